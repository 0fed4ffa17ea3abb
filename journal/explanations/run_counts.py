"""Counts of unfinished runs by the reason that keeps them from moving, of one organization or of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from sqlalchemy import case, func, literal, literal_column, select, text, union_all
from sqlmodel import col

from journal.deployments import activity, wakes
from journal.explanations import deployment_blockers, run_explanation
from journal.explanations.blockers import BlockerCode
from journal.explanations.run_facts import SPECIAL_TARGETS
from journal.held_runs import UNTIL_RESUMED
from models.blocked_interval import BlockedInterval
from models.column_types import build_row
from models.database_time import DatabaseTime
from models.deployment import Deployment
from models.execution import (
    DELAYED_TARGET,
    ISOLATED_TARGET,
    ISOLATED_UNPARSED_TARGET,
    LIMITED_TARGET,
    LIVE_PRIVATE_CONDITION,
    SHARED_TARGET,
    UNPARSED_TARGET,
    Execution,
)
from models.execution_status import ExecutionStatus
from models.timestamps import from_microseconds
from models.worker_presence import WorkerPresence

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.deployments.activity import DeploymentActivity

MAX_COUNTED: Final = 10_000
"""Largest number of runs of one kind that is counted."""
WORKER_QUEUES: Final = (SHARED_TARGET, ISOLATED_TARGET, UNPARSED_TARGET, ISOLATED_UNPARSED_TARGET)
# Literals instead of bound parameters: the databases use a partial index only for a condition that they can
# read.
IS_RUNNING: Final = col(Execution.status) == literal_column(f"'{ExecutionStatus.RUNNING}'")
IS_PUBLIC: Final = col(Execution.is_private) == literal_column("false")
"""Runs that count for everybody in the organization; the others, such as node tests, are for few to see."""
IS_HELD: Final = col(Execution.due_at) == UNTIL_RESUMED
"""Deferred runs that a paused workflow holds."""
RUNNING_CODE: Final = case(
    (col(Execution.lease_until) < DatabaseTime(), BlockerCode.WORKER_LOST.value),
    (col(Execution.request).is_not(None), BlockerCode.CANCEL_REQUESTED.value),
    else_=BlockerCode.NODE_RUNNING.value,
)
"""Code of a running run."""
WAITING_CODES: Final = (
    BlockerCode.TIMER,
    BlockerCode.RETRY_AT,
    BlockerCode.AWAITING_EVENT,
    BlockerCode.AWAITING_INPUT,
    BlockerCode.AWAITING_TASK,
    BlockerCode.AWAITING_CALLBACK,
    BlockerCode.AWAITING_SIGNAL,
    BlockerCode.NODE_RUNNING,
)
"""Codes of started runs that wait, by their open blocked intervals."""


class CodeCount(Struct, frozen=True):
    """Number of runs with one primary reason."""

    count: int
    is_lower_bound: bool
    oldest_since: datetime | None
    until: datetime | None = None
    """Earliest known end, such as the next opening of a window."""


class PodReason(Struct, frozen=True):
    """Reason why the pods of a deployment claim no run, and its end if that is known."""

    code: BlockerCode
    until: datetime | None = None


class RunCounts(Struct, frozen=True):
    """Counts of unfinished runs by code, and the workers that have reported."""

    now: datetime
    by_code: Mapping[BlockerCode, CodeCount]
    workers: Sequence[WorkerPresence]


async def count_runs(connection: AsyncConnection, organization_id: str | None = None) -> RunCounts:
    """Count the unfinished runs of an organization, or (None) of all, by the reason why they do not move.

    Private runs count only without an organization. Each kind is counted up to 10,000. Runs in the queue of the workers
    all count as queued, or as without a worker. The result has the reports of up to 1,000 workers.
    """
    now, present = await read_workers(connection)
    totals = _CodeTotals()
    pods = await list_deployed_targets(connection, organization_id)
    seen = await activity.read_activities(connection, pods) if pods else {}
    for target, row in await _count_pending(connection, organization_id, pods):
        if target in pods:
            totals.add(find_pod_reason(seen.get(target), now, otherwise=BlockerCode.QUEUED_BEHIND), row)
        else:
            totals.add(PodReason(queue_code(target, present, now)), row)
    for target, row in await _count_deferred(connection, organization_id, pods):
        if target in pods:
            totals.add(find_pod_reason(seen.get(target), now, otherwise=BlockerCode.WAKING), row)
        else:
            totals.add(PodReason(BlockerCode(target)), row)
    for code, row in [
        *await _count_waiting(connection, organization_id),
        *await _count_running(connection, organization_id),
    ]:
        totals.add(PodReason(code), row)
    return RunCounts(now, totals.found, present)


async def read_workers(connection: AsyncConnection) -> tuple[datetime, Sequence[WorkerPresence]]:
    """Return the time of the database, and the reports of up to 1,000 workers, the latest first."""
    now = from_microseconds(await connection.scalar(select(DatabaseTime())) or 0)
    workers = await connection.execute(
        select(WorkerPresence).order_by(col(WorkerPresence.seen_at).desc()).limit(1_000)
    )
    return now, [build_row(WorkerPresence, row) for row in workers.mappings()]


class _CodeTotals:
    def __init__(self) -> None:
        self.found: dict[BlockerCode, CodeCount] = {}

    def add(self, reason: PodReason, row: Any) -> None:  # noqa: ANN401 - a row with `number` and `oldest`
        """Add the count and the oldest time of a row to the total of a reason; a row with the count 0 changes
        nothing.
        """
        if not row.number:
            return
        before = self.found.get(reason.code, CodeCount(0, is_lower_bound=False, oldest_since=None))
        self.found[reason.code] = CodeCount(
            before.count + row.number,
            before.is_lower_bound or row.number >= MAX_COUNTED,
            _earlier(before.oldest_since, _to_datetime(row.oldest)),
            _earlier(before.until, reason.until),
        )


def _earlier(one: datetime | None, other: datetime | None) -> datetime | None:
    return min((at for at in (one, other) if at is not None), default=None)


def _to_datetime(value: datetime | int | None) -> datetime | None:
    return from_microseconds(value) if isinstance(value, int) else value


def _count_bounded(label: Any, *conditions: ColumnElement[bool]) -> Select[Any]:  # noqa: ANN401 - any expression
    """Return the statement that counts at most 10,000 rows; its row has `label`, `number`, and `oldest`,
    their oldest change.
    """
    some = select(col(Execution.updated_at).label("at")).where(*conditions).limit(MAX_COUNTED).subquery()
    return select(
        literal(label).label("label"), func.count().label("number"), func.min(some.c.at).label("oldest")
    ).select_from(some)


def _organization_conditions(organization_id: str | None) -> Sequence[ColumnElement[bool]]:
    """Return the SQL conditions of an organization's runs without private ones; none for all organizations (None)."""
    if organization_id is None:
        return ()
    return col(Execution.organization_id) == organization_id, IS_PUBLIC


