"""Process of the runner: creates and connects all its parts."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Final

import structlog
import uvicorn
import uvloop

from concurrency import gc_tuning
from engine.services import NodeServices
from execution.executor import ExecutorHooks, RunExecutor
from execution.node_blobs import NodeBlobs
from execution.pod_api import PodContact
from execution.user_code import open_pod_code
from journal.blobs.blob_store import RunBlobs
from journal.store import DefinitionKey
from models.errors import DatabaseUnavailable
from nodes import catalog as catalogs
from nodes.connections.data_source_connections import DataSourceConnections
from nodes.connections.data_source_policy import ConnectionPolicy, ServerDatabase
from nodes.lazy_models import LazyModels
from nodes.outbound_http import OutboundClient, OutboundPolicy
from nodes.sandbox.pooled_catalog import PooledCatalog
from nodes.sandbox.processes import ProcessKind, ProcessPool
from runner.gateway_client import CallRefused, GatewayClient
from runner.node_services import (
    RemoteApprovalLinks,
    RemoteBlobStorage,
    RemoteCallbacks,
    RemoteDataSources,
    RemoteEventWaits,
    RemoteModels,
    RemoteRunStarter,
    RemoteSignalWaits,
    RemoteState,
    RemoteThrottle,
)
from runner.orphan_watch import wait_orphaned
from runner.pod_app import PodLifecycle, PodPhase, create_app
from runner.remote_answers import RemoteAnswers
from runner.remote_store import RemoteRunStore
from runner.work_poll import GatewayWorkPoll
from telemetry.exporter import serve_metrics
from telemetry.trace_export import run_tracer

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from models.timestamps import DatabaseClock
    from runner.settings import RunnerSettings

log = structlog.get_logger()

CONTACT_PAUSE_SECONDS: Final = 0.25
LAST_CONTACT_SECONDS: Final = 3.0
KEEP_ALIVE_SECONDS: Final = 75


def serve(settings: RunnerSettings) -> None:
    """Run the pod until a stop signal, or until it is orphaned; then let runs finish, hand off the others, and return.

    It is orphaned if its gateway was away or refused it for `runner_orphan_seconds`, or if its working folder is gone.
    """
    uvloop.run(_serve(settings))


async def _serve(settings: RunnerSettings) -> None:
    """Serve probes, wakeups and metrics of the pod, and execute the runs of its workflow until it should stop.

    It stops on SIGTERM or SIGINT, or when it is orphaned. Runs may then finish for the drain time; the others are
    handed off.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    life = PodLifecycle(settings.token, settings.runner_workflow_id, settings.runner_drain_seconds)
    # It answers from the start, and reports that it is not ready.
    async with (
        serve_app(create_app(life), settings),
        serve_metrics(settings.metrics_address, settings.runner_metrics_port),
        run_tracer(settings, "pod"),
    ):
        gateway = GatewayClient(settings)
        orphaned = asyncio.create_task(_stop_when_orphaned(gateway, settings, stop))
        try:
            contact = await make_first_contact(gateway, settings, stop)
            if contact is not None:
                async with run_executor(settings, gateway, contact, life):
                    gc_tuning.freeze_loaded(asyncio.get_running_loop())
                    log.info("runner ready", workflow_id=settings.runner_workflow_id, pod=settings.runner_pod)
                    await stop.wait()
                    life.stage = PodPhase.DRAINING
                    life.patience_seconds = await _drain_seconds(gateway, settings)
                    log.info("runner drains", patience_seconds=life.patience_seconds)
        finally:
            orphaned.cancel()
            await gateway.close()
    log.info("runner stops")


async def _stop_when_orphaned(gateway: GatewayClient, settings: RunnerSettings, stop: asyncio.Event) -> None:
    """Set `stop` once the pod is orphaned, and log the reason."""
    reason = await wait_orphaned(gateway, settings.runner_orphan_seconds)
    log.warning("runner orphaned", workflow_id=settings.runner_workflow_id, reason=reason)
    stop.set()


async def make_first_contact(
    gateway: GatewayClient, settings: RunnerSettings, stop: asyncio.Event
) -> PodContact | None:
    """Ask the gateway for the definition of this pod, every quarter of a second until it answers, and set the clock.

    Refusals are repeated too. Returns None if `stop` is set before.
    """
    while not stop.is_set():
        try:
            asked_at = time.monotonic()
            contact = await gateway.call("/contact", None, PodContact)
            gateway.clock.learn(contact.now, asked_at)
            return contact
        except (DatabaseUnavailable, CallRefused) as error:
            log.warning("gateway not reached", workflow_id=settings.runner_workflow_id, error=str(error))
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), CONTACT_PAUSE_SECONDS)
    return None


