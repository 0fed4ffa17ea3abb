"""Trigger tokens of all workflows that a caller may see, for a review of credentials in other systems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from sqlalchemy import func, select
from sqlmodel import col

from gateway.http.parameters import LIMIT, OFFSET
from gateway.http.responses import JsonResponse
from gateway.http.wire import WireStruct, instant, optional_instant
from gateway.ingest.trigger_tokens import TriggerTokenShape, is_valid_token
from models.ingest import SenderToken, SenderTokenKind
from models.workflow import Workflow, is_readable_by
from models.workflow_triggers import WorkflowTrigger

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.parameters import PageBounds
    from gateway.http.request import GatewayRequest
    from models.access import ApiCaller

LISTED: Final = (LIMIT, OFFSET)


class WorkflowTokenShape(TriggerTokenShape):
    """Trigger token with its workflow, as the API shows it, without its secret."""

    user_id: str
    """User that created the token."""
    workflow_id: str
    workflow_name: str
    owner_id: str
    """Owner of the workflow, who may replace and revoke the token, as admins may."""
    trigger_kind: str | None
    """Kind of the workflow's trigger; null without one, when nothing accepts the token."""


class TriggerTokenList(WireStruct):
    """Page of the valid tokens, the newest first; `count` is the number of all."""

    count: int
    limit: int
    offset: int
    tokens: Sequence[WorkflowTokenShape]


async def index(request: GatewayRequest) -> JsonResponse:
    """List the valid trigger tokens of all workflows that the caller may see, by their last characters.

    A replaced token is listed until its overlap ends.
    """
    part = request.query.page()
    async with request.gateway.database.read() as connection:
        count, shown = await _list_tokens(connection, request.caller, part, request.gateway.clock())
    return JsonResponse(TriggerTokenList(count=count, limit=part.limit, offset=part.offset, tokens=shown))


async def _list_tokens(
    connection: AsyncConnection, caller: ApiCaller, part: PageBounds, now: datetime
) -> tuple[int, Sequence[WorkflowTokenShape]]:
    """Return the number of valid tokens at `now`, of workflows that the caller may read, and a page of them, the newest
    first.
    """
    of_organization = col(SenderToken.organization_id) == caller.organization_id
    is_for_trigger = col(SenderToken.kind) == SenderTokenKind.TRIGGER
    conditions = (of_organization, is_for_trigger, is_valid_token(now), is_readable_by(caller))
    of_workflow = col(Workflow.id) == col(SenderToken.workflow_id)
    counted = select(func.count()).select_from(SenderToken).join(Workflow, of_workflow).where(*conditions)
    kind = (
        select(func.min(col(WorkflowTrigger.kind)))
        .where(col(WorkflowTrigger.workflow_id) == col(SenderToken.workflow_id))
        .scalar_subquery()
    )
    listed = (
        select(
            *(col(SenderToken.id), col(SenderToken.hint), col(SenderToken.user_id)),
            *(col(SenderToken.created_at), col(SenderToken.expires_at), col(SenderToken.last_used_at)),
            *(col(SenderToken.workflow_id), col(Workflow.name), col(Workflow.owner_id), kind.label("kind")),
        )
        .join(Workflow, of_workflow)
        .where(*conditions)
        .order_by(col(SenderToken.id).desc())
        .limit(part.limit)
        .offset(part.offset)
    )
    shown = [
        WorkflowTokenShape(
            id=row.id,
            hint=row.hint,
            created_at=instant(row.created_at),
            expires_at=optional_instant(row.expires_at),
            last_used_at=optional_instant(row.last_used_at),
            user_id=row.user_id,
            workflow_id=row.workflow_id,
            workflow_name=row.name,
            owner_id=row.owner_id,
            trigger_kind=row.kind,
        )
        for row in await connection.execute(listed)
    ]
    return await connection.scalar(counted) or 0, shown
