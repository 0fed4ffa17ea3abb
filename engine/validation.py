"""Validation of graphs before a run, in time linear in nodes and edges; no expression is evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from engine import inline_secrets, mapping_checks, name_suggestions
from engine.agents.agent_steps import AGENT_TYPE
from engine.agents.agent_wiring import PROVIDER_PORTS, list_direct_tools, list_providers
from engine.config_places import (
    ExpressionReader,
    NodeExpressions,
    NodeSection,
    ScriptChecker,
    format_place,
    may_name_model,
)
from engine.dataflow import OutputSamples
from engine.findings import (
    FindingCollector,
    FindingType,
    FixAction,
    GraphFinding,
    SuggestedFix,
    ValidationResult,
)
from engine.graph import MAX_LOOP_DEPTH, find_bodies
from engine.mapping_checks import InspectedGraph
from engine.node_api import CONTINUE, DONE, ERROR, UnknownNodeType

if TYPE_CHECKING:
    from engine.agents.workflow_traits import TraitsById
    from engine.config_places import ResourceText
    from engine.expressions import ExpressionError
    from engine.graph import GraphEdge, GraphNode, LoopBodies, ParsedGraph
    from engine.node_api import NodeType
    from engine.node_lookup import ConfigProblemView, NodeTypeLookup

NO_SAMPLES: Final[OutputSamples] = MappingProxyType({})
SHOWN_CYCLE_NODES: Final = 6
SHOWN_PLACES: Final = 5


def validate_graph(
    graph: ParsedGraph,
    catalog: NodeTypeLookup,
    *,
    is_draft: bool = False,
    samples: OutputSamples = NO_SAMPLES,
    traits: TraitsById = MappingProxyType({}),
) -> ValidationResult:
    """Return errors and warnings of a graph: its structure, configs, paths and inline secrets.

    Paths are also checked against `samples`, the outputs of past runs by node id, and agents by `traits` of the
    workflows that the graph calls, by id. In a draft, some errors are warnings. At most 1,000 of each are listed.
    """
    findings = FindingCollector(is_draft=is_draft)
    drawn = _inspect_graph(graph, catalog, findings, traits=traits)
    if drawn is not None:
        for finding in (*mapping_checks.check_paths(drawn, samples), *_inline_secret_findings(graph)):
            findings.add(finding)
    return findings.result()


def find_errors(
    graph: ParsedGraph, catalog: NodeTypeLookup, *, passed: Collection[str] = ()
) -> ValidationResult:
    """Return the errors that keep a graph from running: in a fraction of the time of `validate_graph`,
    without most warnings.

    `passed` holds the ids of nodes whose configs were valid before and aren't validated again.
    """
    findings = FindingCollector(is_draft=False)
    _inspect_graph(graph, catalog, findings, passed)
    return findings.result()


def _inspect_graph(
    graph: ParsedGraph,
    catalog: NodeTypeLookup,
    findings: FindingCollector,
    passed: Collection[str] = (),
    traits: TraitsById = MappingProxyType({}),
) -> InspectedGraph | None:
    """Add all findings except unresolved paths and secrets; return the parsed parts for these checks.

    None for an empty graph, or if so many errors were found that the rest is not validated.
    """
    if not graph.nodes:
        findings.add(_empty_graph_finding())
        return None
    known = _look_up(graph, catalog, findings)
    types = {node.id: node_type for node, node_type in known}
    loops = {node_id for node_id, node_type in types.items() if node_type.loops}
    bodies = find_bodies(graph, loops)
    used_types = {node_type.type for node_type in types.values()}
    for finding in (
        *_duplicate_findings(graph),
        *_trigger_findings(graph, types),
        *_connection_findings(graph, types),
        *_cycle_finding(graph, loops),
        *_loop_body_findings(graph, bodies),
        *_find_disconnected_nodes(graph, types),
        *(_agent_findings(graph, types, catalog, traits) if traits or AGENT_TYPE in used_types else ()),
    ):
        findings.add(finding)
    direct_tools = list_direct_tools(graph)
    reader, scripts = ExpressionReader(), ScriptChecker()
    readings: dict[str, NodeExpressions] = {}
    for node, node_type in known:
        if not findings.has_capacity:
            findings.truncate()
            return None
        if node.id in passed:
            continue
        readings[node.id] = reader.read(node, node_type)
        placeholders: Sequence[ResourceText] = ()
        if may_name_model(node.type, catalog):
            from engine import model_references  # noqa: PLC0415 - loaded with the first node that calls a model

            placeholders = model_references.list_placeholders(node, graph, catalog)
            for place in placeholders:
                findings.add(model_references.describe_placeholder(node, place))
        problems = _list_config_problems(node, node_type, catalog, is_direct=node.id in direct_tools)
        for finding in _config_findings(node, problems, readings[node.id], placeholders):
            findings.add(finding)
        for finding in scripts.findings(node, node_type):
            findings.add(finding)
    return InspectedGraph(graph, bodies, types, readings)


def _list_config_problems(
    node: GraphNode, node_type: NodeType, catalog: NodeTypeLookup, *, is_direct: bool
) -> Sequence[ConfigProblemView]:
    """Return the problems of a node's config.

    `is_direct` says that the node itself is a tool of an agent: then missing fields are left out. A model fills them in
    as far as it may, and checks of agents report the others.
    """
    problems = catalog.config_problems(node_type, node.config)
    if not is_direct:
        return problems
    return [problem for problem in problems if problem.keyword != "required" or len(problem.steps) > 1]


def _agent_findings(
    graph: ParsedGraph, types: Mapping[str, NodeType], catalog: NodeTypeLookup, traits: TraitsById
) -> Iterator[GraphFinding]:
    """Yield the findings about agents, and warnings about texts of outsiders for exposed agents of called workflows."""
    from engine.agents import agent_checks  # noqa: PLC0415 - loaded with the first graph with agents

    yield from agent_checks.find_problems(graph, types, catalog, traits)
    yield from agent_checks.find_exposed_starts(graph, traits)


def _empty_graph_finding() -> GraphFinding:
    return GraphFinding(
        FindingType.EMPTY_WORKFLOW,
        "The workflow has no nodes",
        "Add a trigger node and a node that it leads to.",
    )


# ── nodes and their types ───────────────────────────────────────────────────────────────────────────────────


def _look_up(
    graph: ParsedGraph, catalog: NodeTypeLookup, findings: FindingCollector
) -> list[tuple[GraphNode, NodeType]]:
    """Return the nodes of known types, each with its type; add findings for unknown types and for types that
    can't run.

    Duplicate node ids are possible.
    """
    asked: dict[tuple[str, str | None], NodeType | UnknownNodeType] = {}
    known: list[tuple[GraphNode, NodeType]] = []
    for node in graph.nodes:
        key = (node.type, node.version)
        if key not in asked:
            asked[key] = _find_node_type(catalog, *key)
        found = asked[key]
        if isinstance(found, UnknownNodeType):
            findings.add(_unknown_type_finding(node, found))
            continue
        known.append((node, found))
        if not found.runnable and node.id not in list_providers(graph):
            findings.add(_not_runnable_finding(node))
    return known


def _find_node_type(
    catalog: NodeTypeLookup, node_type: str, version: str | None
) -> NodeType | UnknownNodeType:
    try:
        return catalog.get(node_type, version)
    except UnknownNodeType as error:
        return error


def _unknown_type_finding(node: GraphNode, error: UnknownNodeType) -> GraphFinding:
    suggestion = "Choose a type and version from the catalog."
    fix = None
    if error.version is not None:
        suggestion = f"Use version {error.version}."
        fix = SuggestedFix(FixAction.SET_VERSION, node.id, value=error.version)
    elif len(meant := name_suggestions.suggest_names(node.type, error.nearest)) == 1:
        suggestion = f"Use the type {meant[0]}."
        fix = SuggestedFix(FixAction.SET_NODE_TYPE, node.id, value=meant[0])
    return GraphFinding(FindingType.UNKNOWN_NODE_TYPE, error.message, suggestion, node.id, fix=fix)


def _not_runnable_finding(node: GraphNode) -> GraphFinding:
    message = f'Node "{node.label}" ({node.type}) can be drawn and connected, but this server can\'t run it'
    suggestion = "Replace it with a runnable type of the catalog before you run the workflow."
    return GraphFinding(FindingType.NOT_RUNNABLE, message, suggestion, node.id)


def _duplicate_findings(graph: ParsedGraph) -> Iterator[GraphFinding]:
    for node_id, count in Counter(node.id for node in graph.nodes).items():
        if count > 1:
            message = f"{count} nodes have the id {node_id!r}"
            suggestion = "Give each node an id of its own."
            yield GraphFinding(FindingType.DUPLICATE_NODE_ID, message, suggestion, node_id)
    for edge_id, count in Counter(edge.id for edge in graph.edges).items():
        if count > 1:
            message = f"{count} connections have the id {edge_id!r}"
            suggestion = "Give each an id of its own."
            yield GraphFinding(FindingType.BROKEN_CONNECTION, message, suggestion, connection_id=edge_id)


def _trigger_findings(graph: ParsedGraph, types: Mapping[str, NodeType]) -> Iterator[GraphFinding]:
    triggers = [node for node in graph.nodes if node.id in types and types[node.id].is_trigger]
    if not triggers and len(types) == len(graph.by_id):
        suggestion = "Add a trigger: manual, rest-api or webhook."
        yield GraphFinding(FindingType.MISSING_TRIGGER, "The workflow has no trigger node", suggestion)
    for extra in triggers[1:]:
        message = f'Node "{extra.label}" ({extra.type}) is a second trigger beside "{triggers[0].label}"'
        yield GraphFinding(FindingType.MULTIPLE_TRIGGERS, message, "Keep one trigger.", extra.id)


# ── connections ─────────────────────────────────────────────────────────────────────────────────────────────


def _connection_findings(graph: ParsedGraph, types: Mapping[str, NodeType]) -> Iterator[GraphFinding]:
    """Yield an error for each edge to or from a missing node, or a port that its node doesn't have."""
    by_id = graph.by_id
    outputs: dict[str, Sequence[str]] = {}
    for edge in graph.edges:
        if edge.source not in by_id or edge.target not in by_id:
            yield _broken_edge_finding(edge, [end for end in (edge.source, edge.target) if end not in by_id])
            continue
        source, target = types.get(edge.source), types.get(edge.target)
        if source and edge.source_port != ERROR:
            if edge.source not in outputs:
                outputs[edge.source] = source.outputs_of(by_id[edge.source].config)
            if edge.source_port not in outputs[edge.source]:
                yield _unknown_output_finding(edge, by_id[edge.source], outputs[edge.source])
        if target and edge.target_port not in target.inputs:
            yield _unknown_input_finding(edge, by_id[edge.target], target)


