"""When a deployed workflow has compute of its own: its policy, what was decided by it, and what another would do."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import TYPE_CHECKING, Any, ClassVar
from zoneinfo import ZoneInfo

from gateway.deployments import lifecycle_rows, lifecycle_shapes
from gateway.deployments.lifecycle_rows import DAY_SECONDS
from gateway.deployments.lifecycle_shapes import LifecyclePolicy, PolicyPreviewRequest, PolicyShape
from gateway.http import limits, read_only
from gateway.http.parameters import LIMIT, OFFSET
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import (
    GuardedWire,
    Instant,
    WireStruct,
    body_of,
    decode_body,
    instant,
    optional_instant,
    read_json,
)
from gateway.workflows import editing
from journal.deployments import activity
from models import lifecycle_forecast, lifecycle_policy
from models.audit import AuditAction
from models.deployment import DeploymentStatus, status_of, stopped_reason_of
from models.lifecycle_forecast import COLD_START, PREVIEW_TIME, PolicyReplay
from models.lifecycle_policy import (
    DeploymentPolicy,
    LifecycleAction,
    LifecycleReason,
    ScheduledWindowPolicy,
    StoppedReason,
    TransitionKind,
)

if TYPE_CHECKING:
    from gateway.deployments.lifecycle_rows import PodUsage
    from journal.deployments.activity import DeploymentActivity
    from models.deployment import LifecycleDecision
    from models.lifecycle_forecast import PastRun
    from models.weekly_windows import WindowChange, ZoneClockChange
    from models.workflow import Workflow

HOUR_SECONDS = 3_600
LISTED = (LIMIT, OFFSET)


class UsageShape(WireStruct):
    """What the pods of a workflow came to lately, next to what they would if they never slept."""

    since: Instant
    until: Instant
    pod_seconds_per_day: float
    always_on_pod_seconds_per_day: float


class LifecycleShape(WireStruct):
    """The lifecycle policy of a workflow, and where its deployment is."""

    workflow_id: str
    lifecycle_policy: PolicyShape
    deployment_status: DeploymentStatus
    stopped_reason: StoppedReason | None
    """Why it is down; null while it is up, and where it isn't deployed."""
    last_activity_at: Instant | None
    """The last delivery, end of a run, or start."""
    next_transition: TransitionKind | None
    """What will happen next if nothing comes; null: nothing will."""
    next_transition_at: Instant | None
    usage: UsageShape | None
    """Null for what never was deployed."""


class LifecycleUpdate(GuardedWire):
    """A policy beside what else is shown of a deployment, most of which has changed by the time it is sent."""

    read_only: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            (
                "workflowId",
                "stoppedReason",
                "lastActivityAt",
                "nextTransition",
                "nextTransitionAt",
                "usage",
                "warnings",
            ),
            "",
        ),
        "deploymentStatus": "POST /api/v1/workflows/:id/start or /stop",
    }

    lifecycle_policy: LifecyclePolicy


class PolicyUpdateResult(WireStruct):
    """The lifecycle policy that a workflow has now."""

    workflow_id: str
    lifecycle_policy: PolicyShape


class DecisionShape(WireStruct):
    """Something that was done about a deployment, and why."""

    id: str
    at: Instant
    action: LifecycleAction
    reason: LifecycleReason
    stopped_reason: StoppedReason | None
    replicas: int
    """Pods that were wanted from then on."""
    user_id: str | None
    """Who did it; null where it followed from the policy."""
    inputs: Mapping[str, Any]
    """What it was decided by."""


class DecisionList(WireStruct):
    """A part of what was decided about a deployment, the newest first; `count` tells how much there is in all."""

    count: int
    limit: int
    offset: int
    decisions: Sequence[DecisionShape]


class TransitionShape(WireStruct):
    """A start or a stop that a schedule brings."""

    at: Instant
    action: TransitionKind
    local_time: str
    """The same moment by the clocks of the schedule's zone, with their offset."""
    is_clock_change: bool
    """The clocks change at this moment, and that brings it about."""


class ClockChangeShape(WireStruct):
    """A moment at which the clocks of the schedule's zone change."""

    at: Instant
    local_time_before: str
    local_time_after: str


