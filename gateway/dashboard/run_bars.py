"""Bars of a run on its time axis: of nodes, iterations of loops, failed attempts, and the time before the start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, TypeAlias

from msgspec import Struct

from gateway.dashboard.formats import look_of, milliseconds_between, parse_instant
from gateway.dashboard.time_axis import WHOLE, Interval, TimeAxis

NodeState: TypeAlias = Mapping[str, Any]
"""State of a node, as the graph of a run shows it."""

MIN_WIDTH: Final = 0.6
"""Percentage of the axis that the shortest bar takes."""
WAITING_TYPES: Final = frozenset({"human-input", "wait", "wait-for-event", "wait-for-signal", "sub-workflow"})
TASK_CODE: Final = "awaiting-task"
"""Code of a run whose custom nodes work elsewhere."""
CONTAINERS: Final = frozenset({"loop"})
"""Types that last as long as the nodes inside of them."""
MIN_START_SHARE: Final = 2.0
"""Percentage of the axis that the time before the start must take to have a row."""
MILLISECOND: Final = timedelta(milliseconds=1)


class TimeBar(Struct, frozen=True):
    """Bar on the time axis, in percent of its width."""

    x: float
    width: float
    tone: str


class StartRow(Struct, frozen=True):
    """Time between the acceptance of a run and its start."""

    label: str
    bars: Sequence[TimeBar]
    duration_ms: int
    asleep_since: str = ""
    """Time since which its pods were asleep; empty if they were not, or if it is not recorded."""


class WakeBar(Struct, frozen=True):
    """Event of the wake before a run, with the time since the event before it."""

    label: str
    at: str
    duration_ms: int | None
    """None for the first event."""


def list_waits(history: Iterable[Mapping[str, Any]], now: datetime) -> Sequence[Interval]:
    """Return the intervals in which a run was blocked, so that none of its nodes worked, in order.

    A task of a custom node is work, of another process.
    """
    waits = []
    for reason in history:
        start = parse_instant(reason["from"])
        if start is not None and reason["code"] != TASK_CODE:
            waits.append((start, parse_instant(reason["to"]) or now))
    return sorted(waits)


def _split(
    start: datetime, end: datetime, waits: Iterable[Interval]
) -> Iterable[tuple[datetime, datetime, bool]]:
    """Yield the parts of an interval with whether each is one of the ordered `waits`."""
    begin = start
    for first, last in waits:
        if last > start and first < end:
            if first > start:
                yield start, first, False
            yield max(first, start), min(last, end), True
            start = min(last, end)
    if start < end or start == begin:
        yield start, end, False


def list_work(
    states: Iterable[NodeState], now: datetime, waits: Sequence[Interval] = ()
) -> Iterable[Interval]:
    """Yield the intervals (start, end) in which nodes ran, for the time axis; those of nodes that still run end at
    `now`.

    Of a node that waits, and of a loop, only start and end count, as intervals without length. `waits` of the run are
    left out.
    """
    for state in states:
        has_no_work = state["nodeType"] in WAITING_TYPES or state["nodeType"] in CONTAINERS
        for one in _spans_of(state):
            start = parse_instant(one["startedAt"])
            if start is None:
                continue
            end = parse_instant(one["endedAt"])
            if has_no_work or one["status"] == "waiting":
                yield start, start
                if end is not None:
                    yield end, end
            else:
                yield from (
                    (first, last) for first, last, is_wait in _split(start, end or now, waits) if not is_wait
                )


def list_waking(run: Mapping[str, Any], seconds: float) -> Iterable[Interval]:
    """Yield the interval of `seconds` before the start of a run in which its pods were woken; none if it is 0."""
    started = parse_instant(run["startedAt"])
    if started is not None and seconds:
        yield started - timedelta(seconds=seconds), started


def build_bars(
    state: NodeState, axis: TimeAxis, now: datetime, waits: Sequence[Interval] = ()
) -> Sequence[TimeBar]:
    """Return the bars of a node on the time axis, then those of its failed attempts; empty for a node that has not
    started.

    A node in a loop has a bar for each iteration; bars of one color that touch are joined. The `waits` of the run are
    those of a loop or agent around them.
    """
    is_waiting = state["nodeType"] in WAITING_TYPES
    bars = [
        _build_bar(first, last, axis, "warn" if is_waiting or is_wait else look_of(one["status"]).tone)
        for one in _spans_of(state)
        if (start := parse_instant(one["startedAt"])) is not None
        for first, last, is_wait in _split(start, parse_instant(one["endedAt"]) or now, waits)
    ]
    tried = [
        _build_bar(start, parse_instant(one["endedAt"]) or now, axis, "tried")
        for one in state["failedAttempts"]
        if (start := parse_instant(one["startedAt"])) is not None
    ]
    return [*_join(bars), *_join(tried)]


def _spans_of(state: NodeState) -> Sequence[Mapping[str, Any]]:
    """Return the iterations of a node in a loop; only the state itself in no loop, or if not all iterations
    are listed.
    """
    iterations: Sequence[Mapping[str, Any]] = state["iterations"]
    is_complete = bool(iterations) and sum(state["iterationCounts"].values()) == len(iterations)
    return iterations if is_complete else [state]


def _build_bar(start: datetime, end: datetime, axis: TimeAxis, tone: str) -> TimeBar:
    """Return the bar of an interval, at least `MIN_WIDTH` percent wide."""
    first = axis.percent(start)
    width = max(axis.percent(end) - first, MIN_WIDTH)
    return TimeBar(round(min(first, WHOLE - width), 2), round(width, 2), tone)


def _join(bars: Sequence[TimeBar]) -> Sequence[TimeBar]:
    """Return bars in the order of their positions; those of one color that touch become one."""
    joined: list[TimeBar] = []
    for bar in sorted(bars, key=lambda one: one.x):
        last = joined[-1] if joined else None
        if last is not None and last.tone == bar.tone and bar.x <= last.x + last.width:
            end = max(last.x + last.width, bar.x + bar.width)
            joined[-1] = TimeBar(last.x, round(end - last.x, 2), last.tone)
        else:
            joined.append(bar)
    return joined


def find_ghost(state: NodeState, axis: TimeAxis) -> float | None:
    """Return the position in percent at which a node would have ended with its duration in the last completed
    run; None without one.
    """
    start, previous = parse_instant(state["startedAt"]), state["previousDurationMs"]
    if start is None or previous is None:
        return None
    return round(min(axis.percent(start + previous * MILLISECOND), WHOLE - MIN_WIDTH / 2), 2)


def list_phases(wake: Mapping[str, Any] | None) -> Sequence[WakeBar]:
    """Return the recorded events of the wake of pods before a run in the order of their times; empty without a wake."""
    events = (
        ("acceptedAt", "Accepted"),
        ("decidedAt", "Pod asked for"),
        ("podStartedAt", "Pod started"),
        ("claimedAt", "Claimed"),
        ("firstNodeAt", "First node"),
    )
    # All times have milliseconds and end in Z, so that texts sort as times do.
    found = sorted((wake[name], label) for name, label in events if wake[name]) if wake else []
    before = [None, *(at for at, _ in found)]
    return [
        WakeBar(label, at, milliseconds_between(earlier, at))
        for (at, label), earlier in zip(found, before, strict=False)
    ]


def build_start_row(
    run: Mapping[str, Any],
    axis: TimeAxis,
    now: datetime,
    waking_seconds: float,
    wake: Mapping[str, Any] | None = None,
) -> StartRow | None:
    """Return the row of the time before the start of a run; None if it is under two percent of the axis, or the run
    has ended without a start.

    A recorded `wake` divides the time for which pods were woken: until the pod was asked for, its start, and its claim
    of the run. A run that has not ended yet may still start.
    """
    created, started = parse_instant(run["createdAt"]), parse_instant(run["startedAt"])
    if created is None or (started is None and run["endedAt"] is not None):
        return None
    end = started or now
    waited = milliseconds_between(run["createdAt"], end.isoformat()) or 0
    if axis.percent(end) < MIN_START_SHARE:
        return None
    woken = min(timedelta(seconds=waking_seconds), end - created)
    # The pod is asked for, starts, and takes the run. Its clock may differ from that of the database.
    booted = parse_instant((wake or {}).get("podStartedAt")) or end
    booted = min(max(booted, end - woken), end)
    asked = parse_instant((wake or {}).get("decidedAt")) or end - woken
    asked = min(max(asked, end - woken), booted)
    parts = ((created, asked, "queued"), (asked, booted, "lit"), (booted, end, "claim"))
    bars = [
        TimeBar(round(axis.percent(first), 2), round(axis.percent(last) - axis.percent(first), 2), tone)
        for first, last, tone in parts
        if last > first
    ]
    asleep_since = str((wake or {}).get("asleepSince") or "")
    return StartRow("Woke its pod" if woken else "Waited for its start", bars, waited, asleep_since)
