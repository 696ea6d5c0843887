"""Turn a data ref into a verified local path.

Objects are downloaded into a directory beside the destination, each checked against its size and
CRC32C. Then the files are hashed from the disk, and the directory is renamed into place only if
they are what the ref names. Readers of the destination see either nothing or the complete dataset.
`core.disk.partial` tells how processes with the same destination wait for each other.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.cloud.store import ObjectStore
from keras_remote_airflow.core.datasets.download import download
from keras_remote_airflow.core.datasets.remote import RemoteData, describe_numbers, find_ref
from keras_remote_airflow.core.disk.cache import hold, make_room, open_cache, release
from keras_remote_airflow.core.disk.destination import (
    check_dest,
    check_replaceable,
    exchange,
    is_around_cwd,
    is_taken,
    put,
)
from keras_remote_airflow.core.disk.partial import locked, partial_name
from keras_remote_airflow.core.disk.record import read_records, tree_state, write_record
from keras_remote_airflow.core.disk.tree import os_error, system_path
from keras_remote_airflow.core.errors import (
    DataChangedError,
    IntegrityError,
    InvalidInputError,
    KerasRemoteError,
    printable,
)
from keras_remote_airflow.core.progress import (
    ProgressCallback,
    format_bytes,
    format_files,
)
from keras_remote_airflow.core.refs import DataRef, parse_data_ref

_log = logging.getLogger(__name__)

# What is at a destination without a record is hashed without a request up to these sizes, which
# takes less time than asking.
UNASKED_FILES = 1_000
UNASKED_BYTES = 100_000_000


def materialize(
    ref: object,
    dest: str | os.PathLike[str] | None = None,
    *,
    replace: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_max_bytes: int | None = None,
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
        ref: the data ref: the dict, its JSON, its Python repr, or a `core.refs.DataRef`; or the
            `gs://` URI of a dataset in a cache, whose marker is then asked whether it is a
            directory.
        dest: the directory to hold the data: it becomes the dataset, or gets the single file under
            its own name. None takes the ref's `mount_path` if neither `cache_dir` nor
            `cache_max_bytes` is given, else a directory in `cache_dir` named by the content. Data
            that is there already is verified and reused, without a write. What is there and large,
            and was not put there by `materialize`, is read only if it has as many files and bytes.
        replace: whether another dataset at `dest` may be replaced; refused without one. Only what
            `materialize` itself put there is, if nothing has changed since; anything else is
            refused. Where there are no extended attributes to note that in (macOS, NFS before
            version 4.2), the first call has to say replace=True, too. Linux and macOS exchange the
            directories in one step; on other systems, and where a file system cannot, a reader
            finds nothing at `dest` for a moment. The old files are then removed: a program that
            goes on opening files by their names in `dest` gets those of the new dataset.
        cache_dir: the directory for copies without a `dest`. None takes
            `keras-remote-data-{uid}` in the system's temporary directory. A copy there that was
            changed is downloaded anew.
        cache_max_bytes: remove the least recently used copies until those in the cache, the new one
            included, have at most so many bytes. A copy is never removed while a process is alive
            that got its path from this function (`core.disk.cache` tells how that is known), so
            the limit may be exceeded; a warning says so then. Only a call that downloads looks at
            the limit. None removes nothing.

    Returns:
        The absolute path of the directory, or of the file.

    Raises:
        InvalidInputError: a malformed ref, an object name that leads out of the destination, a
            destination that cannot be used or holds something else.
        IntegrityError: what is stored is not what the ref names; the destination is untouched.
        StoreError: Cloud Storage refused, or kept failing until the deadline (120 s).
        OSError: the destination cannot be written, or the disk is full.
    """
    is_uri = isinstance(ref, str) and ref.startswith("gs://")
    ref = DataRef(str(ref), is_dir=True) if is_uri else parse_data_ref(ref)
    if is_uri and ref.cache_key is None:
        raise InvalidInputError(
            "not the URI of a dataset, which ends in /data-cache/ and 64 hex digits: "
            f"{ref.gcs_uri}. For other data make a ref with make_data_ref(uri, is_dir)."
        )
    has_cache = cache_dir is not None or cache_max_bytes is not None
    if has_cache and dest is not None:
        raise InvalidInputError(
            f"both dest and a cache are given: {dest}. Leave out cache_dir and cache_max_bytes, or "
            "leave out dest."
        )
    place = ref.mount_path or None if dest is None and not has_cache else dest
    if replace and place is None:
        raise InvalidInputError(
            f"replace=True needs a dest: {ref.gcs_uri}. Pass one, or leave out replace: what is in "
            "a cache is named by its content, and never another dataset."
        )
    if cache_max_bytes is not None and (type(cache_max_bytes) is not int or cache_max_bytes < 0):
        raise InvalidInputError(
            f"cache_max_bytes is {cache_max_bytes!r}; expected a number of bytes, 0 or more"
        )
    cache = target = None
    if place is not None:
        target = check_dest(place)
    else:
        cache = open_cache(cache_dir)
        if ref.cache_key:
            target = check_dest(os.path.join(cache, ref.cache_key.content_hash))
    with ExitStack() as stack:
        bucket = open_bucket(ref.bucket, client, project, retry, user_project)
        store = functools.cache(lambda: stack.enter_context(bucket))
        if is_uri:
            ref = find_ref(store(), ref.gcs_uri)
        return _Job(ref, store, replace, cache, cache_max_bytes, progress).run(target)


