"""How a request reaches Cloud Storage: credentials, connections, retries, concurrency.

The only place that retries. Requests run on an event loop in a thread of their own, so that
hundreds can be in flight for little CPU, whoever calls: a script, a notebook whose loop is busy,
an Airflow task. The caller's thread waits interruptibly: when a signal handler raises there (how
Airflow ends a task), the transfers are cancelled and the thread is gone before the exception
goes on.

The google-cloud-storage client lends its credentials and its endpoint. Its own upload path
costs about 2 ms of CPU per object, ten times what a plain request does.
"""

import asyncio
import json
import logging
import os
import random
import re
import ssl
import threading
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import aiohttp
from yarl import URL

from keras_remote_airflow.core.errors import StoreError

if TYPE_CHECKING:
    from google.auth.exceptions import GoogleAuthError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# https://cloud.google.com/storage/docs/retry-strategy#retryable
_RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
_THROTTLED = frozenset({429, 503})
_REMEDIES = {
    400: "The request itself was refused.",
    401: "The credentials were not accepted: check the connection or the service account key.",
    403: (
        "The account lacks a permission on the bucket: roles/storage.objectViewer reads it, "
        "roles/storage.objectCreator adds to it."
    ),
    404: "Check the bucket's name, and that it exists.",
}
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
# CPU time over wall time of the thread that makes the requests: above the first it is busy, below
# the second it has time for more of them.
_BUSY, _IDLE = 0.9, 0.75
_ENOUGH = 32.0  # requests in flight, to keep the thread busy
_WARNING_INTERVAL = 10.0  # seconds between two warnings that something is tried again
# Entered while a task pauses before it tries again: others may go on in its place.
pausing: ContextVar[Callable[[], AbstractContextManager[None]]] = ContextVar(
    "pausing", default=nullcontext
)
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"


@dataclass(frozen=True)
class RetryPolicy:
    """When to try again, and when to give up.

    Attributes:
        deadline: seconds a request may go on failing, counted from its first failure or its last
            progress. 120 is the google-cloud-storage client's own default.
        initial: seconds of the first pause at the most; each further one is twice as long, and
            each is drawn at random up to its bound ("full jitter").
        maximum: seconds of the longest pause.
        stall_timeout: seconds without a byte from the server after which a request counts as
            failed.
    """

    deadline: float = 120.0
    initial: float = 0.5
    maximum: float = 30.0
    stall_timeout: float = 60.0

    def pause(self, failures: int) -> float:
        """Return how many seconds to wait after this many failures in a row."""
        bound = min(self.maximum, self.initial * 2.0 ** min(failures - 1, 30))
        return random.uniform(0, bound)  # noqa: S311 - jitter, not a secret


