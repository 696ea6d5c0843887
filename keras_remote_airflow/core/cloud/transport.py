"""How a request reaches Cloud Storage: connections, access tokens, an event loop of its own.

Requests run on an event loop in a thread of their own, so that hundreds can be in flight with
little CPU, whether a script, a notebook or an Airflow task is the caller. The caller's thread
waits interruptibly: when a signal handler raises there (how Airflow ends a task), the transfers are
cancelled and the thread has ended before the exception goes on. Where the system refuses to start a
thread, the loop runs in the caller's.

Credentials and endpoint come from the google-cloud-storage client. Its own upload code costs about
2 ms of CPU per object, ten times what a plain request does.
"""

import asyncio
import os
import resource
import threading
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import asynccontextmanager, suppress
from types import MappingProxyType
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import quote

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from keras_remote_airflow.core.cloud.credentials import AccessTokens
from keras_remote_airflow.core.cloud.limiter import Limiter
from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.cloud.proxy import (
    find_proxy,
    is_from_proxy,
    proxy_refusal,
    trusted,
)
from keras_remote_airflow.core.cloud.retry import RefusedError, Retrier, RetryableError, failure
from keras_remote_airflow.core.errors import StoreError
from keras_remote_airflow.core.threads import Threads

_T = TypeVar("_T")

# In flight at the most: requests, and bytes that they hold in memory.
MAX_REQUESTS = 128
_MAX_BYTES = 32 << 20
_CONNECT_SECONDS = 30.0
_CLOSE_SECONDS = 2.0  # for what is under way; Airflow kills a task 5 s after it asked it to end
_THREADS = 32  # for what blocks, such as reading from a slow disk: as many as hashing uses
# Bytes of a streamed body that are read at a time.
_READ_BYTES = 1 << 20
_MAX_ANSWER_BYTES = 64 << 20  # a page of a listing has 15 MB at the most
_ERROR_BYTES = 4096  # of the body of an answer that was not expected
_GZIP = 31  # what zlib calls the gzip format
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Answer(NamedTuple):
    """The answer to a request, of an expected status, its body still to be read.

    The body is what the server stores or says: compression on the way is undone, and objects that
    are stored in gzip stay in gzip.
    """

    status: int
    headers: CIMultiDictProxy[str]
    body: AsyncIterator[bytes]


