"""The content hash is keras_remote's, byte for byte; the snapshot says what was read."""

import errno
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_remote_airflow import Data
from keras_remote_airflow.core.disk.hashing import HashingConfig, take_snapshot
from keras_remote_airflow.core.disk.snapshot import EMPTY_DIRECTORY_HASH
from keras_remote_airflow.core.errors import DataChangedError, InvalidInputError

from . import reference

# Computed by keras-kinetic 0.0.4 itself. Every published dataset is filed under such a name:
# a digest that changes here loses all of them.
DIRECTORIES = {
    "nested": (
        {"train.csv": "t", "sub/eval.csv": "e"},
        "15d41417b45aa09c0450d8955b845bb278f2990728bcc5d919d62309a2c6ebee",
    ),
    "empty": ({}, "9d1ae5a6cdbe837d499a16cb32234ea2d953c60e8e8fdc88f84a3bbe2d629143"),
    "order": (
        {
            "b": "1",
            "a/z": "2",
            "a.txt": "3",
            "a/b/c": "4",
            "B": "5",
            "\u00e9": "6",
            "a-1": "7",
        },
        "9f836e1ab727717bec4df8e5f0873c5a5d39e622134da5f88ea9ff0df295ddc7",
    ),
}


@pytest.mark.parametrize(("files", "digest"), DIRECTORIES.values(), ids=DIRECTORIES)
def test_digest_of_a_known_directory_never_changes(tree, files, digest):
    assert Data(str(tree(files))).content_hash() == digest


def test_digest_of_a_known_file_never_changes(tree):
    path = tree({"config.json": '{"a":1}'}) / "config.json"
    assert (
        Data(str(path)).content_hash()
        == "915c1cc0e2fface2fc152b6d831ef33f937fb56ce777f8d8e22c37c9a96dbc43"
    )


def test_the_reference_of_these_tests_agrees_with_the_known_digests(tree):
    for name, (files, digest) in DIRECTORIES.items():
        assert reference.content_hash(str(tree(files, name))) == digest


def test_trees_that_collide_under_the_one_level_hash_get_different_digests(tree):
    one = tree({"a": "X\0b\0Y"}, "one")
    two = tree({"a": "X", "b": "Y"}, "two")
    assert take_snapshot(str(one)).content_hash != take_snapshot(str(two)).content_hash


def test_a_file_differs_from_the_directory_that_holds_only_it(tree):
    root = tree({"a.txt": "x"})
    assert take_snapshot(str(root)).content_hash != take_snapshot(str(root / "a.txt")).content_hash


def test_a_file_is_hashed_under_its_name_and_a_directory_is_not(tree):
    one, two = tree({"a": "x", "b": "x"}, "one"), tree({"a": "x", "b": "x"}, "two")
    assert take_snapshot(str(one)).content_hash == take_snapshot(str(two)).content_hash
    assert take_snapshot(str(one / "a")).content_hash != take_snapshot(str(one / "b")).content_hash


def test_empty_subdirectories_modes_and_times_are_no_content(tree):
    root = tree({"a": "x"})
    before = take_snapshot(str(root)).content_hash
    (root / "sub" / "deeper").mkdir(parents=True)
    (root / "a").chmod(0o600)
    os.utime(root / "a", (1, 1))
    assert take_snapshot(str(root)).content_hash == before


def test_files_of_every_size_hash_like_the_reference(tree):
    # Around the size at which files go to threads, and enough of them to keep those busy.
    sizes = [0, 1, 128 * 1024 - 1, 128 * 1024, 128 * 1024 + 1, 1024 * 1024, 3 * 1024 * 1024 + 7]
    files = {f"{place}/{size}": bytes([place]) * size for place in range(6) for size in sizes}
    root = tree(files)
    snapshot = take_snapshot(str(root))
    assert snapshot.content_hash == reference.content_hash(str(root))
    assert snapshot.total_bytes == 6 * sum(sizes)
    for file in snapshot.records():
        content = files[file.path]
        assert (file.size, file.crc32c) == (len(content), google_crc32c.value(content)), file.path
        assert file.digest == reference.file_digest(file.path, content), file.path


