"""Lifecycle policy of a deployed workflow: read and set it, list its decisions, and preview another policy."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, cast
from zoneinfo import ZoneInfo

from gateway.access.audit import AuditChange
from gateway.deployments import lifecycle_rows, lifecycle_shapes
from gateway.deployments.lifecycle_rows import DAY, DAY_SECONDS, TimeRange
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
from models import access_store, lifecycle_forecast, lifecycle_policy
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
    from models.audit import AuditEntry
    from models.deployment import LifecycleDecision
    from models.lifecycle_forecast import PastRun
    from models.weekly_windows import WindowChange, ZoneClockChange
    from models.workflow import Workflow

HOUR_SECONDS = 3_600
LISTED = (LIMIT, OFFSET)
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class UsageShape(WireStruct):
    """Recent use of a workflow's pods, and the use without any stop."""

    since: Instant
    until: Instant
    pod_seconds_per_day: float
    always_on_pod_seconds_per_day: float


class LifecycleShape(WireStruct):
    """Lifecycle policy of a workflow, and the state of its deployment."""

    workflow_id: str
    lifecycle_policy: PolicyShape
    deployment_status: DeploymentStatus
    stopped_reason: StoppedReason | None
    """Reason why it is stopped; null while it runs or isn't deployed."""
    last_activity_at: Instant | None
    """Time of the last delivery, end of a run, or start."""
    next_transition: TransitionKind | None
    """Next start or stop if there is no further activity; null if there is none."""
    next_transition_at: Instant | None
    usage: UsageShape | None
    """Null for a workflow that was never deployed."""


class LifecycleUpdate(GuardedWire):
    """Policy inside the answer of `GET`.

    Most of the other fields may have changed before the request and are ignored.
    """

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
    """Present lifecycle policy of a workflow."""

    workflow_id: str
    lifecycle_policy: PolicyShape


class DecisionShape(WireStruct):
    """Decision about a deployment, with its reason."""

    id: str
    at: Instant
    action: LifecycleAction
    reason: LifecycleReason
    stopped_reason: StoppedReason | None
    replicas: int
    """Desired number of pods after the decision."""
    user_id: str | None
    """User who requested it; null for a decision by the policy."""
    user_name: str | None
    """Name of the user, or the mail address of one without; null for a decision by the policy."""
    inputs: Mapping[str, Any]
    """Facts on which the decision is based."""


class LifecycleChange(WireStruct):
    """Change of the lifecycle policy by a user, or of the time until which a user keeps the deployment awake."""

    id: str
    at: Instant
    action: Literal["workflow.lifecycle-set", "workflow.kept-awake", "workflow.hold-ended"]
    user_id: str
    user_name: str | None
    """Name of the user, or the mail address of one without; null for one who is gone."""
    changes: Sequence[AuditChange]
    """Changed values by path, such as `lifecyclePolicy.type`."""


class DecisionList(WireStruct):
    """Page of the decisions about a deployment, newest first; `count` is the number of all decisions."""

    count: int
    limit: int
    offset: int
    decisions: Sequence[DecisionShape]
    changes: Sequence[LifecycleChange]
    """Changes by users in the time of the page's decisions, newest first, at most 100."""


class TransitionShape(WireStruct):
    """Start or stop by a schedule."""

    at: Instant
    action: TransitionKind
    local_time: str
    """Local time in the zone of the schedule, with its UTC offset."""
    is_clock_change: bool
    """Whether a change of the clocks at this moment causes it."""


class ClockChangeShape(WireStruct):
    """Change of the clocks in the zone of the schedule."""

    at: Instant
    local_time_before: str
    local_time_after: str


class ReplayShape(WireStruct):
    """Pod time and waits of past runs under a policy."""

    pod_hours: float
    cold_starts: int
    """Runs that would have waited for a pod to start."""
    waits: int
    """Runs that would have waited for a start, or for a window to open."""
    total_wait_seconds: float
    p95_wait_seconds: float
    """Time within which 95 % of the waits end; 0 without a wait."""
    longest_wait_seconds: float


class ReplayDay(WireStruct):
    """Pod time of past runs on one day, under both policies."""

    starts_at: Instant
    current_pod_hours: float
    candidate_pod_hours: float


class PolicyComparison(WireStruct):
    """Present and candidate policy applied to the same past runs, as if all had executed in pods."""

    since: Instant
    until: Instant
    runs: int
    cold_start_seconds: float
    """Assumed wait of a run for stopped pods to start."""
    current: ReplayShape
    candidate: ReplayShape
    days: Sequence[ReplayDay]
    """Pod time of each day in UTC, the earliest first."""


class PolicyPreview(WireStruct):
    """Forecast for a lifecycle policy."""

    workflow_id: str
    lifecycle_policy: PolicyShape
    until: Instant
    """End of the forecast of transitions and clock changes."""
    transitions: Sequence[TransitionShape]
    """Transitions by the clock alone: those of schedules. Other policies have none."""
    clock_changes: Sequence[ClockChangeShape]
    replay: PolicyComparison


