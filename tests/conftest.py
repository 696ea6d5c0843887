"""Airflow for the tests: a migrated home for the session, and DAG runs in subprocesses.

    def test_example(airflow_home, run_dag, gcs_server, gcs_bucket, tmp_path):
        run = run_dag(dag_file, "dag_id", STORAGE_EMULATOR_HOST=gcs_server.url)
        assert run.states["upload"] == "success", run.log
        assert run.xcoms["upload"]["return_value"]["is_dir"] is True

Nothing here imports Airflow, so the tests of `core` pay nothing for it, and the same file serves
every Airflow line.
"""

import fcntl
import gc
import json
import os
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

_AIRFLOW = [sys.executable, "-m", "airflow"]
_HERE = Path(__file__).parent

# Runs commands of Airflow's one after the other in one process.
_RUN_COMMANDS = """
import json, sys
from airflow.__main__ import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["airflow", *arguments]
    main()
"""

# A warning of what will go, raised from a file of ours or from a DAG file: Airflow prints the path
# first, or (from 3.2 on) the category. What is raised while a DAG file is imported, and with it
# our package, these repeat as a UserWarning, whatever it was.
_OUR_FILE = r"\b(?:keras_remote_airflow|dags)/[\w/]+\.py\b"
_WILL_GO = r"\b(?:\w*Deprecat\w*|Future|RemovedIn\w+|User)Warning\b"
_OUR_WARNING = re.compile(f".*{_OUR_FILE}.*{_WILL_GO}.*|.*{_WILL_GO}.*{_OUR_FILE}.*")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Mark what starts Airflow, by its fixtures, and what depends on it, by its place as well.

    Then, in pytest-xdist's processes, put those tests first that take long.
    """
    for item in items:
        starts_airflow = "new_airflow_home" in getattr(item, "fixturenames", ())
        if starts_airflow:
            item.add_marker("starts_airflow")
        if starts_airflow or item.path.parent in {_HERE / "airflow", _HERE / "dags"}:
            item.add_marker("airflow")
    yield  # -m deselects
    if "PYTEST_XDIST_WORKER" in os.environ:
        _put_long_tests_first(items)


def _put_long_tests_first(items: list[pytest.Item]) -> None:
    """Order the tests for two processes, so that in the end neither waits for the other.

    Each is given half of the list, and later takes tests over from the end of the other's half. The
    first one begins with the deployment, the second one with all tests that share an Airflow.
    """

    def take(wanted: Callable[[pytest.Item], Any]) -> list[pytest.Item]:
        taken = list(filter(wanted, items))
        items[:] = [item for item in items if not wanted(item)]
        return taken

    half = len(items) // 2
    first = take(lambda item: item.path.name == "test_standalone.py")
    second = take(lambda item: item.get_closest_marker("starts_airflow"))
    slow = take(lambda item: item.get_closest_marker("slow"))
    first += slow[::2]
    cut = max(0, half - len(first))
    items[:] = [*first, *items[:cut], *second, *slow[1::2], *items[cut:]]


@pytest.fixture
def no_collection() -> Iterator[None]:
    """No garbage is collected meanwhile: for tests that drive a parser to the recursion limit.

    A finalizer of what earlier tests left, run down there, would fail, and this test with it.
    """
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session")
def new_airflow_home(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[], dict[str, str]]:
    """`new_airflow_home()` returns the environment of a subprocess that has an empty Airflow home.

    It has a folder for DAGs, and neither a database nor connections.
    """

    def make() -> dict[str, str]:
        home = tmp_path_factory.mktemp("airflow")
        (home / "dags").mkdir()
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(
                ("AIRFLOW", "GOOGLE_", "KERAS_REMOTE_", "OPENLINEAGE", "STORAGE_EMULATOR")
            )
        }
        return inherited | {
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__FERNET_KEY": "k" * 43 + "=",  # for connections in the database
            "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
            "AIRFLOW__DATABASE__LOAD_DEFAULT_CONNECTIONS": "False",
            "AIRFLOW__CORE__DAGBAG_IMPORT_TIMEOUT": "200",  # Vertex AI's client takes its time
            "AIRFLOW__METRICS__TIMER_UNIT_CONSISTENCY": "True",  # 2.11 warns without it
            # Airflow calls `airflow` by its name.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(
                filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])
            ),
        }

    return make


@pytest.fixture(scope="session")
def airflow_database(
    new_airflow_home: Callable[[], dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A migrated database of Airflow's, with nothing in it. Copy it as a home's airflow.db."""
    # pytest-xdist's processes have folders of their own beside each other; one of them migrates.
    folder = tmp_path_factory.getbasetemp()
    shared = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "migrated.db"
    with shared.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            env = new_airflow_home()
            _run([*_AIRFLOW, "db", "migrate"], env, timeout=240)
            shutil.copy(Path(env["AIRFLOW_HOME"], "airflow.db"), shared)
    return shared


