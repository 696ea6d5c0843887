"""Computes the content hash, and per file SHA-256 and CRC32C, in one read.

The content hash is keras_remote's two-level one, byte for byte as keras-kinetic 0.0.1 to 0.0.4
compute it (`kinetic/data/data.py`); `||` concatenates and every digest is the raw 32 bytes:

    file digest   SHA-256(relative path || 00 || content)       path in UTF-8 with "/"
    directory     SHA-256("dir:" || digest of file 1 || digest of file 2 || …)
    single file   SHA-256("file:" || digest under its basename)

The order is that of `core.disk.tree`: os.walk's with sorted names.

Both come from the same bytes, so if Cloud Storage accepts the CRC32C, it has the bytes that were
hashed.
"""

import hashlib
import logging
import os
import stat
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import google_crc32c

from keras_remote_airflow.core.disk.snapshot import Snapshot
from keras_remote_airflow.core.disk.tree import (
    FOLDER_FLAGS,
    OPEN_FLAGS,
    TOO_MANY_OPEN,
    check_utf8,
    inaccessible,
    not_a_file,
    open_path,
    patiently,
    single_file,
    stat_path,
    walk,
)
from keras_remote_airflow.core.errors import DataChangedError, printable
from keras_remote_airflow.core.progress import Progress, ProgressCallback
from keras_remote_airflow.core.slow_reads import SlowReads, waiting_seconds
from keras_remote_airflow.core.threads import Threads

if TYPE_CHECKING:
    from keras_remote_airflow.core.disk.index import HashIndex

_log = logging.getLogger(__name__)

# Small files that this thread reads before it looks how long that took: at first, and at most.
# Where many threads read, each is given `_FEW_FILES` at a time.
_FEW_FILES, _MANY_FILES = 8, 64


@dataclass(frozen=True)
class HashingConfig:
    """How files are read. The defaults suit every disk that was measured; tests vary them.

    Attributes:
        small_file_bytes: files up to this size are read whole, in one thread. hashlib releases the
            interpreter lock above 2 KiB, so threads that hash small files wait for each other.
        chunk_bytes: how much of a larger file is read at a time; it should stay in a processor's
            cache from reading to hashing.
        slow_read_seconds: a file that is waited for longer is on a slow disk. A file in memory
            takes some 10 microseconds, one on a local disk 100, one on a remote disk milliseconds.
        files_by_threads: on a slow disk, number of files that threads read before one is measured
            again.
        threads: how many they are.
        index_settle_seconds: the hash index records a file only if it was last modified longer ago
            than this. FAT keeps times to 2 s, ext3 to 1 s, most others to a few milliseconds.
        index_timeout_seconds: how long to wait for a hash index that another process has locked.
    """

    small_file_bytes: int = 128 * 1024
    chunk_bytes: int = 512 * 1024
    slow_read_seconds: float = 0.00005
    files_by_threads: int = 2000
    threads: int = 32
    index_settle_seconds: float = 2.0
    index_timeout_seconds: float = 5.0


DEFAULT_CONFIG = HashingConfig()


def take_snapshot(
    path: str,
    hash_index: str | None = None,
    expected: tuple[int, int] | None = None,
    progress: ProgressCallback | None = None,
    config: HashingConfig = DEFAULT_CONFIG,
) -> Snapshot:
    """Read a local file or directory once.

    Args:
        path: absolute local path.
        hash_index: file of a hash index (see `core.disk.index`), which is read, and written if
            anything is new: files that it knows and that are unchanged are not read. None reads
            every file.
        expected: how many files and bytes are there, if that is known: progress can then tell the
            time left. For a single file it is known anyway.
        progress: called with a `ProgressUpdate` instead of logging a line every 30 s.
        config: how files are read.

    Returns:
        The snapshot, content hash included.

    Raises:
        DataNotFoundError: nothing is there.
        InvalidInputError: something in it is not a file that can be read: a FIFO, socket or device
            (never opened), a broken link, a name that is not UTF-8, a file without permission.
        DataChangedError: a file vanished or changed its size while it was read.
        OSError: the disk or mount cannot be read just now.
    """
    state = stat_path(path)
    is_dir = stat.S_ISDIR(state.st_mode)
    counts = Progress(_log, "Hashing", printable(path), progress)
    index = _open_index(hash_index, path, config) if hash_index else None
    snapshot = Snapshot(path, is_dir, index.stamp if index else None)
    if not is_dir:
        expected = 1, state.st_size
    if expected:
        counts.expect(*expected)
    with closing(index) if index else nullcontext():
        with counts, _Hasher(snapshot, counts, config, index) as hasher:
            base = os.fsencode(path if is_dir else os.path.dirname(path))
            for folder, names in (
                walk(path, snapshot.linked, snapshot.empty) if is_dir else [single_file(path)]
            ):
                paths = [folder + name for name in names]
                check_utf8(base, paths)
                files = _Files(os.path.join(base, folder), names, paths, snapshot.add_names(paths))
                unknown = _unknown(folder, files, snapshot, index) if index else range(len(names))
                counts.add(len(names) - len(unknown), 0)
                hasher.hash(files, unknown)
        snapshot.finish()
        if index:
            index.save(snapshot)
    _log.debug(
        "Hashed %d files, %d bytes in %.2f s: %s",
        len(snapshot),
        snapshot.total_bytes,
        counts.seconds,
        printable(path),
    )
    return snapshot


