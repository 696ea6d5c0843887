"""What the server cannot do is refused, and the message names it."""

from __future__ import annotations

from typing import Any

import pytest

UPLOAD = "/upload/storage/v1/b/demo/o?uploadType=media&name=x"
REWRITE = "/storage/v1/b/demo/o/x/rewriteTo/b/demo/o/y"


@pytest.mark.parametrize(
    ("method", "path", "body", "word"),
    [
        ("PATCH", "/storage/v1/b/demo", {"versioning": {"enabled": True}}, "versioning"),
        ("PATCH", "/storage/v1/b/demo", {"encryption": {"defaultKmsKeyName": "k"}}, "encryption"),
        (
            "POST",
            "/storage/v1/b",
            {"name": "new", "softDeletePolicy": {"retentionDurationSeconds": "604800"}},
            "softDeletePolicy",
        ),
        ("POST", "/storage/v1/b", {"name": "new", "autoclass": {"enabled": True}}, "autoclass"),
        ("POST", "/storage/v1/b?enableObjectRetention=true", {"name": "new"}, "object retention"),
        ("PATCH", "/storage/v1/b/demo/o/x", {"retention": {"mode": "Locked"}}, "object retention"),
        ("PATCH", "/storage/v1/b/demo/o/x", {"kmsKeyName": "k"}, "kmsKeyName"),
        ("POST", f"{UPLOAD}&kmsKeyName=k", {}, "kmsKeyName"),
        ("POST", f"{REWRITE}?destinationKmsKeyName=k", {}, "destinationKmsKeyName"),
        ("POST", REWRITE, {"kmsKeyName": "k"}, "kmsKeyName"),
        ("GET", "/storage/v1/b/demo/o?softDeleted=true", None, "soft delete"),
        ("POST", "/storage/v1/b/demo/o/x/restore", {}, "soft delete"),
        ("POST", "/storage/v1/b/demo/lockRetentionPolicy", {}, "locked retention"),
        ("GET", "/storage/v1/b/demo/o/x/acl", None, "access control lists"),
        ("PUT", "/storage/v1/b/demo/iam", {}, "IAM"),
        ("POST", "/storage/v1/b/demo/notificationConfigs", {}, "notifications"),
        ("PUT", "/demo/x", b"data", "XML API"),
        ("GET", "/demo?list-type=2", None, "XML API"),
    ],
)
def test_it_is_400_and_named(call: Any, method: str, path: str, body: Any, word: str) -> None:
    call.server.put("demo", "x", b"data")
    answer = call(method, path, body)
    assert answer.status == 400
    assert word in answer.json["error"]["message"]
    assert {n: o.data for n, o in call.server.objects("demo").items()} == {"x": b"data"}
    assert [b["name"] for b in call("GET", "/storage/v1/b").json["items"]] == ["demo"]


def test_customer_supplied_keys_are_refused(call: Any) -> None:
    answer = call("POST", UPLOAD, b"data", {"X-Goog-Encryption-Algorithm": "AES256"})
    assert answer.status == 400
    assert "encryption keys" in answer.json["error"]["message"]


def test_what_is_switched_off_is_accepted(call: Any) -> None:
    off = {
        "versioning": {"enabled": False},
        "softDeletePolicy": {"retentionDurationSeconds": "0"},
        "encryption": None,
    }
    assert call("PATCH", "/storage/v1/b/demo", off).status == 200
    assert "versioning" not in call("GET", "/storage/v1/b/demo").json


def test_a_resource_can_be_sent_back(call: Any) -> None:
    call.multipart({"name": "x", "metadata": {"k": "v"}}, b"data")
    for path in ("/storage/v1/b/demo", "/storage/v1/b/demo/o/x"):
        resource = call("GET", path).json
        assert call("PUT", path, resource).status == 200
