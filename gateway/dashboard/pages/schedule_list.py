"""Schedules of all workflows on one timeline with windows and pods, their rows, and the starts and stops."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.addresses import list_address
from gateway.dashboard.formats import parse_instant
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

LIMIT: Final = 20
SHOWN_DECISIONS: Final = 12
PATH: Final = "/dashboard/schedule"
RANGES: Final = (("24", "24 hours"), ("168", "7 days"))
RULER_STEPS: Final = {24: 3, 168: 24}
"""Hours between two labels of the ruler, by the hours of the range."""
REASONS: Final = {
    "always-on": "it is always on",
    "window-open": "its window opened",
    "run-due": "a run was due",
    "idle": "nothing happened for its idle time",
    "no-more-runs": "no run was left",
    "window-closed": "its window closed",
    "drained": "its runs had ended",
    "drain-time-over": "its time to end runs was over",
    "by-hand": "by hand",
    "deployed": "it was deployed",
    "undeployed": "it was undeployed",
    "failed": "its pods could not start",
}
"""Words for the reasons of starts and stops."""


@dataclass(frozen=True, slots=True)
class LaneMark:
    """Shape on a lane: position and width in percent of the range."""

    kind: str
    """`window`, `awake`, `hand`, `tick`, `clock`, `ran` or `dense`."""
    x: float
    width: float
    title: str


async def load(page: PageRequest) -> PageData:
    """Ask the API for 20 schedules and their timeline over 24 hours or, by the query, 7 days; raises `ApiError`."""
    hours = page.query.get("hours")
    schedules, timeline = await asyncio.gather(
        page.get("/api/v1/schedules", limit=LIMIT, offset=page.query.get("offset")),
        page.get(
            "/api/v1/schedules/timeline",
            hours=hours if hours in dict(RANGES) else RANGES[0][0],
            limit=LIMIT,
            offset=page.query.get("offset"),
        ),
    )
    return {"schedules": schedules, "timeline": timeline}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: lanes with their marks, schedules with their timing in words, and the last
    12 decisions.
    """
    listed, timeline = data["schedules"], data["timeline"]
    shown = listed["offset"] + max(len(listed["schedules"]), len(timeline["workflows"]))
    is_last = shown >= max(listed["count"], timeline["count"])
    hours = frame.query.get("hours", "")
    hours = hours if hours in dict(RANGES) else RANGES[0][0]
    next_page = list_address(frame, PATH, {"offset": str(shown), "hours": hours})
    axis = TimeAxis.of(timeline)
    return {
        "title": "Schedule",
        "crumbs": (("Schedule", ""),),
        "schedules": [{**one, "timing": describe_timing(one["policy"])} for one in listed["schedules"]],
        "count": listed["count"],
        "lanes": [{**lane, "marks": build_marks(lane, axis)} for lane in timeline["workflows"]],
        "now_x": axis.x(axis.now),
        "clock_changes": [
            (axis.x(_instant(one["at"])), describe_clock_change(one), one["at"])
            for one in timeline["clockChanges"]
        ],
        "labels": axis.labels(RULER_STEPS[int(hours)]),
        "ranges": [
            (label, list_address(frame, PATH, {"hours": value}), value == hours) for value, label in RANGES
        ],
        "decisions": timeline["decisions"][:SHOWN_DECISIONS],
        "more_decisions": max(len(timeline["decisions"]) - SHOWN_DECISIONS, 0),
        "reasons": REASONS,
        "may_run": frame.may("workflows:execute"),
        "may_write": frame.may("workflows:write"),
        "next": "" if is_last else next_page,
    }


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """Time axis of the lanes."""

    since: datetime
    now: datetime
    until: datetime

    @classmethod
    def of(cls, timeline: Mapping[str, Any]) -> TimeAxis:
        """Return the axis with the bounds and the present time of a timeline of the API."""
        return cls(*(_instant(timeline[name]) for name in ("since", "now", "until")))

    def x(self, at: datetime) -> float:
        """Return the position of a time in percent of the range; times outside of it are at its ends."""
        share = (at - self.since) / (self.until - self.since)
        return round(min(max(share, 0.0), 1.0) * 100, 2)

    def labels(self, step: int) -> Sequence[tuple[float, str]]:
        """Return position in percent and text of the ruler's labels, every `step` hours: hours in UTC, or
        days for 24.
        """
        first = self.since.replace(minute=0, second=0, microsecond=0)
        start = first - timedelta(hours=first.hour % step)
        count = int((self.until - start) / timedelta(hours=step)) + 1
        times = [start + number * timedelta(hours=step) for number in range(1, count + 1)]
        name = "%a %d" if step == RULER_STEPS[168] else "%H"
        return [(self.x(at), at.strftime(name)) for at in times if at < self.until]


def build_marks(lane: Mapping[str, Any], axis: TimeAxis) -> Sequence[LaneMark]:
    """Return the shapes of a schedule's lane, those below others first: windows, times awake, planned starts,
    the last run.

    If the API has cut the planned starts, a single shape shows that they are dense.
    """
    marks = [_span("window", one, "window", axis) for one in lane["windows"]]
    for one in lane["awake"]:
        why = REASONS.get(one["reason"] or "", "")
        title = f"awake{', ' if why else ''}{why}"
        marks.append(_span("hand" if one["isByHand"] else "awake", one, title, axis))
    ticks = lane["ticks"]
    if lane["ticksAreCut"]:
        first, last = axis.x(_instant(ticks[0]["at"])), axis.x(axis.until)
        return [*marks, LaneMark("dense", first, max(last - first, 0.5), "runs again and again")]
    for one in ticks:
        kind = "clock" if one["isByClockChange"] else "tick"
        marks.append(LaneMark(kind, axis.x(_instant(one["at"])), 0, f"will run at {one['localTime']}"))
    ran_at = parse_instant(lane["lastRunAt"])
    if ran_at is not None and ran_at >= axis.since:
        marks.append(LaneMark("ran", axis.x(ran_at), 0, f"ran at {lane['lastRunAt']}"))
    return marks


def _span(kind: str, span: Mapping[str, Any], title: str, axis: TimeAxis) -> LaneMark:
    """Return the shape for a span of time, at least 0.3 percent wide."""
    start, end = axis.x(_instant(span["start"])), axis.x(_instant(span["end"]))
    return LaneMark(kind, start, round(max(end - start, 0.3), 2), title)


def _instant(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def describe_clock_change(change: Mapping[str, Any]) -> str:
    """Return a change of the clocks as a sentence, such as `Clocks go back from 03:00 to 02:00 in Europe/Berlin`."""
    before, after = (datetime.fromisoformat(change[name]) for name in ("localTimeBefore", "localTimeAfter"))
    way = "back" if after.replace(tzinfo=None) < before.replace(tzinfo=None) else "forward"
    return f"Clocks go {way} from {before:%H:%M} to {after:%H:%M} in {change['timezone']}"


def describe_timing(policy: Mapping[str, Any] | None) -> str:
    """Return the timing of a schedule as text, such as `30 7 * * mon-fri, Europe/Berlin` or `every 60 s`.

    Empty for None.
    """
    if policy is None:
        return ""
    if policy["cron"] is not None:
        return f"{policy['cron']}, {policy['timezone']}"
    return f"every {policy['intervalSeconds']:,} s"


PAGE: Final = Page(PATH, "schedule_list.html", load, view, "schedule", ("executions",))
