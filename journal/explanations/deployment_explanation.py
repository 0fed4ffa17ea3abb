"""Explanation of a workflow's deployment: why it is awake, asleep or not deployed, as a pure function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import TYPE_CHECKING, Final
from zoneinfo import ZoneInfoNotFoundError

from msgspec import Struct

from journal.explanations import deployment_blockers
from journal.explanations.blockers import Blocker, BlockerCode, NextEvent, SuggestedRequest
from journal.explanations.run_explanation import workflow_paused
from models import lifecycle_policy
from models.deployment import DeploymentStatus, is_desired, status_of
from models.lifecycle_policy import LifecycleAction, LifecycleReason, StoppedReason
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from datetime import datetime

    from journal.deployments.activity import DeploymentActivity
    from journal.explanations.run_facts import LastDecision
    from models.lifecycle_policy import LifecycleVerdict
    from models.workflow import Workflow

REASON_TEXTS: Final[Mapping[LifecycleReason, str]] = {
    LifecycleReason.ALWAYS_ON: "Its policy keeps it running",
    LifecycleReason.WINDOW_OPEN: "A window of its schedule is open",
    LifecycleReason.RUN_DUE: "A run is due and starts it",
    LifecycleReason.IDLE: "It has been idle for the time of its policy, and stops",
    LifecycleReason.NO_MORE_RUNS: "It has no more runs, and stops",
    LifecycleReason.WINDOW_CLOSED: "No window of its schedule is open",
    LifecycleReason.DRAINED: "Its last run has ended, and it stops",
    LifecycleReason.DRAIN_TIME_OVER: "The time for its last runs is over, and it stops",
    LifecycleReason.BY_HAND: "A user has started or stopped it",
    LifecycleReason.DEPLOYED: "It was deployed",
    LifecycleReason.UNDEPLOYED: "It was undeployed",
    LifecycleReason.NOT_DEPLOYED: "It is not deployed: workers run its executions",
    LifecycleReason.IN_USE: "It has runs, or starts",
    LifecycleReason.NOT_IDLE_YET: "It was used within the time of its policy",
    LifecycleReason.STARTED_BY_HAND: "A user has started it outside its window",
    LifecycleReason.KEPT_AWAKE: "A user keeps it awake",
    LifecycleReason.STOPPED_BY_HAND: "A user has stopped it",
    LifecycleReason.DRAINING: "It waits for its last runs, and stops then",
    LifecycleReason.ASLEEP: "It is asleep: a trigger starts it, and POST /execute uses the shared workers",
    LifecycleReason.FAILED: "Its pods could not start",
}
"""Text of each reason of a lifecycle decision."""
_TIMED: Final = frozenset(
    {
        LifecycleReason.WINDOW_OPEN,
        LifecycleReason.WINDOW_CLOSED,
        LifecycleReason.STARTED_BY_HAND,
        LifecycleReason.KEPT_AWAKE,
    }
)
"""Reasons that hold until a time that is known."""


class DeploymentExplanation(Struct, frozen=True):
    """Reason for the state of a deployment."""

    status: DeploymentStatus
    reason: LifecycleReason
    message: str
    stopped_reason: StoppedReason | None
    blockers: Sequence[Blocker]
    """Reasons why a run could not start now; an asleep deployment that a run may wake has none."""
    next: NextEvent | None


def explain_deployment(
    workflow: Workflow, seen: DeploymentActivity | None, last: LastDecision | None
) -> DeploymentExplanation:
    """Explain status, reason, blockers and next event of a workflow's deployment, as of the time when `seen` was read.

    `seen` is None for a workflow that was never deployed; `last` is the last decision about it. Being asleep is no
    blocker: a trigger starts it.
    """
    paused = [workflow_paused(workflow.id, since=None)] if workflow.status == WorkflowStatus.PAUSED else []
    status = status_of(seen.deployment if seen is not None else None)
    if seen is None or not seen.deployment.is_deployed:
        reason = LifecycleReason.NOT_DEPLOYED
        return DeploymentExplanation(status, reason, REASON_TEXTS[reason], None, paused, None)
    decision = _decide(seen)
    blocker = deployment_blockers.find_blocker(seen, last, seen.now, since=None)
    if blocker is not None and blocker.code is BlockerCode.WAKING and not is_desired(seen.deployment):
        blocker = None  # a trigger starts it: being asleep is no reason that keeps a run waiting
    return DeploymentExplanation(
        status,
        decision.reason,
        _describe(decision, seen),
        StoppedReason(seen.deployment.stopped_reason) if seen.deployment.stopped_reason else None,
        [*paused, *([blocker] if blocker is not None else [])],
        _next_event(seen),
    )


def _decide(seen: DeploymentActivity) -> LifecycleVerdict:
    """Return the decision of the policy now; in an unknown time zone it is no action, because of a closed window."""
    try:
        return lifecycle_policy.decide(seen.policy, seen.situation, seen.now)
    except ZoneInfoNotFoundError:
        return lifecycle_policy.LifecycleVerdict(LifecycleAction.NONE, LifecycleReason.WINDOW_CLOSED)


def _describe(decision: LifecycleVerdict, seen: DeploymentActivity) -> str:
    """Return the reason of a decision as a sentence, with the time until which it holds, if that is certain."""
    since, until = seen.situation.last_activity_at, decision.check_at
    if decision.reason is LifecycleReason.NOT_IDLE_YET and since is not None and until is not None:
        times = [_show_time(at, seen.now) for at in (since, until)]
        return f"Idle since {times[0]}; stops {times[1]} UTC unless a request comes"
    text = REASON_TEXTS[decision.reason]
    if decision.reason in _TIMED and until is not None:
        return f"{text}, until {_show_time(until, seen.now)} UTC"
    return text


def _show_time(at: datetime, now: datetime) -> str:
    """Return a time in UTC, such as `14:32` for a time of today, and with its date for another day."""
    shown = at.astimezone(UTC)
    is_today = shown.date() == now.astimezone(UTC).date()
    return f"{shown:%H:%M}" if is_today else f"{shown:%Y-%m-%d %H:%M}"


def _next_event(seen: DeploymentActivity) -> NextEvent | None:
    try:
        transition = lifecycle_policy.next_transition(seen.policy, seen.situation, seen.now)
    except ZoneInfoNotFoundError:
        return None
    return None if transition is None else NextEvent(transition.kind.value, transition.at)


def suggest_requests(workflow_id: str, status: DeploymentStatus) -> Sequence[SuggestedRequest]:
    """Return the request that changes a deployment in this status: `deploy`, `start` or `stop`; none for
    other statuses.
    """
    names = {
        DeploymentStatus.NOT_DEPLOYED: "deploy",
        DeploymentStatus.STOPPED: "start",
        DeploymentStatus.FAILED: "start",
        DeploymentStatus.RUNNING: "stop",
    }
    name = names.get(status)
    if name is None:
        return ()
    path = f"/api/v1/workflows/{workflow_id}/{name}"
    return [SuggestedRequest("POST", path, deployment_blockers.WRITE_SCOPE)]
