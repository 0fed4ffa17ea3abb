"""Kinds of tools: each is a field of `target` in the config of a `tool`, and the node that does the calls.

A node of the catalog does the calls of every kind, so that effects, resources, timeouts, secrets and approvals follow
from its type. A further kind is one `ToolKind` in `TOOL_KINDS`, its field in the schema of `tool.toml`, and that node
type. A node that returns an `AnswerWait` is a tool like others: the agent waits for the answer without a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

from msgspec import Struct

if TYPE_CHECKING:
    from engine.values import Json

ARGUMENTS: Final = "{{ args }}"
"""Template of all arguments of a call."""
SUB_WORKFLOW_TYPE: Final = "sub-workflow"


class ToolTarget(Struct, frozen=True):
    """Node that does the calls of a tool."""

    type: str
    config: Mapping[str, Json]
    version: str | None = None


BuildTarget: TypeAlias = "Callable[[Mapping[str, Json]], ToolTarget | None]"
"""Returns the node of a tool, given the value of `target`; None if that doesn't fit, which the schema reports."""


class ToolKind(Struct, frozen=True):
    """Kind of tool."""

    field: str
    """Field of `target` that names it."""
    build_target: BuildTarget
    config_path: str = "target"
    """Path in the config of the `tool` under which fields of the node's config are found."""


def _read_node(target: Mapping[str, Json]) -> ToolTarget | None:
    """Return the node of the catalog that the field `node` of `target` gives by type, version and config; None without
    a type.
    """
    node = target.get("node")
    if not isinstance(node, dict) or not isinstance(node.get("type"), str):
        return None
    config, version = node.get("config"), node.get("version")
    return ToolTarget(
        str(node["type"]),
        config if isinstance(config, dict) else {},
        version if isinstance(version, str) else None,
    )


def _read_workflow(target: Mapping[str, Json]) -> ToolTarget | None:
    """Return the node that runs another workflow with the arguments as its inputs, and waits for its end.

    None without `target.workflowId`.
    """
    workflow_id = target.get("workflowId")
    if not isinstance(workflow_id, str):
        return None
    return ToolTarget(SUB_WORKFLOW_TYPE, {"workflowId": workflow_id, "inputs": ARGUMENTS})


TOOL_KINDS: Final = (
    ToolKind("node", _read_node, "target.node.config"),
    ToolKind("workflowId", _read_workflow),
)


def find_kind(target: Mapping[str, Json]) -> ToolKind | None:
    """Return the kind of tool that the value of `target` names; None for an unknown one."""
    return next((kind for kind in TOOL_KINDS if kind.field in target), None)
