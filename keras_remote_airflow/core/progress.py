"""One log line now and then while long work runs."""

import logging
import threading
import time

_INTERVAL = 30.0  # seconds between two lines


class Progress:
    """Counts files and bytes and logs them at most every 30 s; safe to call from any thread.

    Args:
        log: the logger of whoever does the work.
        activity: what is going on, such as "Uploading".
        total_files: number of files there will be, or None where nobody knows.
        total_bytes: their size, or None likewise; with it the line tells the time left.
    """

    def __init__(
        self,
        log: logging.Logger,
        activity: str,
        total_files: int | None = None,
        total_bytes: int | None = None,
    ) -> None:
        self.files = 0
        self.bytes = 0
        self._log = log
        self._activity = activity
        self._total_files = total_files
        self._total_bytes = total_bytes
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._next = self._start + _INTERVAL

    @property
    def seconds(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self._start

    def add(self, files: int, size: int) -> None:
        """Count `files` more files done and `size` more bytes."""
        with self._lock:
            self.files += files
            self.bytes += size
            if time.monotonic() < self._next:
                return
            self._next = time.monotonic() + _INTERVAL
        self._log.info("%s", self._line())

    def _line(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9)
        files = f"{self.files}" + (f"/{self._total_files}" if self._total_files else "")
        line = f"{self._activity}: {files} files, {format_bytes(self.bytes)}"
        if self._total_bytes:
            line += f" of {format_bytes(self._total_bytes)}"
        line += f", {format_bytes(rate)}/s"
        if self._total_bytes and rate:
            line += f", about {max(0, self._total_bytes - self.bytes) / rate:.0f} s left"
        return line


def format_bytes(count: float) -> str:
    """Return `count` bytes as people read them, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
