"""Nodes that are connected to the port `tools` of an agent without a `tool`: their open fields are parameters.

The model fills in only fields that are plain values. Fields that name resources, decide about the effect, hold
expressions, queries or scripts, or set limits and rules, are those of the author alone, whether they are set or not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from engine.agents.agent_steps import AGENT_TYPE
from engine.agents.tool_kinds import SUB_WORKFLOW_TYPE
from engine.node_api import MCP_TOOL_TYPE, OF_EACH, TOOL_TYPE

if TYPE_CHECKING:
    from engine.graph import GraphNode
    from engine.node_api import NodeType

MAX_NAME: Final = 64
MAX_DESCRIPTION: Final = 2_000
OPEN_FIELDS: Final[Mapping[str, frozenset[str]]] = {
    AGENT_TYPE: frozenset({"prompt"}),
    MCP_TOOL_TYPE: frozenset({"arguments"}),
    SUB_WORKFLOW_TYPE: frozenset({"inputs"}),
}
"""Only fields of these types that a model may fill in; the others decide what the node may do."""
AUTHOR_FIELDS: Final = frozenset({"budget", "dataSource", "fallbackModelIds", "headers", "model"})
"""Fields of all types that a model never fills in, such as headers, which may hold credentials and recipients."""
_NOT_IN_NAMES: Final = re.compile(r"[^a-zA-Z0-9_-]")


def name_tool(node: GraphNode) -> str:
    """Return the name of a node as a tool: that in the config of a `tool`, else its id.

    The id is cut to 64 characters, with `_` in place of all but letters, digits, `-` and `_`.
    """
    if node.type == TOOL_TYPE:
        return str(node.config.get("name"))
    return _NOT_IN_NAMES.sub("_", node.id)[:MAX_NAME]


def describe_tool(node: GraphNode, node_type: NodeType) -> str:
    """Return the description of a node as a tool: its label, unless that is its id, and its type's description.

    It is cut to 2,000 characters.
    """
    label = f"{node.label}. " if node.label not in {"", node.id} else ""
    return f"{label}{node_type.description}"[:MAX_DESCRIPTION]


def build_parameters(node: GraphNode, node_type: NodeType) -> dict[str, Any]:
    """Return the JSON Schema of the arguments with which a model calls a node as a tool.

    It is the config schema without fields that the node's config has, and without those that only its author may set.
    """
    schema = node_type.config_schema
    properties = {
        name: each for name, each in _properties(schema).items() if _is_open(name, each, node, node_type)
    }
    required = [name for name in _required(schema) if name in properties]
    built: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    if definitions := schema.get("$defs"):
        built["$defs"] = definitions
    return {**built, "required": required} if required else built


def list_unfilled(node: GraphNode, node_type: NodeType) -> Sequence[str]:
    """Return the required config fields that are missing, and that no model may fill in: the author has to set them."""
    fields = build_parameters(node, node_type)["properties"]
    required = _required(node_type.config_schema)
    return [name for name in required if name not in node.config and name not in fields]


def _is_open(name: str, schema: object, node: GraphNode, node_type: NodeType) -> bool:
    """Return whether a model fills in a config field: the node's config lacks it, and it isn't reserved for the node's
    author.
    """
    only = OPEN_FIELDS.get(node_type.type)
    evaluated = {place.partition(OF_EACH)[0] for place in node_type.compiled}
    return (
        name not in node.config
        and name not in AUTHOR_FIELDS | evaluated
        and name != node_type.effect.deciding_field
        and (only is None or name in only)
        and not _is_bound(schema)
    )


def _is_bound(schema: object) -> bool:
    """Return whether a schema, or one inside it, marks a reference to a resource, or a value that must be a
    constant.
    """
    if isinstance(schema, Mapping):
        if "x-resource" in schema or schema.get("x-constant") is True:
            return True
        return any(map(_is_bound, schema.values()))
    return isinstance(schema, list | tuple) and any(map(_is_bound, schema))


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def _required(schema: Mapping[str, Any]) -> Sequence[str]:
    found = schema.get("required")
    return [str(name) for name in found] if isinstance(found, list | tuple) else []
