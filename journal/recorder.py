"""Writes what runs have done: many runs in one commit, one run in the order in which things happened."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from engine.errors import LeaseLost
from engine.events import SETTLED, Ended, LogLine, Span
from journal.grouping import GroupCommit
from journal.rows import STATUS_AFTER
from journal.store import RunWrite
from models.database import DatabaseUnavailable
from models.execution import TERMINAL

if TYPE_CHECKING:
    from journal.leases import Lease
    from journal.store import Store

RETRY_SECONDS = 0.25


class Recorder:
    """Groups the writes of all runs of a process."""

    def __init__(self, store: Store, on_committed: Callable[[Mapping[str, str]], None]) -> None:
        """`on_committed` is called with the ids of runs that have changed, and the inbox of each that has ended."""
        self._store = store
        self._on_committed = on_committed
        self._group: GroupCommit[RunWrite, bool] = GroupCommit(self._commit)

    def submit(self, write: RunWrite) -> asyncio.Future[bool]:
        """Queue a write; the future tells whether the run still held its token."""
        return self._group.submit(write)

    async def drain(self) -> None:
        """Wait until everything submitted is committed or refused."""
        await self._group.drain()

    async def _commit(self, batch: Sequence[RunWrite]) -> Sequence[bool]:
        held = await self._store.record(batch)
        if held:
            self._on_committed(
                {write.execution_id: write.inbox for write in batch if write.execution_id in held}
            )
        return [write.execution_id in held for write in batch]


class RunJournal:
    """One run's side of the recorder: what it has told and not yet committed."""

    def __init__(
        self, recorder: Recorder, lease: Lease, settled: Sequence[str] = (), *, inbox: str = ""
    ) -> None:
        """`inbox` is told when the run has ended."""
        self._recorder = recorder
        self._lease = lease
        self._inbox = inbox
        self._settled = set(settled)
        self._write = self._empty()
        self._in_turn = asyncio.Lock()
        self._is_broken = False

    def record(self, span: Span) -> None:
        """Keep a span for the next commit."""
        self._write.spans.append(span)
        if span.status in SETTLED:
            self._settled.add(span.node_id)
            self._write.has_new_result = True

    def log(self, line: LogLine) -> None:
        """Keep a log line for the next commit."""
        self._write.logs.append(line)

    def holds_lease(self) -> bool:
        """Tell whether the lease is certain to last a moment longer."""
        return not self._is_broken and self._lease.is_held()

    @property
    def is_dirty(self) -> bool:
        """Whether something waits for the next commit."""
        return bool(self._write.spans or self._write.logs)

    async def commit(self) -> None:
        """Make everything recorded so far durable; raises `LeaseLost`."""
        async with self._in_turn:
            if self.is_dirty or self._is_broken:
                await self._submit(self._taken())

    async def end(self, ended: Ended) -> None:
        """Commit the end of this stretch of work, with all that came before it; raises `LeaseLost`."""
        async with self._in_turn:
            write = self._taken()
            write.end, write.error, write.due_at = ended.status, ended.error, ended.due_at
            if STATUS_AFTER[ended.status] in TERMINAL:
                write.inbox = self._inbox
            await self._submit(write)

    def _taken(self) -> RunWrite:
        write, self._write = self._write, self._empty()
        write.completed_nodes = len(self._settled)
        return write

    def _empty(self) -> RunWrite:
        execution_id, lane = self._lease.key
        return RunWrite(execution_id, lane, self._lease.token)

    async def _submit(self, write: RunWrite) -> None:
        if self._is_broken:
            raise LeaseLost
        try:
            await self._insist(write)
        except BaseException:
            # What this write held is gone, so nothing may follow it, even if the lease should hold again.
            self._is_broken = True
            raise

    async def _insist(self, write: RunWrite) -> None:
        while True:
            try:
                is_held = await self._answer_to(write)
            except DatabaseUnavailable:
                if not self._lease.is_held():
                    raise LeaseLost from None
                # The same write may be repeated: it names the token, and its rows replace themselves.
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if not is_held:
                raise LeaseLost
            return

    async def _answer_to(self, write: RunWrite) -> bool:
        """Tell whether the write was made; a run that has waited for that to the end of its lease is lost."""
        future = self._recorder.submit(write)
        self._break_off_without_lease(future)
        try:
            return await future
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise LeaseLost from None
        finally:
            self._overdue.cancel()

    def _break_off_without_lease(self, future: asyncio.Future[bool]) -> None:
        """Cancel the wait for an answer when the lease has ended, which a renewal puts off."""
        seconds = self._lease.until - time.monotonic()
        self._overdue = asyncio.get_running_loop().call_later(
            seconds, self._break_off_without_lease if seconds > 0 else asyncio.Future.cancel, future
        )
