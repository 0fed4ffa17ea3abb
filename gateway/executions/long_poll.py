"""Long polls and event streams that wait for changes of executions, and the executions that callers may see.

The order is: watch, read, wait. A change between a read and a later watch would be missed. A notification can
be lost, so executions that have been waited for longer than a second are read once a second, in one query. That
suffices while the broker is away.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

import structlog
from msgspec import Struct, field
from sqlalchemy import select
from sqlmodel import col

from concurrency.ttl_cache import TTLCache
from gateway.http import errors, limits
from gateway.http.shared_allowance import SharedAllowance
from journal.group_commit import GroupCommit
from journal.store import ExecutionKey, RunProgressReport
from messages.broker import CHANGED_EXECUTIONS, WATCH_SECONDS, BrokerUnavailable, ChangedExecutions
from models.execution import Execution
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from models.execution_visibility import visibility_condition

if TYPE_CHECKING:
    from journal.store import JournalStore
    from messages.broker import Broker, Notification
    from models.access import ApiCaller, UserRole
    from models.database import Database
    from models.ended_execution import EndedExecution

log = structlog.get_logger()

LOOK_SECONDS: Final = 1.0
"""Seconds after which a lost notification is made up for."""
MAX_WATCHED: Final = 20_000
"""Executions whose watch is remembered; others are read before a poll waits."""

VISIBLE_SECONDS: Final = 5.0
"""Seconds for which a caller who has lost access to a workflow still sees runs that were checked before."""
MAX_VISIBLE: Final = 20_000


class ExecutionWaiter(Struct, eq=False):
    """Waiting request: read again when `changed` is set, and for the last time when `is_over`."""

    begun_at: float
    """Time by the event loop's clock."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: bool = False
    outcome: RunProgressReport | None = None
    """Outcome that came with the notification of the end; otherwise it must be read."""

    def end(self) -> None:
        """End the wait: the request reads a last time and answers."""
        self.is_over = True
        self.changed.set()


class BrokerWatch(Struct, eq=False):
    """Watch requested from the broker, and whether it is in effect."""

    execution_ids: Sequence[str]
    is_set: bool = False


