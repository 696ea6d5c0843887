"""One `Transport` for all triggers of a process that use the same connection.

A triggerer runs hundreds of triggers on one event loop. The loop's default executor has a few
threads, and asgiref has a single one, for all triggers together. Nothing here waits in one of
these: requests run on the transport's own loop, and a connection is fetched in a thread of its own.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from keras_remote_airflow.awaited import AwaitedDataset
from keras_remote_airflow.connection import connect

if TYPE_CHECKING:
    from google.cloud.storage import Client

    from keras_remote_airflow.core.cloud.transport import Transport

_T = TypeVar("_T")


class _Shared:
    def __init__(self, opening: "asyncio.Task[Transport]") -> None:
        self.opening = opening
        self.users = 0

    def close(self) -> None:
        self.opening.cancel()
        if self.opening.done() and not self.opening.cancelled() and not self.opening.exception():
            # In a thread, because it waits for the end of the transport's own.
            leave = self.opening.result().__exit__
            threading.Thread(target=leave, args=(None, None, None), daemon=True).start()


_shared: dict[tuple[Any, ...], _Shared] = {}


@asynccontextmanager
async def shared_transport(awaited: AwaitedDataset) -> AsyncIterator["Transport"]:
    """Own a share of the transport for a dataset's connection; the last owner closes it.

    An error that leaves the context, such as a refusal, ends the sharing: the connection is fetched
    anew for those that come after it, because it may have been corrected.

    Raises:
        TimeoutError: the connection did not come within `awaited.connect_seconds`.
    """
    chain = str(awaited.impersonation_chain)
    key = asyncio.get_running_loop(), awaited.gcp_conn_id, chain, awaited.user_project
    shared = _shared.get(key)
    if shared is None:
        shared = _shared[key] = _Shared(asyncio.create_task(_open(awaited)))
    shared.users += 1
    is_over = False
    try:
        # What never comes must not be waited for by all triggers that begin later, too.
        async with asyncio.timeout(awaited.connect_seconds):
            transport = await asyncio.shield(shared.opening)
        yield transport
    except Exception:
        is_over = True
        raise
    finally:
        shared.users -= 1
        if (is_over or not shared.users) and _shared.get(key) is shared:
            del _shared[key]
        if not shared.users:
            shared.close()


async def _open(awaited: AwaitedDataset) -> "Transport":
    from asgiref.sync import sync_to_async  # comes with Airflow

    def fetch() -> "tuple[Client, type[Transport]]":
        from keras_remote_airflow.core.cloud.transport import Transport  # its import takes a while

        return connect(awaited.gcp_conn_id, awaited.impersonation_chain), Transport

    # Not asyncio.to_thread: before Airflow 3.2 a connection in its database can be fetched only
    # from a thread of which asgiref knows the event loop.
    executor: Any = _NewThreads()  # the annotation asks for a ThreadPoolExecutor; any will do
    fetching = sync_to_async(fetch, thread_sensitive=False, executor=executor)
    client, transport_class = await fetching()
    return transport_class(client, awaited.policy, awaited.user_project).__enter__()


class _NewThreads(Executor):
    """Does each piece of work in a new thread, which no exiting process waits for."""

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> "Future[_T]":
        future: Future[_T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(*args, **kwargs))
                except BaseException as exc:  # noqa: BLE001 - raised by the future
                    future.set_exception(exc)

        threading.Thread(target=run, name="connection", daemon=True).start()
        return future
