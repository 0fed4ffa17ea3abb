"""Completion actions of runs, with the rows of ended runs as a durable queue.

A worker that takes a run sets its `completion_due_at` to a later time, as a lease. It removes completed actions
and postpones failed ones. If it dies in between, another worker takes the run at that time, so each action
may run twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct
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
    """Node of another run that waits for the end of this run."""

    execution_id: str
    node_id: str
    iteration: str


class CompletionCallback(msgspec.Struct, frozen=True, rename="camel"):
    """Callback to a URL after the end of a run with any status."""

    url: str


class FailureAction(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Action after the failure of a run: a run of a workflow, or a request to a URL."""

    workflow_id: str | None = None
    url: str | None = None


class CompletionAction(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Remaining completion actions of a run. Their JSON text begins with the parent, if there is one."""

    parent: ParentNode | None = None
    callback: CompletionCallback | None = None
    on_failure: FailureAction | None = None

    @classmethod
    def from_text(cls, text: str | bytes) -> CompletionAction:
        return decoding.decode(text, CompletionAction)

    @property
    def text(self) -> str | None:
        """JSON text of the actions as it is stored; None if no action remains."""
        return msgspec.json.encode(self).decode() if self != NO_ACTION else None

    @property
    def is_external(self) -> bool:
        """Whether there are actions besides the answer to the parent, which is internal."""
        return self.callback is not None or self.on_failure is not None

    def for_status(self, status: ExecutionStatus) -> CompletionAction:
        """Return the actions that apply to a run with this final status: the failure action only after `failed`."""
        return self if status is ExecutionStatus.FAILED else msgspec.structs.replace(self, on_failure=None)


NO_ACTION: Final = CompletionAction()
ON_FAILURE_TRIGGER: Final = "on-failure"
"""Trigger type of runs that another run's failure has started; their own failure starts no further run."""
_IS_QUEUED: Final = (col(Execution.completion_action).is_not(None), col(Execution.ended_at).is_not(None))
"""Condition of the partial index: ended runs with completion actions."""
_COLUMNS: Final = (
    *(col(Execution.id), col(Execution.shard), col(Execution.organization_id), col(Execution.workflow_id)),
    *(col(Execution.user_id), col(Execution.definition_hash), col(Execution.key_id), col(Execution.status)),
    *(
        col(Execution.error),
        col(Execution.started_at),
        col(Execution.ended_at),
        col(Execution.completion_action),
    ),
    *(col(Execution.completion_due_at), col(Execution.completion_outcome)),
)


class CompletionOutcome(msgspec.Struct, frozen=True, rename="camel"):
    """Progress of the completion actions of a run."""

    attempts: int = 0
    error: str | None = None
    """Error of the last attempt, if it failed. It is final if no action remains."""


class DueCompletion(Struct, frozen=True):
    """Ended run with completion actions that this worker has claimed until its lease ends."""

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
    completion_action: CompletionAction
    outcome: CompletionOutcome
    leased_until: datetime


def requested_actions(
    settings: Mapping[str, Json],
    *,
    callback_url: str = "",
    answering: Mapping[str, Mapping[str, str]] | None = None,
) -> str | None:
    """Return the completion actions of a run as JSON text: callback to `callback_url`, failure workflow or URL of the
    settings (`onFailure`), and answer to a parent; None for none.

    `answering` names the waiting node of the parent, as `children.completion_for_parent` returns it.
    """
    on_failure = settings.get("onFailure")
    return CompletionAction(
        parent=msgspec.convert(answering, CompletionAction).parent if answering else None,
        callback=CompletionCallback(callback_url) if callback_url else None,
        on_failure=msgspec.convert(on_failure, FailureAction) if on_failure else None,
    ).text


def due_statement(limit: int, *, but_of: Collection[str] = ()) -> CompoundSelect[*tuple[Any, ...]]:
    """Return the statement that finds ended runs: up to `limit` with new completion actions, then up to `limit` with
    actions that are due again.

    Runs of the organizations in `but_of` are left out.
    """
    is_fresh = col(Execution.completion_due_at).is_(None)
    is_due_again = col(Execution.completion_due_at) <= DatabaseTime()
    return union_all(
        _candidates_statement(is_fresh, col(Execution.ended_at), limit, but_of),
        _candidates_statement(is_due_again, col(Execution.completion_due_at), limit, but_of),
    )


async def find_due_completions(
    database: Database, limit: int, *, but_of: Collection[str] = ()
) -> Sequence[ExecutionKey]:
    """Return up to `limit` ended runs with due completion actions: new ones first, then those due longest.

    Runs of the organizations in `but_of` are left out. Raises `DatabaseUnavailable`.
    """
    async with database.read() as connection:
        rows = await connection.execute(due_statement(limit, but_of=but_of).limit(limit))
        return [ExecutionKey(row.id, row.shard) for row in rows]


async def claim_completions(
    database: Database, keys: Collection[ExecutionKey], lease_seconds: float
) -> list[DueCompletion]:
    """Claim due completion actions of these runs for `lease_seconds`, and return them.

    Actions that are not due, are claimed by another worker, or have locked rows are left out. Raises
    `DatabaseUnavailable`.
    """

    async def take(connection: AsyncConnection) -> list[DueCompletion]:
        unlocked = (
            select(col(Execution.id))
            .where(
                col(Execution.id).in_(sorted(key.execution_id for key in keys)),
                col(Execution.shard).in_({key.shard for key in keys}),
                *_IS_QUEUED,
                col(Execution.completion_due_at).is_(None)
                | (col(Execution.completion_due_at) <= DatabaseTime()),
            )
            .with_for_update(key_share=True, skip_locked=True)
            .cte("unlocked")
        )
        statement = (
            update(Execution)
            .where(col(Execution.id).in_(select(unlocked.c.id)))
            .values(completion_due_at=DatabaseTime() + int(lease_seconds * 1_000_000))
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
    """Store the remaining actions of a claimed run, their outcome (None: no change), and when they are due again.

    `delay_seconds` is the time until then; None: the lease continues. Without remaining actions, the run is not due
    again. Writes nothing if another worker has claimed the run meanwhile.
    """
    changes: dict[str, Any] = {
        "completion_action": msgspec.to_builtins(left) if left != NO_ACTION else null()
    }
    if outcome is not None:
        changes["completion_outcome"] = msgspec.to_builtins(outcome)
    if left == NO_ACTION:
        changes["completion_due_at"] = None
    elif delay_seconds is not None:
        changes["completion_due_at"] = DatabaseTime() + int(delay_seconds * 1_000_000)
    await connection.execute(
        update(Execution)
        .where(*_is_run(due.key), col(Execution.completion_due_at) == due.leased_until)
        .values(**changes)
    )


async def clear_action(database: Database, key: ExecutionKey) -> None:
    """Clear the completion actions of an ended run, none of which applies to its status; raises
    `DatabaseUnavailable`.
    """

    async def clear(connection: AsyncConnection) -> None:
        await connection.execute(
            update(Execution)
            .where(*_is_run(key), *_IS_QUEUED)
            .values(completion_action=null(), completion_due_at=None)
        )

    await database.transaction(clear)


def _candidates_statement(
    condition: ColumnElement[bool], order: SQLColumnExpression[Any], limit: int, but_of: Collection[str]
) -> Select[Any]:
    statement = select(col(Execution.id), col(Execution.shard)).where(*_IS_QUEUED, condition)
    if but_of:
        statement = statement.where(col(Execution.organization_id).not_in(but_of))
    # A subquery, since SQLite allows no ORDER BY in a part of a union.
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
        completion_action=msgspec.convert(row.completion_action, CompletionAction),
        outcome=msgspec.convert(row.completion_outcome or {}, CompletionOutcome),
        leased_until=row.completion_due_at,
    )


def _is_run(key: ExecutionKey) -> Sequence[ColumnElement[bool]]:
    return col(Execution.id) == key.execution_id, col(Execution.shard) == key.shard
