"""Reconciliation of one workflow: read desired and observed state, act on the difference, store the result."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from journal.deployments import decisions, pod_leases
from messages import deployments, hints
from messages.broker import BrokerUnavailable
from models import deployment_token
from models.deployment import ObservedState as Stored
from models.errors import DatabaseUnavailable
from models.lifecycle_policy import LifecycleAction
from workers.cluster.driver import (
    ClusterBusy,
    ClusterError,
    ClusterForbidden,
    ClusterRefused,
    NotDeployed,
    Reason,
    Resources,
    Wanted,
)
from workers.deployer import comparison, rows
from workers.deployer.comparison import Step
from workers.deployer.look_queue import Backoff, Retry
from workers.deployer.refusal_budget import AttemptDeferred, Refusal, RefusalBudget
from workers.deployer.start_clock import StartClock
from workers.deployer.start_gate import StartGate

if TYPE_CHECKING:
    from journal.store import JournalStore
    from messages.broker import Broker
    from models.database import Database
    from models.deployment import Deployment
    from models.pod_processes import PodProcess
    from workers.cluster.driver import Driver, Observed, Pod
    from workers.deployer.connection import ClusterConnection
    from workers.deployer.rows import Found, Sighting
    from workers.deployer.settings import DeployerSettings

log = structlog.get_logger()

WHILE_CHANGING: Final = Backoff(1.0, 30.0)
"""For pods that come and go: the cluster notifies of them, and a retry makes up for what was missed."""
WHILE_DRAINING: Final = Backoff(1.0, 1.0)
"""For runs of a drain: nothing notifies of their ends."""
WHILE_UNAVAILABLE: Final = Backoff(5.0, 60.0)
"""For changes that the cluster has not answered."""
WHILE_REFUSED: Final = Backoff(10.0, 60.0)
"""For changes that the cluster refuses: nothing notifies of a cure."""
WHILE_WAITING_IN_TURN: Final = Backoff(15.0, 60.0)
"""For starts that wait for others: the end of one asks for the next look."""
MARGIN_SECONDS: Final = 0.05
"""How much later than its due time a start is looked at."""
SHARE_OF_HOLD: Final = 0.9
"""After so much of the time for which a workflow is held, its changes are cut off."""
LATER: Final = Retry(WHILE_CHANGING)
IN_TURN: Final = Retry(WHILE_WAITING_IN_TURN)
MUCH_LATER: Final = Retry(WHILE_UNAVAILABLE)
AT_ONCE: Final = Retry(WHILE_CHANGING, within_seconds=0)
"""For a row that somebody else has changed since it was read."""


_TIMED: Final = frozenset({Stored.STARTING, Stored.RUNNING})
"""States that time alone may change."""


@dataclass(frozen=True, slots=True)
class LookResult:
    """Outcome of one look: the retry that it needs, and the generation of the row that it has read."""

    retry: Retry | None
    generation: int | None = None


class Reconciler:
    """Brings workflows to what is desired of them, one at a time each. Any number may run at once."""

    def __init__(
        self,
        name: str,
        settings: DeployerSettings,
        database: Database,
        store: JournalStore,
        broker: Broker,
        connection: ClusterConnection,
        *,
        command: Sequence[str],
        on_admit: Callable[[str], None],
    ) -> None:
        """`on_admit` is called with each workflow whose start has waited for others and may go on."""
        self._name = name
        self._settings = settings
        self._database = database
        self._store = store
        self._broker = broker
        self._connection = connection
        self._command = tuple(command)
        self._applied: set[str] = set()
        """Workflows that this process has applied: others may have done so with other settings."""
        self._clock = StartClock()
        self._gate = StartGate(settings.starts_at_once, on_admit)
        self._refusals = RefusalBudget()

    async def look(self, workflow_id: str) -> LookResult:
        """Bring a workflow nearer to what is desired; raises `DatabaseUnavailable`."""
        found = await rows.find(self._database, workflow_id)
        if found is not None and found.deployment.drain_until is not None:
            settled = await decisions.decide_and_apply(
                self._database, workflow_id, decisions.decide_by_policy
            )
            if settled is not None and settled.decision.action is not LifecycleAction.NONE:
                found = await rows.find(self._database, workflow_id)
        try:
            retry = await self._reconcile(workflow_id, found)
        except Exception:
            self._gate.release(workflow_id)
            raise
        if found is None:
            return LookResult(retry)
        is_draining = found.deployment.is_deployed and found.deployment.drain_until is not None
        if is_draining and retry is not None and retry.backoff is WHILE_CHANGING:
            retry = Retry(WHILE_DRAINING)
        return LookResult(retry, found.deployment.generation)

    async def _reconcile(self, workflow_id: str, found: Found | None) -> Retry | None:
        """Act and store the result; None where nothing more is expected."""
        try:
            driver = await self._connection.driver()
            # Read before the pods are: a holder that is known by then, and is not among the pods, is gone.
            holders = await pod_leases.pod_lease_owners(self._database, workflow_id)
            observed = await driver.observe(workflow_id)
            if comparison.gone(holders, observed):
                # A cache may not know a pod yet that has taken a run already.
                observed = await driver.observe_uncached(workflow_id)
        except ClusterBusy as error:
            return _put_off(workflow_id, error)
        except ClusterError as error:  # a read that is refused says nothing about pods
            return await self._note_trouble(workflow_id, error, comparison.unknown, LATER)
        gone = comparison.gone(holders, observed)
        await self._take_back(workflow_id, gone, comparison.out_of_memory(gone, observed))
        try:
            return await self._bring_about(driver, workflow_id, found, observed)
        except ClusterBusy as error:
            return _put_off(workflow_id, error)
        except AttemptDeferred as error:
            retry = Retry(Backoff(error.seconds, error.seconds))
            return await self._note_refusal(workflow_id, error.refusal, retry)
        except (ClusterForbidden, ClusterRefused) as error:
            self._refusals.charge(workflow_id, _generation(found), error)
            return await self._note_refusal(workflow_id, error, Retry(WHILE_REFUSED))
        except ClusterError as error:
            return await self._note_trouble(workflow_id, error, comparison.unknown, MUCH_LATER)

    async def _bring_about(
        self, driver: Driver, workflow_id: str, found: Found | None, observed: Observed
    ) -> Retry | None:
        if found is None:
            self._forget_start(workflow_id)
            return await self._remove_unknown(driver, observed)
        deployment = found.deployment
        step = self._step(deployment, observed)
        stale = comparison.replaceable(deployment, observed, now=found.now)
        if step is not Step.NONE or stale:
            self._refusals.require(workflow_id, deployment.generation)
        else:
            self._refusals.forget(workflow_id)
        if comparison.is_start(deployment, observed, step) and not self._gate.admit(
            workflow_id, deployment.organization_id
        ):
            return IN_TURN
        if step is not Step.NONE:
            return await self._act(driver, workflow_id)
        if not deployment.is_deployed:
            self._forget_start(workflow_id)
            return None
        if stale:
            observed = await self._replace(driver, workflow_id, stale)
        return await self._note_observed(found, observed)

    async def _replace(self, driver: Driver, workflow_id: str, stale: Collection[Pod]) -> Observed:
        """Have other pods take the places of these; return what there is then. Two deployers may do so at once."""
        reasons = {pod.trouble.reason for pod in stale if pod.trouble is not None}
        await driver.replace(workflow_id, [pod.name for pod in stale])
        log.info("pods replaced", workflow_id=workflow_id, count=len(stale), reasons=sorted(reasons))
        if Reason.INVALID_CONFIG in reasons:
            self._applied.discard(workflow_id)  # something that they need is missing: make it anew
        return await driver.observe(workflow_id)

    def _step(self, deployment: Deployment, observed: Observed) -> Step:
        return comparison.step(deployment, observed, is_applied=deployment.workflow_id in self._applied)

    def _forget_start(self, workflow_id: str) -> None:
        self._clock.forget(workflow_id)
        self._gate.release(workflow_id)

    # ── acting ────────────────────────────────────────────────────────────────────────────────────────────

    async def _act(self, driver: Driver, workflow_id: str) -> Retry | None:
        """Do what is to be done, unless another deployer is at it."""
        if not await rows.hold(self._database, workflow_id, self._name):
            self._gate.release(workflow_id)
            return LATER
        try:
            # A process that was frozen must not go on with what another one has taken over meanwhile.
            async with asyncio.timeout(rows.HELD_SECONDS * SHARE_OF_HOLD):
                # Another deployer may have been at it since it was read.
                found = await rows.find(self._database, workflow_id)
                if found is None:
                    return AT_ONCE
                observed = await driver.observe(workflow_id)
                step = self._step(found.deployment, observed)
                if step is Step.DELETE:
                    return await self._delete(driver, found.deployment)
                await self._carry_out(driver, found, step)
        except TimeoutError:
            log.warning("deployment not carried out in time", workflow_id=workflow_id)
            return LATER
        finally:
            with suppress(DatabaseUnavailable):  # it is free again when its time is up
                await rows.release(self._database, workflow_id, self._name)
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
            self._applied.add(workflow_id)
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

    async def _look_once_more(self, driver: Driver, workflow_id: str) -> Retry | None:
        found = await rows.find(self._database, workflow_id)
        observed = await driver.observe(workflow_id)
        if found is None or self._step(found.deployment, observed) is not Step.NONE:
            return AT_ONCE
        return await self._note_observed(found, observed)

    async def _delete(self, driver: Driver, deployment: Deployment) -> Retry | None:
        holders = await pod_leases.pod_lease_owners(self._database, deployment.workflow_id)
        is_gone = await driver.delete(deployment.workflow_id)
        self._applied.discard(deployment.workflow_id)
        self._forget_start(deployment.workflow_id)
        if is_gone:
            log.info("deployment removed", workflow_id=deployment.workflow_id)
            await self._take_back(deployment.workflow_id, holders)
        return await self._note(deployment, comparison.undeployed(deployment, is_gone=is_gone))

    async def _remove_unknown(self, driver: Driver, observed: Observed) -> Retry | None:
        """Remove what no row accounts for."""
        if not observed.exists and not observed.pods:
            self._refusals.forget(observed.workflow_id)
            return None
        self._refusals.require(observed.workflow_id, None)
        log.warning("deployment without a row removed", workflow_id=observed.workflow_id)
        return None if await driver.delete(observed.workflow_id) else LATER

    async def _take_back(
        self, workflow_id: str, gone: Collection[PodProcess], out_of_memory: Collection[PodProcess] = ()
    ) -> None:
        """Have what processes that are gone have held go on elsewhere, without waiting for the ends of their leases."""
        if gone and await pod_leases.reclaim_pod_leases(
            self._database, self._store, workflow_id, gone, out_of_memory
        ):
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

    # ── storing ───────────────────────────────────────────────────────────────────────────────────────────

    async def _note_observed(self, found: Found, observed: Observed) -> Retry | None:
        """Store what is seen of a workflow that is deployed as desired, and keep count of its start."""
        deployment, now = found.deployment, found.now
        start_time = timedelta(seconds=self._settings.start_seconds)
        stalled_since = self._clock.stalled_since(deployment, observed, now)
        waiting_since = self._clock.waiting_since(deployment.workflow_id)
        sighting = comparison.sighting(
            deployment,
            observed,
            now=now,
            start_time=start_time,
            stalled_since=stalled_since,
            waiting_since=waiting_since,
        )
        is_under_way = observed.is_coming_up and sighting.observed_reason is None
        if is_under_way:
            self._gate.mark_starting(deployment.workflow_id, deployment.organization_id)
        retry = await self._note(deployment, sighting)
        if not is_under_way:
            # Only now: until its end is stored, a start counts for whoever reads the rows.
            self._gate.release(deployment.workflow_id)
        lost_seconds = comparison.seconds_until_replaced(deployment, sighting, now=now)
        if retry is LATER and lost_seconds is not None:
            return Retry(WHILE_CHANGING, lost_seconds + MARGIN_SECONDS)
        if retry is LATER and waiting_since is not None and sighting.observed in _TIMED:
            due_seconds = (waiting_since + start_time - now).total_seconds() + MARGIN_SECONDS
            return Retry(WHILE_CHANGING, due_seconds) if due_seconds > 0 else retry
        return retry

    async def _note(self, deployment: Deployment, sighting: Sighting) -> Retry | None:
        """Store what was seen, and notify whoever waits; None where nothing more is expected."""
        retry = None if comparison.is_settled(deployment, sighting) else LATER
        if sighting == rows.last_sighting(deployment):
            return retry
        if not await rows.note(self._database, deployment, sighting):
            return AT_ONCE
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
        return retry

    async def _note_refusal(self, workflow_id: str, refusal: Refusal, retry: Retry) -> Retry:
        sighting = comparison.refused if isinstance(refusal, ClusterRefused) else comparison.unknown
        return await self._note_trouble(workflow_id, refusal, sighting, retry)

    async def _note_trouble(
        self, workflow_id: str, error: ClusterError, told: Callable[[Deployment, str], Sighting], retry: Retry
    ) -> Retry:
        """Store why nothing is known, or nothing can be done; return when to try again."""
        log.warning("cluster in the way", workflow_id=workflow_id, error=str(error))
        self._gate.release(workflow_id)
        found = await rows.find(self._database, workflow_id)
        if found is None:
            return retry
        noted = await self._note(found.deployment, told(found.deployment, str(error)))
        return AT_ONCE if noted is AT_ONCE else retry

    async def revoke_superseded(self, driver: Driver, workflow_id: str) -> None:
        """Revoke tokens that no pod has any more: those of pods that were replaced, once they are gone."""
        found = await rows.find(self._database, workflow_id)
        observed = await driver.observe(workflow_id)
        if found is None or not (observed.is_rolled_out or not observed.pods):
            return
        # Right after an apply the old pods may still be all that there is.
        before = found.now - timedelta(seconds=self._settings.start_seconds)
        await self._database.transaction(
            partial(
                deployment_token.revoke_superseded_tokens,
                workflow_id=workflow_id,
                before=before,
                now=found.now,
            )
        )


def _generation(found: Found | None) -> int | None:
    return None if found is None else found.deployment.generation


def _put_off(workflow_id: str, error: ClusterBusy) -> Retry:
    """Return when to try again what the cluster has put off; what was seen last still holds."""
    log.info("cluster busy", workflow_id=workflow_id, seconds=error.retry_seconds)
    return Retry(Backoff(error.retry_seconds, max(error.retry_seconds, WHILE_CHANGING.longest_seconds)))
