"""The hash index saves reads and never changes a hash."""

import fcntl
import json
import logging
import multiprocessing
import os
import re
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keras_remote_airflow.core.data import Data
from keras_remote_airflow.core.errors import InvalidInputError
from keras_remote_airflow.core.disk.hashing import take_snapshot
from keras_remote_airflow.core.disk.snapshot import FileRecord
from keras_remote_airflow.core.disk.index import HashIndex

LONG_AGO = 1_600_000_000


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name, content in {"a": b"1", "b/c": b"2" * 300_000, "b/d": b"", "é": b"3"}.items():
        _write(root / name, content)
    return root


@pytest.fixture
def index(tmp_path: Path) -> str:
    return str(tmp_path / "cache" / "index")


def _write(path: Path, content: bytes, mtime: float = LONG_AGO) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (mtime, mtime))


def _settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files count as old although their ctime, which nobody can set, is now."""
    monkeypatch.setattr("keras_remote_airflow.core.disk.index._GRANULARITY_NS", -(10**18))


def _reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that names every file opened from now on."""
    opened: list[str] = []
    real = os.open

    def note(path: str, flags: int, *args: int, **kwargs: int) -> int:
        opened.append(os.path.basename(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", note)
    return opened


def test_unchanged_files_are_not_opened_again(tree, index, monkeypatch):
    _settle(monkeypatch)
    plain = take_snapshot(str(tree))
    take_snapshot(str(tree), index)
    opened = _reads(monkeypatch)
    again = take_snapshot(str(tree), index)
    assert not set(opened) & {"a", "c", "d", "é"}
    assert again.content_hash == plain.content_hash
    assert list(again.records()) == list(plain.records())


def test_only_what_is_new_is_read_wherever_it_is_and_whatever_is_gone(tmp_path, index, monkeypatch):
    _settle(monkeypatch)
    root = tmp_path / "data"
    old = ["B", "a", "a-/m", "a.txt", "a/k", "a/k.d/p", "a/l/q", "z", "é/f", "😀"]
    gone = ["c", "a/0", "a/l/z", "b/whole/folder", "zz"]
    for name in [*old, *gone]:
        _write(root / name.replace("a/", "a.d/"), name.encode())
    take_snapshot(str(root), index)
    for name in gone:
        (root / name.replace("a/", "a.d/")).unlink()
    new = ["0new", "a-/new1", "a.d/new2", "a.d/l/new3", "b/new4", "new5", "é/new6", "\uffee"]
    for name in new:
        _write(root / name, b"new")
    opened = _reads(monkeypatch)
    take_snapshot(str(root), index)
    files = {os.path.basename(name) for name in [*old, *new]}
    assert {name for name in opened if name in files} == {os.path.basename(n) for n in new}


class Many(list[FileRecord]):
    """As much of a snapshot as the index looks at."""

    def records(self) -> Iterator[FileRecord]:
        return iter(self)


def _peak(index: str, root: str, snapshot: Many, state: os.stat_result) -> int:
    """Return how many bytes it takes to look up and record a snapshot."""
    names = [file.path.encode() for file in snapshot]
    tracemalloc.start()
    table = HashIndex(index, root)
    for name in names:
        table.get(name, state)
    table.save(snapshot)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_is_bounded_with_a_new_file_and_with_other_roots_beside(
    tmp_path, index, monkeypatch
):
    _settle(monkeypatch)
    state = os.stat(__file__)
    file = FileRecord("", state.st_size, 1, bytes(32), state.st_mtime_ns)
    many = 30_000
    snapshot = Many(file._replace(path=f"{i:020}") for i in range(1, many))
    for number in range(4):
        (tmp_path / f"root{number}").mkdir()
        _peak(index, str(tmp_path / f"root{number}"), snapshot, state)
    snapshot.insert(0, file._replace(path=f"{0:020}"))
    # A row takes 112 bytes and its name; it is there twice, what was known and what is.
    assert _peak(index, str(tmp_path / "root1"), snapshot, state) < 250 * many + (5 << 20)
    assert len(HashIndex(index, str(tmp_path / "root1"))._known) == many
    assert len(HashIndex(index, str(tmp_path / "root3"))._known) == many - 1


def test_the_environment_can_name_the_index(tree, index, monkeypatch):
    monkeypatch.setenv("KERAS_REMOTE_HASH_INDEX", index)
    Data(str(tree)).content_hash()
    assert os.path.exists(index)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: _write(root / "a", b"7"),  # same size, same mtime: only the ctime tells
        lambda root: _write(root / "a", b"11"),
        lambda root: _write(root / "new", b"n"),
        lambda root: (root / "a").unlink(),
        lambda root: (root / "a").rename(root / "z"),
        lambda root: os.replace(root / "é", root / "a"),
    ],
    ids=["rewritten", "longer", "added", "removed", "renamed", "swapped"],
)
def test_a_changed_tree_gets_its_true_hash(tree, index, change, monkeypatch):
    _settle(monkeypatch)
    take_snapshot(str(tree), index)
    change(tree)
    expected = take_snapshot(str(tree)).content_hash
    assert take_snapshot(str(tree), index).content_hash == expected
    assert take_snapshot(str(tree), index).content_hash == expected


def test_a_file_modified_just_before_it_was_hashed_is_not_recorded(tree, index, monkeypatch):
    take_snapshot(str(tree), index)
    opened = _reads(monkeypatch)
    take_snapshot(str(tree), index)
    assert {"a", "c", "d", "é"} <= set(opened)


