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

from keras_remote_airflow._compat import make_gcs_hook
from keras_remote_airflow.arguments import rendered, rendered_chain

if TYPE_CHECKING:
    from google.cloud.storage import Client


def connect(gcp_conn_id: str, impersonation_chain: str | Sequence[str] | None) -> "Client":
    """Return the Cloud Storage client that an Airflow connection stands for.

    Raises:
        InvalidInputError: an argument was rendered to something else than text.
        StoreError: there are no credentials.
        Exception: what Airflow raises if it can't get the connection, be it missing or not.
    """
    from google.auth.exceptions import GoogleAuthError
    from requests import RequestException

    from keras_remote_airflow.core.cloud.credentials import credentials_error

    hook = make_gcs_hook(
        gcp_conn_id=rendered("gcp_conn_id", gcp_conn_id),
        impersonation_chain=rendered_chain(impersonation_chain),
    )
    try:
        return hook.get_conn()
    except (GoogleAuthError, RequestException) as exc:
        raise credentials_error(exc) from None
