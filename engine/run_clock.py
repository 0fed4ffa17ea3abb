"""Clock of a run: stored times, and durations by the monotonic clock of the process."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol


class RunClock(Protocol):
    """Conversion between stored times and points of the monotonic clock.

    Durations inside a process are measured by the monotonic clock, so that changes of the system clock don't
    move their end.
    """

    def now(self) -> datetime:
        """Return the current time (aware, UTC)."""

    def moment_of(self, monotonic: float) -> datetime:
        """Return the time (aware, UTC) at a point of `time.monotonic`, in seconds."""

    def monotonic_of(self, moment: datetime) -> float:
        """Return the point of `time.monotonic`, in seconds, at an aware time."""
