"""What the tests share that run a task's code in the test's own process."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

# Before any test module imports Airflow, which makes itself a home on import. (Whole DAG runs have
# a home of their own: `airflow_home`.)
_HOME = tempfile.TemporaryDirectory(prefix="airflow-")
os.environ["AIRFLOW_HOME"] = _HOME.name
os.environ["AIRFLOW__METRICS__TIMER_UNIT_CONSISTENCY"] = "True"  # 2.11 warns without it


@dataclass
class RecordingTaskInstance:
    """What our tasks ask of a task instance."""

    xcoms: dict[str, Any] = field(default_factory=dict)
    try_number: int = 1

    def xcom_push(self, key: str, value: Any) -> None:
        self.xcoms[key] = value


@pytest.fixture
def execute(gcs_server: object) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
    """`execute(task)` returns what the task's execute() returned, and the XComs it pushed.

    `execute(task, xcoms)` puts them there, for tasks that raise.
    """

    def run(task: Any, xcoms: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        ti = RecordingTaskInstance({} if xcoms is None else xcoms)
        return task.execute({"ti": ti}), ti.xcoms

    return run


@pytest.fixture
def dataset(tmp_path):
    """A directory of two files."""
    root = tmp_path / "train"
    (root / "sub").mkdir(parents=True)
    (root / "train.csv").write_text("t")
    (root / "sub" / "eval.csv").write_text("e")
    return root
