"""Trigger tokens of a workflow: created and replaced by its owners, shown once, inside URLs."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import msgspec
from sqlalchemy import and_, insert, or_, select, update
from sqlmodel import col

from engine.values import fingerprint
from gateway.access import audit_log
from gateway.http import errors, limits
from gateway.http.public_address import address_warnings, base_url
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent
from gateway.http.wire import Instant, StrictWire, WireStruct, decode_body, instant, optional_instant
from gateway.workflows import editing, workflow_rows
from journal import definition_snapshot
from models import ids, sender_tokens
from models.audit import AuditAction
from models.column_types import build_row
from models.ingest import SenderToken, SenderTokenKind
from models.process_presence import ProcessPresence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.workflows.stored_workflow import StoredWorkflow

MASK = "…"


class TokenReplacement(StrictWire):
    """Replacement of a trigger token."""

    overlap_seconds: Annotated[int, msgspec.Meta(ge=0, le=limits.TOKEN_OVERLAP_SECONDS)] = 0
    """Time for which the previous token stays valid, so that senders can be updated."""


class TriggerTokenShape(WireStruct):
    """Trigger token as the API shows it, without its secret."""

    id: str
    hint: str
    """Last characters of the token."""
    created_at: Instant
    expires_at: Instant | None
    """Expiry of a replaced token."""
    last_used_at: Instant | None


class InboundAddress(WireStruct):
    """Addresses for senders, with masked token."""

    trigger_kind: str | None
    """Kind of the workflow's trigger."""
    urls: dict[str, str]
    """URLs by kind of sender."""
    warnings: list[str]
    """Reasons why senders may not reach these URLs."""
    tokens: list[TriggerTokenShape]
    """Valid tokens, the newest first."""
    deliveries_kept_days: int | None
    """Days that deliveries are kept after their arrival; null if no present scheduler says it."""


class NewTriggerToken(WireStruct):
    """New trigger token, in the only answer that contains it."""

    id: str
    token: str
    hint: str
    urls: dict[str, str]
    """URLs by kind of sender, to be passed on unchanged."""
    warnings: list[str]
    """Reasons why senders may not reach these URLs."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Show a workflow's URLs for senders, with the token masked, and its valid tokens by their last characters."""
    workflow_id = request.path_params["id"]
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request.requested_object)
        rows = await _list_valid_tokens(connection, workflow_id, request.gateway.clock())
        kept_days = await _read_kept_days(connection)
    shape = InboundAddress(
        trigger_kind=_find_kind(request, stored),
        urls=_build_urls(request, stored, MASK + rows[0].hint if rows else MASK),
        warnings=address_warnings(request),
        tokens=[
            TriggerTokenShape(
                id=row.id,
                hint=row.hint,
                created_at=instant(row.created_at),
                expires_at=optional_instant(row.expires_at),
                last_used_at=optional_instant(row.last_used_at),
            )
            for row in rows
        ],
        deliveries_kept_days=kept_days,
    )
    return JsonResponse(shape)


async def _read_kept_days(connection: AsyncConnection) -> int | None:
    """Return the retention of deliveries that the scheduler seen last has reported, in days; None without one."""
    reports = select(col(ProcessPresence.activity)).order_by(col(ProcessPresence.seen_at).desc())
    found = ((activity or {}).get("retention") for activity in await connection.scalars(reports))
    return next((one["events"] for one in found if one), None)


async def replace(request: GatewayRequest) -> JsonResponse:
    """Create or replace the trigger token of a workflow.

    Only this answer contains the token, inside the URLs for senders. The token is valid for inbound requests
    of this workflow only. The previous one expires at once, or after `overlapSeconds`.
    """
    body = await decode_body(request, TokenReplacement)
    caller, now = request.caller, request.gateway.clock()
    token, token_id = sender_tokens.new_token(SenderTokenKind.TRIGGER), ids.new_id("tok")
    stored: StoredWorkflow | None = None

    async def make(connection: AsyncConnection) -> None:
        nonlocal stored
        # The lock serializes replacements: the second one waits here, and ends the first one's token.
        await workflow_rows.lock_workflow(connection, request.path_params["id"], caller)
        stored = await editing.find_readable(connection, request.requested_object)
        editing.require_writer(request.caller, stored.workflow)
        before = await _expire_tokens(
            connection, stored.workflow.id, now, now + timedelta(seconds=body.overlap_seconds)
        )
        row = SenderToken(
            id=token_id,
            kind=SenderTokenKind.TRIGGER,
            organization_id=caller.organization_id,
            shard=caller.shard,
            workflow_id=stored.workflow.id,
            user_id=caller.user_id,
            hash=sender_tokens.hash_token(token),
            hint=sender_tokens.visible_suffix(token),
            created_at=now,
        )
        await connection.execute(insert(SenderToken).values(row.model_dump()))
        await audit_log.record_change(
            connection,
            caller,
            AuditAction.TRIGGER_TOKEN_SET,
            stored.workflow.id,
            before=fingerprint(before) if before else None,
            after=fingerprint([token_id]),
        )

    await request.gateway.database.transaction(make)
    if stored is None:
        raise errors.not_found("workflow")
    shape = NewTriggerToken(
        id=token_id,
        token=token,
        hint=sender_tokens.visible_suffix(token),
        urls=_build_urls(request, stored, token),
        warnings=address_warnings(request),
    )
    return JsonResponse(shape, status=201)


