"""Composition root of the bridge process."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack

import structlog
import uvloop

from bridge.message_source import MessageSource
from bridge.queue_gateway import QueueGateway
from bridge.queue_transfer import QueueTransfer
from bridge.settings import BridgeSettings, RabbitmqBridgeSettings, RedisBridgeSettings, SqsBridgeSettings
from concurrency import heartbeat

log = structlog.get_logger()


def serve(settings: BridgeSettings) -> None:
    """Run the bridge from a message queue to a workflow until SIGTERM or SIGINT; blocks.

    Raises `BridgeRefused` for failures that an operator must fix, and `InvalidSettings`.
    """
    uvloop.run(_serve(settings))


async def _serve(settings: BridgeSettings) -> None:
    """Move messages of the configured queue to the workflow until SIGTERM or SIGINT,
    with a heartbeat file if it is set.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(heartbeat.run_heartbeat(settings.heartbeat_file))
        source = open_source(settings)
        stack.push_async_callback(source.close)
        gateway = QueueGateway(settings)
        stack.push_async_callback(gateway.close)
        transfer = QueueTransfer(
            source,
            gateway,
            stop,
            on_refused=settings.bridge_on_refused,
            batch=settings.bridge_batch,
            wait_seconds=settings.bridge_wait_seconds,
            hold_seconds=settings.bridge_hold_seconds,
        )
        log.info("bridge begins", source=source.label, workflow_id=settings.bridge_workflow)
        try:
            await transfer.run()
        finally:
            log.info("bridge stops", accepted=transfer.accepted, duplicates=transfer.duplicates)


def open_source(settings: BridgeSettings) -> MessageSource:
    """Return the client of the queue (Redis, SQS or RabbitMQ) that these settings describe.

    It connects when messages are first taken. Raises `InvalidSettings` for an unusable name and for missing credentials
    of SQS, and `TypeError` for other settings.
    """
    match settings:
        case RedisBridgeSettings():
            from bridge.redis_stream import RedisStream  # noqa: PLC0415 - each source loads a client of its own

            return RedisStream(settings)
        case SqsBridgeSettings():
            from bridge.sqs_queue import SqsQueue  # noqa: PLC0415 - as above

            return SqsQueue(settings)
        case RabbitmqBridgeSettings():
            from bridge.rabbitmq_queue import RabbitmqQueue  # noqa: PLC0415 - its library is optional

            return RabbitmqQueue(settings)
    raise TypeError(f"{type(settings).__name__} names no source")
