"""Turn a data ref into a verified local path.

Objects are downloaded into a directory beside the destination, each checked against its size and
CRC32C; then the whole is hashed anew, from disk, and only if it is what the ref names it is
renamed into place. Who opens the destination finds nothing or everything.

The temporary directory has a name that follows from the destination's, `.keras-remote-….partial`,
and is locked (flock) by whoever fills it: a second process waits and then reuses the result, and
what a killed one left behind is swept by the next.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.cloud.store import ObjectToFetch, ObjectInfo, ObjectStore, first_page, list_objects
from keras_remote_airflow.core.datasets.diff import data_objects, differences, matches
from keras_remote_airflow.core.disk.destination import check_dest, default_dest, is_taken, locked, mode_for, mount_point, rename, partial_name
from keras_remote_airflow.core.disk.snapshot import EMPTY_DIRECTORY_HASH, Snapshot
from keras_remote_airflow.core.errors import IntegrityError, InvalidInputError, KerasRemoteError
from keras_remote_airflow.core.layout import CacheKey, Receipt, check_relative_path, parse_marker, split_gcs_uri
from keras_remote_airflow.core.progress import Progress, format_bytes
from keras_remote_airflow.core.refs import DataRef, parse_data_ref

if TYPE_CHECKING:
    from keras_remote_airflow.core.cloud.retry import RetryPolicy

_log = logging.getLogger(__name__)
# Objects listed before they are downloaded: bounds memory whatever the size of the dataset.
_BATCH = 10_000
# How many of the things that are wrong with data an error names.
_SHOWN = 5


def materialize(
    ref: object,
    dest: str | None = None,
    *,
    cache_dir: str | None = None,
    client: Any = None,
    project: str | None = None,
    retry: "RetryPolicy | None" = None,
) -> str:
    """Download the data that `ref` names, verify it, and return its local path.

    Data from a cache is verified against the content hash in its URI. Other `gs://` data has no
    such hash: every object is checked against its size and CRC32C, that is, against damage on the
    way, and that is all that can be promised. Objects are fetched as they are stored; those with
    `Content-Encoding: gzip` stay compressed.

    Args:
        ref: the data ref: the dict, its JSON or its Python repr.
        dest: the directory to hold the data: it becomes the dataset, or gets the single file under
            its own name. None takes the ref's `mount_path`, else a directory in `cache_dir` named
            by the content. Data that is there already is verified and reused.
        cache_dir: None takes `keras-remote-data-{uid}` in the system's temporary directory.
        client: google.cloud.storage.Client whose credentials and endpoint to use; None makes one.
        project: project id for the client made here; None takes `get_default_project()`.
        retry: when to try a failed request again and when to give up; None takes the defaults of
            `core.cloud.retry.RetryPolicy`.

    Returns:
        The absolute path of the directory, or of the file.

    Raises:
        InvalidInputError: a malformed ref, an object name that leads out of the destination, a
            destination that holds something else.
        IntegrityError: what is stored is not what the ref names; the destination is untouched.
        StoreError: Cloud Storage refused, or kept failing until the deadline (120 s).
        OSError: the destination cannot be written, or the disk is full.
    """
    from keras_remote_airflow.core.disk.hashing import take_snapshot

    parsed = parse_data_ref(ref)
    key = parsed.cache_key
    target = os.path.expanduser(dest) if dest else parsed.mount_path
    if key and not target:
        target = default_dest(key.content_hash, cache_dir)
    if target:
        target = check_dest(target)
    held = None
    if key and parsed.is_dir and target and is_taken(target):
        held = take_snapshot(target)
        if held.content_hash == key.content_hash:  # needs no network
            return _reuse(parsed, target, None)
    with open_bucket(split_gcs_uri(parsed.gcs_uri)[0], client, project, retry) as store:
        source = _RefData(store, parsed, key)
        if held is not None and target:
            return _reuse(parsed, target, source.problem(held))
        target = target or check_dest(default_dest(source.fingerprint(), cache_dir))
        if parsed.is_dir:
            return _fetch(source, os.path.dirname(target), target)
        return _fetch(source, target, os.path.join(target, source.single_name()))


@dataclass(frozen=True)
class _RefData:
    """The objects behind a ref.

    Attributes:
        store: the bucket they are in.
        ref: the ref.
        key: its cache entry, or None for data outside a cache.
    """

    store: ObjectStore
    ref: DataRef
    key: CacheKey | None

    def objects(self) -> Iterator[tuple[bytes, ObjectInfo]]:
        """Yield relative path (UTF-8) and object, in the byte order of the paths."""
        if self.key:
            return data_objects(list_objects(self.store, self.key.prefix), self.key.prefix)
        name = split_gcs_uri(self.ref.gcs_uri)[1]
        if self.ref.is_dir:
            prefix = name.rstrip("/") + "/" if name else ""
            return data_objects(list_objects(self.store, prefix), prefix)
        page = first_page(self.store, name)  # the name itself goes before all that begin with it
        return ((os.path.basename(name).encode(), o) for o in page.objects if o.name == name)

    def single_name(self) -> str:
        """Return the name of the one file behind the ref; raise IntegrityError unless it is one."""
        found = list(islice(self.objects(), 2))
        if len(found) != 1:
            raise IntegrityError(
                f"{self.ref.gcs_uri} should be one file, but "
                + ("nothing is there" if not found else f"holds several: {found[0][1].name}, …")
                + ". Check is_dir in the ref, and whether a lifecycle rule deleted the data."
            )
        path = found[0][0]
        check_relative_path(path, "")
        if b"/" in path:
            raise IntegrityError(
                f"{self.ref.gcs_uri} should be one file, but holds {found[0][1].name}. Check "
                "is_dir in the ref."
            )
        return path.decode()

    def fingerprint(self) -> str:
        """Return a hash of which objects, in which generation, the ref stands for just now."""
        digest = hashlib.sha256(self.ref.gcs_uri.encode())
        for _, info in self.objects():
            digest.update(f"\0{info.name}\0{info.generation}".encode())
        return digest.hexdigest()

    def problem(self, snapshot: "Snapshot") -> str | None:
        """Say how data on disk differs from what the ref names, or return None."""
        if self.key and snapshot.content_hash == self.key.content_hash:
            return None
        found = islice(differences(snapshot, self.objects()), _SHOWN)
        faults = [_fault(snapshot, *difference) for difference in found]
        if self.key:
            self._check_kind(snapshot)
            faults += self._unlike_uploaded(snapshot) + self._unlike_receipt(snapshot)
            faults.append(f"its content hash is {snapshot.content_hash}")
        return "; ".join(faults[:_SHOWN]) or None

    def _check_kind(self, snapshot: "Snapshot") -> None:
        assert self.key is not None  # noqa: S101 - for the type checker; only called with a key
        if snapshot.hash_as(not self.ref.is_dir) == self.key.content_hash:
            kind = "a single file" if self.ref.is_dir else "a directory"
            raise InvalidInputError(
                f"the ref says is_dir={self.ref.is_dir}, but {self.ref.gcs_uri} is {kind}. Correct "
                "the ref."
            )

    def _unlike_uploaded(self, snapshot: "Snapshot") -> list[str]:
        """Name files that differ from the digest which their uploader attached."""
        foreign: list[str] = []
        changed: list[str] = []
        expected = False  # other clients attach none
        for index, info in matches(snapshot, self.objects()):
            expected = expected or bool(info and info.digest)
            if index is None or info is None:
                continue  # `differences` has named it
            file = snapshot.record(index)
            if info.digest is None:
                if len(foreign) < _SHOWN:
                    foreign.append(f"{file.path} was added or replaced by something else")
            elif info.digest != file.digest.hex() and len(changed) < _SHOWN:
                changed.append(f"{file.path} is not the file that was hashed")
        return foreign + changed if expected else changed

    def receipt(self) -> Receipt | None:
        """Return what the uploader noted, or None if there is no note that can be read.

        The data is verified without it; it only helps to explain.
        """
        with suppress(KerasRemoteError):
            body = self.store.read(self.key.marker_name) if self.key else None
            return parse_marker(body, self.key) if self.key and body else None
        return None

    def _unlike_receipt(self, snapshot: "Snapshot") -> list[str]:
        receipt = self.receipt()
        if receipt is None or (receipt.files, receipt.total_bytes) == (
            len(snapshot),
            snapshot.total_bytes,
        ):
            return []
        return [
            f"its marker says {receipt.files} files with {receipt.total_bytes} bytes, found "
            f"{len(snapshot)} with {snapshot.total_bytes}"
        ]


def _fault(snapshot: "Snapshot", index: int | None, info: ObjectInfo | None) -> str:
    if index is None:
        return f"{info.name if info else ''} is missing on disk"
    path = snapshot.record(index).path
    return f"{path} differs from its object" if info else f"{path} has no object"


def _reuse(ref: DataRef, final: str, problem: str | None) -> str:
    """Return `final`, which something is at, unless there is a problem with that."""
    if problem:
        raise InvalidInputError(
            f"destination {final} holds something other than {ref.gcs_uri} ({problem}). Nothing "
            "was overwritten: choose another dest, or remove it."
        )
    _log.info("Reusing %s: it holds %s", final, ref.gcs_uri)
    return final


def _fetch(source: _RefData, folder: str, final: str) -> str:
    """Fill `final` through a directory of our own in `folder`, which is on the same file system."""
    from keras_remote_airflow.core.disk.hashing import take_snapshot

    os.makedirs(folder, exist_ok=True)
    partial = os.path.join(folder, partial_name(final))
    with locked(partial):
        if is_taken(final):
            return _reuse(source.ref, final, source.problem(take_snapshot(final)))
        if os.path.ismount(final):
            raise mount_point(final)
        if os.path.isdir(final) and not source.ref.is_dir:
            raise InvalidInputError(
                f"destination {final} is a directory, but {source.ref.gcs_uri} is a single file. "
                "Remove the directory, or choose another dest."
            )
        if os.path.isdir(final) and os.path.samefile(final, os.curdir):
            raise InvalidInputError(
                f"destination {final} is the current directory, which cannot be replaced as a "
                "whole. Choose a directory inside it."
            )
        progress = _download(source, partial)
        if not progress.files and not _may_be_empty(source):
            raise IntegrityError(
                f"{source.ref.gcs_uri} is not what its ref names: no objects are there. Check the "
                "URI; if a lifecycle rule deleted them, have the data uploaded again."
            )
        whole = partial if source.ref.is_dir else os.path.join(partial, os.path.basename(final))
        downloaded = progress.files, progress.bytes
        problem = source.problem(take_snapshot(whole, expected=downloaded))
        if problem:
            raise IntegrityError(
                f"{source.ref.gcs_uri} is not what its ref names: {problem}. Nothing was left at "
                f"{final}. Remove what is under that URI, marker included, and have the data "
                "uploaded again."
            )
        if source.ref.is_dir:
            os.chmod(partial, mode_for(final))
        rename(whole, final)
    _log.info(
        "Materialized %d files (%s) in %.1f s at %s: %s",
        progress.files,
        format_bytes(progress.bytes),
        progress.seconds,
        final,
        source.ref.gcs_uri,
    )
    return final


def _download(source: _RefData, folder: str) -> Progress:
    made = {folder}

    def downloads(batch: list[tuple[bytes, ObjectInfo]]) -> Iterator[ObjectToFetch]:
        for relative, info in batch:
            check_relative_path(relative, "")
            path = os.path.join(folder, relative.decode())
            parent = os.path.dirname(path)
            if parent not in made:
                os.makedirs(parent, exist_ok=True)
                made.add(parent)
            yield ObjectToFetch(info, path)

    objects = source.objects()
    with Progress(_log, f"Downloading {source.ref.gcs_uri}") as progress:
        while batch := list(islice(objects, _BATCH)):
            if not progress.files:
                _expect(progress, source, batch)
            try:
                source.store.download(
                    downloads(batch), lambda done: progress.add(1, done.info.size), progress.move
                )
            except (FileExistsError, NotADirectoryError) as exc:
                # The folder was empty: two object names claim one place, as "a" and "a/b" do.
                place = os.path.relpath(exc.filename, folder)
                raise IntegrityError(
                    f"{source.ref.gcs_uri} cannot be a directory: more than one object claims "
                    f"{place}. Remove the one that does not belong there."
                ) from exc
    return progress


def _expect(progress: Progress, source: _RefData, batch: list[tuple[bytes, ObjectInfo]]) -> None:
    """Say how much there is to download, if it can be known: `batch` is the first of it."""
    if len(batch) < _BATCH:  # and the last
        progress.expect(len(batch), sum(info.size for _, info in batch))
        return
    if receipt := source.receipt():
        progress.expect(receipt.files, receipt.total_bytes)


def _may_be_empty(source: _RefData) -> bool:
    from keras_remote_airflow.core.disk.snapshot import EMPTY_DIRECTORY_HASH

    return source.key is not None and source.key.content_hash == EMPTY_DIRECTORY_HASH
