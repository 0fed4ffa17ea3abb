"""Message sources of each kind that the bridge supports, as seen by producers and operators."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import uuid4

import aio_pika
from aio_pika.abc import AbstractChannel
from redis.asyncio import Redis

from bridge.message_source import MessageSource
from bridge.queue_gateway import QueueGateway
from bridge.queue_transfer import QueueTransfer
from bridge.rabbitmq_queue import RabbitmqQueue
from bridge.redis_stream import RedisStream
from bridge.settings import (
    AwsCredentials,
    BridgeSettings,
    RabbitmqBridgeSettings,
    RedisBridgeSettings,
    RefusalAction,
    SqsBridgeSettings,
)
from bridge.sqs_queue import SqsQueue
from tests import fake_sqs, services
from tests.fake_gateway import FakeGateway
from tests.fake_sqs import FakeSqs
from tests.system import proxy
from tests.system.proxy import FaultyProxy

PATIENCE_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.01
WAIT_SECONDS: Final = 0.1
HOLD_SECONDS: Final = 60


def bridge_settings(gateway: FakeGateway) -> dict[str, Any]:
    """Return the settings that every bridge to a fake gateway shares, by field."""
    return {
        "url": gateway.url,
        "api_key": gateway.key,
        "bridge_workflow": gateway.workflow_id,
        "bridge_wait_seconds": WAIT_SECONDS,
        "bridge_hold_seconds": HOLD_SECONDS,
    }


class BridgeQueue(ABC):
    """External queue that a bridge reads, as its producers and operators see it."""

    name: str

    def __init__(self, gateway: FakeGateway) -> None:
        self.gateway = gateway

    @abstractmethod
    async def send(self, *messages: Any) -> None:  # noqa: ANN401 - any JSON value
        """Put messages into the queue, as JSON."""

    @abstractmethod
    def open(self, **changes: Any) -> MessageSource:  # noqa: ANN401 - settings
        """Return the message source of a new bridge process for this queue, with settings changed."""

    @abstractmethod
    async def left(self) -> int:
        """Return the number of messages that are not acknowledged yet."""

    @abstractmethod
    async def dead(self) -> list[Any]:
        """Return the messages that were moved to the dead letters."""

    @abstractmethod
    async def break_off(self) -> None:
        """Break the bridge's connection, or lose the answer to its next call."""

    def time_passes(self) -> None:  # noqa: B027 - most give the messages of the dead to others at once
        """Let the time pass after which messages of consumers that died are delivered to others;
        do nothing where none must.
        """


class RedisBridgeQueue(BridgeQueue):
    def __init__(self, gateway: FakeGateway, client: Redis, between: FaultyProxy, url: str) -> None:
        super().__init__(gateway)
        self.client = client
        self.name = f"orders-{uuid4().hex}"
        self.settings: dict[str, Any] = {
            "bridge_redis_url": between.in_front_of(url),
            "bridge_redis_stream": self.name,
        }
        self._between = between

    async def send(self, *messages: Any) -> None:  # noqa: ANN401 - any JSON value
        for message in messages:
            await self.client.xadd(self.name, {"message": json.dumps(message)})

    def open(self, **changes: Any) -> RedisStream:  # noqa: ANN401 - settings
        settings = RedisBridgeSettings(**bridge_settings(self.gateway), **self.settings, **changes)
        return RedisStream(settings)

    async def left(self) -> int:
        (group,) = await self.client.xinfo_groups(self.name)
        return int(group["pending"]) + int(group["lag"] or 0)

    async def dead(self) -> list[Any]:
        found: Any = await self.client.xrange(f"{self.name}.dead-letters")
        return [json.loads(fields[b"message"]) for _, fields in found]

    async def break_off(self) -> None:
        self._between.cut()

    async def make_idle(self, consumer: str) -> None:
        """Assign all entries to a consumer, idle for the hold time, so that others may claim them."""
        found: Any = await self.client.xrange(self.name)
        ids = [entry_id for entry_id, _ in found]
        idle = HOLD_SECONDS * 1_000
        await self.client.xclaim(self.name, "pilotflame", consumer, 0, ids, idle=idle, justid=True)


class SqsBridgeQueue(BridgeQueue):
    def __init__(self, gateway: FakeGateway, sqs: FakeSqs) -> None:
        super().__init__(gateway)
        self.sqs = sqs
        self.name = sqs.name
        sqs.max_receives = 2

    async def send(self, *messages: Any) -> None:  # noqa: ANN401 - any JSON value
        for message in messages:
            self.sqs.send(json.dumps(message))

    def open(self, **changes: Any) -> SqsQueue:  # noqa: ANN401 - settings
        settings = SqsBridgeSettings(
            **bridge_settings(self.gateway),
            bridge_sqs_queue_url=self.sqs.queue_url,
            bridge_sqs_endpoint=self.sqs.endpoint,
            **changes,
        )
        sqs = self.sqs
        who = AwsCredentials(sqs.access_key_id, sqs.secret_access_key, sqs.session_token, sqs.region)
        return SqsQueue(settings, who)

    async def left(self) -> int:
        return len(self.sqs.messages)

    async def dead(self) -> list[Any]:
        return [json.loads(kept.body) for kept in self.sqs.dead]

    async def break_off(self) -> None:
        self.sqs.failures.append(fake_sqs.SqsError(503, "com.amazonaws.sqs#ServiceUnavailable"))

    def time_passes(self) -> None:
        self.sqs.now += HOLD_SECONDS


