"""Signals to runs: each is stored once, in order, and answers one node that waits for its name.

A signal and a node that begins to wait both lock the row of the run. So the second of the two finds the first:
no signal is lost or delivered twice, even if processes die in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from enum import StrEnum
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct
from sqlalchemy import BigInteger, delete, func, or_, select, type_coerce, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from engine.node_api import OUTPUT, AnswerSource
from engine.services import SignalExpectation
from journal.store import ExecutionKey
from journal.waits import node_answers
from journal.waits.node_answers import AnswerReception, AnswerResult
from models import database_time, timestamps
from models.column_types import TimestampColumn, build_row
from models.database_time import DatabaseTime
from models.execution import Execution, SpanRow, WaitAnswer
from models.execution_status import TERMINAL_STATUSES
from models.signal import Signal, SignalWait

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.services import RunCaller, SignalRequest

MAX_UNREAD: Final = 1_000
"""Maximum number of signals of a run that no node has received."""
MAX_REPLY_BYTES: Final = 256_000
"""Maximum size of the reply to a signal, as JSON."""
PAGE_CHARACTERS: Final = 10_000_000
"""Characters of the payloads and replies in a page of signals."""
_encode = msgspec.json.Encoder().encode
NO_ANSWER: Final = AnswerResult(AnswerReception.UNAWAITED)


class SignalVerdict(StrEnum):
    """Verdict on a signal."""

    DELIVERED = "delivered"
    """A waiting node has received it."""
    UNREAD = "unread"
    """It is kept for the next node that waits for its name."""
    ENDED = "ended"
    """The run has ended."""
    FULL = "full"
    """The run has the maximum number of unread signals."""


class SignalProgress(Struct, frozen=True):
    """Signal, and whether its run may still reply to it."""

    signal: Signal
    has_ended: bool
    """Whether the run has ended."""


class NewSignal(Struct, frozen=True):
    """Signal of a client."""

    id: str
    name: str
    payload: bytes
    """JSON."""
    user_id: str


class SignalResult(Struct, frozen=True):
    """Result of a signal. If its answer woke the run, the caller notifies workers or pods after the commit."""

    verdict: SignalVerdict
    run_status: str
    signal: Signal | None = None
    """Stored signal; None unless it was delivered or is unread."""
    answer: AnswerResult = NO_ANSWER


async def store_signal(
    connection: AsyncConnection, key: ExecutionKey, sent: NewSignal, attempted: SignalResult | None = None
) -> SignalResult | None:
    """Store a signal in the caller's transaction, and give it to the node that has waited longest for its name; None if
    the run is gone.

    Without such a node it stays unread, behind earlier signals; but it is not stored if the run has 1,000 unread ones.
    Nothing is stored if the run has ended. `attempted` is the result of an earlier call whose commit was not confirmed:
    it is returned if it was committed.
    """
    locked = select(col(Execution.status)).where(*_is_run(key)).with_for_update()
    status = await connection.scalar(locked)
    if status is None:
        return None
    # After the lock, so that it sees a commit in progress.
    if attempted is not None and await find_signal(connection, key, sent.id) is not None:
        return attempted
    if status in TERMINAL_STATUSES:
        return SignalResult(SignalVerdict.ENDED, status)
    last = select(func.max(col(Signal.number))).where(col(Signal.execution_id) == key.execution_id)
    signal = Signal(
        execution_id=key.execution_id,
        number=(await connection.scalar(last) or 0) + 1,
        shard=key.shard,
        id=sent.id,
        name=sent.name,
        payload=sent.payload.decode(),
        user_id=sent.user_id,
        created_at=await database_time.read_database_time(connection),
    )
    answer = await _answer_longest_wait(connection, key, signal)
    if signal.node_id is None and await _count_unread(connection, key) >= MAX_UNREAD:
        return SignalResult(SignalVerdict.FULL, status)
    await connection.execute(_insert(connection, Signal).values(signal.model_dump()))
    verdict = SignalVerdict.UNREAD if signal.node_id is None else SignalVerdict.DELIVERED
    return SignalResult(verdict, status, signal, answer)


async def add_wait(
    connection: AsyncConnection, caller: RunCaller, wanted: SignalRequest, node_id: str, iteration: str
) -> tuple[SignalExpectation, AnswerResult]:
    """Store in the caller's transaction that a node waits for a signal, or answer it with the earliest unread signal of
    the wanted name.

    Return the end of its wait (None without a limit), or its answer, which may have been given before this call; and
    the result of an answer that was stored now, else `NO_ANSWER`. If the run is gone or the node never started, there
    is neither end nor answer. A repeated call changes nothing.
    """
    shard = await connection.scalar(
        select(col(Execution.shard))
        .where(
            col(Execution.id) == caller.execution_id,
            col(Execution.organization_id) == caller.organization_id,
        )
        .with_for_update()
    )
    if shard is None:
        return SignalExpectation(), NO_ANSWER
    key = ExecutionKey(caller.execution_id, shard)
    earlier = await connection.scalar(
        select(col(WaitAnswer.payload)).where(
            col(WaitAnswer.shard) == shard, *_is_node(WaitAnswer, key, node_id, iteration)
        )
    )
    if earlier is not None:
        return SignalExpectation(answer=earlier.encode()), NO_ANSWER
    reached_at = await connection.scalar(
        select(col(SpanRow.started_at)).where(*_is_node(SpanRow, key, node_id, iteration))
    )
    if reached_at is None:
        return SignalExpectation(), NO_ANSWER
    unread = await _find_unread(connection, key, wanted.name)
    if unread is not None:
        payload = _encode_answer(unread)
        answer = await node_answers.store_answer(
            connection, key, node_id, iteration, payload, kind=AnswerSource.SIGNAL
        )
        if answer.reception is AnswerReception.TAKEN:
            await _mark_delivered(connection, unread, node_id, iteration)
            return SignalExpectation(answer=payload), answer
    began_at = min(await database_time.read_database_time(connection), reached_at)
    timeout = wanted.timeout_seconds
    wait = SignalWait(
        execution_id=key.execution_id,
        node_id=node_id,
        iteration=iteration,
        shard=shard,
        name=wanted.name,
        created_at=began_at,
        expires_at=None if timeout is None else began_at + timedelta(seconds=timeout),
    )
    statement = _insert(connection, SignalWait).values(wait.model_dump()).on_conflict_do_nothing()
    await connection.execute(statement)
    kept = select(col(SignalWait.expires_at)).where(*_is_node(SignalWait, key, node_id, iteration))
    return SignalExpectation(expires_at=await connection.scalar(kept)), NO_ANSWER


async def list_signals(
    connection: AsyncConnection, key: ExecutionKey, *, after: int, at_most: int, is_unread: bool | None
) -> tuple[Sequence[Signal], int | None]:
    """Return the next signals of a run behind a number, in order: all (`is_unread` None), or only unread or
    delivered ones; and the number of the last, None if no more follow.

    There are fewer than `at_most` where their payloads would be larger than `PAGE_CHARACTERS`.
    """
    conditions: list[ColumnElement[bool]] = [
        col(Signal.execution_id) == key.execution_id,
        col(Signal.shard) == key.shard,
        col(Signal.number) > after,
    ]
    if is_unread is not None:
        delivered_at = col(Signal.delivered_at)
        conditions.append(delivered_at.is_(None) if is_unread else delivered_at.is_not(None))
    # First their sizes: a thousand payloads of the largest size take a gateway's memory.
    sizes = select(
        col(Signal.number),
        func.length(col(Signal.payload)) + func.coalesce(func.length(col(Signal.reply)), 0),
    ).where(*conditions)
    found = (await connection.execute(sizes.order_by(col(Signal.number)).limit(at_most + 1))).all()
    totals = accumulate(size for _, size in found)
    fitting = sum(total <= PAGE_CHARACTERS for total in totals)
    numbers = [number for number, _ in found][: min(max(fitting, 1), at_most)]
    statement = select(Signal).where(*conditions, col(Signal.number).in_(numbers))
    rows = (await connection.execute(statement.order_by(col(Signal.number)))).mappings().all()
    return [build_row(Signal, row) for row in rows], numbers[-1] if len(numbers) < len(found) else None


async def find_signal(connection: AsyncConnection, key: ExecutionKey, signal_id: str) -> Signal | None:
    """Return a signal of a run by its id; None if there is none."""
    statement = select(Signal).where(
        col(Signal.execution_id) == key.execution_id, col(Signal.id) == signal_id
    )
    row = (await connection.execute(statement)).mappings().first()
    return None if row is None else build_row(Signal, row)


async def store_reply(
    connection: AsyncConnection, caller: RunCaller, node_id: str, iteration: str, reply: str
) -> None:
    """Store the reply (JSON) to the signal that a node has received, in the caller's transaction; the first one counts.

    The signal is that of this iteration of the node, or else of the innermost enclosing one. Nothing happens without
    one, and for a run of another organization.
    """
    owned = select(col(Execution.id)).where(
        col(Execution.id) == caller.execution_id, col(Execution.organization_id) == caller.organization_id
    )
    received = (
        select(col(Signal.number))
        .where(
            col(Signal.execution_id).in_(owned),
            col(Signal.node_id) == node_id,
            col(Signal.iteration).in_(_enclosing_iterations(iteration)),
        )
        .order_by(func.length(col(Signal.iteration)).desc())
        .limit(1)
    )
    number = await connection.scalar(received)
    await connection.execute(
        update(Signal)
        .where(
            col(Signal.execution_id) == caller.execution_id,
            col(Signal.number) == number,
            col(Signal.replied_at).is_(None),
        )
        .values(reply=reply, replied_at=type_coerce(DatabaseTime(), TimestampColumn))
    )


def _enclosing_iterations(iteration: str) -> list[str]:
    """Return the names of an iteration and of all around it, such as `2.0`, `2` and the empty one outside of loops."""
    indexes = iteration.split(".")
    return ["", *(".".join(indexes[: length + 1]) for length in range(len(indexes)))]


async def read_progress(connection: AsyncConnection, key: ExecutionKey, number: int) -> SignalProgress | None:
    """Return a signal of a run by its number, with whether the run has ended; None if there is no such signal, or the
    run is gone.
    """
    statement: Any = (
        select(Signal, col(Execution.status).label("run_status"))
        .join(Execution, col(Execution.id) == col(Signal.execution_id))
        .where(*_is_run(key), col(Signal.execution_id) == key.execution_id, col(Signal.number) == number)
    )
    row = (await connection.execute(statement)).mappings().first()
    if row is None:
        return None
    fields = {name: value for name, value in row.items() if name != "run_status"}
    return SignalProgress(build_row(Signal, fields), row["run_status"] in TERMINAL_STATUSES)


async def _answer_longest_wait(
    connection: AsyncConnection, key: ExecutionKey, signal: Signal
) -> AnswerResult:
    """Answer the node that has waited longest for the name of a new signal, and set the signal's node; return the
    result.

    It is `NO_ANSWER` if no node takes the signal. The wait of a node that no longer waits is deleted. A wait whose end
    is near is passed over: the worker that ends it may have a fast clock.
    """
    margin = node_answers.MAX_CLOCK_SKEW_MICROSECONDS
    expires_at = type_coerce(col(SignalWait.expires_at), BigInteger)
    statement = (
        select(col(SignalWait.node_id), col(SignalWait.iteration))
        .where(
            col(SignalWait.execution_id) == key.execution_id,
            col(SignalWait.name) == signal.name,
            or_(col(SignalWait.expires_at).is_(None), expires_at > DatabaseTime() + margin),
        )
        .order_by(col(SignalWait.created_at), col(SignalWait.node_id), col(SignalWait.iteration))
    )
    for node_id, iteration in (await connection.execute(statement)).all():
        payload = _encode_answer(signal)
        answer = await node_answers.store_answer(
            connection, key, node_id, iteration, payload, kind=AnswerSource.SIGNAL
        )
        await connection.execute(delete(SignalWait).where(*_is_node(SignalWait, key, node_id, iteration)))
        if answer.reception is AnswerReception.TAKEN:
            signal.node_id, signal.iteration, signal.delivered_at = node_id, iteration, signal.created_at
            return answer
    return NO_ANSWER


def _encode_answer(signal: Signal) -> bytes:
    """Return the answer with which a signal completes its node."""
    output = {
        "name": signal.name,
        "payload": msgspec.Raw(signal.payload.encode()),
        "by": signal.user_id,
        "at": timestamps.format_timestamp(signal.created_at),
    }
    return _encode({"output": output, "port": OUTPUT})


async def _find_unread(connection: AsyncConnection, key: ExecutionKey, name: str) -> Signal | None:
    """Return the earliest signal of a name that no node has received; None if there is none."""
    statement = (
        select(Signal).where(*_is_unread(key), col(Signal.name) == name).order_by(col(Signal.number)).limit(1)
    )
    row = (await connection.execute(statement)).mappings().first()
    return None if row is None else build_row(Signal, row)


async def _count_unread(connection: AsyncConnection, key: ExecutionKey) -> int:
    statement = select(func.count()).select_from(Signal).where(*_is_unread(key))
    return await connection.scalar(statement) or 0


async def _mark_delivered(connection: AsyncConnection, signal: Signal, node_id: str, iteration: str) -> None:
    """Note the node that has received an unread signal."""
    await connection.execute(
        update(Signal)
        .where(col(Signal.execution_id) == signal.execution_id, col(Signal.number) == signal.number)
        .values(
            node_id=node_id,
            iteration=iteration,
            delivered_at=type_coerce(DatabaseTime(), TimestampColumn),
        )
    )


def _insert(connection: AsyncConnection, table: type[Signal | SignalWait]) -> Any:  # noqa: ANN401 - of one of two dialects
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table)


def _is_run(key: ExecutionKey) -> Sequence[ColumnElement[bool]]:
    return col(Execution.id) == key.execution_id, col(Execution.shard) == key.shard


def _is_unread(key: ExecutionKey) -> Sequence[ColumnElement[bool]]:
    return col(Signal.execution_id) == key.execution_id, col(Signal.delivered_at).is_(None)


def _is_node(
    table: type[SignalWait | SpanRow | WaitAnswer], key: ExecutionKey, node_id: str, iteration: str
) -> Sequence[ColumnElement[bool]]:
    return (
        col(table.execution_id) == key.execution_id,
        col(table.node_id) == node_id,
        col(table.iteration) == iteration,
    )
