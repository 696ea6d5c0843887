"""Buckets and objects as JSON resources.

https://cloud.google.com/storage/docs/json_api/v1/objects#resource and `/buckets#resource`.
"""

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from .buckets import Bucket
from .calls import Call, Reply, json_reply
from .fields import Tree
from .objects import StoredObject, timestamp


def object_resource(
    stored: StoredObject, bucket: Bucket, base_url: str, wanted: Tree
) -> dict[str, Any]:
    """The object's JSON, or at least the keys in `wanted` (all are half a listing's cost)."""
    if wanted and wanted.keys() <= _CHEAP.keys():
        values = ((key, _CHEAP[key](stored)) for key in wanted)
        return {key: value for key, value in values if value is not None}
    name = quote(stored.name, safe="")
    where = f"storage/v1/b/{stored.bucket}/o/{name}"
    created = timestamp(stored.created)
    resource: dict[str, Any] = {
        "kind": "storage#object",
        "id": f"{stored.bucket}/{stored.name}/{stored.generation}",
        "selfLink": f"{base_url}/{where}",
        "mediaLink": f"{base_url}/download/{where}?generation={stored.generation}&alt=media",
        "name": stored.name,
        "bucket": stored.bucket,
        "generation": str(stored.generation),
        "metageneration": str(stored.metageneration),
        "storageClass": "STANDARD",
        "size": str(stored.size),
        "crc32c": stored.crc32c,
        "etag": stored.etag,
        "timeCreated": created,
        "updated": created if stored.updated == stored.created else timestamp(stored.updated),
        "timeStorageClassUpdated": created,
        "timeFinalized": created,
    }
    until = bucket.retained_until(stored)
    optional = {
        "contentType": stored.content_type,
        "md5Hash": stored.md5,
        "metadata": stored.metadata or None,
        "componentCount": stored.component_count,
        "retentionExpirationTime": None if until is None else timestamp(until),
    }
    resource.update((key, value) for key, value in optional.items() if value is not None)
    resource.update(stored.settings)
    return resource


def object_reply(call: Call, stored: StoredObject, bucket: Bucket) -> Reply:
    """200 with the object's resource, or with what the call's `fields` select of it."""
    return json_reply(call, object_resource(stored, bucket, call.base_url, call.field_tree))


_CHEAP: dict[str, Callable[[StoredObject], Any]] = {
    "name": lambda stored: stored.name,
    "bucket": lambda stored: stored.bucket,
    "generation": lambda stored: str(stored.generation),
    "metageneration": lambda stored: str(stored.metageneration),
    "size": lambda stored: str(stored.size),
    "crc32c": lambda stored: stored.crc32c,
    "md5Hash": lambda stored: stored.md5,
    "metadata": lambda stored: stored.metadata or None,
    "contentType": lambda stored: stored.content_type,
}


def bucket_resource(bucket: Bucket, base_url: str) -> dict[str, Any]:
    resource: dict[str, Any] = {
        "kind": "storage#bucket",
        "id": bucket.name,
        "name": bucket.name,
        "selfLink": f"{base_url}/storage/v1/b/{bucket.name}",
        "projectNumber": "0",
        "metageneration": str(bucket.metageneration),
        "storageClass": "STANDARD",
        "etag": bucket.etag,
        "timeCreated": timestamp(bucket.created),
        "updated": timestamp(bucket.updated),
        "iamConfiguration": {
            "uniformBucketLevelAccess": {"enabled": True},
            "publicAccessPrevention": "inherited",
        },
    }
    resource.update(bucket.settings)
    return resource
