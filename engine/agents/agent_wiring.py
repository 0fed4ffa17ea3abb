"""Wiring of agents: the nodes at their ports for models and tools serve them, and never run alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from engine import content_recording
from engine.agents import tool_kinds
from engine.agents.agent_steps import AGENT_TYPE
from engine.graph import GraphNode, ParsedGraph
from engine.node_api import TOOL_TYPE

if TYPE_CHECKING:
    from engine.values import Json

PORT_OF_MODELS: Final = "ai"
PORT_OF_TOOLS: Final = "tools"
PROVIDER_PORTS: Final = frozenset({PORT_OF_MODELS, PORT_OF_TOOLS})
MAX_AGENT_DEPTH: Final = 3
"""Maximum number of agents one inside another, the outermost among them."""
MAX_TOOLS: Final = 64
"""Maximum number of tools of one agent; each request to its model describes all of them."""
MAX_INNER_TOOLS: Final = 256
"""Maximum number of tools of the agents inside one agent; one tool of several agents counts for each of them."""
TYPES_THAT_WAIT: Final = frozenset(
    {
        *("human-input", "tool", "wait", "wait-for-event"),
        *("wait-for-signal", "webhook-response"),
    }
)
"""Types that can't be the target of a tool: they wait for a person, a time or an event."""


def list_providers(graph: ParsedGraph) -> frozenset[str]:
    """Return the ids of the nodes from which an edge leads to a port for models or tools (`ai`, `tools`)."""
    return frozenset(edge.source for edge in graph.edges if edge.target_port in PROVIDER_PORTS)


def remove_providers(graph: ParsedGraph) -> ParsedGraph:
    """Return a graph without the nodes that provide models and tools, and without their edges."""
    providers = list_providers(graph)
    if not providers:
        return graph
    return replace(
        graph,
        nodes=[node for node in graph.nodes if node.id not in providers],
        edges=[edge for edge in graph.edges if edge.source not in providers and edge.target not in providers],
    )


def find_rewired_agents(before: ParsedGraph, after: ParsedGraph) -> frozenset[str]:
    """Return the ids of the agents in `after` whose models or tools are not the same in `before`; also of new agents
    that have any.
    """
    return frozenset(
        agent.id
        for agent in list_agents(after.nodes)
        if _collect_providers(before, agent.id) != _collect_providers(after, agent.id)
    )


def _collect_providers(graph: ParsedGraph, agent_id: str) -> Sequence[tuple[object, ...]]:
    """Return the contents of the models and tools of an agent in the order of their edges; none for an unknown id."""
    edges = [edge for edge in graph.inbound.get(agent_id, ()) if edge.target_port in PROVIDER_PORTS]
    nodes = [graph.by_id[edge.source] for edge in edges]
    return [
        (edge.target_port, node.type, node.version, dict(node.config))
        for edge, node in zip(edges, nodes, strict=True)
    ]


def count_nodes_that_run(
    nodes: Sequence[Mapping[str, Json]], connections: Sequence[Mapping[str, Json]]
) -> int:
    """Return the number of stored nodes without those that only serve agents."""
    providers = {one.get("source") for one in connections if one.get("targetPort") in PROVIDER_PORTS}
    return sum(node.get("id") not in providers for node in nodes)


def target_of(tool: GraphNode) -> GraphNode | None:
    """Return the node that does the calls of a tool: the target of a `tool` node, under the tool's id, or the node
    itself.

    None for a `tool` node whose config names no valid target.
    """
    if tool.type != TOOL_TYPE:
        return tool
    given = tool.config.get("target")
    kind = tool_kinds.find_kind(given) if isinstance(given, dict) else None
    target = kind.build_target(given) if kind is not None and isinstance(given, dict) else None
    if target is None:
        return None
    return GraphNode(
        id=tool.id, type=target.type, version=target.version, label=tool.label, config=target.config
    )


def find_unrecorded(agent: GraphNode, graph: ParsedGraph, depth: int = 1) -> GraphNode | None:
    """Return the node whose config prevents the recording of an agent's contents; None if they are recorded.

    It is the agent itself, its model, a tool, or such a node of an agent inside it, since each of them sees the
    contents. `depth` is 1 for the outermost agent.
    """
    if not content_recording.is_recorded(agent.type, agent.config):
        return agent
    for edge in graph.inbound[agent.id] if depth <= MAX_AGENT_DEPTH else ():
        if edge.target_port not in PROVIDER_PORTS:
            continue
        provider = graph.by_id[edge.source]
        target = target_of(provider) if edge.target_port == PORT_OF_TOOLS else None
        if not content_recording.is_recorded(provider.type, provider.config):
            return provider
        if target is None:
            continue
        if target.type == AGENT_TYPE:
            found = find_unrecorded(target, graph, depth + 1)
        else:
            found = None if content_recording.is_recorded(target.type, target.config) else target
        if found is not None:
            return found
    return None


def has_too_many_tools(agent: GraphNode, graph: ParsedGraph) -> bool:
    """Return whether the agents inside an agent have more than 256 tools together; a shared tool counts for each agent.

    Call it before the tools are checked or compiled, as their number may multiply with each level. The count stops
    after 257.
    """
    inner = _iterate_inner_tools(agent, graph, 1)
    return next(islice(inner, MAX_INNER_TOOLS, None), None) is not None


def _iterate_inner_tools(agent: GraphNode, graph: ParsedGraph, depth: int) -> Iterator[str]:
    """Yield the ids of the tools of the agents inside an agent, as often as they are connected."""
    for edge in graph.inbound[agent.id] if depth < MAX_AGENT_DEPTH else ():
        if edge.target_port != PORT_OF_TOOLS:
            continue
        target = target_of(graph.by_id[edge.source])
        if target is None or target.type != AGENT_TYPE:
            continue
        yield from (each.source for each in graph.inbound[target.id] if each.target_port == PORT_OF_TOOLS)
        yield from _iterate_inner_tools(target, graph, depth + 1)


def list_direct_tools(graph: ParsedGraph) -> frozenset[str]:
    """Return the ids of the nodes that are connected to a port for tools themselves, without a `tool`."""
    sources = {edge.source for edge in graph.edges if edge.target_port == PORT_OF_TOOLS}
    return frozenset(node.id for node in graph.nodes if node.id in sources and node.type != TOOL_TYPE)


def name_target_config(tool: GraphNode) -> str:
    """Return the path in the config of a `tool` node to its target's config, such as `target.node.config`.

    It is `target` for an unknown kind of tool.
    """
    given = tool.config.get("target")
    kind = tool_kinds.find_kind(given) if isinstance(given, dict) else None
    return "target" if kind is None else kind.config_path


def list_agents(nodes: Sequence[GraphNode]) -> list[GraphNode]:
    """Return the agents among nodes."""
    return [node for node in nodes if node.type == AGENT_TYPE]
