"""What a graph uses that isn't in it: data sources, models and whatever else a config names by its id.

The schema of a type marks such a field: `x-resource = "datasources:read"`. Where a template stands in it, the id is
known to a run alone.
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
    """One place in a config that names something."""

    kind: str
    """`datasources`, `models`, …"""
    id: str
    node_id: str
    path: str
    """The place in the node's config, with dots: `dataSource`."""
    action: str
    """What the node does with it: `read`, `write`, `invoke`."""
    source_types: Sequence[str] = ()
    """Types of data sources that the node can use there; empty for other things than data sources."""

    @property
    def scope(self) -> str:
        return f"{self.kind}:{self.action}:{self.id}"


def required_scopes(graph: ParsedGraph, catalog: NodeTypeLookup) -> list[str]:
    """Return what a graph needs to be allowed: sorted, each once, such as `datasources:read:ds_001`."""
    return sorted({reference.scope for reference in list_references(graph, catalog)})


def list_references(graph: ParsedGraph, catalog: NodeTypeLookup) -> list[ResourceReference]:
    """Return every place of a graph that names something, in order; types that the catalogue lacks name nothing."""
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
    """Return the ids in a value, each with its path, and with the schema that says what it is the id of."""
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
