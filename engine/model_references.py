"""Language models that configs name: placeholders to replace, and the default model of the organization."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from engine.agents.agent_steps import AGENT_TYPE
from engine.agents.agent_wiring import PORT_OF_MODELS, PROVIDER_PORTS, target_of
from engine.config_places import (
    DEFAULT_MODEL,
    MODELS_KIND,
    NodeSection,
    format_place,
    is_resource_id,
    iterate_resource_texts,
    may_name_model,
)
from engine.findings import FindingType, GraphFinding
from engine.graph import GraphNode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from engine.config_places import PlaceSteps, ResourceText
    from engine.graph import ParsedGraph
    from engine.node_lookup import NodeTypeLookup

MODEL_FIELD: Final = "model"

_PLACEHOLDER: Final = re.compile(r"\s*(?:\{\{\s*[A-Z][A-Z0-9_]*\s*\}\}\s*)?")
"""Nothing, or a name in capitals such as `{{AI_MODEL_ID}}`, which no expression can be."""


def list_placeholders(node: GraphNode, graph: ParsedGraph, catalog: NodeTypeLookup) -> list[ResourceText]:
    """Return the fields for a language model, of a node or the target of a tool, that name no model yet.

    They are empty, or hold a placeholder, or `default` in an organization without a default model. The own model of
    an agent is left out if another node provides it.
    """
    return [
        found
        for found in iterate_resource_texts([node], catalog)
        if found.kind == MODELS_KIND
        and _names_none(found.text, catalog)
        and not (found.steps[-1] == MODEL_FIELD and _is_served(found.node, graph))
    ]


def describe_placeholder(node: GraphNode, found: ResourceText) -> GraphFinding:
    """Return the finding about a field of a node that names no model."""
    place = f'Node "{node.label}" ({node.type}): {format_place(NodeSection.CONFIG, found.steps)}'
    kind, shown = FindingType.UNRESOLVED_MODEL_PLACEHOLDER, found.text.strip()
    if found.is_default_model:
        message = f"{place}: the organization has no default language model"
        suggestion = "Name a model, or let an admin set defaultModelId by PUT /api/v1/ai/settings."
        return GraphFinding(kind, message, suggestion, node.id)
    message = f"{place} is {f'the placeholder {shown}' if shown else 'empty'}"
    suggestion = "Name a language model: its id, default for that of the organization, or echo."
    return GraphFinding(kind, message, suggestion, node.id)


def find_model_users(graph: ParsedGraph, catalog: NodeTypeLookup) -> dict[str, str]:
    """Return the ids of the models that a graph names, each with the id of the first node that names it.

    The default model counts with its own id, and a tool names the model of its target. Placeholders and expressions
    name none, and neither does the own model of an agent if another node provides it.
    """
    found: dict[str, str] = {}
    for node, model_id in _iterate_models(graph, catalog):
        found.setdefault(model_id, node.id)
    return found


def list_limited_models(
    graph: ParsedGraph, catalog: NodeTypeLookup, *, limits_runs: bool
) -> list[tuple[GraphNode, str]]:
    """Return the nodes under a limit of costs, each with the id of a model that it names.

    The limit is in the budget of the node, or of an agent that it serves; with `limits_runs`, all calls have one.
    """
    limited = set(graph.by_id) if limits_runs else _list_limited(graph)
    uses = {
        (node.id, model_id): (node, model_id)
        for node, model_id in (_iterate_models(graph, catalog) if limited else ())
        if node.id in limited
    }
    return list(uses.values())


def _list_limited(graph: ParsedGraph) -> set[str]:
    """Return the ids of the nodes with a limit of costs in their budget, and of the models and tools of
    limited agents.
    """
    waiting = [node.id for node in graph.nodes if _limits_cost(target_of(node) or node)]
    limited: set[str] = set()
    while waiting:
        node_id = waiting.pop()
        if node_id not in limited:
            limited.add(node_id)
            edges = graph.inbound.get(node_id, ())
            waiting += [edge.source for edge in edges if edge.target_port in PROVIDER_PORTS]
    return limited


def _limits_cost(node: GraphNode) -> bool:
    budget = node.config.get("budget")
    return isinstance(budget, dict) and budget.get("maxCost") is not None


def _iterate_models(graph: ParsedGraph, catalog: NodeTypeLookup) -> Iterator[tuple[GraphNode, str]]:
    """Yield each node that names a model, or whose target as a tool does, with the id of the model.

    `default` gives the default model of the organization. Placeholders, expressions, and the own model of an agent that
    another node provides are skipped.
    """
    for node in graph.nodes:
        if not may_name_model(node.type, catalog):
            continue
        for one in iterate_resource_texts([node], catalog):
            is_ignored = one.steps[-1] == MODEL_FIELD and _is_served(one.node, graph)
            if one.kind != MODELS_KIND or is_ignored or _names_none(one.text, catalog):
                continue
            model_id = catalog.default_model_id if one.is_default_model else one.text
            if model_id is not None and is_resource_id(model_id):
                yield node, model_id


def names_default(nodes: Sequence[Mapping[str, Any]], catalog: NodeTypeLookup) -> bool:
    """Return whether stored nodes, or targets of tools, name the default model of the organization."""
    return any(_list_default_places(node, catalog) for node in nodes)


def resolve_default(nodes: Sequence[Mapping[str, Any]], catalog: NodeTypeLookup) -> list[dict[str, Any]]:
    """Return stored nodes in which `default` is replaced by the default model of the organization.

    The given nodes do not change. Without a default model they are returned as they are.
    """
    model_id = catalog.default_model_id
    return [dict(node) if model_id is None else _resolve_node(node, model_id, catalog) for node in nodes]


def _resolve_node(node: Mapping[str, Any], model_id: str, catalog: NodeTypeLookup) -> dict[str, Any]:
    resolved = dict(node)
    for steps in _list_default_places(node, catalog):
        resolved["config"] = _replace_at(resolved["config"], steps, model_id)
    return resolved


def _list_default_places(node: Mapping[str, Any], catalog: NodeTypeLookup) -> list[PlaceSteps]:
    """Return the paths in the config of a stored node at which it names the default model."""
    if not may_name_model(str(node["type"]), catalog):
        return []
    found = iterate_resource_texts([GraphNode.from_stored(node)], catalog)
    return [one.steps for one in found if one.is_default_model]


def _names_none(text: str, catalog: NodeTypeLookup) -> bool:
    if text == DEFAULT_MODEL:
        return catalog.default_model_id is None
    return _PLACEHOLDER.fullmatch(text) is not None


def _is_served(node: GraphNode, graph: ParsedGraph) -> bool:
    """Return whether another node provides the model of an agent, so that its own is ignored."""
    edges = graph.inbound.get(node.id, ()) if node.type == AGENT_TYPE else ()
    return any(edge.target_port == PORT_OF_MODELS for edge in edges)


def _replace_at(value: Any, steps: PlaceSteps, replacement: str) -> Any:  # noqa: ANN401 - any JSON value
    """Return a copy of a JSON value with the value at a path replaced; the rest is shared."""
    if not steps:
        return replacement
    changed: Any = list(value) if isinstance(value, list) else dict(value)
    changed[steps[0]] = _replace_at(value[steps[0]], steps[1:], replacement)
    return changed
