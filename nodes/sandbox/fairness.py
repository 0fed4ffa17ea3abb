"""Fair slots for concurrent work: waiting organizations get a slot in rotation."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from engine.run_errors import NodeError

MAX_WAITING = 1_000
"""Maximum number of waiting jobs of one organization."""


class FairSlots:
    """Limited number of slots, shared fairly by organizations.

    An organization without a running job may exceed the limit, up to twice as many in all: otherwise it would wait for
    jobs of others, a single one of which may take a minute.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._working: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """Waiting jobs by organization, in the order of the next turns."""

    @asynccontextmanager
    async def hold(self, organization_id: str) -> AsyncIterator[None]:
        """Wait for a slot, without a time limit, and hold it during the block; waiting organizations get slots in turn.

        Raises `NodeError` (retryable) if 1,000 jobs of the organization wait already.
        """
        await self._acquire(organization_id)
        try:
            yield
        finally:
            self._release(organization_id)

    async def _acquire(self, organization_id: str) -> None:
        """Wait for a slot, counted for the organization; raises `NodeError` if 1,000 of its jobs wait already."""
        if self._has_free_slot(organization_id):
            self._working[organization_id] += 1
            return
        waiting = self._waiting.setdefault(organization_id, deque())
        if len(waiting) >= MAX_WAITING:
            message = f"{MAX_WAITING:,} nodes of the organization are already waiting for a process"
            raise NodeError(message, code="busy", retryable=True)
        turn = asyncio.get_running_loop().create_future()
        waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._cancel_wait(organization_id, turn)
            else:
                self._release(organization_id)
            raise

    def _has_free_slot(self, organization_id: str) -> bool:
        working = self._working.total()
        return working < self._count or (not self._working[organization_id] and working < 2 * self._count)

    def _release(self, organization_id: str) -> None:
        """Free a slot, and give free slots to waiting organizations in turn."""
        self._working[organization_id] -= 1
        if not self._working[organization_id]:
            del self._working[organization_id]
        while (next_one := next(filter(self._has_free_slot, self._waiting), None)) is not None:
            turn = self._waiting[next_one][0]
            self._cancel_wait(next_one, turn)
            if next_one in self._waiting:
                self._waiting.move_to_end(next_one)
            self._working[next_one] += 1
            turn.set_result(None)

    def _cancel_wait(self, organization_id: str, turn: asyncio.Future[None]) -> None:
        waiting = self._waiting[organization_id]
        waiting.remove(turn)
        if not waiting:
            del self._waiting[organization_id]
