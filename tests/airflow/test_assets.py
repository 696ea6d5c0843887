"""Asset events of uploads, in a whole DAG run, and what a retry adds to them."""

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from keras_remote_airflow import assets, upload_data
from keras_remote_airflow._compat import Asset, AssetAlias, TriggeringEvent
from keras_remote_airflow.assets import (
    asset_uri,
    is_work_of_an_earlier_try,
    ref_from_triggering_event,
)
from keras_remote_airflow.core.data import Data
from keras_remote_airflow.core.errors import InvalidInputError
from keras_remote_airflow.core.refs import make_data_ref

DAGS = Path(__file__).parent / "dags"


@pytest.fixture
def long_ago(gcs_server, dataset, monkeypatch):
    """Publish the dataset in the namespace "long-ago", in 2001."""
    from keras_remote_airflow.core.layout import Receipt

    now = Receipt.now

    def then(*arguments, **keywords):
        from dataclasses import replace

        return replace(now(*arguments, **keywords), created_at="2001-01-01T00:00:00Z")

    monkeypatch.setattr(Receipt, "now", then)
    upload_data("test-bucket", str(dataset), namespace_prefix="long-ago")


def test_an_alias_has_events_for_new_data_only(
    run_dag, asset_events, gcs_server, dataset, long_ago
):
    file = dataset / "train.csv"
    gcs_server.create_bucket("elsewhere")
    gcs_server.put("elsewhere", "日本 #?a", b"")
    run = run_dag(
        DAGS / "outlets.py",
        "outlets",
        reserialize=True,
        **gcs_server.env(),
        TEST_DATA=str(dataset),
        TEST_FILE=str(file),
    )
    assert run.states == {
        "miss": "success",
        "hit": "success",
        "skips": "skipped",
        "skipped": "skipped",
        "pull": "success",
        "gcs": "success",
        "dies": "success",
        "after_dies": "success",
        "fails": "success",
        "many[0]": "success",
        "many[1]": "success",
    }, run.log

    folder_hash, file_hash = Data(str(dataset)).content_hash(), Data(str(file)).content_hash()

    def extra(namespace, content_hash=folder_hash, is_dir=True):
        uri = f"gs://test-bucket/{namespace}/data-cache/{content_hash}"
        return make_data_ref(uri, is_dir) | {"content_hash": content_hash}

    on_gcs = make_data_ref("gs://elsewhere/日本 #?a", False) | {"content_hash": None}
    events = asset_events("outlets")
    through_alias = {event.task: event for event in events if event.aliases}
    assert {task: event.extra for task, event in through_alias.items()} == {
        "miss": extra("default"),
        "dies": extra("dies"),  # its retry adds the event for the try that published
        "many[0]": extra("équipe"),
        "many[1]": extra("équipe", file_hash, is_dir=False),
        "gcs": on_gcs,
    }
    for event in through_alias.values():
        assert event.aliases == ["new"]
        assert event.uri == asset_uri(event.extra["gcs_uri"])
    plain = {event.task: event.extra for event in events if not event.aliases}
    assert plain == {"miss": extra("default"), "hit": extra("default")}
    assert len(events) == len(through_alias) + len(plain)

    assert (run.tries["dies"], run.tries["fails"]) == (2, 2)
    ref, gcs_uri, stats = run.xcoms["pull"]["return_value"]
    assert ref | {"content_hash": folder_hash} == extra("default")
    assert gcs_uri == ref["gcs_uri"]
    assert (stats["cache_hit"], stats["content_hash"]) == (True, folder_hash)


@pytest.mark.parametrize(
    ("gcs_uri", "expected"),
    [
        ("gs://bucket/default/data-cache/aa", "gs://bucket/default/data-cache/aa"),
        ("gs://bucket/a=b,c;d@e:f+g!$&'()*-._~", "gs://bucket/a=b,c;d@e:f+g!$&'()*-._~"),
        ("gs://bucket/équipe", "gs://bucket/%C3%A9quipe"),
        ("gs://bucket/a b?x#y%20/", "gs://bucket/a%20b%3Fx%23y%2520/"),
    ],
)
def test_the_uri_of_an_asset_is_one_that_airflow_keeps(gcs_uri, expected):
    assert asset_uri(gcs_uri) == expected
    assert Asset(uri=expected).uri == expected.rstrip("/")


EVENT = TriggeringEvent(
    datetime(2026, 1, 31, tzinfo=UTC),
    make_data_ref("gs://bucket/raw/", True),
    {"gs://bucket/raw", "digits"},
)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (None, True),
        ("digits", True),
        ("gs://bucket/raw/", True),
        (AssetAlias("digits"), True),
        (Asset(uri="gs://bucket/raw/"), True),
        ("other", False),
        (AssetAlias("other"), False),
    ],
    ids=str,
)
def test_a_source_is_an_alias_or_an_asset_or_its_name(monkeypatch, source, found):
    monkeypatch.setattr(assets, "get_triggering_events", lambda context: [EVENT])
    if found:
        assert ref_from_triggering_event({}, source) == EVENT.extra
    else:
        with pytest.raises(InvalidInputError, match="no upload triggered this run"):
            ref_from_triggering_event({}, source)


BEGAN = datetime(2026, 1, 31, 12, 0, 0, 500_000, UTC)


def context_of_try(try_number):
    return {
        "ti": SimpleNamespace(try_number=try_number),
        "dag_run": SimpleNamespace(start_date=BEGAN),
    }


@pytest.mark.parametrize(
    ("published_at", "expected"),
    [
        ("2026-01-31T12:00:01Z", True),
        ("2026-01-31T12:00:00Z", True),  # receipts hold whole seconds
        ("2026-01-31T11:59:59Z", False),
        ("2026-01-31T13:00:01+01:00", True),
        (None, False),
        ("", False),
        ("yesterday", False),
        ("2026-01-31T12:00:01", False),
    ],
)
def test_a_retry_counts_what_was_published_since_its_run_began(published_at, expected):
    assert is_work_of_an_earlier_try(context_of_try(2), published_at) is expected


def test_a_first_try_has_no_earlier_one():
    assert not is_work_of_an_earlier_try(context_of_try(1), "2026-01-31T12:00:01Z")
