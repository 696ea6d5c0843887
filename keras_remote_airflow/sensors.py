"""`CacheSensor`: wait until a dataset is published."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from keras_remote_airflow._compat import (
    AirflowFailException,
    AirflowSensorTimeout,
    AirflowSkipException,
    BaseSensorOperator,
    Context,
    PokeReturnValue,
    conf,
)
from keras_remote_airflow.core.errors import InvalidInputError, StoreError
from keras_remote_airflow.core.layout import KERAS_REMOTE
from keras_remote_airflow.core.refs import parse_data_ref
from keras_remote_airflow.execution import Connection, permanent_errors_fail_the_task
from keras_remote_airflow.links import DatasetLink
from keras_remote_airflow.lookup import Lookup
from keras_remote_airflow.triggers import CacheTrigger

if TYPE_CHECKING:
    from keras_remote_airflow.core.data import Data

_SOURCES = ("content_hash", "data", "data_ref")
_DEFAULT_NAMESPACE = "default"

# How much later than the trigger's own deadline Airflow may end a deferral: time for a last look,
# which `core` gives up after 120 s of failures.
_BACKSTOP = timedelta(minutes=5)


class CacheSensor(BaseSensorOperator):
    """Wait until a dataset is published, and push its ref.

    The dataset is named by exactly one of `content_hash`, `data` and `data_ref`. It is there when
    its marker is, and its objects are: a dataset that a lifecycle rule has eaten is waited for.
    Outages of Cloud Storage are waited out, in every mode.

    XComs: `return_value` is the ref, a plain dict (see `core.refs`), the same in every mode, and
    each of its fields is pushed too (`wait.output["gcs_uri"]` works).

    Fails at once, without retries, on a timeout (see `timeout` of every sensor) and on errors that
    stay true (bad input, a conflict, an unreadable marker); with `soft_fail` it is skipped then. A
    refusal by Cloud Storage (403, no such bucket) is left to the task's `retries`.

    Args:
        bucket_name: bare name of the bucket. Not needed with `data_ref`. Templated.
        content_hash: 64 hex digits, as `Data(path).content_hash()` returns them. Templated.
        data: path of a file or directory on the worker, which is hashed there once (in reschedule
            mode at every poke) to learn what to wait for. Templated.
        data_ref: a ref as DataUploadOperator and CacheSensor push it, or its text as a template
            renders it, such as "{{ ti.xcom_pull('upload') }}". Bucket, namespace and hash come
            from it; `mount_path` too unless it is given, `layout` unless it is "kinetic".
            Templated.
        namespace_prefix: what leads every object name. Templated.
        is_dir: whether the dataset is a directory. Only needed with `content_hash`, when another
            client has written the marker and left it empty.
        mount_path: where a training job should see the data; passed on in the ref. Templated.
        project_id: project id of the client, on which no request made here depends; None takes the
            connection's, then `KERAS_REMOTE_PROJECT` or `GOOGLE_CLOUD_PROJECT`. Templated.
        gcp_conn_id: id of the Google Cloud connection. It needs roles/storage.objectViewer on the
            bucket. Templated.
        impersonation_chain: service account to impersonate, or a chain of them whose last one is
            impersonated. Templated.
        deferrable: look once, then wait in the triggerer, for `timeout` seconds. Every sensor's
            `poke_interval`, `exponential_backoff` (waits double, without jitter), `max_wait`,
            `soft_fail`, `never_fail` and `silent_fail` hold there too. Needs a triggerer: an
            environment without one wants False, and `mode="reschedule"`. Defaults to the
            configuration's `[operators] default_deferrable`.
        layout: "keras_remote", or "kinetic" to share the cache with keras-kinetic. Templated.
        verify: how much of the listing every look takes in: "page" (the first 1,000 objects, one
            request) or "full". Templated.
        hash_index: file on the worker that remembers the hashes of unchanged files of `data`, see
            `core.index`; None takes the worker's `KERAS_REMOTE_HASH_INDEX`, or reads every file.
            Templated.
        multiple_outputs: push each field of the ref as an XCom of its own too.
    """

    template_fields: Sequence[str] = (
        "bucket_name",
        *_SOURCES,
        "namespace_prefix",
        "mount_path",
        "project_id",
        "gcp_conn_id",
        "impersonation_chain",
        "layout",
        "verify",
        "hash_index",
    )
    operator_extra_links = (DatasetLink(),)
    ui_color = "#d2e3fc"

    _looking: tuple[Lookup, Connection] | None = None

    def __init__(
        self,
        *,
        bucket_name: str | None = None,
        content_hash: str | None = None,
        data: "str | Data | None" = None,
        data_ref: dict[str, Any] | str | None = None,
        namespace_prefix: str = _DEFAULT_NAMESPACE,
        is_dir: bool | None = None,
        mount_path: str | None = None,
        project_id: str | None = None,
        gcp_conn_id: str = "google_cloud_default",
        impersonation_chain: str | Sequence[str] | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        layout: str = KERAS_REMOTE.name,
        verify: str = "page",
        hash_index: str | None = None,
        multiple_outputs: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(multiple_outputs=multiple_outputs, **kwargs)
        self.bucket_name = bucket_name
        self.content_hash = content_hash
        self.data = data
        self.data_ref = data_ref
        self.namespace_prefix = namespace_prefix
        self.is_dir = is_dir
        self.mount_path = mount_path
        self.project_id = project_id
        self.gcp_conn_id = gcp_conn_id
        self.impersonation_chain = impersonation_chain
        self.deferrable = deferrable
        self.layout = layout
        self.verify = verify
        self.hash_index = hash_index
        self._check_arguments()

    def execute(self, context: Context) -> Any:
        self._looking = None
        if not self.deferrable:
            return super().execute(context)
        try:
            found = self.poke(context)
        except StoreError:
            if not self.silent_fail:
                raise
            self.log.exception("Could not look, will look again")
        else:
            if found:
                return found.xcom_value
        lookup, _ = self._ready()
        self.log.info(
            "%s is not there yet; a triggerer looks every %s s for at most %s s. (This needs a "
            "running triggerer; without one, pass deferrable=False.)",
            lookup,
            self.poke_interval,
            self.timeout,
        )
        self.defer(
            trigger=CacheTrigger(
                asdict(lookup),
                self.poke_interval,
                time.time() + self.timeout,
                bool(self.exponential_backoff),
                self.max_wait.total_seconds() if self.max_wait else None,
                self.silent_fail,
            ),
            method_name="execute_complete",
            timeout=timedelta(seconds=self.timeout) + _BACKSTOP,
        )
        return None

    def poke(self, context: Context) -> PokeReturnValue:  # noqa: ARG002 - Airflow's signature
        with self._soft_failures_skip(), permanent_errors_fail_the_task():
            lookup, connection = self._ready()
            ref = lookup.look(connection)
        if ref is None and not self.deferrable:
            # Airflow's own message, at the end of a wait in vain, names neither hash nor bucket.
            self.log.info("%s is not there yet", lookup)
        return PokeReturnValue(ref is not None, ref)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - Airflow's signature
        """Return the ref from the trigger's event, or raise what poke mode would have raised."""
        if event["status"] == "found":
            ref: dict[str, Any] = event["ref"]
            return ref
        message = event["message"]
        with self._soft_failures_skip():
            if event["status"] == "timeout":
                raise AirflowSensorTimeout(f"{message} within {self.timeout} s")
            if event["permanent"]:
                raise AirflowFailException(message)
            raise StoreError(message)

    def resume_execution(
        self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context
    ) -> Any:
        # The trigger keeps the deadline, so Airflow's, which is later, is only met when no trigger
        # ran. 2.x would retry that, as an error without a name. (2.x ends a deferral by a shorter
        # execution_timeout too, with the same words, and knows what to do; 3.x does not.)
        error = str((next_kwargs or {}).get("error", "")).lower()
        bounded = (
            "execution" in error
            and self.execution_timeout
            and self.execution_timeout.total_seconds() < self.timeout
        )
        if next_method == "__fail__" and "timeout" in error and not bounded:
            message = (
                "no triggerer answered: check that one is running, or pass deferrable=False. The "
                "dataset did not appear"
            )
            next_method = "execute_complete"
            next_kwargs = {"event": {"status": "timeout", "message": message}}
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except AirflowSkipException as exc:
            # 3.x makes of every skip, ours too, one that only says that soft_fail is set.
            ours = exc.__cause__
            if isinstance(ours, AirflowSkipException):
                raise ours from ours.__cause__
            raise

    @contextmanager
    def _soft_failures_skip(self) -> Iterator[None]:
        """Honour soft_fail and never_fail by the rules of BaseSensorOperator.execute.

        A deferral bypasses that; and unlike it, this says why the task is skipped.
        """
        try:
            yield
        except Exception as exc:
            if isinstance(exc, AirflowFailException | AirflowSensorTimeout):
                skip = self.soft_fail or self.never_fail
            else:
                skip = self.never_fail and not self.silent_fail
            if skip:
                raise AirflowSkipException(f"Skipped instead of failed: {exc}") from exc
            raise

    def _ready(self) -> tuple[Lookup, Connection]:
        """Return what to look for and with what, found out once an execution."""
        if self._looking is None:
            lookup = self._make_lookup()
            self._looking = lookup, lookup.connect()
        return self._looking

    def _make_lookup(self) -> Lookup:
        self._check_arguments()  # again: a template may have rendered to None
        bucket, namespace, layout = self.bucket_name, self.namespace_prefix, self.layout
        is_dir, mount_path, content_hash = self.is_dir, self.mount_path, self.content_hash
        if self.data_ref is not None:
            ref = parse_data_ref(self.data_ref)
            key = ref.cache_key
            if key is None:
                raise self._wrong(
                    f"data_ref names {ref.gcs_uri}, which no upload publishes: there is nothing "
                    "to wait for"
                )
            if bucket not in (None, key.bucket):
                raise self._wrong(
                    f"bucket_name is {bucket!r}, but data_ref names {ref.gcs_uri}: leave it out"
                )
            if namespace not in (_DEFAULT_NAMESPACE, key.namespace):
                raise self._wrong(
                    f"namespace_prefix is {namespace!r}, but data_ref names {ref.gcs_uri}: leave "
                    "it out"
                )
            bucket, namespace, content_hash = key.bucket, key.namespace, key.content_hash
            is_dir = ref.is_dir
            mount_path = ref.mount_path if mount_path is None else mount_path
            layout = ref.layout.name if layout == KERAS_REMOTE.name else layout
        elif self.data is not None:
            content_hash, is_dir = self._hash(self.data)
        chain = self.impersonation_chain
        return Lookup(
            bucket_name=bucket or "",
            content_hash=content_hash or "",
            namespace_prefix=namespace,
            layout=layout,
            is_dir=is_dir,
            mount_path=mount_path,
            gcp_conn_id=self.gcp_conn_id,
            impersonation_chain=chain if chain is None or isinstance(chain, str) else list(chain),
            project_id=self.project_id,
            verify=self.verify,
        )

    def _hash(self, data: "str | Data") -> tuple[str, bool]:
        from keras_remote_airflow.core.data import as_data

        data = as_data(data)
        if data.is_gcs:
            raise self._wrong(
                f"data is {data.path}: only local data has a hash to wait for. Wait for its "
                "objects with Google's own sensors"
            )
        content_hash = data.content_hash(self.hash_index)
        self.log.info("Content hash of %s: %s", data.path, content_hash)
        return content_hash, data.is_dir

    def _check_arguments(self) -> None:
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise self._wrong(
                f"exactly one of {', '.join(_SOURCES)} must be given, "
                f"found {' and '.join(given) or 'none'}"
            )
        if self.bucket_name is None and self.data_ref is None:
            raise self._wrong(f"bucket_name must be given with {given[0]}")

    def _wrong(self, what: str) -> InvalidInputError:
        return InvalidInputError(f"CacheSensor task {self.task_id!r}: {what}")
