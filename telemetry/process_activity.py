"""Activity of this process that its reports of presence carry: always counted, also without metrics.

The numbers are plain and without locks: the thread of the event loop alone changes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class DutyTick:
    """Last tick of a periodic duty."""

    every_seconds: float
    seconds: float
    """Time that it took."""
    ended_at: float
    """End, by the monotonic clock of the process."""


@dataclass(slots=True, eq=False)
class ProcessActivity:
    """Numbers of one process since its start."""

    claims: int = 0
    """Claimed executions."""
    commits: int = 0
    """Transactions with records of executions."""
    committed_runs: int = 0
    """Executions with records in these transactions, counted once for each."""
    count_streams: Callable[[], int] | None = None
    """Returns the number of open event streams; None in processes without any."""
    retention: Mapping[str, int] = field(default_factory=dict)
    """Retention by name, in days; empty unless the process deletes old rows."""
    duties: dict[str, DutyTick] = field(default_factory=dict)
    """Last ticks of periodic duties by name; empty in processes other than the leading scheduler."""


ACTIVITY: Final = ProcessActivity()
"""Activity of this process."""


class ActivityMeter:
    """Meter of the activity between two reports of a process."""

    def __init__(self, activity: ProcessActivity = ACTIVITY) -> None:
        self._activity = activity
        self._at = time.monotonic()
        self._claims, self._commits, self._committed_runs = 0, 0, 0

    def take(self) -> dict[str, Any]:
        """Return the activity since the last call as JSON: `claims` and `commits` per second, `commitSize` as
        the mean number of executions in a commit, `streams`, `retention`, and `duties` with the age of their last
        ticks; without those that do not apply.
        """
        now, activity = time.monotonic(), self._activity
        seconds = max(now - self._at, 0.001)
        claims = activity.claims - self._claims
        commits = activity.commits - self._commits
        committed = activity.committed_runs - self._committed_runs
        self._at = now
        self._claims, self._commits = activity.claims, activity.commits
        self._committed_runs = activity.committed_runs
        shown: dict[str, Any] = {
            "claims": round(claims / seconds, 1),
            "commits": round(commits / seconds, 1),
        }
        if commits:
            shown["commitSize"] = round(committed / commits, 1)
        if activity.count_streams is not None:
            shown["streams"] = activity.count_streams()
        if activity.retention:
            shown["retention"] = dict(activity.retention)
        if activity.duties:
            shown["duties"] = {
                name: {
                    "every": tick.every_seconds,
                    "seconds": round(tick.seconds, 3),
                    "age": round(now - tick.ended_at, 1),
                }
                for name, tick in activity.duties.items()
            }
        return shown