def _broken_edge_finding(edge: GraphEdge, missing: Sequence[str]) -> GraphFinding:
    message = f"Connection {edge.id!r} refers to {' and '.join(map(repr, missing))}, which the workflow doesn't have"
    return GraphFinding(
        FindingType.BROKEN_CONNECTION,
        message,
        "Remove the connection, or add the node.",
        connection_id=edge.id,
        fix=_removal_fix(edge),
    )


def _unknown_output_finding(edge: GraphEdge, node: GraphNode, ports: Sequence[str]) -> GraphFinding:
    message = f'Node "{node.label}" ({node.type}) has no output port {edge.source_port!r}'
    suggestion = f"Use one of: {', '.join((*ports, ERROR))}."
    fix = _suggest_port(edge, "sourcePort", edge.source_port, ports)
    return GraphFinding(FindingType.INVALID_PORT, message, suggestion, node.id, edge.id, fix)


def _unknown_input_finding(edge: GraphEdge, node: GraphNode, node_type: NodeType) -> GraphFinding:
    message = f'Node "{node.label}" ({node.type}) has no input port {edge.target_port!r}'
    if not node_type.inputs:
        suggestion = "This node has no input port: remove the connection."
        return GraphFinding(
            FindingType.INVALID_PORT, message, suggestion, node.id, edge.id, _removal_fix(edge)
        )
    suggestion = f"Use one of: {', '.join(node_type.inputs)}."
    fix = _suggest_port(edge, "targetPort", edge.target_port, node_type.inputs)
    return GraphFinding(FindingType.INVALID_PORT, message, suggestion, node.id, edge.id, fix)


