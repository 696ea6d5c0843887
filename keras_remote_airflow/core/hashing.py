"""One read of a file or directory gives its content hash and, per file, what an upload declares.

The content hash is keras_remote's two-level one, byte for byte as keras-kinetic 0.0.1 to 0.0.4
compute it (`kinetic/data/data.py`); `||` concatenates and every digest is the raw 32 bytes:

    file digest   SHA-256(relative path || 00 || content)       path in UTF-8 with "/"
    directory     SHA-256("dir:" || digest of file 1 || digest of file 2 || …)
    single file   SHA-256("file:" || digest under its basename)

The order is os.walk's with names sorted by code point: a directory's files, then its
subdirectories. Linked directories are not followed; linked files are read.

SHA-256 and CRC32C come from the same bytes, so whatever later answers to the CRC32C of an upload
is what was hashed. A snapshot keeps about 70 bytes a file plus its name, in flat arrays: a million
files fit into some 150 MB.
"""

import errno
import hashlib
import logging
import os
import stat
import threading
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import google_crc32c

from keras_remote_airflow.core.errors import (
    DataChangedError,
    DataNotFoundError,
    InvalidInputError,
    KerasRemoteError,
)
from keras_remote_airflow.core.index import HashIndex
from keras_remote_airflow.core.progress import Progress

_log = logging.getLogger(__name__)

# Below this a file is hashed inline. hashlib lets go of the interpreter lock above 2 KiB, and
# threads that hash small files spend their time fighting over it.
_SMALL = 128 * 1024
# A link that leads to itself or through a file; a path longer than the system takes.
_UNUSABLE = (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)
_CHUNK = 1024 * 1024
# O_NONBLOCK: should a FIFO take a file's place after the directory was listed, opening it must
# not hang. It means nothing to a regular file.
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class FileRecord(NamedTuple):
    """One file of a snapshot.

    Attributes:
        path: relative to the snapshot's root, with "/"; a single file's basename.
        size: bytes.
        crc32c: of its content.
        digest: raw SHA-256 of path, a zero byte and content.
        mtime_ns: modification time when it was opened, nanoseconds since the epoch.
    """

    path: str
    size: int
    crc32c: int
    digest: bytes
    mtime_ns: int


class Snapshot:
    """What a file or directory held when it was read; made by `take_snapshot`.

    Attributes:
        root: absolute local path.
        is_dir: whether it is a directory.
        content_hash: 64 hex digits.
        total_bytes: size of all files.
    """

    def __init__(self, root: str, is_dir: bool) -> None:
        self.root = root
        self.is_dir = is_dir
        self.content_hash = ""
        self.total_bytes = 0
        self._names = bytearray()
        self._name_ends = array("Q")
        self._sizes = array("Q")
        self._crcs = array("I")
        self._mtimes = array("q")
        self._digests = bytearray()

    def __len__(self) -> int:
        return len(self._sizes)

    def name(self, index: int) -> bytes:
        """Return the relative path of file `index` in UTF-8."""
        start = self._name_ends[index - 1] if index else 0
        return bytes(self._names[start : self._name_ends[index]])

    def names(self) -> Iterator[bytes]:
        """Yield every relative path in UTF-8, in the order of the content hash."""
        return map(self.name, range(len(self)))

    def record(self, index: int) -> FileRecord:
        """Return file `index`, in the order of the content hash."""
        return FileRecord(
            self.name(index).decode(),
            self._sizes[index],
            self._crcs[index],
            bytes(self._digests[32 * index : 32 * index + 32]),
            self._mtimes[index],
        )

    def records(self) -> Iterator[FileRecord]:
        """Yield every file in the order of the content hash."""
        return map(self.record, range(len(self)))

    def local_path(self, relative_path: str) -> str:
        """Return where the file called `relative_path` is on disk."""
        return os.path.join(self.root, relative_path) if self.is_dir else self.root

    def _append(
        self, name: bytes, state: os.stat_result, digest: bytes = bytes(32), crc32c: int = 0
    ) -> None:
        self._names += name
        self._name_ends.append(len(self._names))
        self._sizes.append(state.st_size)
        self._mtimes.append(state.st_mtime_ns)
        self._crcs.append(crc32c)
        self._digests += digest
        self.total_bytes += state.st_size

    def _fill(self, index: int, digest: bytes, crc32c: int) -> None:
        self._digests[32 * index : 32 * index + 32] = digest
        self._crcs[index] = crc32c

    def hash_as(self, is_dir: bool) -> str:
        """Return the content hash that the same files have as a directory, or as a single file."""
        return hashlib.sha256((b"dir:" if is_dir else b"file:") + self._digests).hexdigest()


# SHA-256("dir:"): the one dataset that has no objects.
EMPTY_DIRECTORY_HASH = hashlib.sha256(b"dir:").hexdigest()


