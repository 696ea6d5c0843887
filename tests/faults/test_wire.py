"""Trouble on the wire: which faults an upload and a download survive, and which end them.

Every row of the tables is one fault on one kind of request. `HEALS` means: the call succeeds, and
what was stored or read back is whole.
"""

import asyncio
import errno
import os
import threading
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from faultkit import BIG, BUCKET, FAST, content, do_materialize, do_upload, make_tree, published
from faultkit import read_tree as read

from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.cloud.transfer import Source
from keras_remote_airflow.core.cloud.transport import Transport
from keras_remote_airflow.core.datasets.lookup import find
from keras_remote_airflow.core.errors import IntegrityError, StoreError
from keras_remote_airflow.testing import Fault, StorageServer

FILES = {"a.txt": b"a", "sub/b.bin": content(5000), "empty": b"", "two.bin": content(2 << 20, 2)}
TREE = FILES | {"big.bin": content(BIG)}

# The requests of an upload, in order, by method and path; the third number says which of them.
MARKER_READ = ("GET", r"\.cache_marker\?.*alt=media", 1)
LISTING = ("GET", r"/o\?", 1)
OBJECT = ("POST", r"uploadType=multipart", 1)
SESSION = ("POST", r"uploadType=resumable", 1)
SESSION_PUT = ("PUT", r"upload_id=", 1)
MARKER = ("POST", r"uploadType=multipart", len(FILES) + 1)
UPLOAD_STAGES = {
    "marker_read": MARKER_READ,
    "listing": LISTING,
    "object": OBJECT,
    "session": SESSION,
    "session_put": SESSION_PUT,
    "marker": MARKER,
}
DOWNLOAD = ("GET", r"/o/.*big\.bin\?.*alt=media", 1)
DOWNLOAD_STAGES = {"listing": LISTING, "download": DOWNLOAD}

RETRYABLE = [408, 429, 500, 502, 503, 504]
HEALS: dict[str, dict[str, Any]] = {
    **{f"status_{status}": {"status": status} for status in RETRYABLE},
    "three_times_503": {"status": 503, "times": 3},
    "reset_before": {"action": "drop_before"},
    "reset_after": {"action": "drop_after"},  # done, but its answer is lost
    "stall": {"action": "stall"},  # likewise, and the connection stays open
    "half_an_answer": {"action": "truncate"},
    "stall_in_answer": {"action": "stall", "after_bytes": 5},
    "retry_after": {"status": 503, "headers": {"Retry-After": "0"}},
}
PERMANENT = {
    400: "refused",
    401: "credentials were not accepted",
    403: "objectViewer",
    404: "bucket",
}


def fault(stage: tuple[str, str, int], **how: Any) -> Fault:
    method, path, nth = stage
    return Fault(method=method, path=path, nth=nth, **how)


@pytest.mark.parametrize("how", HEALS)
@pytest.mark.parametrize("stage", UPLOAD_STAGES)
def test_upload_heals(server: StorageServer, tmp_path: Path, stage: str, how: str) -> None:
    path = make_tree(tmp_path / "data", TREE)
    server.add_fault(fault(UPLOAD_STAGES[stage], **HEALS[how]))
    result = do_upload(server.url, path)
    assert published(server) == {result.content_hash: set(TREE)}
    assert not result.cache_hit


@pytest.mark.parametrize("how", [*HEALS, "corrupt", "bad_hash"])
@pytest.mark.parametrize("stage", DOWNLOAD_STAGES)
def test_download_heals(server: StorageServer, tmp_path: Path, stage: str, how: str) -> None:
    result = do_upload(server.url, make_tree(tmp_path / "data", TREE))
    server.add_fault(fault(DOWNLOAD_STAGES[stage], **HEALS.get(how, {"action": how})))
    dest = do_materialize(server.url, result.gcs_uri, str(tmp_path / "back"))
    assert read(dest) == TREE


@pytest.mark.parametrize("how", [*HEALS, "corrupt", "bad_hash"])
def test_lookup_heals(server: StorageServer, client: Any, tmp_path: Path, how: str) -> None:
    result = do_upload(server.url, make_tree(tmp_path / "data", FILES))
    assert result.content_hash is not None
    server.add_fault(fault(MARKER_READ, **HEALS.get(how, {"action": how})))
    entry = find(BUCKET, result.content_hash, client=client, retry=FAST)
    assert entry is not None
    assert entry.files == len(FILES)


