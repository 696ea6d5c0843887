"""Train only when the data changed: two DAGs, connected by an asset alias.

    upload_when_changed   upload        every hour; new data adds an event to the alias "digits"
    train_when_changed    find >> train whenever the alias has an event

The first one uploads the folder every hour. If the data hasn't changed, that is a cache hit: it
costs a read of the folder and two requests, and adds no event. Only events start the second one.

Airflow variables say where things are:

    keras_remote_bucket      the Cloud Storage bucket; no default
    keras_remote_namespace   the folder inside it; default: "default"
    keras_remote_data_dir    holds the folder digits/, with one folder per class; `train_digits`
                             writes it
"""

from collections import Counter
from datetime import datetime
from pathlib import Path

try:
    from airflow.sdk import AssetAlias, dag, get_current_context, task
except ImportError:  # Airflow 2
    from airflow.datasets import DatasetAlias as AssetAlias
    from airflow.decorators import dag, task
    from airflow.operators.python import get_current_context

from keras_remote_airflow import Data, DataUploadOperator, ref_from_triggering_event

DIGITS = AssetAlias("digits")


@dag(
    schedule="@hourly",
    start_date=datetime(2025, 1, 1),
    catchup=False,
    max_active_runs=1,
    doc_md=__doc__,
    tags=["example", "keras_remote"],
)
def upload_when_changed():
    DataUploadOperator(
        task_id="upload",
        data="{{ var.value.keras_remote_data_dir }}/digits",
        bucket_name="{{ var.value.keras_remote_bucket }}",
        namespace_prefix="{{ var.value.get('keras_remote_namespace', 'default') }}",
        outlets=[DIGITS],
    )


@task
def find() -> dict:
    """Return the ref of the dataset whose upload started this run."""
    return ref_from_triggering_event(get_current_context(), DIGITS)


@task.local_data
def train(path: str) -> dict:
    """Train a minimal model, the share of each class.

    `train_digits` trains a real one. This example is about where the data comes from.
    """
    images = Counter(image.parent.name for image in Path(path).glob("*/*"))
    model = {label: images[label] / images.total() for label in sorted(images)}
    print(f"trained on {images.total()} images: {model}")
    return {
        "model": model,
        "images": images.total(),
        # Computed from the files that were opened here, not copied from the event.
        "content_hash": Data(path).content_hash(),
    }


@dag(
    schedule=[DIGITS],
    start_date=datetime(2025, 1, 1),
    catchup=False,
    doc_md=__doc__,
    tags=["example", "keras_remote"],
)
def train_when_changed():
    train(find())


upload_when_changed()
train_when_changed()
