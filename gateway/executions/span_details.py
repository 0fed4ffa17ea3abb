"""Details of one span: the config with which the node ran, its attempts, its log, and its duration before."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec
from msgspec import Raw, Struct
from sqlalchemy import and_, func, select
from sqlmodel import col

from engine import inline_secrets
from engine.agents.agent_steps import AGENT_TYPE
from engine.graph import GraphNode
from engine.program import compile_node
from engine.run_records import SpanStatus
from engine.services import idempotency_key_of
from gateway.executions import agent_step_rows, execution_rows
from json_text import decoding
from models.execution import Execution, ExecutionData, LogRow, SpanRow
from models.workflow import Definition
from nodes import custom_types

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.agents.agent_steps import AgentStep
    from engine.node_api import NodeEffect
    from engine.program import NodeProgram
    from engine.values import Json
    from gateway.executions.execution_rows import Recorded
    from journal.store import ExecutionKey
    from nodes.catalog import NodeCatalog

BLOB: Final = "$blob"
"""Key of a reference to a blob; no config has it."""
LOG_LINES: Final = 1_000
ATTEMPTS: Final = 1_000
STEPS: Final = 1_000
EARLIER_RUNS: Final = 20
"""Runs of the workflow before this one among which the previous duration is looked for."""
_encode = msgspec.json.Encoder().encode


class SpanDetails(Struct, frozen=True):
    """Rows about one span."""

    span: Recorded
    rendered_config: str | None
    """Config as it was rendered, or the reference to a blob; None if it depends on no data."""
    node: bytes | None
    """Node in the definition of the run, as JSON; None if it is not stored."""
    custom_types: bytes
    """Custom node types that the definition pins, as JSON."""
    attempts: Sequence[Recorded]
    logs: Sequence[Recorded]
    previous: Recorded | None
    """Start and end of the same node in the run of the workflow before."""
    steps: Sequence[AgentStep] | None
    """Steps of an agent; None for other nodes."""
    questions: Mapping[str, str]
    """Nodes of the open questions about its steps, by the iterations of the questions."""
    idempotency_key: str
    """Key of its calls to the outside."""


class ShownConfig(Struct, frozen=True):
    """Config of a span as the API shows it."""

    rendered: Raw | None
    """Without credentials; None if it is not known."""
    hidden_fields: Sequence[str]
    """Places of the credentials."""
    effect: NodeEffect | None
    """Effect of the node under this config; None if its definition or type is not stored any more."""


async def read_span(
    connection: AsyncConnection, key: ExecutionKey, span_id: str, iteration: str = ""
) -> SpanDetails | None:
    """Return a span of a run with config, attempts and log (1,000 each), by its id, or by node id and iteration; None
    if it is missing.

    The log is that of its node in all iterations. Also read are the times of the last completed span of the same node
    and iteration in the 20 runs before, and the steps of an agent.
    """
    span = await execution_rows.find_span(connection, key, span_id, iteration)
    if span is None:
        return None
    own = (col(SpanRow.execution_id) == key.execution_id, col(SpanRow.shard) == key.shard)
    stored = select(*(col(SpanRow.rendered_config), col(SpanRow.resolved_config), col(SpanRow.key_id))).where(
        *own, col(SpanRow.node_id) == span.node_id, col(SpanRow.iteration) == span.iteration
    )
    configs = (await connection.execute(stored)).first()
    lines = (
        select(LogRow)
        .where(
            col(LogRow.execution_id) == key.execution_id,
            col(LogRow.shard) == key.shard,
            col(LogRow.node_id) == span.node_id,
        )
        .order_by(col(LogRow.sequence))
        .limit(LOG_LINES)
    )
    run = select(
        *(col(Execution.organization_id), col(Execution.definition_hash)),
        *(col(Execution.workflow_id), col(ExecutionData.created_at)),
        func.coalesce(col(Execution.write_key_id), col(Execution.key_id)).label("key_id"),
    ).join(ExecutionData, execution_rows.SAME_RUN)
    row = (await connection.execute(run.where(col(Execution.id) == key.execution_id))).first()
    if row is None:
        return None
    definition = await connection.scalar(
        select(col(Definition.body)).where(
            col(Definition.organization_id) == row.organization_id,
            col(Definition.hash) == row.definition_hash,
        )
    )
    steps = (
        await agent_step_rows.read_steps(connection, key, span.node_id, span.iteration, STEPS)
        if span.type == AGENT_TYPE
        else None
    )
    return SpanDetails(
        span,
        configs and (configs.rendered_config or configs.resolved_config),
        *(
            (None, b"{}")
            if definition is None
            else await asyncio.to_thread(_find_node, definition, span.node_id)
        ),
        await execution_rows.list_attempts(connection, key, span.node_id, span.iteration, ATTEMPTS),
        (await connection.execute(lines)).all(),
        await _find_previous(connection, key, row.workflow_id, row.created_at, span),
        steps,
        await agent_step_rows.read_questions(connection, key, steps or ()),
        idempotency_key_of((configs and configs.key_id) or row.key_id, span.node_id, span.iteration),
    )


async def _find_previous(
    connection: AsyncConnection,
    key: ExecutionKey,
    workflow_id: str,
    created_at: Any,  # noqa: ANN401 - a time as the row has it
    span: Recorded,
) -> Recorded | None:
    """Return start and end of the last completed span of the same node and iteration in the 20 runs before; None if
    there is none.
    """
    earlier = (
        select(col(ExecutionData.execution_id), col(ExecutionData.created_at))
        .where(
            col(ExecutionData.workflow_id) == workflow_id,
            col(ExecutionData.created_at) <= created_at,
            col(ExecutionData.execution_id) != key.execution_id,
        )
        .order_by(col(ExecutionData.created_at).desc())
        .limit(EARLIER_RUNS)
        .subquery()
    )
    same_node = and_(
        col(SpanRow.execution_id) == earlier.c.execution_id,
        col(SpanRow.node_id) == span.node_id,
        col(SpanRow.iteration) == span.iteration,
        col(SpanRow.shard) == key.shard,
        col(SpanRow.status) == SpanStatus.COMPLETED.value,
    )
    statement = (
        select(col(SpanRow.started_at), col(SpanRow.ended_at))
        .select_from(earlier)
        .join(SpanRow, same_node)
        .order_by(earlier.c.created_at.desc())
        .limit(1)
    )
    return (await connection.execute(statement)).first()


def _find_node(definition: str, node_id: str) -> tuple[bytes | None, bytes]:
    """Return a node of a definition as JSON, None if it is absent, and the custom node types that the
    definition pins.

    To pin means to keep the version with which a definition was stored.
    """
    decoded = decoding.decode(definition)
    nodes = decoded.get("nodes", [])
    node = next((_encode(node) for node in nodes if node.get("id") == node_id), None)
    return node, _encode(decoded.get(custom_types.PINNED) or {})


def show_config(details: SpanDetails, catalog: NodeCatalog) -> ShownConfig:
    """Return the config of a span as it was rendered, without credentials, and the effect of its node under it.

    A config without expressions is that of the definition. The config is None if it was not rendered, the effect if the
    node's type is gone.
    """
    text = details.rendered_config
    defined, program = _compile_node(details, catalog)
    rendered = None if text is None else decoding.decode(text)
    if rendered is None and program is not None and program.config.is_static and details.span.hashes:
        rendered = program.config.source
    if isinstance(rendered, dict) and BLOB not in rendered:
        # Fields that the node evaluates itself, such as conditions, are not part of it.
        rendered = {**{name: value for name, value in defined.items() if name not in rendered}, **rendered}
    return ShownConfig(*_hide(rendered), None if program is None else program.effect)


def defined_config(details: SpanDetails) -> Json:
    """Return the config of the node in the definition, without credentials; empty if it is not stored."""
    if details.node is None:
        return {}
    kept, _ = inline_secrets.remove_secrets(dict(GraphNode.from_stored(decoding.decode(details.node)).config))
    return kept


def _compile_node(
    details: SpanDetails, catalog: NodeCatalog
) -> tuple[Mapping[str, Json], NodeProgram | None]:
    """Return the config of a node in the definition, and its compiled form.

    The latter is None if its type is gone or it doesn't compile; the former {} if the definition is not
    stored.
    """
    if details.node is None:
        return {}, None
    node = GraphNode.from_stored(decoding.decode(details.node))
    pinned = {custom_types.PINNED: decoding.decode(details.custom_types)}
    catalog = custom_types.catalog_of_definition(catalog, pinned)
    try:
        return node.config, compile_node(node, catalog)
    except (LookupError, ValueError):
        return node.config, None


def _hide(config: Json) -> tuple[Raw | None, Sequence[str]]:
    """Return a config as JSON without values that look like credentials, and their places; (None, ()) for None."""
    if config is None:
        return None, ()
    kept, hidden = inline_secrets.remove_secrets(config)
    return Raw(_encode(cast("object", kept))), hidden
