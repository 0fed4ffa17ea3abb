"""Authentication by API key: keys are looked up by their keyed hash and cached for a second.

Nobody can compute the hash without the server's secret, so the timing of lookups reveals nothing about keys.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

import structlog
from msgspec import Struct

from concurrency.single_flight import SingleFlight
from concurrency.ttl_cache import TTLCache
from gateway.http import errors
from gateway.http.failed_attempts import FailedAttempts
from gateway.http.request_origin import client_of_scope
from gateway.http.sessions import SessionAuthenticator
from journal.group_commit import GroupCommit
from models import access_store
from models.access import hash_address, hash_key
from models.access_store import KeyUse
from models.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from starlette.types import Scope

    from models.access import ApiCaller
    from models.access_store import FoundKey
    from models.database import Database

log = structlog.get_logger()

CACHE_SECONDS = 1.0
"""Maximum delay of a revocation, in every process."""
MAX_REMEMBERED_KEYS = 10_000
USE_RECORDED_EVERY = timedelta(minutes=1)
LONGEST_KEY = 200


class CachedCaller(Struct):
    """Caller of a key that was valid at its last lookup."""

    caller: ApiCaller
    fresh_until: float


class KeyAuthenticator:
    """Authenticator of API keys, for one process."""

    def __init__(
        self,
        database: Database,
        secret: bytes,
        previous: Sequence[bytes] = (),
        public_url: str = "",
    ) -> None:
        self._database = database
        self.sessions = SessionAuthenticator(database, public_url)
        """Authenticator of requests without a key."""
        self._secret = secret
        self._previous = previous
        self._remembered: OrderedDict[str, CachedCaller] = OrderedDict()
        self._lookups: SingleFlight[str, ApiCaller | None] = SingleFlight(self._look_up)
        self._reads: GroupCommit[Sequence[str], FoundKey | None] = GroupCommit(self._read)
        """One query at a time for all waiting keys: even a flood of wrong keys occupies one connection only.
        """
        self._failures = FailedAttempts("Too many requests from this address had no valid key")
        self._recorded: TTLCache[str, bool] = TTLCache(
            USE_RECORDED_EVERY.total_seconds(), MAX_REMEMBERED_KEYS
        )
        """Ids of keys whose use this process has recorded recently."""
        self._background: set[asyncio.Task[None]] = set()

    async def caller(self, scope: Scope) -> ApiCaller:
        """Return the caller of the request's API key; without a key, that of its browser session.

        Keys are cached for a second. Raises a 401 error without a valid key or session, for a wrong key 429 instead if
        the client had 50 failures within a minute, and 403 for a change that another site requests by a session. A
        valid key is never refused for failures of its client. A request with a key, also an invalid one, never looks at
        cookies.
        """
        key = _read_key(scope)
        if key is None:
            found = await self._caller_of_session(scope)
            if found is None:
                raise errors.unauthorized()
            return found
        remembered = self._remembered.get(hash_key(key, self._secret))
        if remembered is not None and remembered.fresh_until > monotonic():
            return remembered.caller
        caller = await self._lookups.get(key)
        if caller is None:
            raise self._failures.fail(client_of_scope(scope), errors.unauthorized())
        self._note_use(caller.key_id, scope)
        return caller

    def recent_caller(self, scope: Scope) -> ApiCaller | None:
        """Return the caller of the request's API key from the cache, even if outdated; None for an uncached key or a
        session.
        """
        key = _read_key(scope)
        remembered = None if key is None else self._remembered.get(hash_key(key, self._secret))
        return None if remembered is None else remembered.caller

    async def _caller_of_session(self, scope: Scope) -> ApiCaller | None:
        """Return the caller of the browser session in the request's cookie; None without a valid one, and if the
        request has a key.

        Raises the 403 error of `SessionAuthenticator.caller`.
        """
        has_key = any(name == b"x-api-key" for name, _ in scope["headers"])
        return None if has_key else await self.sessions.caller(scope)

    async def close(self) -> None:
        """Wait for lookups of keys and for background writes, such as the time of the last use of a key."""
        await self._lookups.drain()
        await self.sessions.close()
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _look_up(self, key: str) -> ApiCaller | None:
        """Return the caller of a key from the database and cache it; None for an unknown, expired or revoked key.

        A key with the hash of a previous secret gets that of the current one in the background.
        """
        asked_at = monotonic()
        now = self._database.clock.now()
        hashed = hash_key(key, self._secret)
        found = await self._reads.submit([hashed, *(hash_key(key, secret) for secret in self._previous)])
        if found is None or not found.is_valid(now):
            self._remembered.pop(hashed, None)
            return None
        self._remembered[hashed] = CachedCaller(found.caller, asked_at + CACHE_SECONDS)
        self._remembered.move_to_end(hashed)
        if len(self._remembered) > MAX_REMEMBERED_KEYS:
            self._remembered.popitem(last=False)
        if found.hash != hashed:
            self._in_background(self._rehash(key, found))
        return found.caller

    async def _read(self, batch: Sequence[Sequence[str]]) -> Sequence[FoundKey | None]:
        """Return the stored key for each lookup of a batch, None without one, by one query; a lookup has hashes by all
        secrets.
        """
        found = await access_store.find_keys(self._database, {one for hashes in batch for one in hashes})
        return [next((found[one] for one in hashes if one in found), None) for hashes in batch]

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _note_use(self, key_id: str, scope: Scope) -> None:
        """Record the use of a key by a request in the background, at most once a minute in this process."""
        if self._recorded.get(key_id):
            return
        self._recorded.put(key_id, value=True)
        address_hash = hash_address(client_of_scope(scope), self._secret)
        use = KeyUse(self._database.clock.now(), name_route(scope), address_hash)
        self._in_background(self._record_use(key_id, use))

    async def _record_use(self, key_id: str, use: KeyUse) -> None:
        """Store the last use of a key; while the database is away, this is only logged."""
        try:
            await access_store.record_use(self._database, key_id, use, every=USE_RECORDED_EVERY)
        except DatabaseUnavailable as error:
            log.warning("use of key not recorded", key_id=key_id, reason=str(error))

    async def _rehash(self, key: str, found: FoundKey) -> None:
        """Store the hash of a key with the current secret, so that it works after the previous secret is gone.

        While the database is away, this is only logged.
        """
        try:
            await access_store.rehash_key(self._database, key, earlier=found.hash, secret=self._secret)
        except DatabaseUnavailable as error:
            log.warning("key not rehashed", key_id=found.caller.key_id, reason=str(error))


def name_route(scope: Scope) -> str:
    """Return method and path template of a routed request, such as `POST /api/v1/workflows/{id}/execute`."""
    return f"{scope['method']} {scope['route'].path}"


def _read_key(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            given: bytes = value
            return given.decode("latin-1") if 0 < len(given) <= LONGEST_KEY else None
    return None
