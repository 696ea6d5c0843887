"""The hash index: an optional local file that spares unchanged files from being read again.

It maps what the file system says of a file (path, size, mtime, ctime, inode, device) to the file
digest and CRC32C it had under exactly these. As git's index does, it never records a file that was
modified so shortly before it was hashed that a later change could leave its times as they are.

Use it for data on a local disk, not on mounts whose inode numbers or times change or mean little
(gcsfuse, some NFS and container overlays).

An index only saves time. One that is damaged, locked or of a newer format is ignored, with a line
in the log. A damaged one is replaced by the same run. A file that SQLite does not recognize as a
hash index of this format is never written to. Processes may share an index: each reads a block at
a time, and writes in one transaction.

Format: an SQLite database with application_id 0x4B524958 ("KRIX"), user_version 1 and one table:

    CREATE TABLE blocks (root BLOB, number INTEGER, crc32c INTEGER,
                         paths BLOB, states BLOB, crcs BLOB, digests BLOB,
                         PRIMARY KEY (root, number)) WITHOUT ROWID

A row is a block of up to 1,000 files. The blocks of a root (the absolute path of a dataset) are
numbered from 0 and hold its files in the order of the content hash. Numbers in arrays have the
machine's byte order, since an index is of use only where its inode numbers are.

    crc32c    CRC32C of the other four, one after another
    paths     relative paths in UTF-8, joined by zero bytes
    states    five arrays of 8-byte numbers: size, mtime_ns, ctime_ns, inode, device
    crcs      an array of 4-byte numbers: CRC32C of each file
    digests   file digests, 32 bytes each
"""

import logging
import os
import sqlite3
import stat
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cached_property, reduce
from itertools import chain, count, groupby, islice, repeat
from typing import Self
from urllib.parse import quote

import google_crc32c

from keras_remote_airflow.core.disk.snapshot import Snapshot
from keras_remote_airflow.core.disk.tree import walk_order
from keras_remote_airflow.core.errors import InvalidInputError

_log = logging.getLogger(__name__)

APPLICATION_ID = 0x4B524958
FORMAT_VERSION = 1
_BLOCK_FILES = 1_000
_STATE_TYPES = "QqqQq"  # size, mtime_ns, ctime_ns, inode, device
_SCHEMA = """
    CREATE TABLE blocks (root BLOB, number INTEGER, crc32c INTEGER,
                         paths BLOB, states BLOB, crcs BLOB, digests BLOB,
                         PRIMARY KEY (root, number)) WITHOUT ROWID
"""
# In KiB: blocks are read and written one after another, so more would not help.
_SMALL_CACHE = "PRAGMA cache_size = -512"
_COUNT_FILES = "SELECT total(length(crcs)) / 4 FROM blocks WHERE root = ?"
_READ = "SELECT crc32c, paths, states, crcs, digests FROM blocks WHERE root = ? AND number = ?"
# A block that is stored already is not written again.
_WRITE = """
    INSERT INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT DO UPDATE SET crc32c = excluded.crc32c, paths = excluded.paths,
        states = excluded.states, crcs = excluded.crcs, digests = excluded.digests
    WHERE (crc32c, paths, states, crcs, digests) IS NOT (
        excluded.crc32c, excluded.paths, excluded.states, excluded.crcs, excluded.digests)
"""
# What reading and writing a file of any content may raise.
_FAILURES = (sqlite3.Error, OSError, ValueError, TypeError)


