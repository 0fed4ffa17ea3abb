"""Sign-in with an OpenID Connect provider: a browser's way to the provider and back, and the user behind it."""

from __future__ import annotations

import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import datetime, timedelta
from ipaddress import ip_network
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct
from sqlalchemy import select, update
from sqlmodel import col

from gateway.access import audit_log
from gateway.access.invitation_acceptor import hash_invitation
from gateway.access.openid_provider import OpenIdClient, OpenIdProvider
from gateway.access.session_shapes import hash_session
from gateway.http import idempotency
from journal.store import IdempotencyKey
from json_text import decoding
from models import access_store, browser_session, invitation, user_identity
from models.access import DEFAULT_SCOPES, ApiCaller, ApiKey, Organization, User, UserRole
from models.audit import AuditAction
from models.column_types import build_row
from models.encryption import EncryptedText, SecretCorrupted, SecretVault, UnknownSecret
from models.invitation import Invitation
from nodes.outbound_http import OutboundClient, OutboundPolicy

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.access.openid_provider import ProviderClaims
    from gateway.settings import GatewaySettings
    from models.database import Database

ATTEMPT_LIFETIME: Final = timedelta(minutes=10)
"""Time that a person may take at the provider."""
PURPOSE: Final = b"pilotflame sign-in attempt"
SECRET_BYTES: Final = 32
MAX_ANSWER_BYTES: Final = 1_000_000


class SignInAttempt(msgspec.Struct, frozen=True):
    """Sign-in that has begun, kept encrypted in a cookie of the browser."""

    state: str
    nonce: str
    verifier: str
    next: str
    began_at: datetime
    links: str = ""
    """Id of the signed-in user to connect the identity with; empty for a sign-in."""
    invitation: str = ""
    """Code of the invitation that is accepted; empty without one."""


class NoAccount(Exception):
    """No user of this server has the identity, and no invitation is for its address."""


