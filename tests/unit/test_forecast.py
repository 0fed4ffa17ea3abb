"""Forecast of past runs under each lifecycle policy."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from models import lifecycle_forecast, weekly_windows
from models.lifecycle_forecast import COLD_START, PastRun, PolicyReplay
from models.lifecycle_policy import AlwaysOnPolicy, IdleShutdownPolicy, OnDemandPolicy, ScheduledWindowPolicy
from models.weekly_windows import WindowSchedule

MONDAY = datetime(2026, 3, 2, tzinfo=UTC)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)


def run(accepted_hours: float, minutes: float) -> PastRun:
    accepted_at = MONDAY + HOUR * accepted_hours
    return PastRun(accepted_at, accepted_at + MINUTE * minutes)


def sum_up(replay: PolicyReplay) -> tuple[timedelta, int, list[timedelta]]:
    """Return pod time, cold starts and waits of a replay."""
    return replay.pod_time, replay.cold_starts, [*replay.waits]


RUNS = [run(8, 6), run(8.2, 6), run(12, 60), run(12.25, 1), run(20, 10)]


def test_pods_that_never_sleep_are_up_all_the_time() -> None:
    assert sum_up(lifecycle_forecast.replay_runs(AlwaysOnPolicy(), RUNS, MONDAY, MONDAY + DAY)) == (
        DAY,
        0,
        [],
    )


def test_pods_that_sleep_are_up_from_a_run_until_nothing_came_for_a_while() -> None:
    replay = lifecycle_forecast.replay_runs(IdleShutdownPolicy(30), RUNS, MONDAY, MONDAY + DAY)
    # 8:00 to 8:48, 12:00 to 13:30, 20:00 to 20:40
    assert sum_up(replay) == (MINUTE * (48 + 90 + 40), 3, [COLD_START] * 3)
    on_demand = lifecycle_forecast.replay_runs(OnDemandPolicy(), RUNS, MONDAY, MONDAY + DAY)
    assert [on_demand.sum_pod_time(MONDAY + HOUR * at, MONDAY + HOUR * (at + 1)) for at in (8, 12, 13)] == [
        MINUTE * 14,
        HOUR,
        MINUTE,
    ]
    assert sum_up(on_demand) == (MINUTE * (7 + 7 + 61 + 11), 4, [COLD_START] * 4)


def test_pod_time_after_the_period_does_not_count() -> None:
    replay = lifecycle_forecast.replay_runs(IdleShutdownPolicy(30), [run(23.5, 20)], MONDAY, MONDAY + DAY)
    assert replay.pod_time == MINUTE * 30


def test_runs_outside_a_window_wait_until_it_opens() -> None:
    plan = ScheduledWindowPolicy(
        WindowSchedule("UTC", (weekly_windows.parse_window([1, 2], "09:00", "17:00"),))
    )
    replay = lifecycle_forecast.replay_runs(plan, RUNS, MONDAY, MONDAY + DAY)
    assert sum_up(replay) == (8 * HOUR, 0, [HOUR, HOUR * 0.8, 13 * HOUR])


def test_a_window_that_is_always_open_is_always_on() -> None:
    plan = ScheduledWindowPolicy(
        WindowSchedule("UTC", (weekly_windows.parse_window(range(7), "00:00", "24:00"),))
    )
    assert sum_up(lifecycle_forecast.replay_runs(plan, RUNS, MONDAY, MONDAY + DAY)) == (DAY, 0, [])


def test_without_runs_nothing_is_woken() -> None:
    assert sum_up(lifecycle_forecast.replay_runs(OnDemandPolicy(), [], MONDAY, MONDAY + DAY)) == (
        timedelta(),
        0,
        [],
    )


def test_the_next_two_weeks_have_their_clock_changes_in_them() -> None:
    plan = ScheduledWindowPolicy(
        WindowSchedule("America/Los_Angeles", (weekly_windows.parse_window([1], "09:00", "17:00"),))
    )
    starts = [one.at for one in lifecycle_forecast.policy_changes(plan, MONDAY) if one.is_open]
    assert starts == [MONDAY + 17 * HOUR, MONDAY + 7 * DAY + 16 * HOUR]
    (clock,) = lifecycle_forecast.policy_clock_changes(plan, MONDAY)
    assert clock.at == datetime(2026, 3, 8, 10, tzinfo=UTC)
    assert clock.offset_after - clock.offset_before == HOUR
    assert not lifecycle_forecast.policy_changes(AlwaysOnPolicy(), MONDAY)
    assert not lifecycle_forecast.policy_clock_changes(AlwaysOnPolicy(), MONDAY)
