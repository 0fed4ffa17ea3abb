"""How many runs of one kind go on at once: a row takes a place unless its target is `limited`, and rows are counted.

Whoever waits for a place has the target `limited`, which nobody claims. Places are given under a lock for each key, the
database's one writer or an advisory lock, so that two that count at once can't both give the last one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from hashlib import blake2b
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast
from weakref import WeakKeyDictionary

import structlog
from sqlalchemy import and_, func, literal, literal_column, select, update
from sqlmodel import col

from engine.expressions import ExpressionError, compile_template
from engine.values import fingerprint
from journal.group_commit import GroupCommit
from models.database_time import DatabaseTime
from models.errors import LockWaitTimeout
from models.execution import LIMITED_TARGET, SHARED_TARGET, Execution
from models.execution_status import ExecutionStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.dml import ReturningUpdate

    from engine.values import Json
    from models.database import Database

log = structlog.get_logger()

LockKey: TypeAlias = "Callable[[AsyncConnection, str], Awaitable[bool]]"
"""Takes the lock of a key until its transaction ends; returns False where another transaction has it."""

MAX_LIMIT: Final = 1_000
BATCH_RUNS: Final = 100
BATCH_KEYS: Final = 200
KEY_CHARACTERS: Final = 32

# Written out, not bound: SQLite uses the index of those that wait only for a condition that it can read.
_IS_WAITING: Final = and_(
    col(Execution.target) == literal_column(f"'{LIMITED_TARGET}'"),
    col(Execution.status) == literal_column(f"'{ExecutionStatus.PENDING}'"),
)
_HOLDS_SLOT: Final = and_(
    col(Execution.concurrency_key).is_not(None),
    col(Execution.target) != literal_column(f"'{LIMITED_TARGET}'"),
    col(Execution.ended_at).is_(None),
)
_ORDER: Final = (col(Execution.is_fresh), col(Execution.rank), col(Execution.id))
"""What was begun goes first, then whoever has waited the longest: the order in which runs are claimed."""

_admission_groups: WeakKeyDictionary[Database, dict[str, GroupCommit[None, int]]] = WeakKeyDictionary()
"""Calls of `admit` under way, by key."""


class LimitAction(StrEnum):
    """What becomes of a run for which no place is free."""

    QUEUE = "queue"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class ConcurrencyLimit:
    """How many runs that share a key go on at once."""

    key: str
    runs: int
    on_limit: LimitAction


def concurrency_limit(
    settings: Mapping[str, Json], workflow_id: str, trigger: Json
) -> ConcurrencyLimit | None:
    """Return what the settings of a workflow say about a run that is set off by `trigger`; None: nothing.

    Runs of a workflow share their key unless the settings have an expression for it: then those for which it gives the
    same value do.
    """
    concurrency = settings.get("concurrency")
    if not isinstance(concurrency, dict):
        return None
    key = workflow_id
    if (expression := concurrency.get("key")) is not None:
        key = f"{workflow_id}:{_hash_key(expression, trigger)}"
    runs = cast("float", concurrency["limit"])
    return ConcurrencyLimit(key, int(runs), LimitAction(str(concurrency.get("onLimit", LimitAction.QUEUE))))


def _hash_key(expression: Json, trigger: Json) -> str:
    try:
        value = compile_template(expression).render({"trigger": trigger}, [])
    except ExpressionError:
        value = None  # as with a path that finds nothing
    return fingerprint(value)[:KEY_CHARACTERS]


async def count_unended(connection: AsyncConnection, key: str) -> int:
    """Return how many runs have a place of a key, or wait for one; until the transaction ends, nobody gives any."""
    await _lock_key(connection, key)
    is_of_key = col(Execution.concurrency_key) == key
    counted = [
        await connection.scalar(select(func.count()).select_from(Execution).where(is_of_key, condition))
        for condition in (_HOLDS_SLOT, _IS_WAITING)
    ]
    return sum(count or 0 for count in counted)


async def admit_waiting_runs(database: Database, key: str) -> int:
    """Give the free places of a key to those that wait for one; returns how many were given.

    Calls for one key at the same time share a transaction, so that a locked key takes one connection of a process. A
    key that stays locked is left to whoever holds the lock, and to the next sweep.
    """
    groups = _admission_groups.setdefault(database, {})
    group = groups.get(key)
    if group is None:
        group = groups[key] = GroupCommit(partial(_admit_once, database, key))
    try:
        return await group.submit(None)
    finally:
        if group.is_idle:
            groups.pop(key, None)


async def _admit_once(database: Database, key: str, calls: Sequence[None]) -> Sequence[int]:
    try:
        count = await _admit_all(database, key, _lock_key)
    except LockWaitTimeout:
        log.debug("concurrency key locked", key=key)
        count = 0
    return [count, *[0] * (len(calls) - 1)]


async def _admit_all(database: Database, key: str, lock: LockKey) -> int:
    admitted = 0
    while True:
        count = await database.transaction(partial(_admit_locked, key=key, lock=lock))
        admitted += count
        if count < BATCH_RUNS:
            return admitted


async def admit_waiting_keys(database: Database, after: str = "") -> tuple[int, str]:
    """Give the free places of many keys, those behind `after`, that nobody else has given or is about to give.

    Returns how many were given, and the key to go on behind: empty at the end of all keys.
    """
    async with database.read() as connection:
        found = (await connection.execute(waiting_keys_statement(after))).all()
    # Between the two probes of a key, whoever was next may have been admitted by somebody else.
    free = [row.key for row in found if row.runs is not None and row.live < row.runs]
    admitted = sum([await _admit_all(database, key, _try_lock_key) for key in free])
    return admitted, found[-1].key if len(found) == BATCH_KEYS else ""


def advisory_lock_id(key: str) -> int:
    """Return the number of the advisory lock of a key: two keys may share one, and then wait for each other."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big", signed=True)


