"""The names of all objects in a cache, and the format of its markers.

The objects of a dataset with content hash `H` in namespace `ns`:

    {ns}/data-cache/{H}/{relative path}     its files; a single file under its basename
    {ns}/data-cache/{H}/.cache_marker       the marker, layout "keras_remote"
    {ns}/data-markers/{H}                   the marker, layout "kinetic"

The marker is written last: its presence says that every byte is there. Its body is empty (as
other clients write it) or one JSON object, the receipt, of at most `MAX_MARKER_BYTES`:

    {"format_version": 1, "content_hash": "<64 hex digits>", "is_dir": true, "files": 3,
     "bytes": 1024, "created_at": "2026-01-31T12:00:00Z",
     "created_by": "keras_remote_airflow/0.1.0"}

A reader ignores keys it does not know and refuses a `format_version` above `FORMAT_VERSION`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from keras_remote_airflow.core import __version__
from keras_remote_airflow.core.errors import InvalidInputError, MarkerError

# The values of the `layout` parameter everywhere.
LayoutName = Literal["keras_remote", "kinetic"]

FORMAT_VERSION = 1
MAX_MARKER_BYTES = 64 * 1024

# https://cloud.google.com/storage/docs/objects#naming: "1-1024 bytes when UTF-8 encoded".
MAX_OBJECT_NAME_BYTES = 1024

# No dataset may hold a file of this name at its top, in either layout: both keep their data under
# the same prefix, where readers would take the file for a marker.
RESERVED_NAME = ".cache_marker"

_HASH = re.compile(r"[0-9a-f]{64}")
_CACHE_NAME = re.compile(r"(?P<namespace>.+)/data-cache/(?P<content_hash>[0-9a-f]{64})/?")
_CUT_NAME = re.compile(r".+/data-cache(/(?P<digits>[0-9a-f]*)/?)?")
# https://cloud.google.com/storage/docs/buckets#naming
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
# What no relative path may hold: an empty, "." or ".." component, a drive letter, CR, LF. It is
# searched for in many paths at once, each of which stands between "\0/" and "\0". Each alternative
# begins with a literal: only then does `re` skip quickly to the bytes that can begin a match.
_UNSAFE = re.compile(rb"/(?:\.{0,2}[/\0]|(?<=\0/)[A-Za-z]:[/\\\0])|\r|\n")


@dataclass(frozen=True)
class Layout:
    """The place where a generation of clients keeps its markers.

    Attributes:
        name: what the `layout` parameter calls it.
        marker: the marker's object name, with `{namespace}` and `{content_hash}` to fill in.
    """

    name: LayoutName
    marker: str


KERAS_REMOTE = Layout("keras_remote", "{namespace}/data-cache/{content_hash}/" + RESERVED_NAME)
KINETIC = Layout("kinetic", "{namespace}/data-markers/{content_hash}")
_LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (KERAS_REMOTE, KINETIC)}


def get_layout(name: str) -> Layout:
    """Return the layout called `name`; raise InvalidInputError for an unknown one."""
    try:
        return _LAYOUTS[name]
    except KeyError:
        raise InvalidInputError(
            f"unknown layout {name!r}: expected one of {sorted(_LAYOUTS)}"
        ) from None


@dataclass(frozen=True)
class CacheKey:
    """The place of one dataset: bucket, namespace, content hash and layout, all valid.

    Raises InvalidInputError if one of them is not.
    """

    bucket: str
    namespace: str
    content_hash: str
    layout: Layout = KERAS_REMOTE

    def __post_init__(self) -> None:
        check_bucket(self.bucket)
        check_namespace(self.namespace)
        check_content_hash(self.content_hash)
        longest = max(len(self.prefix.encode()) + 1, len(self.marker_name.encode()))
        if longest > MAX_OBJECT_NAME_BYTES:
            raise InvalidInputError(
                f"namespace_prefix too long: {self.namespace!r} makes object names of {longest} "
                f"bytes and more, Cloud Storage takes {MAX_OBJECT_NAME_BYTES}. Shorten it."
            )

    @property
    def prefix(self) -> str:
        """Prefix of the data objects, with a trailing slash."""
        return f"{self.namespace}/data-cache/{self.content_hash}/"

    @property
    def gcs_uri(self) -> str:
        """`gs://` URI of the dataset, without a trailing slash, for files and directories alike."""
        return f"gs://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def marker_name(self) -> str:
        """Name of the marker."""
        return self.layout.marker.format(namespace=self.namespace, content_hash=self.content_hash)

    @property
    def marker_uri(self) -> str:
        """`gs://` URI of the marker."""
        return f"gs://{self.bucket}/{self.marker_name}"

    def object_name(self, relative_path: str) -> str:
        """Return the name of the object that holds a file."""
        return self.prefix + relative_path


def cache_key_from_uri(gcs_uri: str, layout: Layout = KERAS_REMOTE) -> CacheKey | None:
    """Return the cache key that `gcs_uri` spells, or None for any other `gs://` URI."""
    bucket, name = split_gcs_uri(gcs_uri)
    match = _CACHE_NAME.fullmatch(name)
    return CacheKey(bucket, match["namespace"], match["content_hash"], layout) if match else None


def check_not_cut(gcs_uri: str) -> None:
    """Raise InvalidInputError for the URI of a cache without its content hash, or a part of it."""
    _, name = split_gcs_uri(gcs_uri)
    cut = _CUT_NAME.fullmatch(name)
    if cut and not _CACHE_NAME.fullmatch(name):
        raise InvalidInputError(
            "the URI is cut short: …/data-cache/ must be followed by the 64 hex digits of a "
            f"content hash, found {len(cut['digits'] or '')}: {gcs_uri}. Pass the whole ref."
        )


def split_gcs_uri(gcs_uri: str) -> tuple[str, str]:
    """Split `gs://bucket/name` into bucket and name (which may be empty).

    Raises InvalidInputError for anything else.
    """
    bucket, _, name = gcs_uri.removeprefix("gs://").partition("/")
    encoded = name.encode(errors="surrogatepass")
    if (
        not gcs_uri.startswith("gs://")
        or len(encoded) > MAX_OBJECT_NAME_BYTES
        or encoded.decode(errors="replace") != name
    ):
        raise InvalidInputError(f"not a Cloud Storage URI: {gcs_uri!r}; expected gs://bucket/name")
    return check_bucket(bucket), name


def check_bucket(bucket: str) -> str:
    """Return `bucket` if Cloud Storage could hold a bucket of that name, else raise."""
    if not isinstance(bucket, str) or not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise InvalidInputError(
            f"invalid bucket name {bucket!r}: expected the bare name, 3 or more lower-case "
            "letters, digits, '-', '_' or '.', without gs:// and without a path"
        )
    return bucket


def check_namespace(namespace: str) -> str:
    """Return `namespace` if it can lead an object name, else raise InvalidInputError."""
    valid = isinstance(namespace, str) and all(
        part not in ("", ".", "..") and part.isprintable() for part in namespace.split("/")
    )
    if not valid:
        raise InvalidInputError(
            f"invalid namespace_prefix {namespace!r}: expected one or more names joined by single "
            "slashes, such as 'default' or 'team/project', with no slash at either end"
        )
    return namespace


def check_relative_paths(paths: Sequence[bytes], prefix: str) -> None:
    """Raise InvalidInputError unless each path (UTF-8) can be an object below `prefix` and a file.

    The rules are the same when publishing and when reading back. So what can be published can be
    read, and no object name leads out of the directory it is read into.
    """
    joined = b"\0/".join([b"", *paths, b""])
    is_unsafe = _UNSAFE.search(joined) is not None or joined.count(b"\0") > len(paths) + 1
    longest = max(map(len, paths), default=0) + len(prefix.encode())
    if not is_unsafe and longest <= MAX_OBJECT_NAME_BYTES:
        return
    if len(paths) > 1:  # find out which one it is
        for path in paths:
            check_relative_paths([path], prefix)
    shown = paths[0].decode(errors="replace")
    if is_unsafe:
        raise InvalidInputError(
            f"unsafe relative path {shown!r}: expected no '.', '..' or empty component, no drive "
            "letter, no line break and no NUL. Rename it."
        )
    raise InvalidInputError(
        f"object name too long: {prefix + shown!r} has {longest} bytes in UTF-8, Cloud Storage "
        f"takes {MAX_OBJECT_NAME_BYTES}. Shorten the path."
    )


def check_content_hash(content_hash: str) -> str:
    """Return `content_hash` if it is one, else raise InvalidInputError."""
    if not isinstance(content_hash, str) or not _HASH.fullmatch(content_hash):
        raise InvalidInputError(
            f"invalid content hash {content_hash!r}: expected 64 lower-case hex digits, as "
            "Data(path).content_hash() returns them"
        )
    return content_hash


@dataclass(frozen=True)
class Receipt:
    """What a marker tells about its dataset.

    Attributes:
        content_hash: 64 hex digits.
        is_dir: whether the dataset is a directory or a single file.
        files: number of data objects.
        total_bytes: their size.
        created_at: when the marker was written, RFC 3339 in UTC.
        created_by: package and version that wrote it.
    """

    content_hash: str
    is_dir: bool
    files: int
    total_bytes: int
    created_at: str
    created_by: str = f"keras_remote_airflow/{__version__}"

    @classmethod
    def now(cls, content_hash: str, *, is_dir: bool, files: int, total_bytes: int) -> "Receipt":
        """Return the receipt of a dataset that is published now, by this version."""
        created_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return cls(content_hash, is_dir, files, total_bytes, created_at)

    def to_json(self) -> bytes:
        """Return the body of the marker."""
        fields = asdict(self)
        fields["bytes"] = fields.pop("total_bytes")
        return json.dumps({"format_version": FORMAT_VERSION, **fields}).encode()


def parse_marker(body: bytes, key: CacheKey) -> Receipt | None:
    """Return the receipt in a marker's body, or None for an empty body.

    Raises MarkerError for a body that is not a receipt for `key`, or one of a newer format.
    """
    if not body:
        return None
    remedy = (
        "Use a newer keras_remote_airflow, or delete that object to have the data uploaded anew."
    )
    try:
        if len(body) > MAX_MARKER_BYTES:
            raise ValueError(f"{len(body)} bytes")
        fields = json.loads(body)
        version = int(fields["format_version"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as exc:
        raise MarkerError(
            f"marker is unreadable: expected a JSON receipt, found {len(body)} bytes "
            f"({body[:80]!r}): {key.marker_uri}. {remedy}"
        ) from exc
    if not 1 <= version <= FORMAT_VERSION:
        raise MarkerError(
            f"marker has format_version {version}, this version reads up to {FORMAT_VERSION}: "
            f"{key.marker_uri}. {remedy}"
        )
    types = {"content_hash": str, "is_dir": bool, "files": int, "bytes": int}
    wrong = [name for name, kind in types.items() if type(fields.get(name)) is not kind]
    if wrong or fields["content_hash"] != key.content_hash:
        raise MarkerError(
            "marker is not a receipt for its own content hash (look at "
            f"{', '.join(wrong) or 'content_hash'}; found {body[:300]!r}): {key.marker_uri}. "
            f"{remedy}"
        )
    return Receipt(
        fields["content_hash"],
        fields["is_dir"],
        fields["files"],
        fields["bytes"],
        created_at=str(fields.get("created_at", "")),
        created_by=str(fields.get("created_by", "")),
    )
