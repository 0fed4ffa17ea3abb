"""Assignment of accepted runs to workers that have granted slots: these runs need no wakeup and no claim."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

import msgspec
import structlog
from msgspec import Struct

from journal.group_commit import GroupCommit
from journal.store import (
    DIRECT_TOKEN,
    AcceptanceResult,
    AcceptanceVerdict,
    ClaimedRun,
    ExecutionKey,
    InboundRequest,
    IngestedRun,
    RunAcceptance,
)
from messages.broker import GRANT_SECONDS, SLOT_GRANTS, BrokerUnavailable, DirectRuns, SlotGrant
from models.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from journal.store import JournalStore
    from messages.broker import Broker, Notification

MAX_DIRECT_CHARACTERS: Final = 16_000
"""Limit of the texts in one message to a worker; larger runs are claimed."""
FORGET_SECONDS: Final = 60.0
"""Time after its last grant for which a worker is remembered, with the number of runs that it got."""

log = structlog.get_logger()


class GrantingWorker(Struct):
    """Worker with slots for this gateway."""

    assigned: int = 0
    """Number of runs that were assigned to it, including those whose commit is in progress."""
    sent: int = 0
    """Number of runs that were sent to it."""
    received: int = 0
    """Number of the last run that it has received."""
    lost: int = 0
    """Number of later runs that have not arrived in time."""
    assigned_at: float = float("-inf")
    """Time of the last assignment, by the event loop's clock."""
    left: int = 0
    until: float = 0.0

    def apply_grant(self, grant: SlotGrant, now: float) -> None:
        """Apply a grant of slots (free places for runs) of this worker that arrived at `now`, a time of the event loop,
        in place of its earlier one.

        Assigned runs that the worker has not received yet count as used slots. The grant ends after `GRANT_SECONDS`.
        """
        if grant.received > self.received:
            self.received, self.lost = grant.received, 0
            # This gateway has forgotten the worker, but not the other way round.
            self.sent, self.assigned = max(self.sent, self.received), max(self.assigned, self.received)
        if now - self.assigned_at > GRANT_SECONDS:
            self.lost = self.assigned - self.received
        self.left = max(grant.slots - max(self.assigned - self.received - self.lost, 0), 0)
        self.until = now + GRANT_SECONDS

    def assign(self, now: float) -> None:
        """Use up one slot of the worker for a run, at `now`, a time of the event loop."""
        self.assigned, self.assigned_at, self.left = self.assigned + 1, now, self.left - 1

    def withdraw(self) -> None:
        """Free the slot of an assigned run that is not sent after all."""
        self.assigned, self.left = self.assigned - 1, self.left + 1

    def count_sent(self, count: int) -> int:
        """Count `count` more runs as sent to this worker, and return the number of the last one."""
        self.sent += count
        return self.sent


