"""Set of changed workflows that wait for observation."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable


class ChangedWorkflows:
    """IDs of workflows to observe; several changes before an observation count as one."""

    def __init__(self) -> None:
        self._ids: dict[str, None] = {}
        self._is_there = asyncio.Event()

    def add(self, ids: Iterable[str]) -> None:
        """Add workflows to observe."""
        self._ids.update(dict.fromkeys(ids))
        if self._ids:
            self._is_there.set()

    async def take_oldest(self) -> str:
        """Wait for a change; remove and return the workflow that has waited longest."""
        await self._is_there.wait()
        workflow_id = next(iter(self._ids))
        del self._ids[workflow_id]
        if not self._ids:
            self._is_there.clear()
        return workflow_id
