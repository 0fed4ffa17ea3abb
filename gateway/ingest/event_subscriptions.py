"""Query of the workflows that subscribe to an event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from sqlalchemy import and_, select
from sqlmodel import col

from models.workflow import Workflow, WorkflowStatus
from models.workflow_triggers import TriggerKind, WorkflowTrigger, WorkflowTriggerMatch, matching_patterns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncConnection


SUBSCRIBING: Final = (WorkflowStatus.ACTIVE, WorkflowStatus.PAUSED)


class EventSubscription(Struct, frozen=True):
    """Trigger that matches the type of an event, with its workflow."""

    workflow_id: str
    node_id: str
    config: Mapping[str, Any]
    """Config as it is stored, without the defaults of the node type."""
    shard: int
    owner_id: str
    revision: int
    """Current revision of the workflow."""


async def match_subscriptions(
    connection: AsyncConnection, organization_id: str, event_type: str
) -> Sequence[EventSubscription]:
    """Return the triggers of an organization's workflows that subscribe to an event type, ordered by workflow id.

    Paused workflows are included; their runs start after they resume.
    """
    rows = await connection.execute(statement(organization_id, event_type))
    return [EventSubscription(*row) for row in rows]


def statement(organization_id: str, event_type: str) -> Select[*tuple[Any, ...]]:
    """Return the query of the workflows that subscribe to an event type, directly or by a pattern; each is
    found once.

    Only active and paused workflows, no deleted ones and no templates.
    """
    matched = (
        select(col(WorkflowTriggerMatch.workflow_id), col(WorkflowTriggerMatch.node_id))
        .where(
            col(WorkflowTriggerMatch.organization_id) == organization_id,
            col(WorkflowTriggerMatch.pattern).in_(matching_patterns(event_type)),
        )
        .distinct()
        .subquery()
    )
    same_node = and_(
        col(WorkflowTrigger.workflow_id) == matched.c.workflow_id,
        col(WorkflowTrigger.node_id) == matched.c.node_id,
    )
    return (
        select(
            col(WorkflowTrigger.workflow_id),
            col(WorkflowTrigger.node_id),
            col(WorkflowTrigger.config),
            col(Workflow.shard),
            col(Workflow.owner_id),
            col(Workflow.revision),
        )
        .select_from(matched)
        .join(WorkflowTrigger, same_node)
        .join(Workflow, col(Workflow.id) == col(WorkflowTrigger.workflow_id))
        .where(
            col(WorkflowTrigger.kind) == TriggerKind.EVENT,
            col(Workflow.organization_id) == organization_id,
            col(Workflow.status).in_(SUBSCRIBING),
            col(Workflow.deleted_at).is_(None),
            col(Workflow.is_template).is_(False),
        )
        .order_by(col(WorkflowTrigger.workflow_id))
    )
