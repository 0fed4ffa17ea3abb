"""Acceptance of runs: one commit for many requests, then one wakeup of the workers for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import structlog
from sqlalchemy import select, tuple_
from sqlmodel import col

from concurrency.ttl_cache import TTLCache
from gateway.http import errors, limits
from journal import concurrency_limits
from journal.group_commit import GroupCommit
from journal.store import AcceptanceResult, AcceptanceVerdict, DefinitionKey
from messages import wakeups
from models.errors import DatabaseUnavailable
from models.execution import Idempotency
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from sqlalchemy import Row

    from gateway.executions.event_wait_delivery import EventWaitDelivery
    from gateway.executions.long_poll import ExecutionPollHub
    from journal.store import (
        IdempotencyKey,
        IngestedRun,
        IngestResult,
        IngestWrite,
        JournalStore,
        RunAcceptance,
    )
    from messages.broker import Broker
    from models.database import Database

log = structlog.get_logger()

STORED_SECONDS: Final = 3600.0
"""Seconds for which a definition counts as stored after its insertion."""
MAX_STORED: Final = 10_000
RUN_CHARACTERS: Final = 5_000
"""Characters that a run counts besides its texts."""
MAX_CHARACTERS: Final = 10_000_000
"""Limit of characters in one commit, enough for about 2,000 small runs.

