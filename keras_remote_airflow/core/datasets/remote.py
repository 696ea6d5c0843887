"""The objects that a ref or a URI stands for, and how data on disk differs from them."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.cloud.store import (
    ObjectInfo,
    ObjectStore,
    encode_crc32c,
    list_objects,
)
from keras_remote_airflow.core.datasets.diff import compare, data_objects
from keras_remote_airflow.core.disk.snapshot import EMPTY_DIRECTORY_HASH, Snapshot
from keras_remote_airflow.core.errors import (
    EmptyDataError,
    IntegrityError,
    InvalidInputError,
    KerasRemoteError,
)
from keras_remote_airflow.core.layout import (
    KERAS_REMOTE,
    KINETIC,
    RESERVED_NAME,
    Receipt,
    cache_key_from_uri,
    check_relative_paths,
    parse_marker,
)
from keras_remote_airflow.core.progress import format_files
from keras_remote_airflow.core.refs import DataRef

# How many differences an error names.
_SHOWN = 5


@dataclass(frozen=True)
class Source:
    """What is at a `gs://` URI that is passed on as it is.

    Attributes:
        uri: the URI.
        files: number of objects.
        bytes: their total size.
        fingerprint: SHA-256 (hex) of one record for each file, in the byte order of the names: the
            name relative to the URI (of a single object, what follows the last "/") in UTF-8, a
            zero byte, the size in decimal, a zero byte, the CRC32C as Cloud Storage writes it
            (base64), a zero byte. A bucket with a customer-managed key lists no CRC32C; then
            "generation:" and the object's generation in decimal are in its place, because asking
            for each object could take minutes. That fingerprint is another one, too, after the
            same bytes were written again.
    """

    uri: str
    files: int
    bytes: int
    fingerprint: str


def list_source(
    uri: str,
    *,
    client: Any = None,
    user_project: str | None = None,
    retry: RetryPolicy | None = None,
) -> Source:
    """List what is at a `gs://` URI: everything below it if it ends in "/", else the one object.

    Empty "folder" objects are left out. The other parameters are those of `upload_data`.

    Raises:
        InvalidInputError: the URI is not one of Cloud Storage.
        EmptyDataError: nothing is there.
        StoreError: Cloud Storage refused, or kept failing until the deadline (120 s).
    """
    ref = DataRef(uri, is_dir=uri.endswith("/"))
    with open_bucket(ref.bucket, client, None, retry, user_project) as store:
        source = RemoteData(store, ref).list_all()
    if not source.files:
        hint = "" if ref.is_dir else " If it is meant as a folder, let it end in /."
        raise EmptyDataError(
            f"found no objects at {uri}. Check the URI, and that what writes there has done so."
            f"{hint}"
        )
    return source


class RemoteData:
    """The objects that a ref stands for.

    Attributes:
        store: the bucket they are in.
        ref: the ref.
        key: its cache entry, or None for data outside a cache.
    """

    def __init__(self, store: ObjectStore, ref: DataRef) -> None:
        self.store = store
        self.ref = ref
        self.key = ref.cache_key

    @property
    def may_be_empty(self) -> bool:
        """Whether the ref can stand for no objects at all."""
        return self.key is not None and self.key.content_hash == EMPTY_DIRECTORY_HASH

    def objects(self) -> Iterator[tuple[bytes, ObjectInfo]]:
        """Yield relative path (UTF-8) and object, in the byte order of the paths."""
        name = self.ref.object_name
        if self.ref.is_prefix:
            prefix = name.rstrip("/") + "/" if name else ""
            reserved = RESERVED_NAME if self.key else None
            return data_objects(list_objects(self.store, prefix), prefix, reserved)
        path = os.path.basename(name).encode()
        return ((path, info) for info in self.store.stat([name]) if info)

    def single_name(self) -> str:
        """Return the name of the one file behind the ref.

        Raises:
            InvalidInputError: there are several files, or one in a folder: a directory.
            IntegrityError: there is none.
        """
        found = [path for path, _ in islice(self.objects(), 2)]
        if not found:
            raise IntegrityError(
                f"found no objects at {self.ref.gcs_uri}, expected one file. Check the URI; if a "
                "lifecycle rule deleted the file, have the data uploaded again."
            )
        check_relative_paths(found, "")
        path = found[0].decode()
        if len(found) > 1 or "/" in path:
            several = "several objects, such as" if len(found) > 1 else "an object in a folder:"
            raise InvalidInputError(
                f"the ref says is_dir=False, but found {several} {path}: {self.ref.gcs_uri}. "
                "Correct the ref, or remove what does not belong there."
            )
        return path

    def list_all(self) -> Source:
        """List the objects that are there now."""
        files = size = 0
        digest = hashlib.sha256()
        for relative, info in self.objects():
            files += 1
            size += info.size or 0
            if info.crc32c is None:
                content = f"generation:{info.generation}"
            else:
                content = encode_crc32c(info.crc32c)
            digest.update(b"%b\0%d\0%b\0" % (relative, info.size or 0, content.encode()))
        return Source(self.ref.gcs_uri, files, size, digest.hexdigest())

    def numbers(self) -> tuple[int, int] | None:
        """Return how many files and bytes there are, or None if nothing tells that.

        The marker tells it. Where another client wrote that, or the data is outside a cache, the
        listing does.
        """
        if self.key is not None:
            body = self.store.read(self.key.marker_name)
            if body is None:
                return None
            with suppress(KerasRemoteError):
                if receipt := parse_marker(body, self.key):
                    return receipt.files, receipt.total_bytes
        listed = self.list_all()
        return listed.files, listed.bytes

    def receipt(self) -> Receipt | None:
        """Return the receipt in the marker, or None if there is none that can be read.

        Data is verified without it: it only helps to explain, and to tell how much there is.
        """
        if self.key is not None:
            with suppress(KerasRemoteError):
                return parse_marker(self.store.read(self.key.marker_name) or b"", self.key)
        return None

    def problem(self, snapshot: Snapshot) -> str | None:
        """Return in words how data on disk differs from what the ref names, or None if they agree.

        Numbers of files and bytes come first if they differ, then names, parted by "; ". Data in a
        cache is compared by its content hash, other data by sizes and CRC32Cs.

        Raises:
            InvalidInputError: the data is what the ref names, but the ref's `is_dir` is wrong.
        """
        if self.key is not None and snapshot.content_hash == self.key.content_hash:
            return None
        if self.key is not None and snapshot.hash_as(not self.ref.is_dir) == self.key.content_hash:
            kind = "a single file" if self.ref.is_dir else "a directory"
            raise InvalidInputError(
                f"the ref says is_dir={self.ref.is_dir}, but the data is {kind}: "
                f"{self.ref.gcs_uri}. Correct the ref."
            )
        faults = list(islice(self._faults(snapshot), _SHOWN))
        if self.key is not None:
            receipt = self.receipt()
            found = len(snapshot), snapshot.total_bytes
            if receipt and (receipt.files, receipt.total_bytes) != found:
                faults.insert(0, describe_numbers(found, (receipt.files, receipt.total_bytes)))
            faults.append(f"its content hash is {snapshot.content_hash}")
        return "; ".join(faults) or None

    def _faults(self, snapshot: Snapshot) -> Iterator[str]:
        """Yield in words how each file differs from its object, in the byte order of the names."""
        # The digests that uploaders attach; other clients attach none.
        attached = self.key is not None and any(info.digest for _, info in self.objects())
        # What is in a cache is compared by its hash, and this only explains how it differs.
        compared = compare(self.store, snapshot, self.objects(), trust_sizes=self.key is not None)
        for index, info, holds in compared:
            if index is None:
                yield f"{self._relative(info)} is missing"
                continue
            file = snapshot.record(index)
            if info is None:
                yield f"{file.path} is not in the dataset"
            elif not holds:
                yield f"{file.path} differs from its object"
            elif attached and info.digest is None:
                yield f"{file.path} was added or replaced by something else"
            elif attached and info.digest != file.digest.hex():
                yield f"{file.path} is not the file that was hashed"

    def _relative(self, info: ObjectInfo | None) -> str:
        if info is None:
            return ""
        name = self.ref.object_name
        if self.ref.is_prefix and name:
            return info.name.removeprefix(name.rstrip("/") + "/")
        return info.name if self.ref.is_prefix else os.path.basename(info.name)


def describe_numbers(found: tuple[int, int], expected: tuple[int, int]) -> str:
    """Return in words how many files and bytes were found, and how many were expected."""
    return (
        f"{format_files(found[0])} with {found[1]} bytes, expected {format_files(expected[0])} "
        f"with {expected[1]} bytes"
    )


def find_ref(store: ObjectStore, gcs_uri: str) -> DataRef:
    """Return the ref of the dataset at a URI, as its marker tells it.

    Raises:
        IntegrityError: there is no marker.
        InvalidInputError: neither the marker nor the names of the objects tell whether the dataset
            is a directory.
    """
    for layout in (KERAS_REMOTE, KINETIC):
        key = cache_key_from_uri(gcs_uri, layout)
        body = store.read(key.marker_name) if key else None
        if key is None or body is None:
            continue
        receipt = parse_marker(body, key)
        if receipt is not None:
            return DataRef(gcs_uri, receipt.is_dir, None, layout)
        # Another client's marker says nothing. A single file is one object, and not in a folder.
        directory = RemoteData(store, DataRef(gcs_uri, True, None, layout))
        names = [path for path, _ in islice(directory.objects(), 2)]
        if len(names) == 1 and b"/" not in names[0]:
            raise InvalidInputError(
                f"the marker does not say whether this is a directory or a file: {gcs_uri}. Pass "
                "a ref, made with make_data_ref(uri, is_dir)."
            )
        return directory.ref
    raise IntegrityError(
        f"found no dataset at {gcs_uri}: it has no marker. Check the URI; if a lifecycle rule "
        "deleted the dataset, have the data uploaded again."
    )
