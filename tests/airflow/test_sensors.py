"""CacheSensor, executed in this process against a local Cloud Storage.

What needs a scheduler or a trigger (reschedule mode, deferral, retries) is in test_dag_runs.py.
"""

import json
import logging
import os
import traceback
from datetime import timedelta

import pytest

from keras_remote_airflow import CacheSensor, RetryPolicy, upload_data
from keras_remote_airflow._compat import (
    EXECUTION_TIMEOUT_ENDS_DEFERRALS,
    AirflowFailException,
    AirflowSensorTimeout,
    AirflowSkipException,
)
from keras_remote_airflow.awaited import AwaitedDataset
from keras_remote_airflow.core.errors import StoreError
from keras_remote_airflow.core.refs import make_data_ref
from keras_remote_airflow.testing import Fault

try:
    from airflow.sdk.exceptions import TaskDeferred
except ImportError:  # Airflow 3.1 and older
    from airflow.exceptions import TaskDeferred  # type: ignore[no-redef]

GOLDEN = "15d41417b45aa09c0450d8955b845bb278f2990728bcc5d919d62309a2c6ebee"
GCS_URI = f"gs://test-bucket/default/data-cache/{GOLDEN}"
MARKER = f"default/data-cache/{GOLDEN}/.cache_marker"


def sensor(**arguments):
    return CacheSensor(task_id="wait", poke_interval=0.01, **{"timeout": 5} | arguments)


@pytest.fixture
def published(gcs_server, dataset):
    upload_data("test-bucket", str(dataset))
    gcs_server.clear_requests()
    return make_data_ref(GCS_URI, is_dir=True)


@pytest.mark.parametrize("deferrable", [False, True])
@pytest.mark.parametrize("spell", [dict, repr, json.dumps])
def test_a_ref_is_enough(execute, published, spell, deferrable):
    ref, xcoms = execute(sensor(data_ref=spell(published), deferrable=deferrable))
    assert ref == published
    assert xcoms == {}


@pytest.mark.parametrize("deferrable", [False, True])
def test_data_is_hashed_on_the_worker(execute, published, dataset, deferrable):
    task = sensor(data=str(dataset), bucket_name="test-bucket", deferrable=deferrable)
    assert execute(task)[0] == published


def test_the_same_task_object_hashes_anew_when_it_is_executed_again(execute, published, dataset):
    task = sensor(data=str(dataset), bucket_name="test-bucket", timeout=0)
    assert execute(task)[0] == published
    (dataset / "train.csv").write_text("other")
    with pytest.raises(AirflowSensorTimeout):
        execute(task)


def test_data_is_hashed_once_however_often_poke_mode_looks(execute, published, dataset, gcs_server):
    gcs_server.add_fault(Fault(path=MARKER, times=1, status=404))
    task = sensor(data=str(dataset), bucket_name="test-bucket")
    assert not task.poke({})
    (dataset / "train.csv").write_text("changed since")
    assert task.poke({}).xcom_value == published


def test_the_refs_own_mount_path_yields_to_the_parameter(execute, published):
    published["mount_path"] = "/from/ref"
    assert execute(sensor(data_ref=published))[0]["mount_path"] == "/from/ref"
    assert execute(sensor(data_ref=published, mount_path="/mine"))[0]["mount_path"] == "/mine"


@pytest.mark.parametrize("empty", ["None", ""])
def test_what_an_empty_template_renders_does_not_contradict_the_ref(execute, published, empty):
    task = sensor(data_ref=published, bucket_name=empty, namespace_prefix=empty)
    assert execute(task)[0] == published


@pytest.mark.parametrize("deferrable", [False, True])
def test_is_dir_comes_from_the_marker(execute, published, deferrable):
    task = sensor(
        content_hash=GOLDEN, bucket_name="test-bucket", is_dir=False, deferrable=deferrable
    )
    assert execute(task)[0]["is_dir"] is True


