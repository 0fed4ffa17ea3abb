"""Activity of deployments: the runs that their pods hold, and lifecycle decisions by the activity.

All inputs of lifecycle rules are read in one statement, by the time of the database. Desired state and the record of a
decision change in one transaction. Runs of pod processes that have ended are reclaimed at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import structlog
from msgspec import Struct
from sqlalchemy import and_, bindparam, func, insert, literal_column, or_, select, update
from sqlmodel import col

from journal import out_of_memory_reclaim
from models import ids, lifecycle_policy
from models.column_types import build_row
from models.database_time import DatabaseTime
from models.deployment import Deployment, LifecycleDecision, build_situation
from models.execution import LIMITED_TARGET, SHARED_TARGET, Execution
from models.execution_status import ExecutionStatus
from models.lifecycle_policy import (
    DRAIN_TIME,
    DeploymentPolicy,
    DeploymentSituation,
    LifecycleAction,
    LifecycleReason,
    LifecycleVerdict,
    StoppedReason,
)
from models.pod_identity import PodProcess, lease_owner, lease_owner_prefix
from models.timestamps import from_microseconds
from models.workflow import Workflow
from telemetry import instruments

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from sqlalchemy import ColumnElement, RowMapping, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.store import JournalStore
    from models.database import Database

BATCH_DEPLOYMENTS: Final = 500

log = structlog.get_logger()

instruments.declare("lifecycle_decisions_total")

_STARTING_ACTIONS: Final = frozenset({LifecycleAction.START, LifecycleAction.WAKE})
_COLUMNS: Final = tuple(Deployment.model_fields)
KEPT_AWAKE_COLUMNS: Final = ("kept_awake_since", "kept_awake_until", "kept_awake_by")

# Literals instead of bound parameters: the databases use a partial index only for a condition that they can
# read.
_IS_RUNNING = col(Execution.status) == literal_column(f"'{ExecutionStatus.RUNNING}'")


def _inline_literal(value: str) -> ColumnElement[str]:
    """Return a literal instead of a bound parameter.

    The databases use a partial index only for a condition that they can read.
    """
    return literal_column(f"'{value}'")


_OF_DEPLOYMENT: Final = col(Execution.target) == col(Deployment.workflow_id)
_IS_DUE: Final = or_(col(Execution.due_at).is_(None), col(Execution.due_at) <= DatabaseTime())
_PENDING: Final = (
    select(col(Execution.id))
    .where(_OF_DEPLOYMENT, col(Execution.status) == _inline_literal(ExecutionStatus.PENDING), _IS_DUE)
    .correlate(Deployment)
    .exists()
)
_TIMER_DUE: Final = (
    select(col(Execution.id))
    .where(
        _OF_DEPLOYMENT,
        col(Execution.status) == _inline_literal(ExecutionStatus.WAITING),
        col(Execution.due_at) <= DatabaseTime(),
    )
    .correlate(Deployment)
    .exists()
)
_RUNNING: Final = (
    select(col(Execution.id))
    .where(
        _OF_DEPLOYMENT,
        col(Execution.workflow_id) == col(Deployment.workflow_id),
        col(Execution.status) == _inline_literal(ExecutionStatus.RUNNING),
    )
    .correlate(Deployment)
    .exists()
)
_LAST_ENDED_AT: Final = (
    select(func.max(col(Execution.ended_at)))
    .where(
        and_(
            _OF_DEPLOYMENT,
            col(Execution.target) != _inline_literal(SHARED_TARGET),
            col(Execution.target) != _inline_literal(LIMITED_TARGET),
            col(Execution.ended_at).is_not(None),
        )
    )
    .correlate(Deployment)
    .scalar_subquery()
)


class DeploymentActivity(Struct, frozen=True):
    """Deployment, its workflow's policy, and its activity at one moment."""

    deployment: Deployment
    stored_policy: Mapping[str, Any]
    situation: DeploymentSituation
    now: datetime

    @property
    def policy(self) -> DeploymentPolicy:
        """The lifecycle policy, parsed; raises `ZoneInfoNotFoundError` if this machine has no data of its time zone."""
        return lifecycle_policy.parse_policy(self.stored_policy)


