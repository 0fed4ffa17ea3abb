"""Times of the last wakes of all deployments, by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy import func, literal_column, select
from sqlmodel import col

from journal.explanations.blockers import BlockerCode
from models.blocked_interval import BlockedInterval
from models.deployment import LifecycleDecision
from models.execution import Execution
from models.lifecycle_policy import LifecycleAction

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

LAST_WAKES: Final = 200
"""Runs that waited for a pod that are read, the newest."""
PERIOD: Final = timedelta(days=1)
# A literal instead of a bound parameter: the databases use a partial index only for a condition that they can
# read.
_IS_WAKING: Final = col(BlockedInterval.code) == literal_column(f"'{BlockerCode.WAKING.value}'")


async def read_wake_times(connection: AsyncConnection, now: datetime) -> Mapping[str, Sequence[float]]:
    """Return the seconds of each phase of the last 200 wakes in the day before `now`, sorted, by the name of the phase.

    `decide` lasts from the acceptance of a run to the decision to start pods, `start` to the start of the pod's
    process, `claim` to the claim of the run, and `total` from the first to the last. A run that was accepted while its
    pod was starting has no `decide`.
    """
    started = (
        select(func.max(col(LifecycleDecision.at)))
        .where(
            col(LifecycleDecision.workflow_id) == col(Execution.workflow_id),
            col(LifecycleDecision.action).in_([LifecycleAction.START.value, LifecycleAction.WAKE.value]),
            col(LifecycleDecision.at) <= col(BlockedInterval.ended_at),
        )
        .correlate(Execution, BlockedInterval)
        .scalar_subquery()
    )
    statement = (
        select(
            *(col(BlockedInterval.started_at), col(BlockedInterval.ended_at)),
            *(col(BlockedInterval.pod_started_at), started.label("decided_at")),
        )
        .join(Execution, col(Execution.id) == col(BlockedInterval.execution_id))
        .where(_IS_WAKING, col(BlockedInterval.started_at) >= now - PERIOD)
        .order_by(col(BlockedInterval.started_at).desc())
        .limit(LAST_WAKES)
    )
    times: dict[str, list[float]] = {"decide": [], "start": [], "claim": [], "total": []}
    for row in await connection.execute(statement):
        if row.ended_at is None:
            continue
        times["total"].append(_seconds(row.started_at, row.ended_at))
        begun = row.started_at
        if row.decided_at is not None and row.decided_at >= begun:
            times["decide"].append(_seconds(begun, row.decided_at))
            begun = row.decided_at
        if row.pod_started_at is not None:
            times["start"].append(_seconds(begun, row.pod_started_at))
            times["claim"].append(_seconds(row.pod_started_at, row.ended_at))
    return {phase: sorted(found) for phase, found in times.items()}


def _seconds(start: datetime, end: datetime) -> float:
    """Return the seconds between two times; 0 if the clocks of two machines show the second one first."""
    return max((end - start).total_seconds(), 0.0)
