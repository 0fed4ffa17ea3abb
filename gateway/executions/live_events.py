"""Server-sent events of a run: its committed records, in order, after each commit.

The id of a span, log line or step of an agent is its sequence number, so a client continues behind the last
one that it has seen. The end of the run has the id `end`; a client that sends it gets 204, which ends its
reconnections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import msgspec
from msgspec import Struct

from engine.agents.agent_steps import StepKind, StepStatus
from execution.live_answers import COALESCE_SECONDS
from gateway.executions import agent_step_rows, execution_rows, execution_shapes
from gateway.executions.execution_shapes import StepQuestions, StepShape
from gateway.http import limits
from gateway.http.errors import ApiError
from gateway.http.shared_allowance import SharedAllowance
from journal.group_commit import GroupCommit
from models.errors import DatabaseUnavailable
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from telemetry import instruments

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection
    from starlette.types import Receive, Scope, Send

    from gateway.executions.agent_step_rows import StepFilter
    from gateway.executions.execution_rows import Recorded, RunChanges
    from gateway.executions.large_outputs import LargeOutputs
    from gateway.executions.live_answers import AnswerReader, LiveAnswerHub
    from gateway.executions.long_poll import ExecutionAccess, ExecutionPollHub, ExecutionWaiter
    from gateway.http.authentication import KeyAuthenticator
    from gateway.http.wire import WireStruct
    from journal.store import ExecutionKey
    from models.access import ApiCaller
    from models.database import Database
    from models.execution import Execution

END: Final = "end"
KEEP_ALIVE_SECONDS: Final = 15.0
EVENTS_AT_ONCE: Final = 50
MAX_UNCHECKED_SECONDS: Final = 10.0
"""Time after a check of the client's access for which texts are sent; streams that are read check it each second."""
HEADERS: Final = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
"""A buffering proxy would delay events. Every answer has `cache-control` anyway."""

_encode = msgspec.json.Encoder().encode


class LiveEvents:
    """Event streams of one gateway."""

    def __init__(
        self,
        database: Database,
        waiting: ExecutionPollHub,
        authenticator: KeyAuthenticator,
        access: ExecutionAccess,
        large_outputs: LargeOutputs,
        answers: LiveAnswerHub,
    ) -> None:
        self.database = database
        self.waiting = waiting
        self.large_outputs = large_outputs
        self.answers = answers
        self._authenticator = authenticator
        self._access = access
        self.streams = SharedAllowance(
            limits.EVENT_STREAMS, "Too many event streams are open here: poll the progress instead"
        )
        self._heads: GroupCommit[ExecutionKey, Execution | None] = GroupCommit(self._read_heads)

    def stream(self, key: ExecutionKey, caller: ApiCaller, after: int, source: EventSource) -> RunEventStream:
        """Return the stream of a run's records with sequence numbers above `after` from a source.

        Raises a 503 error if too many streams are open.
        """
        self.streams.require(caller.organization_id, caller.key_id)
        return RunEventStream(self, key, caller, after, source)

    async def close(self) -> None:
        """Wait for the queries that are in progress; open streams must have ended before."""
        await self._heads.drain()

    async def check_access(self, key: ExecutionKey, scope: Scope) -> None:
        """Raise the 401 or 404 error that a new request of the same client would get now.

        Keys may be revoked while a stream is open.
        """
        caller = await self._authenticator.caller(scope)
        await self._access.find_key(key.execution_id, caller)

    async def authenticate(self, scope: Scope) -> None:
        """Raise a 401 error if the client's key or session is no longer valid."""
        await self._authenticator.caller(scope)

    async def follow_answers(self, head: Execution) -> None:
        """Ask the process that executes a run for the texts of its models; nothing happens for a run that is
        not running.
        """
        is_running = head.status == ExecutionStatus.RUNNING
        await self.answers.follow(head.id, head.lease_owner if is_running and head.lease_owner else "")

    async def read_head(self, key: ExecutionKey) -> Execution | None:
        """Return the row of a run without its data, None if it is gone; concurrent calls share one query.
        Access is not checked.
        """
        return await self._heads.submit(key)

    async def _read_heads(self, batch: Sequence[ExecutionKey]) -> Sequence[Execution | None]:
        async with self.database.read() as connection:
            found = await execution_rows.read_heads(connection, batch)
        return [found.get(key.execution_id) for key in batch]


RecordEvent: TypeAlias = "tuple[int, str, WireStruct]"
"""Sequence number, name and shape of a record."""


class RecordBatch(Struct, frozen=True):
    """Records of a run in the order of their sequence numbers."""

    events: Sequence[RecordEvent]
    last: int
    """Sequence number behind which the next batch begins."""
    is_all: bool
    """Whether no further record is stored."""


class EventSource(Protocol):
    """Records of a run that one kind of stream sends."""

    @property
    def has_progress(self) -> bool:
        """Whether the stream also sends the progress of the run."""

    @property
    def answers(self) -> StepFilter | None:
        """Filter of the nodes for which the stream also sends the texts that models are writing; None for no texts."""

    async def read(self, connection: AsyncConnection, key: ExecutionKey, after: int) -> RecordBatch:
        """Return the next records with sequence numbers above `after`, at most `EVENTS_AT_ONCE` of each kind."""