@dataclass
class _Job:
    """One call of `materialize`.

    Attributes:
        ref: what to get.
        store: opens the bucket, when the first request is made.
        replace, cache_max_bytes, progress: as for `materialize`.
        cache: the directory of this package's own copies that the data goes into, or None.
    """

    ref: DataRef
    store: Callable[[], ObjectStore]
    replace: bool
    cache: str | None
    cache_max_bytes: int | None
    progress: ProgressCallback | None

    @property
    def source(self) -> RemoteData:
        """The objects; asking for them opens the bucket."""
        return RemoteData(self.store(), self.ref)

    def run(self, target: str | None) -> str:
        """Put the data at `target`, or (None) into the cache; return its path."""
        ref = self.ref
        if target is None:  # data without a content hash, which only a cache gives a name
            target = check_dest(os.path.join(self.cache or "", self.source.list_all().fingerprint))
        if self.cache is not None:
            hold(target)
        if ref.is_dir:
            final = target
            key = ref.cache_key
            if is_around_cwd(final) and (
                key is None or key.content_hash not in read_records(final)
            ):
                check_replaceable(final)
        else:
            final = os.path.join(target, system_path(self.source.single_name()))
            if os.path.isdir(final):
                raise InvalidInputError(
                    f"destination is a directory, but the data is a single file: {final}, "
                    f"{ref.gcs_uri}. Remove the directory, or choose another dest."
                )
        seen = _identity(final)
        try:
            is_whole = self._is_whole(final)
        except (InvalidInputError, DataChangedError):
            if _identity(final) == seen:
                raise
            is_whole = False  # another process has replaced it while it was read
        if not is_whole and self._fetch(final, seen):
            return final
        _log.info("Reusing what is there: %s holds %s", printable(final), ref.gcs_uri)
        return final

    def _is_whole(self, final: str) -> bool:
        """Return whether the data is at `final`, or False if that is free or may be replaced.

        Raises InvalidInputError if something else is there, which has to stay.
        """
        if not is_taken(final):
            return False
        records = read_records(final)
        problem, content_hash = self._compare_numbers(final, records), ""
        if problem is None:
            problem, content_hash = self._compare(final)
        if problem is None:
            return True
        if self.cache is not None:
            _log.warning(
                "Downloading a copy again that was changed (%s): %s", problem, printable(final)
            )
            return False
        if not self.replace:
            raise _something_else(final, problem, self.ref.gcs_uri)
        if not content_hash or content_hash not in records:
            raise _not_ours(final, "it was changed since" if records else "no record says so")
        return False

    def _compare_numbers(self, final: str, records: set[str]) -> str | None:
        """Return how numbers of files and bytes at `final` differ from the data's, if they do.

        Only a destination that takes long to hash is counted, and only if no record says that it is
        the data, or another dataset, which may be replaced if that hash is still right.
        """
        key = self.ref.cache_key
        if self.cache is not None or (key and key.content_hash in records):
            return None
        if self.replace and records:
            return None
        try:
            return self._differing_numbers(_count(final))
        except OSError:  # hashing it says what is wrong
            return None

    def _differing_numbers(self, counts: Iterator[tuple[int, int]]) -> str | None:
        expected, found = None, (0, 0)
        for found in counts:
            if expected is None and (found[0] > UNASKED_FILES or found[1] > UNASKED_BYTES):
                try:
                    expected = self.source.numbers()
                except KerasRemoteError:
                    if self.ref.cache_key is None:
                        raise
                if expected is None:  # the hash alone tells
                    return None
            if expected and (found[0] > expected[0] or found[1] > expected[1]):
                return f"at least {describe_numbers(found, expected)}"
        return describe_numbers(found, expected) if expected and found != expected else None

    def _compare(self, final: str) -> tuple[str | None, str]:
        """Return how what is at `final` differs from the data (None: not at all), and its hash.

        The hash is empty if it does not tell all that is there.
        """
        from keras_remote_airflow.core.disk.hashing import take_snapshot

        try:
            snapshot = take_snapshot(final, progress=self.progress)
        except (InvalidInputError, DataChangedError) as exc:
            # The last sentence tells how to mend data that is to be uploaded.
            reason = str(exc).rpartition(". ")[0] or str(exc)
            if self.cache is not None:
                return reason, ""
            if isinstance(exc, DataChangedError):
                raise
            raise InvalidInputError(
                f"destination is taken, and cannot be compared with the dataset ({reason}): "
                f"{final}. Choose another dest, or empty this one."
            ) from None
        key = self.ref.cache_key
        problem = None
        if key is None or key.content_hash != snapshot.content_hash:  # else it needs no network
            problem = self.source.problem(snapshot)
        # Readers that make classes of directories would see one more.
        for kind, folders in ("a linked", snapshot.linked), ("an empty", snapshot.empty):
            if folders:
                return problem or f"{os.fsdecode(folders[0])} is {kind} directory", ""
        return problem, snapshot.content_hash

    def _fetch(self, final: str, seen: object) -> bool:
        """Download the data to `final`; return False if another process has done it meanwhile.

        `seen` is the identity of what was there, and was compared.
        """
        from keras_remote_airflow.core.disk.hashing import take_snapshot

        with self._partial_directory(final) as partial:
            if _identity(final) != seen and self._is_whole(final):
                return False
            source = self.source
            if self.cache is not None:
                receipt = source.receipt() if self.cache_max_bytes is not None else None
                needed_bytes = receipt.total_bytes if receipt else 0
                make_room(self.cache, self.cache_max_bytes, needed_bytes)
            folder = os.path.join(partial, "data")
            os.mkdir(folder)
            received = download(source, folder, self.progress)
            if not received.files and not source.may_be_empty:
                raise IntegrityError(
                    f"found no objects at {self.ref.gcs_uri}. Check the URI; if a lifecycle rule "
                    "deleted them, have the data uploaded again."
                )
            whole = folder if self.ref.is_dir else os.path.join(folder, os.path.basename(final))
            expected = received.files, received.bytes
            snapshot = take_snapshot(whole, expected=expected, progress=self.progress)
            problem = source.problem(snapshot)
            if problem:
                raise IntegrityError(
                    f"the data is not what its ref names: {problem}. Nothing was left at {final}. "
                    f"Remove what is under {self.ref.gcs_uri}, marker included, and have the data "
                    "uploaded again."
                )
            write_record(whole, final, snapshot.content_hash, beside=self.replace)
            if not put(whole, final):
                state = tree_state(final)
                if self.cache is None and self._is_whole(final):
                    return False
                exchange(whole, final)
                try:
                    if self.cache is None and tree_state(whole) != state:
                        raise _not_ours(final, "it was changed in the last moment")
                except BaseException:
                    exchange(whole, final)
                    raise
        if self.cache is not None:
            make_room(self.cache, self.cache_max_bytes)
        _log.info(
            "Materialized %s (%s) in %.1f s at %s: %s",
            format_files(received.files),
            format_bytes(received.bytes),
            received.seconds,
            printable(final),
            self.ref.gcs_uri,
        )
        return True

    @contextmanager
    def _partial_directory(self, final: str) -> Iterator[str]:
        """Own a directory beside the destination to download into."""
        if self.ref.is_dir and os.path.lexists(final):
            check_replaceable(final)
        folder = os.path.dirname(final)
        copy = final if self.ref.is_dir else folder
        with ExitStack() as stack:
            if self.cache is not None and not self.ref.is_dir:
                stack.callback(_remove_empty, copy)
            try:
                os.makedirs(folder, exist_ok=True)
                partial = stack.enter_context(locked(os.path.join(folder, partial_name(final))))
            except BlockingIOError:  # it says what to do
                raise
            except OSError as exc:  # it names a path that the caller never gave
                raise self._cannot_fill(final, exc) from None
            if self.cache is not None:
                hold(copy)
            try:
                yield partial
            except BaseException:
                if self.cache is not None and not os.path.lexists(final):
                    release(copy)
                raise

    def _cannot_fill(self, final: str, error: OSError) -> Exception:
        """Return the error to raise if no directory for the download can be made."""
        refusing = os.path.dirname(error.filename or final)
        is_denied = isinstance(error, PermissionError)
        if self.cache is not None and is_denied:
            return InvalidInputError(
                f"permission denied by {refusing}, for cache_dir {self.cache}. Choose another, or "
                "give this user access."
            )
        if self.cache is not None:
            return os_error(
                error.errno,
                f"cannot write to cache_dir ({error.strerror}: {refusing}): {self.cache}. Choose "
                "another directory",
            )
        if is_denied:
            inside = f", or {os.path.join(final, 'data')}" if os.path.isdir(final) else ""
            return InvalidInputError(
                f"permission denied by {refusing}, where the download goes first, beside {final}. "
                f"Choose a dest whose parent directory is writable{inside}."
            )
        return os_error(
            error.errno,
            f"cannot write beside the destination ({error.strerror}: {refusing}): {final}. Choose "
            "a dest whose parent directory is writable",
        )


