"""Repeats failed requests; turns the last failure into a StoreError."""

import asyncio
import errno
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import aiohttp

from keras_remote_airflow.core.cloud.limiter import Limiter
from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.errors import StoreError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# https://cloud.google.com/storage/docs/retry-strategy#retryable
RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
_THROTTLED = frozenset({429, 503})
REMEDIES = {
    400: "The request itself was refused. If the bucket uses Requester Pays, pass user_project.",
    401: "The credentials were not accepted: check the connection or the service account key.",
    403: (
        "The account lacks a permission on the bucket: it needs roles/storage.objectViewer to "
        "read, roles/storage.objectCreator to upload."
    ),
    404: "Check the bucket's name, and that it exists.",
}
# Network errors that no further attempt will mend.
_HOPELESS = (
    aiohttp.ClientConnectorCertificateError,
    aiohttp.InvalidURL,
    aiohttp.NonHttpUrlClientError,
)
_SECONDS_BETWEEN_WARNINGS = 10.0


class RetryableError(Exception):
    """An attempt failed, and another may succeed. `Retrier.run` answers it."""

    def __init__(self, message: str, status: int | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class RefusedError(Exception):
    """An attempt failed, and so would any other. `Retrier.run` makes a StoreError of it.

    The error says `message`, then what was refused, then the remedy.
    """

    def __init__(self, message: str, status: int | None = None, remedy: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.remedy = remedy


class Retrier:
    """Makes attempts at requests until one succeeds; the only place that tries again.

    Args:
        policy: when to try again.
        limiter: how many attempts are made at a time.
        endpoint: what the requests go to, for messages.
    """

    def __init__(self, policy: RetryPolicy, limiter: Limiter, endpoint: str) -> None:
        self._policy = policy
        self._limiter = limiter
        self._endpoint = endpoint
        self._next_warning = 0.0

    async def run(
        self,
        what: str,
        attempt: Callable[[], Awaitable[_T]],
        size: int = 0,
        position: Callable[[], int] = int,
    ) -> _T:
        """Await `attempt` until it succeeds, is refused, or the deadline passes.

        Args:
            what: the operation in words, for messages: "uploading gs://bucket/name".
            attempt: makes one attempt; raises RetryableError, or a network error, to be called
                again.
            size: bytes that an attempt keeps in memory.
            position: how far the attempts have come; one that came further starts the count of
                failures anew, so that a long transfer survives any number of dropped connections.

        Raises:
            StoreError: the request was refused, or kept failing until the deadline.
        """
        failures, first_failure, reached = 0, 0.0, position()
        while True:
            try:
                return await self._once(what, attempt, size)
            except (RetryableError, aiohttp.ClientError, TimeoutError, ConnectionError) as exc:
                error = exc
            now = time.monotonic()
            if position() > reached:
                failures, reached = 0, position()
            failures += 1
            if failures == 1:
                first_failure = now
            status = getattr(error, "status", None)
            # On a slow line, too many requests at once make each other time out.
            if status in _THROTTLED or isinstance(error, TimeoutError):
                self._limiter.decrease()
            pause = max(self._policy.pause(failures), getattr(error, "retry_after", 0.0))
            if now + pause - first_failure > self._policy.deadline:
                raise StoreError(
                    f"gave up after {failures} attempts in {now - first_failure:.0f} s: "
                    f"{_describe(error).rstrip('.')}: {what}. {self._remedy(error)}",
                    status=status,
                    transient=True,
                ) from _presentable(error)
            _log.log(
                self._level(failures, now),
                "Trying again in %.1f s, attempt %d failed (%s): %s",
                pause,
                failures,
                _describe(error),
                what,
            )
            await asyncio.sleep(pause)

    async def _once(self, what: str, attempt: Callable[[], Awaitable[_T]], size: int) -> _T:
        """Make one attempt when its turn has come."""
        await self._limiter.enter(size)
        try:
            result = await attempt()
        except RefusedError as exc:
            message = f"{exc}: {what}. {exc.remedy}".rstrip()
            raise StoreError(message, status=exc.status) from exc.__cause__
        except _HOPELESS as exc:
            raise StoreError(
                f"cannot use the endpoint {self._endpoint}: {_describe(exc).rstrip('.')} "
                f"({what}). Check its certificate, and that it begins with https:// or http://."
            ) from _presentable(exc)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not this task was cancelled, but something that it waited for.
            raise RetryableError("it was cancelled from within") from None
        except OSError as exc:
            # aiohttp calls it a network error if a file that it streams can't be read.
            if isinstance(exc.__cause__, OSError) and exc.__cause__.filename:
                raise exc.__cause__ from None
            if exc.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._limiter.decrease()
            raise RetryableError(str(exc)) from exc
        finally:
            self._limiter.leave(size)
        self._limiter.increase()
        return result

    def _remedy(self, error: Exception) -> str:
        """Return what to do about an error that stayed until the deadline."""
        if isinstance(error, aiohttp.ClientConnectorError):
            whom = "the proxy " if isinstance(error, aiohttp.ClientProxyConnectionError) else ""
            return f"Check that something answers at {whom}{error.host}:{error.port}."
        return REMEDIES[401] if getattr(error, "status", None) == 401 else "Try again later."

    def _level(self, failures: int, now: float) -> int:
        """Return how loudly to log a failure: an outage hits hundreds of requests at once."""
        if failures < 2 or now < self._next_warning:
            return logging.DEBUG
        self._next_warning = now + _SECONDS_BETWEEN_WARNINGS
        return logging.WARNING


def failure(status: int, body: bytes, retry_after: str = "") -> RetryableError | RefusedError:
    """Return the error for an answer that was not expected.

    Args:
        status: its HTTP status.
        body: its body, or the beginning of it: Cloud Storage's JSON with a reason, or any text.
        retry_after: its Retry-After header.
    """
    if is_markup(body) and status not in RETRYABLE:
        return not_understood(f"HTTP {status} with a web page", status)
    text = "with a web page" if is_markup(body) else body.decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        text = str(json.loads(text)["error"]["message"])
    reason = f"HTTP {status} {_without_queries(' '.join(text.split())[:300]).rstrip('.')}".rstrip()
    if status in RETRYABLE:
        seconds = min(float(retry_after), 60.0) if retry_after.isdecimal() else 0.0
        return RetryableError(reason, status, seconds)
    return RefusedError(reason, status, REMEDIES.get(status, ""))


def is_markup(body: bytes) -> bool:
    """Tell whether a body is HTML or XML, as the JSON API never answers."""
    return body.lstrip().startswith(b"<")


def not_understood(found: object, status: int | None = None) -> RefusedError:
    """Return the error for an answer that Cloud Storage would not give."""
    return RefusedError(
        f"the server's answer is not a Cloud Storage answer, or is incomplete ({found})",
        status,
        "Check the endpoint, STORAGE_EMULATOR_HOST and the proxy.",
    )


def _describe(error: Exception) -> str:
    # aiohttp names the TLS context, for endpoints of plain HTTP too.
    text = re.sub(r" ssl:(\w+|<[^>]*>)", "", _without_queries(str(error)))
    if isinstance(error, TimeoutError):
        return f"no answer in time ({text or 'stalled'})"
    return text or type(error).__name__


def _presentable(error: Exception) -> Exception:
    """Return the error, or a copy of it without the query of a URL.

    Tracebacks show causes, and everybody who knows the URL of an upload session can write to it.
    """
    text = str(error)
    return error if text == _without_queries(text) else RetryableError(_describe(error))


def _without_queries(text: str) -> str:
    return re.sub(r"\?[^\s'\"]+", "?…", text)
