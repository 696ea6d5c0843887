"""Resumable upload sessions: https://cloud.google.com/storage/docs/performing-resumable-uploads"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from .bodies import Spool
from .calls import Reply
from .errors import ApiError, invalid
from .objects import NewObject

COMMIT_BYTES = 256 * 1024  # chunks other than the last are multiples of this

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+|\*)|\*)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class ContentRange:
    """The header `Content-Range` of a PUT to a session.

    `first` is None for a body without bytes, which asks how far the upload is. `last` is None
    when the body is the rest of the object, `total` when it is not known yet.
    """

    first: int | None
    last: int | None
    total: int | None

    @classmethod
    def parse(cls, header: str) -> Self:
        found = _CONTENT_RANGE.fullmatch(header)
        if found is None:
            raise invalid("Failed to parse Content-Range header.")
        first, last, total = (
            int(text) if text is not None and text != "*" else None for text in found.groups()
        )
        if first is not None and last is not None and (last < first or last >= (total or last + 1)):
            raise invalid("Failed to parse Content-Range header.")
        return cls(first, last, total)


class SessionWrite:
    """The bytes of one PUT on their way into a session; stale once the next PUT has begun."""

    def __init__(
        self, session: "UploadSession", content_range: ContentRange | None, first: int
    ) -> None:
        self._session = session
        self._range = content_range
        self._start = session.persisted
        self._skip = session.persisted - first

    @property
    def _current(self) -> bool:
        return self._session.transfer is self

    def write(self, data: bytes) -> None:
        """Bytes as they arrive; those the session already has are skipped."""
        if self._current:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            self._session.spool.write(data[skipped:] if skipped else data)

    def abort(self) -> None:
        """The request broke off: what arrived is kept down to a multiple of 256 KiB."""
        if self._current:
            self._session.transfer = None
            self._session.spool.truncate(self._session.resumable_size)

    def end(self, body_bytes: int) -> bool:
        """The request's body is whole; True when the object is complete.

        Raises:
            ApiError: 400 when body and Content-Range disagree, or when a chunk that is not the
                last is no multiple of 256 KiB; nothing of this request is kept.
        """
        if not self._current:
            message = "Another request took over this upload."
            raise ApiError(503, "backendError", message, plain=True)
        self._session.transfer = None
        sent = self._range
        if sent is None or (sent.first is not None and sent.last is None):
            return True
        if sent.first is None or sent.last is None:
            return sent.total == self._session.persisted
        expected = sent.last - sent.first + 1
        is_last = sent.total == sent.last + 1
        if body_bytes == expected and (is_last or expected % COMMIT_BYTES == 0):
            return is_last
        self._session.spool.truncate(self._start)
        if body_bytes != expected:
            problem = (
                f"There were {body_bytes} byte(s) in the request body.  There should have been "
                f"{expected} byte(s) (starting at offset {sent.first} and ending at offset "
                f"{sent.last}) according to the Content-Range header."
            )
        else:
            problem = (
                "The number of bytes uploaded is required to be equal or greater than "
                f"{COMMIT_BYTES}, except for the final request (it's recommended to be the exact "
                f"multiple of {COMMIT_BYTES}).  The received request contained {expected} bytes, "
                "which does not meet this requirement."
            )
        raise ApiError(400, "badRequest", f"Invalid request.  {problem}", plain=True)


@dataclass(slots=True)
class UploadSession:
    """One upload: the bytes persisted so far, and what is to become of them.

    `query` is that of the request that began it: its preconditions and `fields` still hold at the
    end. `finished` is the answer to the last PUT, for clients that ask again.
    """

    bucket: str
    new: NewObject
    query: Mapping[str, str]
    spool: Spool
    declared_size: int | None
    transfer: SessionWrite | None = None
    finished: Reply | None = None

    @property
    def persisted(self) -> int:
        """Bytes received so far."""
        return self.spool.size

    @property
    def resumable_size(self) -> int:
        """Bytes that would survive if the current request broke off."""
        return self.persisted // COMMIT_BYTES * COMMIT_BYTES

    def status(self, headers: Mapping[str, str]) -> Reply:
        """The answer while bytes are missing: how many are there."""
        kept = self.resumable_size
        reply = Reply(308, {"Range": f"bytes=0-{kept - 1}"} if kept else {})
        if headers.get("x-guploader-no-308", "").lower() == "yes":
            reply.status = 200
            reply.headers["X-HTTP-Status-Code-Override"] = "308"
        return reply

    def finish(self, reply: Reply) -> None:
        """The object is made; the bytes are its own now."""
        self.finished = reply
        self.spool = Spool(None)

    def begin(self, content_range: ContentRange | None) -> SessionWrite:
        """A PUT begins, with bytes or without.

        A range that starts before the persisted size is taken and its known bytes are skipped;
        one that starts after it is refused with 503, as Cloud Storage does.
        """
        first = 0 if content_range is None else content_range.first
        if first is None:
            first = self.persisted
        elif self.transfer is not None:
            self.transfer.abort()
        if first > self.persisted:
            raise ApiError(
                503,
                "backendError",
                "Invalid request.  According to the Content-Range header, the upload offset is "
                f"{first} byte(s), which exceeds already uploaded size of "
                f"{self.persisted} byte(s).",
                plain=True,
            )
        total = None if content_range is None else content_range.total
        if None not in (total, self.declared_size) and total != self.declared_size:
            raise invalid(
                f"The total of {total} bytes in Content-Range is not the "
                f"{self.declared_size} bytes declared when the upload began."
            )
        transfer = SessionWrite(self, content_range, first)
        self.transfer = transfer
        return transfer
