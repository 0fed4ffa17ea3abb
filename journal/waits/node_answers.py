"""Answers to waiting nodes: each is stored once, and read by the executor that continues the run.

An answer and the write that makes its run wait both update the run's row, so one of them is second. An answer
wakes a waiting run, and a run that got its answer while running doesn't wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct
from sqlalchemy import (
    BigInteger,
    and_,
    case,
    func,
    insert,
    literal_column,
    or_,
    select,
    text,
    type_coerce,
    update,
)
from sqlmodel import col

from engine.node_api import OUTPUT, AnswerSource
from engine.run_records import SpanStatus
from journal import blocked_intervals
from json_text import decoding
from models.database_time import DatabaseTime
from models.execution import AWAITS_INPUT_CONDITION, SHARED_TARGET, Execution, SpanRow, WaitAnswer
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from models.task_states import WORK_SINCE_SQL
from models.timestamps import from_microseconds
from models.workflow import Workflow

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.run_errors import FailureCause
    from engine.values import Json
    from journal.store import ExecutionKey
    from models.database import Database

BATCH_RUNS: Final = 100
QUESTIONS_PAGE: Final = 1_000
MAX_CLOCK_SKEW_MICROSECONDS: Final = 500_000
"""Time before the end of a wait from which input is refused, since the worker that ends it may have a fast
clock.
"""
_ENDING_AT_DEADLINE: Final = frozenset({AnswerSource.INPUT, AnswerSource.CALLBACK, AnswerSource.SIGNAL})
"""Sources whose answers are refused after the end of the wait: their senders learn the outcome, or another node
gets the signal.
"""
RESUMED_DEADLINE: Final = col(Execution.deadline_at) + func.coalesce(
    literal_column(WORK_SINCE_SQL, BigInteger), DatabaseTime()
)
"""Deadline of a waiting run that continues now: its row holds the remaining time instead, which a worker may have used
in part.
"""
_encode = msgspec.json.Encoder().encode


class AnswerReception(StrEnum):
    """Verdict on an answer."""

    TAKEN = "taken"
    LATE = "late"
    """Another answer was first."""
    EXPIRED = "expired"
    """The wait of the node has timed out: it continues without an answer."""
    REASSIGNED = "reassigned"
    """Its question was assigned to other people meanwhile."""
    UNAWAITED = "unawaited"
    """No node waits for it, or its run has ended."""


class HeldRun(Struct, frozen=True):
    """Run that has got an answer while a shared worker held it."""

    execution_id: str
    lease_owner: str
    """Channel of the worker."""


class AnswerResult(Struct, frozen=True):
    """Result of an answer. If it woke the run, the caller notifies workers after the commit."""

    reception: AnswerReception
    is_woken: bool = False
    concurrency_key: str | None = None
    """Concurrency key of a woken run; such a run continues when it is admitted to a slot of the key."""
    deployment_id: str | None = None
    """Id of the workflow whose pods continue a woken run; None: any worker."""
    held: HeldRun | None = None
    """The run, if a worker that the caller can notify holds it."""


class WaitingNode(Struct, frozen=True):
    """Node that waits for an answer."""

    node_id: str
    iteration: str
    label: str
    request: Mapping[str, Json]
    """Request of the node."""
    started_at: datetime | None
    expires_at: datetime | None
    """End of the wait, after which the node continues without an answer or fails; None: no end."""
    continues_at_expiry: bool = False
    """Whether the node continues then, and does not fail."""


def encode_output_answer(value: Json, port: str = OUTPUT) -> bytes:
    """Return the stored answer with which a waiting node completes with a value that leaves at a port."""
    return _encode({"output": value, "port": port})


def encode_error_answer(code: str, message: str, cause: FailureCause | None = None) -> bytes:
    """Return the stored answer with which a waiting node fails, with a code and a message.

    `cause` is the error inside another run for which it has waited.
    """
    error: dict[str, object] = {"code": code, "message": message}
    return _encode({"error": error if cause is None else {**error, "cause": cause}})


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
    """Store the answer of a node in the caller's transaction, and make its waiting run pending; return the result.

    Only the first answer counts: the same one again is taken, another is late. A run that has ended or is gone awaits
    none. A sub-workflow run, an event, a task, a callback or a signal may answer a node before its run waits; input of
    a person, `user_id`, needs a waiting node.
    """
    columns = (
        *(col(Execution.status), col(Execution.concurrency_key), col(Execution.assigned_deployment_id)),
        *(col(Execution.target), col(Execution.lease_owner)),
    )
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
        # The same answer was stored by a transaction whose commit was not confirmed.
        return AnswerResult(AnswerReception.TAKEN if earlier == payload.decode() else AnswerReception.LATE)
    if run.status in TERMINAL_STATUSES:
        return AnswerResult(AnswerReception.UNAWAITED)
    reception = await _judge_answer(connection, key, node_id, iteration, kind)
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
        changes |= {
            "status": ExecutionStatus.PENDING.value,
            "due_at": None,
            "deadline_at": RESUMED_DEADLINE,
        }
    await connection.execute(update(Execution).where(*_is_run(key)).values(changes))
    if not is_woken:
        is_held = run.lease_owner is not None and run.target == SHARED_TARGET
        held = HeldRun(key.execution_id, run.lease_owner) if is_held else None
        return AnswerResult(AnswerReception.TAKEN, held=held)
    await blocked_intervals.end_interval(connection, key.execution_id)
    return AnswerResult(AnswerReception.TAKEN, is_woken, run.concurrency_key, run.assigned_deployment_id)


async def read_answers(
    database: Database, keys: Sequence[ExecutionKey]
) -> dict[str, dict[tuple[str, str], bytes]]:
    """Return the stored answers of runs by execution id, then by node id and iteration; runs without answers are left
    out.

    Raises `DatabaseUnavailable`.
    """
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
    """Return the nodes of an unfinished run that wait for input of a person and have no answer, in the order of their
    spans.

    A node whose wait is over is included until its run continues.
    """
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
            has_default = awaits["expired"] is not None
            found.append(WaitingNode(*place, awaits["request"], row.started_at, row.wake_at, has_default))
    return found


async def replace_request(
    connection: AsyncConnection, key: ExecutionKey, node: WaitingNode, request: Mapping[str, Json]
) -> None:
    """Replace the request of a node that waits for input, in the caller's transaction, which has locked the run.

    The executor writes the span of a waiting node only when its wait ends.
    """
    is_span = (
        *_belongs_to_run(SpanRow, key),
        col(SpanRow.node_id) == node.node_id,
        col(SpanRow.iteration) == node.iteration,
        col(SpanRow.status) == SpanStatus.WAITING.value,
    )
    awaits = decoding.decode(await connection.scalar(select(col(SpanRow.awaits)).where(*is_span)))
    text = _encode({**awaits, "request": request}).decode()
    await connection.execute(update(SpanRow).where(*is_span).values(awaits=text))


class OrganizationWait(Struct, frozen=True):
    """Node that waits for input, with its run."""

    execution_id: str
    workflow_id: str
    workflow_name: str
    user_id: str
    trigger_type: str
    node: WaitingNode


class WaitPosition(Struct, frozen=True):
    """Position of a waiting node in a list of the nodes of an organization."""

    execution_id: str
    sequence: int


class _Awaits(msgspec.Struct):
    """Part of the text of a waiting node that tells whether a person is asked."""

    kind: str
    request: msgspec.Raw


class _Question(msgspec.Struct):
    """Part of a request to a person that names the assignees."""

    assignees: Any = None


_decode_awaits = decoding.build_decoder(_Awaits).decode
_decode_question = decoding.build_decoder(_Question).decode


class ExaminedWait(Struct, frozen=True):
    """Node that waits for input of a person, of which `assignees` alone is decoded: few of those examined are shown."""

    assignees: Json
    """The value in its request."""
    _row: Row[*tuple[Any, ...]]

    @property
    def position(self) -> WaitPosition:
        """Position of the node in the list."""
        return WaitPosition(self._row.execution_id, self._row.sequence)

    def decode(self) -> OrganizationWait:
        """Return the whole node with its run, decoded from the row."""
        row = self._row
        awaits = decoding.decode(row.awaits)
        expires_at = None if row.wake_at is None else from_microseconds(row.wake_at)
        started_at = None if row.started_at is None else from_microseconds(row.started_at)
        place = (row.node_id, row.iteration, row.label)
        has_default = awaits["expired"] is not None
        node = WaitingNode(*place, awaits["request"], started_at, expires_at, has_default)
        return OrganizationWait(
            row.execution_id, row.workflow_id, row.workflow_name, row.user_id, row.trigger_type, node
        )


class WaitsPage(Struct, frozen=True):
    """Nodes that wait for input of a person among those that one statement has examined."""

    waits: Sequence[ExaminedWait]
    behind: WaitPosition | None
    """Position of the last examined node; None if there are no others."""


async def list_organization_waits(
    connection: AsyncConnection,
    visible: ColumnElement[bool],
    matches: Callable[[OrganizationWait], bool],
    *,
    organization_id: str,
    shard: int,
    at_most: int,
    examined: int,
) -> list[OrganizationWait]:
    """Return up to `at_most` nodes that wait for input of a person and match, in runs of an organization that satisfy
    `visible`, newest first.

    They are read in pages, so that questions which do not match hide no older ones. No page is read once `examined`
    nodes are.
    """
    found: list[OrganizationWait] = []
    behind: WaitPosition | None = None
    for _ in range(0, examined, QUESTIONS_PAGE):
        page = await read_organization_waits(
            connection, visible, organization_id, shard, behind, limit=QUESTIONS_PAGE
        )
        found += filter(matches, (one.decode() for one in page.waits))
        behind = page.behind
        if behind is None or len(found) >= at_most:
            break
    return found[:at_most]


async def read_organization_waits(
    connection: AsyncConnection,
    visible: ColumnElement[bool],
    organization_id: str,
    shard: int,
    behind: WaitPosition | None,
    *,
    limit: int,
    mentions: Sequence[str] = (),
) -> WaitsPage:
    """Return the nodes that wait for input of a person, in runs that satisfy `visible`, among the next `limit` nodes
    behind a position.

    Newest runs are first; None is before the first one. With `mentions`, only nodes whose request has one of these
    names anywhere are examined: ids, and e-mail addresses in any case of letters.
    """
    statement = organization_waits_statement(
        visible, organization_id, shard, behind, limit=limit, mentions=mentions
    )
    rows = (await connection.execute(statement)).all()
    examined = ((row, _decode_awaits(row.awaits)) for row in rows if row.is_open)
    waits = [
        ExaminedWait(_decode_question(awaits.request).assignees, row)
        for row, awaits in examined
        if awaits.kind == AnswerSource.INPUT
    ]
    last = rows[-1] if len(rows) == limit else None
    return WaitsPage(waits, None if last is None else WaitPosition(last.execution_id, last.sequence))


def organization_waits_statement(
    visible: ColumnElement[bool],
    organization_id: str,
    shard: int,
    behind: WaitPosition | None = None,
    *,
    limit: int,
    mentions: Sequence[str] = (),
) -> Select[*tuple[Any, ...]]:
    """Return the statement of the next `limit` nodes of an organization that wait for input of a person, read by their
    own index.

    Ordered by the ids of their runs, which have the order of time, the newest first; `behind` is the last node of the
    page before. `is_open` of a row is 1 if its run satisfies `visible`, waits, and has no answer for the node. Each row
    is examined once: a join that dropped some would read on for a full page.
    """
    # A shard has several organizations: a page must neither depend on another one nor name its runs. It is looked up
    # row by row, so that the index of questions stays the one that is read.
    owner = (
        select(col(Execution.organization_id))
        .where(col(Execution.id) == col(SpanRow.execution_id))
        .correlate(SpanRow)
        .scalar_subquery()
    )
    asked = (
        select(
            *(col(SpanRow.execution_id), col(SpanRow.node_id), col(SpanRow.iteration), col(SpanRow.label)),
            *(col(SpanRow.sequence), col(SpanRow.awaits), col(SpanRow.started_at), col(SpanRow.wake_at)),
        )
        .where(
            col(SpanRow.shard) == shard,
            # Both databases need the condition of the index in its words.
            text(f"span.{AWAITS_INPUT_CONDITION}"),
            col(SpanRow.status) == SpanStatus.WAITING.value,
            owner == organization_id,
            *_conditions_behind(behind),
            *([or_(*map(_has_mention, mentions))] if mentions else ()),
        )
        .order_by(col(SpanRow.execution_id).desc(), col(SpanRow.sequence))
        .limit(limit)
        .cte("asked")
        # Without statistics, PostgreSQL would begin with the waiting runs.
        .prefix_with("MATERIALIZED")
    )
    answered = select(col(WaitAnswer.node_id)).where(
        col(WaitAnswer.execution_id) == asked.c.execution_id,
        col(WaitAnswer.node_id) == asked.c.node_id,
        col(WaitAnswer.iteration) == asked.c.iteration,
    )
    is_open = and_(
        visible,
        col(Execution.status) == ExecutionStatus.WAITING.value,
        ~answered.correlate(asked).exists(),
    )
    return (
        select(
            *(asked.c.execution_id, col(Execution.workflow_id), col(Execution.user_id)),
            *(col(Execution.trigger_type), col(Workflow.name).label("workflow_name")),
            *(asked.c.node_id, asked.c.iteration, asked.c.label, asked.c.sequence),
            asked.c.awaits,
            # Converted for the few rows that are shown.
            *(type_coerce(asked.c[name], BigInteger).label(name) for name in ("started_at", "wake_at")),
            case((is_open, 1), else_=0).label("is_open"),
        )
        .select_from(asked)
        .outerjoin(Execution, col(Execution.id) == asked.c.execution_id)
        .outerjoin(Workflow, col(Workflow.id) == col(Execution.workflow_id))
        .order_by(asked.c.execution_id.desc(), asked.c.sequence)
    )


def _has_mention(name: str) -> ColumnElement[bool]:
    """Return the condition that a node's request has a name anywhere; an e-mail address in any case of letters."""
    awaits = col(SpanRow.awaits)
    if "@" not in name:
        return awaits.contains(name, autoescape=True)
    # Most requests name no address, and the search without regard to case takes most of the time of a page.
    return and_(awaits.contains("@"), awaits.icontains(name, autoescape=True))


