"""`StorageServer`: the local Cloud Storage server, in a thread of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote

from .api import Api, error_response
from .faults import Fault, Faults, Request
from .folder import Folder
from .http import Connection, HttpRequest, Response
from .objects import ApiError, Store, StoredObject, Upload, check_name

# Long enough for the slowest machine to bind a port; a server that cannot is broken.
_START_SECONDS = 30.0


class StorageServer:
    """A Cloud Storage for tests: the JSON API over HTTP, in memory or in a folder.

    Args:
        buckets: names of buckets to create at the start (those already in `directory` are kept).
        host: the address to bind. There is no authentication: leave it at the local one.
        port: 0 takes a free port.
        directory: keep everything in this folder, across restarts. None: in memory.
        latency: seconds to wait before each answer.

    Use it as a context manager, or call `start()` and `stop()`. All methods may be called from
    any thread, before the start as well.
    """

    def __init__(
        self,
        buckets: Iterable[str] = (),
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        directory: str | Path | None = None,
        latency: float = 0.0,
    ) -> None:
        self.host = host
        self.port = port
        self.latency = latency
        self._lock = threading.RLock()
        self._faults = Faults()
        self._store = Store(None if directory is None else Folder(Path(directory)))
        self._app = _App(self)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._connections: set[Connection] = set()
        for name in buckets:
            if name not in self._store.buckets:
                self.create_bucket(name)

    # Life.

    def start(self) -> StorageServer:
        """Serve in a background thread; returns once the port is open.

        Raises:
            OSError: the address cannot be bound.
        """
        if self._thread is not None:
            raise RuntimeError("the server is running")
        ready: list[BaseException | None] = []
        event = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(ready, event), name="storage-server", daemon=True
        )
        self._thread.start()
        if not event.wait(_START_SECONDS):
            raise TimeoutError("the server did not start")
        if ready[0] is not None:
            self._thread.join()
            self._thread = None
            raise ready[0]
        return self

    def stop(self) -> None:
        """Close every connection, stalled ones too, drop unfinished uploads, end the thread."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._loop is not None and self._stopping is not None:
            with suppress(RuntimeError):  # the loop has come to its end by itself
                self._loop.call_soon_threadsafe(self._stopping.set)
        thread.join()
        self._app.close()

    def __enter__(self) -> StorageServer:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """What `STORAGE_EMULATOR_HOST` must be set to."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def env(self) -> dict[str, str]:
        """The environment that points Google's clients and Airflow's hooks at this server."""
        return environment(self.url)

    # State, by the back door: no HTTP, no faults, no log.

    def create_bucket(self, name: str, lifecycle: Mapping[str, Any] | None = None) -> None:
        with self._lock:
            settings = {} if lifecycle is None else {"lifecycle": dict(lifecycle)}
            self._store.create_bucket(name, settings)

    def objects(self, bucket: str) -> dict[str, StoredObject]:
        """A snapshot of the bucket's objects by name, in listing order."""
        with self._lock:
            held = self._store.bucket(bucket)
            return {n: dataclasses.replace(held.objects[n]) for n in held.names.sorted()}

    def put(
        self, bucket: str, name: str, data: bytes, metadata: Mapping[str, str] | None = None
    ) -> StoredObject:
        """Store an object, overwriting what is there."""
        check_name(name)
        with self._lock:
            spool = self._store.spool(bucket)
            spool.write(bytes(data))
            upload = Upload(name, metadata=None if metadata is None else dict(metadata))
            return dataclasses.replace(self._store.put(bucket, upload, spool))

    def delete(self, bucket: str, name: str) -> None:
        with self._lock:
            self._store.delete(bucket, name)

    # Faults and the log.

    def add_fault(self, fault: Fault) -> None:
        self._faults.add(fault)

    def clear_faults(self) -> None:
        """Forget all faults; denied permissions stay denied."""
        self._faults.clear()

    def deny(self, *names: str) -> None:
        """Answer 403 to "overwrite", "delete", "bucket_get" and the other names in `DENIABLE`."""
        self._faults.deny(*names)

    def allow_all(self) -> None:
        """Take back every `deny`."""
        self._faults.allow_all()

    @property
    def requests(self) -> list[Request]:
        """The requests answered (or dropped) so far, calls inside a batch included."""
        return self._faults.logged()

    def clear_requests(self) -> None:
        self._faults.clear_log()

    # The thread.

    def _run(self, ready: list[BaseException | None], event: threading.Event) -> None:
        try:
            asyncio.run(self._serve(ready, event))
        except BaseException as exc:
            if event.is_set():
                raise
            ready.append(exc)
            event.set()

    async def _serve(self, ready: list[BaseException | None], event: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        server = await self._loop.create_server(
            lambda: Connection(self._app, self._connections), self.host, self.port, backlog=1024
        )
        self.port = server.sockets[0].getsockname()[1]
        ready.append(None)
        event.set()
        await self._stopping.wait()
        # asyncio makes a task for each connection that it has just accepted. Were the server closed
        # first, such a task would drop its connection unclosed, and that client would wait for
        # ever. So: accept no more, let those tasks end, abort their connections, and then close.
        for listener in server.sockets:
            self._loop.remove_reader(listener.fileno())
        while self._connections or len(asyncio.all_tasks()) > 1:
            for connection in list(self._connections):
                connection.abort()
            await asyncio.sleep(0)
        server.close()


class _App:
    """What the connections call: faults, then the API, then the log."""

    def __init__(self, server: StorageServer) -> None:
        self._server = server
        self._faults = server._faults
        self._lock = server._lock
        self._api = Api(server._store, server._faults)

    def close(self) -> None:
        with self._lock:
            self._api.close()

    def begin(self, request: HttpRequest) -> int | None:
        fault = request.fault = self._match(request)
        drop_after = None
        if fault is not None:
            if fault.action == "drop_before":
                drop_after = fault.after_bytes
            unread = fault.action == "drop_before" and drop_after is None
            if unread or (fault.action == "status" and fault.status is not None):
                request.sink = _Nowhere()
                return None
        try:
            with self._lock:
                request.sink = self._api.open_sink(request)
        except ApiError as exc:
            request.sink = _Nowhere()
            request.refused = exc
        return drop_after

    def respond(self, request: HttpRequest) -> Response:
        fault: Fault | None = request.fault
        response = self._answer(request, fault)
        response.delay += self._server.latency
        if fault is not None:
            response.delay += fault.latency
            if fault.headers:
                response.headers = {**response.headers, **fault.headers}
        silent = response.drop or (response.stall and response.cut_at is None)
        self._log(request, None if silent else response.status)
        return response

    def aborted(self, request: HttpRequest) -> None:
        with self._lock:
            if request.sink is not None:
                request.sink.abort()
        self._log(request, None)

    def _answer(self, request: HttpRequest, fault: Fault | None) -> Response:
        if fault is not None and fault.action == "drop_before" and fault.after_bytes is None:
            return Response(0, drop=True)
        if fault is not None and fault.action == "status" and fault.status is not None:
            return _status_response(fault.status)
        if request.refused is not None:
            return error_response(request.refused)
        with self._lock:
            response = self._api.serve(request, self._batch_call)
        return response if fault is None else _spoil(response, fault)

    def _batch_call(self, request: HttpRequest) -> Response:
        """One call of a batch. Only a fault's status makes sense here."""
        fault = self._match(request)
        if fault is not None and fault.action == "status" and fault.status is not None:
            response = _status_response(fault.status)
        else:
            response = self._api.serve(request, None)
        self._log(request, response.status)
        return response

    def _match(self, request: HttpRequest) -> Fault | None:
        download = request.method == "GET" and request.query.get("alt") == "media"
        return self._faults.match(request.method, request.decoded_target, download=download)

    def _log(self, request: HttpRequest, status: int | None) -> None:
        self._faults.log(
            Request(
                method=request.method,
                path=unquote(request.path),
                query=request.query,
                object_name=request.object_name,
                status=status,
                body_bytes=request.body_bytes,
            )
        )


class _Nowhere:
    """Takes a body that nobody will read."""

    def write(self, data: bytes) -> None:
        """Drop it."""

    def abort(self) -> None:
        """Nothing to undo."""


def _status_response(status: int) -> Response:
    return error_response(ApiError(status, "backendError", f"Injected status {status}"))


def _spoil(response: Response, fault: Fault) -> Response:
    """Make a good answer bad, as the fault says."""
    length = len(response.body) if response.stream is None else response.content_length
    if fault.action == "drop_after":
        response.drop = True
    elif fault.action == "stall":
        response.stall = True
        response.cut_at = fault.after_bytes
    elif fault.action == "truncate":
        response.cut_at = length // 2 if fault.after_bytes is None else fault.after_bytes
    elif fault.action == "corrupt" and response.status in (200, 206):
        at = length // 2 if fault.after_bytes is None else fault.after_bytes
        pieces = (response.body,) if response.stream is None else response.stream
        response.stream = _flip_bit(pieces, at)
        response.content_length = length
    elif fault.action == "bad_hash" and "X-Goog-Hash" in response.headers:
        # Hashes of no object that a test would store.
        wrong = "crc32c=/////w==,md5=/////////////////////w=="
        response.headers = {**response.headers, "X-Goog-Hash": wrong}
    return response


def _flip_bit(pieces: Iterable[bytes], at: int) -> Iterator[bytes]:
    for piece in pieces:
        if 0 <= at < len(piece):
            yield piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
        else:
            yield piece
        at -= len(piece)


def environment(url: str) -> dict[str, str]:
    """The environment that points Google's clients and Airflow's hooks at a server."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "AIRFLOW_CONN_GOOGLE_CLOUD_DEFAULT": (
            '{"conn_type": "google_cloud_platform", '
            '"extra": {"is_anonymous": true, "project": "test-project"}}'
        ),
        # Otherwise gcsfs asks a gRPC service about each bucket's type, and gives up after a
        # minute. It reads this when it is imported.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