def _suggest_port(edge: GraphEdge, field: str, port: str, ports: Sequence[str]) -> SuggestedFix | None:
    """Return a fix with the intended port; None unless there is exactly one candidate."""
    meant = ports if len(ports) == 1 else name_suggestions.suggest_names(port, ports)
    if len(meant) != 1:
        return None
    return SuggestedFix(FixAction.SET_PORT, connection_id=edge.id, path=(field,), value=meant[0])


def _removal_fix(edge: GraphEdge) -> SuggestedFix:
    return SuggestedFix(FixAction.REMOVE_CONNECTION, connection_id=edge.id)


def _cycle_finding(graph: ParsedGraph, loops: Collection[str]) -> Iterator[GraphFinding]:
    """Yield a finding that names one cycle of the graph, if there is any.

    A connection from the body of a loop back to the loop, one of `loops`, is a cycle too; its fix removes the
    connection.
    """
    if len(graph.order) == len(graph.by_id):
        return
    placed = set(graph.order)
    parents = {
        node_id: [edge.source for edge in edges]
        for node_id, edges in graph.inbound.items()
        if node_id not in placed
    }
    try:
        TopologicalSorter(parents).prepare()
    except CycleError as error:
        around: list[str] = error.args[1]
        edges = [
            next(edge for edge in graph.outbound[source] if edge.target == target)
            for source, target in pairwise(around)
        ]
        message = f"The connections form a cycle: {' → '.join(_join_some(around, SHOWN_CYCLE_NODES + 1))}"
        back = _find_loop_back_edge(edges, loops)
        if back is not None:
            suggestion = (
                f"Remove connection {back.id}: the body of a loop ends by itself, and the results of all items"
                f" leave by the loop's port {DONE}."
            )
            yield GraphFinding(FindingType.CYCLE, message, suggestion, back.target, fix=_removal_fix(back))
            return
        shown = ", ".join(_join_some([edge.id for edge in edges], SHOWN_CYCLE_NODES))
        fix = _removal_fix(edges[0]) if len(edges) == 1 else None
        yield GraphFinding(
            FindingType.CYCLE, message, f"Remove one of these connections: {shown}.", around[0], fix=fix
        )


