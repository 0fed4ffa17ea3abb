"""The time of this host, and so of a database on SQLite; it follows a clock that was set only when told to."""

from __future__ import annotations

import time
from typing import Final

# Counts on while the machine sleeps, which the monotonic clock doesn't do on Linux; other systems have no such clock.
_COUNTER: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class HostTime:
    """Microseconds since 1970: read from the wall clock once, then counted by a clock that nobody can set."""

    def __init__(self) -> None:
        self._offset = _wall_microseconds() - _counter_microseconds()

    def microseconds(self) -> int:
        """Return the time."""
        return self._offset + _counter_microseconds()

    def seconds(self) -> float:
        """Return the time in seconds."""
        return self.microseconds() / 1_000_000

    def step(self) -> int:
        """Return by how many microseconds the wall clock is ahead: it was set, where that is more than a moment."""
        return _wall_microseconds() - self.microseconds()

    def move(self, step: int) -> None:
        """Go on from a time that is so many microseconds later."""
        self._offset += step


def _wall_microseconds() -> int:
    return time.time_ns() // 1_000  # noqa: TID251 - what all other time of this host is made of


def _counter_microseconds() -> int:
    return time.clock_gettime_ns(_COUNTER) // 1_000


HOST_TIME: Final = HostTime()
"""Of this process: there is one host."""