async def _lock_key(connection: AsyncConnection, key: str) -> bool:
    """Wait for the lock of a key; raises `LockWaitTimeout`."""
    if connection.dialect.name == "postgresql":
        # In a statement of its own, so that the next one sees what whoever had the lock has committed.
        await connection.execute(select(func.pg_advisory_xact_lock(advisory_lock_id(key))))
    return True


async def _try_lock_key(connection: AsyncConnection, key: str) -> bool:
    """Tell whether the lock of a key was free, and is ours now."""
    if connection.dialect.name != "postgresql":
        return True
    return bool(await connection.scalar(select(func.pg_try_advisory_xact_lock(advisory_lock_id(key)))))


async def _admit_locked(connection: AsyncConnection, *, key: str, lock: LockKey) -> int:
    if not await lock(connection, key):
        return 0
    is_of_key = col(Execution.concurrency_key) == key
    live = await connection.scalar(select(func.count()).select_from(Execution).where(is_of_key, _HOLDS_SLOT))
    admitted, locked = 0, list[str]()
    while True:
        waiting = (
            select(col(Execution.id), col(Execution.concurrency_limit))
            .where(is_of_key, _IS_WAITING, col(Execution.id).not_in(locked))
            .order_by(*_ORDER)
            .limit(BATCH_RUNS)
        )
        rows = (await connection.execute(waiting)).all()
        places = _count_admissible((live or 0) + admitted, [row.concurrency_limit for row in rows])
        chosen = [row.id for row in rows[:places]]
        if not chosen:
            return admitted
        given = {*await connection.scalars(_admit_statement(chosen))}
        admitted += len(given)
        if len(given) == len(chosen):
            return admitted
        locked += [one for one in chosen if one not in given]  # their places are for those behind them


def _admit_statement(execution_ids: Sequence[str]) -> ReturningUpdate[str]:
    """Return the statement that lets those of some runs go on that nobody has locked, and returns their ids."""
    free = (
        select(col(Execution.id))
        .where(col(Execution.id).in_(execution_ids), _IS_WAITING)
        .with_for_update(key_share=True, skip_locked=True)
        .cte("free")
    )
    return (
        update(Execution)
        .where(col(Execution.id).in_(select(free.c.id)))
        .values(
            target=func.coalesce(col(Execution.assigned_deployment_id), SHARED_TARGET),
            updated_at=DatabaseTime(),
        )
        .returning(col(Execution.id))
    )


def _count_admissible(live: int, limits: Sequence[int]) -> int:
    """Return how many of those that wait get a place, by the limit of each: nobody overtakes."""
    return sum(1 for _ in takewhile(lambda one: live + one[0] < one[1], enumerate(limits)))


def waiting_keys_statement(after: str) -> Select[Any]:
    """Return the statement that finds the keys behind another for which somebody waits, by one index probe each.

    Of each: how many places are taken, and how many there are in all for whoever is next.
    """
    key = col(Execution.concurrency_key)
    first = select(func.min(key)).where(_IS_WAITING, key > after).scalar_subquery()
    found = select(first.label("key"), literal(1).label("place")).cte("found", recursive=True)
    following = select(func.min(key)).where(_IS_WAITING, key > found.c.key).scalar_subquery()
    found = found.union_all(
        select(following, found.c.place + 1).where(found.c.key.is_not(None), found.c.place < BATCH_KEYS)
    )
    is_of_key = key == found.c.key
    live = select(func.count()).select_from(Execution).where(is_of_key, _HOLDS_SLOT).scalar_subquery()
    next_limit = (
        select(col(Execution.concurrency_limit)).where(is_of_key, _IS_WAITING).order_by(*_ORDER).limit(1)
    )
    return select(found.c.key, live.label("live"), next_limit.scalar_subquery().label("runs")).where(
        found.c.key.is_not(None)
    )
