"""Delay of an event loop: how much later than requested its timers fire."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

LAG_INTERVAL_SECONDS: Final = 1.0
LAG_SAMPLES: Final = 10


class LoopLagMeter:
    """Meter of the delay of an event loop: the longest of a timer of one second among its last ten firings."""

    def __init__(self) -> None:
        """Create a meter that has measured nothing."""
        self._lags: deque[float] = deque(maxlen=LAG_SAMPLES)

    @property
    def seconds(self) -> float:
        """Longest delay of the last ten samples in seconds; 0 before the first."""
        return max(self._lags, default=0.0)

    async def measure_forever(self, on_sample: Callable[[float], None] = lambda _: None) -> None:
        """Measure each second until the task is canceled, and after each measurement call `on_sample` with the longest
        delay of the last ten, in seconds.
        """
        while True:
            asked_at = time.monotonic()
            await asyncio.sleep(LAG_INTERVAL_SECONDS)
            self._lags.append(max(time.monotonic() - asked_at - LAG_INTERVAL_SECONDS, 0.0))
            on_sample(self.seconds)
