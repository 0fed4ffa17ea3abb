"""Senders: authenticated by key, or by a token in the URL, since providers can't set a header."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl

import structlog
from msgspec import Struct

from concurrency.single_flight import SingleFlight
from concurrency.ttl_cache import TTLCache
from gateway.http import errors
from gateway.http.errors import ApiError
from gateway.http.failed_attempts import FailedAttempts
from gateway.http.parameters import TextParameter
from gateway.http.request_origin import client_of_scope
from journal.group_commit import GroupCommit
from models import sender_tokens
from models.access import ApiCaller, KeyScope
from models.errors import DatabaseUnavailable
from models.ingest import TOKEN_PREFIXES, SenderTokenKind
from models.sender_tokens import FoundSenderToken

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Scope

    from gateway.http.authentication import KeyAuthenticator
    from models.database import Database

log = structlog.get_logger()

LONGEST_TOKEN: Final = 100
TOKEN: Final = TextParameter(
    "key",
    "Trigger token or event token, for senders that can't set the header `X-API-Key`.",
    LONGEST_TOKEN,
)
KEPT_SECONDS: Final = 1.0
"""Maximum delay of a revocation, in every process."""
MAX_KEPT: Final = 10_000
MAX_QUERY_FIELDS: Final = 20
UNAUTHORIZED: Final = 401
USE_RECORDED_EVERY: Final = timedelta(minutes=1)


class RequestSender(Struct, frozen=True):
    """Sender by key or token, or a provider with a verified signature."""

    caller: ApiCaller
    label: str
    """`api-key:`, `trigger-token:` or `event-token:` with an id, or the name of a provider that signed."""
    token: FoundSenderToken | None = None

    @property
    def token_workflow_id(self) -> str:
        """Id of the workflow of a trigger token; only for senders by such a token."""
        return str(self.token and self.token.workflow_id)

    def may_send_to(self, workflow_id: str) -> bool:
        """Return whether the sender may send to a workflow: True for a key, for a trigger token only to its own
        workflow, False for an event token.
        """
        if self.token is None:
            return True
        return self.token.kind is SenderTokenKind.TRIGGER and self.token.workflow_id == workflow_id


class SenderAuthenticator:
    """Authenticator of senders by key or token, for one process."""

    def __init__(self, database: Database, authenticator: KeyAuthenticator) -> None:
        self._database = database
        self._authenticator = authenticator
        self._kept: TTLCache[str, tuple[float, FoundSenderToken]] = TTLCache(KEPT_SECONDS, MAX_KEPT)
        """Tokens with the times of their lookups, by hash."""
        self._lookups: SingleFlight[str, FoundSenderToken | None] = SingleFlight(self._look_up)
        self._reads: GroupCommit[str, FoundSenderToken | None] = GroupCommit(self._read)
        """One query at a time for all waiting tokens."""
        self._recorded: TTLCache[str, bool] = TTLCache(USE_RECORDED_EVERY.total_seconds(), MAX_KEPT)
        """Tokens whose use this process has recorded recently."""
        self._failures = FailedAttempts("Too many requests from this address had no valid token")
        self._background: set[asyncio.Task[None]] = set()

    async def authenticate(self, scope: Scope) -> RequestSender | None:
        """Return the sender of an API key, else of a token in the URL, else of a browser session; None without any of
        them.

        An invalid or expired session counts as none. Raises a 401 error for an invalid key or token, or 429 instead
        after too many failures of the client, and 403 without the scope to execute workflows or for a change that
        another site requests by a session.
        """
        if any(name == b"x-api-key" for name, _ in scope["headers"]):
            return _sender_of(await self._authenticator.caller(scope))
        token = _read_token(scope)
        if token is not None:
            return await self.by_token(scope, token)
        if not any(name == b"cookie" for name, _ in scope["headers"]):
            return None  # any other program than a browser
        caller = await self._authenticator.sessions.caller(scope)
        return None if caller is None else _sender_of(caller)

    async def by_path_token(self, scope: Scope, token: str) -> RequestSender:
        """Return the sender of a trigger token in the path of a URL, which identifies the workflow too.

        Raises a 404 error for any other token, or 429 instead after too many failures of the client.
        """
        try:
            sender = await self.by_token(scope, token)
        except ApiError as error:
            if error.status == UNAUTHORIZED:
                raise errors.not_found("object") from error
            raise
        if sender.token is None or sender.token.kind is not SenderTokenKind.TRIGGER:
            raise errors.not_found("object")
        return sender

    async def by_token(self, scope: Scope, token: str) -> RequestSender:
        """Return the sender of a token, with the right to execute only, and keep the sender with the request as
        `scope["sender"]`.

        Raises a 401 error for an invalid token, or 429 instead after too many failures of the client.
        """
        found = await self._find(scope, token)
        self._note_use(found)
        caller = ApiCaller(
            key_id=found.id,
            user_id=found.user_id,
            organization_id=found.organization_id,
            shard=found.shard,
            role=found.role,
            scopes=frozenset({KeyScope.WORKFLOWS_EXECUTE}),
        )
        sender = scope["sender"] = RequestSender(caller, f"{found.kind}-token:{found.id}", found)
        return sender

    async def close(self) -> None:
        """Wait for lookups of tokens and for background writes, such as the time of a token's last use."""
        await self._lookups.drain()
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _find(self, scope: Scope, token: str) -> FoundSenderToken:
        """Return a token from the cache of a second or the database.

        Raises a 401 error for an unknown or expired one, or 429 instead after too many failures of the client.
        """
        hashed = sender_tokens.hash_token(token)
        kept = self._kept.get(hashed)
        if kept is not None and monotonic() - kept[0] < KEPT_SECONDS:
            return kept[1]
        found = None
        if len(token) <= LONGEST_TOKEN and token.startswith(tuple(TOKEN_PREFIXES.values())):
            found = await self._lookups.get(hashed)
        if found is None:
            raise self._failures.fail(client_of_scope(scope), refuse_sender())
        return found

    async def _look_up(self, hashed: str) -> FoundSenderToken | None:
        """Return the token with a hash from the database and cache it; None for an unknown or expired one."""
        asked_at = monotonic()
        found = await self._reads.submit(hashed)
        if found is not None:
            self._kept.put(hashed, (asked_at, found))
        return found

    async def _read(self, batch: Sequence[str]) -> Sequence[FoundSenderToken | None]:
        """Return the tokens of a batch of hashes by one query; None for unknown and expired ones."""
        found = await sender_tokens.find_tokens(self._database, batch, self._database.clock.now())
        return [found.get(hashed) for hashed in batch]

    def _note_use(self, found: FoundSenderToken) -> None:
        """Record the use of a token in the background, at most once a minute."""
        is_recent = (
            found.last_used_at and self._database.clock.now() - found.last_used_at <= USE_RECORDED_EVERY
        )
        if is_recent or self._recorded.get(found.id):
            return
        self._recorded.put(found.id, value=True)
        task = asyncio.create_task(self._record_use(found.id))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _record_use(self, token_id: str) -> None:
        try:
            await sender_tokens.record_use(
                self._database, token_id, now=self._database.clock.now(), every=USE_RECORDED_EVERY
            )
        except DatabaseUnavailable as error:
            log.warning("use of token not recorded", token_id=token_id, reason=str(error))


