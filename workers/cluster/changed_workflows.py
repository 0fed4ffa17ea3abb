"""What has changed and was not looked at yet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable


class ChangedWorkflows:
    """Ids of workflows to observe: one that changes many times before it is looked at is told once."""

    def __init__(self) -> None:
        self._ids: dict[str, None] = {}
        self._is_there = asyncio.Event()

    def add(self, ids: Iterable[str]) -> None:
        """Have these looked at."""
        self._ids.update(dict.fromkeys(ids))
        if self._ids:
            self._is_there.set()

    async def take_oldest(self) -> str:
        """Return the one that has waited longest."""
        await self._is_there.wait()
        workflow_id = next(iter(self._ids))
        del self._ids[workflow_id]
        if not self._ids:
            self._is_there.clear()
        return workflow_id