@pytest.mark.parametrize(("later_ns", "is_recorded"), [(0, False), (1, True)])
def test_only_what_was_modified_more_than_two_seconds_ago_is_recorded(
    tree, index, later_ns, is_recorded, monkeypatch
):
    newest = max(os.stat(path).st_ctime_ns for path in tree.rglob("*") if path.is_file())
    clock = SimpleNamespace(time_ns=lambda: newest + 2_000_000_000 + later_ns)
    monkeypatch.setattr("keras_remote_airflow.core.disk.index.time", clock)
    take_snapshot(str(tree), index)
    opened = _reads(monkeypatch)
    take_snapshot(str(tree), index)
    assert (not {"a", "c", "d", "é"} & set(opened)) == is_recorded


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"not an index at all, but long enough to be one",
        lambda content: content[:-1],
        lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
        lambda content: content[:8] + b"\x02" + content[9:],
        lambda content: content[:16] + b"[" * (len(content) - 16),
        lambda content: re.sub(rb'"length": \d+', b'"length": ' + b"9" * 30, content),
    ],
    ids=[
        "empty",
        "foreign",
        "truncated",
        "flipped bit",
        "newer format",
        "broken header",
        "huge length",
    ],
)
def test_an_unusable_index_is_ignored_with_a_warning(tree, index, damage, monkeypatch, caplog):
    _settle(monkeypatch)
    expected = take_snapshot(str(tree), index).content_hash
    path = Path(index)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert take_snapshot(str(tree), index).content_hash == expected
    assert f"Hash index {index} is ignored" in caplog.text


@pytest.mark.parametrize("content", [b"precious\n", b"x" * 1000, b"KRAINDEX\x02" + bytes(99)])
def test_a_file_that_is_no_index_of_ours_is_never_written_to(tree, tmp_path, content):
    path = tmp_path / "precious"
    path.write_bytes(content)
    take_snapshot(str(tree), str(path))
    assert path.read_bytes() == content


def test_a_lock_file_of_somebody_else_keeps_its_content(tree, index):
    os.makedirs(os.path.dirname(index))
    Path(index + ".lock").write_text("mine")
    take_snapshot(str(tree), index)
    assert Path(index + ".lock").read_text() == "mine"


@pytest.mark.parametrize("name", ["index", "b/index", "a"])
def test_an_index_inside_its_own_data_is_refused(tree, name):
    with pytest.raises(InvalidInputError, match="lies in the data"):
        take_snapshot(str(tree), str(tree / name))


def test_a_locked_index_is_left_alone_with_a_warning(tree, index, caplog):
    os.makedirs(os.path.dirname(index))
    with open(index + ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with caplog.at_level(logging.WARNING):
            take_snapshot(str(tree), index)
    assert "locked by another process" in caplog.text
    assert not os.path.exists(index)


def test_an_index_that_cannot_be_written_is_no_error(tree, tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        take_snapshot(str(tree), str(tmp_path / "file" / "index"))
    assert "could not be written" in caplog.text


def test_one_index_serves_several_roots_and_forgets_those_that_are_gone(
    tree, tmp_path, index, monkeypatch
):
    _settle(monkeypatch)
    other = tmp_path / "other"
    _write(other / "x", b"x")
    take_snapshot(str(tree), index)
    take_snapshot(str(other), index)
    assert len(HashIndex(index, str(tree))._known) == 4
    (other / "x").unlink()
    other.rmdir()
    _write(tree / "new", b"n")
    take_snapshot(str(tree), index)
    assert len(HashIndex(index, str(other))._known) == 0
    assert len(HashIndex(index, str(tree))._known) == 5


def test_processes_share_an_index(tmp_path, index):
    roots = [tmp_path / f"root{number}" for number in range(6)]
    for number, root in enumerate(roots):
        _write(root / "x", b"x" * number)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        hashes = pool.starmap(_hash, [(str(root), index) for root in roots * 5])
    assert hashes == [take_snapshot(str(root)).content_hash for root in roots] * 5


def _hash(root: str, index: str) -> str:
    return take_snapshot(root, index).content_hash


def test_what_another_process_saves_before_the_lock_is_ours_is_kept(tree, index, monkeypatch):
    _settle(monkeypatch)
    other = tree.parent / "other"
    _write(other / "file", b"x")
    take_snapshot(str(tree), index)
    _write(tree / "new", b"y")
    system_flock, meanwhile = fcntl.flock, [lambda: take_snapshot(str(other), index)]

    def flock(file, operation):
        if meanwhile:
            meanwhile.pop()()
        system_flock(file, operation)

    monkeypatch.setattr("keras_remote_airflow.core.disk.index.fcntl.flock", flock)
    take_snapshot(str(tree), index)
    assert {section["root"] for section in _sections(index)} == {str(tree), str(other)}


@pytest.mark.parametrize("length", [1.5, -3, None, True])
def test_a_section_of_no_length_does_not_spoil_the_others_for_good(
    tree, index, monkeypatch, caplog, length
):
    _settle(monkeypatch)
    other = tree.parent / "other"
    _write(other / "file", b"x")
    for root in (other, tree):
        expected = take_snapshot(str(root), index).content_hash
    sections = _sections(index)
    sections[0]["length"] = length
    header = json.dumps({"sections": sections}).encode()
    Path(index).write_bytes(struct.pack("<8sII", b"KRAINDEX", 1, len(header)) + header)
    for _ in range(2):
        caplog.clear()
        assert take_snapshot(str(tree), index).content_hash == expected
    assert "ignored" not in caplog.text


def _sections(index: str) -> list[dict[str, Any]]:
    content = Path(index).read_bytes()
    [length] = struct.unpack_from("<I", content, 12)
    return json.loads(content[16 : 16 + length])["sections"]
