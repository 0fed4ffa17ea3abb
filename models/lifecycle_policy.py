"""Lifecycle policies of deployments: pure rules for the times at which a deployment has pods.

Each rule depends on the current state, never on past events. So a late, repeated or restarted evaluation
gives the decision that is right at its time.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final, TypeAlias

from msgspec import Struct
from msgspec.structs import asdict

from models import timestamps, weekly_windows
from models.weekly_windows import WindowSchedule

IDLE_MINUTES_MIN: Final = 5
IDLE_MINUTES_MAX: Final = 1_440
IDLE_MINUTES_DEFAULT: Final = 30
ON_DEMAND_TIME: Final = timedelta(seconds=60)
"""Time for which an on-demand deployment stays up after its last run."""
DRAIN_TIME: Final = timedelta(seconds=60)
"""Time for which runs in progress may continue before a stop releases them."""
RETRY_TIME: Final = timedelta(seconds=60)
"""Pause after a failed start, unless a user starts the deployment; doubled by each failure."""
MAX_RETRY_TIME: Final = timedelta(minutes=30)


class PolicyType(StrEnum):
    """Type of a policy in the API."""

    ALWAYS_ON = "always-on"
    IDLE_SHUTDOWN = "idle-shutdown"
    ON_DEMAND = "on-demand"
    SCHEDULED_WINDOW = "scheduled-window"


class AlwaysOnPolicy(Struct, frozen=True):
    """Policy that keeps a deployment up unless a user stops it."""


class IdleShutdownPolicy(Struct, frozen=True):
    """Policy that stops a deployment after a time without activity, and starts it for runs."""

    idle_timeout_minutes: float = IDLE_MINUTES_DEFAULT


class OnDemandPolicy(Struct, frozen=True):
    """Policy that stops a deployment soon after its last run, and starts it for runs."""


class ScheduledWindowPolicy(Struct, frozen=True):
    """Policy that keeps a deployment up while a schedule is open."""

    schedule: WindowSchedule


DeploymentPolicy: TypeAlias = AlwaysOnPolicy | IdleShutdownPolicy | OnDemandPolicy | ScheduledWindowPolicy

DEFAULT_POLICY: Final[Mapping[str, Any]] = {
    "type": PolicyType.IDLE_SHUTDOWN.value,
    "idleTimeoutMinutes": IDLE_MINUTES_DEFAULT,
}
"""Stored form of the policy of a workflow without one."""


class StoppedReason(StrEnum):
    """Reason why a deployment is down."""

    MANUAL = "manual"
    IDLE = "idle"
    ON_DEMAND = "on-demand"
    SCHEDULE = "schedule"
    FAILED = "failed"
    ARCHIVED = "archived"


class LifecycleAction(StrEnum):
    """Action on a deployment."""

    NONE = "none"
    START = "start"
    """Start for the policy or a user; ends draining."""
    WAKE = "wake"
    """Start for a run."""
    DRAIN = "drain"
    """Claim no further runs, and give runs in progress time to end."""
    STOP = "stop"


class LifecycleReason(StrEnum):
    """Reason for an action or for none."""

    ALWAYS_ON = "always-on"
    WINDOW_OPEN = "window-open"
    RUN_DUE = "run-due"
    IDLE = "idle"
    NO_MORE_RUNS = "no-more-runs"
    WINDOW_CLOSED = "window-closed"
    DRAINED = "drained"
    DRAIN_TIME_OVER = "drain-time-over"
    BY_HAND = "by-hand"
    DEPLOYED = "deployed"
    UNDEPLOYED = "undeployed"
    NOT_DEPLOYED = "not-deployed"
    IN_USE = "in-use"
    NOT_IDLE_YET = "not-idle-yet"
    STARTED_BY_HAND = "started-by-hand"
    KEPT_AWAKE = "kept-awake"
    STOPPED_BY_HAND = "stopped-by-hand"
    DRAINING = "draining"
    ASLEEP = "asleep"
    FAILED = "failed"


class DeploymentSituation(Struct, frozen=True):
    """State of a deployment on which decisions depend."""

    is_deployed: bool
    is_up: bool
    """Whether it is desired to have pods, ready or not."""
    drain_until: datetime | None = None
    """End of draining, until which its runs may continue. A draining deployment counts as up."""
    stopped_reason: StoppedReason | None = None
    stopped_at: datetime | None = None
    """Time of the stop, or of the begin of draining."""
    started_by_hand_at: datetime | None = None
    """Time of a start by a user; None after a start by a rule."""
    kept_awake_until: datetime | None = None
    """Time until which a user keeps it awake; None or a past time: nobody does."""
    last_activity_at: datetime | None = None
    """Time of the last delivery, end of a run, or start."""
    is_waking: bool = False
    """Whether it is desired to be up and isn't ready."""
    start_failures: int = 0
    """Consecutive failed starts without a ready pod in between."""
    has_due: bool = False
    """Whether runs of it could be claimed now; waiting and deferred runs don't count."""
    has_running: bool = False


