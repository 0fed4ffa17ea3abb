"""Detection of paths that will find nothing, by the catalog and by past runs."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

from engine import name_suggestions, shapes
from engine.agents.agent_wiring import remove_providers
from engine.approval_links import APPROVAL_TYPE
from engine.config_places import ExpressionPlace, NodeExpressions, NodeSection
from engine.dataflow import DataFlow, OutputSamples
from engine.findings import FindingType, FixAction, GraphFinding, SuggestedFix
from engine.node_api import CONTINUE, TOOL_TYPE
from engine.shapes import SCALAR, UNKNOWN, OtherFields, PathDeadEnd, ValueShape

if TYPE_CHECKING:
    from engine.expressions import ExpressionPath, PathStep
    from engine.graph import GraphNode, LoopBodies, ParsedGraph
    from engine.node_api import NodeType
    from engine.shapes import ShapeSteps

MAX_EXPLAINED: Final = 50
"""Maximum number of paths with a search for alternatives; later findings give none."""
MAX_COMPARED: Final = 100
"""Maximum number of preceding nodes, the nearest first, whose ids and labels are compared with a name."""
SHOWN_NAMES: Final = 8
SHOWN_CHARACTERS: Final = 100

_EXECUTION_SHAPE: Final = ValueShape({"id": SCALAR, "workflowId": SCALAR, "startedAt": SCALAR})
_LOOP_TURN: Final = ValueShape({"item": UNKNOWN, "index": SCALAR})
"""Shape of a loop as seen from inside its body."""
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_ACTIONS: Final = {
    NodeSection.CONFIG: FixAction.SET_CONFIG,
    NodeSection.INPUT_MAPPINGS: FixAction.SET_INPUT_MAPPING,
    NodeSection.PASS_THROUGH_VALUES: FixAction.SET_PASS_THROUGH_VALUE,
}


class InspectedGraph(Struct, frozen=True):
    """Graph with its loop bodies, node types and expressions."""

    graph: ParsedGraph
    bodies: LoopBodies
    """Bodies of its loops."""
    types: Mapping[str, NodeType]
    """Node types by node; nodes of unknown types are omitted."""
    readings: Mapping[str, NodeExpressions]
    """Expressions by node, for nodes with a type."""


def check_paths(drawn: InspectedGraph, samples: OutputSamples) -> Iterator[GraphFinding]:
    """Yield a finding for each path in mappings and configs that is certain to find nothing.

    `samples` are outputs of past runs by node. The content of `item` is not checked: it is known only at run
    time. Nor are graphs with cycles or duplicate node ids, since their order is undefined.
    """
    if len(drawn.graph.order) < len(drawn.graph.nodes):
        return
    # What agents are served by is no input of theirs, and reads the values of the run when it is called.
    drawn = replace(drawn, graph=remove_providers(drawn.graph))
    reads = any(reading.mappings or reading.config for reading in drawn.readings.values())
    if not reads and not any(node.pass_through_values for node in drawn.graph.nodes):
        return
    checker = _PathChecker(drawn, DataFlow(drawn.graph, drawn.types, samples))
    for node_id in drawn.graph.order:
        yield from checker.findings(drawn.graph.by_id[node_id])


class _UnresolvedPath(Struct, frozen=True):
    """Path that finds nothing: the reason, the available fields, and likely alternatives."""

    path: str
    reason: str
    hint: str = ""
    meant: Sequence[str] = ()


class _PathChecker:
    """Checker of the paths of a graph, node by node along its data flow."""

    def __init__(self, drawn: InspectedGraph, flow: DataFlow) -> None:
        self._graph = drawn.graph
        self._bodies = drawn.bodies
        self._readings = drawn.readings
        self._flow = flow
        self._bits = {node_id: 1 << place for place, node_id in enumerate(_list_referenced_nodes(drawn))}
        self._before: dict[str, int] = {}
        """Predecessors of each node among the nodes that paths refer to, as a bit set."""
        self._explained = 0

    def findings(self, node: GraphNode) -> Iterator[GraphFinding]:
        """Yield a finding for each path of one node that finds nothing, and note the shape of its output.

        Call it for all nodes in topological order.
        """
        self._before[node.id] = self._find_referenced_before(node)
        reading = self._readings.get(node.id, NodeExpressions())
        given = arriving = self._flow.infer_input(node)
        if node.input_mappings:
            mapped: dict[str, ValueShape] = dict.fromkeys(node.input_mappings, UNKNOWN)
            for place in reading.mappings:
                yield from self._check_place(node, place, arriving)
                mapped |= _shape_mapped_field(place, arriving)
            given = shapes.add_fields(arriving, mapped)
        for place in reading.config:
            yield from self._check_place(node, place, given)
        yield from self._check_pass_through(node, given)
        self._flow.infer_output(node, given)

    def _find_referenced_before(self, node: GraphNode) -> int:
        """Return the bit set of the nodes before a node, among those to which paths of the graph refer.

        The sets of its parents must be stored.
        """
        before = 0
        if self._bits:
            for edge in self._graph.inbound[node.id]:
                before |= self._before[edge.source] | self._bits.get(edge.source, 0)
        return before

    def _check_place(
        self, node: GraphNode, place: ExpressionPlace, data: ValueShape
    ) -> Iterator[GraphFinding]:
        """Yield a finding for each path of a place that finds nothing in its scope; `data` is the shape of
        the node's data.
        """
        for path in {path.text: path for path in place.paths}.values():
            unfound = self._explain_path(node, place, path, data)
            if unfound is not None:
                yield _build_unresolved_finding(node, place, unfound)

    def _check_pass_through(self, node: GraphNode, given: ValueShape) -> Iterator[GraphFinding]:
        """Yield a finding for each pass-through value of a node whose field the shape of its input surely lacks."""
        for key, source in node.pass_through_values.items():
            name = str(source)
            steps = ((name, None),)
            lost = shapes.follow_path(given, steps)
            if isinstance(lost, PathDeadEnd):
                place = ExpressionPlace(NodeSection.PASS_THROUGH_VALUES, (key,), name, ())
                near = shapes.suggest_paths(steps, lost) if self._count_explanation() else []
                meant = [str(way[0][0]) for way in near if len(way) == 1]
                yield _build_unresolved_finding(
                    node,
                    place,
                    _UnresolvedPath(
                        name, _dead_end_reason(lost), _describe_shape("the input", lost.shape), meant
                    ),
                )

    def _explain_path(
        self, node: GraphNode, place: ExpressionPlace, path: ExpressionPath, data: ValueShape
    ) -> _UnresolvedPath | None:
        """Return the reason why a path in a node finds nothing; None if it may find something.

        `data` is the shape of the node's input.
        """
        match path.root:
            case "data":
                shape = data
            case "trigger":
                shape = self._flow.trigger
            case "execution":
                shape = _EXECUTION_SHAPE
            case "nodes":
                return self._explain_node_path(node, path)
            case "args":
                return (
                    None
                    if node.type == TOOL_TYPE
                    else _UnresolvedPath(
                        path.text, "is no argument", "Only the target of a tool has arguments."
                    )
                )
            case "approval":
                return self._explain_approval(path)
            case root:
                is_known = place.is_evaluated_late or self._bodies.holders.get(node.id) is not None
                return None if is_known else self._explain_loop_root(path, root)
        lost = shapes.follow_path(shape, path.steps)
        return self._explain_dead_end(path, lost) if isinstance(lost, PathDeadEnd) else None

    def _explain_approval(self, path: ExpressionPath) -> _UnresolvedPath | None:
        """Return the reason why a path into `approval` finds nothing; None for `approval.<id>` and its `url`.

        The id must be that of a node that asks people.
        """
        asking = [one.id for one in self._graph.nodes if one.type == APPROVAL_TYPE]
        names = [step[0] for step in path.steps]
        if names[:1] and names[0] in asking and names[1:] in ([], ["url"]):
            return None
        near = [f"approval.{one}.url" for one in asking[:3]]
        return _UnresolvedPath(
            path.text,
            "is no link of an approval",
            "Write approval, the id of a human-input node, and url.",
            near,
        )

    def _explain_node_path(self, node: GraphNode, path: ExpressionPath) -> _UnresolvedPath | None:
        """Return the reason why a path into `nodes` finds nothing when this node runs; None if it may find
        something.
        """
        if not path.steps:
            return None
        node_id = path.steps[0][0]
        if node_id is None or node_id not in self._graph.by_id:
            return self._explain_unknown_node(node, path)
        if node_id == node.id:
            return _UnresolvedPath(
                path.text, "is this node itself", "A node has its output only when it has run."
            )
        if not self._before[node.id] & self._bits[node_id]:
            label = self._graph.by_id[node_id].label
            reason = f"does not run before this one: no connection leads here from {label!r}"
            return _UnresolvedPath(path.text, reason, "Connect it to this node, directly or through others.")
        is_enclosing = node_id in self._bodies.enclosing_loops(node.id)
        shape = _LOOP_TURN if is_enclosing else self._flow.node_shape(node_id)
        lost = shapes.follow_path(ValueShape({node_id: shape}), path.steps)
        return self._explain_dead_end(path, lost) if isinstance(lost, PathDeadEnd) else None

    def _explain_loop_root(self, path: ExpressionPath, root: str) -> _UnresolvedPath:
        hint = f"Put the node behind the port {CONTINUE} of a loop, or read from data."
        return _UnresolvedPath(path.text, f"finds nothing: {root} exists only in the body of a loop", hint)

    def _explain_unknown_node(self, node: GraphNode, path: ExpressionPath) -> _UnresolvedPath:
        """Return the explanation of a path to a missing node, with preceding nodes of a similar id or label."""
        reason = "names no node of the workflow"
        if not self._count_explanation():
            return _UnresolvedPath(path.text, reason)
        ids: dict[str, str] = {}
        for earlier in islice(self._ancestors(node), MAX_COMPARED):
            ids.setdefault(earlier.label, earlier.id)
            ids[earlier.id] = earlier.id
        near = dict.fromkeys(
            ids[name] for name in name_suggestions.suggest_names(path.steps[0][0] or "", ids)
        )
        meant = [_format_path("nodes", ((node_id, None), *path.steps[1:])) for node_id in near]
        return _UnresolvedPath(
            path.text, reason, f"The nodes before this one are {_join_names(ids.values())}.", meant
        )

    def _ancestors(self, node: GraphNode) -> Iterator[GraphNode]:
        """Yield the direct and indirect predecessors of a node, each once, the nearest first."""
        seen = {node.id}
        queue = deque([node.id])
        while queue:
            for edge in self._graph.inbound[queue.popleft()]:
                if edge.source not in seen:
                    seen.add(edge.source)
                    queue.append(edge.source)
                    yield self._graph.by_id[edge.source]

    def _explain_dead_end(self, path: ExpressionPath, lost: PathDeadEnd) -> _UnresolvedPath:
        """Return the explanation of a path that ends where its shape has no such field, with the fields that
        are there.
        """
        if not self._count_explanation():
            return _UnresolvedPath(path.text, _dead_end_reason(lost))
        where = _format_path(path.root, path.steps[: lost.at])
        hint = _describe_shape(where, lost.shape)
        meant = [_format_path(path.root, steps) for steps in shapes.suggest_paths(path.steps, lost)]
        inside = shapes.find_open_field(lost.shape)
        if inside is not None and not meant:
            guess = _format_path(where, ((inside, None), *path.steps[lost.at :]))
            hint = f"{hint.removesuffix('.')}: is it {guess}?"
        return _UnresolvedPath(path.text, _dead_end_reason(lost), hint, meant)

    def _count_explanation(self) -> bool:
        """Count one more path, and return whether it gets a full explanation, which takes time: the first 50 do."""
        self._explained += 1
        return self._explained <= MAX_EXPLAINED


def _shape_mapped_field(place: ExpressionPlace, arriving: ValueShape) -> dict[str, ValueShape]:
    """Return the shape of the field that a mapping creates, by name.

    Empty unless the mapping is a bare path into `data` whose shape is known.
    """
    if "{{" in place.text or "??" in place.text:
        return {}
    (path, *_), (field, *_) = place.paths, place.steps
    if path.root != "data":
        return {}
    found = shapes.follow_path(arriving, path.steps)
    return {} if isinstance(found, PathDeadEnd) else {str(field): found}


def _list_referenced_nodes(drawn: InspectedGraph) -> list[str]:
    """Return the ids of existing nodes that paths of the form `nodes.<id>` refer to, in no particular order."""
    named = {
        path.steps[0][0]
        for reading in drawn.readings.values()
        for place in (*reading.mappings, *reading.config)
        for path in place.paths
        if path.root == "nodes" and path.steps
    }
    return [node_id for node_id in named if node_id is not None and node_id in drawn.graph.by_id]


# ── texts ───────────────────────────────────────────────────────────────────────────────────────────────────


def _build_unresolved_finding(
    node: GraphNode, place: ExpressionPlace, unfound: _UnresolvedPath
) -> GraphFinding:
    message = (
        f'Node "{node.label}" ({node.type}): {place.name}: {_shorten_text(unfound.path)} {unfound.reason}'
    )
    suggestion = f"Did you mean {' or '.join(unfound.meant)}?" if unfound.meant else unfound.hint
    fix = None
    if len(unfound.meant) == 1:
        value = _replace_path(place, unfound.path, unfound.meant[0])
        fix = SuggestedFix(_ACTIONS[place.part], node.id, path=place.steps, value=value)
    return GraphFinding(
        FindingType.UNRESOLVED_MAPPING,
        message,
        suggestion or "Read it from another path, or leave it out.",
        node.id,
        fix=fix,
    )


def _replace_path(place: ExpressionPlace, path: str, meant: str) -> str:
    """Return the text of a mapping or config field with one of its paths replaced by `meant`, everywhere."""
    if "{{" not in place.text and "??" not in place.text:
        return meant
    expression = rf"((?:\{{\{{|\?\?)\s*){re.escape(path)}(\s*(?:\}}\}}|\?\?|\Z))"
    return re.sub(expression, lambda found: f"{found[1]}{meant}{found[2]}", place.text)


def _dead_end_reason(lost: PathDeadEnd) -> str:
    return "found nothing in past runs" if lost.shape.rest is OtherFields.NOTHING_SEEN else "finds nothing"


def _describe_shape(where: str, shape: ValueShape) -> str:
    if shape.fields:
        return f"{where} has {_join_names(shape.fields)}."
    if shape.items is not None:
        return f"{where} is a list: {where}[0] is its first item."
    return f"{where} has no fields."


def _join_names(texts: Iterable[str]) -> str:
    shown = [_shorten_text(name) for name in islice(dict.fromkeys(texts), SHOWN_NAMES + 1)]
    return ", ".join([*shown[:SHOWN_NAMES], "…"] if len(shown) > SHOWN_NAMES else shown) or "none"


def _shorten_text(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _format_path(root: str, steps: ShapeSteps) -> str:
    """Return a path as authors write it, such as `data.items[0]`: the root followed by fields and indexes."""
    return root + "".join(map(_format_step, steps))


def _format_step(step: PathStep) -> str:
    key, position = step
    if key is None:
        return f"[{position}]"
    if _PLAIN_NAME.fullmatch(key):
        return f".{key}"
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    return f'["{escaped}"]'