async def revoke(request: GatewayRequest) -> NoContent:
    """Revoke all trigger tokens of a workflow at once.

    Requests with them are refused from then on.
    """
    now = request.gateway.clock()

    async def end(connection: AsyncConnection) -> None:
        stored = await editing.find_readable(connection, request.requested_object)
        editing.require_writer(request.caller, stored.workflow)
        before = await _expire_tokens(connection, stored.workflow.id, now, now)
        await audit_log.record_change(
            connection,
            request.caller,
            AuditAction.TRIGGER_TOKEN_REVOKED,
            stored.workflow.id,
            before=fingerprint(before) if before else None,
            after=None,
        )

    await request.gateway.database.transaction(end)
    return NoContent()


def is_valid_token(now: datetime) -> ColumnElement[bool]:
    """Return the SQL condition for tokens of senders that are neither revoked nor expired at `now`."""
    return and_(
        col(SenderToken.revoked_at).is_(None),
        or_(col(SenderToken.expires_at).is_(None), col(SenderToken.expires_at) > now),
    )


async def _list_valid_tokens(
    connection: AsyncConnection, workflow_id: str, now: datetime
) -> Sequence[SenderToken]:
    """Return the valid trigger tokens of a workflow at `now`, the newest first."""
    statement = (
        select(SenderToken)
        .where(col(SenderToken.workflow_id) == workflow_id, is_valid_token(now))
        .order_by(col(SenderToken.id).desc())
    )
    return [build_row(SenderToken, row) for row in (await connection.execute(statement)).mappings()]


async def _expire_tokens(
    connection: AsyncConnection, workflow_id: str, now: datetime, at: datetime
) -> list[str]:
    """Make the valid trigger tokens of a workflow expire at `at`, unless they expire earlier; return their ids.

    Only the nine newest may overlap with a new one: older ones are revoked `now`, and all of them if `at` is not later.
    """
    rows = await _list_valid_tokens(connection, workflow_id, now)
    for place, row in enumerate(rows, start=1):
        ends = at if row.expires_at is None else min(at, row.expires_at)
        if place >= limits.TRIGGER_TOKENS:
            ends = now
        values = {"revoked_at": now} if ends <= now else {"expires_at": ends}
        await connection.execute(update(SenderToken).where(col(SenderToken.id) == row.id).values(**values))
    return [row.id for row in rows]


def _find_kind(request: GatewayRequest, stored: StoredWorkflow) -> str | None:
    trigger = definition_snapshot.find_trigger(stored.nodes, request.gateway.catalog)
    return trigger.kind if trigger else None


def _build_urls(request: GatewayRequest, stored: StoredWorkflow, token: str) -> dict[str, str]:
    """Return the URLs of a workflow's trigger with a token, by kind of sender; empty for triggers without senders.

    Kinds are `api`, `batch`, `webhook` and, for mails, one for each service.
    """
    base = base_url(request)
    workflow = f"{base}/api/v1/workflows/{stored.workflow.id}"
    match _find_kind(request, stored):
        case "queue":
            return {
                "api": f"{workflow}/enqueue?key={token}",
                "batch": f"{workflow}/enqueue-batch?key={token}",
            }
        case "email":
            url = f"{workflow}/email-trigger?key={token}"
            # Mailgun posts the unparsed mail to URLs that end in "mime".
            return {
                "api": url,
                "sendgrid": url,
                "ses": url,
                "mailgun": url,
                "mailgunMime": f"{url}&format=mime",
                "mailServer": f"{base}/mail/{token}",
            }
        case "webhook":
            return {"webhook": f"{base}/hooks/{token}"}
    return {}
