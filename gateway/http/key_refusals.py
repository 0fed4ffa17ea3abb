"""Counts of requests whose key lacks a scope, so that an owner can give a key what it needs.

Programs repeat refused requests, so they are counted in memory, and a count per key, scope and day is written every few
seconds. A process that crashes loses the counts of the last seconds.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Final

import structlog
from msgspec import Struct

from models import key_refusal
from models.errors import DatabaseUnavailable, LockWaitTimeout
from models.key_refusal import KeyRefusal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database

log = structlog.get_logger()

WRITE_SECONDS: Final = 3.0
MAX_WAITING: Final = 10_000
"""Keys and scopes that are counted between two writes; refusals of others are not counted."""
WRITTEN_AT_ONCE: Final = 1_000
"""Counts of one statement: PostgreSQL takes 32,767 values at most."""


ATTEMPTS: Final = 5
"""Attempts of a write whose rows another gateway has locked, each of which waits for them."""


class _Count(Struct):
    """Refusals of a key for a scope on a day that are not written yet."""

    number: int
    last_at: datetime
    last_route: str


class KeyRefusals:
    """Counts of requests at one gateway that were refused because their keys lack a scope, by day, key and scope."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: dict[tuple[datetime, str, str], _Count] = {}
        self._writing: asyncio.Task[None] | None = None
        self._is_urgent = asyncio.Event()
        self._first_kept: datetime | None = None
        """Earliest day that this process has kept: earlier ones are deleted once a day."""

    def note(self, key_id: str, scope: str, route: str) -> None:
        """Count a request that was refused because its key lacks a scope; stored in the background within seconds.

        `route` is the method and path template of the request. Of more than 10,000 keys and scopes between two writes,
        the others are not counted.
        """
        now = self._database.clock.now()
        identity = (key_refusal.begin_of_day(now), key_id, scope)
        found = self._waiting.get(identity)
        if found is not None:
            found.number += 1
            found.last_at, found.last_route = now, route
        elif len(self._waiting) < MAX_WAITING:
            self._waiting[identity] = _Count(1, now, route)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    async def drain(self) -> None:
        """Write the counts that wait for the next write, before the process stops."""
        self._is_urgent.set()
        if self._writing is not None:
            await self._writing
        self._is_urgent.clear()

    async def _write(self) -> None:
        """Write the counts every three seconds until none wait; `drain` makes it write at once.

        Counts are lost while the database is away.
        """
        try:
            while self._waiting:
                with suppress(TimeoutError):
                    async with asyncio.timeout(WRITE_SECONDS):
                        await self._is_urgent.wait()
                batch, self._waiting = self._waiting, {}
                rows = [
                    KeyRefusal(
                        day=day,
                        key_id=key_id,
                        scope=scope,
                        count=found.number,
                        last_at=found.last_at,
                        last_route=found.last_route,
                    )
                    for (day, key_id, scope), found in batch.items()
                ]
                await self._write_rows(rows)
        finally:
            self._writing = None

    async def _write_rows(self, rows: Sequence[KeyRefusal]) -> None:
        """Add counts to those in the database, and with the first write of a day delete those of days before the last
        seven; errors are logged.
        """
        first = key_refusal.first_day(self._database.clock.now())

        async def write(connection: AsyncConnection) -> None:
            for start in range(0, len(rows), WRITTEN_AT_ONCE):
                await key_refusal.add_counts(connection, rows[start : start + WRITTEN_AT_ONCE])
            if first != self._first_kept:
                await key_refusal.delete_earlier(connection, first)

        try:
            await self._transact(write)
        except DatabaseUnavailable as error:
            log.warning("refusals of keys not counted", count=len(rows), reason=str(error))
        except Exception:
            log.exception("refusals of keys not counted", count=len(rows))
        else:
            self._first_kept = first

    async def _transact(self, write: Callable[[AsyncConnection], Awaitable[None]]) -> None:
        """Write in a transaction, which is repeated while another gateway keeps counts of the same keys locked.

        Raises `DatabaseUnavailable`, and `LockWaitTimeout` at the last attempt.
        """
        for _ in range(ATTEMPTS - 1):
            with suppress(LockWaitTimeout):
                return await self._database.transaction(write)
        return await self._database.transaction(write)
