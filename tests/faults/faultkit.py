"""What the fault tests share: clients, trees of files, and work done in processes of their own."""

import hashlib
import multiprocessing
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.datasets.materialize import materialize
from keras_remote_airflow.core.datasets.upload import UploadResult, upload
from keras_remote_airflow.core.disk.hashing import take_snapshot
from keras_remote_airflow.core.layout import get_layout
from keras_remote_airflow.core.refs import make_data_ref
from keras_remote_airflow.testing import StorageServer

BUCKET = "test-bucket"
# The real timings, a hundred times faster.
FAST = RetryPolicy(deadline=10, initial=0.01, maximum=0.1, stall_timeout=0.5)
BIG = 9 << 20  # bytes; above core.store's bound for one request, so it takes an upload session

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["pytest", "google.cloud.storage", "keras_remote_airflow.core.datasets.materialize"]
)


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def make_tree(root: Path | str, files: dict[str, bytes]) -> str:
    """Write files below `root` and return it."""
    for name, data in files.items():
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    Path(root).mkdir(parents=True, exist_ok=True)
    return str(root)


def read_tree(root: Path | str) -> dict[str, bytes]:
    paths = [path for path in Path(root).rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def small_files(count: int = 3) -> dict[str, bytes]:
    return {f"part-{i}/{i:03}.bin": content(1000 + i, i) for i in range(count)}


def client_for(url: str, credentials: Any = None) -> Any:
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    return storage.Client(
        project="test-project",
        credentials=credentials or AnonymousCredentials(),
        client_options={"api_endpoint": url},
    )


def do_upload(url: str, path: str, retry: RetryPolicy = FAST, **options: Any) -> UploadResult:
    return upload(BUCKET, path, client=client_for(url), retry=retry, **options)


def do_materialize(
    url: str, gcs_uri: str, dest: str, *, is_dir: bool = True, retry: RetryPolicy = FAST
) -> str:
    return materialize(make_data_ref(gcs_uri, is_dir), dest, client=client_for(url), retry=retry)


def prefix_of(content_hash: str, namespace: str = "default") -> str:
    return f"{namespace}/data-cache/{content_hash}/"


def published(server: StorageServer, layout: str = "keras_remote") -> dict[str, set[str]]:
    """Every content hash that has a marker, with the names of its objects below its prefix.

    Asserts guarantee 1: that the objects under each of them hash to it, with our own hash and no
    code of the package's.
    """
    objects = server.objects(BUCKET)
    marker = get_layout(layout).marker
    found: dict[str, set[str]] = {}
    for content_hash in {name.split("/")[2] for name in objects if name.count("/") >= 2}:
        prefix = prefix_of(content_hash)
        marker_name = marker.format(namespace="default", content_hash=content_hash)
        files = {
            name.removeprefix(prefix): stored.data
            for name, stored in objects.items()
            if name.startswith(prefix) and name != marker_name
        }
        if marker_name in objects:
            assert content_hash in hashes_of(files), f"{content_hash} holds {sorted(files)}"
            found[content_hash] = set(files)
    return found


def hashes_of(files: dict[str, bytes]) -> set[str]:
    """The content hashes that these files can have: as a directory and, if one, as a file."""
    digests = {
        name: hashlib.sha256(name.encode() + b"\0" + data).digest() for name, data in files.items()
    }

    def folder(prefix: str) -> Iterator[bytes]:
        below = [name for name in digests if name.startswith(prefix)]
        for name in sorted(name for name in below if "/" not in name[len(prefix) :]):
            yield digests[name]
        subfolders = {n[len(prefix) :].split("/")[0] for n in below if "/" in n[len(prefix) :]}
        for name in sorted(subfolders):
            yield from folder(f"{prefix}{name}/")

    hashes = {hashlib.sha256(b"dir:" + b"".join(folder(""))).hexdigest()}
    if len(digests) == 1:
        hashes.add(hashlib.sha256(b"file:" + next(iter(digests.values()))).hexdigest())
    return hashes


def content_hash_of(path: str) -> str:
    return take_snapshot(path).content_hash


def bytes_received(server: StorageServer) -> int:
    """How much data arrived in bodies of uploads."""
    return sum(r.body_bytes for r in server.requests if r.method in ("POST", "PUT"))


def wait_until(claim: Callable[[], object], seconds: float = 30) -> None:
    """Return once `claim()` holds; fail if it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


class Job:
    """A function at work in a process of its own."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._receiver, sender = _PROCESSES.Pipe(duplex=False)
        self.process = _PROCESSES.Process(target=_run, args=(sender, function, args, kwargs))
        self.process.start()
        sender.close()

    def result(self, seconds: float = 60) -> Any:
        """Wait for the end; return what the function returned, or raise what it raised."""
        assert self._receiver.poll(seconds), "the process did not end"
        value = self._receiver.recv()
        self.process.join(seconds)
        if isinstance(value, BaseException):
            raise value
        return value

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()


def _run(sender: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    try:
        value = function(*args, **kwargs)
    except Exception as exc:  # noqa: BLE001 - raised again by Job.result
        value = exc
    sender.send(value)


@contextmanager
def killed_at_exit(*jobs: Job) -> Iterator[None]:
    try:
        yield
    finally:
        for job in jobs:
            job.kill()


def peak_memory() -> int:
    """Bytes of memory this process has had at the most (VmHWM)."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def umask_of_process() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Tap:
    """A TCP relay in front of a server, that can stop taking the client's bytes or slow them down.

    Args:
        url: the server behind it.
        stop_after: client bytes after which the first connection that sends as many is left
            open but no longer read.
        pause: seconds to wait after each 64 KiB from the client.
        flip_at: which byte of a connection to damage, once.
    """

    def __init__(
        self,
        url: str,
        stop_after: int | None = None,
        pause: float = 0.0,
        flip_at: int | None = None,
    ) -> None:
        self._address = ("127.0.0.1", int(url.rpartition(":")[2]))
        self._stop_after = stop_after
        self._pause = pause
        self._flip_at = flip_at
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        # Small, so that what was sent is soon taken.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.stopped = self.flipped = 0

    def __enter__(self) -> "Tap":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for each in (self._listener, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._address)
                self._sockets += [near, far]
                threading.Thread(target=self._up, args=(near, far), daemon=True).start()
                threading.Thread(target=self._down, args=(far, near), daemon=True).start()

    def _up(self, near: socket.socket, far: socket.socket) -> None:
        sent = 0
        with suppress(OSError):
            while data := bytearray(near.recv(1 << 16)):
                if self._flip_at is not None and sent + len(data) > self._flip_at:
                    data[self._flip_at - sent] ^= 1
                    self._flip_at = None
                    self.flipped += 1
                far.sendall(data)
                sent += len(data)
                if self._stop_after is not None and sent > self._stop_after:
                    self._stop_after = None
                    self.stopped += 1
                    return
                time.sleep(self._pause)
            far.shutdown(socket.SHUT_WR)

    def _down(self, far: socket.socket, near: socket.socket) -> None:
        with suppress(OSError):
            while data := far.recv(1 << 16):
                near.sendall(data)
            near.shutdown(socket.SHUT_WR)
