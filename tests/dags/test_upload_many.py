"""The DAG upload_many, run by Airflow: mapped uploads between setup and teardown."""

from pathlib import Path

from keras_remote_airflow import materialize

DAG_FILE = Path(__file__).parents[2] / "dags" / "upload_many.py"


def test_every_split_is_uploaded_and_the_folder_removed(run_dag, gcs_server, gcs_bucket, tmp_path):
    (tmp_path / "scratch").mkdir()
    run = run_dag(
        DAG_FILE,
        "upload_many",
        conf={"bucket": gcs_bucket, "namespace": "splits"},
        AIRFLOW_VAR_KERAS_REMOTE_DATA_DIR=str(tmp_path / "scratch"),
        **gcs_server.env(),
    )

    mapped = [f"upload[{index}]" for index in range(3)]
    assert run.states == dict.fromkeys(
        ["make_splits", *mapped, "describe", "remove_splits"], "success"
    ), run.log
    assert run.xcoms["describe"]["return_value"] == {"train": 80, "validation": 10, "test": 10}
    assert list((tmp_path / "scratch").iterdir()) == []
    ref = run.xcoms["upload[1]"]["return_value"]
    folder = Path(materialize(ref, str(tmp_path / "validation")))
    assert sorted(file.name for file in folder.iterdir()) == [f"{n}.csv" for n in range(80, 90)]


def test_the_folder_is_removed_even_if_no_upload_succeeds(run_dag, gcs_server, tmp_path):
    run = run_dag(
        DAG_FILE,
        "upload_many",
        conf={"bucket": "no-such-bucket"},
        AIRFLOW_VAR_KERAS_REMOTE_DATA_DIR=str(tmp_path),
        **gcs_server.env(),
    )
    assert run.states["upload[0]"] == "failed", run.log
    assert run.states["describe"] == "upstream_failed"
    assert run.states["remove_splits"] == "success"
    assert list(tmp_path.iterdir()) == []
