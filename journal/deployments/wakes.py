"""Runs that come for deployments: one that sleeps is woken for them, and where it may not start they are deferred.

A deferred run is one that waits though nobody has begun it. Whether it may run is asked again and again, so it goes on
whoever has started the deployment, changed its policy or opened its window.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from zoneinfo import ZoneInfoNotFoundError

import structlog
from sqlalchemy import and_, bindparam, case, func, literal, literal_column, select, update
from sqlmodel import col

from journal.deployments import activity, decisions
from models import lifecycle_policy
from models.database_time import DatabaseTime
from models.deployment import (
    BLOCKING_REASONS,
    SERVING_STATES,
    Deployment,
    DeploymentStatus,
    is_serving,
    status_of,
)
from models.execution import ISOLATED_TARGET, SHARED_TARGET, Execution
from models.execution_status import ExecutionStatus
from models.lifecycle_policy import LifecycleAction, LifecycleReason, LifecycleVerdict, StartRefusal
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
"""When a run is due that is to wait until somebody starts the deployment."""

# Written out, not bound: the databases use an index of some rows only for a condition that they can read.
IS_PENDING: Final = col(Execution.status) == literal_column(f"'{ExecutionStatus.PENDING}'")
IS_DEFERRED: Final = and_(
    col(Execution.status) == literal_column(f"'{ExecutionStatus.WAITING}'"),
    col(Execution.started_at).is_(None),
)
WORKER_TARGET: Final = case(
    (and_(IS_PENDING, col(Execution.attempt) >= SUSPECT_LOSSES), ISOLATED_TARGET), else_=SHARED_TARGET
)
"""The target of a run that pods are to run no more."""
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
    """A deployment may not be started for a run now."""

    def __init__(self, refusal: StartRefusal) -> None:
        super().__init__(refusal.code)
        self.refusal = refusal


class WakeOutcome(Enum):
    """What was done for the runs of a deployment."""

    NOTHING = auto()
    WOKEN = auto()
    """It is to have pods."""
    RELEASED = auto()
    """Its deferred runs may be taken now."""
    DEFERRED = auto()
    """They wait until it may start."""
    LEFT_TO_WORKERS = auto()
    """It is deployed no more: they are any worker's."""


def is_desired(deployment: Deployment) -> bool:
    """Tell whether a deployment is to have pods and to keep them."""
    return deployment.replicas > 0 and deployment.drain_until is None


def is_ready(deployment: Deployment) -> bool:
    """Tell whether it is, as far as was seen, and has pods that take runs."""
    return is_desired(deployment) and is_serving(deployment)


def has_failed(deployment: Deployment) -> bool:
    """Tell whether it has no pods and can't start any, as far as was seen since something was wanted of it last."""
    return status_of(deployment) is DeploymentStatus.FAILED and deployment.observed not in SERVING_STATES


async def record_activities(database: Database, workflow_ids: Collection[str]) -> dict[str, Deployment]:
    """Take down that something has come for each of these, and return those that are deployed, by workflow id.

    Nobody waits for a deployment that another transaction has locked: it is counted by that one, or about to stop, and
    whoever looks after the runs that have come sees it.
    """
    return await database.transaction(partial(_record_activities, workflow_ids=sorted(set(workflow_ids))))


def blocked_reason(deployment: Deployment) -> str | None:
    """Return what its pods wait for, where they start as soon as the cluster has room; None: they may be coming."""
    is_blocked = (
        is_desired(deployment)
        and deployment.observed not in SERVING_STATES
        and deployment.observed_generation == deployment.generation
        and deployment.observed_reason_code in BLOCKING_REASONS
    )
    return deployment.observed_reason if is_blocked else None


def decide_for_run(seen: DeploymentActivity) -> LifecycleVerdict:
    """Decide, for `decisions.settle`, what takes a run that has come; raises `StartRefused`.

    Of a deployment whose pods can't start it wants that they try once more.
    """
    refusal = lifecycle_policy.start_refusal(seen.policy, seen.situation, seen.now)
    if refusal is not None:
        raise StartRefused(refusal)
    if is_desired(seen.deployment) and not has_failed(seen.deployment):
        return LifecycleVerdict(LifecycleAction.NONE, LifecycleReason.IN_USE)
    return LifecycleVerdict(LifecycleAction.WAKE, LifecycleReason.RUN_DUE)


