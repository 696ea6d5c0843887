"""What Cloud Storage can do and this server cannot: such requests are refused by name.

Settings that do not change what a request does (a location, a storage class, lifecycle rules,
which take a day) are kept and shown. There is no access control either: predefined ACLs are
taken without effect. Everything else that a client would rely on is refused here.
"""

from collections.abc import Mapping
from typing import Any

from .calls import Call
from .errors import unsupported

# Keys of a bucket resource that the server writes; clients send them back.
_BUCKET_OUTPUT_ONLY = {
    "etag", "generation", "id", "kind", "locationType", "metageneration", "name", "owner",
    "projectNumber", "satisfiesPZI", "satisfiesPZS", "selfLink", "timeCreated", "updated",
}  # fmt: skip
_BUCKET_KEPT = {
    "billing", "cors", "customPlacementConfig", "defaultEventBasedHold", "iamConfiguration",
    "labels", "lifecycle", "location", "retentionPolicy", "rpo", "storageClass", "website",
}  # fmt: skip
# Keys of an object resource, parameters, and parts of paths, with what they are about.
_OBJECT_REFUSED = {
    "contexts": "object contexts",
    "customerEncryption": "customer-supplied encryption keys",
    "kmsKeyName": "Cloud KMS keys (kmsKeyName)",
    "retention": "object retention",
}
_QUERY_REFUSED = {
    "destinationKmsKeyName": "Cloud KMS keys (destinationKmsKeyName)",
    "enableObjectRetention": "object retention",
    "kmsKeyName": "Cloud KMS keys (kmsKeyName)",
    "softDeleted": "soft delete",
}
_PATHS_REFUSED = {
    "acl": "access control lists",
    "anywhereCaches": "Anywhere Cache",
    "bulkRestore": "soft delete",
    "defaultObjectAcl": "access control lists",
    "folders": "folders",
    "iam": "changing IAM policies",
    "lockRetentionPolicy": "locked retention policies",
    "managedFolders": "managed folders",
    "notificationConfigs": "Pub/Sub notifications",
    "restore": "soft delete",
    "watch": "change notifications",
}


def refuse_parameters(call: Call) -> None:
    """Raise 400 for a query or headers that ask for something that is not supported."""
    for name, feature in _QUERY_REFUSED.items():
        if call.query.get(name, "").lower() not in ("", "false"):
            raise unsupported(feature)
    for name in call.headers:
        if name.startswith(("x-goog-encryption-", "x-goog-copy-source-encryption-")):
            raise unsupported(f"encryption keys of the client's own ({name})")


def refuse_path(parts: list[str]) -> None:
    """Raise 400 for a path that Cloud Storage knows and this server does not serve."""
    if parts[0] not in ("storage", "upload", "download", "batch", ""):
        raise unsupported("the XML API; use the JSON API")
    # After the bucket, or after the object.
    for part in (*parts[4:5], *parts[6:7]):
        if part in _PATHS_REFUSED:
            raise unsupported(_PATHS_REFUSED[part])


def refuse_object_settings(resource: Mapping[str, Any]) -> None:
    """Raise 400 for a setting of an object that would have no effect."""
    for key, feature in _OBJECT_REFUSED.items():
        if resource.get(key):
            raise unsupported(feature)


def bucket_settings(resource: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a bucket resource; raises 400 for a setting that would have no effect."""
    settings = {}
    for key, value in resource.items():
        if key in _BUCKET_KEPT:
            settings[key] = value
        elif key not in _BUCKET_OUTPUT_ONLY and not _is_off(value):
            raise unsupported(f"the bucket setting {key}")
    return settings


def _is_off(value: Any) -> bool:
    """Whether a setting asks for nothing: `{"enabled": false}` does, for one."""
    if isinstance(value, dict):
        return all(_is_off(each) for each in value.values())
    return not value or value == "0"
