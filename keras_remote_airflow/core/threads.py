"""A thread pool that goes on, more slowly, where no thread can be started."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Threads(ThreadPoolExecutor):
    """Does work in other threads, or in the caller's if the system refuses to start another one.

    Processes and containers have a limit (RLIMIT_NPROC, pids.max), of which others use a part.
    """

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        result: Future[_T] = Future()
        begun = threading.Lock()

        def run() -> None:
            if begun.acquire(blocking=False) and result.set_running_or_notify_cancel():
                try:
                    result.set_result(fn(*args, **kwargs))
                except BaseException as exc:  # noqa: BLE001 - raised by `result`
                    result.set_exception(exc)

        try:
            submitted = super().submit(run)
        except RuntimeError:
            # The pool has taken the work nevertheless. A thread that it has may do it first.
            run()
        else:
            submitted.add_done_callback(lambda future: future.cancelled() and result.cancel())
        return result
