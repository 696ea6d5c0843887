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
        "core/cache.py",
        "    missing = _missing_from_anywhere(store, key, snapshot)\n    _log",
        "    store.create(key.marker_name, b'')\n"
        "    missing = _missing_from_anywhere(store, key, snapshot)\n    _log",
        "test_crash.py::test_killed_after_each_request",
    ),
    "no precondition": (
        "core/store.py",
        '{"ifGenerationMatch": 0, "fields"',
        '{"fields"',
        "test_create_only.py",
    ),
    "no CRC32C declared": (
        "core/store.py",
        '        "crc32c": encode_crc32c(upload.crc32c),\n',
        "",
        "test_hashed_bytes.py",
    ),
    "no size or mtime check": (
        "core/store.py",
        "        now = os.fstat(self._descriptor)\n",
        "        return\n        now = os.fstat(self._descriptor)\n",
        "test_hashed_bytes.py",
    ),
    "412 always accepted": (
        "core/store.py",
        "        if status != 412:\n            return True\n",
        "        return status != 412\n",
        "test_create_only.py",
    ),
    "403 is a miss": (
        "core/store.py",
        '"GET", url, expected=(200, 404)) as response',
        '"GET", url, expected=(200, 403, 404)) as response',
        "test_wire.py",
    ),
    "hit without a listing": (
        "core/cache.py",
        "    if problem:\n        _log.warning",
        "    if False:\n        _log.warning",
        "test_hit.py",
    ),
    "marker's body not read": (
        "core/cache.py",
        "    receipt = parse_marker(body, key)\n    if snapshot",
        "    receipt = None\n    if snapshot",
        "test_hit.py",
    ),
    "everything sent again": (
        "core/cache.py",
        '    missing = array("Q", _missing(store, key, snapshot, only_first_page=False))\n',
        '    missing = array("Q", range(len(snapshot)))\n',
        "test_crash.py",
    ),
    "download not verified": (
        "core/materialize.py",
        "        problem = source.problem(take_snapshot(whole, expected=downloaded))\n",
        "        problem = None\n",
        "test_read_back.py",
    ),
    "unsafe names taken": (
        "core/layout.py",
        "    if _UNSAFE_PATH.search(path):",
        "    if False:",
        "test_read_back.py",
    ),
    "leftovers not swept": (
        "core/materialize.py",
        "            for name in os.listdir(directory):\n",
        "            for name in ():\n",
        "test_read_back.py",
    ),
    "no lock": (
        "core/materialize.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "test_read_back.py",
    ),
    "nothing retried": (
        "core/transport.py",
        "if now + pause - first_failure > self.policy.deadline:",
        "if True:",
        "test_wire.py",
    ),
    "sessions restarted": (
        "core/store.py",
        "                if session is None:\n                    session = await",
        "                if True:\n                    session = await",
        "test_crash.py",
    ),
    "no bound on bytes in flight": (
        "core/transport.py",
        "not self._requests or self._bytes + size <= self._max_bytes",
        "True",
        "test_bounds.py",
    ),
    "no watch over sending": (
        "core/transport.py",
        "                exchange.end()",
        "                pass",
        "test_tap.py",
    ),
    "session URL told": (
        "core/transport.py",
        '    return re.sub(r"\\?[^\\s\'\\"]+", "?…", text)\n',
        "    return text\n",
        "test_tap.py",
    ),
    "hash index trusted too soon": (
        "core/index.py",
        "            if max(file.mtime_ns, ctime) < settled:\n",
        "            if True:\n",
        "../core/test_index.py",
    ),
    "hash index blind for ctime": (
        "core/index.py",
        "            and ctimes[index] == state.st_ctime_ns\n",
        "",
        "../core/test_index.py",
    ),
    "uploaders in step": (
        "core/cache.py",
        "        if found_there > len(snapshot) // _PAGE:",
        "        if False:",
        "test_many.py",
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
