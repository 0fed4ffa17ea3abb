"""Process of the worker: creates and connects all its parts."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
import uvloop

from concurrency import gc_tuning, heartbeat
from engine.services import NodeServices
from execution import abandoned_runs, due_runs, task_sweeps
from execution.answer_messages import BrokerAnswers
from execution.approval_link_urls import ApprovalLinkUrls
from execution.callback_urls import CallbackUrls
from execution.child_runs import ChildRunStarter
from execution.event_matching import EventMatcher
from execution.executor import ExecutorHooks, RunExecutor
from execution.message_signer import MessageSigner
from execution.node_blobs import NodeBlobs
from execution.shared_throttle import SharedThrottle
from execution.signal_waits import SignalWaits
from execution.state_publisher import StatePublisher
from execution.stored_data_sources import StoredDataSources
from execution.trials import TrialGate
from execution.user_code import open_worker_code
from journal import clock_sync, log_levels, worker_presence
from journal.blobs.blob_store_factory import open_blobs
from journal.store import JournalStore
from journal.store_factory import open_store
from journal.tasks.task_upkeep import TaskUpkeep
from journal.waits import node_answers
from messages.broker import Broker
from messages.broker_connection import connect_broker
from messages.message_seal import MessageSeal
from models import database as databases
from models import schema_migration
from models.database import Database
from models.encryption import SecretVault
from models.execution import ISOLATED_TARGET, UNPARSED_TARGET, WORKERS_QUEUE
from models.worker_processes import new_lease_owner
from nodes import catalog as catalogs
from nodes.connections.data_source_connections import DataSourceConnections
from nodes.connections.data_source_policy import ConnectionPolicy, ServerDatabase
from nodes.connections.organization_folders import OrganizationFolders
from nodes.lazy_models import LazyModels
from nodes.outbound_http import OutboundClient, OutboundPolicy
from nodes.sandbox.pooled_catalog import PooledCatalog
from nodes.sandbox.processes import ProcessKind, ProcessPool
from telemetry.exporter import serve_metrics
from telemetry.process_activity import ACTIVITY
from telemetry.trace_export import run_tracer
from workers import lost_worker_leases
from workers.approval_mails import ApprovalMailer
from workers.completion_actions import CompletionActions
from workers.mail_parsing import MailParser, MailSources
from workers.settings import WorkerSettings
from workers.webhook_delivery import WebhookSender

if TYPE_CHECKING:
    from nodes.ai.model_connection import ModelConnections
    from nodes.connections.data_source import ConnectionSources

log = structlog.get_logger()

TAKEN_QUEUES: Final = (WORKERS_QUEUE, UNPARSED_TARGET, ISOLATED_TARGET)
"""Queues from which every worker takes runs."""


def serve(settings: WorkerSettings, announce: Callable[[str], None]) -> None:
    """Run a worker in this process until a stop signal. Raises `InvalidSettings` if a setting is missing that
    only `pilotflame dev` can omit.

    `announce` is called with the name in the leases of this process before it takes the first lease.
    """
    settings.check_for_production()
    uvloop.run(_serve(settings, announce))


async def _serve(settings: WorkerSettings, announce: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(heartbeat.run_heartbeat(settings.heartbeat_file))
        await stack.enter_async_context(serve_metrics(settings.metrics_address, settings.worker_metrics_port))
        await stack.enter_async_context(run_tracer(settings, "worker"))
        url = databases.parse_url(settings.database_url)
        database = Database(url)
        stack.push_async_callback(database.close)
        await schema_migration.require_current(database)
        await stack.enter_async_context(clock_sync.run_clock_sync(database))
        store = await open_store(url, clock=database.clock)
        stack.push_async_callback(store.close)
        owner = new_lease_owner(settings.worker_name)
        seal = MessageSeal.from_settings(settings, database.clock)
        broker = await connect_broker(settings.broker_url, channel=owner, seal=seal)
        stack.push_async_callback(broker.close)
        await lost_worker_leases.reclaim_predecessor_leases(database, store, broker, settings.worker_name)
        announce(owner)
        await stack.enter_async_context(run_worker(settings, store, broker, database))
        gc_tuning.freeze_loaded(asyncio.get_running_loop())
        log.info("worker ready", channel=broker.channel)
        await stop.wait()
        log.info("worker stops")


@asynccontextmanager
async def run_worker(
    settings: WorkerSettings, store: JournalStore, broker: Broker, database: Database
) -> AsyncIterator[RunExecutor]:
    """Run the parts of a worker during the block: executor of runs, parser of mails, completion actions and
    approval mails.

    Yields the executor. On exit, runs may finish at the boundary of a node, and the others are handed off to
    other processes. Runs go through the store, everything less frequent through the database.
    """
    outbound = OutboundClient(OutboundPolicy(allowed_networks=settings.outbound_allowed_networks))
    blobs = open_blobs(settings)
    files = OrganizationFolders(settings.files_dir)
    processes = ProcessPool(ProcessKind.LIBRARY, limit=settings.cpu_processes)
    catalog = PooledCatalog(catalogs.load_catalog().node_types, processes)
    code = open_worker_code(settings)
    vault = SecretVault(settings.secret, settings.previous_secrets)
    sources = StoredDataSources(database, vault)
    connections = DataSourceConnections(
        sources,
        ConnectionPolicy(
            allowed_networks=settings.outbound_allowed_networks,
            tool_server_hosts=frozenset(settings.tool_server_hosts),
            own_databases=(ServerDatabase.from_url(settings.database_url),),
            files=settings.files_dir,
            clock=database.clock,
            max_sqlite_processes=settings.cpu_processes,
        ),
    )
    runs = ChildRunStarter(database, store, broker, catalog, settings)
    signer = MessageSigner(database, vault)
    models = LazyModels(
        partial(_open_models, database, sources), settings.outbound_allowed_networks, settings.model_hosts
    )
    answers = BrokerAnswers(broker, MessageSeal.from_settings(settings, database.clock))
    services = NodeServices(
        http=outbound,
        data_sources=connections,
        files=files,
        blobs=NodeBlobs(blobs),
        code=code,
        runs=runs,
        throttle=SharedThrottle(database),
        events=EventMatcher(database, broker),
        signals=SignalWaits(database, broker),
        state=StatePublisher(database),
        models=models,
        live_answers=answers,
        approvals=ApprovalLinkUrls(database, settings.secret, settings.public_url),
        callbacks=CallbackUrls(signer, settings.secret, settings.public_url),
    )
    webhooks = WebhookSender(signer, outbound)
    after = CompletionActions(
        database, store, broker, blobs, webhooks, runs, sweep_seconds=settings.sweep_seconds
    )
    approval_mails = ApprovalMailer(
        database, connections, settings.secret, settings.public_url, sweep_seconds=settings.sweep_seconds
    )
    isolation = TrialGate()
    ACTIVITY.queues |= dict.fromkeys(TAKEN_QUEUES)
    following = AsyncExitStack()
    levels = await following.enter_async_context(log_levels.follow_log_levels(database))
    executor = RunExecutor(
        store,
        broker,
        catalog,
        services,
        settings,
        blobs=blobs,
        hooks=ExecutorHooks(
            answers=partial(node_answers.read_answers, database),
            on_left=after.handle_end,
            on_swept=partial(_sweep_unattended_runs, database, store, broker),
            log_levels=levels,
        ),
        isolation=isolation,
    )
    reader = MailParser(
        database,
        store,
        broker,
        blobs,
        MailSources(connections, services.throttle),
        settings,
        on_left=after.handle_end,
        isolation=isolation,
    )
    try:
        await answers.start()
        await executor.start()
        after.start()
        approval_mails.start()
        reader.start()
        async with worker_presence.report_presence(
            database, broker.channel, settings.concurrency, executor.count_held_runs
        ):
            yield executor
    finally:
        await reader.close()
        await executor.drain()
        await answers.close()
        await following.aclose()
        await approval_mails.close()
        await after.close()
        await code.close()
        await processes.close()
        await models.close()
        await connections.close()
        files.close()
        await blobs.close()
        await outbound.close()


def _open_models(database: Database, sources: ConnectionSources) -> ModelConnections:
    from execution.stored_models import StoredModels  # noqa: PLC0415 - loaded with the first call of a model

    return StoredModels(database, sources, is_deferring=True)


async def _sweep_unattended_runs(database: Database, store: JournalStore, broker: Broker) -> None:
    """Request abandoned child runs to end, wake deployments with due runs, and move tasks whose lease, deadline or
    delay is over, whether or not a scheduler does so too.

    Raises `DatabaseUnavailable`.
    """
    await abandoned_runs.end_abandoned_runs(database, store, broker)
    await due_runs.wake_due_deployments(database, broker)
    await task_sweeps.move_due_tasks(database, TaskUpkeep(database), broker)
