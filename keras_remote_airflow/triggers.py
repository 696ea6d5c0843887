"""`CacheTrigger`: wait for a dataset without a worker slot."""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from keras_remote_airflow._compat import BaseTrigger, TriggerEvent
from keras_remote_airflow.awaited import AwaitedDataset
from keras_remote_airflow.core.errors import PERMANENT_ERRORS, StoreError
from keras_remote_airflow.core.refs import DataRef

if TYPE_CHECKING:
    from google.cloud.storage import Client

# The worker has just used the same connection. A failure to get it here is therefore a short one
# (of the database, a secret backend, a token service), or the triggerer is set up differently.
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
        try:
            client = await self._connect()
            for interval in self._intervals():
                # Asked before the look, so that one look happens at the deadline itself.
                is_last = time.time() >= self.deadline
                ref = await asyncio.to_thread(self._look, client)
                if ref is not None:
                    return {"status": "found", "ref": ref.to_dict()}
                if is_last:
                    uri = self.awaited.gcs_uri
                    return {"status": "timeout", "message": f"no dataset appeared at {uri}"}
                await self._pause(interval)
            raise AssertionError("the intervals do not end")
        except (*PERMANENT_ERRORS, StoreError) as exc:
            permanent = isinstance(exc, PERMANENT_ERRORS)
            return {"status": "failed", "message": str(exc), "permanent": permanent}

    async def _connect(self) -> "Client":
        from asgiref.sync import sync_to_async  # comes with Airflow

        for attempt in itertools.count(1):
            try:
                # Not asyncio.to_thread: a connection kept in Airflow's database can be fetched
                # only from the thread that asgiref ties to the event loop.
                return await sync_to_async(self.awaited.connect)()
            except Exception as exc:
                if attempt == _CONNECT_ATTEMPTS or time.time() >= self.deadline:
                    raise
                self.log.warning(
                    "Could not get connection %s, will try again: %r", self.awaited.gcp_conn_id, exc
                )
            await self._pause(self.poke_interval)
        raise AssertionError("count() does not end")

    def _look(self, client: "Client") -> DataRef | None:
        try:
            return self.awaited.look(client)
        except StoreError as exc:
            if not self.silent_fail:
                raise
            uri = self.awaited.gcs_uri
            self.log.error("Could not look, will look again (%s): %s", exc, uri)
            return None

    def _intervals(self) -> Iterator[float]:
        interval = self.poke_interval
        while True:
            yield interval
            if self.exponential_backoff:
                interval = min(interval * 2, math.inf if self.max_wait is None else self.max_wait)

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, max(0.0, self.deadline - time.time())))
