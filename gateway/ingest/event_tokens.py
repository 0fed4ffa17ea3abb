"""Event tokens for senders that can't set a header: created by admins, shown once, inside a URL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Final

import msgspec
from msgspec import Meta
from sqlalchemy import func, insert, select, update
from sqlmodel import col

from engine.values import fingerprint
from gateway.access import audit_log
from gateway.http import errors, limits, read_only, text_rules
from gateway.http.parameters import LIMIT, OFFSET
from gateway.http.public_address import address_warnings, base_url
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import Instant, StrictWire, WireStruct, body_of, instant, optional_instant, read_json
from gateway.ingest import event_signatures
from models import ids, sender_tokens
from models.audit import AuditAction
from models.column_types import build_row
from models.ingest import SenderToken, SenderTokenKind
from senders.event_senders import EventSender as Provider

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.ingest.event_signatures import Secrets
    from models.access import ApiCaller

SecretTexts = Annotated[
    list[Annotated[str, Meta(min_length=1, max_length=limits.SECRET_LENGTH)]],
    Meta(max_length=limits.EVENT_TOKEN_SECRETS),
]
LISTED: Final = (LIMIT, OFFSET)


class ProviderSecrets(StrictWire):
    """Signing secrets of providers; several of one provider during a rotation."""

    github: SecretTexts = msgspec.field(default_factory=list)
    stripe: SecretTexts = msgspec.field(default_factory=list)
    slack: SecretTexts = msgspec.field(default_factory=list)
    """Signing secrets of apps."""
    standard_webhooks: SecretTexts = msgspec.field(default_factory=list)
    """`whsec_` and a secret, or `whpk_` and a public key."""


_NAMES: Final[Mapping[Provider, str]] = {
    Provider.GITHUB: "github",
    Provider.STRIPE: "stripe",
    Provider.SLACK: "slack",
    Provider.STANDARD_WEBHOOKS: "standardWebhooks",
}


class CreateEventToken(StrictWire):
    """Request body that creates a token for one or several senders of events.

    An unknown field is refused: with a misspelled provider, the token would accept unsigned events.
    """

    read_only: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("id", "hint", "userId", "createdAt", "lastUsedAt", "revokedAt", "token", "url", "warnings"), ""
        ),
        # Never ignored: the new token would accept unsigned events, where the copied one accepted none.
        "providers": "`secrets`",
    }

    name: Annotated[str, text_rules.describe_length(limits.KEY_NAME_LENGTH, min_length=1)]
    secrets: ProviderSecrets | None = None
    """Secrets of providers, never shown again; with any, the token accepts only events signed with one of
    them.
    """


class EventTokenShape(WireStruct):
    """Event token as the API shows it, without its secret."""

    id: str
    name: str
    hint: str
    """Last characters of the token."""
    providers: list[str]
    """Providers whose signatures it accepts; if empty, it accepts unsigned events."""
    user_id: str
    """Creator of the token, and owner of the events sent with it."""
    created_at: Instant
    last_used_at: Instant | None
    revoked_at: Instant | None


class NewEventToken(EventTokenShape):
    """New event token, in the only answer that contains it."""

    token: str
    url: str
    """URL for the sender, to be passed on unchanged."""
    warnings: list[str]
    """Reasons why the sender may not reach the URL, and ignored fields of the request."""


class EventTokenList(WireStruct):
    """Page of the tokens, the newest first; `count` is the number of all."""

    count: int
    limit: int
    offset: int
    tokens: Sequence[EventTokenShape]


async def create(request: GatewayRequest) -> JsonResponse:
    """Create a token with which senders emit events to the organization.

    Only this answer contains the token, with its URL. The token is valid for events only. It accepts events
    of a signing provider only if it has the provider's secrets.
    """
    _require_admin(request.caller)
    value = await read_json(request)
    body = body_of(request, value, CreateEventToken)
    secrets = _collect_secrets(body.secrets or ProviderSecrets())
    read_only.warn_of_new(
        request, value, CreateEventToken, lambda: {"providers": [_NAMES[provider] for provider in secrets]}
    )
    problems = ProblemCollector()
    name = text_rules.check_line(body.name, "name", problems, max_length=limits.KEY_NAME_LENGTH)
    problems.raise_any()
    caller, now = request.caller, request.gateway.clock()
    token, token_id = sender_tokens.new_token(SenderTokenKind.EVENT), ids.new_id("tok")
    row = SenderToken(
        id=token_id,
        kind=SenderTokenKind.EVENT,
        organization_id=caller.organization_id,
        shard=caller.shard,
        user_id=caller.user_id,
        name=name,
        hash=sender_tokens.hash_token(token),
        hint=sender_tokens.visible_suffix(token),
        created_at=now,
    )
    if secrets:
        encrypted = event_signatures.seal_secrets(
            request.gateway.vault, secrets, organization_id=caller.organization_id, token_id=token_id
        )
        row.encrypted, row.secret_id = encrypted.content, encrypted.secret_id
    row.providers = ",".join(secrets)

    async def make(connection: AsyncConnection) -> None:
        await connection.execute(insert(SenderToken).values(row.model_dump()))
        after = fingerprint([token_id, name, row.providers])
        await audit_log.record_change(
            connection, caller, AuditAction.EVENT_TOKEN_CREATED, token_id, before=None, after=after
        )

    await request.gateway.database.transaction(make)
    shown = msgspec.structs.asdict(_show_token(row))
    url = f"{base_url(request)}/api/v1/workflows/events?key={token}"
    # `warnings` of this answer had texts before fields had warnings.
    warnings = [*address_warnings(request), *(str(one["message"]) for one in request.warnings)]
    request.warnings.clear()
    return JsonResponse(NewEventToken(**shown, token=token, url=url, warnings=warnings), status=201)


async def index(request: GatewayRequest) -> JsonResponse:
    """List the event tokens of the organization, the newest first, revoked ones included."""
    _require_admin(request.caller)
    part = request.query.page()
    conditions = _select_organization(request.caller)
    async with request.gateway.database.read() as connection:
        count = await connection.scalar(select(func.count()).select_from(SenderToken).where(*conditions))
        rows = await connection.execute(
            select(SenderToken)
            .where(*conditions)
            .order_by(col(SenderToken.id).desc())
            .limit(part.limit)
            .offset(part.offset)
        )
        found = [_show_token(build_row(SenderToken, row)) for row in rows.mappings()]
    return JsonResponse(EventTokenList(count=count or 0, limit=part.limit, offset=part.offset, tokens=found))


async def revoke(request: GatewayRequest) -> NoContent:
    """Revoke an event token; it stops working everywhere within a second.

    Only admins may do this. A repeated request succeeds too; an unknown token is a 404.
    """
    _require_admin(request.caller)
    caller, token_id, now = request.caller, request.path_params["id"], request.gateway.clock()

    async def end(connection: AsyncConnection) -> bool:
        is_this = (col(SenderToken.id) == token_id, *_select_organization(caller))
        row = (
            (await connection.execute(select(SenderToken).where(*is_this).with_for_update()))
            .mappings()
            .first()
        )
        if row is None:
            return False
        if row["revoked_at"] is None:
            await connection.execute(
                update(SenderToken).where(*is_this).values(revoked_at=now, encrypted=None, secret_id=None)
            )
            before = fingerprint([token_id, row["name"], row["providers"]])
            await audit_log.record_change(
                connection, caller, AuditAction.EVENT_TOKEN_REVOKED, token_id, before=before, after=None
            )
        return True

    if not await request.gateway.database.transaction(end):
        raise errors.not_found("event token")
    return NoContent()


def _select_organization(caller: ApiCaller) -> Sequence[ColumnElement[bool]]:
    return (
        col(SenderToken.organization_id) == caller.organization_id,
        col(SenderToken.kind) == SenderTokenKind.EVENT,
    )


def _collect_secrets(given: ProviderSecrets) -> Secrets:
    """Return the given secrets by provider, without providers that have none."""
    by_provider = {
        Provider.GITHUB: given.github,
        Provider.STRIPE: given.stripe,
        Provider.SLACK: given.slack,
        Provider.STANDARD_WEBHOOKS: given.standard_webhooks,
    }
    return {provider: secrets for provider, secrets in by_provider.items() if secrets}


def _show_token(row: SenderToken) -> EventTokenShape:
    """Return an event token as the API shows it, without its secrets."""
    return EventTokenShape(
        id=row.id,
        name=row.name,
        hint=row.hint,
        providers=[_NAMES[Provider(word)] for word in row.providers.split(",") if word],
        user_id=row.user_id,
        created_at=instant(row.created_at),
        last_used_at=optional_instant(row.last_used_at),
        revoked_at=optional_instant(row.revoked_at),
    )


def _require_admin(caller: ApiCaller) -> None:
    if not caller.is_admin:
        raise errors.admin_required()
