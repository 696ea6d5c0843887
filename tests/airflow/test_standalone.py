"""Airflow as a person starts it, and spoken to as other programs do: over its REST API.

`airflow standalone` is the scheduler, the triggerer, the API server and the database of a real
deployment, in real processes of their own. It starts once, and runs the example DAGs.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import psutil  # comes with Airflow
import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from keras_remote_airflow import Data, upload_data

EXAMPLES = Path(__file__).parents[2] / "dags"
IS_AIRFLOW_2 = version("apache-airflow").startswith("2.")
ENDS = ("success", "failed", "upstream_failed", "skipped")
PATIENCE = 300  # seconds, for anything that takes a few; the start takes 20 to 60

# Of the 1,797 images as train_digits writes them, on every machine and with every Pillow.
DIGITS_HASH = "801192f6e4ea1cbe08e94315deb519b15e815f8e479159f03e058c8dfbb5ef04"
DIGITS_BYTES = 251_580


@pytest.mark.timeout(900)
def test_the_examples_run_in_a_deployment(
    new_airflow_home, airflow_database, nothing_will_go, gcs_server, gcs_bucket, tmp_path
):
    env = new_airflow_home() | {
        "STORAGE_EMULATOR_HOST": gcs_server.url,
        "AIRFLOW_VAR_KERAS_REMOTE_BUCKET": gcs_bucket,
        "AIRFLOW_VAR_KERAS_REMOTE_DATA_DIR": str(tmp_path / "data"),
        "KERAS_HOME": str(tmp_path / "keras"),  # else train_digits makes ~/.keras
        "PYTHONWARNINGS": "always",
    }
    for name in ("wait_for_dataset.py", "train_when_changed.py", "train_digits.py"):
        shutil.copy(EXAMPLES / name, env["AIRFLOW__CORE__DAGS_FOLDER"])
    shutil.copy(airflow_database, Path(env["AIRFLOW_HOME"], "airflow.db"))
    folder = tmp_path / "data" / "digits"
    for label in "01":
        (folder / label).mkdir(parents=True)
        (folder / label / "a.png").write_bytes(label.encode())
    with _standalone(env) as airflow:
        airflow.post(
            "connections",
            connection_id="google_cloud_default",
            conn_type="google_cloud_platform",
            extra=json.dumps({"is_anonymous": True, "project": "test-project"}),
        )
        for dag in ("wait_for_dataset", "train_when_changed", "train_digits"):
            airflow.unpause(dag)
        upload = _a_team_waits_until_another_has_uploaded(airflow, gcs_server, gcs_bucket, folder)
        _training_runs_once_for_each_change(airflow, upload, folder)
        _digits_are_uploaded_once_and_the_model_knows_its_data(
            airflow, gcs_server, gcs_bucket, tmp_path / "demo"
        )
    # Of the tasks, and of the parts of Airflow that parsed the DAGs and waited.
    for log in Path(env["AIRFLOW_HOME"]).rglob("*.log"):
        nothing_will_go(log.read_text(errors="replace"))


def _a_team_waits_until_another_has_uploaded(airflow, server, bucket, folder):
    """Wait for the folder in the triggerer, upload it, and return the run that did."""
    content_hash = Data(str(folder)).content_hash()
    gcs_uri = f"gs://{bucket}/default/data-cache/{content_hash}"
    ref = {"__data_ref__": True, "gcs_uri": gcs_uri, "is_dir": True, "mount_path": None}

    waiting = airflow.trigger("wait_for_dataset", content_hash=content_hash)
    airflow.wait_for("wait", waiting, "deferred")
    airflow.until(
        lambda: sum(content_hash in request.path for request in server.requests) >= 2,
        "the worker has looked, and the triggerer",
    )
    trigger = airflow.get(f"{waiting}/taskInstances/wait")["trigger"]
    assert trigger["classpath"] == "keras_remote_airflow.triggers.CacheTrigger"
    assert trigger["triggerer_id"]

    airflow.unpause("upload_when_changed")
    upload = airflow.trigger("upload_when_changed")
    airflow.wait_for("upload", upload, "success")
    airflow.wait_for("describe", waiting, "success")
    assert airflow.xcom(upload, "upload") == airflow.xcom(waiting, "wait") == ref
    found = {"gcs_uri": gcs_uri, "is_dir": True, "files": 2, "bytes": 2}
    assert airflow.xcom(waiting, "describe") == found
    browser = f"https://console.cloud.google.com/storage/browser/{gcs_uri[5:]}"
    assert airflow.links(upload, "upload") == {"Cloud Storage": browser}
    assert airflow.links(waiting, "wait") == {"Cloud Storage": browser}

    there = upload_data(bucket, str(folder), namespace_prefix="team-a")
    at_once = airflow.trigger("wait_for_dataset", content_hash=content_hash, namespace="team-a")
    airflow.wait_for("describe", at_once, "success")
    assert airflow.xcom(at_once, "describe") == found | {"gcs_uri": there}
    return upload


def _training_runs_once_for_each_change(airflow, upload, folder):
    def trainings(count):
        def begun():
            found = airflow.runs("train_when_changed")
            return len(found) >= count and found

        runs = airflow.until(begun, f"new data starts training {count}")
        for run in runs:
            airflow.wait_for("train", run, "success")
        return [airflow.xcom(run, "train") for run in runs]

    first = Data(str(folder)).content_hash()
    assert [training["content_hash"] for training in trainings(1)] == [first]
    (event,) = airflow.events("upload_when_changed")
    assert event["extra"] == airflow.xcom(upload, "upload") | {"content_hash": first}
    assert [run["dag_id"] for run in event["created_dagruns"]] == ["train_when_changed"]

    again = airflow.trigger("upload_when_changed")
    airflow.wait_for("upload", again, "success")
    assert airflow.xcom(again, "upload", "upload_stats")["cache_hit"] is True

    (folder / "0" / "b.png").write_bytes(b"new")
    second = Data(str(folder)).content_hash()
    changed = airflow.trigger("upload_when_changed")
    airflow.wait_for("upload", changed, "success")
    by_hash = {training["content_hash"]: training for training in trainings(2)}
    assert by_hash.keys() == {first, second}, "the hit in between started none"
    assert by_hash[second]["model"] == {"0": 2 / 3, "1": 1 / 3}
    assert by_hash[second]["images"] == 3


def _digits_are_uploaded_once_and_the_model_knows_its_data(airflow, server, bucket, data_dir):
    for hit in (False, True):
        run = airflow.trigger("train_digits", data_dir=str(data_dir))
        airflow.wait_for("report", run, "success")
        assert airflow.xcom(run, "train")["content_hash"] == DIGITS_HASH
        assert Data(str(data_dir / "digits")).content_hash() == DIGITS_HASH
        page = Path(airflow.xcom(run, "report")).read_text(encoding="utf-8")
        report = dict(re.findall(r"^\| (.+) \| (.+) \|$", page, re.MULTILINE))
        assert float(report.pop("accuracy")) >= 0.95
        sent = (0, 0) if hit else (1797, DIGITS_BYTES)
        assert (
            report.items()
            >= {
                "content hash": DIGITS_HASH,
                "data": f"gs://{bucket}/default/data-cache/{DIGITS_HASH}",
                "cache": "hit" if hit else "miss",
                "files": "1797",
                "files uploaded": str(sent[0]),
                "files reused": str(1797 - sent[0]),
                "bytes uploaded": str(sent[1]),
                "bytes reused": str(DIGITS_BYTES - sent[1]),
            }.items()
        )
        stored = [name for name in server.objects(bucket) if DIGITS_HASH in name]
        assert len(stored) == 1797 + 1, "the images and the marker"


@contextmanager
def _standalone(env):
    """Run `airflow standalone` in this home; yield a client once all of it is healthy."""
    home = Path(env["AIRFLOW_HOME"])
    api, worker_logs, trigger_logs = _free_ports(3)
    env = env | {
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": worker_logs,
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": trigger_logs,
        # Airflow 3
        # For as long a worker may overlook that a task has ended. The default is 5 s.
        "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
        "AIRFLOW__CORE__PARALLELISM": "4",  # it starts as many workers
        "AIRFLOW__API__PORT": api,
        "AIRFLOW__API__BASE_URL": f"http://localhost:{api}",
        "AIRFLOW__API_AUTH__JWT_SECRET": "j" * 64,  # 3.2 makes one for each process
        # Airflow 2, which learns what an alias stands for when it parses and stores the DAG again
        "AIRFLOW__API__AUTH_BACKENDS": (
            "airflow.providers.fab.auth_manager.api.auth.backend.basic_auth"
        ),
        "AIRFLOW__CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": "0",
        "AIRFLOW__SCHEDULER__MIN_FILE_PROCESS_INTERVAL": "5",
        "AIRFLOW__WEBSERVER__WEB_SERVER_PORT": api,
        "AIRFLOW__WEBSERVER__WORKERS": "1",
    }
    with (home / "standalone.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "airflow", "standalone"],
            env=env,
            cwd=home,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield _Client(f"http://localhost:{api}", home, process)
    except BaseException:
        for path in [home / "standalone.log", *sorted(home.glob("logs/dag_id=*/**/*.log"))]:
            sys.stdout.write(f"\n--- {path}\n{path.read_text(errors='replace')}\n")
        raise
    finally:
        _stop(process)


def _free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [str(each.getsockname()[1]) for each in sockets]


def _stop(leader):
    """End the process with all that it started, some of which has left its process group."""
    leader.send_signal(signal.SIGINT)  # then it stops its components, and waits for them
    with suppress(subprocess.TimeoutExpired):
        leader.wait(timeout=5)
    while members := [pid for pid in psutil.pids() if _session_of(pid) == leader.pid]:
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        leader.wait()
        time.sleep(0.05)


def _session_of(pid):
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            return os.getsid(pid)
    return None


class _Client:
    """What the test asks of the REST API, the same for both of its versions.

    A run is named by its path, "dags/…/dagRuns/…".
    """

    def __init__(self, url, home, process):
        self._process = process
        self._api = f"{url}/api/{'v1' if IS_AIRFLOW_2 else 'v2'}"
        self._http = requests.Session()
        self._http.trust_env = False  # no proxies
        # Now and then SQLite is locked, an internal error; what changes nothing is asked again.
        again = Retry(
            5, connect=0, status_forcelist=[500], allowed_methods=["GET"], backoff_factor=0.5
        )
        self._http.mount(url, HTTPAdapter(max_retries=again))
        self.until(self._is_healthy, "all of Airflow is up")
        if IS_AIRFLOW_2:
            self._http.auth = "admin", (home / "standalone_admin_password.txt").read_text()
        else:
            passwords = home / "simple_auth_manager_passwords.json.generated"
            password = json.loads(passwords.read_text())["admin"]
            answer = self._http.post(
                f"{url}/auth/token", json={"username": "admin", "password": password}, timeout=60
            )
            self._http.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"

    def _is_healthy(self):
        health = self.get("health" if IS_AIRFLOW_2 else "monitor/health")
        parts = ["metadatabase", "scheduler", "triggerer"]
        parts += [] if IS_AIRFLOW_2 else ["dag_processor"]
        return all(health[part]["status"] == "healthy" for part in parts)

    def until(self, ask, what):
        """Return the first answer that is true; errors of the API are no answers."""
        deadline = time.monotonic() + PATIENCE
        seen = None
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if seen := ask():
                    return seen
            except requests.RequestException as exc:
                seen = exc
            time.sleep(0.5)
        return pytest.fail(f"waited {PATIENCE} s, or until Airflow ended, for: {what}; saw {seen}")

    def wait_for(self, task, run, state):
        def is_there():
            found = self.get(f"{run}/taskInstances/{task}")["state"]
            assert found == state or found not in ENDS, (task, found)
            return found == state

        self.until(is_there, f"{task} of {run} is {state}")

    def get(self, path, **parameters):
        return self._call("GET", path, params=parameters)

    def post(self, path, **body):
        return self._call("POST", path, json=body)

    def _call(self, method, path, **arguments):
        answer = self._http.request(method, f"{self._api}/{path}", timeout=60, **arguments)
        if not answer.ok:
            raise requests.HTTPError(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer.json()

    def unpause(self, dag):
        def is_unpaused():
            return self._call("PATCH", f"dags/{dag}", json={"is_paused": False})

        self.until(is_unpaused, f"{dag} is parsed, and unpaused")

    def trigger(self, dag, **conf):
        date = {} if IS_AIRFLOW_2 else {"logical_date": None}
        run = self.post(f"dags/{dag}/dagRuns", conf=conf, **date)["dag_run_id"]
        return f"dags/{dag}/dagRuns/{run}"

    def runs(self, dag):
        found = self.get(f"dags/{dag}/dagRuns")["dag_runs"]
        return [f"dags/{dag}/dagRuns/{run['dag_run_id']}" for run in found]

    def xcom(self, run, task, key="return_value"):
        path = f"{run}/taskInstances/{task}/xcomEntries/{key}"
        return self.get(path, stringify="false")["value"]

    def links(self, run, task):
        found = self.get(f"{run}/taskInstances/{task}/links")
        return found if IS_AIRFLOW_2 else found["extra_links"]

    def events(self, dag):
        kind = "dataset" if IS_AIRFLOW_2 else "asset"
        return self.get(f"{kind}s/events", source_dag_id=dag)[f"{kind}_events"]
