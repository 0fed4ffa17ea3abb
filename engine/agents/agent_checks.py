"""Checks of agents: their models and tools, and the effects that they may have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from engine.agents import agent_exposure, direct_tools, tool_reach, unrecorded_agents
from engine.agents.agent_exposure import NO_TRAITS
from engine.agents.agent_steps import AGENT_TYPE
from engine.agents.agent_wiring import (
    MAX_AGENT_DEPTH,
    MAX_INNER_TOOLS,
    MAX_TOOLS,
    PORT_OF_MODELS,
    PORT_OF_TOOLS,
    PROVIDER_PORTS,
    TYPES_THAT_WAIT,
    has_too_many_tools,
    list_agents,
    list_providers,
    name_target_config,
    target_of,
)
from engine.agents.workflow_traits import name_workflow, traits_of
from engine.findings import FindingType, GraphFinding
from engine.node_api import TOOL_TYPE, NodeEffect, UnknownNodeType

if TYPE_CHECKING:
    from engine.agents.workflow_traits import TraitsById
    from engine.graph import GraphEdge, GraphNode, ParsedGraph
    from engine.node_api import NodeType
    from engine.node_lookup import NodeTypeLookup

MODEL_TYPE: Final = "llm"
EFFECTS_BY_DEFAULT: Final = ("read",)


def find_problems(
    graph: ParsedGraph,
    types: Mapping[str, NodeType],
    catalog: NodeTypeLookup,
    traits: TraitsById = NO_TRAITS,
) -> Iterator[GraphFinding]:
    """Yield the findings about the agents of a graph, and about the nodes at their ports `ai` and `tools`.

    `types` has the known types by node id; agents without one are skipped. `traits` has those of called workflows by
    id, as far as these can be read.
    """
    providers = list_providers(graph)
    for agent in list_agents(graph.nodes):
        if agent.id not in types or agent.id in providers:
            continue
        if has_too_many_tools(agent, graph):
            message = f'The agents inside "{agent.label}" have more than {MAX_INNER_TOOLS} tools in all'
            suggestion = "Connect fewer tools to them: one of several agents counts for each of them."
            yield GraphFinding(FindingType.INVALID_CONFIG, message, suggestion, agent.id)
            continue
        yield from _check_agent(agent, graph, types, catalog, traits)
        yield from unrecorded_agents.find_problems(agent, graph, catalog)


def _check_agent(
    agent: GraphNode,
    graph: ParsedGraph,
    types: Mapping[str, NodeType],
    catalog: NodeTypeLookup,
    traits: TraitsById,
    depth: int = 1,
) -> Iterator[GraphFinding]:
    """Yield the findings about an agent, its model and tools, and the agents among its tools.

    `depth` is 1 for an agent that is no tool of another one.
    """
    edges = [edge for edge in graph.inbound[agent.id] if edge.target_port in PROVIDER_PORTS]
    models = [edge for edge in edges if edge.target_port == PORT_OF_MODELS]
    if not models and not agent.config.get("model"):
        message = f'Node "{agent.label}" (agent) has no language model'
        suggestion = "Connect an llm to its port ai, or set model in its config."
        yield GraphFinding(FindingType.MISSING_CONFIG, message, suggestion, agent.id)
    for extra in models[1:]:
        message = f'Node "{agent.label}" (agent) has a second language model'
        yield GraphFinding(
            FindingType.INVALID_CONFIG, message, "Connect one, with fallbackModelIds.", agent.id, extra.id
        )
    if len(edges) - len(models) > MAX_TOOLS:
        message = f'Node "{agent.label}" (agent) has more than {MAX_TOOLS} tools'
        suggestion = "Connect fewer tools, or let agents inside it have some of them."
        yield GraphFinding(FindingType.INVALID_CONFIG, message, suggestion, agent.id)
    yield from _find_exfiltration_path(agent, graph, catalog, traits)
    names: dict[str, str] = {}
    for edge in edges:
        provider = graph.by_id[edge.source]
        yield from _check_provider(provider, edge, graph)
        if edge.target_port == PORT_OF_TOOLS and provider.id in types:
            yield from _check_tool(provider, agent, graph, catalog, traits)
            nested = target_of(provider)
            if nested is not None and nested.type == AGENT_TYPE:
                if depth < MAX_AGENT_DEPTH:
                    yield from _check_agent(nested, graph, types, catalog, traits, depth + 1)
                else:
                    message = f'Tool "{provider.label}": agents nest at most {MAX_AGENT_DEPTH} deep'
                    suggestion = "Connect its tools to the agent above it."
                    yield GraphFinding(FindingType.INVALID_CONFIG, message, suggestion, provider.id)
            name = direct_tools.name_tool(provider)
            if name in names:
                message = f"Two tools of the agent {agent.label!r} have the name {name!r}"
                suggestion = "Give each a name of its own."
                yield GraphFinding(FindingType.INVALID_CONFIG, message, suggestion, provider.id)
            names[name] = provider.id


def _find_exfiltration_path(
    agent: GraphNode, graph: ParsedGraph, catalog: NodeTypeLookup, traits: TraitsById
) -> Iterator[GraphFinding]:
    """Yield a warning if an agent reads texts of outsiders and private data, and can send without an approval."""
    untrusted, private = (
        agent_exposure.list_untrusted(agent, graph, traits),
        agent_exposure.list_private(agent, graph, traits),
    )
    if not untrusted or not private:
        return
    tools = tool_reach.list_tools(agent, graph)
    exit_ = next(
        (tool for tool in tools if tool_reach.sends_freely(tool, agent, graph, catalog, traits)), None
    )
    if exit_ is None:
        return
    first, second = _choose_two(untrusted, private)
    message = (
        f'The agent "{agent.label}" may be talked into sending data away: "{first.label}" ({first.type}) gives it texts'
        f' of outsiders, "{second.label}" ({second.type}) private data, and "{exit_.label}" sends without an approval'
    )
    suggestion = (
        'Set approval to "tainted", fix the address in the config of the tool, or remove one of the three.'
    )
    yield GraphFinding(FindingType.AGENT_EXFILTRATION_PATH, message, suggestion, agent.id)


def _choose_two(untrusted: Sequence[GraphNode], private: Sequence[GraphNode]) -> tuple[GraphNode, GraphNode]:
    """Return an untrusted and a private source; two different nodes if there are such."""
    pairs = [(one, other) for one in untrusted for other in private]
    return next((pair for pair in pairs if pair[0].id != pair[1].id), pairs[0])


def _check_provider(provider: GraphNode, edge: GraphEdge, graph: ParsedGraph) -> Iterator[GraphFinding]:
    """Yield the findings about the node from which `edge` leads to the port `ai` or `tools` of an agent.

    They concern its type, and its other connections, which would be ignored.
    """
    if edge.target_port == PORT_OF_MODELS and provider.type != MODEL_TYPE:
        message = (
            f'Node "{provider.label}" ({provider.type}) can\'t be connected to the port {edge.target_port}'
        )
        suggestion = f"Connect a node of the type {MODEL_TYPE}."
        yield GraphFinding(FindingType.INVALID_CONFIG, message, suggestion, provider.id, edge.id)
    target = target_of(provider)
    is_agent = target is not None and target.type == AGENT_TYPE
    ignored = [
        *(one for one in graph.inbound[provider.id] if not (is_agent and one.target_port in PROVIDER_PORTS)),
        *(one for one in graph.outbound[provider.id] if one.target_port not in PROVIDER_PORTS),
    ]
    for one in ignored:
        message = f'Node "{provider.label}" ({provider.type}) serves an agent, and does not run by itself'
        suggestion = f"Remove connection {one.id}, or use another node."
        yield GraphFinding(FindingType.INVALID_CONFIG, message, suggestion, provider.id, one.id)


def _check_tool(
    tool: GraphNode, agent: GraphNode, graph: ParsedGraph, catalog: NodeTypeLookup, traits: TraitsById
) -> Iterator[GraphFinding]:
    """Yield the problems of a tool's target: its type and config, and an effect that its agent may not have."""
    target = target_of(tool)
    if target is None:
        return  # the schema of the node reports it
    try:
        node_type = catalog.get(target.type, target.version)
    except UnknownNodeType as error:
        suggestion = "Choose a type and version from the catalog."
        yield GraphFinding(FindingType.UNKNOWN_NODE_TYPE, error.message, suggestion, tool.id)
        return
    if not _can_be_called(node_type):
        message = f'Tool "{tool.label}": the type {target.type} can\'t be a tool: it starts, loops or waits'
        suggestion = "Use a node that returns a result, a workflow, or a node of your own workers."
        yield GraphFinding(FindingType.INVALID_CONFIG, message, suggestion, tool.id)
        return
    if tool.type != TOOL_TYPE:
        # Its config is checked like that of every node, except for the fields that the model fills in.
        for name in direct_tools.list_unfilled(tool, node_type):
            message = f'Tool "{tool.label}" ({tool.type}): {name} is required, and a model can\'t fill it in'
            yield GraphFinding(FindingType.MISSING_CONFIG, message, f"Set {name} in its config.", tool.id)
        yield from _check_effect(tool, target, agent, graph, catalog, traits)
        return
    from engine import model_references  # noqa: PLC0415 - loaded with the first agent

    prefix = tuple(name_target_config(tool).split("."))
    unnamed = {one.steps for one in model_references.list_placeholders(tool, graph, catalog)}
    for problem in catalog.config_problems(node_type, target.config):
        if (*prefix, *problem.steps) in unnamed:
            continue  # the findings about the tool itself name it
        kind = FindingType.MISSING_CONFIG if problem.keyword == "required" else FindingType.INVALID_CONFIG
        message = f'Tool "{tool.label}" ({target.type}): {problem.path}: {problem.message}'
        yield GraphFinding(kind, message, "See the schema of the node type.", tool.id)
    yield from _check_effect(tool, target, agent, graph, catalog, traits)


