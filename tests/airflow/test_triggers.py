"""CacheTrigger on an event loop of its own, against a local Cloud Storage."""

import asyncio
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from asgiref.sync import sync_to_async
from google.auth.credentials import AnonymousCredentials, Credentials
from google.cloud import storage

from keras_remote_airflow import CacheSensor, RetryPolicy, connection, upload_data
from keras_remote_airflow._compat import make_gcs_hook
from keras_remote_airflow.awaited import AwaitedDataset
from keras_remote_airflow.core.errors import StoreError
from keras_remote_airflow.core.refs import make_data_ref
from keras_remote_airflow.testing import Fault
from keras_remote_airflow.triggers import CacheTrigger

try:
    from airflow.sdk.exceptions import AirflowNotFoundException, TaskDeferred
except ImportError:  # Airflow 3.1 and older
    from airflow.exceptions import AirflowNotFoundException, TaskDeferred  # type: ignore[no-redef]

GOLDEN = "15d41417b45aa09c0450d8955b845bb278f2990728bcc5d919d62309a2c6ebee"
MARKER = f"default/data-cache/{GOLDEN}/.cache_marker"
REF = make_data_ref(f"gs://test-bucket/default/data-cache/{GOLDEN}", is_dir=True)


def trigger(seconds=5.0, waits=(), **awaited):
    known = {"bucket_name": "test-bucket", "content_hash": GOLDEN}
    fields = asdict(AwaitedDataset(**known | awaited))
    return CacheTrigger(fields, 0.01, time.time() + seconds, **dict(waits))


async def events(cache_trigger):
    return [event.payload async for event in cache_trigger.run()]


def run(cache_trigger):
    (event,) = asyncio.run(events(cache_trigger))
    assert json.loads(json.dumps(event)) == event
    return event


@pytest.fixture
def published(gcs_server, dataset):
    upload_data("test-bucket", str(dataset))
    gcs_server.clear_requests()


@pytest.fixture
def impatient(monkeypatch):
    """Looks are given up after their first failure, and one without an answer at once."""
    monkeypatch.setattr(AwaitedDataset, "policy", RetryPolicy(deadline=0, stall_timeout=0.1))


def test_fires_the_ref(published):
    assert run(trigger()) == {"status": "found", "ref": REF}


def test_survives_its_own_serialization_through_json(published):
    before = trigger(
        impersonation_chain=["a", "b"],
        user_project="payer",
        layout="kinetic",
        mount_path="/m",
        verify="full",
        waits={"exponential_backoff": True, "max_wait": 5.0, "silent_fail": True},
    )
    path, arguments = json.loads(json.dumps(before.serialize()))
    assert path == "keras_remote_airflow.triggers.CacheTrigger"
    assert CacheTrigger(**arguments).serialize() == before.serialize()


def test_what_a_sensor_defers_is_plain_json(gcs_server):
    sensor = CacheSensor(
        task_id="wait",
        content_hash=GOLDEN,
        bucket_name="test-bucket",
        impersonation_chain=None,
        deferrable=True,
        timeout=60,
        poke_interval=7,
    )
    with pytest.raises(TaskDeferred) as deferred:
        sensor.execute({})
    _, arguments = deferred.value.trigger.serialize()
    assert json.loads(json.dumps(arguments)) == arguments
    assert arguments["poke_interval"] == 7
    assert 50 < arguments["deadline"] - time.time() <= 60
    assert deferred.value.timeout.total_seconds() > 60


def test_looks_again_until_it_is_there(published, gcs_server):
    gcs_server.add_fault(Fault(path=MARKER, times=3, status=404))
    assert run(trigger())["status"] == "found"
    looks = [request.status for request in gcs_server.requests if request.path.endswith(MARKER)]
    assert looks == [404, 404, 404, 200]


