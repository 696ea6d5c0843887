"""One read of a file or directory gives its content hash and, per file, what an upload declares.

The content hash is keras_remote's two-level one, byte for byte as keras-kinetic 0.0.1 to 0.0.4
compute it (`kinetic/data/data.py`); `||` concatenates and every digest is the raw 32 bytes:

    file digest   SHA-256(relative path || 00 || content)       path in UTF-8 with "/"
    directory     SHA-256("dir:" || digest of file 1 || digest of file 2 || …)
    single file   SHA-256("file:" || digest under its basename)

The order is os.walk's with names sorted by code point: a directory's files, then its
subdirectories. Linked directories are not followed; linked files are read.

SHA-256 and CRC32C come from the same bytes, so whatever later answers to the CRC32C of an upload
is what was hashed. A snapshot keeps about 70 bytes a file plus its name, in flat arrays: a million
files fit into some 150 MB.
"""

import errno
import hashlib
import logging
import os
import stat
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import accumulate, compress, islice
from typing import Any, NamedTuple, Self

import google_crc32c

from keras_remote_airflow.core.errors import (
    DataChangedError,
    DataNotFoundError,
    InvalidInputError,
)
from keras_remote_airflow.core.index import HashIndex
from keras_remote_airflow.core.progress import Progress

_log = logging.getLogger(__name__)

# Below this a file is hashed inline. hashlib lets go of the interpreter lock above 2 KiB, and
# threads that hash small files spend their time fighting over it.
_SMALL = 128 * 1024
# A link that leads to itself or through a file; a path longer than the system takes.
_UNUSABLE = (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)
# Of a large file at a time: what stays in a processor's cache between reading and hashing.
_PIECE = 512 * 1024
_HUGE = 64 * 1024 * 1024  # from here on reading ahead pays
# Small files that are hashed before it is looked how long they took: at first, and at the most.
# Where many threads read, each is given `_FEW` at a time.
_FEW, _MANY = 8, 64
# Seconds a file may keep us waiting before many are read at once. A file in memory takes some 10
# microseconds, one on a local disk 100, one on a remote disk milliseconds.
_PATIENCE = 0.00005
_WAITS = 3  # that many times in a row: once may be another process's doing
_WIDE = 32  # threads
_WIDE_FILES = 2000  # before it is looked again whether that is still needed; then twice as many
_SLICE = 10_000  # files of one folder that are listed together
# O_NONBLOCK: should a FIFO take a file's place after the directory was listed, opening it must
# not hang. It means nothing to a regular file.
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
# Files are opened by their name in an open folder: the system need not walk down the whole path.
_FOLDER_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
# What opening a file says that is gone, or that something else has taken the place of.
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP, errno.ENXIO)


class FileRecord(NamedTuple):
    """One file of a snapshot.

    Attributes:
        path: relative to the snapshot's root, with "/"; a single file's basename.
        size: bytes.
        crc32c: of its content.
        digest: raw SHA-256 of path, a zero byte and content.
        mtime_ns: modification time when it was opened, nanoseconds since the epoch.
    """

    path: str
    size: int
    crc32c: int
    digest: bytes
    mtime_ns: int


