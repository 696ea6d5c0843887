"""A directory of copies of datasets, each under the hash of its content.

    {cache}/{64 hex digits}                     a directory: the data, or what holds the single file
    {cache}/.keras-remote-{64 hex digits}.use   empty; locked (flock) by each process that uses the
                                                copy, modified when a process last began to

A process uses a copy from the moment `hold` returns until it ends: it keeps the second file open,
with a shared lock on it, which the system releases when the process has died, in whatever way.
Processes that it forked share the lock, and programs that it starts do not. A copy is removed only
under an exclusive lock, which nothing can have while any process on this machine uses the copy.
(Machines that share the directory share the locks only if its file system does so: NFS does.)

Where locks or this file cannot be had, as in a directory that this user may not write, copies are
used without one: whoever may write there can remove them.
"""

import errno
import fcntl
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress

from keras_remote_airflow.core.disk.destination import absolute_directory
from keras_remote_airflow.core.disk.partial import is_at, locked, partial_name, sweep
from keras_remote_airflow.core.disk.tree import TOO_MANY_OPEN, os_error, patiently
from keras_remote_airflow.core.errors import InvalidInputError, printable
from keras_remote_airflow.core.progress import format_bytes

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{64}")
# The descriptor that holds the lock on each copy that this process uses.
_held: dict[str, int] = {}


def open_cache(cache_dir: object = None) -> str:
    """Return the absolute path of a cache; None is a directory that is this user's alone."""
    if cache_dir is not None:
        return absolute_directory(cache_dir, "cache_dir")
    base = os.path.join(tempfile.gettempdir(), f"keras-remote-data-{os.getuid()}")
    try:
        with suppress(FileExistsError):
            os.mkdir(base, 0o700)
        found = os.lstat(base)
    except OSError as exc:
        raise os_error(
            exc.errno,
            f"cannot make a directory for datasets ({exc.strerror}). Pass dest or cache_dir: "
            f"{base}",
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise InvalidInputError(
            f"{base} is not a directory that only this user can open: remove it, or name a dest"
        )
    return base


def hold(copy: str) -> None:
    """Use the copy at this path, which need not be there yet, until this process ends."""
    path = _use_file(copy)
    try:
        if copy not in _held or not is_at(_held[copy], path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            # A former descriptor is left open: a process that turned itself into a daemon has
            # closed it, and its number may be that of another file.
            _held[copy] = _lock(path, fcntl.LOCK_SH)
        with suppress(PermissionError):  # another user's file
            os.utime(_held[copy])
    except (OSError, AttributeError) as exc:
        if isinstance(exc, OSError) and exc.errno in TOO_MANY_OPEN:
            raise
        _log.debug("Using a copy without a lock (%s): %s", exc, copy)


def release(copy: str) -> None:
    """End the use of a copy that was not put there: no file about it is left.

    The caller has the lock under which the copy would be put there.
    """
    # Not held in any case: a lock that cannot be made exclusive is lost, see flock(2).
    descriptor = _held.pop(copy, None)
    path = _use_file(copy)
    with suppress(OSError):
        if descriptor is not None and is_at(descriptor, path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else others use it
                os.unlink(path)
            finally:
                os.close(descriptor)


def make_room(cache: str, max_bytes: int | None, needed_bytes: int = 0) -> None:
    """Remove what killed processes left, and the least recently used copies until the others fit.

    Args:
        cache: the directory.
        max_bytes: what the copies may take; those in use are kept whatever they take. None keeps
            all.
        needed_bytes: what another copy is about to take.
    """
    sweep(cache)
    if max_bytes is None:
        return
    copies = sorted(_find_copies(cache))
    total = needed_bytes + sum(size for _, _, size in copies)
    kept = []
    for _, copy, size in copies:
        if total > max_bytes and _remove(copy):
            _log.info("Removed a copy (%s) from the cache: %s", format_bytes(size), printable(copy))
            total -= size
        else:
            kept.append(size)
    if total > max_bytes and not needed_bytes:
        largest = max(kept)
        _log.warning(
            "The cache takes %s, limit %s: %s: %s",
            format_bytes(total),
            format_bytes(max_bytes),
            f"one copy alone takes {format_bytes(largest)}"
            if largest > max_bytes
            else "the copies left are in use, or cannot be locked",
            printable(cache),
        )


def _find_copies(cache: str) -> Iterator[tuple[int, str, int]]:
    """Yield last use, path and size of each copy.

    A directory without the file that says when it was used is not ours: other programs name theirs
    by hashes, too.
    """
    for entry in os.scandir(cache):
        if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            with suppress(FileNotFoundError):  # or it was removed meanwhile
                last_use = os.stat(_use_file(entry.path)).st_mtime_ns
                yield last_use, entry.path, _size(entry.path)


def _remove(copy: str) -> bool:
    """Remove a copy unless it is in use or cannot be locked; return whether it is gone."""
    path = _use_file(copy)
    try:
        descriptor = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            with locked(os.path.join(os.path.dirname(copy), partial_name(copy))) as partial:
                os.rename(copy, os.path.join(partial, "old"))
            os.unlink(path)
        finally:
            os.close(descriptor)
    except (OSError, AttributeError) as exc:
        _log.debug("Kept a copy in the cache (%s): %s", exc, copy)
        return False
    return True


def _lock(path: str, operation: int) -> int:
    """Return a descriptor of the file at `path` that holds this lock on it."""
    flock = fcntl.flock  # where there is none, no file is made either
    while True:
        try:
            descriptor = _open(path, os.O_RDWR | os.O_CREAT)
        except OSError as exc:
            if exc.errno not in (errno.EACCES, errno.EROFS):
                raise
            descriptor = _open(path, os.O_RDONLY)
        try:
            flock(descriptor, operation)
            if is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # removed meanwhile, with its copy


def _open(path: str, flags: int) -> int:
    # O_NONBLOCK: opening a FIFO that another user has put there must not wait.
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    return patiently(lambda: os.open(path, flags, 0o666))


def _use_file(copy: str) -> str:
    folder, name = os.path.split(copy)
    return os.path.join(folder, f".keras-remote-{name}.use")


def _size(copy: str) -> int:
    return sum(
        os.lstat(os.path.join(folder, name)).st_size
        for folder, _, names in os.walk(copy)
        for name in names
    )
