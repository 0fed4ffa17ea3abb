"""Starts of pods: concurrency, fairness, and expiry."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from msgspec.structs import replace

from models.deployment import Deployment
from models.deployment import ObservedState as Stored
from workers.cluster.driver import ObservedDeployment, ObservedPod, PodFailure, PodFailureReason, PodStage
from workers.deployer import reconcile
from workers.deployer.deployment_rows import ObservedStatus
from workers.deployer.reconcile_queue import StartClock, StartGate

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)
START_TIME = timedelta(seconds=120)


def make_gate(limit: int) -> tuple[StartGate, list[str]]:
    calls: list[str] = []
    return StartGate(limit, calls.append), calls


def test_no_more_start_at_once_than_the_limit_and_each_end_admits_the_next() -> None:
    gate, calls = make_gate(2)
    assert [gate.admit(name, "org") for name in "abcd"] == [True, True, False, False]
    assert gate.admit("a", "org"), "what is starting may go on"
    gate.release("a")
    assert calls == ["c"]
    assert gate.admit("c", "org")
    gate.release("d")  # it is wanted no more
    gate.release("b")
    assert calls == ["c"]


def test_starts_that_others_have_begun_count() -> None:
    gate, calls = make_gate(1)
    gate.mark_starting("theirs", "org")
    assert not gate.admit("ours", "org")
    gate.release("theirs")
    assert calls == ["ours"]


def test_organizations_start_in_turn_and_slow_starts_of_one_hold_up_no_other() -> None:
    gate, calls = make_gate(4)
    for number in range(8):
        gate.admit(f"many-{number}", "many")
    assert gate.admit("few-0", "few"), "its share is free beyond the limit"
    assert gate.admit("few-1", "few")
    assert not gate.admit("few-2", "few")
    gate.release("many-0")
    gate.release("many-1")
    assert calls == [], "these ends make up for the starts beyond the limit"
    gate.release("many-2")
    gate.release("few-0")
    assert calls == ["many-4", "few-2"]


def make_deployment(**columns: Any) -> Deployment:  # noqa: ANN401 - any column
    given: dict[str, Any] = {
        "workflow_id": "wf",
        "organization_id": "org",
        "shard": 0,
        "definition_hash": "d",
        "version": 1,
        "replicas": 1,
        "generation": 1,
        "created_at": NOON,
        "updated_at": NOON,
        "observed": Stored.STARTING,
        "observed_generation": 1,
        "observed_at": NOON,
    }
    return Deployment(**{**given, **columns})


def make_observed(*stages: PodStage, failure: PodFailure | None = None) -> ObservedDeployment:
    pods = tuple(
        ObservedPod(f"pod-{number}", "d", None, stage is PodStage.READY, is_terminating=False, stage=stage)
        for number, stage in enumerate(stages)
    )
    return ObservedDeployment(
        "wf", exists=True, replicas=1, updated=len(pods), is_current=True, pods=pods, failure=failure
    )


class ObservedStart:
    """A start that is looked at from time to time."""

    def __init__(self) -> None:
        self._clock = StartClock()

    def state(
        self, seconds: float, observed: ObservedDeployment, row: Deployment | None = None
    ) -> tuple[str, str | None]:
        row, now = row or make_deployment(), NOON + timedelta(seconds=seconds)
        sighting = reconcile.observed_status(
            row,
            observed,
            now=now,
            start_time=START_TIME,
            stalled_since=self._clock.stalled_since(row, observed, now),
            waiting_since=self._clock.waiting_since("wf"),
        )
        return sighting.observed, sighting.observed_reason


def test_the_time_of_a_start_runs_from_the_scheduling_of_its_pod() -> None:
    starts = ObservedStart()
    assert starts.state(0, make_observed()) == ("starting", None)
    state, reason = starts.state(3_600, make_observed(PodStage.CREATED))
    assert state == "starting"
    assert reason is not None
    assert "scheduled" in reason
    assert starts.state(3_600, make_observed(PodStage.SCHEDULED)) == ("starting", None)
    assert starts.state(3_719, make_observed(PodStage.SCHEDULED)) == ("starting", None)
    assert starts.state(3_721, make_observed(PodStage.SCHEDULED))[0] == "failed"


def test_a_deadline_is_known_once_a_pod_is_scheduled_and_moves_with_its_progress() -> None:
    clock, row = StartClock(), make_deployment()

    def status(seconds: float, observed: ObservedDeployment) -> ObservedStatus:
        now = NOON + timedelta(seconds=seconds)
        return reconcile.observed_status(
            row,
            observed,
            now=now,
            start_time=START_TIME,
            stalled_since=clock.stalled_since(row, observed, now),
            waiting_since=clock.waiting_since("wf"),
        )

    assert status(0, make_observed()).start_deadline_at is None
    scheduled = status(5, make_observed(PodStage.SCHEDULED))
    assert scheduled.start_deadline_at == NOON + timedelta(seconds=125)
    quick = status(7, make_observed(PodStage.STARTED))
    assert quick.start_deadline_at == NOON + timedelta(seconds=127)
    assert not quick.differs_from(scheduled), "two seconds are worth no write"
    assert status(9, make_observed(PodStage.READY)).start_deadline_at is None
    full = make_observed(
        PodStage.CREATED, failure=PodFailure(PodFailureReason.UNSCHEDULABLE, "no room", is_final=False)
    )
    assert status(60, full).start_deadline_at is None
    later = status(80, make_observed(PodStage.STARTED))
    assert later.differs_from(scheduled)


def test_pods_that_make_progress_are_not_given_up() -> None:
    starts = ObservedStart()
    starts.state(0, make_observed(PodStage.SCHEDULED))
    assert starts.state(119, make_observed(PodStage.STARTED)) == ("starting", None)
    assert starts.state(238, make_observed(PodStage.STARTED)) == ("starting", None)
    assert starts.state(240, make_observed(PodStage.STARTED))[0] == "failed"


def test_a_program_that_crashes_again_and_again_makes_no_progress() -> None:
    starts = ObservedStart()
    crashed = PodFailure(PodFailureReason.CRASH_LOOP, "it crashed")
    starts.state(0, make_observed(PodStage.STARTED))
    starts.state(60, make_observed(PodStage.SCHEDULED, failure=crashed))
    assert starts.state(121, make_observed(PodStage.STARTED, failure=crashed)) == ("failed", "it crashed")


def test_no_time_runs_while_the_cluster_has_no_room_or_after_something_else_was_desired() -> None:
    starts = ObservedStart()
    full = PodFailure(PodFailureReason.QUOTA, "exceeded quota")
    starts.state(0, make_observed(failure=full))
    assert starts.state(3_600, make_observed(failure=full)) == ("starting", "exceeded quota")
    assert starts.state(3_700, make_observed(PodStage.SCHEDULED))[0] == "starting"
    assert starts.state(3_900, make_observed(PodStage.SCHEDULED))[0] == "failed"
    again = make_deployment(generation=2)
    assert starts.state(3_901, make_observed(PodStage.SCHEDULED), again)[0] == "starting"


def test_a_workflow_that_serves_goes_on_serving_while_the_cluster_takes_notification_of_a_change() -> None:
    stale = replace(make_observed(PodStage.READY), is_current=False, available=1)
    serving = make_deployment(observed=Stored.RUNNING, generation=2)
    assert ObservedStart().state(0, stale, serving)[0] == "running"
    assert ObservedStart().state(0, stale, make_deployment(observed=Stored.STOPPING))[0] == "starting"
