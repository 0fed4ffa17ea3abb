"""Windows against an oracle that looks at every minute, on the days around every change of some clocks."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import weekly_windows
from models.weekly_windows import EmptyWindow, WeeklyWindow, WindowSchedule

DAILY = range(7)
SUNDAY, MONDAY, THURSDAY, FRIDAY, SATURDAY = 0, 1, 4, 5, 6
ZONES = (
    "Africa/Cairo",  # clocks change at midnight: that of a day in April does not exist
    "Africa/Casablanca",  # clocks go back for Ramadan
    "America/Los_Angeles",
    "America/Havana",  # clocks go back to midnight, so that hour occurs twice
    "Asia/Kathmandu",  # three quarters of an hour off, and never changes
    "Australia/Lord_Howe",  # clocks change by half an hour
    "Europe/Dublin",
    "Pacific/Chatham",
    "UTC",
)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)


def make_schedule(zone: str, *given: tuple[object, str, str]) -> WindowSchedule:
    return WindowSchedule(
        zone,
        tuple(
            weekly_windows.parse_window(days, start, end)  # type: ignore[arg-type]
            for days, start, end in given
        ),
    )


def parse_moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def clock_change_hours(zone: str) -> list[datetime]:
    """Return the whole hours, of two years, before which the clocks of a zone changed; or a day where they don't."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    days = [start + 24 * HOUR * count for count in range(2 * 365)]
    hours = [day + HOUR * count for day, _ in iterate_changes(days, zone) for count in range(25)]
    return [after for _, after in iterate_changes(hours, zone)] or [start + 100 * HOUR]


def iterate_changes(moments: Sequence[datetime], zone: str) -> list[tuple[datetime, datetime]]:
    """Return those that follow each other, between which the clocks of a zone changed."""
    offsets = [moment.astimezone(ZoneInfo(zone)).utcoffset() for moment in moments]
    return [
        pair for pair, (one, other) in zip(pairwise(moments), pairwise(offsets), strict=True) if one != other
    ]


AROUND = [(zone, at) for zone in ZONES for at in clock_change_hours(zone)]


def is_inside(window: WeeklyWindow, local: datetime) -> bool:
    """Return whether a local time is inside a window that started today or yesterday."""
    minute = local.hour * 60 + local.minute
    today, yesterday = local.isoweekday() % 7, (local.isoweekday() - 1) % 7
    return (today in window.days and window.start_minute <= minute < window.end_minute) or (
        yesterday in window.days and minute < window.end_minute - 1_440
    )


def draw_times() -> st.SearchStrategy[str]:
    # Mostly close to the hours at which clocks change.
    hours = st.sampled_from([0, 1, 2]) | st.integers(0, 23)
    return st.builds(lambda hour, minute: f"{hour:02}:{minute:02}", hours, st.sampled_from([0, 15, 30, 59]))


def draw_windows() -> st.SearchStrategy[tuple[WeeklyWindow, ...]]:
    ends = st.tuples(draw_times(), draw_times() | st.just("24:00")).filter(
        lambda pair: pair[0] != pair[1] or pair[0] == "00:00"
    )
    days = st.just({*DAILY}) | st.sets(st.integers(0, 6), min_size=1)
    one = st.builds(lambda days, pair: weekly_windows.parse_window(days, *pair), days, ends)
    return st.lists(one, min_size=1, max_size=3).map(tuple)


@settings(max_examples=50)
@given(around=st.sampled_from(AROUND), chosen=draw_windows())
def test_a_schedule_matches_a_check_of_every_minute(
    around: tuple[str, datetime], chosen: tuple[WeeklyWindow, ...]
) -> None:
    zone, at = around
    plan = WindowSchedule(zone, chosen)
    since = at - timedelta(hours=30)
    minutes = [since + MINUTE * count for count in range(60 * 60)]
    local = [one.astimezone(ZoneInfo(zone)) for one in minutes]
    expected = [any(is_inside(window, one) for window in chosen) for one in local]
    assert [weekly_windows.is_open(plan, one) for one in minutes[::15]] == expected[::15]
    flips = [
        (minutes[index + 1], after)
        for index, (before, after) in enumerate(pairwise(expected))
        if before != after
    ]
    found = [(one.at, one.is_open) for one in weekly_windows.window_changes(plan, since, minutes[-1])]
    assert found == flips
    assert [one.at for one in weekly_windows.window_changes(plan, minutes[0], at)] == [
        f[0] for f in flips if f[0] <= at
    ]


