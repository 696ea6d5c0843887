"""Bounds: memory for a file of any size, and requests in flight while the service is busy."""

from pathlib import Path

import pytest
from faultkit import (
    FAST,
    Job,
    client_for,
    do_materialize,
    do_upload,
    killed_at_exit,
    make_tree,
    peak_memory,
    published,
    small_files,
)

from keras_remote_airflow.core.transport import Limiter, RetryPolicy, Transport
from keras_remote_airflow.testing import Fault, StorageServer

SIZE = 200 << 20
UNHURRIED = RetryPolicy(deadline=60, initial=0.01, maximum=0.1, stall_timeout=60)


def memory_of_a_round_trip(url: str, path: str, dest: str) -> int:
    """Upload a file and read it back; return the bytes of memory it took at the most."""
    before = peak_memory()
    uri = do_upload(url, path, UNHURRIED).gcs_uri
    do_materialize(url, uri, dest, is_dir=False, retry=UNHURRIED)
    return peak_memory() - before


def test_one_large_file_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(SIZE)
    with StorageServer(["test-bucket"], directory=tmp_path / "server") as server:
        job = Job(memory_of_a_round_trip, server.url, str(path), str(tmp_path / "back"))
        with killed_at_exit(job):
            assert job.result() < 64 << 20


@pytest.mark.parametrize("status", [429, 503])
def test_fewer_requests_are_in_flight_while_the_service_asks_for_less(
    server: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    limits: list[float] = []
    throttled, succeeded = Limiter.throttled, Limiter.succeeded

    def record(limiter: Limiter) -> None:
        limits.append(limiter.limit)

    monkeypatch.setattr(Limiter, "throttled", lambda self: (throttled(self), record(self)))
    monkeypatch.setattr(Limiter, "succeeded", lambda self: (succeeded(self), record(self)))
    server.add_fault(Fault(method="POST", nth=40, times=20, status=status))
    result = do_upload(server.url, make_tree(tmp_path / "data", small_files(200)))
    halved = [n for n in range(1, len(limits)) if limits[n] <= limits[n - 1] / 2]
    assert halved
    assert max(limits[halved[-1] :]) > limits[halved[-1]]
    assert len(published(server)[str(result.content_hash)]) == 200


def test_pauses_grow_and_are_drawn_at_random() -> None:
    policy = RetryPolicy()
    assert all(0 <= policy.pause(n) <= min(30, 0.5 * 2 ** (n - 1)) for n in range(1, 50))
    assert len({policy.pause(5) for _ in range(10)}) == 10


def test_a_closed_transport_leaves_no_thread_and_no_loop(server: StorageServer) -> None:
    with Transport(client_for(server.url), FAST) as transport:
        thread, loop = transport._thread, transport._loop
        assert thread.is_alive()
    assert not thread.is_alive()
    assert loop.is_closed()
