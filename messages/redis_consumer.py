"""Consumer of Dramatiq's Redis queues for wakeups that blocks instead of polling, and survives a lost server."""

import random
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final, cast
from uuid import uuid4

import redis
import structlog
from dramatiq import Worker
from dramatiq.broker import Broker, Consumer, MessageProxy
from dramatiq.brokers.redis import MAINTENANCE_SCALE, RedisBroker
from dramatiq.errors import ConnectionClosed
from dramatiq.message import Message
from dramatiq.middleware import Middleware
from redis.backoff import NoBackoff
from redis.retry import Retry

from json_text import decoding

NAMESPACE: Final = "pilotflame"
MESSAGE_ID: Final = "redis_message_id"  # Dramatiq's name for the option with a message's ID in Redis
REDIS_TIMEOUT_SECONDS: Final = 2.0

# Longest delay of a wakeup by a lost wakeup signal. Each fetch is a heartbeat too, so this is far below its
# timeout.
WAKEUP_SIGNAL_SECONDS: Final = (10.0, 12.0)
HEARTBEAT_TIMEOUT_MILLISECONDS: Final = 30_000
# Twice the 4,096 shards; the same limit for tokens in the wakeup signal. Without workers, the oldest wakeups
# are dropped.
WAKEUPS_KEPT: Final = 8_192

log = structlog.get_logger()


def reconnect_seconds(failures: int) -> float:
    """Return the seconds to pause after so many consecutive failures: 50 ms, doubled by each up to a second.

    Up to half is left off at random.
    """
    return min(1.0, 0.05 * 2.0 ** min(failures - 1, 8)) * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load only


def _create_client(url: str, *, socket_timeout_seconds: float) -> redis.Redis:
    # redis-py repeats a command up to ten times by default, though it may have been carried out before.
    client = redis.Redis.from_url(
        url, retry=Retry(NoBackoff(), 0), socket_connect_timeout=REDIS_TIMEOUT_SECONDS
    )
    # A timeout in the URL would win over an argument, and cut every wait for the wakeup signal short.
    client.connection_pool.connection_kwargs["socket_timeout"] = socket_timeout_seconds
    return client


class StopConsumersMiddleware(Middleware):
    """Middleware that stops consumers first.

    Dramatiq lets them fetch until the threads of a stopping worker have ended.
    """

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        for consumer in worker.consumers.values():
            consumer.stop()
        if isinstance(broker, WakeupQueues):
            broker.interrupt()


