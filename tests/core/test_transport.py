"""How requests get to Cloud Storage: whose account pays, through which proxy, with which token."""

import asyncio
import concurrent.futures
import datetime
import errno
import gzip
import http.client
import http.server
import os
import shutil
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from google.api_core.client_info import ClientInfo
from google.api_core.exceptions import Forbidden, ServiceUnavailable
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import OAuthError, RefreshError, TransportError
from google.cloud import storage
from google.oauth2.credentials import Credentials

from keras_remote_airflow import make_data_ref, materialize
from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.cloud.proxy import trusted
from keras_remote_airflow.core.cloud.store import FileToSend, ObjectToFetch, list_objects
from keras_remote_airflow.core.cloud.transport import Transport
from keras_remote_airflow.core.datasets.lookup import find
from keras_remote_airflow.core.datasets.upload import upload
from keras_remote_airflow.core.disk.hashing import take_snapshot
from keras_remote_airflow.core.errors import StoreError
from keras_remote_airflow.testing import Fault

from .conftest import on_disk

HOST = "storage.invalid"  # no name server knows it, so who gets there went through the proxy
FILES = {"small": b"s", "medium": b"m" * (2 << 20), "large": b"l" * (9 << 20)}


class Relay(http.server.ThreadingHTTPServer):
    """Hands every request on to one server: a forwarding proxy, or, in TLS, a server.

    Attributes:
        seen: method, target and headers of each request.
        refuses: a method, and the status that it answers to such requests by itself.
        compresses: whether it compresses answers for clients that accept that.
    """

    daemon_threads = True

    def __init__(self, url: str, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _RelayHandler)
        self.target = urlsplit(url).hostname, urlsplit(url).port
        self.seen: list[tuple[str, str, Message]] = []
        self.refuses: tuple[str, int] = ("", 0)
        self.compresses = False
        self.scheme = "https" if tls else "http"
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Print nothing: clients that are refused hang up."""


class _RelayHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Relay

    def relay(self) -> None:
        self.server.seen.append((self.command, self.path, self.headers))
        if self.command == self.server.refuses[0]:
            self.refuse()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        connection = http.client.HTTPConnection(*self.server.target)
        try:
            path = f"{url.path}?{url.query}"
            connection.request(self.command, path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                if name == "Location":
                    value = urlsplit(value)._replace(scheme=self.server.scheme).geturl()
                self.send_header(name, value)
        if self.server.compresses and answer.status == 200:
            content = gzip.compress(content)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self) -> None:
        """Answer as a proxy does, without waiting for the body, and hang up."""
        page = b"<html>Ask your administrator</html>"
        self.send_response(self.server.refuses[1])
        self.send_header("Proxy-Authenticate", 'Basic realm="proxy"')
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)
        with suppress(OSError):  # closed with bytes unread, it could take the answer away
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(1 << 16):
                pass
        self.close_connection = True

    do_GET = do_POST = do_PUT = relay  # noqa: N815 - the base class's names

    def do_CONNECT(self) -> None:
        self.server.seen.append((self.command, self.path, self.headers))
        if self.command == self.server.refuses[0]:
            self.refuse()
            return
        with socket.create_connection(self.server.target) as other:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_pipe, args=(other, self.connection))
            back.start()
            _pipe(self.connection, other)
            back.join(10)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


def _pipe(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):  # either side may be the first to hang up
        with source.makefile("rb", 0) as incoming, target.makefile("wb", 0) as outgoing:
            shutil.copyfileobj(incoming, outgoing)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def serving(relay: Relay) -> Iterator[Relay]:
    with relay:
        threading.Thread(target=relay.serve_forever, args=[0.01], daemon=True).start()
        yield relay
        relay.shutdown()


@pytest.fixture
def proxy(gcs_server, monkeypatch) -> Iterator[Relay]:
    """A proxy that leads to the server, and the environment that names it.

    For names, not for addresses of this machine: what else runs in this process must not use it.
    """
    for name in ("http_proxy", "HTTPS_PROXY", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with serving(Relay(gcs_server.url)) as relay:
        monkeypatch.setenv("http_proxy", relay.url)
        yield relay


def client_for(endpoint: str, credentials: Any = None, **options: Any) -> storage.Client:
    return storage.Client(
        project="test-project",
        credentials=credentials or AnonymousCredentials(),
        client_options={"api_endpoint": endpoint, **options.pop("client_options", {})},
        **options,
    )


def there_and_back(client: storage.Client, bucket: str, root: Path, copy: Path) -> None:
    """Do everything that sends requests."""
    result = upload(bucket, root, client=client)
    assert find(bucket, result.content_hash, client=client).files == len(FILES)
    materialize(make_data_ref(result.gcs_uri, True), str(copy), client=client)
    assert on_disk(copy) == FILES


def test_proxy_carries_every_request(proxy, gcs_server, gcs_bucket, tree, tmp_path):
    there_and_back(client_for(f"http://{HOST}"), gcs_bucket, tree(FILES), tmp_path / "copy")
    assert {urlsplit(target).hostname for _, target, _ in proxy.seen} == {HOST}
    assert len(proxy.seen) == len(gcs_server.requests)
    assert {method for method, _, _ in proxy.seen} == {"GET", "POST", "PUT"}


def test_tls_goes_through_the_proxy_unopened(gcs_server, gcs_bucket, tree, tmp_path, monkeypatch):
    certificate = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with serving(Relay(gcs_server.url, context)) as server, serving(Relay(server.url)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        client = client_for(f"https://{HOST}", Credentials("secret-token"))
        there_and_back(client, gcs_bucket, tree(FILES), tmp_path / "copy")
    assert {(method, target) for method, target, _ in proxy.seen} == {("CONNECT", f"{HOST}:443")}
    assert all("secret" not in str(headers) for _, _, headers in proxy.seen)
    assert {headers["Authorization"] for _, _, headers in server.seen} == {"Bearer secret-token"}


@pytest.mark.parametrize("status", [403, 407])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "CONNECT"])
def test_refusal_of_a_proxy_is_called_its_own_and_is_final(
    proxy, gcs_bucket, tree, tmp_path, monkeypatch, method, status
):
    scheme = "https" if method == "CONNECT" else "http"
    monkeypatch.setenv(f"{scheme}_proxy", proxy.url.replace("//", "//name:secret@"))
    proxy.refuses = method, status
    with pytest.raises(
        StoreError, match=rf"proxy 127\S+:{proxy.server_port} .*HTTP {status}"
    ) as raised:
        there_and_back(client_for(f"{scheme}://{HOST}"), gcs_bucket, tree(FILES), tmp_path / "copy")
    assert (raised.value.status, raised.value.transient) == (status, False)
    assert "secret" not in str(raised.value)
    assert sum(seen == method for seen, _, _ in proxy.seen) <= len(FILES)


def test_refusal_on_the_way_is_not_cloud_storages_without_a_named_proxy_either(proxy, gcs_bucket):
    proxy.refuses = "GET", 403
    client = client_for(proxy.url)
    with open_bucket(gcs_bucket, client) as store, pytest.raises(StoreError) as raised:
        store.read("x")
    assert "firewall" in str(raised.value)
    assert "objectViewer" not in str(raised.value)
    assert (raised.value.status, raised.value.transient) == (403, False)


def test_outage_of_a_proxy_is_ridden_out(proxy, gcs_bucket, monkeypatch):
    monkeypatch.setenv("https_proxy", proxy.url)
    proxy.refuses = "CONNECT", 503
    with (
        open_bucket(
            gcs_bucket, client_for(f"https://{HOST}"), retry=RetryPolicy(0.1, 0.01)
        ) as store,
        pytest.raises(StoreError, match=r"the proxy .*HTTP 503") as raised,
    ):
        store.read("x")
    assert raised.value.transient


def test_answers_that_are_compressed_on_the_way_are_read(proxy, gcs_bucket, tree, tmp_path):
    proxy.compresses = True
    there_and_back(client_for(f"http://{HOST}"), gcs_bucket, tree(FILES), tmp_path / "copy")
    assert {headers["Accept-Encoding"] for _, _, headers in proxy.seen} == {"gzip"}
    # A few kilobytes on the wire become nine megabytes, which are never in memory together.
    steps: list[int] = []
    with open_bucket(gcs_bucket, client_for(f"http://{HOST}")) as store:
        [large] = [info for info in list_objects(store, "") if info.name.endswith("/large")]
        wanted = ObjectToFetch(large, str(tmp_path / "large"))
        store.download([wanted], lambda _: None, steps.append)
    assert max(steps) <= 2 << 20 < sum(step for step in steps if step > 0)


def make_certificate(folder: Path) -> Path:
    """Write a key and a certificate for HOST that it has signed itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_no_proxy_is_honoured(proxy, gcs_server, gcs_bucket, tree, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    there_and_back(client_for(gcs_server.url), gcs_bucket, tree(FILES), tmp_path / "copy")
    assert proxy.seen == []


def test_proxy_is_looked_up_once(proxy, gcs_bucket, tree, monkeypatch):
    import requests.utils

    asked = []
    look_up = requests.utils.get_environ_proxies
    monkeypatch.setattr(
        requests.utils, "get_environ_proxies", lambda url: asked.append(url) or look_up(url)
    )
    upload(gcs_bucket, tree(FILES), client=client_for(f"http://{HOST}"))
    assert asked == [f"http://{HOST}"]
    assert len(proxy.seen) > len(FILES)


@pytest.mark.parametrize(
    ("credentials", "options"),
    [
        (Credentials("token", quota_project_id="billed-project"), {}),
        (Credentials("token"), {"client_options": {"quota_project_id": "billed-project"}}),
        (None, {"extra_headers": {"X-Goog-User-Project": "billed-project"}}),
    ],
    ids=["credentials", "client options", "extra headers"],
)
def test_every_request_names_the_project_that_pays(
    proxy, gcs_bucket, tree, tmp_path, credentials, options
):
    client = client_for(f"http://{HOST}", credentials, **options)
    there_and_back(client, gcs_bucket, tree(FILES), tmp_path / "copy")
    assert {method for method, _, _ in proxy.seen} == {"GET", "POST", "PUT"}
    named = {headers["x-goog-user-project"] for _, _, headers in proxy.seen}
    assert named == {"billed-project"}


def test_headers_of_the_client_travel_with_every_request(proxy, gcs_bucket, tree, tmp_path):
    client = client_for(
        f"http://{HOST}",
        client_info=ClientInfo(user_agent="a-team/1.0"),
        extra_headers={"x-tenant": "vision", "accept-encoding": "identity"},
    )
    there_and_back(client, gcs_bucket, tree(FILES), tmp_path / "copy")
    assert {method for method, _, _ in proxy.seen} == {"GET", "POST", "PUT"}
    assert {headers["X-Tenant"] for _, _, headers in proxy.seen} == {"vision"}
    assert all("a-team/1.0" in headers["User-Agent"] for _, _, headers in proxy.seen)
    # Else Cloud Storage would decompress objects that are stored in gzip.
    assert {tuple(headers.get_all("Accept-Encoding")) for _, _, headers in proxy.seen} == {
        ("gzip",)
    }


def test_every_request_names_the_project_that_is_billed(gcs_server, gcs_bucket, tree, tmp_path):
    root = tree(FILES)
    gcs_server.add_fault(Fault(method="PUT", action="drop_after"))  # its session is asked, too
    with open_bucket(gcs_bucket, retry=RetryPolicy(initial=0.01), user_project="a b") as store:
        store.create("marker", b"{}")
        store.upload(files_of(root), lambda *_: None)
        store.upload(files_of(root), lambda *_: None)
        wanted = [ObjectToFetch(o, str(tmp_path / o.name)) for o in list_objects(store, "")]
        store.download(wanted, lambda _: None)
        assert store.read("marker") == b"{}"
    assert {request.method for request in gcs_server.requests} == {"GET", "POST", "PUT"}
    assert {request.query.get("userProject") for request in gcs_server.requests} == {"a b"}


def files_of(root: Path) -> list[FileToSend]:
    return [
        FileToSend(str(root / f.path), f.path, f.size, f.mtime_ns, f.crc32c, f.digest)
        for f in take_snapshot(str(root)).records()
    ]


class ShortLived(Credentials):
    """A token that is good for an hour, and fetched from nowhere."""

    def __init__(self) -> None:
        super().__init__(None)
        self.refreshes = 0

    def refresh(self, request: object) -> None:
        self.refreshes += 1
        self.token = f"token-{self.refreshes}"
        now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)  # as google.auth has it
        self.expiry = now + datetime.timedelta(hours=1)


