"""Access tokens: whose, how they are fetched, and whether a failure is an outage."""

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from keras_remote_airflow.core.cloud.retry import RETRYABLE, RetryableError
from keras_remote_airflow.core.errors import StoreError

if TYPE_CHECKING:
    from google.auth.exceptions import GoogleAuthError

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"


def scoped(credentials: Any) -> Any:
    """Return credentials good for reading and writing objects, or None for anonymous ones."""
    from google.auth.credentials import AnonymousCredentials, with_scopes_if_required

    if credentials is None or isinstance(credentials, AnonymousCredentials):
        return None
    # google.auth has no types.
    return with_scopes_if_required(credentials, [_SCOPE])  # type: ignore[no-untyped-call]


def refresh(credentials: Any) -> None:
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
        return status is None or status in RETRYABLE
    # Token endpoints say it themselves; of impersonation there is only the answer's JSON.
    with suppress(LookupError, TypeError, ValueError):
        return json.loads(error.args[1])["error"]["code"] in RETRYABLE
    return bool(error.retryable)
