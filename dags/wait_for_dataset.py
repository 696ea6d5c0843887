"""Another team's DAG: it knows only a content hash, and waits until that dataset is published.

Trigger it with the hash in a report of `train_digits`. While the dataset is absent, the sensor
waits in the triggerer and holds no worker slot.

Params that are left empty come from the Airflow variables keras_remote_bucket (which has no
default) and keras_remote_namespace ("default").
"""

from datetime import datetime
from pathlib import Path

try:
    from airflow.sdk import Param, dag, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task
    from airflow.models.param import Param

from keras_remote_airflow import CacheSensor


@task.local_data
def describe(local: str, gcs_uri: str) -> dict:
    """Return what is in the dataset, of which `local` is a verified copy."""
    path = Path(local)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    found = {
        "gcs_uri": gcs_uri,
        "is_dir": path.is_dir(),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
    }
    print(f"found {found['files']} files, {found['bytes']} bytes in {gcs_uri}")
    return found


@dag(
    schedule=None,
    start_date=datetime(2025, 1, 1),
    catchup=False,
    params={
        "content_hash": Param(
            type="string",
            pattern="^[0-9a-f]{64}$",
            description="64 hex digits, as in a report of train_digits",
        ),
        "bucket": Param("", type="string", description="empty: variable keras_remote_bucket"),
        "namespace": Param("", type="string", description="empty: variable keras_remote_namespace"),
    },
    doc_md=__doc__,
    tags=["example", "keras_remote"],
)
def wait_for_dataset():
    ready = CacheSensor(
        task_id="wait",
        content_hash="{{ params.content_hash }}",
        bucket_name="{{ params.bucket or var.value.keras_remote_bucket }}",
        namespace_prefix=(
            "{{ params.namespace or var.value.get('keras_remote_namespace', 'default') }}"
        ),
        deferrable=True,
        poke_interval=10,
        timeout=24 * 60 * 60,
    )
    describe(ready.output, ready.output["gcs_uri"])


wait_for_dataset()