class RetryableError(Exception):
    """One attempt failed in a way that the next may not; never leaves this module's `retrying`."""

    def __init__(self, message: str, status: int | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class Limiter:
    """How many requests, and how many bytes held for them, may be in flight.

    The number doubles with each round of answers at first, then grows by one a round; it halves
    when the service asks for less (429, 503), which is what Cloud Storage's ramp-up guidance wants
    (https://cloud.google.com/storage/docs/request-rate#ramp-up). It sinks while the thread that
    makes the requests has no time left: more would only wait for it, and with 128 in flight each
    costs a fifth more than with 32, in caches missed and garbage looked for.

    Args:
        maximum: requests in flight at the most.
        max_bytes: bytes in flight at the most; a single larger request goes alone.
    """

    def __init__(self, maximum: int, max_bytes: int) -> None:
        self.limit = float(min(16, maximum))
        self._threshold = float(maximum)
        self._maximum = float(maximum)
        self._max_bytes = max_bytes
        self._requests = 0
        self._bytes = 0
        self._throttled_at = 0.0
        # The answers left of this round, the clocks when it began, and CPU time over wall time of
        # the last one.
        self._answers = 0
        self._wall = self._cpu = self._busy = 0.0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def _fits(self, size: int) -> bool:
        return self._requests < self.limit and (
            not self._requests or self._bytes + size <= self._max_bytes
        )

    def has_room(self) -> bool:
        """Tell whether more than the next request would get a place at once."""
        return not self.is_crowded() and self._requests + 1 < self.limit

    def is_crowded(self) -> bool:
        """Tell whether requests wait for a place."""
        return any(not turn.done() for _, turn in self._waiting)

    async def enter(self, size: int) -> None:
        """Take a place for a request that keeps `size` bytes in memory, as soon as one is free.

        Whoever took one calls `leave`.
        """
        if not self._waiting and self._fits(size):
            self._take(size)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(size)
            raise

    def _take(self, size: int) -> None:
        self._requests += 1
        self._bytes += size

    def leave(self, size: int) -> None:
        """Give a place back."""
        self._requests -= 1
        self._bytes -= size
        while self._waiting and (self._waiting[0][1].done() or self._fits(self._waiting[0][0])):
            waiting_size, turn = self._waiting.popleft()
            if not turn.done():
                self._take(waiting_size)
                turn.set_result(None)

    def succeeded(self) -> None:
        self._answers -= 1
        if self._answers <= 0:
            self._begin_round()
            if self._busy > _BUSY:
                self.limit = max(min(_ENOUGH, self.limit), 0.75 * self.limit)
        if self.limit < self._maximum and self._busy < _IDLE:
            more = 1.0 if self.limit < self._threshold else 1.0 / self.limit
            self.limit = min(self._maximum, self.limit + more)

    def _begin_round(self) -> None:
        wall, cpu = time.monotonic(), time.thread_time()
        self._busy = (cpu - self._cpu) / max(wall - self._wall, 1e-6)
        self._answers, self._wall, self._cpu = int(self.limit), wall, cpu

    def throttled(self) -> None:
        # All requests of one round hear the same "too many": that is one reason to halve.
        now = time.monotonic()
        if now - self._throttled_at > 1.0:
            self._throttled_at = now
            self.limit = self._threshold = max(1.0, self.limit / 2)


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
        self._credentials = _scoped(client._credentials)
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
                    f"{what}: {_describe(exc)}. Check the endpoint and its certificate: "
                    f"{self.endpoint}, which must begin with https:// or http://"
                ) from _presentable(exc)
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
                        f"attempts; the last: {_describe(exc).rstrip('.')}. {remedy}",
                        status=status,
                        transient=True,
                    ) from _presentable(exc)
                _log.log(
                    self._level(failures, now),
                    "%s failed (attempt %d, %s); trying again in %.1f s",
                    what,
                    failures,
                    _describe(exc),
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
            if response.status in _RETRYABLE or (
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
                self._refresh = self._loop.run_in_executor(None, _refresh, credentials)
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


def _scoped(credentials: Any) -> Any:
    """Return credentials good for reading and writing objects, or None for anonymous ones."""
    from google.auth.credentials import AnonymousCredentials, with_scopes_if_required

    if credentials is None or isinstance(credentials, AnonymousCredentials):
        return None
    # google.auth has no types.
    return with_scopes_if_required(credentials, [_SCOPE])  # type: ignore[no-untyped-call]


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


def _refresh(credentials: Any) -> None:
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import Request

    try:
        credentials.refresh(Request())
    except GoogleAuthError as exc:
        if is_outage(exc):
            raise RetryableError(f"no access token could be fetched: {exc}") from exc
        raise StoreError(
            f"no access token could be fetched: {exc}. Check the credentials.", status=401
        ) from exc


def is_outage(error: "GoogleAuthError") -> bool:
    """Tell whether the same credentials may get a token later."""
    from google.auth.exceptions import TransportError

    # The metadata server's credentials wrap the TransportError, which has the answer, if any.
    outage = error if isinstance(error, TransportError) else error.__cause__
    if isinstance(outage, TransportError):
        status = getattr(outage.args[-1], "status", None) if outage.args else None
        return status is None or status in _RETRYABLE
    # Token endpoints say it themselves; of impersonation there is only the answer's JSON.
    with suppress(LookupError, TypeError, ValueError):
        return json.loads(error.args[1])["error"]["code"] in _RETRYABLE
    return bool(error.retryable)


def refusal(what: str, status: int, body: bytes) -> StoreError:
    """Return the error for an answer that no retry will change: its reason, and what to do."""
    text = body.decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    reason = _without_queries(" ".join(text.split())[:300]).rstrip(".")
    message = f"{what}: HTTP {status} {reason}".rstrip()
    return StoreError(f"{message}. {_REMEDIES.get(status, '')}".rstrip(), status=status)


def _describe(error: Exception) -> str:
    text = _without_queries(str(error))
    if isinstance(error, TimeoutError):
        return f"no answer in time ({text or 'stalled'})"
    return text or type(error).__name__


def _presentable(error: Exception) -> Exception:
    """Return the error, or a copy if its text, which a traceback shows, spells a URL's query.

    Whoever knows the URL of an upload session can write to it.
    """
    text = str(error)
    return error if text == _without_queries(text) else RetryableError(_describe(error))


def _without_queries(text: str) -> str:
    return re.sub(r"\?[^\s'\"]+", "?…", text)


def _retry_after(response: aiohttp.ClientResponse) -> float:
    value = response.headers.get("Retry-After", "")
    return min(float(value), 60.0) if value.isdigit() else 0.0
