"""A directory that appears whole: filled under another name, then renamed into place.

The other name, `.keras-remote-….partial`, is derived from the destination's, so processes with the
same destination use the same directory. The process that fills it holds a lock on it (flock). A
second one waits. The next run deletes the remains of a killed one.

Where the system has no flock, the directory itself is the lock. A second process then fails with
an error that names it, and what a killed process left behind has to be removed by hand.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from keras_remote_airflow.core.errors import InvalidInputError

_log = logging.getLogger(__name__)


def check_dest(dest: str) -> str:
    """Return the absolute path of a destination that can be put in place; raise otherwise."""
    dest = os.path.abspath(dest)
    if os.path.lexists(dest) and not os.path.isdir(dest):
        raise InvalidInputError(
            f"destination is not a directory: {dest}. Choose one, or a path that is not there."
        )
    if os.path.islink(dest) and not os.listdir(dest):
        raise InvalidInputError(
            f"destination is a link, which cannot be replaced as a whole: {dest}. Choose a "
            f"directory inside it, or {os.path.realpath(dest)} itself."
        )
    return dest


def default_dest(name: str, cache_dir: str | None) -> str:
    """Return a directory called `name` in `cache_dir`, or in one that is this user's alone."""
    if cache_dir:
        return os.path.join(os.path.expanduser(cache_dir), name)
    base = os.path.join(tempfile.gettempdir(), f"keras-remote-data-{os.getuid()}")
    with suppress(FileExistsError):
        os.mkdir(base, 0o700)
    found = os.lstat(base)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise InvalidInputError(
            f"{base} is not a directory that only this user can open: remove it, or name a dest"
        )
    return os.path.join(base, name)


def is_taken(path: str) -> bool:
    """Return whether something other than an empty directory is at `path`."""
    if not os.path.lexists(path):
        return False
    return os.path.islink(path) or not os.path.isdir(path) or bool(os.listdir(path))


def partial_name(final: str) -> str:
    """Return the name of the directory through which `final` is filled.

    No other file is likely to have it, and it is short however long the destination's own name is.
    """
    name = os.path.basename(final).encode(errors="surrogateescape")
    return f".keras-remote-{hashlib.sha256(name).hexdigest()[:16]}.partial"


@contextmanager
def locked(directory: str) -> Iterator[None]:
    """Own an empty directory of mode 0700; remove it at the end unless it was renamed away.

    Raises:
        InvalidInputError: a link or a file is in its place.
        BlockingIOError: without flock, the directory exists.
    """
    descriptor = _lock(directory)
    try:
        for name in os.listdir(directory):
            _remove(os.path.join(directory, name))
        try:
            yield
        finally:
            if _is_at(descriptor, directory):
                shutil.rmtree(directory)
    finally:
        os.close(descriptor)


def mode_for(final: str) -> int:
    """Return the mode of the empty directory that is to be replaced, or that of a new one."""
    try:
        return stat.S_IMODE(os.stat(final).st_mode)
    except FileNotFoundError:
        mask = os.umask(0o077)
        os.umask(mask)
        return 0o777 & ~mask


def rename(source: str, final: str) -> None:
    """Put `source` in place of `final`; raise InvalidInputError if that is a mount point."""
    try:
        os.rename(source, final)
    except OSError as exc:
        if exc.errno in (errno.EBUSY, errno.EXDEV):
            raise mount_point(final) from exc
        raise


def put_file(source: str, final: str) -> bool:
    """Give a file the name `final`, unless that is taken; return whether it was free."""
    try:
        os.link(source, final)
    except FileExistsError:
        return False
    except OSError:  # there are file systems without hard links
        rename(source, final)
    return True


def mount_point(path: str) -> InvalidInputError:
    """Return the error to raise for a destination that is a mount point."""
    return InvalidInputError(
        f"destination is a mount point, which cannot be replaced as a whole: {path}. Choose a "
        "directory inside it."
    )


def _lock(directory: str) -> int:
    """Create the directory unless it exists; return a descriptor of it that holds the lock."""
    has_flock = hasattr(fcntl, "flock")
    while True:
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            if not has_flock:
                raise _in_the_way(directory) from None
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(directory, flags)
        except FileNotFoundError:
            continue  # another process has just renamed or removed it
        except OSError as exc:
            if exc.errno in (errno.ENOTDIR, errno.ELOOP):
                raise _in_the_way(directory) from exc
            raise
        try:
            if has_flock:
                _wait_for_flock(descriptor, directory)
            if _is_at(descriptor, directory):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the process that held the lock renamed or removed it


def _in_the_way(directory: str) -> Exception:
    if os.path.isdir(directory) and not os.path.islink(directory):
        return BlockingIOError(
            errno.EWOULDBLOCK,
            "another process is filling this directory, or was killed while it did. Wait for it, "
            "or remove the directory",
            directory,
        )
    return InvalidInputError(
        f"{directory}, where the download goes first, is a link or a file: remove it"
    )


def _wait_for_flock(descriptor: int, directory: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.info(
            "Waiting for another process that is filling the destination through %s", directory
        )
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)