@pytest.mark.parametrize(
    ("waits", "expected"),
    [
        ({}, [0.01] * 6),
        ({"exponential_backoff": True}, [0.01, 0.02, 0.04, 0.08, 0.16, 0.32]),
        ({"exponential_backoff": True, "max_wait": 0.05}, [0.01, 0.02, 0.04, 0.05, 0.05, 0.05]),
        ({"max_wait": 0.005}, [0.01] * 6),
    ],
)
def test_waits_as_long_as_it_is_told(published, gcs_server, monkeypatch, waits, expected):
    slept = []
    tick, trigger_thread = asyncio.sleep, threading.current_thread()

    async def sleep(seconds):
        if threading.current_thread() is trigger_thread:  # the local server sleeps too
            slept.append(seconds)
        await tick(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    gcs_server.add_fault(Fault(path=MARKER, times=6, status=404))
    assert run(trigger(seconds=60, waits=waits))["status"] == "found"
    assert slept == pytest.approx(expected)


def test_silent_fail_waits_a_refusal_out(published, gcs_server):
    gcs_server.add_fault(Fault(path=MARKER, times=2, status=403))
    assert run(trigger(waits={"silent_fail": True}))["status"] == "found"


def test_gives_up_at_the_deadline(gcs_server):
    event = run(trigger(seconds=0.1))
    assert event["status"] == "timeout"
    assert GOLDEN in event["message"]


@pytest.mark.parametrize(
    ("answered", "words"),
    [
        (0, "^no look succeeded .*may be there.*HTTP 503"),
        (2, "^the last .* looks failed.*HTTP 503"),
    ],
)
def test_a_timeout_while_cloud_storage_is_away_says_so(gcs_server, impatient, answered, words):
    if answered:
        gcs_server.add_fault(Fault(path=MARKER, times=answered, status=404))
    gcs_server.add_fault(Fault(path=MARKER, times=0, status=503))
    event = run(trigger(seconds=0.2))
    assert event["status"] == "timeout"
    assert re.search(words, event["message"])
    assert GOLDEN in event["message"]


def test_looks_once_even_if_the_deadline_has_passed(published):
    assert run(trigger(seconds=-1))["status"] == "found"


def test_waits_while_only_the_marker_is_left(published, gcs_server):
    for name in list(gcs_server.objects("test-bucket")):
        if name != MARKER:
            gcs_server.delete("test-bucket", name)
    assert run(trigger(seconds=0.1))["status"] == "timeout"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, None])
def test_an_outage_is_looked_at_again(published, gcs_server, impatient, status):
    fault = Fault(path=MARKER, times=2, status=status)
    gcs_server.add_fault(fault if status else replace(fault, action="stall"))
    assert run(trigger())["status"] == "found"


@pytest.mark.parametrize("status", [400, 401, 403, 407, 410])
def test_a_refusal_fails_but_may_be_retried(published, gcs_server, status):
    gcs_server.add_fault(Fault(path=MARKER, times=0, status=status))
    event = run(trigger())
    assert (event["status"], event["permanent"]) == ("failed", False)
    assert str(status) in event["message"]


def test_an_unreadable_marker_fails_for_good_and_is_quoted(gcs_server):
    gcs_server.put("test-bucket", MARKER, b"not a receipt")
    event = run(trigger())
    assert (event["status"], event["permanent"]) == ("failed", True)
    assert "not a receipt" in event["message"]


@pytest.mark.parametrize(
    ("error", "times"),
    [
        (ConnectionError("the database is restarting"), 2),
        (AirflowNotFoundException("what is said of a backend that does not answer, too"), 4),
        (StoreError("the token service is away", transient=True), 9),
    ],
)
def test_fetches_the_connection_once_and_tries_again_when_that_fails(
    published, monkeypatch, error, times
):
    calls = []

    def failing(**arguments):
        calls.append(arguments)
        if len(calls) <= times:
            raise error
        return make_gcs_hook(**arguments)

    monkeypatch.setattr(connection, "make_gcs_hook", failing)
    assert run(trigger())["status"] == "found"
    assert len(calls) == times + 1


def test_a_connection_that_never_comes_is_an_error_with_its_own_traceback(gcs_server, monkeypatch):
    def failing(**arguments):
        raise LookupError("no connection mine")

    monkeypatch.setattr(connection, "make_gcs_hook", failing)
    with pytest.raises(LookupError, match="no connection mine"):
        run(trigger())


@pytest.mark.slow
def test_the_event_loop_is_never_blocked(published, gcs_server):
    run(trigger())  # the first connection imports the google provider, which holds the GIL
    gcs_server.add_fault(Fault(path=MARKER, times=0, latency=3))

    async def with_heartbeat():
        gaps = []
        waiting = asyncio.ensure_future(events(trigger()))
        while not waiting.done():
            before = time.monotonic()
            await asyncio.sleep(0.01)
            gaps.append(time.monotonic() - before)
        return await waiting, gaps

    (event,), gaps = asyncio.run(with_heartbeat())
    assert event["status"] == "found"
    assert max(gaps) < 2, "a look took 3 s"


def test_a_hundred_triggers_on_one_event_loop_share_a_connection(
    published, gcs_server, monkeypatch
):
    gcs_server.add_fault(Fault(path=MARKER, times=100, status=404))
    fetched = []

    def recording(**arguments):
        fetched.append(arguments)
        return make_gcs_hook(**arguments)

    monkeypatch.setattr(connection, "make_gcs_hook", recording)

    async def hundred():
        return await asyncio.gather(*(events(trigger(seconds=60)) for _ in range(100)))

    assert all(event["status"] == "found" for (event,) in asyncio.run(hundred()))
    assert len(fetched) == 1


