"""Which errors fail a task for good, and which a sensor waits out; all others end a try.

Only classes and flags of this package decide, not the exceptions of Airflow's connection lookup:
when a secrets backend fails, Airflow goes on to the next one, and reports in the end that the
connection isn't defined (AirflowNotFoundException), which may be wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from keras_remote_airflow._compat import (
    AirflowFailException,
    AirflowSensorTimeout,
    AirflowSkipException,
    BaseSensorOperator,
)
from keras_remote_airflow.core.errors import PERMANENT_ERRORS, StoreError


@contextmanager
def permanent_errors_fail_the_task() -> Iterator[None]:
    """Raise AirflowFailException, which no retry follows, in place of `PERMANENT_ERRORS`."""
    try:
        yield
    except PERMANENT_ERRORS as exc:
        # Not from the error itself: the log would show its text twice.
        raise AirflowFailException(str(exc)) from exc.__cause__


@contextmanager
def soft_failures_skip(sensor: BaseSensorOperator) -> Iterator[None]:
    """Honour soft_fail and never_fail by the rules of BaseSensorOperator.execute.

    A deferral bypasses that method; and unlike it, this says why the task is skipped.
    """
    try:
        yield
    except Exception as exc:
        if isinstance(exc, AirflowFailException | AirflowSensorTimeout):
            skip = sensor.soft_fail or sensor.never_fail
        else:
            skip = sensor.never_fail and not sensor.silent_fail
        if skip:
            raise AirflowSkipException(f"Skipped instead of failed: {exc}") from exc
        raise


def is_outage(error: Exception) -> bool:
    """Return whether the same request may well succeed later."""
    return isinstance(error, StoreError) and error.transient
