"""Authentication by the cookie of a browser session, for requests without an API key."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Final

import structlog

from concurrency.ttl_cache import TTLCache
from gateway.http import session_cookies
from journal.group_commit import GroupCommit
from models import browser_session
from models.browser_session import USE_RECORDED_EVERY, FoundSession
from models.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Scope

    from models.access import ApiCaller
    from models.database import Database

log = structlog.get_logger()

KEPT_SECONDS: Final = 1.0
"""Maximum delay of the end of a session, in every process."""
MAX_KEPT: Final = 10_000


class SessionAuthenticator:
    """Authenticator of browser sessions, for one process."""

    def __init__(self, database: Database, public_url: str) -> None:
        self._database = database
        self._public_url = public_url
        self._kept: TTLCache[str, tuple[float, FoundSession]] = TTLCache(KEPT_SECONDS, MAX_KEPT)
        """Sessions with the times of their lookups, by hash."""
        self._reads: GroupCommit[str, FoundSession | None] = GroupCommit(self._read)
        self._recorded: TTLCache[str, bool] = TTLCache(USE_RECORDED_EVERY.total_seconds(), MAX_KEPT)
        self._background: set[asyncio.Task[None]] = set()

    async def caller(self, scope: Scope) -> ApiCaller | None:
        """Return the caller of the request's browser session; None without a valid one.

        Sessions are cached for a second. Raises a 403 error for a request of another site that may change something, if
        it has the cookie, even of a session that has ended.
        """
        cookie = session_cookies.cookie_of(scope, self._public_url)
        secret = None if cookie is None else cookie.value_of(scope)
        if cookie is None or secret is None:
            return None
        cookie.require_same_origin(scope)
        found = await self._find(browser_session.hash_secret(secret))
        if found is None or not found.is_valid(self._database.clock.now()):
            return None
        self._note_use(found)
        return found.caller

    def forget(self, hashed: str) -> None:
        """Drop the cached session with this hash, so that its end is effective at once in this process."""
        self._kept.drop(hashed)

    async def close(self) -> None:
        """Wait for background writes, such as the time of the last use of a session."""
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _find(self, hashed: str) -> FoundSession | None:
        """Return the session with a hash, which may have ended, from the cache of a second or the database; None if
        unknown.
        """
        kept = self._kept.get(hashed)
        if kept is not None and monotonic() - kept[0] < KEPT_SECONDS:
            return kept[1]
        asked_at = monotonic()
        found = await self._reads.submit(hashed)
        if found is not None:
            self._kept.put(hashed, (asked_at, found))
        return found

    async def _read(self, batch: Sequence[str]) -> Sequence[FoundSession | None]:
        """Return the sessions of a batch of hashes by one query; None for unknown ones."""
        found = await browser_session.find_sessions(self._database, set(batch))
        return [found.get(hashed) for hashed in batch]

    def _note_use(self, found: FoundSession) -> None:
        """Record the use of a session in the background, at most once a minute."""
        now = self._database.clock.now()
        if now - found.row.last_seen_at <= USE_RECORDED_EVERY or self._recorded.get(found.row.id):
            return
        self._recorded.put(found.row.id, value=True)
        task = asyncio.create_task(self._record_use(found.row.id))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _record_use(self, session_id: str) -> None:
        try:
            await browser_session.record_use(self._database, session_id, self._database.clock.now())
        except DatabaseUnavailable as error:
            log.warning("use of session not recorded", session_id=session_id, reason=str(error))
