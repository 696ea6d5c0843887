"""`DataUploadOperator`: make sure that data is on Cloud Storage, under the hash of its content."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from keras_remote_airflow._compat import (
    SIGTERM_RAISES,
    AirflowSkipException,
    BaseOperator,
    Context,
    XComArg,
)
from keras_remote_airflow.arguments import (
    check_mount_path,
    names_task_in_errors,
    rendered,
    rendered_or_none,
    to_template,
)
from keras_remote_airflow.assets import (
    check_outlets,
    fill_outlet_events,
    is_work_of_an_earlier_try,
)
from keras_remote_airflow.connection import connect
from keras_remote_airflow.core.data import Data, check_counts
from keras_remote_airflow.core.errors import EmptyDataError, InvalidInputError
from keras_remote_airflow.core.layout import CacheKey, Layout, get_layout
from keras_remote_airflow.core.progress import format_bytes, format_files
from keras_remote_airflow.core.refs import DataRef
from keras_remote_airflow.failures import permanent_errors_fail_the_task
from keras_remote_airflow.links import DatasetLink
from keras_remote_airflow.metrics import count_upload

if TYPE_CHECKING:
    from google.cloud.storage import Client

    from keras_remote_airflow.core.datasets.lookup import Verify
    from keras_remote_airflow.core.datasets.upload import UploadResult
    from keras_remote_airflow.core.layout import LayoutName

OnCacheHit = Literal["continue", "skip"]


class DataUploadOperator(BaseOperator):
    """Upload a local file or directory to Cloud Storage, unless these very bytes are there.

    The task reads and hashes the data on the worker. If a dataset is published under that hash,
    nothing is written; otherwise what is missing is uploaded, and last the marker, which publishes
    it. `gs://` data is listed, and passed on if it is there. See `core.datasets.upload`.

    XComs: `return_value` is the ref, a plain dict (see `core.refs`), each of its fields is pushed
    too (`upload.output["gcs_uri"]` works), and `upload_stats` is {"content_hash", "cache_hit",
    "files", "bytes", "uploaded_files", "uploaded_bytes", "seconds", "fingerprint"}. `gs://` data
    has a fingerprint in place of a content hash: what `core.datasets.remote.list_source` makes of
    names, sizes and checksums.

    Outlets: an `AssetAlias` (Airflow 2: `DatasetAlias`) gets an event only when the data is new,
    so a DAG scheduled on it runs once per changed dataset; an `Asset` gets one on every success,
    as from any task. Both events carry the ref and the content hash, see `assets`. Data is new when
    it was not published before. In a retry, data that an earlier try of the same run published is
    new. `gs://` data has no hash, and always is new.

    Metrics: see `metrics`. OpenLineage, where its provider is installed: see `lineage`.

    A kill or `execution_timeout` stops the transfer; nothing is published, and a retry uploads
    only what is missing. Errors that stay true (bad input, a conflict, an unreadable marker) fail
    the task at once; refusals and outages of Cloud Storage are left to the task's `retries`, and so
    is data with too few files, because a mount may come back.

    Args:
        data: path of a file or directory on the worker, or a `gs://` URI. It is only looked at
            when the task runs. One task uploads one dataset; for a list use `.expand(data=...)`.
            Templated.
        bucket_name: bare name of an existing bucket. Templated.
        namespace_prefix: first part of every object name. Templated.
        mount_path: where a training job should see the data; passed on in the ref. Not with layout
            "kinetic", whose runner would take it to mean that the data is there. Templated.
        gcp_conn_id, impersonation_chain, user_project: see `connection`. Templated.
        layout: "keras_remote", or "kinetic" to share the cache with keras-kinetic. Templated.
        verify: how much of the listing a hit is checked against: "page" (the first 1,000 objects,
            one request) or "full". Templated.
        hash_index: file on the worker that remembers the hashes of unchanged files, see
            `core.disk.index`; None takes the worker's `KERAS_REMOTE_HASH_INDEX`, or reads every
            file. Templated.
        allow_empty: whether a folder without files may be published. It is often a volume that is
            not mounted. `gs://` data must be there in any case.
        min_files: how many files there must be at least, for volumes that are mounted in part and
            prefixes that are half written.
        on_cache_hit: "continue", or "skip": if the data is not new, the task ends as skipped, and
            Airflow skips what is downstream. The XComs are pushed either way.
        multiple_outputs: push each field of the ref as an XCom of its own too.
    """

    template_fields: Sequence[str] = (
        "data",
        "bucket_name",
        "namespace_prefix",
        "mount_path",
        "gcp_conn_id",
        "impersonation_chain",
        "user_project",
        "layout",
        "verify",
        "hash_index",
    )
    operator_extra_links = (DatasetLink(),)
    ui_color = "#d2e3fc"

    _transferring = False
    _result: "UploadResult | None" = None

    def __init__(
        self,
        *,
        data: "str | os.PathLike[str] | Data | XComArg",
        bucket_name: str | XComArg,
        namespace_prefix: str | XComArg = "default",
        mount_path: "str | os.PathLike[str] | XComArg | None" = None,
        gcp_conn_id: str | XComArg = "google_cloud_default",
        impersonation_chain: str | Sequence[str] | XComArg | None = None,
        user_project: str | XComArg | None = None,
        layout: "LayoutName | XComArg" = "keras_remote",
        verify: "Verify | XComArg" = "page",
        hash_index: "str | os.PathLike[str] | XComArg | None" = None,
        allow_empty: bool = False,
        min_files: int = 0,
        on_cache_hit: OnCacheHit = "continue",
        multiple_outputs: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(multiple_outputs=multiple_outputs, **kwargs)
        with names_task_in_errors(self):
            self.data = to_template("data", data)
            self.bucket_name = to_template("bucket_name", bucket_name)
            self.namespace_prefix = to_template("namespace_prefix", namespace_prefix)
            self.mount_path = to_template("mount_path", mount_path)
            self.gcp_conn_id = to_template("gcp_conn_id", gcp_conn_id)
            self.impersonation_chain: Any = impersonation_chain  # a list is one chain
            self.user_project = to_template("user_project", user_project)
            self.layout = to_template("layout", layout)
            self.verify = to_template("verify", verify)
            self.hash_index = to_template("hash_index", hash_index)
            self.allow_empty = allow_empty
            self.min_files = min_files
            self.on_cache_hit = on_cache_hit
            if on_cache_hit not in get_args(OnCacheHit):
                expected = list(get_args(OnCacheHit))
                raise InvalidInputError(
                    f"unknown on_cache_hit {on_cache_hit!r}: expected one of {expected}"
                )
            check_counts(allow_empty, min_files)
            check_mount_path(layout, mount_path)

    if TYPE_CHECKING:

        @property
        def output(self) -> Any:
            """The ref, for a call of another task: it passes for whatever type that declares."""

    def execute(self, context: Context) -> dict[str, Any]:
        self._result = None
        with permanent_errors_fail_the_task():
            layout = get_layout(rendered("layout", self.layout))
            mount_path = rendered_or_none("mount_path", self.mount_path)
            check_mount_path(layout.name, mount_path)
            result = self._result = self._upload(layout)
        count_upload(result, {"dag_id": self.dag_id, "task_id": self.task_id})
        ref = DataRef(result.gcs_uri, result.is_dir, mount_path, layout)
        is_new = not result.cache_hit or is_work_of_an_earlier_try(context, result.published_at)
        fill_outlet_events(context, self.outlets, ref, result.content_hash, is_new=is_new)
        push = context["ti"].xcom_push
        push(key="upload_stats", value=result.stats())
        fields = ref.to_dict()
        if self.on_cache_hit == "skip" and not is_new:
            # Airflow pushes what a task returns, and nothing for one that is skipped.
            push(key="return_value", value=fields)
            for key, value in fields.items() if self.multiple_outputs else ():
                push(key=key, value=value)
            raise AirflowSkipException(
                f"Skipping: nothing new in {format_files(result.files)} "
                f"({format_bytes(result.bytes)}), they are published already. To train on them "
                f"anyway, clear the downstream task: {result.gcs_uri}"
            )
        return fields

    def dry_run(self) -> None:
        """Log what would be uploaded, and where to; write nothing to Cloud Storage.

        On Airflow 2 `airflow tasks test --dry-run` calls this; Airflow 3 has no such option.
        """
        super().dry_run()
        self._upload(get_layout(rendered("layout", self.layout)), dry_run=True)

    def _upload(self, layout: Layout, *, dry_run: bool = False) -> "UploadResult":
        from keras_remote_airflow.core.datasets.upload import upload

        data = self._data()
        bucket_name = rendered("bucket_name", self.bucket_name)
        namespace = rendered("namespace_prefix", self.namespace_prefix)
        any_hash = "0" * 64
        uri = CacheKey(bucket_name, namespace, any_hash, layout).gcs_uri
        check_outlets(self.outlets, data.path if data.is_gcs else uri)
        user_project = rendered_or_none("user_project", self.user_project)
        client = connect(self.gcp_conn_id, self.impersonation_chain)
        self._transferring = True
        try:
            if data.is_gcs:
                return self._look_at(data, client, user_project)
            return upload(
                bucket_name,
                data,
                namespace_prefix=namespace,
                client=client,
                user_project=user_project,
                layout=layout.name,
                verify=self.verify,
                hash_index=rendered_or_none("hash_index", self.hash_index),
                allow_empty=self.allow_empty,
                min_files=self.min_files,
                dry_run=dry_run,
            )
        finally:
            self._transferring = False

    def _look_at(self, data: Data, client: "Client", user_project: str | None) -> "UploadResult":
        from keras_remote_airflow.core.datasets.remote import list_source
        from keras_remote_airflow.core.datasets.upload import UploadResult

        found = list_source(data.path, client=client, user_project=user_project)
        files = format_files(found.files)
        if found.files < self.min_files:
            raise EmptyDataError(
                f"found {files} on Cloud Storage, expected at least {self.min_files}: {data.path}. "
                "Is what writes there done? If not more are expected, pass a lower min_files."
            )
        size = format_bytes(found.bytes)
        self.log.info("Passing on %s (%s) that Cloud Storage has: %s", files, size, data.path)
        return UploadResult(
            data.path,
            data.is_dir,
            files=found.files,
            bytes=found.bytes,
            fingerprint=found.fingerprint,
        )

    def _data(self) -> Data:
        return self.data if isinstance(self.data, Data) else Data(rendered("data", self.data))

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:  # noqa: ARG002 - OpenLineage's signature
        """Return to Airflow's OpenLineage provider what was read and written."""
        from keras_remote_airflow.lineage import describe_upload

        return describe_upload(self._data().path, self._result)

    def on_kill(self) -> None:
        """Stop the transfer.

        Airflow calls this from its SIGTERM handler, in the thread that waits for the transfer, so
        raising here ends the wait; `core` then cancels what is in flight. (An `execution_timeout`
        calls this too, but by then nothing is in flight.)
        """
        if self._transferring and not SIGTERM_RAISES:
            # Airflow 3 retries a task that ends by SystemExit if retries are left, which is right
            # for a task whose worker is taken away; AirflowTaskTerminated fails it for good.
            raise SystemExit("killed while uploading; nothing was published")
