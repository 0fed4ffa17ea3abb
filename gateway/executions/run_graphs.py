"""Endpoint that shows the graph of a run: the definition that ran, with the state of each node."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final

from msgspec import UNSET, Meta, UnsetType

from engine import inline_secrets
from engine.agents.agent_steps import StepKind, StepStatus
from engine.graph import GraphNode
from engine.node_api import NodeEffect
from gateway.executions import model_usage, run_graph_rows
from gateway.executions.execution_rows import ShownSpanStatus
from gateway.executions.execution_shapes import StepQuestion, StepQuestions
from gateway.executions.model_usage import ModelUsageShape
from gateway.executions.run_graph_rows import SHOWN_ATTEMPTS, SHOWN_ITERATIONS
from gateway.http import errors
from gateway.http.errors import ApiError
from gateway.http.parameters import ChoicesParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from gateway.workflows import graph_shapes
from gateway.workflows.graph_shapes import CanvasPosition
from gateway.workflows.workflow_shapes import ShownConnection
from json_text import decoding
from nodes import custom_types

if TYPE_CHECKING:
    from datetime import datetime

    from engine.agents.agent_steps import AgentStep
    from engine.values import Json
    from gateway.executions.agent_step_rows import ToolCallSums
    from gateway.executions.execution_rows import Recorded
    from gateway.executions.run_graph_rows import DefinitionChange, IterationCounts, RunGraphRows
    from journal.definition_snapshot import LoadedWorkflow
    from nodes.catalog import NodeCatalog

_MILLISECOND: Final = timedelta(milliseconds=1)
_WORST_FIRST: Final = ("failed", "running", "retrying", "waiting", "cancelled", "completed", "skipped")
_STATUS: Final = {"enum": [*ShownSpanStatus]}
SHOWN_OPEN_STEPS: Final = 8
"""Open steps of an agent that are shown."""


class GraphExpansion(StrEnum):
    """Optional part of the graph of a run."""

    CONFIG = "config"


EXPAND = ChoicesParameter(
    "expand", "`config`: show the config of each node, without credentials.", GraphExpansion
)


class RunGraphNode(WireStruct):
    """Node of the definition that ran."""

    id: str
    label: str
    type: str
    effect: NodeEffect | None
    """Effect on the outside, by the type and the config of the definition; null for a type that is gone."""
    position: CanvasPosition
    config: Mapping[str, Any] | UnsetType = UNSET
    """Only with `expand=config`: as in the definition, without credentials."""


class AttemptTimes(WireStruct):
    """Failed attempt of a node."""

    iteration: str
    """Iteration of the loop, such as `3`; empty outside of loops."""
    attempt: int
    started_at: Instant | None
    ended_at: Instant | None


class IterationState(WireStruct):
    """State of a node in one iteration of a loop."""

    iteration: str
    """Iteration, such as `3`; in a loop inside of iteration 3, `3.0`."""
    status: Annotated[str, Meta(extra_json_schema=_STATUS)]
    attempt: int
    started_at: Instant | None
    ended_at: Instant | None


class OpenStep(WireStruct):
    """Step of an agent that has begun and not ended."""

    number: int
    kind: StepKind
    name: str
    """Id of the model that is asked, or name of the tool."""
    status: StepStatus
    started_at: Instant
    question: StepQuestion | UnsetType = UNSET
    """Question to a person that a tool call waits for."""


class AgentProgress(WireStruct):
    """Work of an agent so far."""

    steps: int
    """Number of the next step, from 0."""
    open_steps: Annotated[Sequence[OpenStep], Meta(max_length=SHOWN_OPEN_STEPS)]
    """Model that is asked now, or tool calls that are made or wait."""
    usage: ModelUsageShape
    """Tokens and cost of the recorded steps; the agent in a tool call counts once the call has ended."""
    max_tokens: int | None
    """Budget of the node; null without one, and if an expression gives it."""
    max_cost: str | None
    """US dollars as a decimal text; as `maxTokens`."""


class NodeState(WireStruct):
    """State of a node in a run; a node that has not been reached has none."""

    node_id: str
    node_label: str
    node_type: str
    status: Annotated[str, Meta(extra_json_schema=_STATUS)]
    """Of a node in a loop, the worst of its iterations."""
    port: str | None
    attempt: int
    started_at: Instant | None
    ended_at: Instant | None
    wake_at: Instant | None
    duration_ms: int | None
    """Null for a node in a loop: its iterations have durations."""
    previous_duration_ms: int | None
    """Duration of the node in `previousExecutionId`."""
    iteration_counts: Mapping[str, int]
    """Number of iterations by status; empty outside of loops."""
    iterations: Annotated[Sequence[IterationState], Meta(max_length=SHOWN_ITERATIONS)]
    """First iterations; `GET /executions/{id}/spans/{nodeId}?iteration=` shows any other."""
    failed_attempts: Annotated[Sequence[AttemptTimes], Meta(max_length=SHOWN_ATTEMPTS)]
    agent: AgentProgress | UnsetType = UNSET
    """Of an agent outside of loops that has not ended."""
    calls: int | UnsetType = UNSET
    """Of a node that serves agents as a tool: number of its calls, whose sum is `durationMs`."""


class GraphChange(WireStruct):
    """Change of the definition of a workflow."""

    at: Instant
    user_id: str
    user_name: str
    """Name or mail address; the id of a user that is no longer kept."""


class RunGraph(WireStruct):
    """Definition that a run executes, with the states of its nodes but without their inputs and outputs."""

    execution_id: str
    workflow_id: str
    workflow_name: str | None
    """Null if the caller may not read the workflow, or if it was deleted."""
    definition_hash: str
    is_current: bool | None
    """Whether the workflow still has this definition; null as `workflowName`."""
    nodes: Sequence[RunGraphNode]
    """Empty if the definition is not stored any more."""
    connections: Sequence[ShownConnection]
    states: Sequence[NodeState]
    previous_execution_id: str | None
    """Newest completed run of the workflow among the 20 before this one, or the 500 before a failed one."""
    previous_version: int | None
    """Version that `previousExecutionId` executed; null if it had the same definition, or one that no version has."""
    last_change: GraphChange | None
    """Last change of the definition between that run and this one; null if both have the same, or as `workflowName`."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Show the graph of an execution: the definition that ran, and the state of each node.

    Inputs and outputs are left out: `GET /executions/{id}/spans/{sub}` shows those of one node.
    """
    gateway, caller = request.gateway, request.caller
    key = await gateway.access.find_key(request.path_params["id"], caller)
    async with gateway.database.read_snapshot() as connection:
        rows = await run_graph_rows.read_rows(connection, key)
    if rows is None:
        raise errors.not_found("execution")
    workflow = await _load_workflow(request, rows)
    with_config = GraphExpansion.CONFIG in request.query[EXPAND]
    # In a thread, so that large graphs do not block other requests.
    shown = await asyncio.to_thread(
        _show, key.execution_id, rows, workflow, gateway.catalog, with_config=with_config
    )
    if rows.steps:
        _add_progress(
            shown, rows, StepQuestions(gateway.settings.public_url, key.execution_id, rows.questions)
        )
    return JsonResponse(shown)


async def _load_workflow(request: GatewayRequest, rows: RunGraphRows) -> LoadedWorkflow | None:
    """Return the workflow of a run as it is now; None if the caller may not read it."""
    workflows, head = request.gateway.workflows, rows.head
    try:
        workflow = await workflows.load(head.workflow_id, request.caller)
        if workflow.revision != rows.revision:
            # Another process has changed it.
            workflows.forget(head.organization_id, head.workflow_id)
            workflow = await workflows.load(head.workflow_id, request.caller)
    except ApiError:
        return None
    return workflow


def _show(
    execution_id: str,
    rows: RunGraphRows,
    workflow: LoadedWorkflow | None,
    catalog: NodeCatalog,
    *,
    with_config: bool,
) -> RunGraph:
    """Return the graph of a run as the API shows it; `workflow` is the present one, None if the caller may
    not read it.
    """
    definition = decoding.decode(rows.definition) if rows.definition else {}
    catalog = custom_types.catalog_of_definition(catalog, definition)
    connections = definition.get("connections", [])
    nodes = graph_shapes.with_all_positions(definition.get("nodes", []), connections)
    return RunGraph(
        execution_id=execution_id,
        workflow_id=rows.head.workflow_id,
        workflow_name=None if workflow is None else workflow.name,
        definition_hash=rows.head.definition_hash,
        is_current=None if workflow is None else workflow.definition_hash == rows.head.definition_hash,
        nodes=[_show_node(node, catalog, with_config=with_config) for node in nodes],
        connections=[
            ShownConnection(
                id=edge["id"],
                source_node_id=edge["source"],
                source_port=edge["sourcePort"],
                target_node_id=edge["target"],
                target_port=edge["targetPort"],
            )
            for edge in connections
        ],
        states=_add_tools([*_show_states(rows)], rows, nodes, connections),
        previous_execution_id=rows.previous_run,
        previous_version=rows.previous_version,
        last_change=None if workflow is None else _show_change(rows.last_change),
    )


def _show_change(change: DefinitionChange | None) -> GraphChange | None:
    return None if change is None else GraphChange(instant(change.at), change.user_id, change.user_name)


def _add_progress(graph: RunGraph, rows: RunGraphRows, questions: StepQuestions) -> None:
    """Set the progress of the agents that have not ended, in the states of the graph."""
    definition = decoding.decode(rows.definition) if rows.definition else {}
    configs = {node["id"]: node.get("config") or {} for node in definition.get("nodes", [])}
    for state in graph.states:
        steps = [step for step in rows.steps if step.node_id == state.node_id]
        if steps:
            state.agent = _show_progress(steps, configs.get(state.node_id, {}).get("budget"), questions)


def _show_progress(
    steps: Sequence[AgentStep],
    budget: Any,  # noqa: ANN401 - an object, or an expression
    questions: StepQuestions,
) -> AgentProgress:
    """Return the progress of an agent by its steps, of which there is at least one, and by the budget of its
    definition.
    """
    limits = budget if isinstance(budget, dict) else {}
    tokens, cost = limits.get("maxTokens"), limits.get("maxCost")
    return AgentProgress(
        steps=steps[-1].number + 1,
        open_steps=[
            OpenStep(
                number=step.number,
                kind=step.kind,
                name=step.name,
                status=step.status,
                started_at=instant(step.started_at),
                question=questions.show(step),
            )
            for step in steps
            if step.status in {StepStatus.STARTED, StepStatus.WAITING}
        ][:SHOWN_OPEN_STEPS],
        usage=model_usage.sum_records([call for step in steps for call in step.model_calls]),
        max_tokens=tokens if isinstance(tokens, int) else None,
        max_cost=None if cost is None or "{{" in str(cost) else str(cost),
    )


def _show_node(node: Mapping[str, Any], catalog: NodeCatalog, *, with_config: bool) -> RunGraphNode:
    position = node["position"]
    return RunGraphNode(
        id=node["id"],
        label=node["label"],
        type=node["type"],
        effect=_find_effect(node, catalog),
        position=CanvasPosition(x=position["x"], y=position["y"]),
        config=_hide(node.get("config") or {}) if with_config else UNSET,
    )


def _find_effect(node: Mapping[str, Any], catalog: NodeCatalog) -> NodeEffect | None:
    """Return the effect of a node on the outside, by its type and config; None if the type is gone."""
    try:
        node_type = catalog.get(node["type"], node.get("version"))
    except LookupError:
        return None
    return node_type.effect.of(catalog.with_defaults(node_type, node.get("config") or {}))


def _hide(config: Mapping[str, Json]) -> Mapping[str, Any]:
    """Return a node's config without values that look like secrets."""
    kept, _ = inline_secrets.remove_secrets(dict(config))
    return kept if isinstance(kept, dict) else {}


