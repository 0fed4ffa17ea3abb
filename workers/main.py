"""The worker's process: everything it is made of, in one screen."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import structlog
import uvloop
from prometheus_client import start_http_server

from engine.node import Services
from journal.opening import open_store
from journal.store import Store
from messages import broker as brokers
from messages.broker import Broker
from models import database as databases
from models import migrating
from models.database import Database
from nodes import catalog as catalogs
from nodes.outbound import Outbound, OutboundPolicy
from workers.executor import Executor
from workers.settings import WorkerSettings

log = structlog.get_logger()


def serve(settings: WorkerSettings) -> None:
    """Run until told to stop; raises `InvalidSettings` for what only `pilotflame dev` does without."""
    settings.check_for_production()
    if settings.worker_metrics_port is not None:
        start_http_server(settings.worker_metrics_port, addr="127.0.0.1")
    uvloop.run(_serve(settings))


async def _serve(settings: WorkerSettings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        url = databases.parse_url(settings.database_url)
        database = Database(url)
        await migrating.require_current(database)
        await database.close()
        store = await open_store(url)
        stack.push_async_callback(store.close)
        broker = await brokers.connect(settings.redis_url)
        stack.push_async_callback(broker.close)
        await stack.enter_async_context(working(settings, store, broker))
        gc.collect()
        gc.freeze()
        log.info("worker ready", inbox=broker.inbox)
        await stop.wait()
        log.info("worker stops")


@asynccontextmanager
async def working(settings: WorkerSettings, store: Store, broker: Broker) -> AsyncIterator[Executor]:
    """Work as long as the context lasts; on leaving it, hand over what still runs."""
    outbound = Outbound(OutboundPolicy(allowed_networks=settings.outbound_allowed_networks))
    executor = Executor(store, broker, catalogs.load(), Services(http=outbound), settings)
    try:
        await executor.start()
        yield executor
    finally:
        await executor.drain()
        await outbound.close()
