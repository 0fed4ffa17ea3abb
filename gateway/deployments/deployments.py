"""Workflows with pods of their own: deploy, undeploy, start, stop, and read their state and logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final

from msgspec import UNSET, Meta, UnsetType

from gateway.deployments import deployment_changes
from gateway.http import errors, limits
from gateway.http.parameters import IntegerParameter
from gateway.http.responses import JsonResponse
from gateway.http.wire import GuardedWire, Instant, StrictWire, WireStruct, decode_body, optional_instant
from gateway.workflows import editing, graph_shapes, version_rows, workflow_rows
from journal import definition_snapshot
from journal.deployments import desired_state
from models import lifecycle_policy
from models.audit import AuditAction
from models.deployment import (
    MAX_REPLICAS,
    DeploymentStatus,
    has_failed_to_start,
    is_desired,
    status_of,
    stopped_reason_of,
)
from models.lifecycle_policy import LifecycleAction, LifecycleReason, LifecycleVerdict, StoppedReason
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.node_lookup import NodeTypeLookup
    from gateway.http.request import GatewayRequest
    from gateway.workflows.editing import WorkflowEdit
    from gateway.workflows.stored_workflow import StoredWorkflow
    from journal.deployments.activity import DeploymentActivity
    from models.deployment import Deployment
    from models.workflow import WorkflowVersion

LINES: Final = IntegerParameter(
    "limit", "Number of last lines to show.", 100, minimum=1, maximum=limits.POD_LOG_LINES
)


class DeployVersion(StrictWire):
    """Body of a request to deploy a version."""

    version: Annotated[int, Meta(ge=1, le=limits.VERSIONS)]


class StartDeployment(GuardedWire):
    """Body of a request to start a deployment."""

    replicas: Annotated[int, Meta(ge=1, le=MAX_REPLICAS)] = 1


class DeployResult(WireStruct):
    """State of a deployment after a request to deploy it."""

    message: str
    workflow_id: str
    status: WorkflowStatus
    deployment_status: DeploymentStatus
    version: int
    """Version of the workflow whose definition is deployed."""
    reason: str | UnsetType = UNSET
    """Reason why its pods can't start."""


class UndeployResult(WireStruct):
    """State of a deployment after a request to undeploy it."""

    message: str
    workflow_id: str
    status: WorkflowStatus
    deployment_status: DeploymentStatus


class StopResult(WireStruct):
    """State of a deployment after a request to stop it."""

    workflow_id: str
    deployment_status: DeploymentStatus


class StartResult(WireStruct):
    """State of a deployment after a request to start it."""

    workflow_id: str
    deployment_status: DeploymentStatus
    replicas: int
    """Desired number of pods."""
    reason: str | UnsetType = UNSET
    """Reason why its pods can't start."""


class DeploymentShape(WireStruct):
    """Desired and last observed state of a workflow's deployment."""

    workflow_id: str
    status: WorkflowStatus
    deployment_status: DeploymentStatus
    stopped_reason: StoppedReason | None
    """Reason why it is stopped; null while it runs or isn't deployed."""
    reason: str | None
    """Reason why its pods can't start, or why the cluster can't be reached."""
    reason_code: str | None
    """Code of the reason, such as `quota`, `unschedulable`, `image-pull` or `node-not-ready`."""
    replicas: int
    """Desired number of pods."""
    ready_replicas: int
    """Pods that accept runs."""
    version: int | None
    """Version of the workflow whose definition is deployed; null if none is."""
    definition_hash: str | None
    """Hash of the deployed definition."""
    ready_definition_hash: str | None
    """Hash of the definition in the ready pods, which differs until they are replaced."""
    drain_until: Instant | None
    """Until then its running executions may finish; it accepts no new ones."""
    observed_at: Instant | None
    """Time at which its pods entered their present state."""
    updated_at: Instant | None
    """Time at which its desired state last changed."""


