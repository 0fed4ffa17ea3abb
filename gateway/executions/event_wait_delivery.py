"""Delivery of ingested events to waiting nodes: in groups, after the answers to the senders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from journal.group_commit import GroupCommit

if TYPE_CHECKING:
    from execution.event_matching import EventMatcher


class EventWaitDelivery:
    """Queue of events to deliver. The scheduler finds lost ones by their rows."""

    def __init__(self, matcher: EventMatcher) -> None:
        self._matcher = matcher
        self._group: GroupCommit[str, None] = GroupCommit(self._deliver)

    def submit(self, event_id: str) -> None:
        """Queue a committed event for delivery to the runs that wait for such an event; return at once.

        If the process dies, the scheduler delivers it.
        """
        self._group.submit(event_id)

    async def drain(self) -> None:
        """Wait until all events submitted so far are delivered to the runs that wait for them."""
        await self._group.drain()

    async def _deliver(self, batch: Sequence[str]) -> Sequence[None]:
        """Deliver a batch of events to the runs that wait for them."""
        await self._matcher.deliver(batch)
        return [None] * len(batch)
