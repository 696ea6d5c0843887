"""Many uploaders at once: one set of objects, one marker, and the work shared."""

import logging
from pathlib import Path

import pytest
from faultkit import (
    BUCKET,
    Job,
    bytes_received,
    content,
    do_upload,
    killed_at_exit,
    make_tree,
    published,
    wait_until,
)

from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.testing import StorageServer

pytestmark = pytest.mark.slow  # many processes at once

# Eight processes on a small machine: being slow must not count as stalling.
UNHURRIED = RetryPolicy(deadline=60, initial=0.01, maximum=0.1, stall_timeout=60)
PROCESSES = 8
FILES = {f"{i // 10}/{i:03}": content(50_000, i) for i in range(300)}
TOTAL = sum(map(len, FILES.values()))


@pytest.mark.parametrize(("start", "at_most"), [("together", 4.0), ("staggered", 2.0)])
def test_eight_uploaders_of_the_same_data(
    server: StorageServer,
    tmp_path: Path,
    start: str,
    at_most: float,
) -> None:
    path = make_tree(tmp_path / "data", FILES)
    server.latency = 0.01
    jobs: list[Job] = []
    with killed_at_exit(*jobs):
        for nth in range(PROCESSES):
            jobs.append(Job(do_upload, server.url, path, UNHURRIED))
            if start == "staggered":
                share = (nth + 1) * len(FILES) // (PROCESSES + 1)
                wait_until(lambda share=share: len(server.objects(BUCKET)) >= share)  # type: ignore[misc]
        results = [job.result() for job in jobs]
    assert published(server) == {results[0].content_hash: set(FILES)}
    # Every object was sent by exactly one of them; the rest of the bytes ran into what was there.
    assert sum(result.uploaded_files for result in results) == len(FILES)
    ratio = bytes_received(server) / TOTAL
    logging.info("%d uploaders, %s: %.2f times the data was sent", PROCESSES, start, ratio)
    assert ratio < at_most


def test_eight_uploaders_of_different_data(server: StorageServer, tmp_path: Path) -> None:
    trees = {
        n: {"same": content(9000), **{f"{n}/{i}": content(2000, 100 * n + i) for i in range(30)}}
        for n in range(PROCESSES)
    }
    jobs = [
        Job(do_upload, server.url, make_tree(tmp_path / str(n), tree), UNHURRIED)
        for n, tree in trees.items()
    ]
    with killed_at_exit(*jobs):
        results = [job.result() for job in jobs]
    expected = {r.content_hash: set(trees[n]) for n, r in enumerate(results)}
    assert published(server) == expected


def test_the_first_of_many_to_be_killed_takes_nobody_with_it(
    server: StorageServer, tmp_path: Path
) -> None:
    path = make_tree(tmp_path / "data", FILES)
    server.latency = 0.01
    jobs = [Job(do_upload, server.url, path, UNHURRIED) for _ in range(3)]
    with killed_at_exit(*jobs):
        wait_until(lambda: len(server.objects(BUCKET)) > 20)
        jobs[0].kill()
        results = [job.result() for job in jobs[1:]]
    assert published(server) == {results[0].content_hash: set(FILES)}
