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
"""`id, type, label, config, inputMappings, passThroughValues`; where given `version, retry, timeout, atMostOnce`; and
`position`, which a graph that is kept has for every node.
"""
StoredConnection: TypeAlias = "dict[str, Json]"
"""`id, source, sourcePort, target, targetPort`."""


@dataclass(frozen=True, slots=True)
class StoredWorkflow:
    """A workflow with its graph and whom it is shared with."""

    workflow: Workflow
    nodes: Sequence[StoredNode]
    connections: Sequence[StoredConnection]
    shared_with: Mapping[str, datetime]
    """Whom it is shared with, by user id, and since when; in that order."""

    def with_columns(self, **changes: Any) -> Self:  # noqa: ANN401 - columns of any type
        """Return the workflow with other values in its own row."""
        return replace(self, workflow=Workflow(**{**column_values(self.workflow), **changes}))
