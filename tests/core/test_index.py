"""The hash index saves reads and never changes a hash."""

import logging
import mmap
import multiprocessing
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import tracemalloc
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from keras_remote_airflow.core.data import Data
from keras_remote_airflow.core.disk.hashing import HashingConfig, take_snapshot
from keras_remote_airflow.core.disk.index import APPLICATION_ID, FORMAT_VERSION, HashIndex
from keras_remote_airflow.core.disk.snapshot import Snapshot
from keras_remote_airflow.core.errors import InvalidInputError

LONG_AGO = 1_600_000_000
# Nobody can set a file's ctime. With this, files count as old although theirs is now.
SETTLED = HashingConfig(index_settle_seconds=-1000, index_timeout_seconds=0)


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


def _hash(root: Path, index: str | None = None) -> str:
    return take_snapshot(str(root), index, config=SETTLED).content_hash


def _opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that names every file opened from now on."""
    opened: list[str] = []
    system_open = os.open

    def note(path: str, flags: int, *args: int, **kwargs: int) -> int:
        opened.append(os.path.basename(os.fsdecode(path)))
        return system_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", note)
    return opened


def _recorded(index: str) -> dict[str, int]:
    """Return how many files the index knows of each root."""
    with closing(sqlite3.connect(index)) as db:
        rows = db.execute("SELECT root, sum(length(files)) / 44 FROM blocks GROUP BY root")
        return {os.fsdecode(root): files for root, files in rows}


def _schema(index: str) -> str:
    with closing(sqlite3.connect(index)) as db:
        return cast(str, db.execute("SELECT sql FROM sqlite_master").fetchone()[0])


MANY = 50_000


def _fill(index: str | None, root: Path) -> None:
    """Look up many files and record them, as `take_snapshot` does."""
    state = os.stat(__file__)
    table = HashIndex(index, str(root), 1 << 62, 0) if index else None
    with closing(table) if table else nullcontext():
        snapshot = Snapshot(str(root), True, table.stamp if table else None)
        for first in range(0, MANY, 1000):
            folder, indices = b"part-%04d/" % first, range(first, first + 1000)
            names = [b"%07d.txt" % n for n in indices]
            snapshot.add_names([folder + name for name in names])
            snapshot.fill(indices, [state] * 1000, array("I", indices), os.urandom(32_000))
            if table:
                table.look_up(folder, names, array("q", [table.stamp(os.stat(root))]) * 1000)
        if table:
            table.save(snapshot)


def test_unchanged_files_are_not_opened_again(tree, index, monkeypatch):
    plain = take_snapshot(str(tree))
    _hash(tree, index)
    opened = _opened(monkeypatch)
    again = take_snapshot(str(tree), index, config=SETTLED)
    assert not set(opened) & {"a", "c", "d", "é"}
    assert again.content_hash == plain.content_hash
    assert list(again.records()) == list(plain.records())


def test_a_single_file_has_an_index_too(tree, index, monkeypatch):
    expected = _hash(tree / "b" / "c", index)
    opened = _opened(monkeypatch)
    assert _hash(tree / "b" / "c", index) == expected
    assert "c" not in opened


def test_only_what_is_new_is_read_wherever_it_is_and_whatever_is_gone(tmp_path, index, monkeypatch):
    root = tmp_path / "data"
    old = ["B", "a", "a-/m", "a.txt", "a/k", "a/k.d/p", "a/l/q", "z", "é/f", "😀"]
    gone = ["c", "a/0", "a/l/z", "b/whole/folder", "zz"]
    for name in [*old, *gone]:
        _write(root / name.replace("a/", "a.d/"), name.encode())
    _hash(root, index)
    for name in gone:
        (root / name.replace("a/", "a.d/")).unlink()
    new = ["0new", "a-/new1", "a.d/new2", "a.d/l/new3", "b/new4", "new5", "é/new6", "\uffee"]
    for name in new:
        _write(root / name, b"new")
    expected = _hash(root)
    opened = _opened(monkeypatch)
    assert _hash(root, index) == expected
    files = {os.path.basename(name) for name in [*old, *new]}
    assert {name for name in opened if name in files} == {os.path.basename(n) for n in new}


@pytest.mark.slow
def test_only_what_is_new_is_read_where_a_root_has_many_blocks(tmp_path, index, monkeypatch):
    root = tmp_path / "data"
    for number in range(3300):
        _write(root / f"{number // 900}" / f"{number:04}", b"%d" % number)
    _hash(root, index)
    opened = _opened(monkeypatch)
    assert _hash(root, index) == _hash(root)
    assert len([name for name in opened if name.isdigit() and len(name) == 4]) == 3300
    # Gone: a file, a folder, whole blocks in the midst of a folder; new: one file everywhere.
    shutil.rmtree(root / "1")
    for number in (0, *range(1850, 2690), 3299):
        (root / f"{number // 900}" / f"{number:04}").unlink()
    new = {f"{number:04}_" for number in (0, 899, 1810, 2699, 2750, 3100, 3299)}
    for name in new:
        _write(root / f"{int(name[:4]) // 900}" / name, name.encode())
    expected = _hash(root)
    opened.clear()
    assert _hash(root, index) == expected
    assert {name for name in opened if len(name) > 3 and name[0].isdigit()} == new
    assert _recorded(index) == {str(root): sum(len(files) for *_, files in os.walk(root))}


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
def test_a_changed_tree_gets_its_true_hash(tree, index, change):
    _hash(tree, index)
    change(tree)
    expected = _hash(tree)
    assert _hash(tree, index) == expected
    assert _hash(tree, index) == expected


@pytest.mark.parametrize("part", range(5), ids=["size", "mtime", "ctime", "inode", "device"])
def test_each_part_of_a_files_state_counts(tmp_path, index, part):
    root = tmp_path / "data"
    _write(root / "a", b"1")
    snapshot = take_snapshot(str(root), index, config=SETTLED)
    state = os.stat(root / "a")
    values = {
        name: getattr(state, name)
        for name in ("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino", "st_dev")
    }

    def stamps(values: dict[str, int]) -> "array[int]":
        return array("q", [table.stamp(cast(os.stat_result, SimpleNamespace(**values)))])

    changed = values | {list(values)[part]: list(values.values())[part] + 1}
    with closing(HashIndex(index, str(root), 1 << 62, 0)) as table:
        assert list(table.look_up(b"", [b"a"], stamps(changed))[0]) == []
        known, [crc32c], digest = table.look_up(b"", [b"a"], stamps(values))
    assert (list(known), crc32c, digest) == ([0], *snapshot.record(0)[2:4])


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """A file whose next change through mmap does not show in its times, unless written back."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        pages[0] = 1
        os.fsync(file.fileno())
        before = os.stat(path).st_mtime_ns
        pages[0] = 2
        if os.stat(path).st_mtime_ns == before:
            pytest.skip("this file system keeps no times of changes through mmap")
        yield pages


