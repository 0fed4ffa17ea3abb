"""Time of a run by cause, and its critical path: pure functions of its row, intervals and spans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct
from sqlalchemy import select
from sqlmodel import col

from engine.run_records import SpanStatus
from journal.explanations.blockers import BlockerCode
from json_text import decoding
from models.execution import Execution, SpanRow
from models.workflow import Definition

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.blocked_interval import BlockedInterval

MAX_SPANS: Final = 2_000
_ZERO: Final = timedelta()


class TimeSpent(Struct, frozen=True):
    """Time of a run from its acceptance to its end or now; the parts sum up to it."""

    queued: timedelta
    waking: timedelta
    running: timedelta
    waiting_for: Mapping[str, timedelta]
    """By code of the blocker."""


class PathStep(Struct, frozen=True):
    """Node on the critical path: the chain of nodes that determined the end of the run."""

    node_id: str
    label: str
    started_at: datetime
    ended_at: datetime


class _StoredEdge(msgspec.Struct):
    source: str = ""
    target: str = ""


class _StoredEdges(msgspec.Struct):
    connections: list[_StoredEdge] = []


_decode_edges: Final = decoding.build_decoder(_StoredEdges).decode


def sum_times(
    run: Execution,
    intervals: Sequence[BlockedInterval],
    now: datetime,
    *,
    primary: BlockerCode,
    since: datetime | None,
) -> TimeSpent:
    """Divide the time of a run from its acceptance by cause: queued, waking, running, and each code of
    blocked intervals.

    It ends with the run, or `now`. Each moment counts once. `primary` and `since` are the current reason of
    an unfinished run that has no open interval, and its start.
    """
    end = run.ended_at or now
    begun_at = run.started_at or end
    blocked = [*_iterate_blocked_spans(run, intervals, end, primary, since)]
    queued = [*_iterate_queued_spans(run, intervals, end)]
    times: dict[str, timedelta] = {}
    bounds = {run.created_at, begun_at, end}
    bounds.update(moment for _, start, stop in blocked for moment in (start, stop))
    bounds.update(moment for span in queued for moment in span)
    for start, stop in pairwise(sorted(one for one in bounds if run.created_at <= one <= end)):
        label = next((code for code, first, last in blocked if first <= start and stop <= last), None)
        if label is None:
            is_queued = stop <= begun_at or any(first <= start and stop <= last for first, last in queued)
            label = BlockerCode.QUEUED_BEHIND.value if is_queued else _RUNNING
        times[label] = times.get(label, _ZERO) + (stop - start)
    queue_time, running = times.pop(BlockerCode.QUEUED_BEHIND, _ZERO), times.pop(_RUNNING, _ZERO)
    return TimeSpent(queue_time, times.pop(BlockerCode.WAKING, _ZERO), running, times)


_RUNNING: Final = "running"


def _iterate_blocked_spans(
    run: Execution,
    intervals: Sequence[BlockedInterval],
    end: datetime,
    primary: BlockerCode,
    since: datetime | None,
) -> Iterator[tuple[str, datetime, datetime]]:
    """Yield code, start and end of each blocked interval, an open one until `end`.

    An unfinished run without an open interval adds its current block, `primary` since `since`.
    """
    for interval in intervals:
        yield interval.code, interval.started_at, interval.ended_at or end
    is_open = any(interval.ended_at is None for interval in intervals)
    is_blocked = primary not in {BlockerCode.NONE, BlockerCode.NODE_RUNNING, BlockerCode.CANCEL_REQUESTED}
    if run.ended_at is None and is_blocked and since is not None and not is_open:
        yield primary.value, since, end


def _iterate_queued_spans(
    run: Execution, intervals: Sequence[BlockedInterval], end: datetime
) -> Iterator[tuple[datetime, datetime]]:
    """Yield start and end of the times in which a started run could continue and was not claimed again.

    They follow blocked intervals.
    """
    for interval in intervals:
        has_started = run.started_at is not None and interval.started_at >= run.started_at
        if has_started and interval.ended_at is not None:
            yield interval.ended_at, interval.resumed_at or end


def find_critical_path(spans: Iterable[PathStep], edges: Iterable[tuple[str, str]]) -> Sequence[PathStep]:
    """Return the nodes that determined the end of a run, from the first to the last; empty without spans.

    It begins at the node that ended last and follows, each time, the parent that ended last. `edges` are
    pairs of source and target.
    """
    by_id = {step.node_id: step for step in spans}
    parents: dict[str, list[PathStep]] = {}
    for source, target in edges:
        if source in by_id and target in by_id:
            parents.setdefault(target, []).append(by_id[source])
    step = max(by_id.values(), key=lambda one: one.ended_at, default=None)
    path: list[PathStep] = []
    seen: set[str] = set()
    while step is not None and step.node_id not in seen:
        seen.add(step.node_id)
        path.append(step)
        step = max(parents.get(step.node_id, ()), key=lambda one: one.ended_at, default=None)
    return path[::-1]


async def read_critical_path(connection: AsyncConnection, run: Execution) -> Sequence[PathStep]:
    """Return the critical path of an ended run from its spans (2,000 at most, without loops) and its
    definition snapshot.

    Without the snapshot it is only the node that ended last.
    """
    statement = (
        select(
            *(col(SpanRow.node_id), col(SpanRow.label)),
            *(col(SpanRow.started_at), col(SpanRow.ended_at)),
        )
        .where(
            col(SpanRow.execution_id) == run.id,
            col(SpanRow.shard) == run.shard,
            col(SpanRow.iteration) == "",
            col(SpanRow.status) != SpanStatus.SKIPPED.value,
            col(SpanRow.ended_at).is_not(None),
        )
        .limit(MAX_SPANS)
    )
    steps = [
        PathStep(row.node_id, row.label, row.started_at, row.ended_at)
        for row in await connection.execute(statement)
        if row.started_at is not None and row.ended_at is not None
    ]
    body = await connection.scalar(
        select(col(Definition.body)).where(
            col(Definition.organization_id) == run.organization_id,
            col(Definition.hash) == run.definition_hash,
            col(Definition.shard) == run.shard,
        )
    )
    edges = _decode_edges(body).connections if body else []
    return find_critical_path(steps, [(edge.source, edge.target) for edge in edges])
