"""What a file or directory held when it was read.

A snapshot keeps its files in flat arrays, about 70 bytes a file plus its name: a million files fit
into some 150 MB.
"""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice
from typing import NamedTuple

# SHA-256("dir:"): the one dataset that has no objects.
EMPTY_DIRECTORY_HASH = hashlib.sha256(b"dir:").hexdigest()

_64_BITS = (1 << 64) - 1


class FileRecord(NamedTuple):
    """One file of a snapshot.

    Attributes:
        path: relative to the snapshot's root, with "/"; a single file's basename.
        size: bytes.
        crc32c: of its content.
        digest: raw SHA-256 of path, a zero byte and content.
        mtime_ns: modification time when it was opened, nanoseconds since the epoch, modulo 2^64:
            file systems keep times before 1970 and after 2554.
    """

    path: str
    size: int
    crc32c: int
    digest: bytes
    mtime_ns: int


class Snapshot:
    """What a file or directory held when it was read; made by `take_snapshot`.

    An index is a file's position in the order of the content hash. A snapshot is built in three
    steps: names are added in that order, each file is filled in once it has been read (in any
    order, from any thread), and `finish` computes the content hash.

    Attributes:
        root: absolute local path.
        is_dir: whether it is a directory.
        content_hash: 64 hex digits.
        total_bytes: size of all files.
        linked, empty: relative paths of linked and empty directories, which are no part of it.

    Args:
        root: the attribute.
        is_dir: the attribute.
        stamp: a number of 64 bits for a file's state, to be kept for `columns`; None keeps none.
    """

    def __init__(
        self, root: str, is_dir: bool, stamp: Callable[[os.stat_result], int] | None = None
    ) -> None:
        self.root = root
        self.is_dir = is_dir
        self.content_hash = ""
        self.total_bytes = 0
        self.linked: list[bytes] = []
        self.empty: list[bytes] = []
        self._names = bytearray()
        self._name_ends = array("Q")
        self._sizes = array("Q")
        self._crcs = array("I")
        self._mtimes = array("Q")
        self._digests = bytearray()
        self._stamp = stamp
        self._stamps = array("q")

    def __len__(self) -> int:
        return len(self._sizes)

    def name(self, index: int) -> bytes:
        """Return the relative path of file `index` in UTF-8."""
        start = self._name_ends[index - 1] if index else 0
        return bytes(self._names[start : self._name_ends[index]])

    def names(self) -> Iterator[bytes]:
        """Yield every relative path in UTF-8, in the order of the content hash."""
        start = 0
        for end in self._name_ends:
            yield bytes(self._names[start:end])
            start = end

    def record(self, index: int) -> FileRecord:
        """Return file `index`, in the order of the content hash."""
        return FileRecord(
            self.name(index).decode(),
            self._sizes[index],
            self._crcs[index],
            bytes(self._digests[32 * index : 32 * index + 32]),
            self._mtimes[index],
        )

    def records(self) -> Iterator[FileRecord]:
        """Yield every file in the order of the content hash."""
        return map(self.record, range(len(self)))

    def local_path(self, relative_path: str) -> str:
        """Return where the file called `relative_path` is on disk."""
        if not self.is_dir:
            return self.root
        return os.path.join(self.root, os.fsdecode(relative_path.encode()))

    def hash_as(self, is_dir: bool) -> str:
        """Return the content hash that the same files have as a directory, or as a single file."""
        sha256 = hashlib.sha256(b"dir:" if is_dir else b"file:")
        sha256.update(self._digests)
        return sha256.hexdigest()

    def add_names(self, names: list[bytes]) -> int:
        """Make room for files of these relative paths (UTF-8); return the index of the first."""
        first = len(self._sizes)
        ends = accumulate(map(len, names), initial=len(self._names))
        self._name_ends.extend(islice(ends, 1, None))
        self._names += b"".join(names)
        stamps = [self._stamps] if self._stamp else []
        for numbers in (self._sizes, self._crcs, self._mtimes, *stamps):
            numbers.frombytes(bytes(numbers.itemsize * len(names)))
        self._digests += bytes(32 * len(names))
        return first

    def fill(
        self,
        indices: Sequence[int],
        states: Sequence[os.stat_result],
        crcs: "array[int]",
        digests: bytes,
        stamps: "array[int] | None" = None,
    ) -> None:
        """Note what these files were found to be.

        Args:
            indices: of the files, ascending.
            states: what the file system says of each.
            crcs: CRC32C of each.
            digests: file digests, 32 bytes each, one after another.
            stamps: of each; None computes them.
        """
        if indices and indices[-1] - indices[0] != len(indices) - 1:
            for at, index in enumerate(indices):
                digest = digests[32 * at : 32 * at + 32]
                self.fill([index], [states[at]], crcs[at : at + 1], digest)
        elif indices:
            these = slice(indices[0], indices[-1] + 1)
            self._sizes[these] = array("Q", [state.st_size for state in states])
            self._mtimes[these] = array("Q", [state.st_mtime_ns & _64_BITS for state in states])
            self._crcs[these] = crcs
            self._digests[32 * these.start : 32 * these.stop] = digests
            if self._stamp:
                self._stamps[these] = stamps or array("q", map(self._stamp, states))

    def columns(self, start: int, stop: int) -> bytes:
        """Return the stamps, then the CRC32Cs, then the file digests of these files."""
        columns = (self._stamps[start:stop], self._crcs[start:stop])
        return b"".join([*columns, self._digests[32 * start : 32 * stop]])

    def finish(self) -> None:
        """Compute total size and content hash; every file must be filled in."""
        self.total_bytes = sum(self._sizes)
        self.content_hash = self.hash_as(self.is_dir)
