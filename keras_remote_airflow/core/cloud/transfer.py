"""One file on its way: read from the disk to be sent, or written to it as it arrives."""

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Self

import google_crc32c

from keras_remote_airflow.core.cloud.retry import RetryableError
from keras_remote_airflow.core.cloud.store import FileToSend, ObjectToFetch, encode_crc32c
from keras_remote_airflow.core.errors import DataChangedError, IntegrityError
from keras_remote_airflow.core.slow_reads import SlowReads

# Files up to this size are read whole; larger ones pass through in pieces of this size. It is a
# multiple of 256 KiB, as upload sessions commit (https://cloud.google.com/storage/docs/resumable-uploads).
CHUNK_BYTES = 1 << 20
# Seconds that one read may keep all requests waiting. What is in memory takes 0.02 ms for a small
# file, 0.2 ms for a piece of a large one.
_SLOW_READ_SECONDS = 0.002
# Reads made by threads before it is measured again whether the disk is still slow.
_READS_BY_THREADS = 256
# What says that another file, or none for us, is where the hashed one was. All else is an outage.
_REPLACED = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO)
# A download whose bytes have disagreed with their checksum this often is given up.
_MAX_CORRUPT = 5


class Transit:
    """How far a large file has come, reported so that no byte counts twice; see `ObjectStore`."""

    def __init__(self, moved: Callable[[int], None]) -> None:
        self._moved = moved
        self._position = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._position:
            self.reach(0)

    def reach(self, position: int) -> None:
        self._moved(position - self._position)
        self._position = position


class Disk:
    """Reads in the thread that makes the requests, or in others if that keeps requests waiting."""

    def __init__(self) -> None:
        self._slow_reads = SlowReads(_SLOW_READ_SECONDS, _READS_BY_THREADS)

    async def read(self, work: Callable[[], bytes]) -> bytes:
        """Return what `work` reads."""
        if self._slow_reads.threads_should_read:
            self._slow_reads.read_by_threads(1)
            return await asyncio.to_thread(work)
        # Not `waiting_seconds`: this thread's CPU time costs more than reading a small file.
        started = time.perf_counter()
        content = work()
        self._slow_reads.note(time.perf_counter() - started)
        return content


class Source:
    """A local file, open for one attempt; it must still be the one that was hashed."""

    def __init__(self, file: FileToSend) -> None:
        self._file = file

    def __enter__(self) -> Self:
        try:
            self._descriptor = os.open(self._file.path, os.O_RDONLY | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            raise _changed(self._file, "it is gone") from None
        except OSError as exc:
            if exc.errno not in _REPLACED:
                raise
            raise _changed(self._file, f"it cannot be opened: {exc.strerror}") from exc
        try:
            self.check()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def check(self) -> None:
        now = os.fstat(self._descriptor)
        if now.st_size != self._file.size:
            raise _changed(
                self._file, f"{self._file.size} bytes at hash time, {now.st_size} bytes now"
            )
        if (now.st_mtime_ns - self._file.mtime_ns) % 2**64:
            raise _changed(self._file, "it was modified after it was hashed")

    def read(self, start: int, size: int) -> bytes:
        try:
            content = os.pread(self._descriptor, size, start)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, self._file.path) from exc
        if len(content) != size:
            raise _changed(self._file, "it is shorter than at hash time")
        return content

    async def pieces(self, start: int, transit: Transit, disk: Disk) -> AsyncIterator[bytes]:
        """Yield the file from `start`; the last piece only if the file is still as it was."""
        size = self._file.size
        while start < size:
            transit.reach(start)
            piece = await disk.read(partial(self.read, start, min(CHUNK_BYTES, size - start)))
            start += len(piece)
            if start == size:
                self.check()
            yield piece


class Sink:
    """The file that a download fills, and what has arrived of it so far.

    Attributes:
        size: bytes that have arrived.
        crc32c: of the object; None while that isn't known.
    """

    def __init__(self, wanted: ObjectToFetch, uri: str) -> None:
        self.size = 0
        self.crc32c = wanted.info.crc32c
        self._crc32c_of_arrived = 0
        self._corrupt = 0
        self._info = wanted.info
        self._uri = uri
        self._path = wanted.path
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def restart(self) -> None:
        """Forget what has arrived."""
        self.size = self._crc32c_of_arrived = 0
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        else:
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.ftruncate(self._descriptor, 0)

    def add(self, piece: bytes) -> None:
        assert self._descriptor is not None  # noqa: S101 - a response begins with restart()
        try:
            _write(self._descriptor, piece)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, self._path) from exc
        self._crc32c_of_arrived = google_crc32c.extend(self._crc32c_of_arrived, piece)
        self.size += len(piece)

    def check(self) -> None:
        """Raise unless the bytes are those of the object.

        RetryableError the first few times, then IntegrityError.
        """
        size = self.size if self._info.size is None else self._info.size
        if (self.size, self._crc32c_of_arrived) == (size, self.crc32c):
            return
        found = f"{self.size} bytes (CRC32C {encode_crc32c(self._crc32c_of_arrived)})"
        found += f", expected {size} ({encode_crc32c(self.crc32c or 0)})"
        self.restart()
        self._corrupt += 1
        if self._corrupt >= _MAX_CORRUPT:
            raise IntegrityError(
                f"download damaged {self._corrupt} times: {found}: {self._uri}. Look for what "
                "changes data on the way, such as a proxy."
            )
        raise RetryableError(f"arrived as {found}")


def read_whole(file: FileToSend) -> bytes:
    with Source(file) as source:
        return source.read(0, file.size)


async def check_unchanged(file: FileToSend) -> None:
    """Raise DataChangedError unless the file still is the one that was hashed.

    It is read in another thread, so that other transfers go on, and piece by piece, so that no
    thread is still reading after the transfer was cancelled.
    """
    crc32c = 0
    with Source(file) as source:
        for start in range(0, file.size, CHUNK_BYTES):
            size = min(CHUNK_BYTES, file.size - start)
            piece = await asyncio.to_thread(source.read, start, size)
            crc32c = google_crc32c.extend(crc32c, piece)
    if crc32c != file.crc32c:
        raise _changed(file, "its CRC32C differs from the one at hash time")


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _changed(file: FileToSend, how: str) -> DataChangedError:
    return DataChangedError(
        f"a file changed while it was being uploaded ({how}): {file.path}. Nothing was published. "
        "Retry once nothing writes to it."
    )
