"""Paths that will find nothing, as far as the catalogue and past runs tell what each node is given and gives out."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from engine import names, shapes
from engine.dataflow import Flow, Samples
from engine.findings import Finding, FindingType, Fix, FixAction
from engine.node import CONTINUE
from engine.places import Part, Place, Reading
from engine.shapes import SCALAR, UNKNOWN, Lost, Rest, Shape

if TYPE_CHECKING:
    from engine.expressions import Path, Step
    from engine.graph import Graph, Node
    from engine.node import NodeType
    from engine.sections import Bodies
    from engine.shapes import Steps

MAX_EXPLAINED: Final = 50
"""Paths for which another that may have been meant is looked for; of those after them only that they find nothing."""
MAX_COMPARED: Final = 100
"""Nodes that run before, the nearest first, whose ids and labels are compared with a name."""
SHOWN_NAMES: Final = 8
SHOWN_CHARACTERS: Final = 100

_EXECUTION: Final = Shape({"id": SCALAR, "workflowId": SCALAR, "startedAt": SCALAR})
_TURN: Final = Shape({"item": UNKNOWN, "index": SCALAR})
"""What is seen of a loop from inside its body."""
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_ACTIONS: Final = {
    Part.CONFIG: FixAction.SET_CONFIG,
    Part.INPUT_MAPPINGS: FixAction.SET_INPUT_MAPPING,
    Part.PASS_THROUGH_VALUES: FixAction.SET_PASS_THROUGH_VALUE,
}


@dataclass(frozen=True, slots=True)
class Drawn:
    """A graph, and what has been read of it."""

    graph: Graph
    bodies: Bodies
    """Of its loops."""
    types: Mapping[str, NodeType]
    """By node; those that the catalogue lacks are left out."""
    readings: Mapping[str, Reading]
    """By node, of those that have a type."""


def check(drawn: Drawn, samples: Samples) -> Iterator[Finding]:
    """Return a finding for each path that is certain to find nothing.

    Of what `item` holds nothing is said, which is known to the run alone. And nothing of a graph with a cycle, or with
    two nodes of one id: what comes before what isn't decided there.
    """
    if len(drawn.graph.order) < len(drawn.graph.nodes):
        return
    reads = any(reading.mappings or reading.config for reading in drawn.readings.values())
    if not reads and not any(node.pass_through_values for node in drawn.graph.nodes):
        return
    checker = _Checker(drawn, Flow(drawn.graph, drawn.types, samples))
    for node_id in drawn.graph.order:
        yield from checker.findings(drawn.graph.by_id[node_id])


@dataclass(frozen=True, slots=True)
class _Unfound:
    """A path that finds nothing: why, what there is instead, and the paths that may have been meant."""

    path: str
    reason: str
    hint: str = ""
    meant: Sequence[str] = ()


class _Checker:
    """Goes through a graph along with its data."""

    def __init__(self, drawn: Drawn, flow: Flow) -> None:
        self._graph = drawn.graph
        self._bodies = drawn.bodies
        self._readings = drawn.readings
        self._flow = flow
        self._bits = {node_id: 1 << place for place, node_id in enumerate(_named_nodes(drawn))}
        self._before: dict[str, int] = {}
        """Of the nodes that paths name, those that run before each node, as a set of bits: one for each of them."""
        self._explained = 0

    def findings(self, node: Node) -> Iterator[Finding]:
        """Return what the paths of one node don't find; those before it come first."""
        self._before[node.id] = self._runs_before(node)
        reading = self._readings.get(node.id, Reading())
        given = arriving = self._flow.enter(node)
        if node.input_mappings:
            mapped: dict[str, Shape] = dict.fromkeys(node.input_mappings, UNKNOWN)
            for place in reading.mappings:
                yield from self._in_place(node, place, arriving)
                mapped |= _mapped(place, arriving)
            given = shapes.with_fields(arriving, mapped)
        for place in reading.config:
            yield from self._in_place(node, place, given)
        yield from self._in_pass_through(node, given)
        self._flow.leave(node, given)

    def _runs_before(self, node: Node) -> int:
        before = 0
        if self._bits:
            for edge in self._graph.inbound[node.id]:
                before |= self._before[edge.source] | self._bits.get(edge.source, 0)
        return before

    def _in_place(self, node: Node, place: Place, data: Shape) -> Iterator[Finding]:
        for path in {path.text: path for path in place.paths}.values():
            unfound = self._unfound(node, place, path, data)
            if unfound is not None:
                yield _finding(node, place, unfound)

    def _in_pass_through(self, node: Node, given: Shape) -> Iterator[Finding]:
        for key, source in node.pass_through_values.items():
            name = str(source)
            steps = ((name, None),)
            lost = shapes.follow(given, steps)
            if isinstance(lost, Lost):
                place = Place(Part.PASS_THROUGH_VALUES, (key,), name, ())
                near = shapes.near(steps, lost) if self._may_explain() else []
                meant = [str(way[0][0]) for way in near if len(way) == 1]
                yield _finding(
                    node, place, _Unfound(name, _reason(lost), _what_there_is("the input", lost.shape), meant)
                )

    def _unfound(self, node: Node, place: Place, path: Path, data: Shape) -> _Unfound | None:
        match path.root:
            case "data":
                shape = data
            case "trigger":
                shape = self._flow.trigger
            case "execution":
                shape = _EXECUTION
            case "nodes":
                return self._unfound_node(node, path)
            case root:
                is_known = place.is_late or self._bodies.holders.get(node.id) is not None
                return None if is_known else self._outside_of_loops(path, root)
        lost = shapes.follow(shape, path.steps)
        return self._lost(path, lost) if isinstance(lost, Lost) else None

    def _unfound_node(self, node: Node, path: Path) -> _Unfound | None:
        if not path.steps:
            return None
        node_id = path.steps[0][0]
        if node_id is None or node_id not in self._graph.by_id:
            return self._unknown_node(node, path)
        if node_id == node.id:
            return _Unfound(path.text, "is this node itself", "A node has its output only when it has run.")
        if not self._before[node.id] & self._bits[node_id]:
            label = self._graph.by_id[node_id].label
            reason = f"does not run before this one: no connection leads here from {label!r}"
            return _Unfound(path.text, reason, "Connect it to this node, directly or through others.")
        is_around = node_id in self._bodies.around(node.id)
        shape = _TURN if is_around else self._flow.result(node_id)
        lost = shapes.follow(Shape({node_id: shape}), path.steps)
        return self._lost(path, lost) if isinstance(lost, Lost) else None

    def _outside_of_loops(self, path: Path, root: str) -> _Unfound:
        hint = f"Put the node behind the port {CONTINUE} of a loop, or read from data."
        return _Unfound(path.text, f"finds nothing: {root} is there in the body of a loop alone", hint)

    def _unknown_node(self, node: Node, path: Path) -> _Unfound:
        reason = "names no node of the workflow"
        if not self._may_explain():
            return _Unfound(path.text, reason)
        ids: dict[str, str] = {}
        for earlier in islice(self._ancestors(node), MAX_COMPARED):
            ids.setdefault(earlier.label, earlier.id)
            ids[earlier.id] = earlier.id
        near = dict.fromkeys(ids[name] for name in names.meant(path.steps[0][0] or "", ids))
        meant = [_written("nodes", ((node_id, None), *path.steps[1:])) for node_id in near]
        return _Unfound(path.text, reason, f"Before this node run {_listed(ids.values())}.", meant)

    def _ancestors(self, node: Node) -> Iterator[Node]:
        """Return the nodes that lead to a node, the nearest first."""
        seen = {node.id}
        queue = deque([node.id])
        while queue:
            for edge in self._graph.inbound[queue.popleft()]:
                if edge.source not in seen:
                    seen.add(edge.source)
                    queue.append(edge.source)
                    yield self._graph.by_id[edge.source]

    def _lost(self, path: Path, lost: Lost) -> _Unfound:
        if not self._may_explain():
            return _Unfound(path.text, _reason(lost))
        where = _written(path.root, path.steps[: lost.at])
        hint = _what_there_is(where, lost.shape)
        meant = [_written(path.root, steps) for steps in shapes.near(path.steps, lost)]
        inside = shapes.open_field(lost.shape)
        if inside is not None and not meant:
            guess = _written(where, ((inside, None), *path.steps[lost.at :]))
            hint = f"{hint.removesuffix('.')}: is it {guess}?"
        return _Unfound(path.text, _reason(lost), hint, meant)

    def _may_explain(self) -> bool:
        self._explained += 1
        return self._explained <= MAX_EXPLAINED


