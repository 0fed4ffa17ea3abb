"""Workflows as the database stores them: the row, the graph and the users it is shared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from models.column_types import column_values
from models.workflow import Workflow

if TYPE_CHECKING:
    from engine.values import Json

StoredNode: TypeAlias = "dict[str, Json]"
"""Node as stored: `id, type, label, config, inputMappings, passThroughValues`.

Optional fields are `version, retry, timeout, atMostOnce`; every node of a stored graph has a `position`.
"""
StoredConnection: TypeAlias = "dict[str, Json]"
"""`id, source, sourcePort, target, targetPort`."""


@dataclass(frozen=True, slots=True)
class StoredWorkflow:
    """Workflow with its graph and shares."""

    workflow: Workflow
    nodes: Sequence[StoredNode]
    connections: Sequence[StoredConnection]
    shared_with: Mapping[str, datetime]
    """Time of each share by user id, in the order of the shares."""

    def with_columns(self, **changes: Any) -> Self:  # noqa: ANN401 - columns of any type
        """Return the workflow with changed columns of its own row."""
        return replace(self, workflow=Workflow(**{**column_values(self.workflow), **changes}))
