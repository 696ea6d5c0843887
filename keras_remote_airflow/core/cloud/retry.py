"""Which failures are tried again, when, and the error for the last one."""

import asyncio
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
    400: (
        "The request itself was refused. If the bucket is one whose requester pays, pass "
        "user_project."
    ),
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
_SECONDS_BETWEEN_WARNINGS = 10.0


class RetryableError(Exception):
    """An attempt failed, and another may succeed. `Retrier.run` answers it."""

    def __init__(self, message: str, status: int | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class RefusedError(Exception):
    """An attempt failed, and so would any other. `Retrier.run` makes a StoreError of it."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


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
            await self._limiter.enter(size)
            try:
                try:
                    result = await attempt()
                finally:
                    self._limiter.leave(size)
                self._limiter.increase()
                return result
            except RefusedError as exc:
                raise StoreError(f"{what}: {exc}", status=exc.status) from exc.__cause__
            except _HOPELESS as exc:
                raise StoreError(
                    f"{what}: {_describe(exc)}. Check the endpoint and its certificate: "
                    f"{self._endpoint}, which must begin with https:// or http://"
                ) from _presentable(exc)
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
                remedy = "Try again later."
                if isinstance(error, aiohttp.ClientConnectorError):
                    remedy = f"Check that something answers at {self._endpoint}."
                raise StoreError(
                    f"{what} kept failing for {now - first_failure:.0f} s, {failures} "
                    f"attempts; the last: {_describe(error).rstrip('.')}. {remedy}",
                    status=status,
                    transient=True,
                ) from _presentable(error)
            _log.log(
                self._level(failures, now),
                "Trying again in %.1f s: %s failed (attempt %d, %s)",
                pause,
                what,
                failures,
                _describe(error),
            )
            await asyncio.sleep(pause)

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
    text = body.decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        text = str(json.loads(text)["error"]["message"])
    reason = f"HTTP {status} {_without_queries(' '.join(text.split())[:300]).rstrip('.')}".rstrip()
    if status in RETRYABLE:
        seconds = min(float(retry_after), 60.0) if retry_after.isdigit() else 0.0
        return RetryableError(reason, status, seconds)
    return RefusedError(f"{reason}. {REMEDIES.get(status, '')}".rstrip(), status)


def _describe(error: Exception) -> str:
    text = _without_queries(str(error))
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
