"""The JSON API over the buckets: which request does what.

https://cloud.google.com/storage/docs/json_api/v1. Everything here is synchronous and touches
memory or local files only.
"""

import gzip
import logging
import re
import zlib
from collections.abc import Callable
from email.utils import formatdate
from functools import partial
from typing import Any
from urllib.parse import parse_qs

from .batch import batch_reply
from .buckets import DENIABLE, Buckets
from .calls import Call, Receiver, Reply, error_reply, json_reply, parse_json
from .errors import ApiError, invalid, not_allowed, not_found, required
from .fields import parse_fields
from .listing import list_page
from .objects import (
    SETTABLE,
    NewObject,
    StoredObject,
    check_name,
    check_preconditions,
    merge_patch,
)
from .resources import bucket_resource, object_reply, object_resource
from .unsupported import bucket_settings, refuse_object_settings, refuse_parameters, refuse_path
from .uploads import Uploads

log = logging.getLogger(__name__)

MAX_COMPOSE_SOURCES = 32  # https://cloud.google.com/storage/docs/composite-objects

# Headers of a download that are settings of the object.
_DOWNLOAD_HEADERS = {
    "cacheControl": ["Cache-Control"],
    "contentDisposition": ["Content-Disposition"],
    "contentEncoding": ["Content-Encoding", "X-Goog-Stored-Content-Encoding"],
    "contentLanguage": ["Content-Language"],
    "storageClass": ["X-Goog-Storage-Class"],
}
_RANGE = re.compile(r"\s*bytes\s*=\s*(\d*)-(\d*)\s*", re.IGNORECASE | re.ASCII)


