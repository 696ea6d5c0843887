"""Bounds: memory for a file of any size, and requests in flight while the service is busy."""

import asyncio
import resource
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from faultkit import (
    BUCKET,
    FAST,
    Job,
    client_for,
    content,
    do_materialize,
    do_upload,
    killed_at_exit,
    make_tree,
    peak_memory,
    read_tree,
    small_files,
)

from keras_remote_airflow.core.cloud.gcs import GcsStore
from keras_remote_airflow.core.cloud.limiter import Limiter
from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.cloud.store import FileToSend
from keras_remote_airflow.core.cloud.transport import Transport
from keras_remote_airflow.core.disk.hashing import take_snapshot
from keras_remote_airflow.testing import Fault, StorageServer

pytestmark = pytest.mark.slow  # moves much data, and measures

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
    server: StorageServer, tmp_path: Path, status: int
) -> None:
    class Recorder(Limiter):
        def increase(self) -> None:
            super().increase()
            limits.append(self.limit)

        def decrease(self) -> None:
            super().decrease()
            limits.append(self.limit)

    limits: list[float] = []
    uploads = uploads_of(make_tree(tmp_path / "data", small_files(200)))
    server.add_fault(Fault(method="POST", nth=40, times=20, status=status))
    with Transport(client_for(server.url), FAST, limiter=Recorder(128, 1 << 20)) as transport:
        GcsStore(BUCKET, transport).upload(uploads, lambda *_: None)
    halved = [n for n in range(1, len(limits)) if limits[n] <= limits[n - 1] / 2]
    assert halved
    assert max(limits[halved[-1] :]) > limits[halved[-1]]
    assert len(server.objects(BUCKET)) == 200


def test_the_limit_doubles_until_it_is_halved_and_then_grows_by_one_a_round() -> None:
    limiter = Limiter(128, 1 << 20)
    first = limiter.limit
    for _ in range(int(first)):
        limiter.increase()
    assert limiter.limit == 2 * first
    limiter.decrease()
    assert limiter.limit == first
    limiter.decrease()  # of the same round
    assert limiter.limit == first
    for _ in range(int(first)):
        limiter.increase()
    assert first < limiter.limit <= first + 1
    for _ in range(10_000):
        limiter.increase()
    assert limiter.limit == 128
    assert Limiter(8, 1 << 20).limit == 8


def round_trip_with_few_descriptors(limit: int, url: str, path: str, dest: str) -> dict[str, bytes]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    return read_tree(do_materialize(url, do_upload(url, path).gcs_uri, dest))


@pytest.mark.parametrize("limit", [48, 160])
def test_few_descriptors_slow_a_round_trip_down_and_do_not_end_it(
    server: StorageServer, tmp_path: Path, limit: int
) -> None:
    files = small_files(400) | {f"big-{i}": content((1 << 20) + i, i) for i in range(16)}
    path = make_tree(tmp_path / "data", files)
    back = str(tmp_path / "back")
    job = Job(round_trip_with_few_descriptors, limit, server.url, path, back)
    with killed_at_exit(job):
        assert job.result() == files


def test_a_snapshot_keeps_little_of_each_file(tmp_path: Path) -> None:
    path = make_tree(tmp_path / "data", small_files(2000))
    take_snapshot(path)  # what is imported and opened the first time is no part of it
    tracemalloc.start()
    snapshot = take_snapshot(path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 120 * len(snapshot)  # an object with a name and a digest takes more than twice


def test_bytes_in_flight_have_a_bound_and_what_is_larger_goes_alone() -> None:
    async def enter_and_leave() -> list[str]:
        limiter = Limiter(128, 100)
        story: list[str] = []

        async def request(name: str, size: int) -> None:
            await limiter.enter(size)
            story.append(name)

        async def let_run() -> None:
            for _ in range(5):
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            for name, size in {"a": 60, "b": 40, "c": 1, "huge": 1000, "d": 1}.items():
                task = group.create_task(request(name, size))
                if name == "c":
                    given_up = task
            await let_run()
            story.append("full")
            given_up.cancel()  # who no longer waits takes no place
            limiter.leave(60)
            await let_run()
            story.append("the large one waits for an empty line")
            limiter.leave(40)
            await let_run()
            story.append("and goes alone")
            limiter.leave(1000)
        return story

    assert asyncio.run(enter_and_leave()) == [
        "a",
        "b",
        "full",
        "the large one waits for an empty line",
        "huge",
        "and goes alone",
        "d",
    ]


def uploads_of(path: str) -> list[FileToSend]:
    snapshot = take_snapshot(path)
    return [
        FileToSend(snapshot.local_path(r.path), r.path, r.size, r.mtime_ns, r.crc32c, r.digest)
        for r in snapshot.records()
    ]


@pytest.mark.parametrize("limit", [1.0, 16.0])
def test_a_pause_before_another_attempt_holds_up_no_other_file(
    server: StorageServer, tmp_path: Path, limit: float
) -> None:
    class Unmoved(Limiter):
        def decrease(self) -> None:
            """Stay at the limit: what is tested is the pause alone."""

    uploads = uploads_of(make_tree(tmp_path / "data", small_files(200)))
    server.add_fault(Fault(method="POST", times=16, status=503, headers={"Retry-After": "5"}))
    stored: dict[str, float] = {}
    limiter = Unmoved(128, 1 << 20)
    limiter.limit = limit
    with Transport(client_for(server.url), UNHURRIED, limiter=limiter) as slow:
        GcsStore(BUCKET, slow).upload(
            uploads, lambda upload, _: stored.update({upload.name: time.monotonic()})
        )
    at = sorted(stored.values())
    assert len(at) == 200
    longest_gap = max(later - earlier for earlier, later in pairwise(at))
    assert at[184] - at[183] == longest_gap  # the others did not wait for the 16


def test_more_requests_than_one_upload_makes_lose_no_file(
    server: StorageServer, tmp_path: Path
) -> None:
    files = small_files(60)
    uploads = uploads_of(make_tree(tmp_path / "data", files))
    with Transport(client_for(server.url), FAST, limiter=Limiter(1, 1 << 20)) as only_one_at_a_time:
        store = GcsStore(BUCKET, only_one_at_a_time)
        stored: list[str] = []
        with ThreadPoolExecutor() as pool:
            parts = [
                pool.submit(store.upload, uploads[n::3], lambda u, _: stored.append(u.name))
                for n in range(3)
            ]
            for part in parts:
                part.result()
    assert sorted(stored) == sorted(files) == sorted(server.objects(BUCKET))


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
