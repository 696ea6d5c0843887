"""Reports progress of long work, to a callback or in log lines every 30 s."""

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Self

LINE_INTERVAL_SECONDS = 30.0
CALLBACK_INTERVAL_SECONDS = 0.1


class ProgressUpdate(NamedTuple):
    """How far the work has come.

    Attributes:
        activity: what is going on, such as "Hashing", "Uploading" or "Downloading".
        files: number of files that are done.
        bytes: bytes that are done, those of unfinished files included.
        total_files: number of files to be done; None if it is not known.
        total_bytes: their size; None if it is not known.
        seconds: how long it has taken so far.
    """

    activity: str
    files: int
    bytes: int
    total_files: int | None
    total_bytes: int | None
    seconds: float


ProgressCallback = Callable[[ProgressUpdate], None]


class Progress:
    """Counts files and bytes, and tells about them; safe to call from any thread.

    Without a callback it logs a line at most every 30 s. A callback is called instead, at most
    every 0.1 s and once when the work is done. It is called from the threads that do the work, but
    never from two at once; what it raises ends the work.

    As a context manager, entering it starts the clock and leaving it says that the work is done.

    Attributes:
        files: number of files that are done.
        bytes: their size.

    Args:
        log: the logger for the lines.
        activity: the verb, such as "Uploading".
        subject: what is worked on, such as a path or URI; it ends the line.
        callback: what is called instead of logging.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        log: logging.Logger,
        activity: str,
        subject: str = "",
        callback: ProgressCallback | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.files = 0
        self.bytes = 0
        self._log = log
        self._activity = activity
        self._subject = subject
        self._callback = callback
        self._tell = callback or self._log_line
        self._clock = clock
        self._interval = LINE_INTERVAL_SECONDS if callback is None else CALLBACK_INTERVAL_SECONDS
        self._total_files: int | None = None
        self._total_bytes: int | None = None
        self._unfinished_bytes = 0
        self._counting = threading.Lock()
        self._telling = threading.Lock()
        self._start_clock()

    def _start_clock(self) -> None:
        self._started = self._clock()
        self._next = self._started + self._interval

    def __enter__(self) -> Self:
        self._start_clock()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._callback is not None:
            with self._telling:
                self._callback(self._update())

    @property
    def seconds(self) -> float:
        """Seconds since this was made, or entered."""
        return self._clock() - self._started

    def expect(self, files: int, size: int) -> None:
        """Say how many files and bytes are still to be done."""
        with self._counting:
            self._total_files = self.files + files
            self._total_bytes = self.bytes + size

    def skip(self, files: int, size: int) -> None:
        """Expect that much less, because another process has done it."""
        with self._counting:
            if self._total_files is not None and self._total_bytes is not None:
                self._total_files -= files
                self._total_bytes -= size

    def add(self, files: int, size: int) -> None:
        """Count `files` more files done and `size` more bytes."""
        with self._counting:
            self.files += files
            self.bytes += size
        self._tell_if_due()

    def move(self, size: int) -> None:
        """Count bytes of an unfinished file, or take back as many if `size` is negative.

        All of them must be taken back before the file is counted as done.
        """
        with self._counting:
            self._unfinished_bytes += size
        if size > 0:
            self._tell_if_due()

    def _tell_if_due(self) -> None:
        # If another thread is telling just now, this thread has nothing to add.
        if self._clock() < self._next or not self._telling.acquire(blocking=False):
            return
        try:
            if (now := self._clock()) >= self._next:
                self._next = now + self._interval
                self._tell(self._update())
        finally:
            self._telling.release()

    def _log_line(self, update: ProgressUpdate) -> None:
        self._log.info("%s", _line(update, self._subject))

    def _update(self) -> ProgressUpdate:
        with self._counting:
            return ProgressUpdate(
                self._activity,
                self.files,
                self.bytes + self._unfinished_bytes,
                self._total_files,
                self._total_bytes,
                self.seconds,
            )


def _line(update: ProgressUpdate, subject: str) -> str:
    of_files = f"/{update.total_files}" if update.total_files else ""
    unit = "file" if (update.total_files or update.files) == 1 else "files"
    line = f"{update.activity} {update.files}{of_files} {unit}, {format_bytes(update.bytes)}"
    if update.total_bytes:
        line += f" of {format_bytes(update.total_bytes)}"
    rate = update.bytes / max(update.seconds, 1e-9)
    line += f", {format_bytes(rate)}/s"
    if update.total_bytes and rate:
        line += f", about {max(0, update.total_bytes - update.bytes) / rate:.0f} s left"
    return f"{line}: {subject}" if subject else line


def format_files(count: int) -> str:
    """Return "1 file", "2 files" and so on."""
    return f"{count} file{'' if count == 1 else 's'}"


def format_bytes(count: float) -> str:
    """Return `count` bytes as people read them, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
