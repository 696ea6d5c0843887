"""Publish data under the hash of its content, once.

On a miss the data is hashed, the objects that an earlier attempt left are listed, the missing ones
are uploaded, and the marker is written when every byte is stored. An upload that dies on the way
leaves objects without a marker: readers treat them as absent, and the next attempt adds the rest.
"""

import logging
import os
import random
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.cloud.store import FileToSend, ObjectStore
from keras_remote_airflow.core.data import Data, as_data, check_counts
from keras_remote_airflow.core.datasets.diff import missing_files
from keras_remote_airflow.core.datasets.lookup import Verify, check_verify, lookup
from keras_remote_airflow.core.disk.snapshot import Snapshot
from keras_remote_airflow.core.errors import (
    EmptyDataError,
    InvalidInputError,
    StoreError,
    printable,
)
from keras_remote_airflow.core.layout import (
    RESERVED_NAME,
    CacheKey,
    LayoutName,
    Receipt,
    check_bucket,
    check_namespace,
    check_relative_paths,
    get_layout,
    parse_marker,
)
from keras_remote_airflow.core.progress import (
    Progress,
    ProgressCallback,
    format_bytes,
    format_files,
)

_log = logging.getLogger(__name__)

# From this size on, keras_remote suggests reading from Cloud Storage instead of uploading.
LARGE_BYTES = 10 * 1024**3
# Names that are checked in one search.
_CHECKED_TOGETHER = 1000
# Files sent before the first look at whether another uploader is sending the same data.
_FIRST_ROUND_FILES = 16
# Objects in one page of a listing. One page costs as much as one upload.
_PAGE_OBJECTS = 1000
# Answers that contradict each other before an upload ends: one may be due to another uploader.
_MAX_CONTRADICTIONS = 5


@dataclass(frozen=True)
class UploadResult:
    """What `upload` did.

    Attributes:
        gcs_uri: where the data is.
        is_dir: whether it is a directory.
        content_hash: 64 hex digits; None for data that was on Cloud Storage already.
        cache_hit: whether it was published before, with all its objects.
        files: number of files in the data.
        bytes: their total size.
        uploaded_files: how many of them this call sent.
        uploaded_bytes: the size of those.
        seconds: how long it took, hashing included.
        published_at: for a hit, when its marker was written, RFC 3339 in UTC; None if the marker
            does not say. Not compared.
        fingerprint: of data that was on Cloud Storage already, if it was looked at: see
            `core.datasets.remote.list_source`.
    """

    gcs_uri: str
    is_dir: bool
    content_hash: str | None = None
    cache_hit: bool = False
    files: int = 0
    bytes: int = 0
    uploaded_files: int = 0
    uploaded_bytes: int = 0
    seconds: float = 0.0
    published_at: str | None = field(default=None, compare=False)
    fingerprint: str | None = None

    def stats(self) -> dict[str, Any]:
        """Return the figures as the JSON-safe dict that DataUploadOperator pushes."""
        where_and_when = ("gcs_uri", "is_dir", "published_at")
        return {name: of for name, of in asdict(self).items() if name not in where_and_when}


def upload_data(
    bucket_name: str,
    data: Data | str | os.PathLike[str],
    project: str | None = None,
    namespace_prefix: str = "default",
    *,
    client: Any = None,
    layout: LayoutName = "keras_remote",
    verify: Verify = "page",
    retry: RetryPolicy | None = None,
    hash_index: str | None = None,
    user_project: str | None = None,
    progress: ProgressCallback | None = None,
    allow_empty: bool = True,
    min_files: int = 0,
) -> str:
    """Make sure that `data` is on Cloud Storage and return its `gs://` URI.

    `gs://` data is returned as it is, without a request. Local data is read and hashed; if it is
    published under its hash, nothing is written. Otherwise its files are uploaded concurrently,
    except those that an earlier attempt left there, and the marker is written last. Nothing is ever
    overwritten or deleted: roles/storage.objectCreator and objectViewer are enough.

    Args:
        bucket_name: bare name of an existing bucket.
        data: a `Data`, or its path.
        project: project id for the client made here; None takes `get_default_project()`.
        namespace_prefix: the first part of every object name.
        client: google.cloud.storage.Client whose credentials, endpoint and extra headers to use;
            None makes one.
        layout: "keras_remote", or "kinetic" to share the cache with keras-kinetic.
        verify: how much of the listing a hit is checked against: "page" (the first 1,000 objects,
            one request) or "full".
        retry: when to try a failed request again and when to give up; None takes the defaults of
            `RetryPolicy`.
        hash_index: local file that remembers the hashes of unchanged files, see `core.disk.index`;
            None takes the environment's `KERAS_REMOTE_HASH_INDEX`, or reads every file.
        user_project: id of the project to bill, if the bucket uses Requester Pays.
        progress: called with a `core.progress.ProgressUpdate` at most every 0.1 s and at the end of
            hashing, uploading or downloading; None logs a line at most every 30 s.
        allow_empty: whether a folder without files may be published. It often stands for a volume
            that is not mounted.
        min_files: how many files there must be at least. As `allow_empty`, it counts for local
            data, published before or not; `gs://` data is not looked at.

    Raises:
        InvalidInputError: bad input, before anything is written.
        EmptyDataError: fewer files than `allow_empty` and `min_files` ask for; nothing was sent.
        DataChangedError: the data changed meanwhile; nothing was published.
        ConflictError: objects under the hash hold other bytes.
        MarkerError: the marker cannot be read.
        StoreError: Cloud Storage refused, or kept failing until the deadline (120 s).
    """
    result = upload(
        bucket_name,
        data,
        project,
        namespace_prefix,
        client=client,
        layout=layout,
        verify=verify,
        retry=retry,
        hash_index=hash_index,
        user_project=user_project,
        progress=progress,
        allow_empty=allow_empty,
        min_files=min_files,
    )
    return result.gcs_uri


