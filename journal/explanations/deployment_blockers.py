"""Blockers of runs that wait for the pods of their workflow, by the rules of wakes and lifecycle."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Final
from zoneinfo import ZoneInfoNotFoundError

from journal.explanations.blockers import Blocker, BlockerCode, BlockerKind, SuggestedRequest
from models import lifecycle_policy, timestamps
from models.deployment import DeploymentStatus, blocked_reason, is_desired, is_ready, status_of
from models.lifecycle_policy import LifecycleAction, LifecycleReason, StartRefusalCode

if TYPE_CHECKING:
    from journal.deployments.activity import DeploymentActivity
    from journal.explanations.run_facts import LastDecision

WRITE_SCOPE: Final = "workflows:write"
_STARTS: Final = frozenset({LifecycleAction.START, LifecycleAction.WAKE})


def find_blocker(
    seen: DeploymentActivity | None, last: LastDecision | None, now: datetime, *, since: datetime | None
) -> Blocker | None:
    """Return the reason why no pod of a deployment claims a run; None if pods are ready.

    `seen` is None for a workflow that was never deployed, `last` its last decision. `since` is the time from
    which the run could be claimed. In an unknown time zone, the reason is a closed window.
    """
    if seen is None or not seen.deployment.is_deployed:
        return Blocker(
            BlockerCode.DRAINING,
            "The workflow is no longer deployed; its runs pass to the workers within two seconds",
            since,
        )
    deployment = seen.deployment
    if is_ready(deployment):
        return None
    if is_desired(deployment):
        return _starting_blocker(seen, last, now, since)
    try:
        refusal = lifecycle_policy.start_refusal(seen.policy, seen.situation, now)
        decision = lifecycle_policy.decide(seen.policy, seen.situation, now)
    except ZoneInfoNotFoundError as error:
        return Blocker(
            BlockerCode.WINDOW_CLOSED,
            f"The time zone of its schedule is unknown: {error}",
            since,
            kind=BlockerKind.CHANGE,
            details={"opensAt": None},
        )
    if refusal is not None:
        return _refusal_blocker(seen, refusal.code, refusal.opens_at, since)
    if decision.reason is LifecycleReason.FAILED:
        return _explain_failure(seen, since, decision.check_at)
    if deployment.drain_until is not None and decision.action not in _STARTS:
        return Blocker(
            BlockerCode.DRAINING,
            "The deployment stops after its present runs, and is started again for this one",
            deployment.stopped_at or since,
            until=deployment.drain_until,
        )
    return Blocker(
        BlockerCode.WAKING,
        "The deployment is stopped; the next sweep starts it for the run",
        since,
        actions=[_request(seen, "POST", "start")],
        details={
            "phase": "decide",
            "elapsed": _compute_elapsed_seconds(since, now),
            "deadline": None,
            "podReason": None,
        },
    )


def _starting_blocker(
    seen: DeploymentActivity, last: LastDecision | None, now: datetime, since: datetime | None
) -> Blocker:
    """Return the blocker of a deployment that should have pods and has none that claims runs: they failed, or
    they start.
    """
    deployment = seen.deployment
    if status_of(deployment) is DeploymentStatus.FAILED:
        return _explain_failure(seen, since, None)
    started_at = last.at if last is not None and last.action in _STARTS else None
    begun_at = max(filter(None, (started_at, since)), default=None)
    is_applied = deployment.observed_generation == deployment.generation
    blocked = blocked_reason(deployment)
    reason = deployment.observed_reason_code if is_applied else None
    text = blocked or (deployment.observed_reason if is_applied else None) or "Its pods start"
    return Blocker(
        BlockerCode.WAKING,
        text,
        begun_at,
        kind=BlockerKind.ESCALATE if blocked else None,
        actions=[
            SuggestedRequest("GET", f"/api/v1/workflows/{deployment.workflow_id}/logs", "workflows:read")
        ],
        details={
            "phase": "start" if is_applied else "schedule",
            "elapsed": _compute_elapsed_seconds(begun_at, now),
            "deadline": moment_text(deployment.start_deadline_at if is_applied else None),
            "podReason": reason,
        },
    )


def _refusal_blocker(
    seen: DeploymentActivity, code: StartRefusalCode, opens_at: datetime | None, since: datetime | None
) -> Blocker:
    """Return the blocker of a deployment that its policy, a user or its archived workflow keeps from starting;
    `opens_at` is the next opening of its window.
    """
    start = _request(seen, "POST", "start")
    match code:
        case StartRefusalCode.OUTSIDE_WINDOW:
            return Blocker(
                BlockerCode.WINDOW_CLOSED,
                "The lifecycle policy keeps the workflow stopped until its next window",
                since,
                until=opens_at,
                actions=[start, _request(seen, "PUT", "lifecycle")],
                details={"opensAt": moment_text(opens_at)},
            )
        case StartRefusalCode.STOPPED_MANUALLY:
            return Blocker(
                BlockerCode.STOPPED_MANUALLY,
                "A user has stopped the workflow",
                seen.deployment.stopped_at or since,
                actions=[start],
            )
        case StartRefusalCode.NOT_DEPLOYED:
            return Blocker(
                BlockerCode.STOPPED_MANUALLY,
                "The workflow is archived, and its deployment is not started any more",
                seen.deployment.stopped_at or since,
                actions=[_request(seen, "PUT", "status")],
            )


def _explain_failure(seen: DeploymentActivity, since: datetime | None, again_at: datetime | None) -> Blocker:
    """Return the blocker for pods that can't start, with the reason and the time of the next attempt, `again_at`."""
    deployment = seen.deployment
    reason = deployment.failed_reason or deployment.observed_reason
    return Blocker(
        BlockerCode.DEPLOYMENT_FAILED,
        reason or "The pods of the workflow can't start",
        deployment.stopped_at or deployment.observed_at or since,
        until=again_at,
        actions=[_request(seen, "POST", "start"), _request(seen, "POST", "deploy")],
        details={
            "podReason": deployment.failed_reason_code or deployment.observed_reason_code,
            "failures": deployment.start_failures,
        },
    )


def _request(seen: DeploymentActivity, method: str, name: str) -> SuggestedRequest:
    return SuggestedRequest(method, f"/api/v1/workflows/{seen.deployment.workflow_id}/{name}", WRITE_SCOPE)


def _compute_elapsed_seconds(since: datetime | None, now: datetime) -> float | None:
    return None if since is None else max((now - since).total_seconds(), 0.0)


def moment_text(moment: datetime | None) -> str | None:
    """Format a time by ISO 8601 as the API shows it; None stays None."""
    return None if moment is None else timestamps.format_timestamp(moment)
