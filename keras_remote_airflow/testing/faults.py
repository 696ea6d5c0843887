"""Misbehaviour on demand, and the log of what was asked.

A `Fault` matches requests by method and by a regular expression over the decoded path and query.
It counts the requests it matches: it fires from the `nth` on, `times` times.
"""

import re
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import unquote

from .calls import Call

Action = Literal[
    "status", "drop_before", "drop_after", "stall", "truncate", "garbage", "corrupt", "bad_hash"
]
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
# A server that runs for days must not fill the memory with its log.
MAX_LOGGED_REQUESTS = 250_000


@dataclass(frozen=True)
class Fault:
    """One rule.

    Args:
        method: the HTTP method, or "" for any.
        path: a regular expression searched in the decoded path and query.
        nth: the first matching request that is hit, counted from 1.
        times: how many matching requests are hit from there on; 0 means all.
        status: for `action="status"`: answer with this status and do nothing else. With None the
            request is served normally, only later (`latency`) or with other `headers`.
        action: `status`; `drop_before` closes the connection before anything is stored (with
            `after_bytes`: when that many bytes of the request body have arrived, and a shorter
            one is served); `drop_after` does all the work, then closes the connection without an
            answer; `stall` does the work and never answers (with `after_bytes`: stops in the
            middle of the answer);
            `truncate` closes the connection in the middle of the answer; `garbage` does the work
            and answers with bytes that are not HTTP; `corrupt` flips one bit of a download;
            `bad_hash` sends a wrong `x-goog-hash` with a download. The last two match downloads
            only.
        latency: seconds to wait before answering, in addition to the server's own.
        headers: added to the answer, replacing those of the same name.
        after_bytes: where to stop, in bytes of the body; the default is half of an answer.
    """

    method: str = ""
    path: str = ""
    nth: int = 1
    times: int = 1
    status: int | None = None
    action: Action = "status"
    latency: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)
    after_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.nth < 1 or self.times < 0:
            raise ValueError(f"nth counts from 1 and times from 0: {self}")
        re.compile(self.path)
        if _CONTROLS.search("".join([*self.headers, *self.headers.values()])):
            raise ValueError(f"a header has no control characters; try action='garbage': {self}")

    @property
    def injects_status(self) -> bool:
        """Whether the request is answered with `status` and nothing else is done."""
        return self.action == "status" and self.status is not None

    @property
    def is_silent(self) -> bool:
        """Whether no byte of an answer is sent."""
        return self.action == "drop_after" or (
            self.action in ("drop_before", "stall") and self.after_bytes is None
        )


@dataclass(slots=True)
class Request:
    """One request as it was logged; `status` is None when no answer was sent.

    `path` is percent-decoded. `body_bytes` counts what arrived of the request's body.
    """

    method: str
    path: str
    query: dict[str, str]
    object_name: str | None
    status: int | None
    body_bytes: int


class Faults:
    """The rules in force and the log. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[tuple[Fault, re.Pattern[str], list[int]]] = []
        self._log: deque[Request] = deque(maxlen=MAX_LOGGED_REQUESTS)

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._rules = [*self._rules, (fault, re.compile(fault.path), [0])]

    def clear(self) -> None:
        with self._lock:
            self._rules = []

    def match(self, call: Call) -> Fault | None:
        """Count a request, and return the first rule it sets off."""
        if not self._rules:
            return None
        target = call.decoded_target
        hit: Fault | None = None
        with self._lock:
            for fault, pattern, count in self._rules:
                if fault.method and fault.method.upper() != call.method:
                    continue
                if fault.action in ("corrupt", "bad_hash") and not call.is_download:
                    continue
                if not pattern.search(target):
                    continue
                count[0] += 1
                over = count[0] - fault.nth
                if over >= 0 and (fault.times == 0 or over < fault.times) and hit is None:
                    hit = fault
        return hit

    def log(self, call: Call, status: int | None) -> None:
        self._log.append(
            Request(
                method=call.method,
                path=unquote(call.path),
                query=call.query,
                object_name=call.object_name,
                status=status,
                body_bytes=call.body_bytes,
            )
        )

    def logged(self) -> list[Request]:
        return list(self._log)

    def clear_log(self) -> None:
        self._log.clear()
