"""Buckets and objects as Cloud Storage keeps them, without HTTP.

Names, generations, preconditions, checksums and the errors follow the JSON API
(https://cloud.google.com/storage/docs/json_api/v1, status codes under `/status-codes`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .bodies import MD5_UP_TO_BYTES, Body, Spool, md5_of
from .folder import Folder
from .listing import Names

MAX_NAME_BYTES = 1024  # https://cloud.google.com/storage/docs/objects#naming
MAX_METADATA_BYTES = 8 * 1024  # keys and values: https://cloud.google.com/storage/quotas#objects
MAX_COMPOSE_SOURCES = 32  # https://cloud.google.com/storage/docs/composite-objects

# https://cloud.google.com/storage/docs/buckets#naming
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
# What a writer may set on an object besides name, contentType and metadata.
SETTABLE = (
    "cacheControl",
    "contentDisposition",
    "contentEncoding",
    "contentLanguage",
    "customTime",
    "eventBasedHold",
    "storageClass",
    "temporaryHold",
)


class ApiError(Exception):
    """An answer other than success, as the JSON API gives it."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message


def invalid(message: str) -> ApiError:
    return ApiError(400, "invalid", message)


@dataclass(slots=True)
class StoredObject:
    """One object. Times are in microseconds since the epoch."""

    bucket: str
    name: str
    body: Body
    generation: int
    crc32c: str
    md5: str | None = None
    metageneration: int = 1
    content_type: str | None = None
    metadata: dict[str, str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    component_count: int | None = None
    created: int = 0
    updated: int = 0

    @property
    def size(self) -> int:
        return self.body.size

    @property
    def data(self) -> bytes:
        """All bytes, as one copy."""
        return b"".join(self.body.read())


@dataclass(slots=True)
class Bucket:
    """One bucket; `settings` is what its owner wrote on the resource (lifecycle, labels, ...)."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    metageneration: int = 1
    created: int = 0
    updated: int = 0
    objects: dict[str, StoredObject] = field(default_factory=dict)
    names: Names = field(default_factory=Names)


@dataclass(frozen=True, slots=True)
class Preconditions:
    """https://cloud.google.com/storage/docs/request-preconditions"""

    generation_match: int | None = None
    generation_not_match: int | None = None
    metageneration_match: int | None = None
    metageneration_not_match: int | None = None

    @classmethod
    def from_query(cls, query: Mapping[str, str], prefix: str = "if") -> Preconditions:
        """Read `ifGenerationMatch` and its kin; `prefix` may be "ifSource"."""

        def number(name: str) -> int | None:
            text = query.get(prefix + name)
            if text is None:
                return None
            if not (text.isascii() and text.isdigit()):
                raise invalid(f"Invalid value for {prefix}{name}: {text!r}")
            return int(text)

        return cls(
            number("GenerationMatch"),
            number("GenerationNotMatch"),
            number("MetagenerationMatch"),
            number("MetagenerationNotMatch"),
        )

    def check(self, current: StoredObject | Bucket | None, *, reading: bool = False) -> None:
        """Raise 412 unless they hold (304 for the "not match" kind on a read)."""
        if self == _NONE:
            return
        generation = current.generation if isinstance(current, StoredObject) else 0
        metageneration = current.metageneration if current is not None else 0
        if (self.generation_match is not None and self.generation_match != generation) or (
            self.metageneration_match is not None and self.metageneration_match != metageneration
        ):
            raise _condition_not_met()
        if self.generation_not_match == generation or (
            self.metageneration_not_match is not None
            and self.metageneration_not_match == metageneration
        ):
            if reading:
                raise ApiError(304, "notModified", "Not Modified")
            raise _condition_not_met()


_NONE = Preconditions()


def _condition_not_met() -> ApiError:
    return ApiError(
        412,
        "conditionNotMet",
        "At least one of the pre-conditions you specified did not hold.",
    )


@dataclass(frozen=True, slots=True)
class Upload:
    """What a writer says about the object beside its bytes.

    `crc32c` and `md5` are declared by the client (base64): bytes that differ are refused.
    """

    name: str
    content_type: str | None = None
    metadata: dict[str, str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    crc32c: str | None = None
    md5: str | None = None

    @classmethod
    def from_resource(cls, resource: Mapping[str, Any], query: Mapping[str, str]) -> Upload:
        """From an object resource in JSON; the query's `name` wins.

        Raises:
            ApiError: 400 for a name that Cloud Storage cannot hold, or malformed metadata.
        """
        name = query.get("name", resource.get("name"))
        if not isinstance(name, str):
            raise ApiError(400, "required", "Required parameter: name")
        check_name(name)
        return cls(
            name=name,
            content_type=_text(resource, "contentType"),
            metadata=custom_metadata(resource.get("metadata")),
            settings={key: resource[key] for key in SETTABLE if resource.get(key) is not None},
            crc32c=_text(resource, "crc32c"),
            md5=_text(resource, "md5Hash"),
        )

    def with_hashes(self, declared: Mapping[str, str]) -> Upload:
        """Add hashes declared in a header; a contradiction with the metadata is 400."""
        crc32c, md5 = declared.get("crc32c"), declared.get("md5")
        for ours, theirs in ((self.crc32c, crc32c), (self.md5, md5)):
            if ours is not None and theirs is not None and ours != theirs:
                raise invalid(f"Two different hashes were declared: {ours!r} and {theirs!r}.")
        return replace(self, crc32c=self.crc32c or crc32c, md5=self.md5 or md5)


def _text(resource: Mapping[str, Any], key: str) -> str | None:
    value = resource.get(key)
    if value is not None and not isinstance(value, str):
        raise invalid(f"Invalid value for {key}: {value!r}")
    return value


def custom_metadata(value: Any) -> dict[str, str] | None:
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
        raise ApiError(400, "required", "Required parameter: name")
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


class Store:
    """All buckets. Not thread-safe: the server holds a lock around it."""

    def __init__(self, folder: Folder | None = None) -> None:
        self._folder = folder
        self._clock = 0
        self.buckets: dict[str, Bucket] = {}
        if folder is not None:
            self._load(folder)

    # Buckets.

    def create_bucket(self, name: str, settings: Mapping[str, Any] | None = None) -> Bucket:
        if not _BUCKET_NAME.fullmatch(name) or ".." in name:
            raise invalid(f"Invalid bucket name: '{name}'")
        if name in self.buckets:
            raise ApiError(
                409,
                "conflict",
                "Your previous request to create the named bucket succeeded and you already own "
                "it.",
            )
        now = self._now()
        bucket = Bucket(name, dict(settings or {}), created=now, updated=now)
        if self._folder is not None:
            self._folder.create_bucket(name)
        self.buckets[name] = bucket
        self._save_bucket(bucket)
        return bucket

    def bucket(self, name: str) -> Bucket:
        try:
            return self.buckets[name]
        except KeyError:
            raise ApiError(404, "notFound", "The specified bucket does not exist.") from None

    def change_bucket(self, bucket: Bucket, settings: dict[str, Any]) -> None:
        """Replace the bucket's settings."""
        bucket.settings = settings
        bucket.metageneration += 1
        bucket.updated = self._now()
        self._save_bucket(bucket)

    def delete_bucket(self, name: str, preconditions: Preconditions = _NONE) -> None:
        bucket = self.bucket(name)
        preconditions.check(bucket)
        if bucket.objects:
            raise ApiError(409, "conflict", "The bucket you tried to delete is not empty.")
        if self._folder is not None:
            self._folder.delete_bucket(name)
        del self.buckets[name]

    # Objects.

    def spool(self, bucket: str) -> Spool:
        """Where the bytes of an upload to `bucket` may go as they arrive."""
        self.bucket(bucket)  # there must be one
        return Spool(None if self._folder is None else self._folder.data_directory(bucket))

    def get(
        self,
        bucket: str,
        name: str,
        generation: str | None = None,
        preconditions: Preconditions = _NONE,
    ) -> StoredObject:
        found = self.bucket(bucket).objects.get(name)
        if found is None or (generation is not None and generation != str(found.generation)):
            raise ApiError(404, "notFound", f"No such object: {bucket}/{name}")
        preconditions.check(found, reading=True)
        return found

    def check_put(
        self,
        bucket: str,
        name: str,
        preconditions: Preconditions = _NONE,
        overwrite: Literal["allow", "deny"] = "allow",
    ) -> None:
        """Raise what a write of this name would be answered with: 404, 412 or 403."""
        current = self.bucket(bucket).objects.get(name)
        preconditions.check(current)
        if current is not None and overwrite == "deny":
            raise forbidden("storage.objects.delete")

    def put(
        self,
        bucket: str,
        upload: Upload,
        spool: Spool,
        preconditions: Preconditions = _NONE,
        overwrite: Literal["allow", "deny"] = "allow",
    ) -> StoredObject:
        """Store the spooled bytes, or raise and store nothing.

        Raises:
            ApiError: 400 when a declared hash differs, 404 without bucket, 412 when a
                precondition fails, 403 when overwriting is denied and the name exists.
        """
        try:
            self.check_put(bucket, upload.name, preconditions, overwrite)
            if upload.crc32c is not None and upload.crc32c != spool.crc32c:
                raise invalid(
                    f'Provided CRC32C "{upload.crc32c}" doesn\'t match calculated CRC32C '
                    f'"{spool.crc32c}".'
                )
            body = spool.finish()
            md5 = None
            if upload.md5 is not None or body.size <= MD5_UP_TO_BYTES:
                md5 = md5_of(body)
            if upload.md5 is not None and upload.md5 != md5:
                raise invalid(
                    f'Provided MD5 hash "{upload.md5}" doesn\'t match calculated MD5 hash "{md5}".'
                )
        except ApiError:
            spool.discard()
            raise
        return self._keep(self.bucket(bucket), upload, body, spool.crc32c, md5)

    def delete(
        self,
        bucket: str,
        name: str,
        generation: str | None = None,
        preconditions: Preconditions = _NONE,
    ) -> None:
        found = self.get(bucket, name, generation)
        preconditions.check(found)
        holder = self.bucket(bucket)
        if self._folder is not None:
            self._folder.delete_object(bucket, name)
        del holder.objects[name]
        holder.names.remove(name)
        found.body.discard()

    def change(
        self,
        found: StoredObject,
        *,
        content_type: str | None,
        metadata: dict[str, str] | None,
        settings: dict[str, Any],
    ) -> StoredObject:
        """Replace an object's metadata; the generation stays, the metageneration grows."""
        found.content_type = content_type
        found.metadata = metadata
        found.settings = settings
        found.metageneration += 1
        found.updated = self._now()
        self._save_object(found)
        return found

    def compose(
        self,
        bucket: str,
        upload: Upload,
        sources: Iterable[StoredObject],
        preconditions: Preconditions = _NONE,
        overwrite: Literal["allow", "deny"] = "allow",
    ) -> StoredObject:
        """Concatenate objects into one. A composite object has no MD5."""
        self.check_put(bucket, upload.name, preconditions, overwrite)
        spool = self.spool(bucket)
        parts = 0
        for source in sources:
            parts += source.component_count or 1
            for piece in source.body.read():
                spool.write(piece)
        holder = self.bucket(bucket)
        return self._keep(holder, upload, spool.finish(), spool.crc32c, None, parts)

    def copy(
        self,
        source: StoredObject,
        bucket: str,
        upload: Upload,
        preconditions: Preconditions = _NONE,
        overwrite: Literal["allow", "deny"] = "allow",
    ) -> StoredObject:
        """Store the same bytes under another name (or over the same one)."""
        self.check_put(bucket, upload.name, preconditions, overwrite)
        if self._folder is None:
            body = source.body
        else:
            spool = self.spool(bucket)
            for piece in source.body.read():
                spool.write(piece)
            body = spool.finish()
        return self._keep(
            self.bucket(bucket), upload, body, source.crc32c, source.md5, source.component_count
        )

    # Helpers.

    def _keep(
        self,
        bucket: Bucket,
        upload: Upload,
        body: Body,
        crc32c: str,
        md5: str | None,
        component_count: int | None = None,
    ) -> StoredObject:
        now = self._now()
        stored = StoredObject(
            bucket=bucket.name,
            name=upload.name,
            body=body,
            generation=now,
            crc32c=crc32c,
            md5=md5,
            content_type=upload.content_type,
            metadata=upload.metadata,
            settings=upload.settings,
            component_count=component_count,
            created=now,
            updated=now,
        )
        self._save_object(stored)
        before = bucket.objects.get(upload.name)
        bucket.objects[upload.name] = stored
        if before is None:
            bucket.names.add(upload.name)
        elif before.body is not body:
            before.body.discard()
        return stored

    def _now(self) -> int:
        """Microseconds, never twice the same: they serve as generations, as in Cloud Storage."""
        self._clock = max(self._clock + 1, time.time_ns() // 1000)
        return self._clock

    def _save_bucket(self, bucket: Bucket) -> None:
        if self._folder is not None:
            self._folder.save_bucket(
                bucket.name,
                {
                    "name": bucket.name,
                    "settings": bucket.settings,
                    "metageneration": bucket.metageneration,
                    "created": bucket.created,
                    "updated": bucket.updated,
                },
            )

    def _save_object(self, stored: StoredObject) -> None:
        if self._folder is not None:
            self._folder.save_object(
                stored.bucket,
                stored.name,
                {
                    "name": stored.name,
                    "generation": stored.generation,
                    "metageneration": stored.metageneration,
                    "crc32c": stored.crc32c,
                    "md5": stored.md5,
                    "content_type": stored.content_type,
                    "metadata": stored.metadata,
                    "settings": stored.settings,
                    "component_count": stored.component_count,
                    "created": stored.created,
                    "updated": stored.updated,
                },
                stored.body,
            )

    def _load(self, folder: Folder) -> None:
        for fields in folder.buckets():
            bucket = Bucket(**fields)
            self.buckets[bucket.name] = bucket
            for values, body in folder.objects(bucket.name):
                stored = StoredObject(bucket=bucket.name, body=body, **values)
                bucket.objects[stored.name] = stored
                bucket.names.add(stored.name)
                self._clock = max(self._clock, stored.generation, stored.updated)


def forbidden(permission: str) -> ApiError:
    """403, as for an account whose roles lack `permission`."""
    return ApiError(
        403,
        "forbidden",
        f"The caller does not have {permission} access to the Google Cloud Storage resource. "
        f"Permission '{permission}' denied on resource (or it may not exist).",
    )
