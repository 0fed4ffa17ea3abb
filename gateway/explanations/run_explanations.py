"""Endpoint that explains why a run does not move, and where its time went."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from engine.joins import JoinMode
from gateway.executions import execution_rows, model_usage
from gateway.executions.model_usage import ModelUsageShape
from gateway.explanations import explanation_shapes
from gateway.explanations.explanation_shapes import (
    BlockedIntervalShape,
    BlockerShape,
    NextEventShape,
    PathStepShape,
    TimingShape,
    WakeShape,
)
from gateway.http import errors
from gateway.http.parameters import TextParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from journal.explanations import node_explanation, run_explanation, run_facts, run_timing
from journal.explanations.blockers import BlockerCode
from messages.broker import Broker, BrokerUnavailable
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.explanations.blockers import Explanation
    from journal.explanations.run_facts import RunFacts
    from journal.explanations.run_timing import PathStep
    from journal.explanations.run_wake import RunWake
    from nodes.catalog import NodeCatalog

NODE = TextParameter("node", "Explain this node of the run.", max_length=64)
BROKER_SECONDS: Final = 0.5
"""Time after which a broker that does not answer counts as down."""


class RunExplanation(WireStruct):
    """Reasons why a run does not move, its history, and its time by cause."""

    execution_id: str
    workflow_id: str
    node_id: str | None
    """Node that `blockers` are about; null for the run itself."""
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
    """Past reasons, the earliest first, and each lost worker; waits in the queue and other ones under a quarter of a
    second are left out.
    """
    timing: TimingShape
    wake: WakeShape | None
    """Wake of the pods that the run has waited for before its first node; null if none was woken for it."""
    critical_path: Sequence[PathStepShape]
    """Nodes that determined its end, after its end; empty before."""
    usage: ModelUsageShape | None
    """Language models that its nodes have called until now, with their cost; null if they have called none."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Explain why an execution does not move: what blocks it, who holds that, until when, and what helps.

    With `node`, what blocks is that of this node; the rest is always about the execution. `timing` divides
    the time until now, or until the end, by cause, in seconds. `criticalPath` has the nodes that determined
    the end; it is empty before.
    """
    node_id = request.query[NODE]
    gateway, caller = request.gateway, request.caller
    is_reachable = await is_broker_reachable(gateway.broker)
    async with gateway.database.read_snapshot() as connection:
        facts = await run_facts.read_run_facts(
            connection, request.path_params["id"], caller, is_broker_reachable=is_reachable
        )
        if facts is None:
            raise errors.not_found("execution")
        explained = run_explanation.explain_run(facts)
        if node_id is not None:
            explained = await _explain_node(connection, request.gateway.catalog, facts, node_id)
        path: Sequence[PathStep] = ()
        if facts.run.status in TERMINAL_STATUSES:
            path = await run_timing.read_critical_path(connection, facts.run)
        wake = None
        if any(interval.code == BlockerCode.WAKING for interval in facts.intervals):
            from journal.explanations import run_wake  # noqa: PLC0415 - for runs that have waited for a pod

            wake = await run_wake.read_wake(connection, facts.run, facts.intervals)
        calls = await execution_rows.read_model_calls(connection, facts.run.id, caller.shard)
    return JsonResponse(_show_run(facts, explained, path, node_id, calls, wake))


async def _explain_node(
    connection: AsyncConnection, catalog: NodeCatalog, facts: RunFacts, node_id: str
) -> Explanation:
    """Return the explanation of one node of a run: why it has not started or ended.

    Raises a 404 error for a node that its graph does not have.
    """
    graph = await node_explanation.read_graph(connection, facts.run)
    if node_id not in graph.by_id:
        raise errors.not_found("node")
    settled = await node_explanation.read_settled(connection, facts.run)
    kinds = {node.id: catalog.node_types.get(node.type) for node in graph.nodes}
    return node_explanation.explain_node(
        facts,
        graph,
        settled,
        node_id,
        triggers=[
            key for key, kind in kinds.items() if kind is None or kind.is_trigger or key in graph.pinned
        ],
        eager=[
            node.id
            for node in graph.nodes
            if (kind := kinds[node.id]) is not None and kind.joins and node.config.get("mode") == JoinMode.ANY
        ],
    )


async def is_broker_reachable(broker: Broker) -> bool:
    """Return whether Redis answers a ping within half a second."""
    try:
        async with asyncio.timeout(BROKER_SECONDS):
            await broker.ping()
    except (BrokerUnavailable, TimeoutError):
        return False
    return True


def _show_run(
    facts: RunFacts,
    explained: Explanation,
    path: Sequence[PathStep],
    node_id: str | None,
    model_calls: Sequence[str],
    wake: RunWake | None,
) -> RunExplanation:
    """Return the explanation of a run as the API shows it; `explained` is that of the node `node_id`, of the run for
    None.
    """
    run = facts.run
    of_run = explained if node_id is None else run_explanation.explain_run(facts)
    spent = run_timing.sum_times(run, facts.intervals, facts.now, primary=of_run.primary, since=of_run.since)
    return RunExplanation(
        execution_id=run.id,
        workflow_id=run.workflow_id,
        node_id=node_id,
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
        wake=None if wake is None else explanation_shapes.show_wake(wake),
        critical_path=[explanation_shapes.show_step(one) for one in path],
        usage=model_usage.show_usage(model_calls) if model_calls else None,
    )