def _find_loop_back_edge(around: Sequence[GraphEdge], loops: Collection[str]) -> GraphEdge | None:
    """Return the edge of a cycle that leads from a loop's body back to the loop; None without one."""
    entered = {edge.source for edge in around if edge.source_port == CONTINUE and edge.source in loops}
    return next((edge for edge in around if edge.target in entered), None)


def _loop_body_findings(graph: ParsedGraph, bodies: LoopBodies) -> Iterator[GraphFinding]:
    """Yield findings for connections that lead into a loop body from outside, and for loops nested too deeply."""
    by_id = graph.by_id
    for edge in bodies.crossing:
        target = by_id[edge.target]
        loop = by_id[bodies.holders[edge.target] or ""]
        message = (
            f'Connection {edge.id!r} leads from outside into the body of loop "{loop.label}": node "{target.label}"'
            f" is reached from its port {CONTINUE}"
        )
        suggestion = (
            f"Remove it, or the connections by which the body leads to this node: the results of a loop leave it"
            f" by its port {DONE}."
        )
        yield GraphFinding(FindingType.LOOP_BODY_ENTERED, message, suggestion, target.id, edge.id)
    for node_id in {holder for holder in bodies.holders.values() if holder is not None}:
        if bodies.depths[node_id] == MAX_LOOP_DEPTH:
            message = (
                f'Loop "{by_id[node_id].label}" is nested in {MAX_LOOP_DEPTH} others:'
                f" loops nest at most {MAX_LOOP_DEPTH} deep"
            )
            suggestion = "Move its body to another workflow, and run that by a sub-workflow node."
            yield GraphFinding(FindingType.LOOPS_TOO_DEEP, message, suggestion, node_id)


