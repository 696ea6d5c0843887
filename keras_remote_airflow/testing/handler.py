"""What aiohttp calls for each request.

A request sets off a fault or none. Its body goes to the API, which then answers; the log gets a
line; and after the latency the answer is sent, or what the fault makes of it. The API's work is
synchronous and runs on the event loop; the lock keeps the methods of `StorageServer`, which other
threads call, out of the buckets meanwhile.
"""

import asyncio
import gzip
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from aiohttp import web

from .api import Api, answer_or_error
from .calls import Call, Receiver, Reply, error_reply
from .errors import ApiError
from .faults import Fault, Faults

# Answers up to this size are sent whole, in one write with their headers.
_WHOLE_BYTES = 64 * 1024
_NO_FAULT = Fault()


class Handler:
    """The handler of an `aiohttp.web.Server`.

    That server needs `handler_cancellation`, so that a request ends with its connection, and
    `auto_decompress=False`, since objects are stored as they come. `latency` is in seconds.
    """

    def __init__(
        self, api: Api, faults: Faults, lock: threading.RLock, latency: Callable[[], float]
    ) -> None:
        self._api = api
        self._faults = faults
        self._lock = lock
        self._latency = latency
        self.compresses_json = False

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        call = _call(request)
        fault = self._faults.match(call) or _NO_FAULT
        with self._lock:
            receiver = self._receiver(call, fault)
        is_whole = False
        try:
            is_whole = await self._read_body(request, call, receiver, fault)
        finally:
            if not is_whole:
                with self._lock:
                    receiver.abort()
                self._faults.log(call, None)
        if not is_whole:
            return _drop(request)
        with self._lock:
            reply = answer_or_error(call, receiver.answer)
            if clock := self._api.clock_headers():
                reply = replace(reply, headers={**reply.headers, **clock})
        if self.compresses_json and "gzip" in call.headers.get("accept-encoding", ""):
            reply = _compressed(reply)
        self._faults.log(call, None if fault.is_silent else reply.status)
        seconds = self._latency() + fault.latency
        if seconds > 0:
            await asyncio.sleep(seconds)
        if fault is _NO_FAULT:
            return await _send(request, reply)
        return await _send_spoilt(request, reply, fault)

    def _receiver(self, call: Call, fault: Fault) -> Receiver:
        """Where the request's body goes."""
        if fault.injects_status:
            return Receiver(lambda: _injected(fault))
        if fault.action == "drop_before" and fault.after_bytes is None:
            return Receiver(lambda: Reply(0))
        return self._api.receive(call, self._answer_batched)

    async def _read_body(
        self, request: web.BaseRequest, call: Call, receiver: Receiver, fault: Fault
    ) -> bool:
        """Hand the body on as it arrives; False when the fault drops the connection here."""
        drop_at = fault.after_bytes if fault.action == "drop_before" else None
        if call.headers.get("expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while data := await request.content.readany():
            if drop_at is not None:
                data = data[: drop_at - call.body_bytes]
            call.body_bytes += len(data)
            with self._lock:
                receiver.write(data)
            if call.body_bytes == drop_at:
                return False
        return True

    def _answer_batched(self, call: Call) -> Reply:
        """Answer one call of a batch, where only a fault's status makes sense."""
        fault = self._faults.match(call) or _NO_FAULT
        reply = (
            _injected(fault)
            if fault.injects_status
            else answer_or_error(call, lambda: self._api.answer(call))
        )
        self._faults.log(call, reply.status)
        return reply


def _call(request: web.BaseRequest) -> Call:
    headers = {name.lower(): value for name, value in request.headers.items()}
    if len(headers) < len(request.headers):  # some came more than once
        headers = {name: ", ".join(request.headers.getall(name)) for name in headers}
    return Call(request.method, request.raw_path, headers)


def _injected(fault: Fault) -> Reply:
    status = fault.status or 500
    return error_reply(ApiError(status, "backendError", f"Injected status {status}"))


def _compressed(reply: Reply) -> Reply:
    """The same answer in gzip, if it is JSON."""
    if not reply.headers.get("Content-Type", "").startswith("application/json") or reply.stream:
        return reply
    headers = {**reply.headers, "Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
    return Reply(reply.status, headers, gzip.compress(reply.body))


async def _send(
    request: web.BaseRequest, reply: Reply, up_to: int | None = None
) -> web.StreamResponse:
    """Send an answer, or its headers and the first `up_to` bytes of its body."""
    if up_to is None and reply.length <= _WHOLE_BYTES:
        return web.Response(
            status=reply.status,
            headers=reply.headers,
            body=b"".join(reply.pieces),
        )
    response = web.StreamResponse(status=reply.status, headers=reply.headers)
    response.content_length = reply.length
    try:
        await response.prepare(request)
        if request.method != "HEAD":
            left = reply.length if up_to is None else up_to
            for piece in reply.pieces:
                await response.write(piece[:left])
                left -= len(piece)
                if left <= 0:
                    break
    except ConnectionError:
        pass  # the client has gone
    return response


async def _send_spoilt(request: web.BaseRequest, reply: Reply, fault: Fault) -> web.StreamResponse:
    """Send what the fault makes of a good answer."""
    at = reply.length // 2 if fault.after_bytes is None else fault.after_bytes
    headers = {**reply.headers, **fault.headers}
    if fault.is_silent:
        if fault.action == "stall":
            await asyncio.Event().wait()  # until the client gives up or the server stops
        return _drop(request)
    if fault.action == "bad_hash" and "X-Goog-Hash" in headers:
        # Hashes of no object that a test would store.
        headers["X-Goog-Hash"] = "crc32c=/////w==,md5=/////////////////////w=="
    reply = replace(reply, headers=headers)
    if fault.action == "corrupt" and reply.status in (200, 206):
        reply = replace(reply, stream=_flip_bit(reply.pieces, at))
    if fault.action == "garbage" and request.transport is not None:
        request.transport.write(b"this is not HTTP\r\n\r\n")
        request.transport.close()
        return web.Response()
    if fault.action not in ("truncate", "stall") or at >= reply.length:
        return await _send(request, reply)
    response = await _send(request, reply, up_to=at)
    if fault.action == "stall":
        await asyncio.Event().wait()
    if request.transport is not None:
        request.transport.close()
    return response


def _drop(request: web.BaseRequest) -> web.Response:
    """Close the connection at once; nothing can be sent any more, so the result is not."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _flip_bit(pieces: Iterable[bytes], at: int) -> Iterator[bytes]:
    for piece in pieces:
        if 0 <= at < len(piece):
            yield piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
        else:
            yield piece
        at -= len(piece)