async def _drain_seconds(gateway: GatewayClient, settings: RunnerSettings) -> float:
    """Return the seconds that runs may take to finish before they are handed off.

    0 after a stop by the gateway, which has given them that time already. The setting applies otherwise, and
    if the gateway can't be asked.
    """
    try:
        contact = await gateway.call("/contact", None, PodContact, seconds=LAST_CONTACT_SECONDS)
    except (DatabaseUnavailable, CallRefused) as error:
        log.warning("gateway not reached", workflow_id=settings.runner_workflow_id, error=str(error))
        return settings.runner_drain_seconds
    return 0.0 if contact.is_stopped else settings.runner_drain_seconds


@asynccontextmanager
async def run_executor(
    settings: RunnerSettings, gateway: GatewayClient, contact: PodContact, life: PodLifecycle
) -> AsyncIterator[RunExecutor]:
    """Execute runs of the pod's deployment while the context lasts; yield the executor.

    On exit, runs may finish for `life.patience_seconds`, and the others are handed off to other processes.
    """
    outbound = OutboundClient(OutboundPolicy(allowed_networks=settings.outbound_allowed_networks))
    blobs = RunBlobs(RemoteBlobStorage(gateway))
    processes = ProcessPool(ProcessKind.LIBRARY, limit=settings.cpu_processes)
    catalog = PooledCatalog(catalogs.load_catalog().node_types, processes)
    code = open_pod_code(settings)
    connections = DataSourceConnections(
        RemoteDataSources(gateway), _connection_policy(settings, contact, gateway.clock)
    )
    models = LazyModels(
        lambda: RemoteModels(gateway), settings.outbound_allowed_networks, settings.model_hosts
    )
    answers = RemoteAnswers(gateway)
    services = NodeServices(
        http=outbound,
        data_sources=connections,
        blobs=NodeBlobs(blobs),
        code=code,
        runs=RemoteRunStarter(gateway),
        throttle=RemoteThrottle(gateway),
        events=RemoteEventWaits(gateway),
        signals=RemoteSignalWaits(gateway),
        state=RemoteState(gateway),
        models=models,
        live_answers=answers,
        approvals=RemoteApprovalLinks(gateway),
        callbacks=RemoteCallbacks(gateway),
    )
    store = RemoteRunStore(gateway)
    news = GatewayWorkPoll(gateway, channel=settings.runner_pod)
    executor = RunExecutor(
        store, news, catalog, services, settings, blobs=blobs, hooks=ExecutorHooks(answers=store.answers)
    )
    key = DefinitionKey(contact.organization_id, contact.definition_hash, contact.shard)
    await executor.prepare(key, contact.definition)
    try:
        await executor.start()
        life.wakeup, life.stage = executor.wake, PodPhase.READY
        yield executor
    finally:
        await executor.drain(patience_seconds=life.patience_seconds)
        await answers.close()
        await code.close()
        await processes.close()
        await models.close()
        await connections.close()
        await outbound.close()


def _connection_policy(
    settings: RunnerSettings, contact: PodContact, clock: DatabaseClock
) -> ConnectionPolicy:
    """Return the rules for connections of nodes: they may not connect to the server's own database, which the server
    names in `contact`.
    """
    own = contact.own_database
    return ConnectionPolicy(
        allowed_networks=settings.outbound_allowed_networks,
        tool_server_hosts=frozenset(settings.tool_server_hosts),
        own_databases=(ServerDatabase(own.host, own.port, own.database),) if own else (),
        clock=clock,
    )


class PodServer(uvicorn.Server):
    """Uvicorn server that leaves signals to the runner, because a draining pod still answers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serve_app(app: Starlette, settings: RunnerSettings) -> AsyncIterator[None]:
    """Serve requests at the pod's address while the context lasts. Raises `OSError` if the address can't be bound."""
    server = PodServer(
        uvicorn.Config(
            app,
            host=settings.runner_host,
            port=settings.runner_port,
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
    )
    with server.config.bind_socket() as listener:
        log.info("runner listens", host=settings.runner_host, port=listener.getsockname()[1])
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await task
