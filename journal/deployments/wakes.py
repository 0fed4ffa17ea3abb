"""Wakes of deployments for their runs: start a stopped deployment, or defer its runs where it may not start.

A deferred run waits although it has not started. Sweeps check repeatedly whether it may run. So it
continues after a start of the deployment, a change of its policy or the opening of its window.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from zoneinfo import ZoneInfoNotFoundError

import structlog
from msgspec.structs import replace
from sqlalchemy import and_, bindparam, case, func, literal, literal_column, select, update
from sqlmodel import col

from journal import blocked_intervals
from journal.deployments import activity
from journal.explanations.blockers import BlockerCode
from models import lifecycle_policy
from models.column_types import build_row
from models.database_time import DatabaseTime
from models.deployment import (
    Deployment,
    has_failed_to_start,
    is_desired,
)
from models.execution import ISOLATED_TARGET, SHARED_TARGET, Execution
from models.execution_status import ExecutionStatus
from models.lifecycle_policy import (
    LifecycleAction,
    LifecycleReason,
    LifecycleVerdict,
    StartRefusal,
    StoppedReason,
)
from models.loss_limits import SUSPECT_LOSSES

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.deployments.activity import DeploymentActivity
    from models.database import Database

log = structlog.get_logger()

BATCH_TARGETS: Final = 200
BATCH_COUNTED: Final = 1_000
UNTIL_STARTED: Final = datetime(9999, 1, 1, tzinfo=UTC)
"""Due time of a run that waits until somebody starts the deployment."""

# Literals instead of bound parameters: the databases use a partial index only for a condition that they can
# read.
IS_PENDING: Final = col(Execution.status) == literal_column(f"'{ExecutionStatus.PENDING}'")
IS_DEFERRED: Final = and_(
    col(Execution.status) == literal_column(f"'{ExecutionStatus.WAITING}'"),
    col(Execution.started_at).is_(None),
)
WORKER_TARGET: Final = case(
    (and_(IS_PENDING, col(Execution.attempt) >= SUSPECT_LOSSES), ISOLATED_TARGET), else_=SHARED_TARGET
)
"""Target of a run that pods may no longer run."""
_UNLOCKED_DEPLOYMENTS: Final = (
    select(col(Deployment.workflow_id))
    .where(
        col(Deployment.workflow_id).in_(bindparam("counted_ids", expanding=True)), col(Deployment.is_deployed)
    )
    .with_for_update(skip_locked=True)
    .cte("unlocked")
)
_RECORD_ACTIVITY: Final = (
    update(Deployment)
    .where(
        col(Deployment.workflow_id).in_(select(_UNLOCKED_DEPLOYMENTS.c.workflow_id)),
        col(Deployment.is_deployed),
    )
    .values(last_activity_at=DatabaseTime())
    .returning(*Deployment.__table__.columns)  # type: ignore[attr-defined]  # SQLModel adds it
)
_STARTING_ACTIONS: Final = frozenset({LifecycleAction.START, LifecycleAction.WAKE})


class StartRefused(Exception):
    """The deployment may not be started for a run now."""

    def __init__(self, refusal: StartRefusal) -> None:
        super().__init__(refusal.code)
        self.refusal = refusal


class WakeOutcome(Enum):
    """Outcome for the runs of a deployment."""

    NOTHING = auto()
    WOKEN = auto()
    """The deployment is to have pods."""
    RELEASED = auto()
    """Its deferred runs may be claimed now."""
    DEFERRED = auto()
    """Its runs wait until it may start."""
    LEFT_TO_WORKERS = auto()
    """It is no longer deployed: any worker may claim its runs."""


async def record_activities(database: Database, workflow_ids: Collection[str]) -> dict[str, Deployment]:
    """Set the time of the last activity of several deployments to now; return the deployments by workflow id, without
    those of undeployed workflows.

    A deployment that another transaction has locked is returned unchanged. That transaction records activity itself, or
    is about to stop the deployment, and then the sweep for waiting runs finds the runs. Raises `DatabaseUnavailable`.
    """
    return await database.transaction(partial(_record_activities, workflow_ids=sorted(set(workflow_ids))))


def decide_lifecycle(seen: DeploymentActivity) -> LifecycleVerdict:
    """Decide about a deployment by its policy; if its pods failed to start, it is stopped, and the policy starts it
    again later.

    Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
    situation = seen.situation
    if situation.is_up and has_failed_to_start(seen.deployment):
        return lifecycle_policy.stop_decision(situation, LifecycleReason.FAILED, StoppedReason.FAILED)
    return activity.decide_by_policy(seen)


