"""The hash index: an optional local file that spares unchanged files from being read again.

For each file it keeps what the file system said (path, size, mtime, ctime, inode, device), and the
file digest and CRC32C that the file had then. Files modified within 2 s before hashing are not
recorded: a later change might not alter their times. (git's index does the same.)

Use it for data on a local disk, not on mounts whose inode numbers or times are not stable (gcsfuse,
some NFS and container overlays).

An index only saves time. One that is damaged, locked or of a newer format is ignored, with a line
in the log. A damaged one is replaced by the same run. A file that SQLite does not recognize as a
hash index of this format is never written to. Processes may share an index: each reads a block at
a time, and writes in one transaction.

Format: an SQLite database with application_id 0x4B524958 ("KRIX"), user_version 1 and one table:

    CREATE TABLE blocks (root BLOB, number INTEGER, crc32c INTEGER, paths BLOB, files BLOB,
                         PRIMARY KEY (root, number)) WITHOUT ROWID

A row is a block of up to 1,000 files. The blocks of a root (the absolute path of a dataset) are
numbered from 0 and hold its files in the order of the content hash. Numbers in `files` have the
machine's byte order, since an index is of use only where its inode numbers are.

    crc32c   CRC32C of paths and files, one after the other
    paths    relative paths in UTF-8, joined by zero bytes
    files    76 bytes each: size, mtime_ns, ctime_ns, inode and device in 8 bytes, CRC32C in 4, and
             the file digest
"""

import logging
import os
import sqlite3
import struct
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import islice
from typing import Self
from urllib.parse import quote

import google_crc32c

from keras_remote_airflow.core.disk.snapshot import Snapshot
from keras_remote_airflow.core.disk.tree import system_path, walk_order
from keras_remote_airflow.core.errors import InvalidInputError, printable

_log = logging.getLogger(__name__)

APPLICATION_ID = 0x4B524958
FORMAT_VERSION = 1
_BLOCK_FILES = 1_000
_64 = (1 << 64) - 1
_STATE = struct.Struct("=QQQQQ")  # size, mtime_ns, ctime_ns, inode, device
_KNOWN = struct.Struct("=I32s")  # CRC32C, digest
_FILE = struct.Struct(f"{_STATE.size}s{_KNOWN.size}s")
# States above this size are kept in a temporary file until they are saved.
_STATES_IN_MEMORY_BYTES = 1 << 20
_SCHEMA = """
    CREATE TABLE blocks (root BLOB, number INTEGER, crc32c INTEGER, paths BLOB, files BLOB,
                         PRIMARY KEY (root, number)) WITHOUT ROWID
"""
_COUNT_FILES = "SELECT total(length(files)) / ? FROM blocks WHERE root = ?"
_READ = "SELECT crc32c, paths, files FROM blocks WHERE root = ? AND number = ?"
# A block that is stored already is not written again.
_WRITE = """
    REPLACE INTO blocks SELECT ?1, ?2, ?3, ?4, ?5
    WHERE NOT EXISTS (SELECT 1 FROM blocks WHERE (root, number, crc32c) = (?1, ?2, ?3))
"""
# What reading and writing a file of any content may raise.
_FAILURES = (sqlite3.Error, OSError, ValueError, TypeError)


