"""Concurrency limits: a run occupies a slot unless its target is `limited`, and slots are counted from rows.

A run that waits for a slot has the target `limited`, which nobody claims. Admission locks each key, with
SQLite's write lock or an advisory lock, so that two concurrent counts can't both fill the last slot.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from functools import partial
from hashlib import blake2b
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast
from weakref import WeakKeyDictionary

import structlog
from msgspec import Struct
from sqlalchemy import and_, func, literal, literal_column, select, tuple_, update
from sqlmodel import col

from engine.expressions import ExpressionError, compile_template
from engine.values import fingerprint
from journal import blocked_intervals
from journal.explanations.blockers import BlockerCode
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
"""Function that locks a key until its transaction ends; returns False if another transaction holds the lock.
"""

MAX_LIMIT: Final = 1_000
BATCH_RUNS: Final = 100
BATCH_KEYS: Final = 200
KEY_CHARACTERS: Final = 32

# Literals instead of bound parameters: SQLite uses the partial index of waiting runs only for a condition it
# can read.
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
"""Order of admission and of claims: runs that have started, then the runs that have waited longest."""

_admission_groups: WeakKeyDictionary[Database, dict[str, GroupCommit[None, int]]] = WeakKeyDictionary()
"""Calls of `admit_waiting_runs` in progress, by key."""


class LimitAction(StrEnum):
    """Action for a run without a free slot."""

    QUEUE = "queue"
    REJECT = "reject"


class ConcurrencyLimit(Struct, frozen=True):
    """Maximum number of concurrent runs that share a key."""

    key: str
    runs: int
    on_limit: LimitAction


def concurrency_limit(
    settings: Mapping[str, Json], workflow_id: str, trigger: Json
) -> ConcurrencyLimit | None:
    """Return the concurrency limit for a run of a workflow with this trigger output; None without a limit.

    Runs of a workflow share one key, its id, unless the settings have a key expression. Then those runs of it share a
    key for which the expression, evaluated on the trigger's output, gives the same value.
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
    """Return a hash of 32 characters of the value that a key expression gives for the output of the trigger.

    An expression that fails counts as null, as does a path that finds nothing.
    """
    try:
        value = compile_template(expression).render({"trigger": trigger}, [])
    except ExpressionError:
        value = None  # like a path that finds nothing
    return fingerprint(value)[:KEY_CHARACTERS]


async def count_unended(connection: AsyncConnection, key: str) -> int:
    """Return how many runs of a concurrency key hold a slot or wait for one; raises `LockWaitTimeout`.

    On PostgreSQL it locks the key until the transaction ends, so that no waiting run of it gets a slot
    meanwhile.
    """
    await _lock_key(connection, key)
    is_of_key = col(Execution.concurrency_key) == key
    counted = [
        await connection.scalar(select(func.count()).select_from(Execution).where(is_of_key, condition))
        for condition in (_HOLDS_SLOT, _IS_WAITING)
    ]
    return sum(count or 0 for count in counted)


def holders_statement(key: str) -> Select[str]:
    """Return the statement that selects the ids of the runs which hold a slot of a concurrency key."""
    return select(col(Execution.id)).where(col(Execution.concurrency_key) == key, _HOLDS_SLOT)


def ahead_statement(key: str, run: Execution) -> Select[str]:
    """Return the statement that selects the ids of the waiting runs of a key that get a slot before the given run."""
    is_earlier = tuple_(*_ORDER) < tuple_(run.is_fresh, run.rank, run.id)
    return select(col(Execution.id)).where(col(Execution.concurrency_key) == key, _IS_WAITING, is_earlier)