# ── states ──────────────────────────────────────────────────────────────────────────────────────────────────


def _show_states(rows: RunGraphRows) -> Iterator[NodeState]:
    """Yield the states of nodes with spans outside of loops, then of the nodes that ran only inside loops."""
    whole = {row.node_id for row in rows.nodes}
    for row in rows.nodes:
        yield _show_state(row, rows, rows.counts.get(row.node_id))
    for node_id, counts in rows.counts.items():
        if node_id not in whole:
            yield _show_state(rows.iterations[node_id][0], rows, counts)


def _show_state(row: Recorded, rows: RunGraphRows, counts: IterationCounts | None) -> NodeState:
    """Return the state of a node as the API shows it; `row` is its span outside of loops, or that of its
    first iteration.

    `counts` are those of its iterations, None for a node that has none; in a loop, the state is the worst of
    all iterations.
    """
    is_in_loop = bool(row.iteration) and counts is not None
    started_at, ended_at = (
        (counts.started_at, counts.ended_at) if is_in_loop and counts else (row.started_at, row.ended_at)
    )
    attempts = rows.attempts.get(row.node_id, ())
    previous = None if is_in_loop else rows.durations.get(row.node_id)
    return NodeState(
        node_id=row.node_id,
        node_label=row.label,
        node_type=row.type,
        status=_worst_status(counts.by_status) if is_in_loop and counts else row.status,
        port=None if is_in_loop else row.port,
        attempt=max([row.attempt, *(one.attempt for one in attempts)]),
        started_at=optional_instant(started_at),
        ended_at=optional_instant(ended_at),
        wake_at=optional_instant(row.wake_at),
        duration_ms=None if is_in_loop else _count_milliseconds(row.started_at, row.ended_at),
        previous_duration_ms=None if previous is None else previous // _MILLISECOND,
        iteration_counts=counts.by_status if counts else {},
        iterations=[
            IterationState(
                iteration=one.iteration,
                status=one.status,
                attempt=one.attempt,
                started_at=optional_instant(one.started_at),
                ended_at=optional_instant(one.ended_at),
            )
            for one in rows.iterations.get(row.node_id, ())
        ],
        failed_attempts=[
            AttemptTimes(
                iteration=one.iteration,
                attempt=one.attempt,
                started_at=optional_instant(one.started_at),
                ended_at=optional_instant(one.ended_at),
            )
            for one in attempts
        ],
    )