def decide_for_run(seen: DeploymentActivity) -> LifecycleVerdict:
    """Decide to wake a deployment for a new run, unless its pods are desired and have not failed; a `decide` for
    `decide_and_apply`.

    Raises `StartRefused` if the policy allows no start now, and `ZoneInfoNotFoundError` for an unknown time zone.
    """
    refusal = lifecycle_policy.start_refusal(seen.policy, seen.situation, seen.now)
    if refusal is not None:
        raise StartRefused(refusal)
    if is_desired(seen.deployment) and not has_failed_to_start(seen.deployment):
        return LifecycleVerdict(LifecycleAction.NONE, LifecycleReason.IN_USE)
    return LifecycleVerdict(LifecycleAction.WAKE, LifecycleReason.RUN_DUE)


async def wake_for_waiting_runs(database: Database) -> dict[str, WakeOutcome]:
    """Start, defer or release the deployments that have unclaimed or deferred runs, and leave such runs of undeployed
    workflows to the workers; return the outcomes by workflow id.

    Deployments that need nothing are left out. The caller notifies the deployer of each woken deployment. Raises
    `DatabaseUnavailable`.
    """
    done: dict[str, WakeOutcome] = {}
    for condition in (IS_PENDING, IS_DEFERRED):
        after: str | None = SHARED_TARGET
        while after is not None:
            async with database.read() as connection:
                found = [str(one) for one in await connection.scalars(targets_statement(condition, after))]
            for workflow_id in found:
                outcome = await _wake_for_runs(database, workflow_id, condition)
                if outcome is not WakeOutcome.NOTHING:
                    done[workflow_id] = outcome
            after = found[-1] if len(found) == BATCH_TARGETS else None
    return done


async def release_deferred_runs(connection: AsyncConnection, workflow_id: str) -> int:
    """Make the deferred runs of a deployment pending, with blocked intervals that end now; return their number.

    They waited for its window, or for a start by hand.
    """
    code = case(
        (col(Execution.due_at) == UNTIL_STARTED, BlockerCode.STOPPED_MANUALLY.value),
        else_=BlockerCode.WINDOW_CLOSED.value,
    )
    of_deployment = col(Execution.target) == workflow_id
    await blocked_intervals.add_ended_intervals(
        connection, code, of_deployment, IS_DEFERRED, since=col(Execution.updated_at)
    )
    return await _update_runs(
        connection, workflow_id, IS_DEFERRED, status=ExecutionStatus.PENDING.value, due_at=None
    )


def targets_statement(condition: ColumnElement[bool], after: str) -> Select[*tuple[Any, ...]]:
    """Return the statement that lists up to 200 workflow ids after `after`, in order, of deployments with runs that
    meet the condition.

    It makes one index probe for each. Ids of workflows sort after the words that name the other targets.
    """
    target = col(Execution.target)
    first = select(func.min(target)).where(condition, target > after).scalar_subquery()
    found = select(first.label("target"), literal(1).label("place")).cte("found", recursive=True)
    following = select(func.min(target)).where(condition, target > found.c.target).scalar_subquery()
    found = found.union_all(
        select(following, found.c.place + 1).where(found.c.target.is_not(None), found.c.place < BATCH_TARGETS)
    )
    return select(found.c.target).where(found.c.target.is_not(None)).order_by(found.c.target)


async def _record_activities(
    connection: AsyncConnection, *, workflow_ids: Sequence[str]
) -> dict[str, Deployment]:
    found: dict[str, Deployment] = {}
    for start in range(0, len(workflow_ids), BATCH_COUNTED):
        counted_ids = workflow_ids[start : start + BATCH_COUNTED]
        result = await connection.execute(_RECORD_ACTIVITY, {"counted_ids": counted_ids})
        for row in result.mappings():
            found[row["workflow_id"]] = build_row(Deployment, row)
    if locked := [workflow_id for workflow_id in workflow_ids if workflow_id not in found]:
        statement = select(Deployment).where(
            col(Deployment.workflow_id).in_(locked), col(Deployment.is_deployed)
        )
        for row in (await connection.execute(statement)).mappings():
            found[row["workflow_id"]] = build_row(Deployment, row)
    return found


