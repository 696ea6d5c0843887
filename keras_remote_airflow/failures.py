"""Fails a task at once on errors that retrying can't fix."""

from collections.abc import Iterator
from contextlib import contextmanager

from keras_remote_airflow._compat import AirflowFailException
from keras_remote_airflow.core.errors import PERMANENT_ERRORS


@contextmanager
def permanent_errors_fail_the_task() -> Iterator[None]:
    """Raise AirflowFailException, which no retry follows, in place of `PERMANENT_ERRORS`."""
    try:
        yield
    except PERMANENT_ERRORS as exc:
        raise AirflowFailException(str(exc)) from exc
