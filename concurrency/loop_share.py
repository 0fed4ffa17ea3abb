"""How a node that loops over much data leaves room for the other runs of its process."""

from __future__ import annotations

import time

from concurrency import offload

SHARE_SECONDS = 0.005


class LoopShare:
    """A stretch of work on the event loop, to be shared once in every step of a loop."""

    def __init__(self) -> None:
        self._ends_at = time.monotonic() + SHARE_SECONDS

    async def yield_if_due(self) -> None:
        """Let other work run, when this turn has lasted long enough; a cancellation arrives here too."""
        if time.monotonic() >= self._ends_at:
            await offload.yield_to_loop()
            self._ends_at = time.monotonic() + SHARE_SECONDS
