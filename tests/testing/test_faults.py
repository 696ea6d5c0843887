"""The server misbehaves exactly as it is told."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any

import pytest

from keras_remote_airflow.testing import Fault, StorageServer


@pytest.fixture
def impatient(call: Any, new_caller: Any) -> Iterator[Any]:
    """A second client that gives up quickly: the server is going to stall."""
    caller = new_caller(call.server)
    caller.connection.timeout = 0.2
    yield caller
    caller.connection.close()


def test_the_nth_matching_request_fails_and_only_that_one(call: Any) -> None:
    call.server.add_fault(Fault(method="POST", path=r"name=b", nth=2, status=503))
    statuses = [call.media(name, b"").status for name in ("b1", "a", "b2", "b3")]
    assert statuses == [200, 200, 503, 200]
    assert set(call.server.objects("demo")) == {"b1", "a", "b3"}


def test_a_fault_may_hit_several_times_or_always(call: Any) -> None:
    call.server.add_fault(Fault(path="/o/x", times=2, status=429, headers={"Retry-After": "1"}))
    answers = [call("GET", "/storage/v1/b/demo/o/x") for _ in range(3)]
    assert [a.status for a in answers] == [429, 429, 404]
    assert answers[0].headers["retry-after"] == "1"
    call.server.add_fault(Fault(path="/o/x", times=0, status=500))
    assert {call("GET", "/storage/v1/b/demo/o/x").status for _ in range(5)} == {500}
    call.server.clear_faults()
    assert call("GET", "/storage/v1/b/demo/o/x").status == 404


def test_paths_are_matched_as_people_read_them(call: Any) -> None:
    call.media("a b/ü", b"")
    call.server.add_fault(Fault(path="o/a b/ü$", status=503))
    assert call("GET", "/storage/v1/b/demo/o/a%20b%2F%C3%BC").status == 503


def test_a_drop_before_stores_nothing_and_a_drop_after_stores_all(
    call: Any, new_caller: Any
) -> None:
    call.server.add_fault(Fault(path="name=before", action="drop_before"))
    call.server.add_fault(Fault(path="name=after", action="drop_after"))
    for name in ("before", "after"):
        with pytest.raises(OSError):
            new_caller(call.server).media(name, b"data")
    assert set(call.server.objects("demo")) == {"after"}
    lost = [r for r in call.server.requests if r.status is None]
    assert [r.object_name for r in lost] == [None, "after"]


def test_a_stalled_request_is_never_answered(call: Any, impatient: Any) -> None:
    call.server.add_fault(Fault(action="stall", path="name=x"))
    with pytest.raises(TimeoutError):
        impatient.media("x", b"data")
    assert call.media("y", b"data").status == 200


def test_a_download_may_stall_in_the_middle(call: Any, impatient: Any) -> None:
    call.media("x", b"0123456789")
    call.server.add_fault(Fault(action="stall", path="alt=media", after_bytes=4))
    impatient.connection.request("GET", "/storage/v1/b/demo/o/x?alt=media")
    response = impatient.connection.getresponse()
    assert response.getheader("content-length") == "10"
    assert response.read(4) == b"0123"
    with pytest.raises(TimeoutError):
        response.read(1)


def test_a_truncated_download_ends_early(call: Any, new_caller: Any) -> None:
    call.media("x", bytes(3_000_000))
    call.server.add_fault(Fault(action="truncate", path="alt=media", after_bytes=2_000_000))
    caller = new_caller(call.server)
    caller.connection.request("GET", "/storage/v1/b/demo/o/x?alt=media")
    response = caller.connection.getresponse()
    received = 0
    with pytest.raises(Exception, match=r"IncompleteRead|reset"):  # noqa: PT012
        while piece := response.read1():
            received += len(piece)
        raise ConnectionError("reset")
    assert received == 2_000_000
    assert call.download("x").body == bytes(3_000_000)


def test_a_corrupted_download_differs_in_one_bit(call: Any) -> None:
    call.media("x", b"0123456789")
    good = call.download("x")
    call.server.add_fault(Fault(action="corrupt"))
    assert call("GET", "/storage/v1/b/demo/o/x").status == 200  # no download: does not count
    bad = call.download("x")
    differing = [a ^ b for a, b in zip(good.body, bad.body, strict=True) if a != b]
    assert differing == [1]
    assert bad.headers["x-goog-hash"] == good.headers["x-goog-hash"]
    assert call.download("x").body == good.body


def test_a_wrong_hash_comes_with_the_right_bytes(call: Any) -> None:
    call.media("x", b"data")
    good = call.download("x")
    call.server.add_fault(Fault(action="bad_hash"))
    bad = call.download("x")
    assert bad.body == good.body
    assert bad.headers["x-goog-hash"] != good.headers["x-goog-hash"]


def test_without_permission_to_overwrite_a_name_can_be_written_once(call: Any) -> None:
    call.server.deny("overwrite")
    assert call.media("x", b"1").status == 200
    second = call.media("x", b"2")
    assert (second.status, second.reason) == (403, "forbidden")
    assert call.media("x", b"2", "&ifGenerationMatch=0").status == 412
    call.media("y", b"")
    for verb in ("copyTo", "rewriteTo"):
        assert call("POST", f"/storage/v1/b/demo/o/y/{verb}/b/demo/o/x", {}).status == 403
    compose = {"sourceObjects": [{"name": "y"}]}
    assert call("POST", "/storage/v1/b/demo/o/x/compose", compose).status == 403
    assert call.resumable({"name": "x"}).status == 403
    assert call.download("x").body == b"1"
    call.server.allow_all()
    assert call.media("x", b"2").status == 200


def test_denied_permissions_are_403_each_on_its_own(call: Any) -> None:
    call.media("x", b"1")
    requests = {
        "delete": ("DELETE", "/storage/v1/b/demo/o/x"),
        "bucket_get": ("GET", "/storage/v1/b/demo"),
        "list": ("GET", "/storage/v1/b/demo/o"),
        "get": ("GET", "/storage/v1/b/demo/o/x?alt=media"),
        "create": ("POST", "/upload/storage/v1/b/demo/o?uploadType=media&name=y"),
    }
    for denied in requests:
        call.server.allow_all()
        call.server.deny(denied)
        for name, (method, path) in requests.items():
            if name != "delete" or denied == "delete":
                assert (call(method, path).status == 403) == (name == denied), (name, denied)
    with pytest.raises(ValueError, match="choose from"):
        call.server.deny("everything")


def test_the_log_tells_what_was_asked(call: Any) -> None:
    call.server.clear_requests()
    call.multipart({"name": "a b/ü"}, b"data", "&ifGenerationMatch=0")
    call("GET", "/storage/v1/b/demo/o/a%20b%2F%C3%BC")
    call("GET", "/storage/v1/b/demo/o?prefix=a%20b")
    insert, get, listing = call.server.requests
    assert (insert.method, insert.path) == ("POST", "/upload/storage/v1/b/demo/o")
    assert insert.query == {"uploadType": "multipart", "ifGenerationMatch": "0"}
    assert (insert.object_name, insert.status) == ("a b/ü", 200)
    assert insert.body_bytes > 4
    assert (get.object_name, get.path) == ("a b/ü", "/storage/v1/b/demo/o/a b/ü")
    assert (listing.object_name, listing.query) == (None, {"prefix": "a b"})


def test_faults_and_the_back_door_may_be_used_while_clients_write(
    call: Any, new_caller: Any
) -> None:
    server = call.server

    def write(worker: int) -> None:
        caller = new_caller(server)
        for i in range(100):
            caller.media(f"{worker}/{i}", b"x")

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for i in range(100):
        server.add_fault(Fault(path=f"never{i}", status=500))
        server.put("demo", f"back/{i}", b"")
        server.objects("demo")
        server.delete("demo", f"back/{i}")
    for thread in threads:
        thread.join()
    assert len(server.objects("demo")) == 400


def test_latency_delays_every_answer_without_blocking_the_others(new_caller: Any) -> None:
    # Ten requests in parallel, each delayed: they are all on their way at the same time.
    with StorageServer(buckets=["demo"], latency=0.05) as server:
        callers = [new_caller(server) for _ in range(10)]
        for caller in callers:
            caller.connection.request("GET", "/storage/v1/b/demo")
        while len(server.requests) < 10:
            threading.Event().wait(0.001)
        assert {caller.connection.getresponse().status for caller in callers} == {200}


def test_stopping_the_server_ends_stalled_connections(new_caller: Any) -> None:
    server = StorageServer(buckets=["demo"]).start()
    server.add_fault(Fault(action="stall"))
    with socket.create_connection((server.host, server.port)) as raw:
        raw.sendall(b"GET /storage/v1/b HTTP/1.1\r\nHost: x\r\n\r\n")
        while not server.requests:
            threading.Event().wait(0.001)
        server.stop()
        # An abortive close shows as a reset or as the end of the stream.
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(1) == b""
    server.stop()


def test_stopping_the_server_ends_connections_that_were_just_made() -> None:
    server = StorageServer(buckets=["demo"]).start()
    loop, stopping = server._loop, server._stopping
    assert loop is not None
    assert stopping is not None
    visitors: list[socket.socket] = []

    def visit() -> None:
        # In the loop's thread, so that it accepts them in the very round in which it is stopped.
        where = (server.host, server.port)
        visitors.extend(socket.create_connection(where, timeout=10) for _ in range(10))
        loop.call_soon(stopping.set)

    loop.call_soon_threadsafe(visit)
    while not loop.is_closed():
        threading.Event().wait(0.001)
    server.stop()
    for raw in visitors:
        with raw, contextlib.suppress(ConnectionResetError):
            assert raw.recv(1) == b""  # a connection forgotten would time out


def test_a_fault_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="nth counts from 1"):
        Fault(nth=0)
    with pytest.raises(Exception, match="unterminated"):
        Fault(path="[")
    with pytest.raises(ValueError, match="control characters"):
        Fault(headers={"Bad\nHeader": "x"})


def test_garbage_is_not_http(call: Any, new_caller: Any) -> None:
    call.server.add_fault(Fault(path="name=x", action="garbage"))
    with pytest.raises(HTTPException):
        new_caller(call.server).media("x", b"data")
    assert set(call.server.objects("demo")) == {"x"}


def test_connections_are_counted(call: Any, new_caller: Any) -> None:
    call.media("x", b"")
    assert call.server.connections == 1
    other = new_caller(call.server)
    other.media("y", b"")
    assert call.server.connections == 2
    other.connection.close()
    while call.server.connections > 1:
        threading.Event().wait(0.001)
