"""Resumable upload sessions: https://cloud.google.com/storage/docs/performing-resumable-uploads"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .bodies import Spool
from .objects import ApiError, Preconditions, Upload, invalid

CHUNK_BYTES = 256 * 1024  # chunks other than the last are multiples of this

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class ContentRange:
    """`first` and `last` are None for a body without bytes, `total` when it is not known yet."""

    first: int | None
    last: int | None
    total: int | None

    @classmethod
    def parse(cls, header: str) -> ContentRange:
        found = _CONTENT_RANGE.fullmatch(header)
        if found is None:
            raise invalid("Failed to parse Content-Range header.")
        first, last = (None, None) if found[1] is None else (int(found[1]), int(found[2]))
        total = None if found[3] == "*" else int(found[3])
        if first is not None and last is not None and (last < first or last >= (total or last + 1)):
            raise invalid("Failed to parse Content-Range header.")
        return cls(first, last, total)


class PlainError(ApiError):
    """The upload endpoint answers some errors in plain text."""


class Transfer:
    """The bytes of one PUT on their way into a session; stale once the next PUT has begun."""

    def __init__(self, session: Session, content_range: ContentRange | None, first: int) -> None:
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
            raise PlainError(503, "backendError", "Another request took over this upload.")
        self._session.transfer = None
        content_range = self._range
        if content_range is None:
            return True
        if content_range.first is None or content_range.last is None:
            return content_range.total == self._session.persisted
        expected = content_range.last - content_range.first + 1
        problem = None
        if body_bytes != expected:
            problem = (
                f"Invalid request.  There were {body_bytes} byte(s) in the request body.  There "
                f"should have been {expected} byte(s) (starting at offset {content_range.first} "
                f"and ending at offset {content_range.last}) according to the Content-Range header."
            )
        elif content_range.total == content_range.last + 1:
            return True
        elif expected % CHUNK_BYTES:
            problem = (
                "Invalid request.  The number of bytes uploaded is required to be equal or greater "
                f"than {CHUNK_BYTES}, except for the final request (it's recommended to be the "
                f"exact multiple of {CHUNK_BYTES}).  The received request contained {expected} "
                "bytes, which does not meet this requirement."
            )
        if problem is not None:
            self._session.spool.truncate(self._start)
            raise PlainError(400, "badRequest", problem)
        return False


class Session:
    """One upload: the bytes persisted so far, and what is to become of them."""

    def __init__(
        self,
        bucket: str,
        upload: Upload,
        preconditions: Preconditions,
        spool: Spool,
        fields: str | None,
        declared_size: int | None,
    ) -> None:
        self.bucket = bucket
        self.upload = upload
        self.preconditions = preconditions
        self.fields = fields
        self.declared_size = declared_size
        self.spool = spool
        self.transfer: Transfer | None = None
        self.finished: dict[str, Any] | None = None

    @property
    def persisted(self) -> int:
        """Bytes received so far."""
        return self.spool.size

    @property
    def resumable_size(self) -> int:
        """Bytes that would survive if the current request broke off."""
        return self.persisted // CHUNK_BYTES * CHUNK_BYTES

    def finish(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Keep the answer for clients that ask again; the bytes are the object's now."""
        self.finished = answer
        self.spool = Spool(None)
        return answer

    def begin(self, content_range: ContentRange | None) -> Transfer:
        """A PUT begins, with bytes or without.

        A range that starts before the persisted size is taken and its known bytes are skipped;
        one that starts after it is refused with 503, as Cloud Storage does.
        """
        if content_range is None or content_range.first is not None:
            if self.transfer is not None:
                self.transfer.abort()
            first = 0 if content_range is None else content_range.first or 0
        else:
            first = self.persisted
        if first > self.persisted:
            raise PlainError(
                503,
                "backendError",
                "Invalid request.  According to the Content-Range header, the upload offset is "
                f"{first} byte(s), which exceeds already uploaded size of "
                f"{self.persisted} byte(s).",
            )
        total = None if content_range is None else content_range.total
        if None not in (total, self.declared_size) and total != self.declared_size:
            raise invalid(
                f"The total of {total} bytes in Content-Range is not the "
                f"{self.declared_size} bytes declared when the upload began."
            )
        transfer = Transfer(self, content_range, first)
        self.transfer = transfer
        return transfer