class HashIndex:
    """The part of a hash index that is about one file or directory.

    A context manager around the calls of `look_up` and `save`. An index that cannot be used is a
    warning in the log. Only an index inside the data raises an error.

    Args:
        path: the index file; it need not exist yet.
        root: absolute path of the data.
        settled_ns: only files last modified before this time are recorded, in nanoseconds.
        timeout_seconds: how long to wait while another process writes to the file.
    """

    def __init__(self, path: str, root: str, settled_ns: int, timeout_seconds: float) -> None:
        self._path = os.path.abspath(os.path.expanduser(system_path(path)))
        for resolve in (os.path.abspath, os.path.realpath):
            if os.path.commonpath([resolve(self._path), resolve(root)]) == resolve(root):
                raise InvalidInputError(
                    f"the hash index is inside the data, so writing it would change the hash: "
                    f"{self._path} in {root}. Put it elsewhere."
                )
        self._root = os.fsencode(root)
        self._settled_ns = settled_ns
        self._timeout_seconds = timeout_seconds
        self._may_write = True
        self._is_damaged = False
        self._db: sqlite3.Connection | None = None
        self._states = tempfile.SpooledTemporaryFile(  # noqa: SIM115 - closed on exit
            _STATES_IN_MEMORY_BYTES
        )
        self._known_files = self._found_files = 0
        # The block with the next files: its number, its last path as `walk_order` has it, and by
        # path and state what is known of each file. Empty behind the last one.
        self._number = -1
        self._last: list[tuple[bool, bytes]] = []
        self._block: dict[bytes, bytes] = {}
        with self._ignoring_failures():
            self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._states.close()
        if self._db is not None:
            self._db.close()

    def look_up(
        self, paths: list[bytes], states: list[os.stat_result]
    ) -> tuple[list[int], "array[int]", bytes]:
        """Find files that are known and unchanged.

        Must be called for all files, in the order of the content hash.

        Args:
            paths: of files in one folder, relative to the root, UTF-8.
            states: what the file system says of each now.

        Returns:
            Positions of the files found, their CRC32Cs, and their file digests one after another.
        """
        packed = [
            _STATE.pack(
                s.st_size, s.st_mtime_ns & _64, s.st_ctime_ns & _64, s.st_ino, s.st_dev & _64
            )
            for s in states
        ]
        positions: list[int] = []
        found: list[bytes] = []
        start = 0
        with self._ignoring_failures():
            if self._may_write:
                self._states.write(b"".join(packed))
            while self._block and start < len(paths):
                end = bisect_right(paths, self._last, start, key=walk_order)
                for position in range(start, end):
                    known = self._block.get(paths[position] + packed[position])
                    if known is not None:
                        positions.append(position)
                        found.append(known)
                start = end
                if start < len(paths):
                    self._read_block()
        self._found_files += len(found)
        crcs = array("I", b"".join([known[:4] for known in found]))
        return positions, crcs, b"".join([known[4:] for known in found])

    def save(self, snapshot: Snapshot) -> None:
        """Record a snapshot whose every file was asked for, if anything is new."""
        if not self._may_write or self._found_files == len(snapshot) == self._known_files:
            return
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            if self._is_damaged:
                database = os.path.realpath(self._path)
                for path in (database, f"{database}-journal"):
                    with suppress(OSError):
                        os.unlink(path)
            with suppress(FileExistsError):  # only for this user: file names can be private
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            with closing(self._connect("rwc")) as db:
                # The file shrinks when roots are forgotten. This has to precede the first table.
                db.execute("PRAGMA auto_vacuum = FULL")
                with db:
                    db.execute("BEGIN IMMEDIATE")
                    self._write(db, snapshot)
        except _FAILURES as exc:
            _log.warning("The hash index could not be written (%s): %s", exc, printable(self._path))

    @contextmanager
    def _ignoring_failures(self) -> Iterator[None]:
        """Take the index for empty from here on if it cannot be read."""
        try:
            yield
        except _FAILURES as exc:
            self._block = {}
            # A hash index with wrong content is replaced. Other files are left alone, and so is an
            # index that is locked or cannot be read just now.
            code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
            is_wrong = code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR)
            is_wrong = is_wrong or isinstance(exc, ValueError | TypeError)
            self._may_write = self._is_damaged = self._db is not None and is_wrong
            hint = (
                ". It is left alone: delete it, or name another file." if self._db is None else ""
            )
            _log.warning("The hash index is ignored (%s): %s%s", exc, printable(self._path), hint)

    def _open(self) -> None:
        if not os.path.exists(self._path):
            return
        if not os.path.isfile(self._path):
            raise ValueError("it is not a file")
        if not os.path.getsize(self._path):
            return  # another process is about to write it
        # Immutable: SQLite neither locks a file that may not be ours, nor repairs it.
        with closing(self._connect("ro&immutable=1")) as db:
            [[pages]] = db.execute("PRAGMA page_count").fetchall()
            if pages and _is_blank(db):  # SQLite takes what is shorter than a page for blank, too
                return  # another process is writing the first index here, or was killed meanwhile
            _check_format(db)
        # Reading needs no right to write, but after a crash SQLite has to undo what was half done.
        self._db = self._connect("rw")
        [[self._known_files]] = self._db.execute(_COUNT_FILES, [_FILE.size, self._root]).fetchall()
        self._read_block()

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"file:{quote(os.fsencode(self._path))}?mode={mode}"
        timeout = self._timeout_seconds
        return sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None)

    def _read_block(self) -> None:
        # A query for each block, so that other processes can write in between. A block that they
        # wrote may begin with other files than expected, but each of its rows is true.
        self._number += 1
        self._block = {}
        assert self._db is not None  # noqa: S101 - it was opened
        for crc32c, joined, files in self._db.execute(_READ, (self._root, self._number)).fetchall():
            if _crc32c(joined, files) != crc32c:
                raise ValueError("a block does not agree with its CRC32C")
            paths = joined.split(b"\0")
            self._last = walk_order(paths[-1])
            known = zip(paths, _FILE.iter_unpack(files), strict=True)
            self._block = {path + state: file for path, (state, file) in known}

    def _write(self, db: sqlite3.Connection, snapshot: Snapshot) -> None:
        if _is_blank(db):
            db.execute(_SCHEMA)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        _check_format(db)
        settled = self._settled_files(snapshot)
        number = 0
        while block := list(islice(settled, _BLOCK_FILES)):
            paths, files = (
                b"\0".join(path for path, _ in block),
                b"".join(file for _, file in block),
            )
            db.execute(_WRITE, (self._root, number, _crc32c(paths, files), paths, files))
            number += 1
        db.execute("DELETE FROM blocks WHERE root = ? AND number >= ?", (self._root, number))
        for [root] in db.execute("SELECT DISTINCT root FROM blocks").fetchall():
            if not os.path.exists(root):
                db.execute("DELETE FROM blocks WHERE root = ?", [root])

    def _settled_files(self, snapshot: Snapshot) -> Iterator[tuple[bytes, bytes]]:
        """Yield path and record of each file that was last modified long enough ago."""
        self._states.seek(0)
        for file in snapshot.records():
            *_, ctime_ns, inode, device = _STATE.unpack(self._states.read(_STATE.size))
            if max(file.mtime_ns, ctime_ns) < self._settled_ns:
                state = _STATE.pack(file.size, file.mtime_ns, ctime_ns, inode, device)
                known = _KNOWN.pack(file.crc32c, file.digest)
                yield file.path.encode(), state + known


def _is_blank(db: sqlite3.Connection) -> bool:
    """Return whether no program has committed anything to the database."""
    [[tables]] = db.execute("SELECT count(*) FROM sqlite_master").fetchall()
    [[application_id]] = db.execute("PRAGMA application_id").fetchall()
    [[version]] = db.execute("PRAGMA user_version").fetchall()
    return not (tables or application_id or version)


def _check_format(db: sqlite3.Connection) -> None:
    """Raise ValueError unless the database is a hash index of this format."""
    [[application_id]] = db.execute("PRAGMA application_id").fetchall()
    [[version]] = db.execute("PRAGMA user_version").fetchall()
    if application_id != APPLICATION_ID:
        raise ValueError("it is another program's database")
    if version != FORMAT_VERSION:
        raise ValueError(f"it has user_version {version}, this version reads {FORMAT_VERSION}")


def _crc32c(paths: bytes, files: bytes) -> int:
    crc32c: int = google_crc32c.extend(google_crc32c.value(paths), files)
    return crc32c
