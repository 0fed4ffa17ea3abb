"""Endpoint that explains why a run does not move, and where its time went."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from gateway.explanations import explanation_shapes
from gateway.explanations.explanation_shapes import (
    BlockedIntervalShape,
    BlockerShape,
    NextEventShape,
    PathStepShape,
    TimingShape,
)
from gateway.http import errors
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from journal.explanations import run_explanation, run_facts, run_timing
from journal.explanations.blockers import BlockerCode
from messages.broker import Broker, BrokerUnavailable
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus

if TYPE_CHECKING:
    from journal.explanations.blockers import Explanation
    from journal.explanations.run_facts import RunFacts
    from journal.explanations.run_timing import PathStep

BROKER_SECONDS: Final = 0.5
"""Time after which a broker that does not answer counts as down."""


class RunExplanation(WireStruct):
    """Reasons why a run does not move, its history, and its time by cause."""

    execution_id: str
    workflow_id: str
    status: ExecutionStatus
    as_of: Instant
    since: Instant | None
    """Time since which the primary reason holds."""
    progressing: bool
    """True while a process executes it, or the next claim takes it."""
    primary: BlockerCode
    """Code of the first blocker; `none` without one."""
    blockers: Sequence[BlockerShape]
    next: NextEventShape | None
    """Next event at a known time; null if there is none."""
    checked: Sequence[str]
    """Conditions that were checked."""
    unknown: Sequence[str]
    """Facts that could not be read."""
    history: Sequence[BlockedIntervalShape]
    """Past reasons, the earliest first; waits in the queue and under a quarter of a second are left out."""
    timing: TimingShape
    critical_path: Sequence[PathStepShape]
    """Nodes that determined its end, after its end; empty before."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Explain why an execution does not move: what blocks it, who holds that, until when, and what helps.

    For an ended execution, `timing` and `criticalPath` say where its time went.
    """
    gateway, caller = request.gateway, request.caller
    is_reachable = await is_broker_reachable(gateway.broker)
    async with gateway.database.read_snapshot() as connection:
        facts = await run_facts.read_run_facts(
            connection, request.path_params["id"], caller, is_broker_reachable=is_reachable
        )
        if facts is None:
            raise errors.not_found("execution")
        path: Sequence[PathStep] = ()
        if facts.run.status in TERMINAL_STATUSES:
            path = await run_timing.read_critical_path(connection, facts.run)
    return JsonResponse(_show_run(facts, run_explanation.explain_run(facts), path))


async def is_broker_reachable(broker: Broker) -> bool:
    """Return whether the broker answers at once."""
    try:
        async with asyncio.timeout(BROKER_SECONDS):
            await broker.ping()
    except (BrokerUnavailable, TimeoutError):
        return False
    return True


def _show_run(facts: RunFacts, explained: Explanation, path: Sequence[PathStep]) -> RunExplanation:
    run = facts.run
    spent = run_timing.sum_times(
        run, facts.intervals, facts.now, primary=explained.primary, since=explained.since
    )
    return RunExplanation(
        execution_id=run.id,
        workflow_id=run.workflow_id,
        status=ExecutionStatus(run.status),
        as_of=instant(facts.now),
        since=optional_instant(explained.since),
        progressing=explained.is_progressing,
        primary=explained.primary,
        blockers=[explanation_shapes.show_blocker(one) for one in explained.blockers],
        next=explanation_shapes.show_next(explained.next),
        checked=explained.checked,
        unknown=explained.unknown,
        history=[explanation_shapes.show_interval(one) for one in facts.intervals],
        timing=explanation_shapes.show_timing(spent),
        critical_path=[explanation_shapes.show_step(one) for one in path],
    )
