"""Find out whether a dataset is published, and whole."""

import logging
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.cloud.store import AsyncReader, ObjectStore
from keras_remote_airflow.core.datasets.diff import data_objects, missing_files
from keras_remote_airflow.core.disk.snapshot import EMPTY_DIRECTORY_HASH, Snapshot
from keras_remote_airflow.core.errors import ConflictError, InvalidInputError, MarkerError
from keras_remote_airflow.core.layout import CacheKey, LayoutName, get_layout, parse_marker

_log = logging.getLogger(__name__)
# The values of the `verify` parameter everywhere.
Verify = Literal["page", "full"]


@dataclass(frozen=True)
class CacheEntry:
    """A published dataset.

    Attributes:
        gcs_uri: where it is, without a trailing slash.
        is_dir: whether it is a directory; None if its marker does not say.
        files: number of data objects; None if its marker does not say.
        bytes: their total size; None if its marker does not say.
        published_at: when its marker was written, RFC 3339 in UTC; None if the marker does not say.
            Not compared.
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
    layout: LayoutName = "keras_remote",
    verify: Verify = "page",
    retry: RetryPolicy | None = None,
    user_project: str | None = None,
) -> CacheEntry | None:
    """Return the dataset published under `content_hash`, or None while there is none.

    Reads the marker and one page of the listing (`verify="full"`: all of it). A marker whose
    objects are gone counts as none, and a warning says so.

    The other parameters are those of `upload_data`, and so are the errors.

    Args:
        content_hash: 64 hex digits, as `Data.content_hash` returns them.
    """
    key = CacheKey(bucket_name, namespace_prefix, content_hash, get_layout(layout))
    check_verify(verify)
    with open_bucket(bucket_name, client, project, retry, user_project) as store:
        return store.run(look(store, key, verify))


def check_verify(verify: str) -> None:
    """Raise InvalidInputError unless `verify` is a value of the parameter of that name."""
    if verify not in get_args(Verify):
        expected = list(get_args(Verify))
        raise InvalidInputError(f"unknown verify {verify!r}: expected one of {expected}")


async def look(store: AsyncReader, key: CacheKey, verify: str = "page") -> CacheEntry | None:
    """Return the entry under `key` if its marker and its objects are there, else None.

    The listing is compared with the marker's receipt, by number and size of the objects.

    Args:
        store: the bucket that `key` names.
        key: the entry.
        verify: "page" or "full".

    Raises:
        ConflictError: there are objects that are not part of the dataset.
        MarkerError: the marker cannot be read.
    """
    body = await store.aread(key.marker_name)
    if body is None:
        return None
    receipt = parse_marker(body, key)
    files, size, unsized, token, is_enough = 0, 0, 0, None, False
    while not is_enough:
        page = await store.alist_page(key.prefix, token)
        for _, info in data_objects(page.objects, key.prefix):
            files += 1
            size += info.size or 0
            unsized += info.size is None
        token = page.next_token
        if receipt is None:  # then all that can be seen is whether there is anything
            is_enough = files > 0 or token is None
        else:
            is_enough = files > receipt.files or verify == "page" or token is None
    if receipt is None:  # another client's marker
        if not files and key.content_hash != EMPTY_DIRECTORY_HASH:
            _warn_of_eviction("no objects found", key)
            return None
        return CacheEntry(key.gcs_uri, None, None, None)
    expected = receipt.files, receipt.total_bytes
    if unsized:  # then the number of objects has to do
        size = receipt.total_bytes
    if files > receipt.files or size > receipt.total_bytes:
        # An upload does not mend this, so a sensor that waits for one must fail instead.
        raise ConflictError(
            f"found {files} objects with {size} bytes, more than the marker's {receipt.files} with "
            f"{receipt.total_bytes}: {key.gcs_uri}. Find out who wrote the others, and remove them."
        )
    if token is None and (files, size) != expected:
        _warn_of_eviction(
            f"{files} of {receipt.files} objects with {size} of {receipt.total_bytes} bytes found",
            key,
        )
        return None
    return CacheEntry(key.gcs_uri, receipt.is_dir, *expected, receipt.created_at or None)


def lookup(
    store: ObjectStore, key: CacheKey, snapshot: Snapshot, verify: str = "page"
) -> CacheEntry | str:
    """Return the entry under `key` if it is whole, or else say in words why it is a miss.

    Args:
        store: the bucket that `key` names.
        key: the entry.
        snapshot: the data itself, which the listing is compared with.
        verify: "page" or "full".

    Raises:
        ConflictError: there are objects that are not part of the dataset.
        MarkerError: the marker cannot be read, or contradicts the data.
    """
    body = store.read(key.marker_name)
    if body is None:
        return "no marker"
    receipt = parse_marker(body, key)
    known = len(snapshot), snapshot.total_bytes
    if receipt is not None and (receipt.files, receipt.total_bytes) != known:
        raise MarkerError(
            f"marker says {receipt.files} files with {receipt.total_bytes} bytes, but the data has "
            f"{known[0]} with {known[1]}: {key.marker_uri}. Delete that object to have it written "
            "anew."
        )
    missing = sum(1 for _ in missing_files(store, key, snapshot, verify))
    if missing:
        shortfall = f"{missing} of {len(snapshot)} objects missing"
        _warn_of_eviction(shortfall, key)
        return shortfall
    published_at = (receipt.created_at or None) if receipt else None
    return CacheEntry(key.gcs_uri, snapshot.is_dir, *known, published_at)


def _warn_of_eviction(shortfall: str, key: CacheKey) -> None:
    _log.warning(
        "Ignoring a marker: %s, perhaps deleted by a lifecycle rule. The next upload restores "
        "them: %s",
        shortfall,
        key.gcs_uri,
    )
