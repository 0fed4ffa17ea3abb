"""Recorder of runs under leases: one commit for writes of many runs, in order within each run.

Leases are renewed from a thread that user work on the event loop can't starve.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from math import ceil
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import msgspec
import structlog
from msgspec import Struct

from concurrency import offload
from engine import values
from engine.node_api import AnswerSource
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
    encode_error,
)
from engine.services import ControlRequest, RunControl
from journal.blobs import large_values
from journal.blobs.blob_storage import BlobsUnavailable
from journal.explanations.blockers import BlockerCode, code_of_wait
from journal.group_commit import GroupCommit
from journal.store import STATUS_AFTER, LeaseRenewal, RunWrite
from json_text import decoding
from models import task_states
from models.ended_execution import MAX_NOTIFIED_BYTES, EndedExecution
from models.errors import DatabaseUnavailable, LockWaitTimeout, PartialCommit
from models.execution_status import MAX_PERCENT_UNDER_WAY
from models.timestamps import HOST_TIME
from telemetry import instruments
from telemetry.process_activity import ACTIVITY

if TYPE_CHECKING:
    from engine.agents.agent_steps import AgentStep
    from engine.values import Json
    from journal.blobs.large_values import LargeValues
    from journal.store import ExecutionKey, RunStore

T = TypeVar("T")

log = structlog.get_logger()

RETRY_SECONDS = 0.25
MAX_ROWS = 2_000
"""Maximum rows of one commit, except for a single larger run, so that other runs wait no longer than that."""

_WAITING_STATUSES = frozenset({SpanStatus.WAITING, SpanStatus.RETRYING})
_NEVER = datetime.max.replace(tzinfo=UTC)

ROUNDING_PERCENT = 1e-6
"""Tolerance for rounding errors in sums of shares."""

RENEWALS_PER_LEASE = 3
MAX_ROUND_SECONDS = 2.0
"""Longest time between two looks at the leases: the first lease of an assigned run is short."""
ROUND_TOLERANCE = 1.03
"""Factor that keeps a round that begins a little late from renewing leases twice as often."""
TRIES_PER_RENEWAL = 5
"""Attempts at a lease whose row is locked, until the next renewal."""
LEASE_MARGIN = 0.15
"""Share of a lease that is left unused, since the clocks of process and database may run at different speeds.
"""


instruments.declare("commit_seconds", "commit_batch_size", "node_duration_seconds", "node_retries_total")


class _AwaitedAnswer(msgspec.Struct):
    kind: str


_decode_awaits = decoding.build_decoder(_AwaitedAnswer).decode


OnDurable: TypeAlias = "Callable[[Sequence[NodeSpan], Sequence[AttemptSpan], Sequence[AgentStep]], None]"
OnCommitted: TypeAlias = Callable[[Mapping[str, str], Sequence[EndedExecution]], None]


class RunRecorder:
    """Recorder that groups the writes of all runs of a process."""

    def __init__(self, store: RunStore, on_committed: OnCommitted) -> None:
        """Create a recorder; `on_committed` is called after each commit that has written a run.

        Its first argument has the ids of the changed runs as keys, with the channel of the run if it has ended and an
        empty text otherwise, and the keys of organizations with news for their task workers, with an empty text. Its
        second one has the outcomes of runs that ended with all their records in this commit.
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
        self._whole_runs: set[str] = set()
        """Runs whose pending write has all of their records."""

    def submit(self, write: RunWrite, *, is_whole_run: bool = False) -> asyncio.Future[bool]:
        """Queue a write for the next commit; the future returns whether the run still held its fencing token.

        `is_whole_run` says that the write has all records of its run, so that its outcome can be published.
        The future raises `LockWaitTimeout` if another transaction keeps the run's row locked, and
        `DatabaseUnavailable`.
        """
        if is_whole_run:
            self._whole_runs.add(write.execution_id)
        group = self._locked_group if write.execution_id in self._locked else self._group
        return group.submit(write)

    async def drain(self) -> None:
        """Wait until every submitted write is committed or refused."""
        await self._group.drain()
        await self._locked_group.drain()

    async def _commit(self, batch: Sequence[RunWrite]) -> Sequence[bool | Exception]:
        """Write the progress of several runs in one transaction; return for each whether it held its token,
        or an error if its row is locked.

        Written runs are announced with `_on_committed`. Raises `DatabaseUnavailable`.
        """
        locked: LockWaitTimeout | None = None
        unwritten: frozenset[str] = frozenset()
        begun_at = time.perf_counter()
        try:
            held = await self._store.record(batch)
        except PartialCommit as error:
            held, unwritten, locked = error.held, error.unwritten, error
        ACTIVITY.commits += 1
        ACTIVITY.committed_runs += len(batch)
        if instruments.is_exposed:
            instruments.histogram("commit_seconds").observe(time.perf_counter() - begun_at)
            instruments.histogram("commit_batch_size").observe(len(batch))
        self._locked.difference_update(write.execution_id for write in batch)
        self._locked |= unwritten
        if held:
            written = [write for write in batch if write.execution_id in held]
            tasks = {
                task_states.watch_key(write.organization_id): "" for write in written if write.organization_id
            }
            outcomes = [_ended_execution(one) for one in written if one.execution_id in self._whole_runs]
            self._on_committed(
                {write.execution_id: write.channel for write in written} | tasks,
                [one for one in outcomes if one],
            )
        self._whole_runs.difference_update(
            write.execution_id for write in batch if write.execution_id not in unwritten
        )
        return [
            locked if locked is not None and write.execution_id in unwritten else write.execution_id in held
            for write in batch
        ]


