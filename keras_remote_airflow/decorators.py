"""`@task.local_data`: a TaskFlow task whose data refs arrive as verified local paths."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

from keras_remote_airflow._compat import (
    SIGTERM_RAISES,
    Context,
    DecoratedOperator,
    PythonOperator,
    XComArg,
    task_decorator_factory,
)
from keras_remote_airflow.connection import connect
from keras_remote_airflow.core.refs import DataRef, is_data_ref, parse_data_ref
from keras_remote_airflow.failures import permanent_errors_fail_the_task


def local_data_task(
    python_callable: Callable[..., Any] | None = None,
    multiple_outputs: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Make a task of a function whose data refs arrive as local paths.

    Every ref is replaced by the path of what it names, downloaded and verified as `materialize`
    does it: the directory, or the file. Refs are found at any depth of dicts, lists, tuples and
    dataclasses, whose types stay what they are; what a mapped task has pushed becomes a list if
    there are refs in it. Refs are not looked for elsewhere: the text of a ref, as a template
    renders it, stays that text, and a ref inside another object (of attrs, of pydantic, in a set)
    stays a ref. A ref that occurs twice is downloaded once. The ref's `mount_path` is ignored,
    because it says where a training job, not this worker, should see the data.

    Errors that stay true (a malformed ref, an unusable `dest`) fail the task at once; data that is
    not what its ref names and refusals or outages of Cloud Storage are left to its `retries`.

    Args:
        python_callable: the function.
        multiple_outputs: as for `@task`.
        **kwargs: arguments of `@task`, and those of `LocalDataOperator`.
    """
    return task_decorator_factory(
        python_callable=python_callable,
        multiple_outputs=multiple_outputs,
        decorated_operator_class=LocalDataOperator,
        **kwargs,
    )


class LocalDataOperator(DecoratedOperator, PythonOperator):
    """What `@task.local_data` makes of a function.

    Args:
        dest: directory on the worker below which the data is put, each dataset in a directory
            named by its content. It stays there, and later tasks on that worker reuse it, verified
            anew. None takes a temporary directory for this run of the task alone, which is removed
            when the function has returned or raised; other tasks cannot use paths into it.
            Templated.
        gcp_conn_id, impersonation_chain, user_project: see `connection`. Templated.
    """

    template_fields: Sequence[str] = (
        *PythonOperator.template_fields,
        "dest",
        "gcp_conn_id",
        "impersonation_chain",
        "user_project",
    )
    custom_operator_name = "@task.local_data"
    ui_color = "#d2e3fc"

    _running = False

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Any = None,
        op_kwargs: Any = None,
        dest: str | XComArg | None = None,
        gcp_conn_id: str | XComArg = "google_cloud_default",
        impersonation_chain: str | Sequence[str] | XComArg | None = None,
        user_project: str | XComArg | None = None,
        **kwargs: Any,
    ) -> None:
        function = {
            "python_callable": python_callable,
            "op_args": op_args,
            "op_kwargs": op_kwargs,
        }
        super().__init__(**function, kwargs_to_upstream=function, **kwargs)
        # Any: the templates are rendered before `execute` reads these.
        self.dest: Any = dest
        self.gcp_conn_id: Any = gcp_conn_id
        self.impersonation_chain: Any = impersonation_chain
        self.user_project: Any = user_project

    def execute(self, context: Context) -> Any:
        folder = self.dest or tempfile.mkdtemp(prefix="keras-remote-")
        self._running = True
        try:
            paths = PathsForRefs(self._fetcher(os.path.expanduser(folder)))
            with permanent_errors_fail_the_task():
                self.op_args = paths.put_into(self.op_args)
                self.op_kwargs = paths.put_into(self.op_kwargs)
            return super().execute(context)
        finally:
            self._running = False
            if not self.dest:
                shutil.rmtree(folder, ignore_errors=True)

    def on_kill(self) -> None:
        """End the download or the function, so that the temporary directory is removed.

        As `DataUploadOperator.on_kill`: Airflow calls this in the thread that runs the task.
        """
        super().on_kill()
        if self._running and not SIGTERM_RAISES:
            raise SystemExit("killed")

    def _fetcher(self, folder: str) -> Callable[[DataRef], str]:
        client: Any = None

        def fetch(ref: DataRef) -> str:
            from keras_remote_airflow.core.datasets.materialize import materialize

            nonlocal client
            if client is None:
                client = connect(self.gcp_conn_id, self.impersonation_chain)
            return materialize(
                dataclasses.replace(ref, mount_path=None),
                cache_dir=folder,
                client=client,
                user_project=self.user_project,
            )

        return fetch


class PathsForRefs:
    """Puts paths where refs are; a value without refs is returned itself, not a copy.

    Args:
        fetch: returns the path for a ref; called once for each dataset.
    """

    def __init__(self, fetch: Callable[[DataRef], str]) -> None:
        self._fetch = fetch
        self._fetched: dict[tuple[str, bool], str] = {}

    def put_into(self, value: Any) -> Any:
        if is_data_ref(value):
            return self._path(parse_data_ref(value))
        if isinstance(value, dict):
            return self._put_items(value, value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._put_fields(value)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
            return self._put_elements(value)
        return value

    def _path(self, ref: DataRef) -> str:
        key = ref.gcs_uri, ref.is_dir
        if key not in self._fetched:
            self._fetched[key] = self._fetch(ref)
        return self._fetched[key]

    def _changes(self, items: dict[Any, Any]) -> dict[Any, Any]:
        new = {key: self.put_into(item) for key, item in items.items()}
        return {key: item for key, item in new.items() if item is not items[key]}

    def _put_items(self, value: Any, items: dict[Any, Any]) -> Any:
        changes = self._changes(items)
        if not changes:
            return value
        changed = copy(value)  # an OrderedDict or a defaultdict stays one
        changed.update(changes)
        return changed

    def _put_fields(self, value: Any) -> Any:
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        changes = self._changes({name: getattr(value, name) for name in names})
        if not changes:
            return value
        # Not dataclasses.replace: it calls __init__, which may want or do other things.
        changed = copy(value)
        for name, item in changes.items():
            object.__setattr__(changed, name, item)
        return changed

    def _put_elements(self, value: Sequence[Any]) -> Any:
        old = list(value)
        new = [self.put_into(item) for item in old]
        if all(one is other for one, other in zip(old, new, strict=True)):
            return value
        if isinstance(value, tuple):
            make = getattr(value, "_make", type(value))  # namedtuples take their fields one by one
            return make(new)
        if isinstance(value, list):
            changed = copy(value)
            changed[:] = new
            return changed
        return new
