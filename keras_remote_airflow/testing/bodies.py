"""The bytes of an object, in memory or in a file: written as they arrive, then only read."""

import base64
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import google_crc32c

READ_BYTES = 1024 * 1024


class Body:
    """Bytes in memory, and their running CRC32C."""

    __slots__ = ("_crc", "_data")

    def __init__(self) -> None:
        self._data = bytearray()
        self._crc = 0

    @property
    def size(self) -> int:
        return len(self._data)

    @property
    def crc32c(self) -> str:
        """CRC32C of what was written, in base64 of big-endian bytes as Cloud Storage shows it."""
        return base64.b64encode(self._crc.to_bytes(4, "big")).decode()

    def write(self, data: bytes) -> None:
        self._data += data
        self._crc = google_crc32c.extend(self._crc, data)

    def read(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` up to `end`, in pieces."""
        end = self.size if end is None else min(end, self.size)
        return (
            bytes(memoryview(self._data)[at : min(at + READ_BYTES, end)])
            for at in range(start, end, READ_BYTES)
        )

    def truncate(self, size: int) -> None:
        """Keep the first `size` bytes only."""
        if size < self.size:
            self._cut(size)
            self._crc = 0
            for piece in self.read():
                self._crc = google_crc32c.extend(self._crc, piece)

    def discard(self) -> None:
        """Free what holds the bytes. Reads already begun may go on."""

    def _cut(self, size: int) -> None:
        del self._data[size:]


class FileBody(Body):
    """Bytes in a file, which is open only while something is written or read."""

    __slots__ = ("_size", "path")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._size = path.stat().st_size

    @classmethod
    def create(cls, directory: Path) -> "FileBody":
        path = directory / uuid.uuid4().hex
        path.touch()
        return cls(path)

    @property
    def size(self) -> int:
        return self._size

    def write(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(data)
        self._size += len(data)
        self._crc = google_crc32c.extend(self._crc, data)

    def read(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        # Opened here and not at the first piece: the object may be deleted in between.
        file = self.path.open("rb")
        file.seek(start)
        left = (self.size if end is None else min(end, self.size)) - start

        def pieces() -> Iterator[bytes]:
            nonlocal left
            with file:
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

    def _cut(self, size: int) -> None:
        os.truncate(self.path, size)
        self._size = size


def fill(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old bytes or the new ones, nothing between."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
