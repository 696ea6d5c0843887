"""Find out whether a dataset is published, and whole."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.cloud.store import ObjectStore, conflict, first_page, how_to_clear, list_objects
from keras_remote_airflow.core.datasets.diff import data_objects, differences
from keras_remote_airflow.core.disk.snapshot import EMPTY_DIRECTORY_HASH, Snapshot
from keras_remote_airflow.core.errors import ConflictError, InvalidInputError, MarkerError
from keras_remote_airflow.core.layout import CacheKey, Receipt, get_layout, parse_marker

if TYPE_CHECKING:
    from keras_remote_airflow.core.cloud.retry import RetryPolicy

_log = logging.getLogger(__name__)
_VERIFY = ("page", "full")


@dataclass(frozen=True)
class CacheEntry:
    """A published dataset.

    Attributes:
        gcs_uri: where it is, without a trailing slash.
        is_dir: whether it is a directory; None if its marker does not say.
        files: number of data objects; None if its marker does not say.
        bytes: their total size; None likewise.
        published_at: when its marker was written, RFC 3339 in UTC; None likewise. Not compared.
    """

    gcs_uri: str
    is_dir: bool | None
    files: int | None
    bytes: int | None
    published_at: str | None = field(default=None, compare=False)


def find(
    bucket_name: str,
    content_hash: str,
    project: str | None = None,
    namespace_prefix: str = "default",
    *,
    client: Any = None,
    layout: str = "keras_remote",
    verify: str = "page",
    retry: "RetryPolicy | None" = None,
) -> CacheEntry | None:
    """Return the dataset published under `content_hash`, or None while there is none.

    Reads the marker and one page of the listing (`verify="full"`: all of it). A marker whose
    objects are gone counts as none, and a warning says so.

    `content_hash` is 64 hex digits; the other parameters and the errors are those of `upload`.
    """
    key = CacheKey(bucket_name, namespace_prefix, content_hash, get_layout(layout))
    check_verify(verify)
    with open_bucket(bucket_name, client, project, retry) as store:
        return lookup(store, key, verify=verify)


def lookup(
    store: ObjectStore, key: CacheKey, *, snapshot: "Snapshot | None" = None, verify: str = "page"
) -> CacheEntry | None:
    """Return the entry under `key` if its marker and its objects are there, else None.

    Args:
        store: the bucket that `key` names.
        key: the entry.
        snapshot: the data itself, where it is at hand: then the listing is compared with it,
            otherwise with the marker's receipt.
        verify: "page" or "full".
    """
    body = store.read(key.marker_name)
    if body is None:
        return None
    receipt = parse_marker(body, key)
    if snapshot is not None:
        if receipt and (receipt.files, receipt.total_bytes) != (
            len(snapshot),
            snapshot.total_bytes,
        ):
            raise MarkerError(
                f"marker gs://{key.bucket}/{key.marker_name} says {receipt.files} files with "
                f"{receipt.total_bytes} bytes, but data of this content hash has {len(snapshot)} "
                f"with {snapshot.total_bytes}. Delete that object to have it written anew."
            )
        missing = sum(1 for _ in missing_files(store, key, snapshot, only_first_page=verify == "page"))
        problem = f"{missing} of its objects are gone" if missing else None
    else:
        problem = _disagreement(store, key, receipt, verify)
    if problem:
        _log.warning(
            "%s has its marker, but %s (a lifecycle rule may have deleted them): not a hit until "
            "the data is uploaded again",
            key.gcs_uri,
            problem,
        )
        return None
    if snapshot is not None:
        known = snapshot.is_dir, len(snapshot), snapshot.total_bytes
    elif receipt:
        known = receipt.is_dir, receipt.files, receipt.total_bytes
    else:
        return CacheEntry(key.gcs_uri, None, None, None)
    published_at = (receipt.created_at or None) if receipt else None
    return CacheEntry(key.gcs_uri, *known, published_at=published_at)


def missing_files(
    store: ObjectStore, key: CacheKey, snapshot: "Snapshot", *, only_first_page: bool
) -> Iterator[int]:
    """Yield which files of the snapshot have no object; raise ConflictError for foreign objects."""
    bound = None
    if only_first_page:
        page = first_page(store, key.prefix)
        objects = iter(page.objects)
        if page.next_token is not None:
            bound = page.objects[-1].name.removeprefix(key.prefix).encode()
    else:
        objects = list_objects(store, key.prefix)
    for index, found in differences(snapshot, data_objects(objects, key.prefix), bound):
        if found is None and index is not None:
            yield index
        elif found is not None:
            uri = f"gs://{key.bucket}/{found.name}"
            if index is None:
                raise ConflictError(
                    f"{uri} ({found.size} bytes) is under this content hash but not in the data. "
                    f"Find out who wrote it; {how_to_clear(uri)}"
                )
            file = snapshot.record(index)
            path = snapshot.local_path(file.path)
            raise conflict(uri, found, path, file.size, file.crc32c)


def _disagreement(
    store: ObjectStore, key: CacheKey, receipt: Receipt | None, verify: str
) -> str | None:
    """Say how what is under `key` falls short of its receipt, or return None.

    Raises ConflictError if there are more than it says.
    """
    from keras_remote_airflow.core.disk.snapshot import EMPTY_DIRECTORY_HASH

    if receipt is None:
        # Another client's marker says nothing of its objects; only the empty directory has none.
        objects = data_objects(list_objects(store, key.prefix), key.prefix)
        some = next(objects, None) is not None
        return None if some or key.content_hash == EMPTY_DIRECTORY_HASH else "it has no objects"
    if verify == "full":
        whole, shown = True, list_objects(store, key.prefix)
    else:
        page = first_page(store, key.prefix)
        whole, shown = page.next_token is None, iter(page.objects)
    files = size = 0
    for _, info in data_objects(shown, key.prefix):
        files += 1
        size += info.size
    if files > receipt.files or size > receipt.total_bytes:
        # No upload mends this: waiting for one would be in vain.
        raise ConflictError(
            f"{key.gcs_uri} has {files} objects with {size} bytes, more than the {receipt.files} "
            f"with {receipt.total_bytes} that its marker says. Find out who wrote the others, and "
            "remove them."
        )
    if whole and (files, size) != (receipt.files, receipt.total_bytes):
        return (
            f"it has {files} objects with {size} bytes where the marker says {receipt.files} with "
            f"{receipt.total_bytes}"
        )
    return None


def check_verify(verify: str) -> None:
    if verify not in _VERIFY:
        raise InvalidInputError(f"unknown verify {verify!r}: expected one of {list(_VERIFY)}")
