"""Deduplication of concurrent lookups: callers with the same key share one lookup."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Answer = TypeVar("Answer")


class SingleFlight(Generic[Key, Answer]):
    """Lookups in progress by key; a caller that is cancelled doesn't cancel the lookup for the others."""

    def __init__(self, find: Callable[[Key], Awaitable[Answer]]) -> None:
        self._find = find
        self._tasks: dict[Key, asyncio.Task[Answer]] = {}

    async def get(self, key: Key) -> Answer:
        """Return the answer for a key from one lookup that concurrent callers share, or raise its exception.

        The cancellation of a caller does not cancel the lookup. Answers are not cached after the lookup.
        """
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(self._find_and_resolve(key))
            task.add_done_callback(lambda done: self._on_done(key, done))
        return await asyncio.shield(task)

    async def drain(self) -> None:
        """Wait until all lookups in progress have ended, successfully or not; raises nothing."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _find_and_resolve(self, key: Key) -> Answer:
        return await self._find(key)

    def _on_done(self, key: Key, task: asyncio.Task[Answer]) -> None:
        """Forget a lookup that has ended; asyncio logs no exception of it, even if all its callers were canceled."""
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # retrieve it: the callers have it, and asyncio would log it if all of them have gone
