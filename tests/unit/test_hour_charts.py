"""Charts of hours: bars on one scale with failures at their foot, and lines with gaps."""

from __future__ import annotations

import pytest

from gateway.dashboard.formats import show_latency, show_share
from gateway.dashboard.hour_charts import draw_bars, draw_lines, label_hours


def test_bars_have_one_scale_and_failures_at_their_foot() -> None:
    drawn = draw_bars([1_000, 500, 0], [1, 500, 0])
    assert drawn.failed == "M0 42h8v2h-8zM10 22h8v22h-8z", "one failure among a thousand is seen"
    assert drawn.bars == "M0 0h8v42h-8zM20 43h8v1h-8z"
    assert draw_bars([0, 0]).bars == "M0 43h8v1h-8zM10 43h8v1h-8z"
    assert draw_bars([0, 0]).failed == ""


def test_lines_have_gaps_where_no_run_has_a_time() -> None:
    times = [(10, 100), (None, None), (50, 100), (100, 100)]
    hours = [{"p50": low, "p95": high} for low, high in times]
    lines = draw_lines(hours, "p50", "p95")
    assert lines.high == "M0 2h8M20 2h8L30 2h8"
    assert lines.median.startswith("M0 38h8M20 22h8")
    assert draw_lines(hours[1:2], "p50", "p95").high == ""


def test_every_sixth_hour_has_a_label() -> None:
    hours = [{"startsAt": f"2026-11-28T{number:02}:00:00Z"} for number in range(24)]
    assert label_hours(hours) == ["00:00", "06:00", "12:00", "18:00", "now"]


def test_a_share_is_never_shown_as_none_by_rounding() -> None:
    shares = [(0, 9), (1, 100_000), (4, 1_000), (1, 20), (97, 1_000), (2, 3), (0, 0)]
    shown = [show_share(*one) for one in shares]
    assert shown == ["0 %", "<0.1 %", "0.4 %", "5 %", "9.7 %", "67 %", "0 %"]


@pytest.mark.parametrize(
    ("milliseconds", "shown"),
    [(0.04, "0.0 ms"), (0.42, "0.4 ms"), (7.55, "7.5 ms"), (267.55, "268 ms"), (1_234.5, "1.23 s")],
)
def test_a_latency_is_shown_to_the_digit_that_matters(milliseconds: float, shown: str) -> None:
    assert show_latency(milliseconds) == shown
