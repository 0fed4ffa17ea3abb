"""Calendar of a deployment: one row for each day in UTC, with its windows and the times up, past and planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from gateway.dashboard.formats import parse_moment

DAY: Final = timedelta(days=1)
HOUR_SECONDS: Final = 3_600
SPOKEN_BARS: Final = 12
"""Bars of a day that a screen reader reads: dozens would take minutes."""
LEAST: Final = 0.2
"""Width of the narrowest bar in percent, so that a short time is seen."""


@dataclass(frozen=True, slots=True)
class CalendarBar:
    """Part of a day, in percent of its width; `tone` is `window`, `up`, `hand` by a user, or `pre` for a forecast."""

    x: float
    width: float
    tone: str
    title: str


@dataclass(frozen=True, slots=True)
class CalendarDay:
    """Day of the calendar with its bars; `hours` is the pod time, for days to come the planned one."""

    label: str
    is_today: bool
    is_future: bool
    hours: float
    always_on_hours: float
    bars: Sequence[CalendarBar]
    spoken: str
    """The first bars in words."""
    failures: Sequence[float]
    """Positions at which a start failed, in percent."""
    clock_changes: Sequence[float]
    """Positions at which the clocks of the schedule's zone change, in percent."""
    now_x: float | None


@dataclass(frozen=True, slots=True)
class _Span:
    start: datetime
    end: datetime
    tone: str


def draw_calendar(calendar: Mapping[str, Any], clock_changes: Sequence[datetime]) -> Sequence[CalendarDay]:
    """Return the days of the API's calendar in UTC, the earliest first; `clock_changes` are moments to mark."""
    spans = [*_list_spans(calendar)]
    failures = [parse_moment(at) for at in calendar["failedStarts"]]
    now = parse_moment(calendar["now"])
    return [_draw_day(day, spans, failures, clock_changes, now) for day in calendar["days"]]


def _list_spans(calendar: Mapping[str, Any]) -> Iterator[_Span]:
    """Yield windows, past times up and planned ones, those below others first.

    A deployment is a start by a user too, but not one that keeps pods awake.
    """
    for one in calendar["windows"]:
        yield _Span(parse_moment(one["start"]), parse_moment(one["end"]), "window")
    for one in calendar["awake"]:
        is_by_hand = one["isByHand"] and one["reason"] != "deployed"
        yield _Span(parse_moment(one["start"]), parse_moment(one["end"]), "hand" if is_by_hand else "up")
    for one in calendar["planned"]:
        yield _Span(parse_moment(one["start"]), parse_moment(one["end"]), "pre")


def _draw_day(
    day: Mapping[str, Any],
    spans: Sequence[_Span],
    failures: Sequence[datetime],
    clock_changes: Sequence[datetime],
    now: datetime,
) -> CalendarDay:
    """Return a day with the parts of spans within it in percent of its width, marks, and its pod time."""
    start = parse_moment(day["startsAt"])
    end = start + DAY
    is_today = start <= now < end
    seconds = day["plannedPodSeconds"] if start > now else day["podSeconds"]
    bars = [_draw_bar(one, start) for one in spans if one.start < end and one.end > start]
    return CalendarDay(
        f"{start:%a} {start.day}",
        is_today,
        start > now,
        round(seconds / HOUR_SECONDS, 1),
        round(day["alwaysOnPodSeconds"] / HOUR_SECONDS, 1),
        bars,
        _say_bars(bars),
        _mark_moments(start, failures),
        _mark_moments(start, clock_changes),
        _compute_percent(now - start) if is_today else None,
    )


def _draw_bar(span: _Span, day: datetime) -> CalendarBar:
    """Return the part of a span within a day, with its times in UTC as title."""
    start, end = max(span.start, day), min(span.end, day + DAY)
    words = {"window": "window", "up": "up", "hand": "up, started by hand", "pre": "will be up"}[span.tone]
    return CalendarBar(
        _compute_percent(start - day),
        max(_compute_percent(end - start), LEAST),
        span.tone,
        f"{words}, {start:%H:%M} to {'24:00' if end == day + DAY else f'{end:%H:%M}'}",
    )


def _say_bars(bars: Sequence[CalendarBar]) -> str:
    """Return the first 12 bars of a day in words, and the number of the others."""
    more = len(bars) - SPOKEN_BARS
    said = [bar.title for bar in bars[:SPOKEN_BARS]] + ([f"and {more} more"] if more > 0 else [])
    return "; ".join(said) or "never up"


def _mark_moments(day: datetime, moments: Sequence[datetime]) -> Sequence[float]:
    """Return the positions of the moments within a day, in percent of its width."""
    return [_compute_percent(one - day) for one in moments if day <= one < day + DAY]


def _compute_percent(time: timedelta) -> float:
    """Return a time of at most a day as percent of a day."""
    return round(100 * (time / DAY), 2)
