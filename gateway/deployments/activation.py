"""Activation of deployments: requests of this gateway that wait for the same deployment share one watch.

Callers wait until a pod has taken the run, not until the pod is ready. A forwarded run is a wakeup: if the
pod refuses it, nothing is lost, because the rows hold all work, no matter who starts or stops the deployment
meanwhile. The watch wakes the deployment as often as needed, and reports reasons that keep its pods away.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import structlog
from msgspec import Struct, field
from starlette.requests import ClientDisconnect

from concurrency.ttl_cache import TTLCache
from gateway.http import errors, limits
from gateway.http.errors import ApiError
from gateway.http.wire import optional_instant
from journal.deployments import activity, wakes
from journal.deployments.wakes import StartRefused
from journal.group_commit import GroupCommit
from messages import wakeups
from models import lifecycle_policy
from models.deployment import blocked_reason, has_failed_to_start, is_desired, is_ready
from models.errors import DatabaseUnavailable
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from models.lifecycle_policy import LifecycleAction, StartRefusal, StartRefusalCode, StoppedReason
from telemetry import instruments

if TYPE_CHECKING:
    from gateway.executions.long_poll import ExecutionPollHub
    from journal.deployments.activity import DeploymentActivity
    from journal.store import ExecutionKey
    from messages.broker import Broker, Notification
    from models.database import Database
    from models.deployment import Deployment

log = structlog.get_logger()

LOOK_SECONDS: Final = 0.25
"""Mean seconds between two checks of a watched deployment."""
READ_SECONDS: Final = 1.0
"""Mean seconds between two reads of a run's state, in case the notification of its claim is lost."""
PATIENCE_SECONDS: Final = 0.25
"""Seconds for which ready pods may take to claim a run before the watch of their deployment begins."""
HEARD_SECONDS: Final = 60.0
MAX_HEARD: Final = 20_000


class StartFailure(Struct, frozen=True):
    """Permanent failure: the pods of a deployment can't start."""

    reason: str


class StartBlockage(Struct, frozen=True):
    """Temporary failure: the pods of a deployment start once the cluster has capacity for them."""

    reason: str


BadNews: TypeAlias = StartFailure | StartBlockage | StartRefusal


class PodUnavailable(Exception):
    """Error for a run without a pod; an accepted run stays pending for later."""

    def __init__(self, news: BadNews) -> None:
        super().__init__(str(news))
        self.news = news


class CountedDeployment(Struct, frozen=True):
    """Deployment whose activity was recorded for an inbound run."""

    deployment: Deployment
    refusal: StartRefusal | None
    """Reason why it may not start for that run now."""


class DeploymentWatch(Struct, eq=False):
    """Watch over one deployment, and the number of requests that need it."""

    bad_news: asyncio.Future[BadNews] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    waiting: int = 0
    task: asyncio.Task[None] | None = None