@pytest.mark.parametrize("is_dir", [False, True])
def test_is_dir_comes_from_the_parameter_when_the_marker_is_empty(execute, gcs_server, is_dir):
    gcs_server.put("test-bucket", f"default/data-cache/{GOLDEN}/a", b"a")
    gcs_server.put("test-bucket", MARKER, b"")
    task = sensor(content_hash=GOLDEN, bucket_name="test-bucket", is_dir=is_dir)
    assert execute(task)[0]["is_dir"] is is_dir


def test_kinetics_own_upload_and_ref_are_understood(execute, gcs_server):
    gcs_server.put("test-bucket", f"default/data-cache/{GOLDEN}/a", b"a")
    gcs_server.put("test-bucket", f"default/data-markers/{GOLDEN}", b"")
    theirs = {
        "__data_ref__": True,
        "uri": GCS_URI,
        "is_dir": True,
        "mount_path": None,
        "fuse": False,
        "hf_trust_remote_code": False,
    }
    assert execute(sensor(data_ref=theirs))[0] == theirs | {"gcs_uri": GCS_URI}


def test_an_outage_is_waited_out(execute, published, gcs_server, monkeypatch):
    monkeypatch.setattr(AwaitedDataset, "policy", RetryPolicy(deadline=0))
    gcs_server.add_fault(Fault(path=MARKER, times=2, status=503))
    assert execute(sensor(data_ref=published))[0] == published
    looks = [request.status for request in gcs_server.requests if request.path.endswith(MARKER)]
    assert looks == [503, 503, 200]


@pytest.fixture
def logged(caplog, capsys):
    """`logged()` returns what tasks have logged: to logging on Airflow 2, to stdout on 3."""
    caplog.set_level(logging.INFO)
    return lambda: caplog.text + capsys.readouterr().out


def test_each_look_in_vain_says_what_was_looked_for_and_where(execute, gcs_server, logged):
    task = sensor(content_hash=GOLDEN, bucket_name="test-bucket", timeout=0)
    with pytest.raises(AirflowSensorTimeout):
        execute(task)
    assert f"Not there yet: {GCS_URI}" in logged()


@pytest.mark.parametrize("softly", [False, True])
def test_a_timeout_says_whether_cloud_storage_was_asked_with_success(
    execute, gcs_server, monkeypatch, softly
):
    monkeypatch.setattr(AwaitedDataset, "policy", RetryPolicy(deadline=0))
    kind = AirflowSkipException if softly else AirflowSensorTimeout
    task = sensor(content_hash=GOLDEN, bucket_name="test-bucket", timeout=0.03, soft_fail=softly)
    with pytest.raises(kind, match=f"0.03 s: no dataset appeared.*layout: {GCS_URI}"):
        execute(task)
    gcs_server.add_fault(Fault(path=MARKER, times=0, status=503))
    with pytest.raises(kind, match=f"0.03 s: no look succeeded.*may be there: {GCS_URI}.*HTTP 503"):
        execute(task)


def test_one_that_defers_says_so_and_what_that_needs(execute, gcs_server, logged):
    task = sensor(content_hash=GOLDEN, bucket_name="test-bucket", deferrable=True)
    with pytest.raises(TaskDeferred):
        execute(task)
    lines = [line for line in logged().splitlines() if GCS_URI in line]  # 2.11 logs to both
    assert lines
    facts = "0.01 s", "5.0 s", "triggerer", "deferrable=False"
    assert all(fact in line for line in lines for fact in facts), "said once, with all of them"


def test_silent_fail_waits_a_refusal_out(execute, published, gcs_server):
    gcs_server.add_fault(Fault(path=MARKER, times=2, status=403))
    assert execute(sensor(data_ref=published, silent_fail=True))[0] == published


def test_silent_fail_defers_after_a_refusal(execute, gcs_server):
    gcs_server.deny("get")
    task = sensor(
        content_hash=GOLDEN,
        bucket_name="test-bucket",
        silent_fail=True,
        deferrable=True,
        exponential_backoff=True,
        max_wait=60,
    )
    with pytest.raises(TaskDeferred) as deferred:
        execute(task)
    _, arguments = deferred.value.trigger.serialize()
    assert (arguments["silent_fail"], arguments["exponential_backoff"]) == (True, True)
    assert arguments["max_wait"] == 60.0


