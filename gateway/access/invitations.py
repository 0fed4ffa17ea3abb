"""Invitations of an organization: an admin makes a link, and its recipient becomes a user by it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import UNSET, UnsetType

from gateway.access import audit_log, sign_in
from gateway.access.invitation_acceptor import KEY_LIFETIME, hash_invitation
from gateway.http import errors, limits, text_rules
from gateway.http.public_address import base_url
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import Instant, StrictWire, WireStruct, decode_body, instant, optional_instant
from models import browser_session, invitation
from models.access import UserRole
from models.audit import AuditAction
from models.invitation import DEFAULT_LIFETIME, CreatedInvitation, Invitation

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

EMAIL: Final = re.compile(r"[^@\s]+@[^@\s]+\Z")
DEFAULT_SECONDS: Final = int(DEFAULT_LIFETIME.total_seconds())


class InvitationState(StrEnum):
    """State of an invitation."""

    OPEN = "open"
    ACCEPTED = "accepted"
    EXPIRED = "expired"
    REVOKED = "revoked"


class CreateInvitation(StrictWire):
    """Request body with which an admin invites a person."""

    email: Annotated[str, text_rules.describe_length(limits.EMAIL_LENGTH, min_length=3)]
    """Address of the new user; the link is for you to send."""
    role: UserRole = UserRole.MEMBER
    expires_in_seconds: Annotated[int, msgspec.Meta(ge=60, le=limits.INVITATION_SECONDS)] = DEFAULT_SECONDS


class InvitationShape(WireStruct):
    """Invitation as the API shows it: without its code, except in the answer that creates it."""

    id: str
    email: str
    role: UserRole
    state: InvitationState
    invited_by: str
    created_at: Instant
    expires_at: Instant
    accepted_at: Instant | None
    user_id: str | None
    """User that the invitation has made."""
    url: str | UnsetType = UNSET
    """Link for the recipient, only in the answer that creates the invitation. Its code is in the fragment, which
    no server log contains.
    """


class InvitationList(WireStruct):
    """Page of the invitations, the newest first; `count` is the number of all."""

    count: int
    limit: int
    offset: int
    invitations: Sequence[InvitationShape]


class AcceptInvitation(StrictWire):
    """Request body of the page behind an invitation."""

    code: str
    name: Annotated[str, text_rules.describe_length(limits.USER_NAME_LENGTH)] = ""
    dry_run: bool = False
    """Only show the invitation."""


class ShownInvitation(WireStruct):
    """Invitation for its recipient, before it is accepted."""

    email: str
    role: UserRole
    organization_name: str
    expires_at: Instant


class AcceptedInvitation(WireStruct):
    """New user and their key, in the only answer that contains it."""

    user_id: str
    organization_name: str
    key: str
    key_expires_at: Instant


async def index(request: GatewayRequest) -> JsonResponse:
    """List the invitations of the organization, also those that have ended."""
    part, now = request.query.page(), request.gateway.clock()
    async with request.gateway.database.read() as connection:
        count, found = await invitation.list_invitations(
            connection, request.caller.organization_id, limit=part.limit, offset=part.offset
        )
    shown = [_show_invitation(one, now) for one in found]
    return JsonResponse(InvitationList(count=count, limit=part.limit, offset=part.offset, invitations=shown))


async def create(request: GatewayRequest) -> JsonResponse:
    """Invite a person: only this answer contains the link, which works once and until it expires.

    The person who opens the link becomes a user with this address and role: send it only to that person. If the
    organization has a user with the address, only the acceptance is refused.
    """
    body = await decode_body(request, CreateInvitation)
    problems = ProblemCollector()
    email = text_rules.check_line(body.email, "email", problems, max_length=limits.EMAIL_LENGTH)
    if email and not EMAIL.match(email):
        problems.add("email", "invalid-value", "email must be an address such as ada@example.com")
    problems.raise_any()
    now = request.gateway.clock()

    async def make(connection: AsyncConnection) -> CreatedInvitation:
        made = await invitation.create_invitation(
            connection,
            request.caller,
            email=email,
            role=body.role,
            now=now,
            lifetime=timedelta(seconds=body.expires_in_seconds),
        )
        await audit_log.record_change(
            connection,
            request.caller,
            AuditAction.INVITATION_CREATED,
            made.row.id,
            before=None,
            after=hash_invitation(made.row),
        )
        return made

    made = await request.gateway.database.transaction(make)
    url = f"{base_url(request)}/invitation#code={made.code}"
    return JsonResponse(_show_invitation(made.row, now, url), status=201)


async def revoke(request: GatewayRequest) -> NoContent:
    """Revoke an invitation, so that its link ends; one that was accepted does not change."""

    async def end(connection: AsyncConnection) -> None:
        before = await invitation.revoke_invitation(
            connection,
            request.caller.organization_id,
            request.path_params["id"],
            request.gateway.clock(),
        )
        if before is None:
            raise errors.not_found("invitation")
        if before.accepted_at is None and before.revoked_at is None:
            await audit_log.record_change(
                connection,
                request.caller,
                AuditAction.INVITATION_REVOKED,
                before.id,
                before=hash_invitation(before),
                after=None,
            )

    await request.gateway.database.transaction(end)
    return NoContent()


async def accept(request: GatewayRequest) -> JsonResponse:
    """Show an invitation, or accept it: make its user, and sign the browser in.

    With `dryRun`, it is only shown. The invitation is named by the code of its link; a used, revoked or
    expired one is refused. An earlier session of the browser is replaced.
    """
    cookie = sign_in.require_cookie(request)
    cookie.require_same_origin(request.scope)
    body = await decode_body(request, AcceptInvitation)
    acceptor = request.gateway.invitations
    one, organization = await acceptor.find(request.scope, body.code)
    if body.dry_run:
        return JsonResponse(
            ShownInvitation(
                email=one.email,
                role=UserRole(one.role),
                organization_name=organization.name,
                expires_at=instant(one.expires_at),
            )
        )
    problems = ProblemCollector()
    name = text_rules.check_line(
        body.name, "name", problems, max_length=limits.USER_NAME_LENGTH, may_be_empty=True
    )
    problems.raise_any()
    earlier = cookie.value_of(request.scope)
    replaces = None if earlier is None else browser_session.hash_secret(earlier)
    user_agent = request.headers.get("user-agent", "")
    member = await acceptor.accept(one, organization, name, user_agent=user_agent, replaces=replaces)
    if replaces is not None:
        request.gateway.sessions.forget(replaces)
    shape = AcceptedInvitation(
        user_id=member.user.id,
        organization_name=organization.name,
        key=member.key.key,
        key_expires_at=instant(member.key.row.created_at + KEY_LIFETIME),
    )
    return JsonResponse(shape, status=201, headers={"Set-Cookie": cookie.header(member.session_secret)})


def _show_invitation(row: Invitation, now: datetime, url: str | UnsetType = UNSET) -> InvitationShape:
    """Return an invitation as the API shows it at `now`; `url` is its link, which only the creation has."""
    return InvitationShape(
        id=row.id,
        email=row.email,
        role=UserRole(row.role),
        state=_determine_state(row, now),
        invited_by=row.invited_by,
        created_at=instant(row.created_at),
        expires_at=instant(row.expires_at),
        accepted_at=optional_instant(row.accepted_at),
        user_id=row.user_id,
        url=url,
    )


def _determine_state(row: Invitation, now: datetime) -> InvitationState:
    """Return whether an invitation is accepted, revoked, expired at `now`, or open, in this order of precedence."""
    if row.accepted_at is not None:
        return InvitationState.ACCEPTED
    if row.revoked_at is not None:
        return InvitationState.REVOKED
    return InvitationState.OPEN if now < row.expires_at else InvitationState.EXPIRED