def _mapped(place: Place, arriving: Shape) -> dict[str, Shape]:
    """Return the field that a mapping makes, where it is a whole path into what arrives."""
    if "{{" in place.text or "??" in place.text:
        return {}
    (path, *_), (field, *_) = place.paths, place.steps
    if path.root != "data":
        return {}
    found = shapes.follow(arriving, path.steps)
    return {} if isinstance(found, Lost) else {str(field): found}


def _named_nodes(drawn: Drawn) -> list[str]:
    """Return the nodes that paths begin with, as `nodes.<id>`."""
    named = {
        path.steps[0][0]
        for reading in drawn.readings.values()
        for place in (*reading.mappings, *reading.config)
        for path in place.paths
        if path.root == "nodes" and path.steps
    }
    return [node_id for node_id in named if node_id is not None and node_id in drawn.graph.by_id]


# ── in words ────────────────────────────────────────────────────────────────────────────────────────────────


def _finding(node: Node, place: Place, unfound: _Unfound) -> Finding:
    message = f'Node "{node.label}" ({node.type}): {place.name}: {_short(unfound.path)} {unfound.reason}'
    suggestion = f"Did you mean {' or '.join(unfound.meant)}?" if unfound.meant else unfound.hint
    fix = None
    if len(unfound.meant) == 1:
        value = _replaced(place, unfound.path, unfound.meant[0])
        fix = Fix(_ACTIONS[place.part], node.id, path=place.steps, value=value)
    return Finding(
        FindingType.UNRESOLVED_MAPPING,
        message,
        suggestion or "Read it from another path, or leave it out.",
        node.id,
        fix=fix,
    )