class WakeupQueues(RedisBroker):
    """Consuming side of Dramatiq's broker; a script of `redis_broker` sends the wakeups."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.interrupted = threading.Event()
        self._own_wakeup_signal = f"wakeup_signal.{uuid4()}"
        super().__init__(  # type: ignore[no-untyped-call]  # Dramatiq's
            client=_create_client(url, socket_timeout_seconds=REDIS_TIMEOUT_SECONDS),
            namespace=NAMESPACE,
            # No retries, delays, time limits, results or pipelines: the rows hold all of that.
            middleware=[StopConsumersMiddleware()],
            maintenance_chance=MAINTENANCE_SCALE,  # requeues messages of dead workers at every fetch
            heartbeat_timeout=HEARTBEAT_TIMEOUT_MILLISECONDS,
        )

    @property
    def consumer_class(self) -> type["BlockingConsumer"]:
        return BlockingConsumer

    def declare_queue(self, queue_name: str) -> None:
        """Declare a queue without Dramatiq's delay queue, which would only be polled: the broker never delays
        messages.
        """
        if queue_name in self.queues:
            return
        self.emit_before("declare_queue", queue_name)
        self.queues.add(queue_name)
        self.emit_after("declare_queue", queue_name)

    def close(self) -> None:
        self.client.close()

    def connect_to_wakeup_signal(self) -> redis.Redis:
        return _create_client(
            self.url, socket_timeout_seconds=WAKEUP_SIGNAL_SECONDS[1] + REDIS_TIMEOUT_SECONDS
        )

    def wakeup_signals(self, queue_name: str) -> list[str]:
        """Return the two Redis keys to block on: the first wakes any idle consumer of any process, the second the
        consumers of this process.
        """
        return [
            f"{NAMESPACE}:{queue_name}.wakeup_signal",
            f"{NAMESPACE}:{queue_name}.{self._own_wakeup_signal}",
        ]

    def signal_wakeup(self, queue_name: str, times: int) -> None:
        """Wake so many idle consumers of a queue, in any process."""
        wakeup_signal, _ = self.wakeup_signals(queue_name)
        self.client.rpush(wakeup_signal, *["1"] * times)
        self.client.ltrim(wakeup_signal, -WAKEUPS_KEPT, -1)

    def interrupt(self) -> None:
        """End the waits of all consumers of this process at once, for a wakeup signal or for the return of Redis.

        Errors of Redis are ignored. Later waits end at once too.
        """
        self.interrupted.set()
        with suppress(redis.RedisError):
            for queue_name in self.queues:
                _, own_wakeup_signal = self.wakeup_signals(queue_name)
                self.client.rpush(own_wakeup_signal, "1")
                self.client.expire(own_wakeup_signal, 60)


class BlockingConsumer(Consumer):
    """Consumer of one Dramatiq queue in Redis that waits for a signal of new messages instead of polling."""

    def __init__(self, broker: WakeupQueues, queue_name: str, prefetch: int, timeout: int) -> None:
        self._broker = broker
        self._queue_name = queue_name
        self._prefetch = prefetch
        self._timeout_seconds = timeout / 1000
        # It blocks for longer than any other command may take, so it has its own connection and timeout.
        self._wakeup_signal = broker.connect_to_wakeup_signal()
        self._fetched: deque[Message[Any]] = deque()
        self._unacknowledged: set[str] = set()
        self._capacity_changed = threading.Condition()
        self._is_drained = False
        self._failures = 0

    def __next__(self) -> MessageProxy | None:
        try:
            self._fill()
        except redis.RedisError as error:
            # Raised to Dramatiq, the error would cost the three seconds after which it creates a new
            # consumer.
            self._wait_for_redis(error)
            return None
        if self._failures:
            log.info("redis is back", queue=self._queue_name, failures=self._failures)
            self._failures = 0
        return MessageProxy(self._fetched.popleft()) if self._fetched else None

    def ack(self, message: MessageProxy) -> None:
        self._settle("ack", message)

    def nack(self, message: MessageProxy) -> None:
        self._settle("nack", message)

    def requeue(self, messages: Iterable[MessageProxy | Message[Any]]) -> None:
        """Return messages to the queue and wake consumers for them; raises Dramatiq's `ConnectionClosed`."""
        identities = [message.options[MESSAGE_ID] for message in messages]
        if not identities:
            return
        try:
            self._broker.do_requeue(self._queue_name, *identities)
            self._broker.signal_wakeup(self._queue_name, len(identities))
        except redis.RedisError as error:
            raise ConnectionClosed(error) from error  # type: ignore[no-untyped-call]  # Dramatiq's

    def close(self) -> None:
        """Return fetched messages to the queue unless a thread has taken them, and close the connection for signals.

        Raises Dramatiq's `ConnectionClosed`.
        """
        try:
            self.requeue(self._fetched)
        finally:
            self._fetched.clear()
            self._wakeup_signal.close()

    def _fill(self) -> None:
        """Fetch messages if none is at hand: wait for a free thread, and for a signal if the queue was empty."""
        if self._fetched:
            return
        with self._capacity_changed:
            if not self._capacity_changed.wait_for(self._has_capacity, self._timeout_seconds):
                return
        if self._is_drained:
            seconds = random.uniform(*WAKEUP_SIGNAL_SECONDS)  # noqa: S311 - no secret
            self._wakeup_signal.blpop(self._broker.wakeup_signals(self._queue_name), seconds)
        if not self._broker.interrupted.is_set():
            self._fetch(self._prefetch - len(self._unacknowledged))

    def _has_capacity(self) -> bool:
        return len(self._unacknowledged) < self._prefetch

    def _fetch(self, room: int) -> None:
        """Fetch up to `room` messages from Redis into this consumer; unreadable ones become dead letters."""
        bodies: list[bytes | None] = self._broker.do_fetch(self._queue_name, room)
        # Fewer messages than requested mean an empty queue, and each later one sends a signal: no need to
        # fetch again.
        self._is_drained = len(bodies) < room
        messages = [message for body in bodies if (message := self._read(body))]
        self._unacknowledged.update(message.options[MESSAGE_ID] for message in messages)
        self._fetched.extend(messages)
        if len(messages) < len(bodies):
            self._bury_unreadable()

    def _read(self, body: bytes | None) -> Message[Any] | None:
        """Return the message of a body; None if it is unreadable, delayed or of another queue."""
        try:
            message: Message[Any] = decoding.decode(body or b"", Message)
        except (ValueError, RecursionError):
            return None
        # Another queue's name ends a thread of Dramatiq's worker; an `eta` would delay the message in memory.
        is_ours = message.queue_name == self._queue_name and "eta" not in message.options
        return message if is_ours and isinstance(message.options.get(MESSAGE_ID), str) else None

    def _bury_unreadable(self) -> None:
        """Move unreadable messages, held by this consumer, to the dead letters and log them; raises `RedisError`.

        A fetch returns bodies without ids, so these are the held ids of no readable message.
        """
        key = f"{NAMESPACE}:__acks__.{self._broker.broker_id}.{self._queue_name}"
        held = cast("set[bytes]", self._broker.client.smembers(key))
        with self._capacity_changed:
            readable = {identity.encode() for identity in self._unacknowledged}
        for identity in held - readable:
            self._broker.do_nack(self._queue_name, identity)
            log.error(
                "message unreadable, now a dead letter", queue=self._queue_name, message_id=repr(identity)
            )

    def _settle(self, command: str, message: MessageProxy) -> None:
        """Acknowledge (`ack`) or reject (`nack`) a message in Redis, and make room for the next;
        a failure is only logged.
        """
        try:
            getattr(self._broker, f"do_{command}")(self._queue_name, message.options[MESSAGE_ID])
        except redis.RedisError as error:
            # Raised to Dramatiq, it would hold the thread for five seconds a try; the wakeup was taken
            # anyway.
            log.warning("message not settled", queue=self._queue_name, command=command, error=str(error))
        finally:
            with self._capacity_changed:
                self._unacknowledged.discard(message.options[MESSAGE_ID])
                self._capacity_changed.notify()

    def _wait_for_redis(self, error: redis.RedisError) -> None:
        """Pause after a failure of Redis, the longer the more failures; the consumer
        continues under a new id on new connections.
        """
        if not self._failures:
            log.warning("redis lost", queue=self._queue_name, error=str(error))
        self._failures += 1
        self._is_drained = False
        # The messages of a lost response belong to this ID while it sends heartbeats. Under a new ID they
        # return to the queue after the heartbeat timeout.
        self._broker.broker_id = str(uuid4())
        # After a failover the old connections may lead to a server that has become a read-only replica.
        self._wakeup_signal.connection_pool.disconnect()
        self._broker.client.connection_pool.disconnect(inuse_connections=False)
        self._broker.interrupted.wait(reconnect_seconds(self._failures))
