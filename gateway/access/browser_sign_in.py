"""Sign-in of browsers: an API key, or a one-time code of the terminal, becomes a session with a cookie."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

import structlog
from msgspec import Struct

from concurrency.ttl_cache import TTLCache
from engine.values import fingerprint
from gateway.access import audit_log
from gateway.access.audit_log import ServerOperator
from gateway.access.session_shapes import hash_session
from gateway.http import session_cookies
from gateway.http.errors import ApiError
from gateway.http.failed_attempts import FailedAttempts
from gateway.http.request_origin import client_of_scope
from gateway.http.wire import StrictWire
from models import access_store, browser_session
from models.access import KEY_PREFIX, ApiCaller, hash_key, visible_prefix
from models.audit import AuditAction
from models.browser_session import BrowserSession

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.access_store import FoundKey
    from models.database import Database

log = structlog.get_logger()

MAX_FAILURES: Final = 10
"""Failed sign-ins per minute and address."""
CODE_SECONDS: Final = 600.0
MAX_CODES: Final = 100
LONGEST_SECRET: Final = 200
UNKNOWN: Final = "unknown"


class SignInRequest(StrictWire):
    """Request body of a sign-in: exactly one of its fields."""

    key: str | None = None
    code: str | None = None


class SignInResult(Struct, frozen=True):
    """New session: its row, the identity behind it, and the value of its cookie."""

    row: BrowserSession
    found: FoundKey
    secret: str


class BrowserSignIn:
    """Sign-ins of one process: its one-time codes, and its failed attempts by address."""

    def __init__(self, database: Database, secrets_of_keys: Sequence[bytes]) -> None:
        """Set the database, and the server's secrets under which keys are hashed, the current one first."""
        self._database = database
        self._secrets = secrets_of_keys
        self._codes: TTLCache[str, str] = TTLCache(CODE_SECONDS, MAX_CODES)
        """Ids of keys by the hash of a code."""
        self._failures = FailedAttempts(
            "Too many sign-ins from this address have failed: wait a minute", max_failures=MAX_FAILURES
        )

    def issue_code(self, key_id: str) -> str:
        """Return a code that stands for a key in one sign-in, within ten minutes, at this process and from
        this machine only.

        At most 100 codes are valid at a time: a new one replaces the oldest.
        """
        code = secrets.token_urlsafe(browser_session.SECRET_BYTES)
        self._codes.put(browser_session.hash_secret(code), key_id)
        return code

    async def sign_in(
        self, scope: Mapping[str, Any], given: SignInRequest, *, user_agent: str, replaces: str | None
    ) -> SignInResult:
        """Create a browser session and return it with its secret; the session with the hash `replaces`, if
        any, ends.

        The audit trail records it, and refusals too. Raises a 401 error for a wrong, expired or revoked key
        or code, and 429, also for a right one, to a client with ten wrong ones within a minute.
        """
        client = client_of_scope(scope)
        refusal = self._failures.refusal(client)
        if refusal is not None:
            raise refusal
        now = self._database.clock.now()
        found = await self._find(scope, given)
        if found is None or not found.is_valid(now):
            self._failures.count(client)
            await self._record_refusal(given, found)
            raise refuse_sign_in(is_code=given.code is not None)

        async def create(connection: AsyncConnection) -> SignInResult:
            row, secret = await browser_session.create_session(
                connection, found.caller, user_agent=user_agent, now=now, replaces=replaces
            )
            await audit_log.record_change(
                connection,
                found.caller,
                AuditAction.SESSION_CREATED,
                row.id,
                before=None,
                after=hash_session(row),
            )
            return SignInResult(row, found, secret)

        return await self._database.transaction(create)

    async def _find(self, scope: Mapping[str, Any], given: SignInRequest) -> FoundKey | None:
        """Return the key that a sign-in names, directly or by a one-time code; None for an unknown one.

        The key may be expired or revoked. This uses up a code; from another machine, the result is None, and the code
        stays valid. None also for a key's text of over 200 characters.
        """
        if given.code is not None:
            hashed = browser_session.hash_secret(given.code)
            key_id = self._codes.get(hashed)
            if key_id is None or not session_cookies.is_loopback_client(scope):
                return None
            self._codes.drop(hashed)
            async with self._database.read() as connection:
                return await access_store.find_key(connection, key_id)
        key = (given.key or "").strip()
        if not 0 < len(key) <= LONGEST_SECRET:
            return None
        hashes = [hash_key(key, secret) for secret in self._secrets]
        found = await access_store.find_keys(self._database, hashes)
        return next((found[one] for one in hashes if one in found), None)

    async def _record_refusal(self, given: SignInRequest, found: FoundKey | None) -> None:
        """Record a failed sign-in in the audit trail of the key's organization, else of the one that the
        key's prefix names.

        If no organization has the prefix, it is only logged. Of the given text only the visible prefix of a
        key is stored: other texts could be passwords of something else.
        """
        prefix = visible_prefix(given.key) if given.key and given.key.startswith(KEY_PREFIX) else ""

        async def record(connection: AsyncConnection) -> None:
            author: ApiCaller | ServerOperator
            if found is not None:
                author = found.caller
            else:
                organization = await access_store.find_organization_by_prefix(connection, prefix)
                if organization is None:
                    log.warning("sign-in refused", prefix=prefix)
                    return
                author = ServerOperator(organization.id, organization.shard, UNKNOWN, UNKNOWN)
            object_id = found.caller.key_id if found is not None else prefix or UNKNOWN
            await audit_log.record_change(
                connection,
                author,
                AuditAction.SIGN_IN_REFUSED,
                object_id,
                before=None,
                after=fingerprint({"prefix": prefix, "by": "code" if given.code is not None else "key"}),
            )

        await self._database.transaction(record)


def refuse_sign_in(*, is_code: bool) -> ApiError:
    """Return the 401 error for a wrong, expired or revoked key or code; it doesn't say which."""
    message = (
        "The link has been used, is older than ten minutes, or was opened on another machine"
        if is_code
        else "This is no valid API key: it is mistyped, expired or revoked"
    )
    return ApiError(401, "sign-in-refused", message)
