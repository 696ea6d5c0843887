"""Asset events that say which data is new, and how the DAG they trigger learns of it.

The event's `extra`, on an asset (Airflow 2: dataset) as on an alias, is the ref (see `core.refs`)
and one field more. It is flat, because Airflow 2 takes nothing else from an alias:

    {"__data_ref__": True, "gcs_uri": "gs://…", "is_dir": bool, "mount_path": str | None,
     "content_hash": "<64 hex digits>" | None}
"""

from collections.abc import Iterable
from typing import Any

from keras_remote_airflow._compat import Asset, AssetAlias, Context, get_triggering_events
from keras_remote_airflow.core.errors import InvalidInputError
from keras_remote_airflow.core.refs import is_data_ref, parse_data_ref


def describe_events(
    context: Context,
    outlets: Iterable[Any],
    data_ref: dict[str, Any],
    content_hash: str | None,
    *,
    is_new: bool,
) -> None:
    """Say in the events of a task's outlets what it has made available.

    An asset has an event whenever the task succeeds, and that one gets the extra. An alias has
    one only if the data is new: for the asset whose URI is that of the data.

    Args:
        context: the running task's.
        outlets: its outlets; what is neither asset nor alias is left alone.
        data_ref: the ref.
        content_hash: of the data; None if it has none.
        is_new: whether nobody had this data before.
    """
    extra = data_ref | {"content_hash": content_hash}
    for outlet in outlets:
        if isinstance(outlet, Asset):
            context["outlet_events"][outlet].extra.update(extra)
        elif isinstance(outlet, AssetAlias) and is_new:
            context["outlet_events"][outlet].add(Asset(uri=data_ref["gcs_uri"]), extra=extra)


def ref_from_triggering_event(context: Context, source: str | None = None) -> dict[str, Any]:
    """Return the ref of the data whose upload triggered this run.

    Airflow gathers events that come close together into one run; the newest one counts.

    Args:
        context: the running task's, as `get_current_context()` returns it.
        source: name of the asset alias or URI of the asset, for a DAG that is scheduled on more
            than one; None takes any.

    Raises:
        InvalidInputError: no such event triggered the run; it was started by hand, perhaps.
    """
    events = [
        event
        for event in get_triggering_events(context)
        if is_data_ref(event.extra) and source in (None, *event.sources)
    ]
    if not events:
        raise InvalidInputError(
            "no upload triggered this run: expected an asset event with a data ref"
            + (f" of {source!r}" if source else "")
            + ", as DataUploadOperator adds it to its outlets, and found none. Was the run started "
            "by hand? To train again on data that has not changed, clear an earlier run."
        )
    newest = max(events, key=lambda event: event.timestamp)
    return parse_data_ref(newest.extra).to_dict()
