"""Claims of tasks: each one transaction for many polls, on either database."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, text

from journal.tasks import task_worker_marks
from journal.tasks.task_clock import NOW, host_time
from journal.tasks.task_moves import FIRST_LEASE_MICROSECONDS
from journal.tasks.task_polls import CLAIMED_COLUMNS, ClaimedTask, OrganizationNews, PollFindings, TaskPoll
from models.task_states import HELD_CONDITION, TaskState

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database

MAX_QUEUES: Final = 1_000
MAX_CLAIM: Final = 100
CHOSEN_TOGETHER: Final = 400
"""Tasks that one statement leases to all polls."""
MAX_CLAIM_BYTES: Final = 4_194_304


class TaskClaims:
    """Claims in the database of a process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._turns: dict[str, int] = {}

    async def look(self, polls: Sequence[TaskPoll]) -> list[PollFindings]:
        """Return repeated answers and cancellations of polls, and whether tasks wait for each; claims nothing."""
        async with self._database.read() as connection:
            held = await _read_held(connection, polls)
            leaving = await task_worker_marks.read_leaving(connection, polls)
            queues = {
                organization_id: await _ready_queues(connection, organization_id)
                for organization_id in {poll.organization_id for poll in polls if poll.limit > 0}
            }
        found: list[PollFindings] = []
        for poll in polls:
            own = [
                task
                for task in held
                if task.organization_id == poll.organization_id and task.worker_id == poll.worker_id
            ]
            is_leaving = leaving.get((poll.organization_id, poll.worker_id))
            found.append(
                PollFindings(
                    repeated=[
                        task
                        for task in own
                        if task.claim_id == poll.request_id and task.state == TaskState.LEASED
                    ],
                    cancelling=[task.id for task in own if task.state == TaskState.CANCEL_REQUESTED],
                    has_work=poll.limit > 0 and any(map(poll.serves, queues.get(poll.organization_id, ()))),
                    is_draining=is_leaving is False,
                    is_stopped=is_leaving is True,
                )
            )
        return found

    async def claim(self, polls: Sequence[TaskPoll]) -> list[list[ClaimedTask]]:
        """Lease ready tasks to workers, at most `limit` to each; workflows are served in turn."""

        async def work(connection: AsyncConnection) -> list[list[ClaimedTask]]:
            leaving = await task_worker_marks.read_leaving(connection, polls)
            queues = {
                organization_id: await _ready_queues(connection, organization_id)
                for organization_id in {poll.organization_id for poll in polls}
            }
            alike: dict[tuple[object, ...], list[int]] = {}
            for number, poll in enumerate(polls):
                if poll.limit > 0 and (poll.organization_id, poll.worker_id) not in leaving:
                    alike.setdefault(poll.served, []).append(number)
            claimed: list[list[ClaimedTask]] = [[] for _ in polls]
            for numbers in alike.values():
                group = [polls[number] for number in numbers]
                found = await self._claim_for(connection, group, queues[group[0].organization_id])
                for number, tasks in zip(numbers, found, strict=True):
                    claimed[number] = tasks
            return claimed

        return await self._database.transaction(work)

    async def _claim_for(
        self, connection: AsyncConnection, polls: Sequence[TaskPoll], queues: Sequence[str]
    ) -> list[list[ClaimedTask]]:
        """Claim for polls of workers with the same types and pools, each up to its limit, in their order."""
        claimed: list[list[ClaimedTask]] = [[] for _ in polls]
        places = [number for number, poll in enumerate(polls) for _ in range(min(poll.limit, MAX_CLAIM))]
        organization_id = polls[0].organization_id
        for queue in filter(polls[0].serves, queues):
            if not places:
                break
            key = f"{organization_id} {queue}"
            turn = self._turns.get(key, 0)
            chosen = await _choose(
                connection, organization_id, queue, turn, min(len(places), CHOSEN_TOGETHER)
            )
            given = [(task_id, polls[number]) for task_id, number in zip(chosen, places, strict=False)]
            taken = await _take(connection, given) if given else []
            if taken:
                self._turns[key] = taken[-1].queue_turn + 1
            numbers = dict(zip(chosen, places, strict=False))
            for task in taken:
                claimed[numbers[task.id]].append(task)
            places = places[len(chosen) :]
        spilled: list[ClaimedTask] = []
        for number, tasks in enumerate(claimed):
            claimed[number], rest = _within_bytes(tasks, MAX_CLAIM_BYTES)
            spilled += rest
        if spilled:
            await _put_back(connection, [task.id for task in spilled])
        return claimed

    async def put_back(self, task_ids: Sequence[str]) -> None:
        """Free tasks of a claim whose answer reaches no worker."""

        async def work(connection: AsyncConnection) -> None:
            await _put_back(connection, task_ids)

        await self._database.transaction(work)

    async def news(self, organization_id: str, polls: Sequence[TaskPoll]) -> OrganizationNews:
        """Return the queues with work of an organization, cancellations, and which of its polling workers leave."""
        cancelling = text(
            "SELECT worker_id, id FROM task WHERE state = 'cancel_requested'"
            " AND organization_id = :organization_id LIMIT 1000"
        )
        values = {"organization_id": organization_id}
        async with self._database.read() as connection:
            return OrganizationNews(
                await _ready_queues(connection, organization_id),
                [(row[0], row[1]) for row in await connection.execute(cancelling, values)],
                {
                    key[1]: stops
                    for key, stops in (await task_worker_marks.read_leaving(connection, polls)).items()
                },
            )

    async def changed_organizations(self, organization_ids: Sequence[str]) -> set[str]:
        """Return those organizations that have tasks to claim, or cancellations to tell."""
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