def test_token_that_expires_under_way_is_refreshed_once(proxy, gcs_bucket, tree):
    credentials = ShortLived()
    root = tree({f"{number:03}": "content" for number in range(200)})
    files = files_of(root)
    stored = 0

    def done(*_: object) -> None:
        nonlocal stored
        stored += 1
        if stored == 60:
            credentials.expiry -= datetime.timedelta(hours=2)

    with open_bucket(gcs_bucket, client_for(f"http://{HOST}", credentials)) as store:
        store.upload(files, done)
    assert stored == 200
    assert credentials.refreshes == 2
    tokens = [headers["Authorization"] for _, _, headers in proxy.seen]
    assert tokens.count("Bearer token-1") >= 60
    assert tokens.count("Bearer token-2") == 200 - tokens.count("Bearer token-1") > 0


async def asking(transport: Transport, *request, **options):
    return await transport.retry.run("asking", lambda: transport.exchange(*request, **options))


class Stuck(ShortLived):
    """A token that cannot be fetched, which takes a while to tell."""

    def refresh(self, request: object) -> None:
        self.refreshes += 1
        time.sleep(0.3)
        raise TransportError("the token server does not answer")


def test_token_that_cannot_be_fetched_holds_up_all_requests_together(gcs_server):
    async def requests() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(16):
                group.create_task(asking(transport, "GET", "/storage/v1/b"))

    credentials = Stuck()
    client = client_for(gcs_server.url, credentials)
    policy = RetryPolicy(deadline=0.5, initial=0.01)
    with Transport(client, policy) as transport, pytest.raises(ExceptionGroup) as raised:
        transport.run(requests())
    assert "token server does not answer" in str(raised.value.exceptions[0])
    assert credentials.refreshes <= 4  # in turn, the first would try again after 16


