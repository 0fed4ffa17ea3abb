"""A question that several ask at the same time is asked once, and all of them have the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Answer = TypeVar("Answer")


class SingleFlight(Generic[Key, Answer]):
    """The questions that are being asked; who leaves before the answer takes it from nobody else."""

    def __init__(self, find: Callable[[Key], Awaitable[Answer]]) -> None:
        self._find = find
        self._asked: dict[Key, asyncio.Task[Answer]] = {}

    async def get(self, key: Key) -> Answer:
        """Return the answer to a question, or raise what finding it raises."""
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = asyncio.create_task(self._find_and_resolve(key))
            asked.add_done_callback(lambda done: self._on_done(key, done))
        return await asyncio.shield(asked)

    async def drain(self) -> None:
        """Wait for what is being asked."""
        await asyncio.gather(*self._asked.values(), return_exceptions=True)

    async def _find_and_resolve(self, key: Key) -> Answer:
        return await self._find(key)

    def _on_done(self, key: Key, asked: asyncio.Task[Answer]) -> None:
        del self._asked[key]
        if not asked.cancelled():
            asked.exception()  # those who waited have it; if all of them have gone, nobody need be told
