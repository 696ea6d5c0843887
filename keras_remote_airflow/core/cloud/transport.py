"""How a request reaches Cloud Storage: connections, retries, concurrency.

The only place that retries. Requests run on an event loop in a thread of their own, so that
hundreds can be in flight for little CPU, whoever calls: a script, a notebook whose loop is busy,
an Airflow task. The caller's thread waits interruptibly: when a signal handler raises there (how
Airflow ends a task), the transfers are cancelled and the thread is gone before the exception
goes on.

The google-cloud-storage client lends its credentials and its endpoint. Its own upload path
costs about 2 ms of CPU per object, ten times what a plain request does.
"""

import asyncio
import logging
import os
import ssl
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self, TypeVar

import aiohttp
from yarl import URL

from keras_remote_airflow.core.cloud.credentials import refresh, scoped
from keras_remote_airflow.core.cloud.limiter import Limiter
from keras_remote_airflow.core.cloud.retry import RETRYABLE, RetryableError, RetryPolicy, describe, presentable, refusal
from keras_remote_airflow.core.errors import StoreError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_THROTTLED = frozenset({429, 503})
# Network errors that no further attempt will mend.
_HOPELESS = (
    aiohttp.ClientConnectorCertificateError,
    aiohttp.InvalidURL,
    aiohttp.NonHttpUrlClientError,
)
_CONNECT = 30.0  # seconds until a connection must be there
# For what `_Watch` watches from beginning to end.
_NO_READ_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT)
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_THREADS = 32  # for what blocks, such as reading from a slow disk: as many as hashing uses
_WARNING_INTERVAL = 10.0  # seconds between two warnings that something is tried again
# Entered while a task pauses before it tries again: others may go on in its place.
pausing: ContextVar[Callable[[], AbstractContextManager[None]]] = ContextVar(
    "pausing", default=nullcontext
)


