"""Multipart bodies: `multipart/related` uploads and `multipart/mixed` batches (RFC 2046).

Byte-exact: the CRLF before a delimiter belongs to the delimiter, everything else to the part.
"""

from __future__ import annotations

import functools
import re

from .objects import invalid

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


def split_parts(body: bytes, boundary: bytes) -> list[tuple[dict[str, str], bytes]]:
    """Headers (in lower case) and content of each part.

    Raises:
        ApiError: 400 when the body is not closed or a part is malformed.
    """
    delimiter = b"--" + boundary
    if body.startswith(delimiter):
        at = len(delimiter)
    else:
        start = body.find(b"\r\n" + delimiter)
        if start < 0:
            raise invalid("Malformed multipart body: the boundary does not occur.")
        at = start + 2 + len(delimiter)
    parts = []
    while body[at : at + 2] != b"--":
        line_end = body.find(b"\r\n", at)
        if line_end < 0 or body[at:line_end].strip(b" \t"):
            raise invalid("Malformed multipart body: text after a boundary.")
        end = body.find(b"\r\n" + delimiter, line_end)
        if end < 0:
            raise invalid("Malformed multipart body: the closing boundary is missing.")
        parts.append(_part(body, line_end + 2, end))
        at = end + 2 + len(delimiter)
    return parts


def _part(body: bytes, start: int, end: int) -> tuple[dict[str, str], bytes]:
    if body[start : start + 2] == b"\r\n":  # no headers
        return {}, body[start + 2 : end]
    head_end = body.find(b"\r\n\r\n", start, end + 2)
    if head_end < 0:
        raise invalid("Malformed multipart body: a part without an empty line after its headers.")
    return part_headers(body[start:head_end]), body[head_end + 4 : end]


def part_headers(head: bytes) -> dict[str, str]:
    headers = {}
    for line in head.decode("latin-1").split("\r\n"):
        name, colon, value = line.partition(":")
        if not colon:
            raise invalid(f"Malformed multipart body: header line {line!r}.")
        headers[name.strip().lower()] = value.strip()
    return headers
