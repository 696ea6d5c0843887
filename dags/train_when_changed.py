"""Train when the data changed, and only then: two DAGs that know each other through an asset alias.

    upload_when_changed   upload        every hour; new data adds an event to the alias "digits"
    train_when_changed    train         whenever the alias has an event

The first one looks at the folder every hour. Unchanged data is a cache hit, adds no event, and
costs a read of the folder and two requests. The second one never asks what time it is.

Where things are comes from Airflow variables:

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

from keras_remote_airflow import (
    Data,
    DataUploadOperator,
    materialize,
    ref_from_triggering_event,
)

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
def train() -> dict:
    """Train the humblest of models: the share of each class, which is what a blind guesser needs.

    `train_digits` shows a real one. What matters here is where the data comes from.
    """
    ref = ref_from_triggering_event(get_current_context())
    folder = Path(materialize(ref))
    images = Counter(path.parent.name for path in folder.glob("*/*"))
    model = {label: images[label] / images.total() for label in sorted(images)}
    print(f"trained on {images.total()} images in {ref['gcs_uri']}: {model}")
    return {
        "model": model,
        "images": images.total(),
        # Computed from the files that were opened here, not taken over from the event.
        "content_hash": Data(str(folder)).content_hash(),
    }


@dag(
    schedule=[DIGITS],
    start_date=datetime(2025, 1, 1),
    catchup=False,
    doc_md=__doc__,
    tags=["example", "keras_remote"],
)
def train_when_changed():
    train()


upload_when_changed()
train_when_changed()
