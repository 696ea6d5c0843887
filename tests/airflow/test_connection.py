"""What the connection arguments of operators, sensors, triggers and decorators do."""

import asyncio
import json
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.api_core.exceptions import ServiceUnavailable

from keras_remote_airflow import CacheSensor, DataUploadOperator, connection
from keras_remote_airflow._compat import AirflowException, AirflowFailException, make_gcs_hook
from keras_remote_airflow.core.errors import StoreError
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


TASKS = {
    "upload": lambda path, ref, **bare: upload(path, **bare),
    "wait": lambda path, ref, **bare: CacheSensor(task_id="wait", data_ref=ref, **bare),
    "use": lambda path, ref, **bare: use(ref, **bare),
}


@pytest.mark.parametrize("task", TASKS)
def test_missing_credentials_are_one_short_error_without_frames_of_googles(
    execute, dataset, monkeypatch, tmp_path, task
):
    ref, _ = execute(upload(dataset))
    monkeypatch.setenv("AIRFLOW_CONN_BARE", '{"conn_type": "google_cloud_platform"}')
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # else it asks for a metadata server
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    with pytest.raises(StoreError, match=r"^no Google Cloud credentials") as caught:
        TASKS[task](dataset, ref, gcp_conn_id="bare").execute(CONTEXT)
    assert (caught.value.status, caught.value.transient) == (401, False)
    assert "'bare'" in str(caught.value)
    assert "Name a key in the connection" in str(caught.value)
    assert "google/auth" not in "".join(traceback.format_exception(caught.value))


# Keys in a connection, what the error says of them, and whether that is for good.
BAD_KEYS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "no private key": ({"keyfile_dict": '{"type": "service_account"}'}, "'private_key'", True),
    "no account": ({"keyfile_dict": '{"private_key": "x"}'}, "", True),
    "no text": ({"keyfile_dict": '{"private_key": 5}'}, "", True),
    "no JSON": ({"keyfile_dict": "{nope"}, "Invalid key JSON", True),
    "no object": ({"keyfile_dict": "5"}, "", True),
    "no key file": ({"key_path": "/nope.json"}, "/nope.json", False),
}


@pytest.mark.parametrize("case", BAD_KEYS)
@pytest.mark.parametrize("task", TASKS)
def test_a_key_that_cannot_be_used_is_one_error_that_names_the_connection(
    execute, dataset, monkeypatch, task, case
):
    extra, words, for_good = BAD_KEYS[case]
    ref, _ = execute(upload(dataset))
    uri = {"conn_type": "google_cloud_platform", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_MINE", json.dumps(uri))
    kind = AirflowFailException if for_good else StoreError
    with pytest.raises(kind, match=f"connection 'mine'.*{words}") as caught:
        TASKS[task](dataset, ref, gcp_conn_id="mine").execute(CONTEXT)
    assert "".join(traceback.format_exception(caught.value)).count("Traceback (") == 1


@pytest.mark.parametrize(
    "error",
    [
        ServiceUnavailable("Secret Manager is away"),
        AirflowException("Failed getting value of secret mine."),
        ConnectionResetError("reset"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_secret_that_cannot_be_read_now_is_left_to_the_tasks_retries(
    execute, dataset, monkeypatch, error
):
    def failing():
        raise error

    hook = SimpleNamespace(get_conn=failing)
    monkeypatch.setattr(connection, "make_gcs_hook", lambda **_: hook)
    with pytest.raises(StoreError, match="'mine'"):
        execute(upload(dataset, gcp_conn_id="mine"))


def test_a_sensor_waits_out_an_outage_while_it_gets_its_credentials(execute, dataset, monkeypatch):
    ref, _ = execute(upload(dataset))
    outages = [StoreError("the token service is away", transient=True)] * 2

    def failing_twice(**arguments):
        if outages:
            raise outages.pop()
        return make_gcs_hook(**arguments)

    monkeypatch.setattr(connection, "make_gcs_hook", failing_twice)
    wait = CacheSensor(task_id="wait", data_ref=ref, poke_interval=0.01, timeout=5)
    assert execute(wait)[0] == ref
    assert outages == []


@pytest.mark.parametrize("empty", ["", "None"])
def test_a_template_that_renders_to_nothing_names_no_connection(execute, dataset, empty):
    with pytest.raises(AirflowFailException, match="gcp_conn_id must not be empty"):
        execute(upload(dataset, gcp_conn_id=empty))
    chain: dict[str, Any] = {"impersonation_chain": empty, "user_project": empty}
    ref, _ = execute(upload(dataset, **chain))
    assert execute(CacheSensor(task_id="wait", data_ref=ref, mount_path=empty, **chain))[0] == ref


async def events(trigger):
    return [event.payload async for event in trigger.run()]
