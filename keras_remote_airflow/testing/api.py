"""The JSON API over the store: which request does what.

https://cloud.google.com/storage/docs/json_api/v1. Everything here is synchronous and touches
memory or local files only.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from email.utils import formatdate
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote

from . import listing
from .bodies import Spool
from .faults import DENIABLE, Faults
from .fields import parse_fields, select
from .http import (
    STREAM_ABOVE_BYTES,
    BadRequestError,
    HttpRequest,
    Response,
    Sink,
    parse_head,
    reason,
)
from .multipart import RelatedReader, boundary_of, split_parts
from .objects import (
    MAX_COMPOSE_SOURCES,
    SETTABLE,
    ApiError,
    Preconditions,
    Store,
    StoredObject,
    Upload,
    check_name,
    custom_metadata,
    forbidden,
    invalid,
)
from .resources import (
    bucket_resource,
    check_hash,
    hash_header,
    object_resource,
    parse_hash_header,
)
from .resumable import ContentRange, PlainError, Session, Transfer

log = logging.getLogger(__name__)

MAX_BATCH_CALLS = 100  # https://cloud.google.com/storage/docs/batch
_JSON = {"Content-Type": "application/json; charset=UTF-8"}

# Keys of a bucket resource that the server, not the owner, writes.
_BUCKET_OUTPUT_ONLY = {
    "etag", "id", "kind", "metageneration", "name", "projectNumber", "selfLink", "timeCreated",
    "updated",
}  # fmt: skip


class Api:
    """Answers requests of the JSON API."""

    def __init__(self, store: Store, faults: Faults) -> None:
        self._store = store
        self._faults = faults
        self._sessions: dict[str, Session] = {}

    def close(self) -> None:
        """Drop unfinished uploads."""
        for session in self._sessions.values():
            if session.finished is None:
                session.spool.discard()
        self._sessions.clear()

    def open_sink(self, request: HttpRequest) -> Sink | None:
        """Where a body goes as it arrives: every resumable PUT, and large media uploads."""
        if not request.path.startswith("/upload/storage/v1/b/"):
            return None
        query = request.query
        if "upload_id" in query:
            if request.method not in ("PUT", "POST"):
                return None
            session = self._session(request)
            return None if session.finished is not None else session.begin(_range_of(request))
        length = request.headers.get("content-length")
        if length is None or int(length) > STREAM_ABOVE_BYTES:
            bucket = unquote(request.path.split("/")[5])
            if query.get("uploadType") in ("media", "multipart"):
                return _Incoming(self, request, bucket)
        return None

    def serve(
        self, request: HttpRequest, batch_call: Callable[[HttpRequest], Response] | None
    ) -> Response:
        """Answer a request, errors included. `batch_call` serves the calls of a batch."""
        try:
            return self._route(request, batch_call)
        except ApiError as exc:
            return error_response(exc, plain=request.query.get("alt") == "media")
        except Exception:
            log.exception("%s %s failed", request.method, request.decoded_target)
            return error_response(ApiError(500, "internalError", "Internal error: see the log"))

    def _route(  # noqa: C901 - a routing table is long, not complex
        self, request: HttpRequest, batch_call: Callable[[HttpRequest], Response] | None
    ) -> Response:
        # Split before decoding: the name of an object may contain an encoded slash.
        parts = [unquote(part) for part in request.path.split("/")[1:]]
        method = "GET" if request.method == "HEAD" else request.method
        match parts:
            case ["upload", "storage", "v1", "b", bucket, "o"]:
                return self._upload(request, bucket)
            case ["download", "storage", "v1", "b", bucket, "o", name] if method == "GET":
                return self._download(request, bucket, name)
            case ["batch", "storage", "v1"] if method == "POST":
                if batch_call is None:
                    raise invalid("A batch cannot contain a batch.")
                return _batch(request, batch_call)
            case ["storage", "v1", "b"] | ["storage", "v1", "b", ""]:
                return self._buckets(request, method)
            case ["storage", "v1", "b", bucket]:
                return self._bucket(request, method, bucket)
            case ["storage", "v1", "b", bucket, "iam", *rest] if method == "GET":
                return self._iam(request, bucket, rest)
            case ["storage", "v1", "b", bucket, "o"] if method == "GET":
                return self._list(request, bucket)
            case ["storage", "v1", "b", bucket, "o", name]:
                return self._object(request, method, bucket, name)
            case ["storage", "v1", "b", bucket, "o", name, verb, *rest] if method == "POST":
                return self._object_verb(request, bucket, name, verb, rest)
        raise ApiError(404, "notFound", "Not Found")

    def _object_verb(
        self, request: HttpRequest, bucket: str, name: str, verb: str, rest: list[str]
    ) -> Response:
        match verb, rest:
            case "compose", []:
                return self._compose(request, bucket, name)
            case "copyTo" | "rewriteTo", ["b", target_bucket, "o", target]:
                return self._copy(request, verb, bucket, name, target_bucket, target)
            case "moveTo", ["o", target]:
                return self._move(request, bucket, name, target)
        raise ApiError(404, "notFound", "Not Found")

    # Buckets.

    def _buckets(self, request: HttpRequest, method: str) -> Response:
        if method == "POST":
            self._need("bucket_create")
            resource = _json_body(request)
            name = resource.get("name")
            if not isinstance(name, str):
                raise ApiError(400, "required", "Required parameter: name")
            bucket = self._store.create_bucket(name, _bucket_settings(resource))
            return _json(request, bucket_resource(bucket, _base_url(request)))
        if method != "GET":
            raise ApiError(405, "methodNotAllowed", f"{method} is not supported here.")
        query = request.query
        page = listing.list_page(
            sorted(self._store.buckets),
            listing.Query(
                prefix=query.get("prefix", ""), after=_page_token(query), max_results=_limit(query)
            ),
        )
        items = [bucket_resource(self._store.bucket(n), _base_url(request)) for n in page.names]
        return _json(request, _page("storage#buckets", items, page))

    def _bucket(self, request: HttpRequest, method: str, name: str) -> Response:
        if method == "GET":
            self._need("bucket_get")
        bucket = self._store.bucket(name)
        preconditions = Preconditions.from_query(request.query)
        if method == "DELETE":
            self._store.delete_bucket(name, preconditions)
            return Response(204)
        preconditions.check(bucket, reading=method == "GET")
        if method in ("PATCH", "PUT"):
            changes = _json_body(request)
            settings = dict(bucket.settings) if method == "PATCH" else {}
            for key, value in _bucket_settings(changes).items():
                if value is None:
                    settings.pop(key, None)
                elif key == "labels" and method == "PATCH":
                    merged = {**settings.get(key, {}), **value}
                    settings[key] = {k: v for k, v in merged.items() if v is not None}
                else:
                    settings[key] = value
            self._store.change_bucket(bucket, settings)
        elif method != "GET":
            raise ApiError(405, "methodNotAllowed", f"{method} is not supported here.")
        return _json(request, bucket_resource(bucket, _base_url(request)))

    def _iam(self, request: HttpRequest, bucket: str, rest: list[str]) -> Response:
        self._store.bucket(bucket)
        if rest == ["testPermissions"]:
            denied = {DENIABLE[name] for name in self._faults.denied}
            asked = parse_qs(request.query_string).get("permissions", [])
            granted = [permission for permission in asked if permission not in denied]
            answer = {"kind": "storage#testIamPermissionsResponse", "permissions": granted}
            return _json(request, answer)
        if rest:
            raise ApiError(404, "notFound", "Not Found")
        return _json(request, {"kind": "storage#policy", "bindings": [], "version": 1})

    # Reading objects.

    def _list(self, request: HttpRequest, bucket_name: str) -> Response:
        self._need("list")
        bucket = self._store.bucket(bucket_name)
        query = request.query
        page = listing.list_page(
            bucket.names.sorted(),
            listing.Query(
                prefix=query.get("prefix", ""),
                delimiter=query.get("delimiter", ""),
                start=query.get("startOffset", ""),
                end=query.get("endOffset", ""),
                after=_page_token(query),
                glob=query.get("matchGlob", ""),
                include_trailing_delimiter=query.get("includeTrailingDelimiter") == "true",
                max_results=_limit(query),
            ),
        )
        tree = _field_tree(query)
        base_url = _base_url(request)
        wanted = tree.get("items") if tree and "*" not in tree else None
        if tree and "*" not in tree and wanted is None:
            items: list[dict[str, Any]] = [{} for _ in page.names]
        else:
            keys = frozenset(wanted) if wanted else None
            items = [object_resource(bucket.objects[n], base_url, keys) for n in page.names]
        answer = _page("storage#objects", items, page)
        if page.prefixes:
            answer["prefixes"] = page.prefixes
        return _json(request, answer)

    def _object(self, request: HttpRequest, method: str, bucket: str, name: str) -> Response:
        request.object_name = name
        query = request.query
        preconditions = Preconditions.from_query(query)
        generation = query.get("generation")
        if method == "GET":
            if query.get("alt") == "media":
                return self._download(request, bucket, name)
            self._need("get")
            stored = self._store.get(bucket, name, generation, preconditions)
        elif method == "DELETE":
            self._need("delete")
            self._store.delete(bucket, name, generation, preconditions)
            return Response(204)
        elif method in ("PATCH", "PUT"):
            self._need("update")
            stored = self._store.get(bucket, name, generation)
            preconditions.check(stored)
            stored = self._store.change(
                stored, **_changed(stored, _json_body(request), keep=method == "PATCH")
            )
        else:
            raise ApiError(405, "methodNotAllowed", f"{method} is not supported here.")
        return _json(request, object_resource(stored, _base_url(request)))

    def _download(self, request: HttpRequest, bucket: str, name: str) -> Response:
        request.object_name = name
        query = request.query
        self._need("get")
        preconditions = Preconditions.from_query(query)
        stored = self._store.get(bucket, name, query.get("generation"), preconditions)
        if query.get("alt") != "media":
            return _json(request, object_resource(stored, _base_url(request)))
        headers = {
            "Content-Type": stored.content_type or "application/octet-stream",
            "ETag": f'"{stored.generation}"',
            "Last-Modified": formatdate(stored.updated / 1e6, usegmt=True),
            "X-Goog-Generation": str(stored.generation),
            "X-Goog-Metageneration": str(stored.metageneration),
            "X-Goog-Hash": hash_header(stored),
            "X-Goog-Storage-Class": stored.settings.get("storageClass", "STANDARD"),
            "X-Goog-Stored-Content-Length": str(stored.size),
            "X-Goog-Stored-Content-Encoding": stored.settings.get("contentEncoding", "identity"),
        }
        for setting, header in (
            ("cacheControl", "Cache-Control"),
            ("contentDisposition", "Content-Disposition"),
            ("contentEncoding", "Content-Encoding"),
            ("contentLanguage", "Content-Language"),
        ):
            if setting in stored.settings:
                headers[header] = _header_value(stored.settings[setting])
        start, end, status = 0, stored.size, 200
        wanted = parse_range(request.headers.get("range", ""), stored.size)
        if wanted is not None:
            start, end = wanted
            status = 206
            if start >= end:
                raise RangeError(stored.size)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{stored.size}"
        return Response(
            status, headers, stream=stored.body.read(start, end), content_length=end - start
        )

    # Writing objects.

    def _upload(self, request: HttpRequest, bucket: str) -> Response:
        query = request.query
        if "upload_id" in query:
            return self._resume(request)
        upload_type = query.get("uploadType")
        if request.method not in ("POST", "PUT") or upload_type is None:
            raise invalid(f"Invalid upload request: {request.method} with uploadType {upload_type}")
        preconditions = Preconditions.from_query(query)
        if upload_type == "resumable":
            return self._initiate(request, bucket, preconditions)
        if upload_type not in ("media", "multipart"):
            raise invalid(f"Invalid value for uploadType: {upload_type!r}")
        incoming = request.sink
        if not isinstance(incoming, _Incoming):
            incoming = _Incoming(self, request, bucket)
            incoming.write(request.body)
        upload, spool = incoming.end()
        stored = self._store.put(bucket, upload, spool, preconditions, self._overwrite)
        return _json(request, object_resource(stored, _base_url(request)))

    def open_upload(self, request: HttpRequest, bucket: str, upload: Upload) -> Spool:
        """Where the bytes go, if the write would be allowed now: a refused one costs nothing."""
        request.object_name = upload.name
        self._need("create")
        preconditions = Preconditions.from_query(request.query)
        self._store.check_put(bucket, upload.name, preconditions, self._overwrite)
        return self._store.spool(bucket)

    def _initiate(
        self, request: HttpRequest, bucket: str, preconditions: Preconditions
    ) -> Response:
        self._need("create")
        headers = request.headers
        upload = _checked_upload(_json_body(request), request.query)
        declared = {"x-goog-hash": headers.get("x-goog-hash", "")}
        upload = upload.with_hashes(parse_hash_header(declared))
        if upload.content_type is None:
            upload = replace(upload, content_type=headers.get("x-upload-content-type"))
        request.object_name = upload.name
        self._store.check_put(bucket, upload.name, preconditions, self._overwrite)
        length = headers.get("x-upload-content-length")
        if length is not None and not (length.isascii() and length.isdigit()):
            raise invalid(f"Invalid value for X-Upload-Content-Length: {length!r}")
        upload_id = uuid.uuid4().hex
        self._sessions[upload_id] = Session(
            bucket=bucket,
            upload=upload,
            preconditions=preconditions,
            spool=self._store.spool(bucket),
            fields=request.query.get("fields"),
            declared_size=None if length is None else int(length),
        )
        location = (
            f"{_base_url(request)}/upload/storage/v1/b/{quote(bucket)}/o"
            f"?uploadType=resumable&name={quote(upload.name, safe='')}&upload_id={upload_id}"
        )
        return Response(200, {"Location": location, "X-GUploader-UploadID": upload_id})

    def _session(self, request: HttpRequest) -> Session:
        session = self._sessions.get(request.query["upload_id"])
        if session is None:
            raise ApiError(404, "notFound", "No such upload session; start a new one.")
        request.object_name = session.upload.name
        return session

    def _resume(self, request: HttpRequest) -> Response:
        session = self._session(request)
        if request.method == "DELETE":
            # https://cloud.google.com/storage/docs/performing-resumable-uploads#cancel-upload
            del self._sessions[request.query["upload_id"]]
            if session.finished is None:
                session.spool.discard()
            return Response(499)
        if request.method not in ("PUT", "POST"):  # gcsfs sends its chunks with POST
            raise ApiError(405, "methodNotAllowed", f"{request.method} is not supported here.")
        answer = session.finished
        if answer is None:
            content_range = _range_of(request)
            transfer = request.sink
            if not isinstance(transfer, Transfer):
                transfer = session.begin(content_range)
                transfer.write(request.body)
            if not transfer.end(request.body_bytes):
                kept = session.resumable_size
                return Response(308, {"Range": f"bytes=0-{kept - 1}"} if kept else {})
            try:
                upload = session.upload.with_hashes(parse_hash_header(request.headers))
                stored = self._store.put(
                    session.bucket, upload, session.spool, session.preconditions, self._overwrite
                )
                answer = session.finish(object_resource(stored, _base_url(request)))
            except ApiError:
                del self._sessions[request.query["upload_id"]]
                raise
        if session.fields is not None:
            request.query.setdefault("fields", session.fields)
        return _json(request, answer)

    def _compose(self, request: HttpRequest, bucket: str, name: str) -> Response:
        request.object_name = name
        self._need("create")
        check_name(name)
        body = _json_body(request)
        listed = body.get("sourceObjects")
        if not isinstance(listed, list) or not all(isinstance(i, dict) for i in listed):
            raise invalid("Invalid value for sourceObjects.")
        if not 1 <= len(listed) <= MAX_COMPOSE_SOURCES:
            raise invalid(
                f"The number of source components provided must be 1 to {MAX_COMPOSE_SOURCES}."
            )
        sources = []
        for item in listed:
            generation = item.get("generation")
            source = self._store.get(
                bucket, item.get("name", ""), None if generation is None else str(generation)
            )
            wanted = item.get("objectPreconditions") or {}
            Preconditions.from_query({key: str(value) for key, value in wanted.items()}).check(
                source
            )
            sources.append(source)
        upload = _checked_upload({**body.get("destination", {}), "name": name}, {})
        stored = self._store.compose(
            bucket, upload, sources, Preconditions.from_query(request.query), self._overwrite
        )
        return _json(request, object_resource(stored, _base_url(request)))

    def _copy(
        self,
        request: HttpRequest,
        verb: str,
        source_bucket: str,
        source_name: str,
        bucket: str,
        name: str,
    ) -> Response:
        request.object_name = name
        self._need("get")
        self._need("create")
        check_name(name)
        query = request.query
        source = self._store.get(source_bucket, source_name, query.get("sourceGeneration"))
        Preconditions.from_query(query, "ifSource").check(source)
        body = _json_body(request)
        if any(key in body for key in ("contentType", "metadata", *SETTABLE)):
            upload = _checked_upload({**body, "name": name}, {})
        else:
            upload = Upload(name, source.content_type, source.metadata, dict(source.settings))
        stored = self._store.copy(
            source, bucket, upload, Preconditions.from_query(query), self._overwrite
        )
        resource = object_resource(stored, _base_url(request))
        if verb == "copyTo":
            return _json(request, resource)
        answer = {
            "kind": "storage#rewriteResponse",
            "totalBytesRewritten": str(stored.size),
            "objectSize": str(stored.size),
            "done": True,
            "resource": resource,
        }
        return _json(request, answer)

    def _move(self, request: HttpRequest, bucket: str, source_name: str, name: str) -> Response:
        request.object_name = name
        for permission in ("get", "create", "delete"):
            self._need(permission)
        check_name(name)
        query = request.query
        source = self._store.get(bucket, source_name)
        Preconditions.from_query(query, "ifSource").check(source)
        if name == source_name:
            raise invalid("The source and destination object names must be different.")
        upload = Upload(name, source.content_type, source.metadata, dict(source.settings))
        stored = self._store.copy(
            source, bucket, upload, Preconditions.from_query(query), self._overwrite
        )
        self._store.delete(bucket, source_name)
        return _json(request, object_resource(stored, _base_url(request)))

    # Permissions.

    def _need(self, name: str) -> None:
        if name in self._faults.denied:
            raise forbidden(DENIABLE[name])

    @property
    def _overwrite(self) -> Literal["allow", "deny"]:
        return "deny" if "overwrite" in self._faults.denied else "allow"


class _Incoming:
    """A media or multipart upload on its way in."""

    def __init__(self, api: Api, request: HttpRequest, bucket: str) -> None:
        self._api = api
        self._request = request
        self._bucket = bucket
        self._upload: Upload | None = None
        self._spool: Spool | None = None
        self._error: ApiError | None = None
        self._reader: RelatedReader | None = None
        headers = request.headers
        content_type = headers.get("content-type")
        try:
            if request.query.get("uploadType") == "multipart":
                self._reader = RelatedReader(boundary_of(content_type or ""), self._open)
            else:
                upload = Upload.from_resource({"contentType": content_type}, request.query)
                self._begin(upload.with_hashes(parse_hash_header(headers)))
        except ApiError as exc:
            self._error = exc

    def write(self, data: bytes) -> None:
        if self._reader is not None:
            self._reader.write(data)
        elif self._spool is not None:
            self._spool.write(data)

    def end(self) -> tuple[Upload, Spool]:
        """What was uploaded.

        Raises:
            ApiError: whatever was wrong with it; the bytes are gone.
        """
        try:
            if self._error is not None:
                raise self._error
            if self._reader is not None:
                self._reader.end()
        except ApiError:
            self.abort()
            raise
        if self._upload is None or self._spool is None:
            raise invalid("The upload has no bytes.")
        return self._upload, self._spool

    def abort(self) -> None:
        if self._spool is not None:
            self._spool.discard()

    def _open(self, metadata: bytes, headers: dict[str, str]) -> Spool:
        """The media part of a multipart upload begins."""
        upload = _checked_upload(_parse_json(metadata), self._request.query)
        declared = {"x-goog-hash": self._request.headers.get("x-goog-hash", "")}
        upload = upload.with_hashes(parse_hash_header(declared))
        if upload.content_type is None:
            upload = replace(upload, content_type=headers.get("content-type"))
        return self._begin(upload)

    def _begin(self, upload: Upload) -> Spool:
        self._upload = upload
        self._spool = self._api.open_upload(self._request, self._bucket, upload)
        return self._spool


class RangeError(ApiError):
    """416, with the header that says how long the object is."""

    def __init__(self, size: int) -> None:
        super().__init__(416, "requestedRangeNotSatisfiable", "Request range not satisfiable")
        self.size = size


def error_response(exc: ApiError, *, plain: bool = False) -> Response:
    """https://cloud.google.com/storage/docs/json_api/v1/status-codes"""
    if exc.status == 304:
        return Response(304)
    if plain or isinstance(exc, PlainError):
        headers = {"Content-Type": "text/plain; charset=UTF-8"}
        if isinstance(exc, RangeError):
            headers["Content-Range"] = f"bytes */{exc.size}"
        return Response(exc.status, headers, exc.message.encode())
    detail: dict[str, str] = {"message": exc.message, "domain": "global", "reason": exc.reason}
    if exc.status == 412:
        detail |= {"locationType": "header", "location": "If-Match"}
    error = {"error": {"code": exc.status, "message": exc.message, "errors": [detail]}}
    return Response(exc.status, dict(_JSON), json.dumps(error).encode())


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """First byte and end of a `Range` header; None for the whole. An empty range is not
    satisfiable. Malformed headers and several ranges are ignored (RFC 9110, 14.2)."""
    unit, _, spec = header.partition("=")
    first, dash, last = spec.strip().partition("-")
    if unit.strip().lower() != "bytes" or not dash or "," in spec:
        return None
    if not all(text == "" or (text.isascii() and text.isdigit()) for text in (first, last)):
        return None
    if first == "":
        return None if last == "" else (max(0, size - int(last)), size)
    if last and int(last) < int(first):
        return None
    return int(first), min(size, int(last) + 1) if last else size


