"""Wake of the pods that a run has waited for before its first node: its times, in the order in which they happened."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from sqlalchemy import func, select
from sqlmodel import col

from journal.explanations.blockers import BlockerCode
from models.deployment import LifecycleDecision
from models.execution import SpanRow
from models.lifecycle_policy import LifecycleAction

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.blocked_interval import BlockedInterval
    from models.execution import Execution

RECENT_DECISIONS: Final = 10
"""Last decisions before the claim of a run that are read."""
_STARTS: Final = frozenset({LifecycleAction.START, LifecycleAction.WAKE})
_STOPS: Final = frozenset({LifecycleAction.STOP, LifecycleAction.DRAIN})


class RunWake(Struct, frozen=True):
    """Times of the wake before the first node of a run; None for those that are not recorded."""

    accepted_at: datetime
    asleep_since: datetime | None
    """Last stop of the pods before the wake."""
    decided_at: datetime | None
    """Decision to start pods; before `accepted_at` if an earlier run had woken them already."""
    reason: str | None
    """Reason of the decision."""
    pod_started_at: datetime | None
    """Start of the process in the pod that claimed the run."""
    claimed_at: datetime
    first_node_at: datetime | None


async def read_wake(
    connection: AsyncConnection, run: Execution, intervals: Sequence[BlockedInterval]
) -> RunWake | None:
    """Return the wake that a run has waited for, by its blocked intervals; None if no pod was woken for it, or none has
    claimed it yet.
    """
    waited = next((one for one in intervals if one.code == BlockerCode.WAKING), None)
    if waited is None or waited.ended_at is None:
        return None
    decisions = (
        select(col(LifecycleDecision.at), col(LifecycleDecision.action), col(LifecycleDecision.reason))
        .where(
            col(LifecycleDecision.workflow_id) == run.workflow_id,
            col(LifecycleDecision.at) <= waited.ended_at,
        )
        .order_by(col(LifecycleDecision.at).desc(), col(LifecycleDecision.id).desc())
        .limit(RECENT_DECISIONS)
    )
    found = (await connection.execute(decisions)).all()
    start = next((one for one in found if one.action in _STARTS), None)
    stop = next((one for one in found if one.action in _STOPS and (not start or one.at < start.at)), None)
    first_node = select(func.min(col(SpanRow.started_at))).where(
        col(SpanRow.execution_id) == run.id, col(SpanRow.shard) == run.shard, col(SpanRow.iteration) == ""
    )
    return RunWake(
        accepted_at=run.created_at,
        asleep_since=stop.at if start and stop else None,
        decided_at=start.at if start else None,
        reason=start.reason if start else None,
        pod_started_at=waited.pod_started_at,
        claimed_at=waited.ended_at,
        first_node_at=await connection.scalar(first_node),
    )