class OpenIdSignIn(Struct, frozen=True):
    """Sign-ins of one process with its provider."""

    provider: OpenIdProvider
    database: Database
    vault: SecretVault
    secret: bytes
    """Server secret under which keys are hashed."""

    async def begin(
        self, redirect_uri: str, next_page: str, *, links: str = "", invitation_code: str = ""
    ) -> tuple[str, str]:
        """Begin a sign-in: return the address of the provider, and the encrypted value of the cookie that
        remembers the attempt.

        `next_page` is shown afterwards. `links` is the id of a signed-in user to whom the identity will be
        connected, empty for a sign-in. `invitation_code` is for `sign_in`, empty without one. Raises
        `ProviderUnavailable`.
        """
        state, nonce, verifier = (secrets.token_urlsafe(SECRET_BYTES) for _ in range(3))
        url = await self.provider.authorization_url(redirect_uri, state=state, nonce=nonce, verifier=verifier)
        now = self.database.clock.now()
        attempt = SignInAttempt(state, nonce, verifier, next_page, now, links, invitation_code)
        return url, self._seal(attempt)

    async def take_attempt(self, cookie: str | None, state: str) -> SignInAttempt | None:
        """Return the attempt that a cookie holds, if the provider's answer has its `state`, once.

        None for another state, without or with an unreadable cookie, after ten minutes, and for a repetition.
        """
        attempt = None if cookie is None else self._open(cookie)
        if attempt is None or not secrets.compare_digest(attempt.state.encode(), state.encode()):
            return None
        now, use = self.database.clock.now(), secrets.token_urlsafe(SECRET_BYTES)
        if now - attempt.began_at > ATTEMPT_LIFETIME:
            return None
        # Beyond the lifetime, by the clocks of two processes too.
        key = IdempotencyKey("sign-in attempt", attempt.state, "", int(2 * ATTEMPT_LIFETIME.total_seconds()))

        async def reserve(connection: AsyncConnection) -> str:
            return await idempotency.reserve_key(connection, key, shard=0, resource_id=use, now=now)

        return attempt if await self.database.transaction(reserve) == use else None

    async def sign_in(
        self, claims: ProviderClaims, user_agent: str, replaces: str | None, invitation_code: str
    ) -> str:
        """Create a browser session of the user with an identity, and return the session's secret.

        A new identity gets its user by the invitation with the code; without a code, by an open one for the person's
        verified address, on a server with one organization: elsewhere, any organization could claim the person. The
        session with the hash `replaces` ends. Raises `NoAccount`, `EmailTaken`, and `IdentityTaken` for a code with an
        identity that has a user already.
        """
        now = self.database.clock.now()

        async def make(connection: AsyncConnection) -> str:
            user, key_id = await self._find_user(connection, claims, invitation_code, now)
            return await self._create_session(connection, user, key_id, user_agent, now, replaces)

        return await self.database.transaction(make)

    async def link(self, claims: ProviderClaims, organization_id: str, user_id: str) -> None:
        """Connect an identity with a signed-in user, with a new key for its sessions.

        Nothing changes if it is connected with that user already, or the user is missing. Raises `IdentityTaken` if the
        identity belongs to another user.
        """
        now = self.database.clock.now()

        async def connect(connection: AsyncConnection) -> None:
            found = await user_identity.find_identity(connection, claims.issuer, claims.subject)
            if found is not None and found.user_id == user_id:
                return
            if found is not None:
                raise user_identity.IdentityTaken(f"The identity belongs to another user than {user_id}")
            user = await access_store.find_user(connection, organization_id, user_id)
            if user is not None:
                await self._connect(connection, user, claims, now)

        await self.database.transaction(connect)

    async def _find_user(
        self, connection: AsyncConnection, claims: ProviderClaims, invitation_code: str, now: datetime
    ) -> tuple[User, str]:
        """Return the user of an identity, and the id of the key that its sessions stand for.

        A new identity gets a user by an invitation. The key gets a new expiry, even if it had expired; if it is revoked
        or gone, a new one replaces it. Raises the errors of `sign_in`.
        """
        found = await user_identity.find_identity(connection, claims.issuer, claims.subject)
        if found is None:
            user = await self._accept_invitation(connection, claims, invitation_code, now)
            return user, await self._connect(connection, user, claims, now)
        if invitation_code:
            raise user_identity.IdentityTaken("The identity has a user already")
        user_of = await access_store.find_user(connection, found.organization_id, found.user_id)
        if user_of is None:
            raise NoAccount
        extended = await connection.execute(
            update(ApiKey)
            .where(col(ApiKey.id) == found.key_id, col(ApiKey.revoked_at).is_(None))
            .values(expires_at=now + browser_session.LIFETIME)
        )
        if extended.rowcount == 1:
            return user_of, found.key_id
        key_id = await self._create_key(connection, user_of, claims, now)
        await user_identity.set_key(connection, found, key_id)
        return user_of, key_id

    async def _accept_invitation(
        self, connection: AsyncConnection, claims: ProviderClaims, invitation_code: str, now: datetime
    ) -> User:
        """Create and return the user of an invitation: the one with the code, else an open one for the verified
        address.

        The invitation becomes accepted, and the audit trail records both. Raises `NoAccount` without such an
        invitation, and `EmailTaken`.
        """
        if invitation_code:
            one = await invitation.find_by_code(connection, invitation_code)
        else:
            one = await _find_invitation(connection, claims.email, now)
        if one is None:
            raise NoAccount
        organization = await access_store.find_organization(connection, one.organization_id)
        if organization is None or not await invitation.accept_invitation(connection, one, now):
            raise NoAccount
        user = await access_store.create_user(
            connection,
            organization=organization,
            email=one.email,
            name=claims.name[:200],
            role=UserRole(one.role),
            now=now,
        )
        await invitation.record_user(connection, one, user.id)
        author = _caller_of(user, "openid")
        for action, object_id, before, after in (
            (AuditAction.INVITATION_ACCEPTED, one.id, hash_invitation(one), None),
            (AuditAction.USER_CREATED, user.id, None, audit_log.hash_content(user)),
        ):
            await audit_log.record_change(connection, author, action, object_id, before=before, after=after)
        return user

    async def _connect(
        self, connection: AsyncConnection, user: User, claims: ProviderClaims, now: datetime
    ) -> str:
        """Connect an identity with a user in the transaction, and return the id of a new key for its sessions.

        The audit trail records both. Raises `IdentityTaken` if a concurrent request has connected the identity.
        """
        key_id = await self._create_key(connection, user, claims, now)
        await user_identity.add_identity(
            connection, user, issuer=claims.issuer, subject=claims.subject, key_id=key_id, now=now
        )
        await audit_log.record_change(
            connection,
            _caller_of(user, key_id),
            AuditAction.IDENTITY_CONNECTED,
            user.id,
            before=None,
            after=browser_session.hash_secret(f"{claims.issuer} {claims.subject}"),
        )
        return key_id

    async def _create_key(
        self, connection: AsyncConnection, user: User, claims: ProviderClaims, now: datetime
    ) -> str:
        """Create the key that sessions of an identity stand for, and return its id; nobody ever sees its text.

        It has the scopes of the user's role and lasts as long as a session; the audit trail records it.
        """
        made = await access_store.create_key(
            connection,
            user=user,
            name=f"Sign-in by {urlsplit(claims.issuer).netloc}"[:100],
            scopes=DEFAULT_SCOPES[UserRole(user.role)],
            secret=self.secret,
            now=now,
            expires_at=now + browser_session.LIFETIME,
        )
        after = audit_log.hash_content(made.row)
        await audit_log.record_change(
            connection,
            _caller_of(user, made.row.id),
            AuditAction.KEY_CREATED,
            made.row.id,
            before=None,
            after=after,
        )
        return made.row.id

    async def _create_session(
        self,
        connection: AsyncConnection,
        user: User,
        key_id: str,
        user_agent: str,
        now: datetime,
        replaces: str | None,
    ) -> str:
        """Create a browser session for a user's key, record it in the audit trail, and return its secret for
        the cookie.

        The session with the hash `replaces`, if any, ends.
        """
        caller = _caller_of(user, key_id)
        row, secret = await browser_session.create_session(
            connection, caller, user_agent=user_agent, now=now, replaces=replaces
        )
        await audit_log.record_change(
            connection, caller, AuditAction.SESSION_CREATED, row.id, before=None, after=hash_session(row)
        )
        return secret

    def _seal(self, attempt: SignInAttempt) -> str:
        """Encrypt an attempt as text for a cookie: the id of the server's secret, a dot, and the content in
        base64url.
        """
        sealed = self.vault.encrypt(msgspec.json.encode(attempt), organization_id="", object_id="attempt")
        return f"{sealed.secret_id}.{urlsafe_b64encode(sealed.content).decode().rstrip('=')}"

    def _open(self, cookie: str) -> SignInAttempt | None:
        """Decrypt an attempt from a cookie's text; None if it was changed, or its server secret is unknown."""
        secret_id, _, text = cookie.partition(".")
        try:
            content = urlsafe_b64decode(text + "=" * (-len(text) % 4))
            opened = self.vault.decrypt(
                EncryptedText(secret_id, content), organization_id="", object_id="attempt"
            )
        except (ValueError, UnknownSecret, SecretCorrupted):
            return None
        return decoding.decode(opened, SignInAttempt)


