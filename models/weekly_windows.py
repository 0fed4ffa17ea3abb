"""Hours of the week in which something is open, in the local time of a zone: as a level, so that clock changes, missed
ticks and restarts need no care.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cache, lru_cache
from typing import Final
from zoneinfo import ZoneInfo, available_timezones

DAY_MINUTES: Final = 1_440
WEEK_MINUTES: Final = 7 * DAY_MINUTES
HORIZON: Final = timedelta(days=22)
"""Whatever opens or closes at all does so within this time: once a week, and not on a day whose hour is skipped."""
_NO_PLACES: Final = {"Factory", "localtime", "posixrules"}
"""What some systems keep among the zones, though it says nothing of where it is."""
_STEP: Final = timedelta(days=2)
_SAMPLE: Final = timedelta(hours=6)
_SECOND: Final = timedelta(seconds=1)


class EmptyWindow(ValueError):
    """A window ends when it starts, other than at midnight."""


@dataclass(frozen=True, slots=True)
class WeeklyWindow:
    """Some hours, on some days of every week."""

    days: tuple[int, ...]
    """0 is Sunday, 6 is Saturday: those on which it starts."""
    start_minute: int
    end_minute: int
    """Counted from the midnight before its start, so more than 1,440 where it ends on the day after."""


@dataclass(frozen=True, slots=True)
class WindowSchedule:
    """Windows, which may overlap, and the zone whose local time they mean."""

    timezone: str
    windows: tuple[WeeklyWindow, ...]


@dataclass(frozen=True, slots=True)
class WindowChange:
    """The moment at which a schedule opens or closes."""

    at: datetime
    is_open: bool
    """What it is from then on."""
    is_by_clock: bool
    """The clocks change at this moment, and that opens or closes it."""


@dataclass(frozen=True, slots=True)
class ZoneClockChange:
    """The moment at which a zone's local time jumps."""

    at: datetime
    offset_before: timedelta
    offset_after: timedelta


@cache
def zone_names() -> frozenset[str]:
    """Return the names that a schedule may have for its zone."""
    return frozenset(available_timezones() - _NO_PLACES)


def parse_window(days: Iterable[int], start: str, end: str) -> WeeklyWindow:
    """Return a window from its texts, `HH:MM`, the end also `24:00`; raises `EmptyWindow`.

    One that ends before it starts ends on the day after; `00:00` to `00:00` is the whole day.
    """
    start_minute, end_minute = _parse_minute(start), _parse_minute(end)
    if start_minute == end_minute != 0:
        raise EmptyWindow(f"A window can't end when it starts, at {start}")
    if end_minute <= start_minute:
        end_minute += DAY_MINUTES
    return WeeklyWindow(tuple(sorted(set(days))), start_minute, end_minute)


def is_open(schedule: WindowSchedule, now: datetime) -> bool:
    """Tell whether a schedule is open at a moment."""
    local = now.astimezone(ZoneInfo(schedule.timezone))
    minute = _day_of_week(local.date()) * DAY_MINUTES + local.hour * 60 + local.minute
    week = _week_minutes(schedule.windows)
    return bisect_right(week, minute) % 2 == 1


def next_opening(schedule: WindowSchedule, since: datetime) -> datetime | None:
    """Return when a schedule opens the next time after a moment; None where it never closes."""
    return next((one.at for one in window_changes(schedule, since, since + HORIZON) if one.is_open), None)


def next_closing(schedule: WindowSchedule, since: datetime) -> datetime | None:
    """Return when a schedule closes the next time after a moment; None where it never closes."""
    return next((one.at for one in window_changes(schedule, since, since + HORIZON) if not one.is_open), None)


def window_changes(schedule: WindowSchedule, since: datetime, until: datetime) -> Iterator[WindowChange]:
    """Return the changes after one moment and up to another, in order."""
    week = _week_minutes(schedule.windows)
    if week == (0, WEEK_MINUTES):
        return
    was_open = is_open(schedule, since)
    start = since.astimezone(UTC)
    while start < until:
        end = min(start + _STEP, until)
        clocks = {one.at for one in zone_clock_changes(schedule.timezone, start, end)}
        edges = set(_edge_moments(week, ZoneInfo(schedule.timezone), start, end))
        for at in sorted(clocks | edges):
            # The local time runs on evenly between these moments, and only there can anything change.
            if is_open(schedule, at) != was_open:
                was_open = not was_open
                yield WindowChange(at, was_open, at in clocks)
        start = end


def zone_clock_changes(timezone: str, since: datetime, until: datetime) -> Iterator[ZoneClockChange]:
    """Return the moments after one and up to another at which the local time of a zone jumps, in order."""
    zone = ZoneInfo(timezone)
    start = since.astimezone(UTC)
    before = _utc_offset(zone, start)
    while start < until:
        end = min(start + _SAMPLE, until)
        after = _utc_offset(zone, end)
        if after != before:
            yield ZoneClockChange(_find_jump(zone, start, end), before, after)
        start, before = end, after


# ── local time ──────────────────────────────────────────────────────────────────────────────────────────────


def _parse_minute(text: str) -> int:
    hours, _, minutes = text.partition(":")
    return int(hours) * 60 + int(minutes)


def _day_of_week(day: date) -> int:
    """Return the day of the week, 0 for Sunday."""
    return day.isoweekday() % 7


@lru_cache(maxsize=1_024)
def _week_minutes(windows: Sequence[WeeklyWindow]) -> tuple[int, ...]:
    """Return the minutes of the week, from midnight on Sunday, at which it opens, closes, opens and so on."""
    spans: list[tuple[int, int]] = []
    for one in windows:
        for day in one.days:
            start, end = (day * DAY_MINUTES + minute for minute in (one.start_minute, one.end_minute))
            spans.append((start, min(end, WEEK_MINUTES)))
            if end > WEEK_MINUTES:
                spans.append((0, end - WEEK_MINUTES))
    united: list[int] = []
    for start, end in sorted(spans):
        if united and start <= united[-1]:
            united[-1] = max(united[-1], end)
        else:
            united += [start, end]
    return tuple(united)


def _edge_moments(
    week: Sequence[int], zone: ZoneInfo, since: datetime, until: datetime
) -> Iterator[datetime]:
    """Return when the local time passes minutes of the week, after one moment and up to another.

    A local time that comes twice is passed twice. One that is skipped is passed when the clocks change, which is not
    among these.
    """
    # The dates that a zone has between two moments are less than a day from those of UTC.
    day = since.date() - timedelta(days=1)
    while day <= until.date() + timedelta(days=1):
        first = _day_of_week(day) * DAY_MINUTES
        for minute in week:
            if not first <= minute <= first + DAY_MINUTES:
                continue
            local = datetime.combine(day, time()) + timedelta(minutes=minute - first)
            for fold in (0, 1):
                at = local.replace(tzinfo=zone, fold=fold).astimezone(UTC)
                if since < at <= until:
                    yield at
        day += timedelta(days=1)


def _utc_offset(zone: ZoneInfo, at: datetime) -> timedelta:
    return at.astimezone(zone).utcoffset() or timedelta()


def _find_jump(zone: ZoneInfo, start: datetime, end: datetime) -> datetime:
    """Return the moment between two at which the offset becomes that of the second, to the second."""
    before = _utc_offset(zone, start)
    while end - start > _SECOND:
        middle = start + (end - start) // 2
        if _utc_offset(zone, middle) == before:
            start = middle
        else:
            end = middle
    # Clocks change at whole seconds: the one that the last two moments have between them.
    return end.replace(microsecond=0)