# ── course of a day ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("plan", "since", "expected"),
    [
        pytest.param(
            make_schedule("America/Los_Angeles", ([SUNDAY], "02:30", "17:00")),
            "2026-03-08T00:00-08:00",
            ["2026-03-08T03:00-07:00 opens by the clock", "2026-03-08T17:00-07:00 closes"],
            id="a start that is skipped is when the clocks change",
        ),
        pytest.param(
            make_schedule("America/Los_Angeles", ([SUNDAY], "02:15", "02:45"), ([MONDAY], "09:00", "10:00")),
            "2026-03-08T00:00-08:00",
            ["2026-03-09T09:00-07:00 opens", "2026-03-09T10:00-07:00 closes"],
            id="a window that is skipped does not open",
        ),
        pytest.param(
            make_schedule("America/Los_Angeles", ([SUNDAY], "01:30", "03:00")),
            "2026-11-01T00:00-07:00",
            [
                "2026-11-01T01:30-07:00 opens",
                "2026-11-01T01:00-08:00 closes by the clock",
                "2026-11-01T01:30-08:00 opens",
                "2026-11-01T03:00-08:00 closes",
            ],
            id="an hour that comes twice is judged by the clock on the wall both times",
        ),
        pytest.param(
            make_schedule("Africa/Cairo", ([FRIDAY], "00:00", "08:00")),
            "2026-04-23T12:00+02:00",
            ["2026-04-24T01:00+03:00 opens by the clock", "2026-04-24T08:00+03:00 closes"],
            id="a day without midnight starts when it begins",
        ),
        pytest.param(
            make_schedule("Africa/Cairo", ([THURSDAY], "20:00", "24:00")),
            "2026-04-23T12:00+02:00",
            ["2026-04-23T20:00+02:00 opens", "2026-04-24T01:00+03:00 closes by the clock"],
            id="a day whose end is skipped ends there",
        ),
        pytest.param(
            make_schedule("Australia/Lord_Howe", ([SUNDAY], "01:45", "06:00")),
            "2026-04-05T00:00+11:00",
            [
                "2026-04-05T01:45+11:00 opens",
                "2026-04-05T01:30+10:30 closes by the clock",
                "2026-04-05T01:45+10:30 opens",
                "2026-04-05T06:00+10:30 closes",
            ],
            id="clocks may change by half an hour",
        ),
        pytest.param(
            make_schedule("UTC", ([SATURDAY], "22:00", "06:00")),
            "2026-01-03T00:00+00:00",
            ["2026-01-03T22:00+00:00 opens", "2026-01-04T06:00+00:00 closes"],
            id="a window across midnight belongs to the day on which it starts, across the end of the week too",
        ),
        pytest.param(
            make_schedule(
                "UTC", ([MONDAY], "09:00", "12:00"), ([MONDAY], "11:00", "13:00"), ([1], "13:00", "14:00")
            ),
            "2026-01-05T00:00+00:00",
            ["2026-01-05T09:00+00:00 opens", "2026-01-05T14:00+00:00 closes"],
            id="windows that overlap or meet are one",
        ),
        pytest.param(
            make_schedule("UTC", ([MONDAY], "00:00", "00:00")),
            "2026-01-04T12:00+00:00",
            ["2026-01-05T00:00+00:00 opens", "2026-01-06T00:00+00:00 closes"],
            id="midnight to midnight is the whole day",
        ),
    ],
)
def test_a_schedule_opens_and_closes(plan: WindowSchedule, since: str, expected: list[str]) -> None:
    start = parse_moment(since)
    zone = ZoneInfo(plan.timezone)
    found = [
        f"{one.at.astimezone(zone).isoformat(timespec='minutes')} {'opens' if one.is_open else 'closes'}"
        f"{' by the clock' if one.is_by_clock else ''}"
        for one in weekly_windows.window_changes(plan, start, start + timedelta(days=3))
    ]
    assert found == expected


def test_a_window_that_is_skipped_this_week_opens_in_the_next_but_one() -> None:
    plan = make_schedule("America/Los_Angeles", ([SUNDAY], "02:15", "02:45"))
    last = parse_moment("2026-03-01T02:45-08:00")
    assert weekly_windows.next_opening(plan, last) == parse_moment("2026-03-15T02:15-07:00")


@pytest.mark.parametrize(
    "plan",
    [
        make_schedule("UTC", (DAILY, "00:00", "24:00")),
        make_schedule("Africa/Cairo", (DAILY, "06:00", "18:00"), (DAILY, "18:00", "06:00")),
    ],
)
def test_a_schedule_without_a_gap_never_changes(plan: WindowSchedule) -> None:
    now = parse_moment("2026-04-23T12:00+02:00")
    assert weekly_windows.is_open(plan, now)
    assert not [*weekly_windows.window_changes(plan, now, now + weekly_windows.HORIZON)]


def test_the_start_is_inside_and_the_end_is_not() -> None:
    plan = make_schedule("UTC", ([MONDAY], "09:00", "10:00"))
    at = parse_moment("2026-01-05T09:00+00:00")
    instants = [at - timedelta(microseconds=1), at, at + HOUR - timedelta(microseconds=1), at + HOUR]
    assert [weekly_windows.is_open(plan, one) for one in instants] == [False, True, True, False]


def test_a_change_is_found_to_the_second_wherever_the_look_begins() -> None:
    plan = make_schedule("America/Los_Angeles", ([SUNDAY], "02:30", "17:00"))
    opening = parse_moment("2026-03-08T03:00-07:00")
    for microseconds in (1, 999_999, 3_600_000_001, 86_399_123_456):
        assert weekly_windows.next_opening(plan, opening - timedelta(microseconds=microseconds)) == opening


@pytest.mark.parametrize("time", ["09:00", "23:59"])
def test_a_window_must_not_end_when_it_starts(time: str) -> None:
    with pytest.raises(EmptyWindow):
        weekly_windows.parse_window([MONDAY], time, time)


def test_zones_are_those_of_the_world() -> None:
    assert {
        "UTC",
        "Africa/Cairo",
        "America/Los_Angeles",
        "Australia/Lord_Howe",
    } <= weekly_windows.zone_names()
    assert not weekly_windows.zone_names() & {
        "localtime",
        "Factory",
        "posixrules",
        "",
        "../../etc/passwd",
        "america/los_angeles",
    }
