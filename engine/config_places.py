"""Places in the configs of nodes: of expressions, of scripts, and of references to resources.

Scripts are parsed and never executed. A field that refers to a resource, such as a data source or model, by its id is
marked in the schema of its type with `x-resource = "datasources:read"`. If the field contains a template, the id is
known only at run time.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias, cast

from msgspec import Struct, field

from engine.agents.agent_wiring import name_target_config, target_of
from engine.conditions import compile_condition
from engine.expressions import (
    ExpressionError,
    ExpressionPath,
    compile_expression,
    compile_template,
    compile_value,
    needed_path,
)
from engine.findings import FindingType, GraphFinding
from engine.node_api import OF_EACH, TOOL_TYPE, FieldCompilation, UnknownNodeType
from engine.operations import OPERATIONS
from engine.values import MAX_DEPTH

if TYPE_CHECKING:
    from engine.graph import GraphNode, ParsedGraph
    from engine.node_api import NodeType
    from engine.node_lookup import NodeTypeLookup
    from engine.values import Json

PlaceSteps: TypeAlias = "tuple[str | int, ...]"
_Leaf: TypeAlias = "tuple[PlaceSteps, str]"

_EXISTENCE_OPERATORS: Final = ("exists", "not-exists")
"""Operators whose left side may be missing: they test for that."""

MAX_SCRIPT_CHARACTERS: Final = 65_536
MAX_CHARACTERS: Final = 262_144
"""Maximum size of all parsed scripts of one graph, at a microsecond per character; others are checked at run
time.
"""

RESOURCE_KEYWORD: Final = "x-resource"
MODELS_KIND: Final = "models"
DEFAULT_MODEL: Final = "default"
"""Name of the default model of the organization in a config; a definition has the id of the model instead."""
SOURCE_TYPES: Final = "x-source-types"
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")

_Schema: TypeAlias = "Mapping[str, Json]"


class NodeSection(StrEnum):
    """Parts of a node that contain paths."""

    CONFIG = "config"
    INPUT_MAPPINGS = "inputMappings"
    PASS_THROUGH_VALUES = "passThroughValues"  # noqa: S105 - the name of a field


class ExpressionPlace(Struct, frozen=True):
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


class NodeExpressions(Struct):
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
        """Return the expressions in the mappings and the config of a node, and its errors of syntax."""
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
        """Add the expressions in the texts of a value to `reading`; an invalid text is added to its errors instead.

        An object with `$op`, and too deep nesting, are errors that end the search in the value.
        """
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
        """Add one text with expressions to `reading`, or its error; a text that was read before is not compiled again.

        `is_late` marks a text that the node renders itself.
        """
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
        """Add the expressions of a condition or a computed value to `reading`.

        One that doesn't compile as a whole is added to the errors instead.
        """
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
        """Add a mapping that is a bare expression to `reading`; an invalid one is added to its errors."""
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
    """Return the name of a place in a node, such as `config.values.total`."""
    return ".".join([part, *map(str, steps)])


def _config_fields(
    config: Mapping[str, Json], compiled: Mapping[str, FieldCompilation]
) -> Iterator[tuple[PlaceSteps, Json, FieldCompilation | None]]:
    """Yield the fields of a config with their steps, value and kind of compilation (None for fields rendered
    before the call).

    Fields of list items are yielded one by one if some of them are compiled.
    """
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
    """Return whether no text in a value contains `{{` and no object has `$op`, so that it needs no compilation."""
    if isinstance(value, str):
        return "{{" not in value
    if isinstance(value, dict):
        return "$op" not in value and all(map(_is_static, value.values()))
    return not isinstance(value, list) or all(map(_is_static, value))


def _expression_leaves(steps: PlaceSteps, value: Json, *, needed_only: bool = False) -> Iterator[_Leaf]:
    """Yield the texts of a value that contain `{{`, with their places, in order.

    Raises `ExpressionError` for too deep nesting and, unless `needed_only` is set, for an object with `$op`.
    `needed_only` is for conditions and computed values: texts that may find nothing, such as arguments with a fallback
    and operands of `exists`, are left out.
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
            below = _list_needed_texts(inner) if needed_only else _all_texts(inner)
            left.extend(reversed([((*at, *steps), item) for steps, item in below]))