def _remove_empty(folder: str) -> None:
    with suppress(OSError):
        os.rmdir(folder)


def _count(path: str) -> Iterator[tuple[int, int]]:
    """Yield how many files and bytes were found so far, folder by folder."""

    def fail(error: OSError) -> None:
        raise error

    files = size = 0
    if not os.path.isdir(path):
        yield 1, os.stat(path).st_size
        return
    for folder, _, names in os.walk(path, onerror=fail):
        files += len(names)
        yield files, size  # that may be enough
        size += sum(os.stat(os.path.join(folder, name)).st_size for name in names)
        yield files, size


def _identity(path: str) -> tuple[int, int] | None:
    """Return what changes when something else is put at `path`, or into it."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns


def _something_else(final: str, problem: str, gcs_uri: str) -> InvalidInputError:
    first, _, others = problem.partition("; ")
    return InvalidInputError(
        f"destination holds something else ({first}): {final}. {others}{'. ' if others else ''}"
        "Nothing was overwritten: choose another dest, or remove it; replace=True replaces what "
        f"materialize put there. Expected: {gcs_uri}"
    )


def _not_ours(final: str, reason: str) -> InvalidInputError:
    return InvalidInputError(
        f"destination is not what materialize put there ({reason}), so it is not replaced: "
        f"{final}. Choose another dest, or remove it."
    )
