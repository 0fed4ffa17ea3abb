"""Hub of the long polls with which pods wait for work and for stop or cancel requests to their runs.

A run that is accepted at this gateway wakes the pods that poll here. If none does, the wakeup is forwarded to
a ready pod, and published by the broker to the gateways that pods poll. Two queries a second find the work
and requests of all waiting pods whose wakeup was lost. The hub claims nothing, so a lost response does no
harm.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

import structlog
from msgspec import Struct, field
from sqlalchemy import literal_column, select
from sqlmodel import col

from concurrency.ttl_cache import TTLCache
from execution.pod_api import WorkPollRequest, WorkPollResponse
from gateway.http import errors
from messages.broker import CHANGED_EXECUTIONS, WATCH_SECONDS, BrokerUnavailable, ChangedExecutions
from models.errors import DatabaseUnavailable
from models.execution import Execution
from models.execution_status import ExecutionStatus

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Select

    from gateway.pods.forwarding import WakeupForwarder
    from gateway.pods.lease_checks import LeaseHolder
    from messages.broker import Broker, Notification
    from models.database import Database

log = structlog.get_logger()

LOOK_SECONDS: Final = 1.0
POLL_SECONDS: Final = 1.0
"""Time after its last poll during which a pod is expected to poll again."""
MAX_WAITING: Final = 5_000
MAX_COUNTED: Final = 20_000
"""Deployments with a count of inbound runs. A pod of any other gets one needless wakeup and claims nothing."""
_IS_PENDING: Final = col(Execution.status) == literal_column(f"'{ExecutionStatus.PENDING}'")
_IS_RUNNING: Final = col(Execution.status) == literal_column(f"'{ExecutionStatus.RUNNING}'")


class WaitingPod(Struct, eq=False):
    """Open poll of a pod."""

    holder: LeaseHolder
    call: WorkPollRequest
    wants_work: bool
    news: asyncio.Future[WorkPollResponse] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def workflow_id(self) -> str:
        return self.holder.workflow_id


class PodPollHub:
    """Open polls of pods at this gateway."""

    def __init__(self, database: Database, broker: Broker, forwarder: WakeupForwarder) -> None:
        self._database = database
        self._broker = broker
        self._forwarder = forwarder
        self._waiters: dict[str, set[WaitingPod]] = {}
        """By workflow ID."""
        self._run_counts: OrderedDict[str, int] = OrderedDict()
        self._watched: TTLCache[str, bool] = TTLCache(WATCH_SECONDS / 2, MAX_COUNTED)
        """Deployments for which the broker will announce the next run at another gateway."""
        self._polled: TTLCache[str, bool] = TTLCache(POLL_SECONDS, MAX_COUNTED)
        """Deployments with a recent poll: the next poll of their pod learns of the run."""
        self._checking: asyncio.Task[None] | None = None
        self._notifying: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def start(self) -> None:
        """Subscribe to notifications of runs that other gateways have accepted."""
        await self._broker.listen(self._receive, subject=CHANGED_EXECUTIONS)

    async def wait(self, holder: LeaseHolder, call: WorkPollRequest) -> WorkPollResponse:
        """Wait until a pod may have runs to claim, or new stop or cancel requests to its runs, and return that.

        The answer is empty at the timeout of the call; nothing is claimed. Raises `DatabaseUnavailable`, and
        a 503 error if 5,000 pods poll or the gateway stops.
        """
        if self._is_closed or sum(map(len, self._waiters.values())) >= MAX_WAITING:
            raise errors.not_ready("Too many pods wait here, or this gateway is stopping: try again")
        waiter = WaitingPod(holder, call, call.wants_work)
        self._waiters.setdefault(holder.workflow_id, set()).add(waiter)
        try:
            if self._has_missed_runs(waiter):
                self._respond(waiter, has_work=True)
            else:
                await self._begin(waiter)
            if self._checking is None:
                self._checking = asyncio.create_task(self._check_periodically())
            async with asyncio.timeout(call.seconds):
                return await waiter.news
        except TimeoutError:
            return self._build_response(waiter)
        finally:
            self._leave(waiter)

    async def notify_pods(self, workflow_ids: Collection[str]) -> None:
        """After a commit, notify pods of workflows with new runs, also pods that poll other gateways.

        A ready pod is woken by HTTP if none has polled here within a second. A lost notification only delays runs:
        polls look at the database once a second.
        """
        elsewhere = [workflow_id for workflow_id in workflow_ids if not self._count_run(workflow_id)]
        for workflow_id in elsewhere:
            if self._polled.get(workflow_id) is None:
                self._forwarder.forward(workflow_id)
        try:
            await self._broker.publish(dict.fromkeys(elsewhere, ""))
        except BrokerUnavailable as error:
            log.debug(
                "pods not notified", reason=str(error)
            )  # the rows are committed: the periodic query finds them

    def has_waiting_pod(self, workflow_id: str) -> bool:
        """Return whether a pod of a workflow polls here and would be notified of a new run at any gateway: `_watch` is
        in effect.
        """
        return workflow_id in self._waiters and self._watched.get(workflow_id) is not None

    def release(self) -> None:
        """End all polls with an answer without work, and refuse new ones by a 503 error, since the gateway is about to
        stop.
        """
        self._is_closed = True
        for waiter in self._all_waiters():
            self._respond(waiter)

    async def close(self) -> None:
        """Answer all polls and cancel the background tasks."""
        self.release()
        tasks = [*self._notifying, *([self._checking] if self._checking else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._forwarder.close()

    async def _begin(self, waiter: WaitingPod) -> None:
        """Begin a poll: watch for runs at other gateways, and look once for runs and requests if the pod wants work or
        the watch is new.
        """
        if await self._watch(waiter.workflow_id):
            waiter.wants_work = True  # one query finds the runs that were accepted before the watch began
        if waiter.wants_work:
            await self._answer_polls([waiter])

    # ── new runs ────────────────────────────────────────────────────────────────────────────────────────────

    def _count_run(self, workflow_id: str) -> bool:
        """Count a new run of a workflow, and return whether a pod that polls here was notified.

        Pods between two polls detect it by the count at their next poll.
        """
        self._run_counts[workflow_id] = self._run_counts.get(workflow_id, 0) + 1
        self._run_counts.move_to_end(workflow_id)
        if len(self._run_counts) > MAX_COUNTED:
            self._run_counts.popitem(last=False)
        waiters = [one for one in self._waiters.get(workflow_id, ()) if not one.news.done()]
        for waiter in waiters:
            self._respond(waiter, has_work=True)
        return bool(waiters)

    def _has_missed_runs(self, waiter: WaitingPod) -> bool:
        """Return whether runs were accepted here since the last response to this pod, by the count that it
        sends back.
        """
        known = waiter.call.run_counts.get(self._broker.channel)
        return known is not None and known != self._run_counts.get(waiter.workflow_id, 0)

    def _receive(self, notification: Notification) -> None:
        """Notify the pods of workflows with changed runs that another gateway announces, and end the watch of
        these.
        """
        if not isinstance(notification, ChangedExecutions):
            return
        for workflow_id in notification.execution_ids:
            if workflow_id in self._waiters or self._watched.get(workflow_id) is not None:
                self._watched.drop(workflow_id)
                task = asyncio.create_task(self._notify_pods(workflow_id))
                self._notifying.add(task)
                task.add_done_callback(self._notifying.discard)

    async def _notify_pods(self, workflow_id: str) -> None:
        # The watch is renewed first: runs accepted in between are found by the pod that is notified now.
        if workflow_id in self._waiters:
            await self._watch(workflow_id)
        self._count_run(workflow_id)

    async def _watch(self, workflow_id: str) -> bool:
        """Request a notification of the next run at another gateway, once; return whether a new watch began.

        False if a watch is in effect or Redis is unavailable; the periodic check makes up for its loss.
        """
        if self._watched.get(workflow_id) is not None:
            return False
        try:
            await self._broker.watch([workflow_id])
        except BrokerUnavailable as error:
            log.debug("runs at other gateways not watched", reason=str(error))
            return False
        self._watched.put(workflow_id, value=True)
        return True

    # ── periodic check ──────────────────────────────────────────────────────────────────────────────────────

    async def _check_periodically(self) -> None:
        """Answer the polls of waiting pods once a second with pending runs, and with stop or cancel requests to their
        runs, until none wait; errors are logged.
        """
        try:
            while self._waiters:
                await asyncio.sleep(LOOK_SECONDS)
                try:
                    await self._answer_polls(self._all_waiters())
                except DatabaseUnavailable as error:
                    log.debug("pod polls not checked", error=str(error))
                except Exception:
                    log.exception("pod polls not checked")
        finally:
            self._checking = None

    async def _answer_polls(self, waiters: Collection[WaitingPod]) -> None:
        """Look once for pending runs, and for stop or cancel requests that a pod does not know, and answer the polls
        with any.
        """
        idle_workflow_ids = {waiter.workflow_id for waiter in waiters if waiter.wants_work}
        owners = {waiter.holder.owner for waiter in waiters}
        workflow_ids = {waiter.workflow_id for waiter in waiters}
        requests_by_owner: dict[str, dict[str, str]] = {}
        async with self._database.read() as connection:
            requests: Select[*tuple[Any, ...]] = select(
                col(Execution.id), col(Execution.request), col(Execution.lease_owner).label("owner")
            ).where(
                _IS_RUNNING, col(Execution.workflow_id).in_(workflow_ids), col(Execution.request).is_not(None)
            )
            for row in await connection.execute(requests):
                if row.owner in owners:
                    requests_by_owner.setdefault(row.owner, {})[row.id] = row.request
            pending = select(col(Execution.target)).where(
                _IS_PENDING, col(Execution.target).in_(idle_workflow_ids)
            )
            workflow_ids_with_work = (
                set(await connection.scalars(pending.distinct())) if idle_workflow_ids else set()
            )
        for waiter in waiters:
            has_work = waiter.wants_work and waiter.workflow_id in workflow_ids_with_work
            new = requests_by_owner.get(waiter.holder.owner, {}).items() - waiter.call.heard.items()
            if has_work or new:
                self._respond(waiter, has_work=has_work, requests=dict(new))

    # ── responses ───────────────────────────────────────────────────────────────────────────────────────────

    def _respond(
        self, waiter: WaitingPod, *, has_work: bool = False, requests: dict[str, str] | None = None
    ) -> None:
        """Answer a poll, unless it was answered: `has_work` means runs to claim, `requests` stop or cancel
        requests by run.
        """
        if not waiter.news.done():
            waiter.news.set_result(self._build_response(waiter, has_work=has_work, requests=requests))

    def _build_response(
        self, waiter: WaitingPod, *, has_work: bool = False, requests: dict[str, str] | None = None
    ) -> WorkPollResponse:
        run_count = self._run_counts.get(waiter.workflow_id, 0)
        return WorkPollResponse(has_work, requests or {}, self._broker.channel, run_count)

    def _all_waiters(self) -> list[WaitingPod]:
        return [waiter for waiters in self._waiters.values() for waiter in waiters]

    def _leave(self, waiter: WaitingPod) -> None:
        """Remove a poll that has ended; for a second its workflow counts as polled here."""
        waiters = self._waiters[waiter.workflow_id]
        waiters.discard(waiter)
        self._polled.put(waiter.workflow_id, value=True)
        if not waiters:
            del self._waiters[waiter.workflow_id]
