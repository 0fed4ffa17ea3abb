"""Calendar of a deployment: one row for each day in UTC, with its windows and the times up, past and planned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from msgspec import Struct

from models.timestamps import parse_timestamp

DAY: Final = timedelta(days=1)
HOUR_SECONDS: Final = 3_600
SPOKEN_BARS: Final = 12
"""Bars of a day that a screen reader reads: dozens would take minutes."""
LEAST: Final = 0.2
"""Width of the narrowest bar in percent, so that a short time is seen."""
LEAST_TIME: Final = DAY * LEAST / 100
"""Length of the shortest time between two bars that is seen: less than a pixel would be drawn."""
BORDERLESS: Final = frozenset({"up", "hand"})
"""Tones of bars of which several may be drawn as one."""
WORDS: Final = {"window": "window", "up": "up", "hand": "up, started by hand", "pre": "will be up"}
"""Words for each tone of a bar."""


class CalendarBar(Struct, frozen=True):
    """Part of a day, in percent of its width; `tone` is `window`, `up`, `hand` by a user, or `pre` for a forecast."""

    x: float
    width: float
    tone: str
    title: str


class DrawnDay(Struct, frozen=True):
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


class _Span(Struct, frozen=True):
    start: datetime
    end: datetime
    tone: str
    has_breaks: bool = False
    """Whether it is several times with breaks between them that are too short to be seen."""


def draw_calendar(calendar: Mapping[str, Any], clock_changes: Sequence[datetime]) -> Sequence[DrawnDay]:
    """Return the days of the API's calendar in UTC, the earliest first; `clock_changes` are moments to mark."""
    spans = _cut_to_days(_list_spans(calendar))
    failures = [parse_timestamp(at) for at in calendar["failedStarts"]]
    now = parse_timestamp(calendar["now"])
    return [_draw_day(day, spans, failures, clock_changes, now) for day in calendar["days"]]


def _cut_to_days(spans: Iterable[_Span]) -> Mapping[datetime, Sequence[_Span]]:
    """Return the parts of spans by day, the key is its midnight in UTC; days without any are left out.

    Times awake in a row become one if the breaks between them are too short to be seen. Other spans stay separate,
    since they have borders.
    """
    found: dict[datetime, list[_Span]] = {}
    for one in spans:
        day = one.start.replace(hour=0, minute=0, second=0, microsecond=0)
        while day < one.end:
            start, end = max(one.start, day), min(one.end, day + DAY)
            parts = found.setdefault(day, [])
            last = parts[-1] if parts and one.tone in BORDERLESS and parts[-1].tone == one.tone else None
            if last and timedelta() <= start - last.end < LEAST_TIME:
                has_breaks = last.has_breaks or start > last.end
                parts[-1] = _Span(last.start, end, one.tone, has_breaks)
            else:
                parts.append(_Span(start, end, one.tone))
            day += DAY
    return found


def _list_spans(calendar: Mapping[str, Any]) -> Iterator[_Span]:
    """Yield the spans of windows, times awake and planned times of a calendar, in the order in which they are drawn,
    the lowest first.

    A time awake has the tone `hand` if a user started it, unless by a deployment.
    """
    for one in calendar["windows"]:
        yield _Span(parse_timestamp(one["start"]), parse_timestamp(one["end"]), "window")
    for one in calendar["awake"]:
        is_by_hand = one["isByHand"] and one["reason"] != "deployed"
        yield _Span(
            parse_timestamp(one["start"]), parse_timestamp(one["end"]), "hand" if is_by_hand else "up"
        )
    for one in calendar["planned"]:
        yield _Span(parse_timestamp(one["start"]), parse_timestamp(one["end"]), "pre")


def _draw_day(
    day: Mapping[str, Any],
    spans: Mapping[datetime, Sequence[_Span]],
    failures: Sequence[datetime],
    clock_changes: Sequence[datetime],
    now: datetime,
) -> DrawnDay:
    """Return a day with the parts of spans within it in percent of its width, marks, and its pod time."""
    start = parse_timestamp(day["startsAt"])
    end = start + DAY
    is_today = start <= now < end
    seconds = day["plannedPodSeconds"] if start > now else day["podSeconds"]
    bars = [_draw_bar(one, start) for one in spans.get(start, ())]
    return DrawnDay(
        f"{start:%a} {start.day}",
        is_today,
        start > now,
        seconds / HOUR_SECONDS,
        day["alwaysOnPodSeconds"] / HOUR_SECONDS,
        bars,
        _say_bars(bars),
        _mark_moments(start, failures),
        _mark_moments(start, clock_changes),
        _compute_percent(now - start) if is_today else None,
    )


def _draw_bar(span: _Span, day: datetime) -> CalendarBar:
    """Return the bar of a span within a day, with its times in UTC as title."""
    end = "24:00" if span.end == day + DAY else f"{span.end:%H:%M}"
    breaks = " with short breaks" if span.has_breaks else ""
    return CalendarBar(
        _compute_percent(span.start - day),
        max(_compute_percent(span.end - span.start), LEAST),
        span.tone,
        f"{WORDS[span.tone]}{breaks}, {span.start:%H:%M} to {end}",
    )


def _say_bars(bars: Sequence[CalendarBar]) -> str:
    """Return the titles of the first 12 bars of a day as text for a screen reader, and the number of the others.

    Without bars, the text is `never up`.
    """
    more = len(bars) - SPOKEN_BARS
    said = [bar.title for bar in bars[:SPOKEN_BARS]] + ([f"and {more} more"] if more > 0 else [])
    return "; ".join(said) or "never up"


def _mark_moments(day: datetime, moments: Sequence[datetime]) -> Sequence[float]:
    """Return the positions of the moments within a day, in percent of its width."""
    return [_compute_percent(one - day) for one in moments if day <= one < day + DAY]


def _compute_percent(time: timedelta) -> float:
    """Return a time of at most a day as percent of a day."""
    return round(100 * (time / DAY), 2)