def percent_of(share: float) -> int:
    """Return a completed share (0 to 1) of a run in percent, rounded down.

    It is at most 99: only the end of a run makes it 100.
    """
    return min(int(share * 100 + ROUNDING_PERCENT), MAX_PERCENT_UNDER_WAY)


def _count_rows(write: RunWrite) -> int:
    return (
        1
        + sum(len(records) for records in (write.spans, write.attempts, write.steps, write.logs))
        + len(write.metadata)
    )


def _awaits_task(span: NodeSpan) -> bool:
    return span.awaits is not None and _decode_awaits(span.awaits).kind == AnswerSource.TASK


def _count_node(span: NodeSpan) -> None:
    if not instruments.is_exposed or span.started_at is None or span.ended_at is None or span.is_iteration:
        return
    seconds = max((span.ended_at - span.started_at).total_seconds(), 0.0)
    instruments.histogram("node_duration_seconds", span.type, span.status.value).observe(seconds)


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
        is_new: bool = False,
    ) -> None:
        """Create the journal of a claimed run. `channel` is notified of its end; `settled` are the ids of nodes that
        have ended before, which count for its progress.

        `is_new` says that the run has no records yet: if its first write ends it, its outcome is notified too.

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
        self._write = self._create_write()
        self._commit_lock = asyncio.Lock()
        self._is_broken = False
        self._is_new = is_new
        self.organization_id = ""
        """Organization whose task workers are notified of new and cancelled tasks."""
        self._done = 0.0
        """Completed share of the run, as far as this claim of it knows."""
        self._waits: dict[tuple[str, str], NodeSpan] = {}
        """Last spans of the nodes that wait or retry."""
        self.has_new_result = False
        """Whether a result was committed since the run was claimed."""
        self.on_durable: OnDurable | None = None
        """Called with the records of each commit."""

    def record(self, span: NodeSpan) -> None:
        """Add the new state of a node to the next commit, which writes the last state per node and iteration.

        Waiting and retrying nodes are remembered, so that the run can say what blocks it. Completed, failed and
        skipped nodes are counted for its progress; cancelled ones are not.
        """
        if self._write.clock_moved != HOST_TIME.moved:
            self._write.follow_clock(HOST_TIME.moved)
        self._write.spans.append(span)
        if any(
            text is not None and len(text) > self._max_row_bytes
            for text in (span.output, span.input, span.rendered_config)
        ):
            self._has_large = True
        if span.status in _WAITING_STATUSES or self._waits:
            self._track_wait(span)
        if span.task is not None:
            self._write.organization_id = self.organization_id
        if span.status in SETTLED_STATUSES:
            if not span.is_tool_wait:
                _count_node(span)
            self._write.has_new_result = True
            # A node in a loop counts once, at the first iteration in which it settles; the loop counts after
            # all iterations.
            if not span.is_iteration and not span.is_tool_wait:
                self._settled.add(span.node_id)

    def record_attempt(self, attempt: AttemptSpan) -> None:
        """Add the record of one attempt of a node to the next commit; a planned next attempt is counted in
        the metrics.
        """
        if attempt.next_attempt_at is not None:
            instruments.counter("node_retries_total").inc()
        self._write.attempts.append(attempt)

    def record_step(self, step: AgentStep) -> None:
        """Add the new state of a step of an agent to the next commit.

        An ended step counts as a new result of the run if its contents are recorded, since only then another worker
        continues behind it.
        """
        self._write.steps.append(step)
        if step.ended_at is not None and step.conversation is None:
            self._write.has_new_result = True

    def log(self, line: LogLine) -> None:
        """Add a log line to the next commit."""
        self._write.logs.append(line)

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Add metadata of the run to the next commit; a key replaces its earlier value."""
        self._write.metadata.update(metadata)

    def advance(self, share: float) -> None:
        """Add a completed share (0 to 1) to the progress of the run."""
        self._done += share

    def set_answer_count(self, wait_answer_count: int) -> None:
        """Set the number of wait answers that the run has seen: if more are stored when the run is to wait, it becomes
        pending instead.
        """
        self._wait_answer_count = wait_answer_count

    def holds_lease(self) -> bool:
        """Return whether the lease of the run has surely not ended (a margin of 15% is kept); False after a
        refused write.
        """
        return not self._is_broken and self._lease.is_held()

    async def restore(self, spans: Sequence[NodeSpan]) -> Sequence[NodeSpan]:
        """Return recorded spans with the values that their rows keep in blobs, and track the waits among them.

        Raises `RecordedValueLost`, and `LeaseLost` if the lease ends, or the run is canceled or handed off at once,
        while the storage is unavailable.
        """
        for span in spans:
            self._track_wait(span)
        if self._large is None or not any(span.output_blob or span.input_blob for span in spans):
            return spans
        large = self._large
        return await self._repeat_until_done(lambda: asyncio.create_task(large.restore(spans)))

    async def read_trigger(self, text: str) -> Json:
        """Return the output of the trigger node from the text of its row; a body in a blob is read.

        Raises `InvalidJson`, `RecordedValueLost`, and `LeaseLost` if the lease ends, or the run is canceled or handed
        off at once, while the storage is unavailable.
        """
        if self._large is None or not text.startswith(large_values.SEPARATE_BODY):
            return await offload.run(values.decode_json, text.encode())
        large = self._large
        return await self._repeat_until_done(lambda: asyncio.create_task(large.read_trigger(text)))

    @property
    def owes_result(self) -> bool:
        """Whether the result of a node, or of a step with recorded contents, waits for the next commit."""
        return self._write.has_new_result

    async def pass_trial(self) -> None:
        """Commit that the run has passed its trial (no suspect any more), with everything recorded before;
        raises `LeaseLost`.
        """
        async with self._commit_lock:
            write = self._take_pending()
            write.has_passed = True
            await self._submit(write)

    @property
    def is_dirty(self) -> bool:
        """Whether spans, steps, log lines or metadata wait for the next commit; records of attempts alone don't count,
        and are committed with others.
        """
        write = self._write
        return bool(write.spans or write.steps or write.logs or write.metadata)

    @property
    def is_committing(self) -> bool:
        """Whether a commit is in progress: another would only wait for it."""
        return self._commit_lock.locked()

    async def commit(self) -> None:
        """Make everything recorded so far durable, after a commit in progress; without records it commits nothing.

        Waits while the database or the blob storage is unavailable. Raises `LeaseLost`, also after an earlier write was
        refused, and for a canceled run that waits for the blob storage.
        """
        async with self._commit_lock:
            if self.is_dirty or self._is_broken:
                await self._submit(self._take_pending())

    async def end(self, ended: RunOutcome) -> None:
        """Commit the outcome of this claim of the run, with everything recorded before it; raises `LeaseLost`.

        The outcome is an end, a wait until `due_at`, or a release to other processes. An end cancels the
        tasks for which nodes still wait.
        """
        clock_moved = HOST_TIME.moved
        async with self._commit_lock:
            write = self._take_pending()
            if write.clock_moved != clock_moved:
                write.follow_clock(clock_moved)
            write.end, write.error, write.due_at = ended.status, ended.error, ended.due_at
            write.wait_answer_count = self._wait_answer_count
            if ended.status is RunStatus.WAITING:
                self._name_blocker(write)
            elif ended.status is RunStatus.RELEASED:
                write.blocked_by = BlockerCode.QUEUED_BEHIND
            if ended.status in UNFINISHED_STATUSES:
                write.keeps_place = any(map(_awaits_task, self._waits.values()))
            else:
                write.channel = self._channel
                for span in self._waits.values():
                    self._cancel_task(write, span)
            await self._submit(write)

    def _track_wait(self, span: NodeSpan) -> None:
        """Remember a node that waits or retries, or forget it once it does not; a canceled one cancels its task."""
        place = span.node_id, span.iteration
        if span.status in _WAITING_STATUSES:
            self._waits[place] = span
            return
        earlier = self._waits.pop(place, None)
        if span.status is SpanStatus.CANCELLED and earlier is not None:
            self._cancel_task(self._write, earlier)

    def _cancel_task(self, write: RunWrite, span: NodeSpan) -> None:
        """Add the cancellation of the task that a node waits for, if it waits for one, to a write."""
        if _awaits_task(span):
            write.cancelled_tasks.append((span.node_id, span.iteration))
            write.organization_id = self.organization_id

    def _name_blocker(self, write: RunWrite) -> None:
        """Set in a write the reason why its run waits: that of the node whose wait ends first; without such a node, a
        timer.
        """
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
        """Return the write with everything recorded, and begin a new one; the caller holds the commit lock."""
        write, self._write = self._write, self._create_write()
        write.completed_nodes = len(self._settled)
        write.progress = percent_of(self._done)
        return write

    def _create_write(self) -> RunWrite:
        """Return an empty write of this run for its next records, under its lease."""
        execution_id, shard = self._lease.key
        return RunWrite(execution_id, shard, self._lease.token, clock_moved=HOST_TIME.moved)

    async def _submit(self, write: RunWrite) -> None:
        """Commit a write; after a failure every later write raises `LeaseLost`, since the records of this one
        are lost.
        """
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
        """Store large values as blobs, commit the write, and call `on_durable`; raises `LeaseLost` if the
        token is lost.
        """
        if self._has_large and self._large is not None:
            self._has_large = False
            large, spans = self._large, write.spans
            write.spans = await self._repeat_until_done(lambda: asyncio.create_task(large.store(spans)))
        # Repeating the write is safe: it names the token, and its rows replace themselves.
        is_whole = self._is_new and write.end is not None and write.end not in UNFINISHED_STATUSES
        self._is_new = False
        if not await self._repeat_until_done(lambda: self._recorder.submit(write, is_whole_run=is_whole)):
            raise LeaseLost
        if self.on_durable is not None:
            self.on_durable(write.spans, write.attempts, write.steps)
        self.has_new_result = self.has_new_result or write.has_new_result

    async def _repeat_until_done(self, begin: Callable[[], asyncio.Future[T]]) -> T:
        """Begin work again after each outage, every quarter of a second, until it succeeds; return its result.

        Raises `LeaseLost` when the lease ends, or if a run that is canceled or handed off at once waits for blobs.
        """
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
        """Wait for a future until the lease ends; raises `LeaseLost` then."""
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
        """Cancel a future at the end of the lease, which renewals postpone."""
        seconds = self._lease.until - time.monotonic()
        loop = asyncio.get_running_loop()
        if seconds > 0:
            self._overdue = loop.call_later(seconds, self._cancel_without_lease, future)
        else:
            self._overdue = loop.call_later(0, future.cancel)


