"""Access tokens: how they are fetched, and whether a failure to fetch one is an outage."""

import asyncio
import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from google.auth.credentials import AnonymousCredentials, with_scopes_if_required
from google.auth.exceptions import TransportError
from google.auth.transport.requests import Request
from requests import RequestException

from keras_remote_airflow.core.cloud.proxy import find_proxy, proxy_refusal
from keras_remote_airflow.core.cloud.retry import RETRYABLE, RefusedError, RetryableError
from keras_remote_airflow.core.errors import StoreError

_log = logging.getLogger(__name__)

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_TOKEN_SERVER = "https://oauth2.googleapis.com"
# google.auth waits 120 s for each answer, in a thread that the process waits for at its end.
_TOKEN_SECONDS = 30
_NO_ANSWER = (TransportError, RequestException, ConnectionError, TimeoutError)


class AccessTokens:
    """The tokens of one account, fetched when they are needed.

    Args:
        credentials: google.auth credentials; None or anonymous ones send no token.
    """

    def __init__(self, credentials: Any) -> None:
        self._credentials = _scoped(credentials)
        self._fetch: asyncio.Future[None] | None = None
        self._refused = ""
        self._may_renew = True

    async def authorized(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers with an access token, fetched now if there is none that is valid.

        Raises:
            RetryableError: no token can be fetched now.
            RefusedError: these credentials get no token.
        """
        credentials = self._credentials
        if credentials is None:
            return headers
        if not credentials.valid:
            # All requests share one fetch, and its failure. If they fetched in turn, each of them
            # would wait for the timeout of a token server that never answers.
            if self._fetch is None or self._fetch.done():
                loop = asyncio.get_running_loop()
                self._fetch = loop.run_in_executor(None, _refresh, credentials)
            await asyncio.shield(self._fetch)
        authorized = dict(headers)
        credentials.apply(authorized)
        return authorized

    def note_accepted(self, headers: Mapping[str, str]) -> None:
        """Note that a request with these headers was not refused for its token."""
        if not self._may_renew and headers.get("authorization") != self._refused:
            self._may_renew = True

    def renew(self, headers: Mapping[str, str]) -> bool:
        """Forget the token in the headers of a refused request; return whether to try another.

        A token may have been revoked. If its successor is refused before any request with it was
        accepted, then the account is refused, and is not asked for tokens for ever.
        """
        refused = headers.get("authorization")
        if refused is None:
            return False
        if refused == self._refused:  # by another request, or once more: some services keep tokens
            return not self._credentials.token or self._authorization() != refused
        if not self._may_renew:
            return False
        self._refused, self._may_renew = refused, False
        self._credentials.token = None
        return True

    def _authorization(self) -> str:
        headers: dict[str, str] = {}
        self._credentials.apply(headers)
        return headers["authorization"]

    def close(self) -> None:
        """Cancel a fetch that is under way."""
        if self._fetch:
            self._fetch.cancel()


def credentials_error(error: Exception, connection: str = "") -> StoreError:
    """Return the error to raise where a client could not be made, without the frames of its cause.

    Args:
        error: any exception of google.auth, requests or google.api_core.
        connection: id of the Airflow connection that the client was to be made of, if any.
    """
    _log.debug("No credentials", exc_info=error)
    refusal = _proxys_refusal(error, _TOKEN_SERVER)
    outage = isinstance(refusal, RetryableError) if refusal else _is_outage(error)
    of, remedy = "", "Name a key file in GOOGLE_APPLICATION_CREDENTIALS"
    if connection:
        of, remedy = f" for connection {connection!r}", "Name a key in the connection"
    return StoreError(
        f"no Google Cloud credentials{of} ({refusal or words(error)}). {remedy}, or give the "
        "machine a service account.",
        status=refusal.status if refusal else None if outage else 401,
        transient=outage,
    )


def _scoped(credentials: Any) -> Any:
    """Return credentials good for reading and writing objects, or None for anonymous ones."""
    if credentials is None or isinstance(credentials, AnonymousCredentials):
        return None
    # google.auth has no types.
    return with_scopes_if_required(credentials, [_SCOPE])  # type: ignore[no-untyped-call]


class _Request(Request):
    """Remembers what was asked last, and the status of the answer: errors often lack it."""

    url = _TOKEN_SERVER
    status: int | None = None

    def __call__(self, url: str, *args: Any, **options: Any) -> Any:
        self.url, self.status = url, None
        options.setdefault("timeout", _TOKEN_SECONDS)
        answer = super().__call__(url, *args, **options)  # type: ignore[no-untyped-call] # as above
        self.status = answer.status
        return answer


def _refresh(credentials: Any) -> None:
    request = _Request()
    try:
        credentials.refresh(request)
    except Exception as exc:  # noqa: BLE001 - credentials are others' code and raise what they like
        # Frames of google.auth, requests and urllib3 would fill a task's log.
        _log.debug("No access token", exc_info=True)
        if refusal := _proxys_refusal(exc, request.url):
            raise refusal from None
        error = RefusedError(
            f"no access token could be fetched ({words(exc)})", 401, "Check the credentials."
        )
        raise RetryableError(str(error)) if _is_outage(exc, request.status) else error from None


def words(error: Exception) -> str:
    """Return what an exception of another library says, in one line."""
    text = str(error.args[0] if error.args else error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.strerror}: {error.filename}"
    return " ".join(text.split())[:300].rstrip(".") or repr(error)


def _proxys_refusal(error: Exception, url: str) -> RetryableError | RefusedError | None:
    """Return the error to raise if a proxy on the way to `url` has refused the request."""
    tunnel = re.search(r"Tunnel connection failed: (\d{3}) ?([\w ]*)", str(error))
    if tunnel is None and _status(error) != 407:
        return None
    status, reason = (int(tunnel[1]), tunnel[2]) if tunnel else (407, "")
    return proxy_refusal(status, reason, find_proxy(url))


def _is_outage(error: Exception, status: int | None = None) -> bool:
    """Tell whether the same credentials may get a token later.

    Args:
        error: any exception of google.auth, requests or google.api_core.
        status: HTTP status of the answer that led to it, if that is known.
    """
    if status is None or status < 400:
        status = _status(error)
    if status in RETRYABLE or getattr(error, "retryable", False):
        return True
    got_no_answer = isinstance(error, _NO_ANSWER) or isinstance(error.__cause__, _NO_ANSWER)
    return status is None and got_no_answer


def _status(error: Any, depth: int = 4) -> int | None:
    """Return the HTTP status that an error carries, or one of what it was made of."""
    for name in ("status", "status_code", "code"):  # google.auth, requests, google.api_core
        if isinstance(status := getattr(error, name, None), int):
            return status
    if isinstance(error, str):  # impersonation has the answer's JSON
        with suppress(LookupError, TypeError, ValueError):
            return int(json.loads(error)["error"]["code"])
    parts: tuple[Any, ...] = ()
    if depth and isinstance(error, BaseException):
        parts = (getattr(error, "response", None), *error.args, error.__cause__)
    return next((s for part in parts if (s := _status(part, depth - 1)) is not None), None)
