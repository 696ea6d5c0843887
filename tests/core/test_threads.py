"""`Threads`: a pool whose work is done whether or not threads can be started."""

import threading
from concurrent.futures import wait

import pytest

from keras_remote_airflow.core.threads import Threads


@pytest.mark.parametrize("startable", [0, 1, 9])
def test_all_work_is_done_once_however_many_threads_can_be_started(startable, monkeypatch):
    start, started, done = threading.Thread.start, [], []

    def scarce(thread):
        if len(started) == startable:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)

    def work(number):
        done.append(number)
        if number == 7:
            raise ValueError(number)
        return number

    with Threads(4, "test") as threads:
        futures = [threads.submit(work, number) for number in range(50)]
        wait(futures, timeout=10)
    assert sorted(done) == list(range(50))
    assert [future.result() for future in futures if not future.exception()] == [
        number for number in range(50) if number != 7
    ]
    assert len(started) == min(startable, 4)


def test_work_that_is_cancelled_before_it_begins_is_told_from_work_that_is_done():
    hold, begun = threading.Event(), threading.Event()
    threads = Threads(1, "test")
    threads.submit(lambda: (begun.set(), hold.wait(10)))
    never = threads.submit(pytest.fail, "it was cancelled")
    cancelled = threads.submit(pytest.fail, "it was cancelled")
    assert begun.wait(10)
    assert cancelled.cancel()
    threads.shutdown(wait=False, cancel_futures=True)
    hold.set()
    assert never.cancelled()
