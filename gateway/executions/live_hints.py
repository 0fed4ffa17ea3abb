"""Hints for pages of the dashboard: one event stream per tab, which says that something has changed, never what.

The page asks again with its own rights, so that a hint can't show anything, and a lost one costs a reload. The same
stream carries the texts that the models of one run are writing. These are data, so the client's access to the run is
checked once a second while they are sent.
Changes of single runs come from the broker's watches. Lists have a version that is read five times a second, once
for all streams of an organization, from the newest rows alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec
import structlog
from msgspec import Struct, field
from sqlalchemy import and_, func, select
from sqlmodel import col

from gateway.executions.agent_step_rows import StepFilter
from gateway.executions.live_events import HEADERS, CheckedTexts
from gateway.http import errors, limits
from gateway.http.errors import ApiError
from gateway.http.shared_allowance import SharedAllowance
from models.errors import DatabaseUnavailable
from models.execution import Execution, ExecutionData
from models.execution_status import TERMINAL_STATUSES
from models.ingest import Delivery, RejectedRequestSample
from models.run_hour import ALL_WORKFLOWS, RunHour

if TYPE_CHECKING:
    from sqlalchemy import Select
    from starlette.types import Receive, Scope, Send

    from gateway.executions.live_events import LiveEvents
    from journal.store import ExecutionKey
    from models.access import ApiCaller

log = structlog.get_logger()

EXECUTIONS: Final = "executions"
DELIVERIES: Final = "deliveries"
LISTS: Final = frozenset({EXECUTIONS, DELIVERIES})
"""Topics of lists of an organization."""
EXECUTION: Final = "execution:"
TEXTS: Final = "texts:"
"""Beginning of the topic of a run with the texts of its models."""
QUEUE_LENGTH: Final = 256
"""Hints that wait for a slow client; a client with more is asked to load everything again."""
PING_SECONDS: Final = 15.0
LOOK_SECONDS: Final = 0.2
"""Interval at which the version of a list is read while a stream waits for it."""
SECONDS_OF_A_LIST: Final = 0.01
"""Interval for each watched list of a process: a hundred reads a second serve any number of organizations."""
RECENT: Final = timedelta(minutes=1)
"""Age of a change up to which a new stream begins with a hint: the page may be older than the change."""
WATCHED_ROWS: Final = 50
"""Newest rows of a list of an organization whose changes count as a change of the list."""

_TOO_MANY: Final = "Too many event streams are open here: load the page again instead"

TakeTexts: TypeAlias = Callable[[], bytes]
"""Function that returns new texts as encoded events."""

_encode = msgspec.json.Encoder().encode


class LiveHint(msgspec.Struct):
    """Hint that an object of a topic has changed."""

    topic: str
    id: str
    """Id of the object; empty for a list."""
    version: str
    """Text that differs after each change."""


class HintTopics(Struct, frozen=True):
    """Objects that one stream has hints about."""

    runs: Sequence[ExecutionKey] = ()
    lists: Collection[str] = ()
    texts: ExecutionKey | None = None
    """The one of the runs whose texts are sent while models write them."""


class HintQueue(Struct, eq=False):
    """Hints for one client: the newest of each topic, and at most 256."""

    waiting: dict[str, LiveHint] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: bool = False
    has_overflowed: bool = False

    def put(self, hint: LiveHint) -> None:
        """Add a hint in place of an older one about the same object.

        If 256 wait, these are dropped, and the next `take` asks the client to load everything again.
        """
        if len(self.waiting) >= QUEUE_LENGTH:
            self.waiting.clear()
            self.has_overflowed = True
        self.waiting[f"{hint.topic} {hint.id}"] = hint
        self.changed.set()

    def take(self) -> bytes:
        """Return all waiting hints as encoded events and clear them; a `resync` event in their place if some
        were dropped.
        """
        self.changed.clear()
        hints, self.waiting = list(self.waiting.values()), {}
        if self.has_overflowed:
            self.has_overflowed = False
            return b"event: resync\ndata: {}\n\n"
        return b"".join(b"event: hint\ndata: " + _encode(hint) + b"\n\n" for hint in hints)

    def end(self) -> None:
        """End the stream that reads the queue."""
        self.is_over = True
        self.changed.set()


class ListWatch(Struct, eq=False):
    """Queues of one organization that wait for changes of one of its lists."""

    queues: set[HintQueue] = field(default_factory=set)
    task: asyncio.Task[None] | None = None
    version: str = ""
    changed_at: datetime | None = None
    """Time of the newest change that the version counts."""


class LiveHints:
    """Streams of hints of one gateway."""

    def __init__(self, live_events: LiveEvents) -> None:
        self._live_events = live_events
        self._lists: dict[tuple[str, str], ListWatch] = {}
        """Watches by topic and organization."""
        self._queues: set[HintQueue] = set()
        self._is_released = False
        self.streams = SharedAllowance(limits.EVENT_STREAMS, _TOO_MANY)

    def release(self) -> None:
        """End all streams, because the process is about to stop; clients connect again, to another process."""
        self._is_released = True
        for queue in self._queues:
            queue.end()

    async def close(self) -> None:
        """End all streams, and stop to follow lists."""
        self.release()
        tasks = [watch.task for watch in self._lists.values() if watch.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def stream(self, caller: ApiCaller, topics: HintTopics) -> HintStream:
        """Return a stream of hints about topics as an ASGI response; a hint names a changed object, but not the change.

        Raises a 503 error if too many streams are open here, or the process stops.
        """
        if self._is_released:
            raise errors.not_ready(_TOO_MANY)
        self.streams.require(caller.organization_id, caller.key_id)
        return HintStream(self, caller, topics)

    async def have_ended(self, runs: Sequence[ExecutionKey]) -> bool:
        """Return whether none of these runs can change any more: each has ended or is gone."""
        heads = await asyncio.gather(*map(self._live_events.read_head, runs))
        return all(head is None or head.status in TERMINAL_STATUSES for head in heads)

    async def follow(self, queue: HintQueue, caller: ApiCaller, topics: HintTopics) -> None:
        """Put hints about changes of runs, and of lists of the caller's organization, into a queue until canceled.

        If the topics have no lists, it ends the queue and returns when all runs have ended. The caller's access to the
        runs was checked before. Clients of one organization share the queries of a list.
        """
        self._queues.add(queue)
        following = [asyncio.create_task(self._follow_run(queue, key)) for key in topics.runs]
        lists = topics.lists
        for topic in lists:
            self._join_list(queue, topic, caller.organization_id)
        try:
            await asyncio.gather(*following)
            if lists:
                await asyncio.Event().wait()
            queue.end()
        finally:
            self._queues.discard(queue)
            for topic in lists:
                self._leave_list(queue, topic, caller.organization_id)
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)

    @contextmanager
    def open_texts(self, queue: HintQueue, run: ExecutionKey | None, scope: Scope) -> Iterator[TakeTexts]:
        """Yield a function that returns the new texts of a run as encoded events, each once; empty for none and without
        a run.

        During the block, the queue is notified of new texts, and it ends if the client may not see the run any more.
        """
        if run is None:
            yield bytes
            return
        with self._live_events.answers.reader(run.execution_id, StepFilter(), queue.changed) as reader:
            texts = CheckedTexts(reader)
            following = asyncio.create_task(self._follow_texts(queue, texts, run, scope))
            try:
                yield texts.take
            finally:
                following.cancel()

    async def check(self, scope: Scope) -> None:
        """Raise a 401 error if the client's key or session is no longer valid."""
        await self._live_events.authenticate(scope)

    # ── single runs ─────────────────────────────────────────────────────────────────────────────────────────

    async def _follow_run(self, queue: HintQueue, key: ExecutionKey) -> None:
        """Put a hint into the queue after each change of a run, until the run has ended or is gone.

        It begins with a hint if the run has changed within the last minute, since the page may be older.
        """
        events, shown = self._live_events, ""
        with events.waiting.waiter(key.execution_id) as waiter:
            while not waiter.is_over:
                waiter.changed.clear()
                try:
                    if not events.waiting.is_watched(key.execution_id):
                        await events.waiting.watch([key.execution_id])
                    head = await events.read_head(key)
                except DatabaseUnavailable:
                    await waiter.changed.wait()
                    continue
                if head is None:
                    return
                version = head.updated_at.isoformat()
                # A page that was made before the stream may lack a change of that time.
                if version != shown and (shown or self._is_recent(head.updated_at)):
                    queue.put(LiveHint(f"{EXECUTION}{key.execution_id}", key.execution_id, version))
                shown = version
                if head.status in TERMINAL_STATUSES:
                    return
                await waiter.changed.wait()

    async def _follow_texts(
        self, queue: HintQueue, texts: CheckedTexts, key: ExecutionKey, scope: Scope
    ) -> None:
        """Check the client's access to a run once a second, and ask the process that executes it for its texts, until
        it has ended.

        If the client may not see the run any more, the queue ends.
        """
        events = self._live_events
        with events.waiting.waiter(key.execution_id) as waiter:
            while not waiter.is_over:
                waiter.changed.clear()
                with suppress(DatabaseUnavailable):
                    try:
                        await events.check_access(key, scope)
                    except ApiError:
                        texts.note_refusal()
                        queue.end()  # the client connects again, and gets the reason
                        return
                    texts.note_check()
                    if not events.waiting.is_watched(key.execution_id):
                        await events.waiting.watch([key.execution_id])
                    head = await events.read_head(key)
                    if head is None or head.status in TERMINAL_STATUSES:
                        return
                    await events.follow_answers(head)
                await waiter.changed.wait()

    # ── lists ───────────────────────────────────────────────────────────────────────────────────────────────

    def _join_list(self, queue: HintQueue, topic: str, organization_id: str) -> None:
        """Add a queue to those that are notified of changes of a list, with a hint if it has changed within the last
        minute; the first one starts the watch.
        """
        watch = self._lists.setdefault((topic, organization_id), ListWatch())
        watch.queues.add(queue)
        if watch.version and self._is_recent(watch.changed_at):
            queue.put(LiveHint(topic, "", watch.version))
        if watch.task is None:
            watch.task = asyncio.create_task(self._watch_list(topic, organization_id, watch))

    def _leave_list(self, queue: HintQueue, topic: str, organization_id: str) -> None:
        """Remove a queue from those of a list; the last one ends the watch."""
        watch = self._lists.get((topic, organization_id))
        if watch is None:
            return
        watch.queues.discard(queue)
        if not watch.queues and watch.task is not None:
            watch.task.cancel()
            del self._lists[topic, organization_id]

    async def _watch_list(self, topic: str, organization_id: str, watch: ListWatch) -> None:
        """Read the version of a list until canceled, and put a hint into all queues of its watch after each change.

        It is read every 0.2 seconds, less often with many lists, and not while the database is unavailable. The first
        read gives a hint only for a recent change.
        """
        statements = _STATEMENTS[topic](organization_id)
        while True:
            with suppress(DatabaseUnavailable):
                version, watch.changed_at = await self._read_version(statements)
                if version != watch.version and (watch.version or self._is_recent(watch.changed_at)):
                    for queue in watch.queues:
                        queue.put(LiveHint(topic, "", version))
                watch.version = version
            await asyncio.sleep(max(LOOK_SECONDS, SECONDS_OF_A_LIST * len(self._lists)))

    async def _read_version(
        self, statements: Sequence[Select[*tuple[Any, ...]]]
    ) -> tuple[str, datetime | None]:
        """Return a hash of the rows of these statements, the version of a list, and the time of its newest
        change, None for an empty list.
        """
        async with self._live_events.database.read() as connection:
            rows = [tuple(row) for one in statements for row in (await connection.execute(one)).all()]
        version = blake2b(repr(rows).encode(), digest_size=12).hexdigest()
        return version, max(
            (value for row in rows for value in row if isinstance(value, datetime)), default=None
        )

    def _is_recent(self, changed_at: datetime | None) -> bool:
        return changed_at is not None and self._live_events.database.clock.now() - changed_at < RECENT


