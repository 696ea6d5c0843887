"""Open a bucket: with which client, for which project."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from keras_remote_airflow.core.cloud.policy import RetryPolicy

if TYPE_CHECKING:
    from keras_remote_airflow.core.cloud.gcs import GcsStore

_VARIABLES = ("KERAS_REMOTE_PROJECT", "GOOGLE_CLOUD_PROJECT")


def get_default_project() -> str | None:
    """Return the project id named by the environment, or None.

    Reads `KERAS_REMOTE_PROJECT`, then `GOOGLE_CLOUD_PROJECT`; an empty variable counts as unset.
    """
    return next(filter(None, map(os.environ.get, _VARIABLES)), None)


@contextmanager
def open_bucket(
    bucket: str,
    client: Any = None,
    project: str | None = None,
    retry: RetryPolicy | None = None,
    user_project: str | None = None,
) -> Iterator["GcsStore"]:
    """Open a bucket on Cloud Storage, and close its connections afterwards.

    Args:
        bucket: bare name of the bucket.
        client: google.cloud.storage.Client whose credentials and endpoint to use; None makes one
            from the environment (application default credentials, `STORAGE_EMULATOR_HOST`).
        project: project id for a client made here; None takes the environment's.
        retry: when to retry; None takes the defaults.
        user_project: id of the project to bill, if the bucket uses Requester Pays; None bills the
            bucket's own project.
    """
    from keras_remote_airflow.core.cloud.credentials import credentials_error
    from keras_remote_airflow.core.cloud.gcs import GcsStore
    from keras_remote_airflow.core.cloud.transport import Transport

    if client is None:
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import storage

        try:
            # google.cloud.storage has no types.
            client = storage.Client(  # type: ignore[no-untyped-call]
                project=project or get_default_project()
            )
        except (GoogleAuthError, OSError) as exc:
            raise credentials_error(exc) from None
    with Transport(client, retry or RetryPolicy(), user_project) as transport:
        yield GcsStore(bucket, transport)
