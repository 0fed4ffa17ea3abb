"""Resources that a graph refers to by id in its configs, such as data sources and models.

The schema of a type marks such a field with `x-resource = "datasources:read"`. If the field contains a
template, the id is known only at run time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, cast

from engine.node_api import UnknownNodeType

if TYPE_CHECKING:
    from engine.graph import ParsedGraph
    from engine.node_api import NodeType
    from engine.node_lookup import NodeTypeLookup
    from engine.values import Json

RESOURCE_KEYWORD: Final = "x-resource"
SOURCE_TYPES: Final = "x-source-types"
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")

_Schema: TypeAlias = "Mapping[str, Json]"


@dataclass(frozen=True, slots=True)
class ResourceReference:
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


def required_scopes(graph: ParsedGraph, catalog: NodeTypeLookup) -> list[str]:
    """Return the scopes that a graph needs, sorted and unique, such as `datasources:read:ds_001`."""
    return sorted({reference.scope for reference in list_references(graph, catalog)})


def list_references(graph: ParsedGraph, catalog: NodeTypeLookup) -> list[ResourceReference]:
    """Return every resource reference of a graph, in order; nodes of unknown types have none."""
    found: list[ResourceReference] = []
    types: dict[tuple[str, str | None], NodeType | None] = {}
    for node in graph.nodes:
        key = (node.type, node.version)
        if key not in types:
            types[key] = _find_node_type(catalog, *key)
        node_type = types[key]
        if node_type is not None:
            for path, schema, value in _named_ids("", dict(node_type.config_schema), dict(node.config)):
                kind, _, action = str(schema[RESOURCE_KEYWORD]).partition(":")
                source_types = cast("Sequence[str]", schema.get(SOURCE_TYPES, ()))
                found.append(ResourceReference(kind, value, node.id, path, action, source_types))
    return found


def _find_node_type(catalog: NodeTypeLookup, node_type: str, version: str | None) -> NodeType | None:
    try:
        return catalog.get(node_type, version)
    except UnknownNodeType:
        return None


def _named_ids(path: str, schema: Json, value: Json) -> Iterator[tuple[str, _Schema, str]]:
    """Yield the resource ids in a value, each with its path and the schema of its field."""
    if not isinstance(schema, dict):
        return
    if isinstance(value, str):
        if isinstance(schema.get(RESOURCE_KEYWORD), str) and _ID.fullmatch(value):
            yield path, schema, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _named_ids(_child_path(path, str(index)), schema.get("items"), item)
    elif isinstance(value, dict):
        properties = cast("_Schema", schema.get("properties", {}))
        for name, inner in value.items():
            yield from _named_ids(_child_path(path, name), properties.get(name), inner)


def _child_path(path: str, step: str) -> str:
    return f"{path}.{step}" if path else step
