"""Workflows as plain objects, from a builder or from the content of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable


class WorkflowWarning(UserWarning):
    """Warning of the validation of an applied workflow."""


@runtime_checkable
class HasDefinition(Protocol):
    """Builder of a workflow."""

    def definition(self) -> dict[str, Any]:
        """Return the workflow as JSON."""


def definition_of(workflow: Mapping[str, Any] | HasDefinition) -> dict[str, Any]:
    """Return a workflow as JSON: a copy of a mapping, or the definition that a builder makes."""
    return workflow.definition() if isinstance(workflow, HasDefinition) else dict(workflow)


def warning_texts(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the warnings of the answer of an `apply`."""
    for change in result["changes"]:
        for finding in change.get("warnings", ()):  # Older servers have none.
            yield finding_text(change["name"], finding)


def finding_text(name: str, finding: Mapping[str, Any]) -> str:
    """Return a finding of a validation on one line, with the name of its workflow and the id of its node."""
    places = [name, *(finding[key] for key in ("nodeId", "connectionId") if finding.get(key))]
    return f"{': '.join(places)}: {finding['message']} ({finding['type']}): {finding['suggestion']}"