def live_private_statement(organization_id: str) -> Select[*tuple[Any, ...]]:
    """Return the statement of the ids of an organization's private runs that have not ended."""
    return select(col(Execution.id)).where(
        col(Execution.organization_id) == organization_id, text(LIVE_PRIVATE_CONDITION)
    )


async def list_deployed_targets(connection: AsyncConnection, organization_id: str | None) -> Sequence[str]:
    """Return the ids of deployed workflows with pending or deferred runs, of an organization or (None) of
    all, sorted.

    Bounded to 500 for an organization, and to 200 for all, for each of the two states.
    """
    found: set[str] = set()
    for condition in (wakes.IS_PENDING, wakes.IS_DEFERRED):
        if organization_id is None:
            targets = await connection.scalars(wakes.targets_statement(condition, SHARED_TARGET))
            found |= {str(target) for target in targets}
            continue
        deployed = select(col(Deployment.workflow_id)).where(
            col(Deployment.organization_id) == organization_id, col(Deployment.is_deployed)
        )
        has_runs = (
            select(col(Execution.id))
            .where(
                condition,
                col(Execution.target) == col(Deployment.workflow_id),
                col(Execution.organization_id) == organization_id,
            )
            .correlate(Deployment)
            .exists()
        )
        found |= {*await connection.scalars(deployed.where(has_runs).limit(activity.BATCH_DEPLOYMENTS))}
    return sorted(found - SPECIAL_TARGETS)


