"""Writes what runs have done: many runs in one commit, one run in the order in which things happened."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import structlog

from concurrency import offload
from engine import values
from engine.run_control import ControlRequest, RunControl
from engine.run_errors import LeaseLost
from engine.run_records import (
    SETTLED_STATUSES,
    UNFINISHED_STATUSES,
    AttemptSpan,
    LogLine,
    NodeSpan,
    RunOutcome,
)
from journal import trigger_body
from journal.blobs.blob_storage import BlobsUnavailable
from journal.group_commit import GroupCommit
from journal.store import RunWrite
from models.errors import DatabaseUnavailable, LockWaitTimeout, PartialCommit
from models.execution_status import MAX_PERCENT_UNDER_WAY

if TYPE_CHECKING:
    from engine.values import Json
    from journal.blobs.large_values import LargeValues
    from journal.leases import RunLease
    from journal.store import RunStore

T = TypeVar("T")

log = structlog.get_logger()

RETRY_SECONDS = 0.25
MAX_ROWS = 2_000
"""Of one commit, but for a single run's: the others wait for no more than that."""

ROUNDING_PERCENT = 1e-6
"""Sums of parts may be too small by less than this."""


class RunRecorder:
    """Groups the writes of all runs of a process."""

    def __init__(self, store: RunStore, on_committed: Callable[[Mapping[str, str]], None]) -> None:
        """`on_committed` is called with the ids of runs that have changed, and the channel of each that has ended."""
        self._store = store
        self._on_committed = on_committed
        self._group: GroupCommit[RunWrite, bool] = GroupCommit(
            self._commit, weigh=_count_rows, max_weight=MAX_ROWS
        )
        # Apart: whoever shares a commit with a locked run waits for its lock.
        self._locked_group: GroupCommit[RunWrite, bool] = GroupCommit(
            self._commit, weigh=_count_rows, max_weight=MAX_ROWS
        )
        self._locked: set[str] = set()
        """Runs whose rows another transaction had locked when they were last to be written."""

    def submit(self, write: RunWrite) -> asyncio.Future[bool]:
        """Queue a write; the future tells whether the run still held its token, or raises `LockWaitTimeout`."""
        group = self._locked_group if write.execution_id in self._locked else self._group
        return group.submit(write)

    async def drain(self) -> None:
        """Wait until everything submitted is committed or refused."""
        await self._group.drain()
        await self._locked_group.drain()

    async def _commit(self, batch: Sequence[RunWrite]) -> Sequence[bool | Exception]:
        locked: LockWaitTimeout | None = None
        unwritten: frozenset[str] = frozenset()
        try:
            held = await self._store.record(batch)
        except PartialCommit as error:
            held, unwritten, locked = error.held, error.unwritten, error
        self._locked.difference_update(write.execution_id for write in batch)
        self._locked |= unwritten
        if held:
            self._on_committed(
                {write.execution_id: write.channel for write in batch if write.execution_id in held}
            )
        return [
            locked if locked is not None and write.execution_id in unwritten else write.execution_id in held
            for write in batch
        ]


def percent_of(share: float) -> int:
    """Return the part of a run that is done in percent, rounded down; 99 at most, for only its end makes it 100."""
    return min(int(share * 100 + ROUNDING_PERCENT), MAX_PERCENT_UNDER_WAY)


def _count_rows(write: RunWrite) -> int:
    return 1 + len(write.spans) + len(write.attempts) + len(write.logs)


