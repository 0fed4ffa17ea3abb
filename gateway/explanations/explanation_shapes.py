"""API shapes of explanations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from journal.explanations.blockers import BlockerCode, BlockerKind

if TYPE_CHECKING:
    from datetime import timedelta

    from journal.explanations.blockers import Blocker, NextEvent
    from journal.explanations.run_timing import PathStep, TimeSpent
    from journal.explanations.run_wake import RunWake
    from models.blocked_interval import BlockedInterval


class HolderShape(WireStruct):
    """Owner of the thing that a run waits for."""

    type: str
    """`execution` or `worker`."""
    id: str | None
    """Null if the caller may not see it."""
    since: Instant | None


class EstimateShape(WireStruct):
    """Estimated end of a wait."""

    at: Instant
    basis: str
    """Values that the estimate comes from, such as `p50 of 40 runs`."""


class SuggestedRequestShape(WireStruct):
    """Request that ends or shortens a wait."""

    method: str
    path: str
    scope: str
    """Scope that the key needs."""


class BlockerShape(WireStruct):
    """Reason why something does not move."""

    code: BlockerCode
    message: str
    since: Instant | None
    until: Instant | None
    """Time at which it ends by itself; null if that is unknown."""
    by: Sequence[HolderShape]
    position: int | None
    """Place in the queue, from 1; null where there is no queue."""
    estimate: EstimateShape | None
    kind: BlockerKind
    """Remedy: `wait`, a `change` by a user, or `escalate` to an operator of the server."""
    actions: Sequence[SuggestedRequestShape]
    details: Mapping[str, Any]
    """Facts of this code, such as `podReason` or `requestId`."""


class NextEventShape(WireStruct):
    """Next event at a known time."""

    event: str
    at: Instant


class BlockedIntervalShape(WireStruct, rename={"from_": "from", "node_id": "nodeId"}):
    """Past reason of a run."""

    code: str
    node_id: str | None
    from_: Instant
    to: Instant | None


class WakeShape(WireStruct):
    """Wake of the pods before the first node of a run; null for times that are not recorded."""

    accepted_at: Instant
    asleep_since: Instant | None
    """Last stop of the pods before the wake."""
    decided_at: Instant | None
    """Decision to start pods; before `acceptedAt` if an earlier run had woken them already."""
    reason: str | None
    """Reason of the decision, as in `GET /workflows/{id}/lifecycle/decisions`."""
    pod_started_at: Instant | None
    """Start of the process in the pod, by the clock of its machine."""
    claimed_at: Instant
    first_node_at: Instant | None


class TimingShape(WireStruct):
    """Seconds of a run by cause, from its acceptance to its end or now; they sum up to its age."""

    queued: float
    waking: float
    """Start of its pods."""
    running: float
    waiting_for: Mapping[str, float]
    """By code of the blocker."""


class PathStepShape(WireStruct):
    """Node on the critical path."""

    node_id: str
    node_label: str
    started_at: Instant
    ended_at: Instant
    seconds: float


def show_blocker(blocker: Blocker) -> BlockerShape:
    """Return a blocker (a reason why a run does not move) as the API shows it."""
    estimate = blocker.estimate
    return BlockerShape(
        code=blocker.code,
        message=blocker.message,
        since=optional_instant(blocker.since),
        until=optional_instant(blocker.until),
        by=[
            HolderShape(type=holder.type, id=holder.id, since=optional_instant(holder.since))
            for holder in blocker.by
        ],
        position=blocker.position,
        estimate=EstimateShape(at=instant(estimate.at), basis=estimate.basis) if estimate else None,
        kind=blocker.effective_kind,
        actions=[
            SuggestedRequestShape(method=one.method, path=one.path, scope=one.scope)
            for one in blocker.actions
        ],
        details=blocker.details,
    )


def show_next(event: NextEvent | None) -> NextEventShape | None:
    """Return the next event that can let a run continue as the API shows it; None stays None."""
    return None if event is None else NextEventShape(event=event.event, at=instant(event.at))


def show_interval(interval: BlockedInterval) -> BlockedIntervalShape:
    """Return a past interval in which a run was blocked as the API shows it; `to` is None while it lasts."""
    return BlockedIntervalShape(
        code=interval.code,
        node_id=interval.node_id,
        from_=instant(interval.started_at),
        to=optional_instant(interval.ended_at),
    )


def show_timing(spent: TimeSpent) -> TimingShape:
    """Return the time of a run as the API shows it: seconds in the queue, waking, running and waiting by reason.

    Waking is the start of its pods.
    """
    return TimingShape(
        queued=_to_seconds(spent.queued),
        waking=_to_seconds(spent.waking),
        running=_to_seconds(spent.running),
        waiting_for={code: _to_seconds(time) for code, time in spent.waiting_for.items()},
    )


def show_wake(wake: RunWake) -> WakeShape:
    """Return the start of pods for which a run waited as the API shows it; times that were not recorded are None."""
    return WakeShape(
        accepted_at=instant(wake.accepted_at),
        asleep_since=optional_instant(wake.asleep_since),
        decided_at=optional_instant(wake.decided_at),
        reason=wake.reason,
        pod_started_at=optional_instant(wake.pod_started_at),
        claimed_at=instant(wake.claimed_at),
        first_node_at=optional_instant(wake.first_node_at),
    )


def show_step(step: PathStep) -> PathStepShape:
    """Return a node on the critical path in API form, with its duration in seconds."""
    return PathStepShape(
        node_id=step.node_id,
        node_label=step.label,
        started_at=instant(step.started_at),
        ended_at=instant(step.ended_at),
        seconds=_to_seconds(step.ended_at - step.started_at),
    )


def _to_seconds(time: timedelta) -> float:
    return round(time.total_seconds(), 6)
