"""`CacheTrigger`: wait for a dataset without a worker slot."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
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
        poke_interval: seconds between looks.
        deadline: when to give up, in seconds since the epoch. An instant, so that it holds when
            the trigger moves to another triggerer, and under `dag.test()`, which knows no
            deferral timeout.
    """

    def __init__(self, lookup: dict[str, Any], poke_interval: float, deadline: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Airflow's is untyped
        self.lookup = Lookup(**lookup)
        self.poke_interval = poke_interval
        self.deadline = deadline

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return (
            f"{CacheTrigger.__module__}.{CacheTrigger.__qualname__}",
            {
                "lookup": asdict(self.lookup),
                "poke_interval": self.poke_interval,
                "deadline": self.deadline,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        yield TriggerEvent(await self._wait())  # type: ignore[no-untyped-call]  # likewise

    async def _wait(self) -> dict[str, Any]:
        try:
            connection = await self._connect()
            while True:
                # Asked before the look, so that there is one at the deadline itself.
                is_last = time.time() >= self.deadline
                ref = await asyncio.to_thread(self.lookup.look, connection)
                if ref is not None:
                    return {"status": "found", "ref": ref}
                if is_last:
                    return {"status": "timeout", "message": f"{self.lookup} did not appear"}
                await self._pause()
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
            await self._pause()
        raise AssertionError("count() does not end")

    async def _pause(self) -> None:
        await asyncio.sleep(min(self.poke_interval, max(0.0, self.deadline - time.time())))