class Snapshot:
    """What a file or directory held when it was read; made by `take_snapshot`.

    Attributes:
        root: absolute local path.
        is_dir: whether it is a directory.
        content_hash: 64 hex digits.
        total_bytes: size of all files.
    """

    def __init__(self, root: str, is_dir: bool) -> None:
        self.root = root
        self.is_dir = is_dir
        self.content_hash = ""
        self.total_bytes = 0
        self._names = bytearray()
        self._name_ends = array("Q")
        self._sizes = array("Q")
        self._crcs = array("I")
        self._mtimes = array("q")
        self._digests = bytearray()

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
        return os.path.join(self.root, relative_path) if self.is_dir else self.root

    def _extend(self, names: list[bytes]) -> int:
        """Make room for files of these relative paths; return the index of the first."""
        first = len(self._sizes)
        ends = accumulate(map(len, names), initial=len(self._names))
        self._name_ends.extend(islice(ends, 1, None))
        self._names += b"".join(names)
        for numbers in (self._sizes, self._crcs, self._mtimes):
            numbers.frombytes(bytes(numbers.itemsize * len(names)))
        self._digests += bytes(32 * len(names))
        return first

    def _fill(self, index: int, size: int, mtime_ns: int, digest: bytes, crc32c: int) -> None:
        """Note what file `index` was found to be, in any thread."""
        self._sizes[index] = size
        self._mtimes[index] = mtime_ns
        self._digests[32 * index : 32 * index + 32] = digest
        self._crcs[index] = crc32c

    def _fill_all(
        self,
        indices: Sequence[int],
        states: list[os.stat_result],
        crcs: "array[int]",
        digests: bytes,
    ) -> None:
        """Note what these files, in ascending order, were found to be, in any thread."""
        if indices and indices[-1] - indices[0] == len(indices) - 1:
            these = slice(indices[0], indices[-1] + 1)
            self._sizes[these] = array("Q", [state.st_size for state in states])
            self._mtimes[these] = array("q", [state.st_mtime_ns for state in states])
            self._crcs[these] = crcs
            self._digests[32 * these.start : 32 * these.stop] = digests
        else:
            for at, (index, state) in enumerate(zip(indices, states, strict=True)):
                digest = digests[32 * at : 32 * at + 32]
                self._fill(index, state.st_size, state.st_mtime_ns, digest, crcs[at])

    def _finish(self) -> None:
        self.total_bytes = sum(self._sizes)
        self.content_hash = self.hash_as(self.is_dir)

    def hash_as(self, is_dir: bool) -> str:
        """Return the content hash that the same files have as a directory, or as a single file."""
        return hashlib.sha256((b"dir:" if is_dir else b"file:") + self._digests).hexdigest()


# SHA-256("dir:"): the one dataset that has no objects.
EMPTY_DIRECTORY_HASH = hashlib.sha256(b"dir:").hexdigest()


def take_snapshot(
    path: str, hash_index: str | None = None, expected: tuple[int, int] | None = None
) -> Snapshot:
    """Read a local file or directory once.

    Args:
        path: absolute local path.
        hash_index: file of a hash index (see `core.index`), which is read, and written if anything
            is new: files that it knows and that are unchanged are not read. None reads every file.
        expected: how many files and bytes are there, if that is known: progress can then tell the
            time left. Of a single file it is known anyway.

    Returns:
        The snapshot, content hash included.

    Raises:
        DataNotFoundError: nothing is there.
        InvalidInputError: something in it is no file that can be read: a FIFO, socket or device
            (never opened), a broken link, a name that is not UTF-8, a file without permission.
        DataChangedError: a file vanished or changed its size while it was read.
    """
    is_dir = os.path.isdir(path)
    snapshot = Snapshot(path, is_dir)
    progress = Progress(_log, f"Hashing {path}")
    index = HashIndex(hash_index, path) if hash_index else None
    if not is_dir and os.path.exists(path):
        expected = 1, os.path.getsize(path)
    if expected:
        progress.expect(*expected)
    with progress, _Hasher(snapshot, progress) as hasher:
        for folder, names in _walk(path) if is_dir else [_single(path)]:
            paths = _encode(path, folder, names)
            files = _Files(
                os.path.join(path if is_dir else os.path.dirname(path), folder),
                names,
                paths,
                snapshot._extend(paths),
            )
            unknown = _unknown(files, snapshot, index) if index else range(len(names))
            progress.add(len(names) - len(unknown), 0)
            hasher.hash(files, unknown)
    snapshot._finish()
    if index:
        index.save(snapshot)
    _log.debug(
        "Hashed %s: %d files, %d bytes, %.2f s",
        path,
        len(snapshot),
        snapshot.total_bytes,
        progress.seconds,
    )
    return snapshot


class _Files(NamedTuple):
    """The files of one folder.

    Attributes:
        folder: absolute path.
        names: in the folder.
        paths: relative to the snapshot's root, UTF-8.
        first: index of the first in the snapshot.
    """

    folder: str
    names: list[str]
    paths: list[bytes]
    first: int

    def local_path(self, position: int) -> str:
        return os.path.join(self.folder, self.names[position])