def _conditions_behind(behind: WaitPosition | None) -> Iterable[ColumnElement[bool]]:
    """Yield the conditions of nodes after a position, in the order of pages; none without one."""
    if behind is None:
        return
    yield col(SpanRow.execution_id) <= behind.execution_id
    yield or_(col(SpanRow.execution_id) < behind.execution_id, col(SpanRow.sequence) > behind.sequence)


async def _judge_answer(
    connection: AsyncConnection, key: ExecutionKey, node_id: str, iteration: str, kind: AnswerSource
) -> AnswerReception:
    """Return whether a first answer to a node is taken, expired or not awaited, by the span of the node.

    Input of a person, callbacks and signals expire. All kinds but input are taken even before the node waits, while it
    runs, and a callback while it waits for a retry.
    """
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
    if kind is AnswerSource.CALLBACK and span.status == SpanStatus.RETRYING:
        # The receiver got a request whose answer was lost.
        return AnswerReception.TAKEN
    if span.status != SpanStatus.WAITING or not span.awaits:
        return AnswerReception.UNAWAITED
    if decoding.decode(span.awaits)["kind"] != kind:
        return AnswerReception.UNAWAITED
    is_expired = kind in _ENDING_AT_DEADLINE and span.has_expired
    return AnswerReception.EXPIRED if is_expired else AnswerReception.TAKEN


async def is_answered(
    connection: AsyncConnection, key: ExecutionKey, node_id: str, iteration: str | None
) -> bool:
    """Return whether a node of a run has an answer: in one iteration of its loop, or in any if `iteration` is None."""
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