def take_snapshot(path: str, hash_index: str | None = None) -> Snapshot:
    """Read a local file or directory once.

    Args:
        path: absolute local path.
        hash_index: file of a hash index (see `core.index`), which is read, and written if anything
            is new: files that it knows and that are unchanged are not read. None reads every file.

    Returns:
        The snapshot, content hash included.

    Raises:
        DataNotFoundError: nothing is there.
        InvalidInputError: something in it is no file that can be read: a FIFO, socket or device
            (never opened), a broken link, a name that is not UTF-8, a file without permission.
        DataChangedError: a file vanished or changed its size while it was read.
    """
    is_dir = os.path.isdir(path)
    snapshot = Snapshot(path, is_dir)
    progress = Progress(_log, f"Hashing {path}")
    stop = threading.Event()
    index = HashIndex(hash_index, path) if hash_index else None
    # The processors this process may use: a container's share, not the whole machine's.
    threads = min(32, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, "hash") as pool:
        window: deque[Future[None]] = deque()
        try:
            for name, file_path in _walk(path) if is_dir else _single(path):
                if index:
                    state = _stat(file_path)
                    known = index.get(name, state)
                    if known:
                        snapshot._append(name, state, *known)
                        continue
                descriptor, state = _open(file_path)
                if state.st_size <= _SMALL:
                    content = _read_small(descriptor, file_path, state.st_size)
                    digest = hashlib.sha256(name + b"\0" + content).digest()
                    snapshot._append(name, state, digest, google_crc32c.value(content))
                    progress.add(1, len(content))
                    continue
                snapshot._append(name, state)
                large = _LargeFile(
                    snapshot, len(snapshot) - 1, name, file_path, descriptor, state.st_size
                )
                window.append(pool.submit(large.hash, progress, stop))
                if len(window) > 2 * threads:
                    window.popleft().result()
            for future in window:
                future.result()
        finally:
            stop.set()
    snapshot.content_hash = snapshot.hash_as(snapshot.is_dir)
    if index:
        index.save(snapshot)
    _log.debug(
        "Hashed %s: %d files, %d bytes, %.2f s",
        path,
        len(snapshot),
        snapshot.total_bytes,
        progress.seconds,
    )
    return snapshot


@dataclass(frozen=True)
class _LargeFile:
    """An open file with a place in the snapshot; closes its descriptor."""

    snapshot: Snapshot
    index: int
    name: bytes
    path: str
    descriptor: int
    size: int

    def hash(self, progress: Progress, stop: threading.Event) -> None:
        """Fill in digest and CRC32C, in any thread; end early when `stop` is set."""
        sha256 = hashlib.sha256(self.name + b"\0")
        crc32c = done = 0
        try:
            while not stop.is_set() and (chunk := os.read(self.descriptor, _CHUNK)):
                sha256.update(chunk)
                crc32c = google_crc32c.extend(crc32c, chunk)
                done += len(chunk)
                progress.add(0, len(chunk))
        finally:
            os.close(self.descriptor)
        if not stop.is_set():
            _check_size(self.path, self.size, done)
            self.snapshot._fill(self.index, sha256.digest(), crc32c)
            progress.add(1, 0)


def _read_small(descriptor: int, path: str, size: int) -> bytes:
    try:
        content = os.read(descriptor, size + 1)
    finally:
        os.close(descriptor)
    _check_size(path, size, len(content))
    return content


def _check_size(path: str, opened: int, read: int) -> None:
    if read != opened:
        raise DataChangedError(
            f"{path} changed while it was being hashed ({opened} bytes when opened, {read} bytes "
            "read). Retry once nothing writes to it."
        )


def _open(path: str) -> tuple[int, os.stat_result]:
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as exc:
        raise _inaccessible(path, exc) from exc
    opened = os.fstat(descriptor)
    if not stat.S_ISREG(opened.st_mode):
        os.close(descriptor)
        raise _not_a_file(path, opened.st_mode)
    return descriptor, opened


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as exc:
        raise _inaccessible(path, exc) from exc


def _inaccessible(path: str, error: OSError) -> KerasRemoteError:
    if not isinstance(error, PermissionError):
        return DataChangedError(
            f"{path} vanished while the data was being read. Retry once nothing writes to it."
        )
    return InvalidInputError(
        f"cannot read {path}: permission denied. Make it readable for this user, or move it out "
        "of the data."
    )


def _single(path: str) -> Iterator[tuple[bytes, str]]:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as exc:
        raise DataNotFoundError(f"data path does not exist: {path}") from exc
    if not stat.S_ISREG(mode):
        raise _not_a_file(path, mode)
    yield _encode(os.path.basename(path), path), path


def _walk(root: str) -> Iterator[tuple[bytes, str]]:
    """Yield relative and absolute path of each file, in the order of the content hash."""
    linked: list[str] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        files, subfolders = _list(root, folder, linked)
        for name in files:
            relative = folder + name
            path = f"{root}/{relative}"
            yield _encode(relative, path), path
        folders.extend(f"{folder}{name}/" for name in reversed(subfolders))
    if linked:
        _log.warning(
            "Linked directories are not followed and not part of the data: %s%s",
            ", ".join(linked[:10]),
            f" and {len(linked) - 10} more" if len(linked) > 10 else "",
        )


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
        raise _inaccessible(f"{root}/{folder}", exc) from exc
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


def _special(path: str) -> Exception:
    try:
        return _not_a_file(path, os.stat(path).st_mode)
    except OSError:
        if not os.path.islink(path):
            return _inaccessible(path, FileNotFoundError())
        return InvalidInputError(
            f"broken link: {path} points to {os.readlink(path)}, which is not there. Remove the "
            "link or restore its target."
        )


def _not_a_file(path: str, mode: int) -> InvalidInputError:
    kinds = {
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFDIR: "a directory",
    }
    kind = kinds.get(stat.S_IFMT(mode), "a special file")
    return InvalidInputError(f"{path} is {kind}: expected regular files. Move it out of the data.")


def _encode(relative: str, path: str) -> bytes:
    try:
        return relative.encode()
    except UnicodeEncodeError as exc:
        raise InvalidInputError(
            f"file name is not UTF-8: {os.fsencode(path)!r}. Rename it."
        ) from exc
