"""Deployer: reconciles deployments, one workflow at a time, by their desired and observed state alone.

It learns of changes by messages and by the cluster's watch, and sweeps besides: a lost message costs time
only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from messages.broker import BrokerUnavailable
from messages.deployer_messages import POD_LOGS, DeployerMessage, PodLogRequest
from models import deployment_token, ids
from models.errors import DatabaseUnavailable
from telemetry.process_activity import ACTIVITY
from workers.cluster.driver import ClusterConnection, ClusterError, OpenDriver, PodLogLine
from workers.deployer import deployment_rows
from workers.deployer.reconcile_queue import ReconcileQueue, ScheduledRetry
from workers.deployer.reconciler import CHANGING_BACKOFF, Reconciler, ReconcileResult

if TYPE_CHECKING:
    from journal.store import JournalStore
    from messages.broker import Broker
    from models.database import Database
    from workers.cluster.driver import ClusterDriver
    from workers.deployer.settings import DeployerSettings

log = structlog.get_logger()

CONCURRENT_RECONCILES: Final = 8
"""Workflows that are reconciled at the same time."""
WATCH_AGAIN_SECONDS: Final = 1.0
SWEEPS_PER_COUNT: Final = 12
"""Every so many sweeps all deployments are reconciled, including settled ones and those without a row."""
MAX_LOG_BYTES: Final = 1_000_000

DEPLOYMENTS_QUEUE: Final = "deployments"
"""Name of the queue of deployments to reconcile in the reports of this process."""

CloseDriver = Callable[["ClusterDriver"], Awaitable[None]]


async def release_driver(driver: ClusterDriver) -> None:
    """Close a driver of a cluster; the pods keep running for the next deployer."""
    await driver.close()


@asynccontextmanager
async def run_deployer(
    settings: DeployerSettings,
    database: Database,
    store: JournalStore,
    broker: Broker,
    open_driver: OpenDriver,
    *,
    command: Sequence[str],
    close_driver: CloseDriver = release_driver,
) -> AsyncIterator[Deployer]:
    """Run a deployer, which reconciles desired and observed deployments, while the context lasts; yield it.

    The cluster is opened once a deployment exists. At the end its driver is closed by `close_driver`.
    `command` starts the runner in a pod.
    """
    deployer = Deployer(settings, database, store, broker, open_driver, command=command)
    await deployer.start()
    try:
        yield deployer
    finally:
        driver = await deployer.stop()
        if driver is not None:
            await close_driver(driver)


class Deployer:
    """Deployer of one process. Any number may run at once."""

    def __init__(
        self,
        settings: DeployerSettings,
        database: Database,
        store: JournalStore,
        broker: Broker,
        open_driver: OpenDriver,
        *,
        command: Sequence[str],
    ) -> None:
        # Only one deployer of local pods exists at a time, so after a crash the next one need not wait for
        # its locks.
        self.name = "local" if settings.cluster == "local" else ids.new_id("deployer")
        self._settings = settings
        self._database = database
        self._broker = broker
        self._queue = ReconcileQueue()
        self._connection = ClusterConnection(
            open_driver, cluster=settings.cluster, on_open=lambda driver: self._spawn(self._watch(driver))
        )
        self.reconciler = Reconciler(
            self.name,
            settings,
            database,
            store,
            broker,
            self._connection,
            command=command,
            on_admit=self._queue.add_urgent,
        )
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the tasks that sweep, reconcile eight deployments at a time, and answer messages, until `stop`."""
        ACTIVITY.queues[DEPLOYMENTS_QUEUE] = self._queue.count_queued
        self._broker.start_deployer(self._on_message)
        for loop in (
            self._sweep_forever(),
            *(self._reconcile_forever() for _ in range(CONCURRENT_RECONCILES)),
        ):
            self._spawn(loop)

    async def stop(self) -> ClusterDriver | None:
        """Cancel all tasks, wait for their ends, and return the driver of the cluster, which the caller closes; None if
        it was never opened.

        Deployments stay as they are.
        """
        await self._broker.stop_deployer()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._queue.close()
        return self._connection.current

    def request_reconcile(self, workflow_id: str) -> None:
        """Queue a deployment to be reconciled before the routine ones, since a request waits for it."""
        self._queue.add_urgent(workflow_id)

    def _spawn(self, work: Awaitable[None]) -> None:
        """Run work in a task that `stop` cancels."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_message(self, message: DeployerMessage) -> None:
        if isinstance(message, PodLogRequest):
            self._spawn(self._send_logs(message))
        else:
            self.request_reconcile(message.workflow_id)

    # ── scheduling ──────────────────────────────────────────────────────────────────────────────────────────

    async def _reconcile_forever(self) -> None:
        """Reconcile queued deployments one after another, and schedule their retries; errors are logged."""
        while True:
            workflow_id = await self._queue.take()
            result = ReconcileResult(ScheduledRetry(CHANGING_BACKOFF))
            try:
                result = await self.reconciler.reconcile(workflow_id)
            except DatabaseUnavailable as error:
                log.warning("database not reached", workflow_id=workflow_id, error=str(error))
            except Exception:  # this is the outermost loop
                log.exception("deployment not reconciled", workflow_id=workflow_id)
            finally:
                self._queue.finish(workflow_id, result.retry, generation=result.generation)

    async def _sweep_forever(self) -> None:
        """Queue deployments that need reconciliation at each sweep, and all of them at every twelfth, until canceled;
        errors are logged.
        """
        sweeps = 0
        while True:
            try:
                await self._add_all(deployment_rows.list_unsettled)
                if sweeps % SWEEPS_PER_COUNT == 0:
                    await self._request_all()
                sweeps += 1
            except DatabaseUnavailable as error:
                log.warning("database not reached", error=str(error))
            except ClusterError as error:
                log.warning("cluster not reached", error=str(error))
                sweeps += 1
            except Exception:  # this is the outermost loop
                log.exception("deployments not swept")
            await asyncio.sleep(self._settings.deployer_sweep_seconds)

    async def _add_all(self, batch: Callable[..., Awaitable[Sequence[tuple[str, int]]]]) -> set[str]:
        """Queue the workflows of all batches of rows, in case their messages were lost; return their ids.

        `batch` reads the rows that follow a workflow id. A workflow with a scheduled retry waits for it. Raises
        `DatabaseUnavailable`.
        """
        found: set[str] = set()
        after = ""
        while some := await batch(self._database, after=after):
            for workflow_id, generation in some:
                self._queue.add_unless_scheduled(workflow_id, generation)
                found.add(workflow_id)
            after = some[-1][0]
        return found

    async def _request_all(self) -> None:
        """Queue all workflows with a deployed row or with objects in the cluster, and revoke tokens of
        replaced pods.

        Does not open the cluster if nothing is deployed. Raises `DatabaseUnavailable` and `ClusterError`.
        """
        known = await self._add_all(deployment_rows.list_present)
        if not known and self._connection.current is None:
            return  # nothing is deployed: the cluster need not be opened
        driver = await self._connection.driver()
        for observed in await driver.list():
            if observed.workflow_id not in known:
                self._queue.add(observed.workflow_id)
        async with self._database.read() as connection:
            superseded = await deployment_token.list_workflows_with_superseded_tokens(connection)
        for workflow_id in superseded:
            await self.reconciler.revoke_superseded(driver, workflow_id)

    async def _watch(self, driver: ClusterDriver) -> None:
        """Queue the workflows whose objects in the cluster change; after an error, watch again in a second."""
        while True:
            try:
                async for workflow_id in driver.watch():
                    self._queue.add(workflow_id)
            except Exception:  # this is the outermost loop
                log.exception("cluster not watched")
            await asyncio.sleep(WATCH_AGAIN_SECONDS)

    # ── logs of pods ────────────────────────────────────────────────────────────────────────────────────────

    async def _send_logs(self, request: PodLogRequest) -> None:
        """Send the last log lines of a workflow's pods, or the error, to the gateway that asked for them."""
        try:
            driver = await self._connection.driver()
            lines = await driver.logs(request.workflow_id, limit=request.limit)
        except ClusterError as error:
            direct_message = {POD_LOGS: request.request_id, "error": str(error)}
        else:
            direct_message = {POD_LOGS: request.request_id, "lines": _encode_log_lines(lines)}
        with suppress(BrokerUnavailable):  # the gateway asks its client to try again
            await self._broker.send(request.channel, direct_message)


def _encode_log_lines(lines: Sequence[PodLogLine]) -> str:
    """Return the last lines whose texts have a million characters together at most, as a JSON list."""
    kept: list[PodLogLine] = []
    size = 0
    for line in reversed(lines):
        size += len(line.text)
        if size > MAX_LOG_BYTES:
            break
        kept.append(line)
    return msgspec.json.encode(kept[::-1]).decode()
