"""Queries of the recorded steps of agents."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from sqlalchemy import BigInteger, case, func, literal_column, or_, select, type_coerce
from sqlmodel import col

from engine.agents import call_approvals
from engine.agents.agent_steps import AgentStep, StepKind, StepReuse, StepStatus
from engine.model_calls import ModelCallRecord
from engine.run_records import SpanStatus
from journal.run_rows import STEP_COLUMNS, decode_step
from json_text import decoding
from models.agent_step import AgentStepRow
from models.execution import SpanRow

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.parameters import PageBounds
    from journal.store import ExecutionKey


IS_OF_RUN: Final = or_(col(AgentStepRow.reuse).is_(None), col(AgentStepRow.reuse) == StepReuse.REUSED)
"""Condition: a step belongs to its run, and not only to the run that this one replays."""


class StepFilter(Struct, frozen=True):
    """Agents of a run whose steps are read; None: all."""

    node_id: str | None = None
    iteration: str | None = None


async def list_steps(
    connection: AsyncConnection, key: ExecutionKey, wanted: StepFilter, part: PageBounds
) -> tuple[int, Sequence[AgentStep]]:
    """Return the number of matching steps of a run, and the page `part` of them by node, iteration and number."""
    conditions = list(_build_conditions(key, wanted))
    count = await connection.scalar(select(func.count()).select_from(AgentStepRow).where(*conditions))
    order = (col(AgentStepRow.node_id), col(AgentStepRow.iteration), col(AgentStepRow.number))
    statement = select_steps().where(*conditions).order_by(*order).limit(part.limit).offset(part.offset)
    return count or 0, [decode_step(row) for row in await connection.execute(statement)]


async def read_steps(
    connection: AsyncConnection, key: ExecutionKey, node_id: str, iteration: str, at_most: int
) -> Sequence[AgentStep]:
    """Return the first `at_most` steps of the agent `node_id` in an iteration, "" outside of loops, in the
    order of their numbers.
    """
    statement = (
        select_steps()
        .where(*_build_conditions(key, StepFilter(node_id, iteration)))
        .order_by(col(AgentStepRow.number))
        .limit(at_most)
    )
    return [decode_step(row) for row in await connection.execute(statement)]


async def read_changed_steps(
    connection: AsyncConnection, key: ExecutionKey, wanted: StepFilter, after: int, at_most: int
) -> Sequence[AgentStep]:
    """Return the matching steps that have changed since sequence number `after`, in the order of their sequence
    numbers, at most `at_most`.
    """
    statement = (
        select_steps()
        .where(*_build_conditions(key, wanted), col(AgentStepRow.sequence) > after)
        .order_by(col(AgentStepRow.sequence))
        .limit(at_most)
    )
    return [decode_step(row) for row in await connection.execute(statement)]


async def read_states(
    connection: AsyncConnection, key: ExecutionKey, node_ids: Sequence[str], at_most: int
) -> Sequence[AgentStep]:
    """Return the first `at_most` steps of these agents outside of loops, without arguments and results, by node and
    number.

    Steps that a replay has taken over are left out: the replayed run has their cost.
    """
    columns: tuple[Any, ...] = (
        *(col(AgentStepRow.node_id), col(AgentStepRow.number), col(AgentStepRow.sequence)),
        *(col(AgentStepRow.kind), col(AgentStepRow.name), col(AgentStepRow.status)),
        *(col(AgentStepRow.started_at), col(AgentStepRow.request_hash), col(AgentStepRow.model_calls)),
    )
    statement = (
        select(*columns)
        .where(
            *_build_conditions(key, StepFilter(iteration="")),
            col(AgentStepRow.reuse).is_(None),
            col(AgentStepRow.node_id).in_(node_ids),
        )
        .order_by(col(AgentStepRow.node_id), col(AgentStepRow.number))
        .limit(at_most)
    )
    return [
        AgentStep(
            node_id=row.node_id,
            iteration="",
            number=row.number,
            sequence=row.sequence,
            kind=StepKind(row.kind),
            name=row.name,
            status=StepStatus(row.status),
            started_at=row.started_at,
            request_hash=row.request_hash,
            model_calls=decoding.decode(row.model_calls, tuple[ModelCallRecord, ...])
            if row.model_calls
            else (),
        )
        for row in await connection.execute(statement)
    ]


class ToolCallSums(Struct, frozen=True):
    """Calls of one tool by an agent, in all of its iterations."""

    agent_id: str
    """Node of the agent."""
    name: str
    calls: int
    failed: int
    open: int
    """Calls that are made, or that a person has to decide about."""
    started_at: datetime
    ended_at: datetime | None
    spent: timedelta


async def sum_tool_calls(connection: AsyncConnection, key: ExecutionKey) -> Sequence[ToolCallSums]:
    """Return the calls of the tools of all agents of a run, by agent and name."""
    spent = type_coerce(col(AgentStepRow.ended_at), BigInteger) - type_coerce(
        col(AgentStepRow.started_at), BigInteger
    )
    is_open = col(AgentStepRow.status).in_((StepStatus.STARTED, StepStatus.WAITING))
    statement = (
        select(
            *(col(AgentStepRow.node_id), col(AgentStepRow.name), func.count().label("calls")),
            func.sum(case((col(AgentStepRow.status) == StepStatus.FAILED, 1), else_=0)).label("failed"),
            func.sum(case((is_open, 1), else_=0)).label("open"),
            func.min(col(AgentStepRow.started_at)).label("started_at"),
            func.max(col(AgentStepRow.ended_at)).label("ended_at"),
            func.coalesce(func.sum(spent), 0).label("spent"),
        )
        .where(*_build_conditions(key, StepFilter()), col(AgentStepRow.kind) == StepKind.TOOL)
        .group_by(col(AgentStepRow.node_id), col(AgentStepRow.name))
    )
    return [
        ToolCallSums(
            row.node_id,
            row.name,
            row.calls,
            row.failed,
            row.open,
            row.started_at,
            row.ended_at,
            timedelta(microseconds=int(row.spent)),
        )
        for row in await connection.execute(statement)
    ]


async def read_questions(
    connection: AsyncConnection, key: ExecutionKey, steps: Sequence[AgentStep]
) -> Mapping[str, str]:
    """Return the id of the node with the open question about each waiting tool call among the steps, by
    `name_iteration(step)`.

    Steps without an open question are left out.
    """
    iterations = [call_approvals.name_iteration(step) for step in steps if step.status is StepStatus.WAITING]
    if not iterations:
        return {}
    statement = select(col(SpanRow.iteration), col(SpanRow.node_id)).where(
        col(SpanRow.execution_id) == key.execution_id,
        col(SpanRow.shard) == key.shard,
        col(SpanRow.status) == SpanStatus.WAITING.value,
        col(SpanRow.iteration).in_(iterations),
    )
    return {row.iteration: row.node_id for row in await connection.execute(statement)}


def select_steps() -> Select[*tuple[Any, ...]]:
    """Return the statement that selects all steps with the columns, as they are stored, that `decode_step` reads."""
    columns: list[ColumnElement[Any]] = [
        literal_column(f"execution_step.{column}") for column in STEP_COLUMNS
    ]
    return select(*columns).select_from(AgentStepRow)


def _build_conditions(key: ExecutionKey, wanted: StepFilter) -> Iterable[ColumnElement[bool]]:
    yield col(AgentStepRow.execution_id) == key.execution_id
    yield col(AgentStepRow.shard) == key.shard
    yield IS_OF_RUN
    if wanted.node_id is not None:
        yield col(AgentStepRow.node_id) == wanted.node_id
    if wanted.iteration is not None:
        yield col(AgentStepRow.iteration) == wanted.iteration
