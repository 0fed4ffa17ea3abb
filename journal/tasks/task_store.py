"""Store of tasks: each of its changes is one transaction for many workers, on either database."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from journal.tasks.known_tasks import KnownTasks
    from journal.tasks.task_claims import TaskClaims
    from journal.tasks.task_reports import TaskReports
    from journal.tasks.task_upkeep import TaskUpkeep
    from journal.tasks.task_worker_marks import TaskWorkerMarks
    from models.database import Database


class TaskStore:
    """Tasks in the database of a process, by kind of change; each kind is loaded with its first use."""

    def __init__(self, database: Database, *, max_log_lines: int = 10_000) -> None:
        self._database = database
        self.max_log_lines = max_log_lines

    @cached_property
    def _known(self) -> KnownTasks:
        from journal.tasks.known_tasks import KnownTasks  # noqa: PLC0415 - most processes have no tasks

        return KnownTasks(self._database)

    @cached_property
    def claims(self) -> TaskClaims:
        from journal.tasks.task_claims import TaskClaims  # noqa: PLC0415 - the same

        return TaskClaims(self._database, self._known)

    @cached_property
    def reports(self) -> TaskReports:
        from journal.tasks.task_reports import TaskReports  # noqa: PLC0415 - the same

        return TaskReports(self._database, self._known, self.max_log_lines)

    @cached_property
    def upkeep(self) -> TaskUpkeep:
        from journal.tasks.task_upkeep import TaskUpkeep  # noqa: PLC0415 - the same

        return TaskUpkeep(self._database)

    @cached_property
    def workers(self) -> TaskWorkerMarks:
        from journal.tasks.task_worker_marks import TaskWorkerMarks  # noqa: PLC0415 - the same

        return TaskWorkerMarks(self._database)
