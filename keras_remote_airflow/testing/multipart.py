"""`multipart/related` uploads (RFC 2046): a part with metadata, then a part with the bytes.

Byte-exact: the line end before a delimiter belongs to the delimiter, everything else to the
part. Line ends are those of the first delimiter's line: CRLF, or LF, which gcsfs sends and Cloud
Storage takes.
"""

import functools
import re
from collections.abc import Callable

from .bodies import Spool
from .errors import ApiError, invalid

# Metadata of at most 8 KiB of keys and values fits many times over:
# https://cloud.google.com/storage/quotas#objects
MAX_METADATA_PART_BYTES = 1024 * 1024
# Spaces and a line end may follow a delimiter (RFC 2046, 5.1.1).
_AFTER_DELIMITER = re.compile(rb"--|[ \t]{0,64}\r?\n")
_AFTER_DELIMITER_BYTES = 66

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


@functools.lru_cache(maxsize=64)
def _before_media(boundary: bytes) -> re.Pattern[bytes]:
    """Matches everything up to the first byte of the media: line end, metadata, headers."""
    delimiter = b"--" + re.escape(boundary) + rb"[ \t]*"
    head = rb"(.*?\1)??\1"  # headers, or none, and an empty line
    pattern = rb"(?:\r?\n)?" + delimiter + rb"(\r?\n)" + head + rb"(.*?)\1" + delimiter + rb"\1"
    return re.compile(pattern + head, re.DOTALL)


class RelatedReader:
    """Reads an upload as it arrives.

    `open_media` gets the metadata's bytes and the media part's headers and returns where the
    media's bytes go. What it raises is kept, and raised by `end`.
    """

    def __init__(
        self, boundary: bytes, open_media: Callable[[bytes, dict[str, str]], Spool]
    ) -> None:
        self._boundary = boundary
        self._open_media = open_media
        self._buffer = b""  # what cannot be given away yet
        self._delimiter = b""
        self._media: Spool | None = None
        self._after_media: bytes | None = None  # what followed the delimiter after the media
        self._error: ApiError | None = None

    def write(self, data: bytes) -> None:
        if self._error is not None or self._after_media is not None:
            return
        self._buffer = self._buffer + data if self._buffer else data
        try:
            if self._media is None:
                self._read_metadata()
            if self._media is not None:
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
        if self._media is None or self._after_media not in (None, b"--"):
            raise invalid(
                "Malformed multipart body: expected a metadata part and a media part, no more."
            )
        if self._after_media is None:
            raise invalid("Malformed multipart body: the closing boundary is missing.")

    def _read_metadata(self) -> None:
        found = _before_media(self._boundary).match(self._buffer)
        if found is not None:
            newline, _, metadata, head = found.groups()
            self._delimiter = newline + b"--" + self._boundary
            self._buffer = self._buffer[found.end() :]
            self._media = self._open_media(metadata, _part_headers(head or b""))
        elif len(self._buffer) > MAX_METADATA_PART_BYTES:
            raise invalid("Malformed multipart body: no media part in the first MiB.")

    def _read_media(self, media: Spool) -> None:
        buffer, delimiter = self._buffer, self._delimiter
        at = -1
        while (at := buffer.find(delimiter, at + 1)) >= 0:
            after = _AFTER_DELIMITER.match(buffer, at + len(delimiter))
            if after is not None:
                self._after_media = after[0]
                media.write(buffer[:at])
                return
        # A delimiter may have begun at the end. Mostly none has, and then the slices copy nothing.
        at = max(0, len(buffer) - len(delimiter) - _AFTER_DELIMITER_BYTES)
        while (at := buffer.find(delimiter[:1], at)) >= 0:
            if buffer.startswith(delimiter, at) or delimiter.startswith(buffer[at:]):
                break
            at += 1
        ready = len(buffer) if at < 0 else at
        media.write(buffer[:ready])
        self._buffer = buffer[ready:]


def _part_headers(head: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in head.decode("latin-1").splitlines():
        name, colon, value = line.partition(":")
        if not colon:
            raise invalid(f"Malformed multipart body: header line {line!r}.")
        headers[name.strip().lower()] = value.strip()
    return headers
