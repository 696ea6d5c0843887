"""References to data on Cloud Storage.

Between tasks a ref is a plain dict, so that it survives XCom, JSON and templates on every Airflow
version:

    {"__data_ref__": True, "gcs_uri": "gs://…", "is_dir": bool, "mount_path": str | None}

Refs of layout "kinetic" also carry what keras-kinetic's runner reads (its 0.0.4):

    {"uri": <the same URI>, "fuse": False, "hf_trust_remote_code": False}

Refs with only `uri`, as keras-kinetic makes them, are accepted too.

Inside this package a ref is a `DataRef`, which `parse_data_ref` makes of a dict or a text.
"""

import ast
import json
from dataclasses import dataclass, field
from typing import Any

from keras_remote_airflow.core.errors import InvalidInputError
from keras_remote_airflow.core.layout import (
    KERAS_REMOTE,
    KINETIC,
    CacheKey,
    Layout,
    cache_key_from_uri,
    check_not_cut,
    split_gcs_uri,
)

# The environment variable that carries a ref, as JSON, into a container.
REF_VARIABLE = "KERAS_REMOTE_DATA_REF"

_FLAG = "__data_ref__"
# The longest ref has an object name (1,024 bytes) and a path (4,096 bytes on Linux). Hostile text
# above this length never reaches the parsers.
_MAX_CHARACTERS = 64 * 1024
_REMEDY = "Pass the ref as the upload pushed it, or make one with make_data_ref(uri, is_dir)."


def make_data_ref(gcs_uri: str, is_dir: bool, mount_path: str | None = None) -> dict[str, Any]:
    """Return the serializable reference to the data at `gcs_uri`.

    Args:
        gcs_uri: where the data is: what `upload_data` returned, or any `gs://` object or prefix.
        is_dir: whether it is a directory (a prefix) rather than a single file.
        mount_path: where a training job should see the data; None leaves that to the job.

    Raises:
        InvalidInputError: `gcs_uri` is text that a ref cannot hold, see `DataRef`. Templates, and
            outputs of tasks, are looked at when they are filled in.
    """
    if isinstance(gcs_uri, str) and "{{" not in gcs_uri:
        DataRef(gcs_uri, is_dir)
    return {_FLAG: True, "gcs_uri": gcs_uri, "is_dir": is_dir, "mount_path": mount_path}


def is_data_ref(obj: object) -> bool:
    """Return whether `obj` is a reference dict made by this package or by keras-kinetic."""
    return isinstance(obj, dict) and obj.get(_FLAG) is True


@dataclass(frozen=True)
class DataRef:
    """A reference, parsed and checked.

    Attributes:
        gcs_uri: `gs://` URI of the data, as the dict held it.
        is_dir: whether the data is a directory.
        mount_path: where a training job should see the data, or None.
        layout: the generation of the dict it came from, and of the dict it becomes.
        bucket: the bucket in `gcs_uri`.
        object_name: what follows the bucket in `gcs_uri`: the name of an object, or a prefix.

    Raises:
        InvalidInputError: `gcs_uri` is not the URI of something on Cloud Storage, or is that of a
            cache without the whole content hash.
    """

    gcs_uri: str
    is_dir: bool
    mount_path: str | None = None
    layout: Layout = KERAS_REMOTE
    bucket: str = field(init=False, repr=False, compare=False)
    object_name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        bucket, name = split_gcs_uri(self.gcs_uri)
        check_not_cut(self.gcs_uri)
        object.__setattr__(self, "bucket", bucket)  # the way to set a field of a frozen dataclass
        object.__setattr__(self, "object_name", name)

    @property
    def cache_key(self) -> CacheKey | None:
        """The cache entry that the data is, or None for data outside a cache."""
        return cache_key_from_uri(self.gcs_uri, self.layout)

    @property
    def is_prefix(self) -> bool:
        """Whether `gcs_uri` is a prefix: that of a directory, or of a single file in a cache."""
        return self.is_dir or self.cache_key is not None

    def to_dict(self) -> dict[str, Any]:
        """Return the serializable reference."""
        ref = make_data_ref(self.gcs_uri, self.is_dir, self.mount_path)
        if self.layout is KINETIC:
            ref |= {"uri": self.gcs_uri, "fuse": False, "hf_trust_remote_code": False}
        return ref


def parse_data_ref(value: object) -> DataRef:
    """Return the reference that `value` spells.

    Args:
        value: the dict, its JSON, or its Python repr (what a template renders); a `DataRef` is
            returned as it is. Nothing is evaluated: text goes through `json.loads`, then
            `ast.literal_eval`.

    Raises:
        InvalidInputError: `value` is not a reference, or a field is missing or wrong.
    """
    if isinstance(value, DataRef):
        return value
    if isinstance(value, str) and value.startswith("gs://"):
        raise InvalidInputError(
            f"a URI alone is not a data ref: {_shorten(value)}. Make one with "
            "make_data_ref(uri, is_dir)."
        )
    fields = _parse_text(value) if isinstance(value, str) else value
    if not isinstance(fields, dict) or not is_data_ref(fields):
        raise InvalidInputError(
            f"not a data ref: {_shorten(value)}; expected the dict that DataUploadOperator and "
            'CacheSensor push, with "__data_ref__": true, or its text'
        )
    gcs_uri = fields.get("gcs_uri", fields.get("uri"))
    is_dir, mount_path = fields.get("is_dir"), fields.get("mount_path")
    if not isinstance(gcs_uri, str):
        raise InvalidInputError(
            f"data ref without a gcs_uri: expected a gs:// URI there, found {_shorten(value)}. "
            f"{_REMEDY}"
        )
    if not isinstance(is_dir, bool):
        raise InvalidInputError(
            "data ref whose is_dir "
            + ("is not true or false" if "is_dir" in fields else "is missing")
            + f": found {_shorten(value)}. {_REMEDY}"
        )
    if mount_path is not None and not isinstance(mount_path, str):
        raise InvalidInputError(
            f"data ref whose mount_path is neither a string nor null: found {_shorten(value)}. "
            f"{_REMEDY}"
        )
    return DataRef(gcs_uri, is_dir, mount_path, KINETIC if "uri" in fields else KERAS_REMOTE)


def _parse_text(text: str) -> object:
    if len(text) > _MAX_CHARACTERS:
        raise InvalidInputError(
            f"not a data ref: text of {len(text)} characters, expected at most {_MAX_CHARACTERS}. "
            "Pass a ref, not the data."
        )
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    raise InvalidInputError(
        f"data ref is neither JSON nor a Python dict ({len(text)} characters; cut short, or badly "
        f"quoted?): {_shorten(text)}. Pass it whole, for instance "
        "{{ ti.xcom_pull('upload') | tojson }}"
    )


def _shorten(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply to show"
    return text if len(text) <= 200 else text[:200] + "…"
