"""Killed at any moment: no marker lies, and the next attempt sends only what is missing."""

from pathlib import Path
from typing import Any

import pytest
from faultkit import (
    BIG,
    BUCKET,
    Job,
    Tap,
    bytes_received,
    content,
    do_upload,
    killed_at_exit,
    make_tree,
    published,
    small_files,
    wait_until,
)

from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.datasets.upload import UploadResult
from keras_remote_airflow.testing import Fault, StorageServer

pytestmark = pytest.mark.slow  # kills processes

FILES = small_files(4) | {"big": content(BIG)}
# Marker read, listing, four objects, session, its bytes, marker.
REQUESTS = 9
PATIENT = RetryPolicy(stall_timeout=300)


def stored(server: StorageServer) -> set[str]:
    """The files whose objects are there."""
    names = (name.split("/", 3)[3] for name in server.objects(BUCKET))
    return {name for name in names if name != ".cache_marker"}


def sessions(server: StorageServer) -> int:
    """How many upload sessions were opened."""
    return sum(r.method == "POST" and r.query["uploadType"] == "resumable" for r in server.requests)


def upload_again(server: StorageServer, path: str) -> UploadResult:
    """Upload what a killed attempt left; assert that only the missing is sent."""
    # Once its connections have ended, what it had sent is in the log, and final.
    wait_until(lambda: server.connections == 0)
    missing = FILES.keys() - stored(server)
    missing_bytes = sum(len(FILES[name]) for name in missing)
    server.clear_faults()
    server.clear_requests()
    result = do_upload(server.url, path)
    assert (result.uploaded_files, result.uploaded_bytes) == (len(missing), missing_bytes)
    assert missing_bytes <= bytes_received(server) <= missing_bytes + 1024 * (len(missing) + 2)
    assert published(server) == {result.content_hash: set(FILES)}
    return result


def test_an_upload_takes_as_many_requests_as_are_killed_below(
    server: StorageServer, tmp_path: Path
) -> None:
    do_upload(server.url, make_tree(tmp_path / "data", FILES))
    assert len(server.requests) == REQUESTS


@pytest.mark.parametrize("last", range(1, REQUESTS + 1))
def test_killed_after_each_request(server: StorageServer, tmp_path: Path, last: int) -> None:
    path = make_tree(tmp_path / "data", FILES)
    # The last request is carried out but never answered; those after it are not carried out.
    server.add_fault(Fault(nth=last, action="stall"))
    server.add_fault(Fault(nth=last + 1, times=0, action="drop_before"))
    job = Job(do_upload, server.url, path, PATIENT)
    with killed_at_exit(job):
        wait_until(lambda: len(server.requests) >= last)
    whole = last == REQUESTS
    assert len(published(server)) == whole
    result = upload_again(server, path)
    assert result.cache_hit == whole


@pytest.mark.parametrize("sent", [1 << 20, 5 << 20])
def test_killed_in_the_middle_of_a_body(server: StorageServer, tmp_path: Path, sent: int) -> None:
    path = make_tree(tmp_path / "data", FILES)
    with Tap(server.url, stop_after=sent) as tap:
        job = Job(do_upload, tap.url, path, PATIENT)
        with killed_at_exit(job):
            wait_until(lambda: tap.stopped and len(stored(server)) == len(FILES) - 1)
    assert published(server) == {}
    upload_again(server, path)


def test_a_large_file_goes_on_where_the_connection_broke(
    server: StorageServer, tmp_path: Path
) -> None:
    path = make_tree(tmp_path / "data", {"big": content(24 << 20)})
    # Every second one of these asks how much has arrived, and is answered.
    server.add_fault(
        Fault(method="PUT", path="upload_id", times=30, action="drop_before", after_bytes=1 << 20)
    )
    # 30 pauses are far over the deadline: each new piece starts the count anew.
    result = do_upload(server.url, path, RetryPolicy(deadline=0.5, initial=0.1, maximum=0.1))
    assert published(server) == {result.content_hash: {"big"}}
    # Of each broken connection at most what falls short of a multiple of 256 KiB is sent again.
    assert bytes_received(server) < (24 << 20) + 30 * (256 << 10)
    assert sessions(server) == 1


@pytest.mark.parametrize("learnt_from", ["data", "question"])
@pytest.mark.parametrize("status", [404, 410])
def test_a_lost_session_is_opened_anew(
    server: StorageServer, tmp_path: Path, status: int, learnt_from: str
) -> None:
    path = make_tree(tmp_path / "data", {"big": content(BIG)})
    put: dict[str, Any] = {"method": "PUT", "path": "upload_id"}
    if learnt_from == "question":
        server.add_fault(Fault(**put, action="drop_before", after_bytes=3 << 20))
    server.add_fault(Fault(**put, nth=1 + (learnt_from == "question"), status=status))
    server.add_fault(Fault(**put, nth=2, status=status))
    result = do_upload(server.url, path)
    assert published(server) == {result.content_hash: {"big"}}
    assert sessions(server) == 2


@pytest.mark.parametrize("nth", range(1, REQUESTS + 1, 2))
def test_a_server_that_restarts(server: StorageServer, tmp_path: Path, nth: int) -> None:
    path = make_tree(tmp_path / "data", FILES)
    server.add_fault(Fault(nth=nth, action="stall"))
    job = Job(do_upload, server.url, path, RetryPolicy(20, 0.01, 0.1, stall_timeout=300))
    with killed_at_exit(job):
        wait_until(lambda: len(server.requests) >= nth)
        server.stop()
        server.start()
        result = job.result()
    assert published(server) == {result.content_hash: set(FILES)}


def test_a_killed_upload_leaves_no_lock_behind(server: StorageServer, tmp_path: Path) -> None:
    path = make_tree(tmp_path / "data", FILES)
    server.add_fault(Fault(nth=4, times=0, action="stall"))
    jobs = [Job(do_upload, server.url, path, PATIENT) for _ in range(2)]
    with killed_at_exit(*jobs):
        wait_until(lambda: len(server.requests) >= 6)
    upload_again(server, path)
