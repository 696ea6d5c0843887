"""One look at the cache, as the sensor's poke and the trigger both take it."""

import logging
from dataclasses import dataclass
from typing import Any

from keras_remote_airflow.core.errors import InvalidInputError, StoreError
from keras_remote_airflow.core.layout import get_layout
from keras_remote_airflow.core.progress import format_bytes
from keras_remote_airflow.core.refs import DataRef
from keras_remote_airflow.execution import Connection, connect

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lookup:
    """What to look for, with whose credentials, and what the ref will say of it.

    Its fields are plain JSON, so that `dataclasses.asdict` fits a trigger's arguments.

    Attributes:
        bucket_name, namespace_prefix, layout, content_hash: the cache entry.
        verify: how much of the listing to look at: "page" (the first 1,000 objects) or "full".
        is_dir: whether it is a directory, for markers that do not say; None if unknown.
        mount_path: passed on into the ref.
        gcp_conn_id, impersonation_chain, project_id: see `execution.connect`.
    """

    bucket_name: str
    content_hash: str
    namespace_prefix: str = "default"
    layout: str = "keras_remote"
    is_dir: bool | None = None
    mount_path: str | None = None
    gcp_conn_id: str = "google_cloud_default"
    impersonation_chain: str | list[str] | None = None
    project_id: str | None = None
    verify: str = "page"

    def __str__(self) -> str:
        return f"{self.content_hash} in gs://{self.bucket_name}/{self.namespace_prefix}"

    def connect(self) -> Connection:
        """Return the connection to look with; keep it for further looks."""
        return connect(self.gcp_conn_id, self.impersonation_chain, self.project_id)

    def look(self, connection: Connection) -> dict[str, Any] | None:
        """Return the ref of the published dataset, or None while it is not there.

        An outage counts as "not there": whoever waits will look again.

        Raises:
            InvalidInputError: neither the marker nor `is_dir` says whether it is a directory, or
                a field is malformed.
            MarkerError: the marker cannot be read.
            ConflictError: there is more under the hash than the marker says.
            StoreError: Cloud Storage refused.
        """
        from keras_remote_airflow.core.datasets.lookup import find

        try:
            entry = find(
                self.bucket_name,
                self.content_hash,
                connection.project,
                self.namespace_prefix,
                client=connection.client,
                layout=self.layout,
                verify=self.verify,
            )
        except StoreError as exc:
            if not exc.transient:
                raise
            _log.warning("Could not look for %s, will look again: %s", self, exc)
            return None
        if entry is None:
            return None
        is_dir = self.is_dir if entry.is_dir is None else entry.is_dir
        if is_dir is None:
            raise InvalidInputError(
                f"{entry.gcs_uri} is published, but its marker does not say whether it is a "
                "directory or a single file: pass is_dir=True or is_dir=False"
            )
        _log.info("Found %s: %s", entry.gcs_uri, _describe(entry.files, entry.bytes))
        return DataRef(entry.gcs_uri, is_dir, self.mount_path, get_layout(self.layout)).to_dict()


def _describe(files: int | None, total_bytes: int | None) -> str:
    if files is None or total_bytes is None:
        return "its marker does not say how much"
    return f"{files} files ({format_bytes(total_bytes)})"
