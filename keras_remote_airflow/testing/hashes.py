"""Hashes in headers and in metadata: base64 of CRC32C (big-endian) and of MD5."""

import base64
import binascii
from collections.abc import Mapping

from .errors import invalid

_LENGTHS = {"crc32c": 4, "md5": 16}


def hash_header(crc32c: str, md5: str | None) -> str:
    """The value of `x-goog-hash`."""
    return f"crc32c={crc32c}" if md5 is None else f"crc32c={crc32c},md5={md5}"


def declared_hashes(headers: Mapping[str, str], *, of_body: bool = False) -> dict[str, str]:
    """The hashes in `X-Goog-Hash`, by "crc32c" and "md5"; `of_body` adds `Content-MD5`.

    Raises:
        ApiError: 400 when one is not base64 of the right length.
    """
    declared: dict[str, str] = {}
    for part in headers.get("x-goog-hash", "").split(","):
        name, equals, value = part.strip().partition("=")
        if equals:
            declared[name.strip().lower()] = value.strip()
    if of_body and "content-md5" in headers:
        declared["md5"] = headers["content-md5"]
    return {name: checked_hash(declared[name], name) for name in _LENGTHS if name in declared}


def checked_hash(value: str, name: str) -> str:
    """Raise 400 unless `value` is base64 of a hash of that kind."""
    try:
        right = len(base64.b64decode(value, validate=True)) == _LENGTHS[name]
    except (binascii.Error, ValueError):
        right = False
    if not right:
        raise invalid(
            f"Invalid value for {name}: {value!r} is not base64 of {_LENGTHS[name]} bytes"
        )
    return value
