"""What the connection arguments of operators, sensors, triggers and decorators do."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from keras_remote_airflow import CacheSensor, DataUploadOperator, connection
from keras_remote_airflow._compat import make_gcs_hook
from keras_remote_airflow.decorators import LocalDataOperator

try:
    from airflow.sdk.exceptions import TaskDeferred
except ImportError:  # Airflow 3.1 and older
    from airflow.exceptions import TaskDeferred  # type: ignore[no-redef]

CONTEXT = {"ti": None, "outlet_events": {}, "outlets": [], "inlet_events": {}, "params": {}}


def upload(path, bucket="test-bucket", **arguments):
    return DataUploadOperator(task_id="upload", data=str(path), bucket_name=bucket, **arguments)


def use(ref, **arguments):
    def read(path):
        return Path(path, "train.csv").read_text()

    return LocalDataOperator(
        task_id="use", python_callable=read, op_args=[ref], op_kwargs={}, **arguments
    )


def test_connection_and_impersonation_go_to_the_google_provider(execute, dataset, monkeypatch):
    asked = []

    def recording(**arguments):
        asked.append(arguments)
        return make_gcs_hook(gcp_conn_id="google_cloud_default")

    monkeypatch.setattr(connection, "make_gcs_hook", recording)
    mine: dict[str, Any] = {"gcp_conn_id": "mine", "impersonation_chain": ["a@x", "b@x"]}
    ref, _ = execute(upload(dataset, **mine))
    execute(CacheSensor(task_id="wait", data_ref=ref, **mine))
    use(ref, **mine).execute(CONTEXT)
    assert asked == [mine] * 3


def test_every_request_names_the_project_that_pays(execute, gcs_server, dataset):
    gcs_server.create_bucket("paid", requester_pays=True)
    pays: dict[str, Any] = {"user_project": "payer"}

    wait: dict[str, Any] = {"data": str(dataset), "bucket_name": "paid", "deferrable": True}
    with pytest.raises(TaskDeferred) as deferred:
        execute(CacheSensor(task_id="wait", **wait, **pays))
    ref, _ = execute(upload(dataset, "paid", **pays))
    (event,) = asyncio.run(events(deferred.value.trigger))
    assert event["ref"] == ref
    assert use(ref, **pays).execute(CONTEXT) == "t"

    requests = [request for request in gcs_server.requests if "/paid/" in request.path]
    assert {request.query["userProject"] for request in requests} == {"payer"}


async def events(trigger):
    return [event.payload async for event in trigger.run()]