async def _read_held(connection: AsyncConnection, polls: Sequence[TaskPoll]) -> list[ClaimedTask]:
    statement = text(
        f"SELECT {', '.join(CLAIMED_COLUMNS)} FROM task WHERE organization_id IN :organizations"
        f" AND worker_id IN :workers AND {HELD_CONDITION} ORDER BY id"
    ).bindparams(bindparam("organizations", expanding=True), bindparam("workers", expanding=True))
    values = {
        "organizations": sorted({poll.organization_id for poll in polls}),
        "workers": sorted({poll.worker_id for poll in polls}),
    }
    return [ClaimedTask(*row) for row in await connection.execute(statement, values)]


async def _ready_queues(connection: AsyncConnection, organization_id: str) -> list[str]:
    """Return the queues of an organization with tasks to claim, with one index probe each."""
    statement = text(
        "WITH RECURSIVE found (queue, place) AS ("
        " SELECT (SELECT min(queue) FROM task WHERE state = 'ready' AND organization_id = :organization_id), 1"
        " UNION ALL SELECT (SELECT min(queue) FROM task WHERE state = 'ready'"
        " AND organization_id = :organization_id AND queue > found.queue), place + 1"
        f" FROM found WHERE found.queue IS NOT NULL AND place < {MAX_QUEUES})"
        " SELECT queue FROM found WHERE queue IS NOT NULL"
    )
    return list(await connection.scalars(statement, {"organization_id": organization_id}))


_OF_QUEUE: Final = "state = 'ready' AND organization_id = :organization_id AND queue = :queue"


