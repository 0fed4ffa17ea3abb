"""Facts about tasks that this process has leased, so that most reports need not read them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Final

from sqlalchemy import text

from journal.tasks.task_items import TaskFacts
from journal.tasks.task_sql import DIALECTS, is_in, texts

if TYPE_CHECKING:
    from journal.tasks.task_polls import ClaimedTask
    from models.database import Database

MAX_KNOWN: Final = 20_000
_READ: Final = {
    dialect: text(
        "SELECT id, organization_id, execution_id, type, version FROM task"
        f" WHERE {is_in(dialect, 'id', 'task_ids')}"
    )
    for dialect in DIALECTS
}


class KnownTasks:
    """Facts about the tasks that were leased or asked for last."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._facts: dict[str, TaskFacts] = {}

    def add(self, tasks: Iterable[ClaimedTask]) -> None:
        """Keep the organization, run, type and version of leased tasks in memory, for the reports about them; beyond
        20,000 tasks, the first ones are dropped.
        """
        for one in tasks:
            self._keep(TaskFacts(one.id, one.organization_id, one.execution_id, one.type, one.version))

    async def find(self, task_ids: Collection[str]) -> dict[str, TaskFacts]:
        """Return organization, run, type and version of tasks by id, from memory or the database; unknown ids are left
        out.

        Raises `DatabaseUnavailable`.
        """
        missing = [one for one in task_ids if one not in self._facts]
        if missing:
            async with self._database.read() as connection:
                rows = await connection.execute(
                    _READ[connection.dialect.name], {"task_ids": texts(connection, missing)}
                )
                found = {row[0]: TaskFacts(*row) for row in rows}
        else:
            found = {}
        known = {one: facts for one in task_ids if (facts := self._facts.get(one)) is not None}
        for facts in found.values():
            self._keep(facts)
        return known | found

    def _keep(self, facts: TaskFacts) -> None:
        self._facts[facts.id] = facts
        while len(self._facts) > MAX_KNOWN:
            del self._facts[next(iter(self._facts))]