class RunRecordSource(Struct, frozen=True):
    """All spans and log lines, and the progress of the run."""

    large_outputs: LargeOutputs
    has_progress: bool = True
    answers: StepFilter | None = None

    async def read(self, connection: AsyncConnection, key: ExecutionKey, after: int) -> RecordBatch:
        """Return the next spans and log lines with sequence numbers above `after`, at most 50 of each."""
        changes = await execution_rows.read_changes(connection, key, after, at_most=EVENTS_AT_ONCE)
        outputs = self.large_outputs.explain(key.execution_id)
        spans = ((row.sequence, "span", execution_shapes.show_span(row, outputs)) for row in changes.spans)
        return _merge([*spans, *_show_lines(changes.logs)], changes, after)


class LogLineSource(Struct, frozen=True):
    """Log lines alone."""

    levels: frozenset[str]
    """Empty: all levels."""
    has_progress: bool = False
    answers: StepFilter | None = None

    async def read(self, connection: AsyncConnection, key: ExecutionKey, after: int) -> RecordBatch:
        """Return the log lines of the wanted levels among the next 50 with sequence numbers above `after`."""
        changes = await execution_rows.read_changes(connection, key, after, at_most=EVENTS_AT_ONCE)
        lines = (row for row in changes.logs if not self.levels or row.level in self.levels)
        return _merge(list(_show_lines(lines)), changes, after)


class AgentStepSource(Struct, frozen=True):
    """Steps of agents, each in its newest state, and texts that models are writing."""

    wanted: StepFilter
    public_url: str
    has_progress: bool = False

    @property
    def answers(self) -> StepFilter:
        return self.wanted

    async def read(self, connection: AsyncConnection, key: ExecutionKey, after: int) -> RecordBatch:
        """Return the next wanted steps that have changed after sequence number `after`, at most 50, each in
        its newest state.
        """
        steps = await agent_step_rows.read_changed_steps(connection, key, self.wanted, after, EVENTS_AT_ONCE)
        nodes = await agent_step_rows.read_questions(connection, key, steps)
        questions = StepQuestions(self.public_url, key.execution_id, nodes)
        events = [(step.sequence, "step", execution_shapes.show_step(step, questions)) for step in steps]
        last = steps[-1].sequence if steps else after
        return RecordBatch(events, last, is_all=len(steps) < EVENTS_AT_ONCE)


def _show_lines(rows: Iterable[Recorded]) -> Iterable[RecordEvent]:
    return ((row.sequence, "log", execution_shapes.show_log(row)) for row in rows)


def _merge(events: Sequence[RecordEvent], changes: RunChanges, after: int) -> RecordBatch:
    """Return events sorted by sequence number as a batch that ends with the last record of `changes`, from which the
    events may be a selection, or at `after` if it has none.
    """
    last = max((row.sequence for row in (*changes.spans, *changes.logs)), default=after)
    return RecordBatch(sorted(events, key=lambda event: event[0]), last, changes.is_all)


class CheckedTexts(Struct):
    """Texts of one run for one client, which gets them only while its access is checked again and again."""

    reader: AnswerReader
    _checked_at: float = float("-inf")
    """Time of the last check."""

    def note_check(self) -> None:
        """Note that the client may see the run now; texts that have waited for this can be taken."""
        self._checked_at = asyncio.get_running_loop().time()
        self.reader.note_waiting()

    def note_refusal(self) -> None:
        """Note that the client may not see the run any more."""
        self._checked_at = float("-inf")

    def take(self) -> bytes:
        """Return the new texts as encoded events; they have no ids, since they can't be sent again.

        Empty if the client's access was checked more than ten seconds ago: the texts wait for the next check.
        """
        if asyncio.get_running_loop().time() - self._checked_at > MAX_UNCHECKED_SECONDS:
            return b""
        return b"".join(_encode_event(name, shape) for name, shape in self.reader.take())


