"""Turns of transactions that lock the same row in one process.

While they wait for their turns, transactions hold no connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from models.errors import LockWaitTimeout


class TransactionTurns:
    """Queues of turns by key.

    If one turn ends with a lock timeout, those behind it fail at once: they need the same lock.
    """

    def __init__(self) -> None:
        self._queues: dict[str, _TurnQueue] = {}

    @asynccontextmanager
    async def take(self, key: str) -> AsyncIterator[None]:
        """Wait for the turn, and hold it for the block; raises `LockWaitTimeout`."""
        queue = self._queues.setdefault(key, _TurnQueue())
        queue.users += 1
        timeouts = queue.timeouts
        try:
            async with queue.lock:
                if queue.timeouts > timeouts:
                    raise LockWaitTimeout("Another transaction holds a lock that this one needs")
                try:
                    yield
                except LockWaitTimeout:
                    queue.timeouts += 1
                    raise
        finally:
            queue.users -= 1
            if not queue.users:
                del self._queues[key]


class _TurnQueue:
    __slots__ = ("lock", "timeouts", "users")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0
        self.timeouts = 0
