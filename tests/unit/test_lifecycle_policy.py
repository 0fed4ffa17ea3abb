"""Decisions about deployments, case by case."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from models import lifecycle_policy, weekly_windows
from models.lifecycle_policy import (
    AlwaysOnPolicy,
    DeploymentPolicy,
    DeploymentSituation,
    IdleShutdownPolicy,
    LifecycleAction,
    LifecycleReason,
    LifecycleTransition,
    LifecycleVerdict,
    OnDemandPolicy,
    ScheduledWindowPolicy,
    StartRefusalCode,
    StoppedReason,
    TransitionKind,
    decide,
    start_refusal,
)
from models.weekly_windows import WindowSchedule

NONE, START, WAKE = LifecycleAction.NONE, LifecycleAction.START, LifecycleAction.WAKE
DRAIN, STOP = LifecycleAction.DRAIN, LifecycleAction.STOP
MONDAY = datetime(2026, 1, 5, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
INSIDE, OUTSIDE = MONDAY + 12 * HOUR, MONDAY + 20 * HOUR
OPENING, CLOSING = MONDAY + 33 * HOUR, MONDAY + 41 * HOUR
"""Of the day after."""
OFFICE_HOURS = ScheduledWindowPolicy(
    WindowSchedule("UTC", (weekly_windows.parse_window(range(1, 6), "09:00", "17:00"),))
)
POLICIES: tuple[DeploymentPolicy, ...] = (
    AlwaysOnPolicy(),
    IdleShutdownPolicy(30),
    OnDemandPolicy(),
    OFFICE_HOURS,
)


def situation_up(**changes: Any) -> DeploymentSituation:  # noqa: ANN401 - any field of a situation
    return DeploymentSituation(is_deployed=True, is_up=True, last_activity_at=MONDAY, **changes)


def situation_down(
    reason: StoppedReason,
    stopped_at: datetime = MONDAY,
    **changes: Any,  # noqa: ANN401 - any field of a situation
) -> DeploymentSituation:
    return DeploymentSituation(
        is_deployed=True, is_up=False, stopped_reason=reason, stopped_at=stopped_at, **changes
    )


def decided_action(
    policy: DeploymentPolicy, situation: DeploymentSituation, now: datetime
) -> LifecycleAction:
    return decide(policy, situation, now).action


# ── idle-shutdown and on-demand ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("policy", "timeout", "reason"),
    [
        (IdleShutdownPolicy(30), 30 * MINUTE, StoppedReason.IDLE),
        (IdleShutdownPolicy(2 / 60), timedelta(seconds=2), StoppedReason.IDLE),
        (OnDemandPolicy(), MINUTE, StoppedReason.ON_DEMAND),
    ],
)
def test_a_deployment_stops_when_nothing_happened_for_its_timeout(
    policy: DeploymentPolicy, timeout: timedelta, reason: StoppedReason
) -> None:
    idle_at = MONDAY + timeout
    before = decide(policy, situation_up(), idle_at - timedelta(microseconds=1))
    assert (before.action, before.check_at) == (NONE, idle_at)
    after = decide(policy, situation_up(), idle_at)
    assert (after.action, after.stopped_reason) == (STOP, reason)


@pytest.mark.parametrize("use", ["has_due", "has_running", "is_waking"])
@pytest.mark.parametrize("policy", [IdleShutdownPolicy(30), OnDemandPolicy()])
def test_a_deployment_in_use_is_not_idle_however_long_ago_anything_came(
    policy: DeploymentPolicy, use: str
) -> None:
    assert decide(policy, situation_up(**{use: True}), MONDAY + 90 * HOUR) == LifecycleVerdict(
        NONE, LifecycleReason.IN_USE
    )


@pytest.mark.parametrize("reason", [StoppedReason.IDLE, StoppedReason.ON_DEMAND, StoppedReason.MANUAL])
@pytest.mark.parametrize("policy", [IdleShutdownPolicy(30), OnDemandPolicy()])
def test_a_sleeping_deployment_is_woken_by_a_due_run_and_by_nothing_else(
    policy: DeploymentPolicy, reason: StoppedReason
) -> None:
    asleep = situation_down(reason)
    assert decided_action(policy, asleep, MONDAY + 90 * HOUR) is NONE
    assert decided_action(policy, replace(asleep, has_due=True), MONDAY) is WAKE


# ── always-on ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reason", [StoppedReason.IDLE, StoppedReason.ON_DEMAND, StoppedReason.SCHEDULE])
def test_an_always_on_deployment_that_sleeps_is_started(reason: StoppedReason) -> None:
    assert decided_action(AlwaysOnPolicy(), situation_down(reason), MONDAY) is START
    assert decided_action(AlwaysOnPolicy(), situation_up(), MONDAY + 90 * HOUR) is NONE


def test_an_always_on_deployment_that_somebody_stopped_waits_for_somebody_to_start_it() -> None:
    stopped = situation_down(StoppedReason.MANUAL, has_due=True)
    assert decide(AlwaysOnPolicy(), stopped, MONDAY + 90 * HOUR) == LifecycleVerdict(
        NONE, LifecycleReason.STOPPED_BY_HAND
    )


# ── scheduled-window ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reason", [StoppedReason.IDLE, StoppedReason.ON_DEMAND, StoppedReason.SCHEDULE])
def test_a_deployment_is_started_while_its_window_is_open_whenever_somebody_looks(
    reason: StoppedReason,
) -> None:
    assert decided_action(OFFICE_HOURS, situation_down(reason), INSIDE) is START
    outside = decide(OFFICE_HOURS, situation_down(reason, has_due=True), OUTSIDE)
    assert (outside.action, outside.reason, outside.check_at) == (
        NONE,
        LifecycleReason.WINDOW_CLOSED,
        OPENING,
    )


def test_a_deployment_drains_once_its_window_is_closed_and_stops_at_once_without_runs() -> None:
    assert decide(OFFICE_HOURS, situation_up(has_running=True), OUTSIDE) == LifecycleVerdict(
        DRAIN, LifecycleReason.WINDOW_CLOSED, StoppedReason.SCHEDULE
    )
    assert decided_action(OFFICE_HOURS, situation_up(has_due=True), OUTSIDE) is STOP
    assert decide(OFFICE_HOURS, situation_up(), INSIDE).check_at == MONDAY + 17 * HOUR


def test_a_start_by_hand_outside_the_window_holds_until_the_next_closing() -> None:
    started = situation_up(started_by_hand_at=OUTSIDE)
    held = decide(OFFICE_HOURS, started, OUTSIDE + HOUR)
    assert (held.action, held.check_at) == (NONE, CLOSING)
    assert decided_action(OFFICE_HOURS, started, CLOSING - MINUTE) is NONE
    assert decided_action(OFFICE_HOURS, started, CLOSING) is STOP
    assert decided_action(OFFICE_HOURS, started, CLOSING + 30 * HOUR) is STOP  # no evaluation in between


def test_a_start_by_hand_inside_the_window_ends_with_it() -> None:
    assert decided_action(OFFICE_HOURS, situation_up(started_by_hand_at=INSIDE), MONDAY + 17 * HOUR) is STOP


def test_a_stop_by_hand_inside_the_window_holds_until_the_next_opening_or_a_run() -> None:
    stopped = situation_down(StoppedReason.MANUAL, INSIDE)
    held = decide(OFFICE_HOURS, stopped, INSIDE + HOUR)
    assert (held.action, held.reason, held.check_at) == (NONE, LifecycleReason.STOPPED_BY_HAND, OPENING)
    assert decided_action(OFFICE_HOURS, replace(stopped, has_due=True), INSIDE + HOUR) is WAKE
    assert decided_action(OFFICE_HOURS, replace(stopped, has_due=True), OUTSIDE) is NONE
    assert decided_action(OFFICE_HOURS, stopped, OPENING) is START
    assert decided_action(OFFICE_HOURS, stopped, OPENING + HOUR) is START  # no evaluation in between


# ── draining ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_draining_deployment_stops_when_its_runs_have_ended_or_its_time_is_over() -> None:
    until = OUTSIDE + MINUTE
    drains = situation_up(
        drain_until=until, stopped_reason=StoppedReason.SCHEDULE, stopped_at=OUTSIDE, has_running=True
    )
    held = decide(OFFICE_HOURS, drains, OUTSIDE)
    assert (held.action, held.check_at) == (NONE, until)
    over = LifecycleVerdict(STOP, LifecycleReason.DRAIN_TIME_OVER, StoppedReason.SCHEDULE)
    assert decide(OFFICE_HOURS, drains, until) == over
    assert decided_action(OFFICE_HOURS, replace(drains, has_running=False), OUTSIDE) is STOP


def test_start_reasons_of_a_stopped_deployment_end_a_drain() -> None:
    drains = situation_up(drain_until=MONDAY + MINUTE, stopped_reason=StoppedReason.MANUAL, has_running=True)
    assert decided_action(IdleShutdownPolicy(30), replace(drains, has_due=True), MONDAY) is WAKE
    by_schedule = replace(drains, stopped_reason=StoppedReason.SCHEDULE)
    assert decided_action(AlwaysOnPolicy(), by_schedule, MONDAY) is START
    assert decided_action(AlwaysOnPolicy(), replace(drains, has_due=True), MONDAY) is NONE


# ── deployments that never start ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("policy", [IdleShutdownPolicy(30), OnDemandPolicy(), OFFICE_HOURS])
def test_a_deployment_that_a_user_keeps_awake_stops_at_the_end_of_that_time(policy: DeploymentPolicy) -> None:
    until = OUTSIDE + HOUR
    held = situation_up(kept_awake_until=until)
    assert decide(policy, held, OUTSIDE) == LifecycleVerdict(NONE, LifecycleReason.KEPT_AWAKE, check_at=until)
    planned = lifecycle_policy.next_transition(policy, held, OUTSIDE)
    assert planned == LifecycleTransition(TransitionKind.STOP, until)
    assert decide(policy, held, until).action is STOP


def test_a_time_to_be_kept_awake_shortens_nothing() -> None:
    idle_at = MONDAY + 30 * MINUTE
    held = situation_up(kept_awake_until=MONDAY + 20 * MINUTE)
    assert decide(IdleShutdownPolicy(30), held, MONDAY) == LifecycleVerdict(
        NONE, LifecycleReason.NOT_IDLE_YET, check_at=idle_at
    )
    longer = replace(held, kept_awake_until=idle_at + MINUTE)
    assert decide(IdleShutdownPolicy(30), longer, MONDAY).check_at == idle_at + MINUTE
    always = decide(AlwaysOnPolicy(), held, MONDAY)
    assert always == LifecycleVerdict(NONE, LifecycleReason.ALWAYS_ON)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sleeping_deployment_that_is_to_be_kept_awake_starts_and_serves_runs(
    policy: DeploymentPolicy,
) -> None:
    held = situation_down(StoppedReason.SCHEDULE, kept_awake_until=OUTSIDE + HOUR)
    assert decide(policy, held, OUTSIDE) == LifecycleVerdict(START, LifecycleReason.KEPT_AWAKE)
    assert start_refusal(policy, held, OUTSIDE) is None
    # Afterwards, the policy decides as if nobody had asked.
    over, never = replace(held, kept_awake_until=OUTSIDE), replace(held, kept_awake_until=None)
    assert decide(policy, over, OUTSIDE) == decide(policy, never, OUTSIDE)
    assert start_refusal(policy, over, OUTSIDE) == start_refusal(policy, never, OUTSIDE)
    archived = situation_down(StoppedReason.ARCHIVED, kept_awake_until=OUTSIDE + HOUR)
    assert decide(policy, archived, OUTSIDE).action is NONE
    failed = situation_down(StoppedReason.FAILED, OUTSIDE, kept_awake_until=OUTSIDE + HOUR, start_failures=1)
    assert decide(policy, failed, OUTSIDE).reason is LifecycleReason.FAILED


@pytest.mark.parametrize("policy", POLICIES)
def test_undeployed_workflows_are_left_alone(policy: DeploymentPolicy) -> None:
    gone = DeploymentSituation(is_deployed=False, is_up=False, has_due=True)
    assert decide(policy, gone, INSIDE) == LifecycleVerdict(NONE, LifecycleReason.NOT_DEPLOYED)
    assert decided_action(policy, situation_down(StoppedReason.ARCHIVED, has_due=True), INSIDE) is NONE


@pytest.mark.parametrize("policy", [AlwaysOnPolicy(), OFFICE_HOURS])
def test_a_deployment_that_could_not_start_is_tried_again_after_a_while(policy: DeploymentPolicy) -> None:
    failed = situation_down(StoppedReason.FAILED, INSIDE)
    assert decided_action(policy, failed, INSIDE + MINUTE / 2) is NONE
    assert decided_action(policy, failed, INSIDE + MINUTE) is START


@pytest.mark.parametrize(("failures", "minutes"), [(0, 1), (1, 1), (2, 2), (4, 8), (6, 30), (1_000, 30)])
def test_a_start_that_fails_again_and_again_is_tried_less_and_less_often(failures: int, minutes: int) -> None:
    failed = situation_down(StoppedReason.FAILED, INSIDE, start_failures=failures)
    tried_at = INSIDE + minutes * MINUTE
    assert decided_action(AlwaysOnPolicy(), failed, tried_at - MINUTE / 2) is NONE
    assert decided_action(AlwaysOnPolicy(), failed, tried_at) is START


def test_a_due_run_does_not_have_a_failed_start_tried_again_and_again() -> None:
    failed = situation_down(StoppedReason.FAILED, MONDAY, has_due=True)
    held = decide(OnDemandPolicy(), failed, MONDAY)
    assert (held.action, held.check_at) == (NONE, MONDAY + MINUTE)
    assert decided_action(OnDemandPolicy(), failed, MONDAY + MINUTE) is WAKE
    assert decide(OnDemandPolicy(), replace(failed, has_due=False), MONDAY).check_at is None


# ── permitted starts ────────────────────────────────────────────────────────────────────────────────────────

ANY = tuple(reason for reason in StoppedReason if reason is not StoppedReason.ARCHIVED)


@pytest.mark.parametrize("reason", ANY)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_starts_a_sleeping_deployment_as_its_policy_says(
    policy: DeploymentPolicy, reason: StoppedReason
) -> None:
    asleep = situation_down(reason)
    inside, outside = start_refusal(policy, asleep, INSIDE), start_refusal(policy, asleep, OUTSIDE)
    if isinstance(policy, ScheduledWindowPolicy):
        assert inside is None
        assert outside is not None
        assert (outside.code, outside.opens_at) == (StartRefusalCode.OUTSIDE_WINDOW, OPENING)
    elif isinstance(policy, AlwaysOnPolicy) and reason is StoppedReason.MANUAL:
        assert inside == outside
        assert inside is not None
        assert (inside.code, inside.opens_at) == (StartRefusalCode.STOPPED_MANUALLY, None)
    else:
        assert (inside, outside) == (None, None)


@pytest.mark.parametrize("policy", POLICIES)
def test_deployments_that_are_up_take_runs_and_absent_ones_take_none(policy: DeploymentPolicy) -> None:
    assert start_refusal(policy, situation_up(), OUTSIDE) is None
    for gone in (DeploymentSituation(is_deployed=False, is_up=False), situation_down(StoppedReason.ARCHIVED)):
        refusal = start_refusal(policy, gone, INSIDE)
        assert refusal is not None
        assert refusal.code is StartRefusalCode.NOT_DEPLOYED


def test_a_deployment_that_drains_after_its_window_takes_no_runs() -> None:
    drains = situation_up(drain_until=OUTSIDE + MINUTE, stopped_reason=StoppedReason.SCHEDULE)
    refusal = start_refusal(OFFICE_HOURS, drains, OUTSIDE)
    assert refusal is not None
    assert refusal.opens_at == OPENING


# ── next action ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("policy", "situation", "now", "expected"),
    [
        (AlwaysOnPolicy(), situation_up(), INSIDE, None),
        (AlwaysOnPolicy(), situation_down(StoppedReason.MANUAL), INSIDE, None),
        (
            IdleShutdownPolicy(30),
            situation_up(),
            MONDAY,
            LifecycleTransition(TransitionKind.STOP, MONDAY + 30 * MINUTE),
        ),
        (IdleShutdownPolicy(30), situation_up(has_running=True), MONDAY, None),
        (IdleShutdownPolicy(30), situation_down(StoppedReason.IDLE), MONDAY, None),
        (OnDemandPolicy(), situation_up(), MONDAY, LifecycleTransition(TransitionKind.STOP, MONDAY + MINUTE)),
        (OFFICE_HOURS, situation_up(), INSIDE, LifecycleTransition(TransitionKind.STOP, MONDAY + 17 * HOUR)),
        (OFFICE_HOURS, situation_up(), OUTSIDE, LifecycleTransition(TransitionKind.STOP, OUTSIDE)),
        (
            OFFICE_HOURS,
            situation_up(started_by_hand_at=OUTSIDE),
            OUTSIDE,
            LifecycleTransition(TransitionKind.STOP, CLOSING),
        ),
        (
            OFFICE_HOURS,
            situation_down(StoppedReason.SCHEDULE),
            OUTSIDE,
            LifecycleTransition(TransitionKind.START, OPENING),
        ),
        (
            OFFICE_HOURS,
            situation_down(StoppedReason.MANUAL, INSIDE),
            INSIDE,
            LifecycleTransition(TransitionKind.START, OPENING),
        ),
        (
            OFFICE_HOURS,
            situation_down(StoppedReason.SCHEDULE),
            INSIDE,
            LifecycleTransition(TransitionKind.START, INSIDE),
        ),
        (
            IdleShutdownPolicy(30),
            situation_up(drain_until=INSIDE, stopped_reason=StoppedReason.MANUAL, has_running=True),
            INSIDE - MINUTE,
            LifecycleTransition(TransitionKind.STOP, INSIDE),
        ),
    ],
)
def test_the_next_transition_follows_the_clock(
    policy: DeploymentPolicy,
    situation: DeploymentSituation,
    now: datetime,
    expected: LifecycleTransition | None,
) -> None:
    assert lifecycle_policy.next_transition(policy, situation, now) == expected


# ── stored policies ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_stored_policy_is_read() -> None:
    schedule = {
        "timezone": "UTC",
        "windows": [{"days": [1, 2, 3, 4, 5], "startTime": "09:00", "endTime": "17:00"}],
    }
    stored: list[dict[str, Any]] = [
        {"type": "always-on"},
        {"type": "idle-shutdown", "idleTimeoutMinutes": 30},
        {"type": "on-demand"},
        {"type": "scheduled-window", "schedule": schedule},
    ]
    assert tuple(lifecycle_policy.parse_policy(one) for one in stored) == POLICIES
    assert lifecycle_policy.parse_policy(lifecycle_policy.effective_policy(None)) == IdleShutdownPolicy(30)


def test_inputs_of_a_decision_are_stored_as_json() -> None:
    kept = lifecycle_policy.decision_inputs(situation_down(StoppedReason.IDLE, has_due=True), MONDAY)
    assert kept["now"] == kept["stoppedAt"] == "2026-01-05T00:00:00.000Z"
    assert (kept["stoppedReason"], kept["hasDue"], kept["drainUntil"]) == ("idle", True, None)
