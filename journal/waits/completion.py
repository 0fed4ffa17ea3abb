"""What is to be done about the ends of runs: the row of an ended run that has a follow-up is the queue of it.

Whoever takes one puts its `follow_up_at` ahead, as a lease; what was done is taken out, and what failed is put off. A
worker that dies in between is followed by another when that time has come, so everything here may happen twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import null, select, union_all, update
from sqlmodel import col

from journal.store import DefinitionKey, ExecutionKey
from json_text import decoding
from models.database_time import DatabaseTime
from models.execution import Execution
from models.execution_status import ExecutionStatus

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, CompoundSelect, Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from engine.values import Json
    from models.database import Database


class ParentNode(msgspec.Struct, frozen=True, rename="camel"):
    """The node of another run that waits for the end of this one."""

    execution_id: str
    node_id: str
    iteration: str


class CompletionCallback(msgspec.Struct, frozen=True, rename="camel"):
    """Where the end is told, whatever it is."""

    url: str


class FailureAction(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """What is done where the run has failed: a workflow is run, or an address told."""

    workflow_id: str | None = None
    url: str | None = None


class CompletionAction(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """What is still to be done; its text begins with the parent wherever there is one."""

    parent: ParentNode | None = None
    callback: CompletionCallback | None = None
    on_failure: FailureAction | None = None

    @classmethod
    def from_text(cls, text: str | bytes) -> CompletionAction:
        return decoding.decode(text, CompletionAction)

    @property
    def to_text(self) -> str | None:
        """JSON as it is stored; None where nothing is left to do."""
        return msgspec.json.encode(self).decode() if self != NO_ACTION else None

    @property
    def is_external(self) -> bool:
        """Whether it is anything but the parent's, which is nobody's business outside."""
        return self.callback is not None or self.on_failure is not None

    def for_status(self, status: ExecutionStatus) -> CompletionAction:
        """Return what of it concerns a run that has ended so."""
        return self if status is ExecutionStatus.FAILED else msgspec.structs.replace(self, on_failure=None)


NO_ACTION: Final = CompletionAction()
ON_FAILURE_TRIGGER: Final = "on-failure"
"""The trigger type of runs that are run because another has failed: about their own failure, nothing is run."""
_IS_QUEUED: Final = (col(Execution.follow_up).is_not(None), col(Execution.ended_at).is_not(None))
"""The condition of the index: follow-ups of runs that have ended."""
_COLUMNS: Final = (
    *(col(Execution.id), col(Execution.shard), col(Execution.organization_id), col(Execution.workflow_id)),
    *(col(Execution.user_id), col(Execution.definition_hash), col(Execution.key_id), col(Execution.status)),
    *(col(Execution.error), col(Execution.started_at), col(Execution.ended_at), col(Execution.follow_up)),
    *(col(Execution.follow_up_at), col(Execution.follow_up_outcome)),
)


class CompletionOutcome(msgspec.Struct, frozen=True, rename="camel"):
    """How it went so far."""

    attempts: int = 0
    error: str | None = None
    """Why the last attempt failed, if it did; there is no further one once nothing is left to do."""


@dataclass(frozen=True, slots=True)
class DueCompletion:
    """An ended run that somebody follows up, until their lease is over."""

    key: ExecutionKey
    organization_id: str
    workflow_id: str
    user_id: str
    definition: DefinitionKey
    key_id: str
    status: ExecutionStatus
    error: Mapping[str, Any] | None
    started_at: datetime | None
    ended_at: datetime
    follow_up: CompletionAction
    outcome: CompletionOutcome
    leased_until: datetime


def requested_actions(
    settings: Mapping[str, Json],
    *,
    callback_url: str = "",
    answering: Mapping[str, Mapping[str, str]] | None = None,
) -> str | None:
    """Return what is to be done about the end of a run under these settings, as it is stored; None for nothing.

    `answering` says whose node waits for it, as `children.answering` does.
    """
    on_failure = settings.get("onFailure")
    return CompletionAction(
        parent=msgspec.convert(answering, CompletionAction).parent if answering else None,
        callback=CompletionCallback(callback_url) if callback_url else None,
        on_failure=msgspec.convert(on_failure, FailureAction) if on_failure else None,
    ).to_text


def due_statement(limit: int, *, but_of: Collection[str] = ()) -> CompoundSelect[*tuple[Any, ...]]:
    """Return the statement that finds runs that are to be followed up by now; none of some organisations."""
    is_fresh = col(Execution.follow_up_at).is_(None)
    is_due_again = col(Execution.follow_up_at) <= DatabaseTime()
    return union_all(
        _candidates_statement(is_fresh, col(Execution.ended_at), limit, but_of),
        _candidates_statement(is_due_again, col(Execution.follow_up_at), limit, but_of),
    )


async def find_due_completions(
    database: Database, limit: int, *, but_of: Collection[str] = ()
) -> Sequence[ExecutionKey]:
    """Return runs that are to be followed up by now: fresh ones, then those that wait the longest."""
    async with database.read() as connection:
        rows = await connection.execute(due_statement(limit, but_of=but_of).limit(limit))
        return [ExecutionKey(row.id, row.shard) for row in rows]


async def claim_completions(
    database: Database, keys: Collection[ExecutionKey], lease_seconds: float
) -> list[DueCompletion]:
    """Take those of the runs that are due, that nobody else has taken and no other transaction has locked."""

    async def take(connection: AsyncConnection) -> list[DueCompletion]:
        unlocked = (
            select(col(Execution.id))
            .where(
                col(Execution.id).in_(sorted(key.execution_id for key in keys)),
                col(Execution.shard).in_({key.shard for key in keys}),
                *_IS_QUEUED,
                col(Execution.follow_up_at).is_(None) | (col(Execution.follow_up_at) <= DatabaseTime()),
            )
            .with_for_update(key_share=True, skip_locked=True)
            .cte("unlocked")
        )
        statement = (
            update(Execution)
            .where(col(Execution.id).in_(select(unlocked.c.id)))
            .values(follow_up_at=DatabaseTime() + int(lease_seconds * 1_000_000))
            .returning(*_COLUMNS)
        )
        return [_due_completion(row) for row in await connection.execute(statement)]

    return await database.transaction(take)


async def settle_completion(
    connection: AsyncConnection,
    due: DueCompletion,
    left: CompletionAction,
    outcome: CompletionOutcome | None,
    delay_seconds: float | None,
) -> None:
    """Write what is left to do, and not before when; None: the lease goes on.

    Nothing is written where somebody else has taken the run meanwhile.
    """
    changes: dict[str, Any] = {"follow_up": msgspec.to_builtins(left) if left != NO_ACTION else null()}
    if outcome is not None:
        changes["follow_up_outcome"] = msgspec.to_builtins(outcome)
    if left == NO_ACTION:
        changes["follow_up_at"] = None
    elif delay_seconds is not None:
        changes["follow_up_at"] = DatabaseTime() + int(delay_seconds * 1_000_000)
    await connection.execute(
        update(Execution)
        .where(*_is_run(due.key), col(Execution.follow_up_at) == due.leased_until)
        .values(**changes)
    )


async def clear_action(database: Database, key: ExecutionKey) -> None:
    """Clear the follow-up of an ended run that asks for nothing about such an end."""

    async def clear(connection: AsyncConnection) -> None:
        await connection.execute(
            update(Execution).where(*_is_run(key), *_IS_QUEUED).values(follow_up=null(), follow_up_at=None)
        )

    await database.transaction(clear)


def _candidates_statement(
    condition: ColumnElement[bool], order: SQLColumnExpression[Any], limit: int, but_of: Collection[str]
) -> Select[Any]:
    statement = select(col(Execution.id), col(Execution.shard)).where(*_IS_QUEUED, condition)
    if but_of:
        statement = statement.where(col(Execution.organization_id).not_in(but_of))
    # As a subquery, since SQLite takes no order in a part of a union.
    return select(statement.order_by(order).limit(limit).subquery())


def _due_completion(row: Row[Any]) -> DueCompletion:
    return DueCompletion(
        key=ExecutionKey(row.id, row.shard),
        organization_id=row.organization_id,
        workflow_id=row.workflow_id,
        user_id=row.user_id,
        definition=DefinitionKey(row.organization_id, row.definition_hash, row.shard),
        key_id=row.key_id,
        status=ExecutionStatus(row.status),
        error=row.error,
        started_at=row.started_at,
        ended_at=row.ended_at,
        follow_up=msgspec.convert(row.follow_up, CompletionAction),
        outcome=msgspec.convert(row.follow_up_outcome or {}, CompletionOutcome),
        leased_until=row.follow_up_at,
    )


def _is_run(key: ExecutionKey) -> Sequence[ColumnElement[bool]]:
    return col(Execution.id) == key.execution_id, col(Execution.shard) == key.shard
