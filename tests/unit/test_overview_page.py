"""Page of the overview: times of the next starts, stops and runs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from gateway.dashboard.pages import overview

NOW = datetime(2026, 11, 28, 23, 50, tzinfo=UTC)


def schedule(name: str, starts_at: str) -> dict[str, Any]:
    return {
        "workflowId": f"wf_{name}",
        "workflowName": name,
        "isActive": True,
        "nextRuns": [{"startsAt": starts_at}],
    }


def test_a_scheduled_run_of_another_day_has_its_day() -> None:
    schedules = [
        schedule("Weekly", "2026-11-30T02:00:00.000Z"),
        schedule("Soon", "2026-11-28T23:55:00.000Z"),
        schedule("Night", "2026-11-29T00:05:00.000Z"),
    ]
    shown = [(one["name"], one["day"]) for one in overview.list_upcoming((), schedules, NOW)]
    assert shown == [("Soon", ""), ("Night", "Sun 29 Nov"), ("Weekly", "Mon 30 Nov")]