def _add_tools(
    states: list[NodeState],
    rows: RunGraphRows,
    nodes: Sequence[Mapping[str, Any]],
    connections: Sequence[Mapping[str, Any]],
) -> Sequence[NodeState]:
    """Return states with those of the tools that agents have called; only calls that wait have spans of their own."""
    if not rows.tool_calls:
        return states
    from engine.agents import agent_wiring, direct_tools  # noqa: PLC0415 - for runs whose agents have called tools

    by_node = {state.node_id: state for state in states}
    by_id = {node["id"]: GraphNode.from_stored(node) for node in nodes}
    calls = {(sums.agent_id, sums.name): sums for sums in rows.tool_calls}
    for edge in connections:
        tool = by_id.get(edge["source"])
        if tool is None or edge["targetPort"] != agent_wiring.PORT_OF_TOOLS:
            continue
        sums = calls.get((edge["target"], direct_tools.name_tool(tool)))
        if sums is None:
            continue
        if tool.id not in by_node:
            by_node[tool.id] = _show_tool(tool, sums)
            states.append(by_node[tool.id])
        else:
            by_node[tool.id].calls = sums.calls
    return states


def _show_tool(tool: GraphNode, sums: ToolCallSums) -> NodeState:
    status = ShownSpanStatus.COMPLETED
    if sums.open:
        status = ShownSpanStatus.RUNNING
    elif sums.failed == sums.calls:
        status = ShownSpanStatus.FAILED
    return NodeState(
        node_id=tool.id,
        node_label=tool.label,
        node_type=tool.type,
        status=status,
        port=None,
        attempt=1,
        started_at=instant(sums.started_at),
        ended_at=None if sums.open else optional_instant(sums.ended_at),
        wake_at=None,
        duration_ms=sums.spent // _MILLISECOND,
        previous_duration_ms=None,
        iteration_counts={},
        iterations=[],
        failed_attempts=[],
        calls=sums.calls,
    )


def _worst_status(counts: Mapping[str, int]) -> str:
    return next((status for status in _WORST_FIRST if counts.get(status)), next(iter(counts)))


def _count_milliseconds(started_at: datetime | None, ended_at: datetime | None) -> int | None:
    if started_at is None or ended_at is None:
        return None
    return max((ended_at - started_at) // _MILLISECOND, 0)
