"""Recorder of runs: one commit for writes of many runs, in order within each run."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

import msgspec
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
    RunStatus,
    SpanStatus,
)
from journal.blobs import large_values
from journal.blobs.blob_storage import BlobsUnavailable
from journal.explanations.blockers import BlockerCode, code_of_wait
from journal.group_commit import GroupCommit
from journal.store import RunWrite
from json_text import decoding
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
"""Maximum rows of one commit, except for a single larger run, so that other runs wait no longer than that."""

_WAITING_STATUSES = frozenset({SpanStatus.WAITING, SpanStatus.RETRYING})
_NEVER = datetime.max.replace(tzinfo=UTC)

ROUNDING_PERCENT = 1e-6
"""Tolerance for rounding errors in sums of shares."""


class _AwaitedAnswer(msgspec.Struct):
    kind: str


_decode_awaits = decoding.build_decoder(_AwaitedAnswer).decode


class RunRecorder:
    """Recorder that groups the writes of all runs of a process."""

    def __init__(self, store: RunStore, on_committed: Callable[[Mapping[str, str]], None]) -> None:
        """Create a recorder.

        `on_committed` gets changed runs by id, each with its channel if the run has ended.
        """
        self._store = store
        self._on_committed = on_committed
        self._group: GroupCommit[RunWrite, bool] = GroupCommit(
            self._commit, weigh=_count_rows, max_weight=MAX_ROWS
        )
        # Separate: runs that share a commit with a locked run wait for its lock.
        self._locked_group: GroupCommit[RunWrite, bool] = GroupCommit(
            self._commit, weigh=_count_rows, max_weight=MAX_ROWS
        )
        self._locked: set[str] = set()
        """Runs whose rows another transaction had locked at their last write."""

    def submit(self, write: RunWrite) -> asyncio.Future[bool]:
        """Queue a write; the future returns whether the run still held its token.

        The future raises `LockWaitTimeout` if another transaction keeps the run's row locked.
        """
        group = self._locked_group if write.execution_id in self._locked else self._group
        return group.submit(write)

    async def drain(self) -> None:
        """Wait until every submitted write is committed or refused."""
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
    """Return the completed share of a run in percent, rounded down.

    It is at most 99: only the end of a run makes it 100.
    """
    return min(int(share * 100 + ROUNDING_PERCENT), MAX_PERCENT_UNDER_WAY)


def _count_rows(write: RunWrite) -> int:
    return 1 + len(write.spans) + len(write.attempts) + len(write.logs)


class RunJournal:
    """Journal of one run: buffer of spans, attempts and log lines until their commit."""

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
        """Create the journal of a claimed run. `channel` is notified of its end; `settled` are node ids.

        `wait_answer_count` is the number of wait answers that the run has seen. Without `large`, rows hold
        values of any size. A cancel or hand-off requested through `control` ends the wait for an unreachable
        blob storage. The lease is renewed meanwhile, since the database is reachable.
        """
        self._recorder = recorder
        self._lease = lease
        self._channel = channel
        self._wait_answer_count = wait_answer_count
        self._large = large
        self._max_row_bytes = sys.maxsize if large is None else large.max_row_bytes
        self._has_large = False
        self._control = control or RunControl()
        self._settled = set(settled)
        self._write = self._clear_pending()
        self._commit_lock = asyncio.Lock()
        self._is_broken = False
        self._done = 0.0
        """Completed share of the run, as far as this claim of it knows."""
        self._waits: dict[tuple[str, str], NodeSpan] = {}
        """Last spans of the nodes that wait or retry."""
        self.has_new_result = False
        """Whether a result was committed since the run was claimed."""

    def record(self, span: NodeSpan) -> None:
        """Buffer a span for the next commit."""
        self._write.spans.append(span)
        if (span.output is not None and len(span.output) > self._max_row_bytes) or (
            span.input is not None and len(span.input) > self._max_row_bytes
        ):
            self._has_large = True
        if span.status in _WAITING_STATUSES or self._waits:
            self._track_wait(span)
        if span.status in SETTLED_STATUSES:
            self._write.has_new_result = True
            # A node in a loop counts once, at the first iteration in which it settles; the loop counts after
            # all iterations.
            if not span.is_turn:
                self._settled.add(span.node_id)

    def record_attempt(self, attempt: AttemptSpan) -> None:
        """Buffer an attempt for the next commit."""
        self._write.attempts.append(attempt)

    def log(self, line: LogLine) -> None:
        """Buffer a log line for the next commit."""
        self._write.logs.append(line)

    def advance(self, share: float) -> None:
        """Add a completed share to the progress of the run."""
        self._done += share

    def count_answers(self, wait_answer_count: int) -> None:
        """Set the number of wait answers that the run has seen."""
        self._wait_answer_count = wait_answer_count

    def holds_lease(self) -> bool:
        """Return whether the lease is certain to last for a moment longer."""
        return not self._is_broken and self._lease.is_held()

    async def restore(self, spans: Sequence[NodeSpan]) -> Sequence[NodeSpan]:
        """Return spans with values that their rows keep in blobs; raises `RecordedValueLost` and `LeaseLost`."""
        for span in spans:
            self._track_wait(span)
        if self._large is None or not any(span.output_blob or span.input_blob for span in spans):
            return spans
        large = self._large
        return await self._repeat_until_done(lambda: asyncio.create_task(large.restore(spans)))

    async def trigger(self, text: str) -> Json:
        """Return the output of the trigger node; raises `InvalidJson`, `RecordedValueLost` and `LeaseLost`."""
        if self._large is None or not large_values.is_separate(text):
            return await offload.run(values.decode_json, text.encode())
        large = self._large
        return await self._repeat_until_done(lambda: asyncio.create_task(large.trigger(text)))

    @property
    def owes_result(self) -> bool:
        """Whether a new result waits for the next commit."""
        return self._write.has_new_result

    async def pass_trial(self) -> None:
        """Record durably that the run has passed its trial; raises `LeaseLost`."""
        async with self._commit_lock:
            write = self._take_pending()
            write.has_passed = True
            await self._submit(write)

    @property
    def is_dirty(self) -> bool:
        """Whether spans or log lines wait for the next commit."""
        return bool(self._write.spans or self._write.logs)

    @property
    def is_committing(self) -> bool:
        """Whether a commit is in progress: another would only wait for it."""
        return self._commit_lock.locked()

    async def commit(self) -> None:
        """Make everything recorded so far durable; raises `LeaseLost`."""
        async with self._commit_lock:
            if self.is_dirty or self._is_broken:
                await self._submit(self._take_pending())

    async def end(self, ended: RunOutcome) -> None:
        """Commit the end of this claim of the run, with everything recorded before it; raises `LeaseLost`."""
        async with self._commit_lock:
            write = self._take_pending()
            write.end, write.error, write.due_at = ended.status, ended.error, ended.due_at
            write.wait_answer_count = self._wait_answer_count
            if ended.status is RunStatus.WAITING:
                self._name_blocker(write)
            elif ended.status is RunStatus.RELEASED:
                write.blocked_by = BlockerCode.QUEUED_BEHIND
            if ended.status not in UNFINISHED_STATUSES:
                write.channel = self._channel
            await self._submit(write)

    def _track_wait(self, span: NodeSpan) -> None:
        place = span.node_id, span.iteration
        if span.status in _WAITING_STATUSES:
            self._waits[place] = span
        else:
            self._waits.pop(place, None)

    def _name_blocker(self, write: RunWrite) -> None:
        """Name the wait that ends first as the reason of the run's wait."""
        span = min(
            self._waits.values(),
            key=lambda one: (one.wake_at is None, one.wake_at or _NEVER, one.sequence),
            default=None,
        )
        if span is None:
            write.blocked_by = BlockerCode.TIMER
            return
        kind = None if span.awaits is None else _decode_awaits(span.awaits).kind
        write.blocked_by, write.blocked_node = code_of_wait(span.status, kind), span.node_id

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
            # The content of this write is lost, so nothing may follow it, even if the lease should be held
            # again.
            self._is_broken = True
            raise

    async def _make_durable(self, write: RunWrite) -> None:
        if self._has_large and self._large is not None:
            self._has_large = False
            large, spans = self._large, write.spans
            write.spans = await self._repeat_until_done(lambda: asyncio.create_task(large.store(spans)))
        # Repeating the write is safe: it names the token, and its rows replace themselves.
        if not await self._repeat_until_done(lambda: self._recorder.submit(write)):
            raise LeaseLost
        self.has_new_result = self.has_new_result or write.has_new_result

    async def _repeat_until_done(self, begin: Callable[[], asyncio.Future[T]]) -> T:
        """Repeat work until it succeeds; raises `LeaseLost` when the lease ends first."""
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
        """Cancel the wait for an answer when the lease ends; a renewal postpones that."""
        seconds = self._lease.until - time.monotonic()
        loop = asyncio.get_running_loop()
        if seconds > 0:
            self._overdue = loop.call_later(seconds, self._cancel_without_lease, future)
        else:
            self._overdue = loop.call_later(0, future.cancel)
