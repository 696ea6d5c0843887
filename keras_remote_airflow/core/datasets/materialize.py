"""Turn a data ref into a verified local path.

Objects are downloaded into a directory beside the destination, each checked against its size and
CRC32C. Then the files are hashed from the disk, and the directory is renamed into place only if
they are what the ref names. Readers of the destination see either nothing or the complete dataset.
`core.disk.destination` tells how processes with the same destination wait for each other.
"""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.cloud.store import ObjectInfo, ObjectToFetch
from keras_remote_airflow.core.datasets.remote import RemoteData
from keras_remote_airflow.core.disk.destination import (
    check_dest,
    default_dest,
    is_taken,
    locked,
    mode_for,
    mount_point,
    partial_name,
    put_file,
    rename,
)
from keras_remote_airflow.core.disk.snapshot import Snapshot
from keras_remote_airflow.core.errors import IntegrityError, InvalidInputError
from keras_remote_airflow.core.layout import check_relative_paths
from keras_remote_airflow.core.progress import (
    Progress,
    ProgressCallback,
    format_bytes,
    format_files,
)
from keras_remote_airflow.core.refs import DataRef, parse_data_ref

_log = logging.getLogger(__name__)
# Objects that are listed before they are downloaded. It bounds memory for datasets of any size.
BATCH_OBJECTS = 10_000


def materialize(
    ref: object,
    dest: str | None = None,
    *,
    cache_dir: str | None = None,
    client: Any = None,
    project: str | None = None,
    retry: RetryPolicy | None = None,
    user_project: str | None = None,
    progress: ProgressCallback | None = None,
) -> str:
    """Download the data that `ref` names, verify it, and return its local path.

    Data from a cache is verified against the content hash in its URI. Other `gs://` data has no
    such hash: each object is checked against its size and CRC32C, which shows damage on the way and
    nothing else. Objects are fetched as they are stored; those with `Content-Encoding: gzip` stay
    compressed.

    The other parameters are those of `upload_data`.

    Args:
        ref: the data ref: the dict, its JSON, its Python repr, or a `core.refs.DataRef`.
        dest: the directory to hold the data: it becomes the dataset, or gets the single file under
            its own name. None takes the ref's `mount_path`, else a directory in `cache_dir` named
            by the content. Data that is there already is verified and reused.
        cache_dir: None takes `keras-remote-data-{uid}` in the system's temporary directory.

    Returns:
        The absolute path of the directory, or of the file.

    Raises:
        InvalidInputError: a malformed ref, an object name that leads out of the destination, a
            destination that holds something else.
        IntegrityError: what is stored is not what the ref names; the destination is untouched.
        StoreError: Cloud Storage refused, or kept failing until the deadline (120 s).
        OSError: the destination cannot be written, or the disk is full.
    """
    ref = parse_data_ref(ref)
    key = ref.cache_key
    target = os.path.expanduser(dest) if dest else ref.mount_path
    if key and not target:
        target = default_dest(key.content_hash, cache_dir)
    if target:
        target = check_dest(target)
    held = None
    if key and ref.is_dir and target and is_taken(target):
        held = _snapshot_of_dest(target, progress)
        if held.content_hash == key.content_hash:  # needs no network
            return _reuse(ref, target, None)
    with open_bucket(ref.bucket, client, project, retry, user_project) as store:
        source = RemoteData(store, ref)
        if held is not None and target:
            return _reuse(ref, target, source.problem(held))
        target = target or check_dest(default_dest(source.fingerprint(), cache_dir))
        if ref.is_dir:
            return _fetch(source, os.path.dirname(target), target, progress)
        return _fetch(source, target, os.path.join(target, source.single_name()), progress)


def _reuse(ref: DataRef, final: str, problem: str | None) -> str:
    """Return `final`, where something is already, unless there is a problem with that."""
    if problem:
        raise InvalidInputError(
            f"destination holds something else ({problem}): {final}. Nothing was overwritten: "
            f"choose another dest, or remove it. Expected: {ref.gcs_uri}"
        )
    _log.info("Reusing what is there: %s holds %s", final, ref.gcs_uri)
    return final


def _compare(source: RemoteData, final: str, progress: ProgressCallback | None) -> str:
    """Return `final` if what is there is the data; raise InvalidInputError if it is not."""
    return _reuse(source.ref, final, source.problem(_snapshot_of_dest(final, progress)))


def _snapshot_of_dest(final: str, progress: ProgressCallback | None) -> Snapshot:
    """Read what is at the destination; raise InvalidInputError if that cannot be a dataset."""
    from keras_remote_airflow.core.disk.hashing import take_snapshot

    try:
        return take_snapshot(final, progress=progress)
    except InvalidInputError as exc:
        # The last sentence tells how to mend data that is to be uploaded.
        reason = str(exc).rpartition(". ")[0] or str(exc)
        raise InvalidInputError(
            f"destination is taken, and cannot be compared with the dataset ({reason}): {final}. "
            "Choose another dest, or empty this one."
        ) from exc


