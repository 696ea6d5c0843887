"""Compare what is on disk with what a listing shows."""

from collections.abc import Iterable, Iterator

from keras_remote_airflow.core.cloud.store import ObjectInfo
from keras_remote_airflow.core.disk.snapshot import Snapshot
from keras_remote_airflow.core.layout import RESERVED_NAME


def data_objects(objects: Iterable[ObjectInfo], prefix: str) -> Iterator[tuple[bytes, ObjectInfo]]:
    """Yield relative path (UTF-8) and object for the files below a cache prefix.

    Leaves out the marker, and the empty "folder" objects that some tools make.
    """
    for info in objects:
        relative = info.name.removeprefix(prefix)
        if relative != RESERVED_NAME and not relative.endswith("/") and relative:
            yield relative.encode(), info


def matches(
    snapshot: "Snapshot",
    objects: Iterable[tuple[bytes, ObjectInfo]],
    bound: bytes | None = None,
) -> Iterator[tuple[int | None, ObjectInfo | None]]:
    """Yield each file's index with the object of its name, in the byte order of the names.

    A file without an object comes with None, and so does an object without a file. Parameters are
    those of `differences`.
    """
    names = enumerate(snapshot.names())
    wanted = (index for index, name in names if bound is None or name <= bound)
    files = iter(sorted(wanted, key=snapshot.name))
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


def differences(
    snapshot: "Snapshot",
    objects: Iterable[tuple[bytes, ObjectInfo]],
    bound: bytes | None = None,
) -> Iterator[tuple[int | None, ObjectInfo | None]]:
    """Yield where a snapshot and a listing disagree, in the byte order of the names.

    Args:
        snapshot: what is on disk.
        objects: relative paths and objects, in the byte order of the paths, as listings are.
        bound: compare files only up to this path, for a listing that was cut off there.

    Yields:
        `(index, None)` for a file without an object, `(index, object)` for one whose object has
        another size or CRC32C, `(None, object)` for an object without a file.
    """
    for index, info in matches(snapshot, objects, bound):
        if index is not None and info is not None:
            file = snapshot.record(index)
            if (file.size, file.crc32c) == (info.size, info.crc32c):
                continue
        yield index, info
