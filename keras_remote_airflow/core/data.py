"""`Data`: a local file, a local directory or a `gs://` URI."""

import logging
import os
import re

from keras_remote_airflow.core.errors import DataNotFoundError, InvalidInputError
from keras_remote_airflow.core.progress import ProgressCallback

_log = logging.getLogger(__name__)

# s3://…, https://…, gs:/…, GS://…, gs//…
_URI_LIKE = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]+:/|\s*gs:?/", re.IGNORECASE)


class Data:
    """Data that a job needs, as in keras_remote.

    Args:
        path: a local file or directory (absolute, relative or with `~`), or a `gs://` URI. A URI
            that ends in "/" is a directory (a prefix), any other a single object.

    Raises:
        ValueError: the path is empty.
        FileNotFoundError: a local path does not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike):
            raise InvalidInputError(
                f"data path must be a path or a gs:// URI, found {path!r}. If it comes from a "
                "template or an XCom, is that empty?"
            )
        path = os.fspath(path)
        if not path:
            raise InvalidInputError(
                "data path must not be empty: expected a local path or a gs:// URI. "
                "Is the template or XCom empty?"
            )
        self._raw_path = path
        self._path = path
        if self.is_gcs:
            _warn_of_missing_slash(path)
            return
        self._path = os.path.abspath(os.path.expanduser(path))
        if not os.path.lexists(self._path):
            hint = "Check the path, and that this machine is the one that has the data."
            if _URI_LIKE.match(path):
                hint = (
                    "If it is meant as a URI, write gs://bucket/name: other schemes are not "
                    "supported."
                )
            raise DataNotFoundError(
                f"data path does not exist: {path} (resolved to {self._path}). {hint}"
            )
        if not os.path.exists(self._path):
            raise DataNotFoundError(
                f"broken link: {self._path} points to {os.readlink(self._path)}, which is not "
                "there. Remove the link or restore its target."
            )

    @property
    def path(self) -> str:
        """The absolute local path, or the `gs://` URI as it was given."""
        return self._path

    @property
    def is_gcs(self) -> bool:
        """Whether it is a `gs://` URI."""
        return self._raw_path.startswith("gs://")

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory; for a `gs://` URI, whether it ends in "/"."""
        return self._raw_path.endswith("/") if self.is_gcs else os.path.isdir(self._path)

    def content_hash(
        self, hash_index: str | None = None, progress: ProgressCallback | None = None
    ) -> str:
        """Read the data and return its content hash: 64 hex digits, see `core.disk.hashing`.

        Args:
            hash_index: local file that remembers the hashes of unchanged files, see
                `core.disk.index`; it is read and written. None takes the environment's
                `KERAS_REMOTE_HASH_INDEX`, or reads every file.
            progress: called with a `core.progress.ProgressUpdate` at most every 0.1 s and at the
                end; None logs a line at most every 30 s.

        Raises:
            ValueError: the data is on Cloud Storage already, or holds something that is no
                readable file.
            DataChangedError: a file changed or vanished while it was read.
        """
        from keras_remote_airflow.core.disk.hashing import default_index, take_snapshot

        if self.is_gcs:
            raise InvalidInputError(
                f"only local data is hashed, found {self._path}. Download it first, or pass the "
                "URI on as it is."
            )
        snapshot = take_snapshot(self._path, hash_index or default_index(), progress=progress)
        return snapshot.content_hash

    def __repr__(self) -> str:
        return f"Data({self._raw_path!r})"


def as_data(data: Data | str | os.PathLike[str]) -> Data:
    """Return a `Data`, or one made of its path."""
    return data if isinstance(data, Data) else Data(data)


def _warn_of_missing_slash(uri: str) -> None:
    last = uri.removeprefix("gs://").rpartition("/")[2]
    if last and "." not in last:
        _log.warning(
            "Taken for a single object, because it ends in neither / nor an extension: %s. For a "
            "directory (a prefix) write %s/",
            uri,
            uri,
        )