class ExecutionPollHub:
    """Requests of one gateway that wait for executions to change."""

    def __init__(self, store: JournalStore, broker: Broker) -> None:
        self._store = store
        self._broker = broker
        self.polls = SharedAllowance(
            limits.POLLS_WAITING, "Too many requests wait here for executions: ask with wait=0"
        )
        self.awaited_replies: Counter[str] = Counter()
        """Numbers of requests that wait for replies to signals, by execution."""
        self._reads: GroupCommit[ExecutionKey, RunProgressReport | None] = GroupCommit(self._read)
        self._watches: GroupCommit[BrokerWatch, bool] = GroupCommit(self._watch)
        self._watched: TTLCache[str, BrokerWatch] = TTLCache(WATCH_SECONDS / 2, MAX_WATCHED)
        self._expected: TTLCache[str, int] = TTLCache(WATCH_SECONDS / 2, MAX_WATCHED)
        """Numbers of nodes of executions whose ends are expected."""
        self._waiters: dict[str, set[ExecutionWaiter]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._is_released = False

    async def start(self) -> None:
        """Subscribe to notifications of changed executions, and start to wake waiters once a second; without
        Redis, the second suffices.
        """
        await self._broker.listen(self._handle_notification, subject=CHANGED_EXECUTIONS)
        self._looking = asyncio.create_task(self._look_again())

    def release(self) -> None:
        """End all waits with the current state, also those that begin later, since the process is about to stop."""
        self._is_released = True
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.end()

    async def close(self) -> None:
        """End all waits, also those that begin later, each after a last read of its execution; return when the queries
        in progress have ended.
        """
        self.release()
        if self._looking is not None:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking
        await self._watches.drain()
        await self._reads.drain()

    async def read_progress(self, key: ExecutionKey) -> RunProgressReport | None:
        """Return the progress of a run, None if it does not exist; concurrent calls share one query."""
        return await self._reads.submit(key)

    async def wait_for_progress(
        self, key: ExecutionKey, caller: ApiCaller, wait_seconds: float
    ) -> RunProgressReport | None:
        """Wait until a run has ended, at most `wait_seconds` (0: not at all), and return its progress; None if it does
        not exist.

        Raises the errors of `poll`, and `DatabaseUnavailable`.
        """
        if wait_seconds <= 0:
            return await self.read_progress(key)
        with self.poll(key.execution_id, caller.organization_id, caller.key_id, wait_seconds) as waiter:
            return await self._wait_for_end(key, waiter)

    async def wait_for_outcome(
        self, key: ExecutionKey, caller: ApiCaller, wait_seconds: float
    ) -> RunProgressReport | None:
        """Wait until a run has ended, at most `wait_seconds`, and return its outcome; None if it has not ended or does
        not exist.

        Raises the errors of `wait_for_progress`.
        """
        found = await self.wait_for_progress(key, caller, wait_seconds)
        return found if found is not None and found.status in TERMINAL_STATUSES else None

    async def _wait_for_end(self, key: ExecutionKey, waiter: ExecutionWaiter) -> RunProgressReport | None:
        """Wait until a run or the wait has ended, and return the progress of the run; None if the run does not exist.

        A notification of the end that contains the outcome spares the query.
        """
        if self._is_end_watched(key.execution_id):
            # Accepted or read here with a watch in effect, and no notification since: there is nothing new to
            # read.
            await waiter.changed.wait()
        while waiter.outcome is None:
            waiter.changed.clear()
            was_watched = self._is_end_watched(key.execution_id)
            progress = await self._reads.submit(key)
            if progress is None or progress.status in TERMINAL_STATUSES or waiter.is_over:
                return progress
            if was_watched or not await self.watch([key.execution_id]):
                await waiter.changed.wait()
        return waiter.outcome

    @contextmanager
    def poll(
        self, execution_id: str, organization_id: str, key_id: str, wait_seconds: float
    ) -> Iterator[ExecutionWaiter]:
        """Yield a waiter of an execution that occupies a place of `polls`, and whose wait ends after `wait_seconds`, or
        when a smaller client needs the place.

        Raises a 503 error if there is no place for this client.
        """
        with self.waiter(execution_id) as waiter, self.polls.take(organization_id, key_id, waiter.end):
            timer = asyncio.get_running_loop().call_later(max(wait_seconds, 0.0), waiter.end)
            try:
                yield waiter
            finally:
                timer.cancel()

    @contextmanager
    def waiter(self, execution_id: str) -> Iterator[ExecutionWaiter]:
        """Yield a waiter that is notified, until the block ends, of every change of an execution for which `watch` is
        in effect.

        After its first second, it is also notified once a second, in case a notification is lost. Once the process
        stops, its wait has ended from the start (`is_over`).
        """
        waiter = ExecutionWaiter(asyncio.get_running_loop().time())
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

    def _is_end_watched(self, execution_id: str) -> bool:
        """Return whether a watch for the end of an execution is in effect and no notification has arrived since."""
        return self._expected.get(execution_id) is not None or self.is_watched(execution_id)

    def expect(self, total_nodes: Mapping[str, int]) -> None:
        """Expect notifications of the ends of executions that are being accepted here, with their numbers of nodes by
        id.

        Their rows are inserted with a watch, so that no other is needed.
        """
        for execution_id, count in total_nodes.items():
            self._expected.put(execution_id, count)

    def is_watched(self, execution_id: str) -> bool:
        """Return whether a watch for the next change of an execution is in effect and no notification has
        arrived since.
        """
        watch = self._watched.get(execution_id)
        return watch is not None and watch.is_set

    def watch(self, execution_ids: Sequence[str]) -> asyncio.Future[bool]:
        """Request a notification of the next change of each execution; await the result, which is False while
        Redis is away.
        """
        watch = BrokerWatch(execution_ids)
        for execution_id in execution_ids:
            self._watched.put(execution_id, watch)
        return self._watches.submit(watch)

    async def _watch(self, batch: Sequence[BrokerWatch]) -> Sequence[bool]:
        """Request notifications of the executions of a batch from Redis; False for each if it is away."""
        try:
            await self._broker.watch([one for watch in batch for one in watch.execution_ids])
        except BrokerUnavailable as error:
            log.debug("executions not watched", reason=str(error))
            return [False] * len(batch)
        for watch in batch:
            watch.is_set = True
        return [True] * len(batch)

    def wake_waiters(self, execution_id: str) -> None:
        """Wake all waiters of a changed execution, and end its watch; those that continue to wait request another."""
        self._watched.drop(execution_id)
        self._expected.drop(execution_id)
        for waiter in self._waiters.get(execution_id, ()):
            waiter.changed.set()

    async def _read(self, batch: Sequence[ExecutionKey]) -> Sequence[RunProgressReport | None]:
        """Return the progress of the runs of a batch by one query, None for missing ones; waiters of ended
        ones are woken.
        """
        found = {one.execution_id: one for one in await self._store.progress(list(dict.fromkeys(batch)))}
        for progress in found.values():
            if progress.status in TERMINAL_STATUSES:
                # The notification of the end was lost, or was sent before the watch.
                self.wake_waiters(progress.execution_id)
        return [found.get(key.execution_id) for key in batch]

    def _handle_notification(self, notification: Notification) -> None:
        if isinstance(notification, ChangedExecutions):
            for outcome in notification.outcomes:
                self._hand_over(outcome)
            for execution_id in notification.execution_ids:
                self.wake_waiters(execution_id)

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.wake_overdue(asyncio.get_running_loop().time())

    def _hand_over(self, ended: EndedExecution) -> None:
        """Set the outcome of an ended execution at the requests that wait for it, so that they need no query; wake none
        of them.

        Nothing happens for executions that were not expected here.
        """
        total_nodes = self._expected.get(ended.execution_id)
        if total_nodes is None:
            return
        report = RunProgressReport(
            ended.execution_id,
            ExecutionStatus(ended.status),
            ended.completed_nodes,
            total_nodes,
            ended.error,
            ended.outputs,
            ended.percent,
        )
        for waiter in self._waiters.get(ended.execution_id, ()):
            waiter.outcome = report

    def wake_overdue(self, now: float) -> None:
        """Wake the waiters that have waited for at least a second at the loop's time `now`, so that they read again.

        Most runs end sooner, and need no second read.
        """
        for waiters in self._waiters.values():
            for waiter in waiters:
                if now - waiter.begun_at >= LOOK_SECONDS:
                    waiter.changed.set()


class ExecutionAccess:
    """Cache of visible executions by caller, so that polls query the database once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._visible: TTLCache[tuple[str, str, UserRole], bool] = TTLCache(VISIBLE_SECONDS, MAX_VISIBLE)

    async def find_key(self, execution_id: str, caller: ApiCaller) -> ExecutionKey:
        """Return the database key (id and shard) of an execution; raises a 404 error unless it exists and the caller
        may see it.

        A positive answer is cached for five seconds, for which a caller who loses access still gets it.
        """
        if self._visible.get((execution_id, caller.user_id, caller.role)) is None:
            statement = select(col(Execution.id)).where(
                col(Execution.id) == execution_id, visibility_condition(caller)
            )
            async with self._database.read() as connection:
                if await connection.scalar(statement) is None:
                    raise errors.not_found("execution")
            self.allow(execution_id, caller)
        return ExecutionKey(execution_id, caller.shard)

    def allow(self, execution_id: str, caller: ApiCaller) -> None:
        """Cache for five seconds that the caller may see an execution, because it has just started it."""
        self._visible.put((execution_id, caller.user_id, caller.role), value=True)

    def forget(self) -> None:
        """Clear the cache for all callers, after a change that may reduce visibility, such as a removed share."""
        self._visible = TTLCache(VISIBLE_SECONDS, MAX_VISIBLE)
