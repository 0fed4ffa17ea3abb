"""Who asks: a key, looked up by its keyed hash and remembered for a second.

Lookups go by hash, and the hash can't be made without the server's secret, so timing tells nothing about keys.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import TYPE_CHECKING

import structlog

from gateway import errors
from models import access_store
from models.access import key_hash
from models.database import DatabaseUnavailable

if TYPE_CHECKING:
    from starlette.types import Scope

    from models.access import Caller
    from models.database import Database

log = structlog.get_logger()

CACHE_SECONDS = 1.0
"""A revocation works after at most this long, everywhere."""
MAX_REMEMBERED_KEYS = 10_000
MAX_FAILURES = 50
"""Failures of one address within a window; after that, keys not seen before get 429."""
FAILURE_WINDOW_SECONDS = 60.0
MAX_REMEMBERED_ADDRESSES = 10_000
USE_RECORDED_EVERY = timedelta(minutes=1)
LONGEST_KEY = 200


@dataclass(slots=True)
class Remembered:
    """A key that was valid when it was last looked up."""

    caller: Caller
    fresh_until: float


@dataclass(slots=True)
class Failures:
    """What an address has tried in the window that began at `since`."""

    since: float
    count: int = 0


class Authenticator:
    """Turns keys into callers, for one process."""

    def __init__(self, database: Database, secret: bytes) -> None:
        self._database = database
        self._secret = secret
        self._remembered: OrderedDict[str, Remembered] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[Caller | None]] = {}
        self._failures: OrderedDict[str, Failures] = OrderedDict()
        self._background: set[asyncio.Task[None]] = set()

    async def caller(self, scope: Scope) -> Caller:
        """Return whoever the request's key stands for; raises 401 without a valid one, 429 after too many failures."""
        key = _key(scope)
        if key is None:
            raise errors.unauthorized()
        hashed = key_hash(key, self._secret)
        remembered = self._remembered.get(hashed)
        if remembered is not None and remembered.fresh_until > monotonic():
            return remembered.caller
        address = scope["client"][0] if scope.get("client") else ""
        if remembered is None:
            self._refuse_after_failures(address)
        caller = await self._look_up_once(hashed)
        if caller is None:
            self._count_failure(address)
            raise errors.unauthorized()
        return caller

    async def close(self) -> None:
        """Finish what is written in the background."""
        await asyncio.gather(*self._background, *self._lookups.values(), return_exceptions=True)

    async def _look_up_once(self, hashed: str) -> Caller | None:
        """Ask the database, once for all who wait for the same key."""
        lookup = self._lookups.get(hashed)
        if lookup is None:
            lookup = asyncio.create_task(self._look_up(hashed))
            self._lookups[hashed] = lookup
            lookup.add_done_callback(lambda done: self._looked_up(hashed, done))
        return await asyncio.shield(lookup)

    def _looked_up(self, hashed: str, lookup: asyncio.Task[Caller | None]) -> None:
        del self._lookups[hashed]
        if not lookup.cancelled():
            lookup.exception()  # those who waited have it; if all of them have gone, nobody need be told

    async def _look_up(self, hashed: str) -> Caller | None:
        asked_at = monotonic()
        now = datetime.now(UTC)
        found = await access_store.find_key(self._database, hashed)
        if found is None or not found.is_valid(now):
            self._remembered.pop(hashed, None)
            return None
        self._remembered[hashed] = Remembered(found.caller, asked_at + CACHE_SECONDS)
        self._remembered.move_to_end(hashed)
        if len(self._remembered) > MAX_REMEMBERED_KEYS:
            self._remembered.popitem(last=False)
        if found.last_used_at is None or now - found.last_used_at > USE_RECORDED_EVERY:
            task = asyncio.create_task(self._record_use(found.caller.key_id, now))
            self._background.add(task)
            task.add_done_callback(self._background.discard)
        return found.caller

    async def _record_use(self, key_id: str, now: datetime) -> None:
        try:
            await access_store.record_use(self._database, key_id, now=now, every=USE_RECORDED_EVERY)
        except DatabaseUnavailable as error:
            log.warning("use of key not recorded", key_id=key_id, reason=str(error))

    def _refuse_after_failures(self, address: str) -> None:
        failures = self._failures.get(address)
        if failures is None or failures.count < MAX_FAILURES:
            return
        left = failures.since + FAILURE_WINDOW_SECONDS - monotonic()
        if left <= 0:
            del self._failures[address]
            return
        message = "Too many requests from this address had no valid key"
        raise errors.ApiError(429, "rate-limited", message, retry_after_seconds=math.ceil(left))

    def _count_failure(self, address: str) -> None:
        failures = self._failures.get(address)
        if failures is None or failures.since + FAILURE_WINDOW_SECONDS < monotonic():
            failures = Failures(since=monotonic())
            self._failures[address] = failures
            self._failures.move_to_end(address)
        failures.count += 1
        if len(self._failures) > MAX_REMEMBERED_ADDRESSES:
            self._failures.popitem(last=False)


def _key(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            given: bytes = value
            return given.decode("latin-1") if 0 < len(given) <= LONGEST_KEY else None
    return None
