"""A bucket whose requesters pay: every request names the project to bill, or is refused."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import pytest
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from keras_remote_airflow.testing import StorageServer

OBJECT = "/storage/v1/b/paid/o/x"


@pytest.fixture(autouse=True)
def _paid(server: StorageServer) -> None:
    server.create_bucket("paid", requester_pays=True)
    server.put("paid", "x", b"data")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/storage/v1/b/paid"),
        ("PATCH", "/storage/v1/b/paid"),
        ("DELETE", "/storage/v1/b/paid"),
        ("GET", "/storage/v1/b/paid/iam/testPermissions?permissions=storage.objects.get"),
        ("GET", "/storage/v1/b/paid/o"),
        ("GET", OBJECT),
        ("GET", f"{OBJECT}?alt=media"),
        ("GET", f"/download{OBJECT}?alt=media"),
        ("PATCH", OBJECT),
        ("DELETE", OBJECT),
        ("POST", f"{OBJECT}/compose"),
        ("POST", f"{OBJECT}/rewriteTo/b/demo/o/y"),
        ("POST", "/storage/v1/b/demo/o/y/copyTo/b/paid/o/x"),
        ("POST", f"{OBJECT}/moveTo/o/y"),
        ("POST", "/upload/storage/v1/b/paid/o?uploadType=media&name=y"),
        ("POST", "/upload/storage/v1/b/paid/o?uploadType=multipart"),
        ("POST", "/upload/storage/v1/b/paid/o?uploadType=resumable&name=y"),
    ],
)
def test_a_request_without_user_project_is_400(call: Any, method: str, path: str) -> None:
    answer = call(method, path, {} if method in ("PATCH", "POST") else None)
    assert answer.status == 400
    assert b"requester pays" in answer.body
    if "alt=media" not in path:
        assert answer.reason == "required"
    assert set(call.server.objects("paid")) == {"x"}


def test_the_query_or_a_header_names_the_project(call: Any) -> None:
    assert call("GET", f"{OBJECT}?userProject=p").status == 200
    assert call("GET", OBJECT, None, {"X-Goog-User-Project": "p"}).status == 200
    assert call("GET", f"{OBJECT}?userProject=").status == 400
    billing = call("GET", "/storage/v1/b/paid?userProject=p").json["billing"]
    assert billing == {"requesterPays": True}


def test_a_session_keeps_the_project_that_began_it(call: Any) -> None:
    path = "/upload/storage/v1/b/paid/o?uploadType=resumable&name=y"
    session = call("POST", f"{path}&userProject=p").headers["location"]
    assert "userProject=p" in urlsplit(session).query
    assert call("PUT", session, b"data").status == 200
    assert [r.query.get("userProject") for r in call.server.requests] == ["p", "p"]


def test_a_bucket_can_change(call: Any) -> None:
    pays = {"billing": {"requesterPays": True}}
    assert call("PATCH", "/storage/v1/b/demo", pays).status == 200
    assert call("GET", "/storage/v1/b/demo").status == 400
    free = {"billing": {"requesterPays": False}}
    assert call("PATCH", "/storage/v1/b/demo?userProject=p", free).status == 200
    assert call("GET", "/storage/v1/b/demo").status == 200
    assert call("PATCH", "/storage/v1/b/demo", {"billing": "x"}).status == 400


def test_google_cloud_storage_pays_when_told(
    server: StorageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    client = storage.Client(project="p", credentials=AnonymousCredentials())
    with pytest.raises(exceptions.BadRequest, match="requester pays"):
        client.bucket("paid").blob("x").reload()
    server.clear_requests()
    bucket = client.bucket("paid", user_project="p")
    blob = bucket.blob("big", chunk_size=256 * 1024)
    with blob.open("wb") as file:  # a resumable upload
        file.write(bytes(600_000))
    assert blob.download_as_bytes() == bytes(600_000)
    assert {blob.name for blob in client.list_blobs(bucket)} == {"x", "big"}
    # It also asks for the bucket's location by the way, does not pay, and is refused.
    answered = [request for request in server.requests if request.status != 400]
    assert {request.query.get("userProject") for request in answered} == {"p"}
