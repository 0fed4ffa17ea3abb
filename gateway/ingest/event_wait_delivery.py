"""Events that this gateway has taken in, told to the nodes that wait for them: many at a time, behind the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from journal.group_commit import GroupCommit

if TYPE_CHECKING:
    from execution.event_matching import EventMatcher


class EventWaitDelivery:
    """What is still to be told; what is lost here, the scheduler finds by the rows."""

    def __init__(self, awaited: EventMatcher) -> None:
        self._awaited = awaited
        self._group: GroupCommit[str, None] = GroupCommit(self._tell)

    def submit(self, event_id: str) -> None:
        """Tell of an event that is committed."""
        self._group.submit(event_id)

    async def drain(self) -> None:
        """Tell of everything submitted so far."""
        await self._group.drain()

    async def _tell(self, batch: Sequence[str]) -> Sequence[None]:
        await self._awaited.deliver(batch)
        return [None] * len(batch)