def _newest_runs(organization_id: str) -> Sequence[Select[*tuple[Any, ...]]]:
    """Return the statements that read the version of the list of runs: the 50 newest runs of an organization with their
    last change, and its failed runs by hour.

    Failed runs are counted by hour some seconds after the end of a run.
    """
    newest = (
        select(col(Execution.id), col(Execution.updated_at))
        .join(
            ExecutionData,
            and_(
                col(ExecutionData.execution_id) == col(Execution.id),
                col(ExecutionData.shard) == col(Execution.shard),
            ),
        )
        .where(col(ExecutionData.organization_id) == organization_id)
        .order_by(col(ExecutionData.created_at).desc(), col(ExecutionData.execution_id).desc())
        .limit(WATCHED_ROWS)
    )
    failed = select(col(RunHour.starts_at), col(RunHour.failed)).where(
        col(RunHour.organization_id) == organization_id, col(RunHour.workflow_id) == ALL_WORKFLOWS
    )
    return newest, failed


def _newest_deliveries(organization_id: str) -> Sequence[Select[*tuple[Any, ...]]]:
    """Return the statements that read the version of the list of deliveries: the 50 newest deliveries of an
    organization, and the newest sample of a refused request.
    """
    newest = (
        select(col(Delivery.id), col(Delivery.created_at))
        .where(col(Delivery.organization_id) == organization_id)
        .order_by(col(Delivery.created_at).desc(), col(Delivery.id).desc())
        .limit(WATCHED_ROWS)
    )
    refused = select(func.max(col(RejectedRequestSample.created_at))).where(
        col(RejectedRequestSample.organization_id) == organization_id
    )
    return newest, refused