class RunAssigner:
    """Assigns accepted runs to workers that have granted slots to this gateway."""

    def __init__(self, store: JournalStore, broker: Broker, wake_workers: Callable[[], object]) -> None:
        """Set store and broker; `wake_workers` is called when runs that could not be sent are pending."""
        self._store = store
        self._broker = broker
        self._wake_workers = wake_workers
        self._workers: dict[str, GrantingWorker] = {}
        # One after another, so that messages arrive in the order of their numbers.
        self._sends: GroupCommit[tuple[str, list[ClaimedRun]], None] = GroupCommit(self._send_all)
        self._returns: GroupCommit[ExecutionKey, None] = GroupCommit(self._return)

    async def start(self) -> None:
        """Subscribe to grants of free slots from workers."""
        await self._broker.listen(self._handle_notification, subject=SLOT_GRANTS)

    async def drain(self) -> None:
        """Wait until all assigned runs are sent, or pending again."""
        await self._sends.drain()
        await self._returns.drain()

    def assign(self, batch: Sequence[RunAcceptance]) -> Sequence[RunAcceptance]:
        """Assign runs of one commit to workers with free slots, and return all runs in order, the assigned ones with a
        worker's name.

        Each uses up a slot, of the worker with the most free slots first. Runs without a worker are claimed later.
        """
        now = asyncio.get_running_loop().time()
        free = [entry for entry in self._workers.items() if entry[1].left and entry[1].until > now]
        if not free:
            return batch
        free.sort(key=lambda entry: entry[1].left)
        name, worker = free.pop()
        assigned: list[RunAcceptance] = []
        for run in batch:
            if not worker.left and free:
                name, worker = free.pop()
            if worker.left and _may_start(run):
                worker.assign(now)
                assigned.append(msgspec.structs.replace(run, worker=name))
            else:
                assigned.append(run)
        return assigned

    def assign_requests(self, batch: Sequence[InboundRequest]) -> Sequence[InboundRequest]:
        """Return inbound requests with a worker for each run, if there are slots for all runs of a request.

        Runs of one request may have different priorities, so either all of them start at once or all are
        claimed.
        """
        return [self._assign_request(request) for request in batch]

    def _assign_request(self, request: InboundRequest) -> InboundRequest:
        runs = self.assign(request.runs)
        if all(run.worker for run in runs):
            return msgspec.structs.replace(request, runs=runs)
        self.withdraw(runs)
        return request

    def send(self, batch: Sequence[RunAcceptance], answers: Sequence[AcceptanceResult]) -> None:
        """Send the accepted runs of a committed batch to their workers in the background.

        Slots of runs that were not accepted are freed; a run that may have been stored before becomes pending.
        """
        chosen: dict[str, list[ClaimedRun]] = {}
        refused: list[RunAcceptance] = []
        for run, answer in zip(batch, answers, strict=True):
            if not run.worker:
                continue
            if answer.verdict is not AcceptanceVerdict.ACCEPTED:
                refused.append(run)
            elif answer.started_at is None:  # stored by a statement whose answer was lost
                refused.append(run)
                self._returns.submit(ExecutionKey(run.execution_id, run.shard))
            else:
                chosen.setdefault(run.worker, []).append(_build_claimed_run(run, answer.started_at))
        self.withdraw(refused)
        for entry in chosen.items():
            self._sends.submit(entry)

    def withdraw(self, batch: Sequence[RunAcceptance]) -> None:
        """Free the slots of assigned runs that are not sent to their workers."""
        for run in batch:
            if run.worker and (worker := self._workers.get(run.worker)) is not None:
                worker.withdraw()

    def _handle_notification(self, notification: Notification) -> None:
        if isinstance(notification, SlotGrant):
            now = asyncio.get_running_loop().time()
            for name in [name for name, one in self._workers.items() if one.until + FORGET_SECONDS < now]:
                del self._workers[name]
            self._workers.setdefault(notification.worker, GrantingWorker()).apply_grant(notification, now)

    async def _send_all(self, batches: Sequence[tuple[str, list[ClaimedRun]]]) -> Sequence[None]:
        """Send the runs of a batch to their workers, those of one worker together, in messages of at most
        16,000 characters.
        """
        together: dict[str, list[ClaimedRun]] = {}
        for name, runs in batches:
            together.setdefault(name, []).extend(runs)
        for name, runs in together.items():
            for message in _split(runs):
                await self._send(name, message)
        return [None] * len(batches)

    async def _send(self, name: str, runs: list[ClaimedRun]) -> None:
        """Send runs to a worker; make them pending if nobody received the message.

        If Redis fails, the message may have arrived: its runs are claimed after their leases.
        """
        is_heard, worker = False, self._workers.get(name)
        if worker is not None:
            content = msgspec.Raw(msgspec.json.encode(runs))
            message = DirectRuns(self._broker.channel, worker.count_sent(len(runs)), content)
            try:
                is_heard = await self._broker.send_direct(name, message)
            except BrokerUnavailable as error:
                # The message may have arrived. If not, its runs are claimed after their leases.
                log.debug("assigned runs not sent", worker=name, error=str(error))
                self._workers.pop(name, None)
                return
        if not is_heard:
            self._workers.pop(name, None)
            for run in runs:
                self._returns.submit(ExecutionKey(run.execution_id, run.shard))

    async def _return(self, keys: Sequence[ExecutionKey]) -> Sequence[None]:
        """Make runs pending that no worker has received, and wake workers; return None for each.

        If the database fails, the scheduler does it after their leases.
        """
        try:
            if await self._store.return_direct(keys):
                self._wake_workers()
        except DatabaseUnavailable as error:
            log.debug("assigned runs not returned", error=str(error))  # a sweep does it after their leases
        return [None] * len(keys)


def _count_characters(run: RunAcceptance | ClaimedRun) -> int:
    return len(run.trigger) + len(run.completion_action or "")


def _split(runs: Sequence[ClaimedRun]) -> Iterator[list[ClaimedRun]]:
    """Split runs into messages of at most 16,000 characters; a longer run is a message of its own."""
    message: list[ClaimedRun] = []
    left = MAX_DIRECT_CHARACTERS
    for run in runs:
        size = _count_characters(run)
        if message and size > left:
            yield message
            message, left = [], MAX_DIRECT_CHARACTERS
        message.append(run)
        left -= size
    yield message


def _may_start(run: RunAcceptance) -> bool:
    """Return whether any worker may execute the run at once: the run needs no slot of a key, no deployment,
    no mail parser and no delay.

    Runs over 16,000 characters are left to claims.
    """
    if isinstance(run, IngestedRun) and (run.delay_until is not None or not run.is_read):
        return False
    return (
        run.concurrency_key is None
        and run.assigned_deployment_id is None
        and _count_characters(run) <= MAX_DIRECT_CHARACTERS
    )


def _build_claimed_run(run: RunAcceptance, started_at: datetime) -> ClaimedRun:
    """Return an assigned run in the form that a claim returns; `started_at` is the time in its row."""
    return ClaimedRun(
        execution_id=run.execution_id,
        shard=run.shard,
        organization_id=run.organization_id,
        workflow_id=run.workflow_id,
        definition_hash=run.definition_hash,
        token=DIRECT_TOKEN,
        attempt=1,
        key_id=run.execution_id,
        has_journal=False,
        trigger=run.trigger,
        started_at=started_at,
        deadline_at=started_at + timedelta(seconds=run.timeout_seconds),
        request=None,
        channel=run.channel,
        user_id=run.user_id,
        wait_answer_count=0,
        concurrency_key=None,
        completion_action=run.completion_action,
        may_have_more=False,
        claimed_at=started_at,
        trace_origin=run.trace_origin,
        is_tainted=run.is_tainted,
    )