class PodLine(WireStruct):
    """Line of a pod's log."""

    pod: str
    at: str | None
    """Null if the cluster records no times."""
    text: str


class PodLog(WireStruct):
    """Last log lines of a workflow's pods, oldest first."""

    workflow_id: str
    lines: Sequence[PodLine]


# ── desired state ───────────────────────────────────────────────────────────────────────────────────────────


async def deploy(request: GatewayRequest) -> JsonResponse:
    """Deploy the current version of a workflow: its runs then execute in pods of its own, all with this definition.

    The workflow becomes active, so its graph must be valid. Deploying it again replaces its pods one by one, unless
    they have this version already.
    """
    token_id = deployment_changes.fresh_token_id()

    async def order(connection: AsyncConnection, edited: WorkflowEdit) -> None:
        stored = edited.after
        snapshot = workflow_rows.snapshot(stored)
        version = stored.workflow.version
        await deployment_changes.deploy_workflow(
            connection,
            request.caller,
            stored,
            snapshot,
            await request.gateway.workflow_editor.read_catalog(connection, request.caller.organization_id),
            version=version,
            token_id=token_id,
            secret=request.gateway.settings.secret,
        )

    edited = await request.gateway.workflow_editor.edit(
        request.requested_object, AuditAction.WORKFLOW_STATUS_SET, _activate_workflow, anyway=order
    )
    return await _deploy_answer(request, edited.after)


async def deploy_version(request: GatewayRequest) -> JsonResponse:
    """Deploy a given version of a workflow, such as the previous one; the workflow becomes active, but its own graph
    doesn't change.

    Refused if the version's graph is not valid with the present node types, or if the workflow's own graph is not valid
    when it becomes active.
    """
    wanted = (await decode_body(request, DeployVersion)).version
    token_id = deployment_changes.fresh_token_id()

    async def order(connection: AsyncConnection, edited: WorkflowEdit) -> None:
        version = await version_rows.find_version(connection, edited.after.workflow.id, wanted)
        if version is None:
            raise errors.not_found("version")
        editor = request.gateway.workflow_editor
        catalog = await editor.read_catalog(connection, request.caller.organization_id)
        _require_runnable(version, catalog)
        await deployment_changes.deploy_workflow(
            connection,
            request.caller,
            edited.after,
            version.snapshot,
            catalog,
            version=wanted,
            token_id=token_id,
            secret=request.gateway.settings.secret,
        )

    edited = await request.gateway.workflow_editor.edit(
        request.requested_object, AuditAction.WORKFLOW_STATUS_SET, _activate_workflow, anyway=order
    )
    return await _deploy_answer(request, edited.after)


def _activate_workflow(before: StoredWorkflow) -> StoredWorkflow:
    return before.with_columns(status=WorkflowStatus.ACTIVE)


def _require_runnable(version: WorkflowVersion, catalog: NodeTypeLookup) -> None:
    """Raise a 422 error for a version whose graph is invalid with the present node types."""
    snapshot = version.snapshot
    graph_shapes.require_valid(
        definition_snapshot.check_graph(snapshot["nodes"], snapshot["connections"], catalog)
    )


async def _deploy_answer(request: GatewayRequest, stored: StoredWorkflow) -> JsonResponse:
    """Notify the deployer, wait until the pods run, fail or lack capacity, and return the answer about the deployment.

    The wait also ends after the configured time, and if somebody stops the deployment meanwhile. The status is 200 if
    all pods run, else 202 with the state so far.
    """
    workflow_id = stored.workflow.id
    await request.gateway.deployer.notify(workflow_id)
    deployment = await request.gateway.deployer.await_state(workflow_id, _is_up_or_overtaken)
    status = status_of(deployment)
    is_done = deployment is not None and _is_running(deployment)
    shape = DeployResult(
        message="Workflow deployed successfully" if is_done else _pending_message("deployed", status),
        workflow_id=workflow_id,
        status=WorkflowStatus(stored.workflow.status),
        deployment_status=status,
        version=deployment.version if deployment else stored.workflow.version,
        reason=_failure_reason(deployment),
    )
    return editing.answer(stored, shape, status=200 if is_done else 202)