@contextmanager
def _partial_directory(folder: str, final: str) -> Iterator[str]:
    """Own a temporary directory in `folder`, see `core.disk.destination.locked`."""
    partial = os.path.join(folder, partial_name(final))
    with ExitStack() as stack:
        try:
            os.makedirs(folder, exist_ok=True)
            stack.enter_context(locked(partial))
        except BlockingIOError:  # it says what to do
            raise
        except OSError as exc:  # it names a path that the caller never gave
            raise OSError(
                exc.errno,
                f"cannot write beside {final}: {exc.strerror}. Choose a dest whose parent "
                "directory is writable",
            ) from exc
        yield partial


def _fetch(source: RemoteData, folder: str, final: str, progress: ProgressCallback | None) -> str:
    """Fill `final` through a temporary directory in `folder`, which is on the same file system."""
    from keras_remote_airflow.core.disk.hashing import take_snapshot

    with _partial_directory(folder, final) as partial:
        if is_taken(final):
            return _compare(source, final, progress)
        _check_replaceable(final, source.ref)
        received = download(source, partial, progress)
        if not received.files and not source.may_be_empty:
            raise IntegrityError(
                f"found no objects at {source.ref.gcs_uri}. Check the URI; if a lifecycle rule "
                "deleted them, have the data uploaded again."
            )
        whole = partial if source.ref.is_dir else os.path.join(partial, os.path.basename(final))
        expected = received.files, received.bytes
        problem = source.problem(take_snapshot(whole, expected=expected, progress=progress))
        if problem:
            raise IntegrityError(
                f"the data is not what its ref names: {problem}. Nothing was left at {final}. "
                f"Remove what is under {source.ref.gcs_uri}, marker included, and have the data "
                "uploaded again."
            )
        if source.ref.is_dir:
            os.chmod(partial, mode_for(final))
            rename(whole, final)
        elif not put_file(whole, final):  # something else has put a file there meanwhile
            return _compare(source, final, progress)
    _log.info(
        "Materialized %s (%s) in %.1f s at %s: %s",
        format_files(received.files),
        format_bytes(received.bytes),
        received.seconds,
        final,
        source.ref.gcs_uri,
    )
    return final


def _check_replaceable(final: str, ref: DataRef) -> None:
    """Raise InvalidInputError unless a rename can put the data at `final`.

    What is there is an empty directory, or nothing.
    """
    if os.path.ismount(final):
        raise mount_point(final)
    if os.path.isdir(final) and not ref.is_dir:
        raise InvalidInputError(
            f"destination is a directory, but the data is a single file: {final}, {ref.gcs_uri}. "
            "Remove the directory, or choose another dest."
        )
    if os.path.isdir(final) and os.path.samefile(final, os.curdir):
        raise InvalidInputError(
            "destination is the current directory, which cannot be replaced as a whole: "
            f"{final}. Choose a directory inside it."
        )


def download(
    source: RemoteData,
    folder: str,
    progress: ProgressCallback | None = None,
    batch_objects: int = BATCH_OBJECTS,
) -> Progress:
    """Download the objects into `folder`, which is empty; return what was downloaded.

    Raises:
        InvalidInputError: the name of an object leads out of the folder, or no file can have it.
        IntegrityError: two names cannot be files of one folder, or bytes disagree with a checksum.
    """
    made = {folder}

    def files(batch: Iterable[tuple[bytes, ObjectInfo]]) -> Iterator[ObjectToFetch]:
        for relative, info in batch:
            check_relative_paths([relative], "")
            path = os.path.join(folder, relative.decode())
            parent = os.path.dirname(path)
            if parent not in made:
                os.makedirs(parent, exist_ok=True)
                made.add(parent)
            yield ObjectToFetch(info, path)

    def done(file: ObjectToFetch) -> None:
        received.add(1, file.info.size or 0)

    objects = source.objects()
    with Progress(_log, "Downloading", source.ref.gcs_uri, progress) as received:
        while batch := list(islice(objects, batch_objects)):
            if not received.files:
                if len(batch) < batch_objects:  # the first batch is the last one, too
                    received.expect(len(batch), sum(info.size or 0 for _, info in batch))
                elif receipt := source.receipt():
                    received.expect(receipt.files, receipt.total_bytes)
            try:
                source.store.download(files(batch), done, received.move)
            except (FileExistsError, NotADirectoryError) as exc:
                # The folder was empty: two object names claim one place, as "a" and "a/b" do.
                place = os.path.relpath(exc.filename, folder)
                raise IntegrityError(
                    f"the data cannot be a directory: one object is {place}, another is below "
                    f"{place}/: {source.ref.gcs_uri}. Remove the one that does not belong there."
                ) from exc
    return received