def test_a_refused_connection_is_not_handed_on(published, gcs_server, monkeypatch):
    fetched = []

    def recording(**arguments):
        fetched.append(arguments)
        return make_gcs_hook(**arguments)

    monkeypatch.setattr(connection, "make_gcs_hook", recording)
    gcs_server.add_fault(Fault(path="refused", times=0, status=401))

    async def three():
        waiting = asyncio.create_task(events(trigger(content_hash="0" * 64)))
        (refused,) = await events(trigger(namespace_prefix="refused"))
        (found,) = await events(trigger())
        waiting.cancel()
        return refused["status"], found["status"]

    assert asyncio.run(three()) == ("failed", "found")
    assert len(fetched) == 2


@pytest.fixture
def endpoints(monkeypatch):
    """Airflow connection to URL, for connections that are not in Airflow."""
    urls = {}

    def hook(gcp_conn_id, impersonation_chain):
        if gcp_conn_id not in urls:
            return make_gcs_hook(gcp_conn_id=gcp_conn_id)
        options = {"api_endpoint": urls[gcp_conn_id]}
        client = storage.Client("p", AnonymousCredentials(), client_options=options)
        return SimpleNamespace(get_conn=lambda: client)

    monkeypatch.setattr(connection, "make_gcs_hook", hook)
    return urls


async def others_go_on():
    """Return once work of other triggers is done, and that of a sensor elsewhere."""
    assert await asyncio.to_thread(int) == await sync_to_async(int)() == 0
    (event,) = await events(trigger())
    assert event["status"] == "found"


async def cancelled(*tasks):
    for task in tasks:
        task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks)


def test_an_endpoint_that_never_answers_holds_up_no_other_trigger(published, endpoints):
    reached, left = asyncio.Event(), asyncio.Event()

    async def accept(reader, writer):
        reached.set()
        await reader.read()
        left.set()
        writer.close()

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            endpoints["dead"] = f"http://{host}:{port}"
            waiting = [
                asyncio.create_task(events(trigger(seconds=600, gcp_conn_id="dead")))
                for _ in range(40)
            ]
            await reached.wait()
            await others_go_on()
            await cancelled(*waiting)
            async with asyncio.timeout(30):
                await left.wait()  # the last one has closed the connections

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("what", ["connection", "token"])
def test_a_fetch_that_never_ends_holds_up_no_other_trigger(
    published, gcs_server, endpoints, monkeypatch, what
):
    begun, ends = threading.Event(), threading.Event()

    def never_ending(*_):
        begun.set()
        ends.wait(60)

    class Stuck(Credentials):
        refresh = never_ending

    def stuck_hook(gcp_conn_id, **arguments):
        if gcp_conn_id != "stuck":
            return make_gcs_hook(gcp_conn_id=gcp_conn_id)
        if what == "connection":
            never_ending()
        options = {"api_endpoint": gcs_server.url}
        client = storage.Client("p", Stuck(), client_options=options)
        return SimpleNamespace(get_conn=lambda: client)

    monkeypatch.setattr(connection, "make_gcs_hook", stuck_hook)

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        waiting = asyncio.create_task(events(trigger(seconds=600, gcp_conn_id="stuck")))
        await asyncio.get_running_loop().run_in_executor(ThreadPoolExecutor(1), begun.wait)
        await others_go_on()
        await cancelled(waiting)

    try:
        asyncio.run(asyncio.wait_for(main(), 60))
        assert not ends.is_set()
    finally:
        ends.set()


def test_a_fetch_that_never_ends_holds_up_no_later_try(published, monkeypatch):
    run(trigger())  # the first connection imports the google provider, which takes a while
    begun, ends = [], threading.Event()

    def stuck_at_first(**arguments):
        begun.append(arguments)
        if len(begun) == 1:
            ends.wait(60)
        return make_gcs_hook(**arguments)

    monkeypatch.setattr(connection, "make_gcs_hook", stuck_at_first)
    monkeypatch.setattr(AwaitedDataset, "connect_seconds", 0.2)
    try:
        assert run(trigger())["status"] == "found"
        assert len(begun) == 2
    finally:
        ends.set()


def test_the_last_look_ends_whether_or_not_there_is_an_answer(published, gcs_server, impatient):
    gcs_server.add_fault(Fault(path=MARKER, times=0, action="stall"))
    event = run(trigger(seconds=-1))
    assert event["status"] == "timeout"
    assert "no look succeeded" in event["message"]


def test_a_look_of_a_sensor_gives_up_within_seconds_because_there_will_be_another():
    assert AwaitedDataset.policy.deadline + AwaitedDataset.policy.stall_timeout <= 20
