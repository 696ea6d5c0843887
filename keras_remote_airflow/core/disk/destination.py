"""Checks a destination, and puts a directory or file there, or in exchange for what is there."""

import errno
import os
import stat
from contextlib import suppress

from keras_remote_airflow.core.disk.tree import refusing, system_path
from keras_remote_airflow.core.errors import InvalidInputError


def check_dest(dest: object) -> str:
    """Return the absolute path of a destination; raise what `absolute_directory` raises."""
    path = absolute_directory(dest, "destination")
    if os.path.islink(path) and not is_taken(f"{path}/"):
        raise _is_link(path)
    return path


def absolute_directory(directory: object, what: str) -> str:
    """Return the absolute path of a directory that is there or could be made.

    Raises:
        InvalidInputError: it is no path, cannot be a directory, or is in a directory that this user
            may not enter; the message calls it `what`.
        OSError: the file system does not answer.
    """
    text = os.fspath(directory) if isinstance(directory, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise InvalidInputError(
            f"{what} is no path: {directory!r}. Pass the path of a directory; is a template or a "
            "variable empty?"
        )
    path = os.path.abspath(os.path.expanduser(system_path(text)))
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        is_directory = not os.path.islink(path)
    except ValueError as exc:
        raise InvalidInputError(
            f"{what} is no path: {path!r} ({exc}). Pass the path of a directory."
        ) from exc
    except OSError as exc:
        if exc.errno not in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise denied(path, exc) from None
        raise InvalidInputError(
            f"{what} cannot be a directory ({exc.strerror}): {path}. Choose a path whose parents "
            "are directories."
        ) from None
    if not is_directory:
        raise InvalidInputError(
            f"{what} is not a directory: {path}. Choose one, or a path that is not there."
        )
    return path


def is_taken(path: str) -> bool:
    """Return whether something is at `path`, other than an empty directory."""
    try:
        return not stat.S_ISDIR(os.lstat(path).st_mode) or bool(os.listdir(path))
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise denied(path, exc) from None


def is_around_cwd(path: str) -> bool:
    """Return whether `path` is the current directory, or one that contains it, as the root does."""
    try:
        folder, found = os.getcwd(), os.stat(path)
        while not os.path.samestat(os.stat(folder), found):
            if folder == os.path.dirname(folder):
                return False
            folder = os.path.dirname(folder)
    except (FileNotFoundError, PermissionError):
        return False
    return True


def check_replaceable(path: str) -> None:
    """Raise InvalidInputError for a destination that cannot be replaced as a whole."""
    if os.path.islink(path):
        raise _is_link(path)
    if is_around_cwd(path):
        raise InvalidInputError(
            "destination is the current directory, or contains it, and cannot be replaced as a "
            f"whole: {path}. Choose a directory inside it."
        )
    if holds_mount_point(path):
        raise InvalidInputError(
            "destination is a mount point, or contains one, and cannot be replaced as a whole: "
            f"{path}. Choose a directory inside it."
        )


def holds_mount_point(path: str) -> bool:
    """Return whether a file system, or a directory of one, is mounted at `path` or below it."""
    if os.path.ismount(path):
        return True
    try:  # `ismount` misses a directory that is mounted elsewhere in its own file system
        with open("/proc/self/mountinfo", "rb") as mounts:
            places = [line.split()[4] for line in mounts]
    except OSError:
        return False
    escaped = os.fsencode(os.path.realpath(path))
    for character in b"\\ \t\n":
        escaped = escaped.replace(bytes([character]), b"\\%03o" % character)
    return any((place + b"/").startswith(escaped + b"/") for place in places)


def denied(path: str, error: OSError) -> Exception:
    """Return the error to raise for a destination that cannot be looked into."""
    if not isinstance(error, PermissionError):
        return OSError(error.errno, error.strerror, path)
    return InvalidInputError(
        f"permission denied by {refusing(path)}, for destination {path}. Choose another, or give "
        "this user access."
    )


def put(source: str, final: str) -> bool:
    """Rename `source` to `final` unless that is taken; return whether it was free."""
    if os.path.isdir(source):
        with suppress(FileNotFoundError):  # an empty directory hands its mode on
            _take_mode(source, final)
    else:
        try:
            os.link(source, final)
        except FileExistsError:
            return False
        except OSError:  # there are file systems without hard links
            if os.path.lexists(final):
                return False
        else:
            return True
    try:
        os.rename(source, final)
    except OSError:
        if is_taken(final):
            return False
        raise
    return True


def exchange(source: str, final: str) -> None:
    """Put `source` in the place of `final`, and what was there in the place of `source`.

    Linux and macOS exchange the two names in one step. On other systems, and on file systems that
    cannot do that, a reader finds no directory at `final` between two renames.
    """
    old = f"{source}.old"
    try:
        if os.path.isdir(source):
            _take_mode(source, final)
            _take_mode(final, final)
        if _exchange_in_one_step(source, final):
            return
        try:
            try:
                os.link(final, old)
            except OSError:  # a directory, or a file system without hard links
                os.rename(final, old)
            os.rename(source, final)
        except BaseException:
            with suppress(OSError):
                os.rename(old, final)
            raise
        os.rename(old, source)
    except OSError as exc:
        raise OSError(
            exc.errno,
            f"destination cannot be replaced ({exc.strerror}; is it part of a container's image, "
            "or another user's?). Choose a directory on a volume, or a path that is not there",
            final,
        ) from exc


def _take_mode(folder: str, model: str) -> None:
    # A directory that its owner may not write cannot be renamed into another one.
    mode = stat.S_IMODE(os.lstat(model).st_mode) | stat.S_IWUSR
    if stat.S_IMODE(os.lstat(folder).st_mode) != mode:
        os.chmod(folder, mode)


def _is_link(path: str) -> InvalidInputError:
    return InvalidInputError(
        f"destination is a link, which cannot be replaced as a whole: {path}. Choose a directory "
        f"inside it, or {os.path.realpath(path)} itself."
    )


def _exchange_in_one_step(one: str, other: str) -> bool:
    import ctypes

    libc = ctypes.CDLL(None)
    paths = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):  # Linux: RENAME_EXCHANGE is 2, AT_FDCWD is -100
        return not libc.renameat2(-100, paths[0], -100, paths[1], ctypes.c_uint(2))
    if hasattr(libc, "renamex_np"):  # macOS: RENAME_SWAP is 2
        return not libc.renamex_np(*paths, ctypes.c_uint(2))
    return False