@pytest.fixture(scope="session")
def airflow_home(
    new_airflow_home: Callable[[], dict[str, str]], airflow_database: Path
) -> dict[str, str]:
    """Environment of a subprocess that has an Airflow of its own, its database migrated.

    `google_cloud_default` is an anonymous connection with project "test-project"; point
    STORAGE_EMULATOR_HOST at a `gcs_server` to give it something to talk to.
    """
    env = new_airflow_home() | {
        "AIRFLOW_CONN_GOOGLE_CLOUD_DEFAULT": json.dumps(
            {
                "conn_type": "google_cloud_platform",
                "extra": {"is_anonymous": True, "project": "test-project"},
            }
        ),
    }
    shutil.copy(airflow_database, Path(env["AIRFLOW_HOME"], "airflow.db"))
    return env


class _ForkedAirflow:
    """Runs commands of Airflow's in forks of one process: see tests/airflow/forked_airflow.py.

    Settings of Airflow's that it reads on import are those of `env`, whatever a command's are.
    """

    def __init__(self, env: dict[str, str]) -> None:
        self._log = Path(env["AIRFLOW_HOME"], "forked.log")
        self._process = subprocess.Popen(
            [sys.executable, str(_HERE / "airflow" / "forked_airflow.py")],
            env=env | {"PYTHONWARNINGS": "always"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.with_name("import.log").open("wb"),
            bufsize=0,
            start_new_session=True,
        )

    def run(self, arguments: list[str], env: dict[str, str], timeout: float) -> str:
        """Run one command, and return what it printed. Whatever it left running is ended."""
        assert self._process.stdin
        assert self._process.stdout
        self._log.write_bytes(b"")
        command = {"arguments": arguments, "env": env, "log": str(self._log)}
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        pid = int(self._process.stdout.readline())
        ended, _, _ = select.select([self._process.stdout], [], [], timeout)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        self._process.stdout.readline()
        log = self._log.read_text(encoding="utf-8", errors="replace")
        if not ended:
            pytest.fail(f"{arguments} was still running after {timeout} s:\n{log}")
        return log

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="session")
def _forked_airflow(airflow_home: dict[str, str]) -> Iterator[_ForkedAirflow]:
    airflow = _ForkedAirflow(airflow_home)
    yield airflow
    airflow.close()


@dataclass(frozen=True)
class FinishedRun:
    """What a DAG run left in Airflow's database.

    Attributes:
        states: task id to final state; mapped tasks as "task[0]".
        tries: task id to the number of tries.
        xcoms: task id to {key: value}.
        rendered: task id to {template field: what it was rendered to, as Airflow shows it}.
        log: everything the process printed; of a scheduler, its tasks' logs as well.
    """

    states: dict[str, str | None]
    tries: dict[str, int]
    xcoms: dict[str, dict[str, Any]]
    rendered: dict[str, dict[str, Any]]
    log: str


@pytest.fixture(scope="session")
def nothing_will_go() -> Callable[[str], None]:
    """`nothing_will_go(log)` fails the test if something that we or the DAG file use will go.

    PYTHONWARNINGS=always makes a process say all of it in its log.
    """

    def check(log: str) -> None:
        if found := _OUR_WARNING.findall(log):
            pytest.fail("\n".join(["what we use will go:", *found]))

    return check


@pytest.fixture
def run_airflow(
    airflow_home: dict[str, str], _forked_airflow: _ForkedAirflow
) -> Callable[..., str]:
    """`run_airflow("providers", "list", **env)` runs a command, and returns what it printed."""

    def run(*arguments: str, **env: str) -> str:
        return _forked_airflow.run([*arguments], airflow_home | env, timeout=120)

    return run


