"""A server with a folder: nothing is lost at a restart, nothing leads out of the folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from keras_remote_airflow.testing import StorageServer

HOSTILE_NAMES = ["../escape", "/etc/passwd", "a/../../b", "a", "a/b", "..%2f", "nul\0", "x" * 1024]


def everything(server: StorageServer, bucket: str = "demo") -> dict[str, Any]:
    return {
        name: (found.data, found.generation, found.crc32c, found.metadata)
        for name, found in server.objects(bucket).items()
    }


def test_objects_and_buckets_survive_a_restart(tmp_path: Path) -> None:
    lifecycle = {"rule": [{"action": {"type": "Delete"}, "condition": {"age": 30}}]}
    with StorageServer(["demo"], directory=tmp_path) as server:
        server.create_bucket("aged", lifecycle)
        for name in HOSTILE_NAMES:
            server.put("demo", name, name.encode(), {"k": "v"})
        server.put("demo", "gone", b"")
        server.delete("demo", "gone")
        server.put("demo", "a", b"overwritten")
        before = everything(server)
    again = StorageServer(["demo"], directory=tmp_path)
    assert everything(again) == before
    assert again.objects("aged") == {}
    later = again.put("demo", "new", b"").generation
    assert later > max(generation for _, generation, _, _ in before.values())


def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    server = StorageServer(["demo"], directory=inside)
    for name in HOSTILE_NAMES:
        server.put("demo", name, b"x")
    assert os.listdir(tmp_path) == ["inside"]
    assert sorted(os.listdir(inside)) == ["demo"]
    assert {path.parent.name for path in inside.glob("demo/*/*")} == {"data", "meta"}


def test_what_a_crash_left_behind_is_swept_away(tmp_path: Path) -> None:
    server = StorageServer(["demo"], directory=tmp_path)
    server.put("demo", "x", b"data")
    (tmp_path / "demo/data/0123456789abcdef").write_bytes(b"no metadata names me")
    (tmp_path / "demo/meta/0.json.1.tmp").write_bytes(b"{")
    again = StorageServer(["demo"], directory=tmp_path)
    assert {name: found.data for name, found in again.objects("demo").items()} == {"x": b"data"}
    assert len(list((tmp_path / "demo/data").iterdir())) == 1
    assert len(list((tmp_path / "demo/meta").iterdir())) == 1


def test_an_edited_file_name_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    server = StorageServer(["demo"], directory=tmp_path / "storage")
    server.put("demo", "x", b"data")
    [meta] = (tmp_path / "storage/demo/meta").iterdir()
    [data] = (tmp_path / "storage/demo/data").iterdir()
    meta.write_text(meta.read_text().replace(data.name, "../../../secret"))
    with pytest.raises(FileNotFoundError):
        StorageServer(["demo"], directory=tmp_path / "storage")


def test_overwrites_and_failed_uploads_leave_no_files(tmp_path: Path, new_caller: Any) -> None:
    with StorageServer(["demo"], directory=tmp_path) as server:
        call = new_caller(server)
        for _ in range(3):
            call.media("x", b"data")
        call.media("x", b"data", "&ifGenerationMatch=0")
        call.media("x", b"data", x_goog_hash="crc32c=AAAAAA==")
        call.media("x", b"data", x_goog_hash="md5=AAAAAAAAAAAAAAAAAAAAAA==")
        call.multipart({"name": "x", "crc32c": "AAAAAA=="}, bytes(2_000_000))
        server.deny("create")
        assert call.media("z", bytes(2_000_000)).status == 403
        server.allow_all()
        session = call.resumable({"name": "y"}).headers["location"]
        call("DELETE", session)
        call("PUT", call.resumable({"name": "y", "crc32c": "AAAAAA=="}).headers["location"], b"y")
        assert len(list((tmp_path / "demo/data").iterdir())) == 1


def test_a_download_survives_the_deletion_of_its_object(tmp_path: Path, new_caller: Any) -> None:
    data = os.urandom(20_000_000)  # more than the socket buffers hold
    with StorageServer(["demo"], directory=tmp_path) as server:
        server.put("demo", "x", data)
        call = new_caller(server)
        call.connection.request("GET", "/storage/v1/b/demo/o/x?alt=media")
        response = call.connection.getresponse()
        server.delete("demo", "x")
        assert response.read() == data


@pytest.mark.parametrize("on_disk", [False, True])
def test_putting_into_a_bucket_that_is_not_there_is_404(tmp_path: Path, on_disk: bool) -> None:
    with (
        StorageServer(["demo"], directory=tmp_path if on_disk else None) as server,
        pytest.raises(Exception, match="bucket does not exist") as raised,
    ):
        server.put("other", "name", b"")
    assert getattr(raised.value, "status", None) == 404