def default_index() -> str | None:
    """Return the index file that the environment's `KERAS_REMOTE_HASH_INDEX` names, or None."""
    return os.environ.get("KERAS_REMOTE_HASH_INDEX") or None


def _open_index(path: str, root: str, config: HashingConfig) -> "HashIndex":
    # Imported here: sqlite3 takes some milliseconds, and most calls have no index.
    from keras_remote_airflow.core.disk.index import HashIndex

    settled_ns = time.time_ns() - round(config.index_settle_seconds * 1e9)
    return HashIndex(path, root, settled_ns, config.index_timeout_seconds)


class _Files(NamedTuple):
    """Files of one folder.

    Attributes:
        folder: absolute path.
        names: in the folder.
        paths: relative to the snapshot's root, UTF-8.
        first: index of the first in the snapshot.
    """

    folder: bytes
    names: list[bytes]
    paths: list[bytes]
    first: int

    def local_path(self, position: int) -> bytes:
        return os.path.join(self.folder, self.names[position])


def _unknown(folder: bytes, files: _Files, snapshot: Snapshot, index: "HashIndex") -> Sequence[int]:
    """Fill in the files that the index knows; return the positions of the others."""
    states = _states(files, index)
    stamps = array("q", map(index.stamp, states))
    known, crcs, digests = index.look_up(folder, files.names, stamps)
    if len(known) == len(states):
        snapshot.fill(range(files.first, files.first + len(states)), states, crcs, digests, stamps)
        return ()
    indices = [files.first + position for position in known]
    snapshot.fill(indices, [states[position] for position in known], crcs, digests)
    return sorted(set(range(len(states))).difference(known))


def _states(files: _Files, index: "HashIndex") -> list[os.stat_result]:
    folder = open_path(files.folder, FOLDER_FLAGS)
    try:
        index.check_outside(os.fstat(folder))
        return [os.stat(name, dir_fd=folder) for name in files.names]
    except OSError as exc:
        raise inaccessible(os.path.join(files.folder, exc.filename), exc) from None
    finally:
        os.close(folder)


