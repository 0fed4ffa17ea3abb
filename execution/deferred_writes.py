"""Writes that may come a little later, so that many of them share one transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final, Generic, TypeVar

import structlog

from models.errors import DatabaseUnavailable

T = TypeVar("T")

log = structlog.get_logger()

DELAY_SECONDS: Final = 1.0
MAX_BATCH: Final = 500
MAX_WAITING: Final = 20_000


class DeferredWrites(Generic[T]):
    """Queue of writes that are stored together within about a second; a killed process loses those in the queue."""

    def __init__(
        self, store: Callable[[Sequence[T]], Awaitable[None]], delay_seconds: float = DELAY_SECONDS
    ) -> None:
        """Create a queue; `store` stores a batch in one transaction, and may get a batch again whose commit was not
        confirmed.

        A write that can't be stored at all is dropped, with a warning, so that the others don't wait for ever.
        """
        self._store = store
        self._delay = delay_seconds
        self._waiting: list[T] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, write: T) -> None:
        """Add a write; dropped, with a warning, if too many wait since the database is unavailable."""
        if len(self._waiting) >= MAX_WAITING:
            log.warning("write dropped", reason="too many wait for the database")
            return
        self._waiting.append(write)
        if self._task is None:
            self._task = asyncio.create_task(self._store_later())

    async def close(self) -> None:
        """Store the writes that wait; those of an unavailable database are lost, with a warning."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        try:
            while self._waiting:
                await self._store_batch()
        except DatabaseUnavailable as error:
            log.warning("writes lost", count=len(self._waiting), error=str(error))

    async def _store_later(self) -> None:
        """Store all writes in batches, each after the delay, until none waits."""
        try:
            while self._waiting:
                await asyncio.sleep(self._delay)
                # They stay in the queue while the database is unavailable.
                with suppress(DatabaseUnavailable):
                    await self._store_batch()
        finally:
            self._task = None

    async def _store_batch(self) -> None:
        """Store the oldest writes in one transaction, and remove them from the queue after its commit.

        If the database refuses one of them, each is stored alone, and refused ones are dropped. Raises
        `DatabaseUnavailable`; then those that are not stored stay in the queue.
        """
        batch = self._waiting[:MAX_BATCH]
        try:
            await self._store(batch)
        except DatabaseUnavailable:
            raise
        except Exception:  # noqa: BLE001 - of a write that the database refuses
            await self._store_each(len(batch))
        else:
            del self._waiting[: len(batch)]

    async def _store_each(self, count: int) -> None:
        """Store the oldest writes one by one, and drop those that are refused; raises `DatabaseUnavailable`."""
        for _ in range(count):
            try:
                await self._store(self._waiting[:1])
            except DatabaseUnavailable:
                raise
            except Exception:
                log.exception("write dropped", reason="the database refuses it")
            del self._waiting[0]
