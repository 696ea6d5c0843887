"""pytest fixtures: a Cloud Storage for one test.

`gcs_server` is a running `StorageServer` with one bucket, for tests that inject faults or look at
what was stored. `gcs_bucket` is the name of a bucket, for tests that only speak the API: when
STORAGE_EMULATOR_HOST is set already, it is a fresh bucket on that server.
Both set what `environment()` has: STORAGE_EMULATOR_HOST, AIRFLOW_CONN_GOOGLE_CLOUD_DEFAULT
(anonymous) and GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT.
"""

import json
import os
import urllib.request
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .server import StorageServer

BUCKET = "test-bucket"


@pytest.fixture
def gcs_server(monkeypatch: pytest.MonkeyPatch) -> "Iterator[StorageServer]":
    """A local server with the bucket "test-bucket"; skips when another server is set."""
    from .server import StorageServer

    if os.environ.get("STORAGE_EMULATOR_HOST"):
        pytest.skip("needs fault hooks of the local server; unset STORAGE_EMULATOR_HOST")
    with StorageServer(buckets=[BUCKET]) as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def gcs_bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an empty bucket."""
    from .server import environment

    url = os.environ.get("STORAGE_EMULATOR_HOST")
    if not url or "gcs_server" in request.fixturenames:
        request.getfixturevalue("gcs_server")
        return BUCKET
    for name, value in environment(url).items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex}"
    base = url if "://" in url else f"http://{url}"
    call = urllib.request.Request(  # noqa: S310 - the URL is the user's own setting
        f"{base.rstrip('/')}/storage/v1/b?project=test-project",
        data=json.dumps({"name": bucket}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(call):  # noqa: S310
        return bucket
