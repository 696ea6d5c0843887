"""A path that appears whole: filled under another name, then renamed into place.

What is not yet whole lies in a directory of this user alone, beside the destination:

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
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from keras_remote_airflow.core.disk.tree import patiently, refusing, system_path
from keras_remote_airflow.core.errors import InvalidInputError

_log = logging.getLogger(__name__)

_PREFIX, _SUFFIX = ".keras-remote-", ".partial"
# The content hash of what `materialize` put in place, on the directory or file itself.
_RECORD = "user.keras_remote.content_hash"
# What flock answers on file systems that have no locks (Lustre, some mounts of CIFS, NFS and FUSE).
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)
# What a rename of two names against each other answers where the system or file system has none.
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


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
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidInputError(
            f"{what} is no path: {directory!r}. Pass the path of a directory; is a template or a "
            "variable empty?"
        )
    path = os.path.abspath(os.path.expanduser(system_path(text)))
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        is_directory = not os.path.islink(path)
    except OSError as exc:
        if exc.errno not in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise denied(path, exc) from exc
        raise InvalidInputError(
            f"{what} cannot be a directory ({exc.strerror}): {path}. Choose a path whose parents "
            "are directories."
        ) from exc
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
        raise denied(path, exc) from exc


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
    if is_mount_point(path):
        raise InvalidInputError(
            f"destination is a mount point, which cannot be replaced as a whole: {path}. Choose a "
            "directory inside it."
        )


def is_mount_point(path: str) -> bool:
    """Return whether a file system, or a directory of one, is mounted at `path`."""
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
    return escaped in places


def denied(path: str, error: OSError) -> Exception:
    """Return the error to raise for a destination that cannot be looked into."""
    if not isinstance(error, PermissionError):
        return OSError(error.errno, error.strerror, path)
    return InvalidInputError(
        f"permission denied by {refusing(path)}, for destination {path}. Choose another, or give "
        "this user access."
    )


def partial_name(final: str) -> str:
    """Return the name of the directory through which `final` is filled.

    No other file is likely to have it, and it is short however long the destination's own name is.
    """
    return f"{_short_name(final)}-{os.geteuid()}{_SUFFIX}"


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
    except OSError as exc:
        if exc.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
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
            f"destination cannot be replaced ({exc.strerror}; is it part of a container's image?). "
            "Choose a directory on a volume, or a path that is not there",
            final,
        ) from exc


def is_at(descriptor: int, path: str) -> bool:
    """Return whether the open file or directory is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def write_record(new: str, final: str, content_hash: str, *, beside: bool) -> None:
    """Note that `new`, which is to be put at `final`, is a copy of this content.

    The note is an extended attribute, which a rename takes along. Where there are none (macOS, NFS
    before version 4.2), and if `beside` is true, it is a line in a file beside `final`: inode
    number and hash.
    """
    try:
        os.setxattr(new, _RECORD, content_hash.encode())
    except (OSError, AttributeError):
        if beside:
            with open(_record_file(final), "a", opener=_open_record) as file:
                file.write(f"{os.stat(new).st_ino} {content_hash}\n")


def read_records(final: str) -> set[str]:
    """Return the content hashes that `write_record` has noted for this path."""
    found = set()
    with suppress(OSError, AttributeError):
        found.add(os.getxattr(final, _RECORD).decode(errors="replace"))
    with (
        suppress(OSError),
        open(_record_file(final), errors="replace", opener=_open_record) as file,
    ):
        if os.fstat(file.fileno()).st_uid == os.geteuid():
            of_final = f"{os.stat(final).st_ino} "
            found.update(
                line.removeprefix(of_final).strip() for line in file if line.startswith(of_final)
            )
    return found


def tree_state(path: str) -> int:
    """Return a number that changes with any change below a directory, or of a file.

    That the directory or file itself is renamed does not change it.
    """
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        return hash((found.st_ino, found.st_size, found.st_mtime_ns))
    state = hash(found.st_ino)
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            place = os.path.join(folder, name)
            try:
                found = os.lstat(place)
            except FileNotFoundError:
                continue
            times = found.st_size, found.st_mtime_ns, found.st_ctime_ns
            state += hash((place[len(path) :], times))
    return state


def _take_mode(folder: str, model: str) -> None:
    # A directory that its owner may not write cannot be renamed into another one.
    mode = stat.S_IMODE(os.lstat(model).st_mode) | stat.S_IWUSR
    if stat.S_IMODE(os.lstat(folder).st_mode) != mode:
        os.chmod(folder, mode)


def _short_name(final: str) -> str:
    name = os.path.basename(final).encode(errors="surrogateescape")
    return f"{_PREFIX}{hashlib.sha256(name).hexdigest()[:16]}"


def _record_file(final: str) -> str:
    return os.path.join(os.path.dirname(final), f"{_short_name(final)}.record")


def _open_record(path: str, flags: int) -> int:
    # Another user may have put a link or a FIFO there, which would have this process wait.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


def _is_link(path: str) -> InvalidInputError:
    return InvalidInputError(
        f"destination is a link, which cannot be replaced as a whole: {path}. Choose a directory "
        f"inside it, or {os.path.realpath(path)} itself."
    )


def _exchange_in_one_step(one: str, other: str) -> bool:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):  # Linux: RENAME_EXCHANGE is 2, AT_FDCWD is -100
        failed = libc.renameat2(-100, paths[0], -100, paths[1], ctypes.c_uint(2))
    elif hasattr(libc, "renamex_np"):  # macOS: RENAME_SWAP is 2
        failed = libc.renamex_np(*paths, ctypes.c_uint(2))
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), one, None, other)


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
                f"{path}, where the download goes first, is a link or a file: remove it"
            ) from exc
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
