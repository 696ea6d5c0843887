"""Credentials: refreshed when refused, and told to nobody; what is parsed is not evaluated."""

import json
import logging
import os
import socket
import stat
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from faultkit import BUCKET, FAST, client_for, content, make_tree, published

from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.datasets.upload import upload
from keras_remote_airflow.core.errors import InvalidInputError, StoreError
from keras_remote_airflow.core.refs import make_data_ref, parse_data_ref
from keras_remote_airflow.testing import Fault, StorageServer

FILES = {"a": b"a", "b": b"b", "big": content(9 << 20)}


def rotating_credentials(tokens: int = 1000) -> Any:
    """Credentials whose every refresh brings another token, until there are so many."""
    from google.auth.credentials import Credentials

    class Rotating(Credentials):
        refreshes = 0

        def refresh(self, request: object) -> None:
            self.refreshes += 1
            self.token = f"secret-token-{min(self.refreshes, tokens)}"

    return Rotating()


@pytest.mark.parametrize("nth", range(1, 8))
def test_a_refused_token_is_refreshed_once(server: StorageServer, tmp_path: Path, nth: int) -> None:
    credentials = rotating_credentials()
    server.add_fault(Fault(nth=nth, status=401))
    client = client_for(server.url, credentials)
    path = make_tree(tmp_path / "data", FILES)
    result = upload(BUCKET, path, client=client, retry=FAST)
    assert published(server) == {result.content_hash: set(FILES)}
    assert credentials.refreshes == 2


def test_each_token_that_is_refused_is_replaced_once(server: StorageServer) -> None:
    credentials = rotating_credentials()
    for nth in (2, 5):  # in real life an hour apart
        server.add_fault(Fault(nth=nth, status=401))
    with open_bucket(BUCKET, client_for(server.url, credentials), retry=FAST) as store:
        for _ in range(5):
            assert store.read("x") is None
    assert credentials.refreshes == 3


def test_a_token_may_take_longer_to_fetch_than_an_answer(
    server: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = rotating_credentials()
    refresh = credentials.refresh
    monkeypatch.setattr(credentials, "refresh", lambda _: (time.sleep(1), refresh(_)))
    once = RetryPolicy(deadline=0, stall_timeout=0.3)
    client = client_for(server.url, credentials)
    upload(BUCKET, make_tree(tmp_path / "data", FILES), client=client, retry=once)
    assert credentials.refreshes == 1


@pytest.mark.parametrize("tokens", [1, 1000], ids=["the same again", "another"])
def test_credentials_that_stay_refused_are_an_error_without_the_token(
    server: StorageServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, tokens: int
) -> None:
    caplog.set_level(logging.DEBUG)
    credentials = rotating_credentials(tokens)
    server.add_fault(Fault(method="POST", status=401, times=0))
    with pytest.raises(StoreError, match="credentials were not accepted") as raised:
        upload(
            BUCKET,
            make_tree(tmp_path / "data", FILES),
            client=client_for(server.url, credentials),
            retry=FAST,
        )
    assert (raised.value.status, raised.value.transient) == (401, False)
    assert credentials.refreshes == 2
    told = "".join(traceback.format_exception(raised.value)) + caplog.text
    assert "secret-token" not in told


def test_no_token_is_logged_whatever_goes_wrong(
    server: StorageServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for action in ("drop_before", "drop_after", "truncate"):
        server.add_fault(Fault(action=action, times=4))
    client = client_for(server.url, rotating_credentials())
    result = upload(BUCKET, make_tree(tmp_path / "data", FILES), client=client, retry=FAST)
    assert "secret-token" not in caplog.text
    assert "upload_id" not in caplog.text
    assert "secret-token" not in json.dumps(result.stats())


REF = make_data_ref("gs://bucket/default/data", True)
HOSTILE_REFS = {
    "call": "__import__('os').system('touch CANARY')",
    "call in a ref": repr(REF)[:-1] + ", 'x': __import__('os').system('touch CANARY')}",
    "f-string": "f\"{__import__('os').system('touch CANARY')}\"",
    "deeply nested": "[" * 30_000,
    "deep negation": "-" * 60_000 + "1",
    "huge": " " * (1 << 20) + repr(REF),
    "huge number": "9" * 60_000,
    "power": "9**9**9",
    "set": "{1, 2}",
    "NUL": "\0",
    "surrogate": "\udcff",
}


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("text", HOSTILE_REFS)
def test_a_hostile_ref_is_refused_and_not_evaluated(tmp_path: Path, text: str) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(InvalidInputError) as raised:
        parse_data_ref(HOSTILE_REFS[text].replace("CANARY", str(canary)))
    assert not canary.exists()
    assert len(str(raised.value)) < 1000


def test_the_local_server_listens_on_loopback_only(server: StorageServer) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
    for address in {str(a) for a in others} - {"127.0.0.1", "127.0.1.1", "::1"}:
        with pytest.raises(OSError):
            socket.create_connection((address, server.port), timeout=1)


@pytest.mark.parametrize(
    "name", ["../../escaped", "/etc/escaped", "..", "%2e%2e%2fescaped", "a/../../../escaped"]
)
def test_the_local_server_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "outer" / "folder"
    with StorageServer(["bucket"], directory=folder) as server:
        for path in (f"upload/storage/v1/b/bucket/o?uploadType=media&name={name}",):
            request = urllib.request.Request(f"{server.url}/{path}", b"x", method="POST")
            try:
                urllib.request.urlopen(request).close()
            except urllib.error.HTTPError as exc:
                exc.close()
        for bucket in ("..", "%2e%2e", "../../escaped"):
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(f"{server.url}/storage/v1/b/{bucket}/o/x?alt=media")
    assert not list(tmp_path.rglob("escaped"))
    assert {p.name for p in tmp_path.iterdir()} == {"outer"}


def test_the_default_destination_belongs_to_this_user_alone(
    server: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keras_remote_airflow.core.datasets.materialize import materialize

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    client = client_for(server.url)
    uri = upload(BUCKET, make_tree(tmp_path / "data", FILES), client=client, retry=FAST).gcs_uri
    dest = materialize(make_data_ref(uri, True), client=client, retry=FAST)
    base = os.path.dirname(dest)
    assert stat.S_IMODE(os.stat(base).st_mode) == 0o700
    os.chmod(base, 0o777)
    with pytest.raises(InvalidInputError, match="only this user"):
        materialize(make_data_ref(uri, True), client=client, retry=FAST)
