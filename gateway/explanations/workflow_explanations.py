"""Endpoint that explains why the deployment of a workflow is awake, asleep or absent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gateway.explanations import explanation_shapes
from gateway.explanations.explanation_shapes import BlockerShape, NextEventShape, SuggestedRequestShape
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant
from gateway.workflows import editing
from journal.deployments import activity
from journal.explanations import run_facts
from journal.explanations.blockers import BlockerCode
from models.deployment import DeploymentStatus
from models.lifecycle_policy import (
    LifecycleAction,
    LifecycleReason,
    PolicyType,
    StoppedReason,
    effective_policy,
)
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from journal.explanations.run_facts import LastDecision


class LastDecisionShape(WireStruct):
    """Last decision about the deployment."""

    action: LifecycleAction
    reason: LifecycleReason
    at: Instant
    user_id: str | None
    """User who requested it; null for a decision by the policy."""


class WorkflowExplanation(WireStruct):
    """Reason for the state of a workflow's deployment."""

    workflow_id: str
    status: WorkflowStatus
    deployment_status: DeploymentStatus
    as_of: Instant
    policy: PolicyType
    """Type of its lifecycle policy."""
    reason: LifecycleReason
    """Reason why it has pods, or has none."""
    message: str
    stopped_reason: StoppedReason | None
    primary: BlockerCode
    """Reason why a run could not start now: the code of the first blocker, or `none`."""
    blockers: Sequence[BlockerShape]
    next: NextEventShape | None
    """Next `start` or `stop` if there is no further activity; null if there is none."""
    last_decision: LastDecisionShape | None
    actions: Sequence[SuggestedRequestShape]


async def show(request: GatewayRequest) -> JsonResponse:
    """Explain why the pods of a workflow run, are stopped, or can't start.

    Without a deployment, workers run its executions.
    """
    from journal.explanations import deployment_explanation  # noqa: PLC0415 - loaded with the first explanation

    async with request.gateway.database.read_snapshot() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
        seen = await activity.read_activity(connection, workflow.id)
        last = await run_facts.read_last_decision(connection, workflow.id)
    explained = deployment_explanation.explain_deployment(workflow, seen, last)
    actions = deployment_explanation.suggest_requests(workflow.id, explained.status)
    shape = WorkflowExplanation(
        workflow_id=workflow.id,
        status=WorkflowStatus(workflow.status),
        deployment_status=explained.status,
        as_of=instant(request.gateway.clock() if seen is None else seen.now),
        policy=PolicyType(effective_policy(workflow.lifecycle)["type"]),
        reason=explained.reason,
        message=explained.message,
        stopped_reason=explained.stopped_reason,
        primary=explained.blockers[0].code if explained.blockers else BlockerCode.NONE,
        blockers=[explanation_shapes.show_blocker(one) for one in explained.blockers],
        next=explanation_shapes.show_next(explained.next),
        last_decision=_show_decision(last),
        actions=[SuggestedRequestShape(method=one.method, path=one.path, scope=one.scope) for one in actions],
    )
    return JsonResponse(shape)


def _show_decision(last: LastDecision | None) -> LastDecisionShape | None:
    """Return the last decision about a deployment as the API shows it; None for None."""
    if last is None:
        return None
    return LastDecisionShape(
        action=LifecycleAction(last.action),
        reason=LifecycleReason(last.reason),
        at=instant(last.at),
        user_id=last.user_id,
    )
