"""`DataUploadOperator`: make sure that data is on Cloud Storage, under the hash of its content."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keras_remote_airflow._compat import SIGTERM_RAISES, BaseOperator, Context
from keras_remote_airflow.core.layout import get_layout
from keras_remote_airflow.core.refs import DataRef
from keras_remote_airflow.execution import connect, permanent_errors_fail_the_task
from keras_remote_airflow.links import DatasetLink

if TYPE_CHECKING:
    from keras_remote_airflow.core.data import Data


class DataUploadOperator(BaseOperator):
    """Upload a local file or directory to Cloud Storage, unless these very bytes are there.

    The task reads and hashes the data on the worker. If a dataset is published under that hash,
    nothing is written; otherwise what is missing goes up, and the marker that publishes it last.
    `gs://` data is passed through without a request. See `core.cache.upload`.

    XComs: `return_value` is the ref, a plain dict (see `core.refs`), each of its fields is pushed
    too (`upload.output["gcs_uri"]` works), and `upload_stats` is {"content_hash", "cache_hit",
    "files", "bytes", "uploaded_files", "uploaded_bytes", "seconds"}.

    A kill or `execution_timeout` stops the transfer; nothing is published, and a retry uploads
    only what is missing. Errors that stay true (bad input, a conflict, an unreadable marker) fail
    the task at once; refusals and outages of Cloud Storage are left to the task's `retries`.

    Args:
        data: path of a file or directory on the worker, or a `gs://` URI. It is only looked at
            when the task runs. Templated.
        bucket_name: bare name of an existing bucket. Templated.
        namespace_prefix: what leads every object name. Templated.
        mount_path: where a training job should see the data; passed on in the ref. Templated.
        project_id: project id; None takes the connection's, then `KERAS_REMOTE_PROJECT` or
            `GOOGLE_CLOUD_PROJECT`. Templated.
        gcp_conn_id: id of the Google Cloud connection. It needs roles/storage.objectCreator and
            objectViewer on the bucket. Templated.
        impersonation_chain: service account to impersonate, or a chain of them whose last one is
            impersonated. Templated.
        layout: "keras_remote", or "kinetic" to share the cache with keras-kinetic. Templated.
    """

    template_fields: Sequence[str] = (
        "data",
        "bucket_name",
        "namespace_prefix",
        "mount_path",
        "project_id",
        "gcp_conn_id",
        "impersonation_chain",
        "layout",
    )
    operator_extra_links = (DatasetLink(),)
    ui_color = "#d2e3fc"

    _transferring = False

    def __init__(
        self,
        *,
        data: "str | Data",
        bucket_name: str,
        namespace_prefix: str = "default",
        mount_path: str | None = None,
        project_id: str | None = None,
        gcp_conn_id: str = "google_cloud_default",
        impersonation_chain: str | Sequence[str] | None = None,
        layout: str = "keras_remote",
        multiple_outputs: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(multiple_outputs=multiple_outputs, **kwargs)
        self.data = data
        self.bucket_name = bucket_name
        self.namespace_prefix = namespace_prefix
        self.mount_path = mount_path
        self.project_id = project_id
        self.gcp_conn_id = gcp_conn_id
        self.impersonation_chain = impersonation_chain
        self.layout = layout

    def execute(self, context: Context) -> dict[str, Any]:
        from keras_remote_airflow.core.cache import upload
        from keras_remote_airflow.core.data import Data

        with permanent_errors_fail_the_task():
            data = self.data if isinstance(self.data, Data) else Data(self.data)
            client = project = None
            if not data.is_gcs:
                client, project = connect(
                    self.gcp_conn_id, self.impersonation_chain, self.project_id
                )
            self._transferring = True
            try:
                result = upload(
                    self.bucket_name,
                    data,
                    project,
                    self.namespace_prefix,
                    client=client,
                    layout=self.layout,
                )
            finally:
                self._transferring = False
        context["ti"].xcom_push(key="upload_stats", value=result.stats())
        layout = get_layout(self.layout)
        return DataRef(result.gcs_uri, result.is_dir, self.mount_path, layout).to_dict()

    def on_kill(self) -> None:
        """Stop the transfer.

        Airflow calls this from its SIGTERM handler, in the thread that waits for the transfer, so
        raising here ends the wait; `core` then cancels what is in flight. (After an
        `execution_timeout`, which calls this too, nothing is in flight any more.)
        """
        if self._transferring and not SIGTERM_RAISES:
            # SystemExit, because Airflow 3 retries a task that ends by it if retries are left, as
            # a task whose worker is taken away should be; AirflowTaskTerminated fails for good.
            raise SystemExit("killed while uploading; nothing was published")