class RunLease(Struct, eq=False):
    """Lease of one run, by this process's monotonic clock."""

    key: ExecutionKey
    token: int
    until: float

    @property
    def renewal(self) -> LeaseRenewal:
        return LeaseRenewal(*self.key, self.token)

    def is_held(self) -> bool:
        """Return whether the lease has surely not ended, by the monotonic clock with a margin of 15% of its
        duration.
        """
        return time.monotonic() < self.until


def _lease_end(since: float, seconds: float) -> float:
    return since + seconds * (1 - LEASE_MARGIN)


class LeaseKeeper:
    """Renewer of the leases of one process.

    Reports lost leases, and stop and cancel requests that renewals find.
    """

    def __init__(
        self,
        store: RunStore,
        lease_seconds: float,
        *,
        on_lost: Callable[[RunLease], None],
        on_request: Callable[[RunLease, str], None],
    ) -> None:
        self._store = store
        self._lease_seconds = lease_seconds
        third = lease_seconds / RENEWALS_PER_LEASE
        self._round_seconds = third / ceil(third / MAX_ROUND_SECONDS)
        self._on_lost = on_lost
        self._on_request = on_request
        self._leases: dict[str, RunLease] = {}
        self._loop = asyncio.get_running_loop()
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._renew_forever()), name="leases", daemon=True
        )

    def start(self) -> None:
        """Start the renewal thread."""
        self._thread.start()

    def stop(self) -> None:
        """Let the renewal thread end, without waiting for it; leases that are still held expire by themselves."""
        self._stopping.set()

    def hold(
        self, key: ExecutionKey, token: int, since: float, first_seconds: float | None = None
    ) -> RunLease:
        """Return the lease of a run that was claimed at `since` (monotonic seconds); the thread renews it until
        `release`.

        `first_seconds` is its duration before the first renewal, where it differs from that of other leases.
        A lease of the same execution is replaced. If it is lost, `on_lost` is called on the event loop.
        """
        lease = RunLease(key, token, _lease_end(since, first_seconds or self._lease_seconds))
        self._leases[key.execution_id] = lease
        return lease

    def release(self, lease: RunLease) -> None:
        """Stop renewing a lease; a newer lease of the same execution stays."""
        if self._leases.get(lease.key.execution_id) is lease:
            del self._leases[lease.key.execution_id]

    def execution_ids(self) -> list[str]:
        """Return the ids of the executions with leases that are not released yet, lost ones included."""
        return list(self._leases)

    async def _renew_forever(self) -> None:
        """Renew due leases in rounds until `stop`, on an event loop of the thread."""
        store = await self._store.for_thread()
        begun_at = time.monotonic()
        while not await asyncio.to_thread(self._stopping.wait, self._seconds_until_renewal(begun_at)):
            begun_at = time.monotonic()
            leases = self._due_leases(begun_at)
            if not leases:
                continue
            try:
                await self._renew_unlocked(store, leases, self._round_seconds)
            except DatabaseUnavailable as error:
                # The leases expire by themselves: each run checks its own before it starts a node.
                log.warning("leases not renewed", error=str(error), leases=len(leases))
            except Exception:
                log.exception("leases not renewed", leases=len(leases))
        if store is not self._store:
            await store.close()

    def _seconds_until_renewal(self, begun_at: float) -> float:
        """Return the seconds until the next round, counted from the begin of the last one, so that a slow
        round delays nothing.
        """
        return max(0.0, begun_at + self._round_seconds - time.monotonic())

    def _due_leases(self, now: float) -> list[RunLease]:
        """Return the leases to renew in this round: those whose last renewal would be over a third of their duration
        ago at the next round.

        Short leases are due when they have less time left than the others have then. `now` is by the monotonic clock.
        """
        third = self._lease_seconds / RENEWALS_PER_LEASE
        until = _lease_end(now, self._lease_seconds) + self._round_seconds - third * ROUND_TOLERANCE
        return [lease for lease in list(self._leases.values()) if lease.until < until]

    async def _renew_unlocked(self, store: RunStore, leases: list[RunLease], seconds: float) -> None:
        """Renew leases, and retry those with locked rows until shortly before the next round, in `seconds`; then log
        how many are left.

        Raises `DatabaseUnavailable`.
        """
        since = time.monotonic()
        while locked := await self._renew(store, leases):
            left_seconds = seconds * (1 - 1 / TRIES_PER_RENEWAL) - (time.monotonic() - since)
            if left_seconds <= 0 or await asyncio.to_thread(self._stopping.wait, seconds / TRIES_PER_RENEWAL):
                log.warning("leases locked by another transaction", leases=len(locked))
                return
            leases = [lease for lease in locked if self._leases.get(lease.key.execution_id) is lease]

    async def _renew(self, store: RunStore, leases: list[RunLease]) -> list[RunLease]:
        """Renew leases once; report lost ones and requests to stop or cancel on the event loop; return those
        with locked rows.

        Locked leases are neither renewed nor lost. Raises `DatabaseUnavailable`.
        """
        if not leases:
            return []
        since = time.monotonic()
        locked: list[RunLease] = []
        answers = await store.renew([lease.renewal for lease in leases], self._lease_seconds)
        renewed = {answer.execution_id: answer for answer in answers}
        for lease in leases:
            answer = renewed.get(lease.key.execution_id)
            if answer is None:
                self._loop.call_soon_threadsafe(self._on_lost, lease)
                continue
            if answer.is_locked:
                locked.append(lease)
                continue
            lease.until = _lease_end(since, self._lease_seconds)
            if answer.request is not None:
                self._loop.call_soon_threadsafe(self._on_request, lease, answer.request)
        if len(locked) < len(leases):
            ACTIVITY.renewed_at = time.monotonic()
        return locked


def _ended_execution(write: RunWrite) -> EndedExecution | None:
    """Return status, error and outputs of a run that ends with this write, for a notification.

    None if the run does not end, an output outside of loops is stored as a blob, or the outcome is too large. The write
    must hold all records of the run.
    """
    if write.end is None or write.end in UNFINISHED_STATUSES:
        return None
    newest = {span.node_id: span for span in write.spans if not span.iteration}
    if any(span.output_blob is not None for span in newest.values()):
        return None
    outputs = tuple(
        (node_id, span.output.decode())
        for node_id, span in newest.items()
        if span.ended_at is not None and span.output is not None
    )
    error = encode_error(write.error)
    size = len(error or "") + sum(len(node_id) + len(text) for node_id, text in outputs)
    if size > MAX_NOTIFIED_BYTES:
        return None
    status = STATUS_AFTER[write.end].value
    return EndedExecution(
        write.execution_id, status, write.completed_nodes, write.progress, error, outputs, size
    )
