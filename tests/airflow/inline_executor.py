"""An executor for Airflow 3 that runs tasks in the scheduler's own process, as `dag.test()` does.

With it `airflow scheduler --num-runs` is all it takes to run what a schedule asks for. Airflow's
own executors start processes, which want an API server to talk to. (Airflow 2 has its
SequentialExecutor.)
"""

from airflow.executors.base_executor import BaseExecutor
from airflow.sdk.api.datamodels._generated import TaskInstance
from airflow.sdk.execution_time.supervisor import run_task_in_process

try:
    from airflow.dag_processing.dagbag import DagBag
except ImportError:  # Airflow 3.1
    from airflow.models.dagbag import DagBag  # type: ignore[no-redef]

_FIELDS = ("id", "task_id", "dag_id", "run_id", "try_number", "map_index", "dag_version_id")


class InlineExecutor(BaseExecutor):
    def _process_workloads(self, workloads):
        for workload in workloads:
            ti = workload.ti
            del self.queued_tasks[ti.key]
            task = DagBag().get_dag(ti.dag_id).get_task(ti.task_id)
            run_task_in_process(
                ti=TaskInstance(**{name: getattr(ti, name) for name in _FIELDS}), task=task
            )
            self.success(ti.key)  # has run; its state is in the database
