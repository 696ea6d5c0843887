"""Which project is asked, and which one pays."""

from pathlib import Path

import pytest
from google.cloud import storage

import keras_remote_airflow
from keras_remote_airflow import (
    find,
    get_default_project,
    make_data_ref,
    materialize,
    upload,
    upload_data,
)
from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.errors import StoreError

VARIABLES = ("KERAS_REMOTE_PROJECT", "GOOGLE_CLOUD_PROJECT")


@pytest.mark.parametrize(
    ("ours", "googles", "project"),
    [
        ("ours", "googles", "ours"),
        ("ours", None, "ours"),
        (None, "googles", "googles"),
        ("", "googles", "googles"),
        (None, None, None),
        ("", "", None),
    ],
)
def test_our_variable_goes_before_googles_and_empty_is_unset(monkeypatch, ours, googles, project):
    for name, value in zip(VARIABLES, (ours, googles), strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert get_default_project() == project


@pytest.mark.parametrize(
    ("named", "project"), [("named", "named"), ("", "environment"), (None, "environment")]
)
def test_a_named_project_goes_before_the_environment(monkeypatch, gcs_server, named, project):
    monkeypatch.setenv("KERAS_REMOTE_PROJECT", "environment")
    asked = []
    client = storage.Client
    monkeypatch.setattr(storage, "Client", lambda project: asked.append(project) or client(project))
    with open_bucket("bucket", project=named):
        assert asked == [project]


def test_only_one_module_reads_the_variables():
    package = Path(keras_remote_airflow.__file__).parent
    readers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for name in VARIABLES
        # In quotes: docstrings may name them, code has to quote them.
        if any(f"{quote}{name}{quote}" in path.read_text() for quote in "\"'")
    }
    assert readers == {"core/cloud/bucket.py"}


def test_user_project_is_billed_for_every_request(tree, gcs_server, tmp_path):
    gcs_server.create_bucket("requester-pays", requester_pays=True)
    path, dest = str(tree({"a": "1", "sub/b": "2"})), str(tmp_path / "copy")
    with pytest.raises(StoreError, match="requester pays") as refused:
        upload("requester-pays", path)
    assert (refused.value.status, refused.value.transient) == (400, False)

    gcs_server.clear_requests()
    result = upload("requester-pays", path, user_project="payer")
    assert upload_data("requester-pays", path, user_project="payer") == result.gcs_uri
    assert find("requester-pays", result.content_hash, user_project="payer")
    ref = make_data_ref(result.gcs_uri, True)
    assert materialize(ref, dest, user_project="payer") == dest
    assert {request.query.get("userProject") for request in gcs_server.requests} == {"payer"}
