"""The button that opens a task's dataset in the Cloud Storage browser."""

from typing import TYPE_CHECKING
from urllib.parse import quote

from keras_remote_airflow._compat import BaseOperatorLink, XCom
from keras_remote_airflow.core.refs import DataRef, is_data_ref, parse_data_ref

if TYPE_CHECKING:
    from keras_remote_airflow._compat import BaseOperator, TaskInstanceKey

_CONSOLE = "https://console.cloud.google.com/storage/browser"


class DatasetLink(BaseOperatorLink):
    """Opens the dataset that the task's ref names.

    Reads the ref that the task pushed as `return_value`: on Airflow 3 in the worker when the task
    ends, on Airflow 2 in the webserver.
    """

    name = "Cloud Storage"

    def get_link(self, operator: "BaseOperator", *, ti_key: "TaskInstanceKey") -> str:  # noqa: ARG002 - Airflow's signature
        """Return the URL, or "" while the task has pushed no ref."""
        value = XCom.get_value(ti_key=ti_key, key="return_value")
        return console_url(parse_data_ref(value)) if is_data_ref(value) else ""


def console_url(ref: DataRef) -> str:
    """Return the page of Google's console that shows what `ref` names.

    Data in a cache is shown as a folder, even a single file: the ref names the prefix that the
    file lies under.
    """
    if ref.is_prefix:
        return f"{_CONSOLE}/{ref.bucket}/{quote(ref.object_name.rstrip('/'))}"
    return f"{_CONSOLE}/_details/{ref.bucket}/{quote(ref.object_name)}"