class _Hasher:
    """Reads and hashes files; a context manager, which ends when all are done.

    Small files are hashed in the caller's thread while they are in memory or on a fast disk, where
    threads would only wait for each other, and in many threads while the disk is slow. Large files
    are hashed in one thread for each processor, or by the many threads.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        progress: Progress,
        config: HashingConfig,
        index: "HashIndex | None",
    ) -> None:
        self._snapshot = snapshot
        self._index = index
        self._progress = progress
        self._config = config
        self._stop = threading.Event()
        self._for_large_files = Threads(min(config.threads, _processors()), "hash")
        self._for_slow_disks = Threads(config.threads, "hash")
        self._pending: deque[Future[None]] = deque()
        self._slow_reads = SlowReads(config.slow_read_seconds, config.files_by_threads)
        self._batch_files = _FEW_FILES

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._wait_for_threads()
        finally:
            self._stop.set()
            for pool in (self._for_large_files, self._for_slow_disks):
                pool.shutdown(cancel_futures=True)

    def hash(self, files: _Files, positions: Sequence[int]) -> None:
        """Hash the files at these positions, now or by the end."""
        start = 0
        while start < len(positions):
            if self._slow_reads.threads_should_read:
                batch = positions[start : start + _FEW_FILES]
                self._submit(self._for_slow_disks, self._hash_one_by_one, files, batch)
                self._slow_reads.read_by_threads(len(batch))
                if not self._slow_reads.threads_should_read:
                    self._wait_for_threads()  # so that the next files are measured alone
            else:
                batch = positions[start : start + self._batch_files]
                self._hash_and_measure(files, batch)
            start += len(batch)

    def _hash_and_measure(self, files: _Files, positions: Sequence[int]) -> None:
        started = waiting_seconds()
        large = self._hash_small(files, positions)
        self._slow_reads.note(waiting_seconds() - started, len(positions))
        if self._slow_reads.last_was_slow:
            self._batch_files = _FEW_FILES
        else:
            self._batch_files = min(2 * self._batch_files, _MANY_FILES)
        for position in large:
            self._submit(self._for_large_files, self._hash_large, files, position)

    def _submit(self, pool: Threads, work: Callable[..., None], *args: Any) -> None:
        self._pending.append(pool.submit(work, *args))
        while len(self._pending) > 2 * self._config.threads:
            self._pending.popleft().result()

    def _wait_for_threads(self) -> None:
        while self._pending:
            self._pending.popleft().result()

    def _hash_one_by_one(self, files: _Files, positions: Sequence[int]) -> None:
        # Many threads do this at once, so each opens one file at a time.
        for position in positions:
            if self._hash_small(files, [position]):
                self._hash_large(files, position)

    def _hash_small(self, files: _Files, positions: Sequence[int]) -> list[int]:
        """Hash the small ones among these files, in any thread; return the positions of the others.

        A million files pass through here. Each step is taken for all of them before the next one,
        which makes it a loop in C, or nearly so, and takes a tenth less time than file by file.
        """
        try:
            if len(positions) == 1:
                found = patiently(lambda: self._read_small(files, positions))
            else:
                found = self._read_small(files, positions)
        except OSError as exc:
            if exc.errno not in TOO_MANY_OPEN or len(positions) == 1:
                raise
            # This process has too many files open: fewer at a time.
            half = len(positions) // 2
            return [
                *self._hash_small(files, positions[:half]),
                *self._hash_small(files, positions[half:]),
            ]
        small, states, contents, large = found
        paths = files.paths
        digests = b"".join(
            [
                hashlib.sha256(b"%b\0%b" % (paths[position], content)).digest()
                for position, content in zip(small, contents, strict=True)
            ]
        )
        crcs = array("I", map(google_crc32c.value, contents))
        self._snapshot.fill([files.first + p for p in small], states, crcs, digests)
        self._progress.add(len(small), sum(map(len, contents)))
        return large

    def _read_small(
        self, files: _Files, positions: Sequence[int]
    ) -> tuple[Sequence[int], list[os.stat_result], list[bytes], list[int]]:
        """Open all these files, and read the small ones.

        Returns:
            Positions, states and contents of the small files, and the positions of the large ones.
        """
        names, small_file_bytes = files.names, self._config.small_file_bytes
        descriptors: list[int] = []
        folder = open_path(files.folder, FOLDER_FLAGS)
        try:
            for position in positions:
                try:
                    descriptors.append(os.open(names[position], OPEN_FLAGS, dir_fd=folder))
                except OSError as exc:
                    raise inaccessible(files.local_path(position), exc) from None
            states = list(map(os.fstat, descriptors))
            sizes = [state.st_size for state in states]
            if not all(map(stat.S_ISREG, {state.st_mode for state in states})):
                raise next(
                    not_a_file(files.local_path(position), state.st_mode)
                    for position, state in zip(positions, states, strict=True)
                    if not stat.S_ISREG(state.st_mode)
                )
            large, readable = [], descriptors
            if max(sizes) > small_file_bytes:
                small = [size <= small_file_bytes for size in sizes]
                large = [p for p, is_small in zip(positions, small, strict=True) if not is_small]
                positions = list(compress(positions, small))
                states = list(compress(states, small))
                sizes = list(compress(sizes, small))
                readable = list(compress(descriptors, small))
            if self._index:
                for descriptor, state in zip(readable, states, strict=True):
                    self._index.write_back(descriptor, state)
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

    def _hash_large(self, files: _Files, position: int) -> None:
        """Hash one file in chunks; return early when the whole run is being stopped.

        May be called in any thread.
        """
        path = files.local_path(position)
        descriptor = open_path(path, OPEN_FLAGS)
        try:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode):
                raise not_a_file(path, state.st_mode)
            if self._index:
                self._index.write_back(descriptor, state)
            sha256 = hashlib.sha256(files.paths[position] + b"\0")
            crc32c = done = 0
            # It may grow as fast as it is read.
            while done <= state.st_size and (
                chunk := os.read(descriptor, self._config.chunk_bytes)
            ):
                sha256.update(chunk)
                crc32c = google_crc32c.extend(crc32c, chunk)
                done += len(chunk)
                self._progress.add(0, len(chunk))
                if self._stop.is_set():
                    return
        finally:
            os.close(descriptor)
        if done != state.st_size:
            raise _changed(path, state.st_size, done)
        index = files.first + position
        self._snapshot.fill([index], [state], array("I", [crc32c]), sha256.digest())
        self._progress.add(1, 0)


def _processors() -> int:
    """Return how many processors this process may run on; a quota of their time is not seen."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS has no affinity


def _changed(path: bytes, opened: int, read: int) -> DataChangedError:
    return DataChangedError(
        f"a file changed while it was being hashed ({opened} bytes when opened, {read} bytes "
        f"read): {os.fsdecode(path)}. Retry once nothing writes to it."
    )
