"""Checks of task outputs by their node types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from engine import values
from engine.node_api import UnknownNodeType
from nodes.custom_types import OrganizationCatalog

if TYPE_CHECKING:
    from journal.tasks.task_items import Completion, TaskFacts
    from nodes.catalog import NodeCatalog

SHOWN_PROBLEMS: Final = 5


def find_problem(catalog: NodeCatalog | None, facts: TaskFacts, item: Completion) -> tuple[str, str] | None:
    """Return code and message of the problem of a task's output by its node type; None if it is valid.

    The output port and the schema are checked, the schema not for an uploaded output. None also for a deleted
    type, and without the catalog of an organization. The message lists up to five problems.
    """
    if not isinstance(catalog, OrganizationCatalog):
        return None
    try:
        node_type = catalog.get(facts.type, facts.version)
    except UnknownNodeType:
        return None  # deleted since: the run has pinned it, and gets the output as it is
    if item.port not in node_type.outputs:
        known = ", ".join(node_type.outputs)
        return (
            "invalid-port",
            f"{facts.type} {facts.version} has no output port {item.port!r}: it has {known}",
        )
    if item.is_uploaded or not node_type.output.schema:
        return None
    problems = catalog.output_problems(node_type, values.decode_json(item.output))
    if not problems:
        return None
    shown = "; ".join(f"{one.path}: {one.message}" for one in problems[:SHOWN_PROBLEMS])
    return "invalid-output", f"The output doesn't match the schema of its node type: {shown}"
