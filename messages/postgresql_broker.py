"""Broker over PostgreSQL, for servers without Redis: wakeups are rows, and LISTEN/NOTIFY announces them.

Each process has a session of its own that listens, so it connects past a pooler that shares sessions. The tables are
not logged: a crash of PostgreSQL empties them, and sweeps find the work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import asyncpg
import msgspec
import structlog
from msgspec.structs import asdict

from concurrency.shielded_opening import open_shielded
from json_text import decoding
from messages import deployer_messages, mail_parser_wakeup, worker_wakeup
from messages.broker import (
    GATEWAYS,
    NO_GRANTS,
    WATCH_SECONDS,
    BrokerUnavailable,
    ChangedExecutions,
    DirectMessage,
    DirectRuns,
    Notification,
    SlotGrant,
)
from messages.mail_parser_wakeup import MailParserWakeup
from messages.token_buckets import TokenDemand, TokenGrant, grant_tokens
from messages.wakeup_worker import parse_wakeup
from messages.wakeups import NotificationListeners
from messages.worker_wakeup import ALL_SHARDS, WorkerWakeup
from models.ended_execution import EndedExecution
from telemetry.process_activity import ACTIVITY, BROKER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from messages.deployer_messages import DeployerMessage

CONNECTIONS: Final = 4
ANSWER_SECONDS: Final = 2.0
LISTEN_SECONDS: Final = 2.0
CHECK_SECONDS: Final = 5.0
"""Interval at which a listening session is probed, and queues are read whose notification was lost."""
CLEANUP_CHECKS: Final = 12
KEPT_SECONDS: Final = 3_600
"""Time after which messages that nobody takes are deleted."""
RECONNECT_SECONDS: Final = 1.0
TAKEN_TOGETHER: Final = 10
IDS_TOGETHER: Final = 50
MAX_PAYLOAD_BYTES: Final = 7_500
"""PostgreSQL refuses payloads of 8,000 bytes; larger messages are rows."""

CONNECTION_FAILURES: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # of a session that ends while the pool resets it
    OSError,
)
QUEUE_CHANNEL: Final = "pilotflame_queue"
CHANGES_CHANNEL: Final = "pilotflame_changes"
DIRECT_QUEUE: Final = "direct"

# A worker claims after taking a wakeup out of the queue, and so sees everything that was committed before.
PUT: Final = """
WITH put AS (
    INSERT INTO broker_message (queue, key, body, created_at)
    VALUES ($1, $2, $3, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)
    ON CONFLICT (queue, key) DO NOTHING RETURNING queue
)
SELECT pg_notify($4, $5) FROM put
"""
TAKE: Final = """
WITH taken AS (
    DELETE FROM broker_message WHERE (queue, key) IN (
        SELECT queue, key FROM broker_message WHERE queue = $1 ORDER BY created_at, key LIMIT $2
        FOR UPDATE SKIP LOCKED
    ) RETURNING created_at, key, body
)
SELECT body FROM taken ORDER BY created_at, key
"""
TAKE_ONE: Final = "DELETE FROM broker_message WHERE queue = $1 AND key = $2 RETURNING body"
# The listening session of a channel holds this lock.
IS_HEARD: Final = """
SELECT EXISTS (
    SELECT FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND objsubid = 1
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND ((classid::bigint << 32) | objid::bigint) = $1
)
"""
FILL_BUCKETS: Final = """
INSERT INTO rate_bucket (bucket, full_at) SELECT bucket, 0 FROM unnest($1::text[]) AS bucket ORDER BY bucket
ON CONFLICT DO NOTHING
"""
LOCK_BUCKETS: Final = """
SELECT bucket, full_at / 1000000.0::float8 AS full_at, extract(epoch FROM clock_timestamp())::float8 AS now
FROM rate_bucket WHERE bucket = ANY($1) ORDER BY bucket FOR UPDATE
"""
SET_BUCKETS: Final = """
UPDATE rate_bucket SET full_at = given.full_at
FROM unnest($1::text[], $2::bigint[]) AS given(bucket, full_at) WHERE rate_bucket.bucket = given.bucket
"""
CLEAN_UP: Final = (
    "DELETE FROM broker_message WHERE created_at < (extract(epoch FROM clock_timestamp()) - $1::float8) * 1e6",
    "DELETE FROM rate_bucket WHERE full_at < (extract(epoch FROM clock_timestamp()) - $1::float8) * 1e6",
)

log = structlog.get_logger()


class _ChangedPairs(msgspec.Struct):
    """Changed executions, each with the channel that is notified without a watch, or an empty text."""

    pairs: list[tuple[str, str]]


class _DirectPayload(msgspec.Struct):
    """Direct message in a notification, or the key of the row that has it."""

    message: dict[str, str] | None = None
    row: str = ""
    """Key of the row of a message that is too large for a notification."""


@asynccontextmanager
async def _check_answer() -> AsyncIterator[None]:
    """Raise `BrokerUnavailable` for failures of PostgreSQL in the block, or if it takes over two seconds."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            yield
    except CONNECTION_FAILURES as error:
        ACTIVITY.note_failure(BROKER, error)
        raise BrokerUnavailable(str(error) or "PostgreSQL did not answer in time") from error