def _replaced(place: Place, path: str, meant: str) -> str:
    """Return the text of a place with one of its paths replaced."""
    if "{{" not in place.text and "??" not in place.text:
        return meant
    expression = rf"((?:\{{\{{|\?\?)\s*){re.escape(path)}(\s*(?:\}}\}}|\?\?|\Z))"
    return re.sub(expression, lambda found: f"{found[1]}{meant}{found[2]}", place.text)


def _reason(lost: Lost) -> str:
    return "found nothing in past runs" if lost.shape.rest is Rest.NOTHING_SEEN else "finds nothing"


def _what_there_is(where: str, shape: Shape) -> str:
    if shape.fields:
        return f"{where} has {_listed(shape.fields)}."
    if shape.items is not None:
        return f"{where} is a list: {where}[0] is its first item."
    return f"{where} has no fields."


def _listed(texts: Iterable[str]) -> str:
    shown = [_short(name) for name in islice(dict.fromkeys(texts), SHOWN_NAMES + 1)]
    return ", ".join([*shown[:SHOWN_NAMES], "…"] if len(shown) > SHOWN_NAMES else shown) or "none"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _written(root: str, steps: Steps) -> str:
    """Return a path as it is written."""
    return root + "".join(map(_written_step, steps))


def _written_step(step: Step) -> str:
    key, position = step
    if key is None:
        return f"[{position}]"
    if _PLAIN_NAME.fullmatch(key):
        return f".{key}"
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    return f'["{escaped}"]'
