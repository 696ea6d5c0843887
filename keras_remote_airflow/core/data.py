"""`Data`: a local file, a local directory or a `gs://` URI."""

import logging
import os
import re
import stat

from keras_remote_airflow.core.errors import DataNotFoundError, InvalidInputError
from keras_remote_airflow.core.layout import split_gcs_uri
from keras_remote_airflow.core.progress import ProgressCallback
from keras_remote_airflow.core.refs import is_data_ref

_log = logging.getLogger(__name__)

# s3://…, https://…, gs:/…, GS://…, gs//…
_URI_LIKE = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]+:/|\s*gs:?/", re.IGNORECASE)


def path_text(value: object) -> str:
    """Return the local path or `gs://` URI that `value` stands for, without looking for it.

    Args:
        value: text, an `os.PathLike`, or an `ObjectStoragePath` of Airflow or `UPath` on a local
            disk or on Cloud Storage (whose connection is left out). `file:///path` is a local path,
            as fsspec reads it: nothing in it is percent-decoded.

    Raises:
        InvalidInputError: it is of another type or scheme, or empty.
    """
    given = value
    # Only some of these are path-likes, and not for what they stand for.
    if isinstance(scheme := getattr(value, "protocol", None), str):
        if scheme not in ("", "file", "local", "gs"):
            raise InvalidInputError(
                f"data on {scheme}:// cannot be read: expected a local path, file:// or gs://, "
                f"found {value!s}"
            )
        value = str(value)
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    if is_data_ref(value):
        raise InvalidInputError(
            f"a data ref stands for data that is uploaded already: pass it on to what reads it, "
            f"such as materialize: {given!r}"
        )
    if not isinstance(value, str):
        raise InvalidInputError(
            f"data path must be a path or a gs:// URI, found {given!r}. If it comes from a "
            "template or an XCom, is that empty?"
        )
    if not value:
        raise InvalidInputError(
            "data path must not be empty: expected a local path or a gs:// URI. "
            "Is the template or XCom empty?"
        )
    if value.startswith("file://"):
        value = value.removeprefix("file://")
        if not value.startswith("/"):
            raise InvalidInputError(f"not a local file URI: {given!s}; expected file:///path")
    # Airflow writes a connection before the bucket: gs://conn@bucket/name.
    return re.sub(r"\Ags://[^/@]*@", "gs://", value)


class Data:
    """Data that a job needs, as in keras_remote.

    Args:
        path: a local file or directory (absolute, relative or with `~`), or a `gs://` URI, in the
            types that `path_text` takes. A URI that ends in "/" is a directory (a prefix), any
            other a single object.

    Raises:
        ValueError: the path is empty, or cannot be followed or read by this user; or it is a
            `gs://` URI that Cloud Storage cannot hold.
        FileNotFoundError: a local path does not exist.
        OSError: whether it exists can't be told just now: a mount is dead, for instance.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._raw_path = self._path = path_text(path)
        if self.is_gcs:
            split_gcs_uri(self._path)
            _warn_of_missing_slash(self._path)
            return
        from keras_remote_airflow.core.disk.tree import stat_path, system_path

        self._path = os.path.abspath(os.path.expanduser(system_path(self._raw_path)))
        try:
            stat_path(self._path)
        except DataNotFoundError as exc:
            if _URI_LIKE.match(self._raw_path):
                raise DataNotFoundError(
                    f"expected gs://bucket/name or a local path, found {self._raw_path!r}. Other "
                    f"URIs are not supported, and there is no such path: {self._path}"
                ) from None
            hint = ""
            if self._raw_path != self._path:
                hint = f" It was given as {self._raw_path!r}."
            if self._raw_path == "None":
                hint += " Is the template or XCom empty?"
            raise DataNotFoundError(f"{exc}{hint}") from None

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
        if self.is_gcs:
            return self._raw_path.endswith("/")
        from keras_remote_airflow.core.disk.tree import stat_path

        return stat.S_ISDIR(stat_path(self._path).st_mode)

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


def check_counts(allow_empty: object, min_files: object) -> None:
    """Raise InvalidInputError unless these can say how many files data must have."""
    if type(allow_empty) is not bool or type(min_files) is not int or min_files < 0:
        raise InvalidInputError(
            f"allow_empty is {allow_empty!r} and min_files {min_files!r}: expected a bool and an "
            "int of 0 or more. (Operators don't template these.)"
        )


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
