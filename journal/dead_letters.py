"""Counts of dead letters: failed runs of inbound requests, neither redriven, resumed, replayed nor purged."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct
from sqlalchemy import Text, column, exists, func, literal, literal_column, or_, select, type_coerce
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import aliased
from sqlmodel import col

from journal import failure_causes
from models.dead_letter_mute import DeadLetterMute
from models.execution import Execution, Idempotency
from models.execution_status import ExecutionStatus
from models.ingest import INTAKE_KINDS
from models.workflow import Workflow

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from journal.failure_causes import ErrorCause

_resumed: Final = aliased(Execution)
_replay: Final = aliased(Execution)
IS_TAKEN_UP: Final = or_(
    select(col(_resumed.id))
    # By the index of resumed runs, which begins with the first run of a chain.
    .where(col(_resumed.key_id) == col(Execution.key_id), col(_resumed.resumed_from) == col(Execution.id))
    .correlate(Execution)
    .exists(),
    select(col(_replay.id)).where(col(_replay.replay_of) == col(Execution.id)).correlate(Execution).exists(),
)
"""Condition: an execution was resumed or replayed."""
# Literals, not bound parameters: databases use a partial index only for a condition that they can read.
IS_FAILED: Final = col(Execution.status) == literal_column(f"'{ExecutionStatus.FAILED}'")
OF_INTAKE: Final = (
    IS_FAILED,
    col(Execution.trigger_type).in_([literal_column(f"'{kind}'") for kind in INTAKE_KINDS]),
    col(Execution.parent_id).is_(None),
    col(Execution.is_private).is_(False),
)
"""Conditions of failed runs of inbound requests."""
IS_OPEN: Final = (col(Execution.settled_at).is_(None), ~IS_TAKEN_UP)
"""Conditions of dead letters among them, but for used redrive keys, whose scope is a hash of the workflow."""


class ErrorCount(Struct, frozen=True):
    """Number of dead letters of a workflow with the same definition and the same text of the error."""

    workflow_id: str
    error: str | None
    """JSON text."""
    definition_hash: str
    count: int
    first_at: datetime
    last_at: datetime
    newest_id: str

    @property
    def cause(self) -> ErrorCause:
        return failure_causes.describe_stored(self.workflow_id, self.error)


def redrive_scope(workflow_id: str) -> str:
    """Return the scope of the redrive keys of a workflow's dead letters and deliveries."""
    return sha256(f"settled\n{workflow_id}".encode()).hexdigest()


async def count_by_error(
    connection: AsyncConnection, *conditions: ColumnElement[bool]
) -> Sequence[ErrorCount]:
    """Count all dead letters that match the conditions, by workflow, text of the error and definition."""
    columns = (
        col(Execution.workflow_id),
        type_coerce(col(Execution.error), Text).label("error"),
        col(Execution.definition_hash),
    )
    counts = (
        func.count(),
        func.min(col(Execution.created_at)),
        func.max(col(Execution.created_at)),
        # Ids ascend with the time of acceptance.
        func.max(col(Execution.id)),
    )
    statement = await _select_open(connection, conditions, (*columns, *counts))
    rows = await connection.execute(statement.group_by(*columns))
    return [ErrorCount(*row) for row in rows]


async def count_unmuted(connection: AsyncConnection, now: datetime) -> int:
    """Count the dead letters of all organizations, without those of muted groups and of deleted workflows."""
    in_force = select(col(DeadLetterMute.group_id), col(DeadLetterMute.workflow_id)).where(
        col(DeadLetterMute.ends_at) > now
    )
    muted = {row.group_id: row.workflow_id for row in await connection.execute(in_force)}
    workflow = select(col(Workflow.id)).where(col(Workflow.id) == col(Execution.workflow_id))
    is_redrivable = workflow.where(col(Workflow.deleted_at).is_(None)).correlate(Execution).exists()
    has_mutes = col(Execution.workflow_id).in_(set(muted.values()))
    count = await connection.scalar(
        await _select_open(connection, (is_redrivable, ~has_mutes), [func.count()])
    )
    others = await count_by_error(connection, is_redrivable, has_mutes) if muted else ()
    return (count or 0) + sum(row.count for row in others if row.cause.fingerprint not in muted)


def list_pairs(
    pairs: Sequence[tuple[str, str]], *, is_sqlite: bool
) -> tuple[ColumnElement[str], ColumnElement[str]]:
    """Return the two columns of an SQL table of pairs, bound as one JSON parameter on SQLite and as two arrays on
    PostgreSQL.

    So one prepared statement looks all pairs up by their index. A condition with hundreds of alternatives is planned
    anew each time, which takes longer than to run it.
    """
    if is_sqlite:
        listed = func.json_each(msgspec.json.encode(pairs).decode()).table_valued("value")
        return func.json_extract(listed.c.value, "$[0]"), func.json_extract(listed.c.value, "$[1]")
    columns = [literal(list(texts), ARRAY(Text)) for texts in zip(*pairs, strict=True)]
    listed = func.unnest(*columns).table_valued(column("scope", Text), column("key", Text)).render_derived()
    return listed.c.scope, listed.c.key


async def _select_open(
    connection: AsyncConnection,
    conditions: Sequence[ColumnElement[bool]],
    columns: Sequence[SQLColumnExpression[Any]],
) -> Select[*tuple[Any, ...]]:
    """Return the statement that reads columns of the dead letters that match the conditions."""
    matching = (*OF_INTAKE, *IS_OPEN, *conditions)
    unsettled = select(col(Execution.workflow_id)).where(*OF_INTAKE, IS_OPEN[0], *conditions)
    workflow_ids = await connection.scalars(unsettled.distinct())
    scopes = [(workflow_id, redrive_scope(workflow_id)) for workflow_id in workflow_ids]
    if not scopes:
        return select(*columns).where(*matching)
    workflow_id, scope = list_pairs(scopes, is_sqlite=connection.dialect.name == "sqlite")
    is_redriven = exists().where(
        col(Idempotency.shard) == col(Execution.shard),
        col(Idempotency.scope) == scope,
        col(Idempotency.key) == col(Execution.id),
    )
    return select(*columns).where(
        *matching, col(Execution.workflow_id) == workflow_id, ~is_redriven.correlate_except(Idempotency)
    )
