"""Find out whether a dataset is published, and whole."""

import logging
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.cloud.store import ObjectStore
from keras_remote_airflow.core.datasets.diff import missing_files, stored_files
from keras_remote_airflow.core.disk.snapshot import EMPTY_DIRECTORY_HASH, Snapshot
from keras_remote_airflow.core.errors import ConflictError, InvalidInputError, MarkerError
from keras_remote_airflow.core.layout import CacheKey, LayoutName, Receipt, get_layout, parse_marker

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
        return lookup(store, key, verify=verify)


def check_verify(verify: str) -> None:
    """Raise InvalidInputError unless `verify` is a value of the parameter of that name."""
    if verify not in get_args(Verify):
        raise InvalidInputError(
            f"unknown verify {verify!r}: expected one of {list(get_args(Verify))}"
        )


def lookup(
    store: ObjectStore, key: CacheKey, *, snapshot: Snapshot | None = None, verify: str = "page"
) -> CacheEntry | None:
    """Return the entry under `key` if its marker and its objects are there, else None.

    Args:
        store: the bucket that `key` names.
        key: the entry.
        snapshot: the data itself, where it is at hand: then the listing is compared with it,
            otherwise with the marker's receipt.
        verify: "page" or "full".

    Raises:
        ConflictError: there are objects that are not part of the dataset.
        MarkerError: the marker cannot be read, or contradicts the data.
    """
    body = store.read(key.marker_name)
    if body is None:
        return None
    receipt = parse_marker(body, key)
    known: tuple[bool | None, int | None, int | None]
    if snapshot is not None:
        known = snapshot.is_dir, len(snapshot), snapshot.total_bytes
        if receipt is not None and (receipt.files, receipt.total_bytes) != known[1:]:
            raise MarkerError(
                f"marker says {receipt.files} files with {receipt.total_bytes} bytes, but data of "
                f"this content hash has {known[1]} files with {known[2]} bytes: {key.marker_uri}. "
                "Delete that object to have it written anew."
            )
        count = sum(1 for _ in missing_files(store, key, snapshot, verify))
        shortfall = f"{count} of {len(snapshot)} objects missing" if count else None
    elif receipt is not None:
        known = receipt.is_dir, receipt.files, receipt.total_bytes
        shortfall = _shortfall(store, key, receipt, verify)
    else:  # another client's marker, which does not say how much there is
        known = None, None, None
        is_empty = key.content_hash != EMPTY_DIRECTORY_HASH and not any(
            stored_files(store, key, "full")[0]
        )
        shortfall = "no objects found" if is_empty else None
    if shortfall:
        _log.warning(
            "Ignoring a marker: %s, perhaps deleted by a lifecycle rule. The next upload restores "
            "them: %s",
            shortfall,
            key.gcs_uri,
        )
        return None
    published_at = (receipt.created_at or None) if receipt else None
    is_dir, files, total_bytes = known
    return CacheEntry(key.gcs_uri, is_dir, files, total_bytes, published_at)


def _shortfall(store: ObjectStore, key: CacheKey, receipt: Receipt, verify: str) -> str | None:
    """Return in words how the objects under `key` fall short of the receipt, or None.

    Raises ConflictError if they are more than the receipt says.
    """
    files = size = 0
    shown, last_path = stored_files(store, key, verify)
    for _, info in shown:
        files += 1
        size += info.size
    if files > receipt.files or size > receipt.total_bytes:
        # An upload does not mend this, so a sensor that waits for one must fail instead.
        raise ConflictError(
            f"the dataset has {files} objects with {size} bytes, more than the {receipt.files} "
            f"objects with {receipt.total_bytes} bytes in its marker: {key.gcs_uri}. Find out who "
            "wrote the others, and remove them."
        )
    if last_path is None and (files, size) != (receipt.files, receipt.total_bytes):
        return (
            f"{files} of {receipt.files} objects with {size} of {receipt.total_bytes} bytes found"
        )
    return None