def wrapped(outage: Exception) -> Exception:
    """As the metadata server's credentials have it."""
    try:
        raise RefreshError(outage) from outage
    except RefreshError as error:
        return error


def answered(status: int) -> requests.Response:
    response = requests.Response()
    response.status_code = status
    return response


@pytest.mark.parametrize(
    "outage",
    [
        TransportError("no route"),
        wrapped(TransportError("no route")),
        wrapped(TransportError("busy", SimpleNamespace(status=503))),
        RefreshError("503 from the token endpoint", retryable=True),
        RefreshError("Unable to acquire impersonated credentials", '{"error": {"code": 503}}'),
        requests.ConnectionError("no route"),
        requests.HTTPError("busy", response=answered(503)),
        ServiceUnavailable("busy"),
    ],
    ids=[
        "network",
        "metadata server",
        "its answer",
        "token endpoint",
        "impersonation",
        "requests",
        "requests' answer",
        "google.api_core",
    ],
)
def test_outage_of_whoever_gives_tokens_is_ridden_out(gcs_server, gcs_bucket, tmp_path, outage):
    class Flaky(ShortLived):
        def refresh(self, request: object) -> None:
            super().refresh(request)
            if self.refreshes < 3:
                self.token = None
                raise outage

    (tmp_path / "file").touch()
    client = client_for(gcs_server.url, Flaky())
    policy = RetryPolicy(deadline=60, initial=0.01, maximum=0.1)
    assert upload(gcs_bucket, tmp_path, client=client, retry=policy).uploaded_files == 1


