"""Whole DAG runs: real tasks, real XComs, the trigger in line, a local Cloud Storage."""

import re
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import pytest

from keras_remote_airflow.core.data import Data
from keras_remote_airflow.core.refs import parse_data_ref
from keras_remote_airflow.testing import Fault

DAGS = Path(__file__).parent / "dags"
REF_KEYS = {"__data_ref__", "gcs_uri", "is_dir", "mount_path"}


@pytest.fixture
def late_data(tmp_path):
    path = tmp_path / "late.csv"
    path.write_text("late")
    return path


def test_upload_wait_and_use(airflow_home, run_airflow, run_dag, gcs_server, dataset, late_data):
    content_hash = Data(str(dataset)).content_hash()
    late_hash = Data(str(late_data)).content_hash()
    # The upload itself asks first; then each of the three sensors is told twice that it is not
    # there, so that "deferred" looks once in the worker and once in the trigger in vain.
    for first in (2, 5, 8):
        gcs_server.add_fault(
            Fault(
                method="GET",
                path=f"{late_hash}/.cache_marker.*alt=media",
                nth=first,
                times=2,
                status=404,
            )
        )
    env = gcs_server.env() | {
        "TEST_DATA": str(dataset),
        "TEST_LATE_DATA": str(late_data),
        "TEST_CONTENT_HASH": content_hash,
    }
    # A trigger has to fetch such a connection from the thread that may: see CacheTrigger.
    run_airflow(
        *("connections", "add", "in_the_database", "--conn-type", "google_cloud_platform"),
        *("--conn-extra", '{"is_anonymous": true, "project": "test-project"}'),
    )
    gcs_server.create_bucket("elsewhere")
    gcs_server.put("elsewhere", "train/a", b"1")
    run = run_dag(
        DAGS / "journeys.py",
        "journeys",
        **env,
    )
    assert {task for task, state in run.states.items() if state != "success"} == set(), run.log

    gcs_uri = f"gs://test-bucket/default/data-cache/{content_hash}"
    ref = {"__data_ref__": True, "gcs_uri": gcs_uri, "is_dir": True, "mount_path": "/data"}
    assert run.xcoms["miss"]["return_value"] == ref
    assert run.xcoms["miss"].items() >= ref.items()
    stats = run.xcoms["miss"]["upload_stats"]
    assert stats.pop("seconds") >= 0
    assert stats == {
        "content_hash": content_hash,
        "cache_hit": False,
        "files": 2,
        "bytes": 2,
        "uploaded_files": 2,
        "uploaded_bytes": 2,
        "fingerprint": None,
    }

    stats = run.xcoms["hit"]["upload_stats"]
    assert (stats["cache_hit"], stats["files"], stats["uploaded_files"]) == (True, 2, 0)
    assert run.xcoms["hit"]["return_value"] == ref | {"mount_path": None}

    kinetic = ref | {
        "mount_path": None,
        "uri": gcs_uri,
        "fuse": False,
        "hf_trust_remote_code": False,
    }
    assert run.xcoms["kinetic"]["return_value"] == kinetic
    assert run.xcoms["kinetic"]["upload_stats"]["uploaded_files"] == 0, "both layouts share data"
    assert f"default/data-markers/{content_hash}" in gcs_server.objects("test-bucket")

    assert run.xcoms["gcs"]["return_value"]["gcs_uri"] == "gs://elsewhere/train/"
    assert run.xcoms["gcs"]["return_value"]["is_dir"] is True
    assert run.xcoms["gcs"]["upload_stats"]["content_hash"] is None
    assert re.search(r"1 file \(1 B\).*: gs://elsewhere/train/", run.log)

    looks = [
        request.status
        for request in gcs_server.requests
        if request.path.endswith(f"{late_hash}/.cache_marker") and request.method == "GET"
    ]
    assert looks == [404, *3 * [404, 404, 200]], "each mode looked as often as it had to"
    waited = {task: _without_links(run.xcoms[task]) for task in ("poke", "reschedule", "deferred")}
    late = ref | {"gcs_uri": f"gs://test-bucket/default/data-cache/{late_hash}", "is_dir": False}
    assert waited["poke"] == late | {"return_value": late}
    assert waited["reschedule"] == waited["poke"]
    assert waited["deferred"] == waited["poke"]

    for task in ("by_hash", "by_data", "by_repr", "by_json"):
        assert run.xcoms[task]["return_value"] == ref, task
    assert run.xcoms["by_kinetic"]["return_value"] == kinetic

    # What the tab Rendered Template shows.
    assert run.rendered["miss"]["data"] == str(dataset)
    assert run.rendered["hit"]["bucket_name"] == "test-bucket"
    assert shown_ref(run.rendered["poke"]["data_ref"]) == late
    assert shown_ref(run.rendered["by_repr"]["data_ref"]) == ref

    assert run.xcoms["use"]["return_value"] == {"gcs_uri": gcs_uri, "ref": ref, "waited": False}

    url = f"https://console.cloud.google.com/storage/browser/{gcs_uri.removeprefix('gs://')}"
    if version("apache-airflow").startswith("2."):
        command = ["webserver_link.py", "dags/journeys.py", "journeys", "miss", "Cloud Storage"]
        shown = subprocess.run(
            [sys.executable, *command],
            env=airflow_home | env,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert shown.stdout.endswith(url), shown
    else:
        assert run.xcoms["miss"]["_link_DatasetLink"] == url
        assert run.xcoms["deferred"]["_link_DatasetLink"].endswith(late_hash)


def shown_ref(value):
    """Airflow shows dicts as they are, or as their repr."""
    return parse_data_ref(value).to_dict()


def _without_links(xcoms):
    """Airflow 3 keeps the URLs of extra links among the XComs."""
    return {key: value for key, value in xcoms.items() if not key.startswith("_link_")}


def test_failures_are_final_where_a_retry_would_not_help(run_dag, gcs_server, dataset):
    empty_marker = "5" * 64
    gcs_server.put("test-bucket", f"default/data-markers/{empty_marker}", b"")
    gcs_server.put("test-bucket", f"default/data-cache/{empty_marker}/a", b"a")
    run = run_dag(
        DAGS / "failures.py",
        "failures",
        **gcs_server.env(),
        TEST_DATA=str(dataset),
        TEST_EMPTY_MARKER=empty_marker,
    )
    expected = {
        "no_data": ("failed", 1),
        "bad_bucket": ("failed", 1),
        "no_bucket": ("failed", 3),  # it may be created: left to the task's retries
        "bad_hash": ("failed", 1),
        "bad_hash_skips": ("skipped", 1),
        "bad_hash_deferrable_skips": ("skipped", 1),
        "rendered_to_none": ("failed", 1),
        "says_no_is_dir": ("failed", 1),
        "poke_times_out": ("failed", 1),
        "reschedule_times_out": ("failed", 1),
        "deferred_times_out": ("failed", 1),
        "poke_times_out_softly": ("skipped", 1),
        "deferred_times_out_softly": ("skipped", 1),
        "deferred_never_fails": ("skipped", 1),
    }
    outcome = {task: (state, run.tries[task]) for task, state in run.states.items()}
    assert outcome == expected, run.log
    assert "data path does not exist: /no/such/data" in run.log
    assert "is_dir=True or is_dir=False" in run.log
    assert "Waited 0.5 s: no dataset appeared. Check" in run.log
    assert not [request for request in gcs_server.requests if request.method == "POST"]


def test_where_no_triggerer_runs_a_wait_ends_for_good_and_says_so(run_scheduler, gcs_server):
    (run,) = run_scheduler(
        DAGS / "no_triggerer.py",
        "no_triggerer",
        **gcs_server.env(),
        AIRFLOW__SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL="0.1",
    )
    assert (run.states["wait"], run.tries["wait"]) == ("failed", 1), run.log
    assert "AirflowSensorTimeout: Waited 0.1 s: no triggerer answered" in run.log


@pytest.mark.skipif(
    not version("apache-airflow").startswith("2."), reason="Airflow 3 has no --dry-run"
)
def test_the_dry_run_of_a_task_says_what_would_be_sent(airflow_home, gcs_server, dataset):
    folder = {"AIRFLOW__CORE__DAGS_FOLDER": str(DAGS), "TEST_DATA": str(dataset)}
    done = subprocess.run(
        [*(sys.executable, "-m", "airflow", "tasks", "test", "--dry-run", "reports", "miss")],
        env=airflow_home | gcs_server.env() | folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    content_hash = Data(str(dataset)).content_hash()
    said = rf"Would upload 2 of 2 files \(2 B of 2 B\).*data-cache/{content_hash}"
    assert re.search(said, done.stdout + done.stderr), done
    assert gcs_server.objects("test-bucket") == {}


def test_sigterm_stops_the_upload_and_a_retry_completes_it(run_dag, gcs_server, dataset, tmp_path):
    gcs_server.add_fault(Fault(method="POST", path="eval.csv|uploadType", action="stall"))
    go = tmp_path / "go"
    at_kill = []

    def kill_once_both_files_have_been_sent():
        while not (at_kill or over.is_set()):
            if len(gcs_server.objects("test-bucket")) == 2:
                at_kill.extend(gcs_server.objects("test-bucket"))
                go.touch()
            over.wait(0.05)

    over = threading.Event()
    watcher = threading.Thread(target=kill_once_both_files_have_been_sent)
    watcher.start()
    try:
        run = run_dag(
            DAGS / "killed.py",
            "killed",
            timeout=50,  # the core itself would take a stalled request for lost after 60 s
            **gcs_server.env(),
            TEST_DATA=str(dataset),
            TEST_GO=str(go),
        )
    finally:
        over.set()
        watcher.join()
    assert at_kill, run.log
    assert not any(name.endswith(".cache_marker") for name in at_kill)
    # On Airflow 2 a kill ends dag.test() as well, so the retry is only left scheduled.
    state = run.states["upload"], run.tries["upload"]
    assert state in {("success", 2), ("up_for_retry", 1)}, run.log
    if state[0] == "success":
        assert run.xcoms["upload"]["upload_stats"]["uploaded_files"] == 0
    else:
        assert set(gcs_server.objects("test-bucket")) == set(at_kill)


WARNS = """
import pendulum, warnings

try:
    from airflow.sdk import dag, task
except ImportError:
    from airflow.decorators import dag, task

warnings.warn("the file is old", FutureWarning, stacklevel=1)


@dag(schedule=None, start_date=pendulum.datetime(2024, 1, 1), catchup=False)
def warns():
    @task
    def use():
        warnings.warn("use() is old", FutureWarning, stacklevel=1)

    use()


warns()
"""


def test_a_run_that_uses_what_will_go_fails_its_test(run_dag, tmp_path):
    dag_file = tmp_path / "warns.py"
    dag_file.write_text(WARNS)
    with pytest.raises(pytest.fail.Exception, match=r"will go:\n.*warns\.py") as failure:
        run_dag(dag_file, "warns")
    assert "the file is old" in str(failure.value)
    assert "use() is old" in str(failure.value)
