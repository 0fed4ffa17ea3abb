"""Workflows as plain objects, from a builder or from the content of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class HasDefinition(Protocol):
    """Builder of a workflow."""

    def definition(self) -> dict[str, Any]:
        """Return the workflow as JSON."""


def definition_of(workflow: Mapping[str, Any] | HasDefinition) -> dict[str, Any]:
    """Return a workflow as JSON: a copy of a mapping, or the definition that a builder makes."""
    return workflow.definition() if isinstance(workflow, HasDefinition) else dict(workflow)
