"""Server-sent events of a run: its committed records, in order, after each commit.

The id of a span or log line is its sequence number, so a client continues behind the last one that it has
seen. The end of the run has the id `end`; a client that sends it gets 204, which ends its reconnections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.executions import execution_rows, execution_shapes
from gateway.http import errors, limits
from gateway.http.errors import ApiError
from journal.group_commit import GroupCommit
from models.errors import DatabaseUnavailable
from models.execution_status import TERMINAL_STATUSES
from telemetry import instruments

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from gateway.executions.execution_rows import Recorded, RunChanges
    from gateway.executions.large_outputs import LargeOutputs
    from gateway.executions.long_poll import ExecutionAccess, ExecutionPollHub, ExecutionWaiter
    from gateway.http.authentication import KeyAuthenticator
    from gateway.http.wire import WireStruct
    from journal.store import ExecutionKey
    from models.database import Database
    from models.execution import Execution

END: Final = "end"
KEEP_ALIVE_SECONDS: Final = 15.0
EVENTS_AT_ONCE: Final = 50
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
    ) -> None:
        self.database = database
        self.waiting = waiting
        self.large_outputs = large_outputs
        self._authenticator = authenticator
        self._access = access
        self.open = 0
        """Number of open streams."""
        self._heads: GroupCommit[ExecutionKey, Execution | None] = GroupCommit(self._read_heads)

    def stream(self, key: ExecutionKey, after: int) -> RunEventStream:
        """Return the stream of a run's spans, log lines and progress with sequence numbers above `after`.

        Raises a 503 error if 500 streams are open.
        """
        self._require_room()
        return RunEventStream(self, key, after)

    def stream_log(self, key: ExecutionKey, after: int, levels: Collection[str]) -> RunEventStream:
        """Return the stream of a run's log lines above `after`, of the given levels; empty means all levels.

        Raises a 503 error if 500 streams are open.
        """
        self._require_room()
        return RunEventStream(self, key, after, LogSelection(frozenset(levels)))

    def _require_room(self) -> None:
        if self.open >= limits.EVENT_STREAMS:
            raise errors.not_ready("Too many event streams are open here: poll the progress instead")

    async def close(self) -> None:
        """Wait for the queries that are in progress; open streams must have ended before."""
        await self._heads.drain()

    async def check_access(self, key: ExecutionKey, scope: Scope) -> None:
        """Raise the 401 or 404 error that a new request of the same client would get now.

        Keys may be revoked while a stream is open.
        """
        caller = await self._authenticator.caller(scope)
        await self._access.key(key.execution_id, caller)

    async def authenticate(self, scope: Scope) -> None:
        """Raise a 401 error if the client's key or session is no longer valid."""
        await self._authenticator.caller(scope)

    async def head(self, key: ExecutionKey) -> Execution | None:
        """Return the row of a run without its data, None if it is gone; concurrent calls share one query."""
        return await self._heads.submit(key)

    async def _read_heads(self, batch: Sequence[ExecutionKey]) -> Sequence[Execution | None]:
        async with self.database.read() as connection:
            found = await execution_rows.read_heads(connection, batch)
        return [found.get(key.execution_id) for key in batch]


@dataclass(frozen=True, slots=True)
class LogSelection:
    """Log lines alone, without spans and progress."""

    levels: frozenset[str]
    """Empty: all levels."""

    def has(self, row: Recorded) -> bool:
        return not self.levels or row.level in self.levels


class RunEventStream:
    """Event stream of one client, as an ASGI response."""

    def __init__(
        self, live: LiveEvents, key: ExecutionKey, after: int, selection: LogSelection | None = None
    ) -> None:
        """Create a stream of records above `after`.

        With a `selection`, only of its log lines and the end of the run.
        """
        self._selection = selection
        self._live = live
        self._key = key
        self._after = after
        self._shown: Execution | None = None
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        if scope["method"] != "HEAD":
            self._live.open += 1
            instruments.gauge("sse_clients").inc()
            if self._after > 0:
                instruments.counter("sse_resyncs_total").inc()
            try:
                await self._follow(scope, receive, send)
            finally:
                self._live.open -= 1
                instruments.gauge("sse_clients").dec()
        await send({"type": "http.response.body", "body": b""})

    async def _follow(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events of the run until it ends or the client leaves; between them, wait for changes."""
        with self._live.waiting.waiter(self._key.execution_id) as waiter:
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
            if not self._live.waiting.is_watched(self._key.execution_id):
                await self._live.waiting.watch([self._key.execution_id])
            head = await self._live.head(self._key)
            if head is None:
                return False
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
        shown = self._shown
        if shown is not None and shown.updated_at == head.updated_at:
            return
        has_moved = shown is None or shown.status != head.status or shown.progress != head.progress
        if head.status not in TERMINAL_STATUSES and has_moved and self._selection is None:
            await self._send(send, _encode_event("execution", execution_shapes.show_head(head)))
        is_all = False
        while not is_all:
            async with self._live.database.read() as connection:
                changes = await execution_rows.read_changes(
                    connection, self._key, self._after, at_most=EVENTS_AT_ONCE
                )
            is_all = changes.is_all
            await self._send(send, b"".join(self._events(changes)))
        self._shown = head
        if head.status in TERMINAL_STATUSES:
            await self._send(send, _encode_event("execution", execution_shapes.show_head(head), END))

    def _events(self, changes: RunChanges) -> list[bytes]:
        """Return the new records as encoded events in their order, without lines of other levels; note the
        last number as sent.
        """
        outputs = self._live.large_outputs.explain(self._key.execution_id)
        spans = [(row.sequence, "span", execution_shapes.show_span(row, outputs)) for row in changes.spans]
        lines = [(row.sequence, "log", execution_shapes.show_log(row)) for row in changes.logs]
        in_order = sorted([*spans, *lines], key=lambda event: event[0])
        if in_order:
            self._after = in_order[-1][0]
        if (selection := self._selection) is not None:
            shown = {row.sequence for row in changes.logs if selection.has(row)}
            in_order = [event for event in in_order if event[0] in shown]
        return [_encode_event(name, shape, str(sequence)) for sequence, name, shape in in_order]

    async def _keep_alive(self, send: Send) -> None:
        if asyncio.get_running_loop().time() - self._sent_at >= KEEP_ALIVE_SECONDS:
            await self._send(send, b": keep-alive\n\n")

    async def _send(self, send: Send, body: bytes) -> None:
        """Send bytes of the stream, and note the time; empty ones are not sent."""
        if body:
            self._sent_at = asyncio.get_running_loop().time()
            await send({"type": "http.response.body", "body": body, "more_body": True})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _encode_event(name: str, shape: WireStruct, event_id: str | None = None) -> bytes:
    head = f"id: {event_id}\n" if event_id is not None else ""
    return f"{head}event: {name}\ndata: ".encode() + _encode(shape) + b"\n\n"
