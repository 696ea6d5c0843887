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


def _where(stored: StoredObject) -> str:
    return f"storage/v1/b/{stored.bucket}/o/{quote(stored.name, safe='')}"


# Each key of an object's resource that is no setting of a client's; None: the object lacks it.
_OBJECT: dict[str, Callable[[StoredObject, Bucket, str], Any]] = {
    "kind": lambda *_: "storage#object",
    "id": lambda stored, *_: f"{stored.bucket}/{stored.name}/{stored.generation}",
    "selfLink": lambda stored, _, url: f"{url}/{_where(stored)}",
    "mediaLink": lambda stored, _, url: (
        f"{url}/download/{_where(stored)}?generation={stored.generation}&alt=media"
    ),
    "name": lambda stored, *_: stored.name,
    "bucket": lambda stored, *_: stored.bucket,
    "generation": lambda stored, *_: str(stored.generation),
    "metageneration": lambda stored, *_: str(stored.metageneration),
    "contentType": lambda stored, *_: stored.content_type,
    "storageClass": lambda *_: "STANDARD",
    "size": lambda stored, *_: str(stored.size),
    "crc32c": lambda stored, *_: stored.crc32c,
    "md5Hash": lambda stored, *_: stored.md5,
    "etag": lambda stored, *_: stored.etag,
    "metadata": lambda stored, *_: stored.metadata or None,
    "componentCount": lambda stored, *_: stored.component_count,
    "timeCreated": lambda stored, *_: timestamp(stored.created),
    "updated": lambda stored, *_: timestamp(stored.updated),
    "timeStorageClassUpdated": lambda stored, *_: timestamp(stored.created),
    "timeFinalized": lambda stored, *_: timestamp(stored.created),
    "retentionExpirationTime": lambda stored, bucket, _: (
        (until := bucket.retained_until(stored)) and timestamp(until)
    ),
}


def object_resource(
    stored: StoredObject, bucket: Bucket, base_url: str, wanted: Tree
) -> dict[str, Any]:
    """The object's JSON, or at least the keys in `wanted` (all are half a listing's cost)."""
    keys = _OBJECT.keys() & wanted.keys() if wanted and "*" not in wanted else _OBJECT
    values = ((key, _OBJECT[key](stored, bucket, base_url)) for key in keys)
    return {key: value for key, value in values if value is not None} | stored.settings


def object_reply(call: Call, stored: StoredObject, bucket: Bucket) -> Reply:
    """200 with the object's resource, or with what the call's `fields` select of it."""
    resource = object_resource(stored, bucket, call.base_url, call.field_tree)
    return json_reply(call, resource, ETag=stored.etag)


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
