"""`CacheSensor`: wait until a dataset is published."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from keras_remote_airflow._compat import (
    EXECUTION_TIMEOUT_ENDS_DEFERRALS,
    AirflowFailException,
    AirflowSensorTimeout,
    AirflowSkipException,
    BaseSensorOperator,
    Context,
    PokeReturnValue,
    XComArg,
    conf,
    deferral_timed_out,
)
from keras_remote_airflow.arguments import (
    check_mount_path,
    names_task_in_errors,
    rendered,
    rendered_chain,
    rendered_or_none,
    to_template,
)
from keras_remote_airflow.awaited import AwaitedDataset, Looks
from keras_remote_airflow.connection import connect
from keras_remote_airflow.core.errors import InvalidInputError, StoreError, printable
from keras_remote_airflow.core.layout import KERAS_REMOTE, CacheKey, get_layout
from keras_remote_airflow.core.refs import DataRef, parse_data_ref
from keras_remote_airflow.failures import (
    is_outage,
    permanent_errors_fail_the_task,
    soft_failures_skip,
)
from keras_remote_airflow.links import DatasetLink
from keras_remote_airflow.triggers import CacheTrigger

if TYPE_CHECKING:
    from google.cloud.storage import Client

    from keras_remote_airflow.core.data import Data
    from keras_remote_airflow.core.datasets.lookup import Verify
    from keras_remote_airflow.core.layout import LayoutName

_SOURCES = ("content_hash", "data", "data_ref")
_DEFAULT_NAMESPACE = "default"


class CacheSensor(BaseSensorOperator):
    """Wait until a dataset is published, and push its ref.

    The dataset is named by exactly one of `content_hash`, `data` and `data_ref`. It is there when
    its marker is, and its objects are: if a lifecycle rule has deleted some, the sensor waits until
    they are uploaded again. Outages of Cloud Storage are waited out, in every mode.

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
        namespace_prefix: first part of every object name. Templated.
        is_dir: whether the dataset is a directory. Only needed with `content_hash`, when another
            client has written the marker and left it empty.
        mount_path: where a training job should see the data; passed on in the ref. Templated.
        gcp_conn_id, impersonation_chain, user_project: see `connection`. Templated.
        deferrable: look once, then wait in the triggerer, for `timeout` seconds. Every sensor's
            `poke_interval`, `exponential_backoff` (waits double, without jitter), `max_wait`,
            `soft_fail`, `never_fail` and `silent_fail` hold there too. This needs a running
            triggerer; without one, use False and `mode="reschedule"`. Defaults to the
            configuration's `[operators] default_deferrable`.
        layout: "keras_remote", or "kinetic" to share the cache with keras-kinetic. Templated.
        verify: how much of the listing every look takes in: "page" (the first 1,000 objects, one
            request) or "full". Templated.
        hash_index: file on the worker that remembers the hashes of unchanged files of `data`, see
            `core.disk.index`; None takes the worker's `KERAS_REMOTE_HASH_INDEX`, or reads every
            file. Templated.
        multiple_outputs: push each field of the ref as an XCom of its own too.
    """

    template_fields: Sequence[str] = (
        "bucket_name",
        *_SOURCES,
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

    # How much later than the trigger's own deadline Airflow ends a deferral. This is time for the
    # trigger's last look, which `CacheTrigger` gives up after a minute.
    deferral_margin = timedelta(minutes=5)

    _awaited: AwaitedDataset | None = None
    _looks: Looks
    _client: "Client | None" = None

    def __init__(
        self,
        *,
        bucket_name: str | XComArg | None = None,
        content_hash: str | XComArg | None = None,
        data: "str | os.PathLike[str] | Data | XComArg | None" = None,
        data_ref: dict[str, Any] | str | XComArg | None = None,
        namespace_prefix: str | XComArg = _DEFAULT_NAMESPACE,
        is_dir: bool | None = None,
        mount_path: "str | os.PathLike[str] | XComArg | None" = None,
        gcp_conn_id: str | XComArg = "google_cloud_default",
        impersonation_chain: str | Sequence[str] | XComArg | None = None,
        user_project: str | XComArg | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        layout: "LayoutName | XComArg" = KERAS_REMOTE.name,
        verify: "Verify | XComArg" = "page",
        hash_index: "str | os.PathLike[str] | XComArg | None" = None,
        multiple_outputs: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(multiple_outputs=multiple_outputs, **kwargs)
        with names_task_in_errors(self):
            self.bucket_name = to_template("bucket_name", bucket_name)
            self.content_hash = to_template("content_hash", content_hash)
            self.data = to_template("data", data)
            is_ref = isinstance(data_ref, dict)
            self.data_ref: Any = data_ref if is_ref else to_template("data_ref", data_ref)
            self.namespace_prefix = to_template("namespace_prefix", namespace_prefix)
            self.is_dir = is_dir
            self.mount_path = to_template("mount_path", mount_path)
            self.gcp_conn_id = to_template("gcp_conn_id", gcp_conn_id)
            self.impersonation_chain: Any = impersonation_chain  # a list is one chain
            self.user_project = to_template("user_project", user_project)
            self.deferrable = deferrable
            self.layout = to_template("layout", layout)
            self.verify = to_template("verify", verify)
            self.hash_index = to_template("hash_index", hash_index)
            self._check_arguments()
            check_mount_path(layout, mount_path)

    if TYPE_CHECKING:

        @property
        def output(self) -> Any:
            """The ref, for a call of another task: it passes for whatever type that declares."""

    def execute(self, context: Context) -> Any:
        self._awaited = self._client = None
        if not self.deferrable:
            return self._poke_until_timeout(context)
        try:
            if found := self.poke(context):
                return found.xcom_value
        except StoreError:
            if not self.silent_fail:
                raise
            self.log.exception("Could not look, will look again")
        awaited = self._awaited
        assert awaited  # noqa: S101 - made by `poke` before anything that raises a StoreError
        self.log.info(
            "Deferring for at most %s s, with a look every %s s (this needs a triggerer; without "
            "one, pass deferrable=False): %s",
            self.timeout,
            self.poke_interval,
            awaited.key.gcs_uri,
        )
        self.defer(
            trigger=CacheTrigger(
                asdict(awaited),
                self.poke_interval,
                time.time() + self.timeout,
                bool(self.exponential_backoff),
                self.max_wait.total_seconds() if self.max_wait else None,
                self.silent_fail,
            ),
            method_name="execute_complete",
            timeout=timedelta(seconds=self.timeout) + self.deferral_margin,
        )
        return None

    def _poke_until_timeout(self, context: Context) -> Any:
        try:
            return super().execute(context)
        except (AirflowSensorTimeout, AirflowSkipException) as exc:
            # Airflow's own message says nothing about the looks. Errors of `poke` are the cause of
            # a skip.
            if exc.__cause__ or self._awaited is None:
                raise
            skipped = "" if isinstance(exc, AirflowSensorTimeout) else "Skipped instead of failed: "
            outcome = self._looks.outcome(self._awaited.key.gcs_uri)
            raise type(exc)(f"{skipped}Waited {self.timeout} s: {outcome}") from None

    def poke(self, context: Context) -> PokeReturnValue:  # noqa: ARG002 - Airflow's signature
        with soft_failures_skip(self), permanent_errors_fail_the_task():
            ref = self._look()
        return PokeReturnValue(ref is not None, ref and ref.to_dict())

    def _look(self) -> DataRef | None:
        from keras_remote_airflow.core.cloud.transport import Transport

        # Both are kept for the other pokes of this execution.
        if self._awaited is None:
            with names_task_in_errors(self):
                self._awaited, self._looks = self._make_awaited(), Looks()
        awaited = self._awaited
        uri = awaited.key.gcs_uri
        try:
            self._client = self._client or connect(self.gcp_conn_id, self.impersonation_chain)
            with Transport(self._client, awaited.policy, awaited.user_project) as transport:
                ref = transport.run(awaited.look(transport))
        except StoreError as exc:
            self._looks.failed(exc)
            if not is_outage(exc):
                raise
            self.log.warning("Could not look, will look again (%s): %s", exc, uri)
            return None
        self._looks.succeeded()
        if ref is None and not self.deferrable:
            self.log.info("Not there yet: %s", uri)
        return ref

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - Airflow's signature
        """Return the ref from the trigger's event, or raise what poke mode would have raised."""
        if event["status"] == "found":
            ref: dict[str, Any] = event["ref"]
            return ref
        message = event["message"]
        with soft_failures_skip(self):
            if event["status"] == "timeout":
                raise AirflowSensorTimeout(f"Waited {self.timeout} s: {message}")
            if event["permanent"]:
                raise AirflowFailException(message)
            raise StoreError(message)

    def resume_execution(
        self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context
    ) -> Any:
        limit = self.execution_timeout if EXECUTION_TIMEOUT_ENDS_DEFERRALS else None
        is_limited = limit is not None and limit.total_seconds() < self.timeout
        if deferral_timed_out(next_method, next_kwargs) and not is_limited:
            # The trigger keeps the deadline, and Airflow's own is later, so the latter is only
            # reached when no trigger ran. Airflow 2 would retry that, as an error without a name.
            message = "no triggerer answered; check that one is running, or pass deferrable=False"
            next_method = "execute_complete"
            next_kwargs = {"event": {"status": "timeout", "message": message}}
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except AirflowSkipException as exc:
            # 3.x replaces every skip, ours too, by one that only says that soft_fail is set.
            ours = exc.__cause__
            if isinstance(ours, AirflowSkipException):
                raise ours from ours.__cause__
            raise

    def _make_awaited(self) -> AwaitedDataset:
        self._check_arguments()  # again: a template may have rendered to None
        layout = rendered("layout", self.layout)
        mount_path = rendered_or_none("mount_path", self.mount_path)
        check_mount_path(layout, mount_path)
        if self.data_ref is not None:
            ref = parse_data_ref(self.data_ref)
            key = self._key_of(ref)
            mount_path = mount_path or ref.mount_path
            is_dir: bool | None = ref.is_dir
            if layout != KERAS_REMOTE.name:
                key = replace(key, layout=get_layout(layout))
        else:
            bucket = rendered("bucket_name", self.bucket_name)
            namespace = rendered("namespace_prefix", self.namespace_prefix)
            if self.data is not None:
                content_hash, is_dir = self._hash()
            else:
                content_hash, is_dir = rendered("content_hash", self.content_hash), self.is_dir
            key = CacheKey(bucket, namespace, content_hash, get_layout(layout))
        return AwaitedDataset(
            key.bucket,
            key.content_hash,
            key.namespace,
            key.layout.name,
            is_dir,
            mount_path,
            rendered("verify", self.verify),
            rendered("gcp_conn_id", self.gcp_conn_id),
            rendered_chain(self.impersonation_chain),
            rendered_or_none("user_project", self.user_project),
        )

    def _key_of(self, ref: DataRef) -> CacheKey:
        key = ref.cache_key
        if key is None:
            raise InvalidInputError(
                "nothing will publish this data, so there is nothing to wait for: data_ref names "
                f"{ref.gcs_uri}"
            )
        for name, default, found in (
            ("bucket_name", None, key.bucket),
            ("namespace_prefix", _DEFAULT_NAMESPACE, key.namespace),
        ):
            given = rendered_or_none(name, getattr(self, name))
            if given not in (None, default, found):
                raise InvalidInputError(
                    f"{name} is {given!r}, but data_ref names {ref.gcs_uri}: leave it out"
                )
        return key

    def _hash(self) -> tuple[str, bool]:
        from keras_remote_airflow.core.data import Data

        data = self.data if isinstance(self.data, Data) else Data(rendered("data", self.data))
        if data.is_gcs:
            raise InvalidInputError(
                "only local data has a hash to wait for. Wait for objects with Google's own "
                f"sensors. Found data={data.path}"
            )
        content_hash = data.content_hash(rendered_or_none("hash_index", self.hash_index))
        self.log.info("Hashed to %s: %s", content_hash, printable(data.path))
        return content_hash, data.is_dir

    def _check_arguments(self) -> None:
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidInputError(
                f"exactly one of {', '.join(_SOURCES)} must be given, "
                f"found {' and '.join(given) or 'none'}"
            )
        if self.bucket_name is None and self.data_ref is None:
            raise InvalidInputError(f"bucket_name must be given with {given[0]}")
