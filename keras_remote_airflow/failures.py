"""Which errors fail a task for good, and which a sensor waits out; all others end a try.

Only classes and flags of this package decide, not the exceptions of Airflow's connection lookup:
when a secrets backend fails, Airflow goes on to the next one, and reports in the end that the
connection isn't defined (AirflowNotFoundException), which may be wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from keras_remote_airflow._compat import AirflowFailException
from keras_remote_airflow.core.errors import PERMANENT_ERRORS, StoreError


@contextmanager
def permanent_errors_fail_the_task() -> Iterator[None]:
    """Raise AirflowFailException, which no retry follows, in place of `PERMANENT_ERRORS`."""
    try:
        yield
    except PERMANENT_ERRORS as exc:
        raise AirflowFailException(str(exc)) from exc


def is_outage(error: Exception) -> bool:
    """Return whether the same request may well succeed later."""
    return isinstance(error, StoreError) and error.transient
