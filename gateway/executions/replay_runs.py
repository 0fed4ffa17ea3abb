"""Start of planned replays: one transaction that inserts the new execution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from engine.node_api import CONTINUE, ERROR
from engine.replay_plan import ResultUse
from engine.run_records import NodeSpan, SpanStatus
from engine.unfinished_writes import may_have_happened
from gateway.executions import replay_planning, resume_runs
from journal import run_copies
from journal.run_rows import decode_error
from models.database_time import DatabaseTime
from models.execution import Execution, SpanRow
from models.workflow import Definition

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.executions.acceptance import RunAcceptor
    from gateway.executions.long_poll import ExecutionAccess
    from gateway.executions.replay_planning import PlannedReplay
    from journal.store import ExecutionKey
    from models.access import ApiCaller
    from models.database import Database


async def start_planned(
    database: Database,
    access: ExecutionAccess,
    acceptances: RunAcceptor,
    caller: ApiCaller,
    source: ExecutionKey,
    new_id: str,
    planned: PlannedReplay,
) -> None:
    """Start the planned replay `new_id` of an execution in a transaction of its own, make it visible to the caller, and
    wake workers.

    An existing `new_id` is left as it is. Raises the errors of `start_replay` without `again`.
    """
    await database.transaction(
        partial(
            start_replay,
            source=source,
            new_id=new_id,
            caller=caller,
            planned=planned,
            now=database.clock.now(),
            again=False,
        )
    )
    access.allow(new_id, caller)
    acceptances.dispatch(planned.concurrency_key)


async def start_replay(
    connection: AsyncConnection,
    source: ExecutionKey,
    new_id: str,
    caller: ApiCaller,
    planned: PlannedReplay,
    *,
    now: datetime,
    again: bool,
) -> None:
    """Insert the execution `new_id` as a replay of `source` by a plan; nothing changes if it exists already.

    Raises 404, 409 if the source has not ended, was resumed, replayed or redriven before (unless `again`), or its
    workflow is paused, archived or deleted, and `LockWaitTimeout` if another transaction locks the source.
    """
    ended = await resume_runs.lock_ended(connection, source, caller)
    resume_runs.require_ended(ended.status)
    resume_runs.require_open(ended)
    if await connection.scalar(select(col(Execution.id)).where(col(Execution.id) == new_id)) is not None:
        return  # an earlier attempt was committed, but its answer was lost
    if not again:
        await resume_runs.require_not_taken_up(connection, source)
    redriven = await resume_runs.settle_dead_letter(connection, ended, source, new_id, now)
    if redriven is not None and not again:
        raise resume_runs.already_taken_up(redriven)
    await _store_definition(connection, source, caller, planned)
    inner = await _find_inner_spans(connection, source, planned)
    copy = replay_planning.replay_copy(planned, inner)
    await run_copies.insert_replay(connection, source, new_id, caller.user_id, copy)


async def _store_definition(
    connection: AsyncConnection, source: ExecutionKey, caller: ApiCaller, planned: PlannedReplay
) -> None:
    """Store the definition that a replay runs, for the organization; of one that is stored already, only
    renew the age.
    """
    chosen = planned.definition
    if chosen.text is None:
        return
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    row = {
        "organization_id": caller.organization_id,
        "hash": chosen.hash,
        "shard": source.shard,
        "body": chosen.text,
        "created_at": DatabaseTime(),
    }
    # A new use renews the age, so that retention keeps the definition.
    await connection.execute(
        insert(Definition)
        .values(row)
        .on_conflict_do_update(
            index_elements=["organization_id", "hash"], set_={"created_at": DatabaseTime()}
        )
    )


async def _find_inner_spans(
    connection: AsyncConnection, source: ExecutionKey, planned: PlannedReplay
) -> Mapping[ResultUse, Sequence[tuple[str, str]]]:
    """Return node id and iteration of the spans within loops that a replay begins with, by their use: settled or in
    flight.

    Both are empty if no loop is kept.
    """
    found: dict[ResultUse, list[tuple[str, str]]] = {ResultUse.SETTLED: [], ResultUse.IN_FLIGHT: []}
    if not planned.bodies:
        return found
    names = sorted({*planned.bodies, *(node_id for body in planned.bodies.values() for node_id in body)})
    dirty = frozenset(node_id for nodes in planned.dirty.values() for node_id in nodes)
    statement: Select[*tuple[Any, ...]] = select(
        *(col(SpanRow.node_id), col(SpanRow.iteration), col(SpanRow.status), col(SpanRow.port)),
        *(col(SpanRow.attempt), col(SpanRow.error), col(SpanRow.resolved_config)),
    ).where(
        *(col(SpanRow.execution_id) == source.execution_id, col(SpanRow.shard) == source.shard),
        *(col(SpanRow.iteration) != "", col(SpanRow.node_id).in_(names)),
        or_(
            col(SpanRow.status).in_([SpanStatus.COMPLETED, SpanStatus.SKIPPED]),
            and_(col(SpanRow.status) == SpanStatus.FAILED, col(SpanRow.port) == ERROR),
            col(SpanRow.resolved_config).is_not(None),
        ),
    )
    for row in await connection.execute(statement):
        use = _use_of_inner(row, dirty)
        if use is not None:
            found[use].append((row.node_id, row.iteration))
    return found


def _use_of_inner(row: Row[Any], dirty: frozenset[str]) -> ResultUse | None:
    """Return the use in a replay of the span of a node in an iteration, or of the iteration itself; None to
    leave it out.

    A settled result is reused, an unfinished write is treated as in flight; nodes in `dirty` run again.
    """
    is_iteration = row.port == CONTINUE
    is_settled = row.status in {SpanStatus.COMPLETED, SpanStatus.SKIPPED} or row.port == ERROR
    if is_settled:
        return ResultUse.SETTLED if is_iteration or row.node_id not in dirty else None
    span = NodeSpan(
        *(row.node_id, "", "", SpanStatus(row.status), 0, None),
        attempt=row.attempt,
        error=decode_error(row.error),
        resolved_config=row.resolved_config.encode() if row.resolved_config is not None else None,
    )
    repeats = row.node_id not in dirty and not is_iteration and may_have_happened(span)
    return ResultUse.IN_FLIGHT if repeats else None