class HashIndex:
    """The part of a hash index that is about one file or directory.

    A context manager around the calls of `look_up`. Only wrong use raises an error: whatever is
    wrong with the file is a warning in the log.

    Args:
        path: the index file; it need not exist yet.
        root: absolute path of the data.
        settled_ns: only files last modified before this time are recorded, in nanoseconds.
        timeout_seconds: how long to wait while another process writes to the file.
    """

    def __init__(self, path: str, root: str, settled_ns: int, timeout_seconds: float) -> None:
        self._path = os.path.abspath(os.path.expanduser(path))
        if any(_is_inside(at(self._path), at(root)) for at in (os.path.abspath, os.path.realpath)):
            raise InvalidInputError(
                f"hash index {self._path} lies in the data that it is about, {root}, and would "
                "change it. Keep it elsewhere."
            )
        self._root = os.fsencode(root)
        self._settled_ns = settled_ns
        self._timeout_seconds = timeout_seconds
        self._may_write = True
        self._is_damaged = False
        self._db: sqlite3.Connection | None = None
        self._blocks: Iterator[_Block] = iter(())
        self._block: _Block | None = None
        self._known_files = self._found_files = 0
        # What `save` needs of every file beside the snapshot. Devices are runs: (device, files).
        self._ctimes = array("q")
        self._inodes = array("Q")
        self._devices: list[tuple[int, int]] = []
        with self._ignoring_failures():
            self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._db is not None:
            self._db.close()

    def look_up(
        self, paths: list[bytes], states: list[os.stat_result]
    ) -> tuple[list[int], "array[int]", bytes]:
        """Find files that are known and unchanged. Ask for all, in the order of the content hash.

        Args:
            paths: of files in one folder, relative to the root, UTF-8.
            states: what the file system says of each now.

        Returns:
            Positions of the files found, their CRC32Cs, and their file digests one after another.
        """
        rows = [(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev) for s in states]
        columns = [array(*c) for c in zip(_STATE_TYPES, zip(*rows, strict=True), strict=True)]
        self._ctimes.extend(columns[2])
        self._inodes.extend(columns[3])
        self._devices += ((device, len(list(run))) for device, run in groupby(columns[4]))
        known: list[int] = []
        crcs = array("I")
        digests = bytearray()
        start = 0
        with self._ignoring_failures():
            while self._block and start < len(paths):
                block = self._block
                end = block.end(paths, start)
                for positions, rows_found in block.matches(paths, columns, start, end):
                    known.extend(positions)
                    crcs.extend(block.crcs[rows_found])
                    digests += block.digests[32 * rows_found.start : 32 * rows_found.stop]
                start = end
                if start < len(paths):
                    self._block = next(self._blocks, None)
        self._found_files += len(known)
        return known, crcs, bytes(digests)

    def save(self, snapshot: Snapshot) -> None:
        """Record a snapshot whose every file was asked for, if anything is new."""
        if not self._may_write or self._found_files == len(snapshot) == self._known_files:
            return
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            if self._is_damaged:
                self._remove()
            with suppress(FileExistsError):  # only for this user: file names can be private
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            with closing(self._connect("rwc")) as db:
                db.execute(_SMALL_CACHE)
                # The file shrinks when roots are forgotten. This has to precede the first table.
                db.execute("PRAGMA auto_vacuum = FULL")
                with db:
                    db.execute("BEGIN IMMEDIATE")
                    self._write(db, snapshot)
        except _FAILURES as exc:
            _log.warning("Hash index %s could not be written: %s", self._path, exc)

    @contextmanager
    def _ignoring_failures(self) -> Iterator[None]:
        """Take the index for empty from here on if it cannot be read."""
        try:
            yield
        except _FAILURES as exc:
            self._block, self._blocks = None, iter(())
            # A hash index with wrong content is replaced. Other files are left alone, and so is an
            # index that is locked or cannot be read just now.
            code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            is_wrong = code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR)
            self._may_write = self._is_damaged = self._db is not None and is_wrong
            hint = ". It is left alone: delete it, or name another file" if self._db is None else ""
            _log.warning("Hash index %s is ignored: %s%s", self._path, exc, hint)

    def _open(self) -> None:
        try:
            state = os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return
        # SQLite takes a file of one byte for an empty one.
        if not stat.S_ISREG(state.st_mode) or state.st_size == 1:
            raise ValueError("it is not a database")
        # Immutable: SQLite neither locks a file that may not be ours, nor repairs it.
        with closing(self._connect("ro&immutable=1")) as db:
            if not _is_index(db):
                return
        # Reading needs no right to write, but after a crash SQLite has to undo what was half done.
        self._db = self._connect("rw")
        self._db.execute(_SMALL_CACHE)
        [[self._known_files]] = self._db.execute(_COUNT_FILES, [self._root]).fetchall()
        self._blocks = self._read(self._db)
        self._block = next(self._blocks, None)

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"file:{quote(os.fsencode(self._path))}?mode={mode}"
        timeout = self._timeout_seconds
        return sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None)

    def _read(self, db: sqlite3.Connection) -> Iterator["_Block"]:
        # A query for each block, so that other processes can write in between. What they write
        # may begin with other files than expected, and is true nevertheless.
        for number in count():
            rows = db.execute(_READ, (self._root, number)).fetchall()
            if not rows:
                return
            yield _Block(*rows[0])

    def _write(self, db: sqlite3.Connection, snapshot: Snapshot) -> None:
        if not _is_index(db):
            db.execute(_SCHEMA)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        number = -1
        for number, columns in enumerate(self._blocks_of(snapshot)):
            db.execute(_WRITE, (self._root, number, _crc32c(columns), *columns))
        db.execute("DELETE FROM blocks WHERE root = ? AND number > ?", (self._root, number))
        for [root] in db.execute("SELECT DISTINCT root FROM blocks").fetchall():
            if not os.path.exists(root):
                db.execute("DELETE FROM blocks WHERE root = ?", [root])

    def _blocks_of(self, snapshot: Snapshot) -> Iterator[list[bytes]]:
        """Yield paths, states, crcs and digests of the files to be recorded."""
        devices = chain.from_iterable(repeat(device, files) for device, files in self._devices)
        files = zip(snapshot.records(), self._ctimes, self._inodes, devices, strict=True)
        settled = (row for row in files if max(row[0].mtime_ns, row[1]) < self._settled_ns)
        while block := list(islice(settled, _BLOCK_FILES)):
            rows = ((file.size, file.mtime_ns, *state) for file, *state in block)
            columns = zip(_STATE_TYPES, zip(*rows, strict=True), strict=True)
            yield [
                b"\0".join(file.path.encode() for file, *_ in block),
                b"".join(array(*column).tobytes() for column in columns),
                array("I", (file.crc32c for file, *_ in block)).tobytes(),
                b"".join(file.digest for file, *_ in block),
            ]

    def _remove(self) -> None:
        database = os.path.realpath(self._path)
        for path in (database, f"{database}-journal"):
            with suppress(OSError):
                os.unlink(path)


