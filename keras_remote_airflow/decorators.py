"""`@task.local_data`: a TaskFlow task whose data refs arrive as verified local paths."""

import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from typing import Any
from uuid import uuid4

from keras_remote_airflow._compat import (
    SIGTERM_RAISES,
    Context,
    DecoratedOperator,
    PythonOperator,
    XComArg,
    task_decorator_factory,
)
from keras_remote_airflow.arguments import names_task_in_errors, rendered_or_none, to_template
from keras_remote_airflow.connection import connect
from keras_remote_airflow.core.disk.partial import locked, partial_name, sweep
from keras_remote_airflow.core.errors import InvalidInputError
from keras_remote_airflow.core.layout import cache_key_from_uri
from keras_remote_airflow.core.refs import DataRef, is_data_ref, parse_data_ref
from keras_remote_airflow.failures import permanent_errors_fail_the_task

_log = logging.getLogger(__name__)


def local_data_task(
    python_callable: Callable[..., Any] | None = None,
    multiple_outputs: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Make a task of a function whose data refs arrive as local paths.

        @task.local_data
        def train(folder):
            ...

        train(upload.output)

    Every ref is replaced by the path of what it names, downloaded and verified as `materialize`
    does it: the directory, or the file. Refs are found at any depth of dicts, lists, tuples and
    dataclasses, whose types stay what they are; what a mapped task has pushed becomes a list if
    there are refs in it. Refs are not looked for elsewhere: a ref inside another object (of attrs,
    of pydantic, in a set) stays a ref. The text of a ref, as a template renders it, and the URI of
    a dataset stay text, and a warning says what to pass. A ref that occurs twice is downloaded
    once. The ref's `mount_path` is ignored, because it says where a training job, not this worker,
    should see the data.

    By default a task's copy lies in the worker's temporary directory, and is removed when the
    function has returned or raised. If the task is killed at once (SIGKILL, out of memory), the
    next such task of the same user on that worker removes it.

    Errors that stay true (a malformed ref, an unusable directory) fail the task at once; data that
    is not what its ref names and refusals or outages of Cloud Storage are left to its `retries`.

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
        cache_dir, cache_max_bytes: as for `materialize`: a directory on the worker where copies
            stay, which later tasks verify and use, and how large it may become. None for both takes
            a temporary directory for this run of the task alone; other tasks cannot use paths into
            it. `cache_dir` is templated.
        gcp_conn_id, impersonation_chain, user_project: see `connection`. Templated.
    """

    template_fields: Sequence[str] = (
        *PythonOperator.template_fields,
        "cache_dir",
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
        cache_dir: str | os.PathLike[str] | XComArg | None = None,
        cache_max_bytes: int | None = None,
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
        with names_task_in_errors(self):
            self.cache_dir = to_template("cache_dir", cache_dir)
            self.cache_max_bytes = cache_max_bytes
            self.gcp_conn_id = to_template("gcp_conn_id", gcp_conn_id)
            self.impersonation_chain: Any = impersonation_chain  # a list is one chain
            self.user_project = to_template("user_project", user_project)

    def execute(self, context: Context) -> Any:
        self._running = True
        try:
            with ExitStack() as stack:
                temporary = None
                with permanent_errors_fail_the_task():
                    cache_dir = rendered_or_none("cache_dir", self.cache_dir)
                    if cache_dir is None and self.cache_max_bytes is None:
                        cache_dir = temporary = stack.enter_context(_temporary_directory())
                    paths = PathsForRefs(self._fetcher(cache_dir))
                    self.op_args = paths.put_into(self.op_args)
                    self.op_kwargs = paths.put_into(self.op_kwargs)
                    paths.warn_of_text()
                result = super().execute(context)
                if temporary and _leads_into(temporary, result):
                    _log.warning(
                        "The function returned a path into its copy of the data, which is removed "
                        "now: other tasks cannot read it. Pass them the ref, or set cache_dir"
                    )
                return result
        finally:
            self._running = False

    def on_kill(self) -> None:
        """End the download or the function, so that the temporary directory is removed.

        As `DataUploadOperator.on_kill`: Airflow calls this in the thread that runs the task.
        """
        super().on_kill()
        if self._running and not SIGTERM_RAISES:
            raise SystemExit("killed")

    def _fetcher(self, cache_dir: str | None) -> Callable[[DataRef], str]:
        client: Any = None

        def fetch(ref: DataRef) -> str:
            from keras_remote_airflow.core.datasets.materialize import materialize

            nonlocal client
            if client is None:
                client = connect(self.gcp_conn_id, self.impersonation_chain)
            return materialize(
                ref,
                cache_dir=cache_dir,
                cache_max_bytes=self.cache_max_bytes,
                client=client,
                user_project=rendered_or_none("user_project", self.user_project),
            )

        return fetch


@contextmanager
def _temporary_directory() -> Iterator[str]:
    """Own a directory until the process ends at the latest; remove what killed tasks have left."""
    base = tempfile.gettempdir()
    sweep(base)
    with locked(os.path.join(base, partial_name(uuid4().hex))) as folder:
        yield folder


def _leads_into(folder: str, value: Any) -> bool:
    """Return whether it is a path into the folder, or holds one at its first level."""
    if isinstance(value, dict):
        value = list(value.values())
    values = value if isinstance(value, list | tuple) else [value]
    return any(
        os.fsdecode(one).startswith(folder) for one in values if isinstance(one, str | os.PathLike)
    )


class PathsForRefs:
    """Puts paths where refs are; a value without refs is returned itself, not a copy.

    A container inside itself is left as it is.

    Args:
        fetch: returns the path for a ref; called once for each dataset.
    """

    def __init__(self, fetch: Callable[[DataRef], str]) -> None:
        self._fetch = fetch
        self._fetched: dict[tuple[str, bool], str] = {}
        self._entered: set[int] = set()  # ids of the containers around the current value
        self._texts: dict[str, str] = {}  # of datasets, and what kind of text it is

    def put_into(self, value: Any) -> Any:
        if isinstance(value, str):
            if what := _what_it_spells(value):
                self._texts[value] = what
            return value
        if is_data_ref(value):
            return self._path(parse_data_ref(value))
        if isinstance(value, dict):
            put: Callable[[Any], Any] = self._put_items
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            put = self._put_fields
        elif isinstance(value, list | tuple) or _is_lazy(value):
            put = self._put_elements
        else:
            return value
        if id(value) in self._entered:
            return value
        self._entered.add(id(value))
        try:
            return put(value)
        finally:
            self._entered.remove(id(value))

    def _path(self, ref: DataRef) -> str:
        key = ref.gcs_uri, ref.is_dir
        if key not in self._fetched:
            self._fetched[key] = self._fetch(ref)
        return self._fetched[key]

    def warn_of_text(self) -> None:
        """Log one warning if a dataset was left out because only its text was passed."""
        fetched = {uri for uri, _ in self._fetched}
        for text, what in self._texts.items():
            if text not in fetched:
                _log.warning(
                    "Not downloaded: an argument is %s, as text. Pass the ref itself, such as "
                    "upload.output, or make_data_ref(uri, is_dir): %.200s",
                    what,
                    text,
                )
                break

    def _changes(self, items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        return {key: new for key, old in items if (new := self.put_into(old)) is not old}

    def _put_items(self, value: dict[Any, Any]) -> Any:
        changes = self._changes(value.items())
        if not changes:
            return value
        changed = copy(value)  # an OrderedDict or a defaultdict stays one
        changed.update(changes)
        return changed

    def _put_fields(self, value: Any) -> Any:
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        changes = self._changes((name, getattr(value, name)) for name in names)
        if not changes:
            return value
        # Not dataclasses.replace: it calls __init__, which may want or do other things.
        changed = copy(value)
        for name, item in changes.items():
            object.__setattr__(changed, name, item)
        return changed

    def _put_elements(self, value: Sequence[Any]) -> Any:
        # Airflow's lazy sequence fetches its elements anew each time.
        old = value if isinstance(value, list | tuple) else list(value)
        changes = self._changes(enumerate(old))
        if not changes:
            return value
        new = [changes.get(index, item) for index, item in enumerate(old)]
        if isinstance(value, tuple):
            make = getattr(value, "_make", type(value))  # namedtuples take their fields one by one
            return make(new)
        if isinstance(value, list):
            changed = copy(value)
            changed[:] = new
            return changed
        return new


def _is_lazy(value: Any) -> bool:
    """Return whether it is a sequence of what mapped tasks have pushed, which Airflow fetches.

    Other sequences, such as a range, may be long, and hold no refs.
    """
    return isinstance(value, Sequence) and type(value).__module__.startswith("airflow.")


def _what_it_spells(text: str) -> str | None:
    """Return what was probably meant by a text that is not looked into; None for any other."""
    if "__data_ref__" in text:
        return "a data ref"
    if text.startswith("gs://"):
        with suppress(InvalidInputError):
            if cache_key_from_uri(text):
                return "the URI of a dataset"
    return None