def _all_texts(value: dict[str, Json] | list[Json]) -> list[tuple[PlaceSteps, Json]]:
    if isinstance(value, list):
        return [((index,), item) for index, item in enumerate(value)]
    return [((key,), item) for key, item in value.items()]


def _list_needed_texts(value: dict[str, Json] | list[Json]) -> list[tuple[PlaceSteps, Json]]:
    """Return the parts of a condition or computed value whose paths must be found, with their steps.

    Arguments with a fallback and operands of `exists` may be missing.
    """
    if isinstance(value, list):
        return _all_texts(value)
    operation, arguments = OPERATIONS.get(str(value.get("$op"))), value.get("args")
    if operation is not None and operation.takes_first_found and isinstance(arguments, list):
        return [(("args", len(arguments) - 1), arguments[-1])] if arguments else []
    if value.get("operator") in _EXISTENCE_OPERATORS:
        return []
    return _all_texts(value)


class ScriptChecker:
    """Checker of the scripts of one graph, up to a limit of characters."""

    def __init__(self) -> None:
        self._characters = 0
        self._read: dict[str, str | None] = {}

    def findings(self, node: GraphNode, node_type: NodeType) -> Iterator[GraphFinding]:
        """Yield a finding for each config field in Python (schema keyword `x-language`) whose text has a
        syntax error.

        Scripts over 65,536 characters, and all once those of the graph exceed 262,144, are not checked.
        """
        properties = node_type.config_schema.get("properties")
        for name, schema in properties.items() if isinstance(properties, dict) else ():
            source = node.config.get(name)
            if not isinstance(schema, dict) or schema.get("x-language") != "python":
                continue
            if isinstance(source, str) and (wrong := self._syntax_problem(source)) is not None:
                message = f'Node "{node.label}" ({node.type}): config.{name}: {wrong}'
                yield GraphFinding(FindingType.INVALID_CONFIG, message, "Fix the script.", node.id)

    def _syntax_problem(self, source: str) -> str | None:
        """Return the error of syntax in a script; None without one, or if the limits of characters are exceeded."""
        if source not in self._read:
            self._characters += len(source)
            if len(source) > MAX_SCRIPT_CHARACTERS or self._characters > MAX_CHARACTERS:
                return None
            self._read[source] = _syntax_error_of(source)
        return self._read[source]


def _syntax_error_of(source: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}"
    except (RecursionError, MemoryError):
        return "it is nested too deeply"
    except ValueError as error:
        return str(error)
    return None


class ResourceReference(Struct, frozen=True):
    """Reference to a resource in a config."""

    kind: str
    """Kind of resource: `datasources`, `models`, …"""
    id: str
    node_id: str
    path: str
    """Path in the node's config, with dots: `dataSource`."""
    action: str
    """Action of the node on the resource: `read`, `write`, `invoke`."""
    source_types: Sequence[str] = ()
    """Types of data sources that the node accepts there; empty for other kinds of resources."""

    @property
    def scope(self) -> str:
        return f"{self.kind}:{self.action}:{self.id}"


class ResourceText(Struct, frozen=True):
    """Text of a config field that refers to a resource: an id, a template, or a placeholder."""

    kind: str
    action: str
    text: str
    node: GraphNode
    """Node of the field; of a tool, the node that does its calls."""
    steps: PlaceSteps
    """Path in the config of the stored node."""
    source_types: Sequence[str]

    @property
    def is_default_model(self) -> bool:
        """Whether it names the default model of the organization."""
        return (self.kind, self.text) == (MODELS_KIND, DEFAULT_MODEL)


