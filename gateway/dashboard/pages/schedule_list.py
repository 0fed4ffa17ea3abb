"""Schedules of all workflows on one timeline with windows, pods and waiting runs, and the scheduler that leads."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from gateway.dashboard.addresses import page_address
from gateway.dashboard.formats import LIFECYCLE_REASONS, parse_instant
from gateway.dashboard.page import Page, PageData, PageFrame
from models.timestamps import parse_timestamp

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

LIMIT: Final = 20
HEALTH_SECONDS: Final = 5.0
"""Age up to which the last ticks of the scheduler are shown again."""
LATE_TICKS: Final = 3
"""Intervals after which the tick of a duty is late."""
LATE_SECONDS: Final = 30.0
"""Time by which a report of a process may be old: a tick within it is not late."""
SHOWN_COLLISIONS: Final = 5
MINUTE_TEXT: Final = len("2026-01-01T00:00")
DUE_WORDS: Final = {"timer": "waiting", "retry": "to be tried again", "deferred": "deferred until pods start"}
SHOWN_DECISIONS: Final = 12
PATH: Final = "/dashboard/schedule"
RANGES: Final = (("24", "24 hours"), ("168", "7 days"))
RULER_STEPS: Final = {24: 3, 168: 24}
"""Hours between two labels of the ruler, by the hours of the range."""


class LaneMark(Struct, frozen=True):
    """Shape on a lane: position and width in percent of the range."""

    kind: str
    """`window`, `awake`, `hand`, `tick`, `clash` with another workflow, `clock`, `ran`, `dense`, or `timer`, `retry`
    and `deferred` for waiting runs.
    """
    x: float
    width: float
    title: str


async def load(page: PageRequest) -> PageData:
    """Ask the API for 20 schedules and their timeline over 24 hours or, by the query, 7 days; for admins also for
    the leading scheduler. Raises `ApiError`.
    """
    hours = page.query.get("hours")
    schedules, timeline, health = await asyncio.gather(
        page.get("/api/v1/schedules", limit=LIMIT, offset=page.query.get("offset")),
        page.get(
            "/api/v1/schedules/timeline",
            hours=hours if hours in dict(RANGES) else RANGES[0][0],
            limit=LIMIT,
            offset=page.query.get("offset"),
        ),
        page.get_recent("/api/v1/admin/health", seconds=HEALTH_SECONDS),
    )
    scheduler = None if health is None else {name: health[name] for name in ("lead", "duties", "isOperator")}
    return {"schedules": schedules, "timeline": timeline, "scheduler": scheduler}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: lanes with their marks, schedules with their timing in words, and the last
    12 decisions.
    """
    listed, timeline = data["schedules"], data["timeline"]
    shown = listed["offset"] + max(len(listed["schedules"]), len(timeline["workflows"]))
    is_last = shown >= max(listed["count"], timeline["count"])
    hours = frame.query.get("hours", "")
    hours = hours if hours in dict(RANGES) else RANGES[0][0]
    next_page = page_address(frame, PATH, {"offset": str(shown), "hours": hours})
    axis = LaneAxis.of(timeline)
    collisions = find_collisions(timeline["workflows"])
    return {
        "title": "Schedule",
        "crumbs": (("Schedule", ""),),
        "schedules": [{**one, "timing": describe_timing(one["policy"])} for one in listed["schedules"]],
        "count": listed["count"],
        "lanes": [{**lane, "marks": build_marks(lane, axis, collisions)} for lane in timeline["workflows"]],
        "collisions": [
            (at, names) for at, names in collisions.items() if parse_timestamp(f"{at}Z") <= axis.until
        ][:SHOWN_COLLISIONS],
        "collision_count": len(collisions),
        "has_due": any(lane["due"] for lane in timeline["workflows"]),
        "scheduler": data["scheduler"],
        "late_duties": list_late_duties(data["scheduler"], frame.now),
        "now_x": axis.x(axis.now),
        "clock_changes": [
            (axis.x(parse_timestamp(one["at"])), describe_clock_change(one), one["at"])
            for one in timeline["clockChanges"]
        ],
        "labels": axis.list_labels(RULER_STEPS[int(hours)]),
        "ranges": [
            (label, page_address(frame, PATH, {"hours": value}), value == hours) for value, label in RANGES
        ],
        "decisions": timeline["decisions"][:SHOWN_DECISIONS],
        "more_decisions": max(len(timeline["decisions"]) - SHOWN_DECISIONS, 0),
        "reasons": LIFECYCLE_REASONS,
        "may_run": frame.may("workflows:execute"),
        "may_write": frame.may("workflows:write"),
        "next": "" if is_last else next_page,
    }


