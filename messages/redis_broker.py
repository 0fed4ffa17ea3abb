"""Broker over Redis: wakeups in Dramatiq's own layout, notifications by publish and subscribe."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import chain
from typing import Final
from uuid import uuid4

import dramatiq
import msgspec
import redis
import structlog
from msgspec.structs import asdict
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from json_text import decoding
from messages import deployer_messages, mail_parser_wakeup, wakeup_worker, worker_wakeup
from messages.broker import (
    GATEWAYS,
    NO_GRANTS,
    WATCH_SECONDS,
    BrokerUnavailable,
    ChangedExecutions,
    DirectMessage,
    DirectRuns,
    Notification,
    RedisMayEvict,
    SlotGrant,
)
from messages.deployer_messages import DeployerMessage
from messages.mail_parser_wakeup import MailParserWakeup
from messages.message_seal import NOTICES, MessageSeal, SealedMessage
from messages.redis_consumer import (
    MESSAGE_ID,
    NAMESPACE,
    REDIS_TIMEOUT_SECONDS,
    WAKEUPS_KEPT,
    WakeupQueues,
    reconnect_seconds,
)
from messages.redis_direct_queue import DirectQueue
from messages.token_buckets import SPARE, TokenDemand, TokenGrant
from messages.wakeups import NotificationListeners
from messages.worker_wakeup import ALL_SHARDS, WorkerWakeup
from models.ended_execution import MAX_NOTIFIED_BYTES, EndedExecution
from telemetry.process_activity import ACTIVITY, BROKER

CONNECTIONS: Final = 16
LISTEN_SECONDS: Final = 2.0
MARK_MILLISECONDS: Final = 60_000

# A wakeup is outstanding while it is in the queue. A worker claims after taking it out, and so sees
# everything that was committed before.
WAKE: Final = """
local mark, queue, bodies, wakeup_signal = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local mark_milliseconds, id, body, limit = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local latest = redis.call("SET", mark, id, "PX", mark_milliseconds, "GET")
if latest and redis.call("LPOS", queue, latest) then
    redis.call("SET", mark, latest, "PX", mark_milliseconds)
    return
end
redis.call("HSET", bodies, id, body)
if redis.call("RPUSH", queue, id) > limit then
    redis.call("HDEL", bodies, redis.call("LPOP", queue))
end
if redis.call("RPUSH", wakeup_signal, 1) > limit then
    redis.call("LPOP", wakeup_signal)
end
"""

WATCH: Final = """
for _, watchers in ipairs(KEYS) do
    redis.call("SADD", watchers, ARGV[1])
    redis.call("EXPIRE", watchers, ARGV[2])
end
"""

# KEYS: the watchers of each execution. ARGV: the prefix of channels, then, in the same order, each execution
# with the channel that is notified in any case, or an empty text; then channels with their sealed notices.
ANNOUNCE: Final = """
local changed, sealed = {}, {}
for index = 2 * #KEYS + 2, #ARGV, 2 do
    sealed[ARGV[index]] = cjson.decode(ARGV[index + 1])
end
local function tell(channel, execution_id)
    changed[channel] = changed[channel] or {}
    table.insert(changed[channel], execution_id)
end
for index, watchers in ipairs(KEYS) do
    local execution_id, own = ARGV[2 * index], ARGV[2 * index + 1]
    if own ~= "" then
        tell(own, execution_id)
    end
    for _, channel in ipairs(redis.call("SPOP", watchers, 1000)) do
        if channel ~= own then
            tell(channel, execution_id)
        end
    end
end
for channel, execution_ids in pairs(changed) do
    redis.call("PUBLISH", ARGV[1] .. channel, cjson.encode({execution_ids = execution_ids, notice = sealed[channel]}))
    sealed[channel] = nil
end
for channel, notice in pairs(sealed) do
    redis.call("PUBLISH", ARGV[1] .. channel, cjson.encode({notice = notice}))