@pytest.mark.parametrize("size", [10, 300_000], ids=["small", "large"])
def test_a_change_through_mmap_is_seen(tree, index, size):
    _write(tree / "b/c", bytes(size))
    with _mapped(tree / "b/c") as pages:
        _hash(tree, index)
        pages[0] = 3
        assert _hash(tree, index) == _hash(tree)


def test_what_others_have_not_yet_written_is_not_waited_for(tree, index, tmp_path):
    # It may be gigabytes, which a slow disk takes minutes to write.
    if not os.major(os.stat(tmp_path).st_dev):  # it may be an overlay, written back as a whole
        pytest.skip(
            "has no disk of its own, and may be an overlay, which is written back as a whole"
        )
    _write(tmp_path / "other", bytes(10))
    with _mapped(tmp_path / "other") as pages:
        before = os.stat(tmp_path / "other").st_mtime_ns
        _hash(tree, index)
        pages[0] = 3
        assert os.stat(tmp_path / "other").st_mtime_ns == before


def test_a_file_modified_just_before_it_was_hashed_is_not_recorded(tree, index, monkeypatch):
    take_snapshot(str(tree), index)
    opened = _opened(monkeypatch)
    take_snapshot(str(tree), index)
    assert {"a", "c", "d", "é"} <= set(opened)


