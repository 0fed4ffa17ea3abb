"""Cooperative yielding for nodes that loop over much data, so that other runs of the process progress."""

from __future__ import annotations

import time

from concurrency import offload

SHARE_SECONDS = 0.005


class LoopShare:
    """Time slice on the event loop; call `yield_if_due` in every step of a long loop."""

    def __init__(self) -> None:
        self._ends_at = time.monotonic() + SHARE_SECONDS

    async def yield_if_due(self) -> None:
        """Let other work of the event loop run if this time slice (5 ms) is used up; then begin the next slice.

        A cancellation is raised here too.
        """
        if time.monotonic() >= self._ends_at:
            await offload.yield_to_loop()
            self._ends_at = time.monotonic() + SHARE_SECONDS