@pytest.fixture
def run_dag(
    airflow_home: dict[str, str],
    _forked_airflow: _ForkedAirflow,
    nothing_will_go: Callable[[str], None],
) -> Callable[..., FinishedRun]:
    """`run_dag(dag_file, dag_id, *, timeout=120, conf=None, reserialize=False, **env)`.

    Runs `airflow dags test` (2 to 6 s: put many checks into one run) and returns even when tasks
    failed; it fails the test when the process itself does not end, since `dag.test()` ignores the
    timeout of a deferral. Returns a FinishedRun. Airflow 2 adds events only to assets and aliases
    that its database knows: `reserialize=True` tells it first. A warning that something we or the
    DAG file use will go fails the test too.

    With a setting of Airflow's own in `env` (AIRFLOW__…) it takes a process of its own, and twice
    as long: some of them are read on import.
    """

    def run(
        dag_file: Path | str,
        dag_id: str,
        *,
        timeout: float = 120,
        conf: dict[str, Any] | None = None,
        reserialize: bool = False,
        **env: str,
    ) -> FinishedRun:
        options = ["--conf", json.dumps(conf)] if conf else []
        has_settings = any(name.startswith("AIRFLOW__") for name in env)
        env = airflow_home | {"PYTHONWARNINGS": "always"} | env
        _put_alone(dag_file, env)
        log = ""
        commands = [["dags", "reserialize"]] if reserialize else []
        for command in [*commands, ["dags", "test", dag_id, *options]]:
            if has_settings:
                log = _run([*_AIRFLOW, *command], env, timeout=timeout, check=False)
            else:
                log = _forked_airflow.run(command, env, timeout=timeout)
        nothing_will_go(log)
        return _read_runs(env, dag_id, log)[-1]

    return run


@pytest.fixture
def run_scheduler(airflow_home: dict[str, str]) -> Callable[..., list[FinishedRun]]:
    """`run_scheduler(dag_file, dag_id, *, loops=30, timeout=180, **env)`: a real scheduler.

    Runs `airflow scheduler` for so many loops: it creates the runs that are due, and runs their
    tasks, of all DAGs in the file, which it unpauses. Returns all the runs that `dag_id` has by
    then, oldest first.
    """

    def run(
        dag_file: Path | str, dag_id: str, *, loops: int = 30, timeout: float = 180, **env: str
    ) -> list[FinishedRun]:
        is_airflow_2 = version("apache-airflow").startswith("2.")
        env = (
            airflow_home
            | {
                "AIRFLOW__CORE__EXECUTOR": (
                    "SequentialExecutor" if is_airflow_2 else "inline_executor.InlineExecutor"
                ),
                "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
                "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.2",
                # Airflow 2 learns what an alias stands for when it parses and stores the DAG again.
                "AIRFLOW__CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": "0",
                "AIRFLOW__SCHEDULER__MIN_FILE_PROCESS_INTERVAL": "1",
                "PYTHONPATH": os.pathsep.join([str(_HERE / "airflow"), airflow_home["PYTHONPATH"]]),
            }
            | env
        )
        _put_alone(dag_file, env)
        commands = [
            # Before the first `dags test`, which would leave them paused; later it changes nothing.
            ["dags", "reserialize"],
            ["scheduler", "--num-runs", str(loops), "--skip-serve-logs"],
        ]
        log = _run([sys.executable, "-c", _RUN_COMMANDS, json.dumps(commands)], env, timeout)
        # Only Airflow 2 writes them; on 3 they are part of what the scheduler prints.
        files = sorted(Path(env["AIRFLOW_HOME"], "logs", f"dag_id={dag_id}").rglob("*.log"))
        log = "\n".join([log, *(file.read_text(encoding="utf-8") for file in files)])
        return _read_runs(env, dag_id, log)

    return run


@dataclass(frozen=True)
class AssetEvent:
    """An asset event in Airflow's database.

    Attributes:
        task: the task that caused it; a mapped one as "task[0]".
        uri: of the asset.
        extra: what the event says.
        aliases: names of the aliases that the asset came through.
    """

    task: str
    uri: str
    extra: dict[str, Any]
    aliases: list[str]


