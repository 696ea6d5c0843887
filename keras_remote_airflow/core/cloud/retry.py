"""When to try a request again, and what to say of one that failed."""

import json
import random
import re
from contextlib import suppress
from dataclasses import dataclass

from keras_remote_airflow.core.errors import StoreError

# https://cloud.google.com/storage/docs/retry-strategy#retryable
RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
_REMEDIES = {
    400: "The request itself was refused.",
    401: "The credentials were not accepted: check the connection or the service account key.",
    403: (
        "The account lacks a permission on the bucket: roles/storage.objectViewer reads it, "
        "roles/storage.objectCreator adds to it."
    ),
    404: "Check the bucket's name, and that it exists.",
}


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


def refusal(what: str, status: int, body: bytes) -> StoreError:
    """Return the error for an answer that no retry will change: its reason, and what to do."""
    text = body.decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    reason = _without_queries(" ".join(text.split())[:300]).rstrip(".")
    message = f"{what}: HTTP {status} {reason}".rstrip()
    return StoreError(f"{message}. {_REMEDIES.get(status, '')}".rstrip(), status=status)


def describe(error: Exception) -> str:
    text = _without_queries(str(error))
    if isinstance(error, TimeoutError):
        return f"no answer in time ({text or 'stalled'})"
    return text or type(error).__name__


def presentable(error: Exception) -> Exception:
    """Return the error, or a copy if its text, which a traceback shows, spells a URL's query.

    Whoever knows the URL of an upload session can write to it.
    """
    text = str(error)
    return error if text == _without_queries(text) else RetryableError(describe(error))


def _without_queries(text: str) -> str:
    return re.sub(r"\?[^\s'\"]+", "?…", text)