class RabbitmqBridgeQueue(BridgeQueue):
    def __init__(
        self, gateway: FakeGateway, channel: AbstractChannel, between: FaultyProxy, url: str
    ) -> None:
        super().__init__(gateway)
        self.channel = channel
        self.name = f"orders-{uuid4().hex}"
        self.settings: dict[str, Any] = {
            "bridge_rabbitmq_url": between.in_front_of(url),
            "bridge_rabbitmq_queue": self.name,
        }
        self._between = between

    async def declare(self) -> None:
        await self.channel.declare_queue(f"{self.name}.dead")
        arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{self.name}.dead"}
        await self.channel.declare_queue(self.name, arguments={**arguments, "x-max-priority": 10})

    async def send(self, *messages: Any) -> None:  # noqa: ANN401 - any JSON value
        for message in messages:
            await self.publish(json.dumps(message).encode(), message_id=uuid4().hex)

    async def publish(self, body: bytes, **properties: Any) -> None:  # noqa: ANN401 - as AMQP has them
        message = aio_pika.Message(body, **properties)
        await self.channel.default_exchange.publish(message, routing_key=self.name)

    def open(self, **changes: Any) -> RabbitmqQueue:  # noqa: ANN401 - settings
        return RabbitmqQueue(
            RabbitmqBridgeSettings(**bridge_settings(self.gateway), **self.settings, **changes)
        )

    async def left(self) -> int:
        # Messages held by a consumer aren't counted while its channel is open.
        return (await self._declared(self.name)).message_count or 0

    async def dead(self) -> list[Any]:
        queue = await self.channel.get_queue(f"{self.name}.dead")
        found = []
        while (message := await queue.get(fail=False, no_ack=True)) is not None:
            found.append(json.loads(message.body))
        return found

    async def _declared(self, name: str) -> Any:  # noqa: ANN401 - its class is aiormq's
        return (await self.channel.declare_queue(name, passive=True)).declaration_result

    async def break_off(self) -> None:
        self._between.cut()


@asynccontextmanager
async def open_redis_queue(
    gateway: FakeGateway, server: services.RedisServer
) -> AsyncIterator[RedisBridgeQueue]:
    async with (
        proxy.run_proxy(server.url) as between,
        Redis.from_url(server.url, socket_timeout=None) as client,
    ):
        place = RedisBridgeQueue(gateway, client, between, server.url)
        yield place
        await client.delete(place.name, f"{place.name}.dead-letters")


@asynccontextmanager
async def open_sqs_queue(gateway: FakeGateway) -> AsyncIterator[SqsBridgeQueue]:
    async with fake_sqs.serve_fake_sqs() as sqs:
        yield SqsBridgeQueue(gateway, sqs)


@asynccontextmanager
async def open_rabbitmq_queue(
    gateway: FakeGateway, server: services.RabbitmqServer
) -> AsyncIterator[RabbitmqBridgeQueue]:
    async with (
        proxy.run_proxy(server.url) as between,
        await aio_pika.connect(server.url) as connection,
        connection.channel() as channel,
    ):
        place = RabbitmqBridgeQueue(gateway, channel, between, server.url)
        await place.declare()
        yield place
        for name in (place.name, f"{place.name}.dead"):
            await channel.queue_delete(name)


class BridgeRunner:
    """Bridge from a source to a fake gateway that runs in this process."""

    def __init__(
        self,
        gateway: FakeGateway,
        source: MessageSource,
        *,
        on_refused: RefusalAction = RefusalAction.STOP,
        batch: int = 100,
    ) -> None:
        self.source = source
        self._gateway = QueueGateway(BridgeSettings(**bridge_settings(gateway)))
        self.stop = asyncio.Event()
        self.transfer = QueueTransfer(
            source,
            self._gateway,
            self.stop,
            on_refused=on_refused,
            batch=batch,
            wait_seconds=WAIT_SECONDS,
            hold_seconds=WAIT_SECONDS,
        )

    async def run(self) -> None:
        """Move messages until the transfer ends or raises, at most a minute, and close the source."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await self.transfer.run()
        finally:
            await self.source.close()
            await self._gateway.close()

    async def run_until_gone(self, place: BridgeQueue, condition: Callable[[], bool]) -> None:
        """Run until the condition holds and the queue has no unacknowledged message, and then stop as on SIGTERM."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.run())
            await wait_until(condition)
            async with asyncio.timeout(PATIENCE_SECONDS):
                while await place.left():  # noqa: ASYNC110 - nothing signals the change
                    await asyncio.sleep(POLL_SECONDS)
            self.stop.set()

    async def run_until(self, condition: Callable[[], bool]) -> None:
        """Run until the condition holds, and then stop as a process does on SIGTERM."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.run())
            await wait_until(condition)
            self.stop.set()


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds, asked every 10 ms; raises TimeoutError after a minute."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - nothing signals the change
            await asyncio.sleep(POLL_SECONDS)