@pytest.mark.parametrize("status", PERMANENT)
@pytest.mark.parametrize("stage", UPLOAD_STAGES)
def test_upload_gives_up_at_once(
    server: StorageServer, tmp_path: Path, stage: str, status: int
) -> None:
    if (stage, status) in {("marker_read", 404), ("session_put", 404)}:
        pytest.skip("answers of their own: a missing marker, a lost session")
    path = make_tree(tmp_path / "data", TREE)
    server.add_fault(fault(UPLOAD_STAGES[stage], status=status, times=0))
    with pytest.raises(StoreError, match=PERMANENT[status]) as raised:
        do_upload(server.url, path)
    assert (raised.value.status, raised.value.transient) == (status, False)
    method, path, _ = UPLOAD_STAGES[stage]
    refused = [r for r in server.requests if r.status == status and r.method == method]
    # Other requests of the kind were in flight already; none was sent twice.
    assert len({(r.object_name, r.body_bytes) for r in refused}) == len(refused)
    assert published(server) == {}


@pytest.mark.parametrize("status", [400, 401, 403])
def test_download_gives_up_at_once(server: StorageServer, tmp_path: Path, status: int) -> None:
    result = do_upload(server.url, make_tree(tmp_path / "data", TREE))
    server.add_fault(fault(DOWNLOAD, status=status, times=0))
    with pytest.raises(StoreError, match=PERMANENT[status]):
        do_materialize(server.url, result.gcs_uri, str(tmp_path / "back"))
    assert sum(r.status == status for r in server.requests) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_marker_is_no_miss(server: StorageServer, client: Any, status: int) -> None:
    server.add_fault(fault(MARKER_READ, status=status, times=0))
    with pytest.raises(StoreError) as raised:
        find(BUCKET, "0" * 64, client=client, retry=FAST)
    assert not raised.value.transient


def test_a_missing_bucket_is_no_miss(server: StorageServer, client: Any) -> None:
    with pytest.raises(StoreError, match="no-such-bucket"):
        find("no-such-bucket", "0" * 64, client=client, retry=FAST)


def test_bytes_that_are_always_damaged_are_an_error_in_the_end(
    server: StorageServer, tmp_path: Path
) -> None:
    result = do_upload(server.url, make_tree(tmp_path / "data", TREE))
    server.add_fault(fault(DOWNLOAD, action="corrupt", times=0))
    with pytest.raises(IntegrityError, match=r"big\.bin"):
        do_materialize(server.url, result.gcs_uri, str(tmp_path / "back"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_the_error_of_a_transfer_has_its_cause(server: StorageServer, tmp_path: Path) -> None:
    server.add_fault(Fault(method="POST", action="drop_before", times=0))
    with pytest.raises(StoreError, match="gave up after") as raised:
        do_upload(server.url, make_tree(tmp_path / "data", FILES), RetryPolicy(deadline=0))
    assert isinstance(raised.value.__cause__, aiohttp.ClientError)


def test_a_refused_file_is_read_again_where_it_holds_up_no_other(
    server: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []
    real = Source.read

    def note(source: Source, start: int, size: int) -> bytes:
        readers.append(threading.current_thread().name)
        return real(source, start, size)

    monkeypatch.setattr(Source, "read", note)
    server.add_fault(fault(OBJECT, status=400))
    with pytest.raises(StoreError):
        do_upload(server.url, make_tree(tmp_path / "data", {"a": b"a"}))
    # "cloud-storage" is the thread that makes the requests; it reads what it sends.
    assert [name == "cloud-storage" for name in readers] == [True, False]


def test_too_many_open_files_are_waited_out(
    server: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tree(tmp_path / "data", TREE)
    real = os.open
    refused: list[str] = []

    def scarce(name: str, *args: Any, **kwargs: Any) -> int:
        is_upload = threading.current_thread().name.startswith("cloud-storage")
        if is_upload and str(name).startswith(str(tmp_path)) and refused.count(name) < 2:
            refused.append(name)
            raise OSError(errno.EMFILE, "Too many open files", name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", scarce)
    result = do_upload(server.url, path)
    assert len(refused) == 2 * len(TREE)
    assert published(server) == {result.content_hash: set(TREE)}
    refused.clear()
    assert read(do_materialize(server.url, result.gcs_uri, str(tmp_path / "back"))) == TREE
    assert len(refused) == 2 * len(TREE)


def test_a_transfer_that_a_library_cancels_is_not_taken_for_done(
    server: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{number}": b"x" for number in range(20)}
    path = make_tree(tmp_path / "data", files)
    real, calls = Transport.exchange, []

    async def exchange(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 7:
            raise asyncio.CancelledError
        return await real(*args, **options)

    monkeypatch.setattr(Transport, "exchange", exchange)
    result = do_upload(server.url, path)
    assert published(server) == {result.content_hash: set(files)}
    assert result.uploaded_files == len(files)


def test_an_outage_is_said_once_and_not_for_every_file(
    server: StorageServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_tree(tmp_path / "data", {f"{number}": b"x" for number in range(60)})
    server.add_fault(Fault(method="POST", path=r"uploadType=multipart", times=150, status=503))
    with caplog.at_level("WARNING"):
        do_upload(server.url, path)
    assert sum("attempt 2" in record.getMessage() for record in caplog.records) == 1
