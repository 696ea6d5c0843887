"""Asset events that say which data is new, and how the DAG that they trigger gets its ref.

The event's `extra`, on an asset (Airflow 2: dataset) and on an alias, is the ref (see `core.refs`)
plus `content_hash`. It has no nested dicts, because Airflow 2 rejects them in an alias event:

    {"__data_ref__": True, "gcs_uri": "gs://…", "is_dir": bool, "mount_path": str | None,
     "content_hash": "<64 hex digits>" | None}

The asset's URI is that of the data, percent-encoded (`asset_uri`); the ref in `extra` has it as it
is.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any
from urllib.parse import quote

from keras_remote_airflow._compat import Asset, AssetAlias, Context, get_triggering_events
from keras_remote_airflow.core.errors import InvalidInputError
from keras_remote_airflow.core.refs import DataRef, is_data_ref, parse_data_ref

# Airflow refuses longer ones.
_MAX_ASSET_URI_CHARACTERS = 1500


def asset_uri(gcs_uri: str) -> str:
    """Return the URI of the asset that stands for the data at `gcs_uri`.

    Airflow takes ASCII only (its API server fails a task for anything else, after the task has
    succeeded), drops what follows "#", and sorts what follows "?". So these are percent-encoded,
    and "%" is too, to tell any two data apart. Airflow drops slashes at the end.
    """
    return quote(gcs_uri, safe="/:!$&'()*+,;=@")


def check_outlets(outlets: Iterable[Any], gcs_uri: str) -> None:
    """Raise InvalidInputError if an alias among the outlets could not get an event for this URI."""
    characters = len(asset_uri(gcs_uri))
    if characters > _MAX_ASSET_URI_CHARACTERS and any(isinstance(o, AssetAlias) for o in outlets):
        raise InvalidInputError(
            f"asset URI too long: {characters} characters, percent-encoded, Airflow takes "
            f"{_MAX_ASSET_URI_CHARACTERS}: {gcs_uri}. Shorten the name, or remove the alias from "
            "the outlets."
        )


def fill_outlet_events(
    context: Context,
    outlets: Iterable[Any],
    ref: DataRef,
    content_hash: str | None,
    *,
    is_new: bool,
) -> None:
    """Put the ref into the events of a task's outlets.

    An asset has an event whenever the task succeeds, and that event gets the extra. An alias has
    an event only if the data is new: for the asset whose URI is that of the data.

    Args:
        context: the running task's.
        outlets: its outlets; what is neither asset nor alias is left alone.
        ref: the data.
        content_hash: of the data; None if it has none.
        is_new: whether the data was not published before.
    """
    extra = ref.to_dict() | {"content_hash": content_hash}
    for outlet in outlets:
        if isinstance(outlet, Asset):
            context["outlet_events"][outlet].extra.update(extra)
        elif isinstance(outlet, AssetAlias) and is_new:
            context["outlet_events"][outlet].add(Asset(uri=asset_uri(ref.gcs_uri)), extra=extra)


def is_work_of_an_earlier_try(context: Context, published_at: str | None) -> bool:
    """Return whether this is a retry, and the data was published since its DAG run began.

    Airflow adds events only when a task succeeds. If the try that published the data was killed
    before that, its retry finds the data published, and has to add the events in its place.

    Args:
        context: the running task's.
        published_at: RFC 3339, in whole seconds, from the marker. None, or a text that is no time
            with a time zone, counts as unknown: another program may have written the marker.
    """
    began = context["dag_run"].start_date if context["ti"].try_number > 1 else None
    if began is None or not published_at:
        return False
    try:
        published = datetime.fromisoformat(published_at)
    except ValueError:
        return False
    return published.tzinfo is not None and published >= began.replace(microsecond=0)


def ref_from_triggering_event(
    context: Context, source: "str | Asset | AssetAlias | None" = None
) -> dict[str, Any]:
    """Return the ref of the data whose upload triggered this run.

    Airflow gathers events that come close together into one run; the newest one counts.

    Args:
        context: the running task's, as `get_current_context()` returns it.
        source: the asset alias or the asset, or the name of the one or the URI of the other, for a
            DAG that is scheduled on more than one; None takes any.

    Raises:
        InvalidInputError: no such event triggered the run; a person started it, perhaps.
    """
    if isinstance(source, str) and "://" in source:
        source = Asset(uri=source)  # Airflow's spelling has no slash at the end
    if isinstance(source, Asset):
        source = source.uri
    elif isinstance(source, AssetAlias):
        source = source.name
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