def test_a_single_large_file_hashes_like_the_reference(tmp_path):
    path = tmp_path / "weights.bin"
    content = os.urandom(5 * 1024 * 1024 + 13)
    path.write_bytes(content)
    snapshot = take_snapshot(str(path))
    assert snapshot.content_hash == reference.content_hash(str(path))
    assert snapshot.record(0).crc32c == google_crc32c.value(content)


def test_snapshot_lists_the_files_in_the_order_of_the_hash(tree):
    root = tree({"b": "1", "a/z": "2", "a.txt": "3", "a/b/c": "4", "B": "5", "é": "6", "a-1": "7"})
    paths = [file.path for file in take_snapshot(str(root)).records()]
    assert paths == ["B", "a-1", "a.txt", "b", "é", "a/z", "a/b/c"]
    assert paths == [relative for relative, _ in reference.files_in_order(str(root))]


def test_crc32c_is_the_castagnoli_one(tmp_path):
    path = tmp_path / "check"
    path.write_bytes(b"123456789")
    [file] = take_snapshot(str(path)).records()
    assert file.crc32c == 0xE3069283  # the check value of RFC 3720, B.4


def test_linked_file_is_read(tree):
    root = tree({"real.txt": "x"}, "linked")
    (root / "link.txt").symlink_to(root / "real.txt")
    plain = tree({"real.txt": "x", "link.txt": "x"}, "plain")
    assert take_snapshot(str(root)).content_hash == take_snapshot(str(plain)).content_hash


def test_linked_directory_is_not_followed_and_the_log_says_so_once(tree, caplog):
    root = tree({"a": "x", "sub/b": "y"})
    before = take_snapshot(str(root)).content_hash
    outside = tree({"secret": "z"}, "outside")
    (root / "shared").symlink_to(outside)
    (root / "sub" / "loop").symlink_to(root)
    with caplog.at_level(logging.WARNING):
        assert take_snapshot(str(root)).content_hash == before
    [record] = caplog.records
    assert "shared" in record.getMessage()
    assert "sub/loop" in record.getMessage()


def test_thousand_linked_directories_make_one_short_line(tree, caplog):
    root = tree({"a": "x"})
    for number in range(1000):
        (root / f"link-{number:04}").symlink_to(root)
    with caplog.at_level(logging.WARNING):
        take_snapshot(str(root))
    [record] = caplog.records
    assert "990 more" in record.getMessage()


def test_link_to_a_directory_is_the_directory_when_it_is_the_data_itself(tree, tmp_path):
    root = tree({"a": "x"})
    (tmp_path / "current").symlink_to(root)
    assert (
        take_snapshot(str(tmp_path / "current")).content_hash
        == take_snapshot(str(root)).content_hash
    )


def test_empty_directories_are_named_in_the_log(tree, caplog):
    root = tree({"a": "x"})
    (root / "sub" / "deeper").mkdir(parents=True)
    with caplog.at_level(logging.INFO):
        take_snapshot(str(root))
    assert "sub/deeper" in caplog.text


