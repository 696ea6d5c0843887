"""Uploads: where the bytes of a simple, a multipart or a resumable one go as they arrive.

https://cloud.google.com/storage/docs/uploads-downloads#uploads
"""

import uuid
from collections.abc import Mapping
from dataclasses import replace
from urllib.parse import quote, urlencode

from .bodies import Spool
from .buckets import Buckets
from .calls import Call, Receiver, Reply, parse_json
from .errors import ApiError, invalid, not_allowed, not_found
from .multipart import RelatedReader, boundary_of
from .objects import NewObject, declared_hashes, whole_number
from .resources import object_reply
from .resumable import ContentRange, SessionWrite, UploadSession
from .unsupported import refuse_object_settings


class Uploads:
    """Begins uploads and keeps the sessions of resumable ones."""

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._sessions: dict[str, UploadSession] = {}

    def close(self) -> None:
        """Drop unfinished uploads."""
        for session in self._sessions.values():
            session.spool.discard()
        self._sessions.clear()

    def receive(self, call: Call, bucket: str) -> Receiver:
        """Where the request's body goes. May raise ApiError."""
        if "upload_id" in call.query:
            return self._resume(call)
        upload_type = call.query.get("uploadType")
        if call.method in ("POST", "PUT"):
            if upload_type == "resumable":
                return Receiver(lambda: self._start_session(call, bucket), call.body.extend)
            if upload_type in ("media", "multipart"):
                media = _MediaUpload(self, call, bucket)
                return Receiver(media.answer, media.write, media.abort)
        raise invalid(f"Invalid upload request: {call.method} with uploadType {upload_type!r}")

    def open(self, call: Call, bucket: str, new: NewObject) -> Spool:
        """Where an object's bytes go, if it could be written now: a refused one costs nothing."""
        call.object_name = new.name
        self._buckets.check_write(bucket, new.name, call.query)
        return self._buckets.spool(bucket)

    def finish(
        self, call: Call, bucket: str, new: NewObject, spool: Spool, query: Mapping[str, str]
    ) -> Reply:
        """All bytes are there: make the object. After an ApiError the caller discards the bytes."""
        self._buckets.check_write(bucket, new.name, query)
        stored = self._buckets.put(bucket, new, spool)
        return object_reply(call, stored, self._buckets[bucket])

    # Sessions.

    def _start_session(self, call: Call, bucket: str) -> Reply:
        headers = call.headers
        new = _new_object(call, call.body).with_hashes(declared_hashes(headers))
        if new.content_type is None:
            new = replace(new, content_type=headers.get("x-upload-content-type"))
        upload_id = uuid.uuid4().hex
        self._sessions[upload_id] = UploadSession(
            bucket=bucket,
            new=new,
            query=call.query,
            spool=self.open(call, bucket, new),
            declared_size=whole_number(headers, "x-upload-content-length"),
        )
        query = {"uploadType": "resumable", "name": new.name, "upload_id": upload_id}
        if "userProject" in call.query:
            query["userProject"] = call.query["userProject"]
        path = (
            f"/upload/storage/v1/b/{quote(bucket)}/o?{urlencode(query, safe='', quote_via=quote)}"
        )
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
        header = call.headers.get("content-range")
        part = session.begin(None if header is None else ContentRange.parse(header))
        return Receiver(lambda: self._put(call, session, part), part.write, part.abort)

    def _cancel_session(self, call: Call) -> Reply:
        """https://cloud.google.com/storage/docs/performing-resumable-uploads#cancel-upload"""
        session = self._sessions.pop(call.query["upload_id"], None)
        if session is not None:
            session.spool.discard()
        return Reply(499)

    def _put(self, call: Call, session: UploadSession, part: SessionWrite) -> Reply:
        """The body of a PUT to a session is whole."""
        if not part.end(call.body_bytes):
            return session.status(call.headers)
        if "fields" in session.query:
            call.query.setdefault("fields", session.query["fields"])
        try:
            new = session.new.with_hashes(declared_hashes(call.headers, of_body=True))
            reply = self.finish(call, session.bucket, new, session.spool, session.query)
        except ApiError:
            self._cancel_session(call)
            raise
        session.finish(reply)
        return reply


class _MediaUpload:
    """A simple or a multipart upload: its whole body is one request's."""

    def __init__(self, uploads: Uploads, call: Call, bucket: str) -> None:
        self._uploads = uploads
        self._call = call
        self._bucket = bucket
        self._new: NewObject | None = None
        self._spool: Spool | None = None
        self._reader: RelatedReader | None = None
        content_type = call.headers.get("content-type")
        if call.query["uploadType"] == "multipart":
            self._reader = RelatedReader(boundary_of(content_type or ""), self._open_part)
        else:
            new = NewObject.from_resource({"contentType": content_type}, call.query)
            self._open(new.with_hashes(declared_hashes(call.headers, of_body=True)))

    def write(self, data: bytes) -> None:
        if self._reader is not None:
            self._reader.write(data)
        elif self._spool is not None:
            self._spool.write(data)

    def abort(self) -> None:
        if self._spool is not None:
            self._spool.discard()

    def answer(self) -> Reply:
        call = self._call
        try:
            if self._reader is not None:
                self._reader.end()
            if self._new is None or self._spool is None:
                raise invalid("The upload has no bytes.")
            return self._uploads.finish(call, self._bucket, self._new, self._spool, call.query)
        except ApiError:
            self.abort()
            raise

    def _open_part(self, metadata: bytes, headers: dict[str, str]) -> Spool:
        """The media part of a multipart upload begins."""
        new = _new_object(self._call, metadata).with_hashes(declared_hashes(self._call.headers))
        if new.content_type is None:
            new = replace(new, content_type=headers.get("content-type"))
        return self._open(new)

    def _open(self, new: NewObject) -> Spool:
        self._new = new
        self._spool = self._uploads.open(self._call, self._bucket, new)
        return self._spool


def _new_object(call: Call, metadata: bytes | bytearray) -> NewObject:
    """What the metadata of an upload says, as JSON, and its query."""
    resource = parse_json(metadata)
    refuse_object_settings(resource)
    return NewObject.from_resource(resource, call.query)
