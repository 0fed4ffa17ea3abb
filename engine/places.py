"""Where in a node paths are written: its config, its mappings, and what it passes through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias

from engine.conditions import compile_condition
from engine.expressions import (
    ExpressionError,
    Path,
    compile_expression,
    compile_template,
    compile_value,
    needed_path,
)
from engine.node import OF_EACH, Compile
from engine.operations import OPERATIONS
from engine.values import MAX_DEPTH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.graph import Node
    from engine.node import NodeType
    from engine.values import Json

Steps: TypeAlias = "tuple[str | int, ...]"
_Leaf: TypeAlias = "tuple[Steps, str]"

_QUESTIONS: Final = ("exists", "not-exists")
"""Operators that may well find nothing on their left: that is what they ask."""


class Part(StrEnum):
    """The parts of a node that hold paths."""

    CONFIG = "config"
    INPUT_MAPPINGS = "inputMappings"
    PASS_THROUGH_VALUES = "passThroughValues"  # noqa: S105 - the name of a field


@dataclass(frozen=True, slots=True)
class Place:
    """One text with expressions in it."""

    part: Part
    steps: Steps
    """The way from the part to the text."""
    text: str
    paths: Sequence[Path]
    """Those that must lead somewhere: what may be missing has its answer in what follows `??`."""
    is_late: bool = False
    """The node renders it itself, once an item if it likes."""

    @property
    def name(self) -> str:
        return named(self.part, self.steps)


@dataclass(slots=True)
class Reading:
    """The places of one node, and the expressions of it that can't be read."""

    mappings: list[Place] = field(default_factory=list)
    config: list[Place] = field(default_factory=list)
    errors: list[tuple[str, ExpressionError]] = field(default_factory=list)
    """Each with the name of its place."""


class Reader:
    """Reads nodes, a text that many of them share only once."""

    def __init__(self) -> None:
        self._read: dict[str, Sequence[Path]] = {}

    def read(self, node: Node, node_type: NodeType) -> Reading:
        reading = Reading()
        for name, source in node.input_mappings.items():
            if isinstance(source, str) and "{{" not in source:
                self._read_path(name, source, reading)
            else:
                self._read_templates(Part.INPUT_MAPPINGS, (name,), source, reading)
        for steps, value, kind in _fields(node.config, node_type.compiled):
            if kind is Compile.LITERAL:
                continue
            if kind is None:
                self._read_templates(Part.CONFIG, steps, value, reading)
            elif kind is Compile.CONDITION or not _is_static(value):
                self._read_compiled(steps, value, kind, reading)
        return reading

    def _read_templates(self, part: Part, place: Steps, value: Json, reading: Reading) -> None:
        """Take a value in whose texts paths stand between braces."""
        if _is_static(value):
            return
        try:
            for steps, text in _leaves(place, value):
                self._read_text(part, steps, text, reading)
        except ExpressionError as error:
            reading.errors.append((named(part, place), error))

    def _read_text(
        self, part: Part, steps: Steps, text: str, reading: Reading, *, is_late: bool = False
    ) -> None:
        paths = self._read.get(text)
        try:
            if paths is None:
                paths = self._read[text] = compile_template(text).needed
        except ExpressionError as error:
            reading.errors.append((named(part, steps), error))
        else:
            places = reading.config if part is Part.CONFIG else reading.mappings
            places.append(Place(part, steps, text, paths, is_late))

    def _read_compiled(self, place: Steps, value: Json, kind: Compile, reading: Reading) -> None:
        """Take a condition or a value that may be computed: it can be wrong as a whole, not only in its texts."""
        try:
            if kind is Compile.CONDITION:
                compile_condition(value)
            else:
                compile_value(value)
        except ExpressionError as error:
            reading.errors.append((named(Part.CONFIG, place), error))
            return
        for steps, text in _leaves(place, value, needed_only=True):
            self._read_text(Part.CONFIG, steps, text, reading, is_late=True)

    def _read_path(self, name: str, source: str, reading: Reading) -> None:
        """Take a mapping that is an expression and nothing else."""
        paths = self._read.get(source)
        try:
            if paths is None:
                needed = needed_path(compile_expression(source))
                paths = self._read[source] = (needed,) if needed else ()
        except ExpressionError as error:
            reading.errors.append((named(Part.INPUT_MAPPINGS, (name,)), error))
        else:
            reading.mappings.append(Place(Part.INPUT_MAPPINGS, (name,), source, paths))


def named(part: Part, steps: Steps) -> str:
    """Return how a place is called: `config.values.total`."""
    return ".".join([part, *map(str, steps)])


def _fields(
    config: Mapping[str, Json], compiled: Mapping[str, Compile]
) -> Iterator[tuple[Steps, Json, Compile | None]]:
    """Return the fields of a config, one by one also in the items of a list where some of these are compiled."""
    of_items: dict[str, dict[str, Compile]] = {}
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
    """Tell whether a value holds no expression: most do, and needn't be looked at any closer."""
    if isinstance(value, str):
        return "{{" not in value
    if isinstance(value, dict):
        return "$op" not in value and all(map(_is_static, value.values()))
    return not isinstance(value, list) or all(map(_is_static, value))


def _leaves(steps: Steps, value: Json, *, needed_only: bool = False) -> Iterator[_Leaf]:
    """Return the texts of a value that hold expressions, in order.

    Raises `ExpressionError` where it is too deep, and for an operation where nothing is computed.
    """
    left: list[tuple[Steps, Json]] = [(steps, value)]
    while left:
        at, inner = left.pop()
        if isinstance(inner, str):
            if "{{" in inner:
                yield at, inner
        elif isinstance(inner, dict | list) and inner:
            if len(at) >= MAX_DEPTH:
                raise ExpressionError(
                    "[…]", f"objects and lists stand more than {MAX_DEPTH} deep in one another"
                )
            if not needed_only and "$op" in inner and isinstance(inner, dict):
                message = "operations are computed only in the fields that docs/expressions.md lists"
                raise ExpressionError(f"$op {inner['$op']}", f"{message}: compute it in a set node before")
            below = _needed(inner) if needed_only else _all(inner)
            left.extend(reversed([((*at, *steps), item) for steps, item in below]))


def _all(value: dict[str, Json] | list[Json]) -> list[tuple[Steps, Json]]:
    if isinstance(value, list):
        return [((index,), item) for index, item in enumerate(value)]
    return [((key,), item) for key, item in value.items()]


def _needed(value: dict[str, Json] | list[Json]) -> list[tuple[Steps, Json]]:
    """Return the parts of a condition or a computed value in which it matters that a path finds something."""
    if isinstance(value, list):
        return _all(value)
    operation, arguments = OPERATIONS.get(str(value.get("$op"))), value.get("args")
    if operation is not None and operation.takes_first_found and isinstance(arguments, list):
        return [(("args", len(arguments) - 1), arguments[-1])] if arguments else []
    if value.get("operator") in _QUESTIONS:
        return []
    return _all(value)