async def _wake_for_runs(database: Database, workflow_id: str, condition: ColumnElement[bool]) -> WakeOutcome:
    """Start a deployment, or defer or release its runs, if its runs that meet the condition (`IS_PENDING` or
    `IS_DEFERRED`) need it; return the outcome.

    An unknown time zone is logged, and the outcome is `NOTHING`. Raises `DatabaseUnavailable`.
    """
    async with database.read() as connection:
        seen = await activity.read_activity(connection, workflow_id)
    try:
        if seen is not None and _needs_nothing(seen, condition):
            return WakeOutcome.NOTHING
        done = await database.transaction(partial(_wake_locked, workflow_id=workflow_id))
    except ZoneInfoNotFoundError as error:
        log.warning("zone not known here", workflow_id=workflow_id, error=str(error))
        return WakeOutcome.NOTHING
    if done is not WakeOutcome.NOTHING:
        log.info("waiting runs of deployment handled", workflow_id=workflow_id, done=done.name.lower())
    return done


def _needs_nothing(seen: DeploymentActivity, condition: ColumnElement[bool]) -> bool:
    """Return, without a lock, whether the runs of a deployment need no change.

    True if pods are desired already for its pending runs, or its deferred runs may not start yet. False for a
    workflow that is no longer deployed.
    """
    if not seen.deployment.is_deployed:
        return False
    if condition is IS_PENDING:
        return is_desired(seen.deployment)
    return lifecycle_policy.start_refusal(seen.policy, seen.situation, seen.now) is not None


async def _wake_locked(connection: AsyncConnection, *, workflow_id: str) -> WakeOutcome:
    """Lock a deployment without waiting; start it, defer or release its runs, or leave those of an undeployed workflow
    to the workers; return the outcome.

    It is `NOTHING` without a change, and if another transaction holds the lock.
    """
    seen = await activity.read_activity(connection, workflow_id)
    if seen is not None:
        if not await activity.try_lock_deployment(connection, workflow_id):
            return WakeOutcome.NOTHING
        seen = await activity.read_activity(connection, workflow_id)
    if seen is None or not seen.deployment.is_deployed:
        await release_deferred_runs(connection, workflow_id)
        moved = await _update_runs(
            connection, workflow_id, IS_PENDING, target=WORKER_TARGET, assigned_deployment_id=None
        )
        return WakeOutcome.LEFT_TO_WORKERS if moved else WakeOutcome.NOTHING
    refusal = lifecycle_policy.start_refusal(seen.policy, seen.situation, seen.now)
    if refusal is not None:
        return await _defer_runs(connection, workflow_id, refusal.opens_at or UNTIL_STARTED)
    released = await release_deferred_runs(connection, workflow_id)
    if is_desired(seen.deployment):
        return WakeOutcome.RELEASED if released else WakeOutcome.NOTHING
    situation = replace(seen.situation, has_due=seen.situation.has_due or released > 0)
    decision = lifecycle_policy.decide(seen.policy, situation, seen.now)
    if decision.action not in _STARTING_ACTIONS:
        return WakeOutcome.NOTHING
    await activity.apply_decision(connection, replace(seen, situation=situation), decision)
    return WakeOutcome.WOKEN


async def _defer_runs(connection: AsyncConnection, workflow_id: str, due_at: datetime) -> WakeOutcome:
    """Defer pending runs that have not started until `due_at`; return `DEFERRED`, or `NOTHING` if there are none.

    Started runs keep their state and continue first.
    """
    is_new = and_(IS_PENDING, col(Execution.started_at).is_(None))
    deferred = await _update_runs(
        connection, workflow_id, is_new, status=ExecutionStatus.WAITING.value, due_at=due_at
    )
    return WakeOutcome.DEFERRED if deferred else WakeOutcome.NOTHING


async def _update_runs(
    connection: AsyncConnection,
    workflow_id: str,
    condition: ColumnElement[bool],
    **values: Any,  # noqa: ANN401 - columns of any type
) -> int:
    """Set columns, and the time of the last change, of a deployment's runs that meet a condition; return the number of
    changed runs.
    """
    result = await connection.execute(
        update(Execution)
        .where(col(Execution.target) == workflow_id, condition)
        .values(updated_at=DatabaseTime(), **values)
    )
    return result.rowcount