def refuse_sender() -> ApiError:
    """Return the common 401 error for a missing or invalid key, token or signature, with a challenge for user
    and password.
    """
    message = (
        "Send a valid API key in the X-API-Key header, or the workflow's trigger token as ?key= in the URL"
    )
    # Some senders send user and password only after a challenge.
    return ApiError(401, "unauthorized", message, headers={"WWW-Authenticate": 'Basic realm="Pilotflame"'})


def _sender_of(caller: ApiCaller) -> RequestSender:
    """Return the caller of a key or session as a sender; raises a 403 error without the scope to execute workflows."""
    if not caller.has_scope(KeyScope.WORKFLOWS_EXECUTE):
        raise errors.scope_required(KeyScope.WORKFLOWS_EXECUTE)
    return RequestSender(caller, f"api-key:{caller.key_id}")


def _read_token(scope: Scope) -> str | None:
    """Return the token in a URL (parameter `key`), None without one; "", which is invalid, for a repeated parameter,
    and for a query of more than 20 parameters.
    """
    try:
        fields = parse_qsl(
            scope["query_string"].decode("latin-1"), keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS
        )
    except ValueError:
        return ""
    keys = [value for name, value in fields if name == "key"]
    return None if not keys else keys[0] if len(keys) == 1 else ""
