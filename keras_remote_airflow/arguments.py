"""Arguments of tasks, as DAG authors pass them and as templates render them.

`to_template` is for `__init__`, `rendered` and `rendered_or_none` are for `execute`.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from keras_remote_airflow.core.data import path_text
from keras_remote_airflow.core.errors import InvalidInputError
from keras_remote_airflow.core.layout import KINETIC
from keras_remote_airflow.core.refs import is_data_ref


@contextmanager
def names_task_in_errors(task: Any) -> Iterator[None]:
    """End each InvalidInputError with the task: an error of a DAG file names only the file."""
    try:
        yield
    except InvalidInputError as exc:
        raise InvalidInputError(f"{exc} ({type(task).__name__} task {task.task_id!r})") from None


def to_template(name: str, value: Any) -> Any:
    """Return an argument as it may stand in a template field; paths become text.

    Airflow 3 would call `resolve` of a `pathlib.Path`, or look whether it exists where the DAG is
    parsed.

    Args:
        name: the argument's.
        value: text, what else `core.data.path_text` takes, a `Data`, the output of a task, None.

    Raises:
        InvalidInputError: it is a list or another collection, or a path that can't be read.
    """
    if isinstance(value, os.PathLike) or isinstance(getattr(value, "protocol", None), str):
        return path_text(value)
    refuse_several(name, value)
    return value


def rendered_or_none(name: str, value: Any) -> str | None:
    """Return the text of a rendered argument, or None if the template was empty.

    A template renders None as "None", and with `render_template_as_native_obj=True` digits as an
    int.

    Raises:
        InvalidInputError: it is neither text nor a whole number, or it is a ref or the text of one.
    """
    if is_data_ref(value) or (isinstance(value, str) and "__data_ref__" in value):
        advice = (
            "it is uploaded already. Pass it on to the task that reads it"
            if name == "data"
            else "pass one of its fields"
        )
        raise InvalidInputError(f"{name} is a data ref: {advice}. Found {value!s:.200}")
    if isinstance(value, str):
        return None if value in ("", "None") else value
    if value is None:
        return None
    if type(value) is int:
        return str(value)
    refuse_several(name, value)
    raise InvalidInputError(
        f"{name} is a {type(value).__name__}, expected text: {value!r:.200}. If a template "
        "rendered it, see render_template_as_native_obj of the DAG."
    )


def rendered(name: str, value: Any) -> str:
    """Return what `rendered_or_none` returns; raise InvalidInputError for None."""
    text = rendered_or_none(name, value)
    if text is None:
        raise InvalidInputError(
            f"{name} must not be empty, found {value!r}. Is the template empty?"
        )
    return text


def rendered_chain(value: Any) -> str | list[str] | None:
    """Return what `rendered_or_none` returns for an `impersonation_chain`, which may be a list."""
    name = "impersonation_chain"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [rendered(name, account) for account in value]
    return rendered_or_none(name, value)


def check_mount_path(layout: Any, mount_path: Any) -> None:
    """Raise InvalidInputError for a mount path in a ref of layout "kinetic"."""
    if layout == KINETIC.name and mount_path:
        raise InvalidInputError(
            "mount_path with layout='kinetic': keras-kinetic's runner returns it without "
            f"downloading anything. Leave out mount_path={mount_path!r}; where it is needed, "
            "gcsfuse_pod_kwargs and materialize_pod_kwargs take it themselves."
        )


def refuse_several(name: str, value: Any, instead: str = "") -> None:
    """Raise InvalidInputError for a list, or another collection, in place of one value.

    Args:
        name: the argument's.
        value: the argument.
        instead: how to get a task for each; "" is `expand` with this argument.
    """
    if isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping):
        raise InvalidInputError(
            f"{name} is a {type(value).__name__} of {len(value)}: a task takes one. For a task "
            f"each, {instead or f'use .partial(…).expand({name}=…)'}."
        )
