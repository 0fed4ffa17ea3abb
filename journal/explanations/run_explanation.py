"""Explanation of one run: a pure function of facts, which asks the rules of claims, admission and lifecycle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from engine.agents.agent_steps import StepKind
from engine.run_records import SpanStatus
from journal.explanations import deployment_blockers
from journal.explanations.blockers import (
    Blocker,
    BlockerCode,
    BlockerHolder,
    BlockerKind,
    EndEstimate,
    Explanation,
    NextEvent,
    SuggestedRequest,
    code_of_wait,
)
from journal.held_runs import UNTIL_RESUMED
from journal.presence_reports import ABSENT_SECONDS
from models.execution import (
    DELAYED_TARGET,
    ISOLATED_UNPARSED_TARGET,
    LIMITED_TARGET,
    UNPARSED_TARGET,
)
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from models.task_states import TaskState
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from engine.values import Json
    from journal.explanations.run_facts import OpenAgentStep, RunFacts, UnsettledNode
    from journal.explanations.task_facts import TaskFact
    from models.worker_presence import WorkerPresence

SWEEP_TIME: Final = timedelta(seconds=2)
"""Interval of the sweeps that find work which no event has announced, by default."""
READ_SCOPE: Final = "workflows:read"
EXECUTE_SCOPE: Final = "workflows:execute"
WRITE_SCOPE: Final = "workflows:write"
WAITS_FOR_MODELS: Final = {
    "model-rate-limited": "waits until the provider of its language model accepts calls again",
    "model-limit-reached": "waits until the limits of its language model admit the call",
    "month-budget-exceeded": "waits for the next month: the budget of the organization for language models is spent",
}
"""Texts for failures of models after which a node waits, by their codes."""
_CHECKED: Final = {
    ExecutionStatus.PENDING: ("request", "slot", "deployment", "window", "workers", "queue", "broker"),
    ExecutionStatus.WAITING: ("paused", "window", "deployment", "timer", "retry", "event", "input"),
    ExecutionStatus.RUNNING: ("lease", "request", "nodes", "sub-workflows"),
}


def explain_run(facts: RunFacts) -> Explanation:
    """Explain why a run does not move, as of the time of the facts.

    There are no blockers exactly when the next claim takes the run, or after its end. The first blocker is
    the primary one. A running run has its nodes at work as blockers, and counts as progressing unless its
    worker is lost.
    """
    run = facts.run
    if run.status in TERMINAL_STATUSES:
        return Explanation(run.ended_at, is_progressing=False)
    status = ExecutionStatus(run.status)
    blockers = [*_BLOCKERS[status](facts)]
    is_running = status is ExecutionStatus.RUNNING and not any(
        blocker.code is BlockerCode.WORKER_LOST for blocker in blockers
    )
    since = blockers[0].since if blockers else run.updated_at
    return Explanation(
        since,
        is_progressing=is_running or not blockers,
        blockers=blockers,
        next=_next_event(facts, blockers),
        checked=_CHECKED[status],
        unknown=() if facts.is_broker_reachable else ("broker: Redis does not answer",),
    )


# ── pending ───────────────────────────────────────────────────────────────────────────────────────────────


def _pending_blockers(facts: RunFacts) -> Iterator[Blocker]:
    """Yield the blocker of a pending run, at most one: the concurrency limit, its deployment, the workers, or Redis.

    Nothing is yielded if the next claim takes the run.
    """
    run = facts.run
    if run.target == LIMITED_TARGET:
        yield _slot_blocker(facts)
        return
    if facts.deployment_id is not None:
        blocker = deployment_blockers.find_blocker(
            facts.deployment, facts.last_decision, facts.now, since=run.updated_at
        )
        if blocker is not None:
            yield blocker
            return
    else:
        present = present_workers(facts.workers, facts.now)
        if not present:
            yield no_worker(facts.workers, run.target, since=run.updated_at)
            return
        if all(worker.held_runs >= worker.concurrency for worker in present):
            yield _explain_queue(facts, "All workers are full")
            return
    if run.target in {UNPARSED_TARGET, ISOLATED_UNPARSED_TARGET}:
        yield Blocker(
            BlockerCode.QUEUED_BEHIND, "The mail of the run is being parsed", run.updated_at, position=1
        )
    elif facts.ahead or not facts.is_claimable:
        yield _explain_queue(facts, f"{facts.ahead} runs are claimed before it")
    elif not facts.is_broker_reachable:
        yield Blocker(
            BlockerCode.BROKER_DOWN,
            "Redis does not answer; the next sweep of a worker finds the run",
            run.updated_at,
            until=facts.now + SWEEP_TIME,
        )


def present_workers(workers: Sequence[WorkerPresence], now: datetime) -> list[WorkerPresence]:
    """Return the workers that have not ended and have reported within 15 seconds, so that they count as alive."""
    earliest = now - timedelta(seconds=ABSENT_SECONDS)
    return [worker for worker in workers if worker.ended_at is None and worker.seen_at >= earliest]


def no_worker(workers: Sequence[WorkerPresence], queue: str, *, since: datetime | None) -> Blocker:
    """Return the blocker of runs that no living worker can claim; it names the queue and the time of the last
    report.
    """
    seen_at = max((worker.seen_at for worker in workers), default=None)
    text = "No worker was ever seen" if seen_at is None else "No worker reports any more"
    return Blocker(
        BlockerCode.NO_WORKER,
        f"{text}; start one",
        since,
        details={"queue": queue, "lastSeen": _format_moment(seen_at)},
    )


def _slot_blocker(facts: RunFacts) -> Blocker:
    """Return the blocker of a run that waits for a concurrency slot, with holders, position and estimate; raises
    `LookupError` if the facts have no slots.
    """
    run, slot = facts.run, facts.slot
    if slot is None:
        raise LookupError("Facts of a limited run have its slots")
    if slot.held < slot.limit and not slot.ahead:
        text = "A slot is free; the run is admitted within two seconds"
    else:
        text = f"{slot.held} of {slot.limit} slots of its concurrency key are held"
    holders = [
        BlockerHolder("execution", holder.execution_id if holder.is_visible else None, holder.since)
        for holder in slot.holders
    ]
    return Blocker(
        BlockerCode.WAITING_FOR_SLOT,
        text,
        run.updated_at,
        by=holders,
        position=slot.ahead + 1,
        estimate=_estimate_slot(facts),
        actions=[_end_run(holder.id, "cancel") for holder in holders[:3] if holder.id is not None],
        details={"limit": slot.limit, "held": slot.held},
    )


def _estimate_slot(facts: RunFacts) -> EndEstimate | None:
    """Estimate when a run gets a slot of its concurrency key, as if each run before it takes the median duration
    of the workflow's recent runs.

    None without a concurrency limit or recent runs.
    """
    slot, durations = facts.slot, facts.recent.runs
    if slot is None or not durations or not slot.limit:
        return None
    typical = timedelta(seconds=median(durations))
    ends = sorted(max(holder.since + typical, facts.now) for holder in slot.holders)
    if not ends:
        return EndEstimate(facts.now + SWEEP_TIME, "interval of admission")
    rounds, place = divmod(slot.ahead, max(min(slot.limit, len(ends)), 1))
    return EndEstimate(ends[min(place, len(ends) - 1)] + rounds * typical, _median_basis(durations))


def _explain_queue(facts: RunFacts, text: str) -> Blocker:
    """Return the blocker of a run in the queue of workers, with the message `text`, its place, and an estimate from
    recent durations.
    """
    estimate = None
    present = present_workers(facts.workers, facts.now)
    places = sum(worker.concurrency for worker in present)
    if facts.recent.runs and places:
        rounds = max(math.ceil((facts.ahead + 1) / places), 1)
        seconds = rounds * median(facts.recent.runs)
        estimate = EndEstimate(facts.now + timedelta(seconds=seconds), _median_basis(facts.recent.runs))
    return Blocker(
        BlockerCode.QUEUED_BEHIND,
        text,
        facts.run.updated_at,
        position=facts.ahead + 1,
        estimate=estimate,
    )


# ── waiting ───────────────────────────────────────────────────────────────────────────────────────────────


def _waiting_blockers(facts: RunFacts) -> Iterator[Blocker]:
    """Yield the blockers of a waiting run: its deferral if it has not started, else its unsettled nodes, the earliest
    known end first, else a timer.
    """
    run = facts.run
    if run.started_at is None:
        yield _explain_deferral(facts)
        return
    found = [node_blocker(facts, node) for node in facts.nodes]
    if found:
        yield from sorted(found, key=lambda one: (one.until is None, one.until or facts.now))
    else:
        yield Blocker(
            BlockerCode.TIMER,
            "The run waits for a time"
            if run.due_at is not None
            else "Its waits are answered; it goes on with the next sweep",
            run.updated_at,
            until=run.due_at or facts.now + SWEEP_TIME,
        )


def _explain_deferral(facts: RunFacts) -> Blocker:
    """Return the blocker of a run that was accepted and may not start yet: a paused workflow, its deployment,
    or a time.
    """
    run = facts.run
    if run.due_at == UNTIL_RESUMED and run.target == DELAYED_TARGET:
        if facts.workflow_status == WorkflowStatus.PAUSED:
            return workflow_paused(run.workflow_id, since=run.updated_at)
        return Blocker(
            BlockerCode.WORKFLOW_PAUSED,
            "The workflow was resumed; the run starts with the next sweep",
            run.updated_at,
            until=facts.now + SWEEP_TIME,
            kind=BlockerKind.WAIT,
        )
    if facts.deployment_id is not None:
        blocker = deployment_blockers.find_blocker(
            facts.deployment, facts.last_decision, facts.now, since=run.updated_at
        )
        return blocker or Blocker(
            BlockerCode.WAKING,
            "The deployment may serve it; the next sweep releases it",
            run.updated_at,
            until=facts.now + SWEEP_TIME,
            details={"phase": "decide"},
        )
    return Blocker(
        BlockerCode.TIMER, "The run was accepted for a later time", run.updated_at, until=run.due_at
    )


def workflow_paused(workflow_id: str, *, since: datetime | None) -> Blocker:
    """Return the blocker of runs whose workflow is paused, with the request that activates it."""
    return Blocker(
        BlockerCode.WORKFLOW_PAUSED,
        "The workflow is paused; its runs start when it is active again",
        since,
        actions=[SuggestedRequest("PUT", f"/api/v1/workflows/{workflow_id}/status", WRITE_SCOPE)],
    )


# ── nodes ─────────────────────────────────────────────────────────────────────────────────────────────────


def node_blocker(facts: RunFacts, node: UnsettledNode) -> Blocker:
    """Return the blocker that says why an unsettled node has not ended: it waits for a time, person, event, task or
    child run, or is at work.
    """
    where: Mapping[str, Json] = {
        "node": node.node_id,
        "iteration": node.iteration,
        "attempt": node.attempt,
    }
    kind = None if node.awaits is None else str(node.awaits["kind"])
    code = BlockerCode.NODE_RUNNING if node.status is SpanStatus.RUNNING else code_of_wait(node.status, kind)
    match code:
        case BlockerCode.AWAITING_INPUT:
            return _input_blocker(facts, node)
        case BlockerCode.AWAITING_EVENT:
            return Blocker(
                code,
                f"{node.label} waits for an event",
                node.started_at,
                until=node.wake_at,
                actions=[SuggestedRequest("POST", "/api/v1/workflows/events", EXECUTE_SCOPE)],
                details={**where, "eventType": _request_of(node).get("event_type")},
            )
        case BlockerCode.AWAITING_CALLBACK:
            return _callback_blocker(node, where)
        case BlockerCode.AWAITING_SIGNAL:
            name = _request_of(node).get("name")
            return Blocker(
                code,
                f"{node.label} waits for the signal {name}",
                node.started_at,
                until=node.wake_at,
                actions=[
                    SuggestedRequest("POST", f"/api/v1/executions/{facts.run.id}/signals", EXECUTE_SCOPE)
                ],
                details={**where, "signal": name},
            )
        case BlockerCode.AWAITING_TASK:
            return _task_blocker(node)
        case BlockerCode.RETRY_AT | BlockerCode.TIMER:
            text = "waits for a time"
            if code is BlockerCode.RETRY_AT:
                text = WAITS_FOR_MODELS.get(node.error_code or "", "has failed and is tried again")
                where = {**where, "error": node.error_code}
            return Blocker(code, f"{node.label} {text}", node.started_at, until=node.wake_at, details=where)
        case _:
            return _running_blocker(facts, node)


def _request_of(node: UnsettledNode) -> Mapping[str, Json]:
    """Return the request of a node that waits for an answer; empty without one."""
    request = None if node.awaits is None else node.awaits["request"]
    return request if isinstance(request, dict) else {}


def _callback_blocker(node: UnsettledNode, where: Mapping[str, Json]) -> Blocker:
    request = _request_of(node)
    sent = {name: request.get(name) for name in ("method", "url")}
    return Blocker(
        BlockerCode.AWAITING_CALLBACK,
        f"{node.label} waits for the callback of {sent['method']} {sent['url']}",
        node.started_at,
        until=node.wake_at,
        details={**where, **sent},
    )


def _input_blocker(facts: RunFacts, node: UnsettledNode) -> Blocker:
    path = f"/api/v1/executions/{facts.run.id}/input"
    request_id = f"{node.node_id}:{node.iteration}" if node.iteration else node.node_id
    return Blocker(
        BlockerCode.AWAITING_INPUT,
        f"{node.label} waits for the answer of a person",
        node.started_at,
        until=node.wake_at,
        actions=[SuggestedRequest("POST", path, EXECUTE_SCOPE)],
        details={"node": node.node_id, "iteration": node.iteration, "requestId": request_id},
    )


def _task_blocker(node: UnsettledNode) -> Blocker:
    """Return the blocker of a node whose task a task worker of the organization performs, or should.

    It tells whether a worker holds the task, none serves it, or it waits for a slot of its concurrency key,
    a retry or a free worker. Without an open task, the run is about to continue.
    """
    task = node.task
    where: dict[str, Json] = {"node": node.node_id, "iteration": node.iteration, "attempt": node.attempt}
    if task is None:
        text = f"The task of {node.label} has ended; the run goes on with the next claim"
        return Blocker(BlockerCode.AWAITING_TASK, text, node.started_at, details=where)
    where |= {"attempt": task.attempt, "task": task.id, "state": task.state.value}
    if task.is_held:
        text = f"{node.label} is performed by worker {task.worker_id}, {_report_text(task)}"
    elif task.unserved is not None:
        text = f"{node.label}: {task.unserved}"
    elif task.state is TaskState.LIMITED:
        text = f"{node.label} waits for another task with its concurrency key"
    elif task.state is TaskState.DELAYED:
        text = f"{node.label} has failed and is tried again"
    else:
        text = f"{node.label} waits for a free worker of {task.type} in pool {task.pool}"
    return Blocker(
        BlockerCode.AWAITING_TASK,
        text,
        task.claimed_at or node.started_at,
        until=task.until if task.state is TaskState.DELAYED else None,
        by=[BlockerHolder("worker", task.worker_id, task.claimed_at)] if task.is_held else [],
        kind=BlockerKind.CHANGE if task.unserved is not None else None,
        actions=[SuggestedRequest("GET", f"/api/v1/tasks/{task.id}", READ_SCOPE)],
        details=where,
    )


def _report_text(task: TaskFact) -> str:
    """Return a text that says when the worker of a held task has last reported, and when another worker may have the
    task.
    """
    if task.reported_seconds is None:
        reported = "which has not confirmed the claim yet"
    elif task.is_silent:
        reported = f"which has not reported for {task.reported_seconds:.0f} s"
    else:
        reported = f"which has reported {task.reported_seconds:.0f} s ago"
    if task.until is None:
        return reported
    return f"{reported}: without a report, another one may have it at {task.until:%H:%M:%S}"


def _running_blocker(facts: RunFacts, node: UnsettledNode) -> Blocker:
    """Return the blocker of a node at work, with the p95 of its recent durations.

    It has an estimated end while the median is not exceeded. Child runs of the node hold it; the caller sees
    only ids of those it may read.
    """
    children = [child for child in facts.children if child.node_id in {node.node_id, ""}]
    durations = facts.recent.nodes.get(node.node_id, ())
    p95 = percentile(durations, 0.95) if durations else None
    estimate = None
    if node.started_at is not None and durations:
        end = node.started_at + timedelta(seconds=median(durations))
        if end > facts.now:
            estimate = EndEstimate(end, _median_basis(durations))
    text = "waits for a sub-workflow" if children else "is at work"
    if node.open_steps:
        text = _describe_steps(node.open_steps)
    return Blocker(
        BlockerCode.NODE_RUNNING,
        f"{node.label} {text}",
        node.started_at,
        until=node.wake_at,
        by=[
            BlockerHolder("execution", child.execution_id if child.is_visible else None, child.since)
            for child in children
        ],
        estimate=estimate,
        details={
            "node": node.node_id,
            "iteration": node.iteration,
            "attempt": node.attempt,
            "p95": None if p95 is None else round(p95, 3),
            **({"steps": [_show_step(step) for step in node.open_steps]} if node.open_steps else {}),
        },
    )


def _describe_steps(steps: Sequence[OpenAgentStep]) -> str:
    """Return a text that says for which open steps an agent waits: the answer of a model, or the results of tools."""
    if steps[0].kind is StepKind.MODEL:
        return f"waits for the answer of the model {steps[0].name}"
    names = sorted({step.name for step in steps})
    return f"waits for the {'tool' if len(names) == 1 else 'tools'} {', '.join(names)}"


def _show_step(step: OpenAgentStep) -> Json:
    return {
        "number": step.number,
        "kind": step.kind.value,
        "name": step.name,
        "since": _format_moment(step.since),
    }


# ── running ───────────────────────────────────────────────────────────────────────────────────────────────


def _running_blockers(facts: RunFacts) -> Iterator[Blocker]:
    """Yield the blockers of a running run: a lost worker alone, or a requested end and then its unsettled nodes.

    Nodes at work come first. A run without unsettled nodes has one blocker for its process.
    """
    run = facts.run
    if run.lease_until is not None and run.lease_until < facts.now:
        reported = [worker.seen_at for worker in facts.workers if worker.owner == run.lease_owner]
        yield Blocker(
            BlockerCode.WORKER_LOST,
            "The process that executes the run does not renew its lease",
            run.lease_until,
            until=facts.now + SWEEP_TIME,
            by=[BlockerHolder("worker", run.lease_owner, None)],
            details={
                "lastHeartbeat": _format_moment(max(reported, default=None)),
                "reclaimAt": _format_moment(facts.now + SWEEP_TIME),
            },
        )
        return
    if run.request is not None:
        yield Blocker(
            BlockerCode.CANCEL_REQUESTED,
            "Its cancellation is requested"
            if run.request == "cancel"
            else "It stops after its present nodes",
            run.updated_at,
            until=run.deadline_at,
            actions=[] if run.request == "cancel" else [_end_run(run.id, "cancel")],
            details={"request": run.request, "hardAt": _format_moment(run.deadline_at)},
        )
    nodes = [node_blocker(facts, node) for node in facts.nodes]
    yield from sorted(nodes, key=lambda one: one.code is not BlockerCode.NODE_RUNNING)
    if not nodes:
        # Nodes that return at once are recorded when they have ended.
        yield Blocker(
            BlockerCode.NODE_RUNNING,
            "A process executes the run, and has not reported a node yet",
            run.updated_at,
            details={"node": None, "iteration": "", "attempt": run.attempt, "p95": None},
        )


def _next_event(facts: RunFacts, blockers: Sequence[Blocker]) -> NextEvent | None:
    """Return the earliest event with a known time that may let the run continue; None if no time is known.

    Without blockers, it is the claim, now.
    """
    run = facts.run
    moments = [
        NextEvent(_EVENTS.get(one.code, one.code.value), one.until)
        for one in blockers
        if one.until is not None
    ]
    if not blockers:
        return NextEvent("claim", facts.now)
    if run.status == ExecutionStatus.PENDING and run.target == LIMITED_TARGET:
        moments.append(NextEvent("admission", facts.now + SWEEP_TIME))
    return min(moments, key=lambda event: event.at, default=None)


def _end_run(execution_id: str, how: str) -> SuggestedRequest:
    return SuggestedRequest("POST", f"/api/v1/executions/{execution_id}/{how}", EXECUTE_SCOPE)


def _format_moment(moment: datetime | None) -> str | None:
    return deployment_blockers.moment_text(moment)


def median(values: Sequence[float]) -> float:
    """Return the median of at least one value; of an even number of values, the lower of the two in the middle."""
    return percentile(values, 0.5)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share (0 to 1) of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def _median_basis(values: Sequence[float]) -> str:
    return f"p50 of {len(values)} runs"


_EVENTS: Final = {
    BlockerCode.WORKER_LOST: "lease-reclaim",
    BlockerCode.CANCEL_REQUESTED: "deadline",
    BlockerCode.WINDOW_CLOSED: "window-opening",
    BlockerCode.RETRY_AT: "retry",
    BlockerCode.AWAITING_EVENT: "timeout",
    BlockerCode.AWAITING_INPUT: "timeout",
    BlockerCode.AWAITING_CALLBACK: "timeout",
    BlockerCode.AWAITING_SIGNAL: "timeout",
    BlockerCode.BROKER_DOWN: "sweep",
    BlockerCode.DEPLOYMENT_FAILED: "start",
}
_BLOCKERS: Final = {
    ExecutionStatus.PENDING: _pending_blockers,
    ExecutionStatus.WAITING: _waiting_blockers,
    ExecutionStatus.RUNNING: _running_blockers,
}
