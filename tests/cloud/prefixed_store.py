"""An `ObjectStore` below a prefix of another one.

The contract suite takes names as they come, "name" or "a/1", and expects an empty bucket. Below a
prefix it can have one in a bucket that holds other things.
"""

from collections.abc import Callable, Iterable, Sequence

from keras_remote_airflow.core.cloud.store import (
    FileToSend,
    ObjectInfo,
    ObjectStore,
    ObjectToFetch,
    Page,
)


class PrefixedStore:
    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self.bucket = store.bucket
        self._store = store
        self._prefix = prefix

    def read(self, name: str) -> bytes | None:
        return self._store.read(self._prefix + name)

    def list_page(self, prefix: str, token: str | None = None) -> Page:
        page = self._store.list_page(self._prefix + prefix, token)
        return Page([self._shown(info) for info in page.objects], page.next_token)

    def stat(self, names: Sequence[str]) -> list[ObjectInfo | None]:
        found = self._store.stat([self._prefix + name for name in names])
        return [info and self._shown(info) for info in found]

    def create(self, name: str, content: bytes) -> bool:
        return self._store.create(self._prefix + name, content)

    def upload(
        self,
        uploads: Iterable[FileToSend],
        done: Callable[[FileToSend, bool], None],
        moved: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._store.upload(
            (file._replace(name=self._prefix + file.name) for file in uploads),
            lambda file, was_sent: done(
                file._replace(name=file.name.removeprefix(self._prefix)), was_sent
            ),
            moved,
        )

    def download(
        self,
        downloads: Iterable[ObjectToFetch],
        done: Callable[[ObjectToFetch], None],
        moved: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._store.download(
            (
                each._replace(info=each.info._replace(name=self._prefix + each.info.name))
                for each in downloads
            ),
            lambda each: done(each._replace(info=self._shown(each.info))),
            moved,
        )

    def _shown(self, info: ObjectInfo) -> ObjectInfo:
        return info._replace(name=info.name.removeprefix(self._prefix))
