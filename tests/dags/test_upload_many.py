"""The DAG upload_many, run by Airflow: mapped uploads and sensors between setup and teardown."""

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

    mapped = [f"{task}[{index}]" for task in ("upload", "wait") for index in range(3)]
    assert run.states == dict.fromkeys(
        ["make_splits", *mapped, "describe", "remove_splits"], "success"
    ), run.log
    refs = [run.xcoms[f"upload[{index}]"]["return_value"] for index in range(3)]
    assert refs == [run.xcoms[f"wait[{index}]"]["return_value"] for index in range(3)]
    assert run.xcoms["describe"]["return_value"] == {
        split: ref["gcs_uri"]
        for split, ref in zip(("train", "validation", "test"), refs, strict=True)
    }
    assert list((tmp_path / "scratch").iterdir()) == []
    folder = Path(materialize(refs[1], str(tmp_path / "validation")))
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
