"""Due times of schedules, and the runs that they start, under a given clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from models import schedule_timetable
from models.schedule_timetable import (
    GRACE_TIME,
    MAX_WAITING,
    InvalidTimetable,
    MisfirePolicy,
    OverlapPolicy,
    ScheduleState,
    ScheduleTimetable,
    SkipReason,
    decide_instants,
    parse_timetable,
)
from nodes import catalog

NOON = datetime(2026, 3, 4, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
WEEK = timedelta(weeks=1)
WORKFLOW = "wf_1"


def minutely_timetable(**config: Any) -> ScheduleTimetable:  # noqa: ANN401 - any JSON value
    return parse_timetable({"cron": "* * * * *", **config})


def make_state(next_run_at: datetime, **changes: Any) -> ScheduleState:  # noqa: ANN401 - any field
    return ScheduleState(
        WORKFLOW, anchor_at=next_run_at - timedelta(hours=1), next_run_at=next_run_at, **changes
    )


def local_instants(config: dict[str, Any], since: str, count: int) -> list[str]:
    """Return the next instants after a local time, as local times."""
    wanted = parse_timetable(config)
    zone = ZoneInfo(config["timezone"])
    moment = datetime.fromisoformat(since).replace(tzinfo=zone)
    found = schedule_timetable.upcoming_instants(
        wanted, moment.astimezone(UTC), moment.astimezone(UTC), count
    )
    assert all(at.tzinfo is UTC for at in found)
    return [at.astimezone(zone).isoformat(timespec="minutes") for at in found]


# ── when ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "cron",
    [
        *(
            "* * * * *",
            "0 0 1 1 0",
            "59 23 31 12 7",
            "*/5 8-18/2 1,15-20 jan-mar,DEC mon-fri",
            "5/20 * * * *",
        ),
        *("0 0 L * *", "0 0 LW * *", "0 0 * * fri#2", "0 0 * * 5L", "0 0 29 2 *", "0 0 30 2 mon"),
    ],
)
def test_a_cron_expression_has_five_fields_and_comes_true(cron: str) -> None:
    assert schedule_timetable.is_cron_expression(cron)


@pytest.mark.parametrize(
    "cron",
    [
        *("", "* * * *", "* * * * * *", " * * * * *", "*  * * * *", "* * * * *\n", "@daily", "0 * * * * 1"),
        *("60 * * * *", "* 24 * * *", "* * 0 * *", "* * 32 * *", "* * * 13 *", "* * * * 8"),
        *("5-1 * * * *", "1- * * * *", "*/0 * * * *", ", * * * *", "1,,2 * * * *", f"{'9' * 5_000} * * * *"),
        *("* * * mon *", "jan * * * *", "-1 * * * *", "٣ * * * *", "1.5 * * * *"),
        *("0 0 30 2 *", "0 0 31 4,6 *", "0 0 */31 2 MON#2"),
    ],
)
def test_other_texts_and_impossible_times_are_no_cron_expressions(cron: str) -> None:
    assert not schedule_timetable.is_cron_expression(cron)


@pytest.mark.parametrize(
    ("cron", "timezone", "since", "expected"),
    [
        # The clocks skip an hour: times within it are run once, right after it.
        (
            "30 2 * * *",
            "Europe/Berlin",
            "2026-03-28T12:00",
            ["2026-03-29T03:00+02:00", "2026-03-30T02:30+02:00"],
        ),
        (
            "0,30 2 * * *",
            "Europe/Berlin",
            "2026-03-29T01:00",
            ["2026-03-29T03:00+02:00", "2026-03-30T02:00+02:00"],
        ),
        (
            "0 0 * * *",
            "Africa/Cairo",
            "2026-04-23T12:00",
            ["2026-04-24T01:00+03:00", "2026-04-25T00:00+03:00"],
        ),
        # They repeat an hour: a time in it counts once, the first time.
        (
            "30 2 * * *",
            "Europe/Berlin",
            "2026-10-24T12:00",
            ["2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"],
        ),
        # A half-hourly schedule fires in each of the two.
        (
            "*/30 * * * *",
            "Europe/Berlin",
            "2026-10-25T01:45",
            [f"2026-10-25T02:{minute}+0{hour}:00" for hour in (2, 1) for minute in ("00", "30")],
        ),
        ("0 9 * * 0", "UTC", "2026-03-01T09:00", ["2026-03-08T09:00+00:00"]),
    ],
)
def test_instants_follow_the_clocks_of_the_zone(
    cron: str, timezone: str, since: str, expected: list[str]
) -> None:
    assert local_instants({"cron": cron, "timezone": timezone}, since, len(expected)) == expected


def test_a_time_that_has_been_is_not_to_come_in_the_second_of_two_alike_hours() -> None:
    wanted = parse_timetable({"cron": "30 2 * * *", "timezone": "Europe/Berlin"})
    in_the_second = datetime(2026, 10, 25, 1, 10, tzinfo=UTC)
    assert in_the_second.astimezone(ZoneInfo("Europe/Berlin")).isoformat() == "2026-10-25T02:10:00+01:00"
    assert wanted.first_after(in_the_second, in_the_second) == datetime(2026, 10, 26, 1, 30, tzinfo=UTC)


def test_an_interval_is_counted_from_its_anchor() -> None:
    wanted = parse_timetable({"intervalSeconds": 90})
    after = [wanted.first_after(NOON + timedelta(seconds=seconds), NOON) for seconds in (-50, 0, 89.9, 90)]
    assert after == [NOON + timedelta(seconds=seconds) for seconds in (90, 90, 90, 180)]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"cron": "0 0 30 2 *"},
        {"cron": 5},
        {"intervalSeconds": 0},
        {"intervalSeconds": "5"},
        {"intervalSeconds": 1e300},
        {"intervalSeconds": 5, "jitterSeconds": "much"},
        {"intervalSeconds": 5, "misfire": "whatever"},
        {"cron": "* * * * *", "timezone": ["UTC"]},
        {"cron": "* * * * *", "timezone": "Mars/Olympus"},
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused_with_a_reason(config: dict[str, Any]) -> None:
    with pytest.raises(InvalidTimetable, match=r"\w"):
        parse_timetable(config)


def test_a_number_is_whole_however_it_is_written() -> None:
    assert parse_timetable({"intervalSeconds": 60.0}).interval_seconds == 60


def test_the_defaults_of_the_node_type_are_those_of_the_rules() -> None:
    loaded = catalog.load_catalog()
    given = {"cron": "5 4 * * *"}
    filled = loaded.with_defaults(loaded.get("schedule-trigger"), given)
    assert parse_timetable(filled) == parse_timetable(given)


def test_only_changes_of_instants_change_the_timing_hash() -> None:
    plain = minutely_timetable().timing_hash
    assert minutely_timetable(misfire="skip", misfireLimit=3, overlap="queue").timing_hash == plain
    moved = [
        minutely_timetable(timezone="Asia/Tokyo"),
        minutely_timetable(jitterSeconds=5),
        parse_timetable({"cron": "0 * * * *"}),
        parse_timetable({"intervalSeconds": 60}),
    ]
    assert plain not in {one.timing_hash for one in moved}


def test_jitter_delays_workflows_by_different_times_and_each_always_by_the_same() -> None:
    wanted = minutely_timetable(jitterSeconds=60)
    delays = [wanted.start_delay(f"wf_{number}") for number in range(100)]
    assert delays == [wanted.start_delay(f"wf_{number}") for number in range(100)]
    assert all(timedelta() <= delay < MINUTE for delay in delays)
    assert len(set(delays)) > 90
    due_at = NOON + wanted.start_delay(WORKFLOW)
    assert decide_instants(wanted, make_state(NOON), due_at - timedelta(milliseconds=1)).run == ()
    decided = decide_instants(wanted, make_state(NOON), due_at)
    assert (decided.run, decided.next_run_at) == ([NOON], NOON + MINUTE)


# ── started runs ────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_run_before_its_instant_and_everything_once_at_it() -> None:
    wanted = minutely_timetable()
    assert decide_instants(wanted, make_state(NOON), NOON - timedelta(microseconds=1)).run == ()
    decided = decide_instants(wanted, make_state(NOON), NOON)
    assert (decided.run, decided.next_run_at, decided.passed) == ([NOON], NOON + MINUTE, None)


@pytest.mark.parametrize("misfire", MisfirePolicy)
def test_instants_seen_within_a_minute_all_run_under_any_policy(
    misfire: MisfirePolicy,
) -> None:
    wanted = parse_timetable({"intervalSeconds": 20, "misfire": misfire})
    decided = decide_instants(wanted, make_state(NOON), NOON + GRACE_TIME)
    assert decided.run == [NOON + timedelta(seconds=seconds) for seconds in (0, 20, 40, 60)]
    assert (decided.next_run_at, decided.passed) == (NOON + timedelta(seconds=80), None)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"misfire": "skip"}, [0]),
        ({}, [0]),
        ({"misfire": "run-all", "misfireLimit": 3}, [-2, -1, 0]),
    ],
)
def test_the_misfire_policy_decides_the_runs_of_a_missed_week(
    config: dict[str, Any], expected: list[int]
) -> None:
    now = NOON + WEEK + timedelta(seconds=30)
    decided = decide_instants(minutely_timetable(**config), make_state(NOON), now)
    assert decided.run == [NOON + WEEK + minutes * MINUTE for minutes in expected]
    assert decided.next_run_at == NOON + WEEK + MINUTE
    assert (decided.passed, decided.skipped_at) == (
        SkipReason.MISSED,
        NOON + WEEK + (expected[0] - 1) * MINUTE,
    )


def test_a_daily_instant_that_was_missed_is_made_up_for_once_or_left_out() -> None:
    now = NOON + WEEK + timedelta(hours=5)
    daily = {"cron": "0 12 * * *"}
    assert decide_instants(parse_timetable(daily), make_state(NOON), now).run == [NOON + WEEK]
    left_out = decide_instants(parse_timetable({**daily, "misfire": "skip"}), make_state(NOON), now)
    assert (left_out.run, left_out.skipped_at) == ([], NOON + WEEK)
    assert left_out.next_run_at == NOON + WEEK + timedelta(days=1)


def test_one_that_was_missed_and_is_made_up_for_is_not_called_missed() -> None:
    decided = decide_instants(
        parse_timetable({"cron": "0 12 * * *"}), make_state(NOON), NOON + timedelta(hours=5)
    )
    assert (decided.run, decided.passed) == ([NOON], None)


def test_years_that_were_missed_by_the_second_take_no_time_to_decide_about() -> None:
    wanted = parse_timetable({"intervalSeconds": 1, "misfire": "run-all", "misfireLimit": 100})
    now = NOON + 100 * 52 * WEEK
    decided = decide_instants(wanted, make_state(NOON), now)
    assert decided.run == [now - timedelta(seconds=seconds) for seconds in reversed(range(100))]
    minutes = decide_instants(minutely_timetable(misfire="run-all"), make_state(NOON), now)
    assert len(minutes.run) == schedule_timetable.MISFIRE_LIMIT


def test_an_instant_is_passed_over_while_the_last_run_goes_on_where_the_policy_says_so() -> None:
    wanted = minutely_timetable(overlap="skip")
    busy = decide_instants(wanted, make_state(NOON, is_busy=True), NOON)
    assert (busy.run, busy.passed, busy.skipped_at) == ([], SkipReason.OVERLAP, NOON)
    assert busy.next_run_at == NOON + MINUTE
    several = decide_instants(
        parse_timetable({"intervalSeconds": 10, "overlap": "skip"}), make_state(NOON), NOON + MINUTE / 2
    )
    assert (several.run, several.passed) == ([NOON], SkipReason.OVERLAP)


@pytest.mark.parametrize("overlap", [OverlapPolicy.ALLOW, OverlapPolicy.QUEUE])
def test_instants_are_passed_over_while_too_many_runs_wait(overlap: OverlapPolicy) -> None:
    wanted = parse_timetable({"intervalSeconds": 10, "overlap": overlap})
    nearly_full = make_state(NOON, is_busy=True, waiting_runs=MAX_WAITING - 2)
    decided = decide_instants(wanted, nearly_full, NOON + timedelta(seconds=25))
    assert decided.run == [NOON, NOON + timedelta(seconds=10)]
    assert (decided.passed, decided.skipped_at) == (SkipReason.QUEUE_FULL, NOON + timedelta(seconds=20))


# ── clocks that are wrong ───────────────────────────────────────────────────────────────────────────────────


def test_instants_run_early_by_a_fast_clock_are_not_run_again() -> None:
    early = NOON + timedelta(minutes=10)
    assert (
        schedule_timetable.recompute_next_instant(minutely_timetable(), WORKFLOW, NOON, early, NOON)
        == early + MINUTE
    )
    assert (
        schedule_timetable.recompute_next_instant(minutely_timetable(), WORKFLOW, NOON, NOON, NOON + MINUTE)
        == NOON + 2 * MINUTE
    )


def test_after_a_clock_was_far_ahead_a_schedule_goes_on_by_the_right_one() -> None:
    assert (
        schedule_timetable.recompute_next_instant(minutely_timetable(), WORKFLOW, NOON, NOON + WEEK, NOON)
        == NOON + MINUTE
    )
    assert (
        schedule_timetable.recompute_next_instant(minutely_timetable(), WORKFLOW, NOON, None, NOON)
        == NOON + MINUTE
    )