class RunJournal:
    """One run's side of the recorder: what it has told and not yet committed."""

    def __init__(
        self,
        recorder: RunRecorder,
        lease: RunLease,
        settled: Sequence[str] = (),
        *,
        channel: str = "",
        wait_answer_count: int = 0,
        large: LargeValues | None = None,
        control: RunControl | None = None,
    ) -> None:
        """`channel` is told when the run has ended; `signals` are the answers that the run was given so far.

        Without `large`, rows take everything. What `control` is asked breaks off the wait for a blob storage that is
        away: the lease goes on meanwhile, since the database is there to renew it.
        """
        self._recorder = recorder
        self._lease = lease
        self._channel = channel
        self._signals = wait_answer_count
        self._large = large
        self._max_row_bytes = sys.maxsize if large is None else large.max_row_bytes
        self._has_large = False
        self._control = control or RunControl()
        self._settled = set(settled)
        self._write = self._clear_pending()
        self._in_turn = asyncio.Lock()
        self._is_broken = False
        self._done = 0.0
        """The part of the run that is done, as far as this stretch of work knows."""
        self.has_new_result = False
        """A result was committed since the run was claimed."""

    def record(self, span: NodeSpan) -> None:
        """Keep a span for the next commit."""
        self._write.spans.append(span)
        if (span.output is not None and len(span.output) > self._max_row_bytes) or (
            span.input is not None and len(span.input) > self._max_row_bytes
        ):
            self._has_large = True
        if span.status in SETTLED_STATUSES:
            self._write.has_new_result = True
            # A node in a loop counts once, with the first turn in which it settles; the loop, when all are through.
            if not span.is_turn:
                self._settled.add(span.node_id)

    def record_attempt(self, attempt: AttemptSpan) -> None:
        """Keep an attempt for the next commit."""
        self._write.attempts.append(attempt)

    def log(self, line: LogLine) -> None:
        """Keep a log line for the next commit."""
        self._write.logs.append(line)

    def advance(self, share: float) -> None:
        """Count a part of the run as done."""
        self._done += share

    def count_answers(self, wait_answer_count: int) -> None:
        """Count answers that the run has seen since it was claimed."""
        self._signals = wait_answer_count

    def holds_lease(self) -> bool:
        """Tell whether the lease is certain to last a moment longer."""
        return not self._is_broken and self._lease.is_held()

    async def restore(self, spans: Sequence[NodeSpan]) -> Sequence[NodeSpan]:
        """Return spans with what their rows leave out; raises `ValueLost` and `LeaseLost`."""
        if self._large is None or not any(span.output_blob or span.input_blob for span in spans):
            return spans
        large = self._large
        return await self._repeat_until_done(lambda: asyncio.create_task(large.restore(spans)))

    async def trigger(self, text: str) -> Json:
        """Return what the trigger node gives out; raises `InvalidJson`, `ValueLost` and `LeaseLost`."""
        if self._large is None or not trigger_body.is_separate(text):
            return await offload.run(values.decode_json, text.encode())
        large = self._large
        return await self._repeat_until_done(lambda: asyncio.create_task(large.trigger(text)))

    @property
    def owes_result(self) -> bool:
        """Whether a new result waits for the next commit."""
        return self._write.has_new_result

    async def pass_trial(self) -> None:
        """Make durable that the run has been on trial for long enough; raises `LeaseLost`."""
        async with self._in_turn:
            write = self._take_pending()
            write.has_passed = True
            await self._submit(write)

    @property
    def is_dirty(self) -> bool:
        """Whether something waits for the next commit."""
        return bool(self._write.spans or self._write.logs)

    @property
    def is_committing(self) -> bool:
        """Whether a commit is under way: another would only wait for it."""
        return self._in_turn.locked()

    async def commit(self) -> None:
        """Make everything recorded so far durable; raises `LeaseLost`."""
        async with self._in_turn:
            if self.is_dirty or self._is_broken:
                await self._submit(self._take_pending())

    async def end(self, ended: RunOutcome) -> None:
        """Commit the end of this stretch of work, with all that came before it; raises `LeaseLost`."""
        async with self._in_turn:
            write = self._take_pending()
            write.end, write.error, write.due_at = ended.status, ended.error, ended.due_at
            write.wait_answer_count = self._signals
            if ended.status not in UNFINISHED_STATUSES:
                write.channel = self._channel
            await self._submit(write)

    def _take_pending(self) -> RunWrite:
        write, self._write = self._write, self._clear_pending()
        write.completed_nodes = len(self._settled)
        write.progress = percent_of(self._done)
        return write

    def _clear_pending(self) -> RunWrite:
        execution_id, shard = self._lease.key
        return RunWrite(execution_id, shard, self._lease.token)

    async def _submit(self, write: RunWrite) -> None:
        if self._is_broken:
            raise LeaseLost
        try:
            await self._make_durable(write)
        except BaseException:
            # What this write held is gone, so nothing may follow it, even if the lease should hold again.
            self._is_broken = True
            raise

    async def _make_durable(self, write: RunWrite) -> None:
        if self._has_large and self._large is not None:
            self._has_large = False
            large, spans = self._large, write.spans
            write.spans = await self._repeat_until_done(lambda: asyncio.create_task(large.store(spans)))
        # The same write may be repeated: it names the token, and its rows replace themselves.
        if not await self._repeat_until_done(lambda: self._recorder.submit(write)):
            raise LeaseLost
        self.has_new_result = self.has_new_result or write.has_new_result

    async def _repeat_until_done(self, begin: Callable[[], asyncio.Future[T]]) -> T:
        """Do what may be repeated until it is done; a run that has waited for that to the end of its lease is lost."""
        is_logged = False
        while True:
            try:
                return await self._within_lease(begin())
            except DatabaseUnavailable:
                is_hopeless = not self._lease.is_held()
            except BlobsUnavailable as error:
                if not is_logged:
                    log.warning(
                        "blobs not reached", error=str(error), execution_id=self._lease.key.execution_id
                    )
                is_logged = True
                is_hopeless = not self._lease.is_held() or self._is_cancelled()
            if is_hopeless:
                raise LeaseLost
            await asyncio.sleep(RETRY_SECONDS)

    def _is_cancelled(self) -> bool:
        request = self._control.request
        return request is not None and request >= ControlRequest.HAND_OFF_NOW

    async def _within_lease(self, future: asyncio.Future[T]) -> T:
        self._cancel_without_lease(future)
        try:
            return await future
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise LeaseLost from None
        finally:
            self._overdue.cancel()

    def _cancel_without_lease(self, future: asyncio.Future[T]) -> None:
        """Cancel the wait for an answer when the lease has ended, which a renewal puts off."""
        seconds = self._lease.until - time.monotonic()
        loop = asyncio.get_running_loop()
        if seconds > 0:
            self._overdue = loop.call_later(seconds, self._cancel_without_lease, future)
        else:
            self._overdue = loop.call_later(0, future.cancel)