async def _count_pending(
    connection: AsyncConnection, organization_id: str | None, pods: Sequence[str]
) -> Sequence[tuple[str, Any]]:
    """Return each target (queues of workers, runs without a slot, `pods`) with a row that has `number` and `oldest` of
    its pending runs.
    """
    targets = [*WORKER_QUEUES, LIMITED_TARGET, *pods]
    statement = union_all(
        *(
            _count_bounded(
                target,
                wakes.IS_PENDING,
                col(Execution.target) == target,
                *_organization_conditions(organization_id),
            )
            for target in targets
        )
    )
    return [(str(row.label), row) for row in await connection.execute(statement)]


def queue_code(target: str, workers: Sequence[WorkerPresence], now: datetime) -> BlockerCode:
    """Return the reason why the pending runs of a queue wait: no slot in the queue of limited runs, else no living
    worker, else the queue.
    """
    if target == LIMITED_TARGET:
        return BlockerCode.WAITING_FOR_SLOT
    present = run_explanation.present_workers(workers, now)
    return BlockerCode.QUEUED_BEHIND if present else BlockerCode.NO_WORKER


def find_pod_reason(seen: DeploymentActivity | None, now: datetime, *, otherwise: BlockerCode) -> PodReason:
    """Return the reason why the pods of a deployment claim no run, and when it ends, if that is certain; `otherwise` if
    nothing keeps them from it.
    """
    blocker = deployment_blockers.find_blocker(seen, None, now, since=None)
    return PodReason(otherwise) if blocker is None else PodReason(blocker.code, blocker.until)


async def _count_deferred(
    connection: AsyncConnection, organization_id: str | None, pods: Sequence[str]
) -> Sequence[tuple[str, Any]]:
    """Return targets or codes, each with a row with `number` and `oldest`, of accepted runs that may not start yet.

    They are held by a paused workflow, delayed to a time, or deferred by one of the deployments `pods`.
    """
    of_delayed = (wakes.IS_DEFERRED, col(Execution.target) == DELAYED_TARGET)
    of_organization = _organization_conditions(organization_id)
    statement = union_all(
        _count_bounded(BlockerCode.WORKFLOW_PAUSED.value, *of_delayed, IS_HELD, *of_organization),
        _count_bounded(BlockerCode.TIMER.value, *of_delayed, ~IS_HELD, *of_organization),
        *(
            _count_bounded(target, wakes.IS_DEFERRED, col(Execution.target) == target, *of_organization)
            for target in pods
        ),
    )
    return [(str(row.label), row) for row in await connection.execute(statement)]


async def _count_waiting(
    connection: AsyncConnection, organization_id: str | None
) -> Sequence[tuple[BlockerCode, Any]]:
    """Return reasons, each with a row with `number` and `oldest`, of started runs that wait, from their open blocked
    intervals.

    A run with two open intervals counts twice.
    """
    is_open: list[ColumnElement[bool]] = [col(BlockedInterval.ended_at).is_(None)]
    if organization_id is not None:
        is_open += [
            col(BlockedInterval.organization_id) == organization_id,
            col(BlockedInterval.execution_id).not_in(live_private_statement(organization_id)),
        ]
    statements = []
    for code in WAITING_CODES:
        some = (
            select(col(BlockedInterval.started_at).label("at"))
            .where(*is_open, col(BlockedInterval.code) == code.value)
            .limit(MAX_COUNTED)
            .subquery()
        )
        statements.append(
            select(
                literal(code.value).label("label"),
                func.count().label("number"),
                func.min(some.c.at).label("oldest"),
            ).select_from(some)
        )
    return [(BlockerCode(row.label), row) for row in await connection.execute(union_all(*statements))]


async def _count_running(
    connection: AsyncConnection, organization_id: str | None
) -> Sequence[tuple[BlockerCode, Any]]:
    """Return reasons, each with a row with `number` and `oldest`, of running runs: a lost lease, a request to end, or a
    node at work.
    """
    some = (
        select(RUNNING_CODE.label("label"), col(Execution.updated_at).label("at"))
        .where(IS_RUNNING, *_organization_conditions(organization_id))
        .limit(MAX_COUNTED)
        .subquery()
    )
    statement = select(
        some.c.label, func.count().label("number"), func.min(some.c.at).label("oldest")
    ).group_by(some.c.label)
    return [(BlockerCode(row.label), row) for row in await connection.execute(statement)]
