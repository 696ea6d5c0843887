"""Walk a local directory in the order of the content hash, and refuse what is no file."""

import errno
import logging
import os
import stat
from collections.abc import Iterator

from keras_remote_airflow.core.errors import DataChangedError, DataNotFoundError, InvalidInputError

_log = logging.getLogger(__name__)
_SLICE = 10_000  # files of one folder that are listed together
# O_NONBLOCK: should a FIFO take a file's place after the directory was listed, opening it must
# not hang. It means nothing to a regular file.
OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
# Files are opened by their name in an open folder: the system need not walk down the whole path.
FOLDER_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
# A link that leads to itself or through a file; a path longer than the system takes.
_UNUSABLE = (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)
# What opening a file says that is gone, or that something else has taken the place of.
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP, errno.ENXIO)


def walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Yield folders (relative, "" or with a final "/") and names of files in them, some at a time.

    In the order of the content hash.
    """
    linked: list[str] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        files, subfolders = _list(root, folder, linked)
        for start in range(0, len(files), _SLICE):
            yield folder, files[start : start + _SLICE]
        folders.extend(f"{folder}{name}/" for name in reversed(subfolders))
    if linked:
        _log.warning(
            "Linked directories are not followed and not part of the data: %s%s",
            ", ".join(linked[:10]),
            f" and {len(linked) - 10} more" if len(linked) > 10 else "",
        )


def single_file(path: str) -> tuple[str, list[str]]:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as exc:
        raise DataNotFoundError(f"data path does not exist: {path}") from exc
    if not stat.S_ISREG(mode):
        raise not_a_file(path, mode)
    return "", [os.path.basename(path)]


def _list(root: str, folder: str, linked: list[str]) -> tuple[list[str], list[str]]:
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
                    linked.append(folder + entry.name)
                else:
                    raise _special(f"{root}/{folder}{entry.name}")
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


def encode_names(root: str, folder: str, names: list[str]) -> list[bytes]:
    """Return the relative paths of files in UTF-8."""
    try:
        prefix = folder.encode()
        return [prefix + name.encode() for name in names]
    except UnicodeEncodeError as exc:
        refused = next(name for name in names if not _is_utf8(folder + name))
        path = os.fsencode(os.path.join(root, folder, refused))
        raise InvalidInputError(f"file name is not UTF-8: {path!r}. Rename it.") from exc


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_path(path: str, flags: int) -> int:
    try:
        return os.open(path, flags)
    except OSError as exc:
        raise inaccessible(path, exc) from exc


def inaccessible(path: str, error: OSError) -> Exception:
    if error.errno in _VANISHED:
        return DataChangedError(
            f"{path} vanished while the data was being read. Retry once nothing writes to it."
        )
    if isinstance(error, PermissionError):
        return InvalidInputError(
            f"cannot read {path}: permission denied. Make it readable for this user, or move it "
            "out of the data."
        )
    return OSError(error.errno, error.strerror, path)  # it names but the last part of the path


def _special(path: str) -> Exception:
    try:
        return not_a_file(path, os.stat(path).st_mode)
    except OSError:
        if not os.path.islink(path):
            return inaccessible(path, FileNotFoundError(errno.ENOENT, "gone"))
        return InvalidInputError(
            f"broken link: {path} points to {os.readlink(path)}, which is not there. Remove the "
            "link or restore its target."
        )


def not_a_file(path: str, mode: int) -> InvalidInputError:
    kinds = {
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFDIR: "a directory",
    }
    kind = kinds.get(stat.S_IFMT(mode), "a special file")
    return InvalidInputError(f"{path} is {kind}: expected regular files. Move it out of the data.")
