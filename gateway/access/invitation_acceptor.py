"""Acceptance of invitations: a code becomes a user, a key of the role's scopes, and a session of the browser."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from engine.values import fingerprint
from gateway.access import audit_log
from gateway.access.session_shapes import hash_session
from gateway.http import errors
from gateway.http.errors import ApiError
from gateway.http.failed_attempts import FailedAttempts
from gateway.http.request_origin import client_of_scope
from models import access_store, browser_session, invitation
from models.access import DEFAULT_SCOPES, ApiCaller, User, UserRole
from models.audit import AuditAction

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.access import Organization
    from models.access_store import CreatedKey
    from models.database import Database
    from models.invitation import Invitation

MAX_FAILURES: Final = 10
"""Wrong codes per minute and address."""
KEY_LIFETIME: Final = timedelta(days=365)
LONGEST_CODE: Final = 200


class NewMember(Struct, frozen=True):
    """User that an invitation has made, with key and session."""

    organization: Organization
    user: User
    key: CreatedKey
    session_secret: str


class InvitationAcceptor:
    """Acceptance of invitations in one process, with its failed attempts by address."""

    def __init__(self, database: Database, secret: bytes) -> None:
        """Set the database, and the server's secret under which keys are hashed."""
        self._database = database
        self._secret = secret
        self._failures = FailedAttempts(
            "Too many links from this address were wrong: wait a minute", max_failures=MAX_FAILURES
        )

    async def find(self, scope: Mapping[str, Any], code: str) -> tuple[Invitation, Organization]:
        """Return the open invitation with a code, and its organization.

        Raises a 401 error for an unknown, used, revoked or expired code, and 429, also for an open one, to a
        client with ten such codes within a minute.
        """
        client = client_of_scope(scope)
        refusal = self._failures.refusal(client)
        if refusal is not None:
            raise refusal
        async with self._database.read() as connection:
            found = await invitation.find_by_code(connection, code[:LONGEST_CODE])
            organization = (
                None
                if found is None
                else await access_store.find_organization(connection, found.organization_id)
            )
        if found is None or organization is None or not found.is_open(self._database.clock.now()):
            self._failures.count(client)
            raise refuse_invitation()
        return found, organization

    async def accept(
        self,
        one: Invitation,
        organization: Organization,
        name: str,
        *,
        user_agent: str,
        replaces: str | None,
    ) -> NewMember:
        """Create the user of an invitation with a key and a browser session in one transaction, and return them.

        The key has the role's scopes and lasts 365 days. The session with the hash `replaces` ends. Raises a 401
        error if another request was first, and 409 if the organization has a user with the address.
        """
        now = self._database.clock.now()

        async def make(connection: AsyncConnection) -> NewMember:
            return await self._make(connection, one, organization, name, user_agent, now, replaces)

        try:
            return await self._database.transaction(make)
        except access_store.EmailTaken as error:
            raise errors.conflict("email-taken", str(error)) from error

    async def _make(
        self,
        connection: AsyncConnection,
        one: Invitation,
        organization: Organization,
        name: str,
        user_agent: str,
        now: datetime,
        replaces: str | None,
    ) -> NewMember:
        """Create user, key and session of an invitation within a transaction, mark it as accepted, and return them.

        The audit trail gets four entries. Raises a 401 error if the invitation is not open any more, and
        `EmailTaken`.
        """
        if not await invitation.accept_invitation(connection, one, now):
            raise refuse_invitation()
        role = UserRole(one.role)
        user = await access_store.create_user(
            connection, organization=organization, email=one.email, name=name, role=role, now=now
        )
        await invitation.record_user(connection, one, user.id)
        key = await access_store.create_key(
            connection,
            user=user,
            name="First key, by invitation",
            scopes=DEFAULT_SCOPES[role],
            secret=self._secret,
            now=now,
            expires_at=now + KEY_LIFETIME,
        )
        caller = ApiCaller(
            key_id=key.row.id,
            user_id=user.id,
            organization_id=user.organization_id,
            shard=user.shard,
            role=role,
            scopes=DEFAULT_SCOPES[role],
        )
        session, secret = await browser_session.create_session(
            connection, caller, user_agent=user_agent, now=now, replaces=replaces
        )
        for action, object_id, before, after in (
            (AuditAction.INVITATION_ACCEPTED, one.id, hash_invitation(one), None),
            (AuditAction.USER_CREATED, user.id, None, audit_log.hash_content(user)),
            (AuditAction.KEY_CREATED, key.row.id, None, audit_log.hash_content(key.row)),
            (AuditAction.SESSION_CREATED, session.id, None, hash_session(session)),
        ):
            await audit_log.record_change(connection, caller, action, object_id, before=before, after=after)
        return NewMember(organization, user, key, secret)


def refuse_invitation() -> ApiError:
    """Return the 401 error for an unknown, used, revoked or expired link; it doesn't say which."""
    return ApiError(
        401,
        "sign-in-refused",
        "The invitation has been used, was revoked or has expired: ask for a new link",
    )


def hash_invitation(row: Invitation) -> str:
    """Return the SHA-256 of an invitation for the audit trail, without its code."""
    return fingerprint(msgspec.to_builtins(row.model_dump(exclude={"hash"})))
