"""`CacheTrigger`: wait for a dataset without a worker slot."""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from typing import Any

from asgiref.sync import sync_to_async

from keras_remote_airflow._compat import BaseTrigger, TriggerEvent
from keras_remote_airflow.core.errors import PERMANENT_ERRORS, StoreError
from keras_remote_airflow.execution import Connection
from keras_remote_airflow.lookup import Lookup

# The worker has just used the same connection, so a failure to get it here is a hiccup (of the
# database, a secret backend, a token service), or a triggerer set up differently from the workers.
_CONNECT_ATTEMPTS = 5


class CacheTrigger(BaseTrigger):
    """Looks for a dataset at intervals and fires one event.

    The event is one of
        {"status": "found", "ref": <the ref dict that poke mode would return>}
        {"status": "timeout", "message": str}
        {"status": "failed", "message": str, "permanent": bool}

    Outages of Cloud Storage are logged and waited out. Looks happen in threads, so the
    triggerer's event loop never waits for the network.

    Args:
        lookup: the fields of a `Lookup`, as a dict.
        poke_interval: seconds between looks, or between the first two.
        deadline: when to give up, in seconds since the epoch. An instant, so that it holds when
            the trigger moves to another triggerer, and under `dag.test()`, which knows no
            deferral timeout.
        exponential_backoff: wait twice as long after each look.
        max_wait: seconds that these waits do not exceed; None is no such bound.
        silent_fail: wait out refusals of Cloud Storage as well.
    """

    def __init__(
        self,
        lookup: dict[str, Any],
        poke_interval: float,
        deadline: float,
        exponential_backoff: bool = False,
        max_wait: float | None = None,
        silent_fail: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Airflow's is untyped
        self.lookup = Lookup(**lookup)
        self.poke_interval = poke_interval
        self.deadline = deadline
        self.exponential_backoff = exponential_backoff
        self.max_wait = max_wait
        self.silent_fail = silent_fail

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return (
            f"{CacheTrigger.__module__}.{CacheTrigger.__qualname__}",
            {
                "lookup": asdict(self.lookup),
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
        try:
            connection = await self._connect()
            for interval in self._intervals():
                # Asked before the look, so that there is one at the deadline itself.
                is_last = time.time() >= self.deadline
                ref = await asyncio.to_thread(self._look, connection)
                if ref is not None:
                    return {"status": "found", "ref": ref}
                if is_last:
                    return {"status": "timeout", "message": f"{self.lookup} did not appear"}
                await self._pause(interval)
            raise AssertionError("the intervals do not end")
        except (*PERMANENT_ERRORS, StoreError) as exc:
            permanent = isinstance(exc, PERMANENT_ERRORS)
            return {"status": "failed", "message": str(exc), "permanent": permanent}

    async def _connect(self) -> Connection:
        for attempt in itertools.count(1):
            try:
                # Not asyncio.to_thread: a connection kept in Airflow's database can be fetched
                # only from the thread that asgiref ties to the event loop.
                return await sync_to_async(self.lookup.connect)()
            except Exception as exc:
                if attempt == _CONNECT_ATTEMPTS or time.time() >= self.deadline:
                    raise
                self.log.warning(
                    "Could not get connection %s, will try again: %r", self.lookup.gcp_conn_id, exc
                )
            await self._pause(self.poke_interval)
        raise AssertionError("count() does not end")

    def _look(self, connection: Connection) -> dict[str, Any] | None:
        try:
            return self.lookup.look(connection)
        except StoreError as exc:
            if not self.silent_fail:
                raise
            self.log.error("Could not look for %s, will look again: %s", self.lookup, exc)
            return None

    def _intervals(self) -> Iterator[float]:
        interval = self.poke_interval
        while True:
            yield interval
            if self.exponential_backoff:
                interval = min(interval * 2, math.inf if self.max_wait is None else self.max_wait)

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, max(0.0, self.deadline - time.time())))
