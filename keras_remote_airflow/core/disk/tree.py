"""Walk a local directory in the order of the content hash, and refuse what is not a file.

The order is a directory's files, then its subdirectories, each sorted by name (by code point, which
is the byte order of UTF-8). Linked directories are not followed; linked files are read.
"""

import errno
import logging
import os
import stat
from collections.abc import Iterator

from keras_remote_airflow.core.errors import DataChangedError, DataNotFoundError, InvalidInputError

_log = logging.getLogger(__name__)

# O_NONBLOCK: opening must not hang if a FIFO takes a file's place after the directory was listed.
# It changes nothing for a regular file.
OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
# Files are opened by their name in an open folder, which spares the system the rest of the path.
# macOS has no O_PATH; a folder that was listed can be opened for reading, too.
FOLDER_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC

# Files of one folder that `walk` yields together.
_FILES_TOGETHER = 1_000
# How many linked directories the warning names.
_SHOWN_LINKS = 10
# Errors for a link that leads to itself or through a file, and for too long a path.
_UNUSABLE = (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)
# Errors for a file that is gone, or whose place something else has taken.
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP, errno.ENXIO)
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


def walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, file names), up to 1,000 names at a time, in the order of the content hash.

    The folder is relative to `root`: "" or with a final "/".

    Raises:
        InvalidInputError: something in it is not a file that can be read.
        DataChangedError: a folder vanished meanwhile.
    """
    links: list[str] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        files, subfolders = _list(root, folder, links)
        for start in range(0, len(files), _FILES_TOGETHER):
            yield folder, files[start : start + _FILES_TOGETHER]
        folders.extend(f"{folder}{name}/" for name in reversed(subfolders))
    if links:
        _log.warning(
            "Linked directories are not followed and not part of the data: %s%s",
            ", ".join(links[:_SHOWN_LINKS]),
            f" and {len(links) - _SHOWN_LINKS} more" if len(links) > _SHOWN_LINKS else "",
        )


def single_file(path: str) -> tuple[str, list[str]]:
    """Return what `walk` would yield for a directory that holds only this file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as exc:
        raise DataNotFoundError(f"data path does not exist: {path}") from exc
    if not stat.S_ISREG(mode):
        raise not_a_file(path, mode)
    return "", [os.path.basename(path)]


def walk_order(path: bytes) -> list[tuple[bool, bytes]]:
    """Return what sorts relative paths as `walk` yields them."""
    *folders, file = path.split(b"/")
    return [*((True, folder) for folder in folders), (False, file)]


def encode_names(root: str, folder: str, names: list[str]) -> list[bytes]:
    """Return the relative paths of files in UTF-8; raise InvalidInputError for other names."""
    try:
        return [f"{folder}{name}".encode() for name in names]
    except UnicodeEncodeError as exc:
        path = os.fsencode(os.path.join(root, exc.object))
        raise InvalidInputError(f"file name is not UTF-8: {path!r}. Rename it.") from exc


def open_path(path: str, flags: int) -> int:
    """Open a file or folder; raise what `inaccessible` says."""
    try:
        return os.open(path, flags)
    except OSError as exc:
        raise inaccessible(path, exc) from exc


def inaccessible(path: str, error: OSError) -> Exception:
    """Return the error to raise for a path that cannot be opened or listed."""
    if error.errno in _VANISHED:
        return DataChangedError(
            f"a file vanished while the data was being read: {path}. Retry once nothing writes to "
            "the data."
        )
    if isinstance(error, PermissionError):
        return InvalidInputError(
            f"permission denied, cannot read {path}. Make it readable for this user, or move it "
            "out of the data."
        )
    # The system's error names only the last part of the path.
    return OSError(error.errno, error.strerror, path)


def not_a_file(path: str, mode: int) -> InvalidInputError:
    """Return the error to raise for a FIFO, socket, device or directory in a file's place."""
    kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
    return InvalidInputError(
        f"found {kind}, expected regular files: {path}. Move it out of the data."
    )


def _list(root: str, folder: str, links: list[str]) -> tuple[list[str], list[str]]:
    """Return the names of files and subfolders, sorted; add linked directories to `links`."""
    files: list[str] = []
    subfolders: list[str] = []
    try:
        with os.scandir(f"{root}/{folder}") as entries:
            for entry in entries:
                if entry.is_file():
                    files.append(entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    subfolders.append(entry.name)
                elif entry.is_dir():
                    links.append(folder + entry.name)
                else:
                    raise _neither_file_nor_folder(f"{root}/{folder}{entry.name}")
    except (FileNotFoundError, PermissionError) as exc:
        raise inaccessible(f"{root}/{folder}", exc) from exc
    except OSError as exc:
        if exc.errno in _UNUSABLE:
            raise InvalidInputError(
                f"cannot follow the link or path {exc.filename or root + '/' + folder}: "
                f"{exc.strerror}. Remove the link, or shorten the path."
            ) from exc
        raise
    files.sort()
    subfolders.sort()
    return files, subfolders


def _neither_file_nor_folder(path: str) -> Exception:
    try:
        return not_a_file(path, os.stat(path).st_mode)
    except OSError:
        if not os.path.islink(path):
            return inaccessible(path, FileNotFoundError(errno.ENOENT, "gone"))
        return InvalidInputError(
            f"broken link: {path} points to {os.readlink(path)}, which is not there. Remove the "
            "link or restore its target."
        )