class Api:
    """Answers requests of the JSON API."""

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._uploads = Uploads(buckets)

    def close(self) -> None:
        """Drop unfinished uploads."""
        self._uploads.close()

    def clock_headers(self) -> dict[str, str]:
        """The header `Date` of answers, if the clock is not the machine's."""
        ahead = self._buckets.ahead
        return {"Date": formatdate(self._buckets.time() / 1e6, usegmt=True)} if ahead else {}

    def receive(self, call: Call, answer_batched: Callable[[Call], Reply]) -> Receiver:
        """Where the request's body goes. `answer_batched` answers the calls of a batch."""
        try:
            match call.parts:
                case ["upload", "storage", "v1", "b", bucket, "o"]:
                    self._check(call, "object", bucket)
                    return self._uploads.receive(call, bucket)
                case ["batch", "storage", "v1"] if call.method == "POST":
                    return Receiver(lambda: batch_reply(call, answer_batched), call.body.extend)
                case ["storage", *_]:
                    return Receiver(lambda: self.answer(call), call.body.extend)
        except ApiError as exc:
            return Receiver(partial(error_reply, exc))
        return Receiver(lambda: self.answer(call))

    def answer(self, call: Call) -> Reply:
        """Answer a request whose body is in `call.body`. May raise ApiError."""
        # Split before decoding: the name of an object may contain an encoded slash.
        parts = call.parts
        match parts[1:] if parts[0] == "download" and call.reads else parts:
            case ["storage", "v1", "b", *where]:
                found = self._route(call, where)
                if found is not None:
                    kind, answer = found
                    self._check(call, kind, *where[:1])
                    return answer()
        refuse_path(parts)
        raise not_found()

    def _route(self, call: Call, where: list[str]) -> tuple[str, Callable[[], Reply]] | None:
        """What the answer describes, as `parse_fields` calls it, and what gives it."""
        match where:
            case [] | [""]:
                kind = "buckets" if call.reads else "bucket"
                return kind, lambda: self._list_or_create_buckets(call)
            case [bucket]:
                return "bucket", lambda: self._bucket(call, bucket)
            case [bucket, "iam"] if call.reads:
                return "iam", lambda: self._policy(call, bucket)
            case [bucket, "iam", "testPermissions"] if call.reads:
                return "iam", lambda: self._test_permissions(call, bucket)
            case [bucket, "o"] if call.reads:
                return "objects", lambda: self._list(call, bucket)
            case [bucket, "o", name]:
                return "object", lambda: self._object(call, bucket, name)
            case [bucket, "o", name, "compose"] if call.method == "POST":
                return "object", lambda: self._compose(call, bucket, name)
            case [bucket, "o", name, "moveTo", "o", target] if call.method == "POST":
                return "object", lambda: self._move(call, bucket, name, target)
            case [bucket, "o", name, "copyTo" | "rewriteTo" as verb, "b", other, "o", target] if (
                call.method == "POST"
            ):
                kind = "object" if verb == "copyTo" else verb
                return kind, lambda: self._copy(call, bucket, name, other, target)
        return None

    def _check(self, call: Call, kind: str, bucket: str = "") -> None:
        """Raise 400 for parameters that are not supported or wrong, before anything is done."""
        refuse_parameters(call)
        if call.query.get("fields"):
            call.field_tree = parse_fields(call.query["fields"], kind)
        self._need_payer(call, bucket)

    def _need_payer(self, call: Call, bucket: str) -> None:
        """Raise 400 if the bucket wants a project to bill and the call names none.

        https://cloud.google.com/storage/docs/requester-pays
        """
        if bucket not in self._buckets or not self._buckets[bucket].requester_pays:
            return
        if not (call.query.get("userProject") or call.headers.get("x-goog-user-project")):
            message = "Bucket is a requester pays bucket but no user project provided."
            raise ApiError(400, "required", message)

    # Buckets.

    def _list_or_create_buckets(self, call: Call) -> Reply:
        def resource(name: str) -> dict[str, Any]:
            return bucket_resource(self._buckets[name], call.base_url)

        if call.reads:
            return _list_reply(call, "storage#buckets", self._buckets.names(), resource)
        if call.method != "POST":
            raise not_allowed(call.method)
        self._buckets.need("bucket_create")
        wanted = parse_json(call.body)
        name = wanted.get("name")
        if not isinstance(name, str):
            raise required("name")
        self._buckets.create_bucket(name, bucket_settings(wanted))
        return json_reply(call, resource(name))

    def _bucket(self, call: Call, name: str) -> Reply:
        if call.reads:
            self._buckets.need("bucket_get")
        bucket = self._buckets[name]
        check_preconditions(call.query, bucket, call.headers, reading=call.reads)
        if call.method == "DELETE":
            self._buckets.delete_bucket(name)
            return Reply(204)
        if call.method in ("PATCH", "PUT"):
            before = bucket.settings if call.method == "PATCH" else {}
            changes = bucket_settings(parse_json(call.body))
            self._buckets.change_bucket(bucket, merge_patch(before, changes))
        elif not call.reads:
            raise not_allowed(call.method)
        return json_reply(call, bucket_resource(bucket, call.base_url), ETag=bucket.etag)

    def _policy(self, call: Call, bucket: str) -> Reply:
        self._buckets[bucket]  # 404 if there is none
        return json_reply(call, {"kind": "storage#policy", "bindings": [], "version": 1})

    def _test_permissions(self, call: Call, bucket: str) -> Reply:
        self._buckets[bucket]  # 404 if there is none
        asked = parse_qs(call.query_string).get("permissions", [])
        denied = {DENIABLE[name] for name in self._buckets.denied}
        granted = [permission for permission in asked if permission not in denied]
        answer = {"kind": "storage#testIamPermissionsResponse", "permissions": granted}
        return json_reply(call, answer)

    # Reading objects.

    def _list(self, call: Call, bucket_name: str) -> Reply:
        self._buckets.need("list")
        bucket = self._buckets[bucket_name]
        wanted = call.field_tree.get("items", {})

        def resource(name: str) -> dict[str, Any]:
            item = object_resource(bucket.objects[name], bucket, call.base_url, wanted)
            for key in self._buckets.listings_lack:
                item.pop(key, None)
            return item

        return _list_reply(call, "storage#objects", bucket.names(), resource)

    def _object(self, call: Call, bucket: str, name: str) -> Reply:
        if call.reads:
            return self._get(call, bucket, name)
        call.object_name = name
        if call.method not in ("DELETE", "PATCH", "PUT"):
            raise not_allowed(call.method)
        self._buckets.need("delete" if call.method == "DELETE" else "update")
        stored = self._buckets.get(bucket, name, call.query.get("generation"))
        check_preconditions(call.query, stored, call.headers)
        if call.method == "DELETE":
            self._buckets.check_removal(stored)
            self._buckets.delete(stored)
            return Reply(204)
        resource = parse_json(call.body)
        refuse_object_settings(resource)
        before = stored.writable if call.method == "PATCH" else {"name": name}
        new = NewObject.from_resource(merge_patch(before, {**resource, "name": name}), {})
        self._buckets.change(stored, new)
        return self._resource(call, stored)

    def _get(self, call: Call, bucket: str, name: str) -> Reply:
        """The object's bytes or, without `alt=media`, its resource."""
        call.object_name = name
        self._buckets.need("get")
        stored = self._buckets.get(bucket, name, call.query.get("generation"))
        check_preconditions(call.query, stored, call.headers, reading=True)
        if call.query.get("alt") != "media":
            return self._resource(call, stored)
        headers = {
            "Content-Type": _header_value(stored.content_type or "application/octet-stream"),
            "ETag": stored.etag,
            "Last-Modified": formatdate(stored.updated / 1e6, usegmt=True),
            "X-Goog-Generation": str(stored.generation),
            "X-Goog-Metageneration": str(stored.metageneration),
            "X-Goog-Hash": stored.hash_header,
            "X-Goog-Storage-Class": "STANDARD",
            "X-Goog-Stored-Content-Length": str(stored.size),
            "X-Goog-Stored-Content-Encoding": "identity",
        }
        for setting, names in _DOWNLOAD_HEADERS.items():
            if setting in stored.settings:
                headers |= dict.fromkeys(names, _header_value(stored.settings[setting]))
        if "gzip" not in call.headers.get("accept-encoding", ""):
            plain = _unzipped(stored)
            if plain is not None:
                del headers["Content-Encoding"]
                return Reply(200, headers, plain)
        start, end, status = 0, stored.size, 200
        wanted = parse_range(call.headers.get("range", ""), stored.size)
        if wanted is not None:
            start, end = wanted
            status = 206
            if start >= end:
                raise ApiError(
                    416,
                    "requestedRangeNotSatisfiable",
                    "Request range not satisfiable",
                    plain=True,
                    headers={"Content-Range": f"bytes */{stored.size}"},
                )
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{stored.size}"
        return Reply(status, headers, stream=stored.body.read(start, end), length=end - start)

    def _resource(self, call: Call, stored: StoredObject) -> Reply:
        return object_reply(call, stored, self._buckets[stored.bucket])

    # Objects made from other objects.

    def _source(
        self, call: Call, bucket: str, name: str, generation: str | None = None
    ) -> StoredObject:
        """The object to copy or to move."""
        self._buckets.need("get")
        source = self._buckets.get(bucket, name, generation)
        check_preconditions(call.query, source, prefix="ifSource")
        return source

    def _compose(self, call: Call, bucket: str, name: str) -> Reply:
        call.object_name = name
        body = parse_json(call.body)
        listed = body.get("sourceObjects")
        if not isinstance(listed, list) or not all(isinstance(i, dict) for i in listed):
            raise invalid("Invalid value for sourceObjects.")
        if not 1 <= len(listed) <= MAX_COMPOSE_SOURCES:
            raise invalid(
                f"The number of source components provided must be 1 to {MAX_COMPOSE_SOURCES}."
            )
        new = self._new_object(body.get("destination") or {}, name)
        self._buckets.check_write(bucket, name, call.query)
        sources = []
        for item in listed:
            generation = item.get("generation")
            source = self._buckets.get(
                bucket, item.get("name", ""), None if generation is None else str(generation)
            )
            check_preconditions(item.get("objectPreconditions") or {}, source)
            sources.append(source)
        return self._resource(call, self._buckets.compose(bucket, new, sources))

    def _copy(
        self, call: Call, source_bucket: str, source_name: str, bucket: str, name: str
    ) -> Reply:
        self._need_payer(call, bucket)
        call.object_name = name
        generation = call.query.get("sourceGeneration")
        source = self._source(call, source_bucket, source_name, generation)
        body = parse_json(call.body)
        if any(key in body for key in ("contentType", "metadata", *SETTABLE)):
            new = self._new_object(body, name)
        else:
            refuse_object_settings(body)
            new = NewObject.like(source, name)
        check_name(name)
        self._buckets.check_write(bucket, name, call.query)
        stored = self._buckets.copy(source, bucket, new)
        if call.parts[6] == "copyTo":
            return self._resource(call, stored)
        answer = {
            "kind": "storage#rewriteResponse",
            "totalBytesRewritten": str(stored.size),
            "objectSize": str(stored.size),
            "done": True,
            "resource": object_resource(stored, self._buckets[bucket], call.base_url, {}),
        }
        return json_reply(call, answer)

    def _move(self, call: Call, bucket: str, source_name: str, name: str) -> Reply:
        call.object_name = name
        self._buckets.need("delete")
        source = self._source(call, bucket, source_name)
        check_name(name)
        if name == source.name:
            raise invalid("The source and destination object names must be different.")
        self._buckets.check_removal(source)
        self._buckets.check_write(bucket, name, call.query)
        stored = self._buckets.copy(source, bucket, NewObject.like(source, name))
        self._buckets.delete(source)
        return self._resource(call, stored)

    def _new_object(self, resource: dict[str, Any], name: str) -> NewObject:
        refuse_object_settings(resource)
        return NewObject.from_resource({**resource, "name": name}, {})