@pytest.mark.parametrize(("later_ns", "is_recorded"), [(0, False), (1, True)])
def test_only_what_was_modified_more_than_two_seconds_ago_is_recorded(
    tree, index, later_ns, is_recorded, monkeypatch
):
    newest = max(os.stat(path).st_ctime_ns for path in tree.rglob("*") if path.is_file())
    clock = SimpleNamespace(time_ns=lambda: newest + 2_000_000_000 + later_ns)
    monkeypatch.setattr("keras_remote_airflow.core.disk.hashing.time", clock)
    take_snapshot(str(tree), index)
    opened = _opened(monkeypatch)
    take_snapshot(str(tree), index)
    assert (not {"a", "c", "d", "é"} & set(opened)) == is_recorded


def _sql(*statements: str):
    def change(path: Path) -> None:
        with closing(sqlite3.connect(path)) as db, db:
            for statement in statements:
                db.execute(statement)

    return change


def _bytes(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def _flip(content: bytes) -> bytes:
    at = content.rindex(b"c\0d")  # in the names of a block
    return content[:at] + b"b" + content[at + 1 :]


def _flip_digest(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        for folder, files in db.execute("SELECT folder, files FROM blocks").fetchall():
            flipped = files[:-1] + bytes([files[-1] ^ 1])
            db.execute("UPDATE blocks SET files = ? WHERE folder = ?", (flipped, folder))


# What has become of an index, and whether the next run replaces it.
DAMAGE = {
    "flipped bit": (_bytes(_flip), True),
    "flipped bit in a digest": (_flip_digest, True),
    "truncated": (_bytes(lambda content: content[:4096]), True),
    "zeros": (_bytes(lambda content: content[:4096] + bytes(len(content) - 4096)), True),
    "another table": (_sql("DROP TABLE blocks", "CREATE TABLE blocks (root)"), True),
    "no table": (_sql("DROP TABLE blocks"), True),
    "text": (_sql("UPDATE blocks SET files = 'text'"), True),
    "nothing": (_sql("UPDATE blocks SET names = NULL"), True),
    "newer format": (_sql("PRAGMA user_version = 2"), False),
    "other program": (_sql("PRAGMA application_id = 1"), False),
    "no database": (
        _bytes(lambda content: b"not an index at all, but long enough to be one"),
        False,
    ),
    "old format": (_bytes(lambda content: b"KRAINDEX" + bytes(9999)), False),
    "short": (_bytes(lambda content: b"S"), False),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_an_unusable_index_is_ignored_with_one_line(tree, index, case, caplog):
    damage, is_replaced = DAMAGE[case]
    expected = _hash(tree, index)
    path = Path(index)
    damage(path)
    damaged = path.read_bytes()
    assert _hash(tree, index) == expected
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(rf"hash index is ignored .*{index}", record.getMessage())
    caplog.clear()
    assert _hash(tree, index) == expected
    assert len(caplog.records) == (0 if is_replaced else 1)
    assert (path.read_bytes() == damaged) == (not is_replaced)


def test_a_directory_or_fifo_is_no_index(tree, tmp_path, caplog):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("folder", "fifo"):
        caplog.clear()
        assert _hash(tree, str(tmp_path / name)) == _hash(tree)
        assert len(caplog.records) == 1
        assert "it is not a file" in caplog.text
    assert os.listdir(tmp_path / "folder") == []


def test_an_empty_file_becomes_an_index(tree, index, caplog):
    # Another process that is about to write its index has just created it.
    os.makedirs(os.path.dirname(index))
    Path(index).touch()
    _hash(tree, index)
    assert _recorded(index) == {str(tree): 4}
    assert not caplog.records


@pytest.mark.parametrize("content", [b"precious\n", b"x" * 1000, b"KRAINDEX\x02" + bytes(99)])
def test_a_file_that_is_no_index_of_ours_is_never_written_to(tree, tmp_path, content):
    path = tmp_path / "precious"
    path.write_bytes(content)
    _hash(tree, str(path))
    assert path.read_bytes() == content


def test_a_database_of_another_program_is_not_even_repaired(tree, tmp_path):
    # A hot journal: whoever opens the database next is to undo a half-written transaction.
    path = tmp_path / "precious"
    script = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("CREATE TABLE precious (content)")
db.execute("PRAGMA cache_size = 1")
db.execute("BEGIN")
for _ in range(100):
    db.execute("INSERT INTO precious VALUES (randomblob(4000))")
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=60)
    before = {file.name: file.read_bytes() for file in tmp_path.glob("precious*")}
    assert len(before) == 2
    _hash(tree, str(path))
    assert {file.name: file.read_bytes() for file in tmp_path.glob("precious*")} == before


def test_what_a_killed_process_wrote_is_undone(tree, index):
    expected = _hash(tree, index)
    script = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")
db.execute("BEGIN")
db.execute("UPDATE blocks SET files = randomblob(400000)")
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script, index], check=True, timeout=60)
    assert os.path.exists(f"{index}-journal")
    assert _hash(tree, index) == expected
    assert not os.path.exists(f"{index}-journal")
    assert _recorded(index) == {str(tree): 4}


