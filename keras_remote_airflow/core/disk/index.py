"""The hash index: an optional local file that spares unchanged files from being read again.

It maps what the file system says of a file (path, size, mtime, ctime, inode, device) to the file
digest and CRC32C it had under exactly these. As git's index does, it never records a file that was
modified so shortly before it was hashed that a later change could leave its times as they are.

Use it for data on a local disk. Not on mounts whose inode numbers or times change or mean little
(gcsfuse, some NFS and container overlays): there every file would look changed, or worse, a
changed one unchanged.

An index that is missing, corrupt, locked or of a newer format is ignored with a warning: it only
ever saves time. A file that is no index, or one of a newer format, is never written to. Processes
may share one: readers see a whole file, which writers replace one at a time, keeping each other's
sections.

Format (all numbers little-endian):

    8 bytes    "KRAINDEX"
    4 + 4      format_version 1; length of the header
    header     JSON {"sections": [{"root": str, "files": number, "names": bytes of the names,
               "length": bytes of the section, "crc32c": of the section}, …]}
    sections   one a root, in that order, each arrays over its files in the order of the content
               hash: 8-byte ends of the names, 8-byte size, mtime_ns, ctime_ns, inode and device,
               4-byte CRC32C, 32-byte digest; then the names in UTF-8
"""

import fcntl
import json
import logging
import os
import struct
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from io import BytesIO
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, BinaryIO

import google_crc32c

from keras_remote_airflow.core.errors import InvalidInputError

if TYPE_CHECKING:
    from keras_remote_airflow.core.disk.hashing import Snapshot

_log = logging.getLogger(__name__)

_ENVIRONMENT_VARIABLE = "KERAS_REMOTE_HASH_INDEX"

_MAGIC = b"KRAINDEX"
_FORMAT_VERSION = 1
_PREAMBLE = struct.Struct("<8sII")
# A file is recorded only if it was last modified this long before it was hashed: FAT keeps times
# to 2 s, ext3 to 1 s, most others to a few milliseconds.
_GRANULARITY_NS = 2_000_000_000
# Read and written at a time, in bytes: a whole number of rows of any column.
_PIECE = 1 << 20
_NUMBERS = "QqqqQQ"  # end of name, size, mtime_ns, ctime_ns, inode, device


class _ForeignError(ValueError):
    """A file that is no hash index, or one of a newer format: never to be replaced."""


# What reading a file of any content may raise.
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    OverflowError,
    RecursionError,
    MemoryError,
    struct.error,
)


class _Table:
    """What is known of the files of one root, in flat arrays; see the module for their order."""

    def __init__(self) -> None:
        self.numbers = [array(code) for code in _NUMBERS]
        self.crcs = array("I")
        self.digests = bytearray()
        self.names = bytearray()

    def __len__(self) -> int:
        return len(self.crcs)

    def add(self, name: bytes, state: tuple[int, ...], crc32c: int, digest: bytes) -> None:
        self.names += name
        for column, number in zip(self.numbers, (len(self.names), *state), strict=True):
            column.append(number)
        self.crcs.append(crc32c)
        self.digests += digest

    def end(self, index: int) -> int:
        """Return where the name of file `index` ends; of -1, where the first begins."""
        return self.numbers[0][index] if index >= 0 else 0

    def name(self, index: int) -> bytes:
        return bytes(self.names[self.end(index - 1) : self.end(index)])

    def pieces(self) -> Iterator[bytes]:
        """Yield the section, some at a time: at a million files it is more than 100 MB."""
        for column in (*self.numbers, self.crcs):
            step = _PIECE // column.itemsize
            for start in range(0, len(column), step):
                rows = column[start : start + step]
                if sys.byteorder == "big":
                    rows.byteswap()
                yield rows.tobytes()
        for text in (self.digests, self.names):
            for start in range(0, len(text), _PIECE):
                yield bytes(text[start : start + _PIECE])

    def section(self, root: str) -> dict[str, Any]:
        """Return what the header says of it."""
        crc32c = length = 0
        for piece in self.pieces():
            crc32c = google_crc32c.extend(crc32c, piece)
            length += len(piece)
        return {
            "root": root,
            "files": len(self),
            "names": len(self.names),
            "length": length,
            "crc32c": crc32c,
        }

    @classmethod
    def read(cls, file: BinaryIO, section: dict[str, Any]) -> "_Table":
        table = cls()
        crc32c = 0
        files = section["files"]
        widths = [*(column.itemsize for column in table.numbers), table.crcs.itemsize, 32]
        if section["length"] != files * sum(widths) + section["names"]:
            raise ValueError("its sections are not of the length they should have")

        def read(size: int) -> Iterator[bytes]:
            nonlocal crc32c
            for piece in _pieces(file, size):
                crc32c = google_crc32c.extend(crc32c, piece)
                yield piece

        for column in (*table.numbers, table.crcs):
            for piece in read(files * column.itemsize):
                column.frombytes(piece)
            if sys.byteorder == "big":
                column.byteswap()
        for text, size in ((table.digests, 32 * files), (table.names, section["names"])):
            for piece in read(size):
                text += piece
        if crc32c != section["crc32c"]:
            raise ValueError("a section does not agree with its CRC32C")
        return table


