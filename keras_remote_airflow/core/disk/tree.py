"""Walk a local directory in the order of the content hash, and refuse what is not a file.

The order is a directory's files, then its subdirectories, each sorted by name (by byte, which is
the order of code points in UTF-8). Linked directories are not followed; linked files are read.

Names are bytes here, as the system has them: what Python makes of them depends on the locale.
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from keras_remote_airflow.core.errors import (
    DataChangedError,
    DataNotFoundError,
    InvalidInputError,
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# O_NONBLOCK: opening must not hang if a FIFO takes a file's place after the directory was listed.
# It changes nothing for a regular file.
OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
# Files are opened by their name in an open folder, which spares the system the rest of the path.
# macOS has no O_PATH; a folder that was listed can be opened for reading, too.
FOLDER_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC

# Files of one folder that `walk` yields together.
_FILES_TOGETHER = 1_000
# How many linked or empty directories a log line names.
_SHOWN = 10
# Errors that say that nothing is there. Any other one leaves that open.
ABSENT = (errno.ENOENT, errno.ENOTDIR)
# Errors for a link that leads to itself, and for too long a path.
_UNUSABLE = (errno.ELOOP, errno.ENAMETOOLONG)
# Errors of a process, or a machine, that has too many files open.
TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)
_PATIENCE_SECONDS = 30
# Errors for a file that was there: it is gone, or something else has taken its place.
_VANISHED = (*ABSENT, errno.ELOOP, errno.ENXIO)
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


def system_path(path: str) -> str:
    """Return a path as calls to the system take it, where the locale lacks some of its letters."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        with suppress(UnicodeEncodeError):  # `stat_path` refuses what no path can hold
            return os.fsdecode(path.encode(errors="surrogateescape"))
    return path


def stat_path(path: str | bytes) -> os.stat_result:
    """Return what the system says of a path; links are followed.

    Raises:
        DataNotFoundError: nothing is there.
        InvalidInputError: a link leads nowhere, or permission is denied.
        OSError: that can't be told just now, for instance because a mount is dead.
    """
    try:
        return os.stat(path)
    except OSError as exc:
        raise _unusable(path, exc) from None  # the text says it all, here and below
    except ValueError as exc:
        raise InvalidInputError(
            f"data path does not exist: nothing can be called {path!r} ({exc})"
        ) from None


def walk(root: str, linked: list[bytes], empty: list[bytes]) -> Iterator[tuple[bytes, list[bytes]]]:
    """Yield (folder, file names), up to 1,000 names at a time, in the order of the content hash.

    The folder is relative to `root`: empty or with a final "/".

    Args:
        root: the directory.
        linked, empty: get the relative paths of linked and empty directories, which are left out.
            The log names them at the end.

    Raises:
        InvalidInputError: something in it is not a file that can be read.
        DataChangedError: a folder vanished meanwhile.
        OSError: something in it can't be read just now.
    """
    folders = [b""]
    while folders:
        folder = folders.pop()
        files, subfolders, links = _list(os.fsencode(root) + b"/" + folder)
        for start in range(0, len(files), _FILES_TOGETHER):
            yield folder, files[start : start + _FILES_TOGETHER]
        folders.extend(folder + name + b"/" for name in reversed(subfolders))
        linked.extend(folder + name for name in links)
        if folder and not (files or subfolders or links):
            empty.append(folder)
    if linked:
        _log.warning(
            "Linked directories are not followed and not part of the data: %s", _named(linked)
        )
    if empty:
        _log.info("Empty directories are not part of the data: %s", _named(empty))


