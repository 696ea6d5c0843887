"""What the account of every client may do. There is no authentication: all clients are one account.

Tests take permissions away with `StorageServer.deny`.
"""

from collections.abc import Iterable

from .buckets import Buckets
from .calls import Call
from .errors import ApiError, forbidden
from .objects import Preconditions

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


class Access:
    """The permissions that are denied, and the checks before reads and writes."""

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._denied: frozenset[str] = frozenset()

    def deny(self, *names: str) -> None:
        """Raises ValueError for a name that is not in `DENIABLE`."""
        for name in names:
            if name not in DENIABLE:
                raise ValueError(f"cannot deny {name!r}: choose from {', '.join(DENIABLE)}")
        self._denied |= frozenset(names)

    def allow_all(self) -> None:
        self._denied = frozenset()

    def granted(self, permissions: Iterable[str]) -> list[str]:
        """Those of the permissions that the account has."""
        denied = {DENIABLE[name] for name in self._denied}
        return [permission for permission in permissions if permission not in denied]

    def need(self, *names: str) -> None:
        """Raise 403 if one of them is denied."""
        for name in names:
            if name in self._denied:
                raise forbidden(DENIABLE[name])

    def need_payer(self, call: Call, bucket: str) -> None:
        """Raise 400 if the bucket wants a project to bill and the call names none.

        https://cloud.google.com/storage/docs/requester-pays
        """
        if bucket not in self._buckets or not self._buckets[bucket].requester_pays:
            return
        if not (call.query.get("userProject") or call.headers.get("x-goog-user-project")):
            raise ApiError(
                400,
                "required",
                "Bucket is a requester pays bucket but no user project provided.",
            )

    def need_write(self, bucket: str, name: str, preconditions: Preconditions) -> None:
        """Raise what a write of this name would be answered with: 404, 412 or 403."""
        self.need("create")
        current = self._buckets[bucket].objects.get(name)
        preconditions.check(current)
        if current is not None:
            self.need("overwrite")
            self._buckets.check_removal(current)