def _base_url(request: HttpRequest) -> str:
    return f"http://{request.headers.get('host', '127.0.0.1')}"


def _header_value(value: object) -> str:
    return str(value).replace("\r", " ").replace("\n", " ")


def _field_tree(query: Mapping[str, str]) -> dict[str, Any]:
    text = query.get("fields", "")
    if not text:
        return {}
    try:
        return parse_fields(text)
    except ValueError as exc:
        raise ApiError(400, "invalidParameter", str(exc)) from exc


def _json(request: HttpRequest, value: dict[str, Any]) -> Response:
    tree = _field_tree(request.query)
    chosen = select(value, tree) if tree else value
    return Response(200, _JSON, json.dumps(chosen, ensure_ascii=False).encode())


def _page(kind: str, items: list[dict[str, Any]], page: listing.Page) -> dict[str, Any]:
    answer: dict[str, Any] = {"kind": kind}
    if page.next is not None:
        answer["nextPageToken"] = page.next
    if items:
        answer["items"] = items
    return answer


def _limit(query: Mapping[str, str]) -> int:
    text = query.get("maxResults", "")
    if not text:
        return listing.MAX_RESULTS
    if not (text.isascii() and text.isdigit()):
        raise invalid(f"Invalid value for maxResults: {text!r}")
    return min(int(text) or listing.MAX_RESULTS, listing.MAX_RESULTS)


