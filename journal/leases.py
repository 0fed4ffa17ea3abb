"""Leases on running executions, renewed from a thread that user work on the event loop can't starve."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from journal.store import LeaseRenewal
from models.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from journal.store import ExecutionKey, RunStore

log = structlog.get_logger()

RENEWALS_PER_LEASE = 3
TRIES_PER_RENEWAL = 5
"""Attempts at a lease whose row is locked, until the next renewal."""
LEASE_MARGIN = 0.15
"""Share of a lease that is left unused, since the clocks of process and database may run at different speeds.
"""


@dataclass(slots=True, eq=False)
class RunLease:
    """Lease of one run, by this process's monotonic clock."""

    key: ExecutionKey
    token: int
    until: float

    @property
    def renewal(self) -> LeaseRenewal:
        return LeaseRenewal(*self.key, self.token)

    def is_held(self) -> bool:
        """Return whether the lease is certain to last for a moment longer."""
        return time.monotonic() < self.until


class LeaseKeeper:
    """Renewer of the leases of one process.

    Reports lost leases, and stop and cancel requests that renewals find.
    """

    def __init__(
        self,
        store: RunStore,
        lease_seconds: float,
        *,
        on_lost: Callable[[RunLease], None],
        on_request: Callable[[RunLease, str], None],
    ) -> None:
        self._store = store
        self._lease_seconds = lease_seconds
        self._on_lost = on_lost
        self._on_request = on_request
        self._leases: dict[str, RunLease] = {}
        self._loop = asyncio.get_running_loop()
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._renew_forever()), name="leases", daemon=True
        )

    def start(self) -> None:
        """Start the renewal thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the renewal thread; leases that are still held expire by themselves."""
        self._stopping.set()

    def hold(self, key: ExecutionKey, token: int, since: float) -> RunLease:
        """Renew a lease, claimed at `since` (monotonic seconds), until it is released."""
        lease = RunLease(key, token, self._lease_end(since))
        self._leases[key.execution_id] = lease
        return lease

    def release(self, lease: RunLease) -> None:
        """Stop renewing a lease."""
        if self._leases.get(lease.key.execution_id) is lease:
            del self._leases[lease.key.execution_id]

    def execution_ids(self) -> list[str]:
        """Return the ids of the executions with held leases."""
        return list(self._leases)

    def _lease_end(self, since: float) -> float:
        return since + self._lease_seconds * (1 - LEASE_MARGIN)

    async def _renew_forever(self) -> None:
        store = await self._store.for_thread()
        interval_seconds = self._lease_seconds / RENEWALS_PER_LEASE
        begun_at = time.monotonic()
        while not await asyncio.to_thread(self._stopping.wait, self._seconds_until_renewal(begun_at)):
            begun_at = time.monotonic()
            leases = list(self._leases.values())
            if not leases:
                continue
            try:
                await self._renew_unlocked(store, leases, interval_seconds)
            except DatabaseUnavailable as error:
                # The leases expire by themselves: each run checks its own before it starts a node.
                log.warning("leases not renewed", error=str(error), leases=len(leases))
            except Exception:
                log.exception("leases not renewed", leases=len(leases))
        if store is not self._store:
            await store.close()

    def _seconds_until_renewal(self, begun_at: float) -> float:
        """Return the time until the next round.

        It counts from the begin of the last round, so that a slow round delays nothing.
        """
        return max(0.0, begun_at + self._lease_seconds / RENEWALS_PER_LEASE - time.monotonic())

    async def _renew_unlocked(self, store: RunStore, leases: list[RunLease], seconds: float) -> None:
        """Renew leases, and retry those with locked rows until the next round."""
        since = time.monotonic()
        while locked := await self._renew(store, leases):
            left_seconds = seconds * (1 - 1 / TRIES_PER_RENEWAL) - (time.monotonic() - since)
            if left_seconds <= 0 or await asyncio.to_thread(self._stopping.wait, seconds / TRIES_PER_RENEWAL):
                log.warning("leases locked by another transaction", leases=len(locked))
                return
            leases = [lease for lease in locked if self._leases.get(lease.key.execution_id) is lease]

    async def _renew(self, store: RunStore, leases: list[RunLease]) -> list[RunLease]:
        """Renew leases; returns those with locked rows, which are neither renewed nor lost."""
        if not leases:
            return []
        since = time.monotonic()
        locked: list[RunLease] = []
        answers = await store.renew([lease.renewal for lease in leases], self._lease_seconds)
        renewed = {answer.execution_id: answer for answer in answers}
        for lease in leases:
            answer = renewed.get(lease.key.execution_id)
            if answer is None:
                self._loop.call_soon_threadsafe(self._on_lost, lease)
                continue
            if answer.is_locked:
                locked.append(lease)
                continue
            lease.until = self._lease_end(since)
            if answer.request is not None:
                self._loop.call_soon_threadsafe(self._on_request, lease, answer.request)
        return locked
