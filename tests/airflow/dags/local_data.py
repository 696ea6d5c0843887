"""`@task.local_data` as users write it: each task reports what it was given."""

import os
import signal
from pathlib import Path

import pendulum

from keras_remote_airflow import DataUploadOperator

try:
    from airflow.sdk import dag, get_current_context, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task
    from airflow.operators.python import get_current_context

DATA, DEST = os.environ["TEST_DATA"], os.environ["TEST_DEST"]


def read(path):
    path = Path(path)
    if path.is_file():
        return {path.name: path.read_text()}
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


@task.local_data
def nested(everything, again, *, plain, run_id):
    pair = everything["pair"]
    return {
        "read": read(everything["train"][0]),
        "file": read(pair[0]),
        "again": again == everything["train"][0],
        "pair": [type(pair).__name__, pair[1]],
        "plain": plain,
        "run_id": run_id == get_current_context()["run_id"],
        "paths": [again, pair[0]],
    }


@task.local_data
def reduce(paths):
    return {"type": type(paths).__name__, "read": [read(path) for path in paths]}


@task.local_data
def mapped(path, suffix):
    return f"{read(path)}{suffix}"


@task.local_data(multiple_outputs=True)
def raises(path):
    get_current_context()["ti"].xcom_push(key="path", value=path)
    assert read(path)
    raise RuntimeError("the model diverged")


@task.local_data(retries=2, retry_delay=pendulum.duration(seconds=0))
def never_runs(path):
    raise RuntimeError("unreachable")


@task.local_data(cache_dir="{{ params.dest }}")
def keep(path):
    return path


@task.local_data(retries=1, retry_delay=pendulum.duration(seconds=0))
def killed(path):
    Path(DEST, "killed").write_text(path)
    os.kill(os.getpid(), signal.SIGTERM)
    return "went on"


@dag(
    schedule=None,
    start_date=pendulum.datetime(2024, 1, 1),
    catchup=False,
    params={"dest": os.path.join(DEST, "kept")},
)
def local_data():
    folder = DataUploadOperator(
        task_id="folder", data=DATA, bucket_name="test-bucket", mount_path="/no/such/mount"
    )
    file = DataUploadOperator(
        task_id="file", data=os.path.join(DATA, "train.csv"), bucket_name="test-bucket"
    )
    both = DataUploadOperator.partial(task_id="both", bucket_name="test-bucket").expand(
        data=[DATA, os.path.join(DATA, "train.csv")]
    )
    done = [
        nested(
            {"train": [folder.output], "pair": (file.output, 1)},
            folder.output,
            plain={"epochs": [3, "{{ run_id and 4 }}"]},
        ),
        reduce(both.output),
        mapped.partial(suffix="!").expand(path=both.output),
        raises(folder.output),
        never_runs({"__data_ref__": True, "gcs_uri": "gs://x", "is_dir": "yes"}),
    ]
    first = keep.override(task_id="first")(folder.output)
    second = keep.override(task_id="second")(folder.output)
    first >> second
    # Last: on Airflow 2 it ends dag.test().
    last = killed.override(trigger_rule="all_done")(folder.output)
    [*done, second] >> last


local_data()
