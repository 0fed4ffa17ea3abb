"""Weekly windows in the local time of a zone.

They are functions of time, so that clock changes, missed ticks and restarts need no special handling.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from functools import cache, lru_cache
from typing import Final
from zoneinfo import ZoneInfo, available_timezones

from msgspec import Struct

DAY_MINUTES: Final = 1_440
WEEK_MINUTES: Final = 7 * DAY_MINUTES
HORIZON: Final = timedelta(days=22)
"""Time within which a schedule opens or closes, if ever: once a week, except on a day with a skipped hour."""
_NO_PLACES: Final = {"Factory", "localtime", "posixrules"}
"""Entries that some systems list among time zones and that name no place."""
_STEP: Final = timedelta(days=2)
_SAMPLE: Final = timedelta(hours=6)
_SECOND: Final = timedelta(seconds=1)


class EmptyWindow(ValueError):
    """The window ends when it starts, other than at midnight."""


class WeeklyWindow(Struct, frozen=True):
    """Span of hours on some days of every week."""

    days: tuple[int, ...]
    """Days on which it starts; 0 is Sunday, 6 is Saturday."""
    start_minute: int
    end_minute: int
    """End in minutes since the midnight before its start, so above 1,440 if it ends on the next day."""


class WindowSchedule(Struct, frozen=True):
    """Windows, which may overlap, and the time zone of their local times."""

    timezone: str
    windows: tuple[WeeklyWindow, ...]


class WindowChange(Struct, frozen=True):
    """Opening or closing of a schedule."""

    at: datetime
    is_open: bool
    """State after the change."""
    is_by_clock: bool
    """Whether a clock change at this time causes it."""


class ZoneClockChange(Struct, frozen=True):
    """Jump of a zone's local time."""

    at: datetime
    offset_before: timedelta
    offset_after: timedelta


@cache
def zone_names() -> frozenset[str]:
    """Return the valid names of time zones for a schedule: those of places, such as `Europe/Berlin`."""
    return frozenset(available_timezones() - _NO_PLACES)


def parse_window(days: Iterable[int], start: str, end: str) -> WeeklyWindow:
    """Return a window from local times `HH:MM` on days of the week (0 is Sunday); the end may be `24:00`.

    A window that ends before it starts ends on the next day; `00:00` to `00:00` is the whole day. Raises
    `EmptyWindow` for any other equal times.
    """
    start_minute, end_minute = _parse_minute(start), _parse_minute(end)
    if start_minute == end_minute != 0:
        raise EmptyWindow(f"A window can't end when it starts, at {start}")
    if end_minute <= start_minute:
        end_minute += DAY_MINUTES
    return WeeklyWindow(tuple(sorted(set(days))), start_minute, end_minute)


def is_open(schedule: WindowSchedule, now: datetime) -> bool:
    """Return whether a schedule is open at a time, by the local time of its zone.

    A window includes its start and excludes its end. Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
    local = now.astimezone(ZoneInfo(schedule.timezone))
    minute = _day_of_week(local.date()) * DAY_MINUTES + local.hour * 60 + local.minute
    week = _week_minutes(schedule.windows)
    return bisect_right(week, minute) % 2 == 1


def next_opening(schedule: WindowSchedule, since: datetime) -> datetime | None:
    """Return the next opening of a schedule after a time, None if there is none within 22 days.

    None also for a schedule that never closes. Raises `ZoneInfoNotFoundError`.
    """
    return next((one.at for one in window_changes(schedule, since, since + HORIZON) if one.is_open), None)


def next_closing(schedule: WindowSchedule, since: datetime) -> datetime | None:
    """Return the next closing of a schedule after a time, None if there is none within 22 days.

    None for a schedule that never closes. Raises `ZoneInfoNotFoundError`.
    """
    return next((one.at for one in window_changes(schedule, since, since + HORIZON) if not one.is_open), None)


def window_changes(schedule: WindowSchedule, since: datetime, until: datetime) -> Iterator[WindowChange]:
    """Yield the openings and closings after `since` and up to `until`, in order; none if the schedule never closes.

    Overlapping windows count as one. Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
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
            # Local time is continuous between these times, so only at them can the state change.
            if is_open(schedule, at) != was_open:
                was_open = not was_open
                yield WindowChange(at, was_open, at in clocks)
        start = end


def zone_clock_changes(timezone: str, since: datetime, until: datetime) -> Iterator[ZoneClockChange]:
    """Yield the changes of a zone's UTC offset after `since` and up to `until`, in order.

    Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
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
    """Return the minute of the day of a text `HH:MM`, 0 to 1,440."""
    hours, _, minutes = text.partition(":")
    return int(hours) * 60 + int(minutes)


def _day_of_week(day: date) -> int:
    """Return the day of the week, 0 for Sunday."""
    return day.isoweekday() % 7


@lru_cache(maxsize=1_024)
def _week_minutes(windows: Sequence[WeeklyWindow]) -> tuple[int, ...]:
    """Return the minutes since Sunday's midnight at which windows alternately open and close.

    Windows that overlap or touch are united.
    """
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
    """Yield the times after `since` and up to `until` at which the local time passes one of the minutes in `week`.

    A repeated local time is passed twice. A skipped time is passed at the clock change, which is not among these times.
    """
    # Local dates between two times differ by less than a day from those in UTC.
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
    """Return the second between two times at which a zone's UTC offset changes."""
    before = _utc_offset(zone, start)
    while end - start > _SECOND:
        middle = start + (end - start) // 2
        if _utc_offset(zone, middle) == before:
            start = middle
        else:
            end = middle
    # Clocks change at whole seconds: at the one between the last two times.
    return end.replace(microsecond=0)
