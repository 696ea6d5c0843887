"""Resumable uploads: offsets, status queries, interruptions."""

from __future__ import annotations

import base64
import gc
import os
import socket
import tracemalloc
from typing import Any

import google_crc32c
import pytest

from keras_remote_airflow.testing import Fault

CHUNK = 256 * 1024


def crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


def begin(call: Any, metadata: dict[str, Any] | None = None, **headers: str) -> str:
    answer = call.resumable({"name": "big", **(metadata or {})}, **headers)
    assert answer.status == 200
    return str(answer.headers["location"])


def put(call: Any, session: str, data: bytes, content_range: str, **headers: str) -> Any:
    sent = {"Content-Range": content_range}
    sent |= {k.replace("_", "-"): v for k, v in headers.items()}
    return call("PUT", session, data, sent)


def test_an_upload_in_one_request_needs_no_range(call: Any) -> None:
    data = os.urandom(CHUNK + 1)
    answer = call("PUT", begin(call, {"metadata": {"k": "v"}}), data)
    assert (answer.json["size"], answer.json["metadata"]) == (str(len(data)), {"k": "v"})
    assert call.download("big").body == data


def test_chunks_add_up_to_the_object(call: Any) -> None:
    data = os.urandom(2 * CHUNK + 5)
    session = begin(call)
    first = put(call, session, data[:CHUNK], f"bytes 0-{CHUNK - 1}/*")
    assert (first.status, first.headers["range"]) == (308, f"bytes=0-{CHUNK - 1}")
    second = put(call, session, data[CHUNK : 2 * CHUNK], f"bytes {CHUNK}-{2 * CHUNK - 1}/*")
    assert second.headers["range"] == f"bytes=0-{2 * CHUNK - 1}"
    assert not call.server.objects("demo")
    last = put(call, session, data[2 * CHUNK :], f"bytes {2 * CHUNK}-{len(data) - 1}/{len(data)}")
    assert last.json["crc32c"] == crc32c(data)
    assert call.download("big").body == data


def test_an_empty_object_is_finished_with_a_bare_total(call: Any) -> None:
    assert put(call, begin(call), b"", "bytes */0").json["size"] == "0"


def test_a_status_query_tells_what_is_persisted(call: Any) -> None:
    session = begin(call)
    before = put(call, session, b"", "bytes */*")
    assert before.status == 308
    assert "range" not in before.headers
    put(call, session, bytes(CHUNK), f"bytes 0-{CHUNK - 1}/{CHUNK + 1}")
    middle = put(call, session, b"", f"bytes */{CHUNK + 1}")
    assert (middle.status, middle.headers["range"]) == (308, f"bytes=0-{CHUNK - 1}")
    put(call, session, b"x", f"bytes {CHUNK}-{CHUNK}/{CHUNK + 1}")
    after = put(call, session, b"", "bytes */*")
    assert (after.status, after.json["size"]) == (200, str(CHUNK + 1))


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK + 1])
def test_a_chunk_that_is_no_multiple_of_256_kib_is_400_unless_last(call: Any, size: int) -> None:
    session = begin(call)
    assert put(call, session, bytes(size), f"bytes 0-{size - 1}/*").status == 400
    assert "range" not in put(call, session, b"", "bytes */*").headers


@pytest.mark.parametrize(
    "content_range", ["bytes 0-9/5", "bytes 5-2/10", "bytes 0-9", "0-9/10", "bytes x-y/z", ""]
)
def test_a_malformed_range_is_400(call: Any, content_range: str) -> None:
    assert put(call, begin(call), bytes(10), content_range).status == 400
    assert not call.server.objects("demo")


@pytest.mark.parametrize("sent", [5, 15])
def test_a_body_that_is_not_what_the_range_says_is_400(call: Any, sent: int) -> None:
    session = begin(call)
    assert put(call, session, bytes(sent), "bytes 0-9/10").status == 400
    assert not call.server.objects("demo")
    assert put(call, session, b"0123456789", "bytes 0-9/10").status == 200


def test_an_offset_beyond_what_is_persisted_is_refused(call: Any) -> None:
    session = begin(call)
    put(call, session, bytes(CHUNK), f"bytes 0-{CHUNK - 1}/*")
    gap = put(call, session, bytes(10), f"bytes {2 * CHUNK}-{2 * CHUNK + 9}/{2 * CHUNK + 10}")
    assert gap.status == 503
    assert b"exceeds already uploaded size" in gap.body
    assert not call.server.objects("demo")


def test_bytes_that_are_already_persisted_are_skipped(call: Any) -> None:
    data = os.urandom(2 * CHUNK)
    session = begin(call)
    put(call, session, data[:CHUNK], f"bytes 0-{CHUNK - 1}/*")
    assert put(call, session, data, f"bytes 0-{2 * CHUNK - 1}/{2 * CHUNK}").status == 200
    assert call.download("big").body == data


def test_a_total_other_than_the_declared_one_is_400(call: Any) -> None:
    session = begin(call, x_upload_content_length="11")
    assert put(call, session, bytes(10), "bytes 0-9/10").status == 400
    assert not call.server.objects("demo")