def activity_statement() -> Select[*tuple[Any, ...]]:
    """Return the statement that reads deployments with the lifecycle policy of their workflow and their activity;
    callers add conditions.

    Columns besides those of the row: `lifecycle`, `has_due` and `has_running` (runs), `last_ended_at` (of its last
    ended run) and `now`.
    """
    return select(
        Deployment,
        col(Workflow.lifecycle),
        or_(_PENDING, _TIMER_DUE).label("has_due"),
        _RUNNING.label("has_running"),
        _LAST_ENDED_AT.label("last_ended_at"),
        DatabaseTime().label("now"),
    ).join(Workflow, col(Workflow.id) == col(Deployment.workflow_id))


@cache
def _one_activity_statement() -> Select[*tuple[Any, ...]]:
    """Return the statement that reads the activity of the deployment of the workflow `:wanted_id`.

    It is built once, since that takes longer than the statement itself.
    """
    return activity_statement().where(col(Deployment.workflow_id) == bindparam("wanted_id"))


async def read_activity(connection: AsyncConnection, workflow_id: str) -> DeploymentActivity | None:
    """Return the activity of one deployment; None for a workflow that was never deployed."""
    found = await connection.execute(_one_activity_statement(), {"wanted_id": workflow_id})
    row = found.mappings().first()
    return None if row is None else _activity_of(row)


async def read_activities(
    connection: AsyncConnection, workflow_ids: Sequence[str]
) -> Mapping[str, DeploymentActivity]:
    """Return the activity of some deployments by workflow id; workflows that were never deployed are absent."""
    found: dict[str, DeploymentActivity] = {}
    for start in range(0, len(workflow_ids), BATCH_DEPLOYMENTS):
        batch = workflow_ids[start : start + BATCH_DEPLOYMENTS]
        rows = await connection.execute(activity_statement().where(col(Deployment.workflow_id).in_(batch)))
        found |= {row["workflow_id"]: _activity_of(row) for row in rows.mappings()}
    return found


async def read_all_activities(connection: AsyncConnection, after: str = "") -> Sequence[DeploymentActivity]:
    """Return up to 500 activities of deployed workflows whose ids follow `after`, ordered by workflow id."""
    wanted = (
        activity_statement()
        .where(col(Deployment.workflow_id) > after, col(Deployment.is_deployed))
        .order_by(col(Deployment.workflow_id))
        .limit(BATCH_DEPLOYMENTS)
    )
    return [_activity_of(row) for row in (await connection.execute(wanted)).mappings()]


LockDeployment: TypeAlias = "Callable[[AsyncConnection, str], Awaitable[bool]]"
"""Function that locks a deployment until the transaction ends; returns False if another transaction holds the
lock.
"""


async def lock_deployment(connection: AsyncConnection, workflow_id: str) -> bool:
    """Lock a deployment's row against changes and new activity until the transaction ends; return True, also
    without a row.

    A statement of its own: rows that PostgreSQL reads together with a lock may be older than the lock. Waits
    for other transactions; raises `LockWaitTimeout`. SQLite has one writer, and locks nothing.
    """
    await connection.execute(
        select(col(Deployment.workflow_id))
        .where(col(Deployment.workflow_id) == workflow_id)
        .with_for_update()
    )
    return True


async def try_lock_deployment(connection: AsyncConnection, workflow_id: str) -> bool:
    """Lock a deployment until the transaction ends, without waiting; return False if it is locked or missing.

    For sweeps, which look again later and have other deployments to process.
    """
    statement = (
        select(col(Deployment.workflow_id))
        .where(col(Deployment.workflow_id) == workflow_id)
        .with_for_update(skip_locked=True)
    )
    return await connection.scalar(statement) is not None


def _activity_of(row: RowMapping) -> DeploymentActivity:
    deployment = build_row(Deployment, {name: row[name] for name in _COLUMNS})
    situation = build_situation(
        deployment,
        has_due=bool(row["has_due"]),
        has_running=bool(row["has_running"]),
        last_ended_at=row["last_ended_at"],
    )
    stored = cast("Mapping[str, Any] | None", row["lifecycle"])
    return DeploymentActivity(
        deployment, lifecycle_policy.effective_policy(stored), situation, from_microseconds(row["now"])
    )


