"""`CacheTrigger`: wait for a dataset without a worker slot."""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from keras_remote_airflow._compat import BaseTrigger, TriggerEvent
from keras_remote_airflow.awaited import AwaitedDataset, Looks
from keras_remote_airflow.core.errors import PERMANENT_ERRORS, StoreError
from keras_remote_airflow.core.refs import DataRef
from keras_remote_airflow.failures import is_outage
from keras_remote_airflow.shared_transport import shared_transport

if TYPE_CHECKING:
    from keras_remote_airflow.core.cloud.transport import Transport

# The worker has just used the same connection. A failure to get it here is therefore a short one
# (of the database, a secret backend, a token service), or the triggerer is set up differently.
_CONNECT_ATTEMPTS = 5
# How long after the deadline a look, which is then the last one, may still take.
_LAST_LOOK_SECONDS = 60.0


class CacheTrigger(BaseTrigger):
    """Looks for a dataset at intervals and fires one event.

    The event is one of

        {"status": "found", "ref": <the ref dict that poke mode would return>}
        {"status": "timeout", "message": str}
        {"status": "failed", "message": str, "permanent": bool}

    Outages of Cloud Storage are logged and waited out. Neither the triggerer's event loop nor a
    thread that other triggers need waits for the network, and a trigger can be cancelled at any
    moment. Triggers with the same connection share one transport: see `shared_transport`.

    Args:
        awaited: the fields of an `AwaitedDataset`, as a dict.
        poke_interval: seconds between looks, or between the first two.
        deadline: when to give up, in seconds since the epoch. It is an instant, so that it holds
            when the trigger moves to another triggerer, and under `dag.test()`, which ignores the
            timeout of a deferral.
        exponential_backoff: wait twice as long after each look.
        max_wait: seconds that these waits do not exceed; None sets no such bound.
        silent_fail: wait out refusals of Cloud Storage as well.
    """

    def __init__(
        self,
        awaited: dict[str, Any],
        poke_interval: float,
        deadline: float,
        exponential_backoff: bool = False,
        max_wait: float | None = None,
        silent_fail: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Airflow's is untyped
        self.awaited = AwaitedDataset(**awaited)
        self.poke_interval = poke_interval
        self.deadline = deadline
        self.exponential_backoff = exponential_backoff
        self.max_wait = max_wait
        self.silent_fail = silent_fail

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return (
            f"{CacheTrigger.__module__}.{CacheTrigger.__qualname__}",
            {
                "awaited": asdict(self.awaited),
                "poke_interval": self.poke_interval,
                "deadline": self.deadline,
                "exponential_backoff": self.exponential_backoff,
                "max_wait": self.max_wait,
                "silent_fail": self.silent_fail,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        yield TriggerEvent(await self._wait())  # type: ignore[no-untyped-call]  # likewise

    async def _wait(self) -> dict[str, Any]:
        looks = Looks()
        seconds = max(0.0, self.deadline - time.time()) + _LAST_LOOK_SECONDS
        try:
            async with asyncio.timeout(seconds) as patience, AsyncExitStack() as stack:
                transport = await self._connect(stack, looks)
                for interval in self._intervals():
                    # Asked before the look, so that one look happens at the deadline itself.
                    is_last = time.time() >= self.deadline
                    ref = await self._look(transport, looks)
                    if ref is not None:
                        return {"status": "found", "ref": ref.to_dict()}
                    if is_last:
                        break
                    await self._pause(interval)
        except TimeoutError:
            if patience.expired():
                looks.failed(f"no answer within {_LAST_LOOK_SECONDS:.0f} s")
            elif time.time() < self.deadline:
                raise
        except (*PERMANENT_ERRORS, StoreError) as exc:
            if not is_outage(exc):
                permanent = isinstance(exc, PERMANENT_ERRORS)
                return {"status": "failed", "message": str(exc), "permanent": permanent}
        return {"status": "timeout", "message": looks.outcome(self.awaited.key.gcs_uri)}

    async def _connect(self, stack: AsyncExitStack, looks: Looks) -> "Transport":
        for attempt in itertools.count(1):
            try:
                return await stack.enter_async_context(shared_transport(self.awaited))
            except Exception as exc:
                looks.failed(exc)
                is_last = attempt >= _CONNECT_ATTEMPTS and not is_outage(exc)
                if is_last or time.time() >= self.deadline:
                    raise
                self.log.warning(
                    "Could not get a connection, will try again: %r (%s)",
                    exc,
                    self.awaited.gcp_conn_id,
                )
            await self._pause(self.poke_interval)
        raise AssertionError("count() does not end")

    async def _look(self, transport: "Transport", looks: Looks) -> DataRef | None:
        try:
            ref = await transport.arun(self.awaited.look(transport))
        except StoreError as exc:
            looks.failed(exc)
            if not (is_outage(exc) or self.silent_fail):
                raise
            uri = self.awaited.key.gcs_uri
            self.log.warning("Could not look, will look again (%s): %s", exc, uri)
            return None
        looks.succeeded()
        return ref

    def _intervals(self) -> Iterator[float]:
        interval = self.poke_interval
        while True:
            yield interval
            if self.exponential_backoff:
                interval = min(interval * 2, math.inf if self.max_wait is None else self.max_wait)

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, max(0.0, self.deadline - time.time())))
