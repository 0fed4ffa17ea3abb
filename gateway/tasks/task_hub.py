"""Hub of task workers at one gateway: their polls, their reports, and the consequences of these.

Once a second, one query finds tasks whose notification was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING, Final

import structlog

from gateway.tasks.worker_presence import TaskWorkerPresence
from journal import concurrency_limits
from journal.group_commit import GroupCommit
from journal.tasks.task_items import Completion
from messages import wakeups
from models.errors import DatabaseUnavailable, LockWaitTimeout
from models.execution import SHARED_TARGET

if TYPE_CHECKING:
    from execution.organization_catalogs import OrganizationCatalogs
    from gateway.executions.acceptance import PodNotifier
    from gateway.tasks.held_polls import HeldPoll
    from gateway.tasks.parked_polls import PollAnswer
    from gateway.tasks.poll_keys import PollKeyChecker
    from gateway.tasks.poll_service import ClientWatch, PollService
    from gateway.tasks.worker_presence import WorkerDescription
    from journal.tasks.task_items import ItemResult, WorkerReport
    from journal.tasks.task_polls import TaskPoll
    from journal.tasks.task_store import TaskStore
    from journal.tasks.task_transaction import TaskEffects
    from messages.broker import Broker
    from models.database import Database

log = structlog.get_logger()

LOOK_SECONDS: Final = 1.0
ABANDONED_SECONDS: Final = 10.0
FORGET_SECONDS: Final = 3_600.0
ACTIVE_SECONDS: Final = 600.0
"""Time after the last call of a worker for which this gateway sweeps tasks."""


class TaskHub:
    """Polls and reports of task workers at this gateway, and the periodic work on tasks while there are any."""

    def __init__(
        self,
        database: Database,
        broker: Broker,
        tasks: TaskStore,
        pods: PodNotifier,
        catalogs: OrganizationCatalogs,
    ) -> None:
        self._database = database
        self._catalogs = catalogs
        self._broker = broker
        self.tasks = tasks
        self._pods = pods
        self.presence = TaskWorkerPresence(database)
        self._reports: GroupCommit[WorkerReport, list[ItemResult]] = GroupCommit(self._report)
        self._periodic: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._active_until = 0.0
        self._abandoned_at = 0.0
        self._forgotten_at = 0.0
        self._is_closed = False

    @cached_property
    def _polls(self) -> PollService:
        from gateway.tasks.poll_service import PollService  # noqa: PLC0415 - loaded with the first worker

        return PollService(self._broker, self.tasks)

    @cached_property
    def _keys(self) -> PollKeyChecker:
        from gateway.tasks.poll_keys import PollKeyChecker  # noqa: PLC0415 - as above

        return PollKeyChecker(self._database)

    async def wait(
        self,
        poll: TaskPoll,
        worker: WorkerDescription,
        seconds: float,
        call_on_disconnect: ClientWatch | None = None,
    ) -> PollAnswer:
        """Return tasks or cancellations for a worker as soon as there are any; an empty answer after `seconds`.

        A worker that disconnects meanwhile gets no tasks: `call_on_disconnect` registers a callback for that. Raises a
        409 error for a stopped worker, 503 while 20,000 polls wait or the gateway stops, and the error of the first
        look for tasks, such as `DatabaseUnavailable`.
        """
        from gateway.tasks.parked_polls import ParkedPoll  # noqa: PLC0415 - loaded with the first worker

        self._keep_active()
        await self.presence.note(worker)
        parked = ParkedPoll(poll, seconds, key_id=worker.key_id)
        return await self._polls.wait(parked, call_on_disconnect)

    async def hold(
        self,
        poll: TaskPoll,
        worker: WorkerDescription,
        seconds: float,
        call_on_disconnect: ClientWatch | None = None,
    ) -> HeldPoll:
        """Open a poll with heartbeats, which may wait for minutes, and return it; the caller waits and closes it.

        Raises 503 while 20,000 polls wait or the gateway stops, and `DatabaseUnavailable`; `HeldPoll.wait_first` raises
        409 for a stopped worker.
        """
        from gateway.tasks.held_polls import HeldPoll  # noqa: PLC0415 - loaded with the first worker
        from gateway.tasks.parked_polls import ParkedPoll  # noqa: PLC0415 - as above

        self._keep_active()
        await self.presence.note(worker)
        parked = ParkedPoll(poll, seconds, key_id=worker.key_id, has_heartbeats=True)
        await self._polls.open(parked, call_on_disconnect)
        return HeldPoll(parked, self._polls, self.presence)

    # ── reports ─────────────────────────────────────────────────────────────────────────────────────────────

    async def report(self, report: WorkerReport) -> Sequence[ItemResult]:
        """Apply a worker's report about its tasks, in one transaction with other reports; return the result of each
        item, then those of held tasks that are lost or canceled.

        Raises `DatabaseUnavailable`.
        """
        self._keep_active()
        return await self._reports.submit(report)

    async def _report(self, batch: Sequence[WorkerReport]) -> Sequence[list[ItemResult]]:
        """Apply reports in one transaction, with outputs checked by their types' schemas; return the results of each
        report.

        The consequences for runs and workers follow in the background.
        """
        from gateway.tasks import output_checks  # noqa: PLC0415 - loaded with the first worker

        completing = {
            one.organization_id for one in batch if any(isinstance(item, Completion) for item in one.items)
        }
        catalogs = {one: await self._catalogs.of(one) for one in sorted(completing)}
        results, effects = await self.tasks.reports.report(
            batch,
            lambda facts, item: output_checks.find_problem(catalogs.get(facts.organization_id), facts, item),
        )
        self._in_background(effects)
        return results

    async def stop(self, organization_id: str, worker_id: str) -> None:
        """Store that a worker stops: it gets no more tasks, and its open polls end; ignored for an unknown worker."""
        if await self.tasks.workers.stop(organization_id, worker_id):
            await self._polls.announce_leaving(organization_id)

    async def drain(self, organization_id: str, worker_id: str) -> bool:
        """Ask a worker to stop, by the answer to its next or open poll; return False for an unknown worker."""
        is_known = await self.tasks.workers.drain(organization_id, worker_id)
        if is_known:
            await self._polls.announce_leaving(organization_id)
        return is_known

    def _in_background(self, effects: TaskEffects) -> None:
        """Start `follow` for committed changes of tasks, in the background."""
        task = asyncio.create_task(self._follow_quietly(effects))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _follow_quietly(self, effects: TaskEffects) -> None:
        """Do what `follow` does, and log errors instead of raising them: a sweep makes up for them."""
        try:
            await self.follow(effects)
        except (DatabaseUnavailable, LockWaitTimeout) as error:
            log.debug("changes of tasks not followed", reason=str(error))  # the periodic work does
        except Exception:
            log.exception("changes of tasks not followed")

    # ── effects of a transaction ────────────────────────────────────────────────────────────────────────────

    async def follow(self, effects: TaskEffects) -> None:
        """After a commit, wake or notify runs with answers, admit tasks of freed concurrency keys, and notify
        task workers.

        A sweep makes up for a lost call. Raises `DatabaseUnavailable` and `LockWaitTimeout`.
        """
        if effects.woken:
            await self._wake_runs(effects)
        if effects.answered:
            await wakeups.notify_answered_runs(self._broker, effects.answered)
        changed = effects.ready_organizations | effects.cancelling_organizations
        if effects.freed_keys:
            changed |= await self.tasks.upkeep.admit(sorted(effects.freed_keys))
        if changed:
            await self._polls.announce(changed)

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
        """Repeat the checks for due tasks each second for the next ten minutes; started now if they don't run."""
        self._active_until = monotonic() + ACTIVE_SECONDS
        if self._periodic is None and not self._is_closed:
            self._periodic = asyncio.create_task(self._repeat())

    async def _repeat(self) -> None:
        """Look once a second for lost notifications and due tasks, while polls wait or reports have come in
        ten minutes.
        """
        try:
            while self._polls.organization_ids or monotonic() < self._active_until:
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
        """Store the presence of workers, end polls with refused keys, sweep, and look for tasks whose notification was
        lost, each once.
        """
        await self.presence.flush()
        await self._keys.end_refused(self._polls)
        self._polls.repeat_failed_looks()
        await self.sweep()
        if organization_ids := sorted(self._polls.organization_ids):
            for organization_id in await self.tasks.claims.changed_organizations(organization_ids):
                self._polls.serve(organization_id)

    async def sweep(self) -> None:
        """Move tasks whose time has come, and admit tasks of free concurrency keys.

        Less often, tasks of ended runs are canceled and rows of long absent workers deleted. Raises
        `DatabaseUnavailable` and `LockWaitTimeout`.
        """
        await self.follow(await self.tasks.upkeep.sweep())
        if keys := await self.tasks.upkeep.list_limited_keys():
            await self._polls.announce(await self.tasks.upkeep.admit(keys))
        if monotonic() > self._abandoned_at:
            self._abandoned_at = monotonic() + ABANDONED_SECONDS
            await self.follow(await self.tasks.upkeep.cancel_abandoned())
        if monotonic() > self._forgotten_at:
            self._forgotten_at = monotonic() + FORGET_SECONDS
            await self.tasks.workers.forget()

    def release(self) -> None:
        """Answer all open polls without tasks and refuse new ones with 503, because the gateway stops."""
        self._is_closed = True
        self._polls.release()

    async def close(self) -> None:
        """Answer all open polls, finish open reports, and end the background work."""
        self.release()
        if self._periodic is not None:
            self._periodic.cancel()
            await asyncio.gather(self._periodic, return_exceptions=True)
        await self._polls.close()
        await self._reports.drain()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.presence.close()