def upload(
    bucket_name: str,
    data: Data | str | os.PathLike[str],
    project: str | None = None,
    namespace_prefix: str = "default",
    *,
    client: Any = None,
    layout: LayoutName = "keras_remote",
    verify: Verify = "page",
    retry: RetryPolicy | None = None,
    hash_index: str | None = None,
    user_project: str | None = None,
    progress: ProgressCallback | None = None,
    allow_empty: bool = True,
    min_files: int = 0,
    dry_run: bool = False,
) -> UploadResult:
    """Do what `upload_data` does, and return where the data is and what was done.

    The other parameters are those of `upload_data`, and so are the errors.

    Args:
        dry_run: write nothing to Cloud Storage. Data and bucket are read as for an upload, and
            the result says what would have been uploaded, and where to.
    """
    from keras_remote_airflow.core.disk.hashing import default_index, take_snapshot

    started = time.monotonic()
    check_bucket(bucket_name)
    check_namespace(namespace_prefix)
    chosen_layout = get_layout(layout)
    check_verify(verify)
    check_counts(allow_empty, min_files)
    data = as_data(data)
    if data.is_gcs:
        _log.info("Passing on data that is on Cloud Storage already: %s", data.path)
        return UploadResult(data.path, data.is_dir)

    snapshot = take_snapshot(data.path, hash_index or default_index(), progress=progress)
    if len(snapshot) < (expected := max(min_files, 0 if allow_empty else 1)):
        raise EmptyDataError(
            f"found {format_files(len(snapshot))}, expected at least {expected}; perhaps a volume "
            f"is not mounted: {snapshot.root}. Nothing was uploaded. If there may be so few files, "
            "pass allow_empty=True or a lower min_files."
        )
    key = CacheKey(bucket_name, namespace_prefix, snapshot.content_hash, chosen_layout)
    _check_names(snapshot, key)
    sent = Progress(_log, "Comparing" if dry_run else "Uploading", key.gcs_uri, progress)
    with open_bucket(bucket_name, client, project, retry, user_project) as store:
        found = lookup(store, key, snapshot, verify)
        if isinstance(found, str):
            warn_of_odd_data(snapshot)
            if dry_run:
                for index in missing_files(store, key, snapshot):
                    sent.add(1, snapshot.record(index).size)
            else:
                publish(store, key, snapshot, sent, found)
    result = UploadResult(
        key.gcs_uri,
        snapshot.is_dir,
        snapshot.content_hash,
        cache_hit=not isinstance(found, str),
        files=len(snapshot),
        bytes=snapshot.total_bytes,
        uploaded_files=sent.files,
        uploaded_bytes=sent.bytes,
        seconds=round(time.monotonic() - started, 3),
        published_at=None if isinstance(found, str) else found.published_at,
    )
    _log.info(
        "%s %d of %s (%s of %s) in %.1f s, cache %s: %s to %s",
        "Would upload" if dry_run else "Uploaded",
        result.uploaded_files,
        format_files(result.files),
        format_bytes(result.uploaded_bytes),
        format_bytes(result.bytes),
        result.seconds,
        "hit" if result.cache_hit else f"miss ({found})",
        printable(snapshot.root),
        result.gcs_uri,
    )
    return result


def _check_names(snapshot: Snapshot, key: CacheKey) -> None:
    names = snapshot.names()
    while some := list(islice(names, _CHECKED_TOGETHER)):
        check_relative_paths(some, key.prefix)
        if RESERVED_NAME.encode() in some:
            raise InvalidInputError(
                "a file has the name that is reserved for the cache's own marker: "
                f"{snapshot.local_path(RESERVED_NAME)}. Rename or remove it."
            )


