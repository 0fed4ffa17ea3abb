"""Calendar of a deployment: past times up from its decisions, and the times in which it will be up."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from gateway.dashboard.day_calendar import draw_calendar, list_forecast, list_up_times

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)


def decision(at: str, action: str, user_id: str | None = None, reason: str = "run-due") -> dict[str, Any]:
    return {"at": f"2026-11-{at}:00.000Z", "action": action, "userId": user_id, "reason": reason}


def policy(kind: str, next_stop: str | None = None) -> dict[str, Any]:
    return {
        "lifecyclePolicy": {"type": kind},
        "nextTransition": "stop" if next_stop else None,
        "nextTransitionAt": next_stop,
    }


def test_starts_and_stops_become_times_up_and_a_start_by_a_user_has_its_tone() -> None:
    decisions = [
        decision("28T10:00", "wake"),
        decision("27T18:00", "stop"),
        decision("27T17:00", "none"),
        decision("27T06:00", "start", "user_1", "by-hand"),
        decision("26T18:00", "stop"),
    ]
    found = list_up_times(decisions, NOW, is_up=True)
    assert [(one.start.day, one.end.day, one.tone) for one in found] == [(27, 27, "hand"), (28, 28, "up")]
    assert found[1].end == NOW
    assert len(list_up_times(decisions, NOW, is_up=False)) == 1, "a start without a stop is not known to last"


def test_a_forecast_ends_with_the_next_stop_or_follows_the_windows() -> None:
    (idle,) = list_forecast(policy("idle-shutdown", "2026-11-28T12:30:00.000Z"), (), NOW, is_up=True)
    assert (idle.end.hour, idle.end.minute) == (12, 30)
    (always,) = list_forecast(policy("always-on"), (), NOW, is_up=True)
    assert always.end == datetime(2026, 12, 5, tzinfo=UTC)
    assert list_forecast(policy("on-demand"), (), NOW, is_up=False) == ()
    changes = [
        {"at": "2026-11-28T18:00:00.000Z", "action": "stop"},
        {"at": "2026-11-29T08:00:00.000Z", "action": "start"},
    ]
    windows = list_forecast(policy("scheduled-window"), changes, NOW, is_up=True)
    assert [(one.start.day, one.end.day) for one in windows] == [(28, 28), (29, 5)]


def test_days_have_their_share_of_each_time_up() -> None:
    decisions = [decision("27T06:00", "stop"), decision("26T18:00", "start")]
    days = draw_calendar(list_up_times(decisions, NOW, is_up=False), [NOW], [NOW - timedelta(hours=6)], NOW)
    assert len(days) == 14
    before, today = days[5:8:2]
    assert (before.label, before.hours, before.bars[0].x, before.bars[0].width) == ("Thu 26", 6.0, 75, 25)
    assert days[6].hours == 6.0
    assert (today.is_today, today.now_x, today.failures) == (True, 50, [50])
    assert [day.clock_changes for day in days if day.clock_changes] == [[25]]
    assert [day.is_future for day in days] == [False] * 8 + [True] * 6