def required_scopes(graph: ParsedGraph, catalog: NodeTypeLookup) -> list[str]:
    """Return the scopes that a graph's references need, sorted and unique, such as `datasources:read:ds_001`.

    `default` needs the scope of the organization's current default model, or none without such a model.
    """
    scopes = {reference.scope for reference in list_references(graph, catalog)}
    if catalog.default_model_id is not None:
        scopes.update(
            f"{found.kind}:{found.action}:{catalog.default_model_id}"
            for found in iterate_resource_texts(graph.nodes, catalog)
            if found.is_default_model
        )
    return sorted(scopes)


def list_references(graph: ParsedGraph, catalog: NodeTypeLookup) -> list[ResourceReference]:
    """Return every reference to a resource id, such as a data source, in the configs of nodes and of targets of tools,
    in the order of nodes and fields; repeated ones too.

    The schemas of the node types say which fields those are. Nodes of unknown types have none. Texts that are no ids,
    such as templates, and `default` for a model are left out.
    """
    return [
        ResourceReference(
            found.kind,
            found.text,
            found.node.id,
            ".".join(map(str, found.steps)),
            found.action,
            found.source_types,
        )
        for found in iterate_resource_texts(graph.nodes, catalog)
        if is_resource_id(found.text) and not found.is_default_model
    ]


def is_resource_id(text: str) -> bool:
    """Return whether a text that refers to a resource is an id, and no template."""
    return _ID.fullmatch(text) is not None


def iterate_resource_texts(nodes: Sequence[GraphNode], catalog: NodeTypeLookup) -> Iterator[ResourceText]:
    """Yield the texts of all fields that refer to resources, of nodes and of the targets of tools; unknown types have
    none.
    """
    types: dict[tuple[str, str | None], NodeType | None] = {}
    for node, prefix in _with_tool_targets(nodes):
        key = (node.type, node.version)
        if key not in types:
            types[key] = _find_node_type(catalog, *key)
        node_type = types[key]
        if node_type is None:
            continue
        for steps, schema, value in _iterate_named_texts(
            prefix, dict(node_type.config_schema), dict(node.config)
        ):
            kind, _, action = str(schema[RESOURCE_KEYWORD]).partition(":")
            source_types = cast("Sequence[str]", schema.get(SOURCE_TYPES, ()))
            yield ResourceText(kind, action, value, node, steps, source_types)


def may_name_model(node_type: str, catalog: NodeTypeLookup) -> bool:
    """Return whether nodes of a type may call language models, which is always so for tools, by their targets.

    False for an unknown type.
    """
    try:
        return node_type == TOOL_TYPE or catalog.get(node_type).is_paid
    except UnknownNodeType:
        return False


def _with_tool_targets(nodes: Sequence[GraphNode]) -> Iterator[tuple[GraphNode, PlaceSteps]]:
    """Yield the nodes, and the targets of tools, each with the path of its config in the config of the stored node.

    The path is empty for a node itself.
    """
    for node in nodes:
        yield node, ()
        if node.type == TOOL_TYPE and (target := target_of(node)) is not None:
            yield target, tuple(name_target_config(node).split("."))


def _find_node_type(catalog: NodeTypeLookup, node_type: str, version: str | None) -> NodeType | None:
    try:
        return catalog.get(node_type, version)
    except UnknownNodeType:
        return None


def _iterate_named_texts(
    steps: PlaceSteps, schema: Json, value: Json
) -> Iterator[tuple[PlaceSteps, _Schema, str]]:
    """Yield the texts in a config value that refer to resources, each with its path and the schema of its field."""
    if not isinstance(schema, dict):
        return
    if isinstance(value, str):
        if isinstance(schema.get(RESOURCE_KEYWORD), str):
            yield steps, schema, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _iterate_named_texts((*steps, index), schema.get("items"), item)
    elif isinstance(value, dict):
        properties = cast("_Schema", schema.get("properties", {}))
        for name, inner in value.items():
            yield from _iterate_named_texts((*steps, name), properties.get(name), inner)
