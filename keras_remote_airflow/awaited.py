"""The dataset that a sensor and its trigger wait for, and how they look for it."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.errors import InvalidInputError
from keras_remote_airflow.core.layout import CacheKey, get_layout
from keras_remote_airflow.core.progress import format_bytes, format_files
from keras_remote_airflow.core.refs import DataRef

if TYPE_CHECKING:
    from keras_remote_airflow.core.cloud.transport import Transport

_log = logging.getLogger(__name__)


class Looks:
    """How the looks for a dataset went, for what is said when the time is over."""

    def __init__(self) -> None:
        self._made = self._failed = 0  # failed: the last ones, in a row
        self._last_failure: object = None

    def succeeded(self) -> None:
        """Count a look that Cloud Storage answered, whether or not the dataset was there."""
        self._made, self._failed = self._made + 1, 0

    def failed(self, why: object) -> None:
        """Count a look that Cloud Storage did not answer, or refused."""
        self._made, self._failed, self._last_failure = self._made + 1, self._failed + 1, why

    def outcome(self, uri: str) -> str:
        """Return in words why the dataset at `uri` was not found."""
        if not self._failed:
            return f"no dataset appeared. Check bucket, namespace and layout: {uri}"
        why = str(self._last_failure) or repr(self._last_failure)
        if self._failed == self._made:
            return (
                f"no look succeeded ({self._made} failed), so the dataset may be there: {uri}. "
                f"The last failure: {why}"
            )
        return (
            f"the last {self._failed} of {self._made} looks failed, so the dataset may be there: "
            f"{uri}. The last failure: {why}"
        )


@dataclass(frozen=True)
class AwaitedDataset:
    """What to look for, with which credentials, and what its ref will say.

    Its fields are plain JSON, so that `dataclasses.asdict` makes a trigger's argument of it.

    Attributes:
        bucket_name, namespace_prefix, layout, content_hash: the cache entry.
        is_dir: whether it is a directory, for markers that do not say; None if unknown.
        mount_path: passed on into the ref.
        verify: how much of the listing to look at: "page" (the first 1,000 objects) or "full".
        gcp_conn_id, impersonation_chain, user_project: see `connection`.
        policy: when a look is given up. That takes seconds, because sensor and trigger look again.
        connect_seconds: how long a trigger waits for the connection.

    Raises:
        InvalidInputError: the cache entry cannot exist, because one of its four parts is malformed;
            or `verify` is unknown.
    """

    bucket_name: str
    content_hash: str
    namespace_prefix: str = "default"
    layout: str = "keras_remote"
    is_dir: bool | None = None
    mount_path: str | None = None
    verify: str = "page"
    gcp_conn_id: str = "google_cloud_default"
    impersonation_chain: str | list[str] | None = None
    user_project: str | None = None

    policy: ClassVar = RetryPolicy(deadline=5.0, maximum=2.0, stall_timeout=10.0)
    connect_seconds: ClassVar = 60.0

    def __post_init__(self) -> None:
        from keras_remote_airflow.core.datasets.lookup import check_verify

        check_verify(self.verify)
        _ = self.key

    @property
    def key(self) -> CacheKey:
        """The cache entry."""
        layout = get_layout(self.layout)
        return CacheKey(self.bucket_name, self.namespace_prefix, self.content_hash, layout)

    async def look(self, transport: "Transport") -> DataRef | None:
        """Return the ref of the published dataset, or None while it is not there.

        Args:
            transport: the one on whose loop this runs: see its `run` and `arun`.

        Raises:
            InvalidInputError: neither the marker nor `is_dir` says whether it is a directory.
            MarkerError: the marker cannot be read.
            ConflictError: there is more under the hash than the marker says.
            StoreError: Cloud Storage refused, or did not answer in time.
        """
        from keras_remote_airflow.core.cloud.gcs import GcsStore
        from keras_remote_airflow.core.datasets.lookup import look

        key = self.key
        entry = await look(GcsStore(key.bucket, transport), key, self.verify)
        if entry is None:
            return None
        is_dir = self.is_dir if entry.is_dir is None else entry.is_dir
        if is_dir is None:
            raise InvalidInputError(
                "pass is_dir=True or is_dir=False: the marker does not say whether the dataset is "
                f"a directory or a single file: {entry.gcs_uri}"
            )
        amount = "a dataset whose marker does not say how large it is"
        if entry.files is not None and entry.bytes is not None:
            amount = f"{format_files(entry.files)} ({format_bytes(entry.bytes)})"
        _log.info("Found %s: %s", amount, entry.gcs_uri)
        return DataRef(entry.gcs_uri, is_dir, self.mount_path, key.layout)
