"""An `ObjectStore` in a dict: the double for tests of the cache's own logic.

It passes the same contract suite as the store on Cloud Storage (`test_store.py`).
"""

import os
from collections.abc import Callable, Iterable, Sequence

import google_crc32c

from keras_remote_airflow.core.cloud.store import (
    FileToSend,
    ObjectInfo,
    ObjectToFetch,
    Page,
    ignore_moved,
)
from keras_remote_airflow.core.errors import ConflictError, DataChangedError, IntegrityError


class MemoryStore:
    """One bucket in memory.

    Args:
        page_size: objects per page of a listing.

    Attributes:
        written: names of the objects stored so far, in that order.
        calls: names of the methods called so far.
    """

    bucket = "memory-bucket"

    def __init__(self, page_size: int = 1000) -> None:
        self.written: list[str] = []
        self.calls: list[str] = []
        self._objects: dict[str, tuple[ObjectInfo, bytes]] = {}
        self._page_size = page_size
        self._generation = 0

    def read(self, name: str) -> bytes | None:
        self.calls.append("read")
        return self._objects[name][1] if name in self._objects else None

    def list_page(self, prefix: str, token: str | None = None) -> Page:
        self.calls.append("list_page")
        names = sorted(
            (name for name in self._objects if name.startswith(prefix) and name > (token or "")),
            key=str.encode,
        )
        page = names[: self._page_size]
        more = page[-1] if len(names) > len(page) else None
        return Page([self._objects[name][0] for name in page], more)

    async def aread(self, name: str) -> bytes | None:
        return self.read(name)

    async def alist_page(self, prefix: str, token: str | None = None) -> Page:
        return self.list_page(prefix, token)

    def stat(self, names: Sequence[str]) -> list[ObjectInfo | None]:
        self.calls.append("stat")
        return [self._objects[name][0] if name in self._objects else None for name in names]

    def create(self, name: str, content: bytes) -> bool:
        self.calls.append("create")
        if name in self._objects:
            return False
        self.replace(name, content)
        return True

    def upload(
        self,
        files: Iterable[FileToSend],
        done: Callable[[FileToSend, bool], None],
        moved: Callable[[int], None] = ignore_moved,
    ) -> None:
        self.calls.append("upload")
        for file in files:
            done(file, self._upload_one(file))

    def _upload_one(self, file: FileToSend) -> bool:
        if not os.path.exists(file.path):
            raise DataChangedError(f"{file.path} is gone")
        with open(file.path, "rb") as local:
            content = local.read()
        if (len(content), google_crc32c.value(content)) != (file.size, file.crc32c):
            raise DataChangedError(f"{file.path} changed")
        if file.name in self._objects:
            there = self._objects[file.name][0]
            if (there.size, there.crc32c) != (file.size, file.crc32c):
                raise ConflictError(f"{file.name} holds other bytes")
            return False
        self.replace(file.name, content, file.digest.hex())
        return True

    def download(
        self,
        objects: Iterable[ObjectToFetch],
        done: Callable[[ObjectToFetch], None],
        moved: Callable[[int], None] = ignore_moved,
    ) -> None:
        self.calls.append("download")
        for wanted in objects:
            info, content = self._objects.get(wanted.info.name, (None, b""))
            if info is None or info.generation != wanted.info.generation:
                raise IntegrityError(f"{wanted.info.name} is gone or was replaced")
            if (info.size, info.crc32c) != (wanted.info.size, wanted.info.crc32c):
                raise IntegrityError(f"{wanted.info.name} disagrees with its checksum")
            with open(wanted.path, "xb") as file:
                file.write(content)
            done(wanted)

    # By the back door: what no uploader does.

    def replace(self, name: str, content: bytes, digest: str | None = None) -> None:
        self._generation += 1
        crc32c = google_crc32c.value(content)
        info = ObjectInfo(name, len(content), crc32c, self._generation, digest)
        self._objects[name] = (info, content)
        self.written.append(name)

    def delete(self, name: str) -> None:
        del self._objects[name]
