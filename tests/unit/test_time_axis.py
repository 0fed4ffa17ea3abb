"""Time axis of a run: folded waits, one scale for the rest, and round ticks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from gateway.dashboard.time_axis import TimeAxis

START = datetime(2026, 11, 28, 2, 30, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def test_work_has_one_scale_and_waits_are_folded() -> None:
    axis = TimeAxis.build(START, at(1_002), [(at(0), at(1)), (at(1_001), at(1_002))])
    (fold,) = axis.list_folds()
    assert fold.milliseconds == 1_000_000
    assert (fold.x, fold.width) == (44.0, 12.0)
    assert axis.percent(at(0.5)) == pytest.approx(22)
    assert axis.percent(at(1_001.5)) == pytest.approx(78)
    assert axis.percent(at(501)) == pytest.approx(50)
    assert axis.percent(at(-5)) == 0
    assert axis.percent(at(5_000)) == pytest.approx(100)


def test_overlapping_work_and_short_gaps_are_not_folded() -> None:
    axis = TimeAxis.build(START, at(10), [(at(0), at(4)), (at(2), at(5)), (at(6.5), at(10))])
    assert axis.list_folds() == []
    assert axis.percent(at(6.5)) == pytest.approx(65)


def test_many_folds_share_half_of_the_axis() -> None:
    axis = TimeAxis.build(
        START, at(1_001), [(at(number * 100), at(number * 100 + 1)) for number in range(11)]
    )
    assert len(axis.list_folds()) == 10
    assert sum(fold.width for fold in axis.list_folds()) == pytest.approx(48)


@pytest.mark.parametrize("length", [0.0, 0.004, 0.9, 3.0, 47.0, 3_601.0, 86_400.0 * 40])
def test_ticks_are_round_and_apart(length: float) -> None:
    ticks = TimeAxis.build(START, at(length), [(START, at(length))]).list_ticks()
    assert ticks[0].milliseconds == 0
    assert all(later.x - tick.x >= 18 for tick, later in pairwise(ticks))
    assert all(tick.x <= 91 for tick in ticks)
    assert length < 0.004 or len(ticks) >= 2
