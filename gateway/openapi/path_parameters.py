"""Descriptions of path parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from msgspec import Struct, field

if TYPE_CHECKING:
    from engine.values import Json


class PathParameterDoc(Struct, frozen=True):
    """Path parameter, chosen by the path segment before it."""

    description: str
    example: str
    schema: Mapping[str, Json] = field(
        default_factory=lambda: {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
    )


PLACES: Final[Mapping[str, PathParameterDoc]] = {
    "sessions": PathParameterDoc("Id of the session.", "session_abc123"),
    "invitations": PathParameterDoc("Id of the invitation.", "invitation_abc123"),
    "keys": PathParameterDoc("Id of the key.", "key_abc123"),
    "event-tokens": PathParameterDoc("Id of the token.", "tok_abc123"),
    "events": PathParameterDoc("Id of the event.", "event_abc123"),
    "workflows": PathParameterDoc("Id of the workflow.", "wf_abc123"),
    "nodes": PathParameterDoc("Id of the node in the workflow.", "node-xyz123"),
    "connections": PathParameterDoc("Id of the connection in the workflow.", "conn-abc123"),
    "versions": PathParameterDoc("Number of the version, from 1; in comparisons also `current`.", "1"),
    "diff": PathParameterDoc("Number of the version to compare with, or `current`.", "current"),
    "share": PathParameterDoc("Id of the user.", "user_789"),
    "datasources": PathParameterDoc("Id of the data source.", "ds_001"),
    "models": PathParameterDoc("Id of the model.", "model_001"),
    "provider-keys": PathParameterDoc(
        "Id of the provider key, which is that of its data source.", "ds_provider"
    ),
    "tool-servers": PathParameterDoc("Id of the tool server, which is that of its data source.", "ds_tools"),
    "workflow-nodes": PathParameterDoc(
        "Node type, or the namespace of a custom one, which its name follows.", "http-request"
    ),
    "{type}": PathParameterDoc("Name of a custom node type in its namespace.", "resize"),
    "tasks": PathParameterDoc("Id of the task.", "task_abc123"),
    "workers": PathParameterDoc("Id of the worker, as it has chosen it.", "w_abc123"),
    "groups": PathParameterDoc("Id of the group of dead letters.", "5f0b3a1c9d2e4f68"),
    "bulk-operations": PathParameterDoc("Id of the bulk operation.", "bulk_abc123"),
    "deliveries": PathParameterDoc("Id of the delivery.", "dlv_abc123"),
    "spans": PathParameterDoc("Id of the span, or of a node outside of loops.", "span_abc123"),
    "executions": PathParameterDoc("Id of the execution.", "exec_xyz789"),
    "hooks": PathParameterDoc("The trigger token of the workflow.", "tt-abc123"),
    "mail": PathParameterDoc("The trigger token of the workflow.", "tt-mail123"),
    "blobs": PathParameterDoc(
        "SHA-256 of the content, as in the field `sha256` of its reference.",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    ),
}
