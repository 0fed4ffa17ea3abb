"""Holds of deployments: a user keeps one awake until a time, whatever its lifecycle policy says."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta
from sqlalchemy import update
from sqlmodel import col

from gateway.access import audit_log
from gateway.deployments import deployment_changes
from gateway.http import limits
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent
from gateway.http.wire import Instant, StrictWire, WireStruct, decode_body, instant, optional_instant
from gateway.workflows import editing
from journal.deployments import activity
from models import lifecycle_policy
from models.audit import AuditAction
from models.deployment import Deployment
from models.lifecycle_policy import LifecycleAction, TransitionKind
from models.timestamps import format_timestamp

if TYPE_CHECKING:
    from datetime import datetime
    from typing import Any

    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.deployments.activity import DeploymentActivity


class HoldRequest(StrictWire):
    """Body that keeps a deployment awake."""

    expires_in_seconds: Annotated[int, Meta(ge=60, le=limits.HOLD_SECONDS)]
    """Seconds from now until the end, at most a week."""


class DeploymentHold(WireStruct):
    """Time for which a user keeps a deployment awake."""

    workflow_id: str
    since: Instant
    until: Instant
    user_id: str
    next_transition: TransitionKind | None
    next_transition_at: Instant | None
    """Next start or stop if there is no further activity; null if there is none."""


async def keep(request: GatewayRequest) -> JsonResponse:
    """Keep a deployment awake for a time: it starts if it is stopped, and its policy does not stop it before the end.

    A later request replaces the time. A stop by a user ends it. After its end, the policy decides again.
    """
    body = await decode_body(request, HoldRequest)
    workflow_id, caller = request.path_params["id"], request.caller

    async def work(connection: AsyncConnection) -> DeploymentActivity:
        seen = await _lock(connection, request)
        until = seen.now + timedelta(seconds=body.expires_in_seconds)
        await _set(connection, request, seen, AuditAction.WORKFLOW_KEPT_AWAKE, until)
        held = await _read(connection, workflow_id)
        decision = lifecycle_policy.decide(held.policy, held.situation, held.now)
        if decision.action is not LifecycleAction.START:
            return held
        await activity.apply_decision(connection, held, decision, user_id=caller.user_id)
        return await _read(connection, workflow_id)

    held = await request.gateway.database.transaction(work, locks=f"deployment:{workflow_id}")
    await request.gateway.deployer.notify(workflow_id)
    upcoming = lifecycle_policy.next_transition(held.policy, held.situation, held.now)
    deployment = held.deployment
    return JsonResponse(
        DeploymentHold(
            workflow_id=workflow_id,
            since=instant(deployment.kept_awake_since or held.now),
            until=instant(deployment.kept_awake_until or held.now),
            user_id=caller.user_id,
            next_transition=upcoming.kind if upcoming else None,
            next_transition_at=optional_instant(upcoming.at if upcoming else None),
        )
    )


async def end(request: GatewayRequest) -> NoContent:
    """Keep a deployment awake no longer: its lifecycle policy decides again, within seconds.

    Nothing happens if nobody keeps it awake.
    """
    workflow_id = request.path_params["id"]

    async def work(connection: AsyncConnection) -> None:
        seen = await _lock(connection, request)
        if seen.deployment.kept_awake_until is not None:
            await _set(connection, request, seen, AuditAction.WORKFLOW_HOLD_ENDED, None)

    await request.gateway.database.transaction(work, locks=f"deployment:{workflow_id}")
    return NoContent()


async def _lock(connection: AsyncConnection, request: GatewayRequest) -> DeploymentActivity:
    """Return the deployment that the path names, with its policy and activity; lock it until the transaction ends.

    Raises 404 or 403 unless the caller may change the workflow, and 409 if it isn't deployed.
    """
    workflow_id = request.path_params["id"]
    stored = await editing.find_readable(connection, request.requested_object)
    editing.require_writer(request.caller, stored.workflow)
    await activity.lock_deployment(connection, workflow_id)
    return await _read(connection, workflow_id)


async def _read(connection: AsyncConnection, workflow_id: str) -> DeploymentActivity:
    """Return a deployment with its policy and activity; raises 409 if the workflow isn't deployed."""
    seen = await activity.read_activity(connection, workflow_id)
    if seen is None or not seen.deployment.is_deployed:
        raise deployment_changes.not_deployed()
    return seen


async def _set(
    connection: AsyncConnection,
    request: GatewayRequest,
    seen: DeploymentActivity,
    action: AuditAction,
    until: datetime | None,
) -> None:
    """Store the end of the time for which the caller keeps a deployment awake, None for none, with an audit entry."""
    before, caller = seen.deployment, request.caller
    values: dict[str, Any] = dict.fromkeys(activity.KEPT_AWAKE_COLUMNS)
    if until is not None:
        values = {
            "kept_awake_since": seen.now,
            "kept_awake_until": until,
            "kept_awake_by": caller.user_id,
        }
    await connection.execute(
        update(Deployment).where(col(Deployment.workflow_id) == before.workflow_id).values(values)
    )
    old, new = (None if one is None else format_timestamp(one) for one in (before.kept_awake_until, until))
    changes = audit_log.list_changes(
        {"keptAwakeUntil": old}, {"keptAwakeUntil": new}, shown=("keptAwakeUntil",)
    )
    await audit_log.record_change(
        connection, caller, action, before.workflow_id, before=old, after=new, changes=changes
    )