def answer_or_error(call: Call, answer: Callable[[], Reply]) -> Reply:
    """What `answer` returns, or the answer that its exception stands for."""
    try:
        return answer()
    except ApiError as exc:
        return error_reply(exc, plain=call.query.get("alt") == "media")
    except Exception:
        log.exception("%s %s failed", call.method, call.decoded_target)
        return error_reply(ApiError(500, "internalError", "Internal error: see the log"))


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """First byte and end of a `Range` header; None for the whole. An empty range is not
    satisfiable. Malformed headers and several ranges are ignored (RFC 9110, 14.2)."""
    found = _RANGE.fullmatch(header)
    if found is None or not any(found.groups()):
        return None
    first, last = (int(text) if text else None for text in found.groups())
    if first is None:
        return max(0, size - (last or 0)), size
    if last is None:
        return first, size
    return (first, min(size, last + 1)) if last >= first else None


def _unzipped(stored: StoredObject) -> bytes | None:
    """What a client without gzip gets of an object in gzip; None if that is the object as it is.

    https://cloud.google.com/storage/docs/transcoding. A `Range` is not honoured then.
    """
    settings = stored.settings
    if settings.get("contentEncoding") != "gzip" or "no-transform" in settings.get(
        "cacheControl", ""
    ):
        return None
    try:
        return gzip.decompress(stored.data)
    except (OSError, EOFError, zlib.error):
        return None


def _header_value(value: object) -> str:
    """Text that can be sent in a header: clients may store any content type they like."""
    text = str(value).encode(errors="replace").decode()
    return re.sub(r"[\x00-\x1f\x7f]", " ", text)


def _list_reply(
    call: Call, kind: str, names: list[str], resource: Callable[[str], dict[str, Any]]
) -> Reply:
    """One page of a listing of sorted names."""
    page = list_page(names, call.query)
    answer = {
        "nextPageToken": page.next,
        "items": [resource(name) for name in page.names],
        "prefixes": page.prefixes,
    }
    return json_reply(call, {"kind": kind, **{k: v for k, v in answer.items() if v}})
