"""Charts of 24 hours as shapes for an SVG: bars with failures at their foot, and lines of two percentiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from msgspec import Struct

from gateway.dashboard.formats import parse_instant

STEP: Final = 10
"""Width of an hour."""
BAR: Final = 8
HEIGHT: Final = 44
SPARK_HEIGHT: Final = 22
LEAST: Final = 2
"""Height of the smallest bar that is not zero, so that one failure among thousands is seen."""
LABELED_HOURS: Final = (0, 6, 12, 18)

Hour = Mapping[str, Any]


class BarPaths(Struct, frozen=True):
    """Bars as two paths of an SVG, which are far shorter than a shape for each bar."""

    bars: str
    failed: str
    """Failures at the foot of the bars; empty without any."""


class QuantileLines(Struct, frozen=True):
    """Lines of the median and the 95th percentile as paths of an SVG, empty without any value."""

    median: str
    high: str


def draw_bars(wholes: Sequence[int], failures: Sequence[int] = (), *, height: int = HEIGHT) -> BarPaths:
    """Return a bar for each hour as SVG paths: its number of runs, with the failed ones among them in red at its foot.

    `height` is that of the chart in pixels, which the largest bar takes. Hours without runs have a line at the foot.
    """
    largest = max(wholes, default=0)
    bars, reds = [], []
    for number, (whole, bad) in enumerate(zip(wholes, failures or [0] * len(wholes), strict=True)):
        red = _scale(bad, largest, height)
        rest = min(_scale(whole - bad, largest, height), height - red) or (0 if red else 1)
        if rest:
            bars.append(_draw_bar(number, height - red - rest, rest))
        if red:
            reds.append(_draw_bar(number, height - red, red))
    return BarPaths("".join(bars), "".join(reds))


def _draw_bar(number: int, y: int, height: int) -> str:
    return f"M{number * STEP} {y}h{BAR}v{height}h-{BAR}z"


def _scale(count: int, largest: int, height: int) -> int:
    return max(round(height * count / largest), LEAST) if count else 0


def draw_lines(hours: Sequence[Hour], median: str, high: str) -> QuantileLines:
    """Return the lines of two percentiles of the hours, on one scale; hours without values are gaps.

    `median` and `high` are the names of their fields.
    """
    largest = max((hour[high] or 0 for hour in hours), default=0)
    return QuantileLines(*(_draw_line([hour[name] for hour in hours], largest) for name in (median, high)))


def _draw_line(values: Sequence[int | None], largest: int) -> str:
    """Return values of hours as an SVG path, with gaps for None; it is level within an hour, so that one
    between two gaps is seen.
    """
    parts: list[str] = []
    for number, value in enumerate(values):
        if value is None:
            continue
        is_behind_gap = number == 0 or values[number - 1] is None
        y = HEIGHT - 2 - round((HEIGHT - 4) * value / largest) if largest else HEIGHT - 2
        parts.append(f"{'M' if is_behind_gap else 'L'}{number * STEP} {y}h{BAR}")
    return "".join(parts)


def label_hours(hours: Sequence[Hour]) -> Sequence[str]:
    """Return the labels below a chart: the time of day of every sixth hour in UTC, and `now`."""
    times = [parse_instant(hours[number]["startsAt"]) for number in LABELED_HOURS if number < len(hours)]
    return [*(f"{at:%H:%M}" for at in times if at is not None), "now"]
