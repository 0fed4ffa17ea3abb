"""Signing secret of completion callbacks: created and replaced by admins, shown once."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import delete, insert, select, update
from sqlmodel import col

from engine.values import fingerprint
from gateway.access import audit_log
from gateway.http import errors
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant
from models import ids, signing_secrets
from models.access import Organization
from models.audit import AuditAction
from models.signing_secrets import SigningSecret

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.request import GatewayRequest


class SigningSecretShape(WireStruct):
    """Signing secret as the API shows it, without the secret itself."""

    hint: str
    """Last characters of the secret."""
    created_at: Instant


class NewSigningSecret(SigningSecretShape):
    """New signing secret, in the only answer that contains it."""

    secret: str
    """`whsec_` and Base64, as Standard Webhooks specifies."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Show the creation time and the last characters of the current signing secret; 404 if there is none."""
    _require_admin(request)
    statement = signing_secrets.valid_secrets_statement(request.caller.organization_id).limit(1)
    async with request.gateway.database.read() as connection:
        row = (await connection.execute(statement)).mappings().first()
    if row is None:
        raise errors.not_found("signing secret: POST /api/v1/auth/signing-secret makes one")
    return JsonResponse(SigningSecretShape(hint=row["hint"], created_at=instant(row["created_at"])))


async def replace(request: GatewayRequest) -> JsonResponse:
    """Create or replace the signing secret of completion callbacks; only this answer contains it.

    For a day, callbacks also carry a signature of the previous secret, so that receivers can be updated.
    """
    _require_admin(request)
    caller, now = request.caller, request.gateway.clock()
    secret, secret_id = signing_secrets.new_secret(), ids.new_id("whsec")
    encrypted = signing_secrets.encrypt_secret(
        request.gateway.vault, secret, organization_id=caller.organization_id, object_id=secret_id
    )
    row = SigningSecret(
        id=secret_id,
        organization_id=caller.organization_id,
        shard=caller.shard,
        encrypted=encrypted.content,
        secret_id=encrypted.secret_id,
        hint=signing_secrets.visible_suffix(secret),
        created_at=now,
    )

    async def make(connection: AsyncConnection) -> None:
        before = await _retire(connection, caller.organization_id, now)
        await connection.execute(insert(SigningSecret).values(row.model_dump()))
        await audit_log.record_change(
            connection,
            caller,
            AuditAction.SIGNING_SECRET_SET,
            caller.organization_id,
            before=before and fingerprint(before),
            after=fingerprint(row.id),
        )

    await request.gateway.database.transaction(make)
    shown = NewSigningSecret(secret=secret, hint=row.hint, created_at=instant(now))
    return JsonResponse(shown, status=201)


async def _retire(connection: AsyncConnection, organization_id: str, now: datetime) -> str | None:
    """Let the current signing secret expire after a day; keep two older ones that are still valid, delete the others.

    Return the id of the former current one, None if there was none. The organization's row stays locked for the
    transaction.
    """
    # The lock serializes replacements: there is never more than one secret without an expiry.
    lock = select(col(Organization.id)).where(col(Organization.id) == organization_id).with_for_update()
    await connection.execute(lock)
    rows = (
        (await connection.execute(signing_secrets.valid_secrets_statement(organization_id))).mappings().all()
    )
    still_signing = [row["id"] for row in rows[: signing_secrets.MAX_SECRETS - 1]]
    of_organization = col(SigningSecret.organization_id) == organization_id
    await connection.execute(
        delete(SigningSecret).where(of_organization, col(SigningSecret.id).not_in(still_signing))
    )
    await connection.execute(
        update(SigningSecret)
        .where(of_organization, col(SigningSecret.expires_at).is_(None))
        .values(expires_at=now + signing_secrets.OVERLAP_TIME)
    )
    return str(rows[0]["id"]) if rows else None


def _require_admin(request: GatewayRequest) -> None:
    """Raise a 403 error unless the caller is an admin."""
    if not request.caller.is_admin:
        raise errors.admin_required()