class DeploymentChanged(Exception):
    """The desired state of a deployment has changed since it was read: read and decide again."""


class DecidedDeployment(Struct, frozen=True):
    """Deployment after a decision; its desired state has changed unless the action is `none`."""

    deployment: Deployment
    decision: LifecycleVerdict


async def decide_and_apply(
    database: Database,
    workflow_id: str,
    decide: Callable[[DeploymentActivity], LifecycleVerdict],
    *,
    replicas: int | None = None,
    user_id: str | None = None,
    lock: LockDeployment = lock_deployment,
) -> DecidedDeployment | None:
    """Read a deployment, call `decide`, and apply its decision in one transaction; return the decision and the
    deployment after it.

    A decision with the action `none` changes and records nothing. None for a workflow that was never deployed, or if
    `lock` doesn't get the deployment. A start gets `replicas` pods, by default the last number. `user_id` is the
    author. Concurrent activity is either seen here, or sees the decision. `decide` may be called again, and its
    exceptions propagate. Raises `DatabaseUnavailable`.
    """
    work = partial(
        _decide_and_apply,
        workflow_id=workflow_id,
        decide=decide,
        replicas=replicas,
        user_id=user_id,
        lock=lock,
    )
    settled = await database.transaction(work, locks=f"deployment:{workflow_id}")
    if settled is not None and settled.decision.action is not LifecycleAction.NONE:
        log.info(
            "deployment decided",
            workflow_id=workflow_id,
            action=settled.decision.action,
            reason=settled.decision.reason,
            generation=settled.deployment.generation,
        )
    return settled