@pytest.fixture
def asset_events(airflow_home: dict[str, str]) -> Callable[[str], list[AssetEvent]]:
    """`asset_events(dag_id)` returns the events that the DAG's runs have caused, oldest first."""

    def read(dag_id: str) -> list[AssetEvent]:
        with _open_database(airflow_home) as db:
            tables = db.execute("SELECT name FROM sqlite_master WHERE name = 'asset_event'")
            kind = "asset" if tables.fetchall() else "dataset"  # Airflow 2
            rows = db.execute(
                f"SELECT e.id, e.source_task_id, e.source_map_index, a.uri, e.extra"
                f" FROM {kind}_event e JOIN {kind} a ON a.id = e.{kind}_id"
                f" WHERE e.source_dag_id = ? ORDER BY e.id",
                [dag_id],
            ).fetchall()
            aliases = db.execute(
                f"SELECT l.event_id, a.name FROM {kind}_alias_{kind}_event l"
                f" JOIN {kind}_alias a ON a.id = l.alias_id"
            ).fetchall()
        return [
            AssetEvent(
                task=_name(task, index),
                uri=uri,
                extra=json.loads(extra),
                aliases=sorted(name for event, name in aliases if event == number),
            )
            for number, task, index, uri, extra in rows
        ]

    return read


def _put_alone(dag_file: Path | str, env: dict[str, str]) -> None:
    """Make the file the only one in the folder for DAGs.

    Airflow 3 looks a DAG up in the folder, whatever file is named.
    """
    folder = Path(env["AIRFLOW__CORE__DAGS_FOLDER"])
    shutil.rmtree(folder)
    folder.mkdir()
    shutil.copy(dag_file, folder)


def _run(command: list[str], env: dict[str, str], timeout: float, check: bool = True) -> str:
    with subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            log, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its children hold the pipe too
            log, _ = process.communicate()
            pytest.fail(f"{command} was still running after {timeout} s:\n{log}")
    if check and process.returncode:
        pytest.fail(f"{command} exited with {process.returncode}:\n{log}")
    return log


def _open_database(env: dict[str, str]) -> sqlite3.Connection:
    """Open Airflow's database with sqlite3: its own models take seconds to import."""
    database = Path(env["AIRFLOW_HOME"]) / "airflow.db"
    return sqlite3.connect(f"file:{database}?mode=ro", uri=True)


def _read_runs(env: dict[str, str], dag_id: str, log: str) -> list[FinishedRun]:
    """Read the DAG's runs, oldest first; fail the test if there is none."""
    with _open_database(env) as db:
        runs = db.execute("SELECT run_id FROM dag_run WHERE dag_id = ? ORDER BY id", [dag_id])
        found = [_read_run(db, dag_id, run_id, log) for (run_id,) in runs.fetchall()]
    if not found:
        pytest.fail(f"no run of {dag_id}:\n{log}")
    return found


def _read_run(db: sqlite3.Connection, dag_id: str, run_id: str, log: str) -> FinishedRun:
    instances = db.execute(
        "SELECT task_id, map_index, state, try_number FROM task_instance"
        " WHERE dag_id = ? AND run_id = ?",
        [dag_id, run_id],
    ).fetchall()
    values = db.execute(
        "SELECT task_id, map_index, key, value FROM xcom WHERE dag_id = ? AND run_id = ?",
        [dag_id, run_id],
    ).fetchall()
    fields = db.execute(
        "SELECT task_id, map_index, rendered_fields FROM rendered_task_instance_fields"
        " WHERE dag_id = ? AND run_id = ?",
        [dag_id, run_id],
    ).fetchall()
    xcoms: dict[str, dict[str, Any]] = {}
    for task_id, map_index, key, value in values:
        xcoms.setdefault(_name(task_id, map_index), {})[key] = _decode(value)
    return FinishedRun(
        states={_name(task, index): state for task, index, state, _ in instances},
        tries={_name(task, index): tries for task, index, _, tries in instances},
        xcoms=xcoms,
        rendered={_name(task, index): _decode(values) for task, index, values in fields},
        log=log,
    )


def _name(task_id: str, map_index: int) -> str:
    return task_id if map_index < 0 else f"{task_id}[{map_index}]"


def _decode(value: str | bytes | float | None) -> Any:
    # JSON: bytes on Airflow 2, a JSON column on 3, where SQLite turns a bare number into one.
    return json.loads(value) if isinstance(value, str | bytes) else value
