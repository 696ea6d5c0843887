"""Break each guarantee on purpose, in a copy of the package, and see which tests notice.

    python tests/faults/mutate.py [name ...]

Prints, for each mutation, the first test that failed. Exits with 1 if one went unnoticed.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# Name: (file in the package, text, what to put in its place, tests that should notice).
MUTATIONS = {
    "marker first": (
        "core/datasets/upload.py",
        "    missing = _missing_from_random_start(store, key, snapshot)\n    _log",
        "    store.create(key.marker_name, b'')\n"
        "    missing = _missing_from_random_start(store, key, snapshot)\n    _log",
        "test_crash.py::test_killed_after_each_request",
    ),
    "no precondition": (
        "core/cloud/gcs.py",
        '{"ifGenerationMatch": 0, "fields"',
        '{"fields"',
        "test_create_only.py",
    ),
    "no CRC32C declared": (
        "core/cloud/gcs.py",
        '        "crc32c": encode_crc32c(file.crc32c),\n',
        "",
        "test_hashed_bytes.py",
    ),
    "no size or mtime check": (
        "core/cloud/transfer.py",
        "        now = os.fstat(self._descriptor)\n",
        "        return\n        now = os.fstat(self._descriptor)\n",
        "test_hashed_bytes.py",
    ),
    "412 always accepted": (
        "core/cloud/gcs.py",
        "            if there and there.holds(file.size, file.crc32c, file.digest):\n",
        "            if True:\n",
        "test_create_only.py",
    ),
    "answer of an insert not compared": (
        "core/cloud/gcs.py",
        "            there = _comparable(file.name, body) if status != 412 else None\n",
        "            if status != 412:\n                return True\n            there = None\n",
        "test_answers.py",
    ),
    "unknown checksum taken for the right one": (
        "core/cloud/store.py",
        "return True if self.digest == digest.hex() else None",
        "return True",
        "test_answers.py",
    ),
    "403 is a miss": (
        "core/cloud/gcs.py",
        'self._object(name, alt="media"),\n                expected=(200, 404)',
        'self._object(name, alt="media"),\n                expected=(200, 403, 404)',
        "test_wire.py",
    ),
    "hit without a listing": (
        "core/datasets/lookup.py",
        "    if token is None and (files, size) != expected:\n",
        "    if False:\n",
        "test_hit.py",
    ),
    "marker's body not read": (
        "core/datasets/lookup.py",
        "    receipt = parse_marker(body, key)\n    files",
        "    receipt = None\n    files",
        "test_hit.py",
    ),
    "everything sent again": (
        "core/datasets/upload.py",
        '    missing = array("Q", missing_files(store, key, snapshot))\n',
        '    missing = array("Q", range(len(snapshot)))\n',
        "test_crash.py",
    ),
    "download not verified": (
        "core/datasets/materialize.py",
        "        problem = source.problem(",
        "        problem = None and source.problem(",
        "test_read_back.py",
    ),
    "unsafe names taken": (
        "core/layout.py",
        "    if not is_unsafe and longest",
        "    if longest",
        "test_read_back.py",
    ),
    "leftovers not swept": (
        "core/disk/partial.py",
        "        for name in os.listdir(directory):\n",
        "        for name in ():\n",
        "test_read_back.py",
    ),
    "no lock": (
        "core/disk/partial.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "test_read_back.py",
    ),
    "nothing retried": (
        "core/cloud/retry.py",
        "if now + pause - first_failure > self._policy.deadline:",
        "if True:",
        "test_wire.py",
    ),
    "sessions restarted": (
        "core/cloud/gcs.py",
        "                if session is None:\n                    session = await",
        "                if True:\n                    session = await",
        "test_crash.py",
    ),
    "no bound on bytes in flight": (
        "core/cloud/limiter.py",
        "not self._requests or self._bytes + size <= self._max_bytes",
        "True",
        "test_bounds.py",
    ),
    "no watch over sending": (
        "core/cloud/transport.py",
        "self._stall_timeout = policy.stall_timeout",
        "self._stall_timeout = 3600.0",
        "test_tap.py",
    ),
    "what is slow taken for stalled": (
        "core/cloud/transport.py",
        "if until < now + self._stall_timeout:",
        "if False:",
        "test_tap.py",
    ),
    "session URL told": (
        "core/cloud/retry.py",
        '    return re.sub(r"\\?[^\\s\'\\"]+", "?…", text)\n',
        "    return text\n",
        "test_tap.py",
    ),
    "hash index trusted too soon": (
        "core/disk/index.py",
        "        if max(state.st_mtime_ns, state.st_ctime_ns) >= self._settled_ns:\n",
        "        if False:\n",
        "../core/test_index.py",
    ),
    "hash index blind for ctime": (
        "core/disk/index.py",
        "state.st_mtime_ns, state.st_ctime_ns, state.st_ino",
        "state.st_mtime_ns, state.st_mtime_ns, state.st_ino",
        "../core/test_index.py",
    ),
    "hash index blind for damage": (
        "core/disk/index.py",
        "            if crc32c != _crc32c(self._root, folder, joined, files):\n",
        "            if False:\n",
        "../core/test_index.py",
    ),
    "files not accounted for": (
        "core/datasets/upload.py",
        "            if lost := [",
        "            if False and [",
        "../core/test_cache_logic.py",
    ),
    "cancelled transfers are done": (
        "core/cloud/retry.py",
        "            if task is None or task.cancelling():\n",
        "            if True:\n",
        "test_wire.py",
    ),
    "no bound on descriptors": (
        "core/cloud/transport.py",
        "limiter or Limiter(_most_requests(), _MAX_BYTES)",
        "limiter or Limiter(MAX_REQUESTS, _MAX_BYTES)",
        "test_bounds.py::test_few_descriptors_slow_a_round_trip_down_and_do_not_end_it",
    ),
    "another user's directory used": (
        "core/disk/partial.py",
        "not (is_new or _is_private(descriptor)):",
        "False:",
        "../core/test_destination.py",
    ),
    "replaced without a record": (
        "core/datasets/materialize.py",
        "        if not content_hash or content_hash not in records:\n",
        "        if False:\n",
        "../core/test_materialize.py",
    ),
    "last change before an exchange removed": (
        "core/datasets/materialize.py",
        "tree_state(whole) != state",
        "False",
        "../core/test_materialize.py",
    ),
    "copy in use removed": (
        "core/disk/cache.py",
        "_lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "_lock(path, fcntl.LOCK_SH)",
        "../core/test_cache.py",
    ),
    "hash index blind for mmap": (
        "core/disk/index.py",
        "        if state.st_dev in self._written_back or not self.stamp(state):\n",
        "        if True:\n",
        "../core/test_index.py",
    ),
    "a dead mount taken for a missing path": (
        "core/disk/tree.py",
        "    if error.errno in ABSENT:\n",
        "    if True:\n",
        "../core/test_data.py",
    ),
    "uploaders in step": (
        "core/datasets/upload.py",
        " and found_there <= len(snapshot) // _PAGE_OBJECTS:",
        ":",
        "../core/test_cache_logic.py",
    ),
}


def main() -> int:
    chosen = sys.argv[1:] or list(MUTATIONS)
    unnoticed = 0
    for name in chosen:
        file, before, after, tests = MUTATIONS[name]
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder)
            for part in ("keras_remote_airflow", "tests"):
                shutil.copytree(REPOSITORY / part, copy / part)
            shutil.copy(REPOSITORY / "pyproject.toml", copy)
            source = (copy / "keras_remote_airflow" / file).read_text()
            if source.count(before) != 1:
                print(f"{name}: {file} has changed; adapt the mutation")  # noqa: T201
                unnoticed += 1
                continue
            (copy / "keras_remote_airflow" / file).write_text(source.replace(before, after))
            noticed = run(copy, tests.split())
        unnoticed += not noticed
        print(f"{name}: {noticed or 'NOT NOTICED'}", flush=True)  # noqa: T201
    return bool(unnoticed)


def run(copy: Path, tests: list[str]) -> str:
    """Return the first test that fails in the copy, or "" if all pass."""
    command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", "--timeout=20"]
    # The copy comes before the installed package.
    environment = os.environ | {"PYTHONPATH": str(copy)}
    process = subprocess.run(
        [*command, "--tb=no", *(f"tests/faults/{test}" for test in tests)],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"^(?:FAILED|ERROR) tests/\w+/(\S+)", process.stdout, re.MULTILINE)
    if found:
        return found[1]
    return "" if process.returncode == 0 else f"died: {process.stdout[-300:]}"


if __name__ == "__main__":
    sys.exit(main())
