"""Where the body of a request goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .calls import Answer, Call


class Receiver(Protocol):
    """Takes the body of one request as it arrives, and then answers it."""

    def write(self, data: bytes) -> None: ...

    def abort(self) -> None:
        """The rest will not come."""

    def answer(self) -> Answer:
        """The body is whole. May raise ApiError."""


class WholeBody:
    """Collects a body that is needed whole for the answer."""

    def __init__(self, call: Call, answer: Callable[[], Answer]) -> None:
        self._call = call
        self.answer = answer

    def write(self, data: bytes) -> None:
        self._call.body += data

    def abort(self) -> None:
        """Nothing was done yet."""


class UnusedBody:
    """Drops a body on which the answer does not depend."""

    def __init__(self, answer: Callable[[], Answer]) -> None:
        self.answer = answer

    def write(self, data: bytes) -> None:
        """Nothing is kept."""

    def abort(self) -> None:
        """Nothing was done yet."""


class Refusal(UnusedBody):
    """The answer is an error, whatever the body says."""

    def __init__(self, error: Exception) -> None:
        def refuse() -> Answer:
            raise error

        super().__init__(refuse)