class DeploymentActivator:
    """Activation of deployments for the requests of this gateway, and for runs without a waiting client."""

    def __init__(self, database: Database, broker: Broker, waiting: ExecutionPollHub) -> None:
        self._database = database
        self._broker = broker
        self._waiting = waiting
        self._counts: GroupCommit[str, Deployment | None] = GroupCommit(self._count)
        self._wakes: GroupCommit[str, None] = GroupCommit(self._wake)
        self._queues: Counter[str] = Counter()
        self._watches: dict[str, DeploymentWatch] = {}
        self._waiters: dict[str, set[asyncio.Future[bool]]] = {}
        self._heard: TTLCache[str, bool] = TTLCache(HEARD_SECONDS, MAX_HEARD)
        """Runs that pods have taken, possibly before any request waited for that."""
        self._is_released = False

    async def start(self) -> None:
        """Listen to the notifications of runs that pods have taken."""
        await self._broker.listen(self._receive, subject=wakeups.TAKEN_RUNS)

    def release(self) -> None:
        """End all present and later waits for claims, with the result False, because the process is about to stop."""
        self._is_released = True
        for execution_id in list(self._waiters):
            self._notify(execution_id, is_taken=False)

    async def close(self) -> None:
        """End all waits, cancel the watches of deployments, and finish the pending writes."""
        self.release()
        tasks = [watch.task for watch in self._watches.values() if watch.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._counts.drain()
        await self._wakes.drain()

    @property
    def has_waiting_requests(self) -> bool:
        """Whether any request of this process waits until pods of its deployment are up."""
        return bool(self._queues)

    # ── requests for a deployment ───────────────────────────────────────────────────────────────────────────

    @contextmanager
    def count_waiting(self, workflow_id: str) -> Iterator[None]:
        """Count a request as waiting for a deployment during the block.

        If its client leaves or it is canceled, the deployment is woken, because the run may still be
        accepted.
        """
        self._queues[workflow_id] += 1
        try:
            yield
        except (asyncio.CancelledError, ClientDisconnect):
            # The client may have gone before the deployment was woken, and its run may be accepted all the
            # same.
            self.wake_deployment(workflow_id)
            raise
        finally:
            self._queues[workflow_id] -= 1
            if not self._queues[workflow_id]:
                del self._queues[workflow_id]

    async def record_request(self, workflow_id: str) -> Deployment:
        """Record activity of a deployment, so that its policy keeps it up, and return it; nothing is woken.

        Raises a 409 error if it isn't deployed, and, after the activity is recorded, 409 if it is down and its policy
        forbids a start, and 503 if over 1,000 requests wait for it here.
        """
        deployment = await self._counts.submit(workflow_id)
        if deployment is None:
            raise errors.not_deployed()
        if not is_desired(deployment):
            await self._check_policy(workflow_id)
        if not is_ready(deployment) and self._queues[workflow_id] > limits.WAKES_WAITING:
            raise errors.not_ready("Too many requests wait here for the workflow to start: try again")
        return deployment

    async def record_run(self, workflow_id: str) -> CountedDeployment | None:
        """Record activity of a deployment for a run without a waiting client, and return it; None if it isn't deployed.

        The result has the refusal of a start by its policy, or None if the deployment is up or may start.
        """
        deployment = await self._counts.submit(workflow_id)
        if deployment is None:
            return None
        if is_desired(deployment):
            return CountedDeployment(deployment, None)
        async with self._database.read() as connection:
            seen = await activity.read_activity(connection, workflow_id)
        if seen is None:
            return None
        return CountedDeployment(
            deployment, lifecycle_policy.start_refusal(seen.policy, seen.situation, seen.now)
        )

    async def record_runs(self, workflow_ids: Sequence[str]) -> Mapping[str, CountedDeployment]:
        """Record activity of several deployments at once; return each by its workflow id, with the refusal of its
        start, None if it is up or may start.

        Workflows that aren't deployed are omitted.
        """
        found = await wakes.record_activities(self._database, workflow_ids)
        stopped = [workflow_id for workflow_id, one in found.items() if not is_desired(one)]
        seen: Mapping[str, DeploymentActivity] = {}
        if stopped:
            async with self._database.read() as connection:
                seen = await activity.read_activities(connection, stopped)
        counted = {
            workflow_id: CountedDeployment(deployment, None) for workflow_id, deployment in found.items()
        }
        for workflow_id, one in seen.items():
            refusal = lifecycle_policy.start_refusal(one.policy, one.situation, one.now)
            counted[workflow_id] = CountedDeployment(found[workflow_id], refusal)
        return counted

    def wake_deployment(self, workflow_id: str) -> None:
        """Wake a deployment in the background for a run without a waiting client; if that fails, the
        scheduler does it.
        """
        self._wakes.submit(workflow_id)

    async def _check_policy(self, workflow_id: str) -> None:
        """Raise a 409 error if the policy of a deployment forbids a start now, or it isn't deployed."""
        async with self._database.read() as connection:
            seen = await activity.read_activity(connection, workflow_id)
        if seen is None:
            raise errors.not_deployed()
        refusal = lifecycle_policy.start_refusal(seen.policy, seen.situation, seen.now)
        if refusal is not None:
            raise refuse_start(refusal)

    async def _count(self, batch: Sequence[str]) -> Sequence[Deployment | None]:
        """Record activity of deployments in one transaction; return each, or None if it isn't deployed."""
        found = await wakes.record_activities(self._database, batch)
        return [found.get(workflow_id) for workflow_id in batch]

    async def _wake(self, batch: Sequence[str]) -> Sequence[None]:
        """Wake each deployment of a batch that is down, and return None for each; errors of the database are logged
        only.
        """
        for workflow_id in dict.fromkeys(batch):
            try:
                await self._check_deployment(workflow_id, is_first=True)
            except DatabaseUnavailable as error:
                log.debug("deployment not woken", workflow_id=workflow_id, error=str(error))
        return [None] * len(batch)

    # ── waiting for a pod ───────────────────────────────────────────────────────────────────────────────────

    async def await_claim(
        self, key: ExecutionKey, workflow_id: str, *, is_new: bool, is_ready: bool, seconds: float
    ) -> bool:
        """Wait until a run is claimed, at most `seconds`, with its deployment kept awake; return whether it was, True
        also for a run that has ended or is gone.

        `is_new` means a run accepted here just now: for any other, the run is read first, and True is returned at once
        if it was claimed. `is_ready` means a deployment with ready pods, which is woken only after a quarter of a
        second. False also if the process stops. Raises `PodUnavailable` if its pods can't start, or its policy forbids
        a start now.
        """
        if not is_new and await self._has_begun(key):
            return True
        with self._waiter(key.execution_id) as waiter:
            try:
                async with asyncio.timeout(seconds):
                    if is_ready:
                        await asyncio.wait({waiter}, timeout=PATIENCE_SECONDS)
                    if not waiter.done():
                        await self._wait_for_claim(key, workflow_id, waiter)
            except TimeoutError:
                return False
            return waiter.result() if waiter.done() else True

    async def _wait_for_claim(
        self, key: ExecutionKey, workflow_id: str, waiter: asyncio.Future[bool]
    ) -> None:
        """Keep the deployment awake, and return once the run is claimed, ended or gone, or the process stops; raises
        `PodUnavailable` if its pods can't start, or its policy forbids a start now.

        It is notified of claims, and also reads the run about once a second.
        """
        with self._shared_watch(workflow_id) as watch:
            news: set[asyncio.Future[Any]] = {waiter, watch.bad_news}
            while True:
                await asyncio.wait(
                    news,
                    timeout=READ_SECONDS * random.uniform(0.5, 1.5),  # noqa: S311 - spreads load
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if waiter.done() or await self._has_begun(key):
                    return
                if watch.bad_news.done():
                    raise PodUnavailable(watch.bad_news.result())

    async def _has_begun(self, key: ExecutionKey) -> bool:
        """Return whether a run was claimed or has ended; True also for a missing one."""
        progress = await self._waiting.read_progress(key)
        if progress is None or progress.completed_nodes:
            return True
        return progress.status is ExecutionStatus.RUNNING or progress.status in TERMINAL_STATUSES

    @contextmanager
    def _waiter(self, execution_id: str) -> Iterator[asyncio.Future[bool]]:
        """Yield a future that gets True when the run is claimed, False if the process stops first.

        It is done already for a run whose claim was heard of in the last minute.
        """
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self._is_released or self._heard.get(execution_id) is not None:
            waiter.set_result(not self._is_released)
        waiters = self._waiters.setdefault(execution_id, set())
        waiters.add(waiter)
        instruments.gauge("wake_waiters").inc()
        try:
            yield waiter
        finally:
            instruments.gauge("wake_waiters").dec()
            waiters.discard(waiter)
            if not waiters:
                self._waiters.pop(execution_id, None)

    def _receive(self, notification: Notification) -> None:
        """Let the requests go on that wait for the runs of a notification, which pods have claimed; remember these for
        a minute.
        """
        for execution_id in wakeups.parse_taken_runs(notification):
            self._heard.put(execution_id, value=True)
            self._notify(execution_id, is_taken=True)

    def _notify(self, execution_id: str, *, is_taken: bool) -> None:
        """Set the futures of all requests that wait for a run to `is_taken`."""
        for waiter in self._waiters.get(execution_id, ()):
            if not waiter.done():
                waiter.set_result(is_taken)

    # ── watching deployments ────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _shared_watch(self, workflow_id: str) -> Iterator[DeploymentWatch]:
        """Yield the watch of a deployment, which keeps it awake; concurrent blocks share it.

        The first block starts it, the last one ends it.
        """
        watch = self._watches.get(workflow_id)
        if watch is None:
            watch = self._watches[workflow_id] = DeploymentWatch()
            watch.task = asyncio.create_task(self._keep_awake(workflow_id, watch))
        watch.waiting += 1
        try:
            yield watch
        finally:
            watch.waiting -= 1
            if not watch.waiting:
                self._end(workflow_id, watch)

    def _end(self, workflow_id: str, watch: DeploymentWatch) -> None:
        """End a watch and cancel its task, so that the next request starts a new one."""
        if self._watches.get(workflow_id) is watch:
            del self._watches[workflow_id]
        if watch.task is not None:
            watch.task.cancel()

    async def _keep_awake(self, workflow_id: str, watch: DeploymentWatch) -> None:
        """Check a deployment, and wake it if needed, about every quarter of a second until its pods can't start.

        Then the reason is the watch's `bad_news`, and the watch ends.
        """
        news: BadNews | None = None
        is_first = True
        while news is None:
            try:
                news = await self._check_deployment(workflow_id, is_first=is_first)
                is_first = False
            except DatabaseUnavailable as error:
                log.debug("deployment not checked", workflow_id=workflow_id, error=str(error))
            except Exception:
                log.exception("deployment not checked", workflow_id=workflow_id)
            if news is None:
                await asyncio.sleep(LOOK_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 - spreads load
        watch.bad_news.set_result(news)
        watch.task = None
        self._end(workflow_id, watch)

    async def _check_deployment(self, workflow_id: str, *, is_first: bool) -> BadNews | None:
        """Wake a deployment that is stopped, failed or about to stop; return why its pods can't start, or None.

        A failure or a lack of capacity counts only after the first check, which wakes a failed deployment; a refusal by
        its policy counts at once. None if it isn't deployed: workers execute its runs. Raises `DatabaseUnavailable`.
        """
        async with self._database.read() as connection:
            seen = await activity.read_activity(connection, workflow_id)
        if seen is None or not seen.deployment.is_deployed:
            return None  # its runs belong to the workers now
        deployment = seen.deployment
        has_failed = has_failed_to_start(deployment)
        if not is_first and (has_failed or deployment.stopped_reason == StoppedReason.FAILED):
            reason = deployment.failed_reason or deployment.observed_reason
            return StartFailure(reason or "unknown reason")
        if is_desired(deployment) and not has_failed:
            reason = None if is_first else blocked_reason(deployment)
            return None if reason is None else StartBlockage(reason)
        try:
            settled = await activity.decide_and_apply(self._database, workflow_id, wakes.decide_for_run)
        except StartRefused as error:
            return None if error.refusal.code is StartRefusalCode.NOT_DEPLOYED else error.refusal
        if settled is not None and settled.decision.action is not LifecycleAction.NONE:
            await wakeups.wake_deployer(self._broker, workflow_id)
        return None


def refuse_start(refusal: StartRefusal) -> ApiError:
    """Return the 409 error for a run whose deployment may not start: not deployed, outside its window, or
    stopped by hand.
    """
    match refusal.code:
        case StartRefusalCode.NOT_DEPLOYED:
            return errors.not_deployed()
        case StartRefusalCode.OUTSIDE_WINDOW:
            return errors.outside_window(optional_instant(refusal.opens_at))
        case StartRefusalCode.STOPPED_MANUALLY:
            return errors.stopped_manually()
