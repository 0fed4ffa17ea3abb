"""Places of expressions in a node: its config, its input mappings, and its pass-through values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias

from engine.conditions import compile_condition
from engine.expressions import (
    ExpressionError,
    ExpressionPath,
    compile_expression,
    compile_template,
    compile_value,
    needed_path,
)
from engine.node_api import OF_EACH, FieldCompilation
from engine.operations import OPERATIONS
from engine.values import MAX_DEPTH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.graph import GraphNode
    from engine.node_api import NodeType
    from engine.values import Json

PlaceSteps: TypeAlias = "tuple[str | int, ...]"
_Leaf: TypeAlias = "tuple[PlaceSteps, str]"

_EXISTENCE_OPERATORS: Final = ("exists", "not-exists")
"""Operators whose left side may be missing: they test for that."""


class NodeSection(StrEnum):
    """Parts of a node that contain paths."""

    CONFIG = "config"
    INPUT_MAPPINGS = "inputMappings"
    PASS_THROUGH_VALUES = "passThroughValues"  # noqa: S105 - the name of a field


@dataclass(frozen=True, slots=True)
class ExpressionPlace:
    """Text with expressions."""

    part: NodeSection
    steps: PlaceSteps
    """Path from the section to the text."""
    text: str
    paths: Sequence[ExpressionPath]
    """Paths that must be found: those without a fallback behind `??`."""
    is_evaluated_late: bool = False
    """Whether the node renders the text itself, possibly once per item."""

    @property
    def name(self) -> str:
        return format_place(self.part, self.steps)


@dataclass(slots=True)
class NodeExpressions:
    """Expressions of one node, and its errors of syntax."""

    mappings: list[ExpressionPlace] = field(default_factory=list)
    config: list[ExpressionPlace] = field(default_factory=list)
    errors: list[tuple[str, ExpressionError]] = field(default_factory=list)
    """Errors with the names of their places."""


class ExpressionReader:
    """Reader of the expressions of nodes; it caches texts that many nodes share."""

    def __init__(self) -> None:
        self._read: dict[str, Sequence[ExpressionPath]] = {}

    def read(self, node: GraphNode, node_type: NodeType) -> NodeExpressions:
        reading = NodeExpressions()
        for name, source in node.input_mappings.items():
            if isinstance(source, str) and "{{" not in source:
                self._read_path(name, source, reading)
            else:
                self._read_templates(NodeSection.INPUT_MAPPINGS, (name,), source, reading)
        for steps, value, kind in _config_fields(node.config, node_type.compiled):
            if kind is FieldCompilation.LITERAL:
                continue
            if kind is None:
                self._read_templates(NodeSection.CONFIG, steps, value, reading)
            elif kind is FieldCompilation.CONDITION or not _is_static(value):
                self._read_compiled(steps, value, kind, reading)
        return reading

    def _read_templates(
        self, part: NodeSection, place: PlaceSteps, value: Json, reading: NodeExpressions
    ) -> None:
        """Read a value whose texts contain paths in braces."""
        if _is_static(value):
            return
        try:
            for steps, text in _expression_leaves(place, value):
                self._read_text(part, steps, text, reading)
        except ExpressionError as error:
            reading.errors.append((format_place(part, place), error))

    def _read_text(
        self,
        part: NodeSection,
        steps: PlaceSteps,
        text: str,
        reading: NodeExpressions,
        *,
        is_late: bool = False,
    ) -> None:
        paths = self._read.get(text)
        try:
            if paths is None:
                paths = self._read[text] = compile_template(text).needed
        except ExpressionError as error:
            reading.errors.append((format_place(part, steps), error))
        else:
            places = reading.config if part is NodeSection.CONFIG else reading.mappings
            places.append(ExpressionPlace(part, steps, text, paths, is_late))

    def _read_compiled(
        self, place: PlaceSteps, value: Json, kind: FieldCompilation, reading: NodeExpressions
    ) -> None:
        """Read a condition or a computed value, which may be wrong as a whole, not only in its texts."""
        try:
            if kind is FieldCompilation.CONDITION:
                compile_condition(value)
            else:
                compile_value(value)
        except ExpressionError as error:
            reading.errors.append((format_place(NodeSection.CONFIG, place), error))
            return
        for steps, text in _expression_leaves(place, value, needed_only=True):
            self._read_text(NodeSection.CONFIG, steps, text, reading, is_late=True)

    def _read_path(self, name: str, source: str, reading: NodeExpressions) -> None:
        """Read a mapping that is a bare expression."""
        paths = self._read.get(source)
        try:
            if paths is None:
                needed = needed_path(compile_expression(source))
                paths = self._read[source] = (needed,) if needed else ()
        except ExpressionError as error:
            reading.errors.append((format_place(NodeSection.INPUT_MAPPINGS, (name,)), error))
        else:
            reading.mappings.append(ExpressionPlace(NodeSection.INPUT_MAPPINGS, (name,), source, paths))


def format_place(part: NodeSection, steps: PlaceSteps) -> str:
    """Return the name of a place, such as `config.values.total`."""
    return ".".join([part, *map(str, steps)])


def _config_fields(
    config: Mapping[str, Json], compiled: Mapping[str, FieldCompilation]
) -> Iterator[tuple[PlaceSteps, Json, FieldCompilation | None]]:
    """Yield the fields of a config; those of list items one by one, if some of them are compiled."""
    of_items: dict[str, dict[str, FieldCompilation]] = {}
    for place, kind in compiled.items():
        field, of_each, name = place.partition(OF_EACH)
        if of_each:
            of_items.setdefault(field, {})[name] = kind
    for name, value in config.items():
        if name not in of_items or not isinstance(value, list):
            yield (name,), value, compiled.get(name)
            continue
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                yield (name, index), item, None
                continue
            for inner, each in item.items():
                yield (name, index, inner), each, of_items[name].get(inner)


def _is_static(value: Json) -> bool:
    """Return whether a value contains no expression; most values contain none and need no further work."""
    if isinstance(value, str):
        return "{{" not in value
    if isinstance(value, dict):
        return "$op" not in value and all(map(_is_static, value.values()))
    return not isinstance(value, list) or all(map(_is_static, value))


def _expression_leaves(steps: PlaceSteps, value: Json, *, needed_only: bool = False) -> Iterator[_Leaf]:
    """Yield the texts of a value that contain expressions, in order.

    Raises `ExpressionError` if the value is nested too deeply, or contains an operation in a field that
    doesn't compute them.
    """
    left: list[tuple[PlaceSteps, Json]] = [(steps, value)]
    while left:
        at, inner = left.pop()
        if isinstance(inner, str):
            if "{{" in inner:
                yield at, inner
        elif isinstance(inner, dict | list) and inner:
            if len(at) >= MAX_DEPTH:
                raise ExpressionError("[…]", f"objects and lists nest more than {MAX_DEPTH} deep")
            if not needed_only and "$op" in inner and isinstance(inner, dict):
                message = "operations are computed only in the fields that docs/expressions.md lists"
                raise ExpressionError(f"$op {inner['$op']}", f"{message}: compute it in a set node before")
            below = _needed_texts(inner) if needed_only else _all_texts(inner)
            left.extend(reversed([((*at, *steps), item) for steps, item in below]))


def _all_texts(value: dict[str, Json] | list[Json]) -> list[tuple[PlaceSteps, Json]]:
    if isinstance(value, list):
        return [((index,), item) for index, item in enumerate(value)]
    return [((key,), item) for key, item in value.items()]


def _needed_texts(value: dict[str, Json] | list[Json]) -> list[tuple[PlaceSteps, Json]]:
    """Return the parts of a condition or computed value whose paths must be found."""
    if isinstance(value, list):
        return _all_texts(value)
    operation, arguments = OPERATIONS.get(str(value.get("$op"))), value.get("args")
    if operation is not None and operation.takes_first_found and isinstance(arguments, list):
        return [(("args", len(arguments) - 1), arguments[-1])] if arguments else []
    if value.get("operator") in _EXISTENCE_OPERATORS:
        return []
    return _all_texts(value)