def decide_by_policy(seen: DeploymentActivity) -> LifecycleVerdict:
    """Decide about a deployment by its lifecycle policy and current activity; a `decide` for `decide_and_apply`.

    Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
    return lifecycle_policy.decide(seen.policy, seen.situation, seen.now)


async def apply_decision(
    connection: AsyncConnection,
    seen: DeploymentActivity,
    decision: LifecycleVerdict,
    *,
    replicas: int | None = None,
    user_id: str | None = None,
) -> Deployment:
    """Store a deployment's new desired state under the next generation, with a record of the decision; return the new
    state.

    The action of the decision must not be `none`. `replicas` is the number of pods of a start, None for the last
    number; `user_id` is who decided, None for the lifecycle policy. Raises `DeploymentChanged` if the state has changed
    since it was read.
    """
    before = seen.deployment
    changes = {
        **_determine_changes(seen, decision, replicas),
        "generation": before.generation + 1,
        "updated_at": seen.now,
    }
    is_as_seen = (
        col(Deployment.workflow_id) == before.workflow_id,
        col(Deployment.generation) == before.generation,
    )
    result = await connection.execute(update(Deployment).where(*is_as_seen).values(changes))
    if result.rowcount != 1:
        raise DeploymentChanged(f"The desired state of {before.workflow_id} has changed since it was read")
    after = Deployment(**{**before.model_dump(), **changes})
    await store_decision(connection, seen, decision, after, user_id=user_id)
    return after


async def store_decision(
    connection: AsyncConnection,
    seen: DeploymentActivity,
    decision: LifecycleVerdict,
    after: Deployment,
    *,
    user_id: str | None = None,
) -> None:
    """Insert the record of a decision with its reason, inputs and author (None: no person), and count it in
    the metrics.

    `seen` is the activity that led to it, and `after` the state that it gave the deployment.
    """
    kept = LifecycleDecision(
        id=ids.new_id("decision"),
        organization_id=after.organization_id,
        shard=after.shard,
        workflow_id=after.workflow_id,
        at=seen.now,
        action=decision.action,
        reason=decision.reason,
        stopped_reason=decision.stopped_reason,
        replicas=after.replicas,
        user_id=user_id,
        inputs={
            "lifecyclePolicy": seen.stored_policy,
            **lifecycle_policy.decision_inputs(seen.situation, seen.now),
        },
    )
    await connection.execute(insert(LifecycleDecision).values(kept.model_dump()))
    if instruments.is_exposed:
        instruments.counter("lifecycle_decisions_total", decision.action.value, decision.reason.value).inc()


async def _decide_and_apply(
    connection: AsyncConnection,
    *,
    workflow_id: str,
    decide: Callable[[DeploymentActivity], LifecycleVerdict],
    replicas: int | None,
    user_id: str | None,
    lock: LockDeployment,
) -> DecidedDeployment | None:
    """Lock a deployment, call `decide` and apply its decision in the transaction; None as for `decide_and_apply`."""
    if not await lock(connection, workflow_id):
        return None
    seen = await read_activity(connection, workflow_id)
    if seen is None:
        return None
    decision = decide(seen)
    if decision.action is LifecycleAction.NONE:
        return DecidedDeployment(seen.deployment, decision)
    after = await apply_decision(connection, seen, decision, replicas=replicas, user_id=user_id)
    return DecidedDeployment(after, decision)


def _determine_changes(
    seen: DeploymentActivity, decision: LifecycleVerdict, replicas: int | None
) -> dict[str, Any]:
    """Return the columns of the desired state that a start, a wake, a drain or a stop changes, with their new values.

    The action must not be `none`. `replicas` is the number of pods of a start or wake; None means the number of the
    last start.
    """
    before, now = seen.deployment, seen.now
    if decision.action in _STARTING_ACTIONS:
        pods = replicas or before.last_replicas
        is_by_hand = decision.reason in {LifecycleReason.BY_HAND, LifecycleReason.DEPLOYED}
        return {
            "replicas": pods,
            "last_replicas": pods,
            "drain_until": None,
            "stopped_reason": None,
            "stopped_at": None,
            "started_by_hand_at": now if is_by_hand else None,
            "start_failures": 0 if is_by_hand else before.start_failures,
            "last_activity_at": now,
        }
    has_failed = StoppedReason.FAILED == decision.stopped_reason != before.stopped_reason
    stopped: dict[str, Any] = {
        "stopped_reason": decision.stopped_reason,
        "stopped_at": before.stopped_at if decision.stopped_reason == before.stopped_reason else now,
        "started_by_hand_at": None,
        "start_failures": before.start_failures + has_failed,
    }
    if decision.stopped_reason is not StoppedReason.FAILED:
        # After a failed start, it is tried again until the end of the time.
        stopped |= dict.fromkeys(KEPT_AWAKE_COLUMNS)
    if decision.action is LifecycleAction.DRAIN:
        return {**stopped, "drain_until": before.drain_until or now + DRAIN_TIME}
    return {**stopped, "replicas": 0, "drain_until": None}


async def pod_lease_owners(database: Database, workflow_id: str) -> frozenset[PodProcess]:
    """Return the processes of a workflow's pods that hold leases of its running runs, expired ones included; raises
    `DatabaseUnavailable`.
    """
    prefix = lease_owner_prefix(workflow_id)
    statement = (
        select(col(Execution.lease_owner))
        .where(col(Execution.workflow_id) == workflow_id, _IS_RUNNING)
        .distinct()
    )
    async with database.read() as connection:
        owners = [owner for owner in await connection.scalars(statement) if owner is not None]
    found = (PodProcess.from_name(owner.removeprefix(prefix)) for owner in owners if owner.startswith(prefix))
    return frozenset(process for process in found if process is not None)


async def reclaim_pod_leases(
    database: Database,
    store: JournalStore,
    workflow_id: str,
    gone: Iterable[PodProcess],
    out_of_memory: Collection[PodProcess] = (),
) -> int:
    """Make the runs of ended pod processes pending again, or end them; return the number of runs. Raises
    `DatabaseUnavailable`.

    The processes in `out_of_memory` were killed for lack of memory: their runs get a log line, and are
    isolated sooner. If a process still runs after all, as on a machine that is cut off, its writes are
    refused from then on.
    """
    count = 0
    for process in gone:
        owner = lease_owner(workflow_id, process)
        if process in out_of_memory:
            count += await out_of_memory_reclaim.reclaim_out_of_memory(database, store, owner)
        else:
            count += await store.reclaim(owner)
    if count:
        log.info("executions of pods reclaimed", workflow_id=workflow_id, count=count)
    return count
