"""How far long work has come: a log line now and then, or a bar where somebody watches."""

import logging
import os
import sys
import threading
import time
from typing import Any, Self

# Seconds between two log lines, and between two states of a bar.
_LINE_INTERVAL = 30.0
_BAR_INTERVAL = 0.1
# Work that takes no longer than this many seconds shows no bar.
_BAR_DELAY = 1.0


class Progress:
    """Counts files and bytes, and says so; safe to call from any thread.

    A context manager that shows a tqdm bar if stderr is a terminal. Inside an Airflow task, without
    tqdm, or if it is never entered, it logs a line at most every 30 s instead.

    Attributes:
        files: how many are done.
        bytes: their size.

    Args:
        log: the logger of whoever does the work.
        activity: what is going on, such as "Uploading to gs://…"; a bar shows its first word.
    """

    def __init__(self, log: logging.Logger, activity: str) -> None:
        self.files = 0
        self.bytes = 0
        self._log = log
        self._activity = activity
        self._total_files: int | None = None
        self._total_bytes: int | None = None
        self._moving = 0  # bytes of files that are not done yet
        self._bar: Any = None
        self._interval = _LINE_INTERVAL
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._start = time.monotonic()
        self._next = self._start + self._interval

    def __enter__(self) -> Self:
        self._bar = _make_bar(self._activity.partition(" ")[0])
        if self._bar is not None:
            self._interval = _BAR_INTERVAL
        self._begin()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._draw()
            self._bar.close()
            self._bar = None

    @property
    def seconds(self) -> float:
        """Seconds since the work began: since this was made, or entered."""
        return time.monotonic() - self._start

    def expect(self, files: int, size: int) -> None:
        """Say what is still to be done: with it the time left can be told."""
        with self._lock:
            self._total_files = self.files + files
            self._total_bytes = self.bytes + size

    def add(self, files: int, size: int) -> None:
        """Count `files` more files done and `size` more bytes."""
        with self._lock:
            self.files += files
            self.bytes += size
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + self._interval
        self._tell()

    def move(self, size: int) -> None:
        """Count bytes of a file that is not done yet, or take back as many if `size` is negative.

        Whoever does takes back all of them before the file is done.
        """
        with self._lock:
            self._moving += size
            now = time.monotonic()
            if size <= 0 or now < self._next:
                return
            self._next = now + self._interval
        self._tell()

    def skip(self, files: int, size: int) -> None:
        """Expect that much less: somebody else has done it."""
        with self._lock:
            if self._total_files is not None and self._total_bytes is not None:
                self._total_files -= files
                self._total_bytes -= size

    def _tell(self) -> None:
        if self._bar is not None:
            self._draw()
        else:
            self._log.info("%s", self._line())

    def _draw(self) -> None:
        self._bar.total = self._total_bytes
        self._bar.set_postfix_str(f"{self._count()} files", refresh=False)
        self._bar.update(self.bytes + self._moving - self._bar.n)

    def _count(self) -> str:
        return f"{self.files}/{self._total_files}" if self._total_files else f"{self.files}"

    def _line(self) -> str:
        done = self.bytes + self._moving
        rate = done / max(self.seconds, 1e-9)
        line = f"{self._activity}: {self._count()} files, {format_bytes(done)}"
        if self._total_bytes:
            line += f" of {format_bytes(self._total_bytes)}"
        line += f", {format_bytes(rate)}/s"
        if self._total_bytes and rate:
            line += f", about {max(0, self._total_bytes - done) / rate:.0f} s left"
        return line


def _make_bar(activity: str) -> Any:
    """Return a tqdm bar where somebody at a terminal watches, else None."""
    # Airflow sets this one for the time a task runs; its log is where progress belongs, even if
    # `dag.test()` was called from a terminal.
    if "AIRFLOW_CTX_DAG_ID" in os.environ or not (sys.stderr and sys.stderr.isatty()):
        return None
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no types

        return tqdm(
            desc=activity,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            delay=_BAR_DELAY,
            miniters=0,
        )
    except (ImportError, KeyError):  # KeyError: old ones know no delay
        return None


def format_bytes(count: float) -> str:
    """Return `count` bytes as people read them, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
