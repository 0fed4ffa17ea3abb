"""What each node of a graph is given and gives out, as far as that is known before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from engine import shapes
from engine.expressions import ExpressionError
from engine.joins import Combine, Join, Mode
from engine.node import CONTINUE, ERROR, INPUT
from engine.shapes import SCALAR, UNKNOWN, Lost, Rest, Shape

if TYPE_CHECKING:
    from engine.graph import Edge, Graph, Node
    from engine.node import NodeType
    from engine.values import Json

Samples: TypeAlias = "Mapping[str, Sequence[Json]]"
"""What nodes gave out in past runs, by their ids."""

_ERROR: Final = Shape({"code": SCALAR, "message": SCALAR, "nodeId": SCALAR, "attempt": SCALAR})


class Flow:
    """Follows the data from node to node: each must have been left before those behind it are entered."""

    def __init__(self, graph: Graph, types: Mapping[str, NodeType], samples: Samples) -> None:
        self._graph = graph
        self._types = types
        self._samples = samples
        self._of_schemas: dict[str, Shape] = {}
        self._given: dict[str, Shape] = {}
        self._outputs: dict[str, Shape] = {}
        self.trigger = self._trigger()
        """What is known of the root `trigger`."""

    def enter(self, node: Node) -> Shape:
        """Return what the nodes before it give to a node: one of them alone, or several together."""
        edges = self._graph.inbound[node.id]
        node_type = self._types.get(node.id)
        if node_type and node_type.is_trigger and not edges:
            return self.trigger
        if not edges or any(edge.target_port != INPUT for edge in edges):
            return UNKNOWN
        if node_type and node_type.joins:
            return self._joined(node, edges)
        if len(edges) == 1:
            return self._leaving(edges[0])
        alone = self._alone(edges)
        together = [Shape(alone)] if len(alone) > 1 else []
        return shapes.either([*alone.values(), *together])

    def _joined(self, node: Node, edges: Sequence[Edge]) -> Shape:
        alone = self._alone(edges)
        try:
            join = Join.of(node.config)
        except ExpressionError:
            return UNKNOWN
        if join.mode is Mode.ANY or join.combine is Combine.MERGED:
            return shapes.either([*alone.values()])
        return (
            Shape(alone) if join.combine is Combine.BY_NODE else Shape(items=shapes.either([*alone.values()]))
        )

    def _alone(self, edges: Sequence[Edge]) -> dict[str, Shape]:
        """Return what comes from each of several nodes."""
        by_source: dict[str, list[Shape]] = {}
        for edge in edges:
            by_source.setdefault(edge.source, []).append(self._leaving(edge))
        return {source: shapes.either(leaving) for source, leaving in by_source.items()}

    def leave(self, node: Node, given: Shape) -> None:
        """Note what a node works on, after its mappings, and what it makes of that."""
        self._given[node.id] = given
        output = self._output(node, given)
        if node.pass_through_values:
            passed = {
                key: shapes.follow(given, ((str(source), None),))
                for key, source in node.pass_through_values.items()
            }
            found = {key: UNKNOWN if isinstance(each, Lost) else each for key, each in passed.items()}
            output = shapes.with_fields(output, found)
        self._outputs[node.id] = output

    def result(self, node_id: str) -> Shape:
        """Return what is kept of a node that was left, by whichever port the data did."""
        if any(edge.source_port == ERROR for edge in self._graph.outbound[node_id]):
            return shapes.either([self._outputs[node_id], self._failed(node_id)])
        return self._outputs[node_id]

    def _trigger(self) -> Shape:
        triggers = [node_id for node_id, node_type in self._types.items() if node_type.is_trigger]
        return self._own_output(triggers[0]) if len(triggers) == 1 else UNKNOWN

    def _leaving(self, edge: Edge) -> Shape:
        source_type = self._types.get(edge.source)
        if source_type and source_type.loops and edge.source_port == CONTINUE:
            return UNKNOWN
        return self._failed(edge.source) if edge.source_port == ERROR else self._outputs[edge.source]

    def _failed(self, node_id: str) -> Shape:
        """Return what leaves a node by its port `error`."""
        return Shape({"error": _ERROR, "data": self._given[node_id]})

    def _output(self, node: Node, given: Shape) -> Shape:
        node_type = self._types.get(node.id)
        if node_type is None:
            return UNKNOWN
        rule = node_type.output
        fields = shapes.of_config(node.config.get(rule.fields_of)) if rule.fields_of else Shape()
        if fields.rest is Rest.UNKNOWN:
            return UNKNOWN
        if rule.dropped_by is not None:
            deciding, dropping = rule.dropped_by
            chosen = node.config.get(deciding)
            if chosen == dropping:
                return fields
            if shapes.of_config(chosen) is UNKNOWN:
                return UNKNOWN
        if node_type.is_trigger or rule.keeps_input:
            return shapes.with_fields(given, fields.fields) if rule.fields_of else given
        return self._own_output(node.id)

    def _own_output(self, node_id: str) -> Shape:
        """Return what a node gives out whatever it is given: what its type declares, and what it gave before."""
        node_type = self._types[node_id]
        if node_type.type not in self._of_schemas:
            self._of_schemas[node_type.type] = shapes.of_schema(dict(node_type.output.schema))
        declared = self._of_schemas[node_type.type]
        past = self._samples.get(node_id)
        return shapes.with_past(declared, shapes.of_past(past)) if past else declared