@pytest.mark.parametrize(
    "refusal",
    [
        RefreshError("not allowed", {"error": "invalid_grant"}),
        wrapped(TransportError("not allowed", SimpleNamespace(status=403))),
        RefreshError("not allowed", '{"error": {"code": 403}}'),
        requests.HTTPError("not allowed", response=answered(403)),
        Forbidden("not allowed"),
    ],
    ids=["token endpoint", "metadata server", "impersonation", "requests", "google.api_core"],
)
def test_credentials_that_are_refused_are_not_tried_again(
    gcs_server, gcs_bucket, tmp_path, refusal
):
    class Revoked(ShortLived):
        def refresh(self, request: object) -> None:
            self.refreshes += 1
            raise refusal

    credentials = Revoked()
    with pytest.raises(StoreError, match=r"not allowed.*Check the credentials") as raised:
        upload(gcs_bucket, tmp_path, client=client_for(gcs_server.url, credentials))
    assert (raised.value.status, credentials.refreshes) == (401, 1)


@pytest.mark.parametrize("status", [503, 403])
def test_status_of_a_token_endpoint_counts_though_the_error_lacks_it(
    gcs_server, gcs_bucket, tmp_path, status
):
    class Federated(ShortLived):
        def refresh(self, request: Any) -> None:
            super().refresh(request)
            if request(f"{gcs_server.url}/token", method="POST").status == status:
                self.token = None
                raise OAuthError("<html>", "<html>")

    (tmp_path / "file").touch()
    gcs_server.add_fault(Fault(path="/token", status=status, times=2))
    client = client_for(gcs_server.url, Federated())
    policy = RetryPolicy(deadline=60, initial=0.01, maximum=0.1)
    with pytest.raises(StoreError) if status == 403 else nullcontext():
        upload(gcs_bucket, tmp_path, client=client, retry=policy)
    asked = [request.status for request in gcs_server.requests if "/token" in request.path]
    assert asked.count(status) == (1 if status == 403 else 2)


