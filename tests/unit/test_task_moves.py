"""Moves of tasks: random interleavings of workers, sweeps and cancellations against a model."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from journal.tasks import task_moves
from journal.tasks.task_moves import MAX_LOSSES, MAX_UNACKNOWLEDGED, SECOND, ReportStatus, TaskRow
from models.task_states import HELD_STATES, UNBEGUN_STATES, TaskState

LEASE_SECONDS = 30
TIMEOUT_SECONDS = 120
STEPS = st.one_of(
    st.sampled_from(["claim", "renew", "complete", "fail", "fail for good", "release", "cancel", "return"]),
    st.sampled_from(["late complete", "late fail", "late release"]),
    st.integers(min_value=1, max_value=200),
)


def make_task(*, max_attempts: int = 2, is_at_most_once: bool = False) -> TaskRow:
    empty = dict.fromkeys(task_moves.ROW_COLUMNS)
    counts = dict.fromkeys(("fence", "failures", "losses", "unacknowledged", "log_lines"), 0)
    texts = (
        "id",
        "execution_id",
        "node_id",
        "iteration",
        "organization_id",
        "workflow_id",
        "type",
        "version",
        "queue",
    )
    given: dict[str, Any] = {
        **empty,
        **counts,
        **dict.fromkeys(texts, "x"),
        "shard": 0,
        "timeout_microseconds": TIMEOUT_SECONDS * SECOND,
        "lease_microseconds": LEASE_SECONDS * SECOND,
        "max_attempts": max_attempts,
        "first_delay_microseconds": SECOND,
        "max_delay_microseconds": 60 * SECOND,
        "delay_grows": True,
        "is_at_most_once": is_at_most_once,
        "is_acknowledged": False,
        "state": TaskState.READY,
    }
    return TaskRow(**given)


def claim(task: TaskRow, now: int) -> str:
    """Do what the statement of a claim does."""
    task.fence += 1
    task.state, task.lease = TaskState.LEASED, f"lease {task.fence}"
    task.worker_id, task.claim_id, task.claimed_at, task.is_acknowledged = "w", "c", now, False
    task.lease_until = now + task_moves.FIRST_LEASE_MICROSECONDS
    task.deadline_at = now + task.timeout_microseconds
    task.check_at = min(task.lease_until, task.deadline_at)
    return task.lease


class TaskSimulation:
    """Task, the leases that its workers believe to have, and the answers that its node has got."""

    def __init__(self, task: TaskRow) -> None:
        self.task = task
        self.now = 1_000_000 * SECOND
        self.leases: list[str] = []
        self.answers = 0
        self.begun = 0

    def step(self, action: str | int) -> None:  # noqa: C901, PLR0912 - one case for each action
        task, before = self.task, self.task.state
        was_ended = task.is_ended
        current = self.leases[-1] if self.leases else "none"
        late = self.leases[-2] if len(self.leases) > 1 else "none"
        status: ReportStatus | None = None
        if isinstance(action, int):
            self.now += action * SECOND
            task_moves.move_if_due(task, self.now)
        elif action == "claim":
            if before == TaskState.READY:
                self.leases.append(claim(task, self.now))
                self.begun += 1
        elif action == "renew":
            if task.is_held:
                task_moves.renew(task, self.now)
        elif action == "cancel":
            task_moves.cancel(task, self.now)
        elif action == "return":
            if task.is_held and not task.is_acknowledged:
                task_moves.return_unreceived(task, self.now)
        elif action in {"complete", "late complete"}:
            lease = current if action == "complete" else late
            status = task_moves.complete(task, lease, self.now)
            assert (status is ReportStatus.OK) == (task.state == TaskState.COMPLETED != before)
        elif action in {"release", "late release"}:
            status = task_moves.release(task, current if action == "release" else late, self.now)
        else:
            lease = late if action == "late fail" else current
            status = task_moves.fail(
                task, lease, self.now, "broken", "It broke.", is_final=action == "fail for good"
            )
        if isinstance(action, str) and action.startswith("late"):
            assert status is not ReportStatus.OK or late == task.lease
        if was_ended:
            assert task.state == before
            assert status in {None, ReportStatus.REPEATED, ReportStatus.LOST, ReportStatus.CANCELLED}
        elif task.state in {TaskState.COMPLETED, TaskState.FAILED}:
            self.answers += 1

    def check(self) -> None:
        """Check what holds at every moment."""
        task = self.task
        assert self.answers == (task.state in {TaskState.COMPLETED, TaskState.FAILED})
        assert task.losses <= MAX_LOSSES
        assert task.unacknowledged <= MAX_UNACKNOWLEDGED
        assert task.failures <= task.max_attempts
        if task.state in HELD_STATES:
            assert task.check_at is not None, "a sweep would never end it"
            assert task.lease == self.leases[-1]
        if task.state == TaskState.DELAYED:
            assert task.check_at == task.due_at is not None
        if task.is_ended:
            assert (task.check_at, task.lease_until) == (None, None)
            assert task.ended_at is not None
        if task.is_at_most_once and task.losses + task.unacknowledged:
            assert task.is_ended


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=60), st.integers(1, 3), st.booleans())
def test_every_interleaving_ends_in_one_answer_at_most(
    steps: list[str | int],
    max_attempts: int,
    is_at_most_once: bool,  # noqa: FBT001 - drawn by hypothesis
) -> None:
    simulation = TaskSimulation(make_task(max_attempts=max_attempts, is_at_most_once=is_at_most_once))
    for step in steps:
        simulation.step(step)
        simulation.check()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["renew", 5, 15, 40, 130, "fail", "release"]), max_size=30), st.integers(1, 3)
)
def test_a_task_ends_if_its_workers_never_complete_it(steps: list[str | int], max_attempts: int) -> None:
    """Releases alone cost nothing; every other way to lose an attempt is counted."""
    simulation = TaskSimulation(make_task(max_attempts=max_attempts))
    cycle = [step for step in steps if step != "release"] or [40]
    for _ in range(60):
        simulation.step("claim")
        for step in cycle:
            simulation.step(step)
            simulation.check()
        simulation.step(200)
        simulation.step(200)
    assert simulation.task.state == TaskState.FAILED


@pytest.mark.parametrize("state", [*UNBEGUN_STATES])
def test_a_start_timeout_ends_a_task_that_no_worker_has_begun(state: TaskState) -> None:
    task = make_task()
    task.state, task.check_at = state, 5
    task_moves.move_if_due(task, 4)
    assert task.state == state
    task_moves.move_if_due(task, 5)
    expected = TaskState.READY if state == TaskState.DELAYED else TaskState.FAILED
    assert task.state == expected


def test_delays_grow_to_their_maximum() -> None:
    task = make_task()
    delays = [task_moves.delay_after(task, failures) // SECOND for failures in range(1, 9)]
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60]
    task.delay_grows = False
    assert task_moves.delay_after(task, 5) == SECOND


def test_a_repeated_report_is_recognized() -> None:
    task = make_task()
    lease = claim(task, 0)
    assert [task_moves.release(task, lease, 1) for _ in range(2)] == [ReportStatus.OK, ReportStatus.REPEATED]
    lease = claim(task, 2)
    failed = [task_moves.fail(task, lease, 3, "bad", "It failed") for _ in range(2)]
    assert failed == [ReportStatus.OK, ReportStatus.REPEATED]
    assert (task.state, task.failures) == (TaskState.DELAYED, 1)
    lease = claim(task, 4)
    assert [task_moves.complete(task, lease, 5) for _ in range(2)] == [ReportStatus.OK, ReportStatus.REPEATED]
    assert task_moves.complete(task, "another", 6) == ReportStatus.LOST


def test_leases_that_end_are_counted_by_whether_the_worker_had_the_task() -> None:
    task = make_task()
    claim(task, 0)
    task_moves.move_if_due(task, task_moves.FIRST_LEASE_MICROSECONDS)
    assert (task.state, task.unacknowledged, task.losses, task.failures) == (TaskState.READY, 1, 0, 0)
    claim(task, 0)
    task_moves.renew(task, 0)
    task_moves.move_if_due(task, LEASE_SECONDS * SECOND - 1)
    assert task.state == TaskState.LEASED
    task_moves.move_if_due(task, LEASE_SECONDS * SECOND)
    assert (task.state, task.unacknowledged, task.losses, task.failures) == (TaskState.READY, 1, 1, 0)


def test_the_deadline_is_a_failure_although_the_lease_is_renewed() -> None:
    task = make_task()
    claim(task, 0)
    task_moves.renew(task, (TIMEOUT_SECONDS - 1) * SECOND)
    task_moves.move_if_due(task, TIMEOUT_SECONDS * SECOND)
    assert (task.state, task.losses, task.failures) == (TaskState.DELAYED, 0, 1)
