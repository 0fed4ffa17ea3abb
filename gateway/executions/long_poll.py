"""The desk at which long polls and event streams wait for executions to change.

Watch, then read, then wait: a change between reading and watching would go unheard. A notice may still be lost, so once
a second everybody looks again, all in one query; with the broker away that alone keeps the answers coming.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog

from concurrency.ttl_cache import TTLCache
from gateway.http import errors, limits
from journal.group_commit import GroupCommit
from messages.broker import WATCH_SECONDS, BrokerUnavailable, ChangedExecutions
from models.execution_status import TERMINAL_STATUSES

if TYPE_CHECKING:
    from journal.store import ExecutionKey, JournalStore, RunProgressReport
    from messages.broker import Broker, Notification

log = structlog.get_logger()

LOOK_SECONDS: Final = 1.0
"""How long a lost notice can go unnoticed."""
MAX_WATCHED: Final = 20_000
"""Executions whose watch is remembered; of others the row is read before anybody waits."""


@dataclass(slots=True, eq=False)
class ExecutionWaiter:
    """One that waits for an execution: look again whenever `changed` is set, for the last time when `is_over`."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: bool = False

    def end(self) -> None:
        self.is_over = True
        self.changed.set()


@dataclass(slots=True, eq=False)
class BrokerWatch:
    """What the broker was asked to tell of, and whether it has taken that on."""

    execution_ids: Sequence[str]
    is_set: bool = False


class ExecutionPollHub:
    """Everybody who waits at this gateway."""

    def __init__(self, store: JournalStore, broker: Broker) -> None:
        self._store = store
        self._broker = broker
        self.polls = 0
        """How many polls wait."""
        self._reads: GroupCommit[ExecutionKey, RunProgressReport | None] = GroupCommit(self._read)
        self._watches: GroupCommit[BrokerWatch, bool] = GroupCommit(self._watch)
        self._watched: TTLCache[str, BrokerWatch] = TTLCache(WATCH_SECONDS / 2, MAX_WATCHED)
        self._expected: TTLCache[str, bool] = TTLCache(WATCH_SECONDS / 2, MAX_WATCHED)
        self._waiters: dict[str, set[ExecutionWaiter]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._is_released = False

    async def start(self) -> None:
        """Open the channel, or go on without it while the broker is away."""
        await self._broker.listen(self._noticed)
        self._looking = asyncio.create_task(self._look_again())

    def release(self) -> None:
        """Let everybody go with what there is now: the process is about to end."""
        self._is_released = True
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.end()

    async def close(self) -> None:
        """Let everybody go, and finish what is being read."""
        self.release()
        if self._looking is not None:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking
        await self._watches.drain()
        await self._reads.drain()

    async def progress(self, key: ExecutionKey, wait_seconds: float) -> RunProgressReport | None:
        """Return where a run is: as soon as it has ended, else when the time is over; None where there is none."""
        if wait_seconds <= 0:
            return await self._reads.submit(key)
        if self.polls >= limits.POLLS_WAITING:
            raise errors.not_ready("Too many requests wait here for executions to end: ask with wait=0")
        self.polls += 1
        with self.waiter(key.execution_id) as waiter:
            timer = asyncio.get_running_loop().call_later(wait_seconds, waiter.end)
            try:
                return await self._ended(key, waiter)
            finally:
                timer.cancel()
                self.polls -= 1

    async def _ended(self, key: ExecutionKey, waiter: ExecutionWaiter) -> RunProgressReport | None:
        if self._will_hear_of(key.execution_id):
            # Accepted here, or read before, and not heard of since: there is nothing new to read.
            await waiter.changed.wait()
        while True:
            waiter.changed.clear()
            was_watched = self._will_hear_of(key.execution_id)
            progress = await self._reads.submit(key)
            if progress is None or progress.status in TERMINAL_STATUSES or waiter.is_over:
                return progress
            if was_watched or not await self.watch([key.execution_id]):
                await waiter.changed.wait()

    @contextmanager
    def waiter(self, execution_id: str) -> Iterator[ExecutionWaiter]:
        """Lend a waiter that hears of every change of an execution that is watched, and once a second besides."""
        waiter = ExecutionWaiter()
        if self._is_released:
            waiter.end()
        waiters = self._waiters.setdefault(execution_id, set())
        waiters.add(waiter)
        try:
            yield waiter
        finally:
            waiters.discard(waiter)
            if not waiters:
                self._waiters.pop(execution_id, None)

    def _will_hear_of(self, execution_id: str) -> bool:
        """Tell whether the end will be heard of, and nothing has been since that was so."""
        return self._expected.get(execution_id) is not None or self.is_watched(execution_id)

    def expect(self, execution_ids: Sequence[str]) -> None:
        """Count on being told of the end of each: they are being accepted here, and their rows say so."""
        for execution_id in execution_ids:
            self._expected.put(execution_id, value=True)

    def is_watched(self, execution_id: str) -> bool:
        """Tell whether the next change will be heard of, and none has been since that was so."""
        watch = self._watched.get(execution_id)
        return watch is not None and watch.is_set

    def watch(self, execution_ids: Sequence[str]) -> asyncio.Future[bool]:
        """Ask to be told of the next change of each; False where the broker is away."""
        watch = BrokerWatch(execution_ids)
        for execution_id in execution_ids:
            self._watched.put(execution_id, watch)
        return self._watches.submit(watch)

    async def _watch(self, batch: Sequence[BrokerWatch]) -> Sequence[bool]:
        try:
            await self._broker.watch([one for watch in batch for one in watch.execution_ids])
        except BrokerUnavailable as error:
            log.debug("executions not watched", reason=str(error))
            return [False] * len(batch)
        for watch in batch:
            watch.is_set = True
        return [True] * len(batch)

    def heard_of(self, execution_id: str) -> None:
        """Have everybody look at an execution that has changed; whoever goes on waiting watches it anew."""
        self._watched.drop(execution_id)
        self._expected.drop(execution_id)
        for waiter in self._waiters.get(execution_id, ()):
            waiter.changed.set()

    async def _read(self, batch: Sequence[ExecutionKey]) -> Sequence[RunProgressReport | None]:
        found = {one.execution_id: one for one in await self._store.progress(list(dict.fromkeys(batch)))}
        for progress in found.values():
            if progress.status in TERMINAL_STATUSES:
                # No notice will come any more: it was lost, or it came before the watch.
                self.heard_of(progress.execution_id)
        return [found.get(key.execution_id) for key in batch]

    def _noticed(self, notification: Notification) -> None:
        if isinstance(notification, ChangedExecutions):
            for execution_id in notification.execution_ids:
                self.heard_of(execution_id)

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for waiters in self._waiters.values():
                for waiter in waiters:
                    waiter.changed.set()