class _Block:
    """Some of the known files, in the order of the content hash."""

    def __init__(self, crc32c: int, *columns: bytes) -> None:
        if _crc32c(columns) != crc32c:
            raise ValueError("a block does not agree with its CRC32C")
        paths, states, crcs, self.digests = columns
        self._paths = paths.split(b"\0")
        self._states = [
            array(code, states[start : start + 8 * len(self._paths)])
            for code, start in zip(_STATE_TYPES, count(0, 8 * len(self._paths)), strict=False)
        ]
        self.crcs = array("I", crcs)
        self._last = walk_order(self._paths[-1])
        self._next = 0

    def end(self, paths: list[bytes], start: int) -> int:
        """Return how far `paths`, from `start` on, are within this block."""
        if walk_order(paths[-1]) <= self._last:
            return len(paths)
        return bisect_right(paths, self._last, start, key=walk_order)

    def matches(
        self, paths: list[bytes], states: list["array[int]"], start: int, end: int
    ) -> Iterator[tuple[range, slice]]:
        """Yield positions from `start` to `end`, and rows here, of files that are unchanged."""
        rows = slice(self._next, self._next + end - start)
        if self._paths[rows] == paths[start:end] and all(
            known[rows] == asked[start:end]
            for known, asked in zip(self._states, states, strict=True)
        ):  # all are as they were, which costs a fraction of looking at them one by one
            self._next = rows.stop
            yield range(start, end), rows
            return
        for position in range(start, end):
            row = self._row_of.get(paths[position])
            if row is not None and all(
                known[row] == asked[position]
                for known, asked in zip(self._states, states, strict=True)
            ):
                self._next = row + 1
                yield range(position, position + 1), slice(row, row + 1)

    @cached_property
    def _row_of(self) -> dict[bytes, int]:
        return {path: row for row, path in enumerate(self._paths)}


def _is_inside(path: str, root: str) -> bool:
    return os.path.commonpath([path, root]) == root


def _is_index(db: sqlite3.Connection) -> bool:
    """Return whether this is a hash index, or an empty database; raise for anything else."""
    [[application_id]] = db.execute("PRAGMA application_id").fetchall()
    [[version]] = db.execute("PRAGMA user_version").fetchall()
    if application_id == APPLICATION_ID and version == FORMAT_VERSION:
        return True
    if application_id == APPLICATION_ID:
        raise ValueError(f"it has user_version {version}, this version reads {FORMAT_VERSION}")
    if application_id or db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall():
        raise ValueError("it is another program's database")
    return False


def _crc32c(columns: Sequence[bytes]) -> int:
    crc32c: int = reduce(google_crc32c.extend, columns, 0)
    return crc32c
