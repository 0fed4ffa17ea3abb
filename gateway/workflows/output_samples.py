"""Samples of node outputs in the last runs of a workflow, limited in number and size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from sqlalchemy import Row, func, select
from sqlmodel import col

from engine.expressions import ExpressionError
from engine.node_api import UnknownNodeType
from engine.program import compile_node
from engine.run_records import SpanStatus
from engine.values import InvalidJson
from json_text import decoding
from models.execution import Execution, ExecutionData, SpanRow
from models.execution_visibility import visibility_condition

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.graph import GraphNode, ParsedGraph
    from engine.values import Json
    from models.access import ApiCaller
    from models.workflow import Workflow
    from nodes.catalog import NodeCatalog

PastOutput: TypeAlias = Row[*tuple[Any, ...]]
"""`node_id`, `output` as JSON text, and the `hashes` of the node at the time of that output."""

RUNS: Final = 5
MAX_OUTPUT_CHARACTERS: Final = 100_000
MAX_CHARACTERS: Final = 2_000_000
"""Characters of all outputs together, the newest first."""
MAX_OUTPUTS: Final = 2_000


async def recent_outputs(
    connection: AsyncConnection, workflow: Workflow, caller: ApiCaller
) -> Sequence[PastOutput]:
    """Return the outputs of completed nodes in a workflow's five newest runs that the caller may see, the newest run
    first.

    Outputs over 100,000 characters are left out, and the rest after 2,000 outputs or two million characters.
    """
    runs = (
        select(
            col(ExecutionData.execution_id).label("id"),
            col(ExecutionData.shard),
            col(ExecutionData.created_at),
        )
        .join(
            Execution,
            (col(Execution.id) == col(ExecutionData.execution_id))
            & (col(Execution.shard) == col(ExecutionData.shard)),
        )
        .where(
            visibility_condition(caller),
            col(ExecutionData.organization_id) == workflow.organization_id,
            col(ExecutionData.workflow_id) == workflow.id,
            col(ExecutionData.shard) == workflow.shard,
        )
        .order_by(col(ExecutionData.created_at).desc())
        .limit(RUNS)
        .subquery()
    )
    size = func.length(col(SpanRow.output))
    newest_first = (runs.c.created_at.desc(), runs.c.id, col(SpanRow.sequence))
    outputs = (
        select(
            col(SpanRow.node_id),
            col(SpanRow.output),
            col(SpanRow.hashes),
            func.sum(size).over(order_by=newest_first).label("characters"),
        )
        .join(runs, (col(SpanRow.execution_id) == runs.c.id) & (col(SpanRow.shard) == runs.c.shard))
        .where(
            col(SpanRow.status) == SpanStatus.COMPLETED,
            col(SpanRow.hashes).is_not(None),
            size <= MAX_OUTPUT_CHARACTERS,
        )
        .order_by(*newest_first)
        .subquery()
    )
    few = select(outputs).where(outputs.c.characters <= MAX_CHARACTERS).limit(MAX_OUTPUTS)
    return (await connection.execute(few)).all()


def output_samples(
    past: Sequence[PastOutput], graph: ParsedGraph, catalog: NodeCatalog
) -> dict[str, list[Json]]:
    """Return recorded outputs by node id, as samples for a validation.

    Outputs from before the last change of a node's type, config or mappings are left out.
    """
    present: dict[str, bytes | None] = {}
    found: dict[str, list[Json]] = {}
    for row in past:
        node = graph.by_id.get(row.node_id)
        if node is None:
            continue
        if node.id not in present:
            present[node.id] = _compute_hashes(node, catalog)
        now = present[node.id]
        if now is not None and row.hashes.startswith(now):
            found.setdefault(node.id, []).append(decoding.decode(row.output))
    return found


def _compute_hashes(node: GraphNode, catalog: NodeCatalog) -> bytes | None:
    """Return the digests of a node's type, config and mappings; None for an invalid node."""
    try:
        return compile_node(node, catalog).static_hashes
    except (UnknownNodeType, ExpressionError, InvalidJson):
        return None
