"""Store of tasks: each of its changes is one transaction for many workers, on either database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from journal.tasks.task_claims import TaskClaims
from journal.tasks.task_reports import TaskReports
from journal.tasks.task_upkeep import TaskUpkeep
from journal.tasks.task_worker_marks import TaskWorkerMarks

if TYPE_CHECKING:
    from models.database import Database


class TaskStore:
    """Tasks in the database of a process, by kind of change."""

    def __init__(self, database: Database, *, max_log_lines: int = 10_000) -> None:
        self.claims = TaskClaims(database)
        self.reports = TaskReports(database, max_log_lines)
        self.upkeep = TaskUpkeep(database)
        self.workers = TaskWorkerMarks(database)
