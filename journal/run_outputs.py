"""Outputs of a run: the outputs of leaf nodes, which reached no other node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct
from sqlalchemy import and_, bindparam, func, select
from sqlmodel import col

from engine.node_api import OUTPUT
from json_text import decoding
from models.execution import SpanRow
from models.workflow import Definition

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.store import DefinitionKey, ExecutionKey

BATCH_NODES: Final = 500

# Built once: building a statement takes longer than running it.
_IS_SETTLED: Final = and_(
    col(SpanRow.execution_id) == bindparam("execution_id"),
    col(SpanRow.shard) == bindparam("shard"),
    col(SpanRow.iteration) == "",
    col(SpanRow.ended_at).is_not(None),
)
_SETTLED: Final = (
    select(
        *(col(SpanRow.node_id), col(SpanRow.port)),
        func.length(func.coalesce(col(SpanRow.output), col(SpanRow.output_blob))).label("size"),
    )
    .where(_IS_SETTLED)
    .order_by(col(SpanRow.sequence))
)
_OUTPUTS: Final = select(col(SpanRow.node_id), col(SpanRow.output), col(SpanRow.output_blob)).where(
    _IS_SETTLED, col(SpanRow.node_id).in_(bindparam("node_ids", expanding=True))
)
_DEFINITION: Final = select(col(Definition.body)).where(
    col(Definition.organization_id) == bindparam("organization_id"),
    col(Definition.hash) == bindparam("hash"),
    col(Definition.shard) == bindparam("shard"),
)


class OutputsTooLarge(Exception):
    """The outputs have more characters than the caller's limit."""

    def __init__(self, size: int) -> None:
        super().__init__(f"The outputs have {size:,} characters")
        self.size = size


class LeafOutput(Struct, frozen=True):
    """Output of a node as JSON text, or the reference to its blob."""

    text: bytes
    is_blob: bool


class _DefinitionEdge(msgspec.Struct):
    source: str
    target: str
    source_port: str = msgspec.field(name="sourcePort", default=OUTPUT)


class _DefinitionConnections(msgspec.Struct):
    connections: Sequence[_DefinitionEdge] = ()


async def read_leaf_outputs(
    connection: AsyncConnection, key: ExecutionKey, definition: DefinitionKey, *, max_characters: int
) -> Mapping[str, LeafOutput]:
    """Return the outputs of a run's leaves by node id, in the order of their spans; iterations of loops are left out.

    A leaf is a node with output that reached no other: no connection leads from its chosen port to a node with a span.
    Without the stored definition, all nodes with output are leaves. Raises `OutputsTooLarge` above `max_characters`
    together, before it reads them; an output in a blob counts with its reference.
    """
    run = {"execution_id": key.execution_id, "shard": key.shard}
    rows = (await connection.execute(_SETTLED, run)).all()
    reached = {row.node_id for row in rows}
    edges = _parse_edges(await connection.scalar(_DEFINITION, definition._asdict()))
    used_ports = {(edge.source, edge.source_port) for edge in edges if edge.target in reached}
    found = [
        row for row in rows if row.size is not None and (row.node_id, row.port or OUTPUT) not in used_ports
    ]
    if (total := sum(row.size for row in found)) > max_characters:
        raise OutputsTooLarge(total)
    node_ids = [row.node_id for row in found]
    texts: dict[str, LeafOutput] = {}
    for start in range(0, len(node_ids), BATCH_NODES):
        batch = {"node_ids": node_ids[start : start + BATCH_NODES]}
        for row in await connection.execute(_OUTPUTS, run | batch):
            texts[row.node_id] = LeafOutput((row.output or row.output_blob).encode(), row.output is None)
    return {node_id: texts[node_id] for node_id in node_ids if node_id in texts}


def _parse_edges(body: str | None) -> Sequence[_DefinitionEdge]:
    try:
        return decoding.decode(body or "{}", _DefinitionConnections).connections
    except msgspec.DecodeError:
        return ()  # a definition that could not run has no outputs either
