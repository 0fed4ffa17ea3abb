"""Shapes of the inputs and outputs of nodes, as far as they are known before a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from engine import shapes
from engine.expressions import ExpressionError
from engine.joins import JoinCombination, JoinConfig, JoinMode
from engine.node_api import CONTINUE, ERROR, INPUT
from engine.shapes import SCALAR, UNKNOWN, OtherFields, PathDeadEnd, ValueShape

if TYPE_CHECKING:
    from engine.graph import GraphEdge, GraphNode, ParsedGraph
    from engine.node_api import NodeType
    from engine.values import Json

OutputSamples: TypeAlias = "Mapping[str, Sequence[Json]]"
"""Outputs of nodes in past runs, by node id."""

_ERROR: Final = ValueShape({"code": SCALAR, "message": SCALAR, "nodeId": SCALAR, "attempt": SCALAR})


class DataFlow:
    """Data flow analysis of a graph: call `infer_output` for a node before `infer_input` for its successors."""

    def __init__(self, graph: ParsedGraph, types: Mapping[str, NodeType], samples: OutputSamples) -> None:
        self._graph = graph
        self._types = types
        self._samples = samples
        self._of_schemas: dict[str, ValueShape] = {}
        self._given: dict[str, ValueShape] = {}
        self._outputs: dict[str, ValueShape] = {}
        self.trigger = self._trigger()
        """Shape of the root `trigger`."""

    def infer_input(self, node: GraphNode) -> ValueShape:
        """Return the shape of a node's input: the trigger's data, the output of one predecessor, or a union of several.

        A join has the shape that it builds. The shape is unknown without predecessors or behind an invalid port. Raises
        `KeyError` if `infer_output` was not called for a predecessor.
        """
        edges = self._graph.inbound[node.id]
        node_type = self._types.get(node.id)
        if node_type and node_type.is_trigger and not edges:
            return self.trigger
        if not edges or any(edge.target_port != INPUT for edge in edges):
            return UNKNOWN
        if node_type and node_type.joins:
            return self._join_inputs(node, edges)
        if len(edges) == 1:
            return self._edge_shape(edges[0])
        alone = self._single_inputs(edges)
        together = [ValueShape(alone)] if len(alone) > 1 else []
        return shapes.union_shapes([*alone.values(), *together])

    def _join_inputs(self, node: GraphNode, edges: Sequence[GraphEdge]) -> ValueShape:
        """Return the shape of the input that a join builds from its branches; unknown for an invalid config."""
        alone = self._single_inputs(edges)
        try:
            join = JoinConfig.from_config(node.config)
        except ExpressionError:
            return UNKNOWN
        if join.mode is JoinMode.ANY or join.combine is JoinCombination.MERGED:
            return shapes.union_shapes([*alone.values()])
        return (
            ValueShape(alone)
            if join.combine is JoinCombination.BY_NODE
            else ValueShape(items=shapes.union_shapes([*alone.values()]))
        )

    def _single_inputs(self, edges: Sequence[GraphEdge]) -> dict[str, ValueShape]:
        """Return by source node the shape of the values that its edges carry, a union if it has several edges."""
        by_source: dict[str, list[ValueShape]] = {}
        for edge in edges:
            by_source.setdefault(edge.source, []).append(self._edge_shape(edge))
        return {source: shapes.union_shapes(leaving) for source, leaving in by_source.items()}

    def infer_output(self, node: GraphNode, given: ValueShape) -> None:
        """Derive and store the shape of a node's output, with its pass-through fields; store that of its input too.

        `given` is the shape of its input after mappings.
        """
        self._given[node.id] = given
        output = self._output_shape(node, given)
        if node.pass_through_values:
            passed = {
                key: shapes.follow_path(given, ((str(source), None),))
                for key, source in node.pass_through_values.items()
            }
            found = {key: UNKNOWN if isinstance(each, PathDeadEnd) else each for key, each in passed.items()}
            output = shapes.add_fields(output, found)
        self._outputs[node.id] = output

    def node_shape(self, node_id: str) -> ValueShape:
        """Return the shape of a node's value under the root `nodes`: its output, in a union with its error if its
        port `error` is connected.

        Raises `KeyError` if `infer_output` was not called for the node.
        """
        if any(edge.source_port == ERROR for edge in self._graph.outbound[node_id]):
            return shapes.union_shapes([self._outputs[node_id], self._error_shape(node_id)])
        return self._outputs[node_id]

    def _trigger(self) -> ValueShape:
        triggers = [node_id for node_id, node_type in self._types.items() if node_type.is_trigger]
        return self._own_output(triggers[0]) if len(triggers) == 1 else UNKNOWN

    def _edge_shape(self, edge: GraphEdge) -> ValueShape:
        source_type = self._types.get(edge.source)
        if source_type and source_type.loops and edge.source_port == CONTINUE:
            return UNKNOWN
        return self._error_shape(edge.source) if edge.source_port == ERROR else self._outputs[edge.source]

    def _error_shape(self, node_id: str) -> ValueShape:
        """Return the shape of the data at a node's port `error`: the error, and the input as `data`."""
        return ValueShape({"error": _ERROR, "data": self._given[node_id]})

    def _output_shape(self, node: GraphNode, given: ValueShape) -> ValueShape:
        """Return the shape of a node's output, by that of its input (`given`), without pass-through fields."""
        node_type = self._types.get(node.id)
        if node_type is None:
            return UNKNOWN
        rule = node_type.output
        fields = shapes.shape_of_config(node.config.get(rule.fields_of)) if rule.fields_of else ValueShape()
        if fields.rest is OtherFields.UNKNOWN:
            return UNKNOWN
        if rule.dropped_by is not None:
            deciding, dropping = rule.dropped_by
            chosen = node.config.get(deciding)
            if chosen == dropping:
                return fields
            if shapes.shape_of_config(chosen) is UNKNOWN:
                return UNKNOWN
        if node_type.is_trigger or rule.keeps_input:
            return shapes.add_fields(given, fields.fields) if rule.fields_of else given
        return self._own_output(node.id)

    def _own_output(self, node_id: str) -> ValueShape:
        """Return the shape of a node's output: declared by its type, completed by sample outputs of past runs."""
        node_type = self._types[node_id]
        if node_type.type not in self._of_schemas:
            self._of_schemas[node_type.type] = shapes.shape_of_schema(dict(node_type.output.schema))
        declared = self._of_schemas[node_type.type]
        past = self._samples.get(node_id)
        return shapes.merge_samples(declared, shapes.shape_of_samples(past)) if past else declared