def warn_of_odd_data(snapshot: Snapshot) -> None:
    """Log a warning for a dataset without files, and for one of more than `LARGE_BYTES`."""
    if not len(snapshot):
        _log.warning(
            "The dataset is empty, without files. Is the volume mounted? %s",
            printable(snapshot.root),
        )
    if snapshot.total_bytes > LARGE_BYTES:
        _log.warning(
            "The dataset has %s. Consider keeping data of this size on Cloud Storage and passing "
            'its URI (Data("gs://…")), with I/O that streams (tf.data, grain): %s',
            format_bytes(snapshot.total_bytes),
            printable(snapshot.root),
        )


def publish(
    store: ObjectStore, key: CacheKey, snapshot: Snapshot, sent: Progress, why: str
) -> None:
    """Store the objects that are missing under `key`, then the marker.

    Args:
        store: the bucket that `key` names.
        key: the entry.
        snapshot: the data.
        sent: counts the files and bytes that were sent.
        why: in words, why this is a miss.
    """
    missing = _missing_from_random_start(store, key, snapshot)
    _log.info(
        "Uploading %d of %s, cache miss (%s): %s to %s",
        len(missing),
        format_files(len(snapshot)),
        why,
        printable(snapshot.root),
        key.gcs_uri,
    )
    with sent:
        _send(store, key, snapshot, missing, sent)
    receipt = Receipt.now(
        snapshot.content_hash,
        is_dir=snapshot.is_dir,
        files=len(snapshot),
        total_bytes=snapshot.total_bytes,
    )
    # The marker goes last: readers take its presence to mean "all bytes are here".
    for _ in range(_MAX_CONTRADICTIONS):
        if store.create(key.marker_name, receipt.to_json()):
            return
        # Another uploader was first, or the marker was still there when its objects were not. It
        # counts if it can be read; if it is gone by now, ours is written after all.
        if (body := store.read(key.marker_name)) is not None:
            parse_marker(body, key)
            return
    raise StoreError(
        f"the marker is said to be there and then not to be there, {_MAX_CONTRADICTIONS} times: "
        f"{key.marker_uri}. Find out what deletes it, then try again.",
        transient=True,
    )


def _send(
    store: ObjectStore, key: CacheKey, snapshot: Snapshot, missing: "array[int]", sent: Progress
) -> None:
    """Store these files of the snapshot, except those that another uploader stores meanwhile.

    Trying to send a file that another uploader has stored costs a request; listing the objects
    costs one for each 1,000 files. So files are sent in rounds, each twice as large as the one
    before. When the files found stored have cost more requests than a listing, the objects are
    listed and the rounds begin anew.
    """
    found_there = 0
    unsettled: set[str] = set()

    def files(indices: "array[int]") -> Iterator[FileToSend]:
        for index in indices:
            file = snapshot.record(index)
            name = key.object_name(file.path)
            unsettled.add(name)
            yield FileToSend(
                snapshot.local_path(file.path),
                name,
                file.size,
                file.mtime_ns,
                file.crc32c,
                file.digest,
            )

    def done(file: FileToSend, was_sent: bool) -> None:
        nonlocal found_there
        unsettled.remove(file.name)
        if was_sent:
            sent.add(1, file.size)
        else:
            sent.skip(1, file.size)
            found_there += 1
        _log.debug("%s %s", "Stored" if was_sent else "Found", file.name)

    while missing:
        listed = len(missing)
        sent.expect(listed, _total_bytes(snapshot, missing))
        round_files, found_there = _FIRST_ROUND_FILES, 0
        while missing and found_there <= len(snapshot) // _PAGE_OBJECTS:
            these = files(missing[:round_files])
            store.upload(these, done, sent.move)
            # The marker will say that all files are there, so each must have been accounted for.
            if lost := [*unsettled, *(file.name for file in these)]:
                raise StoreError(
                    f"{format_files(len(lost))} neither sent nor found there, such as {lost[0]}. "
                    "Nothing was published. Try again.",
                    transient=True,
                )
            missing = missing[round_files:]
            round_files *= 2
        if missing:
            missing = _missing_from_random_start(store, key, snapshot)
            if len(missing) >= listed:
                raise StoreError(
                    f"{format_files(listed)} missing in one listing and {len(missing)} in the "
                    f"next, though some were stored or found in between: {key.gcs_uri}. Find out "
                    "what deletes objects there, then try again.",
                    transient=True,
                )


def _missing_from_random_start(
    store: ObjectStore, key: CacheKey, snapshot: Snapshot
) -> "array[int]":
    """Return which files have no object, rotated so that a random one comes first.

    Several uploaders of the same data then begin at different files and share the work, where they
    would otherwise race for each object.
    """
    missing = array("Q", missing_files(store, key, snapshot))
    start = random.randrange(len(missing)) if missing else 0  # noqa: S311 - no secret
    return missing[start:] + missing[:start]


def _total_bytes(snapshot: Snapshot, files: "array[int]") -> int:
    if len(files) == len(snapshot):
        return snapshot.total_bytes
    return sum(snapshot.record(index).size for index in files)
