"""A request and the reply to it as the API sees them, without sockets."""

import json
from collections.abc import Callable, Iterable
from dataclasses import InitVar, dataclass, field
from typing import Any
from urllib.parse import unquote, unquote_plus

from .errors import ApiError
from .fields import Tree, select

_JSON = {"Content-Type": "application/json; charset=UTF-8"}
_PLAIN = {"Content-Type": "text/plain; charset=UTF-8"}


@dataclass(slots=True)
class Call:
    """One request, from a connection or from a batch; header names are in lower case.

    `path` is still percent-encoded: an object name may contain `%2F`, so the path must be split
    at its slashes before it is decoded. `body` stays empty for uploads. `object_name` is filled
    in for the log once it is known, `field_tree` from the parameter `fields` once it is checked.
    """

    method: str
    target: InitVar[str]
    headers: dict[str, str]
    body: bytearray = field(default_factory=bytearray)
    body_bytes: int = 0
    object_name: str | None = None
    field_tree: Tree = field(default_factory=dict)
    path: str = field(init=False)
    query_string: str = field(init=False)
    query: dict[str, str] = field(init=False)

    def __post_init__(self, target: str) -> None:
        if not target.startswith("/"):  # a whole URL, as clients send it in batches
            target = "/" + "/".join(target.split("/")[3:])
        self.path, _, self.query_string = target.partition("?")
        # Of a repeated name the last value is kept.
        pairs = (pair.partition("=") for pair in self.query_string.split("&") if pair)
        self.query = {unquote_plus(name): unquote_plus(value) for name, _, value in pairs}

    @property
    def parts(self) -> list[str]:
        """The decoded parts of the path."""
        return [unquote(part) for part in self.path.split("/")[1:]]

    @property
    def decoded_target(self) -> str:
        """Path and query as a person reads them, for matching and for logs."""
        query = f"?{unquote_plus(self.query_string)}" if self.query_string else ""
        return unquote(self.path) + query

    @property
    def reads(self) -> bool:
        return self.method in ("GET", "HEAD")

    @property
    def is_download(self) -> bool:
        return self.method == "GET" and self.query.get("alt") == "media"

    @property
    def base_url(self) -> str:
        return f"http://{self.headers.get('host', '127.0.0.1')}"


@dataclass(slots=True)
class Reply:
    """What is answered: `body`, or a `stream` of `length` bytes."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    stream: Iterable[bytes] | None = None
    length: int = -1

    def __post_init__(self) -> None:
        if self.stream is None:
            self.length = len(self.body)

    @property
    def pieces(self) -> Iterable[bytes]:
        return (self.body,) if self.stream is None else self.stream


def _ignore(*_: object) -> None:
    """Do nothing."""


@dataclass(frozen=True, slots=True)
class Receiver:
    """Where the body of one request goes as it arrives, and how the request is answered then.

    `abort` is called when the rest of the body will not come. `answer` may raise ApiError. By
    default the body is dropped.
    """

    answer: Callable[[], Reply]
    write: Callable[[bytes], object] = _ignore
    abort: Callable[[], object] = _ignore


def parse_json(data: bytes | bytearray) -> dict[str, Any]:
    """A JSON object; nothing and `null` count as an empty one."""
    if not data.strip():
        return {}
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise ApiError(400, "parseError", f"Parse Error: {exc}") from exc
    if value is not None and not isinstance(value, dict):
        raise ApiError(400, "parseError", "Parse Error: expected a JSON object")
    return value or {}


def json_reply(call: Call, value: dict[str, Any], **headers: str) -> Reply:
    """200, with what the call's `fields` select."""
    chosen = select(value, call.field_tree)
    body = json.dumps(chosen, ensure_ascii=False).encode(errors="replace")
    return Reply(200, {**_JSON, **headers}, body)


def error_reply(exc: ApiError, *, plain: bool = False) -> Reply:
    if exc.status == 304:
        return Reply(304)
    if plain or exc.plain:
        return Reply(exc.status, {**_PLAIN, **exc.headers}, exc.message.encode())
    detail = {"message": exc.message, "domain": "global", "reason": exc.reason}
    if exc.status == 412:
        detail |= {"locationType": "header", "location": "If-Match"}
    error = {"error": {"code": exc.status, "message": exc.message, "errors": [detail]}}
    return Reply(exc.status, _JSON, json.dumps(error).encode())