# ── the policy ──────────────────────────────────────────────────────────────────────────────────────────────


async def show(request: GatewayRequest) -> JsonResponse:
    """Show a workflow's lifecycle policy, and the state of its deployment."""
    async with request.gateway.database.read() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
        seen = await activity.read_activity(connection, workflow.id)
        now = request.gateway.clock() if seen is None else seen.now
        used = await lifecycle_rows.read_usage(connection, workflow.id, now)
    return JsonResponse(_show_lifecycle(workflow, seen, used), headers=editing.entity_tag(workflow))


async def update(request: GatewayRequest) -> JsonResponse:
    """Set a workflow's lifecycle policy: when it keeps pods, and when they stop.

    It takes effect within half a minute. Fields of other policy types are validated but not stored.
    """
    policy = lifecycle_shapes.to_stored_policy(await _read_policy(request))
    edited = await request.gateway.workflow_editor.edit(
        request.requested_object,
        AuditAction.WORKFLOW_LIFECYCLE_SET,
        lambda before: before.with_columns(lifecycle=policy),
    )
    shape = PolicyUpdateResult(
        workflow_id=edited.after.workflow.id, lifecycle_policy=lifecycle_shapes.show_policy(policy)
    )
    return editing.answer(edited.after, shape)


async def _read_policy(request: GatewayRequest) -> LifecyclePolicy:
    """Return the policy of a body, which is either a policy or an answer of `GET` that contains one.

    In such an answer, `workflowId` and `deploymentStatus` must be as they are now; its other fields are ignored. Raises
    a 422 error for an invalid policy or a difference, and 404 if the workflow is then missing or unreadable.
    """
    value = await read_json(request)
    if not isinstance(value, dict) or "type" in value or "lifecyclePolicy" not in value:
        return body_of(request, value, LifecyclePolicy)
    given = body_of(request, value, LifecycleUpdate)
    async with request.gateway.database.read() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
        seen = await activity.read_activity(connection, workflow.id)
    now = {"workflowId": workflow.id, "deploymentStatus": status_of(seen.deployment if seen else None).value}
    read_only.require_same({name: value[name] for name in now if name in value}, LifecycleUpdate, lambda: now)
    return given.lifecycle_policy


async def history(request: GatewayRequest) -> JsonResponse:
    """List the decisions about a workflow's deployment, by users and by its policy, newest first.

    `changes` has the changes of the policy in the time of these decisions, and those of the times until which users
    keep the deployment awake.
    """
    part = request.query.page()
    async with request.gateway.database.read() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
        count, found = await lifecycle_rows.list_decisions(connection, workflow.id, part)
        span = TimeRange(
            found[-1].at if part.offset + len(found) < count else EPOCH,
            found[0].at if part.offset and found else request.gateway.clock() + timedelta(days=1),
        )
        changed = await lifecycle_rows.list_changes(connection, workflow, span)
        by_users = [one.user_id for one in found if one.user_id is not None]
        by_users += [one.user_id for one in changed]
        names = await access_store.read_user_names(connection, request.caller.organization_id, by_users)
    shape = DecisionList(
        count=count,
        limit=part.limit,
        offset=part.offset,
        decisions=[_show_decision(one, names) for one in found],
        changes=[_show_change(one, names) for one in changed],
    )
    return JsonResponse(shape)


async def preview(request: GatewayRequest) -> JsonResponse:
    """Preview the effects of a lifecycle policy without setting it.

    Shows its starts and stops of pods in the next two weeks. It also replays the runs of the last two weeks:
    for how long pods would have run, and how long runs would have waited for them.
    """
    body = lifecycle_shapes.to_stored_policy(await decode_body(request, PolicyPreviewRequest))
    now = request.gateway.clock()
    async with request.gateway.database.read() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
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
    # In a thread, so that other requests are served while thousands of runs are replayed.
    before, after = await asyncio.to_thread(_replay_policies, (current, candidate), runs, since, now)
    shape = PolicyPreview(
        workflow_id=workflow.id,
        lifecycle_policy=lifecycle_shapes.show_policy(body),
        until=instant(now + PREVIEW_TIME),
        transitions=[
            _show_transition(one, zone) for one in lifecycle_forecast.policy_changes(candidate, now)
        ],
        clock_changes=[
            _show_clock_change(one) for one in lifecycle_forecast.policy_clock_changes(candidate, now)
        ],
        replay=PolicyComparison(
            since=instant(since),
            until=instant(now),
            runs=len(runs),
            cold_start_seconds=COLD_START.total_seconds(),
            current=_show_replay(before, replicas),
            candidate=_show_replay(after, replicas),
            days=_show_replay_days(before, after, replicas, TimeRange(since, now)),
        ),
    )
    return JsonResponse(shape, headers=editing.entity_tag(workflow))


# ── shapes ──────────────────────────────────────────────────────────────────────────────────────────────────


