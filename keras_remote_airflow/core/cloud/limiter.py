"""How many requests may be in flight, and how many bytes they may hold in memory."""

import asyncio
import time
from collections import deque

_FIRST_LIMIT = 16
# Requests that are in flight together are refused together. That is one reason to halve the limit,
# not many.
_SECONDS_BETWEEN_HALVINGS = 1.0


class Limiter:
    """Additive increase, multiplicative decrease (AIMD).

    The limit doubles with each round of answers at first, and after the first decrease grows by one
    a round. It halves when the service asks for less, as Cloud Storage's guidance on ramping up
    wants (https://cloud.google.com/storage/docs/request-rate#ramp-up).

    Attributes:
        limit: how many requests may be in flight now.

    Args:
        maximum: the highest limit.
        max_bytes: bytes that all requests together may hold; one that holds more goes alone.
    """

    def __init__(self, maximum: int, max_bytes: int) -> None:
        self.limit = float(min(_FIRST_LIMIT, maximum))
        self._maximum = float(maximum)
        self._doubles_below = float(maximum)
        self._max_bytes = max_bytes
        self._requests = 0
        self._bytes = 0
        self._halved_at = 0.0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, size: int) -> None:
        """Wait for a place for a request that holds `size` bytes; give it back with `leave`."""
        if not self._waiting and self._fits(size):
            self._take(size)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(size)
            raise

    def leave(self, size: int) -> None:
        """Give a place back."""
        self._requests -= 1
        self._bytes -= size
        while self._waiting and (self._waiting[0][1].done() or self._fits(self._waiting[0][0])):
            waiting_size, turn = self._waiting.popleft()
            if not turn.done():
                self._take(waiting_size)
                turn.set_result(None)

    def increase(self) -> None:
        """Note that a request succeeded."""
        if self.limit < self._maximum:
            step = 1.0 if self.limit < self._doubles_below else 1.0 / self.limit
            self.limit = min(self._maximum, self.limit + step)

    def decrease(self) -> None:
        """Note that the service asked for fewer requests."""
        now = time.monotonic()
        if now - self._halved_at > _SECONDS_BETWEEN_HALVINGS:
            self._halved_at = now
            self.limit = self._doubles_below = max(1.0, self.limit / 2)

    def _fits(self, size: int) -> bool:
        return self._requests < self.limit and (
            not self._requests or self._bytes + size <= self._max_bytes
        )

    def _take(self, size: int) -> None:
        self._requests += 1
        self._bytes += size
