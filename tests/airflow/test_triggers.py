"""CacheTrigger on an event loop of its own, against a local Cloud Storage."""

import asyncio
import json
import threading
import time
from dataclasses import asdict

import pytest

from keras_remote_airflow import CacheSensor, connection, upload_data
from keras_remote_airflow._compat import make_gcs_hook
from keras_remote_airflow.awaited import AwaitedDataset
from keras_remote_airflow.core.refs import make_data_ref
from keras_remote_airflow.testing import Fault
from keras_remote_airflow.triggers import CacheTrigger

try:
    from airflow.sdk.exceptions import TaskDeferred
except ImportError:  # Airflow 3.1 and older
    from airflow.exceptions import TaskDeferred  # type: ignore[no-redef]

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


def test_looks_once_even_if_the_deadline_has_passed(published):
    assert run(trigger(seconds=-1))["status"] == "found"


def test_waits_while_only_the_marker_is_left(published, gcs_server):
    for name in list(gcs_server.objects("test-bucket")):
        if name != MARKER:
            gcs_server.delete("test-bucket", name)
    assert run(trigger(seconds=0.1))["status"] == "timeout"


def test_rides_out_transient_errors(published, gcs_server):
    gcs_server.add_fault(Fault(path=MARKER, times=2, status=503))
    assert run(trigger())["status"] == "found"


def test_an_unreadable_marker_fails_for_good_and_is_quoted(gcs_server):
    gcs_server.put("test-bucket", MARKER, b"not a receipt")
    event = run(trigger())
    assert (event["status"], event["permanent"]) == ("failed", True)
    assert "not a receipt" in event["message"]


def test_a_refusal_fails_but_may_be_retried(published, gcs_server):
    gcs_server.deny("get")
    event = run(trigger())
    assert (event["status"], event["permanent"]) == ("failed", False)


def test_fetches_the_connection_once_and_tries_again_when_that_fails(published, monkeypatch):
    calls = []

    def failing_twice(**arguments):
        calls.append(arguments)
        if len(calls) <= 2:
            raise ConnectionError("the database is restarting")
        return make_gcs_hook(**arguments)

    monkeypatch.setattr(connection, "make_gcs_hook", failing_twice)
    assert run(trigger())["status"] == "found"
    assert len(calls) == 3


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


def test_a_hundred_triggers_on_one_event_loop_all_find_it(published, gcs_server):
    gcs_server.add_fault(Fault(path=MARKER, times=100, status=404))

    async def hundred():
        return await asyncio.gather(*(events(trigger(seconds=60)) for _ in range(100)))

    assert all(event["status"] == "found" for (event,) in asyncio.run(hundred()))
