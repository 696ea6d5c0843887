"""DataUploadOperator, executed in this process against a local Cloud Storage."""

import pytest

from keras_remote_airflow import Data, DataUploadOperator, execution
from keras_remote_airflow._compat import AirflowFailException
from keras_remote_airflow.core.errors import StoreError

GOLDEN = "15d41417b45aa09c0450d8955b845bb278f2990728bcc5d919d62309a2c6ebee"


def upload(path, **arguments):
    return DataUploadOperator(
        task_id="upload", **{"data": str(path), "bucket_name": "test-bucket"} | arguments
    )


def test_returns_the_ref_and_pushes_the_stats(execute, dataset):
    ref, xcoms = execute(upload(dataset, namespace_prefix="team/a", mount_path="/data"))
    assert ref == {
        "__data_ref__": True,
        "gcs_uri": f"gs://test-bucket/team/a/data-cache/{GOLDEN}",
        "is_dir": True,
        "mount_path": "/data",
    }
    assert type(ref) is dict
    assert list(xcoms) == ["upload_stats"]
    assert xcoms["upload_stats"]["content_hash"] == GOLDEN


def test_a_file_is_not_a_directory(execute, dataset):
    ref, _ = execute(upload(dataset / "train.csv"))
    assert ref["is_dir"] is False


def test_takes_a_data_object_too(execute, dataset):
    ref, _ = execute(upload(dataset, data=Data(str(dataset))))
    assert ref["gcs_uri"].endswith(GOLDEN)


def test_constructing_it_touches_neither_the_data_nor_the_arguments():
    arguments = {
        "data": "/no/such/path/{{ run_id }}",
        "bucket_name": "{{ var.value.bucket }}",
        "namespace_prefix": "{{ 1 }}",
        "mount_path": "{{ 2 }}",
        "project_id": "{{ 3 }}",
        "gcp_conn_id": "{{ 4 }}",
        "impersonation_chain": ("{{ 5 }}", "{{ 6 }}"),
        "layout": "{{ 7 }}",
    }
    task = DataUploadOperator(task_id="upload", **arguments)
    assert {name: getattr(task, name) for name in task.template_fields} == arguments


def test_gs_data_asks_nobody(execute, gcs_server):
    task = upload("gs://elsewhere/model.keras", gcp_conn_id="there_is_no_such_connection")
    ref, xcoms = execute(task)
    assert (ref["gcs_uri"], ref["is_dir"]) == ("gs://elsewhere/model.keras", False)
    assert xcoms["upload_stats"]["content_hash"] is None
    assert gcs_server.requests == []


def test_passes_the_connection_on(execute, dataset, monkeypatch):
    asked = []
    make_gcs_hook = execution.make_gcs_hook

    def recording(**arguments):
        asked.append(arguments)
        return make_gcs_hook(gcp_conn_id="google_cloud_default")

    monkeypatch.setattr(execution, "make_gcs_hook", recording)
    execute(upload(dataset, gcp_conn_id="mine", impersonation_chain=["a@x", "b@x"]))
    assert asked == [{"gcp_conn_id": "mine", "impersonation_chain": ["a@x", "b@x"]}]


@pytest.mark.parametrize(
    ("project_id", "variable", "expected"),
    [("named", "env", "named"), (None, "env", "test-project"), (None, None, "test-project")],
)
def test_project_is_the_argument_then_the_connections(
    gcs_server, monkeypatch, project_id, variable, expected
):
    if variable:
        monkeypatch.setenv("KERAS_REMOTE_PROJECT", variable)
    assert execution.connect("google_cloud_default", None, project_id).project == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"data": "/no/such/path"}, "/no/such/path"),
        ({"data": ""}, "must not be empty"),
        ({"bucket_name": "gs://test-bucket"}, "gs://test-bucket"),
        ({"namespace_prefix": "/"}, "namespace_prefix '/'"),
        ({"layout": "kinetik"}, "kinetik"),
    ],
)
def test_bad_input_fails_for_good(execute, gcs_server, dataset, arguments, words):
    with pytest.raises(AirflowFailException, match=words) as caught:
        execute(upload(dataset, **arguments))
    assert isinstance(caught.value.__cause__, ValueError)
    assert gcs_server.objects("test-bucket") == {}


def test_a_refusal_is_left_to_the_tasks_retries(execute, gcs_server, dataset):
    gcs_server.deny("create")
    with pytest.raises(StoreError, match="objectCreator"):
        execute(upload(dataset))


def test_on_kill_does_nothing_while_nothing_is_transferred(dataset):
    upload(dataset).on_kill()