def _page_token(query: Mapping[str, str]) -> str:
    token = query.get("pageToken", "")
    if not token:
        return ""
    try:
        return listing.decode_token(token)
    except ValueError:
        raise invalid(f"Invalid value for pageToken: {token!r}") from None


def _json_body(request: HttpRequest) -> dict[str, Any]:
    return _parse_json(request.body)


def _parse_json(data: bytes) -> dict[str, Any]:
    if not data.strip():
        return {}
    try:
        value = json.loads(data)
    except ValueError as exc:
        raise ApiError(400, "parseError", f"Parse Error: {exc}") from exc
    if not isinstance(value, dict):
        raise ApiError(400, "parseError", "Parse Error: expected a JSON object")
    return value


def _checked_upload(resource: Mapping[str, Any], query: Mapping[str, str]) -> Upload:
    upload = Upload.from_resource(resource, query)
    if upload.crc32c is not None:
        check_hash(upload.crc32c, "crc32c", 4)
    if upload.md5 is not None:
        check_hash(upload.md5, "md5Hash", 16)
    return upload


def _bucket_settings(resource: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in resource.items() if key not in _BUCKET_OUTPUT_ONLY}


def _changed(stored: StoredObject, body: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """The fields of an object after a PATCH (`keep`) or an update."""
    metadata = dict(stored.metadata or {}) if keep else {}
    if "metadata" in body:
        if body["metadata"] is None:
            metadata = {}
        elif isinstance(body["metadata"], dict):
            metadata.update(body["metadata"])
        else:
            raise invalid(f"Invalid value for metadata: {body['metadata']!r}")
    settings = dict(stored.settings) if keep else {}
    settings.update({key: body[key] for key in SETTABLE if key in body})
    content_type = stored.content_type if keep else None
    return {
        "content_type": body.get("contentType", content_type),
        "metadata": custom_metadata({k: v for k, v in metadata.items() if v is not None}),
        "settings": {key: value for key, value in settings.items() if value is not None},
    }


def _range_of(request: HttpRequest) -> ContentRange | None:
    header = request.headers.get("content-range")
    return None if header is None else ContentRange.parse(header)


def _batch(request: HttpRequest, call: Callable[[HttpRequest], Response]) -> Response:
    """https://cloud.google.com/storage/docs/batch: calls without media, answered in order."""
    # Clients end lines in a batch with LF as well as CRLF. There are no media in it to be spoilt.
    lines_in = re.sub(rb"\r?\n", b"\r\n", request.body)
    parts = split_parts(lines_in, boundary_of(request.headers.get("content-type", "")))
    if len(parts) > MAX_BATCH_CALLS:
        raise invalid(f"The batch has {len(parts)} calls; at most {MAX_BATCH_CALLS} are allowed.")
    boundary = f"batch_{uuid.uuid4().hex}"
    lines: list[bytes] = []
    for headers, content in parts:
        inner = _inner_request(content, request.headers.get("host", "127.0.0.1"))
        response = call(inner)
        body = response.body if response.stream is None else b"".join(response.stream)
        lines.append(f"--{boundary}\r\nContent-Type: application/http\r\n".encode())
        if "content-id" in headers:
            content_id = headers["content-id"].strip("<>")
            lines.append(f"Content-ID: <response-{content_id}>\r\n".encode())
        status = f"\r\nHTTP/1.1 {response.status} {reason(response.status)}\r\n"
        fields = {**response.headers, "Content-Length": str(len(body))}
        lines.append(status.encode())
        lines += [f"{name}: {value}\r\n".encode("latin-1") for name, value in fields.items()]
        lines += [b"\r\n", body, b"\r\n"]
    lines.append(f"--{boundary}--\r\n".encode())
    headers = {"Content-Type": f"multipart/mixed; boundary={boundary}"}
    return Response(200, headers, b"".join(lines))


def _inner_request(content: bytes, host: str) -> HttpRequest:
    head, _, body = content.lstrip(b"\r\n").partition(b"\r\n\r\n")
    try:
        inner = parse_head(head.rstrip(b"\r\n"))
    except BadRequestError as exc:
        raise invalid(f"Failed to parse batch request: {exc}") from exc
    inner.body = body.rstrip()
    inner.body_bytes = len(inner.body)
    inner.headers.setdefault("host", host)
    return inner
