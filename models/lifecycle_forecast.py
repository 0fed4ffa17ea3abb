"""Forecast and replay of a lifecycle policy: coming window changes, and past pod time, cold starts and waits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Final

from msgspec import Struct

from models import weekly_windows
from models.lifecycle_policy import (
    ON_DEMAND_TIME,
    AlwaysOnPolicy,
    DeploymentPolicy,
    IdleShutdownPolicy,
    OnDemandPolicy,
    ScheduledWindowPolicy,
)
from models.weekly_windows import WindowChange, WindowSchedule, ZoneClockChange

PREVIEW_TIME: Final = timedelta(days=14)
"""Length of a preview in each direction, forecast and replay."""
COLD_START: Final = timedelta(seconds=10)
"""Assumed wait of a run for stopped pods."""


class PastRun(Struct, frozen=True):
    """Past run: a pod was busy with it between two times."""

    accepted_at: datetime
    ended_at: datetime


class PolicyReplay(Struct, frozen=True):
    """Cost and delay of past runs under a policy."""

    up_times: Sequence[tuple[datetime, datetime]]
    """Start and end of each time for which one pod would have been up, in order."""
    cold_starts: int
    """Number of runs that would have started the pod."""
    waits: Sequence[timedelta]
    """Waits of runs for a pod, without runs that would not have waited."""

    @property
    def pod_time(self) -> timedelta:
        """Total time for which one pod would have been up."""
        return sum((end - start for start, end in self.up_times), timedelta())

    def sum_pod_time(self, since: datetime, until: datetime) -> timedelta:
        """Return the total time for which one pod would have been up between two times."""
        return sum(
            (
                min(end, until) - max(start, since)
                for start, end in self.up_times
                if start < until and end > since
            ),
            timedelta(),
        )


def policy_changes(policy: DeploymentPolicy, now: datetime) -> Sequence[WindowChange]:
    """Return the openings and closings of a policy's windows within the next 14 days; none for policies without
    windows.

    Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
    match policy:
        case ScheduledWindowPolicy(schedule):
            return [*weekly_windows.window_changes(schedule, now, now + PREVIEW_TIME)]
        case _:
            return []


def policy_clock_changes(policy: DeploymentPolicy, now: datetime) -> Sequence[ZoneClockChange]:
    """Return the changes of the clocks in a policy's time zone within the next 14 days; none for policies without
    windows.

    Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
    match policy:
        case ScheduledWindowPolicy(schedule):
            return [*weekly_windows.zone_clock_changes(schedule.timezone, now, now + PREVIEW_TIME)]
        case _:
            return []


def replay_runs(
    policy: DeploymentPolicy, runs: Sequence[PastRun], since: datetime, until: datetime
) -> PolicyReplay:
    """Return the pod time, cold starts and waits that `policy` would have caused for past runs between two times.

    `runs` must be sorted by acceptance. A cold start counts as a wait of ten seconds. Raises `ZoneInfoNotFoundError`
    for an unknown time zone.
    """
    match policy:
        case AlwaysOnPolicy():
            return PolicyReplay([(since, until)], 0, [])
        case IdleShutdownPolicy(minutes):
            return _replay_on_demand(runs, timedelta(minutes=minutes), until)
        case OnDemandPolicy():
            return _replay_on_demand(runs, ON_DEMAND_TIME, until)
        case ScheduledWindowPolicy(schedule):
            return _replay_schedule(schedule, runs, since, until)


def _replay_on_demand(runs: Sequence[PastRun], keep: timedelta, until: datetime) -> PolicyReplay:
    """Return the result for pods that start for a run and stop once no run has been in progress for `keep`."""
    up_times: list[tuple[datetime, datetime]] = []
    for run in runs:
        end = run.ended_at + keep
        if up_times and run.accepted_at < up_times[-1][1]:
            up_times[-1] = (up_times[-1][0], max(up_times[-1][1], end))
        else:
            up_times.append((run.accepted_at, end))
    cold_starts = len(up_times)
    if up_times:
        up_times[-1] = (up_times[-1][0], min(up_times[-1][1], until))
    return PolicyReplay(up_times, cold_starts, [COLD_START] * cold_starts)


def _replay_schedule(
    schedule: WindowSchedule, runs: Sequence[PastRun], since: datetime, until: datetime
) -> PolicyReplay:
    """Return the result for pods that are up while a schedule is open; runs outside of its windows wait for the next
    opening.

    Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
    spans = [*_open_spans(schedule, since, until)]
    up_times = [(opens_at, min(closes_at, until)) for opens_at, closes_at in spans if opens_at < until]
    waits: list[timedelta] = []
    place = 0
    for run in runs:
        while place < len(spans) and spans[place][1] <= run.accepted_at:
            place += 1
        if place < len(spans) and run.accepted_at < spans[place][0]:
            waits.append(spans[place][0] - run.accepted_at)
    return PolicyReplay(up_times, 0, waits)


def _open_spans(
    schedule: WindowSchedule, since: datetime, until: datetime
) -> Iterator[tuple[datetime, datetime]]:
    """Yield start and end of the open times of a schedule from `since` on, including the first that begins after
    `until`.

    Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
    end = until + weekly_windows.HORIZON
    opens_at = since if weekly_windows.is_open(schedule, since) else None
    for change in weekly_windows.window_changes(schedule, since, end):
        if change.is_open:
            opens_at = change.at
        elif opens_at is not None:
            yield opens_at, change.at
            if opens_at > until:
                return
            opens_at = None
    if opens_at is not None:
        yield opens_at, end
