"""Reconciliation of one workflow: read desired and observed state, act on the difference, store the result."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
from msgspec import Struct

from journal.deployments import activity
from messages import wakeups
from messages.broker import BrokerUnavailable
from models import deployment_token
from models.deployment import ObservedState as Stored
from models.errors import DatabaseUnavailable
from models.lifecycle_policy import LifecycleAction
from telemetry import instruments
from workers.cluster.driver import (
    ClusterBusy,
    ClusterError,
    ClusterForbidden,
    ClusterRefused,
    DesiredDeployment,
    NotDeployed,
    PodFailureReason,
    PodResourceLimits,
)
from workers.deployer import deployment_rows, reconcile
from workers.deployer.reconcile import ReconcileStep
from workers.deployer.reconcile_queue import (
    AttemptDeferred,
    Refusal,
    RefusalBudget,
    RetryBackoff,
    ScheduledRetry,
    StartClock,
    StartGate,
)

if TYPE_CHECKING:
    from journal.store import JournalStore
    from messages.broker import Broker
    from models.database import Database
    from models.deployment import Deployment
    from models.pod_identity import PodProcess
    from workers.cluster.driver import ClusterConnection, ClusterDriver, ObservedDeployment, ObservedPod
    from workers.deployer.deployment_rows import DeploymentSnapshot, ObservedStatus
    from workers.deployer.settings import DeployerSettings

log = structlog.get_logger()

CHANGING_BACKOFF: Final = RetryBackoff(1.0, 30.0)
"""For pods that start or stop: the cluster notifies of their changes, and a retry makes up for lost notifications."""
DRAINING_BACKOFF: Final = RetryBackoff(1.0, 1.0)
"""For runs of a drain: nothing notifies of their ends."""
WHILE_UNAVAILABLE: Final = RetryBackoff(5.0, 60.0)
"""For changes that the cluster has not answered."""
REFUSED_BACKOFF: Final = RetryBackoff(10.0, 60.0)
"""For changes that the cluster refuses: nothing notifies of a cure."""
QUEUED_START_BACKOFF: Final = RetryBackoff(15.0, 60.0)
"""For starts that wait for others: the end of another start triggers the next attempt."""
TIMER_MARGIN_SECONDS: Final = 0.05
"""Delay of a check after the due time of a start."""
LOCK_TIME_FRACTION: Final = 0.9
"""Share of the lock time after which the changes to a workflow are interrupted."""
RETRY_LATER: Final = ScheduledRetry(CHANGING_BACKOFF)
RETRY_IN_TURN: Final = ScheduledRetry(QUEUED_START_BACKOFF)
RETRY_AFTER_REFUSAL: Final = ScheduledRetry(WHILE_UNAVAILABLE)
RETRY_AT_ONCE: Final = ScheduledRetry(CHANGING_BACKOFF, within_seconds=0)
"""For a row that another process has changed since it was read."""


_TIMED_STATES: Final = frozenset({Stored.STARTING, Stored.RUNNING})
"""States that time alone may change."""


class ReconcileResult(Struct, frozen=True):
    """Result of one reconciliation: the needed retry, and the generation of the row that was read."""

    retry: ScheduledRetry | None
    generation: int | None = None


class Reconciler:
    """Reconciler of workflows, one task at a time for each. Any number of reconcilers may run at once."""

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
        """Create a reconciler; it calls `on_admit` with each workflow that may start after a wait.

        `name` is the owner of its locks of deployments, and `command` starts the runner in a pod.
        """
        self._name = name
        self._settings = settings
        self._database = database
        self._store = store
        self._broker = broker
        self._connection = connection
        self._command = tuple(command)
        self._applied: set[str] = set()
        """Workflows that this process has applied. Other deployers may have applied them with other settings."""
        self._clock = StartClock()
        self._gate = StartGate(settings.starts_at_once, on_admit)
        self._refusals = RefusalBudget()

    async def reconcile(self, workflow_id: str) -> ReconcileResult:
        """Take one step that brings a workflow nearer to its desired state; return when to reconcile it again.

        The lifecycle policy decides first about a draining deployment. Errors of the cluster are stored as
        the status. Raises `DatabaseUnavailable`.
        """
        found = await deployment_rows.find_deployment(self._database, workflow_id)
        if found is not None and found.deployment.drain_until is not None:
            settled = await activity.decide_and_apply(self._database, workflow_id, activity.decide_by_policy)
            if settled is not None and settled.decision.action is not LifecycleAction.NONE:
                found = await deployment_rows.find_deployment(self._database, workflow_id)
        try:
            retry = await self._reconcile_found(workflow_id, found)
        except Exception:
            self._gate.release(workflow_id)
            raise
        if found is None:
            return ReconcileResult(retry)
        is_draining = found.deployment.is_deployed and found.deployment.drain_until is not None
        if is_draining and retry is not None and retry.backoff is CHANGING_BACKOFF:
            retry = ScheduledRetry(DRAINING_BACKOFF)
        return ReconcileResult(retry, found.deployment.generation)

    async def _reconcile_found(
        self, workflow_id: str, found: DeploymentSnapshot | None
    ) -> ScheduledRetry | None:
        """Reclaim runs of dead pods, take one step, and store the result; return the retry.

        None if no further change is expected. `found` is None for a workflow without a row, whose objects are
        deleted. Errors of the cluster are stored as the status. Raises `DatabaseUnavailable`.
        """
        try:
            driver = await self._connection.driver()
            # Read before the pods: a lease owner that is known by then and is not among the pods is dead.
            holders = await activity.pod_lease_owners(self._database, workflow_id)
            observed = await driver.observe(workflow_id)
            if reconcile.lost_processes(holders, observed):
                # A cache may not know a pod yet that has already claimed a run.
                observed = await driver.observe_uncached(workflow_id)
        except ClusterBusy as error:
            return _postpone_request(workflow_id, error)
        except ClusterError as error:  # a refused read says nothing about pods
            return await self._store_failure(workflow_id, error, reconcile.unknown_status, RETRY_LATER)
        gone = reconcile.lost_processes(holders, observed)
        await self._reclaim_leases(workflow_id, gone, reconcile.out_of_memory_processes(gone, observed))
        try:
            return await self._converge(driver, workflow_id, found, observed)
        except ClusterBusy as error:
            return _postpone_request(workflow_id, error)
        except AttemptDeferred as error:
            retry = ScheduledRetry(RetryBackoff(error.seconds, error.seconds))
            return await self._note_refusal(workflow_id, error.refusal, retry)
        except (ClusterForbidden, ClusterRefused) as error:
            self._refusals.charge(workflow_id, _get_generation(found), error)
            return await self._note_refusal(workflow_id, error, ScheduledRetry(REFUSED_BACKOFF))
        except ClusterError as error:
            return await self._store_failure(
                workflow_id, error, reconcile.unknown_status, RETRY_AFTER_REFUSAL
            )

    async def _converge(
        self,
        driver: ClusterDriver,
        workflow_id: str,
        found: DeploymentSnapshot | None,
        observed: ObservedDeployment,
    ) -> ScheduledRetry | None:
        """Take the next step that a workflow needs, if any, and store the observed state.

        Returns when to reconcile it again; None if nothing has to be retried. `found` is None for objects of an
        unknown workflow, which are removed. Raises `ClusterError`, `AttemptDeferred` and
        `DatabaseUnavailable`.
        """
        if found is None:
            self._forget_start(workflow_id)
            return await self._remove_unknown(driver, observed)
        deployment = found.deployment
        step = self._plan_step(deployment, observed)
        stale = reconcile.pods_to_replace(deployment, observed, now=found.now)
        if step is not ReconcileStep.NONE or stale:
            self._refusals.require(workflow_id, deployment.generation)
        else:
            self._refusals.forget(workflow_id)
        if reconcile.starts_pods(deployment, observed, step) and not self._gate.admit(
            workflow_id, deployment.organization_id
        ):
            return RETRY_IN_TURN
        if step is not ReconcileStep.NONE:
            return await self._act_under_lock(driver, workflow_id)
        if not deployment.is_deployed:
            self._forget_start(workflow_id)
            return None
        if stale:
            observed = await self._replace(driver, workflow_id, stale)
        return await self._store_observed(found, observed)

    async def _replace(
        self, driver: ClusterDriver, workflow_id: str, stale: Collection[ObservedPod]
    ) -> ObservedDeployment:
        """Stop these pods, so that the cluster starts others; return the observed state after it. Raises
        `ClusterError`.

        Another deployer may do the same at once. If an object that pods need is missing, the next reconciliation
        applies all objects again.
        """
        reasons = {pod.failure.reason for pod in stale if pod.failure is not None}
        await driver.replace(workflow_id, [pod.name for pod in stale])
        log.info("pods replaced", workflow_id=workflow_id, count=len(stale), reasons=sorted(reasons))
        if PodFailureReason.INVALID_CONFIG in reasons:
            self._applied.discard(workflow_id)  # an object that they need is missing: apply all again
        return await driver.observe(workflow_id)

    def _plan_step(self, deployment: Deployment, observed: ObservedDeployment) -> ReconcileStep:
        return reconcile.plan(deployment, observed, is_applied=deployment.workflow_id in self._applied)

    def _forget_start(self, workflow_id: str) -> None:
        self._clock.forget(workflow_id)
        self._gate.release(workflow_id)

    # ── acting ────────────────────────────────────────────────────────────────────────────────────────────

    async def _act_under_lock(self, driver: ClusterDriver, workflow_id: str) -> ScheduledRetry | None:
        """Take the next step of a workflow under its lock against other deployers.

        Returns when to reconcile it again: later if another deployer holds the lock, or the step takes almost
        as long as the lock lasts (15 s); None if nothing has to be retried. Raises `ClusterError`,
        `AttemptDeferred` and `DatabaseUnavailable`.
        """
        if not await deployment_rows.lock_deployment(self._database, workflow_id, self._name):
            self._gate.release(workflow_id)
            return RETRY_LATER
        try:
            # A process that was frozen must not continue after another one has taken over.
            async with asyncio.timeout(deployment_rows.LOCK_SECONDS * LOCK_TIME_FRACTION):
                # Another deployer may have changed the workflow since it was read.
                found = await deployment_rows.find_deployment(self._database, workflow_id)
                if found is None:
                    return RETRY_AT_ONCE
                observed = await driver.observe(workflow_id)
                step = self._plan_step(found.deployment, observed)
                if step is ReconcileStep.DELETE:
                    return await self._delete(driver, found.deployment)
                await self._carry_out(driver, found, step)
        except TimeoutError:
            log.warning("deployment not reconciled in time", workflow_id=workflow_id)
            return RETRY_LATER
        finally:
            with suppress(DatabaseUnavailable):  # the lock expires by itself
                await deployment_rows.unlock_deployment(self._database, workflow_id, self._name)
        return await self._observe_again(driver, workflow_id)

    async def _carry_out(self, driver: ClusterDriver, found: DeploymentSnapshot, step: ReconcileStep) -> None:
        """Apply or scale the objects of a deployment by `step`.

        Nothing happens if the row has changed before the first object of an absent deployment is created, or if the
        objects to scale are gone. Raises `ClusterError` and `DatabaseUnavailable`.
        """
        deployment = found.deployment
        workflow_id = deployment.workflow_id
        if step is ReconcileStep.APPLY:
            if deployment.observed == Stored.ABSENT and not await deployment_rows.store_status(
                self._database, deployment, reconcile.initial_status(deployment)
            ):
                return
            await driver.apply(await self._desired_deployment(found))
            self._applied.add(workflow_id)
        elif step is ReconcileStep.SCALE:
            try:
                await driver.scale(workflow_id, deployment.replicas)
            except NotDeployed:
                return  # it was deleted meanwhile: the next reconciliation handles that
        log.info(
            "deployment carried out",
            workflow_id=workflow_id,
            step=step,
            replicas=deployment.replicas,
            generation=deployment.generation,
        )

    async def _observe_again(self, driver: ClusterDriver, workflow_id: str) -> ScheduledRetry | None:
        found = await deployment_rows.find_deployment(self._database, workflow_id)
        observed = await driver.observe(workflow_id)
        if found is None or self._plan_step(found.deployment, observed) is not ReconcileStep.NONE:
            return RETRY_AT_ONCE
        return await self._store_observed(found, observed)

    async def _delete(self, driver: ClusterDriver, deployment: Deployment) -> ScheduledRetry | None:
        """Delete the objects of an undeployed workflow, and store the status; once they are gone, reclaim the
        runs of its pods.

        Returns when to reconcile it again, None if nothing has to be retried. Raises `ClusterError` and
        `DatabaseUnavailable`.
        """
        holders = await activity.pod_lease_owners(self._database, deployment.workflow_id)
        is_gone = await driver.delete(deployment.workflow_id)
        self._applied.discard(deployment.workflow_id)
        self._forget_start(deployment.workflow_id)
        if is_gone:
            log.info("deployment removed", workflow_id=deployment.workflow_id)
            await self._reclaim_leases(deployment.workflow_id, holders)
        return await self._store_status(deployment, reconcile.undeployed_status(deployment, is_gone=is_gone))

    async def _remove_unknown(
        self, driver: ClusterDriver, observed: ObservedDeployment
    ) -> ScheduledRetry | None:
        """Delete the objects of a workflow without a row; return the retry until none is left, then None.

        Raises `ClusterError` and `AttemptDeferred`.
        """
        if not observed.exists and not observed.pods:
            self._refusals.forget(observed.workflow_id)
            return None
        self._refusals.require(observed.workflow_id, None)
        log.warning("deployment without a row removed", workflow_id=observed.workflow_id)
        return None if await driver.delete(observed.workflow_id) else RETRY_LATER

    async def _reclaim_leases(
        self, workflow_id: str, gone: Collection[PodProcess], out_of_memory: Collection[PodProcess] = ()
    ) -> None:
        """Reclaim the runs of dead pod processes before their leases expire, and wake workers and pods if
        there are any.

        Raises `DatabaseUnavailable`.
        """
        if gone and await activity.reclaim_pod_leases(
            self._database, self._store, workflow_id, gone, out_of_memory
        ):
            with suppress(BrokerUnavailable):  # pods and workers sweep for themselves
                await self._broker.publish({workflow_id: ""})
            # Runs of an undeployed workflow belong to the workers.
            await wakeups.wake_workers(self._broker)

    async def _desired_deployment(self, found: DeploymentSnapshot) -> DesiredDeployment:
        deployment, secret = found.deployment, self._settings.secret
        token = await deployment_rows.ensure_token(self._database, deployment, secret=secret, now=found.now)
        asked = await deployment_rows.pod_resources(self._database, deployment)
        usual = PodResourceLimits()
        return DesiredDeployment(
            workflow_id=deployment.workflow_id,
            organization_id=deployment.organization_id,
            definition_hash=deployment.definition_hash,
            generation=deployment.deployed_generation,
            image=self._settings.runner_image,
            command=self._command,
            token=token,
            replicas=deployment.replicas,
            environment=self._settings.pod_environment(deployment.workflow_id),
            resources=PodResourceLimits(
                cpu_millicores=asked.cpu_millicores or usual.cpu_millicores,
                memory_mebibytes=asked.memory_mebibytes or usual.memory_mebibytes,
            ),
        )

    # ── storing ───────────────────────────────────────────────────────────────────────────────────────────

    async def _store_observed(
        self, found: DeploymentSnapshot, observed: ObservedDeployment
    ) -> ScheduledRetry | None:
        """Store the observed state of a deployed workflow, and count it as a start in progress or not.

        Returns when to reconcile it again: when a lost node or the time limit of a start is due; None if
        nothing is. Raises `DatabaseUnavailable`.
        """
        deployment, now = found.deployment, found.now
        start_time = timedelta(seconds=self._settings.start_seconds)
        stalled_since = self._clock.stalled_since(deployment, observed, now)
        waiting_since = self._clock.waiting_since(deployment.workflow_id)
        status = reconcile.observed_status(
            deployment,
            observed,
            now=now,
            start_time=start_time,
            stalled_since=stalled_since,
            waiting_since=waiting_since,
        )
        is_under_way = observed.is_starting and status.observed_reason is None
        if is_under_way:
            self._gate.mark_starting(deployment.workflow_id, deployment.organization_id)
        retry = await self._store_status(deployment, status)
        if not is_under_way:
            # Only after the write: a start counts for readers of the rows until its end is stored.
            self._gate.release(deployment.workflow_id)
        lost_seconds = reconcile.seconds_until_replaced(deployment, status, now=now)
        if retry is RETRY_LATER and lost_seconds is not None:
            return ScheduledRetry(CHANGING_BACKOFF, lost_seconds + TIMER_MARGIN_SECONDS)
        if retry is RETRY_LATER and waiting_since is not None and status.observed in _TIMED_STATES:
            due_seconds = (waiting_since + start_time - now).total_seconds() + TIMER_MARGIN_SECONDS
            return ScheduledRetry(CHANGING_BACKOFF, due_seconds) if due_seconds > 0 else retry
        return retry

    async def _store_status(self, deployment: Deployment, status: ObservedStatus) -> ScheduledRetry | None:
        """Store a status that differs, and notify waiting clients; return the retry, None if no further
        change is expected.

        A row that has changed meanwhile is reconciled again at once. Raises `DatabaseUnavailable`.
        """
        retry = None if reconcile.is_settled(deployment, status) else RETRY_LATER
        if not status.differs_from(deployment_rows.stored_status(deployment)):
            return retry
        if not await deployment_rows.store_status(self._database, deployment, status):
            return RETRY_AT_ONCE
        has_started = status.observed == Stored.RUNNING and deployment.observed == Stored.STARTING
        if has_started and instruments.is_exposed:
            # The row has changed last with the decision to start.
            seconds = (self._database.clock.now() - deployment.updated_at).total_seconds()
            instruments.histogram("wake_seconds", "start").observe(max(seconds, 0.0))
        log.info(
            "deployment observed",
            workflow_id=deployment.workflow_id,
            observed=status.observed,
            ready=status.ready_replicas,
            reason=status.observed_reason,
            generation=status.observed_generation,
        )
        with suppress(BrokerUnavailable):  # waiting clients poll once a second
            await self._broker.publish({wakeups.deployment_watch_key(deployment.workflow_id): ""})
        return retry

    async def _note_refusal(
        self, workflow_id: str, refusal: Refusal, retry: ScheduledRetry
    ) -> ScheduledRetry:
        status = reconcile.refused_status if isinstance(refusal, ClusterRefused) else reconcile.unknown_status
        return await self._store_failure(workflow_id, refusal, status, retry)

    async def _store_failure(
        self,
        workflow_id: str,
        error: ClusterError,
        make_status: Callable[[Deployment, str], ObservedStatus],
        retry: ScheduledRetry,
    ) -> ScheduledRetry:
        """Store an error of the cluster by the status that `make_status` returns, and free the place of the
        start; return the retry, one at once if the row has changed meanwhile.

        Raises `DatabaseUnavailable`.
        """
        log.warning("cluster operation failed", workflow_id=workflow_id, error=str(error))
        self._gate.release(workflow_id)
        found = await deployment_rows.find_deployment(self._database, workflow_id)
        if found is None:
            return retry
        noted = await self._store_status(found.deployment, make_status(found.deployment, str(error)))
        return RETRY_AT_ONCE if noted is RETRY_AT_ONCE else retry

    async def revoke_superseded(self, driver: ClusterDriver, workflow_id: str) -> None:
        """Revoke tokens of replaced pods, once all pods are of the current deployment or none is left.

        Only tokens that were replaced over `start_seconds` ago: right after an apply, the old pods may be the only
        ones. Raises `DatabaseUnavailable` and `ClusterError`.
        """
        found = await deployment_rows.find_deployment(self._database, workflow_id)
        observed = await driver.observe(workflow_id)
        if found is None or not (observed.is_rolled_out or not observed.pods):
            return
        # Right after an apply the old pods may still be the only ones.
        before = found.now - timedelta(seconds=self._settings.start_seconds)
        await self._database.transaction(
            partial(
                deployment_token.revoke_superseded_tokens,
                workflow_id=workflow_id,
                before=before,
                now=found.now,
            )
        )


def _get_generation(found: DeploymentSnapshot | None) -> int | None:
    return None if found is None else found.deployment.generation


def _postpone_request(workflow_id: str, error: ClusterBusy) -> ScheduledRetry:
    """Return the retry of a request that the API server deferred; the last observed state remains valid."""
    log.info("cluster busy", workflow_id=workflow_id, seconds=error.retry_seconds)
    return ScheduledRetry(
        RetryBackoff(error.retry_seconds, max(error.retry_seconds, CHANGING_BACKOFF.longest_seconds))
    )