async def _choose(
    connection: AsyncConnection, organization_id: str, queue: str, after: int, limit: int
) -> list[str]:
    """Return the ids of the next tasks of a queue: its workflows in turn, begun tasks before fresh ones."""
    values: dict[str, Any] = {"organization_id": organization_id, "queue": queue}
    statement = text(
        "WITH RECURSIVE turn (turn, place) AS ("
        f" SELECT (SELECT min(queue_turn) FROM task WHERE {_OF_QUEUE} AND queue_turn >= :after), 1"
        f" UNION ALL SELECT (SELECT min(queue_turn) FROM task WHERE {_OF_QUEUE}"
        " AND queue_turn > turn.turn), place + 1"
        " FROM turn WHERE turn.turn IS NOT NULL AND place < :turns)"
        " SELECT turn FROM turn WHERE turn IS NOT NULL"
    )
    turns: list[int] = []
    for first in (after, 0) if after else (0,):
        found = await connection.scalars(statement, {**values, "after": first, "turns": limit})
        turns += [turn for turn in found if turn not in turns]
        if len(turns) >= limit:
            break
    turns = turns[:limit]
    if not turns:
        return []
    # More than an equal share of each: other workflows may have fewer tasks than theirs.
    share = limit if len(turns) == 1 else min(limit, 4 * -(-limit // len(turns)))
    parts = [
        f"SELECT * FROM (SELECT id, queue_turn FROM task WHERE {_OF_QUEUE} AND queue_turn = :t{number}"
        f" ORDER BY is_fresh, rank, id LIMIT :share) AS p{number}"
        for number in range(len(turns))
    ]
    parameters = {f"t{number}": turn for number, turn in enumerate(turns)}
    rows = await connection.execute(text(" UNION ALL ".join(parts)), {**values, **parameters, "share": share})
    by_turn: dict[int, list[str]] = {turn: [] for turn in turns}
    for row in rows:
        by_turn[row.queue_turn].append(row.id)
    in_turn = (
        task_id for level in zip_longest(*by_turn.values()) for task_id in level if task_id is not None
    )
    return list(islice(in_turn, limit))


async def _take(connection: AsyncConnection, given: Sequence[tuple[str, TaskPoll]]) -> list[ClaimedTask]:
    """Lease tasks to the workers of polls, with one lease for all tasks of a poll."""
    is_postgresql = connection.dialect.name == "postgresql"
    now = NOW[connection.dialect.name]
    lock = " FOR NO KEY UPDATE SKIP LOCKED" if is_postgresql else ""
    least = "least" if is_postgresql else "min"
    leases = {id(poll): secrets.token_urlsafe(16) for _, poll in given}
    parts: list[str] = []
    values: dict[str, Any] = {"no": False, "task_ids": [task_id for task_id, _ in given]}
    for number, (task_id, poll) in enumerate(given):
        names = ("task_id", "owner", "request", "secret")
        parts.append("SELECT " + ", ".join(f"CAST(:{name}{number} AS text) AS {name}" for name in names))
        fields = (task_id, poll.worker_id, poll.request_id, leases[id(poll)])
        values |= {f"{name}{number}": field for name, field in zip(names, fields, strict=True)}
    returned = (
        ", ".join(f"task.{name}" for name in CLAIMED_COLUMNS) if is_postgresql else ", ".join(CLAIMED_COLUMNS)
    )
    statement = text(
        f"UPDATE task SET state = 'leased', fence = fence + 1, is_fresh = :no, lease = secret,"
        f" worker_id = owner, claim_id = request, claimed_at = {now}, is_acknowledged = :no,"
        f" lease_until = {now} + {FIRST_LEASE_MICROSECONDS}, deadline_at = {now} + timeout_microseconds,"
        f" check_at = {now} + {least}({FIRST_LEASE_MICROSECONDS}, timeout_microseconds), due_at = NULL,"
        f" started_at = coalesce(started_at, {now}), updated_at = {now}"
        f" FROM ({' UNION ALL '.join(parts)}) AS given"
        " WHERE task.id = given.task_id AND task.state = 'ready' AND task.id IN ("
        " SELECT id FROM task WHERE id IN :task_ids AND state = 'ready'"
        f" ORDER BY id{lock}) RETURNING {returned}"
    ).bindparams(bindparam("task_ids", expanding=True))
    rows = await connection.execute(statement, {**values, **host_time(connection)})
    tasks = [ClaimedTask(*row) for row in rows]
    places = {task_id: place for place, (task_id, _) in enumerate(given)}
    return sorted(tasks, key=lambda task: places[task.id])


def _within_bytes(tasks: Sequence[ClaimedTask], limit: int) -> tuple[list[ClaimedTask], list[ClaimedTask]]:
    """Divide tasks into those that fit into an answer and the rest; the first one always fits."""
    for number, task in enumerate(tasks):
        limit -= task.size
        if limit < 0 and number:
            return list(tasks[:number]), list(tasks[number:])
    return list(tasks), []


async def _put_back(connection: AsyncConnection, task_ids: Sequence[str]) -> None:
    statement = text(
        "UPDATE task SET state = 'ready', lease = NULL, worker_id = NULL, claim_id = NULL, claimed_at = NULL,"
        " lease_until = NULL, deadline_at = NULL, check_at = NULL WHERE id IN :task_ids AND state = 'leased'"
    ).bindparams(bindparam("task_ids", expanding=True))
    await connection.execute(statement, {"task_ids": list(task_ids)})
