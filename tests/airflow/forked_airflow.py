"""Airflow's command line in a process that imported Airflow once, and forks for each command.

    {"arguments": ["dags", "test", "my_dag"], "env": {...}, "log": "/tmp/a.log"}

is one line of standard input. The answers are the process id of the fork, which leads a process
group of its own, and an empty line once it has ended; what it prints goes to the log.

Importing Airflow is most of what `airflow dags test` does. Nothing of our package is imported here:
each fork does that anew, as a process of its own would.
"""

import asyncio
import atexit
import importlib
import json
import os
import sys
import tempfile
from contextlib import suppress
from typing import Any


@atexit.register  # before any other, so that it is called after all of them
def _exit_at_once() -> None:
    """End without freeing what has been imported, which takes seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# Airflow prints on import too, which must not be taken for an answer.
_ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

import sqlalchemy.orm  # noqa: E402 - only now may it print
from airflow.__main__ import main  # noqa: E402

# What `dags test` imports on some Airflow or other, and takes long to.
for _name in (
    "a2wsgi",
    "airflow.api_fastapi.execution_api.app",
    "airflow.api_fastapi.execution_api.routes",
    "airflow.api_fastapi.execution_api.versions",
    "airflow.cli.commands.dag_command",
    "airflow.cli.commands.remote_commands.dag_command",
    "airflow.dag_processing.bundles.manager",
    "airflow.dag_processing.collection",
    "airflow.dag_processing.dagbag",
    "airflow.jobs.triggerer_job_runner",
    "airflow.models.dagbag",
    "airflow.models.renderedtifields",
    "airflow.models.taskinstance",
    "airflow.providers.google.cloud.hooks.gcs",
    "airflow.providers.standard.decorators.python",
    "airflow.sdk",
    "airflow.sdk.bases.sensor",
    "airflow.sdk.definitions.dag",
    "airflow.sdk.execution_time.supervisor",
    "airflow.sdk.execution_time.task_runner",
    "airflow.triggers.base",
    "alembic.command",
    "anyio._backends._asyncio",
    "google.cloud.storage",
):
    with suppress(ImportError):
        importlib.import_module(_name)
sqlalchemy.orm.configure_mappers()


def _make_the_api_of_tasks() -> None:
    """Make what the tasks of `dags test` talk to on Airflow 3, as it does itself.

    When that is first asked for something it derives its routes for each of its versions, which is
    most of what a short run takes.
    """
    from airflow.api_fastapi.execution_api.app import InProcessExecutionAPI
    from airflow.sdk.execution_time import supervisor
    from httpx import AsyncClient

    api = InProcessExecutionAPI()

    async def ask() -> None:
        async with AsyncClient(transport=api.atransport, base_url="http://in-process") as client:
            await client.get("/nothing")

    asyncio.run(ask())
    supervisor.in_process_api_server = lambda: api  # type: ignore[assignment]  # is cached


with suppress(ImportError):  # Airflow 2
    _make_the_api_of_tasks()


def _wait_for_a_command() -> None:
    """Return in each fork; the process itself ends with its standard input."""
    for line in sys.stdin:
        command = json.loads(line)
        if not (pid := os.fork()):
            _become(command)
            return
        _ANSWERS.write(f"{pid}\n")
        os.waitpid(pid, 0)
        _ANSWERS.write("\n")
    sys.exit()


def _become(command: dict[str, Any]) -> None:
    """Take on a command's arguments, environment and log."""
    os.setsid()
    _ANSWERS.close()
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for source, target in (nothing, 0), (log, 1), (log, 2):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(command["env"])
    tempfile.tempdir = None  # TMPDIR may be another one
    sys.argv = ["airflow", *command["arguments"]]


# Airflow has asked for our provider info, and what that imports. Each command imports it anew.
for _name in [name for name in sys.modules if name.startswith("keras_remote_airflow")]:
    del sys.modules[_name]
_wait_for_a_command()
sys.exit(main())
