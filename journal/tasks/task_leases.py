"""Choice of the next tasks of a queue, and their leases to the workers of polls.

Workflows are served in turn, and begun tasks before fresh ones. On PostgreSQL all is one statement. Claims of several
gateways at once choose the same tasks; the row lock decides, and the slower one passes over them.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import text

from journal.tasks import visible_tasks
from journal.tasks.task_moves import FIRST_LEASE_MICROSECONDS
from journal.tasks.task_polls import CLAIMED_COLUMNS, ClaimedTask, TaskPoll
from journal.tasks.task_sql import NOW, POSTGRESQL, RowsParameter, host_time, is_in, is_in_query, texts
from journal.tasks.task_worker_marks import LEAVING_CONDITION
from models.ids import TURNS
from models.task_states import WORK_SINCE_SQL

if TYPE_CHECKING:
    from sqlalchemy import TextClause
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.access import ApiCaller

_PLACES: Final = RowsParameter("place", (("owner", "text"), ("request", "text"), ("secret", "text")))
_GIVEN: Final = RowsParameter("given", (("task_id", "text"), *_PLACES.columns))
_OF_QUEUE: Final = "state = 'ready' AND organization_id = :organization_id AND queue = :queue"


class TakenTasks(msgspec.Struct, frozen=True):
    """Tasks that a claim has leased, each with the number of its place, in the order of these."""

    tasks: list[tuple[int, ClaimedTask]]
    missed: int = 0
    """Number of chosen tasks that other claims had locked."""


async def take(
    connection: AsyncConnection,
    queue: str,
    after: int,
    places: Sequence[TaskPoll],
    chosen: Sequence[str] | None = None,
) -> TakenTasks:
    """Lease the next tasks of a queue, at most one for each place, a free slot of its poll; return them with the
    numbers of their places.

    Workflows take turns, beginning with the first one whose queue turn is `after` or higher. A poll may have several
    places; its tasks share one lease. Polls of workers that leave get none. With `chosen`, only these tasks are leased,
    in their order.
    """
    leases = {id(poll): secrets.token_urlsafe(16) for poll in places}
    rows = [(poll.worker_id, poll.request_id, leases[id(poll)]) for poll in places]
    owners = texts(connection, sorted({poll.worker_id for poll in places}))
    values = {"organization_id": places[0].organization_id, "queue": queue, "owners": owners, "no": False}
    if connection.dialect.name == POSTGRESQL:
        return await _take_at_once(connection, values, after, rows, chosen)
    return await _take_in_steps(connection, values, after, rows, chosen)


def _lease_sql(dialect: str) -> str:
    """Return the SQL assignments that lease a task to a place, a free slot of a poll, with the columns `owner`,
    `request` and `secret`.
    """
    now, least = NOW[dialect], "least" if dialect == POSTGRESQL else "min"
    # The remaining time of the run limits the attempt.
    remaining = (
        f"(SELECT CASE WHEN execution.status = 'waiting' THEN deadline_at + coalesce({WORK_SINCE_SQL}, {now})"
        f" ELSE deadline_at END - {now} FROM execution WHERE execution.id = task.execution_id)"
    )
    timeout = f"{least}(timeout_microseconds, coalesce({remaining}, timeout_microseconds))"
    return (
        f"state = 'leased', fence = fence + 1, is_fresh = :no, lease = secret,"
        f" worker_id = owner, claim_id = request, claimed_at = {now}, is_acknowledged = :no,"
        f" lease_until = {now} + {FIRST_LEASE_MICROSECONDS}, deadline_at = {now} + {timeout},"
        f" check_at = {now} + {least}({FIRST_LEASE_MICROSECONDS}, {timeout}), due_at = NULL,"
        f" started_at = coalesce(started_at, {now}), updated_at = {now}"
    )


def _stays_sql(dialect: str) -> str:
    """Return the SQL condition that the worker with the id in the column `owner` takes tasks: it has not stopped, and
    nobody has asked it to. `:owners` are the ids of all workers that ask for tasks.
    """
    leaving = (
        "SELECT id FROM task_worker WHERE task_worker.organization_id = :organization_id"
        f" AND {is_in(dialect, 'id', 'owners')} AND {LEAVING_CONDITION}"
    )
    return f"NOT {is_in_query(dialect, 'owner', leaving)}"


# ── PostgreSQL ──────────────────────────────────────────────────────────────────────────────────────────────

_NEXT: Final = f"""
WITH RECURSIVE later (turn, place) AS (
    SELECT (SELECT min(queue_turn) FROM task WHERE {_OF_QUEUE} AND queue_turn >= CAST(:after AS integer)), 1
    UNION ALL SELECT (SELECT min(queue_turn) FROM task WHERE {_OF_QUEUE} AND queue_turn > later.turn), place + 1
    FROM later WHERE later.turn IS NOT NULL AND place < CAST(:places AS bigint)
), earlier (turn, place) AS (
    SELECT (SELECT min(queue_turn) FROM task WHERE {_OF_QUEUE} AND queue_turn < CAST(:after AS integer)), 1
    UNION ALL SELECT (
        SELECT min(queue_turn) FROM task
        WHERE {_OF_QUEUE} AND queue_turn > earlier.turn AND queue_turn < CAST(:after AS integer)
    ), place + 1
    FROM earlier WHERE earlier.turn IS NOT NULL AND place < CAST(:places AS bigint)
), turn AS MATERIALIZED (
    SELECT turn, row_number() OVER (ORDER BY part, turn) AS place FROM (
        SELECT 1 AS part, turn FROM later WHERE turn IS NOT NULL
        UNION ALL SELECT 2, turn FROM earlier WHERE turn IS NOT NULL
    ) AS parts ORDER BY place LIMIT CAST(:places AS bigint)
), candidate AS MATERIALIZED (
    SELECT chosen.id, row_number() OVER (ORDER BY chosen.level, turn.place) AS number
    FROM turn CROSS JOIN LATERAL (
        SELECT id, row_number() OVER (ORDER BY is_fresh, rank, id) AS level FROM task
        WHERE {_OF_QUEUE} AND queue_turn = turn.turn ORDER BY is_fresh, rank, id
        -- More than an equal share of each workflow: others may have fewer tasks than theirs.
        LIMIT (SELECT least(CAST(:places AS bigint), 4 * (CAST(:places AS bigint) / greatest(count(*), 1) + 1))
            FROM turn)
    ) AS chosen ORDER BY number LIMIT CAST(:places AS bigint)
)"""
_CHOSEN: Final = """
WITH candidate AS MATERIALIZED (
    SELECT id, number FROM unnest(CAST(:chosen AS text[])) WITH ORDINALITY AS chosen (id, number)
)"""
_TAKE_AT_ONCE, _TAKE_CHOSEN = (
    text(
        f"""{candidates}, locked AS MATERIALIZED (
    -- The expression leaves one index to choose: another one would read all tasks that are ready.
    SELECT id FROM task WHERE id = ANY(ARRAY(SELECT id FROM candidate)) AND state || '' = 'ready'
    ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
), given AS (
    SELECT locked.id AS task_id, row_number() OVER (ORDER BY candidate.number) AS number
    FROM locked JOIN candidate ON candidate.id = locked.id
), taken AS (
    UPDATE task SET {_lease_sql(POSTGRESQL)} FROM given
    JOIN unnest({_PLACES.arrays_sql}) WITH ORDINALITY
        AS place (owner, request, secret, number) ON place.number = given.number
    WHERE task.id = given.task_id AND {_stays_sql(POSTGRESQL)}
    RETURNING given.number, {", ".join(f"task.{name}" for name in CLAIMED_COLUMNS)}
)
SELECT (SELECT count(*) FROM candidate) - (SELECT count(*) FROM locked), taken.*
FROM (SELECT 1) AS always LEFT JOIN taken ON true ORDER BY taken.number
"""
    )
    for candidates in (_NEXT, _CHOSEN)
)


async def _take_at_once(
    connection: AsyncConnection,
    values: dict[str, Any],
    after: int,
    places: Sequence[tuple[str, str, str]],
    chosen: Sequence[str] | None,
) -> TakenTasks:
    """Choose and lease tasks by one statement (PostgreSQL), whose other parameters are `values`.

    `after` is the queue turn (the place of a workflow in a queue) at which to begin; `places` have owner, request and
    lease of each free slot.
    """
    parameters = {**values, **_PLACES.values(connection, places)}
    if chosen is None:
        parameters |= {"after": after, "places": len(places)}
        found = (await connection.execute(_TAKE_AT_ONCE, parameters)).all()
    else:
        found = (await connection.execute(_TAKE_CHOSEN, {**parameters, "chosen": list(chosen)})).all()
    tasks = [(row[1] - 1, ClaimedTask(*row[2:])) for row in found if row[1] is not None]
    return TakenTasks(tasks, found[0][0])


# ── SQLite ──────────────────────────────────────────────────────────────────────────────────────────────────

TURNS_TOGETHER: Final = 64
"""Workflows of a queue that are found without regard to their turn: most queues have fewer."""
_TURNS: Final = text(
    "WITH RECURSIVE turn (turn, place) AS ("
    f" SELECT (SELECT min(queue_turn) FROM task WHERE {_OF_QUEUE} AND queue_turn >= :after), 1"
    f" UNION ALL SELECT (SELECT min(queue_turn) FROM task WHERE {_OF_QUEUE}"
    " AND queue_turn > turn.turn), place + 1"
    " FROM turn WHERE turn.turn IS NOT NULL AND place < :turns)"
    " SELECT turn FROM turn WHERE turn IS NOT NULL"
)


async def _choose(connection: AsyncConnection, queue: dict[str, Any], after: int, limit: int) -> list[str]:
    """Return the ids of up to `limit` next tasks of a queue: workflows take turns, from the turn `after` on.

    `queue` has the parameters that name organization and queue. Within a workflow, retries come first, then the order
    of rank and age.
    """
    turns = (await _find_turns(connection, queue, after, max(limit, TURNS_TOGETHER)))[:limit]
    if not turns:
        return []
    # More than an equal share of each: other workflows may have fewer tasks than theirs.
    share = limit if len(turns) == 1 else min(limit, 4 * -(-limit // len(turns)))
    values = {**queue, "share": share} | {f"t{number}": turn for number, turn in enumerate(turns)}
    by_turn: dict[int, list[str]] = {turn: [] for turn in turns}
    for row in await connection.execute(_parts_statement(len(turns)), values):
        by_turn[row.queue_turn].append(row.id)
    in_turn = (
        task_id for level in zip_longest(*by_turn.values()) for task_id in level if task_id is not None
    )
    return list(islice(in_turn, limit))


async def choose_visible(
    connection: AsyncConnection, poll: TaskPoll, viewer: ApiCaller, queue: str, after: int, limit: int
) -> list[str]:
    """Return the ids of up to `limit` next tasks of a queue that the user of a poll may see: workflows take turns, from
    the turn `after` on.
    """
    of_queue = {"organization_id": poll.organization_id, "queue": queue}
    turns = await _find_turns(connection, of_queue, after, TURNS)
    return await visible_tasks.choose(connection, viewer, queue, turns, limit)


async def _find_turns(
    connection: AsyncConnection, queue: dict[str, Any], after: int, limit: int
) -> list[int]:
    """Return the turns (numbers of workflows) of a queue with tasks to claim, beginning at `after`, then the lower
    ones: at least `limit` if there are so many, and at most twice as many.

    `queue` has the parameters that name organization and queue.
    """
    found = list(await connection.scalars(_TURNS, {**queue, "after": 0, "turns": limit}))
    if len(found) < limit:
        return [turn for turn in found if turn >= after] + [turn for turn in found if turn < after]
    later = list(await connection.scalars(_TURNS, {**queue, "after": after, "turns": limit}))
    return [*later, *(turn for turn in found if turn not in later)]


@lru_cache(maxsize=64)
def _parts_statement(turns: int) -> TextClause:
    """Return the statement that reads up to `:share` next tasks of each of `turns` workflows of a queue.

    The queue turns of the workflows are the parameters `:t0`, `:t1` and so on.
    """
    parts = [
        f"SELECT * FROM (SELECT id, queue_turn FROM task WHERE {_OF_QUEUE} AND queue_turn = :t{number}"
        f" ORDER BY is_fresh, rank, id LIMIT :share) AS p{number}"
        for number in range(turns)
    ]
    return text(" UNION ALL ".join(parts))


_TAKE: Final = text(
    f"UPDATE task SET {_lease_sql('sqlite')} FROM {_GIVEN.sql('sqlite')}"
    f" WHERE task.id = given.task_id AND task.state = 'ready' AND {is_in('sqlite', 'task.id', 'task_ids')}"
    f" AND {_stays_sql('sqlite')} RETURNING {', '.join(CLAIMED_COLUMNS)}"
)


async def _take_in_steps(
    connection: AsyncConnection,
    values: dict[str, Any],
    after: int,
    places: Sequence[tuple[str, str, str]],
    chosen: Sequence[str] | None,
) -> TakenTasks:
    """Choose tasks, then lease them, under the write lock that the transaction holds (SQLite).

    Arguments are those of `_take_at_once`.
    """
    if chosen is None:
        chosen = await _choose(connection, values, after, len(places))
    if not chosen:
        return TakenTasks([])
    rows = [(task_id, *place) for task_id, place in zip(chosen, places, strict=False)]
    parameters = {
        **values,
        "task_ids": texts(connection, chosen),
        **_GIVEN.values(connection, rows),
        **host_time(connection),
    }
    numbers = {task_id: number for number, task_id in enumerate(chosen)}
    taken = [ClaimedTask(*row) for row in await connection.execute(_TAKE, parameters)]
    return TakenTasks(sorted(((numbers[task.id], task) for task in taken), key=lambda one: one[0]))
