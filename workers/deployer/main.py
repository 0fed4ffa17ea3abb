"""Process of the deployer: creates and connects all its parts."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
import uvloop

from concurrency import gc_tuning, heartbeat
from journal import clock_sync, process_presence
from journal.store_factory import open_store
from messages.broker_connection import connect_broker
from models import database as databases
from models import schema_migration
from models.database import Database
from telemetry.exporter import serve_metrics
from workers.deployer.deployer import run_deployer

if TYPE_CHECKING:
    from workers.cluster.driver import ClusterDriver
    from workers.deployer.settings import DeployerSettings

log = structlog.get_logger()

COMMAND_OF_IMAGE: Final = ("pilotflame", "runner")
STOP_SECONDS: Final = 3.0
LOCAL_COMMAND: Final = (sys.executable, "-m", "pilotflame", "runner")


def serve(settings: DeployerSettings) -> None:
    """Run a deployer in this process until a stop signal.

    Raises `InvalidSettings` if a setting is missing that only `pilotflame dev` can omit.
    """
    settings.check_for_production()
    uvloop.run(_serve(settings))


async def _serve(settings: DeployerSettings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(heartbeat.run_heartbeat(settings.heartbeat_file))
        await stack.enter_async_context(
            serve_metrics(settings.metrics_address, settings.deployer_metrics_port)
        )
        database = Database(databases.parse_url(settings.database_url))
        stack.push_async_callback(database.close)
        await schema_migration.require_current(database)
        await stack.enter_async_context(clock_sync.run_clock_sync(database))
        store = await open_store(database.url, clock=database.clock, connections=1)
        stack.push_async_callback(store.close)
        broker = await connect_broker(settings.broker_url)
        stack.push_async_callback(broker.close)
        await stack.enter_async_context(process_presence.report_process(database, "deployer"))
        to_cluster = partial(open_driver, settings)
        await stack.enter_async_context(
            run_deployer(settings, database, store, broker, to_cluster, command=runner_command(settings))
        )
        gc_tuning.freeze_loaded(asyncio.get_running_loop())
        log.info("deployer ready", cluster=settings.cluster)
        await stop.wait()
        log.info("deployer stops")


def runner_command(settings: DeployerSettings) -> tuple[str, ...]:
    """Return the command that starts the runner in a pod: of this Python for local pods, else of the image."""
    return LOCAL_COMMAND if settings.cluster == "local" else COMMAND_OF_IMAGE


async def end_pods(driver: ClusterDriver) -> None:
    """Close a driver and end its local pods, which start again with the next deployer. Other pods keep running."""
    from workers.cluster.local_driver import LocalDriver  # noqa: PLC0415 - it is loaded by now, or not needed

    if isinstance(driver, LocalDriver):
        await driver.end_pods(STOP_SECONDS)
    else:
        await driver.close()


async def open_driver(settings: DeployerSettings) -> ClusterDriver:
    """Return the driver for the cluster of the settings, Kubernetes or local processes; raises `ClusterError`."""
    if settings.cluster == "local":
        from workers.cluster import local_driver  # noqa: PLC0415 - without pods, nothing needs its HTTP client
        from workers.cluster.local_pod import LocalPodLimits  # noqa: PLC0415 - the same

        return await local_driver.open_local(
            settings.data_dir / "pods",
            runs_without_isolation=settings.allow_local_pods,
            limits=LocalPodLimits(grace_seconds=settings.grace_seconds),
        )

    from workers.cluster import kubernetes_driver  # noqa: PLC0415 - its client costs 140 MB, which local pods save
    from workers.cluster.kubernetes_api import RequestBudget  # noqa: PLC0415 - the same
    from workers.cluster.manifests import ClusterLayout  # noqa: PLC0415 - the same

    layout = ClusterLayout(
        namespace=settings.kubernetes_namespace,
        gateway_host=settings.kubernetes_gateway_host,
        gateway_namespace=settings.kubernetes_gateway_namespace,
        gateway_port=settings.kubernetes_gateway_port,
        grace_seconds=int(settings.grace_seconds),
        outbound_networks=tuple(map(str, settings.outbound_allowed_networks)),
        image_pull_secrets=settings.kubernetes_image_pull_secrets,
        dns_endpoints=settings.dns_endpoints,
    )
    budget = RequestBudget(settings.kubernetes_requests_per_second)
    return await kubernetes_driver.connect_driver(layout, kubeconfig=settings.kubeconfig, budget=budget)
