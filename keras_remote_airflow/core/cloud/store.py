"""Objects in one bucket: what datasets ask of a store.

DAG files import this, so it imports nothing heavy. What talks to Cloud Storage (`core.cloud.gcs`)
is imported when a bucket is opened.
"""

import base64
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from keras_remote_airflow.core.errors import ConflictError, StoreError


class ObjectInfo(NamedTuple):
    """What an answer of the server says about one object; None for what it doesn't say.

    Listings of buckets with a customer-managed key have no CRC32C.

    Attributes:
        name: in the bucket.
        size: bytes.
        crc32c: of the content.
        generation: which version of the object this is.
        digest: the file digest that the uploader attached, hex, or None.
    """

    name: str
    size: int | None
    crc32c: int | None
    generation: int | None
    digest: str | None = None

    def holds(self, size: int, crc32c: int, digest: bytes) -> bool | None:
        """Return whether the object holds the bytes of this file; None if that isn't known.

        Args:
            size: of the file.
            crc32c: of its content.
            digest: its file digest, raw; it decides where the server says too little.
        """
        if self.crc32c == crc32c and self.size == size:
            return True
        if self.size not in (None, size) or self.crc32c not in (None, crc32c):
            return False
        return True if self.digest == digest.hex() else None


class Page(NamedTuple):
    """One page of a listing, in the byte order of the names; the last has no next token."""

    objects: list[ObjectInfo]
    next_token: str | None


class FileToSend(NamedTuple):
    """A local file to store.

    Attributes:
        path: the local file.
        name: the object's name.
        size: bytes when it was hashed.
        mtime_ns: its modification time then, modulo 2^64.
        crc32c: of its content then.
        digest: its file digest, raw.
    """

    path: str
    name: str
    size: int
    mtime_ns: int
    crc32c: int
    digest: bytes


class ObjectToFetch(NamedTuple):
    """An object to fetch into `path`, a file that does not exist yet."""

    info: ObjectInfo
    path: str


def ignore_moved(moved: int) -> None:
    """Ignore how many bytes moved."""


class ObjectStore(Protocol):
    """What the cache needs of a bucket. Every method raises StoreError when the store refuses."""

    bucket: str

    def read(self, name: str) -> bytes | None:
        """Return a marker's content, or None if there is no such object.

        If it is larger than `MAX_MARKER_BYTES`, only a little more than that is returned.
        """

    def list_page(self, prefix: str, token: str | None = None) -> Page:
        """Return one page of the objects whose names begin with `prefix`.

        A page without objects is the last one.
        """

    def stat(self, names: Sequence[str]) -> list[ObjectInfo | None]:
        """Ask for each of these objects, concurrently; None for one that is not there.

        What is returned has size and CRC32C, whatever listings of the bucket lack.
        """

    def create(self, name: str, content: bytes) -> bool:
        """Store a small object unless the name is taken; return whether it was stored."""

    def upload(
        self,
        files: Iterable[FileToSend],
        done: Callable[[FileToSend, bool], None],
        moved: Callable[[int], None] = ignore_moved,
    ) -> None:
        """Store files concurrently; objects that hold the same bytes already are left alone.

        Args:
            files: consumed as places become free, so it may be a generator over many (but not
                one that uses this store).
            done: called for each file, with whether it was sent (rather than found there).
            moved: called with the bytes of a large file as they move, negative for those that
                have to be sent again, and for all of them just before the file is done.

        Raises:
            DataChangedError: a file is not as it was hashed; it was not stored.
            ConflictError: an object of that name holds other bytes.
        """

    def download(
        self,
        objects: Iterable[ObjectToFetch],
        done: Callable[[ObjectToFetch], None],
        moved: Callable[[int], None] = ignore_moved,
    ) -> None:
        """Fetch objects concurrently into new files, checking size and CRC32C; see `upload`.

        Raises:
            IntegrityError: an object is gone, was replaced, or its bytes disagree with its
                checksum time and again.
        """


class AsyncReader(Protocol):
    """What an asynchronous look needs of a bucket; see the methods of `ObjectStore`."""

    async def aread(self, name: str) -> bytes | None:
        """Do what `read` does."""

    async def alist_page(self, prefix: str, token: str | None = None) -> Page:
        """Do what `list_page` does."""


def list_objects(store: ObjectStore, prefix: str) -> Iterator[ObjectInfo]:
    """Yield every object whose name begins with `prefix`, in the byte order of the names.

    Their sizes are known: objects that are listed without one are asked for.
    """
    token, last = None, ""
    while True:
        page = store.list_page(prefix, token)
        for info in _with_sizes(store, page.objects):
            if info.name <= last:
                raise StoreError(
                    "the server's answer is not a Cloud Storage answer, or is incomplete "
                    f"(it lists {info.name} after {last}): gs://{store.bucket}/{prefix}"
                )
            last = info.name
            yield info
        token = page.next_token
        if token is None:
            return


def _with_sizes(store: ObjectStore, objects: list[ObjectInfo]) -> list[ObjectInfo]:
    unsized = [info.name for info in objects if info.size is None]
    if not unsized:
        return objects
    asked = iter(store.stat(unsized))
    known = (next(asked) if info.size is None else info for info in objects)
    return [info for info in known if info is not None]  # those that are gone by now are left out


def conflict(uri: str, there: ObjectInfo, path: str, size: int, crc32c: int) -> ConflictError:
    """Return the error for an object that holds other bytes than the file that belongs there."""
    found = "unknown" if there.crc32c is None else encode_crc32c(there.crc32c)
    return ConflictError(
        f"an object holds other bytes: {there.size} (CRC32C {found}), expected {size} "
        f"({encode_crc32c(crc32c)}): {uri}, from {path}. Nothing was overwritten. If the object "
        f"should not be there, {how_to_remove(uri)}"
    )


def encode_crc32c(crc32c: int) -> str:
    """Return a CRC32C as Cloud Storage writes it: base64 of its four bytes, big-endian."""
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()


def how_to_remove(uri: str) -> str:
    """Return in words how to remove an object, whose name may be chosen by a stranger."""
    if set(uri) & set("*?[") or not uri.isprintable():  # gcloud would take it for a pattern
        return "remove it in the Cloud Storage console"
    return f"remove it: gcloud storage rm {shlex.quote(uri)}"
