"""Heartbeats of the open polls of one gateway, by one timer for all of them.

A proxy cuts a request without traffic after about a minute, and neither side notices a connection that is gone. So a
poll of minutes sends a byte now and then.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from time import monotonic
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gateway.tasks.parked_polls import ParkedPoll

HEARTBEAT_SECONDS: Final = 25.0
"""Time between two heartbeats of a poll: two of them within the minute after which proxies cut a request."""
TICK_SECONDS: Final = 0.25
PART_AT_ONCE: Final = 20
"""Divisor of the number of polls whose heartbeats are sent in one tick: polls that began together, such as those after
the start of a gateway, drift apart instead of holding up the event loop together.
"""
AT_ONCE: Final = 20


class PollHeartbeats:
    """Open polls in the order of their next heartbeats."""

    def __init__(self) -> None:
        self._due: OrderedDict[ParkedPoll, float] = OrderedDict()
        """Times of the next heartbeats of polls, the earliest first: all have the same interval."""
        self._timer: asyncio.TimerHandle | None = None

    def add(self, parked: ParkedPoll) -> None:
        """Call `beat` of a poll every few seconds until it is discarded, so that its client gets heartbeats."""
        self._due[parked] = monotonic() + HEARTBEAT_SECONDS
        if self._timer is None:
            self._schedule()

    def discard(self, parked: ParkedPoll) -> None:
        """End the heartbeats of a poll, since it is over; nothing happens for one that has none."""
        self._due.pop(parked, None)

    def close(self) -> None:
        """End all heartbeats, since the gateway stops."""
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self._send_due)

    def _send_due(self) -> None:
        """Send the heartbeats that are due, the longest due ones first and a limited number."""
        self._timer = None
        now = monotonic()
        for _ in range(AT_ONCE + len(self._due) // PART_AT_ONCE):
            parked = next(iter(self._due), None)
            if parked is None or self._due[parked] > now:
                break
            self._due[parked] = now + HEARTBEAT_SECONDS
            self._due.move_to_end(parked)
            parked.beat()
        if self._due:
            self._schedule()
