"""Exposure of agents: texts that outsiders write, private data, and ways out, by the types of nodes.

Provenance decides, not contents: a model can be talked into things by any text that it reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from engine.agents.agent_steps import AGENT_TYPE
from engine.agents.agent_wiring import MAX_AGENT_DEPTH, PORT_OF_TOOLS, target_of
from engine.agents.tool_kinds import SUB_WORKFLOW_TYPE
from engine.agents.workflow_traits import traits_of
from engine.node_api import MCP_TOOL_TYPE, TOOL_TYPE, NodeEffect

if TYPE_CHECKING:
    from engine.agents.workflow_traits import TraitsById
    from engine.graph import GraphNode, ParsedGraph

UNTRUSTED_TYPES: Final = frozenset(
    {
        *("email-trigger", "event-trigger", "queue-trigger", "wait-for-event", "webhook"),
        *(
            "http-request",
            MCP_TOOL_TYPE,
            "email-parse",
            "attachment-read",
            "file-source",
            "s3-source",
            "sub-workflow",
        ),
    }
)
"""Types whose output may hold text of outsiders: mails, webhooks, messages of queues, events, web pages, shared
documents, and other workflows."""
PRIVATE_TYPES: Final = frozenset(
    {
        *("postgresql-source", "mysql-source", "sqlite-source", "s3-source", "file-source"),
        MCP_TOOL_TYPE,
    }
)
"""Types whose output is data of the organization."""
NAMESPACE_SEPARATOR: Final = "/"
"""Part of the names of custom types, whose nodes task workers do; no type of the catalog has it."""
_SENDING_TYPES: Final = frozenset({"email-send"})
_HTTP_TYPE: Final = "http-request"
ARGUMENT_HOST: Final = re.compile(r"^[^/?#]*(?://[^/?#]*)?\{\{[^}]*\bargs\b")
"""Beginning of a URL whose host comes from the model."""
EXPRESSION_HOST: Final = re.compile(r"^[^/?#]*(?://[^/?#]*)?\{\{")
"""Beginning of a URL whose host comes from the data of a run."""
NO_TRAITS: Final[TraitsById] = MappingProxyType({})


def list_untrusted(agent: GraphNode, graph: ParsedGraph, traits: TraitsById = NO_TRAITS) -> list[GraphNode]:
    """Return the nodes before an agent, and the nodes that do the calls of its tools, with outputs that may hold text
    of outsiders.
    """
    nodes = [*_list_ancestors(agent, graph), *_list_targets(agent, graph)]
    return [node for node in nodes if reads_outside_text(node, traits)]


def has_tainted_input(node: GraphNode, graph: ParsedGraph) -> bool:
    """Return whether text of outsiders may reach a node, by the types of the nodes before it.

    Whether the input of a sub-workflow run holds such a text is known only in the run (`RunCaller.is_tainted`).
    """
    return any(gives_outside_text(each.type) for each in _list_ancestors(node, graph))


def gives_outside_text(type_: str) -> bool:
    """Return whether the output of a node of this type may hold text of outsiders, as that of any custom type may."""
    return type_ in UNTRUSTED_TYPES or NAMESPACE_SEPARATOR in type_


def reads_outside_text(node: GraphNode, traits: TraitsById) -> bool:
    """Return whether the output of a node may hold text of outsiders; for a sub-workflow node, by that workflow's
    traits.
    """
    if node.type == SUB_WORKFLOW_TYPE:
        return traits_of(node, traits).gives_outside_text
    return gives_outside_text(node.type)


def list_private(agent: GraphNode, graph: ParsedGraph, traits: TraitsById = NO_TRAITS) -> list[GraphNode]:
    """Return the nodes before an agent, and the nodes that do the calls of its tools, with outputs of private data."""
    nodes = [*_list_ancestors(agent, graph), *_list_targets(agent, graph)]
    return [node for node in nodes if reads_private_data(node, traits)]


def reads_private_data(node: GraphNode, traits: TraitsById) -> bool:
    """Return whether the output of a node may be data of the organization.

    For a sub-workflow node, the traits of that workflow tell.
    """
    if node.type == SUB_WORKFLOW_TYPE:
        return traits_of(node, traits).gives_private_data
    return node.type in PRIVATE_TYPES or (node.type == _HTTP_TYPE and bool(node.config.get("dataSource")))


def can_send(
    node: GraphNode,
    effect: NodeEffect,
    traits: TraitsById = NO_TRAITS,
    *,
    free_host: re.Pattern[str] = ARGUMENT_HOST,
) -> bool:
    """Return whether a node with this effect can send data out of the server: by a mail, a task, HTTP or a tool server.

    HTTP counts for a write, and for an address whose host matches `free_host`: by default one that a model fills in. A
    tool server counts for a write, and a workflow by its traits. Other nodes count as unable, even if they write.
    """
    if node.type == SUB_WORKFLOW_TYPE:
        return traits_of(node, traits).can_send
    if node.type == _HTTP_TYPE:
        url = node.config.get("url")
        # Without an address in its config, the model fills it in.
        return effect is NodeEffect.WRITE or not isinstance(url, str) or free_host.match(url) is not None
    if node.type == MCP_TOOL_TYPE:
        return effect is NodeEffect.WRITE
    return node.type in _SENDING_TYPES or NAMESPACE_SEPARATOR in node.type


def _list_targets(agent: GraphNode, graph: ParsedGraph, depth: int = 1) -> Iterator[GraphNode]:
    """Yield the nodes that do the calls of an agent's tools, and of the tools of agents among them."""
    for edge in graph.inbound[agent.id]:
        if edge.target_port == PORT_OF_TOOLS:
            target = target_of(graph.by_id[edge.source])
            if target is not None:
                yield target
                if target.type == AGENT_TYPE and depth < MAX_AGENT_DEPTH:
                    yield from _list_targets(target, graph, depth + 1)


def _list_ancestors(node: GraphNode, graph: ParsedGraph) -> list[GraphNode]:
    """Return the nodes from which connections lead to a node, directly or through others, the nearest first.

    Connections to its own port `tools` don't count. The tools of an earlier agent do, since its answer is made of their
    results: each `tool` is returned as the node that does its calls.
    """
    found: dict[str, None] = {}
    waiting = [edge.source for edge in graph.inbound[node.id] if edge.target_port != PORT_OF_TOOLS]
    while waiting:
        node_id = waiting.pop(0)
        if node_id not in found and node_id != node.id:
            found[node_id] = None
            waiting += [edge.source for edge in graph.inbound[node_id]]
    nodes = (graph.by_id[node_id] for node_id in found)
    return [(target_of(each) or each) if each.type == TOOL_TYPE else each for each in nodes]
