"""How runs are taken in: many in one commit, then one hint to the workers for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import structlog
from sqlalchemy import select
from sqlmodel import col

from gateway import errors, limits
from gateway.recent import Recent
from journal.grouping import GroupCommit
from journal.store import Accepted, DefinitionKey, Verdict
from messages.broker import BrokerUnavailable
from models.execution import Idempotency
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.waiting import Waiting
    from journal.store import Acceptance, IdempotencyKey, Store
    from messages.broker import Broker
    from models.database import Database

log = structlog.get_logger()

STORED_SECONDS: Final = 3600.0
"""How long a definition counts as stored after it was."""
MAX_STORED: Final = 10_000

_CLOSED: Final[Mapping[WorkflowStatus, str]] = {
    WorkflowStatus.PAUSED: "The workflow is paused: set it to active to run it",
    WorkflowStatus.ARCHIVED: "The workflow is archived: set it to draft or active to run it",
}
"""Statuses in which no run is taken in, and what to do about it."""
_HTTP_KEYS: Final = ("body", "headers", "query")
_KEYS: Final[Mapping[str, Sequence[str]]] = {
    "webhook": _HTTP_KEYS,
    "rest-api": _HTTP_KEYS,
    "manual": ("body",),
}
"""What a trigger node gives out, by the kind of event that it takes."""


class Acceptances:
    """The way in of one gateway."""

    def __init__(self, store: Store, broker: Broker, waiting: Waiting) -> None:
        self._store = store
        self._broker = broker
        self._waiting = waiting
        self._group: GroupCommit[Acceptance, Accepted] = GroupCommit(self._commit)
        self._hints: GroupCommit[None, None] = GroupCommit(self._wake)
        self._stored: Recent[DefinitionKey, bool] = Recent(STORED_SECONDS, MAX_STORED)

    async def accept(self, acceptance: Acceptance) -> Accepted:
        """Return what became of a run once that is committed; raises 503 where too many wait."""
        if self._group.depth >= limits.ACCEPTANCES_WAITING:
            raise errors.not_ready("Too many executions wait to be accepted: try again")
        return await self._group.submit(acceptance)

    def is_stored(self, definition: DefinitionKey) -> bool:
        """Tell whether a definition is known to be in the database, so that its text need not be sent again."""
        return self._stored.get(definition) is not None

    def hint(self) -> None:
        """Tell the workers that there is work, after the commit; hints that wait for one another become one."""
        self._hints.submit(None)

    async def drain(self) -> None:
        """Finish what was begun."""
        await self._group.drain()
        await self._hints.drain()

    async def _commit(self, batch: Sequence[Acceptance]) -> Sequence[Accepted]:
        # Before the commit, so that whatever comes after it counts.
        self._waiting.expect([one.execution_id for one in batch])
        answers = await self._store.accept(batch)
        accepted = [
            one for one, answer in zip(batch, answers, strict=True) if answer.verdict is Verdict.ACCEPTED
        ]
        if accepted:
            self.hint()
        for one in accepted:
            if one.definition is not None:
                self._stored.put(
                    DefinitionKey(one.organization_id, one.definition_hash, one.lane), value=True
                )
        return answers

    async def _wake(self, batch: Sequence[None]) -> Sequence[None]:
        try:
            await self._broker.wake()
        except BrokerUnavailable as error:
            log.debug("workers not woken", reason=str(error))  # the rows are committed: a sweep finds them
        return batch


def require_open(status: WorkflowStatus) -> None:
    """Raise 409 where a workflow takes no run in."""
    if status in _CLOSED:
        raise errors.conflict(f"workflow-{status}", _CLOSED[status])


async def earlier(database: Database, lane: int, key: IdempotencyKey) -> Accepted | None:
    """Return the answer that an earlier request with this key got, if there was one."""
    statement = select(col(Idempotency.fingerprint), col(Idempotency.resource_id)).where(
        col(Idempotency.lane) == lane,
        col(Idempotency.scope) == key.scope,
        col(Idempotency.key) == key.key,
        col(Idempotency.expires_at) > datetime.now(UTC),
    )
    async with database.read() as connection:
        row = (await connection.execute(statement)).first()
    if row is None:
        return None
    verdict = Verdict.REPEATED if row.fingerprint == key.fingerprint else Verdict.MISMATCH
    return Accepted(verdict, row.resource_id)


def trigger_output(kind: str, inputs: Mapping[str, Json]) -> dict[str, Json]:
    """Return what the trigger node gives out: the inputs as its `body`, unless they are laid out as its output already.

    They are where they have a `body`, or `headers` or `query` that are objects: an input that is merely called `query`
    is part of the body.
    """
    keys = _KEYS.get(kind, _KEYS["manual"])
    empty: dict[str, Json] = {key: {} for key in keys}
    if any(key in inputs and (key == "body" or isinstance(inputs[key], dict)) for key in keys):
        return {**empty, **inputs}
    return {**empty, "body": dict(inputs)}
