"""The bytes of an object: held in memory, or in a file of their own.

A `Spool` takes bytes as they arrive, keeps their running CRC32C, and becomes a `Body`.
"""

import base64
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import google_crc32c

READ_BYTES = 1024 * 1024
# MD5 runs at some 0.6 GB/s, twice what the rest of an upload costs. Above this size it is
# computed only if the client declared one; Cloud Storage, too, has objects without md5Hash
# (https://cloud.google.com/storage/docs/metadata#md5).
MD5_UP_TO_BYTES = 1024 * 1024


class Body(Protocol):
    """Immutable bytes."""

    @property
    def size(self) -> int: ...

    def read(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` up to `end`, in pieces."""

    def discard(self) -> None:
        """Free what holds the bytes. Reads already begun may go on."""


class MemoryBody:
    """Bytes in memory, in the pieces in which they arrived."""

    __slots__ = ("_chunks", "size")

    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = chunks
        self.size = sum(map(len, chunks))

    def read(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        end = self.size if end is None else end
        offset = 0
        for chunk in self._chunks:
            if offset >= end:
                return
            if offset + len(chunk) > start:
                yield chunk[max(0, start - offset) : end - offset]
            offset += len(chunk)

    def discard(self) -> None:
        """Nothing to do: garbage collection frees memory."""


class FileBody:
    """Bytes in a file."""

    __slots__ = ("path", "size")

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size

    def read(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        # Opened here and not at the first piece: the object may be deleted in between.
        file = self.path.open("rb")
        left = (self.size if end is None else min(end, self.size)) - start

        def pieces() -> Iterator[bytes]:
            nonlocal left
            with file:
                file.seek(start)
                yield b""
                while left > 0:
                    piece = file.read(min(left, READ_BYTES))
                    if not piece:
                        raise OSError(f"{self.path} is shorter than the {self.size} bytes stored")
                    left -= len(piece)
                    yield piece

        stream = pieces()
        next(stream)  # from here on the file is closed with the generator, even if unread
        return stream

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)


class Spool:
    """Takes an upload's bytes as they arrive: in memory, or in a file under `directory`."""

    def __init__(self, directory: Path | None) -> None:
        self.size = 0
        self._crc = 0
        self._chunks: list[bytes] = []
        self._path = None if directory is None else directory / uuid.uuid4().hex
        self._file = None if self._path is None else self._path.open("xb", buffering=0)

    def write(self, data: bytes) -> None:
        if not data:
            return
        if self._file is None:
            self._chunks.append(data)
        else:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
        self.size += len(data)
        self._crc = google_crc32c.extend(self._crc, data)

    @property
    def crc32c(self) -> str:
        """CRC32C of what was written, in base64 of big-endian bytes as Cloud Storage shows it."""
        return base64.b64encode(self._crc.to_bytes(4, "big")).decode()

    def truncate(self, size: int) -> None:
        """Keep the first `size` bytes only."""
        if size >= self.size:
            return
        if self._file is None or self._path is None:
            self._chunks = list(MemoryBody(self._chunks).read(0, size))
        else:
            self._file.truncate(size)
            self._file.seek(size)
        self.size = size
        self._crc = 0
        for piece in self._body().read():
            self._crc = google_crc32c.extend(self._crc, piece)

    def finish(self) -> Body:
        """No more bytes will come."""
        if self._file is not None:
            self._file.close()
        return self._body()

    def discard(self) -> None:
        """The bytes are not wanted."""
        if self._file is not None and self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
        self._chunks = []

    def _body(self) -> Body:
        if self._path is None:
            return MemoryBody(self._chunks)
        return FileBody(self._path, self.size)


def md5_of(body: Body) -> str:
    """MD5 in base64, as Cloud Storage shows it."""
    digest = hashlib.md5(usedforsecurity=False)
    for piece in body.read():
        digest.update(piece)
    return base64.b64encode(digest.digest()).decode()


def fill(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old bytes or the new ones, nothing between."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
