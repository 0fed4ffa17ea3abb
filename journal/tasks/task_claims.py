"""Claims of tasks for many polls, on either database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from sqlalchemy import text

from journal.tasks import task_leases
from journal.tasks.task_leases import TakenTasks
from journal.tasks.task_polls import CLAIMED_COLUMNS, Claim, ClaimedTask, OrganizationNews, TaskPoll
from journal.tasks.task_sql import (
    DIALECTS,
    POSTGRESQL,
    RowsParameter,
    is_in,
    is_in_query,
    list_sql,
    read_list,
    texts,
)
from journal.tasks.task_upkeep import LIMITED_KEYS
from journal.tasks.task_worker_marks import LEAVING_CONDITION
from models.task_states import HELD_CONDITION

if TYPE_CHECKING:
    from sqlalchemy import TextClause
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.tasks.known_tasks import KnownTasks
    from models.database import Database

MAX_QUEUES: Final = 1_000
MAX_CLAIM: Final = 100
CLAIMED_TOGETHER: Final = 400
"""Tasks that are leased together to all polls."""
MAX_CLAIM_BYTES: Final = 4_194_304


class TaskClaims:
    """Claims of tasks by task workers, in the database of a process."""

    def __init__(self, database: Database, known: KnownTasks) -> None:
        self._database = database
        self._known = known
        self._turns: dict[str, int] = {}

    async def read_news(
        self, organization_id: str, polls: Sequence[TaskPoll], worker_ids: Sequence[str]
    ) -> OrganizationNews:
        """Return the news for the polls of an organization: queues with tasks, cancellations, leaving workers,
        concurrency keys with waiting tasks, and the tasks of repeated claims.

        It claims nothing new, but `put_back` of the first claim no longer frees the tasks of a repeated one. `polls`
        are those that may repeat an earlier claim; only workers among `worker_ids` are reported as leaving.
        """
        async with self._database.read() as connection:
            if connection.dialect.name == POSTGRESQL:
                # Each statement is a transaction of its own, since more would only cost time.
                await connection.execution_options(isolation_level="AUTOCOMMIT")
            news, repeated = await _read_news(connection, organization_id, polls, worker_ids)
        if repeated:
            news.repeated = await self._repeat(repeated)
        return news

    async def _repeat(self, task_ids: Sequence[str]) -> dict[tuple[str, str], list[ClaimedTask]]:
        """Return leased tasks by their worker and the id of the claim that leased them, for its repetition.

        Their fence is raised, so that `put_back` of the first answer doesn't free them.
        """

        async def work(connection: AsyncConnection) -> dict[tuple[str, str], list[ClaimedTask]]:
            values = {"ids": texts(connection, task_ids)}
            rows = await connection.execute(_REPEAT[connection.dialect.name], values)
            found: dict[tuple[str, str], list[ClaimedTask]] = {}
            for task in sorted((ClaimedTask(*row) for row in rows), key=lambda one: one.id):
                found.setdefault((task.worker_id, task.claim_id), []).append(task)
            return found

        return await self._database.transaction(work)

    async def claim(self, polls: Sequence[TaskPoll], queues: Sequence[str]) -> Claim:
        """Lease tasks of queues to polls with the same types, pools and viewer, in their order, to each at most its
        `limit` and at most 100.

        Workflows are served in turn. Workers that leave get nothing. Each queue is a transaction of its own. Raises
        `DatabaseUnavailable`: then tasks of earlier queues stay leased until their leases end.
        """
        places = [number for number, poll in enumerate(polls) for _ in range(min(poll.limit, MAX_CLAIM))]
        places = places[:CLAIMED_TOGETHER]
        claim = Claim([[] for _ in polls])
        for queue in filter(polls[0].serves, queues):
            taken = await self._take(queue, [polls[number] for number in places])
            for number, task in taken.tasks:
                claim.tasks[places[number]].append(task)
            filled = {number for number, _ in taken.tasks}
            places = [place for number, place in enumerate(places) if number not in filled]
            claim.missed += taken.missed
            if not places:
                break
        claim.has_more = not places or claim.missed > 0
        await self._put_back_large(claim)
        self._known.add(task for tasks in claim.tasks for task in tasks)
        return claim

    async def _take(self, queue: str, polls: Sequence[TaskPoll]) -> TakenTasks:
        """Lease tasks of a queue to polls with free slots, in one transaction.

        Workflows take turns: the next call begins behind the workflow of the last leased task.
        """
        poll = polls[0]
        key = f"{poll.organization_id} {queue} {poll.viewer_id}"
        after = self._turns.get(key, 0)
        chosen: Sequence[str] | None = None
        if poll.viewer is not None:
            async with self._database.read() as connection:
                chosen = await task_leases.choose_visible(
                    connection, poll, poll.viewer, queue, after, len(polls)
                )
            if not chosen:
                return TakenTasks([])

        async def work(connection: AsyncConnection) -> TakenTasks:
            return await task_leases.take(connection, queue, after, polls, chosen)

        taken = await self._database.statement(work)
        if taken.tasks:
            self._turns[key] = taken.tasks[-1][1].queue_turn + 1
        return taken

    async def _put_back_large(self, claim: Claim) -> None:
        """Free those leased tasks of a claim that make its answers larger than 4 MiB; each answer keeps its
        first task.
        """
        spilled: list[ClaimedTask] = []
        for number, tasks in enumerate(claim.tasks):
            claim.tasks[number], rest = _within_bytes(tasks, MAX_CLAIM_BYTES)
            spilled += rest
        if spilled:
            await self.put_back(spilled)
            claim.has_more = True

    async def put_back(self, tasks: Sequence[ClaimedTask]) -> None:
        """Free leased tasks of a claim whose answer reaches no worker; that costs no attempt.

        Tasks that a repetition of the claim has got meanwhile, at any gateway, stay with their worker.
        """
        rows = [(task.id, task.fence) for task in tasks]

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(_PUT_BACK[connection.dialect.name], _UNWANTED.values(connection, rows))

        await self._database.transaction(work)

    async def changed_organizations(self, organization_ids: Sequence[str]) -> set[str]:
        """Return those of the organizations that have tasks to claim, or cancellations that their workers must learn
        of.
        """
        found: set[str] = set()
        async with self._database.read() as connection:
            for start in range(0, len(organization_ids), 100):
                part = organization_ids[start : start + 100]
                parts = [
                    f"SELECT * FROM (SELECT organization_id FROM task WHERE {condition}"
                    f" AND organization_id = :o{number} LIMIT 1) AS {letter}{number}"
                    for number in range(len(part))
                    for letter, condition in (("r", "state = 'ready'"), ("c", "state = 'cancel_requested'"))
                ]
                values = {f"o{number}": one for number, one in enumerate(part)}
                found |= set(await connection.scalars(text(" UNION ALL ".join(parts)), values))
        return found


# ── looks ───────────────────────────────────────────────────────────────────────────────────────────────────

_READY_QUEUES: Final = (
    "WITH RECURSIVE found (queue, place) AS ("
    " SELECT (SELECT min(queue) FROM task WHERE state = 'ready' AND organization_id = :organization_id), 1"
    " UNION ALL SELECT (SELECT min(queue) FROM task WHERE state = 'ready'"
    " AND organization_id = :organization_id AND queue > found.queue), place + 1"
    f" FROM found WHERE found.queue IS NOT NULL AND place < {MAX_QUEUES})"
    " SELECT queue AS value FROM found WHERE queue IS NOT NULL"
)
"""One index probe for each queue."""


def _news_statement(dialect: str) -> TextClause:
    """Return the one statement that reads queues with tasks, cancellations, leaving workers, repeated claims,
    and concurrency keys with waiting tasks.
    """
    parts = (
        _READY_QUEUES,
        (
            "SELECT worker_id || ' ' || id AS value FROM task WHERE state = 'cancel_requested'"
            " AND organization_id = :organization_id LIMIT 1000"
        ),
        (
            "SELECT id || CASE WHEN stopped_at IS NULL THEN ' drains' ELSE ' stops' END AS value FROM task_worker"
            f" WHERE organization_id = :organization_id AND {is_in(dialect, 'id', 'workers')} AND {LEAVING_CONDITION}"
        ),
        # The first condition on the state is that of an index.
        (
            "SELECT id AS value FROM task WHERE organization_id = :organization_id"
            f" AND {is_in(dialect, 'worker_id', 'pollers')} AND {is_in(dialect, 'claim_id', 'requests')}"
            f" AND {HELD_CONDITION} AND state = 'leased'"
        ),
        LIMITED_KEYS,
    )
    return text("SELECT " + ", ".join(list_sql(dialect, part) for part in parts))


_NEWS: Final = {dialect: _news_statement(dialect) for dialect in DIALECTS}


def _build_lock_query(dialect: str) -> str:
    """Return the SQL query for the ids of the tasks among the parameter `ids` that are leased, which locks their rows.

    It locks in ascending order of ids, as reports of results do, so that the two can't deadlock. SQLite has one
    writer, and needs no row locks.
    """
    condition = f"{is_in(dialect, 'id', 'ids')} AND state = 'leased' ORDER BY id"
    return f"SELECT id FROM task WHERE {condition}{' FOR NO KEY UPDATE' if dialect == POSTGRESQL else ''}"


_REPEAT: Final = {
    dialect: text(
        f"UPDATE task SET fence = fence + 1 WHERE {is_in_query(dialect, 'id', _build_lock_query(dialect))}"
        f" RETURNING {', '.join(CLAIMED_COLUMNS)}"
    )
    for dialect in DIALECTS
}


async def _read_news(
    connection: AsyncConnection, organization_id: str, polls: Sequence[TaskPoll], worker_ids: Sequence[str]
) -> tuple[OrganizationNews, list[str]]:
    """Return the news of an organization (queues with tasks, cancellations, and leaving workers among `worker_ids`),
    and the ids of the tasks of repeated claims.

    `polls` are those that may repeat an earlier claim; the news don't depend on the types that they serve. Claims
    nothing.
    """
    values = {
        "organization_id": organization_id,
        "workers": texts(connection, worker_ids),
        "pollers": texts(connection, [poll.worker_id for poll in polls]),
        "requests": texts(connection, [poll.request_id for poll in polls]),
        "first_key": f"{organization_id} ",
        "last_key": f"{organization_id}!",
    }
    (row,) = await connection.execute(_NEWS[connection.dialect.name], values)
    queues, cancelling, leaving, repeated, limited_keys = map(read_list, row)
    pairs = [one.split(" ") for one in cancelling]
    marks = [one.split(" ") for one in leaving]
    news = OrganizationNews(
        repeated={},
        leaving={worker_id: mark == "stops" for worker_id, mark in marks},
        cancelling=[(worker_id, task_id) for worker_id, task_id in pairs],
        queues=queues,
        limited_keys=limited_keys,
    )
    return news, repeated


def _within_bytes(tasks: Sequence[ClaimedTask], limit: int) -> tuple[list[ClaimedTask], list[ClaimedTask]]:
    """Divide tasks into those that fit into an answer and the rest; the first one always fits."""
    for number, task in enumerate(tasks):
        limit -= task.size
        if limit < 0 and number:
            return list(tasks[:number]), list(tasks[number:])
    return list(tasks), []


_UNWANTED: Final = RowsParameter("unwanted", (("task_id", "text"), ("task_fence", "bigint")))
_PUT_BACK: Final = {
    dialect: text(
        "UPDATE task SET state = 'ready', lease = NULL, worker_id = NULL, claim_id = NULL, claimed_at = NULL,"
        f" lease_until = NULL, deadline_at = NULL, check_at = NULL FROM {_UNWANTED.sql(dialect)}"
        " WHERE task.id = unwanted.task_id AND task.fence = unwanted.task_fence AND task.state = 'leased'"
    )
    for dialect in DIALECTS
}
