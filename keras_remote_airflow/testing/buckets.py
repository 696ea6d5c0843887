"""Buckets and the objects in them, in memory or in a folder. Knows nothing of HTTP."""

import dataclasses
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from .bodies import Body, FileBody
from .errors import ApiError, forbidden, invalid, not_found, required
from .folder import Folder
from .objects import NewObject, StoredObject, check_preconditions, etag, timestamp

# https://cloud.google.com/storage/docs/buckets#naming
_BUCKET_NAME = re.compile(
    r"(?!goog|.*g[o0]{2}g[l1]e|\d+(?:\.\d+){3}$)(?=.{3,222}$)(?=[a-z0-9])"
    r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*(?<=[a-z0-9])"
)
# What a bucket keeps from its creation.
_FIXED = ("location", "customPlacementConfig")
# https://cloud.google.com/storage/docs/locations
_REGION = re.compile(r"[A-Z]+-[A-Z]+\d+")
_LOCATION_TYPES = {
    **dict.fromkeys(["ASIA", "EU", "US"], "multi-region"),
    **dict.fromkeys(["ASIA1", "EUR4", "EUR5", "EUR7", "EUR8", "NAM4"], "dual-region"),
}
MAX_RETENTION_SECONDS = 3_155_760_000  # https://cloud.google.com/storage/docs/bucket-lock
# What `StorageServer.deny` takes, and the permission a 403 then names
# (https://cloud.google.com/storage/docs/access-control/iam-permissions).
DENIABLE = {
    "overwrite": "storage.objects.delete",
    "delete": "storage.objects.delete",
    "create": "storage.objects.create",
    "get": "storage.objects.get",
    "list": "storage.objects.list",
    "update": "storage.objects.update",
    "bucket_get": "storage.buckets.get",
    "bucket_create": "storage.buckets.create",
}