def _show_lifecycle(
    workflow: Workflow, seen: DeploymentActivity | None, used: PodUsage | None
) -> LifecycleShape:
    """Return a workflow's policy and the state of its deployment as the API shows it.

    `seen` and `used` are None for a workflow that was never deployed.
    """
    deployment = seen.deployment if seen else None
    upcoming = lifecycle_policy.next_transition(seen.policy, seen.situation, seen.now) if seen else None
    return LifecycleShape(
        workflow_id=workflow.id,
        lifecycle_policy=lifecycle_shapes.show_policy(lifecycle_policy.effective_policy(workflow.lifecycle)),
        deployment_status=status_of(deployment),
        stopped_reason=stopped_reason_of(deployment),
        last_activity_at=optional_instant(seen.situation.last_activity_at if seen else None),
        next_transition=upcoming.kind if upcoming else None,
        next_transition_at=optional_instant(upcoming.at if upcoming else None),
        usage=_show_usage(used, deployment.last_replicas) if used and deployment else None,
    )


def _show_usage(used: PodUsage, replicas: int) -> UsageShape:
    return UsageShape(
        since=instant(used.since),
        until=instant(used.until),
        pod_seconds_per_day=round(used.pod_seconds_per_day, 1),
        always_on_pod_seconds_per_day=float(replicas * DAY_SECONDS),
    )


def _show_decision(row: LifecycleDecision, names: Mapping[str, str]) -> DecisionShape:
    return DecisionShape(
        id=row.id,
        at=instant(row.at),
        action=LifecycleAction(row.action),
        reason=LifecycleReason(row.reason),
        stopped_reason=None if row.stopped_reason is None else StoppedReason(row.stopped_reason),
        replicas=row.replicas,
        user_id=row.user_id,
        user_name=None if row.user_id is None else names.get(row.user_id),
        inputs=row.inputs,
    )


def _show_change(entry: AuditEntry, names: Mapping[str, str]) -> LifecycleChange:
    return LifecycleChange(
        id=entry.id,
        at=instant(entry.created_at),
        action=cast("Any", entry.action),
        user_id=entry.user_id,
        user_name=names.get(entry.user_id),
        changes=[AuditChange(**change) for change in entry.changes or ()],
    )


def _replay_policies(
    policies: Sequence[DeploymentPolicy], runs: Sequence[PastRun], since: datetime, until: datetime
) -> list[PolicyReplay]:
    return [lifecycle_forecast.replay_runs(policy, runs, since, until) for policy in policies]


def _show_replay(replay: PolicyReplay, replicas: int) -> ReplayShape:
    """Return the figures of a replayed policy as the API shows them: pod hours of all replicas, cold starts,
    and waits in seconds.
    """
    return ReplayShape(
        pod_hours=round(replay.pod_time.total_seconds() * replicas / HOUR_SECONDS, 3),
        cold_starts=replay.cold_starts,
        waits=len(replay.waits),
        total_wait_seconds=sum(replay.waits, timedelta()).total_seconds(),
        p95_wait_seconds=_compute_p95(replay.waits).total_seconds(),
        longest_wait_seconds=max(replay.waits, default=timedelta()).total_seconds(),
    )


def _show_replay_days(
    current: PolicyReplay, candidate: PolicyReplay, replicas: int, shown: TimeRange
) -> Sequence[ReplayDay]:
    """Return the pod hours of all replicas on each day of a time, under two policies."""
    day, found = lifecycle_rows.start_of_day(shown.since.astimezone(UTC)), []
    while day < shown.until:
        hours = [
            round(
                one.sum_pod_time(max(day, shown.since), day + DAY).total_seconds() * replicas / HOUR_SECONDS,
                3,
            )
            for one in (current, candidate)
        ]
        found.append(
            ReplayDay(starts_at=instant(day), current_pod_hours=hours[0], candidate_pod_hours=hours[1])
        )
        day += DAY
    return found


def _compute_p95(waits: Sequence[timedelta]) -> timedelta:
    """Return the wait within which 95 % of the waits ended; 0 without any."""
    ranked = sorted(waits)
    return ranked[(len(ranked) * 95 + 99) // 100 - 1] if ranked else timedelta()


def _show_transition(change: WindowChange, zone: tzinfo) -> TransitionShape:
    return TransitionShape(
        at=instant(change.at),
        action=TransitionKind.START if change.is_open else TransitionKind.STOP,
        local_time=_format_local_time(change.at, zone),
        is_clock_change=change.is_by_clock,
    )


def _show_clock_change(change: ZoneClockChange) -> ClockChangeShape:
    return ClockChangeShape(
        at=instant(change.at),
        local_time_before=_format_local_time(change.at, timezone(change.offset_before)),
        local_time_after=_format_local_time(change.at, timezone(change.offset_after)),
    )


def _format_local_time(at: datetime, zone: tzinfo) -> str:
    return at.astimezone(zone).isoformat(timespec="seconds")