end
"""

# KEYS: buckets. ARGV: first the divisor for tokens ahead, then, for each bucket, its tokens per second, its
# capacity, and the tokens that are needed, wanted and ahead. A bucket is the time, in microseconds of this
# server's clock, at which it is full.
TAKE: Final = """
local time = redis.call("TIME")
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local spare = tonumber(ARGV[1])
local grants = {}
for index, bucket in ipairs(KEYS) do
    local first = 5 * index - 3
    local speed, burst = tonumber(ARGV[first]) / 1000000, tonumber(ARGV[first + 1])
    local needed, wanted, ahead = tonumber(ARGV[first + 2]), tonumber(ARGV[first + 3]), tonumber(ARGV[first + 4])
    local full_at = math.max(tonumber(redis.call("GET", bucket) or now), now)
    local held = burst - (full_at - now) * speed + 0.000001
    local enough = math.min(needed, burst)
    if held < enough then
        grants[index] = {0, math.floor(held), math.ceil((enough - held) / speed)}
    else
        local tokens = math.max(needed, math.min(wanted, math.floor(held)))
        tokens = tokens + math.min(ahead, math.floor(math.max(math.floor(held) - tokens, 0) / spare))
        full_at = full_at + tokens / speed
        redis.call("SET", bucket, string.format("%.0f", full_at), "PX", math.ceil((full_at - now) / 1000))
        grants[index] = {tokens, math.floor(held) - tokens, 0}
    end
end
return grants
"""

CHANNELS: Final = f"{NAMESPACE}:channel:"

log = structlog.get_logger()


class _PublishedMessage(msgspec.Struct):
    """Message on a channel of a process: changed executions, a notice for a gateway, or a direct message."""

    execution_ids: tuple[str, ...] = ()
    notice: SealedMessage | None = None
    direct_message: dict[str, str] | None = None


class _GatewayNotice(msgspec.Struct):
    """Content of a message to the gateway that accepted the executions."""

    outcomes: tuple[EndedExecution, ...] = ()
    grant: SlotGrant | None = None


async def refuse_evicting(client: Redis) -> None:
    """Raise `RedisMayEvict` if a full Redis would evict stored keys instead of refusing to write.

    A policy that can't be read is logged and accepted. Raises the errors of Redis if it is away.
    """
    try:
        # From INFO, which hosted servers allow where they forbid CONFIG.
        policy = (await client.info("memory")).get("maxmemory_policy")
    except redis.ResponseError as error:
        log.warning("redis eviction policy unknown", error=str(error))
        return
    if policy != "noeviction":
        raise RedisMayEvict(
            f"Redis may evict what it acknowledged: set maxmemory-policy to noeviction, not {policy}"
        )


@asynccontextmanager
async def _check_answer() -> AsyncIterator[None]:
    """Raise `BrokerUnavailable` for failures of Redis in the block, or if it takes over two seconds."""
    try:
        async with asyncio.timeout(REDIS_TIMEOUT_SECONDS):
            yield
    except (redis.RedisError, OSError) as error:
        ACTIVITY.note_failure(BROKER, error)
        raise BrokerUnavailable(str(error) or "redis did not answer in time") from error


async def connect(
    url: str, *, channel: str, seal: MessageSeal | None = None, is_gateway: bool = False
) -> "RedisBroker":
    """Return a broker for Redis; an unreachable server doesn't prevent the start.

    `channel` is the name of this process; a gateway also receives the messages to all gateways. Without a `seal`,
    notifications carry no outcomes and no runs are assigned directly. Raises `RedisMayEvict` if Redis may evict keys,
    and `ValueError` for an invalid URL.
    """
    broker = RedisBroker(url, channel=channel, seal=seal, is_gateway=is_gateway)
    try:
        async with _check_answer():
            await refuse_evicting(broker.client)
    except BrokerUnavailable as error:
        log.warning("redis is away, starting without it", error=str(error))
    except RedisMayEvict:
        await broker.close()
        raise
    return broker


def _create_client(url: str) -> Redis:
    """Return a client with up to 16 connections that neither repeats commands nor connects before the first one."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=CONNECTIONS,
        timeout=REDIS_TIMEOUT_SECONDS,
        socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
        # redis-py repeats a command up to ten times by default, though it may have been carried out before.
        retry=Retry(NoBackoff(), 0),
        # Under protocol version 3, redis-py expects maintenance notifications and hands out closed
        # connections.
        protocol=2,
    )
    # With a timeout, redis-py sends under `asyncio.wait_for`, which on Python 3.11 may swallow a
    # cancellation.
    pool.connection_kwargs["socket_timeout"] = None
    return Redis.from_pool(pool)


