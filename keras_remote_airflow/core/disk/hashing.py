"""One read of a file or directory gives its content hash and, per file, what an upload declares.

The content hash is keras_remote's two-level one, byte for byte as keras-kinetic 0.0.1 to 0.0.4
compute it (`kinetic/data/data.py`); `||` concatenates and every digest is the raw 32 bytes:

    file digest   SHA-256(relative path || 00 || content)       path in UTF-8 with "/"
    directory     SHA-256("dir:" || digest of file 1 || digest of file 2 || …)
    single file   SHA-256("file:" || digest under its basename)

The order is os.walk's with names sorted by code point: a directory's files, then its
subdirectories. Linked directories are not followed; linked files are read.

SHA-256 and CRC32C come from the same bytes, so whatever later answers to the CRC32C of an upload
is what was hashed.
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
from itertools import compress
from typing import Any, NamedTuple, Self

import google_crc32c

from keras_remote_airflow.core.disk.index import HashIndex
from keras_remote_airflow.core.disk.snapshot import Snapshot
from keras_remote_airflow.core.disk.tree import open_path, inaccessible, walk, single_file, encode_names, not_a_file, OPEN_FLAGS, FOLDER_FLAGS
from keras_remote_airflow.core.errors import DataChangedError
from keras_remote_airflow.core.progress import Progress

_log = logging.getLogger(__name__)

# Below this a file is hashed inline. hashlib lets go of the interpreter lock above 2 KiB, and
# threads that hash small files spend their time fighting over it.
_SMALL = 128 * 1024
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


def take_snapshot(
    path: str, hash_index: str | None = None, expected: tuple[int, int] | None = None
) -> Snapshot:
    """Read a local file or directory once.

    Args:
        path: absolute local path.
        hash_index: file of a hash index (see `core.disk.index`), which is read, and written if anything
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
        for folder, names in walk(path) if is_dir else [single_file(path)]:
            paths = encode_names(path, folder, names)
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
    folder = open_path(files.folder, FOLDER_FLAGS)
    try:
        return [os.stat(name, dir_fd=folder) for name in files.names]
    except OSError as exc:
        raise inaccessible(os.path.join(files.folder, exc.filename), exc) from exc
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
        descriptor = open_path(path, OPEN_FLAGS)
        try:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode):
                raise not_a_file(path, state.st_mode)
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
    folder = open_path(files.folder, FOLDER_FLAGS)
    try:
        for position in positions:
            try:
                descriptors.append(os.open(names[position], OPEN_FLAGS, dir_fd=folder))
            except OSError as exc:
                raise inaccessible(files.local_path(position), exc) from exc
        states = list(map(os.fstat, descriptors))
        sizes = [state.st_size for state in states]
        if not all(map(stat.S_ISREG, {state.st_mode for state in states})):
            raise next(
                not_a_file(files.local_path(position), state.st_mode)
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


def _changed(path: str, opened: int, read: int) -> DataChangedError:
    return DataChangedError(
        f"{path} changed while it was being hashed ({opened} bytes when opened, {read} bytes "
        "read). Retry once nothing writes to it."
    )