@pytest.mark.parametrize("moment", ["first", "second"])
def test_what_a_process_left_that_was_killed_as_it_wrote_the_first_index_is_replaced(
    tree, index, moment, caplog
):
    _hash(tree, index)
    create = f"""
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")
db.execute("BEGIN IMMEDIATE")
db.execute("PRAGMA application_id = {APPLICATION_ID}")
db.execute("PRAGMA user_version = {FORMAT_VERSION}")
db.execute({_schema(index)!r})
if sys.argv[2] == "second":
    db.execute("COMMIT")
    db.execute("BEGIN IMMEDIATE")
    for number in range(100):
        db.execute("INSERT INTO blocks VALUES (1, 2, ?, 4, 5, randomblob(4000))", [number])
os._exit(0)
"""
    os.unlink(index)
    subprocess.run([sys.executable, "-c", create, index, moment], check=True, timeout=60)
    assert moment == "first" or os.path.exists(f"{index}-journal")
    _hash(tree, index)
    assert _recorded(index) == {str(tree): 4}
    assert not caplog.records


@pytest.mark.parametrize("name", ["index", "b/index", "a"])
def test_an_index_inside_its_own_data_is_refused(tree, name):
    with pytest.raises(InvalidInputError, match="inside the data"):
        take_snapshot(str(tree), str(tree / name))


def test_an_index_that_a_link_leads_into_the_data_is_refused(tree, tmp_path):
    (tmp_path / "link").symlink_to(tree)
    for data, index in ((tree, tmp_path / "link" / "index"), (tmp_path / "link", tree / "index")):
        with pytest.raises(InvalidInputError, match="inside the data"):
            take_snapshot(str(data), str(index))


def test_an_index_that_a_mount_leads_into_the_data_is_refused(tree, tmp_path):
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    script = f"""
from keras_remote_airflow.core.disk.hashing import take_snapshot
from keras_remote_airflow.core.errors import InvalidInputError
for data, index in (("{tree}", "{mounted}/new/index"), ("{mounted}", "{tree}/b/index")):
    try:
        take_snapshot(data, index)
    except InvalidInputError as exc:
        print(exc)
"""
    for source in (tree, tree / "b"):
        shell = f'mount --bind {source} {mounted} && exec "$0" -c "$1"'
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", shell, sys.executable, script],
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            pytest.skip("mounting is not allowed here")
        assert done.stdout.count("inside the data") == 2


