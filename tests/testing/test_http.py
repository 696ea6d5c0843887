"""HTTP/1.1 as it arrives: in pieces, in a row, or broken."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from keras_remote_airflow.testing import StorageServer

GET = b"GET /storage/v1/b/demo?fields=name HTTP/1.1\r\nHost: x\r\n\r\n"
UPLOAD = b"POST /upload/storage/v1/b/demo/o?uploadType=media&name=x&fields=size HTTP/1.1\r\nHost: x"


def read_to_end(raw: socket.socket, end: bytes | None = None) -> bytes:
    """Read until the connection ends, or until `end` is there."""
    received = b""
    while (end is None or not received.endswith(end)) and (piece := raw.recv(65536)):
        received += piece
    return received


def test_a_connection_is_kept_for_many_requests(call: Any) -> None:
    call.media("x", b"data")
    before = call.connection.sock
    assert {call.download("x").status for _ in range(50)} == {200}
    assert call.connection.sock is before


def test_requests_in_a_row_are_answered_in_order(server: StorageServer) -> None:
    with socket.create_connection((server.host, server.port), timeout=60) as raw:
        raw.sendall(GET * 2000)
        received = b""
        while received.count(b'{"name": "demo"}') < 2000:
            piece = raw.recv(65536)
            assert piece
            received += piece
    assert received.count(b"HTTP/1.1 200") == 2000


def test_a_request_may_arrive_byte_by_byte(server: StorageServer) -> None:
    with socket.create_connection((server.host, server.port), timeout=60) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in UPLOAD + b"\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n":
            raw.sendall(bytes([byte]))
        raw.sendall(b"0\r\nTrailer: x\r\n\r\n")
        assert read_to_end(raw, b'{"size": "5"}').startswith(b"HTTP/1.1 200 ")
    assert server.objects("demo")["x"].data == b"abcde"


def test_a_client_may_wait_for_100_continue(server: StorageServer) -> None:
    with socket.create_connection((server.host, server.port), timeout=60) as raw:
        raw.sendall(UPLOAD + b"\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert raw.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.sendall(b"data")
        assert read_to_end(raw, b'{"size": "4"}').startswith(b"HTTP/1.1 200 ")


def test_connection_close_is_honoured(server: StorageServer) -> None:
    with socket.create_connection((server.host, server.port), timeout=60) as raw:
        raw.sendall(GET.replace(b"Host: x", b"Host: x\r\nConnection: close"))
        received = read_to_end(raw)
    assert b"Connection: close" in received
    assert received.endswith(b'{"name": "demo"}')


def test_head_sends_headers_only(call: Any) -> None:
    call.media("x", b"data")
    answer = call("HEAD", "/storage/v1/b/demo/o/x?alt=media")
    assert (answer.headers["content-length"], answer.body) == ("4", b"")
    assert call.download("x").body == b"data"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET nowhere HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nBad Name : x\r\n\r\n",
        UPLOAD + b"\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\ndata",
        UPLOAD + b"\r\nContent-Length: -1\r\n\r\n",
        UPLOAD + b"\r\nContent-Length: +4\r\n\r\ndata",
        UPLOAD + b"\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\ndata",
        UPLOAD + b"\r\nTransfer-Encoding: gzip\r\n\r\n",
        UPLOAD + b"\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        UPLOAD + b"\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        UPLOAD + b"\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcde\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 200_000,
    ],
    ids=lambda data: repr(data[-30:]),
)
def test_what_cannot_be_read_is_400_and_the_connection_ends(
    server: StorageServer, request_bytes: bytes
) -> None:
    with socket.create_connection((server.host, server.port), timeout=60) as raw:
        try:
            raw.sendall(request_bytes)
            received = read_to_end(raw)
        except ConnectionError:
            received = b" 400 "  # it closed while we were still sending
    assert b" 400 " in received.partition(b"\r\n")[0]
    assert not server.objects("demo")


def test_a_body_cut_short_stores_nothing(server: StorageServer) -> None:
    for size in (10, 5_000_000):
        head = UPLOAD + b"\r\nContent-Length: %d\r\n\r\n" % size
        with socket.create_connection((server.host, server.port), timeout=60) as raw:
            raw.sendall(head + bytes(size - 1))
            raw.shutdown(socket.SHUT_WR)
            assert read_to_end(raw) == b""
    while len(server.requests) < 2:
        threading.Event().wait(0.001)
    assert not server.objects("demo")
    assert [r.status for r in server.requests] == [None, None]


def test_only_the_local_address_is_bound(server: StorageServer) -> None:
    assert server.url.startswith("http://127.0.0.1:")
