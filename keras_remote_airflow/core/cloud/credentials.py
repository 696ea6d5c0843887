"""Access tokens: how they are fetched, and whether a failure to fetch one is an outage."""

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from keras_remote_airflow.core.cloud.retry import RETRYABLE, RefusedError, RetryableError

if TYPE_CHECKING:
    from google.auth.exceptions import GoogleAuthError

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"


class AccessTokens:
    """The tokens of one account, fetched when they are needed.

    Args:
        credentials: google.auth credentials; None or anonymous ones send no token.
    """

    def __init__(self, credentials: Any) -> None:
        self._credentials = _scoped(credentials)
        self._fetch: asyncio.Future[None] | None = None
        self._refused: str | None = None

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

    def renew(self, headers: Mapping[str, str]) -> bool:
        """Forget the token in the headers of a refused request; return whether to try another.

        A token may have been revoked. Each token is given up once, so that an account that is
        refused for another reason is not asked for tokens for ever.
        """
        refused = headers.get("authorization")
        if refused is None or self._refused not in (None, refused):
            return False
        if self._refused is None:
            self._refused = refused
            self._credentials.token = None
        return True

    def close(self) -> None:
        """Cancel a fetch that is under way."""
        if self._fetch:
            self._fetch.cancel()


def _scoped(credentials: Any) -> Any:
    """Return credentials good for reading and writing objects, or None for anonymous ones."""
    from google.auth.credentials import AnonymousCredentials, with_scopes_if_required

    if credentials is None or isinstance(credentials, AnonymousCredentials):
        return None
    # google.auth has no types.
    return with_scopes_if_required(credentials, [_SCOPE])  # type: ignore[no-untyped-call]


def _refresh(credentials: Any) -> None:
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import Request

    try:
        credentials.refresh(Request())
    except GoogleAuthError as exc:
        if is_outage(exc):
            raise RetryableError(f"no access token could be fetched ({exc})") from exc
        raise RefusedError(
            f"no access token could be fetched ({exc})", 401, "Check the credentials."
        ) from exc


def is_outage(error: "GoogleAuthError") -> bool:
    """Tell whether the same credentials may get a token later."""
    from google.auth.exceptions import TransportError

    # The metadata server's credentials wrap the TransportError, which has the answer, if any.
    outage = error if isinstance(error, TransportError) else error.__cause__
    if isinstance(outage, TransportError):
        status = getattr(outage.args[-1], "status", None) if outage.args else None
        return status is None or status in RETRYABLE
    # Token endpoints say whether to retry; for impersonation only the answer's JSON tells.
    with suppress(LookupError, TypeError, ValueError):
        return json.loads(error.args[1])["error"]["code"] in RETRYABLE
    return bool(error.retryable)
