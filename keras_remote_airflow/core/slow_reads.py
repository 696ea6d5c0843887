"""Whether reading files keeps a thread waiting, so that several threads should read at once.

Files in memory are read fastest by one thread; files on a slow disk by many threads. The same rule
serves hashing and sending: three slow reads in a row (one may be another process's doing) mean a
slow disk. Threads then read a number of files before one read is measured again; each time the
disk is still slow, that number doubles.
"""

import time
from types import TracebackType
from typing import Self

_SLOW_IN_A_ROW = 3


class SlowReads:
    """Measures reads, each inside `with`, and tells whether they are slow.

    Measured is the time that passes while this thread does not compute.

    Args:
        patience_seconds: a read that waits longer is slow.
        period: reads made by threads before the disk is measured again, at first.
    """

    def __init__(self, patience_seconds: float, period: int) -> None:
        self._patience_seconds = patience_seconds
        self._first_period = self._period = period
        self._slow_in_a_row = 0
        self._left = 0

    @property
    def threads_should_read(self) -> bool:
        """Whether threads should make the next read."""
        return self._left > 0

    def read_by_threads(self, reads: int) -> None:
        """Count reads that threads make, unmeasured."""
        self._left -= reads

    def measure(self, reads: int) -> "_Measurement":
        """Return a context manager around `reads` reads made one after another in this thread."""
        return _Measurement(self, reads)

    def note(self, waited_seconds: float) -> None:
        """Note how long one read waited."""
        if waited_seconds <= self._patience_seconds:
            self._slow_in_a_row, self._period = 0, self._first_period
            return
        self._slow_in_a_row += 1
        if self._slow_in_a_row >= _SLOW_IN_A_ROW:
            self._left = self._period
            self._period *= 2


class _Measurement:
    def __init__(self, slow_reads: SlowReads, reads: int) -> None:
        self._slow_reads = slow_reads
        self._reads = reads

    def __enter__(self) -> Self:
        self._started, self._computed = time.perf_counter(), time.thread_time()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        computed = time.thread_time() - self._computed
        waited = time.perf_counter() - self._started - computed
        self._slow_reads.note(waited / max(1, self._reads))