class ReplayShape(WireStruct):
    """What past runs would have taken under a policy."""

    pod_hours: float
    cold_starts: int
    """Runs that would have waited for a pod to start."""
    waits: int
    """Runs that would have waited for a start, or for a window to open."""
    total_wait_seconds: float
    longest_wait_seconds: float


class PolicyComparison(WireStruct):
    """A policy and today's, each applied to the same past runs, as if every one had gone to a pod."""

    since: Instant
    until: Instant
    runs: int
    cold_start_seconds: float
    """What a run is assumed to wait for pods that sleep."""
    current: ReplayShape
    candidate: ReplayShape


class PolicyPreview(WireStruct):
    """What a policy would do."""

    workflow_id: str
    lifecycle_policy: PolicyShape
    until: Instant
    """How far transitions and clock changes are looked for."""
    transitions: Sequence[TransitionShape]
    """Those that the clock alone brings: of schedules, none of other policies."""
    clock_changes: Sequence[ClockChangeShape]
    replay: PolicyComparison


# ── the policy ──────────────────────────────────────────────────────────────────────────────────────────────


async def show(request: GatewayRequest) -> JsonResponse:
    """Show a workflow's lifecycle policy, and where its deployment is."""
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request)
        seen = await activity.read_activity(connection, stored.workflow.id)
        now = request.gateway.clock() if seen is None else seen.now
        used = await lifecycle_rows.read_usage(connection, stored.workflow.id, now)
    return editing.answer(stored, _shape(stored.workflow, seen, used))


async def update(request: GatewayRequest) -> JsonResponse:
    """Set a workflow's lifecycle policy: when its pods are kept, and when they sleep.

    It counts from the next look at the deployment on, within half a minute. What doesn't belong to the policy's type is
    checked, and not kept.
    """
    policy = lifecycle_shapes.store_policy(await _given_policy(request))
    edited = await editing.edit_workflow(
        request, AuditAction.WORKFLOW_LIFECYCLE_SET, lambda before: before.with_columns(lifecycle=policy)
    )
    shape = PolicyUpdateResult(
        workflow_id=edited.after.workflow.id, lifecycle_policy=lifecycle_shapes.show_policy(policy)
    )
    return editing.answer(edited.after, shape)


async def _given_policy(request: GatewayRequest) -> LifecyclePolicy:
    """Return the policy that a body is, or that it has where it is what `GET` answers."""
    value = await read_json(request)
    if not isinstance(value, dict) or "type" in value or "lifecyclePolicy" not in value:
        return body_of(request, value, LifecyclePolicy)
    given = body_of(request, value, LifecycleUpdate)
    async with request.gateway.database.read() as connection:
        workflow = (await editing.find_readable(connection, request)).workflow
        seen = await activity.read_activity(connection, workflow.id)
    now = {"workflowId": workflow.id, "deploymentStatus": status_of(seen.deployment if seen else None).value}
    read_only.require_same({name: value[name] for name in now if name in value}, LifecycleUpdate, lambda: now)
    return given.lifecycle_policy


async def history(request: GatewayRequest) -> JsonResponse:
    """List what was decided about a workflow's deployment, by whom or by what, the newest first."""
    part = request.query.page()
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request)
        count, found = await lifecycle_rows.list_decisions(connection, stored.workflow.id, part)
    shape = DecisionList(
        count=count, limit=part.limit, offset=part.offset, decisions=[_decision(one) for one in found]
    )
    return JsonResponse(shape)


