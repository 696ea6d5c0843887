"""HTTP/1.1 for a local server: one strict, keep-alive connection over an asyncio transport.

The parser reads what Cloud Storage's clients send (RFC 9112): a request line, headers, and a
body with `Content-Length` or chunked encoding. Anything ambiguous is answered with 400 and the
connection is closed. Requests on one connection are answered in order, one at a time.

A raw asyncio protocol is used because a web framework spends more time per request than the
whole of our own work: the server must not be the bottleneck of a benchmark.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import unquote, unquote_plus

MAX_HEAD_BYTES = 64 * 1024
# Bodies up to this size are handed over whole; larger ones go to a sink as they arrive.
STREAM_ABOVE_BYTES = 1024 * 1024
WRITE_BYTES = 1024 * 1024
# What is read at once; a connection that has seen a large body reads more.
RECEIVE_BYTES = 64 * 1024
LARGE_RECEIVE_BYTES = 1024 * 1024

_REASONS = {status.value: status.phrase for status in HTTPStatus}
_REASONS[499] = "Client Closed Request"
_REASONS[308] = "Resume Incomplete"


class BadRequestError(Exception):
    """The bytes on the wire are not a request this server can read."""


class Sink(Protocol):
    """Where a large request body goes as it arrives."""

    def write(self, data: bytes) -> None: ...

    def abort(self) -> None:
        """The rest will not come."""


@dataclass(slots=True)
class HttpRequest:
    """A parsed request; header names are in lower case.

    `path` is still percent-encoded: an object name may contain `%2F`, so it must be split at
    its slashes before it is decoded. `body` is empty when the body went to `sink`.
    """

    method: str
    path: str
    query_string: str
    headers: dict[str, str]
    body: bytes = b""
    body_bytes: int = 0
    sink: Sink | None = None
    object_name: str | None = None
    query: dict[str, str] = field(default_factory=dict)
    # For the application: what it decided when only the head was there.
    fault: Any = None
    refused: Any = None

    @property
    def decoded_target(self) -> str:
        """Path and query as a person reads them, for matching and for logs."""
        if not self.query_string:
            return unquote(self.path)
        return f"{unquote(self.path)}?{unquote_plus(self.query_string)}"


@dataclass(slots=True)
class Response:
    """What to answer, and how to misbehave while doing so.

    `delay` is in seconds. `cut_at` stops the body after that many bytes; then the connection is
    closed, or, with `stall`, left open and silent.
    """

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    stream: Iterable[bytes] | None = None
    content_length: int = 0
    delay: float = 0.0
    cut_at: int | None = None
    stall: bool = False
    drop: bool = False


class Application(Protocol):
    """What a connection asks of the server. All three are called on the event loop."""

    def begin(self, request: HttpRequest) -> int | None:
        """The head is read. May set `request.sink`; returns after how many body bytes to drop."""

    def respond(self, request: HttpRequest) -> Response:
        """The body is read, too."""

    def aborted(self, request: HttpRequest) -> None:
        """The connection ended in the middle of the body."""


def reason(status: int) -> str:
    return _REASONS.get(status, "Unknown")


def parse_query(query_string: str) -> dict[str, str]:
    """The query as a dict; of a repeated name the last value is kept."""
    query: dict[str, str] = {}
    if query_string:
        for pair in query_string.split("&"):
            name, _, value = pair.partition("=")
            if name:
                query[unquote_plus(name)] = unquote_plus(value)
    return query


def parse_head(head: bytes) -> HttpRequest:
    """Parse request line and headers (without the empty line).

    Raises:
        BadRequestError: the head is malformed.
    """
    lines = head.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or parts[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise BadRequestError(f"malformed request line {lines[0]!r}")
    method, target, version = parts
    if target.startswith(("http://", "https://")):
        target = "/" + target.split("/", 3)[3] if target.count("/") >= 3 else "/"
    if not target.startswith("/"):
        raise BadRequestError(f"malformed request target {target!r}")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise BadRequestError(f"malformed header line {line!r}")
        name = name.lower()
        value = value.strip(" \t")
        if name in headers:
            if name in ("content-length", "transfer-encoding", "host"):
                raise BadRequestError(f"header {name} given twice")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    if version == "HTTP/1.0":
        headers.setdefault("connection", "close")
    path, _, query_string = target.partition("?")
    return HttpRequest(method, path, query_string, headers, query=parse_query(query_string))


def body_length(headers: dict[str, str]) -> int | None:
    """The declared length of the body in bytes, or None when it is chunked."""
    encoding = headers.get("transfer-encoding")
    length = headers.get("content-length")
    if encoding is not None:
        if length is not None:
            raise BadRequestError("both Content-Length and Transfer-Encoding")
        if encoding.lower() != "chunked":
            raise BadRequestError(f"unsupported Transfer-Encoding {encoding!r}")
        return None
    if length is None:
        return 0
    if not (length.isascii() and length.isdigit()):
        raise BadRequestError(f"malformed Content-Length {length!r}")
    return int(length)


def _chunk_size(line: bytes) -> int:
    digits = line.split(b";", 1)[0].strip()
    if not digits or digits.strip(b"0123456789abcdefABCDEF"):
        raise BadRequestError(f"malformed chunk size {line!r}")
    return int(digits, 16)


class Connection(asyncio.BufferedProtocol):
    """One client connection."""

    def __init__(self, app: Application, connections: set[Connection]) -> None:
        self._app = app
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._request: HttpRequest | None = None
        self._chunks: list[bytes] = []
        self._remaining = 0  # of the body, or of the current chunk
        self._chunked = False
        self._in_chunk = False
        self._in_trailer = False
        self._drop_after: int | None = None
        self._answering = False
        self._output: Iterator[bytes] | None = None
        self._cut_short = False
        self._stall_at_end = False
        self._closing_after = False
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._parsing = False
        self._receive = memoryview(bytearray(RECEIVE_BYTES))

    # asyncio calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"not a stream transport: {transport!r}")
        self._transport = transport
        self._connections.add(self)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._transport = None
        self._output = None
        request, self._request = self._request, None
        if request is not None and not self._answering:
            self._app.aborted(request)

    def eof_received(self) -> bool:
        # A half-closed client still gets the answer to a request it sent in full.
        return self._answering

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._pump()

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._receive

    def buffer_updated(self, nbytes: int) -> None:
        self._data_received(bytes(self._receive[:nbytes]))

    def _data_received(self, data: bytes) -> None:
        if self._request is not None and not self._answering and not self._chunked:
            # The middle of a body: no copy through the buffer.
            if len(data) <= self._remaining:
                self._take(data)
                self._remaining -= len(data)
                if self._remaining == 0:
                    self._complete()
                return
            self._take(data[: self._remaining])
            data = data[self._remaining :]
            self._remaining = 0
            self._buffer += data
            self._complete()
            return
        self._buffer += data
        if self._answering:
            if len(self._buffer) > MAX_HEAD_BYTES and self._transport is not None:
                self._transport.pause_reading()
            return
        self._parse()

    def abort(self) -> None:
        """Close at once, without sending what is still buffered."""
        if self._transport is not None:
            self._transport.abort()

    # Reading.

    def _parse(self) -> None:
        if self._parsing:
            return  # an answer was written from inside the loop below, which goes on by itself
        self._parsing = True
        try:
            while self._transport is not None and not self._answering:
                if self._request is None:
                    if not self._parse_head():
                        return
                elif not self._parse_chunked():
                    return
        except BadRequestError as exc:
            self._reject(exc)
        finally:
            self._parsing = False

    def _parse_head(self) -> bool:
        buffer = self._buffer
        while buffer[:2] == b"\r\n":  # RFC 9112, 2.2: ignore empty lines before a request
            del buffer[:2]
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(buffer) > MAX_HEAD_BYTES:
                raise BadRequestError("request head too large")
            return False
        request = parse_head(bytes(buffer[:end]))
        length = body_length(request.headers)
        del buffer[: end + 4]
        self._begin(request, length)
        if self._chunked:
            return True
        taken = min(len(buffer), self._remaining)
        if taken:
            self._remaining -= taken
            data = bytes(buffer) if taken == len(buffer) else bytes(buffer[:taken])
            del buffer[:taken]
            self._take(data)
        if self._remaining == 0:
            self._complete()
            return True
        return False

    def _begin(self, request: HttpRequest, length: int | None) -> None:
        """The head is read: prepare for the body."""
        self._request = request
        self._chunks = []
        self._chunked = length is None
        self._in_chunk = self._in_trailer = False
        self._remaining = length or 0
        if self._remaining > STREAM_ABOVE_BYTES and len(self._receive) < LARGE_RECEIVE_BYTES:
            self._receive = memoryview(bytearray(LARGE_RECEIVE_BYTES))
        self._drop_after = self._app.begin(request)
        if "expect" in request.headers:
            if request.headers["expect"].lower() != "100-continue":
                raise BadRequestError("unsupported Expect header")
            if self._transport is not None:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _parse_chunked(self) -> bool:
        """Read one piece of a chunked body; False when more bytes are needed."""
        buffer = self._buffer
        if self._in_chunk and self._remaining:
            data = bytes(buffer[: self._remaining])
            del buffer[: len(data)]
            self._remaining -= len(data)
            if data:
                self._take(data)
            return bool(data)
        if self._in_chunk:
            if len(buffer) < 2:
                return False
            if buffer[:2] != b"\r\n":
                raise BadRequestError("chunk does not end with CRLF")
            del buffer[:2]
            self._in_chunk = False
            return True
        end = buffer.find(b"\r\n")
        if end < 0:
            if len(buffer) > MAX_HEAD_BYTES:
                raise BadRequestError("chunk line too large")
            return False
        line = bytes(buffer[:end])
        del buffer[: end + 2]
        if not self._in_trailer:
            self._remaining = _chunk_size(line)
            self._in_chunk = self._remaining > 0
            self._in_trailer = self._remaining == 0
        elif not line:
            self._complete()
        return True

    def _take(self, data: bytes) -> None:
        request = self._request
        if request is None:
            return
        if self._drop_after is not None and request.body_bytes + len(data) >= self._drop_after:
            data = data[: self._drop_after - request.body_bytes]
            request.body_bytes += len(data)
            if request.sink is not None:
                request.sink.write(data)
            self.abort()
            # connection_lost comes later; what arrives until then is nobody's.
            self._request = None
            self._app.aborted(request)
            return
        request.body_bytes += len(data)
        if request.sink is not None:
            request.sink.write(data)
        else:
            self._chunks.append(data)

    def _complete(self) -> None:
        request = self._request
        if request is None:
            return
        chunks, self._chunks = self._chunks, []
        request.body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._answering = True
        self._send(request, self._app.respond(request))

    def _reject(self, exc: BadRequestError) -> None:
        request, self._request = self._request, None
        if request is not None:
            self._app.aborted(request)
        if self._transport is not None:
            body = str(exc).encode()
            self._transport.write(
                b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            self._transport.close()

    # Writing.

    def _send(self, request: HttpRequest, response: Response) -> None:
        if self._transport is None:
            return
        if response.delay > 0:
            delay, response.delay = response.delay, 0.0
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(delay, self._send, request, response)
            return
        self._timer = None
        if response.drop:
            self.abort()
            return
        if response.stall and response.cut_at is None:
            return  # silent until the client gives up or the server stops
        no_body = response.status in (204, 304) or request.method == "HEAD"
        length = len(response.body) if response.stream is None else response.content_length
        lines = [f"HTTP/1.1 {response.status} {reason(response.status)}"]
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        if response.status != 204:
            lines.append(f"Content-Length: {length}")
        if request.headers.get("connection", "").lower() == "close":
            self._closing_after = True
            lines.append("Connection: close")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")
        if response.stream is None and response.cut_at is None:
            self._transport.write(head if no_body else head + response.body)
            self._finish()
            return
        pieces: Iterable[bytes] = (response.body,) if response.stream is None else response.stream
        self._transport.write(head)
        self._output = iter(()) if no_body else _cut(pieces, response.cut_at)
        self._cut_short = response.cut_at is not None and response.cut_at < length and not no_body
        self._stall_at_end = response.stall
        self._pump()

    def _pump(self) -> None:
        """Write the streamed body as fast as the client reads it."""
        while self._output is not None and not self._paused and self._transport is not None:
            piece = next(self._output, None)
            if piece is not None:
                self._transport.write(piece)
                continue
            self._output = None
            if not self._cut_short:
                self._finish()
            elif not self._stall_at_end:
                self._transport.close()

    def _finish(self) -> None:
        """The answer is written; go on with the next request."""
        self._request = None
        self._answering = False
        if self._transport is None:
            return
        if self._closing_after:
            self._transport.close()
            return
        self._transport.resume_reading()
        if self._buffer:
            self._parse()


def _cut(pieces: Iterable[bytes], limit: int | None) -> Iterator[bytes]:
    """The pieces in writes of bounded size, ending after `limit` bytes."""
    left = limit
    for piece in pieces:
        for start in range(0, len(piece), WRITE_BYTES):
            part = piece[start : start + WRITE_BYTES]
            if left is not None:
                part = part[:left]
                left -= len(part)
            if part:
                yield part
            if left == 0:
                return
