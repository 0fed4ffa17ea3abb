"""Time of this host, and so of a database on SQLite; it follows changes of the wall clock only on request."""

from __future__ import annotations

import time
from typing import Final

# Runs while the machine sleeps, unlike the monotonic clock on Linux; other systems have no such clock.
_COUNTER: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class HostTime:
    """Microseconds since 1970: read from the wall clock once, then counted by a clock that nobody can set."""

    def __init__(self) -> None:
        self._offset = _wall_microseconds() - _counter_microseconds()

    def microseconds(self) -> int:
        """Return the time in microseconds since 1970."""
        return self._offset + _counter_microseconds()

    def seconds(self) -> float:
        """Return the time in seconds since 1970."""
        return self.microseconds() / 1_000_000

    def step(self) -> int:
        """Return by how many microseconds the wall clock is ahead; a large step means that it was set."""
        return _wall_microseconds() - self.microseconds()

    def move(self, step: int) -> None:
        """Move the time by a step in microseconds."""
        self._offset += step


def _wall_microseconds() -> int:
    return time.time_ns() // 1_000  # noqa: TID251 - the source of all other time of this host


def _counter_microseconds() -> int:
    return time.clock_gettime_ns(_COUNTER) // 1_000


HOST_TIME: Final = HostTime()
"""Time of the host for this process."""
