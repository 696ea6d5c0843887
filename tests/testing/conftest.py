from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pytest

from keras_remote_airflow.testing import StorageServer


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def reason(self) -> str:
        """The reason in a JSON error."""
        return str(self.json["error"]["errors"][0]["reason"])


class Caller:
    """Plain HTTP, one kept-alive connection, no client library's opinions."""

    def __init__(self, server: StorageServer) -> None:
        self.server = server
        self.connection = http.client.HTTPConnection(server.host, server.port, timeout=60)

    def __call__(
        self,
        method: str,
        path: str,
        body: bytes | dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        path = path.removeprefix(self.server.url)
        self.connection.request(method, path, data, headers or {})
        response = self.connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, response.read())

    def media(self, name: str, data: bytes, query: str = "", **headers: str) -> Answer:
        """A simple upload into the bucket "demo"."""
        path = f"/upload/storage/v1/b/demo/o?uploadType=media&name={quote(name, safe='')}{query}"
        return self("POST", path, data, {k.replace("_", "-"): v for k, v in headers.items()})

    def multipart(
        self, metadata: dict[str, Any], data: bytes, query: str = "", **headers: str
    ) -> Answer:
        body = (
            b"--sep\r\nContent-Type: application/json\r\n\r\n"
            + json.dumps(metadata).encode()
            + b"\r\n--sep\r\nContent-Type: text/csv\r\n\r\n"
            + data
            + b"\r\n--sep--\r\n"
        )
        sent = {"Content-Type": 'multipart/related; boundary="sep"'}
        sent |= {k.replace("_", "-"): v for k, v in headers.items()}
        return self("POST", f"/upload/storage/v1/b/demo/o?uploadType=multipart{query}", body, sent)

    def resumable(self, metadata: dict[str, Any], query: str = "", **headers: str) -> Answer:
        """Begin a resumable upload; the session is in the header `location`."""
        return self(
            "POST",
            f"/upload/storage/v1/b/demo/o?uploadType=resumable{query}",
            metadata,
            {k.replace("_", "-"): v for k, v in headers.items()},
        )

    def download(self, name: str, query: str = "", **headers: str) -> Answer:
        path = f"/download/storage/v1/b/demo/o/{quote(name, safe='')}?alt=media{query}"
        return self("GET", path, None, {k.replace("_", "-"): v for k, v in headers.items()})


@pytest.fixture(params=["memory", "folder"])
def server(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[StorageServer]:
    """A server with the bucket "demo": every test runs against memory and against a folder."""
    directory = tmp_path / "storage" if request.param == "folder" else None
    with StorageServer(buckets=["demo"], directory=directory) as running:
        yield running


@pytest.fixture
def call(server: StorageServer) -> Iterator[Caller]:
    caller = Caller(server)
    yield caller
    caller.connection.close()


@pytest.fixture
def new_caller() -> Iterator[Callable[[StorageServer], Caller]]:
    """For tests that start a server, or open a second connection, of their own."""
    callers: list[Caller] = []

    def make(server: StorageServer) -> Caller:
        callers.append(Caller(server))
        return callers[-1]

    yield make
    for caller in callers:
        caller.connection.close()
