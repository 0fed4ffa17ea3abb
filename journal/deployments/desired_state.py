"""Deploy and undeploy: changes of the desired state with their reason and with the runs that they concern."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import and_, insert, literal_column, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from journal.deployments import activity, wakes
from models import database_time, deployment_token
from models.column_types import build_row
from models.database_time import DatabaseTime
from models.deployment import Deployment, DeploymentStatus, is_desired, status_of
from models.deployment_token import TokenBearer
from models.execution import (
    DELAYED_TARGET,
    ISOLATED_UNPARSED_TARGET,
    LIMITED_TARGET,
    UNPARSED_TARGET,
    Execution,
)
from models.execution_status import ExecutionStatus
from models.ids import turn_of_workflow
from models.lifecycle_policy import LifecycleAction, LifecycleReason, LifecycleVerdict, StoppedReason
from models.workflow import Definition

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.deployments.activity import DeploymentActivity

UNFINISHED: Final = (ExecutionStatus.PENDING, ExecutionStatus.WAITING, ExecutionStatus.RUNNING)


class DeployRequest(Struct, frozen=True):
    """Definition to deploy."""

    workflow_id: str
    organization_id: str
    shard: int
    user_id: str
    version: int
    definition: str
    definition_hash: str
    token_id: str
    """A new id, for the token of its pods."""


async def find_deployment(connection: AsyncConnection, workflow_id: str) -> Deployment | None:
    """Return the row of a deployment, with its desired and last observed state; None for a workflow that was
    never deployed.
    """
    statement = select(Deployment).where(col(Deployment.workflow_id) == workflow_id)
    row = (await connection.execute(statement)).mappings().first()
    return None if row is None else build_row(Deployment, row)


async def deploy_workflow(connection: AsyncConnection, order: DeployRequest, *, secret: bytes) -> Deployment:
    """Store a definition, make it the desired state of its workflow's deployment, and start it; return the new state.

    If the same definition and version is deployed, with pods that are desired and have not failed, only the
    definition's age changes. A deployed workflow keeps its number of pods, another gets one pod. New pods get a new
    token, derived from `secret`; the token of replaced pods stays valid until none of them is left. Raises
    `LockWaitTimeout`, and `LookupError` for an unknown workflow.
    """
    await _store_definition(connection, order)
    await activity.lock_deployment(connection, order.workflow_id)
    seen = await activity.read_activity(connection, order.workflow_id)
    if seen is None:
        seen = await _insert_deployment(connection, order)
    elif _is_desired(seen.deployment, order):
        return seen.deployment
    before = seen.deployment
    changes: dict[str, Any] = {
        "is_deployed": True,
        "definition_hash": order.definition_hash,
        "version": order.version,
        "deployed_generation": before.generation + 1,
    }
    replicas = before.last_replicas if before.is_deployed else 1
    decision = LifecycleVerdict(LifecycleAction.START, LifecycleReason.DEPLOYED)
    seen = await _update_deployment(connection, seen, changes)
    after = await activity.apply_decision(
        connection, seen, decision, replicas=replicas, user_id=order.user_id
    )
    bearer = TokenBearer(order.workflow_id, order.organization_id, order.shard)
    await deployment_token.issue_token(
        connection, bearer, secret=secret, token_id=order.token_id, now=seen.now
    )
    return after


async def undeploy_workflow(
    connection: AsyncConnection, workflow_id: str, *, user_id: str, reason: StoppedReason | None = None
) -> Deployment | None:
    """Undeploy a workflow: stop its pods without draining, let workers execute its runs, and return the new state.

    None for a workflow that isn't deployed. `reason` is shown as the cause of the stop. Raises
    `LockWaitTimeout`.
    """
    await activity.lock_deployment(connection, workflow_id)
    seen = await activity.read_activity(connection, workflow_id)
    if seen is None or not seen.deployment.is_deployed:
        return None
    decision = LifecycleVerdict(LifecycleAction.STOP, LifecycleReason.UNDEPLOYED, reason)
    seen = await _update_deployment(connection, seen, {"is_deployed": False})
    after = await activity.apply_decision(connection, seen, decision, user_id=user_id)
    await _release_to_workers(connection, seen.deployment)
    return after


def _is_desired(deployment: Deployment, order: DeployRequest) -> bool:
    """Return whether the same definition and version is deployed already, with pods desired that have not failed."""
    return (
        deployment.is_deployed
        and deployment.definition_hash == order.definition_hash
        and deployment.version == order.version
        and is_desired(deployment)
        and status_of(deployment) is not DeploymentStatus.FAILED
    )


async def _store_definition(connection: AsyncConnection, order: DeployRequest) -> None:
    """Store a definition, or set its age to now if it exists, so that retention does not delete it before its
    deployment.
    """
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(Definition).values(
        organization_id=order.organization_id,
        hash=order.definition_hash,
        shard=order.shard,
        body=order.definition,
        created_at=DatabaseTime(),
    )
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=[col(Definition.organization_id), col(Definition.hash)],
            set_={"created_at": statement.excluded.created_at},
        )
    )


async def _insert_deployment(connection: AsyncConnection, order: DeployRequest) -> DeploymentActivity:
    """Insert the row of a workflow's first deployment with `is_deployed` false, for the caller to update, and return
    its activity.

    Raises `LookupError` for an unknown workflow.
    """
    now = await database_time.read_database_time(connection)
    first = Deployment(
        workflow_id=order.workflow_id,
        organization_id=order.organization_id,
        shard=order.shard,
        is_deployed=False,
        definition_hash=order.definition_hash,
        version=order.version,
        generation=0,
        deployed_generation=0,
        created_at=now,
        updated_at=now,
    )
    await connection.execute(insert(Deployment).values(first.model_dump()))
    seen = await activity.read_activity(connection, order.workflow_id)
    if seen is None:
        raise LookupError(f"{order.workflow_id} is no workflow")
    return seen


async def _update_deployment(
    connection: AsyncConnection, seen: DeploymentActivity, changes: dict[str, Any]
) -> DeploymentActivity:
    """Write changed columns of a deployment whose row is locked; returns its activity with the new values."""
    deployment = seen.deployment
    await connection.execute(
        update(Deployment).where(col(Deployment.workflow_id) == deployment.workflow_id).values(changes)
    )
    return replace(seen, deployment=Deployment(**{**deployment.model_dump(), **changes}))


async def _release_to_workers(connection: AsyncConnection, deployment: Deployment) -> None:
    """Let workers execute the unfinished runs of a deployment: pending ones at once, others when their lease
    or wait ends.

    Deferred runs become pending. Runs that wait for a slot, a delay or a parser lose only their assignment to
    the pods.
    """
    workflow_id = deployment.workflow_id
    await wakes.release_deferred_runs(connection, workflow_id)
    for status in UNFINISHED:
        # Literals instead of bound parameters: the databases use a partial index only for a condition that
        # they can read.
        of_status = col(Execution.status) == literal_column(f"'{status}'")
        of_target = (
            (col(Execution.workflow_id) == workflow_id, col(Execution.target) == workflow_id)
            if status is ExecutionStatus.RUNNING
            else (col(Execution.target) == workflow_id,)
        )
        await connection.execute(
            update(Execution)
            .where(of_status, *of_target)
            .values(target=wakes.WORKER_TARGET, assigned_deployment_id=None, updated_at=DatabaseTime())
        )
    kept_from_pods = (
        col(Execution.target).in_(
            [LIMITED_TARGET, DELAYED_TARGET, UNPARSED_TARGET, ISOLATED_UNPARSED_TARGET]
        ),
        col(Execution.organization_id) == deployment.organization_id,
        col(Execution.workflow_id) == workflow_id,
        col(Execution.assigned_deployment_id) == workflow_id,
    )
    for is_found in (
        and_(wakes.IS_PENDING, col(Execution.queue_turn) == turn_of_workflow(workflow_id)),
        wakes.IS_DEFERRED,
        col(Execution.status) == literal_column(f"'{ExecutionStatus.RUNNING}'"),
    ):
        await connection.execute(
            update(Execution).where(is_found, *kept_from_pods).values(assigned_deployment_id=None)
        )