async def undeploy(request: GatewayRequest) -> JsonResponse:
    """Remove a workflow's pods for good; it becomes a draft, and workers execute its accepted runs.

    An archived workflow stays archived. The answer comes when the pods have ended, or else after a limited time with
    202.
    """

    async def order(connection: AsyncConnection, edited: WorkflowEdit) -> None:
        await deployment_changes.undeploy_workflow(connection, request.caller, edited.after.workflow.id)

    edited = await request.gateway.workflow_editor.edit(
        request.requested_object, AuditAction.WORKFLOW_STATUS_SET, _make_draft, anyway=order
    )
    workflow_id = edited.after.workflow.id
    await request.gateway.deployer.notify(workflow_id)
    status = status_of(await request.gateway.deployer.await_state(workflow_id, _is_gone_or_overtaken))
    is_done = status is DeploymentStatus.NOT_DEPLOYED
    shape = UndeployResult(
        message="Workflow undeployed successfully" if is_done else _pending_message("undeployed", status),
        workflow_id=workflow_id,
        status=WorkflowStatus(edited.after.workflow.status),
        deployment_status=status,
    )
    return editing.answer(edited.after, shape, status=200 if is_done else 202)


def _make_draft(before: StoredWorkflow) -> StoredWorkflow:
    is_archived = before.workflow.status == WorkflowStatus.ARCHIVED
    return before if is_archived else before.with_columns(status=WorkflowStatus.DRAFT)


async def stop(request: GatewayRequest) -> JsonResponse:
    """Stop a workflow's pods: new runs don't start, and running ones have a minute to finish.

    Runs that don't finish return to the queue. The deployment remains. It starts again by `start`, or for the next run
    if its lifecycle policy allows that. The answer comes when the pods have ended, or else after a limited time with
    202.
    """
    deployment = await deployment_changes.change_deployment(
        request.gateway.database, request.requested_object, AuditAction.WORKFLOW_STOPPED, _decide_stop
    )
    await request.gateway.deployer.notify(deployment.workflow_id)
    status = status_of(
        await request.gateway.deployer.await_state(deployment.workflow_id, _is_down_or_overtaken)
    )
    shape = StopResult(workflow_id=deployment.workflow_id, deployment_status=status)
    return JsonResponse(shape, status=200 if status is DeploymentStatus.STOPPED else 202)


def _decide_stop(seen: DeploymentActivity) -> LifecycleVerdict:
    if seen.situation.stopped_reason is StoppedReason.MANUAL:
        return LifecycleVerdict(LifecycleAction.NONE, LifecycleReason.STOPPED_BY_HAND)
    return lifecycle_policy.stop_decision(seen.situation, LifecycleReason.BY_HAND, StoppedReason.MANUAL)


async def start(request: GatewayRequest) -> JsonResponse:
    """Start a stopped workflow, which is much faster than deploying it, or change its number of pods.

    The answer comes when the pods run, fail or lack capacity, or else after a limited time with 202.
    """
    replicas = (await decode_body(request, StartDeployment)).replicas

    def started(seen: DeploymentActivity) -> LifecycleVerdict:
        is_up = is_desired(seen.deployment) and not has_failed_to_start(seen.deployment)
        if is_up and seen.deployment.replicas == replicas:
            return LifecycleVerdict(LifecycleAction.NONE, LifecycleReason.IN_USE)
        return LifecycleVerdict(LifecycleAction.START, LifecycleReason.BY_HAND)

    ordered = await deployment_changes.change_deployment(
        request.gateway.database,
        request.requested_object,
        AuditAction.WORKFLOW_STARTED,
        started,
        replicas=replicas,
    )
    await request.gateway.deployer.notify(ordered.workflow_id)
    deployment = await request.gateway.deployer.await_state(ordered.workflow_id, _is_up_or_overtaken)
    status = status_of(deployment)
    shape = StartResult(
        workflow_id=ordered.workflow_id,
        deployment_status=status,
        replicas=deployment.replicas if deployment else replicas,
        reason=_failure_reason(deployment),
    )
    return JsonResponse(shape, status=200 if deployment is not None and _is_running(deployment) else 202)


