"""The only file that knows Airflow versions, and the only one that imports Airflow.

Each name is taken from its newest home (up to 3.3), else from an older one (down to 2.11): the
old homes warn on the versions that have the new (by a FutureWarning, which users would see). mypy
checks the newest Airflow's branch only.
"""

from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

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
        from airflow.datasets import Dataset as Asset
        from airflow.datasets import DatasetAlias as AssetAlias
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

from airflow.triggers.base import BaseTrigger, TriggerEvent

if TYPE_CHECKING:
    from airflow.providers.google.cloud.hooks.gcs import GCSHook
    from airflow.sdk.types import TaskInstanceKey

__all__ = [
    "SIGTERM_RAISES",
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
    "conf",
    "get_triggering_events",
    "make_gcs_hook",
    "make_operator_lineage",
    "task_decorator_factory",
]


def make_gcs_hook(**arguments: Any) -> "GCSHook":
    """Return a GCSHook; its import takes a second, which no DAG file should pay for."""
    from airflow.providers.google.cloud.hooks.gcs import GCSHook

    return GCSHook(**arguments)


class TriggeringEvent(NamedTuple):
    """One of the asset events that made a scheduler create a run.

    Attributes:
        timestamp: when it happened.
        extra: what the task that caused it said about it.
        sources: URI of the asset, and the names of the aliases it came through.
    """

    timestamp: datetime
    extra: dict[str, Any]
    sources: set[str]


def get_triggering_events(context: Context) -> list[TriggeringEvent]:
    """Return the asset events that the run was created for; none if it was triggered by hand."""
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
    """Return an OperatorLineage. Only the OpenLineage provider asks for one, so it is installed."""
    from airflow.providers.openlineage.extractors import OperatorLineage

    return OperatorLineage(**arguments)
