"""Figures of the whole server: its queues, wakes, claims, commits, streams and retention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import asdict
from sqlalchemy import func, select
from sqlmodel import SQLModel, col

from gateway.http.wire import Instant, WireStruct, optional_instant
from journal import queue_delays
from models import ids
from models.execution import Execution
from models.ingest import Delivery, EventRecord

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from doctor.alert_states import QueueFacts
    from models.access import ApiCaller

_PERCENTS: Final = (50, 95)


class QueueFigure(WireStruct):
    """Pending executions of one target."""

    target: str
    """`workers`, `pods`, or the name of another queue: `limited` waits for a slot, `delayed` for a time, `intake`
    for the parser of mails, and `isolated` (mails: `isolated-intake`) for a trial after several lost workers.
    """
    count: int
    count_is_lower_bound: bool
    """True from 10,000 on."""


class WakePhase(WireStruct):
    """Times of one phase of the last wakes, in seconds."""

    phase: str
    """`decide` from the acceptance to the decision, `start` to the pod's process, `claim` to the claim, or `total`."""
    count: int
    p50: float | None
    p95: float | None


class OldestRows(WireStruct):
    """Oldest rows that are kept, with the days for which they are."""

    kind: str
    oldest_at: Instant | None
    """Null if there is none."""
    days: int | None
    """Retention; null if no present process says it. An execution is kept for this time after its end."""


class LargestWorkflow(WireStruct):
    """Workflow with many stored runs."""

    workflow_id: str
    organization_id: str | None
    """Null for a workflow that was deleted."""
    name: str | None
    """Null for workflows that the caller may not read, such as those of other organizations."""
    runs: int
    """Stored runs, about: by the statistics of PostgreSQL, or by a sample of 500 rows of SQLite."""


class ServerFigures(WireStruct):
    """Figures of all organizations' work."""

    claims_per_second: float
    """Executions that the present workers have claimed, by their last reports; without those of pods."""
    commits_per_second: float
    commit_size: float | None
    """Mean number of executions in one commit of a worker; null without a commit."""
    event_streams: int
    """Open event streams of the present gateways."""
    queues: Sequence[QueueFigure]
    oldest_pending_seconds: float
    """Time for which the oldest pending execution could be claimed."""
    schedule_lag_seconds: float
    """Time for which a schedule has been due."""
    deferred_delay_seconds: float
    """Time for which a waiting execution has been due."""
    wakes: Sequence[WakePhase]
    """Of the last 200 executions of a day that waited for a pod."""
    retention: Sequence[OldestRows]
    largest_workflows: Sequence[LargestWorkflow]
    """At most ten workflows of all organizations, the one with the most stored runs first."""


async def read_figures(
    connection: AsyncConnection,
    caller: ApiCaller,
    now: datetime,
    activities: Sequence[Mapping[str, Any]],
    queue: QueueFacts,
) -> ServerFigures:
    """Return the figures of the server from its rows and the reported activities of its present processes.

    `queue` has the seconds for which the oldest pending run, schedule and waiting run have been due. Names of workflows
    are those that the caller may read.
    """
    commits = sum(one.get("commits", 0) for one in activities)
    committed = sum(one.get("commits", 0) * one.get("commitSize", 0) for one in activities)
    from gateway.drift import largest_workflows  # noqa: PLC0415 - for the operator's page alone
    from journal import wake_times  # noqa: PLC0415 - the same

    times = await wake_times.read_wake_times(connection, now)
    return ServerFigures(
        claims_per_second=round(sum(one.get("claims", 0) for one in activities), 1),
        commits_per_second=round(commits, 1),
        commit_size=round(committed / commits, 1) if commits else None,
        event_streams=sum(one.get("streams", 0) for one in activities),
        queues=[
            QueueFigure(target=target, count=count, count_is_lower_bound=is_lower_bound)
            for target, count, is_lower_bound in await queue_delays.count_pending(connection)
        ],
        oldest_pending_seconds=round(queue.oldest_pending, 1),
        schedule_lag_seconds=round(queue.schedule_lag, 1),
        deferred_delay_seconds=round(queue.deferred_delay, 1),
        wakes=[_show_phase(phase, found) for phase, found in times.items()],
        retention=await _find_oldest(connection, activities),
        largest_workflows=[
            LargestWorkflow(**asdict(one)) for one in await largest_workflows.find_largest(connection, caller)
        ],
    )


def _show_phase(phase: str, ordered: Sequence[float]) -> WakePhase:
    """Return count, median and 95th percentile of the sorted times of a phase; both are None without times."""
    p50, p95 = (
        round(ordered[-(-len(ordered) * percent // 100) - 1], 3) if ordered else None for percent in _PERCENTS
    )
    return WakePhase(phase=phase, count=len(ordered), p50=p50, p95=p95)


async def _find_oldest(
    connection: AsyncConnection, activities: Sequence[Mapping[str, Any]]
) -> Sequence[OldestRows]:
    """Return the creation time of the oldest execution, delivery and event, taken from its id, None without rows.

    The retention in days is that of a process in `activities`, None if none reports it.
    """
    days: Mapping[str, int] = next((one["retention"] for one in activities if one.get("retention")), {})
    tables: tuple[tuple[str, type[SQLModel], str], ...] = (
        ("executions", Execution, "executions"),
        ("deliveries", Delivery, "events"),
        ("events", EventRecord, "events"),
    )
    found = []
    for kind, table, name in tables:
        oldest = await connection.scalar(select(func.min(col(table.id))))  # type: ignore[attr-defined]  # all have ids
        at = None if oldest is None else ids.time_of(oldest)
        found.append(OldestRows(kind=kind, oldest_at=optional_instant(at), days=days.get(name)))
    return found
