"""A directory of this user alone, beside a destination, for what is not yet whole.

    .keras-remote-{16 hex digits}-{uid}.partial/
        data         what is being downloaded, or what was replaced by it
        data.old     what is being replaced, where two names cannot be exchanged in one step

Its name follows from the destination's, so processes with the same destination use the same one.
The process that fills it holds a lock on it (flock). A second one waits. The next run deletes the
remains of a killed one. Where the file system has no flock, the directory itself is the lock: a
second process fails with an error that names it, and what a killed process left behind has to be
removed by hand. What another user has put under that name is neither used nor touched: this process
then uses a name that no other process knows.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from keras_remote_airflow.core.disk.tree import patiently
from keras_remote_airflow.core.errors import InvalidInputError

_log = logging.getLogger(__name__)

_PREFIX, _SUFFIX = ".keras-remote-", ".partial"
# What flock answers on file systems that have no locks (Lustre, some mounts of CIFS, NFS and FUSE).
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)


def partial_name(final: str) -> str:
    """Return the name of the directory through which `final` is filled.

    No other file is likely to have it, and it is short however long the destination's own name is.
    """
    return f"{short_name(final)}-{os.geteuid()}{_SUFFIX}"


def short_name(final: str) -> str:
    """Return the beginning of the names of all that lies beside `final` for its sake."""
    name = os.path.basename(final).encode(errors="surrogateescape")
    return f"{_PREFIX}{hashlib.sha256(name).hexdigest()[:16]}"


@contextmanager
def locked(directory: str, wait: bool = True) -> Iterator[str]:
    """Own an empty directory of mode 0700, and yield its path; remove it at the end.

    The path is `directory`, or one beside it if another user has put something there.

    Raises:
        InvalidInputError: a link or a file of this user is in its place.
        BlockingIOError: the directory exists, and there is no flock; or another process holds the
            lock, and `wait` is False.
    """
    descriptor, directory = _lock(directory, wait)
    try:
        for name in os.listdir(directory):
            _remove(os.path.join(directory, name))
        try:
            yield directory
        finally:
            if is_at(descriptor, directory):
                # What something still writes to is left to the next run.
                _remove(directory, ignore_errors=True)
    finally:
        os.close(descriptor)


def sweep(folder: str) -> None:
    """Remove the directories of this kind that killed processes of this user left in `folder`."""
    for name in os.listdir(folder):
        if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
            with (
                suppress(OSError, InvalidInputError),
                locked(os.path.join(folder, name), wait=False),
            ):
                pass


def is_at(descriptor: int, path: str) -> bool:
    """Return whether the open file or directory is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _lock(directory: str, wait: bool) -> tuple[int, str]:
    """Create the directory unless it exists; return a descriptor that holds the lock, and its path.

    The path is another one if what is at `directory` is not this user's.
    """
    path = directory
    while True:
        is_new = True
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            is_new = False
        try:
            descriptor = _open_directory(path)
        except FileNotFoundError:
            continue  # another process has just removed it
        try:
            # One that was made just now is trusted whatever its owner and mode: there are file
            # systems that know neither.
            if descriptor is None or not (is_new or _is_private(descriptor)):
                if not wait:
                    raise PermissionError(errno.EACCES, "not a directory of this user", path)
                _log.warning("Stepping round what another user has put there: %s", path)
                path = f"{directory.removesuffix(_SUFFIX)}-{os.urandom(8).hex()}{_SUFFIX}"
                continue
            if not _flock(descriptor, path, wait) and not is_new:
                raise BlockingIOError(
                    errno.EWOULDBLOCK,
                    "another process is filling this directory, or was killed while it did. Wait "
                    "for it, or remove the directory",
                    path,
                )
            if is_at(descriptor, path):
                held, descriptor = descriptor, None
                return held, path
            # The process that held the lock has removed it.
        finally:
            if descriptor is not None:
                os.close(descriptor)


def _open_directory(path: str) -> int | None:
    """Return a descriptor of the directory, or None for what another user has put there."""
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        return patiently(lambda: os.open(path, flags))
    except FileNotFoundError:
        raise
    except OSError as exc:
        if os.lstat(path).st_uid != os.geteuid():
            return None
        if exc.errno in (errno.ENOTDIR, errno.ELOOP):
            raise InvalidInputError(
                f"a link or a file is where the download goes first, remove it: {path}"
            ) from None
        raise


def _is_private(descriptor: int) -> bool:
    """Return whether the directory is this user's alone, once it was closed to others."""
    if os.fstat(descriptor).st_uid != os.geteuid():
        return False
    with suppress(OSError):  # some file systems don't do that
        os.fchmod(descriptor, 0o700)
    return not os.fstat(descriptor).st_mode & 0o077


def _flock(descriptor: int, directory: str, wait: bool) -> bool:
    """Take the lock; return False where there is none to take."""
    if not hasattr(fcntl, "flock"):
        return False
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            _log.info(
                "Waiting for another process that is filling the destination through %s", directory
            )
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as exc:
        if exc.errno not in _NO_FLOCK:
            raise
        return False
    return True


def _remove(path: str, ignore_errors: bool = False) -> None:
    if os.path.islink(path) or not os.path.isdir(path):
        os.unlink(path)
        return
    shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):  # a user may have made the directories read-only
        os.chmod(path, 0o700)
        for folder, folders, _ in os.walk(path):
            for name in folders:
                if not os.path.islink(subfolder := os.path.join(folder, name)):
                    os.chmod(subfolder, 0o700)
        shutil.rmtree(path, ignore_errors)