@pytest.mark.parametrize("where", ["metadata", "header"])
def test_a_wrong_hash_is_400_and_nothing_is_stored(call: Any, where: str) -> None:
    wrong = crc32c(b"other")
    if where == "metadata":
        answer = call("PUT", begin(call, {"crc32c": wrong}), b"data")
    else:
        answer = call("PUT", begin(call), b"data", {"X-Goog-Hash": f"crc32c={wrong}"})
    assert answer.status == 400
    assert not call.server.objects("demo")


def test_the_right_hash_on_the_final_chunk_is_accepted(call: Any) -> None:
    data = os.urandom(CHUNK + 1)
    session = begin(call, {"crc32c": crc32c(data)})
    put(call, session, data[:CHUNK], f"bytes 0-{CHUNK - 1}/*")
    last = put(
        call,
        session,
        data[CHUNK:],
        f"bytes {CHUNK}-{CHUNK}/{CHUNK + 1}",
        x_goog_hash=f"crc32c={crc32c(data)}",
    )
    assert last.status == 200


def test_preconditions_hold_at_the_beginning_and_at_the_end(call: Any) -> None:
    session = call.resumable({"name": "big"}, "&ifGenerationMatch=0").headers["location"]
    call.media("big", b"another upload was faster")
    assert call("PUT", session, b"late").status == 412
    assert call.resumable({"name": "big"}, "&ifGenerationMatch=0").status == 412
    assert call.download("big").body == b"another upload was faster"


def test_dialects_of_clients_are_understood(call: Any) -> None:
    session = begin(call)
    # Clients in Go ask for 200 instead of 308.
    status = put(call, session, bytes(CHUNK), f"bytes 0-{CHUNK - 1}/*", x_guploader_no_308="yes")
    assert (status.status, status.headers["x-http-status-code-override"]) == (200, "308")
    assert status.headers["range"] == f"bytes=0-{CHUNK - 1}"
    # Node sends the rest of an object without saying how much it is.
    assert put(call, session, b"rest", f"bytes {CHUNK}-*/*").json["size"] == str(CHUNK + 4)
    assert put(call, begin(call), b"all", "bytes 0-*/*").json["size"] == "3"
    assert put(call, begin(call), b"all", "bytes 0-*/3").json["size"] == "3"


def test_a_cancelled_session_is_gone(call: Any) -> None:
    session = begin(call)
    assert call("DELETE", session).status == 499
    assert call("PUT", session, b"x").status == 404


@pytest.mark.parametrize("sent", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17])
def test_an_interrupted_request_keeps_whole_256_kib(call: Any, new_caller: Any, sent: int) -> None:
    data = os.urandom(4 * CHUNK)
    session = begin(call)
    call.server.add_fault(Fault(method="PUT", action="drop_before", after_bytes=sent))
    with pytest.raises(OSError):
        put(call, session, data, f"bytes 0-{len(data) - 1}/{len(data)}")
    again = new_caller(call.server)
    kept = sent // CHUNK * CHUNK
    status = put(again, session, b"", f"bytes */{len(data)}")
    assert status.headers.get("range") == (f"bytes=0-{kept - 1}" if kept else None)
    rest = f"bytes {kept}-{len(data) - 1}/{len(data)}"
    assert put(again, session, data[kept:], rest).json["crc32c"] == crc32c(data)
    assert again.download("big").body == data


def test_a_client_that_vanishes_in_the_middle_can_resume(call: Any) -> None:
    data = os.urandom(3 * CHUNK)
    session = begin(call)
    path = session.removeprefix(call.server.url)
    with socket.create_connection((call.server.host, call.server.port)) as raw:
        raw.sendall(
            f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            + data[: 2 * CHUNK + 100]
        )
        raw.shutdown(socket.SHUT_WR)
        assert raw.recv(1) == b""  # the server has seen the end and closed
    status = put(call, session, b"", f"bytes */{len(data)}")
    assert status.headers["range"] == f"bytes=0-{2 * CHUNK - 1}"
    rest = f"bytes {2 * CHUNK}-{len(data) - 1}/{len(data)}"
    assert put(call, session, data[2 * CHUNK :], rest).status == 200
    assert call.download("big").body == data


def test_a_lost_answer_to_the_last_chunk_shows_as_finished(call: Any, new_caller: Any) -> None:
    session = begin(call)
    call.server.add_fault(Fault(method="PUT", action="drop_after"))
    with pytest.raises(OSError):
        put(call, session, b"data", "bytes 0-3/4")
    assert put(new_caller(call.server), session, b"", "bytes */4").json["size"] == "4"


def test_a_large_chunked_body_arrives_whole(call: Any) -> None:
    pieces = [os.urandom(100_000) for _ in range(30)]
    path = "/upload/storage/v1/b/demo/o?uploadType=media&name=big"
    call.connection.request("POST", path, iter(pieces), encode_chunked=True, headers={
        "Transfer-Encoding": "chunked"
    })  # fmt: skip
    assert call.connection.getresponse().read()
    assert call.server.objects("demo")["big"].data == b"".join(pieces)


def test_bytes_of_a_deleted_object_are_kept_nowhere(call: Any) -> None:
    tracemalloc.start()
    try:
        session = begin(call)
        size = int(put(call, session, bytes(16 << 20), "bytes 0-16777215/16777216").json["size"])
        assert put(call, session, b"", "bytes */16777216").json["size"] == str(size)
        call.server.delete("demo", "big")
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < size // 2
    finally:
        tracemalloc.stop()
    assert put(call, session, b"", "bytes */16777216").json["size"] == str(size)
