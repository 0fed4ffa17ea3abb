"""Activity of deployments: all inputs of lifecycle rules, read in one statement, by the database's time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from sqlalchemy import and_, func, literal_column, or_, select, update
from sqlmodel import col

from models import lifecycle_policy
from models.database_time import DatabaseTime
from models.deployment import Deployment, build_situation
from models.execution import LIMITED_TARGET, SHARED_TARGET, Execution
from models.execution_status import ExecutionStatus
from models.lifecycle_policy import DeploymentPolicy, DeploymentSituation
from models.timestamps import from_microseconds
from models.workflow import Workflow

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, RowMapping, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

BATCH_DEPLOYMENTS: Final = 500


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


@dataclass(frozen=True, slots=True)
class DeploymentActivity:
    """Deployment, its workflow's policy, and its activity at one moment."""

    deployment: Deployment
    stored_policy: Mapping[str, Any]
    situation: DeploymentSituation
    now: datetime

    @property
    def policy(self) -> DeploymentPolicy:
        """The lifecycle policy.

        Its use raises `ZoneInfoNotFoundError` where this machine doesn't know its time zone.
        """
        return lifecycle_policy.parse_policy(self.stored_policy)


def activity_statement() -> Select[*tuple[Any, ...]]:
    """Return the statement that reads the activity of deployments, for callers to add conditions."""
    return select(
        Deployment,
        col(Workflow.lifecycle),
        or_(_PENDING, _TIMER_DUE).label("has_due"),
        _RUNNING.label("has_running"),
        _LAST_ENDED_AT.label("last_ended_at"),
        DatabaseTime().label("now"),
    ).join(Workflow, col(Workflow.id) == col(Deployment.workflow_id))


async def read_activity(connection: AsyncConnection, workflow_id: str) -> DeploymentActivity | None:
    """Return the activity of one deployment; None for a workflow that was never deployed."""
    found = await connection.execute(activity_statement().where(col(Deployment.workflow_id) == workflow_id))
    row = found.mappings().first()
    return None if row is None else _activity_of(row)


async def read_activities(
    connection: AsyncConnection, workflow_ids: Sequence[str]
) -> Mapping[str, DeploymentActivity]:
    """Return the activity of some deployments, by workflow id."""
    found: dict[str, DeploymentActivity] = {}
    for start in range(0, len(workflow_ids), BATCH_DEPLOYMENTS):
        batch = workflow_ids[start : start + BATCH_DEPLOYMENTS]
        rows = await connection.execute(activity_statement().where(col(Deployment.workflow_id).in_(batch)))
        found |= {row["workflow_id"]: _activity_of(row) for row in rows.mappings()}
    return found


async def read_all_activities(connection: AsyncConnection, after: str = "") -> Sequence[DeploymentActivity]:
    """Return a batch of activities of deployed workflows, ordered by workflow id, after `after`."""
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
    """Lock a deployment against changes and new activity until the transaction ends.

    A statement of its own: rows that PostgreSQL reads together with a lock may be older than the lock. Waits
    for other transactions; raises `LockWaitTimeout`.
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


async def record_activity(connection: AsyncConnection, workflow_id: str) -> bool:
    """Record activity of a deployment; returns whether the workflow is deployed.

    Committed before the run is, it keeps an idle deployment from stopping in between. If the stop was faster,
    the sweep for waiting runs finds the run.
    """
    result = await connection.execute(
        update(Deployment)
        .where(col(Deployment.workflow_id) == workflow_id, col(Deployment.is_deployed))
        .values(last_activity_at=DatabaseTime())
    )
    return result.rowcount == 1


def _activity_of(row: RowMapping) -> DeploymentActivity:
    columns = Deployment.__table__.columns.keys()  # type: ignore[attr-defined]  # SQLModel adds it
    deployment = Deployment(**{name: row[name] for name in columns})
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