class RunEventStream:
    """Event stream of one client, as an ASGI response."""

    def __init__(
        self, live: LiveEvents, key: ExecutionKey, caller: ApiCaller, after: int, source: EventSource
    ) -> None:
        """Create a stream of the records above `after` of a source, and of the end of the run."""
        self._source = source
        self._caller = caller
        self._live = live
        self._key = key
        self._after = after
        self._shown: Execution | None = None
        self._sent_at = 0.0
        self._texts: CheckedTexts | None = None
        self._order = asyncio.Lock()
        """Held while texts are taken and sent, so that no text overtakes an earlier one or its step."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "HEAD":
            await self._stream(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await send({"type": "http.response.body", "body": b""})

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head and the events, in a place that a smaller client may get: the stream then ends early."""
        caller = self._caller
        with (
            self._live.waiting.waiter(self._key.execution_id) as waiter,
            self._live.streams.take(caller.organization_id, caller.key_id, waiter.end),
        ):
            instruments.gauge("sse_clients").inc()
            if self._after > 0:
                instruments.counter("sse_resyncs_total").inc()
            try:
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                if self._source.answers is None:
                    await self._follow(waiter, scope, receive, send)
                else:
                    await self._follow_with_answers(self._source.answers, waiter, scope, receive, send)
            finally:
                instruments.gauge("sse_clients").dec()

    async def _follow_with_answers(
        self, wanted: StepFilter, waiter: ExecutionWaiter, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Send the events of the run until it ends or the client leaves, and beside them the texts that
        models are writing.
        """
        with self._live.answers.reader(self._key.execution_id, wanted) as reader:
            self._texts = CheckedTexts(reader)
            sending = asyncio.create_task(self._send_answers(self._texts, send))
            try:
                await self._follow(waiter, scope, receive, send)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _send_answers(self, texts: CheckedTexts, send: Send) -> None:
        """Send texts as they grow until canceled; a client that reads slowly gets more of them at once."""
        while True:
            await texts.reader.changed.wait()
            async with self._order:
                await self._send(send, texts.take())
            await asyncio.sleep(COALESCE_SECONDS)

    async def _follow(self, waiter: ExecutionWaiter, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events of the run until it ends or the client leaves; between them, wait for changes."""
        client = asyncio.create_task(_until_gone(receive))
        client.add_done_callback(lambda _: waiter.end())
        try:
            while not waiter.is_over and await self._send_changes(waiter, scope, send):
                await waiter.changed.wait()
        finally:
            client.cancel()

    async def _send_changes(self, waiter: ExecutionWaiter, scope: Scope, send: Send) -> bool:
        """Send the events since the last call; return False if none will follow.

        None follow after the end of the run, or if the client may not see it any more. While the database is
        away, nothing is sent and it returns True.
        """
        waiter.changed.clear()
        try:
            await self._live.check_access(self._key, scope)
            if self._texts is not None:
                self._texts.note_check()
            if not self._live.waiting.is_watched(self._key.execution_id):
                await self._live.waiting.watch([self._key.execution_id])
            head = await self._live.read_head(self._key)
            if head is None:
                return False
            if self._texts is not None:
                await self._live.follow_answers(head)
            await self._send_records(head, send)
        except ApiError:
            return False
        except DatabaseUnavailable:
            pass  # the next attempt, a second later, sends the same events
        else:
            if head.status in TERMINAL_STATUSES:
                self._live.waiting.wake_waiters(self._key.execution_id)
                return False
        await self._keep_alive(send)
        return True

    async def _send_records(self, head: Execution, send: Send) -> None:
        """Send the progress of the run, if the source has it, and the records since the last call; after the end of the
        run, also its outcome, with the event id `end`.

        Nothing is read or sent if the row of the run has not changed.
        """
        shown = self._shown
        if shown is not None and shown.updated_at == head.updated_at:
            return
        has_moved = shown is None or shown.status != head.status or shown.progress != head.progress
        if head.status not in TERMINAL_STATUSES and has_moved and self._source.has_progress:
            await self._send(send, _encode_event("execution", execution_shapes.show_head(head)))
        is_all = False
        while not is_all:
            async with self._live.database.read() as connection:
                batch = await self._source.read(connection, self._key, self._after)
            is_all, self._after = batch.is_all, batch.last
            await self._send_batch(batch, send)
        self._shown = head
        if head.status in TERMINAL_STATUSES:
            await self._send(send, _encode_event("execution", execution_shapes.show_head(head), END))

    async def _send_batch(self, batch: RecordBatch, send: Send) -> None:
        """Send records as events; texts that models are writing are sent before the steps that record them."""
        encoded = [_encode_event(name, shape, str(sequence)) for sequence, name, shape in batch.events]
        if self._texts is None:
            await self._send(send, b"".join(encoded))
            return
        async with self._order:
            texts = self._texts.take()
            for _, _, shape in batch.events:
                if isinstance(shape, StepShape) and _is_answer(shape):
                    self._texts.reader.note_recorded((shape.node_id, shape.iteration), shape.number)
            await self._send(send, texts + b"".join(encoded))

    async def _keep_alive(self, send: Send) -> None:
        if asyncio.get_running_loop().time() - self._sent_at >= KEEP_ALIVE_SECONDS:
            await self._send(send, b": keep-alive\n\n")

    async def _send(self, send: Send, body: bytes) -> None:
        """Send bytes of the stream, and note the time; empty ones are not sent."""
        if body:
            self._sent_at = asyncio.get_running_loop().time()
            await send({"type": "http.response.body", "body": body, "more_body": True})


def _is_answer(step: StepShape) -> bool:
    return step.kind == StepKind.MODEL and step.status == StepStatus.COMPLETED


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _encode_event(name: str, shape: WireStruct, event_id: str | None = None) -> bytes:
    head = f"id: {event_id}\n" if event_id is not None else ""
    return f"{head}event: {name}\ndata: ".encode() + _encode(shape) + b"\n\n"