def test_hash_index_is_kept_where_it_is_told(execute, published, dataset, tmp_path):
    for path in (dataset / "train.csv", dataset / "sub" / "eval.csv"):
        os.utime(path, (1, 1))  # long enough ago to be recorded
    index = tmp_path / "index"
    execute(sensor(data=str(dataset), bucket_name="test-bucket", hash_index=str(index)))
    assert index.stat().st_size > 0


@pytest.mark.parametrize("deferrable", [False, True])
def test_a_refusal_is_left_to_the_tasks_retries(execute, published, gcs_server, deferrable):
    gcs_server.deny("get")
    with pytest.raises(StoreError, match="objectViewer"):
        execute(sensor(data_ref=published, deferrable=deferrable))


def test_evicted_objects_are_waited_for(execute, published, gcs_server, caplog):
    for name in list(gcs_server.objects("test-bucket")):
        if name != MARKER:
            gcs_server.delete("test-bucket", name)
    with pytest.raises(AirflowSensorTimeout):
        execute(sensor(data_ref=published, timeout=0.05))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bucket_name": "b"}, "exactly one of .* found none"),
        ({"bucket_name": "b", "content_hash": GOLDEN, "data": "/d"}, "content_hash and data"),
        ({"data": "/d", "data_ref": {}}, "found data and data_ref"),
        ({"content_hash": GOLDEN}, "bucket_name must be given with content_hash"),
        ({"data": "/d"}, "bucket_name must be given with data"),
    ],
)
def test_wrong_combinations_fail_when_the_dag_is_parsed(arguments, words):
    with pytest.raises(ValueError, match=f"{words}.*task 'wait'"):
        sensor(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bucket_name": "b", "data": ["/d", "/e"]}, r"data is a list of 2.*\.expand\(data=…\)"),
        ({"data_ref": [{}]}, r"data_ref is a list of 1.*\.expand"),
        (
            {"bucket_name": "b", "data": "/d", "layout": "kinetic", "mount_path": "/m"},
            "mount_path with layout='kinetic'",
        ),
    ],
)
def test_arguments_that_no_sensor_can_take_fail_when_the_dag_is_parsed(arguments, words):
    with pytest.raises(ValueError, match=rf"{words}.*\(CacheSensor task 'wait'\)"):
        sensor(**arguments)


@pytest.mark.parametrize("deferrable", [False, True])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"content_hash": "ABC", "bucket_name": "test-bucket"}, "invalid content hash 'ABC'"),
        ({"content_hash": GOLDEN, "bucket_name": "gs://b"}, "invalid bucket name 'gs://b'"),
        ({"content_hash": GOLDEN, "bucket_name": ""}, "bucket_name must not be empty"),
        ({"content_hash": GOLDEN, "bucket_name": "bbb", "layout": "x"}, "unknown layout 'x'"),
        (
            {"content_hash": GOLDEN, "bucket_name": "test-bucket", "verify": "some"},
            "unknown verify 'some'",
        ),
        ({"data": "/no/such", "bucket_name": "test-bucket"}, "/no/such"),
        (
            {"data": "gs://bbb/c/", "bucket_name": "test-bucket"},
            "only local data .*data=gs://bbb/c/.*'wait'",
        ),
        ({"data": make_data_ref(GCS_URI, True), "bucket_name": "bbb"}, "data is a data ref"),
        ({"data_ref": "None"}, "not a data ref"),
        ({"data_ref": {"gcs_uri": GCS_URI, "is_dir": True}}, "not a data ref"),
        (
            {"data_ref": make_data_ref(GCS_URI, True), "bucket_name": "other"},
            "bucket_name is 'other', but data_ref names .*'wait'",
        ),
        (
            {"data_ref": make_data_ref(GCS_URI, True), "namespace_prefix": "other"},
            "namespace_prefix is 'other', but data_ref names .*'wait'",
        ),
        (
            {"data_ref": make_data_ref(GCS_URI, True), "impersonation_chain": 1.5},
            "impersonation_chain is a float",
        ),
        ({"data_ref": make_data_ref("gs://bbb/model.keras", False)}, "nothing will publish"),
    ],
)
def test_malformed_values_fail_for_good(execute, arguments, words, deferrable):
    with pytest.raises(AirflowFailException, match=words) as caught:
        execute(sensor(deferrable=deferrable, **arguments))
    assert "".join(traceback.format_exception(caught.value)).count("Traceback (") == 1
    with pytest.raises(AirflowSkipException, match=words):
        execute(sensor(deferrable=deferrable, soft_fail=True, **arguments))