def _unknown(files: _Files, snapshot: Snapshot, index: HashIndex) -> Sequence[int]:
    """Fill in the files that the index knows; return the positions of the others."""
    states = _states(files)
    if known := index.get_all(files.paths, states):
        snapshot._fill_all(range(files.first, files.first + len(states)), states, *known)
        return ()
    unknown = []
    for position, (path, state) in enumerate(zip(files.paths, states, strict=True)):
        if found := index.get(path, state):
            snapshot._fill(files.first + position, state.st_size, state.st_mtime_ns, *found)
        else:
            unknown.append(position)
    return unknown


def _states(files: _Files) -> list[os.stat_result]:
    folder = _open(files.folder, _FOLDER_FLAGS)
    try:
        return [os.stat(name, dir_fd=folder) for name in files.names]
    except OSError as exc:
        raise _inaccessible(os.path.join(files.folder, exc.filename), exc) from exc
    finally:
        os.close(folder)


class _Hasher:
    """Reads and hashes files; a context manager, which ends when all are done.

    Small files in the caller's thread, as long as they are in memory or on a disk so fast that
    threads would only be in each other's way; when reading keeps us waiting, many at once. It is
    measured: what a few files took, less the CPU time of it, is what we waited. Large files go to
    a thread for each processor, or stay with those that read many at once.
    """

    def __init__(self, snapshot: Snapshot, progress: Progress) -> None:
        self._snapshot = snapshot
        self._progress = progress
        self._stop = threading.Event()
        # The processors this process may run on; a quota of their time is not seen here.
        processors = min(_WIDE, len(os.sched_getaffinity(0)))
        self._processors = ThreadPoolExecutor(processors, "hash")
        self._wide = ThreadPoolExecutor(_WIDE, "hash")
        self._pending: deque[Future[None]] = deque()
        self._batch = _FEW
        self._waits = 0
        self._wide_files = 0
        self._next_wide_files = _WIDE_FILES

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._settle()
        finally:
            self._stop.set()
            for pool in (self._processors, self._wide):
                pool.shutdown(cancel_futures=True)

    def hash(self, files: _Files, positions: Sequence[int]) -> None:
        """Hash the files at these positions, now or by the end."""
        start = 0
        while start < len(positions):
            if self._wide_files > 0:
                batch = positions[start : start + _FEW]
                self._submit(self._wide, self._hash_all, files, batch)
                self._wide_files -= len(batch)
                if self._wide_files <= 0:
                    self._settle()  # so that what comes next is measured alone
            else:
                batch = positions[start : start + self._batch]
                self._hash_and_measure(files, batch)
            start += len(batch)

    def _hash_and_measure(self, files: _Files, positions: Sequence[int]) -> None:
        started, worked = time.perf_counter(), time.thread_time()
        large = self._hash_small(files, positions)
        waited = time.perf_counter() - started - (time.thread_time() - worked)
        if waited < _PATIENCE * len(positions):
            self._batch = min(2 * self._batch, _MANY)
            self._waits, self._next_wide_files = 0, _WIDE_FILES
        else:
            self._batch = _FEW
            self._waits += 1
            if self._waits >= _WAITS:
                self._wide_files = self._next_wide_files
                self._next_wide_files *= 2
        for position in large:
            self._submit(self._processors, self._hash_large, files, position)

    def _submit(self, pool: ThreadPoolExecutor, work: Callable[..., None], *args: Any) -> None:
        self._pending.append(pool.submit(work, *args))
        while len(self._pending) > 2 * _WIDE:
            self._pending.popleft().result()

    def _settle(self) -> None:
        while self._pending:
            self._pending.popleft().result()

    def _hash_all(self, files: _Files, positions: Sequence[int]) -> None:
        for position in positions:  # one by one: all threads together have enough files open
            if self._hash_small(files, [position]):
                self._hash_large(files, position)

    def _hash_small(self, files: _Files, positions: Sequence[int]) -> list[int]:
        """Hash the small ones among these files, in any thread; return the positions of the others.

        What a million files pass through: each step is taken for all of them before the next one,
        which makes it a loop in C, or nearly so, and takes a tenth less time than file by file.
        """
        try:
            small, states, contents, large = _read_together(files, positions)
        except OSError as exc:
            if exc.errno not in (errno.EMFILE, errno.ENFILE) or len(positions) == 1:
                raise
            # This process has too many files open: fewer at a time.
            half = len(positions) // 2
            return [
                *self._hash_small(files, positions[:half]),
                *self._hash_small(files, positions[half:]),
            ]
        paths = files.paths
        digests = b"".join(
            [
                hashlib.sha256(b"%b\0%b" % (paths[position], content)).digest()
                for position, content in zip(small, contents, strict=True)
            ]
        )
        crcs = array("I", map(google_crc32c.value, contents))
        self._snapshot._fill_all([files.first + p for p in small], states, crcs, digests)
        self._progress.add(len(small), sum(map(len, contents)))
        return large

    def _hash_large(self, files: _Files, position: int) -> None:
        """Hash one file piece by piece, in any thread; end early when all is to end."""
        path = files.local_path(position)
        descriptor = _open(path, _OPEN_FLAGS)
        try:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode):
                raise _not_a_file(path, state.st_mode)
            sha256 = hashlib.sha256(files.paths[position] + b"\0")
            crc32c = done = 0
            read = _read_ahead if state.st_size > _HUGE else _read
            with closing(read(descriptor)) as pieces:
                for piece, summed in pieces:
                    crc32c = summed
                    sha256.update(piece)
                    done += len(piece)
                    self._progress.add(0, len(piece))
                    if self._stop.is_set():
                        return
                    if done > state.st_size:
                        break  # it may grow as fast as it is read
        finally:
            os.close(descriptor)
        if done != state.st_size:
            raise _changed(path, state.st_size, done)
        index = files.first + position
        self._snapshot._fill(index, done, state.st_mtime_ns, sha256.digest(), crc32c)
        self._progress.add(1, 0)


