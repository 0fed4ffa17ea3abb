"""Chart of the pod hours of each day under two policies, as shapes for an SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from msgspec import Struct

from gateway.dashboard.formats import show_hours
from models.timestamps import parse_timestamp

HEIGHT: Final = 96
LEFT: Final = 6.0
"""Percent of the width for the labels of the axis."""
STEPS: Final = (1, 2, 4, 8, 12, 24, 48, 96, 120, 240)
LABELED: Final = 3
"""Each third day keeps its label in a narrow window."""


class DayBars(Struct, frozen=True):
    """Bars of one day: positions and widths in percent, heights in pixels."""

    label: str
    center: float
    current_x: float
    current_height: float
    candidate_x: float
    candidate_height: float
    width: float
    is_kept: bool
    """Whether its label stays in a narrow window."""
    title: str


class PolicyChart(Struct, frozen=True):
    """Bars of all days on one scale."""

    days: Sequence[DayBars]
    top_hours: int
    """Hours at the top line; the middle line has half of them."""


def draw_policy_chart(days: Sequence[Mapping[str, Any]]) -> PolicyChart:
    """Return two bars, present and candidate policy, for each day of a policy replay in the API, on a scale
    of round hours.
    """
    largest = max((max(day["currentPodHours"], day["candidatePodHours"]) for day in days), default=0)
    top = next((step for step in STEPS if largest <= step), int(largest) + 1)
    slot = (100 - LEFT) / max(len(days), 1)
    width = round(slot / 3, 2)
    return PolicyChart([_draw_day(day, number, slot, width, top) for number, day in enumerate(days)], top)


def _draw_day(day: Mapping[str, Any], number: int, slot: float, width: float, top: int) -> DayBars:
    """Return the two bars of a day: the present policy on the left, the candidate on the right."""
    at, center = parse_timestamp(day["startsAt"]), LEFT + (number + 0.5) * slot
    heights = [round(HEIGHT * day[name] / top, 1) for name in ("currentPodHours", "candidatePodHours")]
    return DayBars(
        str(at.day),
        round(center, 2),
        round(center - width, 2),
        heights[0],
        round(center, 2),
        heights[1],
        width,
        number % LABELED == 0,
        f"{at:%a} {at.day}: {show_hours(day['currentPodHours'])} now, {show_hours(day['candidatePodHours'])}",
    )
