"""Hub of the open polls of task workers at one gateway.

A commit that creates tasks notifies the gateways with polls of its organization; each claims for as many polls as
it needs. A parked poll costs no query. Once a second, one query finds tasks whose notification was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Final

import structlog

from gateway.http import errors
from gateway.tasks.worker_presence import WorkerPresence
from journal import concurrency_limits
from journal.group_commit import GroupCommit
from messages import wakeups
from messages.broker import CHANGED_EXECUTIONS, BrokerUnavailable, ChangedExecutions
from models.errors import DatabaseUnavailable, LockWaitTimeout
from models.execution import SHARED_TARGET
from models.task_states import organization_of_key, watch_key

if TYPE_CHECKING:
    from collections.abc import Collection

    from gateway.executions.acceptance import PodNotifier
    from gateway.tasks.worker_presence import WorkerDescription
    from journal.tasks.task_items import ItemResult, WorkerReport
    from journal.tasks.task_polls import ClaimedTask, TaskPoll
    from journal.tasks.task_store import TaskStore
    from journal.tasks.task_transaction import TaskEffects
    from messages.broker import Broker, Notification
    from models.database import Database
    from nodes.catalog import NodeCatalog

log = structlog.get_logger()

LOOK_SECONDS: Final = 1.0
ABANDONED_SECONDS: Final = 10.0
FORGET_SECONDS: Final = 3_600.0
ACTIVE_SECONDS: Final = 600.0
"""Time after the last call of a worker for which this gateway sweeps tasks."""
MAX_PARKED: Final = 20_000
SERVED_TOGETHER: Final = 20
"""Polls that share one claim."""
TOLD_SECONDS: Final = 5.0
"""Time after which an open poll tells a worker of a cancellation again."""
MAX_TOLD: Final = 10_000


@dataclass(frozen=True, slots=True)
class PollAnswer:
    """Answer to a poll."""

    tasks: Sequence[ClaimedTask] = ()
    cancelling: Sequence[str] = ()
    is_draining: bool = False
    is_stopped: bool = False


@dataclass(slots=True, eq=False)
class ParkedPoll:
    """Open poll of a worker."""

    poll: TaskPoll
    since: float = field(default_factory=monotonic)
    answer: asyncio.Future[PollAnswer] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def resolve(self, answer: PollAnswer) -> bool:
        """Answer the poll; return False if it has its answer, or its client is gone."""
        if self.answer.done():
            return False
        self.answer.set_result(answer)
        return True

    @property
    def order(self) -> tuple[int, float]:
        """Key by which polls get tasks: those for the most tasks first, then the longest waiting."""
        return -self.poll.limit, self.since


@dataclass(frozen=True, slots=True)
class PendingReport:
    """Report, with the node types of its organization if it has outputs."""

    report: WorkerReport
    catalog: NodeCatalog | None


class TaskHub:
    """All open polls of task workers at this gateway."""

    def __init__(self, database: Database, broker: Broker, tasks: TaskStore, pods: PodNotifier) -> None:
        self._database = database
        self._broker = broker
        self.tasks = tasks
        self._pods = pods
        self.presence = WorkerPresence(database)
        self._parked: dict[str, set[ParkedPoll]] = {}
        """By organization."""
        self._looks: GroupCommit[ParkedPoll, None] = GroupCommit(self._look)
        self._reports: GroupCommit[PendingReport, list[ItemResult]] = GroupCommit(self._report)
        self._serving: dict[str, asyncio.Task[None]] = {}
        self._served_again: set[str] = set()
        self._watched: set[str] = set()
        self._told: dict[str, float] = {}
        self._periodic: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._active_until = 0.0
        self._abandoned_at = 0.0
        self._forgotten_at = 0.0
        self._is_closed = False

    # ── polls ───────────────────────────────────────────────────────────────────────────────────────────────

    async def wait(self, poll: TaskPoll, worker: WorkerDescription, seconds: float) -> PollAnswer:
        """Return tasks or cancellations for a worker as soon as there are any; an empty answer after `seconds`.

        Raises a 409 error for a stopped worker, and 503 while 20,000 polls wait or the gateway stops.
        """
        if self._is_closed or sum(map(len, self._parked.values())) >= MAX_PARKED:
            raise errors.not_ready("Too many workers wait here, or this gateway is stopping: try again")
        await self._listen()
        await self.presence.note(worker)
        answer = await self._wait(ParkedPoll(poll), seconds)
        if answer.is_stopped:
            raise errors.conflict("worker-stopped", "The worker has said that it stops: start with a new id")
        return answer

    async def _listen(self) -> None:
        """Subscribe to notifications of tasks with the first poll: most gateways have none."""
        if self._listening is None:
            self._listening = asyncio.create_task(
                self._broker.listen(self._receive, subject=CHANGED_EXECUTIONS)
            )
        await asyncio.shield(self._listening)

    async def _wait(self, parked: ParkedPoll, seconds: float) -> PollAnswer:
        """Park a poll until it is answered, at most for `seconds`; then return its answer, an empty one without."""
        poll = parked.poll
        self._parked.setdefault(poll.organization_id, set()).add(parked)
        self._keep_active()
        try:
            # First the watch, then the look: a task that is created in between is announced.
            await self._watch(poll.organization_id)
            await self._looks.submit(parked)
            async with asyncio.timeout(seconds):
                return await parked.answer
        except TimeoutError:
            return (
                parked.answer.result()
                if parked.answer.done() and not parked.answer.cancelled()
                else PollAnswer()
            )
        finally:
            self._leave(parked)

    def _leave(self, parked: ParkedPoll) -> None:
        of_organization = self._parked.get(parked.poll.organization_id)
        if of_organization is not None:
            of_organization.discard(parked)
            if not of_organization:
                del self._parked[parked.poll.organization_id]

    async def _look(self, batch: Sequence[ParkedPoll]) -> Sequence[None]:
        """Answer repeated claims and cancellations, and claim for polls with work."""
        found = await self.tasks.claims.look([one.poll for one in batch])
        wanting: list[ParkedPoll] = []
        for parked, findings in zip(batch, found, strict=True):
            cancelling = self._untold(findings.cancelling)
            is_leaving = findings.is_stopped or findings.is_draining
            if findings.repeated or cancelling or is_leaving:
                is_stopped = findings.is_stopped and not findings.repeated
                parked.resolve(PollAnswer(findings.repeated, cancelling, findings.is_draining, is_stopped))
            elif findings.has_work:
                wanting.append(parked)
        for start in range(0, len(wanting), SERVED_TOGETHER):
            await self._claim(wanting[start : start + SERVED_TOGETHER])
        return [None] * len(batch)

    async def _claim(self, parked: Sequence[ParkedPoll]) -> int:
        """Claim tasks for polls in their order, and return the number of tasks; polls without one stay parked.

        Tasks whose client has left meanwhile are put back.
        """
        waiting = [one for one in sorted(parked, key=lambda one: one.order) if not one.answer.done()]
        if not waiting:
            return 0
        claimed = await self.tasks.claims.claim([one.poll for one in waiting])
        unwanted: list[str] = []
        for one, tasks in zip(waiting, claimed, strict=True):
            if tasks and not one.resolve(PollAnswer(tasks)):
                unwanted += [task.id for task in tasks]
        if unwanted:
            await self.tasks.claims.put_back(unwanted)
            for one in waiting:
                self.serve(one.poll.organization_id)
        return sum(map(len, claimed)) - len(unwanted)

    def _untold(self, task_ids: Sequence[str]) -> list[str]:
        """Return those cancellations that no open poll has reported within five seconds, and note them as reported."""
        now = monotonic()
        new = [one for one in task_ids if self._told.get(one, 0.0) <= now]
        for one in new:
            self._told[one] = now + TOLD_SECONDS
        while len(self._told) > MAX_TOLD:
            del self._told[next(iter(self._told))]
        return new

    # ── reports ─────────────────────────────────────────────────────────────────────────────────────────────

    async def report(self, report: WorkerReport, catalog: NodeCatalog | None) -> Sequence[ItemResult]:
        """Apply a worker's report of its tasks, together with others; return the results of its items in
        their order.

        `catalog` has the node types of its organization, None if the report has no outputs.
        """
        self._keep_active()
        return await self._reports.submit(PendingReport(report, catalog))

    async def _report(self, batch: Sequence[PendingReport]) -> Sequence[list[ItemResult]]:
        """Apply a batch of reports in one transaction, and follow their effects in the background."""
        from gateway.tasks import output_checks  # noqa: PLC0415 - loaded with the first worker

        catalogs = {one.report.organization_id: one.catalog for one in batch if one.catalog is not None}
        results, effects = await self.tasks.reports.report(
            [one.report for one in batch],
            lambda facts, item: output_checks.find_problem(catalogs.get(facts.organization_id), facts, item),
        )
        self._in_background(effects)
        return results

    async def stop(self, organization_id: str, worker_id: str) -> None:
        """Give a worker no more tasks, and end its open polls."""
        if await self.tasks.workers.stop(organization_id, worker_id):
            await self.announce([organization_id])

    async def drain(self, organization_id: str, worker_id: str) -> bool:
        """Ask a worker to stop by its next answer; returns False for an unknown one."""
        is_known = await self.tasks.workers.drain(organization_id, worker_id)
        if is_known:
            await self.announce([organization_id])
        return is_known

    def _in_background(self, effects: TaskEffects) -> None:
        task = asyncio.create_task(self._follow_quietly(effects))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _follow_quietly(self, effects: TaskEffects) -> None:
        try:
            await self.follow(effects)
        except (DatabaseUnavailable, LockWaitTimeout) as error:
            log.debug("changes of tasks not followed", reason=str(error))  # the periodic work does
        except Exception:
            log.exception("changes of tasks not followed")

    # ── news ────────────────────────────────────────────────────────────────────────────────────────────────

    def _receive(self, notification: Notification) -> None:
        """Serve the polls of organizations whose tasks have changed, as another process announces."""
        if not isinstance(notification, ChangedExecutions):
            return
        for key in notification.execution_ids:
            organization_id = organization_of_key(key)
            if organization_id is not None:
                self._watched.discard(organization_id)
                self.serve(organization_id)

    def serve(self, organization_id: str) -> None:
        """Claim in the background for the parked polls of an organization, whose tasks have changed; calls
        meanwhile repeat it once.
        """
        if organization_id not in self._parked:
            return
        if organization_id in self._serving:
            self._served_again.add(organization_id)
            return
        task = asyncio.create_task(self._serve(organization_id))
        self._serving[organization_id] = task

    async def _serve(self, organization_id: str) -> None:
        """Serve the polls of an organization until nothing has changed meanwhile; failures are only logged."""
        try:
            while True:
                self._served_again.discard(organization_id)
                await self._watch(organization_id)
                await self._serve_once(organization_id)
                if organization_id not in self._served_again:
                    return
        except (DatabaseUnavailable, LockWaitTimeout) as error:
            log.debug("task polls not served", reason=str(error))
        except Exception:
            log.exception("task polls not served")
        finally:
            del self._serving[organization_id]

    async def _serve_once(self, organization_id: str) -> None:
        if limited := await self.tasks.upkeep.limited_keys(organization_id):
            await self.tasks.upkeep.admit(limited)
        while parked := [one for one in self._parked.get(organization_id, ()) if not one.answer.done()]:
            parked.sort(key=lambda one: one.order)
            news = await self.tasks.claims.news(organization_id, [one.poll for one in parked])
            self._tell(parked, news.cancelling, news.leaving)
            chosen: list[ParkedPoll] = []
            for queue in news.queues:
                fitting = (
                    one
                    for one in parked
                    if one not in chosen and one.poll.limit > 0 and one.poll.serves(queue)
                )
                chosen += [one for one in [next(fitting, None)] if one is not None]
                if len(chosen) >= SERVED_TOGETHER:
                    break
            if not chosen or not await self._claim(chosen):
                return

    def _tell(
        self,
        parked: Sequence[ParkedPoll],
        cancelling: Sequence[tuple[str, str]],
        leaving: Mapping[str, bool],
    ) -> None:
        """Report cancellations and drains to workers by their open polls; polls of stopped workers end.

        `leaving` holds for each leaving worker whether it is stopped (True) or asked to (False).
        """
        by_worker: dict[str, list[str]] = {}
        for worker_id, task_id in cancelling:
            by_worker.setdefault(worker_id, []).append(task_id)
        for one in parked:
            task_ids = by_worker.get(one.poll.worker_id, [])
            stops = leaving.get(one.poll.worker_id)
            if (new := self._untold(task_ids)) or stops is not None:
                one.resolve(PollAnswer((), new, stops is False, stops is True))

    async def _watch(self, organization_id: str) -> None:
        """Request a notification of the next change of the organization's tasks by another process, once.

        Without Redis, polls are served once a second.
        """
        if organization_id in self._watched:
            return
        try:
            await self._broker.watch([watch_key(organization_id)])
        except BrokerUnavailable as error:
            log.debug("tasks not watched", reason=str(error))
            return
        self._watched.add(organization_id)

    # ── effects of a transaction ────────────────────────────────────────────────────────────────────────────

    async def follow(self, effects: TaskEffects) -> None:
        """After a commit, wake runs, admit tasks whose concurrency key is free, and notify workers; a sweep
        makes up for a loss.
        """
        if effects.woken:
            await self._wake_runs(effects)
        changed = effects.ready_organizations | effects.cancelling_organizations
        if effects.freed_keys:
            changed |= await self.tasks.upkeep.admit(sorted(effects.freed_keys))
        if changed:
            await self.announce(changed)

    async def announce(self, organization_ids: Collection[str]) -> None:
        """Serve the polls here, and notify other gateways of changed tasks."""
        for organization_id in organization_ids:
            self.serve(organization_id)
        try:
            await self._broker.publish(dict.fromkeys(map(watch_key, organization_ids), ""))
        except BrokerUnavailable as error:
            log.debug("tasks not announced", reason=str(error))

    async def _wake_runs(self, effects: TaskEffects) -> None:
        """Admit runs of freed concurrency keys, and wake the workers and pods of woken runs."""
        keys = {run.concurrency_key for run in effects.woken if run.concurrency_key is not None}
        for key in sorted(keys):
            await concurrency_limits.admit_waiting_runs(self._database, key)
        await wakeups.wake_workers(self._broker)
        pods = {run.target for run in effects.woken} - {SHARED_TARGET}
        pods |= {key.partition(":")[0] for key in keys}
        if pods:
            await self._pods.notify_pods(pods)

    # ── periodic work ───────────────────────────────────────────────────────────────────────────────────────

    def _keep_active(self) -> None:
        self._active_until = monotonic() + ACTIVE_SECONDS
        if self._periodic is None and not self._is_closed:
            self._periodic = asyncio.create_task(self._repeat())

    async def _repeat(self) -> None:
        """Look once a second for lost notifications and due tasks, while polls wait or reports have come in
        ten minutes.
        """
        try:
            while self._parked or monotonic() < self._active_until:
                await asyncio.sleep(LOOK_SECONDS)
                try:
                    await self._check()
                except (DatabaseUnavailable, LockWaitTimeout) as error:
                    log.debug("tasks not checked", reason=str(error))
                except Exception:
                    log.exception("tasks not checked")
        finally:
            self._periodic = None

    async def _check(self) -> None:
        """Look once for tasks whose notification was lost, and move tasks whose time has come."""
        await self.presence.flush()
        await self.sweep()
        organization_ids = sorted(self._parked)
        if organization_ids:
            for organization_id in await self.tasks.claims.changed_organizations(organization_ids):
                self.serve(organization_id)

    async def sweep(self) -> None:
        """Move tasks whose time has come, admit limited ones, and cancel those of ended runs."""
        await self.follow(await self.tasks.upkeep.sweep())
        if keys := await self.tasks.upkeep.limited_keys():
            await self.announce(await self.tasks.upkeep.admit(keys))
        if monotonic() > self._abandoned_at:
            self._abandoned_at = monotonic() + ABANDONED_SECONDS
            await self.follow(await self.tasks.upkeep.cancel_abandoned())
        if monotonic() > self._forgotten_at:
            self._forgotten_at = monotonic() + FORGET_SECONDS
            await self.tasks.workers.forget()

    def release(self) -> None:
        """Answer all polls and refuse new ones, because the gateway stops."""
        self._is_closed = True
        for parked in [one for polls in self._parked.values() for one in polls]:
            parked.resolve(PollAnswer())

    async def close(self) -> None:
        """Answer all polls and end the background work."""
        self.release()
        tasks = [*self._serving.values(), *([self._periodic] if self._periodic else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._looks.drain()
        await self._reports.drain()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.presence.close()
