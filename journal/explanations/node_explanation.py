"""Explanation of one node of a run: a pure function, which asks the readiness rules of the engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from sqlalchemy import select
from sqlmodel import col

from engine.frames import ReadinessTracker
from engine.graph import ParsedGraph
from engine.run_records import SETTLED_STATUSES, SpanStatus
from journal.explanations import run_explanation
from journal.explanations.blockers import Blocker, BlockerCode, Explanation
from json_text import decoding
from models.execution import SpanRow
from models.execution_status import TERMINAL_STATUSES
from models.workflow import Definition

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.explanations.run_facts import RunFacts
    from models.execution import Execution

CHECKED: Final = ("span", "branches", "parents", "parallelism", "run")


class SettledNode(Struct, frozen=True):
    """Node that has ended, outside of the iterations of loops."""

    status: SpanStatus
    port: str | None


async def read_graph(connection: AsyncConnection, run: Execution) -> ParsedGraph:
    """Return the graph of a run's definition snapshot; an empty one if the snapshot was deleted."""
    body = await connection.scalar(
        select(col(Definition.body)).where(
            col(Definition.organization_id) == run.organization_id,
            col(Definition.hash) == run.definition_hash,
            col(Definition.shard) == run.shard,
        )
    )
    return ParsedGraph.from_stored(decoding.decode(body) if body else {})


async def read_settled(connection: AsyncConnection, run: Execution) -> Mapping[str, SettledNode]:
    """Return the nodes of a run that have ended, by id, with status and outgoing port; iterations of loops
    are left out.
    """
    statement = select(col(SpanRow.node_id), col(SpanRow.status), col(SpanRow.port)).where(
        col(SpanRow.execution_id) == run.id,
        col(SpanRow.shard) == run.shard,
        col(SpanRow.iteration) == "",
        col(SpanRow.status).in_([status.value for status in SETTLED_STATUSES]),
    )
    return {
        row.node_id: SettledNode(SpanStatus(row.status), row.port)
        for row in await connection.execute(statement)
    }


def explain_node(
    facts: RunFacts,
    graph: ParsedGraph,
    settled: Mapping[str, SettledNode],
    node_id: str,
    *,
    triggers: Collection[str],
    eager: Collection[str],
) -> Explanation:
    """Explain why a node of a run has not ended, or was skipped; without blockers, the node or the run has ended, or
    the node starts at once.

    `settled` are the ended nodes, `triggers` the ids of nodes that may start a run, and `eager` the ids of those that
    start after their first branch.
    """
    blockers = _find_blockers(facts, graph, settled, node_id, triggers, eager)
    since = blockers[0].since if blockers else facts.run.updated_at
    return Explanation(since, is_progressing=not blockers, blockers=blockers, checked=CHECKED)


def _find_blockers(
    facts: RunFacts,
    graph: ParsedGraph,
    settled: Mapping[str, SettledNode],
    node_id: str,
    triggers: Collection[str],
    eager: Collection[str],
) -> Sequence[Blocker]:
    """Return the blockers of a node.

    Its own wait; else the branch that was not taken, the parallelism or the state of the run if it is ready,
    or else the number of unfinished parents. Empty for a node that has ended, and for others of an ended run.
    """
    present = [node for node in facts.nodes if node.node_id == node_id]
    if present:
        return [run_explanation.node_blocker(facts, node) for node in present]
    found = settled.get(node_id)
    if found is not None and found.status is not SpanStatus.SKIPPED:
        return ()
    plan = ReadinessTracker(graph, triggers, eager)
    steps = [plan.start()]
    for earlier in graph.order:
        node = settled.get(earlier)
        if node is not None and node.port is not None and node.status is not SpanStatus.SKIPPED:
            steps.append(plan.settle(earlier, node.port))
    skipped = {one for step in steps for one in step.skipped}
    if node_id in skipped or found is not None:
        return [_branch_blocker(facts, graph, settled, skipped, node_id)]
    if any(node_id in step.ready for step in steps):
        return _ready_blockers(facts, graph)
    waited = sorted({edge.source for edge in graph.inbound[node_id]} - {*settled} - skipped)
    if facts.run.status in TERMINAL_STATUSES:
        return ()
    return [
        Blocker(
            BlockerCode.PARENTS,
            f"{len(waited)} nodes before it have not ended",
            facts.run.started_at,
            details={"ids": list(waited)},
        )
    ]


def _ready_blockers(facts: RunFacts, graph: ParsedGraph) -> Sequence[Blocker]:
    """Return the reasons why a ready node has not started: the limit of parallel nodes, or else the blockers of the
    run, without its nodes at work.
    """
    limit = graph.settings.parallelism
    at_work = [node for node in facts.nodes if node.status is SpanStatus.RUNNING]
    if len(at_work) >= limit:
        return [
            Blocker(
                BlockerCode.PARALLELISM,
                f"{len(at_work)} of {limit} nodes are at work",
                facts.run.updated_at,
                details={"limit": limit, "ids": [node.node_id for node in at_work]},
            )
        ]
    blockers = run_explanation.explain_run(facts).blockers
    return [one for one in blockers if one.code is not BlockerCode.NODE_RUNNING]


def _branch_blocker(
    facts: RunFacts,
    graph: ParsedGraph,
    settled: Mapping[str, SettledNode],
    skipped: Collection[str],
    node_id: str,
) -> Blocker:
    """Return the blocker of a skipped node: the nearest ended node before it, which left by another port.

    It names no node if no trigger leads to the skipped one.
    """
    queue, seen = [node_id], {node_id}
    for place in queue:
        for edge in graph.inbound[place]:
            source = settled.get(edge.source)
            if source is not None and source.status is not SpanStatus.SKIPPED:
                return Blocker(
                    BlockerCode.BRANCH_NOT_TAKEN,
                    f"{edge.source} left by {source.port or 'no port'}, not by {edge.source_port}",
                    facts.run.started_at,
                    details={"router": edge.source, "port": edge.source_port, "taken": source.port},
                )
            if edge.source not in seen and (edge.source in skipped or source is not None):
                seen.add(edge.source)
                queue.append(edge.source)
    return Blocker(
        BlockerCode.BRANCH_NOT_TAKEN,
        "No trigger leads to it",
        facts.run.started_at,
        details={"router": None, "port": None, "taken": None},
    )
