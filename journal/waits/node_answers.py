"""Answers to nodes that wait for one: given once, and read by whoever takes the run up again.

An answer and the write by which its run goes to sleep both change the run's row, so that one of them is second: an
answer wakes the run that sleeps, and a run that was answered while it worked doesn't go to sleep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import BigInteger, and_, insert, select, type_coerce, update
from sqlmodel import col

from engine.node_api import OUTPUT, AnswerSource
from engine.run_records import SpanStatus
from json_text import decoding
from models.database_time import DatabaseTime
from models.execution import Execution, SpanRow, WaitAnswer
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.run_errors import FailureCause
    from engine.values import Json
    from journal.store import ExecutionKey
    from models.database import Database

BATCH_RUNS: Final = 100
MAX_CLOCK_SKEW_MICROSECONDS: Final = 500_000
"""A person is heard until so shortly before a wait ends: the worker's clock, by which it does, may be that fast."""
_encode = msgspec.json.Encoder().encode


class AnswerReception(StrEnum):
    """What became of an answer."""

    TAKEN = "taken"
    LATE = "late"
    """Another was first."""
    EXPIRED = "expired"
    """The node has waited long enough: it goes on without."""
    UNAWAITED = "unawaited"
    """No node waits for it, or its run has ended."""


@dataclass(frozen=True, slots=True)
class AnswerResult:
    """An answer, and whether it woke the run: after the commit, workers are told that there is work."""

    reception: AnswerReception
    is_woken: bool = False
    concurrency_key: str | None = None
    """A run that was woken and has one goes on when it is admitted to a place of this key."""


@dataclass(frozen=True, slots=True)
class WaitingNode:
    """A node that waits for an answer."""

    node_id: str
    iteration: str
    label: str
    request: Mapping[str, Json]
    """What the node asks."""
    started_at: datetime | None
    expires_at: datetime | None
    """From then on the node goes on without; None: it waits for ever."""


def encode_output_answer(value: Json, port: str = OUTPUT) -> bytes:
    """Return the answer by which a node ends well."""
    return _encode({"output": value, "port": port})


def encode_error_answer(code: str, message: str, cause: FailureCause | None = None) -> bytes:
    """Return the answer by which a node fails; `cause` is the error inside the run that it has waited for."""
    said: dict[str, object] = {"code": code, "message": message}
    return _encode({"error": said if cause is None else {**said, "cause": cause}})


async def store_answer(
    connection: AsyncConnection,
    key: ExecutionKey,
    node_id: str,
    iteration: str,
    payload: bytes,
    *,
    kind: AnswerSource,
    user_id: str | None = None,
) -> AnswerResult:
    """Give a node its answer, as a part of a transaction: the first counts.

    A run may answer the node that has started it before that has gone to sleep, and so may an event; a person is asked
    only by one that has.
    """
    columns = (col(Execution.status), col(Execution.concurrency_key))
    run = (await connection.execute(select(*columns).where(*_is_run(key)).with_for_update())).first()
    if run is None:
        return AnswerResult(AnswerReception.UNAWAITED)
    earlier = await connection.scalar(
        select(col(WaitAnswer.payload)).where(
            *_belongs_to_run(WaitAnswer, key),
            col(WaitAnswer.node_id) == node_id,
            col(WaitAnswer.iteration) == iteration,
        )
    )
    if earlier is not None:
        # The very same was given by a transaction whose commit nobody heard of.
        return AnswerResult(AnswerReception.TAKEN if earlier == payload.decode() else AnswerReception.LATE)
    if run.status in TERMINAL_STATUSES:
        return AnswerResult(AnswerReception.UNAWAITED)
    reception = await _receive_answer(connection, key, node_id, iteration, kind)
    if reception is not AnswerReception.TAKEN:
        return AnswerResult(reception)
    await connection.execute(
        insert(WaitAnswer).values(
            execution_id=key.execution_id,
            node_id=node_id,
            iteration=iteration,
            shard=key.shard,
            payload=payload.decode(),
            user_id=user_id,
            created_at=DatabaseTime(),
        )
    )
    changes: dict[str, Any] = {
        "wait_answer_count": col(Execution.wait_answer_count) + 1,
        "updated_at": DatabaseTime(),
    }
    is_woken = run.status == ExecutionStatus.WAITING
    if is_woken:
        # What was left of the run's timeout when it went to sleep is counted from now on.
        changes |= {
            "status": ExecutionStatus.PENDING.value,
            "due_at": None,
            "deadline_at": col(Execution.deadline_at) + DatabaseTime(),
        }
    await connection.execute(update(Execution).where(*_is_run(key)).values(changes))
    return AnswerResult(AnswerReception.TAKEN, is_woken, run.concurrency_key if is_woken else None)


