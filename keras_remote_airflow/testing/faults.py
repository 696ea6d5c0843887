"""Misbehaviour on demand, and the log of what was asked.

A `Fault` matches requests by method and by a regular expression over the decoded path and query.
It counts the requests it matches: it fires from the `nth` on, `times` times.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Action = Literal["status", "drop_before", "drop_after", "stall", "truncate", "corrupt", "bad_hash"]
# What `StorageServer.deny` takes, and the permission a 403 then names
# (https://cloud.google.com/storage/docs/access-control/iam-permissions).
DENIABLE = {
    "overwrite": "storage.objects.delete",
    "delete": "storage.objects.delete",
    "create": "storage.objects.create",
    "get": "storage.objects.get",
    "list": "storage.objects.list",
    "update": "storage.objects.update",
    "bucket_get": "storage.buckets.get",
    "bucket_create": "storage.buckets.create",
}
# The log of a server that runs for days must not eat its memory.
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
            `truncate` closes the connection in the middle of the answer; `corrupt` flips one bit
            of a download; `bad_hash` sends a wrong `x-goog-hash` with a download. The last two
            match downloads only.
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
    """The rules in force, the denied permissions and the log. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[tuple[Fault, re.Pattern[str], list[int]]] = []
        self._log: deque[Request] = deque(maxlen=MAX_LOGGED_REQUESTS)
        self.denied: frozenset[str] = frozenset()

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._rules = [*self._rules, (fault, re.compile(fault.path), [0])]

    def clear(self) -> None:
        with self._lock:
            self._rules = []

    def match(self, method: str, target: str, *, download: bool) -> Fault | None:
        """Count a request, and return the first rule it sets off."""
        if not self._rules:
            return None
        hit: Fault | None = None
        with self._lock:
            for fault, pattern, count in self._rules:
                if fault.method and fault.method.upper() != method:
                    continue
                if fault.action in ("corrupt", "bad_hash") and not download:
                    continue
                if not pattern.search(target):
                    continue
                count[0] += 1
                over = count[0] - fault.nth
                if over >= 0 and (fault.times == 0 or over < fault.times) and hit is None:
                    hit = fault
        return hit

    def log(self, request: Request) -> None:
        self._log.append(request)

    def logged(self) -> list[Request]:
        return list(self._log)

    def clear_log(self) -> None:
        self._log.clear()

    def deny(self, *names: str) -> None:
        """Raises ValueError for a name that is not in `DENIABLE`."""
        for name in names:
            if name not in DENIABLE:
                raise ValueError(f"cannot deny {name!r}: choose from {', '.join(DENIABLE)}")
        self.denied |= frozenset(names)

    def allow_all(self) -> None:
        self.denied = frozenset()
