"""What every task of this package does when it runs: borrow credentials, and fail as it should."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple

from keras_remote_airflow._compat import AirflowFailException, Context, make_gcs_hook
from keras_remote_airflow.core.errors import PERMANENT_ERRORS
from keras_remote_airflow.core.cloud.bucket import resolve_project


class Connection(NamedTuple):
    """What `core` needs to talk to Cloud Storage.

    Attributes:
        client: google.cloud.storage.Client with an Airflow connection's credentials.
        project: project id, or None if nobody named one.
    """

    client: Any
    project: str | None


def connect(
    gcp_conn_id: str, impersonation_chain: str | Sequence[str] | None, project_id: str | None
) -> Connection:
    """Return the Cloud Storage client that an Airflow connection stands for.

    Args:
        gcp_conn_id: id of a Google Cloud connection.
        impersonation_chain: service account to impersonate, or a chain of them whose last one is
            impersonated; None leaves that to the connection.
        project_id: project id; None takes the connection's, then the environment's.
    """
    hook = make_gcs_hook(gcp_conn_id=gcp_conn_id, impersonation_chain=impersonation_chain)
    return Connection(hook.get_conn(), resolve_project(project_id, hook.project_id))


@contextmanager
def permanent_errors_fail_the_task() -> Iterator[None]:
    """Raise AirflowFailException, which no retry follows, for errors that stay true."""
    try:
        yield
    except PERMANENT_ERRORS as exc:
        raise AirflowFailException(str(exc)) from exc


def is_work_of_an_earlier_try(context: Context, happened_at: str | None) -> bool:
    """Return whether this is a retry, and something happened since its DAG run began.

    Args:
        context: the running task's.
        happened_at: RFC 3339, in whole seconds. None or anything else is "nobody knows", and so
            is a time without a zone: a marker's receipt is somebody else's text.
    """
    began = context["dag_run"].start_date if context["ti"].try_number > 1 else None
    if began is None or not happened_at:
        return False
    try:
        happened = datetime.fromisoformat(happened_at)
    except ValueError:
        return False
    return happened.tzinfo is not None and happened >= began.replace(microsecond=0)