def _named(paths: list[bytes]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return b", ".join(paths[:_SHOWN]).decode(errors="replace") + more


def single_file(path: str) -> tuple[bytes, list[bytes]]:
    """Return what `walk` would yield for a directory that holds only this file."""
    mode = stat_path(path).st_mode
    if not stat.S_ISREG(mode):
        raise not_a_file(path, mode)
    return b"", [os.fsencode(os.path.basename(path))]


def check_utf8(root: bytes, paths: list[bytes]) -> None:
    """Raise InvalidInputError unless all these relative paths are UTF-8."""
    try:
        b"/".join(paths).decode()
    except UnicodeDecodeError:
        if len(paths) > 1:  # find out which one it is
            for path in paths:
                check_utf8(root, [path])
        path = os.path.join(root, paths[0])
        raise InvalidInputError(f"file name is not UTF-8: {path!r}. Rename it.") from None


def open_path(path: bytes, flags: int) -> int:
    """Open a file or folder that was there; raise what `inaccessible` says."""
    try:
        return patiently(lambda: os.open(path, flags))
    except OSError as exc:
        raise inaccessible(path, exc) from None


def patiently(work: Callable[[], _T]) -> _T:
    """Return what `work` returns; while too many files are open, call it again for up to 30 s."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return work()
        except OSError as exc:
            if exc.errno not in TOO_MANY_OPEN or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def inaccessible(path: str | bytes, error: OSError) -> Exception:
    """Return the error to raise for a path that was there, and cannot be opened or listed."""
    if error.errno in _VANISHED:
        return DataChangedError(
            "a file vanished while the data was being read: "
            f"{os.fsdecode(path)}. Retry once nothing writes to the data."
        )
    return _unusable(path, error)


def not_a_file(path: str | bytes, mode: int) -> InvalidInputError:
    """Return the error to raise for a FIFO, socket, device or directory in a file's place."""
    kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
    return InvalidInputError(
        f"found {kind}, expected regular files: {os.fsdecode(path)}. Move it out of the data."
    )


def _unusable(path: str | bytes, error: OSError) -> Exception:
    path = os.fsdecode(path)
    if error.errno in ABSENT:
        try:
            target = os.readlink(path)
        except OSError:  # it is no link
            return DataNotFoundError(
                f"data path does not exist: {path}. Check the path, and that this machine is the "
                "one that has the data."
            )
        return DataNotFoundError(
            f"broken link: {path} points to {target}, which is not there. Remove the link or "
            "restore its target."
        )
    if error.errno in _UNUSABLE:
        return InvalidInputError(
            f"cannot follow the path or link: {path} ({error.strerror}). Remove the link, or "
            "shorten the path."
        )
    if isinstance(error, PermissionError):
        place = refusing(path)
        by = "" if place == path else f" by {place}"
        return InvalidInputError(
            f"permission denied{by}, cannot read {path}. Make it readable for this user, or move "
            "it out of the data."
        )
    # An outage. (The system's error names only the last part of the path.)
    return OSError(error.errno, error.strerror, path)


def os_error(number: int | None, text: str) -> OSError:
    """Return an error with this number, whose text does not begin with it."""
    error = OSError(text)
    error.errno = number
    return error


def refusing(path: str) -> str:
    """Return the directory, or the file, whose permissions keep this user from `path`."""
    for place in (real := Path(os.path.realpath(path)), *real.parents):
        try:
            place.stat()
        except OSError:
            continue
        return str(place)
    return path


def _list(folder: bytes) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Return the names of files, subfolders and linked directories, each sorted."""
    files: list[bytes] = []
    subfolders: list[bytes] = []
    links: list[bytes] = []
    others: list[bytes] = []
    try:
        with patiently(lambda: os.scandir(folder)) as entries:
            for entry in entries:
                if entry.is_file():
                    files.append(entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    subfolders.append(entry.name)
                elif entry.is_dir():
                    links.append(entry.name)
                else:
                    others.append(entry.path)
    except OSError as exc:
        path = os.fsencode(exc.filename or folder)
        raise (inaccessible(path, exc) if path == folder else _unusable(path, exc)) from None
    for path in others:
        raise _neither_file_nor_folder(path)
    return sorted(files), sorted(subfolders), sorted(links)


def _neither_file_nor_folder(path: bytes) -> Exception:
    try:
        mode = os.lstat(path).st_mode
    except OSError as exc:
        return inaccessible(path, exc)
    if stat.S_ISLNK(mode):
        mode = stat_path(path).st_mode  # raises for a broken link
    return not_a_file(path, mode)
