"""Database time within a process: learned from answers, and never made worse by one."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from models import ids
from models.timestamps import DRIFT, HOST_TIME, DatabaseClock, HostTime

NOON = datetime(2030, 1, 15, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def test_a_clock_counts_on_from_the_middle_of_a_round_trip() -> None:
    clock = DatabaseClock()
    clock.learn(NOON, asked_at=100.0, answered_at=104.0)
    assert clock.moment_of(102.0) == NOON
    assert clock.moment_of(112.5) == NOON + 10.5 * SECOND
    assert clock.monotonic_of(NOON + 3 * SECOND) == 105.0


def test_moments_survive_the_way_to_the_monotonic_clock_and_back() -> None:
    clock = DatabaseClock()
    for moment in (NOON, NOON + timedelta(days=3650, microseconds=1)):
        assert clock.moment_of(clock.monotonic_of(moment)) == moment


def test_a_clock_that_has_learned_nothing_is_that_of_the_host() -> None:
    assert abs(DatabaseClock().now() - datetime.now(UTC)) < 60 * SECOND


@pytest.mark.parametrize(
    ("answered_at", "moment", "is_taken"),
    [
        pytest.param(210.0, NOON + 106 * SECOND, False, id="a slow answer says no more than is known"),
        pytest.param(210.0, NOON + 500 * SECOND, True, id="even a slow answer shows that the clock was set"),
        pytest.param(200.002, NOON + 100.002 * SECOND, True, id="an answer as exact is newer"),
    ],
)
def test_an_answer_counts_where_it_is_as_exact_or_contradicts(
    answered_at: float, moment: datetime, *, is_taken: bool
) -> None:
    clock = DatabaseClock()
    clock.learn(NOON, asked_at=99.999, answered_at=100.001)
    before = clock.moment_of(1_000.0)
    clock.learn(moment, asked_at=200.0, answered_at=answered_at)
    assert (clock.moment_of(1_000.0) != before) is is_taken


def test_an_old_answer_is_replaced_by_one_that_drift_has_made_as_exact() -> None:
    clock = DatabaseClock()
    clock.learn(NOON, asked_at=100.0, answered_at=100.0)
    later = 100.0 + 2.0 / DRIFT
    clock.learn(NOON + timedelta(seconds=later - 99.0), asked_at=later - 1.0, answered_at=later + 1.0)
    assert clock.moment_of(later) == NOON + timedelta(seconds=later - 99.0)


def test_an_answer_without_a_time_changes_nothing() -> None:
    clock = DatabaseClock()
    clock.learn(NOON, 100.0, 100.0)
    clock.learn(None, 200.0)
    assert clock.moment_of(100.0) == NOON


def test_ids_are_of_the_time_of_the_clock_that_they_are_made_by() -> None:
    clock = DatabaseClock()
    ahead = ids.new_id("x")
    clock.learn(NOON - timedelta(days=3650), asked_at=time.monotonic(), answered_at=time.monotonic())
    try:
        ids.use_clock(clock)
        first, second = ids.new_id("x"), ids.new_id("x")
        assert ids.earliest_id("x", NOON - timedelta(days=3651)) < first < second < ahead
        assert second < ids.earliest_id("x", NOON - timedelta(days=3649))
    finally:
        ids.use_clock(DatabaseClock())


def test_the_time_of_the_host_is_moved_only_when_it_is_told_to() -> None:
    step = HOST_TIME.step()
    HOST_TIME.move(86_400_000_000)
    try:
        assert HOST_TIME.step() - step == pytest.approx(-86_400_000_000, abs=1_000_000)
        assert DatabaseClock().now() - datetime.now(UTC) > 23 * 3600 * SECOND
    finally:
        HOST_TIME.move(-86_400_000_000)


def test_a_forked_process_reads_the_wall_clock_again() -> None:
    """Its parent may have started before the clock was set, and counts its time from then."""
    clock = HostTime()
    clock.move(86_400_000_000)
    clock.restart()
    assert (clock.step() == pytest.approx(0, abs=1_000_000), clock.moved) == (True, 0)
