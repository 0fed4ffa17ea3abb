"""RabbitMQ queue as a message source, consumed with an acknowledgement for each message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import structlog

from bridge.bridge_errors import BridgeRefused, BridgeUnavailable
from bridge.message_source import SourceMessage, UnreadableMessage, make_deduplication_id, to_json
from models.settings import InvalidSettings

try:
    import aio_pika
    from aiormq import exceptions
except ImportError as error:
    raise InvalidSettings(
        "The bridge to RabbitMQ needs the library aio-pika: pip install 'pilotflame[rabbitmq]'"
    ) from error

if TYPE_CHECKING:
    from aio_pika.abc import AbstractConnection, AbstractIncomingMessage

    from bridge.settings import RabbitmqBridgeSettings

CONNECT_SECONDS: Final = 5.0
COMMAND_SECONDS: Final = 5.0
MAX_PRIORITY: Final = 100
FINAL_ERRORS: Final = (
    exceptions.AuthenticationError,
    exceptions.ChannelAccessRefused,
    exceptions.ChannelLockedResource,
    exceptions.ChannelNotFoundEntity,
    exceptions.ConnectionNotAllowed,
    exceptions.ProbableAuthenticationError,
)
"""Permanent errors: a wrong password, no such queue or virtual host, no permission to read it."""
RETRYABLE_ERRORS: Final = (*aio_pika.exceptions.CONNECTION_EXCEPTIONS, TimeoutError)

log = structlog.get_logger()


class RabbitmqQueue:
    """Implements `bridge.message_source.MessageSource`; reopens a lost connection when messages are taken."""

    def __init__(self, settings: RabbitmqBridgeSettings) -> None:
        self.label = settings.label("rabbitmq", settings.bridge_rabbitmq_queue)
        self._url = settings.bridge_rabbitmq_url.get_secret_value()
        self._queue = settings.bridge_rabbitmq_queue
        self._prefetch = settings.bridge_batch
        self._consumer: RabbitmqConsumer | None = None

    async def take(self, limit: int, wait_seconds: float) -> Sequence[SourceMessage]:
        """Take up to `limit` received messages, connecting first if needed; empty if none arrives within
        `wait_seconds`.

        Raises `BridgeUnavailable` for a lost connection, which the next call reopens, and `BridgeRefused` for a missing
        or locked queue and wrong credentials.
        """
        if self._consumer is None:
            async with _translate_errors():
                self._consumer = await RabbitmqConsumer.open(self._url, self._queue, prefetch=self._prefetch)
        try:
            return [self._message(*one) for one in await self._consumer.take(limit, wait_seconds)]
        except BridgeUnavailable:
            await self.close()
            raise

    async def hold(self, ids: Sequence[str]) -> None:
        """Do nothing: a delivery is held for as long as its channel is open."""

    async def acknowledge(self, ids: Sequence[str]) -> None:
        """Acknowledge deliveries of the present connection; a closed channel is only logged."""
        for delivery in self._open_deliveries(ids):
            with _ignore_closed_channel():
                await delivery.ack()

    async def release(self, ids: Sequence[str]) -> None:
        """Requeue deliveries of the present connection; a closed channel is only logged."""
        for delivery in self._open_deliveries(ids):
            with _ignore_closed_channel():
                await delivery.reject(requeue=True)

    async def dead_letter(self, reasons: Mapping[str, str]) -> None:
        """Reject messages without requeuing: RabbitMQ moves them to the queue's dead-letter exchange, or
        drops them.

        The reasons are not passed on. A closed channel is logged and ignored, since its messages are
        delivered again.
        """
        for delivery in self._open_deliveries(list(reasons)):
            with _ignore_closed_channel():
                await delivery.reject(requeue=False)

    async def close(self) -> None:
        """Close the connection, if there is one; RabbitMQ requeues unacknowledged messages."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await consumer.close()

    def _open_deliveries(self, ids: Sequence[str]) -> Iterator[AbstractIncomingMessage]:
        """Yield the deliveries of these ids that this connection holds, and remove each from those in hand.

        RabbitMQ has requeued those of an earlier connection: their ids are left out.
        """
        for delivery_id in ids:
            delivery = self._consumer.in_hand.pop(delivery_id, None) if self._consumer else None
            if delivery is not None:
                yield delivery

    def _message(self, delivery_id: str, delivery: AbstractIncomingMessage) -> SourceMessage:
        """Convert a delivery to a message; one that is neither JSON nor UTF-8 gets a `problem` instead of a body.

        Priorities above 100 count as 100, none as 0.
        """
        # Without a message id from the publisher, a second delivery can't be distinguished from a new message.
        deduplication_id = make_deduplication_id(self.label, delivery.message_id or delivery_id)
        try:
            body = to_json(delivery.body)
        except UnreadableMessage as error:
            return SourceMessage(delivery_id, deduplication_id, problem=str(error))
        return SourceMessage(delivery_id, deduplication_id, body, min(delivery.priority or 0, MAX_PRIORITY))


