"""Changes between a recorded run and the definition to replay: of nodes, bodies of loops, and values."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from engine import values
from engine.replay_plan import ReplayReason, ReplayReasonCode

if TYPE_CHECKING:
    from engine.graph import GraphEdge, GraphNode, ParsedGraph
    from engine.node_key import NodeKey
    from engine.program import NodeProgram, WorkflowProgram
    from engine.replay_plan import ReplayFacts
    from engine.values import Json

MAX_PATHS: Final = 20
"""Maximum number of paths that a reason lists."""


def static_changes(facts: ReplayFacts, node_id: str, key: NodeKey) -> list[ReplayReason]:
    """Return the reasons for which a node's recorded key no longer holds, as far as the definition and data
    sources tell.

    The values of the run are not compared. Empty if nothing has changed.
    """
    graph = facts.program.graph
    now = _static_key(facts.program.nodes[node_id])
    before, after = facts.original.by_id.get(node_id), graph.by_id[node_id]
    found: list[ReplayReason] = []
    if key.type != now["type"]:
        found.append(ReplayReason(ReplayReasonCode.TYPE_VERSION_CHANGED))
    if key.config != now["config"]:
        paths = [] if before is None else diff_paths(dict(before.config), dict(after.config))
        found.append(ReplayReason(ReplayReasonCode.CONFIG_CHANGED, tuple(paths)))
    if key.mappings != now["mappings"]:
        paths = [] if before is None else diff_paths(_merge_mappings(before), _merge_mappings(after))
        found.append(ReplayReason(ReplayReasonCode.MAPPING_CHANGED, tuple(paths)))
    if key.implementation != now["implementation"]:
        found.append(_implementation_change(facts, node_id))
    if key.ports != now["ports"]:
        found.append(ReplayReason(ReplayReasonCode.MAPPING_CHANGED, ("connections",)))
    if key.type == now["type"]:
        found += _source_changes(facts, key)
    return found


def _static_key(program: NodeProgram) -> dict[str, bytes]:
    """Return the digests of a compiled node that need no values of a run: type, config, mappings, implementation, and
    ports, by these names.
    """
    static, end = program.static_hashes, program.key_end
    return {
        "type": static[:32],
        "config": static[32:64],
        "mappings": static[64:96],
        "implementation": end[:16],
        "ports": end[16:32],
    }


def _implementation_change(facts: ReplayFacts, node_id: str) -> ReplayReason:
    """Return the reason for a changed implementation: for a loop the edited nodes of its body, if there are any."""
    program = facts.program.nodes[node_id]
    if program.body:
        changed = _find_edited_body_nodes(program, facts.original, facts.program.graph, facts.rewired_agents)
        if changed:
            paths = tuple(f"nodes.{inner}" for inner in sorted(changed))[:MAX_PATHS]
            return ReplayReason(ReplayReasonCode.CONFIG_CHANGED, paths)
    return ReplayReason(ReplayReasonCode.IMPLEMENTATION_CHANGED)


def _source_changes(facts: ReplayFacts, key: NodeKey) -> list[ReplayReason]:
    changed = tuple(name for name, revision in key.sources if facts.revisions.get(name) != revision)
    return [ReplayReason(ReplayReasonCode.SOURCE_CHANGED, changed)] if changed else []


def find_loops_around(program: WorkflowProgram, node_ids: frozenset[str]) -> frozenset[str]:
    """Return the loops whose bodies contain any of the nodes: a node in a loop runs again only with its loop."""
    return frozenset(loop_id for loop_id, loop in program.nodes.items() if not node_ids.isdisjoint(loop.body))


def changed_body_nodes(
    loop: NodeProgram,
    original: ParsedGraph,
    graph: ParsedGraph,
    rewired_agents: frozenset[str] = frozenset(),
) -> frozenset[str]:
    """Return the nodes of a loop's body that differ between the `original` definition, of the recorded run, and
    `graph`, and the nodes of the body behind them.

    `rewired_agents` are ids of agents that differ too: by their models or tools, which are in neither graph.
    """
    found = set(_find_edited_body_nodes(loop, original, graph, rewired_agents))
    left = deque(found)
    while left:
        for edge in graph.outbound[left.popleft()]:
            if edge.target in loop.body and edge.target not in found:
                found.add(edge.target)
                left.append(edge.target)
    return frozenset(found)


def _find_edited_body_nodes(
    loop: NodeProgram, original: ParsedGraph, graph: ParsedGraph, rewired_agents: frozenset[str]
) -> set[str]:
    """Return the nodes of a loop's body that are new, or whose content, incoming edges or providers have changed."""
    return {
        inner
        for inner in loop.body
        if (before := original.by_id.get(inner)) is None
        or inner in rewired_agents
        or _collect_content(before) != _collect_content(graph.by_id[inner])
        or [edge_ends(edge) for edge in original.inbound[inner]]
        != [edge_ends(edge) for edge in graph.inbound[inner]]
    }


def _collect_content(node: GraphNode) -> tuple[object, ...]:
    return node.type, node.version, dict(node.config), _merge_mappings(node)


def _merge_mappings(node: GraphNode) -> dict[str, Json]:
    return {**dict(node.input_mappings), **dict(node.pass_through_values)}


def edge_ends(edge: GraphEdge) -> tuple[str, str, str]:
    """Return the source, source port and target port of an edge."""
    return edge.source, edge.source_port, edge.target_port


def diff_paths(before: Json, after: Json, prefix: str = "") -> list[str]:
    """Return up to 20 places at which two values differ, such as `headers.Accept`; `prefix` is the place of the values
    themselves.

    Lists of different lengths, and values of different kinds, count as one difference.
    """
    found: list[str] = []
    left: deque[tuple[str, Json, Json]] = deque([(prefix, before, after)])
    while left and len(found) < MAX_PATHS:
        place, one, other = left.popleft()
        if isinstance(one, dict) and isinstance(other, dict):
            for key in sorted({*one, *other}):
                inner = f"{place}.{key}" if place else key
                if key not in one or key not in other:
                    found.append(inner)
                else:
                    left.append((inner, one[key], other[key]))
        elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
            for index, pair in enumerate(zip(one, other, strict=True)):
                left.append((f"{place}.{index}" if place else str(index), *pair))
        elif not values.equal_json(one, other):
            found.append(place)
    return found[:MAX_PATHS]
