"""What others ask of a run while it runs."""

from __future__ import annotations

import asyncio
from enum import IntEnum


class ControlRequest(IntEnum):
    """Ordered by force: a stronger request replaces a weaker one, never the other way round."""

    HAND_OFF = 1
    """Finish what has begun, start nothing, let another worker go on."""
    STOP = 2
    """Finish what has begun, start nothing, end as stopped."""
    HAND_OFF_NOW = 3
    """Break off what has begun and let another worker go on."""
    CANCEL = 4
    """Break off what has begun and end as cancelled."""
    ABANDON = 5
    """The lease is lost: break off and write nothing."""


class RunControl:
    """One run's switch; safe to use from its event loop only."""

    def __init__(self) -> None:
        self.request: ControlRequest | None = None
        self.changed = asyncio.Event()

    def ask(self, request: ControlRequest) -> None:
        """Make a request, unless a stronger one was made before."""
        if self.request is None or request > self.request:
            self.request = request
            self.changed.set()