class RabbitmqConsumer:
    """Connection to RabbitMQ with one subscription, and the deliveries in hand: taken, and not acknowledged yet."""

    def __init__(self, connection: AbstractConnection) -> None:
        self.in_hand: dict[str, AbstractIncomingMessage] = {}
        self._connection = connection
        self._mark = uuid4().hex
        """Unique part of delivery ids: delivery tags are unique only within a channel."""
        self._received: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()
        """Received deliveries; None marks the end of the channel."""

    @classmethod
    async def open(cls, url: str, queue_name: str, *, prefetch: int) -> RabbitmqConsumer:
        """Connect to RabbitMQ and start to receive messages of an existing queue.

        At most `prefetch` unacknowledged messages are sent at a time. Raises the errors of the library, and
        `TimeoutError` after 5 seconds, for the connection and for the subscription.
        """
        connection = await aio_pika.connect(url, timeout=CONNECT_SECONDS)
        consumer = cls(connection)
        try:
            async with asyncio.timeout(COMMAND_SECONDS):
                await consumer._consume(queue_name, prefetch)
        except BaseException:
            await consumer.close()
            raise
        log.info("connected to rabbitmq", queue=queue_name)
        return consumer

    async def _consume(self, queue_name: str, prefetch: int) -> None:
        """Subscribe to a queue, which must exist already; received messages wait in memory until `take`."""
        channel = await self._connection.channel()
        await channel.set_qos(prefetch_count=prefetch)
        channel.close_callbacks.add(self._end)
        (await channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(self._end)
        # A passive lookup: the owners of a queue declare its properties.
        queue = await channel.get_queue(queue_name, ensure=True)
        await queue.consume(self._received.put)

    def _end(self, *_: object) -> None:
        """Mark the end of the channel, for the next `take`; a callback of the library."""
        self._received.put_nowait(None)

    async def take(self, limit: int, wait_seconds: float) -> Sequence[tuple[str, AbstractIncomingMessage]]:
        """Return up to `limit` received messages, each with its id; an empty
        list if none arrives within `wait_seconds`.

        They stay in hand until they are acknowledged or rejected. Raises `BridgeUnavailable` once the channel has
        ended, and then drops the messages received in the same call: RabbitMQ delivers them again.
        """
        try:
            arrived = [await asyncio.wait_for(self._received.get(), wait_seconds)]
        except TimeoutError:
            return []
        while len(arrived) < limit and not self._received.empty():
            arrived.append(self._received.get_nowait())
        taken = {f"{self._mark}.{one.delivery_tag}": one for one in arrived if one is not None}
        if len(taken) < len(arrived):
            raise BridgeUnavailable("RabbitMQ has closed the channel")
        self.in_hand.update(taken)
        return list(taken.items())

    async def close(self) -> None:
        """Close the connection within 5 seconds; errors are ignored."""
        with suppress(*RETRYABLE_ERRORS):
            async with asyncio.timeout(COMMAND_SECONDS):
                await self._connection.close()


@asynccontextmanager
async def _translate_errors() -> AsyncIterator[None]:
    """Raise errors of the RabbitMQ library in the block as `BridgeUnavailable` or `BridgeRefused`."""
    try:
        yield
    except FINAL_ERRORS as error:
        raise BridgeRefused(f"RabbitMQ refused: {error}") from error
    except RETRYABLE_ERRORS as error:
        raise BridgeUnavailable(f"RabbitMQ did not answer: {error or type(error).__name__}") from error


@contextmanager
def _ignore_closed_channel() -> Iterator[None]:
    """Log errors of a closed channel instead of raising them.

    Its messages are delivered again and deduplicated then.
    """
    try:
        yield
    except RETRYABLE_ERRORS as error:
        log.info("message no longer held", reason=str(error) or type(error).__name__)
