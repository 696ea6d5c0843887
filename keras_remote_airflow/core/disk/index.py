"""The hash index: an optional local file that spares unchanged files from being read again.

For each file it keeps the file digest, the CRC32C and a stamp: a hash of what the file system said
of the file then (size, mtime, ctime, inode, device). A file is recorded only if

- its times are more than 2 s older than the run, since a later change might not alter them (git's
  index does the same), and
- it was written back in the run, before it was read. A page that is written to through mmap changes
  the file's times once, and then not again until it is written back. So any change that follows
  shows in the times.

Don't use it where that isn't so: for files in memory (tmpfs, such as /dev/shm) that are written to
through mmap, and for mounts whose times and inode numbers are not those of a local disk (gcsfuse,
NFS).

An index only saves time. One that cannot be used is ignored, with a line in the log, and replaced
by the same run if it is a damaged index of this format. Other files are never written to. Processes
may share an index: each reads a block at a time, and writes in one transaction.

Format: an SQLite database with application_id 0x4B524958 ("KRIX"), user_version 1 and one table:

    CREATE TABLE blocks (root BLOB, folder BLOB, last BLOB, crc32c INTEGER, names BLOB, files BLOB,
                         PRIMARY KEY (root, folder, last)) WITHOUT ROWID

A row is a block of up to 1,000 files that follow each other in one folder. Numbers in `files` have
the machine's byte order.

    root     absolute path of the dataset
    folder   relative to it: empty or with a final "/"
    last     the last one of the names
    crc32c   CRC32C of root, folder, names and files, joined by zero bytes
    names    joined by zero bytes
    files    the stamps of all files (8 bytes each; 0: to be read again), then their CRC32Cs (4
             bytes each), then their file digests (32 bytes each)
"""

import logging
import os
import sqlite3
import stat
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c

from keras_remote_airflow.core.disk.snapshot import Snapshot
from keras_remote_airflow.core.disk.tree import ABSENT, OPEN_FLAGS, stat_path, system_path
from keras_remote_airflow.core.errors import InvalidInputError, printable

if TYPE_CHECKING:
    import ctypes

_log = logging.getLogger(__name__)

APPLICATION_ID = 0x4B524958
FORMAT_VERSION = 1
_HEADER = b"SQLite format 3\0" + FORMAT_VERSION.to_bytes(4) + APPLICATION_ID.to_bytes(4)
_BLOCK_FILES = 1_000
# If the machine crashes, the index may be damaged, which is noticed. So nothing is waited for.
_CREATE = f"""
    PRAGMA synchronous = OFF;
    BEGIN IMMEDIATE;
    PRAGMA application_id = {APPLICATION_ID};
    PRAGMA user_version = {FORMAT_VERSION};
    CREATE TABLE IF NOT EXISTS blocks (
        root BLOB, folder BLOB, last BLOB, crc32c INTEGER, names BLOB, files BLOB,
        PRIMARY KEY (root, folder, last)) WITHOUT ROWID;
    COMMIT;
"""
_READ = """
    SELECT last, crc32c, names, files FROM blocks
    WHERE root = ? AND folder = ? AND last >= ? ORDER BY last
"""
# What reading and writing a file of any content may raise.
_FAILURES = (sqlite3.Error, OSError, ValueError, TypeError)
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


