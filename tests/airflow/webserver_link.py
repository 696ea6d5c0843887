"""Prints what Airflow 2's webserver puts behind a task's button: DAG file, dag id, task id, button.

A program of its own, because the webserver works on the serialized DAG and on the class that the
provider info names for the link.
"""

import sys
from typing import Any

from airflow.models import DagBag, DagRun
from airflow.serialization.serialized_objects import SerializedDAG

dag_file, dag_id, task_id, button = sys.argv[1:]
dag = DagBag(dag_file, include_examples=False).get_dag(dag_id)  # type: ignore[call-arg]
serialized: Any = SerializedDAG  # mypy sees the class of Airflow 3
task = serialized.from_dict(serialized.to_dict(dag)).get_task(task_id)
(run,) = DagRun.find(dag_id=dag_id)
sys.stdout.write(str(task.get_extra_links(run.get_task_instance(task_id), button)))