@pytest.mark.parametrize("status", [403, 407])
def test_proxy_that_refuses_the_way_to_a_token_is_named_at_once(proxy, gcs_bucket, tree, status):
    class Behind(ShortLived):
        def refresh(self, request: Any) -> None:
            self.refreshes += 1
            cause = OSError(f"Tunnel connection failed: {status} No way")
            raise TransportError(requests.exceptions.ProxyError(cause))

    credentials = Behind()
    with pytest.raises(StoreError, match=f"proxy.*{status} No way") as raised:
        upload(gcs_bucket, tree(FILES), client=client_for(f"http://{HOST}", credentials))
    assert (raised.value.status, credentials.refreshes) == (status, 1)


def test_missing_credentials_are_one_error_without_googles_frames(
    monkeypatch, gcs_bucket, tree, tmp_path
):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    for path in (tmp_path / "gone.json", tmp_path):
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
        with pytest.raises(StoreError, match="no Google Cloud credentials") as raised:
            upload(gcs_bucket, tree(FILES, path.name + "-data"))
        assert (raised.value.status, raised.value.transient) == (401, False)
        assert "google/auth" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("size", [0, 100, 100_000], ids=["no body", "small", "large"])
@pytest.mark.parametrize(
    "words", [b"", b"HTTP/1.1 100 Continue\r\n\r\n"], ids=["silent", "continue"]
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_whoever_never_answers_is_given_up_on(proxy, monkeypatch, scheme, words, size):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        monkeypatch.setenv(f"{scheme}_proxy", address)
        stop = threading.Event()
        threading.Thread(target=_accept, args=(mute, words, stop), daemon=True).start()
        policy = RetryPolicy(deadline=0.5, initial=0.01, stall_timeout=0.3)
        with Transport(client_for(f"{scheme}://{HOST}"), policy) as transport:
            data = b"x" * size or None
            with pytest.raises(StoreError, match="no answer in time"):
                transport.run(asking(transport, "POST", "/", data=data))
        stop.set()


def test_an_answer_that_comes_slowly_is_not_given_up_on():
    def answer_slowly(server: socket.socket) -> None:
        connection = server.accept()[0]
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        for byte in b"patience!":
            stop.wait(0.2)
            connection.sendall(bytes([byte]))
        stop.wait(60)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as slow:
        stop = threading.Event()
        threading.Thread(target=answer_slowly, args=(slow,), daemon=True).start()
        policy = RetryPolicy(deadline=0, stall_timeout=1.0)
        client = client_for(f"http://127.0.0.1:{slow.getsockname()[1]}")
        with Transport(client, policy) as transport:
            status, _, body = transport.run(asking(transport, "GET", "/"))
            assert (status, body) == (200, b"patience!")
        stop.set()


def _accept(server: socket.socket, words: bytes, stop: threading.Event) -> None:
    connections = []
    with suppress(OSError):
        while not stop.is_set():
            connections.append(server.accept()[0])
            connections[-1].sendall(words)


def test_work_that_is_left_when_the_transport_closes_is_cancelled():
    begun, cancelled = threading.Event(), threading.Event()

    async def work():
        begun.set()
        await asyncio.sleep(60)

    def wait(transport):
        try:
            transport.run(work())
        except concurrent.futures.CancelledError:
            cancelled.set()

    with Transport(client_for(f"http://{HOST}"), RetryPolicy()) as transport:
        waiting = threading.Thread(target=wait, args=[transport], daemon=True)
        waiting.start()
        assert begun.wait(10)
    assert cancelled.wait(10)


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("when", ["at once", "while it works"])
def test_whoever_waits_for_a_thread_that_ends_too_early_is_told(when, monkeypatch):
    real = asyncio.BaseEventLoop.run_forever

    def run_forever(loop):
        if when != "at once":
            real(loop)
        raise OSError("the selector broke")

    async def work():
        asyncio.get_running_loop().stop()
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.BaseEventLoop, "run_forever", run_forever)
    transport = Transport(client_for(f"http://{HOST}"), RetryPolicy())
    with pytest.raises(StoreError, match="the selector broke") as raised, transport:
        transport.run(work())
    assert raised.value.transient


