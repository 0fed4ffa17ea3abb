"""Documents of custom node types for tests."""

from __future__ import annotations

from typing import Any

RESIZE: dict[str, Any] = {
    "type": "acme/resize",
    "version": "1.2.0",
    "name": "Resize image",
    "description": "Scales an image.",
    "effect": "write",
    "ports": {"inputs": ["input"], "outputs": ["output", "too-small"]},
    "config": {
        "type": "object",
        "required": ["image"],
        "additionalProperties": False,
        "properties": {
            "image": {"type": "string"},
            "width": {"type": "integer", "minimum": 1, "maximum": 8000, "default": 1200},
        },
    },
    "output": {"schema": {"type": "object", "required": ["url"], "properties": {"url": {"type": "string"}}}},
    "task": {"timeoutSeconds": 120, "retry": {"maxAttempts": 3, "maxDelay": 60}, "pool": "default"},
}


def custom_type(**changes: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return the document of the custom type `acme/resize`, with these fields changed."""
    return {**RESIZE, **changes}


def custom_graph(
    config: dict[str, Any] | None = None,
    type_name: str = "acme/resize",
    **fields: Any,  # noqa: ANN401 - any JSON value
) -> dict[str, Any]:
    """Return a graph of a manual trigger and a node `work` of a custom type;
    `fields` are further fields of the node.
    """
    node = {"id": "work", "nodeId": type_name, "config": config or {"image": "a.png"}, **fields}
    return {
        "nodes": [{"id": "start", "nodeId": "manual"}, node],
        "connections": [{"source": "start", "target": "work"}],
    }