class PostgresqlBroker:
    """Broker of one process, by tables and notifications of PostgreSQL; implements `messages.broker.Broker`."""

    uses_redis = False

    def __init__(self, url: str, pool: asyncpg.Pool, *, channel: str, is_gateway: bool = False) -> None:
        self.channel = channel
        self._channels = (channel, GATEWAYS) if is_gateway else (channel,)
        self._url = url
        self._pool = pool
        self._listeners = NotificationListeners()
        self._watched_until: dict[str, float] = {}
        self._consumers: dict[str, Callable[[Mapping[str, object]], None]] = {}
        self._drains: dict[str, asyncio.Task[None]] = {}
        self._is_due: set[str] = set()
        self._receipts: set[asyncio.Task[None]] = set()
        self._listening: asyncio.Task[None] | None = None
        self._is_channel_open = asyncio.Event()

    # ── queues ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def wake_workers(self, shard: int = ALL_SHARDS) -> None:
        await self._put(worker_wakeup.QUEUE, str(shard), asdict(WorkerWakeup(shard=shard)))

    def receive_direct(self, on_runs: Callable[[DirectRuns], None]) -> None:
        """Do nothing: runs are claimed, since nothing is granted."""

    async def send_direct(self, worker: str, message: DirectRuns) -> bool:  # noqa: ARG002 - see receive_direct
        """Return False: no run is assigned over PostgreSQL."""
        return False

    async def wake_mail_parsers(self) -> None:
        await self._put(mail_parser_wakeup.QUEUE, "all", asdict(MailParserWakeup()))

    async def notify_deployer(self, message: DeployerMessage) -> None:
        await self._put(deployer_messages.QUEUE, message.key, deployer_messages.encode_message(message))

    def start_worker(self, on_wakeup: Callable[[int], None]) -> None:
        self._consume(worker_wakeup.QUEUE, lambda payload: on_wakeup(parse_wakeup(payload).shard))

    async def stop_worker(self) -> None:
        await self._stop_consuming(worker_wakeup.QUEUE)

    def start_mail_parser(self, on_wakeup: Callable[[], None]) -> None:
        self._consume(mail_parser_wakeup.QUEUE, lambda _payload: on_wakeup())

    async def stop_mail_parser(self) -> None:
        await self._stop_consuming(mail_parser_wakeup.QUEUE)

    def start_deployer(self, on_message: Callable[[DeployerMessage], None]) -> None:
        def take(payload: Mapping[str, object]) -> None:
            message = deployer_messages.parse_message(payload)
            if message is not None:
                on_message(message)

        self._consume(deployer_messages.QUEUE, take)

    async def stop_deployer(self) -> None:
        await self._stop_consuming(deployer_messages.QUEUE)

    async def _put(self, queue: str, key: str, payload: Mapping[str, object]) -> None:
        """Put a message into a queue, and notify its consumers, unless one with the same key is still in it.

        Raises `BrokerUnavailable`.
        """
        body = msgspec.json.encode(payload).decode()
        async with _check_answer():
            await self._pool.execute(PUT, queue, key, body, QUEUE_CHANNEL, queue)

    def _consume(self, queue: str, take: Callable[[Mapping[str, object]], None]) -> None:
        """Start to call `take` on the event loop for each message of a queue, also those that are in it already."""
        self._consumers[queue] = take
        self._start_listening()
        self._drain(queue)

    async def _stop_consuming(self, queue: str) -> None:
        self._consumers.pop(queue, None)
        drain = self._drains.pop(queue, None)
        if drain is not None:
            await asyncio.gather(drain, return_exceptions=True)

    def _drain(self, queue: str) -> None:
        """Take all messages of a queue in the background, if it has a consumer; once more if it is called
        meanwhile.
        """
        self._is_due.add(queue)
        if queue in self._consumers and queue not in self._drains:
            self._drains[queue] = asyncio.create_task(self._take_all(queue))

    async def _take_all(self, queue: str) -> None:
        """Remove the messages of a queue in batches, and then pass them to its consumer, until the queue is empty or
        has no consumer, or PostgreSQL fails.

        Each is passed at most once: a removed message is lost if the process or its consumer fails. The next check,
        within five seconds, reads the queue again.
        """
        loop = asyncio.get_running_loop()
        try:
            while queue in self._consumers and queue in self._is_due:
                self._is_due.discard(queue)
                bodies = await self._pool.fetch(TAKE, queue, TAKEN_TOGETHER, timeout=ANSWER_SECONDS)
                if len(bodies) == TAKEN_TOGETHER:
                    self._is_due.add(queue)
                for row in bodies:
                    take = self._consumers.get(queue)
                    if take is not None:
                        loop.call_soon(take, decoding.decode(row["body"], dict[str, Any]))
        except CONNECTION_FAILURES as error:
            log.debug("queue not read", queue=queue, error=str(error))  # It is read again at the next check.
        finally:
            if self._drains.get(queue) is asyncio.current_task():
                del self._drains[queue]

    # ── notifications ───────────────────────────────────────────────────────────────────────────────────────────

    async def watch(self, execution_ids: Sequence[str]) -> None:
        """Watch executions for 15 minutes, as `Broker.watch` describes.

        Every process hears of all changes, and delivers those that it watches. Raises `BrokerUnavailable` if
        the listening session is not connected.
        """
        if not execution_ids:
            return
        now = asyncio.get_running_loop().time()
        for execution_id in execution_ids:
            self._watched_until.pop(execution_id, None)
            self._watched_until[execution_id] = now + WATCH_SECONDS
        while self._watched_until:
            first = next(iter(self._watched_until))
            if self._watched_until[first] > now:
                break
            del self._watched_until[first]
        if self._listening is not None and not self._is_channel_open.is_set():
            raise BrokerUnavailable("the session that listens is not connected")
        if self._listening is None:
            await self.ping()

    async def publish(
        self,
        channels: Mapping[str, str],
        outcomes: Sequence[EndedExecution] = (),  # noqa: ARG002 - too large for notifications of 8,000 bytes
        grants: Mapping[str, SlotGrant] = NO_GRANTS,  # noqa: ARG002 - all runs are claimed
    ) -> None:
        """Notify all processes of changed executions; outcomes and grants are not sent. Raises `BrokerUnavailable`."""
        if not channels:
            return
        pairs = [*channels.items()]
        payloads = [
            msgspec.json.encode(_ChangedPairs(pairs[start : start + IDS_TOGETHER])).decode()
            for start in range(0, len(pairs), IDS_TOGETHER)
        ]
        async with _check_answer():
            await self._pool.execute(
                "SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payload", CHANGES_CHANNEL, payloads
            )

    async def send(self, channel: str, message: Mapping[str, str]) -> None:
        """Send a direct message as a notification, or one over 7,500 bytes as a row that the notification names."""
        payload = msgspec.json.encode(_DirectPayload(dict(message)))
        target = _channel_name(channel)
        async with _check_answer():
            if len(payload) <= MAX_PAYLOAD_BYTES:
                await self._pool.execute("SELECT pg_notify($1, $2)", target, payload.decode())
                return
            key = str(uuid4())
            announced = msgspec.json.encode(_DirectPayload(row=key)).decode()
            await self._pool.execute(PUT, DIRECT_QUEUE, key, payload.decode(), target, announced)

    async def is_heard(self, channel: str) -> bool:
        async with _check_answer():
            return bool(await self._pool.fetchval(IS_HEARD, _lock_key(channel)))

    async def listen(
        self, on_notification: Callable[[Notification], None], *, subject: str | None = None
    ) -> None:
        self._listeners.add(on_notification, subject)
        self._start_listening()
        with suppress(TimeoutError):
            async with asyncio.timeout(LISTEN_SECONDS):
                await self._is_channel_open.wait()

    def _start_listening(self) -> None:
        if self._listening is None:
            self._listening = asyncio.create_task(self._keep_listening())

    async def _keep_listening(self) -> None:
        """Keep a listening session open: connect again a second after each loss."""
        is_lost = False
        while True:
            try:
                connection = await _open_session(
                    self._url, timeout=ANSWER_SECONDS, command_timeout=ANSWER_SECONDS
                )
                try:
                    await self._receive_notifications(connection)
                finally:
                    self._is_channel_open.clear()
                    connection.terminate()
            except CONNECTION_FAILURES as error:
                if not is_lost:
                    log.warning("channel closed", channel=self.channel, error=str(error))
                is_lost = True
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _receive_notifications(self, connection: asyncpg.Connection) -> None:
        """Receive notifications on a session until it ends, and hold the lock that shows that the channel is heard.

        Every five seconds, the queues are read, lest a notification be missed, and the lock is requested again, since
        an earlier session may have had it. Each minute, outdated rows of the queues are deleted. Raises the errors of
        asyncpg, and `TimeoutError` if the session does not answer in time.
        """
        await connection.add_listener(QUEUE_CHANNEL, lambda *given: self._drain(given[3]))
        await connection.add_listener(CHANGES_CHANNEL, lambda *given: self._deliver_changes(given[3]))
        for channel in self._channels:
            await connection.add_listener(
                _channel_name(channel), lambda *given: self._deliver_direct(given[3])
            )
        # Locks of one session count: a predecessor of the same name may not be gone yet.
        await connection.execute("SELECT pg_try_advisory_lock($1)", _lock_key(self.channel))
        self._is_channel_open.set()
        log.info("channel open", channel=self.channel)
        lost = asyncio.Event()
        connection.add_termination_listener(lambda _connection: lost.set())
        checks = 0
        while not lost.is_set():
            for queue in tuple(self._consumers):
                self._drain(queue)
            with suppress(TimeoutError):
                await asyncio.wait_for(lost.wait(), CHECK_SECONDS)
            await connection.execute("SELECT pg_try_advisory_lock($1)", _lock_key(self.channel))
            checks += 1
            if checks % CLEANUP_CHECKS == 0:
                for statement in CLEAN_UP:
                    await connection.execute(statement, KEPT_SECONDS)

    def _deliver_changes(self, payload: str) -> None:
        """Deliver the changed executions that this process watches, which ends their watches,
        or that name its channel.
        """
        pairs = decoding.decode(payload.encode(), _ChangedPairs).pairs
        changed = tuple(
            execution_id
            for execution_id, channel in pairs
            if self._watched_until.pop(execution_id, None) is not None or channel == self.channel
        )
        if changed:
            self._listeners.deliver(ChangedExecutions(changed))

    def _deliver_direct(self, payload: str) -> None:
        """Deliver a direct message; if it only names a row, read the message from there in the background first."""
        given = decoding.decode(payload.encode(), _DirectPayload)
        if given.message is not None:
            self._listeners.deliver(DirectMessage(given.message))
            return
        receipt = asyncio.create_task(self._receive_row(given.row))
        self._receipts.add(receipt)
        receipt.add_done_callback(self._receipts.discard)

    async def _receive_row(self, key: str) -> None:
        """Take a direct message from its row, and deliver it; it is lost if the database is away."""
        try:
            async with _check_answer():
                body = await self._pool.fetchval(TAKE_ONE, DIRECT_QUEUE, key)
        except BrokerUnavailable as error:
            log.warning("direct message lost", channel=self.channel, error=str(error))
            return
        message = None if body is None else decoding.decode(body.encode(), _DirectPayload).message
        if message is not None:
            self._listeners.deliver(DirectMessage(message))

    # ── rates ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def take_tokens(self, demands: Sequence[TokenDemand]) -> Sequence[TokenGrant]:
        names = [demand.bucket for demand in demands]
        async with _check_answer(), self._pool.acquire() as connection, connection.transaction():
            await connection.execute(FILL_BUCKETS, names)
            rows = {row["bucket"]: row for row in await connection.fetch(LOCK_BUCKETS, names)}
            found = [
                grant_tokens(demand, rows[demand.bucket]["full_at"], rows[demand.bucket]["now"])
                for demand in demands
            ]
            await connection.execute(SET_BUCKETS, names, [round(full_at * 1_000_000) for _, full_at in found])
        return [grant for grant, _ in found]

    async def ping(self) -> None:
        async with _check_answer():
            await self._pool.execute("SELECT")

    async def close(self) -> None:
        for queue in tuple(self._consumers):
            await self._stop_consuming(queue)
        waiting = [*self._receipts, *([self._listening] if self._listening is not None else [])]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        self._pool.terminate()


