"""Looks after deployments, one workflow at a time: whatever has happened, what is wanted and what there is decide.

It hears of changes by messages and by the cluster, and looks for itself besides: a lost word costs time only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from journal import decisions, pod_leases
from messages import deployments, hints
from messages.broker import BrokerUnavailable
from messages.deployments import DeployerMessage, ReadPodLogs
from models import deployment_token, ids
from models.database import DatabaseUnavailable
from models.deployment import Observed as Stored
from models.lifecycle import LifecycleAction
from workers.cluster.driver import (
    ClusterError,
    ClusterUnavailable,
    LogLine,
    NotDeployed,
    Resources,
    Wanted,
)
from workers.deployer import comparison, rows
from workers.deployer.comparison import Step

if TYPE_CHECKING:
    from datetime import datetime

    from journal.store import Store
    from messages.broker import Broker
    from models.database import Database
    from models.deployment import Deployment
    from models.pod_processes import PodProcess
    from workers.cluster.driver import Driver, Observed
    from workers.deployer.rows import Found, Sighting
    from workers.deployer.settings import DeployerSettings

log = structlog.get_logger()

AT_ONCE: Final = 8
"""Workflows that are looked after at the same time."""
LOOK_AGAIN_SECONDS: Final = 1.0
"""When to look again at what is on its way, should the cluster say nothing."""
SWEEPS_PER_COUNT: Final = 12
"""Every so many sweeps everything is looked at, also what seems settled, and what no row accounts for."""
MAX_LOG_BYTES: Final = 1_000_000

OpenDriver = Callable[[], Awaitable["Driver"]]
CloseDriver = Callable[["Driver"], Awaitable[None]]


async def leave(driver: Driver) -> None:
    """Let go of a cluster whose pods live on for the next deployer."""
    await driver.close()


@asynccontextmanager
async def deploying(
    settings: DeployerSettings,
    database: Database,
    store: Store,
    broker: Broker,
    open_driver: OpenDriver,
    *,
    command: Sequence[str],
    close_driver: CloseDriver = leave,
) -> AsyncIterator[Deployer]:
    """Look after deployments as long as the context lasts; the cluster is opened once there is one."""
    deployer = Deployer(settings, database, store, broker, open_driver, command=command)
    await deployer.start()
    try:
        yield deployer
    finally:
        driver = await deployer.stop()
        if driver is not None:
            await close_driver(driver)


class Deployer:
    """One of any number."""

    def __init__(
        self,
        settings: DeployerSettings,
        database: Database,
        store: Store,
        broker: Broker,
        open_driver: OpenDriver,
        *,
        command: Sequence[str],
    ) -> None:
        # Of local pods there is one deployer at a time: after a crash the next one need not wait.
        self.name = "local" if settings.cluster == "local" else ids.new("deployer")
        self._settings = settings
        self._database = database
        self._store = store
        self._broker = broker
        self._open_driver = open_driver
        self._command = tuple(command)
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._queued: set[str] = set()
        self._in_hand: set[str] = set()
        self._again: set[str] = set()
        self._applied: dict[str, datetime] = {}
        """What was applied by this process, and when last: others may have done so with other settings."""
        self._driver: Driver | None = None
        self._opening = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to look after deployments."""
        self._broker.start_deployer(self._take)
        for loop in (self._sweep_on(), *(self._look_on() for _ in range(AT_ONCE))):
            self._spawn(loop)

    async def stop(self) -> Driver | None:
        """Leave everything as it is for the next deployer; returns the way to the cluster, where it was opened."""
        await self._broker.stop_deployer()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return self._driver

    def look_at(self, workflow_id: str) -> None:
        """Have a deployment looked at soon."""
        if workflow_id not in self._queued:
            self._queued.add(workflow_id)
            self._queue.put_nowait(workflow_id)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _take(self, message: DeployerMessage) -> None:
        if isinstance(message, ReadPodLogs):
            self._spawn(self._send_logs(message))
        else:
            self.look_at(message.workflow_id)

    # ── when to look ──────────────────────────────────────────────────────────────────────────────────────

    async def _look_on(self) -> None:
        while True:
            workflow_id = await self._queue.get()
            self._queued.discard(workflow_id)
            if workflow_id in self._in_hand:
                self._again.add(workflow_id)
                continue
            self._in_hand.add(workflow_id)
            try:
                if not await self._look(workflow_id):
                    self._look_later(workflow_id)
            except DatabaseUnavailable as error:
                log.warning("database not reached", workflow_id=workflow_id, error=str(error))
                self._look_later(workflow_id)
            except Exception:  # this is the outermost loop
                log.exception("deployment not looked after", workflow_id=workflow_id)
            finally:
                self._in_hand.discard(workflow_id)
                if workflow_id in self._again:
                    self._again.discard(workflow_id)
                    self.look_at(workflow_id)

    def _look_later(self, workflow_id: str) -> None:
        asyncio.get_running_loop().call_later(LOOK_AGAIN_SECONDS, self.look_at, workflow_id)

    async def _sweep_on(self) -> None:
        sweeps = 0
        while True:
            try:
                await self._add_all(rows.unsettled)
                if sweeps % SWEEPS_PER_COUNT == 0:
                    await self._count()
                sweeps += 1
            except DatabaseUnavailable as error:
                log.warning("database not reached", error=str(error))
            except ClusterError as error:
                log.warning("cluster not reached", error=str(error))
                sweeps += 1
            except Exception:  # this is the outermost loop
                log.exception("deployments not looked for")
            await asyncio.sleep(self._settings.deployer_sweep_seconds)

    async def _add_all(self, batch: Callable[..., Awaitable[Sequence[str]]]) -> set[str]:
        found: set[str] = set()
        after = ""
        while some := await batch(self._database, after=after):
            for workflow_id in some:
                self.look_at(workflow_id)
            found.update(some)
            after = some[-1]
        return found

    async def _count(self) -> None:
        """Look at everything that there is, by the rows and by the cluster."""
        known = await self._add_all(rows.present)
        if not known and self._driver is None:
            return  # nothing is deployed: the cluster need not be opened for that
        driver = await self._cluster()
        for observed in await driver.list():
            self.look_at(observed.workflow_id)
        async with self._database.read() as connection:
            superseded = await deployment_token.superseded(connection)
        for workflow_id in superseded:
            await self._revoke_superseded(driver, workflow_id)

    async def _watch(self, driver: Driver) -> None:
        while True:
            try:
                async for workflow_id in driver.watch():
                    self.look_at(workflow_id)
            except Exception:  # this is the outermost loop
                log.exception("cluster not watched")
            await asyncio.sleep(LOOK_AGAIN_SECONDS)

    async def _cluster(self) -> Driver:
        """Return the way to the cluster; raises what opening it does."""
        async with self._opening:
            if self._driver is None:
                self._driver = await self._open_driver()
                log.info("cluster opened", cluster=self._settings.cluster)
                self._spawn(self._watch(self._driver))
            return self._driver

    # ── one look ──────────────────────────────────────────────────────────────────────────────────────────

    async def _look(self, workflow_id: str) -> bool:
        """Bring a deployment nearer to what is wanted; False where it is to be looked at again soon."""
        found = await rows.find(self._database, workflow_id)
        if found is not None and found.deployment.drain_until is not None:
            settled = await decisions.settle(self._database, workflow_id, decisions.by_policy)
            if settled is not None and settled.decision.action is not LifecycleAction.NONE:
                found = await rows.find(self._database, workflow_id)
        try:
            driver = await self._cluster()
            # Read before the pods are: whoever holds a run by then, and isn't found among them, is gone.
            holders = await pod_leases.holders(self._database, workflow_id)
            observed = await driver.observe(workflow_id)
            await self._take_back(workflow_id, comparison.gone(holders, observed))
            if found is None:
                return await self._remove_unknown(driver, observed)
            if self._step(found.deployment, observed) is not Step.NONE:
                return await self._act(driver, workflow_id)
            if not found.deployment.is_deployed:
                return True
            return await self._note(found.deployment, self._sighting(found, observed))
        except ClusterUnavailable as error:
            return await self._note_trouble(workflow_id, error, comparison.unknown)
        except ClusterError as error:
            return await self._note_trouble(workflow_id, error, comparison.refused)

    def _step(self, deployment: Deployment, observed: Observed) -> Step:
        return comparison.step(deployment, observed, is_applied=deployment.workflow_id in self._applied)

    def _sighting(self, found: Found, observed: Observed) -> Sighting:
        start_time = timedelta(seconds=self._settings.start_seconds)
        return comparison.sighting(
            found.deployment,
            observed,
            now=found.now,
            start_time=start_time,
            applied_at=self._applied.get(found.deployment.workflow_id),
        )

    async def _act(self, driver: Driver, workflow_id: str) -> bool:
        """Do what is to be done, unless another deployer is at it."""
        if not await rows.hold(self._database, workflow_id, self.name):
            return False
        try:
            # Another deployer may have been at it since it was read.
            found = await rows.find(self._database, workflow_id)
            if found is None:
                return False
            observed = await driver.observe(workflow_id)
            step = self._step(found.deployment, observed)
            if step is Step.DELETE:
                return await self._delete(driver, found.deployment)
            await self._carry_out(driver, found, step)
        finally:
            with suppress(DatabaseUnavailable):  # it is free again when its time is up
                await rows.release(self._database, workflow_id, self.name)
        return await self._look_once_more(driver, workflow_id)

    async def _carry_out(self, driver: Driver, found: Found, step: Step) -> None:
        deployment = found.deployment
        workflow_id = deployment.workflow_id
        if step is Step.APPLY:
            if deployment.observed == Stored.ABSENT and not await rows.note(
                self._database, deployment, comparison.begun(deployment)
            ):
                return
            await driver.apply(await self._wanted(found))
            self._applied[workflow_id] = found.now
        elif step is Step.SCALE:
            try:
                await driver.scale(workflow_id, deployment.replicas)
            except NotDeployed:
                return  # it has just gone: the next look sees that
        log.info(
            "deployment carried out",
            workflow_id=workflow_id,
            step=step,
            replicas=deployment.replicas,
            generation=deployment.generation,
        )

    async def _look_once_more(self, driver: Driver, workflow_id: str) -> bool:
        found = await rows.find(self._database, workflow_id)
        observed = await driver.observe(workflow_id)
        if found is None or self._step(found.deployment, observed) is not Step.NONE:
            return False
        return await self._note(found.deployment, self._sighting(found, observed))

    async def _delete(self, driver: Driver, deployment: Deployment) -> bool:
        holders = await pod_leases.holders(self._database, deployment.workflow_id)
        is_gone = await driver.delete(deployment.workflow_id)
        self._applied.pop(deployment.workflow_id, None)
        if is_gone:
            log.info("deployment removed", workflow_id=deployment.workflow_id)
            await self._take_back(deployment.workflow_id, holders)
        return await self._note(deployment, comparison.undeployed(deployment, is_gone=is_gone))

    async def _remove_unknown(self, driver: Driver, observed: Observed) -> bool:
        """Remove what no row accounts for."""
        if not observed.exists and not observed.pods:
            return True
        log.warning("deployment without a row removed", workflow_id=observed.workflow_id)
        return await driver.delete(observed.workflow_id)

    async def _take_back(self, workflow_id: str, gone: Collection[PodProcess]) -> None:
        """Have what processes that are gone have held go on elsewhere, without waiting for the ends of their leases."""
        if gone and await pod_leases.take_back(self._store, workflow_id, gone):
            with suppress(BrokerUnavailable):  # pods and workers look for themselves
                await self._broker.announce({workflow_id: ""})
            # Of what is deployed no more, runs are any worker's.
            await hints.wake(self._broker)

    async def _wanted(self, found: Found) -> Wanted:
        deployment, secret = found.deployment, self._settings.secret
        token = await rows.token(self._database, deployment, secret=secret, now=found.now)
        asked = await rows.resources(self._database, deployment)
        usual = Resources()
        return Wanted(
            workflow_id=deployment.workflow_id,
            organization_id=deployment.organization_id,
            definition_hash=deployment.definition_hash,
            generation=deployment.deployed_generation,
            image=self._settings.runner_image,
            command=self._command,
            token=token,
            replicas=deployment.replicas,
            environment=self._settings.pod_environment(deployment.workflow_id),
            resources=Resources(
                cpu_millicores=asked.cpu_millicores or usual.cpu_millicores,
                memory_mebibytes=asked.memory_mebibytes or usual.memory_mebibytes,
            ),
        )

    # ── what is told ──────────────────────────────────────────────────────────────────────────────────────

    async def _note(self, deployment: Deployment, sighting: Sighting) -> bool:
        """Store what was seen, and tell whoever waits; False where it is to be looked at again soon."""
        is_left_to_sweeps = sighting.observed in {Stored.FAILED, Stored.OUTDATED, Stored.UNKNOWN}
        is_done = is_left_to_sweeps or comparison.is_settled(deployment, sighting)
        if sighting == rows.last_sighting(deployment):
            return is_done
        if not await rows.note(self._database, deployment, sighting):
            self.look_at(deployment.workflow_id)
            return True
        log.info(
            "deployment observed",
            workflow_id=deployment.workflow_id,
            observed=sighting.observed,
            ready=sighting.ready_replicas,
            reason=sighting.observed_reason,
            generation=sighting.observed_generation,
        )
        with suppress(BrokerUnavailable):  # whoever waits looks once a second
            await self._broker.announce({deployments.changed(deployment.workflow_id): ""})
        return is_done

    async def _note_trouble(
        self, workflow_id: str, error: ClusterError, told: Callable[[Deployment, str], Sighting]
    ) -> bool:
        log.warning("cluster in the way", workflow_id=workflow_id, error=str(error))
        found = await rows.find(self._database, workflow_id)
        return found is None or await self._note(found.deployment, told(found.deployment, str(error)))

    async def _revoke_superseded(self, driver: Driver, workflow_id: str) -> None:
        """Revoke tokens that no pod has any more: those of pods that were replaced, once they are gone."""
        found = await rows.find(self._database, workflow_id)
        observed = await driver.observe(workflow_id)
        if found is None or not (observed.is_rolled_out or not observed.pods):
            return
        # Right after an apply the old pods may still be all that there is.
        before = found.now - timedelta(seconds=self._settings.start_seconds)
        await self._database.transaction(
            partial(deployment_token.revoke_superseded, workflow_id=workflow_id, before=before, now=found.now)
        )

    async def _send_logs(self, asked: ReadPodLogs) -> None:
        try:
            driver = await self._cluster()
            lines = await driver.logs(asked.workflow_id, limit=asked.limit)
        except ClusterError as error:
            letter = {"pod_logs": asked.asked, "error": str(error)}
        else:
            letter = {"pod_logs": asked.asked, "lines": _encoded(lines)}
        with suppress(BrokerUnavailable):  # whoever asked is told to ask again
            await self._broker.send(asked.inbox, letter)


def _encoded(lines: Sequence[LogLine]) -> str:
    """Return the last lines that fit into a letter, as JSON."""
    kept: list[LogLine] = []
    size = 0
    for line in reversed(lines):
        size += len(line.text)
        if size > MAX_LOG_BYTES:
            break
        kept.append(line)
    return msgspec.json.encode(kept[::-1]).decode()