_STATEMENTS: Final[Mapping[str, Callable[[str], Sequence[Select[*tuple[Any, ...]]]]]] = {
    EXECUTIONS: _newest_runs,
    DELIVERIES: _newest_deliveries,
}
"""Queries of the rows whose change is a change of a list, by topic."""


class HintStream:
    """Stream of hints of one client, as an ASGI response."""

    def __init__(self, live: LiveHints, caller: ApiCaller, topics: HintTopics) -> None:
        self._live = live
        self._caller = caller
        self._topics = topics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "HEAD":
            await self._run(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await send({"type": "http.response.body", "body": b""})

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head and the hints, in a place that a smaller client may get: the stream then ends early."""
        queue, caller = HintQueue(), self._caller
        with (
            self._live.streams.take(caller.organization_id, caller.key_id, queue.end),
            self._live.open_texts(queue, self._topics.texts, scope) as take_texts,
        ):
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await self._send_hints(queue, take_texts, scope, receive, send)

    async def _send_hints(
        self, queue: HintQueue, take_texts: TakeTexts, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Send hints, and texts behind them, until the queue ends, the client leaves, or its key is no longer valid.

        The key is checked every 15 seconds; if the database is unavailable then, the stream ends, too.
        """
        following = asyncio.create_task(self._live.follow(queue, self._caller, self._topics))
        gone = asyncio.create_task(_until_gone(receive))
        gone.add_done_callback(lambda _: queue.end())
        loop = asyncio.get_running_loop()
        checks_at = loop.time() + PING_SECONDS
        try:
            body = b": open\n\n"
            while not queue.is_over:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(checks_at):
                        await queue.changed.wait()
                # Also while hints come faster than pings.
                if loop.time() >= checks_at:
                    await self._live.check(scope)
                    checks_at = loop.time() + PING_SECONDS
                # Texts last: the page that a hint loads may show the end of an earlier one.
                body = (queue.take() + take_texts()) or b": ping\n\n"
        except (ApiError, DatabaseUnavailable):
            pass  # the client connects again, and gets the reason
        finally:
            for task in (following, gone):
                task.cancel()
            await asyncio.gather(following, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
