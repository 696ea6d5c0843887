"""Connections that stop taking bytes, or take them slowly, which no status code can tell."""

import logging
import socket
import threading
import traceback
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest
from faultkit import BIG, Tap, client_for, content, do_upload, make_tree, published

from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.cloud.transport import Transport
from keras_remote_airflow.core.errors import StoreError
from keras_remote_airflow.testing import Fault, StorageServer

pytestmark = pytest.mark.slow  # waits for connections that stall


@pytest.mark.parametrize("size", [1 << 20, 6 << 20, 24 << 20], ids=["whole", "streamed", "session"])
def test_a_server_that_stops_reading_is_given_up_and_tried_again(
    server: StorageServer, tmp_path: Path, size: int
) -> None:
    path = make_tree(tmp_path / "data", {"file": content(size)})
    with Tap(server.url, stop_after=size // 8) as tap:
        result = do_upload(tap.url, path)
        assert tap.stopped == 1
    assert published(server) == {result.content_hash: {"file"}}


@pytest.mark.parametrize("how", ["drop", "garbage"])
def test_the_url_of_an_upload_session_is_told_to_nobody(
    server: StorageServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    caplog.set_level(logging.DEBUG)
    path = make_tree(tmp_path / "data", {"file": content(BIG)})
    if how == "drop":
        server.add_fault(Fault(path="upload_id=", action="drop_before", after_bytes=1000, times=0))
    else:
        server.add_fault(Fault(path="upload_id=", action="garbage", times=0))
    with pytest.raises(StoreError) as raised:
        do_upload(server.url, path, RetryPolicy(deadline=0.2, initial=0.01, maximum=0.02))
    told = "".join(traceback.format_exception(raised.value)) + caplog.text
    assert "upload_id" not in told
    assert any("upload_id" in r.query for r in server.requests)


def test_a_slow_upload_is_no_stalled_one(server: StorageServer, tmp_path: Path) -> None:
    path = make_tree(tmp_path / "data", {"file": content(24 << 20)})
    once = RetryPolicy(deadline=0, initial=0.01, maximum=0.1, stall_timeout=1.5)
    # 384 pieces of 64 KiB, 8 ms after each: twice the stall timeout in all. (A send buffer of the
    # kernel's takes up to 4 MB of them at once.)
    with Tap(server.url, pause=0.008) as tap:
        result = do_upload(tap.url, path, once)
    assert published(server) == {result.content_hash: {"file"}}


def test_a_body_is_never_sent_again_from_its_middle() -> None:
    """Not even when a kept connection breaks, after which aiohttp itself would send a PUT again."""
    requests: list[bytes] = []

    def answer_the_first_and_hang_up_on_others(server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection = server.accept()[0]
                with connection, connection.makefile("rb") as incoming:
                    while head := b"".join(iter(incoming.readline, b"\r\n")):
                        requests.append(head)
                        if len(requests) > 1:
                            incoming.read(len(b"firstsecond"))
                            break
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async def pieces() -> AsyncIterator[bytes]:
        yield b"first"
        yield b"second"

    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        threading.Thread(
            target=answer_the_first_and_hang_up_on_others, args=(server,), daemon=True
        ).start()
        with Transport(client_for(url), RetryPolicy(deadline=0, stall_timeout=5)) as transport:
            transport.run(transport.exchange("GET", "/"))
            with pytest.raises(aiohttp.ClientError):
                transport.run(
                    transport.exchange("PUT", "/", headers={"Content-Length": "11"}, data=pieces())
                )
    assert [head.split()[0] for head in requests] == [b"GET", b"PUT"]
