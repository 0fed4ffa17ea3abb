"""Calendar of a deployment: one row for each day in UTC, with the times in which it was up or will be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from gateway.dashboard.formats import parse_instant

DAY: Final = timedelta(days=1)
PAST_DAYS: Final = 7
FUTURE_DAYS: Final = 6
STARTS: Final = frozenset({"start", "wake"})
STOPS: Final = frozenset({"stop"})


@dataclass(frozen=True, slots=True)
class UpTime:
    """Time in which a deployment is up: `tone` is `up`, `hand` for a start by a user, or `pre` for a forecast."""

    start: datetime
    end: datetime
    tone: str


@dataclass(frozen=True, slots=True)
class CalendarBar:
    """Part of a day, in percent of its width."""

    x: float
    width: float
    tone: str


@dataclass(frozen=True, slots=True)
class CalendarDay:
    """Day of the calendar with its bars; `hours` is the time up."""

    label: str
    is_today: bool
    is_future: bool
    hours: float
    bars: Sequence[CalendarBar]
    failures: Sequence[float]
    """Positions at which a start failed, in percent."""
    clock_changes: Sequence[float]
    """Positions at which the clocks of the schedule's zone change, in percent."""
    now_x: float | None


def list_up_times(decisions: Iterable[Mapping[str, Any]], now: datetime, *, is_up: bool) -> Sequence[UpTime]:
    """Return the past times up of a deployment, the earliest first, from its decisions with the newest first.

    If `is_up`, the last one ends at `now`. `by hand` means a start by a user other than the deployment
    itself; a start or wake without a later stop counts to the next decision.
    """
    found: list[UpTime] = []
    end, by_hand = now if is_up else None, False
    for decision in decisions:
        at = parse_instant(decision["at"]) or now
        if decision["action"] in STOPS:
            end = at
        elif decision["action"] in STARTS:
            by_hand = decision["userId"] is not None and decision["reason"] != "deployed"
            if end is not None:
                found.append(UpTime(at, end, "hand" if by_hand else "up"))
            end = None
    return found[::-1]


def list_forecast(
    lifecycle: Mapping[str, Any],
    transitions: Iterable[Mapping[str, Any]],
    now: datetime,
    *,
    is_up: bool,
) -> Sequence[UpTime]:
    """Return the times in which a deployment will be up without further events.

    `lifecycle` is the API's answer for the workflow, `transitions` are its planned starts and stops in order.
    With a `scheduled-window` policy, the times are those between them, even if it is down now. Otherwise it is
    one time until the next planned stop, or until the end of the calendar without one; none if it is down.
    """
    end_of_calendar = start_of_day(now) + (FUTURE_DAYS + 1) * DAY
    if lifecycle["lifecyclePolicy"]["type"] == "scheduled-window":
        return _list_windows(transitions, now, end_of_calendar, is_open=is_up)
    if not is_up:
        return ()
    stop = parse_instant(lifecycle["nextTransitionAt"]) if lifecycle["nextTransition"] == "stop" else None
    return [UpTime(now, max(stop, now) if stop else end_of_calendar, "pre")]


def _list_windows(
    transitions: Iterable[Mapping[str, Any]], now: datetime, end: datetime, *, is_open: bool
) -> Sequence[UpTime]:
    """Return the windows up to `end` from planned starts and stops in their order; if `is_open`, the first
    begins `now`.
    """
    found: list[UpTime] = []
    start = now if is_open else None
    for one in transitions:
        at = parse_instant(one["at"]) or now
        if one["action"] == "start":
            start = start or at
        elif start is not None:
            found.append(UpTime(start, at, "pre"))
            start = None
    return [*found, *([UpTime(start, end, "pre")] if start is not None else [])]


def draw_calendar(
    up_times: Sequence[UpTime],
    failures: Sequence[datetime],
    clock_changes: Sequence[datetime],
    now: datetime,
) -> Sequence[CalendarDay]:
    """Return the 14 days of the calendar in UTC, the earliest first: seven before today, today, and six after it.

    `failures` and `clock_changes` are moments to mark.
    """
    today = start_of_day(now)
    return [
        _draw_day(today + number * DAY, up_times, failures, clock_changes, now)
        for number in range(-PAST_DAYS, FUTURE_DAYS + 1)
    ]


def _draw_day(
    day: datetime,
    up_times: Sequence[UpTime],
    failures: Sequence[datetime],
    clock_changes: Sequence[datetime],
    now: datetime,
) -> CalendarDay:
    """Return a day with its bars: the parts of `up_times` within it in percent of its width, the failures,
    changes of the clocks, and the hours up.
    """
    clipped = [
        (max(one.start, day), min(one.end, day + DAY), one.tone)
        for one in up_times
        if one.start < day + DAY and one.end > day
    ]
    up = sum(((end - start) for start, end, _ in clipped), timedelta())
    is_today = day == start_of_day(now)
    return CalendarDay(
        f"{day:%a} {day.day}",
        is_today,
        day > now,
        round(up / timedelta(hours=1), 1),
        [
            CalendarBar(_compute_percent(start - day), max(_compute_percent(end - start), 0.2), tone)
            for start, end, tone in clipped
        ],
        _mark_moments(day, failures),
        _mark_moments(day, clock_changes),
        _compute_percent(now - day) if is_today else None,
    )


def _mark_moments(day: datetime, moments: Sequence[datetime]) -> Sequence[float]:
    """Return the positions of the moments within a day, in percent of its width."""
    return [_compute_percent(one - day) for one in moments if day <= one < day + DAY]


def _compute_percent(time: timedelta) -> float:
    """Return a time of at most a day as percent of a day."""
    return round(100 * (time / DAY), 2)


def start_of_day(moment: datetime) -> datetime:
    """Return midnight of the moment's day in its time zone."""
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)
