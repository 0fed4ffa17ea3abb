"""Rows of a workflow's triggers and schedule, saved together with the workflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import delete, insert
from sqlmodel import col

from gateway.workflows import schedule_rows
from models.workflow import WorkflowStatus
from models.workflow_triggers import TriggerKind, WorkflowTrigger, WorkflowTriggerMatch, parse_patterns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.workflows.stored_workflow import StoredNode, StoredWorkflow
    from models.workflow import Workflow
    from nodes.catalog import NodeCatalog


async def add_triggers(connection: AsyncConnection, stored: StoredWorkflow, catalog: NodeCatalog) -> None:
    """Insert the rows of a new workflow."""
    workflow = stored.workflow
    triggers = _triggers(workflow, stored.nodes, catalog)
    await _insert(connection, triggers)
    if workflow.status == WorkflowStatus.ACTIVE:
        await schedule_rows.save_schedule(connection, workflow, _schedule(triggers))


async def save_triggers(
    connection: AsyncConnection, before: StoredWorkflow, after: StoredWorkflow, catalog: NodeCatalog
) -> None:
    """Update the rows after a change of a workflow; a deleted workflow has none."""
    workflow = after.workflow
    were = _triggers(before.workflow, before.nodes, catalog)
    are = _triggers(workflow, after.nodes, catalog) if workflow.deleted_at is None else []
    is_alike = list(map(_content, were)) == list(map(_content, are))
    if not is_alike or workflow.deleted_at is not None:
        for table in (WorkflowTriggerMatch, WorkflowTrigger):
            await connection.execute(delete(table).where(col(table.workflow_id) == workflow.id))
        await _insert(connection, are)
    had, has = _schedule(were), _schedule(are)
    if (had or has) and not (is_alike and _standing(before.workflow) == _standing(workflow)):
        await schedule_rows.save_schedule(connection, workflow, has)


async def _insert(connection: AsyncConnection, triggers: Sequence[WorkflowTrigger]) -> None:
    if triggers:
        await connection.execute(insert(WorkflowTrigger), [trigger.model_dump() for trigger in triggers])
    matches = [
        {
            "workflow_id": trigger.workflow_id,
            "node_id": trigger.node_id,
            "pattern": pattern,
            "organization_id": trigger.organization_id,
        }
        for trigger in triggers
        if trigger.kind == TriggerKind.EVENT
        for pattern in parse_patterns(trigger.config)
    ]
    if matches:
        await connection.execute(insert(WorkflowTriggerMatch), matches)


def _triggers(
    workflow: Workflow, nodes: Sequence[StoredNode], catalog: NodeCatalog
) -> Sequence[WorkflowTrigger]:
    """Return the trigger rows; of nodes with the same id, which only a draft may have, the last one counts."""
    found: dict[str, WorkflowTrigger] = {}
    for node in nodes:
        node_type = catalog.node_types.get(str(node["type"]))
        if node_type is None or node_type.trigger_kind not in set(TriggerKind):
            continue
        found[str(node["id"])] = WorkflowTrigger(
            workflow_id=workflow.id,
            node_id=str(node["id"]),
            organization_id=workflow.organization_id,
            shard=workflow.shard,
            kind=node_type.trigger_kind,
            config=cast("dict[str, Any]", node["config"]),
            revision=workflow.revision,
        )
    return list(found.values())


def _content(trigger: WorkflowTrigger) -> tuple[str, str, dict[str, Any], str]:
    # With the config's text, because 1 equals true in Python.
    return trigger.node_id, trigger.kind, trigger.config, repr(trigger.config)


def _standing(workflow: Workflow) -> tuple[str, bool]:
    return workflow.status, workflow.is_template


def _schedule(triggers: Sequence[WorkflowTrigger]) -> WorkflowTrigger | None:
    """Return the schedule trigger; only a draft may have several."""
    return next((trigger for trigger in triggers if trigger.kind == TriggerKind.SCHEDULE), None)