@dataclass(slots=True)
class Bucket:
    """One bucket; `settings` is what its owner wrote on the resource (lifecycle, labels, ...)."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    metageneration: int = 1
    created: int = 0
    updated: int = 0
    objects: dict[str, StoredObject] = field(default_factory=dict)
    _names: list[str] | None = None

    def names(self) -> list[str]:
        """The names of the objects in order: not a copy, not to be changed."""
        if self._names is None:
            self._names = sorted(self.objects)
        return self._names

    def add(self, stored: StoredObject) -> None:
        if stored.name not in self.objects:
            self._names = None
        self.objects[stored.name] = stored

    def remove(self, stored: StoredObject) -> None:
        del self.objects[stored.name]
        self._names = None

    @property
    def etag(self) -> str:
        return etag(self.created, self.metageneration)

    @property
    def requester_pays(self) -> bool:
        return bool(self.settings.get("billing", {}).get("requesterPays"))

    def retained_until(self, stored: StoredObject) -> int | None:
        """When the bucket's retention policy releases an object; None without policy.

        The period has not begun while an event-based hold is on the object.
        """
        policy = self.settings.get("retentionPolicy")
        if policy is None or stored.settings.get("eventBasedHold"):
            return None
        return max(stored.created, stored.released) + int(policy["retentionPeriod"]) * 1_000_000


class Buckets:
    """All buckets. Not thread-safe: the server holds a lock around it."""

    def __init__(self, folder: Folder | None = None) -> None:
        self._folder = folder
        self._clock = 0
        self._by_name: dict[str, Bucket] = {}
        self.denied: frozenset[str] = frozenset()  # names in DENIABLE
        self.ahead = 0  # microseconds by which this server's clock is set ahead
        self.listings_lack: frozenset[str] = frozenset()  # keys of objects' resources
        self.checks_hashes = True
        if folder is not None:
            self._load(folder)

    # Buckets.

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Bucket:
        try:
            return self._by_name[name]
        except KeyError:
            raise not_found("The specified bucket does not exist.") from None

    def names(self) -> list[str]:
        return sorted(self._by_name)

    def create_bucket(self, name: str, settings: Mapping[str, Any]) -> Bucket:
        if not _BUCKET_NAME.fullmatch(name):
            raise invalid(f"Invalid bucket name: '{name}'")
        if name in self._by_name:
            message = "Your previous request to create the named bucket succeeded"
            raise ApiError(409, "conflict", f"{message} and you already own it.")
        now = self._now()
        bucket = Bucket(name, _checked(settings, now), created=now, updated=now)
        if self._folder is not None:
            self._folder.create_bucket(name)
        self._by_name[name] = bucket
        self._save_bucket(bucket)
        return bucket

    def change_bucket(self, bucket: Bucket, settings: Mapping[str, Any]) -> None:
        """Replace the bucket's settings."""
        now = self._now()
        fixed = {key: bucket.settings[key] for key in _FIXED if key in bucket.settings}
        bucket.settings = _checked({**settings, **fixed}, now)
        bucket.metageneration += 1
        bucket.updated = now
        self._save_bucket(bucket)

    def delete_bucket(self, name: str) -> None:
        if self[name].objects:
            raise ApiError(409, "conflict", "The bucket you tried to delete is not empty.")
        if self._folder is not None:
            self._folder.delete_bucket(name)
        del self._by_name[name]

    # Objects.

    def new_body(self, bucket: str) -> Body:
        """Where the bytes of an upload to `bucket` may go as they arrive."""
        self[bucket]  # 404 if there is none
        if self._folder is None:
            return Body()
        return FileBody.create(self._folder.data_directory(bucket))

    def get(self, bucket: str, name: str, generation: str | None = None) -> StoredObject:
        found = self[bucket].objects.get(name)
        if found is None or (generation is not None and generation != str(found.generation)):
            raise not_found(f"No such object: {bucket}/{name}")
        return found

    def need(self, *names: str) -> None:
        """Raise 403 if one of them is denied. All clients are one account."""
        for name in names:
            if name in self.denied:
                raise forbidden(DENIABLE[name])

    def check_write(self, bucket: str, name: str, query: Mapping[str, str]) -> None:
        """Raise what a write of this name would be answered with: 404, 412 or 403."""
        self.need("create")
        current = self[bucket].objects.get(name)
        check_preconditions(query, current)
        if current is not None:
            self.need("overwrite")
            self.check_removal(current)

    def check_removal(self, stored: StoredObject) -> None:
        """Raise 403 if a hold or the bucket's retention policy keeps the object."""
        stored.check_holds()
        until = self[stored.bucket].retained_until(stored)
        if until is not None and until > self.time():
            raise ApiError(
                403,
                "retentionPolicyNotMet",
                f"Object '{stored.bucket}/{stored.name}' is subject to bucket's retention policy "
                "or object retention and cannot be deleted or overwritten until "
                f"{datetime.fromtimestamp(until / 1e6, UTC).isoformat()}",
            )

    def put(
        self, bucket: str, new: NewObject, body: Body, component_count: int | None = None
    ) -> StoredObject:
        """Store bytes, overwriting what is there; 400 if a declared hash differs."""
        held = self[bucket]
        now = self._now()
        default = {"eventBasedHold": True} if held.settings.get("defaultEventBasedHold") else {}
        stored = StoredObject(
            bucket,
            new.name,
            body,
            generation=now,
            crc32c=body.crc32c,
            content_type=new.content_type,
            metadata=new.metadata,
            settings={**default, **new.settings},
            component_count=component_count,
            created=now,
            updated=now,
        )
        for name, declared in new.hashes if self.checks_hashes else ():
            if declared != (actual := getattr(stored, name)):
                kind = "CRC32C" if name == "crc32c" else "MD5 hash"
                raise invalid(
                    f'Provided {kind} "{declared}" doesn\'t match calculated {kind} "{actual}".'
                )
        self._save_object(stored)
        before = held.objects.get(new.name)
        held.add(stored)
        if before is not None and before.body is not body:
            before.body.discard()
        return stored

    def delete(self, stored: StoredObject) -> None:
        bucket = self[stored.bucket]
        if self._folder is not None:
            self._folder.delete_object(stored.bucket, stored.name)
        bucket.remove(stored)
        stored.body.discard()

    def change(self, stored: StoredObject, new: NewObject) -> None:
        """Change what a writer says; the generation stays, the metageneration grows."""
        stored.updated = self._now()
        if stored.settings.get("eventBasedHold") and not new.settings.get("eventBasedHold"):
            stored.released = stored.updated
        stored.content_type, stored.metadata = new.content_type, new.metadata
        stored.settings = new.settings
        stored.metageneration += 1
        self._save_object(stored)

    def compose(self, bucket: str, new: NewObject, sources: list[StoredObject]) -> StoredObject:
        """Concatenate objects into one. A composite object has no MD5."""
        count = sum(source.component_count or 1 for source in sources)
        return self.put(bucket, new, self._joined(bucket, sources), count)

    def copy(self, source: StoredObject, bucket: str, new: NewObject) -> StoredObject:
        """Store the same bytes under another name (or over the same one)."""
        body = source.body if self._folder is None else self._joined(bucket, [source])
        return self.put(bucket, new, body, source.component_count)

    def time(self) -> int:
        """Microseconds since the epoch by this server's clock."""
        return time.time_ns() // 1000 + self.ahead

    # Helpers.

    def _now(self) -> int:
        """The time, never the same twice: it serves as generation, as in Cloud Storage."""
        self._clock = max(self._clock + 1, self.time())
        return self._clock

    def _joined(self, bucket: str, sources: list[StoredObject]) -> Body:
        body = self.new_body(bucket)
        for source in sources:
            for piece in source.body.read():
                body.write(piece)
        return body

    def _save_bucket(self, bucket: Bucket) -> None:
        if self._folder is not None:
            self._folder.save_bucket(bucket.name, _fields(bucket, "objects", "_names"))

    def _save_object(self, stored: StoredObject) -> None:
        if self._folder is not None:
            fields = _fields(stored, "bucket", "body")
            self._folder.save_object(stored.bucket, stored.name, fields, stored.body)

    def _load(self, folder: Folder) -> None:
        for fields in folder.buckets():
            bucket = Bucket(**fields)
            self._by_name[bucket.name] = bucket
            for values, body in folder.objects(bucket.name):
                stored = StoredObject(bucket=bucket.name, body=body, **values)
                bucket.add(stored)
                self._clock = max(self._clock, stored.generation, stored.updated)