class RedisBroker:
    """Broker of one process, by channels and queues of Redis; implements `messages.broker.Broker`."""

    uses_redis = True

    def __init__(
        self, url: str, *, channel: str, seal: MessageSeal | None = None, is_gateway: bool = False
    ) -> None:
        self.channel = channel
        self._channels = (channel, GATEWAYS) if is_gateway else (channel,)
        self._seal = seal
        self.client = _create_client(url)
        self._url = url
        self._wake = self.client.register_script(WAKE)
        self._watch = self.client.register_script(WATCH)
        self._publish = self.client.register_script(ANNOUNCE)
        self._take_tokens = self.client.register_script(TAKE)
        self._worker: dramatiq.Worker | None = None
        self._mail_parser: dramatiq.Worker | None = None
        self._deployer: dramatiq.Worker | None = None
        self._direct = None if seal is None else DirectQueue(self.client, seal, channel)
        self._listeners = NotificationListeners()
        self._listening: asyncio.Task[None] | None = None
        self._is_channel_open = asyncio.Event()

    async def wake_workers(self, shard: int = ALL_SHARDS) -> None:
        await self._put(
            worker_wakeup.QUEUE, worker_wakeup.ACTOR, str(shard), asdict(WorkerWakeup(shard=shard))
        )

    async def wake_mail_parsers(self) -> None:
        await self._put(mail_parser_wakeup.QUEUE, mail_parser_wakeup.ACTOR, "all", asdict(MailParserWakeup()))

    def start_mail_parser(self, on_wakeup: Callable[[], None]) -> None:
        self._mail_parser = wakeup_worker.start_mail_parser_worker(WakeupQueues(self._url), on_wakeup)

    async def stop_mail_parser(self) -> None:
        mail_parser, self._mail_parser = self._mail_parser, None
        if mail_parser is not None:
            await asyncio.to_thread(wakeup_worker.stop, mail_parser)

    async def notify_deployer(self, message: DeployerMessage) -> None:
        await self._put(
            deployer_messages.QUEUE,
            deployer_messages.ACTOR,
            message.key,
            deployer_messages.encode_message(message),
        )

    async def _put(self, name: str, actor: str, key: str, payload: dict[str, object]) -> None:
        """Put a message for `actor` into the Dramatiq queue `name`, unless the latest one with the same key is still in
        it (for a minute at most).
        Raises `BrokerUnavailable`.
        """
        identity = str(uuid4())
        message: dramatiq.Message[None] = dramatiq.Message(
            name, actor, (), payload, {MESSAGE_ID: identity}, identity
        )
        queue = f"{NAMESPACE}:{name}"
        async with _check_answer():
            await self._wake(
                keys=[f"{queue}.wakeup_mark.{key}", queue, f"{queue}.msgs", f"{queue}.wakeup_signal"],
                args=[MARK_MILLISECONDS, identity, message.encode(), WAKEUPS_KEPT],
            )

    async def watch(self, execution_ids: Sequence[str]) -> None:
        if not execution_ids:
            return
        async with _check_answer():
            await self._watch(keys=_watchers_keys(execution_ids), args=[self.channel, WATCH_SECONDS])

    async def publish(
        self,
        channels: Mapping[str, str],
        outcomes: Sequence[EndedExecution] = (),
        grants: Mapping[str, SlotGrant] = NO_GRANTS,
    ) -> None:
        if not channels and not grants:
            return
        pairs = chain.from_iterable([*channels.items(), *self._notices(channels, outcomes, grants)])
        async with _check_answer():
            await self._publish(keys=_watchers_keys(channels), args=[CHANNELS, *pairs])

    def _notices(
        self,
        channels: Mapping[str, str],
        outcomes: Sequence[EndedExecution],
        grants: Mapping[str, SlotGrant],
    ) -> Iterator[tuple[str, str]]:
        """Yield each channel with its sealed notice: as many outcomes as fit, in order, and its grant;
        nothing without a seal.

        Executions without a channel have no notice.
        """
        if self._seal is None:
            return
        notices = {channel: _GatewayNotice(grant=grant) for channel, grant in grants.items()}
        chosen: dict[str, list[EndedExecution]] = {}
        left: dict[str, int] = {}
        for outcome in outcomes:
            channel = channels[outcome.execution_id]
            left_bytes = left.get(channel, MAX_NOTIFIED_BYTES) - outcome.size
            if channel and left_bytes >= 0:
                left[channel] = left_bytes
                chosen.setdefault(channel, []).append(outcome)
        for channel, of_channel in chosen.items():
            notices.setdefault(channel, _GatewayNotice()).outcomes = tuple(of_channel)
        for channel, notice in notices.items():
            sealed = self._seal.seal(NOTICES, channel, msgspec.json.encode(notice))
            yield channel, msgspec.json.encode(sealed).decode()

    async def send(self, channel: str, message: Mapping[str, str]) -> None:
        async with _check_answer():
            await self.client.publish(
                CHANNELS + channel, msgspec.json.encode(_PublishedMessage(direct_message=dict(message)))
            )

    async def is_heard(self, channel: str) -> bool:
        async with _check_answer():
            ((_, listeners),) = await self.client.pubsub_numsub(CHANNELS + channel)
            return int(listeners) > 0

    async def listen(
        self, on_notification: Callable[[Notification], None], *, subject: str | None = None
    ) -> None:
        self._listeners.add(on_notification, subject)
        if self._listening is None:
            self._listening = asyncio.create_task(self._keep_listening())
        with suppress(TimeoutError):
            async with asyncio.timeout(LISTEN_SECONDS):
                await self._is_channel_open.wait()

    def start_worker(self, on_wakeup: Callable[[int], None]) -> None:
        self._worker = wakeup_worker.start(WakeupQueues(self._url), on_wakeup)

    def receive_direct(self, on_runs: Callable[[DirectRuns], None]) -> None:
        if self._direct is not None:
            self._direct.start(on_runs)

    async def send_direct(self, worker: str, message: DirectRuns) -> bool:
        if self._direct is None:
            return False
        async with _check_answer():
            return await self._direct.send(worker, CHANNELS + worker, message)

    async def stop_worker(self) -> None:
        if self._direct is not None:
            await self._direct.stop()
        worker, self._worker = self._worker, None
        if worker is not None:
            await asyncio.to_thread(wakeup_worker.stop, worker)

    def start_deployer(self, on_message: Callable[[DeployerMessage], None]) -> None:
        self._deployer = wakeup_worker.start_deployer(WakeupQueues(self._url), on_message)

    async def stop_deployer(self) -> None:
        deployer, self._deployer = self._deployer, None
        if deployer is not None:
            await asyncio.to_thread(wakeup_worker.stop, deployer)

    async def take_tokens(self, demands: Sequence[TokenDemand]) -> Sequence[TokenGrant]:
        numbers = chain.from_iterable(
            (one.rate.per_second, one.rate.burst, one.needed, one.wanted, one.ahead) for one in demands
        )
        async with _check_answer():
            answers = await self._take_tokens(
                keys=[f"{NAMESPACE}:bucket:{one.bucket}" for one in demands], args=[SPARE, *numbers]
            )
        return [TokenGrant(tokens, left, microseconds / 1_000_000) for tokens, left, microseconds in answers]

    async def ping(self) -> None:
        async with _check_answer():
            await self.client.ping()

    async def close(self) -> None:
        await self.stop_worker()
        await self.stop_mail_parser()
        await self.stop_deployer()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        await self.client.aclose()

    async def _keep_listening(self) -> None:
        """Keep the subscription to the own channels, and subscribe again after a growing pause."""
        failures = 0
        while True:
            try:
                async with self.client.pubsub() as subscription:
                    await subscription.subscribe(*(CHANNELS + channel for channel in self._channels))
                    async for event in subscription.listen():
                        failures = 0
                        self._take(event["type"], event["data"])
            except (redis.RedisError, OSError) as error:
                if not failures:
                    log.warning("channel closed", channel=self.channel, error=str(error))
            self._is_channel_open.clear()
            failures += 1
            await asyncio.sleep(reconnect_seconds(failures))

    def _take(self, kind: str, body: bytes) -> None:
        """Handle an event of the subscription: note that the channel is open,
        or deliver the notifications of a message.

        An unreadable message is logged and dropped.
        """
        if kind == "subscribe" and not self._is_channel_open.is_set():
            self._is_channel_open.set()
            log.info("channel open", channel=self.channel)
        if kind != "message":
            return
        try:
            notifications = self._parse_message(body)
        except ValueError:
            log.warning("notification unreadable", channel=self.channel)
            return
        for notification in notifications:
            self._listeners.deliver(notification)

    def _parse_message(self, body: bytes) -> Iterable[Notification]:
        """Return the notifications of a message: a direct message, or changed executions and a grant."""
        published = decoding.decode(body, _PublishedMessage)
        if published.direct_message:
            return [DirectMessage(published.direct_message)]
        notice = self._open(published.notice)
        grants = [] if notice.grant is None else [notice.grant]
        if not published.execution_ids:
            return grants
        return [ChangedExecutions(published.execution_ids, notice.outcomes), *grants]

    def _open(self, sealed: SealedMessage | None) -> _GatewayNotice:
        """Return the opened notice; an empty one if it can't be opened."""
        content = None
        if sealed is not None and self._seal is not None:
            content = self._seal.open(NOTICES, self.channel, sealed)
        return _GatewayNotice() if content is None else decoding.decode(content, _GatewayNotice)


def _watchers_keys(execution_ids: Iterable[str]) -> list[str]:
    return [f"{NAMESPACE}:watchers:{execution_id}" for execution_id in execution_ids]
