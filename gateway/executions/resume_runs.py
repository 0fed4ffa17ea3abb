"""Resume of failed runs: a new execution that starts from the committed results of the failed one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    Text,
    and_,
    bindparam,
    case,
    false,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    true,
)
from sqlalchemy.orm import aliased
from sqlmodel import SQLModel, col

from engine.node_api import ERROR
from engine.run_records import SpanStatus
from gateway.executions import acceptance
from gateway.http import errors
from journal import run_labels, unparsed_mail
from journal.waits import completion
from json_text import decoding
from models import ids
from models.database_time import DatabaseTime
from models.execution import (
    LIMITED_TARGET,
    SHARED_TARGET,
    UNPARSED_TARGET,
    AttemptRow,
    Execution,
    ExecutionData,
    SpanRow,
)
from models.execution_status import MAX_PERCENT_UNDER_WAY, ExecutionStatus
from models.execution_visibility import visibility_condition
from models.workflow import Workflow, WorkflowStatus

if TYPE_CHECKING:
    from sqlalchemy import Insert, Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import ColumnElement, SQLColumnExpression

    from journal.store import ExecutionKey
    from models.access import ApiCaller

_later = aliased(Execution)
IS_RESUMED: Final = (
    select(col(_later.id))
    # By the index of resumed runs, which begins with the first run of a line.
    .where(col(_later.key_id) == col(Execution.key_id), col(_later.resumed_from) == col(Execution.id))
    .correlate(Execution)
    .exists()
)
"""Condition: an execution was resumed."""
_SETTLED: Final = or_(
    col(SpanRow.status).in_([SpanStatus.COMPLETED, SpanStatus.SKIPPED]),
    and_(col(SpanRow.status) == SpanStatus.FAILED, col(SpanRow.port) == ERROR),
)
"""Nodes that do not run again.

