"""The DAG wait_for_dataset, run by Airflow: it knows a hash, and finds the bytes."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from keras_remote_airflow import Data, upload_data

DAG_FILE = Path(__file__).parents[2] / "dags" / "wait_for_dataset.py"


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "dataset"
    (folder / "eval").mkdir(parents=True)
    (folder / "train.csv").write_text("1,2,3\n")
    (folder / "eval" / "eval.csv").write_text("4,5\n")
    return Data(str(folder))


@pytest.fixture
def wait_for(run_dag, gcs_server, gcs_bucket):
    """Run the DAG for a dataset that is, or will be, in the namespace "team-a"."""

    def run(dataset):
        return run_dag(
            DAG_FILE,
            "wait_for_dataset",
            conf={
                "content_hash": dataset.content_hash(),
                "bucket": gcs_bucket,
                "namespace": "team-a",
            },
            STORAGE_EMULATOR_HOST=gcs_server.url,
        )

    return run


def _check(run, dataset, bucket):
    assert run.states == {"wait": "success", "describe": "success"}, run.log
    assert run.xcoms["describe"]["return_value"] == {
        "gcs_uri": f"gs://{bucket}/team-a/data-cache/{dataset.content_hash()}",
        "is_dir": True,
        "files": 2,
        "bytes": 10,
    }


def test_a_dataset_that_is_there_is_found_by_its_hash_alone(wait_for, dataset, gcs_bucket):
    upload_data(gcs_bucket, dataset, namespace_prefix="team-a")

    run = wait_for(dataset)

    _check(run, dataset, gcs_bucket)
    assert "deferr" not in run.log.lower()  # it was there at the first look


def test_the_sensor_defers_until_the_dataset_is_published(
    wait_for, dataset, gcs_server, gcs_bucket
):
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(wait_for, dataset)
        # Once by the sensor, and once more by the trigger it handed over to.
        while _looks(gcs_server, dataset) < 2 and not running.done():
            time.sleep(0.05)
        upload_data(gcs_bucket, dataset, namespace_prefix="team-a")
        run = running.result()

    _check(run, dataset, gcs_bucket)
    assert "deferr" in run.log.lower()


def _looks(server, dataset):
    """How often somebody asked for the dataset's marker."""
    return sum(dataset.content_hash() in request.path for request in server.requests)
