"""Uploads: simple, multipart and resumable ones.

https://cloud.google.com/storage/docs/uploads-downloads#uploads. The bytes of a simple or a
resumable upload go to their object's body as they arrive. A multipart upload, which clients use for
small files, is taken apart when it is whole.
"""

import functools
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple
from urllib.parse import quote, urlencode

from .bodies import Body
from .buckets import Buckets
from .calls import Call, Receiver, Reply, parse_json
from .errors import ApiError, invalid, not_allowed, not_found
from .fields import Tree
from .objects import NewObject, hashes_in, whole_number
from .resources import object_reply
from .unsupported import refuse_object_settings

COMMIT_BYTES = 256 * 1024  # chunks of a resumable upload but the last are multiples of this

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+|\*)|\*)/(\d+|\*)")
# Single quotes are no quotes in RFC 2045, but clients send them and Cloud Storage takes them.
_BOUNDARY = re.compile(
    r"""multipart/.*;\s*boundary=(?:"([^"]+)"|'([^']+)'|([^;\s"']+))""", re.IGNORECASE
)
# What may follow a delimiter (RFC 2046, 5.1.1).
_AFTER_DELIMITER = re.compile(rb"--|[ \t]*\r?\n")
_PART_TYPE = re.compile(rb"^content-type:[ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)


class Uploads:
    """Receives uploads and keeps the sessions of resumable ones."""

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._sessions: dict[str, _Session] = {}

    def close(self) -> None:
        """Drop unfinished uploads."""
        for session in self._sessions.values():
            session.body.discard()
        self._sessions.clear()

    def receive(self, call: Call, bucket: str) -> Receiver:
        """Where the request's body goes. May raise ApiError."""
        if "upload_id" in call.query:
            return self._resume(call)
        upload_type = call.query.get("uploadType")
        if call.method in ("POST", "PUT"):
            if upload_type == "resumable":
                return Receiver(lambda: self._start_session(call, bucket), call.body.extend)
            if upload_type == "multipart":
                return Receiver(lambda: self._multipart(call, bucket), call.body.extend)
            if upload_type == "media":
                resource = {"contentType": call.headers.get("content-type")}
                new = NewObject.from_resource(resource, call.query)
                new = new.with_hashes(hashes_in(call.headers, of_body=True))
                body = self._open(call, bucket, new)
                return Receiver(
                    lambda: self._finish(call, bucket, new, body, call.query),
                    body.write,
                    body.discard,
                )
        raise invalid(f"Invalid upload request: {call.method} with uploadType {upload_type!r}")

    def _multipart(self, call: Call, bucket: str) -> Reply:
        metadata, content_type, media = _split(call.body, call.headers.get("content-type", ""))
        new = _new_object(call, metadata, content_type)
        body = self._open(call, bucket, new)
        body.write(media)
        return self._finish(call, bucket, new, body, call.query)

    def _open(self, call: Call, bucket: str, new: NewObject) -> Body:
        """Where an object's bytes go, if it could be written now: a refused one costs nothing."""
        call.object_name = new.name
        self._buckets.check_write(bucket, new.name, call.query)
        return self._buckets.new_body(bucket)

    def _finish(
        self, call: Call, bucket: str, new: NewObject, body: Body, query: Mapping[str, str]
    ) -> Reply:
        """All bytes are there: make the object."""
        try:
            self._buckets.check_write(bucket, new.name, query)
            stored = self._buckets.put(bucket, new, body)
        except ApiError:
            body.discard()
            raise
        return object_reply(call, stored, self._buckets[bucket])

    # Sessions: https://cloud.google.com/storage/docs/performing-resumable-uploads

    def _start_session(self, call: Call, bucket: str) -> Reply:
        new = _new_object(call, call.body, call.headers.get("x-upload-content-type"))
        upload_id = uuid.uuid4().hex
        self._sessions[upload_id] = _Session(
            bucket=bucket,
            new=new,
            query=call.query,
            field_tree=call.field_tree,
            body=self._open(call, bucket, new),
            declared_size=whole_number(call.headers, "x-upload-content-length"),
        )
        query = {"uploadType": "resumable", "name": new.name, "upload_id": upload_id}
        if "userProject" in call.query:
            query["userProject"] = call.query["userProject"]
        path = f"/upload/storage/v1/b/{bucket}/o?{urlencode(query, safe='', quote_via=quote)}"
        headers = {"Location": call.base_url + path, "X-GUploader-UploadID": upload_id}
        return Reply(200, headers)

    def _resume(self, call: Call) -> Receiver:
        session = self._sessions.get(call.query["upload_id"])
        if session is None:
            raise not_found("No such upload session; start a new one.")
        call.object_name = session.new.name
        if call.method == "DELETE":
            return Receiver(lambda: self._cancel_session(call))
        if call.method not in ("PUT", "POST"):  # gcsfs sends its chunks with POST
            raise not_allowed(call.method)
        if session.finished is not None:
            finished = session.finished
            return Receiver(lambda: finished)
        if session.transfer is not None:
            session.transfer.abort()
        part = session.transfer = _SessionWrite(session, call.headers.get("content-range"))
        return Receiver(lambda: self._put(call, session, part), part.write, part.abort)

    def _cancel_session(self, call: Call) -> Reply:
        session = self._sessions.pop(call.query["upload_id"], None)
        if session is not None:
            session.body.discard()
        return Reply(499)

    def _put(self, call: Call, session: "_Session", part: "_SessionWrite") -> Reply:
        """The body of a PUT to a session is whole."""
        if not part.end(call.body_bytes):
            return session.status(call.headers)
        call.field_tree = call.field_tree or session.field_tree
        try:
            new = session.new.with_hashes(hashes_in(call.headers, of_body=True))
            reply = self._finish(call, session.bucket, new, session.body, session.query)
        except ApiError:
            self._cancel_session(call)
            raise
        session.finished = reply
        session.body = Body()  # the bytes are the object's own now
        return reply


@dataclass(slots=True)
class _Session:
    """One upload: the bytes received so far, and what is to become of them.

    `query` and `field_tree` are those of the request that began it: they still hold at the end.
    `finished` is the answer to the last PUT, for clients that ask again.
    """

    bucket: str
    new: NewObject
    query: Mapping[str, str]
    field_tree: Tree
    body: Body
    declared_size: int | None
    transfer: "_SessionWrite | None" = None
    finished: Reply | None = None

    @property
    def resumable_size(self) -> int:
        """Bytes that would survive if the current request broke off."""
        return self.body.size // COMMIT_BYTES * COMMIT_BYTES

    def status(self, headers: Mapping[str, str]) -> Reply:
        """The answer while bytes are missing: how many are there."""
        kept = self.resumable_size
        reply = Reply(308, {"Range": f"bytes=0-{kept - 1}"} if kept else {})
        if headers.get("x-guploader-no-308", "").lower() == "yes":
            reply.status = 200
            reply.headers["X-HTTP-Status-Code-Override"] = "308"
        return reply


class _SessionWrite:
    """One PUT to a session; stale once the next one has begun.

    Its `Content-Range` may say `*` for the first byte (the body is empty: how far is the upload?),
    for the last (the body is the rest of the object) and for the total (not known yet). A range
    that starts before the received size is taken and its known bytes are skipped; one that starts
    after it is refused with 503, as Cloud Storage does.
    """

    def __init__(self, session: _Session, content_range: str | None) -> None:
        self._session = session
        self._start = session.body.size
        found = _CONTENT_RANGE.fullmatch("bytes 0-*/*" if content_range is None else content_range)
        if found is None:
            raise invalid("Failed to parse Content-Range header.")
        self._first, self._last, self._total = (
            None if text in (None, "*") else int(text) for text in found.groups()
        )
        first = self._start if self._first is None else self._first
        self._skip = self._start - first
        if self._last is not None and not first <= self._last < (self._total or self._last + 1):
            raise invalid("Failed to parse Content-Range header.")
        if self._skip < 0:
            raise ApiError(
                503,
                "backendError",
                "Invalid request.  According to the Content-Range header, the upload offset is "
                f"{first} byte(s), which exceeds already uploaded size of {self._start} byte(s).",
                plain=True,
            )
        if None not in (self._total, session.declared_size) and (
            self._total != session.declared_size
        ):
            raise invalid(
                f"The total of {self._total} bytes in Content-Range is not the "
                f"{session.declared_size} bytes declared when the upload began."
            )

    def write(self, data: bytes) -> None:
        """Bytes as they arrive; those the session already has are skipped."""
        if self._session.transfer is self:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            self._session.body.write(data[skipped:])

    def abort(self) -> None:
        """The request broke off: what arrived is kept down to a multiple of 256 KiB."""
        if self._session.transfer is self:
            self._session.transfer = None
            self._session.body.truncate(self._session.resumable_size)

    def end(self, body_bytes: int) -> bool:
        """The request's body is whole; True when the object is complete.

        Raises:
            ApiError: 400 when body and Content-Range disagree, or when a chunk that is not the
                last is no multiple of 256 KiB; nothing of this request is kept.
        """
        if self._session.transfer is not self:
            message = "Another request took over this upload."
            raise ApiError(503, "backendError", message, plain=True)
        self._session.transfer = None
        if self._first is None:
            return self._total == self._session.body.size
        if self._last is None:
            return True
        expected = self._last - self._first + 1
        is_last = self._total == self._last + 1
        if body_bytes == expected and (is_last or expected % COMMIT_BYTES == 0):
            return is_last
        self._session.body.truncate(self._start)
        problem = (
            f"There were {body_bytes} byte(s) in the request body.  There should have been "
            f"{expected} byte(s)."
            if body_bytes != expected
            else f"A chunk of {expected} bytes that is not the last must be a multiple of "
            f"{COMMIT_BYTES} bytes."
        )
        raise ApiError(400, "badRequest", f"Invalid request.  {problem}", plain=True)


def _new_object(call: Call, metadata: bytes | bytearray, content_type: str | None) -> NewObject:
    """What the metadata of an upload says, as JSON, and its query and headers."""
    resource = parse_json(metadata)
    refuse_object_settings(resource)
    declared = {"crc32c": resource.get("crc32c"), "md5": resource.get("md5Hash")}
    new = NewObject.from_resource(resource, call.query).with_hashes(declared)
    new = new.with_hashes(hashes_in(call.headers))
    return new if new.content_type is not None else replace(new, content_type=content_type)


def _malformed() -> ApiError:
    return invalid(
        "Malformed multipart body: expected a metadata part, a media part and the closing "
        "boundary, no more."
    )


@functools.lru_cache(maxsize=64)
def _first_delimiter(content_type: str) -> tuple[re.Pattern[bytes], bytes]:
    """What a multipart body begins with, and all its delimiters but their line ends."""
    found = _BOUNDARY.match(content_type)
    if found is None:
        raise invalid(f"Invalid multipart content type {content_type!r}: no boundary.")
    delimiter = b"--" + (found[1] or found[2] or found[3]).encode("latin-1")
    return re.compile(rb"(?:\r?\n)?" + re.escape(delimiter) + rb"[ \t]*(\r?\n)"), delimiter


class _Part(NamedTuple):
    head: bytes
    content: bytes
    is_last: bool
    next: int  # where the next part begins


def _part(body: bytearray, start: int, newline: bytes, delimiter: bytes) -> _Part:
    """The part at `start`: headers, or none, then an empty line, then everything else."""
    if body.startswith(newline, start):
        empty, content = start, start + len(newline)
    else:
        empty = body.find(newline * 2, start)
        content = empty + 2 * len(newline)
    at, after = content - 1, None
    while empty >= 0 and after is None and (at := body.find(delimiter, at + 1)) >= 0:
        after = _AFTER_DELIMITER.match(body, at + len(delimiter))
    if after is None:
        raise _malformed()
    media = bytes(memoryview(body)[content:at])
    return _Part(bytes(body[start:empty]), media, after[0] == b"--", after.end())


def _split(body: bytearray, content_type: str) -> tuple[bytes, str | None, bytes]:
    """Metadata, and content type and bytes of the media in a `multipart/related` body (RFC 2046).

    Byte-exact: the line end before a delimiter belongs to the delimiter. Line ends are those of
    the first delimiter: CRLF, or LF, which gcsfs sends and Cloud Storage takes.
    """
    beginning, delimiter = _first_delimiter(content_type)
    found = beginning.match(body)
    if found is None:
        raise _malformed()
    newline, start = found[1], found.end()
    metadata = _part(body, start, newline, newline + delimiter)
    media = _part(body, metadata.next, newline, newline + delimiter)
    if metadata.is_last or not media.is_last:
        raise _malformed()
    part_type = _PART_TYPE.search(media.head)
    return metadata.content, part_type and part_type[1].decode("latin-1").strip(), media.content