def test_an_index_can_be_a_link(tree, tmp_path, index, monkeypatch):
    (tmp_path / "link").symlink_to(index)
    os.makedirs(os.path.dirname(index))
    _hash(tree, str(tmp_path / "link"))
    assert _recorded(index) == {str(tree): 4}
    _sql("DROP TABLE blocks")(index)
    _hash(tree, str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert _recorded(index) == {str(tree): 4}


@pytest.mark.parametrize("name", ["a?b#c%41", "dïr/ä", os.fsdecode(b"\xff")])
def test_an_index_and_its_data_can_have_any_name(tmp_path, name):
    root, index = tmp_path / "roots" / name, tmp_path / "indices" / name
    _write(root / "file", b"x")
    _hash(root, str(index))
    assert index.is_file()
    assert _recorded(str(index)) == {str(root): 1}


def test_an_index_is_for_its_owner_alone(tree, index):
    _hash(tree, index)
    assert os.stat(index).st_mode & 0o777 == 0o600


@pytest.mark.parametrize("lock", ["IMMEDIATE", "EXCLUSIVE"])
def test_a_locked_index_is_left_alone_with_one_line(tree, index, caplog, lock):
    expected = _hash(tree, index)
    _write(tree / "new", b"n")
    with closing(sqlite3.connect(index, isolation_level=None)) as db:
        db.execute(f"BEGIN {lock}")
        assert _hash(tree, index) != expected
        [record] = caplog.records
        assert "locked" in record.getMessage()
    assert _recorded(index) == {str(tree): 4}


def test_an_index_that_is_read_can_be_written_by_another_process(tree, index):
    _hash(tree, index)
    with closing(HashIndex(index, str(tree), 1 << 62, 0)) as table:
        stamps = array("q", [table.stamp(os.stat(tree / "b/c"))])
        assert list(table.look_up(b"b/", [b"c"], stamps)[0]) == [0]
        _write(tree / "new", b"n")
        _hash(tree, index)
        assert list(table.look_up(b"b/", [b"c"], stamps)[0]) == [0]
    assert _recorded(index) == {str(tree): 5}


def test_an_index_that_cannot_be_written_is_one_line(tree, tmp_path, caplog):
    (tmp_path / "file").touch()
    _hash(tree, str(tmp_path / "file" / "index"))
    [record] = caplog.records
    assert "could not be written" in record.getMessage()


def test_an_index_that_cannot_be_written_is_read_all_the_same():
    # Not tmp_path, which only its owner can enter; and as nobody, since root may write everywhere.
    base = Path(tempfile.mkdtemp())
    index = base / "cache" / "index"
    try:
        base.chmod(0o755)
        for name in ("old", "new"):
            _write(base / "data" / name, name.encode())
            _hash(base / "data", str(index))
            index.chmod(0o444)
            index.parent.chmod(0o555)
        script = """
import ctypes, logging, os, sys
from keras_remote_airflow.core.disk.hashing import HashingConfig, take_snapshot
from keras_remote_airflow.core.disk.index import HashIndex
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
logging.basicConfig(stream=sys.stdout)
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
config = HashingConfig(index_settle_seconds=-1000)
for _ in range(2):
    print(take_snapshot(sys.argv[1], sys.argv[2], config=config).content_hash)
print(*map(opened.count, (b"old", b"new", b"newer")))
"""
        _write(base / "data" / "newer", b"newer")
        done = subprocess.run(
            [sys.executable, "-c", script, str(base / "data"), str(index)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        *lines, opened = done.stdout.splitlines()
        assert [line for line in lines if " " not in line] == [_hash(base / "data")] * 2
        assert len([line for line in lines if "could not be written" in line]) == 2
        assert len(lines) == 4
        assert opened == "0 0 2"
    finally:
        index.parent.chmod(0o755)
        shutil.rmtree(base)


def test_one_index_serves_several_roots_and_forgets_those_that_are_gone(tree, tmp_path, index):
    other = tmp_path / "other"
    _write(other / "x", b"x")
    _hash(tree, index)
    _hash(other, index)
    assert _recorded(index) == {str(tree): 4, str(other): 1}
    shutil.rmtree(other)
    _write(tree / "new", b"n")
    _hash(tree, index)
    assert _recorded(index) == {str(tree): 5}


def test_one_roots_damaged_block_does_not_hurt_another_root(tree, tmp_path, index, caplog):
    other = tmp_path / "other"
    _write(other / "x", b"x")
    for root in (tree, other):
        _hash(root, index)
    _sql(f"UPDATE blocks SET crc32c = 1 WHERE root = CAST('{tree}' AS BLOB)")(index)
    _hash(other, index)
    assert not caplog.records
    _hash(tree, index)
    assert len(caplog.records) == 1
    assert _recorded(index) == {str(tree): 4}  # a damaged index is replaced as a whole


@pytest.mark.slow
def test_processes_share_an_index(tmp_path, index):
    roots = [tmp_path / f"root{number}" for number in range(6)]
    for number, root in enumerate(roots):
        _write(root / "x", b"x" * number)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        hashes = pool.starmap(_hash_patiently, [(str(root), index) for root in roots * 5])
    assert hashes == [_hash(root) for root in roots] * 5
    assert _recorded(index) == {str(root): 1 for root in roots}


def _hash_patiently(root: str, index: str) -> str:
    config = HashingConfig(index_settle_seconds=-1000, index_timeout_seconds=60)
    return take_snapshot(root, index, config=config).content_hash


def test_the_format_is_the_documented_one(tree, index):
    take_snapshot(str(tree), index, config=SETTLED)
    with closing(sqlite3.connect(index)) as db:
        assert db.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        assert db.execute("PRAGMA user_version").fetchone() == (FORMAT_VERSION,)
        rows = db.execute("SELECT root, folder, last, names, files FROM blocks").fetchall()
    assert [row[:4] for row in rows] == [
        (os.fsencode(tree), b"", "é".encode(), "a\0é".encode()),
        (os.fsencode(tree), b"b/", b"d", b"c\0d"),
    ]
    records = {record.path: record for record in take_snapshot(str(tree)).records()}
    for _, folder, _, names, files in rows:
        count = len(names.split(b"\0"))
        crcs, digests = 8 * count, 12 * count
        for at, name in enumerate((folder + name).decode() for name in names.split(b"\0")):
            state = os.stat(tree / name)
            times = state.st_mtime_ns, state.st_ctime_ns
            stamp = hash((state.st_size, *times, state.st_ino, state.st_dev))
            assert array("q", files[:crcs])[at] == stamp
            assert array("I", files[crcs:digests])[at] == records[name].crc32c
            assert files[digests:][32 * at : 32 * at + 32] == records[name].digest


@pytest.mark.slow
def test_an_index_takes_at_most_200_bytes_a_file(tmp_path, index):
    for name in ("gone", "here", "there"):
        (tmp_path / name).mkdir()
        _fill(index, tmp_path / name)
        if name == "gone":
            (tmp_path / name).rmdir()
    assert os.path.getsize(index) < 200 * 2 * MANY
    assert _recorded(index) == {str(tmp_path / name): MANY for name in ("here", "there")}


@pytest.mark.parametrize("known", [False, True], ids=["nothing is known", "all has changed"])
@pytest.mark.slow
def test_memory_beside_the_snapshot_is_at_most_20_mib_for_a_million_files(tmp_path, index, known):
    (tmp_path / "data").mkdir()
    if known:
        _fill(index, tmp_path / "data")
    peaks = []
    for path in (None, index):
        tracemalloc.start()
        _fill(path, tmp_path / "data")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 16 MiB for a million files, and some blocks; SQLite's cache has 2 MiB.
    assert peaks[1] - peaks[0] < 17 * MANY + (3 << 19)
