"""A user's project, with README's DAGs in it, passes `mypy --strict`."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from ..docs.pages import REPOSITORY, for_this_airflow, read_blocks

pytest.importorskip("mypy")  # the older lines may be installed without the tools

# mypy also complains about each `type: ignore` here that nothing needs.
MORE = """
from pathlib import Path

from airflow.sdk import dag, task  # Airflow 2: from airflow.decorators import dag, task

from keras_remote_airflow import CacheSensor, Data, DataUploadOperator, find, upload_data
from keras_remote_airflow.consumers import gcsfuse_pod_kwargs, vertex_command_kwargs
from keras_remote_airflow.decorators import LocalDataOperator


@task
def place() -> str:
    return "/data"


@task
def judge(uri: str, files: int) -> float:
    return len(uri) / files


@task.local_data
def train(path: str, epochs: int = 3) -> float:
    return len(path) * epochs


@dag(schedule=None)
def everything() -> None:
    where = place()
    upload = DataUploadOperator(
        task_id="upload",
        data=where,
        bucket_name=where,
        namespace_prefix=where,
        mount_path=where,
        gcp_conn_id=where,
        impersonation_chain=where,
        user_project=where,
        layout="kinetic",
        verify="full",
        hash_index=where,
        on_cache_hit="skip",
    )
    wait = CacheSensor(task_id="wait", data_ref=upload.output, mount_path=where, retries=3)
    by_hash = CacheSensor(task_id="hash", content_hash=where, bucket_name=where, layout="kinetic")
    DataUploadOperator(task_id="path", data=Path("/data"), bucket_name="b")
    DataUploadOperator(task_id="data", data=Data("/data"), bucket_name="b")
    LocalDataOperator(task_id="local", python_callable=print, op_args=[upload.output], dest=where)
    judge(upload.output["gcs_uri"], by_hash.output["files"])
    train(wait.output, epochs=5)
    where >> upload >> wait

    print(gcsfuse_pod_kwargs(upload, "/data"), gcsfuse_pod_kwargs(where, "/data"))
    print(vertex_command_kwargs(upload.output, ["fit", where]))

    train(1, epochs="5")  # type: ignore[arg-type]
    upload_data("b", Data("/d"), layout="x")  # type: ignore[arg-type]
    find("b", "0" * 64, verify="all")  # type: ignore[arg-type]
"""
# Not on Airflow 2, whose mypy takes our XComArg for Any.
WRONG = """
DataUploadOperator(task_id="a", data=1, bucket_name="b")  # type: ignore[arg-type]
DataUploadOperator(task_id="b", data="/d", bucket_name="b", layout="x")  # type: ignore[arg-type]
CacheSensor(task_id="c", data="/d", bucket_name="b", verify="all")  # type: ignore[arg-type]
DataUploadOperator(task_id="d", data="", bucket_name="b", on_cache_hit="")  # type: ignore[arg-type]
"""
# Our own files are not the user's to check, as where the package is installed. What is skipped is
# nothing that a DAG file uses, and takes mypy five seconds.
CONFIG = """
[mypy]
strict = true
[mypy-keras_remote_airflow.*]
follow_imports = silent
[mypy-cryptography.*,google.protobuf.*,kubernetes.*,kubernetes_asyncio.*,libcst.*,sqlalchemy.*]
follow_imports = skip
"""


def test_a_users_project_passes_mypy_strict(tmp_path):
    more = MORE if version("apache-airflow").startswith("2.") else MORE + WRONG
    (tmp_path / "more.py").write_text(for_this_airflow(more))
    for block in read_blocks(REPOSITORY / "README.md"):
        if block.is_dag_file:
            (tmp_path / f"readme_{block.line}.py").write_text(block.text)
    assert list(tmp_path.glob("readme_*.py"))
    config = tmp_path / "mypy.ini"
    config.write_text(CONFIG)
    # Kept between runs: without it, mypy reads Airflow for seven seconds.
    cache = REPOSITORY / ".mypy_cache" / f"airflow-{version('apache-airflow')}"
    mypy = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", cache, tmp_path],
        env=os.environ | {"MYPYPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert mypy.returncode == 0, mypy.stdout + mypy.stderr