async def read_answers(
    database: Database, keys: Sequence[ExecutionKey]
) -> dict[str, dict[tuple[str, str], bytes]]:
    """Return the answers that were given to runs, by execution id, then by node id and iteration."""
    found: dict[str, dict[tuple[str, str], bytes]] = {}
    columns = (
        col(WaitAnswer.execution_id),
        col(WaitAnswer.node_id),
        col(WaitAnswer.iteration),
        col(WaitAnswer.payload),
    )
    async with database.read() as connection:
        for start in range(0, len(keys), BATCH_RUNS):
            part = keys[start : start + BATCH_RUNS]
            condition = and_(
                col(WaitAnswer.execution_id).in_([key.execution_id for key in part]),
                col(WaitAnswer.shard).in_({key.shard for key in part}),
            )
            for execution_id, *place, payload in await connection.execute(select(*columns).where(condition)):
                node_id, iteration = place
                found.setdefault(execution_id, {})[node_id, iteration] = payload.encode()
    return found


async def list_input_waits(connection: AsyncConnection, key: ExecutionKey) -> list[WaitingNode]:
    """Return the nodes of a run that wait for a person and have no answer yet, in the order of their asking."""
    answered = select(col(WaitAnswer.node_id)).where(
        col(WaitAnswer.execution_id) == col(SpanRow.execution_id),
        col(WaitAnswer.node_id) == col(SpanRow.node_id),
        col(WaitAnswer.iteration) == col(SpanRow.iteration),
    )
    statement = (
        select(
            *(col(SpanRow.node_id), col(SpanRow.iteration), col(SpanRow.label)),
            *(col(SpanRow.awaits), col(SpanRow.started_at), col(SpanRow.wake_at)),
        )
        .join(Execution, and_(col(Execution.id) == col(SpanRow.execution_id), *_is_run(key)))
        .where(
            *_belongs_to_run(SpanRow, key),
            col(SpanRow.status) == SpanStatus.WAITING.value,
            col(SpanRow.awaits).is_not(None),
            col(Execution.ended_at).is_(None),
            ~answered.exists(),
        )
        .order_by(col(SpanRow.sequence))
    )
    found: list[WaitingNode] = []
    for row in await connection.execute(statement):
        awaits = decoding.decode(row.awaits)
        if awaits["kind"] == AnswerSource.INPUT:
            place = (row.node_id, row.iteration, row.label)
            found.append(WaitingNode(*place, awaits["request"], row.started_at, row.wake_at))
    return found


async def _receive_answer(
    connection: AsyncConnection, key: ExecutionKey, node_id: str, iteration: str, kind: AnswerSource
) -> AnswerReception:
    """Tell what becomes of an answer that is the first one, by the span of the node."""
    has_expired = (
        type_coerce(col(SpanRow.wake_at), BigInteger) <= DatabaseTime() + MAX_CLOCK_SKEW_MICROSECONDS
    )
    statement = select(col(SpanRow.status), col(SpanRow.awaits), has_expired.label("has_expired")).where(
        *_belongs_to_run(SpanRow, key), col(SpanRow.node_id) == node_id, col(SpanRow.iteration) == iteration
    )
    span = (await connection.execute(statement)).first()
    if span is None:
        return AnswerReception.UNAWAITED
    if kind is not AnswerSource.INPUT and span.status == SpanStatus.RUNNING:
        return AnswerReception.TAKEN
    if span.status != SpanStatus.WAITING or not span.awaits:
        return AnswerReception.UNAWAITED
    if decoding.decode(span.awaits)["kind"] != kind:
        return AnswerReception.UNAWAITED
    return (
        AnswerReception.EXPIRED if kind is AnswerSource.INPUT and span.has_expired else AnswerReception.TAKEN
    )


async def is_answered(
    connection: AsyncConnection, key: ExecutionKey, node_id: str, iteration: str | None
) -> bool:
    """Tell whether a node was given an answer: in one iteration, or in any where none is named."""
    statement = select(col(WaitAnswer.node_id)).where(
        *_belongs_to_run(WaitAnswer, key), col(WaitAnswer.node_id) == node_id
    )
    if iteration is not None:
        statement = statement.where(col(WaitAnswer.iteration) == iteration)
    return await connection.scalar(statement.limit(1)) is not None


def _is_run(key: ExecutionKey) -> Sequence[ColumnElement[bool]]:
    return col(Execution.id) == key.execution_id, col(Execution.shard) == key.shard


def _belongs_to_run(table: type[WaitAnswer | SpanRow], key: ExecutionKey) -> Sequence[ColumnElement[bool]]:
    return col(table.execution_id) == key.execution_id, col(table.shard) == key.shard