async def preview(request: GatewayRequest) -> JsonResponse:
    """Tell what a lifecycle policy would do, without setting it.

    When it would start and stop pods in the next two weeks, and what the runs of the last two would have taken: how
    long pods would have been up, and what runs would have waited for them.
    """
    body = lifecycle_shapes.store_policy(await decode_body(request, PolicyPreviewRequest))
    now = request.gateway.clock()
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request)
        workflow = stored.workflow
        since = max(now - PREVIEW_TIME, workflow.created_at)
        runs = await lifecycle_rows.read_past_runs(connection, workflow.id, since, now)
        seen = await activity.read_activity(connection, workflow.id)
    if len(runs) == limits.PREVIEW_RUNS:
        since = runs[0].accepted_at
    replicas = seen.deployment.last_replicas if seen else 1
    current, candidate = (
        lifecycle_policy.parse_policy(lifecycle_policy.effective_policy(workflow.lifecycle)),
        lifecycle_policy.parse_policy(body),
    )
    zone = ZoneInfo(candidate.schedule.timezone) if isinstance(candidate, ScheduledWindowPolicy) else UTC
    # In a thread: others are served while thousands of runs are gone through.
    before, after = await asyncio.to_thread(_replayed, (current, candidate), runs, since, now)
    shape = PolicyPreview(
        workflow_id=workflow.id,
        lifecycle_policy=lifecycle_shapes.show_policy(body),
        until=instant(now + PREVIEW_TIME),
        transitions=[_transition(one, zone) for one in lifecycle_forecast.policy_changes(candidate, now)],
        clock_changes=[_clock_change(one) for one in lifecycle_forecast.policy_clock_changes(candidate, now)],
        replay=PolicyComparison(
            since=instant(since),
            until=instant(now),
            runs=len(runs),
            cold_start_seconds=COLD_START.total_seconds(),
            current=_replay(before, replicas),
            candidate=_replay(after, replicas),
        ),
    )
    return editing.answer(stored, shape)


# ── as clients see it ───────────────────────────────────────────────────────────────────────────────────────


def _shape(workflow: Workflow, seen: DeploymentActivity | None, used: PodUsage | None) -> LifecycleShape:
    deployment = seen.deployment if seen else None
    coming = lifecycle_policy.next_transition(seen.policy, seen.situation, seen.now) if seen else None
    return LifecycleShape(
        workflow_id=workflow.id,
        lifecycle_policy=lifecycle_shapes.show_policy(lifecycle_policy.effective_policy(workflow.lifecycle)),
        deployment_status=status_of(deployment),
        stopped_reason=stopped_reason_of(deployment),
        last_activity_at=optional_instant(seen.situation.last_activity_at if seen else None),
        next_transition=coming.kind if coming else None,
        next_transition_at=optional_instant(coming.at if coming else None),
        usage=_usage(used, deployment.last_replicas) if used and deployment else None,
    )


def _usage(used: PodUsage, replicas: int) -> UsageShape:
    return UsageShape(
        since=instant(used.since),
        until=instant(used.until),
        pod_seconds_per_day=round(used.pod_seconds_per_day, 1),
        always_on_pod_seconds_per_day=float(replicas * DAY_SECONDS),
    )


def _decision(row: LifecycleDecision) -> DecisionShape:
    return DecisionShape(
        id=row.id,
        at=instant(row.at),
        action=LifecycleAction(row.action),
        reason=LifecycleReason(row.reason),
        stopped_reason=None if row.stopped_reason is None else StoppedReason(row.stopped_reason),
        replicas=row.replicas,
        user_id=row.user_id,
        inputs=row.inputs,
    )


def _replayed(
    policies: Sequence[DeploymentPolicy], runs: Sequence[PastRun], since: datetime, until: datetime
) -> list[PolicyReplay]:
    return [lifecycle_forecast.replay_runs(policy, runs, since, until) for policy in policies]


def _replay(replay: PolicyReplay, replicas: int) -> ReplayShape:
    return ReplayShape(
        pod_hours=round(replay.pod_time.total_seconds() * replicas / HOUR_SECONDS, 3),
        cold_starts=replay.cold_starts,
        waits=len(replay.waits),
        total_wait_seconds=sum(replay.waits, timedelta()).total_seconds(),
        longest_wait_seconds=max(replay.waits, default=timedelta()).total_seconds(),
    )


def _transition(change: WindowChange, zone: tzinfo) -> TransitionShape:
    return TransitionShape(
        at=instant(change.at),
        action=TransitionKind.START if change.is_open else TransitionKind.STOP,
        local_time=_local(change.at, zone),
        is_clock_change=change.is_by_clock,
    )


def _clock_change(change: ZoneClockChange) -> ClockChangeShape:
    return ClockChangeShape(
        at=instant(change.at),
        local_time_before=_local(change.at, timezone(change.offset_before)),
        local_time_after=_local(change.at, timezone(change.offset_after)),
    )


def _local(at: datetime, zone: tzinfo) -> str:
    return at.astimezone(zone).isoformat(timespec="seconds")
