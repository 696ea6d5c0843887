"""The dataset that a sensor and its trigger wait for, and a method that looks once."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from keras_remote_airflow.connection import connect
from keras_remote_airflow.core.errors import InvalidInputError, StoreError
from keras_remote_airflow.core.layout import CacheKey, LayoutName, get_layout
from keras_remote_airflow.core.progress import format_bytes, format_files
from keras_remote_airflow.core.refs import DataRef

if TYPE_CHECKING:
    from google.cloud.storage import Client

    from keras_remote_airflow.core.datasets.lookup import Verify

_log = logging.getLogger(__name__)


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

    Raises:
        InvalidInputError: the cache entry cannot exist, because one of its four parts is malformed.
    """

    bucket_name: str
    content_hash: str
    namespace_prefix: str = "default"
    layout: LayoutName = "keras_remote"
    is_dir: bool | None = None
    mount_path: str | None = None
    verify: "Verify" = "page"
    gcp_conn_id: str = "google_cloud_default"
    impersonation_chain: str | list[str] | None = None
    user_project: str | None = None

    def __post_init__(self) -> None:
        self._key()

    def _key(self) -> CacheKey:
        layout = get_layout(self.layout)
        return CacheKey(self.bucket_name, self.namespace_prefix, self.content_hash, layout)

    @property
    def gcs_uri(self) -> str:
        """Where the dataset will be."""
        return self._key().gcs_uri

    def connect(self) -> "Client":
        """Return the client to look with; keep it for further looks."""
        return connect(self.gcp_conn_id, self.impersonation_chain)

    def look(self, client: "Client") -> DataRef | None:
        """Return the ref of the published dataset, or None while it is not there.

        An outage of Cloud Storage counts as "not there": the next look may find it.

        Raises:
            InvalidInputError: neither the marker nor `is_dir` says whether it is a directory, or
                `verify` is unknown.
            MarkerError: the marker cannot be read.
            ConflictError: there is more under the hash than the marker says.
            StoreError: Cloud Storage refused.
        """
        from keras_remote_airflow.core.datasets.lookup import find

        try:
            entry = find(
                self.bucket_name,
                self.content_hash,
                namespace_prefix=self.namespace_prefix,
                client=client,
                layout=self.layout,
                verify=self.verify,
                user_project=self.user_project,
            )
        except StoreError as exc:
            if not exc.transient:
                raise
            _log.warning("Could not look, will look again (%s): %s", exc, self.gcs_uri)
            return None
        if entry is None:
            return None
        is_dir = self.is_dir if entry.is_dir is None else entry.is_dir
        if is_dir is None:
            raise InvalidInputError(
                "pass is_dir=True or is_dir=False: the marker does not say whether the dataset is "
                f"a directory or a single file: {entry.gcs_uri}"
            )
        _log.info("Found %s: %s", _amount(entry.files, entry.bytes), entry.gcs_uri)
        return DataRef(entry.gcs_uri, is_dir, self.mount_path, get_layout(self.layout))


def _amount(files: int | None, total_bytes: int | None) -> str:
    if files is None or total_bytes is None:
        return "a dataset whose marker does not say how large it is"
    return f"{format_files(files)} ({format_bytes(total_bytes)})"
