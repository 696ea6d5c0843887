"""Being stopped: SIGTERM, as Airflow ends a task, at any request; and what must not outlive it."""

import asyncio
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from faultkit import (
    BIG,
    BUCKET,
    FAST,
    Job,
    client_for,
    content,
    do_materialize,
    do_upload,
    killed_at_exit,
    make_tree,
    published,
    small_files,
    wait_until,
)

from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.cloud.transport import Transport
from keras_remote_airflow.core.disk.partial import partial_name
from keras_remote_airflow.testing import Fault, StorageServer

pytestmark = pytest.mark.slow  # kills processes

PATIENT = RetryPolicy(deadline=300, initial=100, maximum=100, stall_timeout=300)


class Stopped(BaseException):
    """What the signal handler raises."""


def until_stopped(work: Any, stderr: str, *args: Any, **kwargs: Any) -> tuple[float, list[str]]:
    """Run `work` until SIGTERM; return how long the end took, and which threads outlived it."""
    received = []

    def stop(*_: object) -> None:
        received.append(time.monotonic())
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    with suppress(Stopped):
        work(*args, **kwargs)
    seconds = time.monotonic() - received[0]
    return seconds, [thread.name for thread in threading.enumerate()][1:]


@pytest.mark.parametrize("how", ["stall", "retrying"])
@pytest.mark.parametrize("nth", range(1, 8))
def test_sigterm_stops_an_upload_at_any_request(
    server: StorageServer, tmp_path: Path, nth: int, how: str
) -> None:
    files = small_files(2) | {"big": content(BIG)}
    path = make_tree(tmp_path / "data", files)
    if how == "stall":
        server.add_fault(Fault(nth=nth, times=0, action="stall"))
    else:
        server.add_fault(Fault(nth=nth, times=0, status=503))
    stderr = tmp_path / "stderr"
    job = Job(until_stopped, do_upload, str(stderr), server.url, path, retry=PATIENT)
    with killed_at_exit(job):
        wait_until(lambda: len(server.requests) >= nth)
        assert job.process.pid is not None
        os.kill(job.process.pid, signal.SIGTERM)
        seconds, threads = job.result()
    assert seconds < 30, "left alone it would go on for 300 s"
    assert threads == []
    assert stderr.read_text() == ""
    assert published(server) == {} or nth > len(files) + 3


def test_sigterm_stops_a_download_and_removes_what_it_left(
    server: StorageServer, tmp_path: Path
) -> None:
    result = do_upload(server.url, make_tree(tmp_path / "data", {"big": content(BIG), "a": b"a"}))
    server.add_fault(Fault(path=r"/o/.*big.*alt=media", action="stall", after_bytes=BIG // 2))
    stderr = tmp_path / "stderr"
    dest = str(tmp_path / "back")
    job = Job(
        until_stopped, do_materialize, str(stderr), server.url, result.gcs_uri, dest, retry=PATIENT
    )
    with killed_at_exit(job):
        wait_until(lambda: (tmp_path / partial_name("back") / "data" / "big").exists())
        assert job.process.pid is not None
        os.kill(job.process.pid, signal.SIGTERM)
        seconds, threads = job.result()
    assert seconds < 30, "left alone it would go on for 300 s"
    assert threads == []
    assert stderr.read_text() == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "stderr"]


def test_an_interrupt_before_the_work_has_begun_is_answered_at_once(server: StorageServer) -> None:
    release = threading.Event()

    def interrupt(*_: object) -> None:
        threading.Timer(0.1, release.set).start()
        raise Stopped

    async def work() -> None:
        await asyncio.Event().wait()

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with Transport(client_for(server.url), FAST) as transport:
            transport._loop.call_soon_threadsafe(release.wait)
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            started = time.monotonic()
            with pytest.raises(Stopped):
                transport.run(work())
            assert time.monotonic() - started < 9, "left alone the wait takes 10 s"
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_error_leaves_no_thread(server: StorageServer, tmp_path: Path) -> None:
    server.add_fault(Fault(method="POST", status=403, times=0))
    path = make_tree(tmp_path / "data", small_files(50))
    with pytest.raises(Exception, match="403"):
        do_upload(server.url, path)
    assert "cloud-storage" not in [thread.name for thread in threading.enumerate()]
    assert server.objects(BUCKET) == {}
