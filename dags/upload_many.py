"""Several datasets, one task each: dynamic task mapping, with setup and teardown around it.

    make_splits >> upload[0], upload[1], upload[2] >> describe >> remove_splits

The setup task writes the splits into a scratch folder. The teardown task removes the folder, even
if uploads failed. The datasets stay on Cloud Storage, and a second run finds all three.

`describe` gets all three datasets at once, as a list of local paths.

Params that are left empty come from the Airflow variables keras_remote_bucket (which has no
default) and keras_remote_namespace ("default"). The scratch folder is on the worker. If there are
several workers, set keras_remote_data_dir to a folder that they share.
"""

import shutil
from datetime import datetime
from pathlib import Path
from tempfile import mkdtemp

try:
    from airflow.sdk import Param, dag, setup, task, teardown
except ImportError:  # Airflow 2
    from airflow.decorators import dag, setup, task, teardown
    from airflow.models.param import Param

from keras_remote_airflow import DataUploadOperator

SPLITS = {"train": range(80), "validation": range(80, 90), "test": range(90, 100)}


@setup
def make_splits(data_dir: str) -> list:
    """Write a folder of numbers and their squares for each split; return the folders."""
    scratch = Path(mkdtemp(prefix="splits-", dir=data_dir or None))
    for split, numbers in SPLITS.items():
        (scratch / split).mkdir()
        for number in numbers:
            (scratch / split / f"{number:02}.csv").write_text(f"{number},{number**2}\n")
    return [str(scratch / split) for split in SPLITS]


@task.local_data
def describe(folders: list, copies: list) -> dict:
    """Return the number of files in each split. The copies are in the order of the folders."""
    found = {
        Path(folder).name: len(list(Path(copy).iterdir()))
        for folder, copy in zip(folders, copies, strict=True)
    }
    print(found)
    return found


@teardown
def remove_splits(folders: list) -> None:
    shutil.rmtree(Path(folders[0]).parent)


@dag(
    schedule=None,
    start_date=datetime(2025, 1, 1),
    catchup=False,
    params={
        "bucket": Param("", type="string", description="empty: variable keras_remote_bucket"),
        "namespace": Param("", type="string", description="empty: variable keras_remote_namespace"),
    },
    doc_md=__doc__,
    tags=["example", "keras_remote"],
)
def upload_many():
    folders = make_splits("{{ var.value.get('keras_remote_data_dir', '') }}")
    upload = DataUploadOperator.partial(
        task_id="upload",
        bucket_name="{{ params.bucket or var.value.keras_remote_bucket }}",
        namespace_prefix=(
            "{{ params.namespace or var.value.get('keras_remote_namespace', 'default') }}"
        ),
    ).expand(data=folders)
    # `folders`, the output of the setup task, is an argument of the teardown task: this makes the
    # two a pair. The uploads run in between.
    describe(folders, upload.output) >> remove_splits(folders)


upload_many()