class HashIndex:
    """The part of a hash index that is about one file or directory.

    `close` it at the end. An index that cannot be used is a warning in the log. Only an index
    inside the data raises an error.

    Args:
        path: the index file; it need not exist yet.
        root: absolute path of the data.
        settled_ns: only files last modified before this time are recorded, in nanoseconds.
        timeout_seconds: how long to wait while another process writes to the file.
    """

    def __init__(self, path: str, root: str, settled_ns: int, timeout_seconds: float) -> None:
        self._path = os.path.realpath(os.path.expanduser(system_path(path)))
        self._root = os.fsencode(root)
        self._settled_ns = settled_ns
        self._timeout_seconds = timeout_seconds
        self._written_back: set[int] = set()
        self._has_news = self._is_damaged = False
        self._may_write = True
        self._db: sqlite3.Connection | None = None
        self._places: list[os.stat_result] = []
        for place in (Path(self._path), *Path(self._path).parents):
            with suppress(OSError):
                self._places.append(os.stat(place))
        self.check_outside(stat_path(root))
        try:
            if self._check_format():
                self._db = self._connect()
        except _FAILURES as exc:
            self._ignore(exc)

    def close(self) -> None:
        """Close the file."""
        if self._db is not None:
            self._db.close()

    def check_outside(self, folder: os.stat_result) -> None:
        """Raise InvalidInputError if this folder of the data holds the index, or is to hold it.

        Device and inode tell, since links, mounts and letter case lead to other names.
        """
        if any(os.path.samestat(folder, place) for place in self._places):
            raise InvalidInputError(
                "the hash index is inside the data, so writing it would change the hash: "
                f"{self._path} in {os.fsdecode(self._root)}. Put it elsewhere."
            )

    def stamp(self, state: os.stat_result) -> int:
        """Return what tells this state of a file from all later ones; 0 if nothing does yet."""
        if max(state.st_mtime_ns, state.st_ctime_ns) >= self._settled_ns:
            return 0
        return hash(
            (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev)
        )

    def look_up(
        self, folder: bytes, names: list[bytes], stamps: "array[int]"
    ) -> tuple[Sequence[int], "array[int]", bytes]:
        """Find files of one folder that are known and unchanged.

        Args:
            folder: relative to the root: empty or with a final "/".
            names: of the files, sorted.
            stamps: of each, as it is now.

        Returns:
            Positions of the files found, their CRC32Cs, and their file digests one after another.
        """
        positions: list[int] = []
        crcs = array("I")
        digests: list[bytes] = []
        try:
            for there, (known_stamps, known_crcs, known_digests) in self._read(folder, names):
                if there == names and known_stamps == stamps and 0 not in stamps:
                    return range(len(names)), known_crcs, known_digests
                places = {name: at for at, name in enumerate(there)}
                for position, (name, stamp) in enumerate(zip(names, stamps, strict=True)):
                    at = places.get(name)
                    if at is not None and known_stamps[at] == stamp != 0:
                        positions.append(position)
                        crcs.append(known_crcs[at])
                        digests.append(known_digests[32 * at : 32 * at + 32])
        except _FAILURES as exc:
            self._ignore(exc)
        self._has_news = self._has_news or len(positions) < len(names)
        return positions, crcs, b"".join(digests)

    def write_back(self, descriptor: int, state: os.stat_result) -> None:
        """Have what was written to a file through mmap written back, before the file is read.

        Args:
            descriptor: the open file.
            state: what the file system says of it; a file that won't be recorded is left alone.
        """
        if state.st_dev in self._written_back or not self.stamp(state):
            return
        libc = _libc()
        if not hasattr(libc, "syncfs"):  # macOS
            os.fsync(descriptor)
        elif os.major(state.st_dev):
            # What is in flight is waited for, the rest is sent off: then no page can be written to
            # unseen. Thousandfold faster than fsync, which has the disk flush its cache each time.
            if libc.sync_file_range(descriptor, 0, 0, 3):
                os.fsync(descriptor)
        else:
            # The file may be one of another file system below this one (overlayfs), for which
            # sync_file_range does nothing.
            if libc.syncfs(descriptor):
                os.sync()
            self._written_back.add(state.st_dev)

    def save(self, snapshot: Snapshot) -> None:
        """Record a stamped snapshot whose every file was looked up, if anything is new."""
        if not (self._has_news and self._may_write):
            return
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            if self._is_damaged:
                for path in (self._path, f"{self._path}-journal"):
                    with suppress(FileNotFoundError):
                        os.unlink(path)
            self._check_format()
            with suppress(FileExistsError):  # only for this user: file names can be private
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            with closing(self._connect()) as db, db:
                db.executescript(_CREATE)
                db.execute("BEGIN IMMEDIATE")
                for [root] in db.execute("SELECT DISTINCT root FROM blocks").fetchall():
                    if root == self._root or _is_gone(root):
                        db.execute("DELETE FROM blocks WHERE root = ?", [root])
                rows = self._blocks(snapshot)
                db.executemany("INSERT INTO blocks VALUES (?, ?, ?, ?, ?, ?)", rows)
        except _FAILURES as exc:
            _log.warning("The hash index could not be written (%s): %s", exc, printable(self._path))

    def _ignore(self, error: Exception) -> None:
        """Take the index for empty from here on."""
        # A damaged index is replaced. Other files are left alone, and so is an index that is
        # locked or cannot be read just now.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        is_wrong = code in _DAMAGE or isinstance(error, ValueError | TypeError)
        self._may_write = self._is_damaged = self._db is not None and is_wrong
        self.close()
        self._db = None
        _log.warning("The hash index is ignored (%s): %s", error, printable(self._path))

    def _check_format(self) -> bool:
        """Return whether the index was written before; raise ValueError if another file is there.

        SQLite is not asked, because it would repair another program's database.
        """
        try:
            descriptor = os.open(self._path, OPEN_FLAGS)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("it is not a file")
            header = os.read(descriptor, 72)  # https://www.sqlite.org/fileformat.html
        finally:
            os.close(descriptor)
        if header and (header[:16] + header[60:64] + header[68:]) != _HEADER:
            raise ValueError(f"it is no hash index of format {FORMAT_VERSION}")
        return bool(header)  # empty: another process is about to write it

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=self._timeout_seconds, isolation_level=None)

    def _read(
        self, folder: bytes, names: list[bytes]
    ) -> Iterator[tuple[list[bytes], tuple["array[int]", "array[int]", bytes]]]:
        """Yield names from the first to the last one of these, and what is known of the files."""
        if self._db is None:
            return
        # A query for each folder, so that other processes can write in between.
        for last, crc32c, joined, files in self._db.execute(_READ, (self._root, folder, names[0])):
            if crc32c != _crc32c(self._root, folder, joined, files):
                raise ValueError("a block does not agree with its CRC32C")
            there = joined.split(b"\0")
            crcs, digests = 8 * len(there), 12 * len(there)
            columns = array("q", files[:crcs]), array("I", files[crcs:digests]), files[digests:]
            yield there, columns
            if last >= names[-1]:
                return

    def _blocks(
        self, snapshot: Snapshot
    ) -> Iterator[tuple[bytes, bytes, bytes, int, bytes, bytes]]:
        paths = enumerate(snapshot.names())
        for folder, files_there in groupby(paths, lambda file: file[1][: file[1].rfind(b"/") + 1]):
            while block := list(islice(files_there, _BLOCK_FILES)):
                names = [path[len(folder) :] for _, path in block]
                joined, files = b"\0".join(names), snapshot.columns(block[0][0], block[-1][0] + 1)
                crc32c = _crc32c(self._root, folder, joined, files)
                yield self._root, folder, names[-1], crc32c, joined, files


@cache
def _libc() -> "ctypes.CDLL":
    import ctypes  # takes some milliseconds

    libc = ctypes.CDLL(None)
    if hasattr(libc, "sync_file_range"):
        libc.sync_file_range.argtypes = ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
    return libc


def _is_gone(root: bytes) -> bool:
    try:
        os.stat(root)
    except OSError as exc:
        return exc.errno in ABSENT
    return False


def _crc32c(*columns: bytes) -> int:
    return int(google_crc32c.value(b"\0".join(columns)))