async def connect(url: str, *, channel: str, is_gateway: bool = False) -> PostgresqlBroker:
    """Return a broker for a database URL; statements open up to four connections when they need them.

    `channel` is the name of this process; a gateway also receives the messages to all gateways. Raises `ValueError` for
    an invalid URL.
    """
    address = url.replace("postgresql+asyncpg://", "postgresql://", 1)
    pool = await asyncpg.create_pool(
        address,
        min_size=0,
        max_size=CONNECTIONS,
        timeout=ANSWER_SECONDS,
        command_timeout=ANSWER_SECONDS,
        connect=_open_session,
        # Lost writes do no harm: a crash empties these tables in any case.
        server_settings={"application_name": "pilotflame", "synchronous_commit": "off"},
    )
    return PostgresqlBroker(address, pool, channel=channel, is_gateway=is_gateway)


async def _open_session(dsn: str | None = None, **options: Any) -> Any:  # noqa: ANN401 - asyncpg's own
    """Open a session with options of `asyncpg.connect`; if the caller is canceled, it closes once it is open."""
    return await open_shielded(asyncpg.connect(dsn, **options), lambda opened: opened.terminate())


def _channel_name(channel: str) -> str:
    """Return the channel's name in PostgreSQL, which allows 63 bytes: a prefix and a hash of it."""
    return f"pilotflame_{blake2b(channel.encode(), digest_size=16).hexdigest()}"


def _lock_key(channel: str) -> int:
    """Return the id of the advisory lock that the listener of a channel holds: a hash of its name."""
    return int.from_bytes(blake2b(channel.encode(), digest_size=8).digest(), signed=True)
