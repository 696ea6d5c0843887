"""Compare a snapshot, which is what is on disk, with a listing, which is what is stored.

Both are read in the byte order of the names, in one pass: a merge join. Memory does not grow with
the listing.
"""

from collections.abc import Iterable, Iterator, Sequence

from keras_remote_airflow.core.cloud.store import (
    ObjectInfo,
    ObjectStore,
    conflict,
    how_to_remove,
    list_objects,
)
from keras_remote_airflow.core.disk.snapshot import Snapshot
from keras_remote_airflow.core.errors import ConflictError
from keras_remote_airflow.core.layout import RESERVED_NAME, CacheKey

# Objects that are asked for together.
_ASKED_TOGETHER = 1000


def data_objects(
    objects: Iterable[ObjectInfo], prefix: str, reserved: str | None = RESERVED_NAME
) -> Iterator[tuple[bytes, ObjectInfo]]:
    """Yield relative path (UTF-8) and object for the files below a prefix.

    Leaves out the marker of a cache (`reserved`), and the empty "folder" objects that some tools
    make. One that holds bytes is data, which no file can be; what is done with it will fail.
    """
    for info in objects:
        relative = info.name.removeprefix(prefix)
        is_folder = not info.size and (not relative or relative.endswith("/"))
        if relative != reserved and not is_folder:
            yield relative.encode(), info


def merge_join(
    snapshot: Snapshot,
    objects: Iterable[tuple[bytes, ObjectInfo]],
    last_path: bytes | None = None,
) -> Iterator[tuple[int | None, ObjectInfo | None]]:
    """Yield each file's index with the object of its name, in the byte order of the names.

    Args:
        snapshot: what is on disk.
        objects: relative paths and objects, in the byte order of the paths, as listings are.
        last_path: leave out files behind this path, for a listing that was cut off there.

    Yields:
        `(index, object)`; `(index, None)` for a file without an object, `(None, object)` for an
        object without a file.
    """
    names = enumerate(snapshot.names())
    listed = (index for index, name in names if last_path is None or name <= last_path)
    files = iter(sorted(listed, key=snapshot.name))
    index = next(files, None)
    for path, info in objects:
        while index is not None and snapshot.name(index) < path:
            yield index, None
            index = next(files, None)
        if index is None or snapshot.name(index) != path:
            yield None, info
            continue
        yield index, info
        index = next(files, None)
    while index is not None:
        yield index, None
        index = next(files, None)


def compare(
    store: ObjectStore,
    snapshot: Snapshot,
    objects: Iterable[tuple[bytes, ObjectInfo]],
    last_path: bytes | None = None,
    *,
    trust_sizes: bool = False,
) -> Iterator[tuple[int | None, ObjectInfo | None, bool]]:
    """Yield each pair of `merge_join`, and whether the object holds the file's bytes.

    Where the listing says too little to compare, the object is asked for; those come last.

    Args:
        store: the bucket of the objects.
        snapshot: what is on disk.
        objects: as in `merge_join`.
        last_path: as in `merge_join`.
        trust_sizes: don't ask for objects of which the listing has neither CRC32C nor digest.
    """
    unsure: list[tuple[int, ObjectInfo]] = []
    for index, info in merge_join(snapshot, objects, last_path):
        holds: bool | None = False
        if index is not None and info is not None:
            file = snapshot.record(index)
            holds = info.holds(file.size, file.crc32c, file.digest)
            if holds is None and not (trust_sizes and info.digest is None):
                unsure.append((index, info))
                if len(unsure) == _ASKED_TOGETHER:
                    yield from _ask(store, snapshot, unsure)
                    unsure.clear()
                continue
        yield index, info, holds is not False
    if unsure:
        yield from _ask(store, snapshot, unsure)


def _ask(
    store: ObjectStore, snapshot: Snapshot, unsure: Sequence[tuple[int, ObjectInfo]]
) -> Iterator[tuple[int, ObjectInfo | None, bool]]:
    found = store.stat([info.name for _, info in unsure])
    for (index, _), info in zip(unsure, found, strict=True):
        file = snapshot.record(index)
        yield index, info, bool(info and info.holds(file.size, file.crc32c, file.digest))


def missing_files(
    store: ObjectStore, key: CacheKey, snapshot: Snapshot, verify: str = "full"
) -> Iterator[int]:
    """Yield the index of each file of the snapshot that has no object under `key`.

    Args:
        store: the bucket that `key` names.
        key: the entry.
        snapshot: the data.
        verify: "full", or "page" for the files on the first page of the listing. With "page" the
            size is enough where the listing has neither CRC32C nor digest: nothing is asked for.

    Raises:
        ConflictError: an object under `key` holds other bytes than its file, or has no file.
    """
    objects: Iterable[ObjectInfo] = list_objects(store, key.prefix)
    last_path, is_page = None, verify == "page"
    if is_page:
        page = store.list_page(key.prefix)
        objects = page.objects
        if page.next_token is not None:
            last_path = page.objects[-1].name.removeprefix(key.prefix).encode()
    listed = data_objects(objects, key.prefix)
    for index, found, holds in compare(store, snapshot, listed, last_path, trust_sizes=is_page):
        if found is None:
            if index is not None:
                yield index
            continue
        uri = f"gs://{key.bucket}/{found.name}"
        if index is None:
            raise ConflictError(
                f"an object of {found.size} bytes is under this content hash but not in the data: "
                f"{uri}. If it should not be there, {how_to_remove(uri)}"
            )
        if not holds:
            file = snapshot.record(index)
            path = snapshot.local_path(file.path)
            raise conflict(uri, found, path, file.size, file.crc32c)
