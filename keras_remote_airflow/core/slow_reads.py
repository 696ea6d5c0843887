"""Decides whether files are read by one thread or by many, for hashing and for sending.

Files in memory are read fastest by one thread, files on a slow disk by many. After three slow reads
in a row, several threads read the next N files; then one read is measured again. If it is slow too,
N doubles.
"""

import time

_SLOW_IN_A_ROW = 3


def waiting_seconds() -> float:
    """Return a clock of this thread that stands still while the thread computes."""
    return time.perf_counter() - time.thread_time()


class SlowReads:
    """Measures how long reads wait, and tells whether threads should make the next ones.

    Args:
        slow_read_seconds: a read that waits longer is slow.
        reads_by_threads: number of reads that threads make before one is measured again, at first.
    """

    def __init__(self, slow_read_seconds: float, reads_by_threads: int) -> None:
        self._slow_read_seconds = slow_read_seconds
        self._first_reads_by_threads = self._reads_by_threads = reads_by_threads
        self._slow_in_a_row = 0
        self._left = 0

    @property
    def last_was_slow(self) -> bool:
        """Whether the last measured read was slow."""
        return self._slow_in_a_row > 0

    @property
    def threads_should_read(self) -> bool:
        """Whether threads should make the next read."""
        return self._left > 0

    def read_by_threads(self, reads: int) -> None:
        """Count reads that threads make, unmeasured."""
        self._left -= reads

    def note(self, waited_seconds: float, reads: int = 1) -> None:
        """Note how long so many reads waited together."""
        if waited_seconds <= self._slow_read_seconds * reads:
            self._slow_in_a_row = 0
            self._reads_by_threads = self._first_reads_by_threads
            return
        self._slow_in_a_row += 1
        if self._slow_in_a_row >= _SLOW_IN_A_ROW:
            self._left = self._reads_by_threads
            self._reads_by_threads *= 2