class Transport:
    """An authenticated pool of connections to the JSON API; a context manager.

    Attributes:
        retry: makes attempts until one succeeds; requests are made inside its attempts.

    Args:
        client: the google.cloud.storage.Client whose credentials, endpoint and extra headers to
            use.
        policy: when to retry.
        user_project: id of the project to bill, if the bucket uses Requester Pays
            (https://cloud.google.com/storage/docs/requester-pays); None bills the
            bucket's owner.
        limiter: how many requests may be in flight; None takes the defaults.
    """

    def __init__(
        self,
        client: Any,
        policy: RetryPolicy,
        user_project: str | None = None,
        limiter: Limiter | None = None,
    ) -> None:
        self._endpoint: str = client.api_endpoint.rstrip("/")
        self._stall_timeout = policy.stall_timeout
        self._user_project = f"userProject={quote(user_project, safe='')}" if user_project else ""
        limiter = limiter or Limiter(_most_requests(), _MAX_BYTES)
        self.retry = Retrier(policy, limiter, self._endpoint)
        # The client has no public names for its credentials and headers.
        self._tokens = AccessTokens(client._credentials)
        self._headers = _headers(client._initial_client_info, client._extra_headers)
        self._loop = asyncio.new_event_loop()
        # For what blocks: reading from slow disks, fetching tokens. Threads start when needed.
        self._loop.set_default_executor(Threads(_THREADS, "cloud-storage"))
        self._thread: threading.Thread | None = threading.Thread(
            target=self._run_loop, name="cloud-storage", daemon=True
        )
        self._unfinished: set[Future[Any]] = set()
        self._death: BaseException | None = None  # what ended the thread too early

    def __enter__(self) -> Self:
        try:
            self._start()
            self.run(self._open())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._thread is None:
                self._loop.run_until_complete(self._close())
            elif self._thread.is_alive():
                self._submit(self._close()).result(timeout=10)
        finally:
            self._stop()

    def _start(self) -> None:
        assert self._thread is not None  # noqa: S101 - a transport is entered once
        try:
            self._thread.start()
        except RuntimeError as exc:  # how Python says that the system refuses
            self._thread, self._death = None, exc

    def _stop(self) -> None:
        if self._thread is None:
            self._loop.close()
            return
        with suppress(RuntimeError):  # it has ended, or an interrupt came while it was started
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def _run_loop(self) -> None:
        try:
            is_stopped = False
            while not is_stopped:
                # A callback of the caller's may raise these. They end `run_forever`, but are the
                # result of its task as well: the loop has to go on for `run` to raise it.
                with suppress(SystemExit, KeyboardInterrupt):
                    self._loop.run_forever()
                    is_stopped = True
        except BaseException as exc:  # noqa: BLE001 - raised by `run`
            self._death = exc
            self._fail_unfinished()
        else:
            self._loop.close()

    def _check(self, work: Coroutine[Any, Any, Any]) -> None:
        """Raise if the thread is not there to do this work."""
        if self._thread is None or not self._thread.is_alive():
            work.close()
            raise self._gone()

    def _fail_unfinished(self) -> None:
        for future in list(self._unfinished):
            with suppress(InvalidStateError):  # it is cancelled just now
                future.set_exception(self._gone())

    def _gone(self) -> Exception:
        if self._death is None:
            return RuntimeError(
                "this store is closed, or was opened before the process forked, and its thread is "
                "not here: open another one"
            )
        return StoreError(
            f"the thread that makes the requests has ended ({self._death!r}). Try again. Where "
            "gevent replaces threads, let one transfer at a time run in a process.",
            transient=True,
        )

    async def _open(self) -> None:
        self._proxy = find_proxy(self._endpoint)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=trusted(self._endpoint, self._proxy)),
            cookie_jar=aiohttp.DummyCookieJar(),
            # `request` watches over what comes after the connection is there. aiohttp's own timeout
            # of reading begins only when the body is sent.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            auto_decompress=False,
            headers=self._headers,
        )
        # When a connection that was kept breaks, older versions of aiohttp send a PUT again by
        # themselves, with what is left of its body. There is no public switch for that.
        self._session._retry_connection = False

    async def _close(self) -> None:
        self._tokens.close()
        # A signal handler may have raised in `run` before it waited for its work.
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        # Without a thread, that exception may have cut off what would have woken one of them.
        await asyncio.wait([asyncio.gather(*left, return_exceptions=True)], timeout=_CLOSE_SECONDS)
        await self._session.close()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run `work` on the transport's loop and return its result.

        Whatever is raised in the waiting thread cancels the work, and waits for its end.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError(
                "an iterable that is passed to upload or download must not use its own store: the "
                "store's thread consumes it, and would wait for itself"
            )
        if self._thread is None:
            return self._loop.run_until_complete(work)
        self._check(work)
        finished = threading.Event()

        async def supervised() -> _T:
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

    async def arun(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do what `run` does for a caller on another event loop, which it never blocks.

        To cancel it cancels the work, and does not wait for its end.
        """
        return await asyncio.wrap_future(self._submit(work))

    def _submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        self._check(work)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        if self._death is not None:  # the thread may have overlooked this one
            self._fail_unfinished()
        return future

    @asynccontextmanager
    async def request(
        self,
        method: str,
        url: str,
        *,
        expected: tuple[int, ...] = (200,),
        headers: Mapping[str, str] = _NO_HEADERS,
        data: bytes | AsyncIterable[bytes] | None = None,
    ) -> AsyncIterator[Answer]:
        """Make one attempt at a request and yield the answer once its status is `expected`.

        Args:
            method: the HTTP method.
            url: below the endpoint, percent-encoded; or absolute, as an upload session's is.
            expected: statuses that the caller answers itself.
            headers: beside those of every request.
            data: the body.

        Raises:
            RetryableError: another attempt may succeed.
            RefusedError: no other attempt will.
            TimeoutError: for `stall_timeout` seconds no piece of the body was taken, and none of
                the answer came.
        """
        headers = await self._tokens.authorized(headers)
        # Setting a timer costs as much as reading a small file, so it is set a little later than
        # need be, and again only when what it adds is used up.
        patience = 1.01 * self._stall_timeout
        until = self._loop.time() + patience
        async with asyncio.timeout_at(until) as stalled:

            def moved() -> None:
                nonlocal until
                now = self._loop.time()
                if until < now + self._stall_timeout:
                    until = now + patience
                    stalled.reschedule(until)

            try:
                async with self._session.request(
                    method,
                    self._url(url),
                    headers=headers,
                    data=_watched(data, moved) if isinstance(data, AsyncIterable) else data,
                    proxy=self._proxy,
                    allow_redirects=False,
                ) as response:
                    if response.status not in expected:
                        raise await self._failure(response, headers)
                    self._tokens.note_accepted(headers)
                    body = _watched(response.content.iter_chunked(_READ_BYTES), moved)
                    if _is_compressed_on_the_way(response, url):
                        body = _decompressed(body)
                    yield Answer(response.status, response.headers, body)
            except aiohttp.ClientHttpProxyError as exc:  # the answer to CONNECT
                raise proxy_refusal(exc.status, exc.message, self._proxy) from None

    async def _failure(
        self, response: aiohttp.ClientResponse, headers: Mapping[str, str]
    ) -> RetryableError | RefusedError:
        """Return the error for an answer that was not expected; `headers` are the request's."""
        body = await response.content.read(_ERROR_BYTES)
        if response.headers.get("Content-Encoding") == "gzip":
            with suppress(zlib.error):
                body = zlib.decompressobj(_GZIP).decompress(body, _ERROR_BYTES)
        if is_from_proxy(response.status, response.headers, body):
            return proxy_refusal(response.status, response.reason or "", self._proxy)
        error = failure(response.status, body, response.headers.get("Retry-After", ""))
        if response.status == 401 and self._tokens.renew(headers):
            return RetryableError(str(error), 401)
        return error

    def _url(self, url: str) -> URL:
        if self._user_project and "userProject=" not in url:
            url += ("&" if "?" in url else "?") + self._user_project
        return URL(url if "://" in url else self._endpoint + url, encoded=True)

    async def exchange(
        self, method: str, url: str, *, at_most: int = _MAX_ANSWER_BYTES, **options: Any
    ) -> tuple[int, CIMultiDictProxy[str], bytes]:
        """Make one attempt at a request whose answer is small; return status, headers and body.

        Of a body of more than `at_most` bytes, little more than that is read. The other parameters
        and the errors are those of `request`.
        """
        pieces, size = [], 0
        async with self.request(method, url, **options) as answer:
            async for piece in answer.body:
                pieces.append(piece)
                size += len(piece)
                if size > at_most:
                    break
            return answer.status, answer.headers, b"".join(pieces)


def _most_requests() -> int:
    """Return how many requests may be in flight.

    Each opens a socket and a file. A third of the descriptors that are free is left to others.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MAX_REQUESTS
    try:
        opened = len(os.listdir("/dev/fd"))
    except OSError:
        opened = 0
    return max(1, min(MAX_REQUESTS, (limit - opened) // 3))


async def _watched(pieces: AsyncIterable[bytes], moved: Callable[[], None]) -> AsyncIterator[bytes]:
    """Yield the pieces; call `moved` when one has come, and when the next one is asked for."""
    async for piece in pieces:
        moved()
        yield piece
        moved()


async def _decompressed(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    gzip, is_empty = zlib.decompressobj(_GZIP), True
    try:
        async for piece in pieces:
            is_empty = False
            while piece:  # in bounded pieces: a file of zeros becomes a thousand times as large
                yield gzip.decompress(piece, _READ_BYTES)
                piece = gzip.unconsumed_tail
        yield gzip.flush()
    except zlib.error as exc:
        raise RetryableError(f"the compression of the answer is damaged ({exc})") from exc
    if not gzip.eof and not is_empty:
        raise RetryableError("the compressed answer ends too early")


def _is_compressed_on_the_way(response: aiohttp.ClientResponse, url: str) -> bool:
    """Tell whether a body has to be decompressed: it is JSON, or an object that isn't stored so."""
    if response.headers.get("Content-Encoding") != "gzip":
        return False
    is_object = "alt=media" in url and response.status in (200, 206)
    return not is_object or response.headers.get("X-Goog-Stored-Content-Encoding") == "identity"


def _headers(client_info: Any, extra: Mapping[str, str] | None) -> CIMultiDict[str]:
    """Return the headers of every request: what the client sends with its own, and ours.

    Args:
        client_info: the google.api_core ClientInfo that the client was made with, or None.
        extra: the client's `extra_headers`.
    """
    agent = client_info.to_user_agent() if client_info else ""
    headers = CIMultiDict({"User-Agent": f"{agent} keras-remote-airflow".strip()})
    headers.update(extra or {})
    # Without it Cloud Storage would send the decompressed bytes of gzip-encoded objects, which are
    # not the ones that size and CRC32C describe.
    headers["Accept-Encoding"] = "gzip"
    return headers
