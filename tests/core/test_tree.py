"""A tree is walked in the order of the content hash, some files at a time."""

import errno
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_remote_airflow.core.disk.tree import (
    OPEN_FLAGS,
    check_utf8,
    inaccessible,
    open_path,
    single_file,
    walk,
)
from keras_remote_airflow.core.errors import DataChangedError, DataNotFoundError, InvalidInputError

from . import reference


def walked(root: Path) -> list[str]:
    return [(folder + name).decode() for folder, names in walk(str(root), [], []) for name in names]


def test_files_of_a_folder_come_before_its_subfolders(tree):
    root = tree(dict.fromkeys(["b", "a/z", "a.txt", "a/b/c", "B", "é", "a-1", "a-/x"], "x"))
    assert walked(root) == ["B", "a-1", "a.txt", "b", "é", "a/z", "a/b/c", "a-/x"]
    assert walked(root) == [relative for relative, _ in reference.files_in_order(str(root))]


def test_a_large_folder_comes_in_parts(tmp_path):
    for number in range(2500):
        (tmp_path / f"{number:04}").touch()
    parts = [(folder, len(names)) for folder, names in walk(str(tmp_path), [], [])]
    assert parts == [(b"", 1000), (b"", 1000), (b"", 500)]
    assert walked(tmp_path) == [f"{number:04}" for number in range(2500)]


def test_linked_and_empty_folders_are_told_apart_from_the_files(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "c").symlink_to(tmp_path / "a")
    linked, empty = [], []
    assert list(walk(str(tmp_path), linked, empty)) == []
    assert (linked, empty) == ([b"c"], [b"a/b/"])


def walk_order(path: bytes) -> list[tuple[bool, bytes]]:
    """Sorts a folder's files before its subfolders, each by their bytes."""
    *folders, file = path.split(b"/")
    return [*((True, folder) for folder in folders), (False, file)]


_NAMES = st.sampled_from(["a", "b", "a-", "a.b", "A", "é", "\uffee", "😀", "ab"])
_PATHS = st.sets(st.lists(_NAMES, min_size=1, max_size=4).map("/".join), max_size=15)


@given(_PATHS)
@settings(max_examples=60, deadline=None)
def test_paths_sort_as_they_are_walked(paths):
    with tempfile.TemporaryDirectory() as folder:
        for relative in paths:
            path = Path(folder, relative)
            # "a" and "a/b" cannot both be files: the first one stays.
            if any(parent.is_file() for parent in path.parents) or path.is_dir():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        found = [path.encode() for path in walked(Path(folder))]
    assert found == sorted(found, key=walk_order)
    assert len({tuple(walk_order(path)) for path in found}) == len(found)


def test_a_single_file_is_one_in_a_folder_of_its_own(tree):
    assert single_file(str(tree({"sub/a": "x"}) / "sub" / "a")) == (b"", [b"a"])


def test_what_is_no_single_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidInputError, match="FIFO"):
        single_file(str(tmp_path / "fifo"))
    with pytest.raises(InvalidInputError, match="directory"):
        single_file(str(tmp_path))
    with pytest.raises(DataNotFoundError, match="nothing"):
        single_file(str(tmp_path / "nothing"))


def test_names_that_are_not_utf8_are_told():
    check_utf8(b"/data", ["sub/é/a".encode(), "sub/é/ü".encode()])
    with pytest.raises(InvalidInputError, match=r"b'/data/sub/\\xff'"):
        check_utf8(b"/data", [b"sub/a", b"sub/\xff"])


@pytest.mark.parametrize("code", ["ENOENT", "ENOTDIR", "ELOOP", "ENXIO"])
def test_a_path_that_is_gone_or_replaced_is_a_change(code):
    error = inaccessible("/data/x", OSError(getattr(errno, code), "said the system", "x"))
    assert isinstance(error, DataChangedError)
    assert "/data/x" in str(error)


def test_a_path_without_permission_is_bad_input():
    error = inaccessible("/data/x", PermissionError(errno.EACCES, "said the system", "x"))
    assert isinstance(error, InvalidInputError)


@pytest.mark.parametrize("code", ["EIO", "ENOTCONN", "ESTALE", "ETIMEDOUT", "EHOSTDOWN"])
def test_any_other_error_stays_what_it_is_and_names_the_whole_path(code):
    number = getattr(errno, code)
    error = inaccessible("/data/x", OSError(number, "said the system", "x"))
    assert isinstance(error, OSError)
    assert not isinstance(error, InvalidInputError)
    assert (error.errno, error.filename) == (number, "/data/x")


def test_opening_says_the_same(tmp_path):
    with pytest.raises(DataChangedError, match="nothing"):
        open_path(os.fsencode(tmp_path / "nothing"), os.O_RDONLY)


def test_a_file_whose_place_a_fifo_takes_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    os.close(open_path(os.fsencode(tmp_path / "fifo"), OPEN_FLAGS))