These include failed nodes that left by their error port, and exclude failed turns of loops.
"""
_IN_FLIGHT: Final = and_(col(SpanRow.status) == SpanStatus.RUNNING, col(SpanRow.resolved_config).is_not(None))
"""Writes with unknown outcome: they are repeated with the recorded key and body."""
_NOT_YET: Final = (
    *("due_at", "lease_owner", "lease_until", "deadline_at"),
    *("request", "error", "started_at", "ended_at", "follow_up_at", "follow_up_outcome"),
)
"""Columns of an execution that are empty until its first claim."""


async def resume_execution(
    connection: AsyncConnection, failed: ExecutionKey, new_id: str, caller: ApiCaller
) -> str | None:
    """Insert the execution `new_id`; raises 404, and 409 if the failed one can't be resumed.

    Returns its concurrency key if it waits for a slot.
    """
    earlier = await _lock_failed(connection, failed, caller)
    concurrency_key: str | None = earlier.concurrency_key
    if await connection.scalar(select(col(Execution.id)).where(col(Execution.id) == new_id)) is not None:
        return concurrency_key  # an earlier attempt was committed, but its answer was lost
    await _require_not_resumed(connection, failed)
    await insert_copy(connection, failed, new_id, caller, trigger_type=earlier.trigger_type)
    return concurrency_key


async def insert_copy(
    connection: AsyncConnection, failed: ExecutionKey, new_id: str, caller: ApiCaller, *, trigger_type: str
) -> None:
    """Insert the execution `new_id` with the committed results of a failed one."""
    kept = select(col(SpanRow.node_id), col(SpanRow.iteration), _SETTLED.label("is_settled")).where(
        _spans_of(failed), or_(_SETTLED, _IN_FLIGHT)
    )
    spans = (await connection.execute(kept)).all()
    settled_nodes = sum(bool(row.is_settled) and not row.iteration for row in spans)
    changes: dict[str, SQLColumnExpression[Any]] = {
        "completed_nodes": literal(settled_nodes),
        "progress": case(
            (
                col(Execution.total_nodes) > 0,
                MAX_PERCENT_UNDER_WAY * settled_nodes // col(Execution.total_nodes),
            ),
            else_=0,
        ),
        "follow_up": literal(await _follow_up(connection, failed, trigger_type), Text()),
    }
    if await connection.scalar(_is_unparsed(failed)):
        changes["target"] = literal(UNPARSED_TARGET)
    await connection.execute(_new_execution(failed, new_id, caller, changes))
    await connection.execute(_new_data(failed, new_id))
    await run_labels.copy_labels(connection, failed, new_id)
    if spans:
        copies = [
            {"new_id": ids.new_id("span"), "of_node": row.node_id, "of_iteration": row.iteration}
            for row in spans
        ]
        await connection.execute(_new_span(failed, new_id), copies)
        await _copy_attempts(connection, failed, new_id)


async def _copy_attempts(connection: AsyncConnection, failed: ExecutionKey, new_id: str) -> None:
    """Copy the attempts of the nodes whose spans are kept; other nodes begin with attempt 1."""
    identity = (col(AttemptRow.node_id), col(AttemptRow.iteration), col(AttemptRow.attempt))
    of_kept = and_(
        *(
            col(AttemptRow.execution_id) == col(SpanRow.execution_id),
            col(AttemptRow.shard) == col(SpanRow.shard),
        ),
        *(
            col(AttemptRow.node_id) == col(SpanRow.node_id),
            col(AttemptRow.iteration) == col(SpanRow.iteration),
        ),
    )
    kept = select(*identity).join(SpanRow, of_kept).where(_spans_of(failed), or_(_SETTLED, _IN_FLIGHT))
    copies = [
        {"new_id": ids.new_id("span"), "of_node": row[0], "of_iteration": row[1], "of_attempt": row[2]}
        for row in await connection.execute(kept)
    ]
    if not copies:
        return
    condition = and_(
        *(col(AttemptRow.execution_id) == failed.execution_id, col(AttemptRow.shard) == failed.shard),
        col(AttemptRow.node_id) == bindparam("of_node"),
        col(AttemptRow.iteration) == bindparam("of_iteration"),
        col(AttemptRow.attempt) == bindparam("of_attempt"),
    )
    changes = {"execution_id": literal(new_id), "id": bindparam("new_id", type_=Text())}
    await connection.execute(_copy("attempt_span", changes, condition), copies)


async def _lock_failed(connection: AsyncConnection, failed: ExecutionKey, caller: ApiCaller) -> Row[Any]:
    """Return the row of the failed execution, locked against resume and deletion until the transaction ends."""
    statement: Select[*tuple[Any, ...]] = (
        select(
            *(col(Execution.status), col(Execution.trigger_type), col(Execution.concurrency_key)),
            *(col(Workflow.status).label("workflow_status"), col(Workflow.deleted_at)),
        )
        .join(Workflow, col(Workflow.id) == col(Execution.workflow_id))
        .where(col(Execution.id) == failed.execution_id, visibility_condition(caller))
        .with_for_update(of=Execution)
    )
    found: Row[Any] | None = (await connection.execute(statement)).first()
    if found is None:
        raise errors.not_found("execution")
    if found.status != ExecutionStatus.FAILED:
        message = f"Only a failed execution can be resumed: this one is {found.status}"
        raise errors.conflict("execution-not-failed", message)
    if found.deleted_at is not None:
        raise errors.conflict("workflow-deleted", "The execution's workflow is deleted")
    acceptance.require_open(WorkflowStatus(found.workflow_status))
    return found


async def _require_not_resumed(connection: AsyncConnection, failed: ExecutionKey) -> None:
    """Raise 409 if a failed execution was resumed before; the details name the newest execution of the line."""
    # A separate statement after the lock, so that it sees the commit of a competing resume.
    resumed_key = select(col(Execution.key_id)).where(col(Execution.id) == failed.execution_id, IS_RESUMED)
    key_id = await connection.scalar(resumed_key)
    if key_id is None:
        return
    line = select(col(Execution.id)).where(
        col(Execution.key_id) == key_id, col(Execution.resumed_from).is_not(None)
    )
    newest_first = (col(Execution.created_at).desc(), col(Execution.id).desc())
    newest = await connection.scalar(line.order_by(*newest_first).limit(1))
    message = f"The execution was resumed already: resume the newest one of its line, {newest}"
    detail = errors.problem("id", "already-resumed", message)
    raise errors.conflict("already-resumed", message, details=[{**detail, "executionId": newest}])


async def _follow_up(connection: AsyncConnection, failed: ExecutionKey, trigger_type: str) -> str | None:
    """Return the completion actions of the new execution, from the settings of the failed one.

    The callbacks of the failed one were sent at its end.
    """
    if trigger_type == completion.ON_FAILURE_TRIGGER:
        return None
    config = select(col(ExecutionData.config)).where(
        col(ExecutionData.execution_id) == failed.execution_id, col(ExecutionData.shard) == failed.shard
    )
    return completion.requested_actions(decoding.decode(await connection.scalar(config) or "{}"))


def _new_execution(
    failed: ExecutionKey, new_id: str, caller: ApiCaller, also: Mapping[str, SQLColumnExpression[Any]]
) -> Insert:
    now = DatabaseTime()
    changes: dict[str, SQLColumnExpression[Any]] = {
        "id": literal(new_id),
        "user_id": literal(caller.user_id),
        "status": literal(ExecutionStatus.PENDING.value),
        "target": case(
            (
                col(Execution.concurrency_key).is_(None),
                func.coalesce(col(Execution.assigned_deployment_id), SHARED_TARGET),
            ),
            else_=LIMITED_TARGET,
        ),
        "rank": now,
        "is_fresh": true(),
        "token": literal(0),
        "attempt": literal(0),
        "isolated": false(),
        "isolation_losses": literal(0),
        "wait_answer_count": literal(0),
        "resumed_from": col(Execution.id),
        "has_journal": true(),
        "channel": literal(""),
        "created_at": now,
        "updated_at": now,
        **{name: null() for name in _NOT_YET},
        **also,
    }
    condition = and_(col(Execution.id) == failed.execution_id, col(Execution.shard) == failed.shard)
    return _copy("execution", changes, condition)


def _is_unparsed(failed: ExecutionKey) -> Select[bool]:
    """Return the statement that tells whether the mail that started a run could not be parsed."""
    return select(unparsed_mail.is_unparsed_column(col(ExecutionData.trigger))).where(
        col(ExecutionData.execution_id) == failed.execution_id, col(ExecutionData.shard) == failed.shard
    )


def _new_data(failed: ExecutionKey, new_id: str) -> Insert:
    condition = and_(
        col(ExecutionData.execution_id) == failed.execution_id, col(ExecutionData.shard) == failed.shard
    )
    return _copy("execution_data", {"execution_id": literal(new_id), "created_at": DatabaseTime()}, condition)


def _new_span(failed: ExecutionKey, new_id: str) -> Insert:
    """Return the statement that copies the span of `of_node` and `of_iteration` with the id `new_id`."""
    condition = and_(
        _spans_of(failed),
        col(SpanRow.node_id) == bindparam("of_node"),
        col(SpanRow.iteration) == bindparam("of_iteration"),
    )
    changes = {"execution_id": literal(new_id), "id": bindparam("new_id", type_=Text())}
    return _copy("span", changes, condition)


def _spans_of(failed: ExecutionKey) -> ColumnElement[bool]:
    return and_(col(SpanRow.execution_id) == failed.execution_id, col(SpanRow.shard) == failed.shard)


def _copy(
    table: str, changes: Mapping[str, SQLColumnExpression[Any]], condition: ColumnElement[bool]
) -> Insert:
    """Return the statement that copies rows of a table with some columns changed."""
    columns = SQLModel.metadata.tables[table].columns
    selected = select(*(changes.get(column.name, column) for column in columns)).where(condition)
    return insert(SQLModel.metadata.tables[table]).from_select([column.name for column in columns], selected)
