"""`multipart/related` uploads (RFC 2046).

Byte-exact: the line end before a delimiter belongs to the delimiter, everything else to the
part. Line ends are those of the first delimiter's line: CRLF, or LF, which gcsfs sends and Cloud
Storage takes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from .bodies import Spool
from .errors import ApiError, invalid

# Metadata of at most 8 KiB of keys and values fits many times over:
# https://cloud.google.com/storage/quotas#objects
MAX_METADATA_PART_BYTES = 1024 * 1024

_BOUNDARY = re.compile(
    r""";\s*boundary=(?:"([^"]+)"|'([^']+)'|([^;\s"']+))""",
    re.IGNORECASE,
)


@functools.lru_cache(maxsize=64)
def boundary_of(content_type: str) -> bytes:
    """The boundary of a multipart content type.

    Single quotes are no quotes in RFC 2045, but clients send them and Cloud Storage takes them.

    Raises:
        ApiError: 400 when there is none.
    """
    found = _BOUNDARY.search(content_type)
    if not content_type.lower().startswith("multipart/") or found is None:
        raise invalid(f"Invalid multipart content type {content_type!r}: no boundary.")
    return (found[1] or found[2] or found[3]).encode("latin-1")


class RelatedReader:
    """Reads a `multipart/related` upload as it arrives: a metadata part, then a media part.

    `open_media` gets the metadata's bytes and the media part's headers and returns where the
    media's bytes go. What it raises is kept, and raised by `end`.
    """

    def __init__(
        self, boundary: bytes, open_media: Callable[[bytes, dict[str, str]], Spool]
    ) -> None:
        self._boundary = boundary
        self._open_media = open_media
        self._buffer = b""  # what cannot be given away yet
        self._newline = b"\r\n"
        self._media: Spool | None = None
        self._closed = False
        self._error: ApiError | None = None

    def write(self, data: bytes) -> None:
        if self._error is not None:
            return
        self._buffer = self._buffer + data if self._buffer else data
        try:
            if self._media is None:
                self._read_metadata()
            if self._media is not None and not self._closed:
                self._read_media(self._media)
        except ApiError as exc:
            self._error = exc

    def end(self) -> None:
        """The body is whole.

        Raises:
            ApiError: 400 for a malformed body, or whatever `open_media` raised.
        """
        if self._error is not None:
            raise self._error
        if self._media is None:
            raise invalid("Multipart uploads have a metadata part and a media part.")
        if not self._closed:
            raise invalid("Malformed multipart body: the closing boundary is missing.")
        if self._buffer[:2] != b"--":
            raise invalid("Multipart uploads have a metadata part and a media part, not more.")

    def _read_metadata(self) -> None:
        """Everything up to the first byte of the media, once it is there."""
        delimiter = b"--" + self._boundary
        start = re.match(rb"\r?\n|", self._buffer)
        at = 0 if start is None else start.end()
        end = self._buffer.find(b"\n", at)
        if end >= 0:
            line = self._buffer[at:end]
            if line.rstrip(b" \t\r") != delimiter:
                raise invalid("Malformed multipart body: it does not begin with the boundary.")
            self._newline = newline = b"\r\n" if line.endswith(b"\r") else b"\n"
            head_end, start_of_metadata = self._head(end + 1)
            metadata_end = self._find_delimiter(start_of_metadata) if head_end >= 0 else -1
            if metadata_end >= 0:
                line_end = self._buffer.find(b"\n", metadata_end + len(newline))
                head_end, media_start = self._head(line_end + 1)
                if head_end >= 0:
                    headers = _part_headers(self._buffer[line_end + 1 : head_end])
                    metadata = self._buffer[start_of_metadata:metadata_end]
                    self._buffer = self._buffer[media_start:]
                    self._media = self._open_media(metadata, headers)
                    return
        if len(self._buffer) > MAX_METADATA_PART_BYTES:
            raise invalid("Malformed multipart body: no media part in the first MiB.")

    def _head(self, at: int) -> tuple[int, int]:
        """Where a part's headers end and its content begins; -1 when that has not arrived."""
        newline = self._newline
        if self._buffer[at : at + len(newline)] == newline:
            return at, at + len(newline)
        end = self._buffer.find(newline * 2, at)
        return end, end + 2 * len(newline)

    def _read_media(self, media: Spool) -> None:
        buffer = self._buffer
        at = self._find_delimiter(0)
        if at >= 0:
            media.write(buffer[:at])
            self._buffer = buffer[at + len(self._newline) + 2 + len(self._boundary) :]
            self._closed = True
            return
        # A delimiter may have begun in what was not written yet.
        ready = -at - 1
        if ready > 0:
            media.write(buffer[:ready])  # mostly all of it, and then the slice is no copy
            self._buffer = buffer[ready:]

    def _find_delimiter(self, at: int) -> int:
        """Where the next delimiter begins; if there is none, -1 - n with n bytes free of it."""
        buffer = self._buffer
        delimiter = self._newline + b"--" + self._boundary
        while True:
            at = buffer.find(delimiter, at)
            if at < 0:
                return -1 - self._partial_delimiter(delimiter)
            follows = buffer[at + len(delimiter) : at + len(delimiter) + 64]
            if follows.startswith(b"--") or re.match(rb"[ \t]*\r?\n", follows):
                return at
            if re.fullmatch(rb"-|[ \t]*\r?", follows):
                return -1 - at  # too early to tell
            at += 1

    def _partial_delimiter(self, delimiter: bytes) -> int:
        """Where at the end of the buffer a delimiter may have begun; else the buffer's length."""
        buffer = self._buffer
        at = buffer.find(delimiter[:1], max(0, len(buffer) - len(delimiter) + 1))
        while at >= 0 and not delimiter.startswith(buffer[at:]):
            at = buffer.find(delimiter[:1], at + 1)
        return len(buffer) if at < 0 else at


def _part_headers(head: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    if not head:
        return headers
    for line in head.decode("latin-1").split("\r\n"):
        name, colon, value = line.partition(":")
        if not colon:
            raise invalid(f"Malformed multipart body: header line {line!r}.")
        headers[name.strip().lower()] = value.strip()
    return headers
