"""Moves of tasks whose time has come, whose runs have ended, or that get a free place of their concurrency key."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from sqlalchemy import bindparam, text

from journal.concurrency_limits import advisory_lock_id
from journal.tasks import task_moves
from journal.tasks.task_sql import NOW, host_time
from journal.tasks.task_transaction import TaskEffects, TaskTransaction
from models.task_states import TaskState

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database

ADMITTED_TOGETHER: Final = 500
LIMITED_KEYS: Final = (
    "WITH RECURSIVE found (key, place) AS ("
    " SELECT (SELECT min(concurrency_key) FROM task WHERE state = 'limited'"
    " AND concurrency_key > :first_key AND concurrency_key < :last_key), 1"
    " UNION ALL SELECT (SELECT min(concurrency_key) FROM task WHERE state = 'limited'"
    " AND concurrency_key > found.key AND concurrency_key < :last_key), place + 1"
    " FROM found WHERE found.key IS NOT NULL AND place < 200)"
    " SELECT key AS value FROM found WHERE key IS NOT NULL"
)
"""Query of the concurrency keys with waiting tasks, between two keys; one index probe for each."""


class TaskUpkeep:
    """Moves of tasks that no worker reports, in the database of a process."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def sweep(self, limit: int = 200) -> TaskEffects:
        """Move up to `limit` tasks whose time has come: ends of leases, deadlines, delays and start timeouts.

        Tasks that other transactions have locked are left to the next sweep. Returns the effects to announce. Raises
        `DatabaseUnavailable`.
        """
        async with self._database.read() as connection:
            now = NOW[connection.dialect.name]
            found = await connection.execute(
                text(
                    f"SELECT id, execution_id FROM task WHERE check_at <= {now} ORDER BY check_at LIMIT :limit"
                ),
                {"limit": limit, **host_time(connection)},
            )
            due = found.all()
        if not due:
            return TaskEffects()

        async def work(connection: AsyncConnection) -> TaskEffects:
            transaction = TaskTransaction(connection)
            await transaction.lock_runs(sorted({row.execution_id for row in due}))
            await transaction.lock_tasks(sorted(row.id for row in due), skips_locked=True)
            for task in transaction.tasks.values():
                task_moves.move_if_due(task, transaction.now)
                if task.state == TaskState.LEASED:
                    transaction.count_time(task)
                if task.state == TaskState.FAILED and task.ended_at == transaction.now:
                    transaction.answer_failure(task)
            return await transaction.store()

        return await self._database.transaction(work)

    async def cancel_abandoned(self, limit: int = 200) -> TaskEffects:
        """Cancel up to `limit` open tasks whose runs have ended or are gone, or ask the workers that hold them to stop;
        return the effects to announce.
        """
        statement = text(
            "SELECT id FROM task WHERE ended_at IS NULL AND state <> 'cancel_requested' AND NOT EXISTS"
            " (SELECT 1 FROM execution WHERE execution.id = task.execution_id AND execution.ended_at IS NULL)"
            " LIMIT :limit"
        )
        async with self._database.read() as connection:
            task_ids = sorted((await connection.scalars(statement, {"limit": limit})).all())
        return await self._cancel(task_ids) if task_ids else TaskEffects()

    async def _cancel(self, task_ids: Sequence[str]) -> TaskEffects:
        """Cancel tasks in one transaction; return the effects to announce."""

        async def work(connection: AsyncConnection) -> TaskEffects:
            transaction = TaskTransaction(connection)
            await transaction.lock_tasks(task_ids)
            for task in transaction.tasks.values():
                task_moves.cancel(task, transaction.now)
            return await transaction.store()

        return await self._database.transaction(work)

    async def admit(self, keys: Sequence[str]) -> set[str]:
        """Give free places of concurrency keys to waiting tasks, which can be claimed then; return the organizations of
        these tasks.

        Each key is a transaction, which waits for the key's lock. Raises `LockWaitTimeout` and `DatabaseUnavailable`.
        """
        ready: set[str] = set()
        for key in keys:
            ready |= await self._database.transaction(partial(_admit, key=key))
        return ready

    async def list_limited_keys(self) -> list[str]:
        """Return up to 200 concurrency keys with tasks that wait for a place, of all organizations."""
        async with self._database.read() as connection:
            return list(await connection.scalars(text(LIMITED_KEYS), {"first_key": "", "last_key": "~"}))


async def _admit(connection: AsyncConnection, *, key: str) -> set[str]:
    """Give the free places of a concurrency key to waiting tasks, under the key's lock, so that none
    overtakes another.

    Returns the organizations with admitted tasks.
    """
    is_postgresql = connection.dialect.name == "postgresql"
    if is_postgresql:
        # A statement of its own, so that the next one sees the commit of the previous holder.
        await connection.execute(
            text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": advisory_lock_id(f"task {key}")}
        )
    placed = await connection.scalar(
        text(
            "SELECT count(*) FROM task WHERE concurrency_key = :key"
            " AND concurrency_key IS NOT NULL AND state IN ('ready', 'leased', 'cancel_requested')"
        ),
        {"key": key},
    )
    lock = " FOR NO KEY UPDATE SKIP LOCKED" if is_postgresql else ""
    rows = (
        await connection.execute(
            text(
                "SELECT id, concurrency_limit, organization_id FROM task"
                " WHERE state = 'limited' AND concurrency_key = :key"
                f" ORDER BY is_fresh, rank, id LIMIT {ADMITTED_TOGETHER}{lock}"
            ),
            {"key": key},
        )
    ).all()
    chosen: list[str] = []
    for number, row in enumerate(rows):
        if (placed or 0) + number >= row.concurrency_limit:
            break
        chosen.append(row.id)
    if not chosen:
        return set()
    statement = text(
        f"UPDATE task SET state = 'ready', updated_at = {NOW[connection.dialect.name]}"
        " WHERE id IN :task_ids AND state = 'limited'"
    ).bindparams(bindparam("task_ids", expanding=True))
    await connection.execute(statement, {"task_ids": chosen, **host_time(connection)})
    return {row.organization_id for row in rows}