def test_times_that_file_systems_keep_are_kept(tree, tmp_path):
    root = tree({str(number): "x" for number in range(4)})
    # 1901 and 2446 are the ends of ext4; nanoseconds since 1970 leave 63 bits in 2262.
    times = [-(2**31), -1, 2**63 // 10**9 + 1, 15_032_385_535]
    for number, seconds in enumerate(times):
        os.utime(root / str(number), (seconds, seconds))
    plain = take_snapshot(str(root))
    indexed = [take_snapshot(str(root), str(tmp_path / "index")) for _ in range(2)]
    for snapshot in (plain, *indexed):
        assert snapshot.content_hash == reference.content_hash(str(root))
        for file in snapshot.records():
            found = os.stat(root / file.path).st_mtime_ns
            assert (file.mtime_ns - found) % 2**64 == 0


# What keeps Python from going over to UTF-8 by itself.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0"}


def test_the_locale_changes_neither_hash_nor_names(tree, tmp_path):
    root = tree({"é": "1", "ü/日本": "2", "a": "3"}, "données")
    (root / "ü" / "leer").mkdir()
    script = """
import json, logging, os, sys
from keras_remote_airflow.core.data import Data
from keras_remote_airflow.core.disk.hashing import take_snapshot
from keras_remote_airflow.core.errors import InvalidInputError
root, index, log = json.loads(sys.argv[1])
assert sys.getfilesystemencoding() != "utf-8"
logging.basicConfig(filename=log, encoding="utf-8", level=logging.INFO)
logging.raiseExceptions = True
snapshot = take_snapshot(Data(root).path, index)
assert all(os.stat(snapshot.local_path(file.path)) for file in snapshot.records())
answer = {"hash": snapshot.content_hash, "names": [file.path for file in snapshot.records()]}
os.mkfifo(snapshot.local_path("\\u00fc/r\\u00f6hre"))
try:
    take_snapshot(Data(root).path)
except InvalidInputError as exc:
    answer["error"] = str(exc)
print(json.dumps(answer))
"""
    arguments = json.dumps([str(root), str(tmp_path / "indéx"), str(tmp_path / "log")])
    done = subprocess.run(
        [sys.executable, "-c", script, arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | ASCII,
    )
    assert done.returncode == 0, done.stderr
    assert "Logging error" not in done.stderr
    answer = json.loads(done.stdout)
    (root / "ü" / "röhre").unlink()
    assert answer["hash"] == reference.content_hash(str(root))
    assert answer["names"] == ["a", "é", "ü/日本"]
    assert f"{root}/ü/röhre" in answer["error"]
    assert "ü/leer" in (tmp_path / "log").read_text(encoding="utf-8")


def test_empty_directory_hash_is_the_known_one():
    assert DIRECTORIES["empty"][1] == EMPTY_DIRECTORY_HASH


_NAME = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=8
).filter(lambda name: name not in (".", ".."))
_TREES = st.dictionaries(
    st.lists(_NAME, min_size=1, max_size=3).map("/".join), st.binary(max_size=20), max_size=12
)


@given(_TREES)
@settings(max_examples=60, deadline=None)
def test_any_tree_hashes_like_the_reference(files):
    with tempfile.TemporaryDirectory() as folder:
        for relative, content in files.items():
            path = Path(folder, relative)
            # "a" and "a/b" cannot both be files: the first one stays.
            if any(parent.is_file() for parent in path.parents) or path.is_dir():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        assert take_snapshot(folder).content_hash == reference.content_hash(folder)


# Patient enough that waiting for the processor of a busy machine does not count as a slow disk.
PATIENT = HashingConfig(slow_read_seconds=0.002)


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk where opening a file takes 5 ms: tells which threads opened how many at once."""

    class Disk:
        seconds = 0.005
        most = now = 0
        threads: ClassVar[list[str]] = []

    disk, lock, system_open = Disk(), threading.Lock(), os.open

    def slow_open(path, flags, mode=0o777, *, dir_fd=None):
        with lock:
            disk.now += 1
            disk.most = max(disk.most, disk.now)
            disk.threads.append(threading.current_thread().name)
        try:
            if disk.seconds:
                time.sleep(disk.seconds)
            return system_open(path, flags, mode, dir_fd=dir_fd)
        finally:
            with lock:
                disk.now -= 1

    monkeypatch.setattr("keras_remote_airflow.core.disk.hashing.os.open", slow_open)
    return disk


def test_files_that_keep_us_waiting_are_read_many_at_once(tree, slow_disk):
    root = str(tree({f"{n % 3}/{n}": bytes(n) for n in range(400)}))
    assert take_snapshot(root, config=PATIENT).content_hash == reference.content_hash(root)
    assert slow_disk.most > 16


def test_files_that_do_not_are_read_one_by_one(tree, slow_disk):
    slow_disk.seconds = 0
    take_snapshot(str(tree({f"{n % 3}/{n}": bytes(n) for n in range(400)})), config=PATIENT)
    assert set(slow_disk.threads) == {threading.current_thread().name}


def test_reading_many_at_once_ends_when_the_disk_has_become_fast(tree, slow_disk, monkeypatch):
    opened = slow_disk.threads

    def heal(name, **kept):
        slow_disk.seconds = 0 if len(opened) > 60 else slow_disk.seconds
        return sha256(name, **kept)

    sha256 = hashlib.sha256
    monkeypatch.setattr("keras_remote_airflow.core.disk.hashing.hashlib.sha256", heal)
    opened.clear()
    config = replace(PATIENT, files_by_threads=50)
    take_snapshot(str(tree({str(n): bytes(n) for n in range(400)})), config=config)
    assert len(set(opened)) > 2
    assert set(opened[-200:]) == {threading.current_thread().name}


def test_what_has_taken_a_files_place_is_a_change_with_its_full_path(tree, monkeypatch):
    root = tree({})
    # Listed as a file, and opened when it is a link to itself.
    monkeypatch.setattr("keras_remote_airflow.core.disk.hashing.walk", lambda *_: [(b"", [b"b"])])
    (root / "b").symlink_to("b")
    with pytest.raises(DataChangedError, match=f"vanished.*{re.escape(str(root))}/b"):
        take_snapshot(str(root))


def test_an_error_of_the_disk_names_the_full_path(tree, monkeypatch):
    root = tree({"sub/data.csv": b"1"})
    system_open = os.open

    def failing(path, *arguments, **options):
        if path == b"data.csv":
            raise OSError(errno.EIO, "Input/output error", path)
        return system_open(path, *arguments, **options)

    monkeypatch.setattr("keras_remote_airflow.core.disk.hashing.os.open", failing)
    with pytest.raises(OSError, match=re.escape(f"Input/output error: '{root}/sub/data.csv'")):
        take_snapshot(str(root))


def test_a_file_that_grows_as_fast_as_it_is_read_is_not_read_without_end(tmp_path, monkeypatch):
    path = tmp_path / "growing"
    path.write_bytes(bytes(2 << 20))
    read = []

    def growing(descriptor, size):
        read.append(size)
        return bytes(size)

    monkeypatch.setattr("keras_remote_airflow.core.disk.hashing.os.read", growing)
    with pytest.raises(DataChangedError, match=r"changed.*growing"):
        take_snapshot(str(path))
    assert sum(read) < 4 << 20


def test_of_names_that_are_not_utf8_the_right_one_is_told(tmp_path):
    root = os.path.join(os.fsencode(tmp_path), b"\xff")
    os.mkdir(root)
    for name in (b"a", b"b\xff"):
        with open(os.path.join(root, name), "wb"):
            pass
    with pytest.raises(InvalidInputError, match=r"b\\xff'"):
        take_snapshot(os.fsdecode(root))


@pytest.mark.parametrize("waiting", [False, True], ids=["in memory", "on a slow disk"])
def test_few_descriptors_are_enough(tmp_path, waiting):
    for n in range(300):
        (tmp_path / str(n)).write_bytes(bytes([n % 256]) * n)
    script = (
        "import sys\n"
        "from resource import RLIMIT_NOFILE, getrlimit, setrlimit\n"
        "from keras_remote_airflow.core.disk.hashing import HashingConfig, take_snapshot\n"
        f"config = HashingConfig(slow_read_seconds={-1 if waiting else 1})\n"
        f"setrlimit(RLIMIT_NOFILE, ({48 if waiting else 40}, getrlimit(RLIMIT_NOFILE)[1]))\n"
        "print(take_snapshot(sys.argv[1], config=config).content_hash)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == take_snapshot(str(tmp_path)).content_hash, done.stderr