class LaneAxis(Struct, frozen=True):
    """Time axis of the lanes."""

    since: datetime
    now: datetime
    until: datetime

    @classmethod
    def of(cls, timeline: Mapping[str, Any]) -> LaneAxis:
        """Return the axis with the bounds and the present time of a timeline of the API."""
        return cls(*(parse_timestamp(timeline[name]) for name in ("since", "now", "until")))

    def x(self, at: datetime) -> float:
        """Return the position of a time in percent of the range; times outside of it are at its ends."""
        share = (at - self.since) / (self.until - self.since)
        return round(min(max(share, 0.0), 1.0) * 100, 2)

    def list_labels(self, step: int) -> Sequence[tuple[float, str]]:
        """Return position in percent and text of the ruler's labels, every `step` hours: hours in UTC, or
        days for 24.
        """
        first = self.since.replace(minute=0, second=0, microsecond=0)
        start = first - timedelta(hours=first.hour % step)
        count = int((self.until - start) / timedelta(hours=step)) + 1
        times = [start + number * timedelta(hours=step) for number in range(1, count + 1)]
        name = "%a %d" if step == RULER_STEPS[168] else "%H"
        return [(self.x(at), at.strftime(name)) for at in times if at < self.until]


def find_collisions(lanes: Sequence[Mapping[str, Any]]) -> Mapping[str, Sequence[str]]:
    """Return the minutes in which several workflows start, as `2026-01-01T00:00`, with their names, in order.

    Schedules whose starts are dense don't count: they would collide with every other one.
    """
    found: dict[str, list[str]] = {}
    for lane in lanes:
        if not lane["ticksAreCut"]:
            for minute in dict.fromkeys(one["at"][:MINUTE_TEXT] for one in lane["ticks"]):
                found.setdefault(minute, []).append(lane["workflowName"])
    return {minute: names for minute, names in sorted(found.items()) if len(names) > 1}


def list_late_duties(scheduler: Mapping[str, Any] | None, now: datetime) -> Sequence[str]:
    """Return the names of the scheduler's duties that were last done over three intervals and half a minute
    ago; empty for None.
    """
    return [
        one["name"]
        for one in ([] if scheduler is None else scheduler["duties"])
        if (now - parse_timestamp(one["lastAt"])).total_seconds()
        > LATE_TICKS * one["everySeconds"] + LATE_SECONDS
    ]


def build_marks(
    lane: Mapping[str, Any], axis: LaneAxis, collisions: Mapping[str, Sequence[str]]
) -> Sequence[LaneMark]:
    """Return the shapes of a schedule's lane, those below others first: windows, times awake, waiting runs, planned
    starts, the last run.

    If the API has cut the planned starts, a single shape shows that they are dense.
    """
    marks = [_span("window", one, "window", axis) for one in lane["windows"]]
    for one in lane["awake"]:
        why = LIFECYCLE_REASONS.get(one["reason"] or "", "")
        title = f"awake{', ' if why else ''}{why}"
        marks.append(_span("hand" if one["isByHand"] else "awake", one, title, axis))
    for one in lane["due"]:
        runs = "run" if one["count"] == 1 else "runs"
        title = f"{one['count']:,} {runs} {DUE_WORDS[one['kind']]}, from {one['at'][11:16]} UTC on"
        marks.append(LaneMark(one["kind"], axis.x(parse_timestamp(one["at"])), 0, title))
    ticks = lane["ticks"]
    if lane["ticksAreCut"]:
        first, last = axis.x(parse_timestamp(ticks[0]["at"])), axis.x(axis.until)
        return [*marks, LaneMark("dense", first, max(last - first, 0.5), "runs again and again")]
    for one in ticks:
        names = collisions.get(one["at"][:MINUTE_TEXT], ())
        kind = "clock" if one["isByClockChange"] else "clash" if names else "tick"
        title = f"will run at {one['localTime']}"
        if names:
            title += (
                f", in the same minute as {', '.join(name for name in names if name != lane['workflowName'])}"
            )
        marks.append(LaneMark(kind, axis.x(parse_timestamp(one["at"])), 0, title))
    ran_at = parse_instant(lane["lastRunAt"])
    if ran_at is not None and ran_at >= axis.since:
        marks.append(LaneMark("ran", axis.x(ran_at), 0, f"ran at {lane['lastRunAt']}"))
    return marks


def _span(kind: str, span: Mapping[str, Any], title: str, axis: LaneAxis) -> LaneMark:
    """Return a shape of this kind for a span of time with `start` and `end`, at least 0.3 percent wide."""
    start, end = axis.x(parse_timestamp(span["start"])), axis.x(parse_timestamp(span["end"]))
    return LaneMark(kind, start, round(max(end - start, 0.3), 2), title)


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