def test_where_no_thread_can_be_started_everything_is_done_without(
    gcs_server, gcs_bucket, tree, tmp_path, monkeypatch
):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    files = FILES | {f"{number}": b"s" * number for number in range(40)}
    client = client_for(gcs_server.url, ShortLived())
    result = upload(gcs_bucket, tree(files), client=client)
    assert result.uploaded_files == len(files)
    materialize(make_data_ref(result.gcs_uri, True), str(tmp_path / "copy"), client=client)
    assert on_disk(tmp_path / "copy") == files


@pytest.mark.slow
@pytest.mark.parametrize("thread", ["thread", "no thread"])
def test_closing_ends_though_the_work_does_not(monkeypatch, thread):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    async def deaf() -> None:
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.get_running_loop().create_future()

    async def begin() -> None:
        begun.append(asyncio.create_task(deaf()))
        await asyncio.sleep(0)

    if thread == "no thread":
        monkeypatch.setattr(threading.Thread, "start", refuse)
    begun: list[Any] = []
    with Transport(client_for(f"http://{HOST}"), RetryPolicy()) as transport:
        transport.run(begin())
    assert begun[0].cancelling()


@pytest.mark.parametrize("problem", ["No such file", "no certificate", "not connected"])
def test_authorities_that_cannot_be_read_are_named(problem, tmp_path, monkeypatch):
    bundle = tmp_path / "bundle.pem"
    if problem != "No such file":
        bundle.write_text("no certificate")
    if problem == "not connected":  # a mount that died
        real = os.stat

        def dead(path, *args, **kwargs):
            if path == str(bundle):
                raise OSError(errno.ENOTCONN, problem, path)
            return real(path, *args, **kwargs)

        monkeypatch.setattr(os, "stat", dead)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
    with pytest.raises(StoreError, match=f"{problem}.*{bundle}"):
        trusted(f"https://{HOST}")
