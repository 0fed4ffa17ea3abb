"""Checks of agents whose contents are not recorded: they may only use tools that a new conversation can call again.

A worker that is lost takes the conversation with it, and another one begins anew. It would repeat writes under other
keys, and could not read the answer to a question or to a call that another process does, for which an agent leaves its
worker. Such questions, runs and tasks would also record the arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from engine.agents import tool_reach
from engine.agents.agent_steps import AGENT_TYPE
from engine.agents.agent_wiring import MAX_AGENT_DEPTH, find_unrecorded, target_of
from engine.agents.tool_kinds import SUB_WORKFLOW_TYPE
from engine.content_recording import FIELD
from engine.findings import FindingType, GraphFinding
from engine.node_api import NodeEffect, UnknownNodeType

if TYPE_CHECKING:
    from engine.graph import GraphNode, ParsedGraph
    from engine.node_lookup import NodeTypeLookup

ALWAYS: Final = "always"
"""Approval of all calls, as `engine.agents.agent.ApprovalPolicy` has it, which validation does not load."""


def find_problems(agent: GraphNode, graph: ParsedGraph, catalog: NodeTypeLookup) -> Iterator[GraphFinding]:
    """Yield errors for an agent, and the agents inside it, if its contents are not recorded.

    Such an agent may not write, ask for approval of each call, or have tools that another process performs.
    """
    cause = find_unrecorded(agent, graph)
    if cause is not None:
        yield from _check_agent(agent, cause, graph, catalog)


def _check_agent(
    agent: GraphNode, cause: GraphNode, graph: ParsedGraph, catalog: NodeTypeLookup, depth: int = 1
) -> Iterator[GraphFinding]:
    """Yield an error for each permission or tool of an agent that needs recorded contents, and of agents inside it.

    `cause` is the node because of which the contents are not recorded.
    """
    begin = f'Node "{agent.label}" (agent) has {FIELD}: false'
    if cause.id != agent.id:
        begin += f' by "{cause.label}"'
    effects = agent.config.get("effects")
    if isinstance(effects, list) and NodeEffect.WRITE.value in effects:
        message = f"{begin}, and may write: a conversation that begins again would repeat its writes"
        yield _build_finding(
            agent, message, 'Remove "write" from effects, and let nodes behind the agent write.'
        )
    if agent.config.get("approval") == ALWAYS:
        message = f"{begin}, and asks about each call: a question keeps the arguments"
        yield _build_finding(agent, message, "Choose another approval.")
    for tool in tool_reach.list_tools(agent, graph):
        target = target_of(tool)
        if target is None:
            continue
        if tool.config.get("approval") == ALWAYS:
            message = f'{begin}, and asks about each call of "{tool.label}": a question keeps the arguments'
            yield _build_finding(tool, message, "Choose another approval.")
        if _is_awaited(target, catalog):
            message = f'{begin}, and "{tool.label}" ({target.type}) keeps its arguments in a run or a task'
            yield _build_finding(tool, message, "Use a node that gives its result at once.")
        if target.type == AGENT_TYPE and depth < MAX_AGENT_DEPTH:
            yield from _check_agent(target, cause, graph, catalog, depth + 1)


def _build_finding(node: GraphNode, message: str, suggestion: str) -> GraphFinding:
    return GraphFinding(FindingType.INVALID_CONFIG, message, suggestion, node.id)


def _is_awaited(target: GraphNode, catalog: NodeTypeLookup) -> bool:
    """Return whether another process does the calls of a tool with this target."""
    try:
        node_type = catalog.get(target.type, target.version)
    except UnknownNodeType:
        return False  # other findings name it
    return node_type.task is not None or node_type.type == SUB_WORKFLOW_TYPE
