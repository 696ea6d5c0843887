"""What `materialize` has put at a destination: it replaces that and nothing else.

The record is the content hash, in the extended attribute `user.keras_remote.content_hash` of the
directory or file, which a rename takes along. Where there are no attributes (macOS, NFS before
version 4.2), it is a line in a file beside the destination, inode number and content hash:

    .keras-remote-{16 hex digits}.record
"""

import os
import stat
from contextlib import suppress

from keras_remote_airflow.core.disk.partial import short_name

_ATTRIBUTE = "user.keras_remote.content_hash"


def write_record(new: str, final: str, content_hash: str, *, beside: bool) -> None:
    """Note that `new`, which is to be put at `final`, is a copy of this content.

    It is written into a file beside `final` only if `beside` is true.
    """
    try:
        os.setxattr(new, _ATTRIBUTE, content_hash.encode())
    except (OSError, AttributeError):
        if beside:
            with open(_record_file(final), "a", opener=_open_record) as file:
                file.write(f"{os.stat(new).st_ino} {content_hash}\n")


def read_records(final: str) -> set[str]:
    """Return the content hashes that `write_record` has noted for this path."""
    found = set()
    with suppress(OSError, AttributeError):
        found.add(os.getxattr(final, _ATTRIBUTE).decode(errors="replace"))
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


def _record_file(final: str) -> str:
    return os.path.join(os.path.dirname(final), f"{short_name(final)}.record")


def _open_record(path: str, flags: int) -> int:
    # Another user may have put a link or a FIFO there, which would have this process wait.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
