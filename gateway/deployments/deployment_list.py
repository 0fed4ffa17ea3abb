"""Endpoint of an organization's deployments: their states, and their next starts and stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final
from zoneinfo import ZoneInfoNotFoundError

from sqlalchemy import select
from sqlmodel import col

from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from journal.deployments import activity
from models import lifecycle_policy
from models.deployment import Deployment, DeploymentStatus, status_of, stopped_reason_of
from models.lifecycle_policy import PolicyType, StoppedReason, TransitionKind
from models.workflow import Workflow, is_readable_by

if TYPE_CHECKING:
    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.deployments.activity import DeploymentActivity
    from models.access import ApiCaller

MAX_DEPLOYMENTS: Final = 500


class ListedDeployment(WireStruct):
    """Deployment of a workflow in a list."""

    workflow_id: str
    workflow_name: str
    deployment_status: DeploymentStatus
    stopped_reason: StoppedReason | None
    """Reason why it is stopped; null while it runs."""
    reason: str | None
    """Reason why its pods can't start."""
    reason_code: str | None
    start_failures: int
    """Consecutive failed starts."""
    replicas: int
    ready_replicas: int
    observed_at: Instant | None
    """Time since which its pods are in their present state."""
    policy_type: PolicyType
    last_activity_at: Instant | None
    next_transition: TransitionKind | None
    """Next start or stop if there is no further activity; null if there is none."""
    next_transition_at: Instant | None


class DeploymentList(WireStruct):
    """Deployments of an organization, at most 500, in the order of the ids of their workflows."""

    as_of: Instant
    is_complete: bool
    """Whether there are no more than 500."""
    deployments: Sequence[ListedDeployment]


async def index(request: GatewayRequest) -> JsonResponse:
    """List the deployments of the workflows that the caller may read, with their next starts and stops.

    At most 500 are listed.
    """
    async with request.gateway.database.read() as connection:
        found = await _read_deployments(connection, request.caller)
    return JsonResponse(
        DeploymentList(
            as_of=instant(request.gateway.clock()),
            is_complete=len(found) <= MAX_DEPLOYMENTS,
            deployments=[_show_deployment(name, seen) for name, seen in found[:MAX_DEPLOYMENTS]],
        )
    )


async def _read_deployments(
    connection: AsyncConnection, caller: ApiCaller
) -> Sequence[tuple[str, DeploymentActivity]]:
    """Return workflow names and activities of the deployments that the caller may see, one more than are listed."""
    names = {row.workflow_id: row.name for row in await connection.execute(deployments_statement(caller))}
    seen = await activity.read_activities(connection, list(names))
    return [(name, seen[workflow_id]) for workflow_id, name in names.items() if workflow_id in seen]


def deployments_statement(caller: ApiCaller) -> Select[*tuple[Any, ...]]:
    """Return the statement of the deployed workflows that a caller may read, at most 501."""
    return (
        select(col(Deployment.workflow_id), col(Workflow.name))
        .join(Workflow, col(Workflow.id) == col(Deployment.workflow_id))
        .where(
            col(Deployment.organization_id) == caller.organization_id,
            col(Deployment.is_deployed),
            is_readable_by(caller),
        )
        .order_by(col(Deployment.workflow_id))
        .limit(MAX_DEPLOYMENTS + 1)
    )


def _show_deployment(name: str, seen: DeploymentActivity) -> ListedDeployment:
    """Return a deployment as the API shows it; without a next transition where this host doesn't know the time
    zone of its policy.
    """
    deployment = seen.deployment
    try:
        upcoming = lifecycle_policy.next_transition(seen.policy, seen.situation, seen.now)
    except ZoneInfoNotFoundError:
        upcoming = None
    return ListedDeployment(
        workflow_id=deployment.workflow_id,
        workflow_name=name,
        deployment_status=status_of(deployment),
        stopped_reason=stopped_reason_of(deployment),
        reason=deployment.observed_reason or deployment.failed_reason,
        reason_code=deployment.observed_reason_code or deployment.failed_reason_code,
        start_failures=deployment.start_failures,
        replicas=deployment.replicas,
        ready_replicas=deployment.ready_replicas,
        observed_at=optional_instant(deployment.observed_at),
        policy_type=PolicyType(seen.stored_policy["type"]),
        last_activity_at=optional_instant(seen.situation.last_activity_at),
        next_transition=upcoming.kind if upcoming else None,
        next_transition_at=optional_instant(upcoming.at if upcoming else None),
    )