class LifecycleVerdict(Struct, frozen=True):
    """Action with its reason."""

    action: LifecycleAction
    reason: LifecycleReason
    stopped_reason: StoppedReason | None = None
    """Reason that a stop or drain stores."""
    check_at: datetime | None = None
    """Time at which the decision changes without an event; None: only an event changes it."""


class StartRefusalCode(StrEnum):
    """Reason why a deployment may not be started for a run."""

    NOT_DEPLOYED = "not-deployed"
    OUTSIDE_WINDOW = "outside-window"
    STOPPED_MANUALLY = "stopped-manually"


class StartRefusal(Struct, frozen=True):
    """Refusal of a start: the run is refused, or deferred if no caller waits for it."""

    code: StartRefusalCode
    opens_at: datetime | None = None
    """Earliest time of the run; None: after somebody starts or deploys the workflow."""


class TransitionKind(StrEnum):
    """Direction of a transition."""

    START = "start"
    STOP = "stop"


class LifecycleTransition(Struct, frozen=True):
    """Next start or stop of a deployment without further events."""

    kind: TransitionKind
    at: datetime


# ── stored form ─────────────────────────────────────────────────────────────────────────────────────────────


def effective_policy(stored: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the stored lifecycle policy of a workflow; the default one for None."""
    return DEFAULT_POLICY if stored is None else stored


def parse_policy(stored: Mapping[str, Any]) -> DeploymentPolicy:
    """Parse a stored policy, which must be valid.

    It has `type`, and `idleTimeoutMinutes` or `schedule` with `timezone` and `windows` of `days`, `startTime` and
    `endTime`.
    """
    match PolicyType(stored["type"]):
        case PolicyType.ALWAYS_ON:
            return AlwaysOnPolicy()
        case PolicyType.IDLE_SHUTDOWN:
            return IdleShutdownPolicy(stored["idleTimeoutMinutes"])
        case PolicyType.ON_DEMAND:
            return OnDemandPolicy()
        case PolicyType.SCHEDULED_WINDOW:
            schedule = stored["schedule"]
            found = (
                weekly_windows.parse_window(one["days"], one["startTime"], one["endTime"])
                for one in schedule["windows"]
            )
            return ScheduledWindowPolicy(WindowSchedule(schedule["timezone"], tuple(found)))


# ── decisions ───────────────────────────────────────────────────────────────────────────────────────────────


def decide(policy: DeploymentPolicy, situation: DeploymentSituation, now: datetime) -> LifecycleVerdict:
    """Return the decision of a policy about a deployment at `now`: the action, its reason, and the time to decide
    again, None if only other facts can change the decision.

    It depends on its arguments alone. Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
    if not situation.is_deployed:
        return LifecycleVerdict(LifecycleAction.NONE, LifecycleReason.NOT_DEPLOYED)
    if situation.drain_until is not None:
        return _decide_while_draining(policy, situation, situation.drain_until, now)
    if situation.is_up:
        return _keep_awake(_decide_while_up(policy, situation, now), situation, now)
    return _decide_while_down(policy, situation, now)


def retry_pause(start_failures: int) -> timedelta:
    """Return the pause after this many consecutive failed starts: one minute, doubled each time up to 30 minutes."""
    doublings = min(max(start_failures - 1, 0), 16)
    return min(RETRY_TIME * (1 << doublings), MAX_RETRY_TIME)


def start_refusal(
    policy: DeploymentPolicy, situation: DeploymentSituation, now: datetime
) -> StartRefusal | None:
    """Return the reason why a deployment can't serve a run now; None if it is up, or may be started for the run.

    For a closed window, the refusal has its next opening. Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
    if not situation.is_deployed or situation.stopped_reason is StoppedReason.ARCHIVED:
        return StartRefusal(StartRefusalCode.NOT_DEPLOYED)
    if situation.is_up and situation.drain_until is None:
        return None
    match policy:
        case AlwaysOnPolicy() if situation.stopped_reason is StoppedReason.MANUAL:
            return StartRefusal(StartRefusalCode.STOPPED_MANUALLY)
        case ScheduledWindowPolicy(schedule) if not (
            weekly_windows.is_open(schedule, now) or _is_kept_awake(situation, now)
        ):
            return StartRefusal(StartRefusalCode.OUTSIDE_WINDOW, weekly_windows.next_opening(schedule, now))
        case _:
            return None


def stop_decision(
    situation: DeploymentSituation, reason: LifecycleReason, stopped_reason: StoppedReason
) -> LifecycleVerdict:
    """Return the verdict that stops a deployment: a drain if it is up with runs in progress, else a stop at once.

    `reason` explains the decision; `stopped_reason` is stored in the deployment.
    """
    action = LifecycleAction.DRAIN if situation.is_up and situation.has_running else LifecycleAction.STOP
    return LifecycleVerdict(action, reason, stopped_reason)


def next_transition(
    policy: DeploymentPolicy, situation: DeploymentSituation, now: datetime
) -> LifecycleTransition | None:
    """Return the next start or stop of a deployment if nothing but the clock changes; a due transition is at `now`.

    None if there is none. Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
    decision = decide(policy, situation, now)
    match decision.action:
        case LifecycleAction.START | LifecycleAction.WAKE:
            return LifecycleTransition(TransitionKind.START, now)
        case LifecycleAction.DRAIN | LifecycleAction.STOP:
            return LifecycleTransition(TransitionKind.STOP, now)
        case LifecycleAction.NONE if decision.check_at is not None:
            kind = TransitionKind.STOP if situation.is_up else TransitionKind.START
            return LifecycleTransition(kind, decision.check_at)
        case _:
            return None


def decision_inputs(situation: DeploymentSituation, now: datetime) -> dict[str, Any]:
    """Return the inputs of `decide`, the situation and `now`, as a JSON object with names in camel case, to be stored
    with the decision.
    """
    facts = {"now": now, **asdict(situation)}
    return {
        _to_camel_case(name): timestamps.format_timestamp(value) if isinstance(value, datetime) else value
        for name, value in facts.items()
    }


def _decide_while_up(
    policy: DeploymentPolicy, situation: DeploymentSituation, now: datetime
) -> LifecycleVerdict:
    """Return the decision about a deployment that is up, by its policy.

    Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
    match policy:
        case AlwaysOnPolicy():
            return LifecycleVerdict(LifecycleAction.NONE, LifecycleReason.ALWAYS_ON)
        case IdleShutdownPolicy(minutes):
            stop = LifecycleVerdict(LifecycleAction.STOP, LifecycleReason.IDLE, StoppedReason.IDLE)
            return _stop_unless_in_use(stop, situation, timedelta(minutes=minutes), now)
        case OnDemandPolicy():
            stop = LifecycleVerdict(
                LifecycleAction.STOP, LifecycleReason.NO_MORE_RUNS, StoppedReason.ON_DEMAND
            )
            return _stop_unless_in_use(stop, situation, ON_DEMAND_TIME, now)
        case ScheduledWindowPolicy(schedule):
            return _stop_unless_open(schedule, situation, now)


def _is_kept_awake(situation: DeploymentSituation, now: datetime) -> bool:
    return situation.kept_awake_until is not None and situation.kept_awake_until > now


def _keep_awake(verdict: LifecycleVerdict, situation: DeploymentSituation, now: datetime) -> LifecycleVerdict:
    """Return `verdict`; or if it stops a deployment, or is to be checked, before the end of the time for which a user
    keeps it awake, no action until then.
    """
    until = situation.kept_awake_until
    if until is None or until <= now:
        return verdict
    stops_before = verdict.check_at is not None and verdict.check_at < until
    if verdict.action is LifecycleAction.NONE and not stops_before:
        return verdict
    return LifecycleVerdict(LifecycleAction.NONE, LifecycleReason.KEPT_AWAKE, check_at=until)


def _stop_unless_in_use(
    stop: LifecycleVerdict, situation: DeploymentSituation, timeout: timedelta, now: datetime
) -> LifecycleVerdict:
    """Return `stop` once a deployment has been idle for `timeout`, counted from its last activity.

    Before, return no action with that time as the time to check again; without one while a run is due or in progress,
    or pods start.
    """
    if situation.has_due or situation.has_running or situation.is_waking:
        return LifecycleVerdict(LifecycleAction.NONE, LifecycleReason.IN_USE)
    idle_at = (situation.last_activity_at or now) + timeout
    return (
        stop
        if now >= idle_at
        else LifecycleVerdict(LifecycleAction.NONE, LifecycleReason.NOT_IDLE_YET, check_at=idle_at)
    )


def _stop_unless_open(
    schedule: WindowSchedule, situation: DeploymentSituation, now: datetime
) -> LifecycleVerdict:
    """Return a stop (or drain) while the schedule is closed; after a start by a user, only from the next closing on.

    Otherwise return no action, with the time of the next closing as the time to check again. Raises
    `ZoneInfoNotFoundError` for an unknown time zone.
    """
    if weekly_windows.is_open(schedule, now):
        closes_at = weekly_windows.next_closing(schedule, now)
        return LifecycleVerdict(LifecycleAction.NONE, LifecycleReason.WINDOW_OPEN, check_at=closes_at)
    started_at = situation.started_by_hand_at
    if started_at is not None:
        closes_at = weekly_windows.next_closing(schedule, started_at)
        if closes_at is not None and closes_at > now:
            return LifecycleVerdict(LifecycleAction.NONE, LifecycleReason.STARTED_BY_HAND, check_at=closes_at)
    return stop_decision(situation, LifecycleReason.WINDOW_CLOSED, StoppedReason.SCHEDULE)


def _decide_while_draining(
    policy: DeploymentPolicy, situation: DeploymentSituation, until: datetime, now: datetime
) -> LifecycleVerdict:
    """Return the decision about a draining deployment: start it again; stop it if no run is in progress or the drain
    has lasted until `until`; else wait.

    Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
    again = _decide_while_down(policy, situation, now)
    if again.action is not LifecycleAction.NONE:
        return again
    if not situation.has_running:
        return LifecycleVerdict(LifecycleAction.STOP, LifecycleReason.DRAINED, situation.stopped_reason)
    if now >= until:
        return LifecycleVerdict(
            LifecycleAction.STOP, LifecycleReason.DRAIN_TIME_OVER, situation.stopped_reason
        )
    return LifecycleVerdict(LifecycleAction.NONE, LifecycleReason.DRAINING, check_at=until)


def _decide_while_down(
    policy: DeploymentPolicy, situation: DeploymentSituation, now: datetime
) -> LifecycleVerdict:
    """Return the decision about a deployment that is down or drains: start it for its policy, wake it for a due run, or
    no action.

    After a failed start, no action before the time of the next retry. With no action, that time (if pods are wanted),
    or the next opening of the windows, is the time to check again; there is none without windows and for an archived
    workflow. Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
    if situation.stopped_reason is StoppedReason.ARCHIVED:
        return LifecycleVerdict(LifecycleAction.NONE, LifecycleReason.NOT_DEPLOYED)
    if situation.stopped_reason is StoppedReason.FAILED:
        retry_at = (situation.stopped_at or now) + retry_pause(situation.start_failures)
        if now < retry_at:
            is_wanted = situation.has_due or _start_reason(policy, situation, now) is not None
            return LifecycleVerdict(
                LifecycleAction.NONE, LifecycleReason.FAILED, check_at=retry_at if is_wanted else None
            )
    if (reason := _start_reason(policy, situation, now)) is not None:
        return LifecycleVerdict(LifecycleAction.START, reason)
    if situation.has_due and start_refusal(policy, situation, now) is None:
        return LifecycleVerdict(LifecycleAction.WAKE, LifecycleReason.RUN_DUE)
    opens_at = (
        weekly_windows.next_opening(policy.schedule, now)
        if isinstance(policy, ScheduledWindowPolicy)
        else None
    )
    return LifecycleVerdict(LifecycleAction.NONE, _explain_stop(policy, situation, now), check_at=opens_at)


def _start_reason(
    policy: DeploymentPolicy, situation: DeploymentSituation, now: datetime
) -> LifecycleReason | None:
    """Return the reason, other than a due run, why a deployment should be up now; None if there is none.

    Unless a user keeps it awake, a stop by a user holds until the next opening of the windows, or under an always-on
    policy until a start. Raises `ZoneInfoNotFoundError` for an unknown time zone.
    """
    if _is_kept_awake(situation, now):
        return LifecycleReason.KEPT_AWAKE
    is_by_hand = situation.stopped_reason is StoppedReason.MANUAL
    match policy:
        case AlwaysOnPolicy() if not is_by_hand:
            return LifecycleReason.ALWAYS_ON
        case ScheduledWindowPolicy(schedule) if weekly_windows.is_open(schedule, now):
            # A stop by a user holds until the next opening after it.
            if is_by_hand and not _has_opened(schedule, situation.stopped_at or now, now):
                return None
            return LifecycleReason.WINDOW_OPEN
        case _:
            return None


def _has_opened(schedule: WindowSchedule, since: datetime, now: datetime) -> bool:
    opened_at = weekly_windows.next_opening(schedule, since)
    return opened_at is not None and opened_at <= now


def _explain_stop(policy: DeploymentPolicy, situation: DeploymentSituation, now: datetime) -> LifecycleReason:
    if isinstance(policy, ScheduledWindowPolicy) and not weekly_windows.is_open(policy.schedule, now):
        return LifecycleReason.WINDOW_CLOSED
    is_by_hand = situation.stopped_reason is StoppedReason.MANUAL
    return LifecycleReason.STOPPED_BY_HAND if is_by_hand else LifecycleReason.ASLEEP


def _to_camel_case(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(map(str.capitalize, rest))