def _read_together(
    files: _Files, positions: Sequence[int]
) -> tuple[Sequence[int], list[os.stat_result], list[bytes], list[int]]:
    """Read the small ones among these files, all being open at once.

    Returns:
        Their positions, states and contents, and the positions of the large ones.
    """
    names = files.names
    descriptors: list[int] = []
    folder = _open(files.folder, _FOLDER_FLAGS)
    try:
        for position in positions:
            try:
                descriptors.append(os.open(names[position], _OPEN_FLAGS, dir_fd=folder))
            except OSError as exc:
                raise _inaccessible(files.local_path(position), exc) from exc
        states = list(map(os.fstat, descriptors))
        sizes = [state.st_size for state in states]
        if not all(map(stat.S_ISREG, {state.st_mode for state in states})):
            raise next(
                _not_a_file(files.local_path(position), state.st_mode)
                for position, state in zip(positions, states, strict=True)
                if not stat.S_ISREG(state.st_mode)
            )
        large, readable = [], descriptors
        if max(sizes) > _SMALL:
            small = [size <= _SMALL for size in sizes]
            large = [p for p, is_small in zip(positions, small, strict=True) if not is_small]
            positions = list(compress(positions, small))
            states = list(compress(states, small))
            sizes = list(compress(sizes, small))
            readable = list(compress(descriptors, small))
        contents = [os.read(d, size + 1) for d, size in zip(readable, sizes, strict=True)]
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        os.close(folder)
    if (found := list(map(len, contents))) != sizes:
        raise next(
            _changed(files.local_path(position), size, read)
            for position, size, read in zip(positions, sizes, found, strict=True)
            if read != size
        )
    return positions, states, contents, large


def _read(descriptor: int) -> Generator[tuple[bytes, int], None, None]:
    """Yield a file's pieces, each with the CRC32C of all up to it."""
    crc32c = 0
    while piece := os.read(descriptor, _PIECE):
        crc32c = google_crc32c.extend(crc32c, piece)
        yield piece, crc32c