def _find_disconnected_nodes(graph: ParsedGraph, types: Mapping[str, NodeType]) -> Iterator[GraphFinding]:
    """Yield a warning for each node without incoming edges, except triggers and nodes that serve agents.

    A node without input ports is disconnected only if it has no outgoing edge either.
    """
    for node in graph.nodes:
        node_type = types.get(node.id)
        if graph.inbound[node.id] or (node_type and node_type.is_trigger):
            continue
        if any(edge.target_port in PROVIDER_PORTS for edge in graph.outbound[node.id]):
            continue
        if node_type and not node_type.inputs:
            if not graph.outbound[node.id]:
                message = f'Node "{node.label}" ({node.type}) is not connected to any node'
                yield GraphFinding(
                    FindingType.DISCONNECTED_NODE, message, "Connect it, or remove it.", node.id
                )
            continue
        message = f'Nothing leads to node "{node.label}" ({node.type}): it will be skipped'
        yield GraphFinding(FindingType.DISCONNECTED_NODE, message, "Connect it, or remove it.", node.id)


# ── configs ─────────────────────────────────────────────────────────────────────────────────────────────────


def _config_findings(
    node: GraphNode,
    problems: Sequence[ConfigProblemView],
    reading: NodeExpressions,
    placeholders: Sequence[ResourceText],
) -> Iterator[GraphFinding]:
    """Yield the findings about a config: one for all missing fields, one for each other problem, and expression errors.

    Fields that hold placeholders for language models are skipped, since other findings name them.
    """
    unnamed = {one.steps for one in placeholders}
    unnamed_places = {format_place(NodeSection.CONFIG, steps) for steps in unnamed}
    missing = [problem for problem in problems if problem.keyword == "required"]
    if missing:
        yield _missing_config_finding(node, missing)
    for problem in problems:
        if problem.keyword != "required" and problem.steps not in unnamed:
            yield _invalid_config_finding(node, problem)
    for name, error in reading.errors:
        if name not in unnamed_places:
            yield _invalid_expression_finding(node, name, error)


def _missing_config_finding(node: GraphNode, missing: Sequence[ConfigProblemView]) -> GraphFinding:
    needed = "; ".join(problem.message for problem in missing)
    message = f'Node "{node.label}" ({node.type}) needs configuration: {needed}'
    fields = " and ".join(problem.path for problem in missing)
    return GraphFinding(FindingType.MISSING_CONFIG, message, f"Set {fields} in its config.", node.id)


def _invalid_config_finding(node: GraphNode, problem: ConfigProblemView) -> GraphFinding:
    message = f'Node "{node.label}" ({node.type}): {problem.path}: {problem.message}'
    suggestion = "See the schema of the node type."
    fix = None
    if problem.meant is not None:
        is_unknown_field = problem.keyword == "additionalProperties"
        action = FixAction.RENAME_CONFIG if is_unknown_field else FixAction.SET_CONFIG
        suggestion = f"Rename it to {problem.meant}." if is_unknown_field else f"Set it to {problem.meant}."
        fix = SuggestedFix(action, node.id, path=problem.steps, value=problem.meant)
    return GraphFinding(FindingType.INVALID_CONFIG, message, suggestion, node.id, fix=fix)


def _invalid_expression_finding(node: GraphNode, name: str, error: ExpressionError) -> GraphFinding:
    message = f'Node "{node.label}" ({node.type}): {name}: {error}'
    return GraphFinding(FindingType.INVALID_CONFIG, message, "Fix the expression.", node.id)


def _inline_secret_findings(graph: ParsedGraph) -> Iterator[GraphFinding]:
    for node in graph.nodes:
        found = inline_secrets.find_secrets(dict(node.config))
        if found:
            shown = ", ".join(_join_some(found, SHOWN_PLACES))
            message = (
                f'Node "{node.label}" ({node.type}) seems to contain a credential in its config: {shown}'
            )
            suggestion = (
                "Pass it with the data of the run instead: everyone who reads the workflow can read it."
            )
            yield GraphFinding(FindingType.INLINE_SECRET, message, suggestion, node.id)


def _join_some(texts: Sequence[str], most: int) -> Sequence[str]:
    return [*texts[:most], "…"] if len(texts) > most else texts