def _check_effect(
    tool: GraphNode,
    target: GraphNode,
    agent: GraphNode,
    graph: ParsedGraph,
    catalog: NodeTypeLookup,
    traits: TraitsById,
) -> Iterator[GraphFinding]:
    """Yield a finding if a tool writes while its agent may only read.

    That is an error if the graph alone shows it. If a workflow that the tool calls writes, it is a warning, since that
    workflow may change: a run withholds the tool.
    """
    allowed = agent.config.get("effects", list(EFFECTS_BY_DEFAULT))
    if not isinstance(allowed, list) or NodeEffect.WRITE.value in allowed:
        return
    suggestion = 'Add "write" to effects in the config of the agent, or remove the tool.'
    reading = NodeEffect.READ
    if tool_reach.find_effect(target, graph, catalog, of_unknown=reading) is NodeEffect.WRITE:
        message = f'Tool "{tool.label}" writes, and the agent "{agent.label}" may only read'
        yield GraphFinding(FindingType.INVALID_CONFIG, message, suggestion, tool.id)
    elif tool_reach.find_effect(target, graph, catalog, traits, of_unknown=reading) is NodeEffect.WRITE:
        message = (
            f'Tool "{tool.label}" calls a workflow that writes, and the agent "{agent.label}" may only read: its model'
            " does not get the tool"
        )
        yield GraphFinding(FindingType.TOOL_WITHHELD, message, suggestion, tool.id)


def find_exposed_starts(graph: ParsedGraph, traits: TraitsById) -> Iterator[GraphFinding]:
    """Yield a warning for each node that gives texts of outsiders to another workflow with an exposed agent.

    Such an agent reads private data and can send without an approval. Workflows without `traits` are skipped.
    """
    for node in graph.nodes:
        label = traits_of(node, traits).exposed_agent if name_workflow(node) in traits else ""
        if label and agent_exposure.has_tainted_input(node, graph):
            message = (
                f'Node "{node.label}" ({node.type}) gives texts of outsiders to the agent "{label}", which reads'
                " private data and sends without an approval"
            )
            suggestion = 'Set approval to "tainted" in the config of that agent.'
            yield GraphFinding(FindingType.AGENT_EXFILTRATION_PATH, message, suggestion, node.id)


def _can_be_called(node_type: NodeType) -> bool:
    """Return whether a node of this type returns a result for one input, so that an agent can call it."""
    return (
        node_type.runnable
        and not (node_type.is_trigger or node_type.loops or node_type.joins)
        and node_type.type not in TYPES_THAT_WAIT
    )
