"""Reach of tools: the effect of a call, and whether it can send data without an approval; also that of workflows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from engine.agents import agent_exposure, agent_wiring, workflow_traits
from engine.agents.agent_exposure import EXPRESSION_HOST, NO_TRAITS
from engine.agents.agent_steps import AGENT_TYPE
from engine.agents.agent_wiring import MAX_AGENT_DEPTH, PORT_OF_TOOLS, target_of
from engine.agents.tool_kinds import SUB_WORKFLOW_TYPE
from engine.agents.workflow_traits import WorkflowTraits
from engine.node_api import NodeEffect, UnknownNodeType

if TYPE_CHECKING:
    from engine.agents.workflow_traits import TraitsById
    from engine.graph import GraphNode, ParsedGraph
    from engine.node_lookup import NodeTypeLookup
    from engine.values import Json


def list_tools(agent: GraphNode, graph: ParsedGraph) -> list[GraphNode]:
    """Return the nodes at the port `tools` of an agent."""
    edges = [edge for edge in graph.inbound[agent.id] if edge.target_port == PORT_OF_TOOLS]
    return [graph.by_id[edge.source] for edge in edges]


def find_effect(
    node: GraphNode,
    graph: ParsedGraph,
    catalog: NodeTypeLookup,
    traits: TraitsById = NO_TRAITS,
    *,
    of_unknown: NodeEffect = NodeEffect.WRITE,
    depth: int = 1,
) -> NodeEffect:
    """Return the effect of a node: that of its type and config, or of the workflow that it calls.

    An agent writes if one of its tools does. `of_unknown` is the effect of workflows without traits, and of types that
    are unknown. `depth` is 1 except for the tools of an agent, for which the function calls itself.
    """
    if node.type == SUB_WORKFLOW_TYPE:
        known = traits.get(workflow_traits.name_workflow(node))
        return of_unknown if known is None else known.effect
    if node.type != AGENT_TYPE:
        try:
            node_type = catalog.get(node.type, node.version)
        except UnknownNodeType:
            return of_unknown
        return node_type.effect.of(catalog.with_defaults(node_type, node.config))
    targets = [target_of(tool) for tool in list_tools(node, graph)] if depth <= MAX_AGENT_DEPTH else []
    effects = (
        find_effect(each, graph, catalog, traits, of_unknown=of_unknown, depth=depth + 1)
        for each in targets
        if each is not None
    )
    return NodeEffect.WRITE if NodeEffect.WRITE in effects else NodeEffect.READ


def sends_freely(
    tool: GraphNode,
    agent: GraphNode,
    graph: ParsedGraph,
    catalog: NodeTypeLookup,
    traits: TraitsById = NO_TRAITS,
    depth: int = 1,
) -> bool:
    """Return whether an agent can send data out of the server by this tool without an approval.

    A tool that is an agent can if one of its own tools can. The approval rule `tainted` counts like `writes`, since it
    asks once texts of outsiders are read. False for unknown types, and for a write that the agent may not do. `depth`
    is 1 except for the tools of an agent inside, for which the function calls itself.
    """
    target = target_of(tool)
    if target is None:
        return False
    try:
        agent_type = catalog.get(agent.type, agent.version)
        catalog.get(target.type, target.version)
    except UnknownNodeType:
        return False
    effect = find_effect(target, graph, catalog, traits)
    config = catalog.with_defaults(agent_type, agent.config)
    allowed = config.get("effects")
    if effect is NodeEffect.WRITE and isinstance(allowed, list) and effect.value not in allowed:
        return False
    rule = tool.config.get("approval") or config.get("approval")
    is_asked = rule == "always" or (rule in {"writes", "tainted"} and effect is NodeEffect.WRITE)
    if target.type == AGENT_TYPE and not is_asked and depth < MAX_AGENT_DEPTH:
        tools = list_tools(target, graph)
        return any(sends_freely(each, target, graph, catalog, traits, depth + 1) for each in tools)
    return not is_asked and agent_exposure.can_send(target, effect, traits)


def describe_workflow(
    graph: ParsedGraph, settings: Mapping[str, Json], catalog: NodeTypeLookup, traits: TraitsById
) -> WorkflowTraits:
    """Return the traits of a workflow: its effect, the sources of its texts and data, and whether these can be sent.

    An action `onFailure` in its `settings` counts as a write that can send. `traits` has the traits of the workflows
    that it calls, by id; without them the worst case counts.
    """
    providers = agent_wiring.list_providers(graph)
    running = [node for node in graph.nodes if node.id not in providers]
    called = [node for node in workflow_traits.iterate_callers(graph) if node.type != AGENT_TYPE]
    agents = agent_wiring.list_agents(running)
    effects = {find_effect(node, graph, catalog, traits) for node in running}
    exits = (
        *(_sends_alone(node, graph, catalog, traits) for node in running if node.type != AGENT_TYPE),
        *(can_send_unapproved(agent, graph, catalog, traits) for agent in agents),
    )
    # A failed run starts the failure workflow, or calls its URL.
    has_failure_action = bool(settings.get("onFailure"))
    return WorkflowTraits(
        NodeEffect.WRITE if has_failure_action or NodeEffect.WRITE in effects else NodeEffect.READ,
        gives_outside_text=any(agent_exposure.reads_outside_text(node, traits) for node in called),
        gives_private_data=any(agent_exposure.reads_private_data(node, traits) for node in called),
        can_send=has_failure_action or any(exits),
        exposed_agent=next(_iterate_exposed_agents(running, graph, catalog, traits), ""),
    )


def can_send_unapproved(
    agent: GraphNode, graph: ParsedGraph, catalog: NodeTypeLookup, traits: TraitsById
) -> bool:
    """Return whether an agent can send data out of the server by one of its tools without an approval.

    Approvals are those in the configs of tools and agent. A read counts if it can send, such as a GET of any URL.
    `traits` has those of called workflows by id.
    """
    return any(sends_freely(tool, agent, graph, catalog, traits) for tool in list_tools(agent, graph))


def _sends_alone(node: GraphNode, graph: ParsedGraph, catalog: NodeTypeLookup, traits: TraitsById) -> bool:
    effect = find_effect(node, graph, catalog, traits)
    return agent_exposure.can_send(node, effect, traits, free_host=EXPRESSION_HOST)


def _iterate_exposed_agents(
    running: list[GraphNode], graph: ParsedGraph, catalog: NodeTypeLookup, traits: TraitsById
) -> Iterator[str]:
    """Yield the labels of agents that read private data and can send it, among the nodes `running` and in workflows
    that these call.
    """
    for node in running:
        if node.type == SUB_WORKFLOW_TYPE:
            if label := workflow_traits.traits_of(node, traits).exposed_agent:
                yield label
        elif node.type == AGENT_TYPE:
            is_private = bool(agent_exposure.list_private(node, graph, traits))
            if is_private and can_send_unapproved(node, graph, catalog, traits):
                yield node.label