def _read_ahead(descriptor: int) -> Generator[tuple[bytes, int], None, None]:
    """Yield the same, the next piece being read and summed in a thread of its own meanwhile.

    So that a file which is alone takes no longer than its SHA-256 does: 1.23 s instead of 1.34 s
    for 2 GiB. For smaller files the threads would cost more than they save.
    """
    pieces = _read(descriptor)
    with ThreadPoolExecutor(1, "read") as reader:
        coming = reader.submit(next, pieces, None)
        while piece := coming.result():
            coming = reader.submit(next, pieces, None)
            yield piece


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags)
    except OSError as exc:
        raise _inaccessible(path, exc) from exc


def _inaccessible(path: str, error: OSError) -> Exception:
    if error.errno in _VANISHED:
        return DataChangedError(
            f"{path} vanished while the data was being read. Retry once nothing writes to it."
        )
    if isinstance(error, PermissionError):
        return InvalidInputError(
            f"cannot read {path}: permission denied. Make it readable for this user, or move it "
            "out of the data."
        )
    return OSError(error.errno, error.strerror, path)  # it names but the last part of the path


def _single(path: str) -> tuple[str, list[str]]:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as exc:
        raise DataNotFoundError(f"data path does not exist: {path}") from exc
    if not stat.S_ISREG(mode):
        raise _not_a_file(path, mode)
    return "", [os.path.basename(path)]


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Yield folders (relative, "" or with a final "/") and names of files in them, some at a time.

    In the order of the content hash.
    """
    linked: list[str] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        files, subfolders = _list(root, folder, linked)
        for start in range(0, len(files), _SLICE):
            yield folder, files[start : start + _SLICE]
        folders.extend(f"{folder}{name}/" for name in reversed(subfolders))
    if linked:
        _log.warning(
            "Linked directories are not followed and not part of the data: %s%s",
            ", ".join(linked[:10]),
            f" and {len(linked) - 10} more" if len(linked) > 10 else "",
        )


def _list(root: str, folder: str, linked: list[str]) -> tuple[list[str], list[str]]:
    files: list[str] = []
    subfolders: list[str] = []
    try:
        with os.scandir(f"{root}/{folder}") as entries:
            for entry in entries:
                if entry.is_file():
                    files.append(entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    subfolders.append(entry.name)
                elif entry.is_dir():
                    linked.append(folder + entry.name)
                else:
                    raise _special(f"{root}/{folder}{entry.name}")
    except (FileNotFoundError, PermissionError) as exc:
        raise _inaccessible(f"{root}/{folder}", exc) from exc
    except OSError as exc:
        if exc.errno in _UNUSABLE:
            raise InvalidInputError(
                f"cannot follow the link or path {exc.filename or root + '/' + folder}: "
                f"{exc.strerror}. Remove the link, or shorten the path."
            ) from exc
        raise
    files.sort()
    subfolders.sort()
    return files, subfolders


def _special(path: str) -> Exception:
    try:
        return _not_a_file(path, os.stat(path).st_mode)
    except OSError:
        if not os.path.islink(path):
            return _inaccessible(path, FileNotFoundError(errno.ENOENT, "gone"))
        return InvalidInputError(
            f"broken link: {path} points to {os.readlink(path)}, which is not there. Remove the "
            "link or restore its target."
        )


def _not_a_file(path: str, mode: int) -> InvalidInputError:
    kinds = {
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFDIR: "a directory",
    }
    kind = kinds.get(stat.S_IFMT(mode), "a special file")
    return InvalidInputError(f"{path} is {kind}: expected regular files. Move it out of the data.")


def _changed(path: str, opened: int, read: int) -> DataChangedError:
    return DataChangedError(
        f"{path} changed while it was being hashed ({opened} bytes when opened, {read} bytes "
        "read). Retry once nothing writes to it."
    )


def _encode(root: str, folder: str, names: list[str]) -> list[bytes]:
    """Return the relative paths of files in UTF-8."""
    try:
        prefix = folder.encode()
        return [prefix + name.encode() for name in names]
    except UnicodeEncodeError as exc:
        refused = next(name for name in names if not _is_utf8(folder + name))
        path = os.fsencode(os.path.join(root, folder, refused))
        raise InvalidInputError(f"file name is not UTF-8: {path!r}. Rename it.") from exc


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