class HashIndex:
    """The part of a hash index that is about one file or directory.

    Args:
        path: the index file; it need not exist yet.
        root: absolute path of the data.
    """

    def __init__(self, path: str, root: str) -> None:
        self._path = os.path.abspath(os.path.expanduser(path))
        self._root = root
        if os.path.commonpath([self._path, root]) == root:
            raise InvalidInputError(
                f"hash index {self._path} lies in the data that it is about, {root}, and would "
                "change it. Keep it elsewhere."
            )
        self._may_replace = True
        self._known = self._load()
        self._next = 0
        self._found = 0
        # Where each file asked for stands: in what is known or, as -1 - position, in the others.
        self._rows = array("q")
        self._others = array("q"), array("Q"), array("Q")  # ctime_ns, inode, device
        self._started_ns = time.time_ns()

    def get_all(
        self, names: list[bytes], states: list[os.stat_result]
    ) -> tuple["array[int]", bytes] | None:
        """Return CRC32Cs and digests of files if they are what comes next, all of them unchanged.

        As `get` for each of them (one or more), but at a fraction of the cost; and if the answer is
        None, they are to be asked for one by one.
        """
        start, end = self._next, self._next + len(names)
        known = self._known
        here = ((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev) for s in states)
        ends = accumulate(map(len, names), initial=known.end(start - 1))
        columns = [islice(ends, 1, None), *zip(*here, strict=True)]
        for column, numbers in zip(known.numbers, columns, strict=True):
            if column[start:end] != array(column.typecode, numbers):
                return None
        if known.names[known.end(start - 1) : known.end(end - 1)] != b"".join(names):
            return None
        self._next = end
        self._found += len(names)
        self._rows.extend(range(start, end))
        return known.crcs[start:end], bytes(known.digests[32 * start : 32 * end])

    def get(self, name: bytes, state: os.stat_result) -> tuple[bytes, int] | None:
        """Return digest and CRC32C of a file if it is unchanged, and note its state for `save`.

        Args:
            name: path relative to the root, UTF-8. Ask in the order of the content hash: what comes
                before the last one asked for is not found any more.
            state: what the file system says of the file now.
        """
        index = self._find(name)
        if index is None or not self._is_as_known(index, state):
            ctimes, inodes, devices = self._others
            self._rows.append(-1 - len(ctimes))
            ctimes.append(state.st_ctime_ns)
            inodes.append(state.st_ino)
            devices.append(state.st_dev)
            return None
        self._rows.append(index)
        self._found += 1
        return bytes(self._known.digests[32 * index : 32 * index + 32]), self._known.crcs[index]

    def _find(self, name: bytes) -> int | None:
        while self._next < len(self._known):
            known = self._known.name(self._next)
            if known == name:
                self._next += 1
                return self._next - 1
            if _order(known) > _order(name):
                return None
            self._next += 1  # a file that is gone
        return None

    def _is_as_known(self, index: int, state: os.stat_result) -> bool:
        _, sizes, mtimes, ctimes, inodes, devices = self._known.numbers
        return (
            mtimes[index] == state.st_mtime_ns
            and ctimes[index] == state.st_ctime_ns
            and sizes[index] == state.st_size
            and inodes[index] == state.st_ino
            and devices[index] == state.st_dev
        )

    def save(self, snapshot: "Snapshot") -> None:
        """Record a snapshot whose every file was asked for, in its order, if anything is new."""
        if not self._may_replace or self._found == len(snapshot) == len(self._known):
            return
        table = _Table()
        settled = self._started_ns - _GRANULARITY_NS
        _, _, _, *known = self._known.numbers
        self._known = _Table()  # of a million files, the rest of it is 85 MB
        for file, row in zip(snapshot.records(), self._rows, strict=True):
            columns, at = (known, row) if row >= 0 else (self._others, -1 - row)
            ctime, inode, device = (column[at] for column in columns)
            if max(file.mtime_ns, ctime) < settled:
                state = (file.size, file.mtime_ns, ctime, inode, device)
                table.add(file.path.encode(), state, file.crc32c, file.digest)
        try:
            self._replace(table)
        except BlockingIOError:
            _log.warning("Hash index %s is locked by another process: not updated", self._path)
        except (OSError, ValueError) as exc:
            _log.warning("Hash index %s could not be written: %s", self._path, exc)

    def _load(self) -> _Table:
        try:
            with open(self._path, "rb") as file:
                for section in _read_header(file):
                    if section["root"] != self._root:
                        file.seek(section["length"], os.SEEK_CUR)
                        continue
                    return _Table.read(file, section)
        except FileNotFoundError:
            pass
        except _UNREADABLE as exc:
            self._may_replace = not isinstance(exc, _ForeignError)
            _log.warning("Hash index %s is ignored: %s", self._path, exc)
        return _Table()

    def _replace(self, table: _Table) -> None:
        """Put the table into the file, beside the sections of roots that still exist."""
        folder = os.path.dirname(self._path)
        os.makedirs(folder, exist_ok=True)
        with ExitStack() as stack:
            lock = stack.enter_context(open(self._path + ".lock", "ab"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            old = stack.enter_context(_open_or_nothing(self._path))  # not before it is ours
            kept = self._other_sections(old)
            sections = [*(section for section, _ in kept), table.section(self._root)]
            header = json.dumps({"sections": sections}).encode()
            descriptor, partial = tempfile.mkstemp(dir=folder, prefix=".hash-index-")
            try:
                with open(descriptor, "wb") as file:
                    file.write(_PREAMBLE.pack(_MAGIC, _FORMAT_VERSION, len(header)))
                    file.write(header)
                    for section, start in kept:
                        old.seek(start)
                        file.writelines(_pieces(old, section["length"]))
                    file.writelines(table.pieces())
                os.replace(partial, self._path)
            except BaseException:
                os.unlink(partial)
                raise

    def _other_sections(self, file: BinaryIO) -> list[tuple[dict[str, Any], int]]:
        """Return the sections to keep, and where they begin."""
        kept = []
        with suppress(*_UNREADABLE):
            sections = _read_header(file)
            start = file.tell()
            end = file.seek(0, os.SEEK_END)
            for section in sections:
                begin, start = start, start + section["length"]
                if (
                    section["root"] != self._root
                    and os.path.exists(section["root"])
                    and start <= end
                ):
                    kept.append((section, begin))
        return kept


def default_index() -> str | None:
    """Return the index file that the environment's `KERAS_REMOTE_HASH_INDEX` names, or None."""
    return os.environ.get(_ENVIRONMENT_VARIABLE) or None


def _open_or_nothing(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError:
        return BytesIO()


def _order(name: bytes) -> list[tuple[bool, bytes]]:
    """Return what sorts names as the content hash does: a folder's files, then its subfolders."""
    *folders, file = name.split(b"/")
    return [*((True, folder) for folder in folders), (False, file)]


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the next `size` bytes of a file, some at a time."""
    while size > 0:
        piece = file.read(min(_PIECE, size))
        if not piece:
            raise ValueError("it is cut short")
        size -= len(piece)
        yield piece


def _read_header(file: BinaryIO) -> list[dict[str, Any]]:
    preamble = file.read(_PREAMBLE.size)
    if len(preamble) < _PREAMBLE.size and not _MAGIC.startswith(preamble[: len(_MAGIC)]):
        raise _ForeignError("it is another file, which is left alone")
    magic, version, length = _PREAMBLE.unpack(preamble)
    if magic != _MAGIC:
        raise _ForeignError("it is another file, which is left alone")
    if version != _FORMAT_VERSION:
        raise _ForeignError(
            f"it has format_version {version}, this version reads {_FORMAT_VERSION}"
        )
    sections: list[dict[str, Any]] = json.loads(file.read(length))["sections"]
    if not all(type(section["length"]) is int and section["length"] >= 0 for section in sections):
        raise ValueError("a section has no length")
    return sections
