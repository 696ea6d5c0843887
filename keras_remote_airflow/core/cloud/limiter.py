"""How many requests may be in flight at a time."""

import asyncio
import time
from collections import deque

# CPU time over wall time of the thread that makes the requests: above the first it is busy, below
# the second it has time for more of them.
_BUSY, _IDLE = 0.9, 0.75
_ENOUGH = 32.0  # requests in flight, to keep the thread busy


class Limiter:
    """How many requests, and how many bytes held for them, may be in flight.

    The number doubles with each round of answers at first, then grows by one a round; it halves
    when the service asks for less (429, 503), which is what Cloud Storage's ramp-up guidance wants
    (https://cloud.google.com/storage/docs/request-rate#ramp-up). It sinks while the thread that
    makes the requests has no time left: more would only wait for it, and with 128 in flight each
    costs a fifth more than with 32, in caches missed and garbage looked for.

    Args:
        maximum: requests in flight at the most.
        max_bytes: bytes in flight at the most; a single larger request goes alone.
    """

    def __init__(self, maximum: int, max_bytes: int) -> None:
        self.limit = float(min(16, maximum))
        self._threshold = float(maximum)
        self._maximum = float(maximum)
        self._max_bytes = max_bytes
        self._requests = 0
        self._bytes = 0
        self._throttled_at = 0.0
        # The answers left of this round, the clocks when it began, and CPU time over wall time of
        # the last one.
        self._answers = 0
        self._wall = self._cpu = self._busy = 0.0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def _fits(self, size: int) -> bool:
        return self._requests < self.limit and (
            not self._requests or self._bytes + size <= self._max_bytes
        )

    def has_room(self) -> bool:
        """Tell whether more than the next request would get a place at once."""
        return not self.is_crowded() and self._requests + 1 < self.limit

    def is_crowded(self) -> bool:
        """Tell whether requests wait for a place."""
        return any(not turn.done() for _, turn in self._waiting)

    async def enter(self, size: int) -> None:
        """Take a place for a request that keeps `size` bytes in memory, as soon as one is free.

        Whoever took one calls `leave`.
        """
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

    def _take(self, size: int) -> None:
        self._requests += 1
        self._bytes += size

    def leave(self, size: int) -> None:
        """Give a place back."""
        self._requests -= 1
        self._bytes -= size
        while self._waiting and (self._waiting[0][1].done() or self._fits(self._waiting[0][0])):
            waiting_size, turn = self._waiting.popleft()
            if not turn.done():
                self._take(waiting_size)
                turn.set_result(None)

    def succeeded(self) -> None:
        self._answers -= 1
        if self._answers <= 0:
            self._begin_round()
            if self._busy > _BUSY:
                self.limit = max(min(_ENOUGH, self.limit), 0.75 * self.limit)
        if self.limit < self._maximum and self._busy < _IDLE:
            more = 1.0 if self.limit < self._threshold else 1.0 / self.limit
            self.limit = min(self._maximum, self.limit + more)

    def _begin_round(self) -> None:
        wall, cpu = time.monotonic(), time.thread_time()
        self._busy = (cpu - self._cpu) / max(wall - self._wall, 1e-6)
        self._answers, self._wall, self._cpu = int(self.limit), wall, cpu

    def throttled(self) -> None:
        # All requests of one round hear the same "too many": that is one reason to halve.
        now = time.monotonic()
        if now - self._throttled_at > 1.0:
            self._throttled_at = now
            self.limit = self._threshold = max(1.0, self.limit / 2)