A single larger item still gets a commit.
"""
KEYS_AT_ONCE: Final = 500

_CLOSED: Final[Mapping[WorkflowStatus, str]] = {
    WorkflowStatus.PAUSED: "The workflow is paused: set it to active to run it",
    WorkflowStatus.ARCHIVED: "The workflow is archived: set it to draft or active to run it",
}
"""Message for each workflow status that refuses runs."""


class PodNotifier(Protocol):
    """Notifies pods of new runs."""

    async def notify_pods(self, workflow_ids: Collection[str]) -> None:
        """Notify the pods of these workflows."""


class RunAcceptor:
    """Accepts runs and inbound requests for one gateway, in group commits."""

    def __init__(
        self,
        database: Database,
        store: JournalStore,
        broker: Broker,
        waiting: ExecutionPollHub,
        pods: PodNotifier,
        events: EventWaitDelivery,
    ) -> None:
        self._database = database
        self._store = store
        self._broker = broker
        self._waiting = waiting
        self._pods = pods
        self._events = events
        self._group: GroupCommit[RunAcceptance, AcceptanceResult] = GroupCommit(
            self._commit, weigh=_weight, max_weight=MAX_CHARACTERS
        )
        # A separate group: each of these runs takes a transaction of its own, which others need not wait for.
        self._separate: GroupCommit[RunAcceptance, AcceptanceResult] = GroupCommit(self._commit)
        # Inbound requests have a group commit of their own too: each may start a thousand runs.
        self._ingests: GroupCommit[IngestWrite, IngestResult] = GroupCommit(
            self._ingest_batch, weigh=lambda write: sum(map(_weight, write.runs)), max_weight=MAX_CHARACTERS
        )
        self._admissions: set[asyncio.Task[None]] = set()
        self._wakeups: GroupCommit[None, None] = GroupCommit(self._wake)
        self._pod_notifications: GroupCommit[str, None] = GroupCommit(self._notify_pods)
        self._parser_wakeups: GroupCommit[None, None] = GroupCommit(self._wake_mail_parsers)
        self._stored: TTLCache[DefinitionKey, bool] = TTLCache(STORED_SECONDS, MAX_STORED)

    async def accept(self, acceptance: RunAcceptance) -> AcceptanceResult:
        """Return the outcome of a run after its commit; raises 503 while too many runs wait."""
        group = self._group if acceptance.may_wait else self._separate
        if group.depth >= limits.ACCEPTANCES_WAITING:
            raise errors.not_ready("Too many executions wait to be accepted: try again")
        return await group.submit(acceptance)

    async def ingest(self, write: IngestWrite) -> IngestResult:
        """Return the outcome of an inbound request after its commit; raises 503 while too many wait."""
        if self._ingests.depth >= limits.ACCEPTANCES_WAITING:
            raise errors.not_ready("Too many executions wait to be accepted: try again")
        return await self._ingests.submit(write)

    @property
    def channel(self) -> str:
        """Channel on which this gateway is notified of the ends of its runs."""
        return self._broker.channel

    def is_stored(self, definition: DefinitionKey) -> bool:
        """Tell whether the database is known to have a definition, so that its text need not be sent again."""
        return self._stored.get(definition) is not None

    def follow(self, concurrency_key: str | None) -> None:
        """Wake the workers for a pending run, or admit its concurrency key where it waits for a slot.

        The run is committed.
        """
        if concurrency_key is None:
            self.wake_workers()
        else:
            self._begin_admission(concurrency_key)

    def wake_workers(self) -> None:
        """Wake the workers after a commit; concurrent wakeups are merged into one."""
        self._wakeups.submit(None)

    async def drain(self) -> None:
        """Finish pending commits and wakeups."""
        await self._group.drain()
        await self._separate.drain()
        await self._ingests.drain()
        while self._admissions:
            await asyncio.wait(self._admissions)
        await self._wakeups.drain()
        await self._parser_wakeups.drain()
        await self._pod_notifications.drain()

    async def _commit(self, batch: Sequence[RunAcceptance]) -> Sequence[AcceptanceResult]:
        # Expect the executions before the commit, so that no later change is missed.
        self._waiting.expect([one.execution_id for one in batch])
        answers = await self._store.accept(batch)
        accepted = [
            one
            for one, answer in zip(batch, answers, strict=True)
            if answer.verdict is AcceptanceVerdict.ACCEPTED
        ]
        self._remember(accepted)
        self._notify(accepted)
        return answers

    async def _ingest_batch(self, batch: Sequence[IngestWrite]) -> Sequence[IngestResult]:
        answers = await self._store.ingest(batch)
        accepted: list[IngestedRun] = []
        for write, answer in zip(batch, answers, strict=True):
            of_runs = zip(write.runs, answer.runs, strict=False)  # empty if the request was not accepted
            accepted += [run for run, one in of_runs if one.verdict is AcceptanceVerdict.ACCEPTED]
            if write.event is not None and answer.verdict is AcceptanceVerdict.ACCEPTED:
                self._events.submit(write.event.event_id)
        self._remember(accepted)
        self._notify([run for run in accepted if run.is_read and run.delay_until is None])
        if any(not run.is_read for run in accepted):
            self._parser_wakeups.submit(None)
        return answers

    def _remember(self, accepted: Sequence[RunAcceptance]) -> None:
        """Remember the definitions that the database has now."""
        for one in accepted:
            if one.definition is not None:
                self._stored.put(
                    DefinitionKey(one.organization_id, one.definition_hash, one.shard), value=True
                )

    def _notify(self, accepted: Sequence[RunAcceptance]) -> None:
        """Notify pods and workers of runs that may start."""
        if any(one.concurrency_key is None and one.assigned_deployment_id is None for one in accepted):
            self.wake_workers()
        for one in accepted:
            if one.concurrency_key is None and one.assigned_deployment_id is not None:
                self._pod_notifications.submit(one.assigned_deployment_id)
            if one.concurrency_key is not None:
                self._begin_admission(one.concurrency_key)

    def _begin_admission(self, key: str) -> None:
        """Admit runs of a concurrency key in the background: a locked key delays only its own runs."""
        task = asyncio.create_task(self._admit(key))
        self._admissions.add(task)
        task.add_done_callback(self._admissions.discard)

    async def _admit(self, key: str) -> None:
        """Grant concurrency slots to accepted runs; a sweep repeats an admission that fails here."""
        try:
            if await concurrency_limits.admit_waiting_runs(self._database, key):
                self.wake_workers()
                # Keys begin with the workflow id; if that workflow has no deployment, no pod polls for it.
                await self._pods.notify_pods({key.partition(":")[0]})
        except DatabaseUnavailable as error:
            log.debug("concurrency slots not granted", key=key, error=str(error))

    async def _notify_pods(self, batch: Sequence[str]) -> Sequence[None]:
        await self._pods.notify_pods(set(batch))
        return [None] * len(batch)

    async def _wake_mail_parsers(self, batch: Sequence[None]) -> Sequence[None]:
        await wakeups.wake_mail_parsers(self._broker)
        return batch

    async def _wake(self, batch: Sequence[None]) -> Sequence[None]:
        await wakeups.wake_workers(self._broker)
        return batch


def _weight(run: RunAcceptance) -> int:
    return RUN_CHARACTERS + len(run.trigger) + len(run.definition or "")


def require_open(status: WorkflowStatus) -> None:
    """Raise 409 if the status of a workflow refuses runs."""
    if status in _CLOSED:
        raise errors.conflict(f"workflow-{status}", _CLOSED[status])


async def find_earlier(database: Database, shard: int, key: IdempotencyKey) -> AcceptanceResult | None:
    """Return the answer to an earlier request with this idempotency key, or None."""
    statement = select(col(Idempotency.fingerprint), col(Idempotency.resource_id)).where(
        col(Idempotency.shard) == shard,
        col(Idempotency.scope) == key.scope,
        col(Idempotency.key) == key.key,
        col(Idempotency.expires_at) > database.clock.now(),
    )
    async with database.read() as connection:
        row = (await connection.execute(statement)).first()
    if row is None:
        return None
    return _as_bound(row, key)


async def find_all_earlier(
    database: Database, shard: int, keys: Sequence[IdempotencyKey]
) -> dict[IdempotencyKey, AcceptanceResult]:
    """Return the answers to earlier requests by their idempotency keys; unused keys are omitted."""
    pair = tuple_(col(Idempotency.scope), col(Idempotency.key))
    asked = {(key.scope, key.key): key for key in keys}
    pairs = list(asked)
    found: dict[IdempotencyKey, AcceptanceResult] = {}
    async with database.read() as connection:
        for start in range(0, len(pairs), KEYS_AT_ONCE):
            statement = select(Idempotency).where(
                col(Idempotency.shard) == shard,
                pair.in_(pairs[start : start + KEYS_AT_ONCE]),
                col(Idempotency.expires_at) > database.clock.now(),
            )
            for row in await connection.execute(statement):
                key = asked[row.scope, row.key]
                found[key] = _as_bound(row, key)
    return found


def _as_bound(row: Row[*tuple[Any, ...]], key: IdempotencyKey) -> AcceptanceResult:
    verdict = AcceptanceVerdict.REPEATED if row.fingerprint == key.fingerprint else AcceptanceVerdict.MISMATCH
    return AcceptanceResult(verdict, row.resource_id)