def test_a_template_that_renders_to_nothing_is_named(execute):
    task = sensor(data_ref="{{ native }}")
    task.data_ref = None  # as render_template_as_native_obj leaves it
    with pytest.raises(AirflowFailException, match=r"exactly one of .* found none .*'wait'"):
        execute(task)


def test_constructing_it_leaves_the_arguments_alone():
    arguments = {
        "bucket_name": "{{ 0 }}",
        "content_hash": "{{ 1 }}",
        "namespace_prefix": "{{ 2 }}",
        "mount_path": "{{ 3 }}",
        "gcp_conn_id": "{{ 4 }}",
        "impersonation_chain": ("{{ 5 }}",),
        "user_project": "{{ 6 }}",
        "layout": "{{ 7 }}",
        "verify": "{{ 8 }}",
        "hash_index": "{{ 9 }}",
    }
    task = sensor(**arguments)
    rendered = {name: getattr(task, name) for name in task.template_fields}
    assert rendered == arguments | {"data": None, "data_ref": None}


def resume_after_the_deferral_timed_out(**arguments):
    """As Airflow does it, from 2.11 to 3.3. (With a real scheduler: test_dag_runs.py.)"""
    task = sensor(content_hash=GOLDEN, bucket_name="bbb", **arguments)
    task.resume_execution("__fail__", {"error": "words that differ between versions"}, {})


@pytest.mark.parametrize("execution_timeout", [None, timedelta(seconds=6)])
def test_a_deferral_that_no_triggerer_serves_is_a_timeout_that_says_so(execution_timeout):
    with pytest.raises(AirflowSensorTimeout, match=r"5\.0 s.*no triggerer answered"):
        resume_after_the_deferral_timed_out(execution_timeout=execution_timeout)


@pytest.mark.parametrize("softly", ["soft_fail", "never_fail"])
def test_such_a_timeout_skips_a_sensor_that_fails_softly(softly):
    with pytest.raises(AirflowSkipException, match=r"5\.0 s.*no triggerer answered"):
        resume_after_the_deferral_timed_out(**{softly: True})


def test_only_airflow_2_ends_a_deferral_by_an_execution_timeout_and_then_it_may_be_retried():
    with pytest.raises(Exception, match=r"words|no triggerer answered") as caught:
        resume_after_the_deferral_timed_out(execution_timeout=timedelta(seconds=4))
    final = isinstance(caught.value, AirflowSensorTimeout | AirflowFailException)
    assert final is not EXECUTION_TIMEOUT_ENDS_DEFERRALS


@pytest.mark.parametrize("softly", ["soft_fail", "never_fail"])
def test_one_that_is_skipped_after_a_deferral_says_why(softly):
    task = sensor(content_hash=GOLDEN, bucket_name="bbb", **{softly: True})
    event = {"status": "timeout", "message": "it did not appear"}
    with pytest.raises(AirflowSkipException, match=r"5\.0 s: it did not appear"):
        task.resume_execution("execute_complete", {"event": event}, {})


@pytest.mark.parametrize("traceback", [None, ["Traceback", "LookupError: no connection"]])
def test_a_trigger_that_broke_is_no_timeout(traceback):
    task = sensor(content_hash=GOLDEN, bucket_name="bbb")
    with pytest.raises(Exception, match="it broke") as caught:
        task.resume_execution("__fail__", {"error": "it broke", "traceback": traceback}, {})
    assert not isinstance(caught.value, AirflowSensorTimeout | AirflowFailException)
