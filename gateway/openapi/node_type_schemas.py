"""Schemas of the node types of one organization, as components of its OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from engine.conditions import CONDITION_SCHEMA
from gateway.openapi.schemas import REF

if TYPE_CHECKING:
    from engine.node_api import NodeType
    from nodes.catalog import NodeCatalog

CONDITION: Final = "node-condition"
CONDITION_ID: Final = CONDITION_SCHEMA["$id"]
NODE: Final = "node"
"""Component of a node of any type of the catalog."""
TEMPLATES: Final = "A text with `{{` is accepted in place of any value without `x-constant`."


def build_node_schemas(catalog: NodeCatalog) -> dict[str, Any]:
    """Return the components of a catalog by name.

    For `acme/resize`, these are `node.acme.resize`, `config.acme.resize`, and `output.acme.resize` if the type
    describes its output. No other component has a dot in its name. Deprecated types are left out, as in the list of
    the catalog.
    """
    listed = [one for _, one in sorted(catalog.node_types.items()) if not one.is_deprecated]
    found: dict[str, Any] = {CONDITION: _adopt(CONDITION_SCHEMA, is_root=True)}
    for node_type in listed:
        found |= _iterate_components(node_type)
    names = {one.type: f"{NODE}.{_component_name(one.type)}" for one in listed}
    found[NODE] = {
        "description": "Node of a type of the catalog, for `nodes` of a workflow.",
        "oneOf": [{"$ref": REF + name} for name in names.values()],
        "discriminator": {
            "propertyName": "type",
            "mapping": {type_name: REF + name for type_name, name in names.items()},
        },
    }
    return found


def _iterate_components(node_type: NodeType) -> Iterator[tuple[str, Any]]:
    """Yield name and schema of the components that describe a node type: its config, its output if known, and
    the node.
    """
    name = _component_name(node_type.type)
    config = _adopt(node_type.config_schema)
    described = [config.get("description", ""), TEMPLATES]
    yield f"config.{name}", {**config, "description": " ".join(filter(None, described))}
    output = _adopt(node_type.output.schema)
    if output:
        yield f"output.{name}", output
    yield (
        f"{NODE}.{name}",
        {
            "description": node_type.description,
            "allOf": [{"$ref": f"{REF}NodeInput"}],
            "type": "object",
            "required": ["type"],
            "properties": {
                "type": {"const": node_type.type},
                "version": {"type": "string", "default": node_type.version},
                "config": {"$ref": f"{REF}config.{name}"},
            },
            "x-ports": {"inputs": [*node_type.inputs], "outputs": [*node_type.outputs, "error"]},
            "x-effect": node_type.effect.default,
        },
    )


def _component_name(type_name: str) -> str:
    return type_name.replace("/", ".")


def _adopt(schema: Any, *, is_root: bool = False) -> Any:  # noqa: ANN401 - any part of a JSON Schema
    """Return a node type's schema for OpenAPI: each condition becomes a reference to the component of conditions.

    The `$id` of the type's schema itself, which `is_root` marks, is dropped.
    """
    if isinstance(schema, list):
        return [_adopt(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    if not is_root and CONDITION_ID in (schema.get("$id"), schema.get("$ref")):
        kept = {"description": schema["description"]} if "description" in schema else {}
        return {**kept, "$ref": REF + CONDITION}
    return {name: _adopt(one) for name, one in schema.items() if not (is_root and name == "$id")}
