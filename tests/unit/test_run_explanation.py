"""Explanations of runs: a code for each state, with times, holders, estimates and requests."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from engine.agents.agent_steps import StepKind
from engine.graph import ParsedGraph
from engine.run_records import SpanStatus
from journal.deployments.activity import DeploymentActivity
from journal.explanations.blockers import BlockerCode, BlockerKind
from journal.explanations.node_explanation import SettledNode, explain_node
from journal.explanations.run_explanation import explain_run
from journal.explanations.run_facts import (
    ChildRun,
    LastDecision,
    OpenAgentStep,
    RecentDurations,
    RunFacts,
    SlotFacts,
    SlotHolder,
    UnsettledNode,
)
from journal.explanations.run_timing import PathStep, find_critical_path, sum_times
from journal.held_runs import UNTIL_RESUMED
from models.blocked_interval import BlockedInterval
from models.deployment import Deployment, build_situation
from models.execution import Execution
from models.timestamps import format_timestamp
from models.worker_presence import WorkerPresence

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
WORKFLOW = "wf_1"
WINDOW = {
    "type": "scheduled-window",
    "schedule": {
        "timezone": "UTC",
        "windows": [{"days": [1], "startTime": "08:00", "endTime": "09:00"}],
    },
}


def run(**fields: Any) -> Execution:  # noqa: ANN401 - any column
    """Return a pending run of an hour ago."""
    columns: dict[str, Any] = {
        "id": "exec_1",
        "shard": 1,
        "organization_id": "org_1",
        "workflow_id": WORKFLOW,
        "user_id": "user_1",
        "trigger_type": "api",
        "definition_hash": "0" * 64,
        "rank": 1,
        "queue_turn": 1,
        "timeout_microseconds": 1,
        "key_id": "exec_1",
        "channel": "",
        "created_at": NOW - timedelta(hours=1),
        "updated_at": NOW - 10 * SECOND,
    }
    return Execution(**columns | fields)


def facts(row: Execution | None = None, **fields: Any) -> RunFacts:  # noqa: ANN401 - any fact
    known: dict[str, Any] = {
        "workflow_status": "active",
        "is_suspect": False,
        "is_claimable": True,
        "workers": [worker()],
    }
    return RunFacts(row or run(), NOW, **known | fields)


def worker(**fields: Any) -> WorkerPresence:  # noqa: ANN401 - any column
    columns: dict[str, Any] = {"owner": "worker:a/1", "concurrency": 2, "started_at": NOW, "seen_at": NOW}
    return WorkerPresence(**columns | fields)


def deployed(policy: Mapping[str, Any] | None = None, **fields: Any) -> DeploymentActivity:  # noqa: ANN401 - any column
    """Return a stopped deployment."""
    columns: dict[str, Any] = {
        "workflow_id": WORKFLOW,
        "organization_id": "org_1",
        "shard": 1,
        "definition_hash": "0",
        "version": 1,
        "observed": "stopped",
        "observed_generation": 1,
        "created_at": NOW,
        "updated_at": NOW,
    }
    deployment = Deployment(**columns | fields)
    situation = build_situation(deployment, has_due=True, has_running=False, last_ended_at=None)
    return DeploymentActivity(deployment, policy or {"type": "on-demand"}, situation, NOW)


def node(status: SpanStatus, **fields: Any) -> UnsettledNode:  # noqa: ANN401 - any field
    place: dict[str, Any] = {
        "node_id": "step",
        "iteration": "",
        "label": "Step",
        "status": status,
        "attempt": 1,
        "started_at": NOW - 5 * SECOND,
        "wake_at": NOW + 60 * SECOND,
        "awaits": None,
    }
    return UnsettledNode(**place | fields)


def waiting(*nodes: UnsettledNode) -> RunFacts:
    return facts(run(status="waiting", started_at=NOW - 60 * SECOND), nodes=nodes)


def running(*nodes: UnsettledNode, **fields: Any) -> RunFacts:  # noqa: ANN401 - any column
    lease = {"lease_owner": "worker:a/1", "lease_until": NOW + 5 * SECOND}
    return facts(run(status="running", started_at=NOW - 60 * SECOND, **lease | fields), nodes=nodes)


def answer(kind: str) -> dict[str, Any]:
    return {"kind": kind, "request": {"event_type": "order.paid"}, "expired": None}


SLOT = SlotFacts(1, 1, 2, [SlotHolder("exec_2", NOW - 30 * SECOND, is_visible=False)])
CASES: Mapping[str, tuple[RunFacts, BlockerCode]] = {
    "no blocker": (facts(), BlockerCode.NONE),
    "ended": (facts(run(status="completed", ended_at=NOW)), BlockerCode.NONE),
    "behind others": (facts(ahead=3), BlockerCode.QUEUED_BEHIND),
    "workers full": (facts(workers=[worker(held_runs=2)]), BlockerCode.QUEUED_BEHIND),
    "unparsed mail": (facts(run(target="intake")), BlockerCode.QUEUED_BEHIND),
    "no slot": (facts(run(target="limited"), slot=SLOT), BlockerCode.WAITING_FOR_SLOT),
    "no worker": (facts(workers=[worker(seen_at=NOW - 60 * SECOND)]), BlockerCode.NO_WORKER),
    "worker ended": (facts(workers=[worker(ended_at=NOW)]), BlockerCode.NO_WORKER),
    "broker down": (facts(is_broker_reachable=False), BlockerCode.BROKER_DOWN),
    "asleep": (facts(run(target=WORKFLOW), deployment=deployed()), BlockerCode.WAKING),
    "starting": (
        facts(run(target=WORKFLOW), deployment=deployed(replicas=1, observed="starting")),
        BlockerCode.WAKING,
    ),
    "serving": (
        facts(run(target=WORKFLOW), deployment=deployed(replicas=1, observed="running")),
        BlockerCode.NONE,
    ),
    "undeployed": (facts(run(target=WORKFLOW), deployment=deployed(is_deployed=False)), BlockerCode.DRAINING),
    "outside the window": (
        facts(run(target=WORKFLOW), deployment=deployed(WINDOW)),
        BlockerCode.WINDOW_CLOSED,
    ),
    "deferred": (
        facts(run(target=WORKFLOW, status="waiting", due_at=UNTIL_RESUMED), deployment=deployed(WINDOW)),
        BlockerCode.WINDOW_CLOSED,
    ),
    "stopped by a user": (
        facts(
            run(target=WORKFLOW),
            deployment=deployed({"type": "always-on"}, stopped_reason="manual", stopped_at=NOW),
        ),
        BlockerCode.STOPPED_MANUALLY,
    ),
    "archived": (
        facts(run(target=WORKFLOW), deployment=deployed(stopped_reason="archived")),
        BlockerCode.STOPPED_MANUALLY,
    ),
    "start failed": (
        facts(
            run(target=WORKFLOW),
            deployment=deployed(
                stopped_reason="failed", stopped_at=NOW, start_failures=1, failed_reason_code="image-pull"
            ),
        ),
        BlockerCode.DEPLOYMENT_FAILED,
    ),
    "pods failed": (
        facts(run(target=WORKFLOW), deployment=deployed(replicas=1, observed="failed")),
        BlockerCode.DEPLOYMENT_FAILED,
    ),
    "paused": (
        facts(run(target="delayed", status="waiting", due_at=UNTIL_RESUMED), workflow_status="paused"),
        BlockerCode.WORKFLOW_PAUSED,
    ),
    "delayed": (
        facts(run(target="delayed", status="waiting", due_at=NOW + 60 * SECOND)),
        BlockerCode.TIMER,
    ),
    "timer": (waiting(node(SpanStatus.WAITING)), BlockerCode.TIMER),
    "retry": (waiting(node(SpanStatus.RETRYING)), BlockerCode.RETRY_AT),
    "event": (waiting(node(SpanStatus.WAITING, awaits=answer("event"))), BlockerCode.AWAITING_EVENT),
    "input": (waiting(node(SpanStatus.WAITING, awaits=answer("input"))), BlockerCode.AWAITING_INPUT),
    "task": (waiting(node(SpanStatus.WAITING, awaits=answer("task"))), BlockerCode.AWAITING_TASK),
    "callback": (waiting(node(SpanStatus.WAITING, awaits=answer("callback"))), BlockerCode.AWAITING_CALLBACK),
    "signal": (waiting(node(SpanStatus.WAITING, awaits=answer("signal"))), BlockerCode.AWAITING_SIGNAL),
    "sub-workflow": (waiting(node(SpanStatus.WAITING, awaits=answer("run"))), BlockerCode.NODE_RUNNING),
    "node at work": (running(node(SpanStatus.RUNNING)), BlockerCode.NODE_RUNNING),
    "no node yet": (running(), BlockerCode.NODE_RUNNING),
    "lease over": (running(lease_until=NOW - SECOND), BlockerCode.WORKER_LOST),
    "stop requested": (running(request="stop"), BlockerCode.CANCEL_REQUESTED),
}
NODE_CODES = {BlockerCode.PARENTS, BlockerCode.BRANCH_NOT_TAKEN, BlockerCode.PARALLELISM}


@pytest.mark.parametrize("name", CASES)
def test_each_state_has_its_code(name: str) -> None:
    known, code = CASES[name]
    explained = explain_run(known)
    assert explained.primary is code
    assert explained.since is not None
    for blocker in explained.blockers:
        assert blocker.message
        assert not blocker.message.endswith(".")


def test_every_code_of_runs_has_a_case() -> None:
    assert {code for _, code in CASES.values()} == {*BlockerCode} - NODE_CODES


def test_a_slot_names_its_holders_place_and_estimate_and_hides_foreign_ids() -> None:
    (blocker,) = explain_run(
        facts(run(target="limited"), slot=SLOT, recent=RecentDurations([60.0] * 4))
    ).blockers
    assert (blocker.position, blocker.by[0].id, blocker.by[0].since) == (3, None, NOW - 30 * SECOND)
    assert blocker.actions == []
    # The holder ends in 30 seconds, and two runs of a minute follow before this one.
    assert blocker.estimate is not None
    assert (blocker.estimate.at, blocker.estimate.basis) == (NOW + 150 * SECOND, "p50 of 4 runs")
    shown = replace(SLOT, holders=[SlotHolder("exec_2", NOW, is_visible=True)])
    (blocker,) = explain_run(facts(run(target="limited"), slot=shown)).blockers
    assert blocker.by[0].id == "exec_2"
    assert [one.path for one in blocker.actions] == ["/api/v1/executions/exec_2/cancel"]


def test_pods_without_capacity_are_for_an_operator() -> None:
    starting = deployed(
        replicas=1, observed="starting", observed_generation=1, start_deadline_at=NOW + 60 * SECOND
    )
    (blocker,) = explain_run(facts(run(target=WORKFLOW), deployment=starting)).blockers
    assert blocker.details["deadline"] == "2026-03-04T12:01:00.000Z"
    blocked = deployed(replicas=1, observed="starting", observed_reason_code="unschedulable")
    last = LastDecision("wake", "run-due", NOW - 20 * SECOND, None)
    known = facts(run(target=WORKFLOW), deployment=blocked, last_decision=last)
    blocked.deployment.observed_reason = "0/3 nodes are available"
    (blocker,) = explain_run(known).blockers
    assert blocker.effective_kind is BlockerKind.ESCALATE
    assert blocker.message == "0/3 nodes are available"
    assert blocker.details["podReason"] == "unschedulable"
    assert blocker.details["elapsed"] == 10


def test_a_node_at_work_shows_its_usual_time_and_the_runs_that_hold_it() -> None:
    known = replace(
        running(node(SpanStatus.RUNNING)),
        recent=RecentDurations(nodes={"step": [1.0] * 19 + [9.0]}),
        children=[ChildRun("exec_9", "step", "running", NOW, is_visible=True)],
    )
    (blocker,) = explain_run(known).blockers
    assert blocker.details["p95"] == 1.0
    assert [holder.id for holder in blocker.by] == ["exec_9"]


def test_the_next_event_is_the_earliest() -> None:
    known = waiting(
        node(SpanStatus.WAITING, awaits=answer("input"), wake_at=NOW + 90 * SECOND),
        node(SpanStatus.RETRYING, wake_at=NOW + 30 * SECOND),
    )
    explained = explain_run(known)
    assert explained.next is not None
    assert (explained.next.event, explained.next.at) == ("retry", NOW + 30 * SECOND)
    assert explained.primary is BlockerCode.RETRY_AT


def test_the_time_of_a_run_is_divided_without_gaps_and_overlaps() -> None:
    begun = NOW - 50 * SECOND
    ended = run(status="completed", started_at=begun, ended_at=NOW, created_at=NOW - 100 * SECOND)

    def interval(code: str, start: int, end: int, resumed: int | None = None, node: str | None = None) -> Any:  # noqa: ANN401 - a row
        return BlockedInterval(
            execution_id="exec_1",
            started_at=NOW - start * SECOND,
            shard=1,
            organization_id="org_1",
            code=code,
            node_id=node,
            ended_at=NOW - end * SECOND,
            resumed_at=None if resumed is None else NOW - resumed * SECOND,
        )

    rows = [
        interval("waiting-for-slot", 100, 80),
        interval("waking", 90, 60),  # the first ten seconds count for the slot
        interval("awaiting-input", 40, 20, 15, "ask"),
    ]
    spent = sum_times(ended, rows, NOW, primary=BlockerCode.NONE, since=NOW)
    assert spent.waiting_for == {"waiting-for-slot": 20 * SECOND, "awaiting-input": 20 * SECOND}
    assert spent.waking == 20 * SECOND
    assert spent.queued == 15 * SECOND
    assert spent.running == 25 * SECOND


def test_a_blocked_run_counts_the_time_until_now() -> None:
    row = run(target="limited", created_at=NOW - 20 * SECOND, updated_at=NOW - 20 * SECOND)
    explained = explain_run(facts(row, slot=SLOT))
    spent = sum_times(row, [], NOW, primary=explained.primary, since=explained.since)
    assert spent.waiting_for == {"waiting-for-slot": 20 * SECOND}
    assert spent.queued == timedelta()


def test_the_critical_path_follows_the_parents_that_ended_last() -> None:
    def step(node_id: str, start: int, end: int) -> PathStep:
        return PathStep(node_id, node_id, NOW + start * SECOND, NOW + end * SECOND)

    spans = [step("a", 0, 1), step("fast", 1, 2), step("slow", 1, 5), step("join", 5, 6)]
    edges = [("a", "fast"), ("a", "slow"), ("fast", "join"), ("slow", "join"), ("join", "a"), ("gone", "a")]
    assert [one.node_id for one in find_critical_path(spans, edges)] == ["a", "slow", "join"]


ROUTED = ParsedGraph.from_stored(
    {
        "nodes": [
            {"id": "start", "type": "manual"},
            {"id": "check", "type": "condition"},
            {"id": "yes", "type": "set"},
            {"id": "after", "type": "set"},
            {"id": "slow", "type": "set"},
            {"id": "join", "type": "set"},
        ],
        "connections": [
            {"id": "1", "source": "start", "target": "check"},
            {"id": "2", "source": "check", "target": "yes", "sourcePort": "true"},
            {"id": "3", "source": "yes", "target": "after"},
            {"id": "4", "source": "start", "target": "slow"},
            {"id": "5", "source": "slow", "target": "join"},
            {"id": "6", "source": "check", "target": "join", "sourcePort": "false"},
        ],
        "settings": {"parallelism": 1},
    }
)
LEFT = {
    "start": SettledNode(SpanStatus.COMPLETED, "output"),
    "check": SettledNode(SpanStatus.COMPLETED, "false"),
}


@pytest.mark.parametrize(
    ("node_id", "settled", "code", "details"),
    [
        ("join", LEFT, BlockerCode.PARENTS, {"ids": ["slow"]}),
        ("yes", LEFT, BlockerCode.BRANCH_NOT_TAKEN, {"router": "check", "port": "true", "taken": "false"}),
        ("after", LEFT, BlockerCode.BRANCH_NOT_TAKEN, {"router": "check", "port": "true", "taken": "false"}),
        ("slow", LEFT, BlockerCode.PARALLELISM, {"limit": 1, "ids": ["step"]}),
        ("check", LEFT, BlockerCode.NONE, None),
        ("check", {}, BlockerCode.PARENTS, {"ids": ["start"]}),
    ],
)
def test_a_node_waits_for_its_parents_its_branch_or_a_place(
    node_id: str, settled: Mapping[str, SettledNode], code: BlockerCode, details: Mapping[str, Any] | None
) -> None:
    known = running(node(SpanStatus.RUNNING))
    explained = explain_node(known, ROUTED, settled, node_id, triggers=["start"], eager=[])
    assert explained.primary is code
    assert details is None or dict(explained.blockers[0].details) == details


@pytest.mark.parametrize(
    ("kind", "names", "words"),
    [
        (StepKind.MODEL, ["model_a"], "Step waits for the answer of the model model_a"),
        (StepKind.TOOL, ["find"], "Step waits for the tool find"),
        (StepKind.TOOL, ["look", "find", "look"], "Step waits for the tools find, look"),
    ],
)
def test_an_agent_names_the_steps_that_it_waits_for(kind: StepKind, names: list[str], words: str) -> None:
    steps = [OpenAgentStep(number, kind, name, NOW) for number, name in enumerate(names)]
    (blocker,) = explain_run(running(node(SpanStatus.RUNNING, open_steps=steps))).blockers
    assert (blocker.code, blocker.message) == (BlockerCode.NODE_RUNNING, words)
    shown = blocker.details["steps"]
    assert isinstance(shown, list)
    assert shown[0] == {"number": 0, "kind": kind.value, "name": names[0], "since": format_timestamp(NOW)}


def test_a_ready_node_shares_the_blockers_of_its_run() -> None:
    explained = explain_node(facts(ahead=2), ROUTED, LEFT, "slow", triggers=["start"], eager=[])
    assert explained.primary is BlockerCode.QUEUED_BEHIND
    at_work = running(node(SpanStatus.RUNNING, node_id="slow"))
    explained = explain_node(at_work, ROUTED, LEFT, "slow", triggers=["start"], eager=[])
    assert explained.primary is BlockerCode.NODE_RUNNING