async def wake_for_waiting_runs(database: Database) -> dict[str, WakeOutcome]:
    """See to the runs of deployments that nobody takes or that are deferred; returns what was done, by workflow id.

    Whoever was woken is to be told to the deployer. Raises `DatabaseUnavailable`.
    """
    done: dict[str, WakeOutcome] = {}
    for condition in (IS_PENDING, IS_DEFERRED):
        after: str | None = SHARED_TARGET
        while after is not None:
            async with database.read() as connection:
                found = [str(one) for one in await connection.scalars(targets_statement(condition, after))]
            for workflow_id in found:
                what = await _wake_for_runs(database, workflow_id, condition)
                if what is not WakeOutcome.NOTHING:
                    done[workflow_id] = what
            after = found[-1] if len(found) == BATCH_TARGETS else None
    return done


async def release_deferred_runs(connection: AsyncConnection, workflow_id: str) -> int:
    """Let the deferred runs of a deployment be taken; returns how many there were."""
    return await _retarget_runs(
        connection, workflow_id, IS_DEFERRED, status=ExecutionStatus.PENDING.value, due_at=None
    )


def targets_statement(condition: ColumnElement[bool], after: str) -> Select[*tuple[Any, ...]]:
    """Return the statement that finds the deployments behind another that such runs are for, by one index probe each.

    Ids of workflows stand behind the words that other targets are.
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
            found[row["workflow_id"]] = Deployment(**row)
    if locked := [workflow_id for workflow_id in workflow_ids if workflow_id not in found]:
        statement = select(Deployment).where(
            col(Deployment.workflow_id).in_(locked), col(Deployment.is_deployed)
        )
        for row in (await connection.execute(statement)).mappings():
            found[row["workflow_id"]] = Deployment(**row)
    return found


async def _wake_for_runs(database: Database, workflow_id: str, condition: ColumnElement[bool]) -> WakeOutcome:
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
        log.info("deployment seen to for its runs", workflow_id=workflow_id, done=done.name.lower())
    return done


def _needs_nothing(seen: DeploymentActivity, condition: ColumnElement[bool]) -> bool:
    """Tell, without a lock, what holds for most: pods take what is pending, and what is deferred may not run yet."""
    if not seen.deployment.is_deployed:
        return False
    if condition is IS_PENDING:
        return is_desired(seen.deployment)
    return lifecycle_policy.start_refusal(seen.policy, seen.situation, seen.now) is not None


async def _wake_locked(connection: AsyncConnection, *, workflow_id: str) -> WakeOutcome:
    seen = await activity.read_activity(connection, workflow_id)
    if seen is not None:
        if not await activity.try_lock_deployment(connection, workflow_id):
            return WakeOutcome.NOTHING
        seen = await activity.read_activity(connection, workflow_id)
    if seen is None or not seen.deployment.is_deployed:
        await release_deferred_runs(connection, workflow_id)
        moved = await _retarget_runs(
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
    await decisions.apply_decision(connection, replace(seen, situation=situation), decision)
    return WakeOutcome.WOKEN


async def _defer_runs(connection: AsyncConnection, workflow_id: str, due_at: datetime) -> WakeOutcome:
    """Keep what nobody has begun until then; what was begun stays where it is, and is the first to go on."""
    is_new = and_(IS_PENDING, col(Execution.started_at).is_(None))
    deferred = await _retarget_runs(
        connection, workflow_id, is_new, status=ExecutionStatus.WAITING.value, due_at=due_at
    )
    return WakeOutcome.DEFERRED if deferred else WakeOutcome.NOTHING


async def _retarget_runs(
    connection: AsyncConnection,
    workflow_id: str,
    condition: ColumnElement[bool],
    **values: Any,  # noqa: ANN401 - columns of any type
) -> int:
    result = await connection.execute(
        update(Execution)
        .where(col(Execution.target) == workflow_id, condition)
        .values(updated_at=DatabaseTime(), **values)
    )
    return result.rowcount
