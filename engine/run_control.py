"""Control requests to a run in progress."""

from __future__ import annotations

import asyncio
from enum import IntEnum


class ControlRequest(IntEnum):
    """Requests in order of precedence: a stronger request replaces a weaker one, never the reverse."""

    HAND_OFF = 1
    """Complete the nodes in progress, start none, and let another worker continue."""
    STOP = 2
    """Complete the nodes in progress, start none, and end as stopped."""
    HAND_OFF_NOW = 3
    """Cancel the nodes in progress, and let another worker continue."""
    CANCEL = 4
    """Cancel the nodes in progress, and end as cancelled."""
    ABANDON = 5
    """Cancel the nodes in progress, and write nothing: the lease is lost."""


class RunControl:
    """Control of one run; use it only from the run's event loop."""

    def __init__(self) -> None:
        self.request: ControlRequest | None = None
        self.changed = asyncio.Event()

    def ask(self, request: ControlRequest) -> None:
        """Set the request to the run and wake the waiters of `changed`, unless one at least as strong is set."""
        if self.request is None or request > self.request:
            self.request = request
            self.changed.set()
