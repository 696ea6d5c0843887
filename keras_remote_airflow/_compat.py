"""The only file that knows Airflow versions, and the only one that imports Airflow.

Each name is taken from its newest home (up to 3.3), else from an older one (down to 2.11): the
old homes warn on the versions that have the new. `DeprecatedImportWarning` is a FutureWarning.
mypy sees the newest.
"""

from typing import TYPE_CHECKING, Any

try:
    from airflow.providers.standard.operators.python import PythonOperator
    from airflow.sdk import (
        BaseOperator,
        BaseOperatorLink,
        BaseSensorOperator,
        Context,
        PokeReturnValue,
    )
    from airflow.sdk.bases.decorator import DecoratedOperator, task_decorator_factory

    # The base of XComArg, and the one thing that Airflow 2 resolves when it renders templates.
    from airflow.sdk.definitions._internal.mixins import ResolveMixin
    from airflow.sdk.execution_time.xcom import XCom

    # From here on SIGTERM only calls on_kill() and the task goes on; in 2.x Airflow itself raises
    # AirflowTaskTerminated afterwards, and finds out whether somebody has set the state meanwhile.
    SIGTERM_RAISES = False
except ImportError:  # Airflow 2
    if not TYPE_CHECKING:
        from airflow.decorators.base import DecoratedOperator, task_decorator_factory
        from airflow.models.baseoperator import BaseOperator
        from airflow.models.baseoperatorlink import BaseOperatorLink
        from airflow.models.xcom import XCom
        from airflow.operators.python import PythonOperator
        from airflow.sensors.base import BaseSensorOperator, PokeReturnValue
        from airflow.utils.context import Context
        from airflow.utils.mixins import ResolveMixin

        SIGTERM_RAISES = True

try:
    from airflow.sdk.exceptions import (
        AirflowFailException,
        AirflowSensorTimeout,
        AirflowSkipException,
    )
except ImportError:  # Airflow 3.1 and older
    if not TYPE_CHECKING:
        from airflow.exceptions import (
            AirflowFailException,
            AirflowSensorTimeout,
            AirflowSkipException,
        )

try:
    from airflow.sdk.configuration import conf
except ImportError:  # Airflow 3.1 and older
    if not TYPE_CHECKING:
        from airflow.configuration import conf

from airflow.triggers.base import BaseTrigger, TriggerEvent

if TYPE_CHECKING:
    from airflow.providers.google.cloud.hooks.gcs import GCSHook
    from airflow.sdk.types import TaskInstanceKey

__all__ = [
    "SIGTERM_RAISES",
    "AirflowFailException",
    "AirflowSensorTimeout",
    "AirflowSkipException",
    "BaseOperator",
    "BaseOperatorLink",
    "BaseSensorOperator",
    "BaseTrigger",
    "Context",
    "DecoratedOperator",
    "PokeReturnValue",
    "PythonOperator",
    "ResolveMixin",
    "TaskInstanceKey",
    "TriggerEvent",
    "XCom",
    "conf",
    "make_gcs_hook",
    "task_decorator_factory",
]


def make_gcs_hook(**arguments: Any) -> "GCSHook":
    """Return a GCSHook; its import takes a second, which no DAG file should pay for."""
    from airflow.providers.google.cloud.hooks.gcs import GCSHook

    return GCSHook(**arguments)
