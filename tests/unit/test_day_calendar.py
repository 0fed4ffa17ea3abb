"""Calendar of a deployment: windows below times up, past and planned, in percent of each day."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from gateway.dashboard.day_calendar import draw_calendar
from gateway.dashboard.policy_chart import draw_policy_chart


def at(text: str) -> str:
    return f"2026-11-{text}:00.000Z"


def span(start: str, end: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    return {"start": at(start), "end": at(end), **fields}


CALENDAR: dict[str, Any] = {
    "now": at("28T12:00"),
    "days": [
        {
            "startsAt": at(f"{day}T00:00"),
            "podSeconds": 3_600 * hours,
            "alwaysOnPodSeconds": 86_400,
            "plannedPodSeconds": 7_200,
        }
        for day, hours in ((27, 10.5), (28, 3), (29, 0))
    ],
    "windows": [span("27T18:00", "28T06:00")],
    "awake": [
        span("27T21:00", "28T03:00", isByHand=False, reason="window-open"),
        span("28T10:00", "28T11:00", isByHand=True, reason="by-hand"),
        span("27T01:00", "27T02:00", isByHand=True, reason="deployed"),
    ],
    "planned": [span("28T23:00", "29T01:00")],
    "failedStarts": [at("28T06:00")],
}


def test_a_day_has_its_part_of_each_time_and_windows_lie_below() -> None:
    first, today, last = draw_calendar(CALENDAR, [datetime(2026, 11, 29, 12, tzinfo=UTC)])
    assert [(one.tone, one.x, one.width) for one in first.bars] == [
        ("window", 75, 25),
        ("up", 87.5, 12.5),
        ("up", 4.17, 4.17),
    ]
    assert [one.tone for one in today.bars] == ["window", "up", "hand", "pre"]
    assert first.bars[1].title == "up, 21:00 to 24:00"
    assert [(one.tone, one.title) for one in last.bars] == [("pre", "will be up, 00:00 to 01:00")]
    assert (today.is_today, today.now_x, today.failures) == (True, 50, [25])
    assert (last.is_future, last.clock_changes, last.now_x) == (True, [50], None)


def test_the_words_for_a_day_name_twelve_of_its_times() -> None:
    first, _, last = draw_calendar({**CALENDAR, "planned": []}, [])
    assert first.spoken == "window, 18:00 to 24:00; up, 21:00 to 24:00; up, 01:00 to 02:00"
    assert last.spoken == "never up"
    often = [
        span(f"27T01:{minute}", f"27T01:{minute + 1}", isByHand=False, reason="run-due")
        for minute in range(10, 30)
    ]
    alternating = [{**one, "isByHand": number % 2 == 1} for number, one in enumerate(often)]
    day = draw_calendar({**CALENDAR, "windows": [], "awake": alternating}, [])[0]
    assert len(day.bars) == 20
    assert day.spoken.endswith("; up, started by hand, 01:21 to 01:22; and 8 more")


def test_times_up_with_breaks_too_short_to_be_seen_are_one_bar_of_their_day() -> None:
    awake = [
        span(start, end, isByHand=False, reason="run-due")
        for start, end in (
            *(("27T01:00", "27T01:10"), ("27T01:12", "27T01:20"), ("27T01:23", "27T02:00")),
            *(("27T23:00", "28T01:00"), ("28T01:01", "28T01:30")),
        )
    ]
    days = draw_calendar({**CALENDAR, "awake": awake}, [])
    assert [(one.tone, one.title) for one in days[0].bars] == [
        ("window", "window, 18:00 to 24:00"),
        ("up", "up with short breaks, 01:00 to 01:20"),
        ("up", "up, 01:23 to 02:00"),
        ("up", "up, 23:00 to 24:00"),
    ]
    assert (days[0].bars[1].x, days[0].bars[1].width) == (4.17, 1.39)
    assert [one.title for one in days[1].bars][1] == "up with short breaks, 00:00 to 01:30"


def test_hours_are_those_so_far_and_for_days_to_come_those_planned() -> None:
    days = draw_calendar(CALENDAR, [])
    assert [(one.label, one.hours) for one in days] == [("Fri 27", 10.5), ("Sat 28", 3.0), ("Sun 29", 2.0)]


def test_bars_of_two_policies_have_one_scale_of_round_hours() -> None:
    days = [
        {"startsAt": at("27T00:00"), "currentPodHours": 6, "candidatePodHours": 1.5},
        {"startsAt": at("28T00:00"), "currentPodHours": 0, "candidatePodHours": 0},
    ]
    chart = draw_policy_chart(days)
    assert chart.top_hours == 8
    first = chart.days[0]
    assert (first.current_height, first.candidate_height) == (72, 18)
    assert first.current_x + first.width == first.candidate_x == first.center
    assert draw_policy_chart([]).days == []