class Transport:
    """An authenticated pool of connections to the JSON API; a context manager.

    Args:
        client: the google.cloud.storage.Client whose credentials and endpoint to use.
        policy: when to retry.
        concurrency: requests in flight at the most.
        max_bytes: bytes of payload held in memory at the most.
    """

    def __init__(
        self, client: Any, policy: RetryPolicy, concurrency: int = 128, max_bytes: int = 32 << 20
    ) -> None:
        self.endpoint: str = client.api_endpoint.rstrip("/")
        self.policy = policy
        self.concurrency = concurrency
        self.limiter = Limiter(concurrency, max_bytes)
        # The client has no public name for its credentials.
        self._credentials = scoped(client._credentials)
        self._next_warning = 0.0
        self._refused_authorization: str | None = None
        self._refresh: asyncio.Future[None] | None = None
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        # For what blocks: reading from slow disks, fetching tokens. Threads start when needed.
        self._loop.set_default_executor(ThreadPoolExecutor(_THREADS, "cloud-storage"))
        self._thread = threading.Thread(target=self._loop.run_forever, name="cloud-storage")
        self._thread.daemon = True

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.run(self._open())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._submit(self._close()).result(timeout=10)
        finally:
            self._stop()

    async def _open(self) -> None:
        self._proxy = _proxy(self.endpoint)
        self._watch = _Watch(self._loop, self.policy.stall_timeout)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=_tls(self.endpoint, self._proxy)),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=_CONNECT, sock_read=self.policy.stall_timeout
            ),
            auto_decompress=False,
            # Without it Cloud Storage would send the decompressed bytes of gzip-encoded objects,
            # which are not the ones that size and CRC32C describe.
            headers={"Accept-Encoding": "gzip", "User-Agent": "keras-remote-airflow"},
        )

        # aiohttp sends a PUT again by itself when a connection it had kept breaks: large uploads
        # would start anew instead of going on. It has no public switch for that.
        self._session._retry_connection = False

    async def _close(self) -> None:
        if self._refresh:
            self._refresh.cancel()
        await self._session.close()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run `work` on the transport's loop and return its result.

        Whatever is raised in the waiting thread cancels the work, and waits for its end.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError(
                "what is handed to upload or download is consumed on the store's own thread and "
                "must not use its own store: the call would wait for itself"
            )
        if os.getpid() != self._pid:
            work.close()
            raise RuntimeError(
                "this store was opened before the process forked, and its thread is not here: open "
                "another one"
            )
        finished = threading.Event()

        async def supervised() -> _T:
            pausing.set(nullcontext)  # the caller's context may be that of another transport's task
            try:
                return await work
            finally:
                finished.set()

        future = self._submit(supervised())
        try:
            return future.result()
        except BaseException:
            if future.cancel():
                finished.wait(10)
            raise

    def _submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        if not self._thread.is_alive():
            self._loop.close()

    async def retrying(
        self,
        what: str,
        size: int,
        attempt: Callable[[], Awaitable[_T]],
        position: Callable[[], int] = int,
    ) -> _T:
        """Await `attempt` until it succeeds, fails for good, or the deadline passes.

        Args:
            what: the operation in words, for messages: "uploading gs://bucket/name".
            size: bytes that an attempt keeps in memory.
            attempt: makes one attempt; raises RetryableError, or a network error, for another.
            position: how far the attempts have come; one that came further starts the count of
                failures anew, so that a long transfer survives any number of dropped connections.
        """
        failures, first_failure, reached = 0, 0.0, position()
        while True:
            await self.limiter.enter(size)
            try:
                try:
                    result = await attempt()
                finally:
                    self.limiter.leave(size)
                self.limiter.succeeded()
            except _HOPELESS as exc:
                raise StoreError(
                    f"{what}: {describe(exc)}. Check the endpoint and its certificate: "
                    f"{self.endpoint}, which must begin with https:// or http://"
                ) from presentable(exc)
            except (RetryableError, aiohttp.ClientError, TimeoutError, ConnectionError) as exc:
                status = getattr(exc, "status", None)
                now = time.monotonic()
                if position() > reached:
                    failures, first_failure, reached = 0, 0.0, position()
                failures += 1
                first_failure = first_failure or now
                # On a slow line it is our own number of requests that makes them time out.
                if status in _THROTTLED or isinstance(exc, TimeoutError):
                    self.limiter.throttled()
                pause = max(self.policy.pause(failures), getattr(exc, "retry_after", 0.0))
                if now + pause - first_failure > self.policy.deadline:
                    remedy = "Try again later."
                    if isinstance(exc, aiohttp.ClientConnectorError):
                        remedy = f"Check that something answers at {self.endpoint}."
                    raise StoreError(
                        f"{what} kept failing for {now - first_failure:.0f} s, {failures} "
                        f"attempts; the last: {describe(exc).rstrip('.')}. {remedy}",
                        status=status,
                        transient=True,
                    ) from presentable(exc)
                _log.log(
                    self._level(failures, now),
                    "%s failed (attempt %d, %s); trying again in %.1f s",
                    what,
                    failures,
                    describe(exc),
                    pause,
                )
                with pausing.get()():
                    await asyncio.sleep(pause)
            else:
                return result

    def _level(self, failures: int, now: float) -> int:
        """Return how loudly to log a failure: an outage hits hundreds of requests at once."""
        if failures < 2 or now < self._next_warning:
            return logging.DEBUG
        self._next_warning = now + _WARNING_INTERVAL
        return logging.WARNING

    @asynccontextmanager
    async def request(
        self,
        what: str,
        method: str,
        url: str,
        *,
        expected: tuple[int, ...],
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Make one attempt at a request and yield the response once its status is `expected`.

        Raises RetryableError or StoreError, as the status says, for any other.

        Args:
            what: as in `retrying`.
            method: the HTTP method.
            url: below the endpoint, percent-encoded; or absolute, as an upload session's is.
            expected: statuses that the caller answers itself.
            headers: beside those of every request.
        """
        headers = await self._authorized(headers)
        # Once the answer has begun, aiohttp watches: whoever reads it may take their time.
        with _Exchange(self._watch):
            response = await self._begin(what, method, url, expected, headers)
        async with response:
            yield response

    async def exchange(
        self,
        what: str,
        method: str,
        url: str,
        *,
        expected: tuple[int, ...],
        headers: Mapping[str, str] = _NO_HEADERS,
        data: Any = None,
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Make one attempt at a request whose answer is small; return status, headers and body.

        Parameters and errors are those of `request`; `data` is bytes, or an asynchronous iterator
        over them.
        """
        headers = await self._authorized(headers)
        with _Exchange(self._watch, data) as exchange:
            response = await self._begin(
                what,
                method,
                url,
                expected,
                headers,
                data=exchange.body,
                timeout=_NO_READ_TIMEOUT,
            )
            async with response:
                body = [piece async for piece in exchange.watched(response.content.iter_any())]
                return response.status, response.headers, b"".join(body)

    async def _begin(
        self,
        what: str,
        method: str,
        url: str,
        expected: tuple[int, ...],
        headers: Mapping[str, str],
        **options: Any,
    ) -> aiohttp.ClientResponse:
        full_url = URL(url if "://" in url else self.endpoint + url, encoded=True)
        response = await self._session.request(
            method, full_url, headers=headers, proxy=self._proxy, allow_redirects=False, **options
        )
        if response.status in expected:
            return response
        async with response:
            error = refusal(what, response.status, await response.content.read(4096))
            if response.status in RETRYABLE or (
                response.status == 401 and self._may_reauthorize(headers.get("authorization"))
            ):
                message = str(error).removeprefix(f"{what}: ")
                raise RetryableError(message, response.status, _retry_after(response))
            raise error

    async def call(
        self,
        what: str,
        method: str,
        url: str,
        *,
        expected: tuple[int, ...] = (200,),
        **options: Any,
    ) -> tuple[int, bytes]:
        """Send a request whose answer is small, retrying; return status and body."""

        async def attempt() -> tuple[int, bytes]:
            status, _, body = await self.exchange(what, method, url, expected=expected, **options)
            return status, body

        return await self.retrying(what, len(options.get("data") or b""), attempt)

    async def _authorized(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers with the access token, which may have to be fetched."""
        credentials = self._credentials
        if credentials is None:
            return headers
        if not credentials.valid:
            # One fetch for all who wait, and its failure is everybody's: if each tried in turn, a
            # token server that never answers would hold us up for as many times its timeout.
            if self._refresh is None or self._refresh.done():
                self._refresh = self._loop.run_in_executor(None, refresh, credentials)
            await asyncio.shield(self._refresh)
        authorized = dict(headers)
        credentials.apply(authorized)
        return authorized

    def _may_reauthorize(self, refused: str | None) -> bool:
        """Forget a refused token so that the next attempt fetches another; only ever one."""
        if refused is None or self._refused_authorization not in (None, refused):
            return False
        if self._refused_authorization is None:
            self._refused_authorization = refused
            self._credentials.token = None
        return True


class _Watch:
    """Ends exchanges in which nothing has moved for too long.

    It looks at all of them now and then, which costs less than a timer for each.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, stall_timeout: float) -> None:
        self._loop = loop
        self._seconds = stall_timeout
        self.exchanges: set[_Exchange] = set()
        self._look()

    def _look(self) -> None:
        now = time.monotonic()
        for exchange in self.exchanges:
            if now - exchange.moved_at > self._seconds:
                exchange.end()
        self._loop.call_later(max(self._seconds / 16, 0.01), self._look)


class _Exchange:
    """A request and its answer, under watch; a context manager.

    `body` is what to send; its pieces, if it comes in pieces, pass `watched`. Raises TimeoutError
    when for `stall_timeout` seconds no piece of it was taken and none of the answer came. aiohttp's
    own timeout begins when the body is sent and a connection to the server itself, not a proxy, is
    there.
    """

    def __init__(self, watch: _Watch, body: Any = None) -> None:
        self.body = self if isinstance(body, AsyncIterator) else body
        self.moved_at = time.monotonic()
        self._pieces = body
        self._watch = watch
        self._stalled = False
        self._begun = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - requests are made in tasks
        self._task = task
        self._cancelling = task.cancelling()
        self._watch.exchanges.add(self)
        return self

    def end(self) -> None:
        """Cancel what waits for this exchange, once."""
        if not self._stalled:
            self._stalled = True
            self._task.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._watch.exchanges.discard(self)
        # As asyncio.timeout does it: cancelled by the watch alone, or by somebody else as well?
        if (
            self._stalled
            and self._task.uncancel() <= self._cancelling
            and isinstance(error, asyncio.CancelledError)
        ):
            raise TimeoutError from error

    def __aiter__(self) -> AsyncIterator[bytes]:
        # Should aiohttp ever send a PUT again by itself after all (see `Transport._open`): it would
        # go on in the middle of the body.
        if self._begun:
            raise ConnectionResetError("the connection broke")
        self._begun = True
        return self.watched(self._pieces)

    async def watched(self, pieces: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        """Yield the pieces, each of which is a sign of life."""
        async for piece in pieces:
            self.moved_at = time.monotonic()
            yield piece


def _proxy(url: str) -> str | None:
    """Return the proxy that the environment names for `url`, as the requests library reads it.

    Asked once: aiohttp's own `trust_env` asks for every request, in a thread, which costs more
    than the request.
    """
    from requests.utils import get_environ_proxies, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    if not proxy:
        return None
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    if not proxy.startswith(("http://", "https://")):
        scheme = proxy.partition("://")[0]
        raise StoreError(
            f"the environment names a {scheme} proxy for {url}: only HTTP proxies can be used. Set "
            "HTTPS_PROXY to one, or exempt the host with NO_PROXY."
        )
    return proxy


def _tls(*urls: str | None) -> ssl.SSLContext | Literal[True]:
    """Return what to trust at `urls`: the system's authorities, and those that requests trusts.

    So that a proxy that inspects traffic is trusted here as it is when tokens are fetched.
    """
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if not bundle or not any(url and url.startswith("https://") for url in urls):
        return True
    return _trusting(bundle, os.path.getmtime(bundle) if os.path.exists(bundle) else 0.0)


# Reading the certificates takes longer than a look into the cache of data. By its time of
# modification a bundle that was replaced is read again.
@lru_cache(1)
def _trusting(bundle: str, _modified: float) -> ssl.SSLContext:
    context = ssl.create_default_context()
    try:
        if os.path.isdir(bundle):
            context.load_verify_locations(capath=bundle)
        else:
            context.load_verify_locations(cafile=bundle)
    except OSError as exc:
        raise StoreError(
            f"REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names {bundle}, which cannot be used as CA "
            f"certificates ({exc.strerror or exc}). Correct or unset it."
        ) from exc
    return context


def _retry_after(response: aiohttp.ClientResponse) -> float:
    value = response.headers.get("Retry-After", "")
    return min(float(value), 60.0) if value.isdigit() else 0.0
