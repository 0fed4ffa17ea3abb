"""The desk at which pods wait for work, and for what is asked of the runs that they hold.

A run that arrives at this gateway is told at once to the pods that wait here. Where none does, it is forwarded to one
of its pods, and told by the broker to the gateways at which they wait. Once a second somebody looks for all of them, in
two queries, at what nobody was told of; nothing is taken here, so a lost answer does no harm.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import structlog
from sqlalchemy import literal_column, select
from sqlmodel import col

from concurrency.ttl_cache import TTLCache
from execution.pod_api import WorkPollRequest, WorkPollResponse
from gateway.http import errors
from messages.broker import WATCH_SECONDS, BrokerUnavailable, ChangedExecutions
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
"""How long after its last poll a pod is taken to be about to poll again."""
MAX_WAITING: Final = 5_000
MAX_COUNTED: Final = 20_000
"""Deployments whose arrivals are counted; a pod of another is told of one too many, and finds nothing."""
_IS_PENDING: Final = col(Execution.status) == literal_column(f"'{ExecutionStatus.PENDING}'")
_IS_RUNNING: Final = col(Execution.status) == literal_column(f"'{ExecutionStatus.RUNNING}'")


@dataclass(slots=True, eq=False)
class WaitingPod:
    """A pod that waits."""

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
    """All pods that wait at this gateway."""

    def __init__(self, database: Database, broker: Broker, forwarder: WakeupForwarder) -> None:
        self._database = database
        self._broker = broker
        self._forwarder = forwarder
        self._waiters: dict[str, set[WaitingPod]] = {}
        """By workflow id."""
        self._arrivals: OrderedDict[str, int] = OrderedDict()
        self._watched: TTLCache[str, bool] = TTLCache(WATCH_SECONDS / 2, MAX_COUNTED)
        """Deployments whose next arrival at another gateway will be heard of."""
        self._polled: TTLCache[str, bool] = TTLCache(POLL_SECONDS, MAX_COUNTED)
        """Deployments of which a pod was here a moment ago: it will be told when it asks again."""
        self._looking: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def start(self) -> None:
        """Hear of what arrives at other gateways."""
        await self._broker.listen(self._noticed)

    async def wait(self, holder: LeaseHolder, call: WorkPollRequest) -> WorkPollResponse:
        """Return what there is to tell a pod, at the latest when its time is up; raises `DatabaseUnavailable`."""
        if self._is_closed or sum(map(len, self._waiters.values())) >= MAX_WAITING:
            raise errors.not_ready("As many pods wait here as can, or this gateway stops: try again")
        waiter = WaitingPod(holder, call, call.wants_work)
        self._waiters.setdefault(holder.workflow_id, set()).add(waiter)
        try:
            if self._has_missed_arrivals(waiter):
                self._tell(waiter, has_work=True)
            else:
                await self._begin(waiter)
            if self._looking is None:
                self._looking = asyncio.create_task(self._look_on())
            async with asyncio.timeout(call.seconds):
                return await waiter.news
        except TimeoutError:
            return self._news(waiter)
        finally:
            self._leave(waiter)

    async def arrived(self, workflow_ids: Collection[str]) -> None:
        """Tell pods that runs are there for them, those that wait at other gateways too, after the commit."""
        elsewhere = [workflow_id for workflow_id in workflow_ids if not self._has_arrived(workflow_id)]
        for workflow_id in elsewhere:
            if self._polled.get(workflow_id) is None:
                self._forwarder.forward(workflow_id)
        try:
            await self._broker.publish(dict.fromkeys(elsewhere, ""))
        except BrokerUnavailable as error:
            log.debug("pods not told", reason=str(error))  # the rows are committed: whoever looks finds them

    def has_waiting_pod(self, workflow_id: str) -> bool:
        """Tell whether a pod of a workflow waits here, and whatever arrives anywhere is told to it."""
        return workflow_id in self._waiters and self._watched.get(workflow_id) is not None

    def release(self) -> None:
        """Let everybody go: the gateway stops."""
        self._is_closed = True
        for waiter in self._all():
            self._tell(waiter)

    async def close(self) -> None:
        """End the looking."""
        self.release()
        tasks = [*self._telling, *([self._looking] if self._looking else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._forwarder.close()

    async def _begin(self, waiter: WaitingPod) -> None:
        if await self._watch(waiter.workflow_id):
            waiter.wants_work = True  # what has come while nobody watched is looked for, once
        if waiter.wants_work:
            await self._look([waiter])

    # ── arrivals ──────────────────────────────────────────────────────────────────────────────────────────

    def _has_arrived(self, workflow_id: str) -> bool:
        """Tell whether a pod that waits here has been told; those that don't wait just now will be."""
        self._arrivals[workflow_id] = self._arrivals.get(workflow_id, 0) + 1
        self._arrivals.move_to_end(workflow_id)
        if len(self._arrivals) > MAX_COUNTED:
            self._arrivals.popitem(last=False)
        waiters = [one for one in self._waiters.get(workflow_id, ()) if not one.news.done()]
        for waiter in waiters:
            self._tell(waiter, has_work=True)
        return bool(waiters)

    def _has_missed_arrivals(self, waiter: WaitingPod) -> bool:
        """Tell whether something has arrived here since a pod was told of arrivals here last."""
        known = waiter.call.arrivals.get(self._broker.channel)
        return known is not None and known != self._arrivals.get(waiter.workflow_id, 0)

    def _noticed(self, notification: Notification) -> None:
        if not isinstance(notification, ChangedExecutions):
            return
        for workflow_id in notification.execution_ids:
            if workflow_id in self._waiters or self._watched.get(workflow_id) is not None:
                self._watched.drop(workflow_id)
                task = asyncio.create_task(self._pass_on(workflow_id))
                self._telling.add(task)
                task.add_done_callback(self._telling.discard)

    async def _pass_on(self, workflow_id: str) -> None:
        # Watched anew first: what arrives in between is found by whoever is told now.
        if workflow_id in self._waiters:
            await self._watch(workflow_id)
        self._has_arrived(workflow_id)

    async def _watch(self, workflow_id: str) -> bool:
        """Have the broker tell of the next arrival at another gateway; tells whether it hadn't been about to."""
        if self._watched.get(workflow_id) is not None:
            return False
        try:
            await self._broker.watch([workflow_id])
        except BrokerUnavailable as error:
            log.debug("arrivals not watched", reason=str(error))
            return False
        self._watched.put(workflow_id, value=True)
        return True

    # ── looking ───────────────────────────────────────────────────────────────────────────────────────────

    async def _look_on(self) -> None:
        try:
            while self._waiters:
                await asyncio.sleep(LOOK_SECONDS)
                try:
                    await self._look(self._all())
                except DatabaseUnavailable as error:
                    log.debug("pods not looked after", error=str(error))
                except Exception:
                    log.exception("pods not looked after")
        finally:
            self._looking = None

    async def _look(self, waiters: Collection[WaitingPod]) -> None:
        hungry = {waiter.workflow_id for waiter in waiters if waiter.wants_work}
        owners = {waiter.holder.owner for waiter in waiters}
        workflow_ids = {waiter.workflow_id for waiter in waiters}
        asked: dict[str, dict[str, str]] = {}
        async with self._database.read() as connection:
            requests: Select[*tuple[Any, ...]] = select(
                col(Execution.id), col(Execution.request), col(Execution.lease_owner).label("owner")
            ).where(
                _IS_RUNNING, col(Execution.workflow_id).in_(workflow_ids), col(Execution.request).is_not(None)
            )
            for row in await connection.execute(requests):
                if row.owner in owners:
                    asked.setdefault(row.owner, {})[row.id] = row.request
            pending = select(col(Execution.target)).where(_IS_PENDING, col(Execution.target).in_(hungry))
            wanted = set(await connection.scalars(pending.distinct())) if hungry else set()
        for waiter in waiters:
            has_work = waiter.wants_work and waiter.workflow_id in wanted
            new = asked.get(waiter.holder.owner, {}).items() - waiter.call.heard.items()
            if has_work or new:
                self._tell(waiter, has_work=has_work, requests=dict(new))

    # ── telling ───────────────────────────────────────────────────────────────────────────────────────────

    def _tell(
        self, waiter: WaitingPod, *, has_work: bool = False, requests: dict[str, str] | None = None
    ) -> None:
        if not waiter.news.done():
            waiter.news.set_result(self._news(waiter, has_work=has_work, requests=requests))

    def _news(
        self, waiter: WaitingPod, *, has_work: bool = False, requests: dict[str, str] | None = None
    ) -> WorkPollResponse:
        arrivals = self._arrivals.get(waiter.workflow_id, 0)
        return WorkPollResponse(has_work, requests or {}, self._broker.channel, arrivals)

    def _all(self) -> list[WaitingPod]:
        return [waiter for waiters in self._waiters.values() for waiter in waiters]

    def _leave(self, waiter: WaitingPod) -> None:
        waiters = self._waiters[waiter.workflow_id]
        waiters.discard(waiter)
        self._polled.put(waiter.workflow_id, value=True)
        if not waiters:
            del self._waiters[waiter.workflow_id]