async def _find_invitation(connection: AsyncConnection, email: str, now: datetime) -> Invitation | None:
    """Return the newest open invitation for an address, on a server with exactly one organization; else None."""
    if not email or not await has_one_organization(connection):
        return None
    statement = (
        select(Invitation)
        .where(
            col(Invitation.email) == email,
            col(Invitation.accepted_at).is_(None),
            col(Invitation.revoked_at).is_(None),
            col(Invitation.expires_at) > now,
        )
        .order_by(col(Invitation.created_at).desc())
        .limit(1)
    )
    row = (await connection.execute(statement)).mappings().first()
    return None if row is None else build_row(Invitation, row)


async def has_one_organization(connection: AsyncConnection) -> bool:
    """Return whether the server has exactly one organization."""
    return len((await connection.execute(select(col(Organization.id)).limit(2))).all()) == 1


def build_openid_sign_in(settings: GatewaySettings, database: Database) -> OpenIdSignIn | None:
    """Return the sign-in with the OpenID Connect provider of the settings; None without an issuer.

    It may reach private networks, since the operator chooses the provider.
    """
    if not settings.openid_issuer:
        return None
    secret = settings.openid_client_secret
    client = OpenIdClient(
        issuer=settings.openid_issuer,
        client_id=settings.openid_client_id,
        client_secret="" if secret is None else secret.get_secret_value(),
        scopes=settings.openid_scopes,
    )
    # The operator chooses the provider, which may be in a private network.
    everywhere = tuple(ip_network(one) for one in ("0.0.0.0/0", "::/0"))
    policy = OutboundPolicy(allowed_networks=everywhere, max_response_bytes=MAX_ANSWER_BYTES)
    return OpenIdSignIn(
        provider=OpenIdProvider(client, OutboundClient(policy)),
        database=database,
        # It seals attempts, and opens nothing else of the server.
        vault=SecretVault(settings.secret, settings.previous_secrets, purpose=PURPOSE),
        secret=settings.secret,
    )


def _caller_of(user: User, key_id: str) -> ApiCaller:
    """Return the caller that a user's key stands for, with the scopes of the user's role."""
    role = UserRole(user.role)
    return ApiCaller(
        key_id=key_id,
        user_id=user.id,
        organization_id=user.organization_id,
        shard=user.shard,
        role=role,
        scopes=DEFAULT_SCOPES[role],
    )