def _fields(value: Bucket | StoredObject, *without: str) -> dict[str, Any]:
    """What is kept of a bucket or an object in a file beside its bytes."""
    names = (each.name for each in dataclasses.fields(value))
    return {name: getattr(value, name) for name in names if name not in without}


def _checked(settings: Mapping[str, Any], now: int) -> dict[str, Any]:
    """A bucket's settings; raises 400 for a malformed value of those that have an effect here."""
    checked = dict(settings)
    for setting in ("billing", "retentionPolicy"):
        if not isinstance(settings.get(setting, {}), dict):
            raise invalid(f"Invalid value for {setting}: {settings[setting]!r}")
    if "retentionPolicy" in settings:
        period = settings["retentionPolicy"].get("retentionPeriod")
        if period is None:
            raise required("retentionPolicy.retentionPeriod")
        if not (str(period).isdigit() and 0 < int(period) <= MAX_RETENTION_SECONDS):
            raise invalid(f"Invalid value for retentionPeriod: {period!r}")
        policy = {"effectiveTime": timestamp(now), **settings["retentionPolicy"]}
        checked["retentionPolicy"] = {**policy, "retentionPeriod": str(period)}
    location = str(settings.get("location", "US")).upper()
    kind = "region" if _REGION.fullmatch(location) else _LOCATION_TYPES.get(location)
    if kind is None:
        raise invalid("The specified location constraint is not valid.")
    if "customPlacementConfig" in settings:
        kind = "dual-region"
    if kind != "region":
        checked.setdefault("rpo", "DEFAULT")
    return {**checked, "location": location, "locationType": kind}
