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
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO

import google_crc32c

from keras_remote_airflow.core.errors import InvalidInputError

if TYPE_CHECKING:
    from keras_remote_airflow.core.hashing import Snapshot

_log = logging.getLogger(__name__)

_ENVIRONMENT_VARIABLE = "KERAS_REMOTE_HASH_INDEX"

_MAGIC = b"KRAINDEX"
_FORMAT_VERSION = 1
_PREAMBLE = struct.Struct("<8sII")
# A file is recorded only if it was last modified this long before it was hashed: FAT keeps times
# to 2 s, ext3 to 1 s, most others to a few milliseconds.
_GRANULARITY_NS = 2_000_000_000
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

    def name(self, index: int) -> bytes:
        ends = self.numbers[0]
        return bytes(self.names[ends[index - 1] if index else 0 : ends[index]])

    def to_bytes(self) -> bytes:
        columns = [*self.numbers, self.crcs]
        if sys.byteorder == "big":
            columns = [array(column.typecode, column) for column in columns]
            for column in columns:
                column.byteswap()
        return b"".join([*(column.tobytes() for column in columns), self.digests, self.names])

    @classmethod
    def from_bytes(cls, content: bytes, files: int, name_bytes: int) -> "_Table":
        table = cls()
        at = 0
        for column in (*table.numbers, table.crcs):
            size = files * column.itemsize
            column.frombytes(content[at : at + size])
            if sys.byteorder == "big":
                column.byteswap()
            at += size
        table.digests += content[at : at + 32 * files]
        table.names += content[at + 32 * files :]
        if len(table.digests) != 32 * files or len(table.names) != name_bytes:
            raise ValueError("its sections are not of the length they should have")
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
        self._positions: dict[bytes, int] | None = None
        self._next = 0
        self._found = 0
        # Where each file asked for stands: in what is known or, as -1 - position, in the others.
        self._rows = array("q")
        self._others = array("q"), array("Q"), array("Q")  # ctime_ns, inode, device
        self._started_ns = time.time_ns()

    def get(self, name: bytes, state: os.stat_result) -> tuple[bytes, int] | None:
        """Return digest and CRC32C of a file if it is unchanged, and note its state for `save`.

        Args:
            name: path relative to the root, UTF-8. Asked in the order of the content hash, every
                answer costs a comparison or two; in any other order, a look-up.
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
        index: int | None = self._next
        if self._next >= len(self._known) or self._known.name(self._next) != name:
            if self._positions is None:
                self._positions = {self._known.name(i): i for i in range(len(self._known))}
            index = self._positions.get(name)
        if index is not None:
            self._next = index + 1
        return index

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
        except OSError as exc:
            _log.warning("Hash index %s could not be written: %s", self._path, exc)

    def _load(self) -> _Table:
        try:
            with open(self._path, "rb") as file:
                for section in _read_header(file):
                    if section["root"] != self._root:
                        file.seek(section["length"], os.SEEK_CUR)
                        continue
                    content = file.read(section["length"])
                    if google_crc32c.value(content) != section["crc32c"]:
                        raise ValueError("a section does not agree with its CRC32C")
                    return _Table.from_bytes(content, section["files"], section["names"])
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
        with open(self._path + ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            contents = self._other_sections()
            content = table.to_bytes()
            section = {
                "root": self._root,
                "files": len(table),
                "names": len(table.names),
                "length": len(content),
                "crc32c": google_crc32c.value(content),
            }
            contents.append((section, content))
            header = json.dumps({"sections": [section for section, _ in contents]}).encode()
            descriptor, partial = tempfile.mkstemp(dir=folder, prefix=".hash-index-")
            try:
                with open(descriptor, "wb") as file:
                    file.write(_PREAMBLE.pack(_MAGIC, _FORMAT_VERSION, len(header)))
                    file.write(header)
                    file.writelines(content for _, content in contents)
                os.replace(partial, self._path)
            except BaseException:
                os.unlink(partial)
                raise

    def _other_sections(self) -> list[tuple[dict[str, Any], bytes]]:
        with suppress(*_UNREADABLE):
            with open(self._path, "rb") as file:
                sections = [
                    (section, file.read(section["length"])) for section in _read_header(file)
                ]
            return [
                (section, content)
                for section, content in sections
                if section["root"] != self._root and os.path.exists(section["root"])
            ]
        return []


def default_index() -> str | None:
    """Return the index file that the environment's `KERAS_REMOTE_HASH_INDEX` names, or None."""
    return os.environ.get(_ENVIRONMENT_VARIABLE) or None


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
    return sections
