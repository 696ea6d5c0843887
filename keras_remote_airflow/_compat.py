"""The only file that knows Airflow versions, and the only one that imports Airflow.

Where `_requirements` finds that Airflow is missing or too old, importing this file raises an
ImportError that says so in one line, and Airflow is not imported.

Each name is taken from its newest home (up to 3.3), else from an older one (down to 2.11). On
versions that have the newest home, an older one gives a FutureWarning, which users would see. mypy
checks only the branch of the newest Airflow.
"""

from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from keras_remote_airflow._requirements import missing_requirement

if missing := missing_requirement():
    raise ImportError(missing)

try:
    from airflow.providers.standard.operators.python import PythonOperator
    from airflow.sdk import (
        Asset,
        AssetAlias,
        BaseOperator,
        BaseOperatorLink,
        BaseSensorOperator,
        Context,
        PokeReturnValue,
        XComArg,
    )
    from airflow.sdk.bases.decorator import DecoratedOperator, task_decorator_factory

    # The base of XComArg. Airflow 2 resolves nothing else when it renders templates.
    from airflow.sdk.definitions._internal.mixins import ResolveMixin
    from airflow.sdk.execution_time.xcom import XCom
    from airflow.triggers.base import BaseTrigger, TriggerEvent

    IS_AIRFLOW_2 = False
except ImportError:  # Airflow 2
    if not TYPE_CHECKING:
        from airflow.datasets import Dataset as Asset
        from airflow.datasets import DatasetAlias as AssetAlias
        from airflow.decorators.base import DecoratedOperator, task_decorator_factory
        from airflow.models.baseoperator import BaseOperator
        from airflow.models.baseoperatorlink import BaseOperatorLink
        from airflow.models.xcom import XCom
        from airflow.models.xcom_arg import XComArg
        from airflow.operators.python import PythonOperator
        from airflow.sensors.base import BaseSensorOperator, PokeReturnValue
        from airflow.triggers.base import BaseTrigger, TriggerEvent
        from airflow.utils.context import Context
        from airflow.utils.mixins import ResolveMixin

        IS_AIRFLOW_2 = True

try:
    from airflow.sdk.exceptions import (
        AirflowException,
        AirflowFailException,
        AirflowSensorTimeout,
        AirflowSkipException,
    )
except ImportError:  # Airflow 3.1 and older
    if not TYPE_CHECKING:
        from airflow.exceptions import (
            AirflowException,
            AirflowFailException,
            AirflowSensorTimeout,
            AirflowSkipException,
        )

try:
    from airflow.sdk.configuration import conf
except ImportError:  # Airflow 3.1 and older
    if not TYPE_CHECKING:
        from airflow.configuration import conf

try:
    from airflow.sdk.observability.stats import Stats
except ImportError:  # Airflow 3.1 and older
    if not TYPE_CHECKING:
        from airflow.stats import Stats

try:
    from airflow.sdk.plugins_manager import AirflowPlugin
except ImportError:  # Airflow 3.1 and older
    if not TYPE_CHECKING:
        from airflow.plugins_manager import AirflowPlugin

if TYPE_CHECKING:
    from airflow.providers.google.cloud.hooks.gcs import GCSHook
    from airflow.sdk.types import TaskInstanceKey

# On SIGTERM, Airflow 2 itself raises AirflowTaskTerminated after on_kill(), and finds out whether
# the state of the task was set meanwhile; Airflow 3 only calls on_kill(), and the task goes on.
SIGTERM_RAISES = IS_AIRFLOW_2

# Whether the scheduler ends a deferral when the task's execution_timeout is over. Airflow 3 counts
# only the time in which the task runs.
EXECUTION_TIMEOUT_ENDS_DEFERRALS = IS_AIRFLOW_2

__all__ = [
    "EXECUTION_TIMEOUT_ENDS_DEFERRALS",
    "SIGTERM_RAISES",
    "AirflowException",
    "AirflowFailException",
    "AirflowPlugin",
    "AirflowSensorTimeout",
    "AirflowSkipException",
    "Asset",
    "AssetAlias",
    "BaseOperator",
    "BaseOperatorLink",
    "BaseSensorOperator",
    "BaseTrigger",
    "Context",
    "DecoratedOperator",
    "PokeReturnValue",
    "PythonOperator",
    "ResolveMixin",
    "Stats",
    "TaskInstanceKey",
    "TriggerEvent",
    "TriggeringEvent",
    "XCom",
    "XComArg",
    "conf",
    "deferral_timed_out",
    "get_triggering_events",
    "make_gcs_hook",
    "make_operator_lineage",
    "task_decorator_factory",
]


def make_gcs_hook(**arguments: Any) -> "GCSHook":
    """Return a GCSHook; its import takes a second, which no DAG file should pay for."""
    from airflow.providers.google.cloud.hooks.gcs import GCSHook

    return GCSHook(**arguments)


def deferral_timed_out(next_method: str, next_kwargs: dict[str, Any] | None) -> bool:
    """Return whether a task is resumed because no trigger fired before its deferral's timeout.

    Airflow resumes a task by "__fail__" in two cases. When the trigger raises or ends without an
    event, there is a traceback among the arguments (None for the latter); when the scheduler ends
    the deferral, there is none.
    """
    return next_method == "__fail__" and "traceback" not in (next_kwargs or {})


class TriggeringEvent(NamedTuple):
    """One of the asset events that made the scheduler create a run.

    Attributes:
        timestamp: when it happened.
        extra: what the task that caused it has put there.
        sources: URI of the asset, and the names of the aliases it came through.
    """

    timestamp: datetime
    extra: dict[str, Any]
    sources: set[str]


def get_triggering_events(context: Context) -> list[TriggeringEvent]:
    """Return the asset events that the run was created for; none if a person triggered it."""
    values: Any = context
    if "triggering_asset_events" in values:
        # Its keys are aliases too, which name the same events once more.
        found = [
            (asset.uri, event)
            for asset, events in values["triggering_asset_events"].items()
            if isinstance(asset, Asset)
            for event in events
        ]
    else:  # Airflow 2 calls assets datasets
        datasets = values.get("triggering_dataset_events", {})
        found = [(uri, event) for uri, events in datasets.items() for event in events]
    return [
        TriggeringEvent(
            event.timestamp, event.extra, {uri, *(alias.name for alias in event.source_aliases)}
        )
        for uri, event in found
    ]


def make_operator_lineage(**arguments: Any) -> Any:
    """Return an OperatorLineage; only for calls by the OpenLineage provider, which brings it."""
    from airflow.providers.openlineage.extractors import OperatorLineage

    return OperatorLineage(**arguments)
