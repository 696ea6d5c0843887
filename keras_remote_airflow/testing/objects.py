"""Objects, what a writer says about them, and what must hold for a request.

https://cloud.google.com/storage/docs/json_api/v1/objects
"""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Self

from .bodies import Body
from .errors import ApiError, invalid, required

MAX_NAME_BYTES = 1024  # https://cloud.google.com/storage/docs/objects#naming
MAX_METADATA_BYTES = 8 * 1024  # keys and values: https://cloud.google.com/storage/quotas#objects

# MD5 runs at some 0.6 GB/s: above this size a download does not wait for it.
_SMALL_BYTES = 1024 * 1024

# Bytes of each kind of hash.
_HASH_BYTES = {"crc32c": 4, "md5": 16}

# Holds, and what error messages call them: https://cloud.google.com/storage/docs/object-holds
HOLDS = {"temporaryHold": "Temporary", "eventBasedHold": "Event-Based"}
# What a writer may set on an object besides name, contentType and metadata.
SETTABLE = (
    "cacheControl",
    "contentDisposition",
    "contentEncoding",
    "contentLanguage",
    "customTime",
    "storageClass",
    *HOLDS,
)


@dataclass(slots=True)
class StoredObject:
    """One object. Times are in microseconds since the epoch.

    `released` is when an event-based hold ended last: a retention period counts from then.
    """

    bucket: str
    name: str
    body: Body
    generation: int
    crc32c: str
    metageneration: int = 1
    content_type: str | None = None
    metadata: dict[str, str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    component_count: int | None = None
    created: int = 0
    updated: int = 0
    released: int = 0

    _md5: str | None = field(default=None, compare=False, repr=False)

    @property
    def md5(self) -> str | None:
        """MD5 in base64, computed when it is first asked for; a composite object has none."""
        if self._md5 is None and self.component_count is None:
            digest = hashlib.md5(usedforsecurity=False)
            for piece in self.body.read():
                digest.update(piece)
            self._md5 = base64.b64encode(digest.digest()).decode()
        return self._md5

    @property
    def writable(self) -> dict[str, Any]:
        """The part of the object's resource that a client can change."""
        content = {"contentType": self.content_type, "metadata": self.metadata}
        return {"name": self.name, **content, **self.settings}

    @property
    def etag(self) -> str:
        return etag(self.generation, self.metageneration)

    @property
    def hash_header(self) -> str:
        """`X-Goog-Hash` of a download; MD5 of a large object is there if it is known already."""
        hashes = f"crc32c={self.crc32c}"
        known = self.md5 if self.size <= _SMALL_BYTES else self._md5
        return hashes if known is None else f"{hashes},md5={known}"

    @property
    def size(self) -> int:
        return self.body.size

    @property
    def data(self) -> bytes:
        """All bytes, as one copy."""
        return b"".join(self.body.read())

    def check_holds(self) -> None:
        """Raise 403 if a hold forbids to delete or overwrite the object."""
        for hold, words in HOLDS.items():
            if self.settings.get(hold):
                raise ApiError(
                    403,
                    "objectUnderActiveHold",
                    f"Object '{self.bucket}/{self.name}' is under active {words} hold and cannot "
                    "be deleted, overwritten or archived until hold is removed.",
                )


def etag(generation: int, metageneration: int) -> str:
    packed = generation.to_bytes(8, "big") + metageneration.to_bytes(4, "big")
    return base64.b64encode(packed).decode()


def timestamp(microseconds: int) -> str:
    """RFC 3339 with milliseconds, as Cloud Storage writes it."""
    moment = datetime.fromtimestamp(microseconds // 1000 / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def check_preconditions(
    query: Mapping[str, Any],
    current: Any,
    headers: Mapping[str, str] = MappingProxyType({}),
    *,
    prefix: str = "if",
    reading: bool = False,
) -> None:
    """Raise 412 unless they hold for a bucket, an object or None, which has generation 0.

    On reads the "not match" kind raises 304. `prefix` may be "ifSource".
    https://cloud.google.com/storage/docs/request-preconditions
    """
    differs = _names_etag(headers, "if-match", current) is False
    is_same = _names_etag(headers, "if-none-match", current) is True
    for number in ("Generation", "Metageneration"):
        actual = getattr(current, number.lower(), 0)
        differs |= whole_number(query, f"{prefix}{number}Match") not in (None, actual)
        is_same |= whole_number(query, f"{prefix}{number}NotMatch") == actual
    if is_same and reading and not differs:
        raise ApiError(304, "notModified", "Not Modified")
    if is_same or differs:
        message = "At least one of the pre-conditions you specified did not hold."
        raise ApiError(412, "conditionNotMet", message)


def _names_etag(headers: Mapping[str, str], name: str, current: Any) -> bool | None:
    """Whether the header names the ETag of what is there; None without the header."""
    if name not in headers:
        return None
    named = {part.strip().removeprefix("W/").strip('"') for part in headers[name].split(",")}
    return not named.isdisjoint({"*", current.etag})


def whole_number(values: Mapping[str, Any], name: str) -> int | None:
    """A parameter or header that is a number, or None without it."""
    text = values.get(name)
    if text is None:
        return None
    if not (str(text).isascii() and str(text).isdigit()):
        raise invalid(f"Invalid value for {name}: {text!r}")
    return int(text)


@dataclass(frozen=True, slots=True)
class NewObject:
    """What a writer says about an object beside its bytes.

    `hashes` are what the client declared, as ("crc32c" or "md5", base64): other bytes are refused.
    """

    name: str
    content_type: str | None = None
    metadata: dict[str, str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    hashes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_resource(cls, resource: Mapping[str, Any], query: Mapping[str, str]) -> Self:
        """From an object resource in JSON; the query's `name` and `contentEncoding` win.

        Raises:
            ApiError: 400 for a name that Cloud Storage cannot hold, or a malformed value.
        """
        name = query.get("name", resource.get("name"))
        if not isinstance(name, str):
            raise required("name")
        check_name(name)
        if "contentEncoding" in query:
            resource = {**resource, "contentEncoding": query["contentEncoding"]}
        return cls(
            name=name,
            content_type=_text(resource, "contentType"),
            metadata=_custom_metadata(resource.get("metadata")),
            settings=_settings(resource),
        )

    @classmethod
    def like(cls, source: StoredObject, name: str) -> Self:
        """What a copy of `source` is given; holds are not copied."""
        settings = {key: value for key, value in source.settings.items() if key not in HOLDS}
        return cls(name, source.content_type, source.metadata, settings)

    def with_hashes(self, declared: Mapping[str, Any]) -> Self:
        """Add declared hashes; raise 400 unless each is base64 of the right length."""
        hashes = self.hashes
        for name, size in _HASH_BYTES.items():
            value = declared.get(name)
            if value is None:
                continue
            try:
                found = len(base64.b64decode(value, validate=True))
            except (TypeError, ValueError):
                found = -1
            if found != size:
                raise invalid(f"Invalid value for {name}: {value!r} is not base64 of {size} bytes")
            hashes += ((name, value),)
        return replace(self, hashes=hashes) if hashes != self.hashes else self


def hashes_in(headers: Mapping[str, str], *, of_body: bool = False) -> dict[str, str]:
    """The hashes in `X-Goog-Hash`; `of_body` adds `Content-MD5`."""
    declared: dict[str, str] = {}
    for part in headers.get("x-goog-hash", "").split(","):
        name, equals, value = part.partition("=")
        if equals:
            declared[name.strip().lower()] = value.strip()
    if of_body and "content-md5" in headers:
        declared["md5"] = headers["content-md5"]
    return declared


def merge_patch(old: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON merge patch (RFC 7396): null removes a key, objects are merged."""
    merged = {key: value for key, value in old.items() if value is not None}
    for key, value in changes.items():
        if isinstance(value, dict):
            before = old.get(key)
            merged[key] = merge_patch(before if isinstance(before, dict) else {}, value)
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged


def _settings(resource: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in an object resource."""
    for hold in HOLDS:
        if not isinstance(resource.get(hold, False), bool | None):
            raise invalid(f"Invalid value for {hold}: {resource[hold]!r}")
    return {key: resource[key] for key in SETTABLE if resource.get(key) is not None}


def _text(resource: Mapping[str, Any], key: str) -> str | None:
    value = resource.get(key)
    if value is not None and not isinstance(value, str):
        raise invalid(f"Invalid value for {key}: {value!r}")
    return value


def _custom_metadata(value: Any) -> dict[str, str] | None:
    """Check the `metadata` map of a new object: text to text."""
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise invalid(f"Invalid value for metadata: {value!r}")
    try:
        size = sum(len(key.encode()) + len(text.encode()) for key, text in value.items())
    except UnicodeEncodeError as exc:
        raise invalid("Custom metadata must be valid UTF-8.") from exc
    if size > MAX_METADATA_BYTES:
        raise invalid(f"Custom metadata of {size} bytes exceeds {MAX_METADATA_BYTES} bytes.")
    return dict(value) or None


def check_name(name: str) -> None:
    """400 for a name no object can have: https://cloud.google.com/storage/docs/objects#naming"""
    try:
        length = len(name.encode())
    except UnicodeEncodeError as exc:
        raise invalid("Object names must be valid UTF-8.") from exc
    if not name:
        raise required("name")
    if length > MAX_NAME_BYTES:
        raise invalid(
            f"The maximum object length is 1024 characters, but got a name with {length}."
        )
    if (
        name in (".", "..")
        or "\r" in name
        or "\n" in name
        or name.startswith(".well-known/acme-challenge/")
    ):
        raise invalid(f"Disallowed object name: {name!r}")
