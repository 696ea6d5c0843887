"""Credentials of an Airflow connection.

Every operator, sensor and decorator takes these three, all of them templated:

    gcp_conn_id          id of a Google Cloud connection. It is fetched when the task runs, and only
                         if there is something to ask Cloud Storage. Reading needs
                         roles/storage.objectViewer on the bucket, uploading needs
                         roles/storage.objectCreator too.
    impersonation_chain  service account to impersonate, or a list: each impersonates the next, and
                         the last is used; None leaves that to the connection.
    user_project         id of the project to bill, if the bucket uses Requester Pays; None bills
                         the bucket's own project.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from keras_remote_airflow._compat import AirflowException, make_gcs_hook
from keras_remote_airflow.arguments import rendered, rendered_chain
from keras_remote_airflow.core.errors import InvalidInputError

if TYPE_CHECKING:
    from google.cloud.storage import Client


def connect(gcp_conn_id: str, impersonation_chain: str | Sequence[str] | None) -> "Client":
    """Return the Cloud Storage client that an Airflow connection stands for.

    Raises:
        InvalidInputError: an argument was rendered to something else than text, or the key in the
            connection is malformed.
        StoreError: there are no credentials, or they can't be read now.
        Exception: what Airflow raises if it can't get the connection, be it missing or not.
    """
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    from keras_remote_airflow.core.cloud.credentials import credentials_error, words

    connection = rendered("gcp_conn_id", gcp_conn_id)
    # This fetches the connection. Its errors are left as they are, see `failures`.
    hook = make_gcs_hook(
        gcp_conn_id=connection, impersonation_chain=rendered_chain(impersonation_chain)
    )
    try:
        return hook.get_conn()
    except (
        GoogleAuthError,
        GoogleAPIError,
        OSError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        AirflowException,
    ) as exc:
        if not _is_about_the_key(exc):
            raise credentials_error(exc, connection) from None
        reason = f"{exc} is missing" if isinstance(exc, KeyError) else words(exc)
        raise InvalidInputError(
            f"the key in connection {connection!r} cannot be used ({reason}). Correct the "
            "connection."
        ) from None


def _is_about_the_key(error: Exception) -> bool:
    """Return whether the key was read, and no retry will mend it."""
    # Google's provider raises AirflowException for malformed JSON, and also if the Secret Manager,
    # where the key may be, is away. What it met before tells them apart.
    met = error.__context__ if isinstance(error, AirflowException) else error
    malformed = isinstance(met, LookupError | ValueError | TypeError | AttributeError)
    return malformed and not isinstance(met, OSError)
