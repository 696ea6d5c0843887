"""Train a small Keras model on handwritten digits, uploading them only when they changed.

    write_digits >> upload >> train >> report

Trigger it twice: the second run finds the same bytes under the same content hash, and uploads
nothing. Change one image and trigger it again: the hash changes, and the data is uploaded.

`train` gets the path of a local copy, whose content hash was checked. When it ends, the copy is
removed.

The run's params say where things are. If a param is empty, an Airflow variable says it:

    bucket      keras_remote_bucket      the Cloud Storage bucket; no default
    namespace   keras_remote_namespace   the folder inside it; default: "default"
    data_dir    keras_remote_data_dir    holds the folder digits/; default: data/ beside the DAG
                                         folder, on Cloud Composer /home/airflow/gcs/data
    report_dir  keras_remote_report_dir  gets the reports; default: reports/ inside data_dir
"""

import re
from datetime import datetime
from pathlib import Path

try:
    from airflow.sdk import Param, dag, get_current_context, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task
    from airflow.models.param import Param
    from airflow.operators.python import get_current_context

from keras_remote_airflow import Data, DataUploadOperator

BUCKET = "{{ params.bucket or var.value.keras_remote_bucket }}"
NAMESPACE = "{{ params.namespace or var.value.get('keras_remote_namespace', 'default') }}"
DATA_DIR = "{{ params.data_dir or var.value.get('keras_remote_data_dir', '') }}"
REPORT_DIR = "{{ params.report_dir or var.value.get('keras_remote_report_dir', '') }}"

DEFAULT_DATA_DIR = Path(__file__).resolve().parent.parent / "data"


@task
def write_digits(data_dir: str) -> str:
    """Write scikit-learn's digits as PNG files into one folder per class, unless they are there."""
    folder = Path(data_dir or DEFAULT_DATA_DIR) / "digits"
    # It lies outside the folder, because everything in the folder is uploaded. It is written last:
    # a run that was killed leaves no such file, and the next run writes all images again.
    complete = folder.with_name("digits.complete")
    if complete.exists():
        print(f"{folder} is already there")
        return str(folder)

    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Grey values are 0 to 16. Without compression the bytes, and so the content hash, don't
        # depend on the zlib that Pillow was built with.
        Image.fromarray((image * 255 / 16).astype(np.uint8)).save(path, compress_level=0)
    complete.touch()
    print(f"wrote {len(digits.images)} images to {folder}")
    return str(folder)


@task.local_data
def train(folder: str) -> dict:
    """Train on the bytes that were uploaded; return the figures for the report."""
    import os

    os.environ["KERAS_BACKEND"] = "jax"  # read once, when keras is imported
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import keras
    import numpy as np
    from PIL import Image

    paths = sorted(Path(folder).glob("[0-9]/*.png"))
    x = np.stack([np.asarray(Image.open(path), dtype="float32").ravel() / 255 for path in paths])
    y = np.array([int(path.parent.name) for path in paths])

    keras.utils.set_random_seed(0)
    order = np.random.default_rng(0).permutation(len(x))
    held_out, rest = order[: len(x) // 5], order[len(x) // 5 :]
    model = keras.Sequential(
        [
            keras.layers.Input((64,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x[rest], y[rest], epochs=30, verbose=0)
    _, accuracy = model.evaluate(x[held_out], y[held_out], verbose=0)
    print(f"{accuracy:.4f} of {len(held_out)} held-out images are recognized")

    return {
        "accuracy": round(float(accuracy), 4),
        "trained_on": len(rest),
        "held_out": len(held_out),
        # Computed from the files that were opened here, not copied from the ref.
        "content_hash": Data(folder).content_hash(),
    }


@task
def report(ref: dict, upload: dict, training: dict, data_dir: str, report_dir: str) -> str:
    """Write one page: the accuracy, the content hash, and how much data was uploaded."""
    run_id = get_current_context()["run_id"]
    folder = Path(report_dir or Path(data_dir or DEFAULT_DATA_DIR) / "reports")
    folder.mkdir(parents=True, exist_ok=True)
    # Run ids contain characters such as ":" and "+", which some file systems refuse.
    page = folder / f"train_digits-{re.sub('[^A-Za-z0-9_.-]', '_', run_id)}.md"
    rows = {
        "accuracy": training["accuracy"],
        "images trained on": training["trained_on"],
        "images held out": training["held_out"],
        "content hash": training["content_hash"],
        "data": ref["gcs_uri"],
        "cache": "hit" if upload["cache_hit"] else "miss",
        "files": upload["files"],
        "bytes": upload["bytes"],
        "files uploaded": upload["uploaded_files"],
        "bytes uploaded": upload["uploaded_bytes"],
        "files reused": upload["files"] - upload["uploaded_files"],
        "bytes reused": upload["bytes"] - upload["uploaded_bytes"],
    }
    lines = [f"# train_digits, {run_id}", "", "| what | value |", "|---|---|"]
    lines += [f"| {what} | {value} |" for what, value in rows.items()]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(page.read_text(encoding="utf-8"))
    return str(page)


@dag(
    schedule=None,
    start_date=datetime(2025, 1, 1),
    catchup=False,
    max_active_runs=1,  # two runs would write the same folder
    params={
        "bucket": Param("", type="string", description="empty: variable keras_remote_bucket"),
        "namespace": Param("", type="string", description="empty: variable keras_remote_namespace"),
        "data_dir": Param("", type="string", description="empty: variable keras_remote_data_dir"),
        "report_dir": Param(
            "", type="string", description="empty: variable keras_remote_report_dir"
        ),
    },
    doc_md=__doc__,
    tags=["example", "keras_remote"],
)
def train_digits():
    upload = DataUploadOperator(
        task_id="upload",
        data=write_digits(DATA_DIR),
        bucket_name=BUCKET,
        namespace_prefix=NAMESPACE,
    )
    report(
        ref=upload.output,
        upload=upload.output["upload_stats"],
        training=train(upload.output),
        data_dir=DATA_DIR,
        report_dir=REPORT_DIR,
    )


train_digits()