async def admit_waiting_runs(database: Database, key: str) -> int:
    """Give the free slots of a concurrency key to its waiting runs, so that they can be claimed; return how many got a
    slot.

    Concurrent calls for one key share transactions: one call gets the number, and the others 0. If the key's lock isn't
    free in time, the result is 0, and the holder of the lock, or the next sweep, admits the runs. Raises
    `DatabaseUnavailable`.
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
    """Admit the waiting runs of a key for all of the calls; return their number for the first call, and 0 for the
    others.
    """
    try:
        count = await _admit_all(database, key, _lock_key)
    except LockWaitTimeout:
        log.debug("concurrency key locked", key=key)
        count = 0
    return [count, *[0] * (len(calls) - 1)]


async def _admit_all(database: Database, key: str, lock: LockKey) -> int:
    """Admit the waiting runs of a key for which slots are free, 100 in each transaction; return their number.

    It ends when `lock` does not get the key. Raises `DatabaseUnavailable`, and `LockWaitTimeout` if `lock` does.
    """
    admitted = 0
    while True:
        count = await database.transaction(partial(_admit_locked, key=key, lock=lock))
        admitted += count
        if count < BATCH_RUNS:
            return admitted


async def admit_waiting_keys(database: Database, after: str = "") -> tuple[int, str]:
    """Admit waiting runs for up to 200 keys that follow `after` in order, except keys that another
    transaction has locked.

    Return the number of admitted runs and the last key, to continue after; the key is empty when no more
    follow. Raises `DatabaseUnavailable`.
    """
    async with database.read() as connection:
        found = (await connection.execute(waiting_keys_statement(after))).all()
    # Between the two probes of a key, another process may have admitted the run that was next.
    free = [row.key for row in found if row.runs is not None and row.live < row.runs]
    admitted = sum([await _admit_all(database, key, _try_lock_key) for key in free])
    return admitted, found[-1].key if len(found) == BATCH_KEYS else ""


def advisory_lock_id(key: str) -> int:
    """Return the id of a key's advisory lock in PostgreSQL: a signed 64-bit hash.

    Two keys may share an id, and then wait for each other.
    """
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big", signed=True)


async def _lock_key(connection: AsyncConnection, key: str) -> bool:
    """Lock a key until the transaction ends, after a wait for other transactions that hold it, and return True; raises
    `LockWaitTimeout`.

    On SQLite there is one writer, and nothing is locked.
    """
    if connection.dialect.name == "postgresql":
        # A statement of its own, so that the next one sees the commit of the previous holder.
        await connection.execute(select(func.pg_advisory_xact_lock(advisory_lock_id(key))))
    return True


async def _try_lock_key(connection: AsyncConnection, key: str) -> bool:
    """Lock a key until the transaction ends, without waiting; return False if another transaction holds it.

    On SQLite there is one writer: nothing is locked, and the result is True.
    """
    if connection.dialect.name != "postgresql":
        return True
    return bool(await connection.scalar(select(func.pg_try_advisory_xact_lock(advisory_lock_id(key)))))


async def _admit_locked(connection: AsyncConnection, *, key: str, lock: LockKey) -> int:
    """Give free slots of a key to its waiting runs in order of rank; return how many, 0 if `lock` returns
    False.

    A run becomes claimable by its deployment or the workers, and its blocked interval ends. No run overtakes
    another, except runs whose rows are locked. A batch has 100 runs at most.
    """
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
        # Before the update, which sets the start of the wait to now.
        await blocked_intervals.add_ended_intervals(
            connection,
            BlockerCode.WAITING_FOR_SLOT,
            col(Execution.id).in_(chosen),
            _IS_WAITING,
            since=col(Execution.updated_at),
        )
        given = {*await connection.scalars(_admit_statement(chosen))}
        admitted += len(given)
        if len(given) == len(chosen):
            return admitted
        locked += [one for one in chosen if one not in given]  # their slots go to the runs behind them


def _admit_statement(execution_ids: Sequence[str]) -> ReturningUpdate[str]:
    """Return the statement that makes waiting runs claimable, except locked ones; it returns the ids of the
    admitted runs.
    """
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
    """Return how many waiting runs get a slot, in their order, while `live` slots are occupied.

    `limits` are the limits of the waiting runs, each as of its acceptance. The first run without room ends
    the count: no run overtakes another.
    """
    return sum(1 for _ in takewhile(lambda one: live + one[0] < one[1], enumerate(limits)))


def waiting_keys_statement(after: str) -> Select[Any]:
    """Return the statement that lists up to 200 keys after `after` with waiting runs, in order, by one index
    probe per key.

    Each row has the key, the number of occupied slots (`live`), and the limit of the run that is next
    (`runs`).
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


def idle_slots_statement() -> Select[Any]:
    """Return the statement that selects the next waiting run of each key with a free slot, of up to 200 keys.

    Each row has the run's `id` and `organization_id`, and the time `since` which it waits.
    """
    keys = waiting_keys_statement("").subquery("keys")
    following = (
        select(col(Execution.id))
        .where(col(Execution.concurrency_key) == keys.c.key, _IS_WAITING)
        .order_by(*_ORDER)
        .limit(1)
        .scalar_subquery()
    )
    idle = select(following.label("id")).where(keys.c.live < keys.c.runs).subquery("idle")
    columns: tuple[Any, ...] = (
        col(Execution.id),
        col(Execution.organization_id),
        col(Execution.updated_at).label("since"),
    )
    return select(*columns).join(idle, idle.c.id == col(Execution.id))