# ── observed state ──────────────────────────────────────────────────────────────────────────────────────────


async def show(request: GatewayRequest) -> JsonResponse:
    """Show the desired and observed state of a workflow's deployment, also for a workflow that was never deployed."""
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request.requested_object)
        deployment = await desired_state.find_deployment(connection, stored.workflow.id)
    is_deployed = deployment is not None and deployment.is_deployed
    shape = DeploymentShape(
        workflow_id=stored.workflow.id,
        status=WorkflowStatus(stored.workflow.status),
        deployment_status=status_of(deployment),
        stopped_reason=stopped_reason_of(deployment) if is_deployed else None,
        reason=deployment.observed_reason if deployment else None,
        reason_code=deployment.observed_reason_code if deployment else None,
        replicas=deployment.replicas if deployment else 0,
        ready_replicas=deployment.ready_replicas if deployment else 0,
        version=deployment.version if deployment and is_deployed else None,
        definition_hash=deployment.definition_hash if deployment and is_deployed else None,
        ready_definition_hash=(
            deployment.observed_definition_hash if deployment and deployment.ready_replicas else None
        ),
        drain_until=optional_instant(deployment.drain_until if deployment else None),
        observed_at=optional_instant(deployment.observed_at if deployment else None),
        updated_at=optional_instant(deployment.updated_at if deployment else None),
    )
    return editing.answer(stored, shape)


async def logs(request: GatewayRequest) -> JsonResponse:
    """Show the last log lines of a workflow's pods themselves; logs of runs are part of their executions.

    Refused unless the workflow is deployed.
    """
    limit = request.query[LINES]
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request.requested_object)
        deployment = await desired_state.find_deployment(connection, stored.workflow.id)
    if status_of(deployment) is DeploymentStatus.NOT_DEPLOYED:
        raise deployment_changes.not_deployed()
    lines = await request.gateway.pod_logs.read(stored.workflow.id, request.caller, limit)
    shape = PodLog(
        workflow_id=stored.workflow.id,
        lines=[PodLine(pod=line.pod, at=line.at, text=line.text) for line in lines],
    )
    return JsonResponse(shape)


def _is_running(deployment: Deployment) -> bool:
    """Return whether all desired pods are ready, as observed since the last change of the desired state."""
    return (
        status_of(deployment) is DeploymentStatus.RUNNING
        and deployment.observed_generation == deployment.generation
        and deployment.ready_replicas >= deployment.replicas
    )


# Another user or a new run may meanwhile ask for the opposite state. Then waiting is pointless.


def _is_up_or_overtaken(deployment: Deployment) -> bool:
    return _is_running(deployment) or not is_desired(deployment)


def _is_down_or_overtaken(deployment: Deployment) -> bool:
    is_overtaken = is_desired(deployment) or not deployment.is_deployed
    return is_overtaken or status_of(deployment) is DeploymentStatus.STOPPED


def _is_gone_or_overtaken(deployment: Deployment) -> bool:
    return status_of(deployment) is DeploymentStatus.NOT_DEPLOYED or deployment.is_deployed


def _failure_reason(deployment: Deployment | None) -> str | UnsetType:
    if deployment is None or deployment.observed_reason is None:
        return UNSET
    return deployment.observed_reason


def _pending_message(done: str, status: DeploymentStatus) -> str:
    return f"The workflow is not {done} yet: its deployment is {status}"
