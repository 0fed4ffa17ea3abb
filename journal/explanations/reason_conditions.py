"""Condition of the unfinished runs of an organization with one reason, as `run_counts` counts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import and_, false, or_, select
from sqlmodel import col

from journal.deployments import activity, wakes
from journal.explanations import run_counts
from journal.explanations.blockers import BlockerCode
from models.blocked_interval import BlockedInterval
from models.execution import DELAYED_TARGET, LIMITED_TARGET, Execution

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection


async def build_condition(
    connection: AsyncConnection, organization_id: str, codes: Sequence[BlockerCode]
) -> ColumnElement[bool]:
    """Return the SQL condition of the runs of an organization that wait for one of the reasons `codes` now, without
    private runs; the caller adds the condition that they belong to the organization.

    Workers, and deployments of the organization, are read first: the same run has another reason when a worker or a pod
    appears.
    """
    now, workers = await run_counts.read_workers(connection)
    pods = await run_counts.list_deployed_targets(connection, organization_id)
    seen = await activity.read_activities(connection, pods) if pods else {}
    queues = [*run_counts.WORKER_QUEUES, LIMITED_TARGET]
    of_queues = [target for target in queues if run_counts.queue_code(target, workers, now) in codes]

    def find_pods(otherwise: BlockerCode) -> list[str]:
        """Return the workflow ids of the deployments with a reason among `codes`; a deployment without any reason has
        `otherwise`.
        """
        return [
            target
            for target in pods
            if run_counts.find_pod_reason(seen.get(target), now, otherwise=otherwise).code in codes
        ]

    pending = [*of_queues, *find_pods(BlockerCode.QUEUED_BEHIND)]
    has_reason = or_(
        false(),
        and_(wakes.IS_PENDING, col(Execution.target).in_(pending)),
        and_(wakes.IS_DEFERRED, col(Execution.target).in_(find_pods(BlockerCode.WAKING))),
        *(condition for code in codes for condition in _list_conditions(code)),
    )
    return and_(run_counts.IS_PUBLIC, has_reason)


def _list_conditions(code: BlockerCode) -> Iterator[ColumnElement[bool]]:
    """Yield the conditions of one reason that depend on the rows of runs alone."""
    of_delayed = and_(wakes.IS_DEFERRED, col(Execution.target) == DELAYED_TARGET)
    if code is BlockerCode.WORKFLOW_PAUSED:
        yield and_(of_delayed, run_counts.IS_HELD)
    if code is BlockerCode.TIMER:
        yield and_(of_delayed, ~run_counts.IS_HELD)
    if code in run_counts.WAITING_CODES:
        is_open = (
            select(col(BlockedInterval.execution_id))
            .where(
                col(BlockedInterval.execution_id) == col(Execution.id),
                col(BlockedInterval.code) == code.value,
                col(BlockedInterval.ended_at).is_(None),
            )
            .correlate(Execution)
            .exists()
        )
        yield and_(~wakes.IS_DEFERRED, is_open)
    yield and_(run_counts.IS_RUNNING, run_counts.RUNNING_CODE.in_([code.value]))
