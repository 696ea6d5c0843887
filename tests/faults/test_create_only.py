"""Guarantee 2: nothing is overwritten or deleted; what is there already is compared."""

from pathlib import Path
from typing import Any

import pytest
from faultkit import BUCKET, FAST, content, do_upload, make_tree, prefix_of, published, small_files
from test_hashed_bytes import Uploading, held_at

from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.cloud.store import FileToSend
from keras_remote_airflow.core.data import Data
from keras_remote_airflow.core.disk.hashing import take_snapshot
from keras_remote_airflow.core.errors import ConflictError, MarkerError, StoreError
from keras_remote_airflow.testing import Fault, StorageServer

FILES = small_files(2) | {"mid": content(3 << 20), "big": content(9 << 20)}


def object_of(path: str, name: str) -> str:
    return prefix_of(Data(path).content_hash()) + name


def test_every_write_is_create_only(server: StorageServer, tmp_path: Path) -> None:
    path = make_tree(tmp_path / "data", FILES)
    do_upload(server.url, path)
    do_upload(server.url, path)
    writes = [r for r in server.requests if r.method != "GET"]
    assert {r.method for r in writes} == {"POST", "PUT"}
    assert all(r.query.get("ifGenerationMatch") == "0" for r in writes if r.method == "POST")
    assert all("upload_id" in r.query for r in writes if r.method == "PUT")


@pytest.mark.parametrize("same_size", [True, False])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_other_bytes_under_our_name(
    server: StorageServer, tmp_path: Path, when: str, name: str, same_size: bool
) -> None:
    path = make_tree(tmp_path / "data", FILES)
    taken = object_of(path, name)
    other = bytes(len(FILES[name])) if same_size else b"other"
    if when == "before":
        server.put(BUCKET, taken, other)
        uploading = Uploading(server.url, path)
        uploading.start()
    else:
        with held_at(server, path, method="POST") as uploading:
            server.put(BUCKET, taken, other)
    with pytest.raises(ConflictError) as raised:
        uploading.result()
    assert f"gs://{BUCKET}/{taken}" in str(raised.value)
    assert f"gcloud storage rm gs://{BUCKET}/{taken}" in str(raised.value)
    assert server.objects(BUCKET)[taken].data == other
    assert published(server) == {}


def test_the_same_bytes_meanwhile_are_another_uploader(
    server: StorageServer, tmp_path: Path
) -> None:
    path = make_tree(tmp_path / "data", FILES)
    with held_at(server, path, method="POST") as uploading:
        for name, data in FILES.items():
            server.put(BUCKET, object_of(path, name), data)
    assert uploading.result().uploaded_files == 0
    assert len(published(server)) == 1


def test_an_object_that_is_not_in_the_data(server: StorageServer, tmp_path: Path) -> None:
    path = make_tree(tmp_path / "data", FILES)
    server.put(BUCKET, object_of(path, "stray"), b"")
    with pytest.raises(ConflictError, match=r"not in the data.*/stray\b"):
        do_upload(server.url, path)
    assert published(server) == {}


def test_an_unreadable_marker_meanwhile(server: StorageServer, tmp_path: Path) -> None:
    path = make_tree(tmp_path / "data", FILES)
    with held_at(server, path, path=r"/o\?prefix") as uploading:
        server.put(BUCKET, object_of(path, ".cache_marker"), b"{")
    with pytest.raises(MarkerError):
        uploading.result()


def test_a_lost_answer_is_no_conflict(server: StorageServer, tmp_path: Path) -> None:
    path = make_tree(tmp_path / "data", FILES)
    for method in ("POST", "PUT"):
        server.add_fault(Fault(method=method, times=3, action="drop_after"))
    result = do_upload(server.url, path)
    assert published(server) == {result.content_hash: set(FILES)}


@pytest.mark.parametrize("permission", ["create", "list", "get"])
def test_a_missing_permission_is_named(
    server: StorageServer, tmp_path: Path, permission: str
) -> None:
    server.deny(permission)
    with pytest.raises(StoreError, match=r"403.*storage\.objects\..*objectCreator"):
        do_upload(server.url, make_tree(tmp_path / "data", FILES))
    assert server.objects(BUCKET) == {}


@pytest.mark.parametrize("size", [100, 3 << 20, 9 << 20])
def test_the_store_compares_whatever_it_was_told_is_there(
    server: StorageServer, client: Any, tmp_path: Path, size: int
) -> None:
    """Without the listing of an upload, which would see the difference as well."""
    file = take_snapshot(make_tree(tmp_path / "data", {"file": content(size)})).record(0)
    local = str(tmp_path / "data" / "file")
    upload = FileToSend(local, "object", file.size, file.mtime_ns, file.crc32c, file.digest)
    sent: list[bool] = []
    with open_bucket(BUCKET, client, retry=FAST) as store:
        server.put(BUCKET, "object", content(size))
        store.upload([upload], lambda _, was_sent: sent.append(was_sent))
        assert sent == [False]
        server.put(BUCKET, "object", bytes(size))
        with pytest.raises(ConflictError, match=r"gcloud storage rm gs://test-bucket/object"):
            store.upload([upload], lambda _, was_sent: sent.append(was_sent))
    assert sent == [False]
