"""`StorageServer`: the local Cloud Storage server, in a thread of its own."""

import asyncio
import dataclasses
import socket
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from .api import Api
from .buckets import DENIABLE, Buckets
from .faults import Fault, Faults, Request
from .folder import Folder
from .handler import Handler
from .objects import NewObject, StoredObject, check_name

# Clients keep idle connections: closing one at the wrong moment would look like a fault.
_KEEPALIVE_SECONDS = 24 * 3600.0
# Object names of 1024 bytes come percent-encoded, some requests have two, and page tokens are long.
_MAX_LINE_BYTES = 64 * 1024


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
        self._buckets = Buckets(None if directory is None else Folder(Path(directory)))
        self._api = Api(self._buckets)
        self._handler = Handler(self._api, self._faults, self._lock, lambda: self.latency)
        self._web: web.Server | None = None
        self._thread: threading.Thread | None = None
        for name in buckets:
            if name not in self._buckets:
                self.create_bucket(name)

    # Life.

    def start(self) -> Self:
        """Serve in a background thread; returns once the port is open.

        Raises:
            OSError: the address cannot be bound.
        """
        if self._thread is not None:
            raise RuntimeError("the server is running")
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.create_server((self.host, self.port), family=family, backlog=1024)
        self.port = listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(
            target=self._run, args=(self._loop, listener), name="storage-server", daemon=True
        )
        self._thread.start()
        return self

    def stop(self) -> None:
        """Close every connection, stalled ones too, drop unfinished uploads, end the thread."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with suppress(RuntimeError):  # the loop has come to its end by itself
            self._loop.call_soon_threadsafe(self._stopping.set)
        thread.join()
        with self._lock:
            self._api.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
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

    def create_bucket(
        self,
        name: str,
        lifecycle: Mapping[str, Any] | None = None,
        *,
        requester_pays: bool = False,
    ) -> None:
        """Create a bucket.

        Args:
            name: of the bucket.
            lifecycle: its lifecycle rules. They are shown, and nothing is deleted by them.
            requester_pays: refuse requests that name no project to bill (`userProject`).
        """
        settings: dict[str, Any] = {}
        if lifecycle is not None:
            settings["lifecycle"] = dict(lifecycle)
        if requester_pays:
            settings["billing"] = {"requesterPays": True}
        with self._lock:
            self._buckets.create_bucket(name, settings)

    def objects(self, bucket: str) -> dict[str, StoredObject]:
        """A snapshot of the bucket's objects by name, in listing order."""
        with self._lock:
            held = self._buckets[bucket]
            return {n: dataclasses.replace(held.objects[n]) for n in held.names()}

    def put(
        self, bucket: str, name: str, data: bytes, metadata: Mapping[str, str] | None = None
    ) -> StoredObject:
        """Store an object, overwriting what is there."""
        check_name(name)
        with self._lock:
            body = self._buckets.new_body(bucket)
            body.write(bytes(data))
            new = NewObject(name, metadata=None if metadata is None else dict(metadata))
            return dataclasses.replace(self._buckets.put(bucket, new, body))

    def delete(self, bucket: str, name: str) -> None:
        with self._lock:
            self._buckets.delete(self._buckets.get(bucket, name))

    def advance_clock(self, seconds: float) -> None:
        """Set the server's clock ahead, for tests of what happens later.

        Times of objects and the end of retention periods follow it.
        """
        with self._lock:
            self._buckets.ahead += round(seconds * 1_000_000)

    def play(
        self,
        *,
        listings_lack: Iterable[str] = (),
        compresses_json: bool = False,
        checks_hashes: bool = True,
    ) -> None:
        """Be like other servers and buckets from now on; `play()` goes back to the usual.

        Args:
            listings_lack: keys that objects lack in listings. `{"crc32c", "md5Hash"}` is a bucket
                with a customer-managed key; a request for a single object still shows both.
            compresses_json: JSON is answered in gzip if the client accepts that.
            checks_hashes: False is a server that stores bytes whatever hash was declared.
        """
        with self._lock:
            self._buckets.listings_lack = frozenset(listings_lack)
            self._buckets.checks_hashes = checks_hashes
            self._handler.compresses_json = compresses_json

    # Faults and the log.

    def add_fault(self, fault: Fault) -> None:
        self._faults.add(fault)

    def clear_faults(self) -> None:
        """Forget all faults; denied permissions stay denied."""
        self._faults.clear()

    def deny(self, *names: str) -> None:
        """Answer 403 to "overwrite", "delete", "bucket_get" and the other names in `DENIABLE`.

        Raises:
            ValueError: a name is not in `DENIABLE`.
        """
        for name in names:
            if name not in DENIABLE:
                raise ValueError(f"cannot deny {name!r}: choose from {', '.join(DENIABLE)}")
        self._buckets.denied |= frozenset(names)

    def allow_all(self) -> None:
        """Take back every `deny`."""
        self._buckets.denied = frozenset()

    @property
    def requests(self) -> list[Request]:
        """The requests answered (or dropped) so far, calls inside a batch included."""
        return self._faults.logged()

    def clear_requests(self) -> None:
        self._faults.clear_log()

    @property
    def connections(self) -> int:
        """How many connections of clients are open."""
        return 0 if self._web is None else len(self._web.connections)

    # The thread.

    def _run(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        loop.run_until_complete(self._serve(listener))
        loop.close()

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._web = web.Server(
            self._handler,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            keepalive_timeout=_KEEPALIVE_SECONDS,
            max_line_size=_MAX_LINE_BYTES,
            max_field_size=_MAX_LINE_BYTES,
        )
        server = await loop.create_server(self._web, sock=listener, backlog=1024)
        await self._stopping.wait()
        # asyncio makes a task for each connection that it has just accepted. Were the server closed
        # first, such a task would drop its connection unclosed, and that client would wait for
        # ever. So: accept no more, let those tasks end, abort their connections, and then close.
        loop.remove_reader(listener.fileno())
        while self._web.connections or len(asyncio.all_tasks()) > 1:
            for connection in self._web.connections:
                if connection.transport is not None:
                    connection.transport.abort()
            await asyncio.sleep(0)
        server.close()


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
