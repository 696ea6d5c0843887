"""The button that opens the dataset. Its life in Airflow is followed in test_dag_runs.py."""

import pytest

from keras_remote_airflow import CacheSensor, DataUploadOperator
from keras_remote_airflow._compat import XCom
from keras_remote_airflow.core.refs import DataRef
from keras_remote_airflow.decorators import LocalDataOperator
from keras_remote_airflow.links import DatasetLink, console_url

BROWSER = "https://console.cloud.google.com/storage/browser"
PREFIX = "default/data-cache/" + "0" * 64


@pytest.mark.parametrize(
    ("gcs_uri", "is_dir", "url"),
    [
        (f"gs://bucket/{PREFIX}", True, f"{BROWSER}/bucket/{PREFIX}"),
        (f"gs://bucket/{PREFIX}", False, f"{BROWSER}/bucket/{PREFIX}"),
        ("gs://bucket/my data/é/", True, f"{BROWSER}/bucket/my%20data/%C3%A9"),
        ("gs://bucket/model.keras", False, f"{BROWSER}/_details/bucket/model.keras"),
        ("gs://bucket/", True, f"{BROWSER}/bucket/"),
    ],
)
def test_opens_the_folder_or_the_object(gcs_uri, is_dir, url):
    assert console_url(DataRef(gcs_uri, is_dir)) == url


@pytest.mark.parametrize("value", [None, {}, "text"])
def test_there_is_no_link_before_there_is_a_ref(monkeypatch, value):
    monkeypatch.setattr(XCom, "get_value", lambda **key: value)
    assert DatasetLink().get_link(None, ti_key=None) == ""


@pytest.mark.parametrize("kind", [CacheSensor, DataUploadOperator])
def test_both_tasks_have_it(kind):
    assert [link.name for link in kind.operator_extra_links] == ["Cloud Storage"]


@pytest.mark.parametrize("kind", [CacheSensor, DataUploadOperator, LocalDataOperator])
def test_every_task_has_the_packages_color_in_the_graph(kind):
    assert kind.ui_color == "#d2e3fc"
