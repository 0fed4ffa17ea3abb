"""The clock of a run: moments as they are stored, and durations as this process counts them."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol


class RunClock(Protocol):
    """Turns stored moments into points of the monotonic clock, and back.

    Whatever counts a duration inside a process counts it by the monotonic clock: no clock that is set moves its end.
    """

    def now(self) -> datetime:
        """Return the present moment (aware, UTC)."""

    def moment_of(self, monotonic: float) -> datetime:
        """Return the moment (aware, UTC) at a point of `time.monotonic`, in seconds."""

    def monotonic_of(self, moment: datetime) -> float:
        """Return the point of `time.monotonic`, in seconds, at an aware moment."""
