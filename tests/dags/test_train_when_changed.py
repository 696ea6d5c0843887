"""The DAGs of train_when_changed, in a scheduler's hands: one training per changed dataset."""

from pathlib import Path

import pytest

from keras_remote_airflow import Data

DAG_FILE = Path(__file__).parents[2] / "dags" / "train_when_changed.py"


@pytest.mark.timeout(600)
def test_training_runs_once_for_each_change(
    run_dag, run_scheduler, gcs_server, gcs_bucket, tmp_path
):
    digits = tmp_path / "digits"
    for label in "01":
        (digits / label).mkdir(parents=True)
        (digits / label / "a.png").write_bytes(label.encode())
    env = gcs_server.env() | {
        "AIRFLOW_VAR_KERAS_REMOTE_BUCKET": gcs_bucket,
        "AIRFLOW_VAR_KERAS_REMOTE_DATA_DIR": str(tmp_path),
    }

    def upload():
        run = run_dag(DAG_FILE, "upload_when_changed", **env)
        assert run.states == {"upload": "success"}, run.log
        return run.xcoms["upload"]["upload_stats"]["cache_hit"]

    def trainings():
        runs = run_scheduler(DAG_FILE, "train_when_changed", **env)
        assert [run.states for run in runs] == [{"train": "success"}] * len(runs), runs[-1].log
        return [run.xcoms["train"]["return_value"] for run in runs]

    # The scheduler runs the hourly upload too, which is what the first training waits for.
    first = Data(str(digits)).content_hash()
    assert [training["content_hash"] for training in trainings()] == [first]

    assert upload() is True
    (digits / "0" / "b.png").write_bytes(b"new")
    assert upload() is False
    _, second = trainings()
    assert second == {
        "model": {"0": 2 / 3, "1": 1 / 3},
        "images": 3,
        "content_hash": Data(str(digits)).content_hash(),
    }
