"""One transaction on tasks and their runs: locks, moves, answers to nodes and log lines.

Runs are locked before tasks, both in the order of their ids, as everywhere; so transactions can't deadlock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import bindparam, text

from engine.run_records import make_storable
from journal.tasks import task_moves
from journal.tasks.task_clock import NOW
from journal.tasks.task_moves import CHANGING_COLUMNS, ROW_COLUMNS, TaskRow
from json_text import decoding
from models import ids
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from models.task_states import TaskState
from models.timestamps import HOST_TIME

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

MAX_LINE_CHARACTERS: Final = 8_192
_RUN_COLUMNS: Final = "id, shard, status, concurrency_key, target"
_ALIVE: Final = frozenset({ExecutionStatus.PENDING, ExecutionStatus.WAITING})
"""Statuses in which no process numbers the log lines of a run."""
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class WokenRun:
    """Run that an answer has made pending."""

    execution_id: str
    concurrency_key: str | None
    target: str


@dataclass(slots=True)
class TaskEffects:
    """Consequences of a transaction on tasks, for messages after its commit."""

    woken: list[WokenRun] = field(default_factory=list)
    ready_organizations: set[str] = field(default_factory=set)
    """Organizations with tasks that can be claimed since."""
    cancelling_organizations: set[str] = field(default_factory=set)
    """Organizations with workers to tell of a cancellation."""
    freed_keys: set[str] = field(default_factory=set)
    """Concurrency keys with a free place or a new task."""
    moved: int = 0
    """Number of changed tasks."""


class LogText(msgspec.Struct, frozen=True):
    """Line that a worker adds to the log of a run."""

    level: str
    message: str
    at: int
    """Microseconds since 1970."""


@dataclass(slots=True)
class LockedRun:
    """Run whose row the transaction has locked."""

    execution_id: str
    shard: int
    status: str
    concurrency_key: str | None
    target: str
    answers: int = 0

    @property
    def is_ended(self) -> bool:
        return self.status in TERMINAL_STATUSES


class TaskTransaction:
    """Locked rows of tasks and runs, with the changes that `store` writes."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._is_postgresql = connection.dialect.name == "postgresql"
        self.now = HOST_TIME.microseconds()
        self.tasks: dict[str, TaskRow] = {}
        self.runs: dict[str, LockedRun] = {}
        self.effects = TaskEffects()
        self._before: dict[str, tuple[Any, ...]] = {}
        self._answers: list[dict[str, Any]] = []
        self._lines: dict[str, list[tuple[TaskRow, LogText]]] = {}

    async def lock_runs(self, execution_ids: Collection[str]) -> None:
        """Lock runs by id until the transaction ends, so that their status can't change; those that are gone
        count as ended.
        """
        if not execution_ids:
            return
        statement = f"SELECT {_RUN_COLUMNS} FROM execution WHERE id IN :ids ORDER BY id{self._for_update()}"
        for row in await self._select(statement, sorted(execution_ids)):
            self.runs[row[0]] = LockedRun(*row)

    async def lock_tasks(self, condition: str, *, skips_locked: bool = False, **values: Any) -> None:  # noqa: ANN401 - values of columns
        """Lock the tasks that satisfy an SQL condition, and read the time of the transaction."""
        now = NOW["postgresql"] if self._is_postgresql else "NULL"
        statement = (
            f"SELECT {', '.join(ROW_COLUMNS)}, {now} FROM task WHERE {condition} ORDER BY id"
            f"{self._for_update(skips_locked=skips_locked)}"
        )
        for row in await self._select(statement, **values):
            task = TaskRow(*row[:-1])
            if task.id not in self.tasks:
                self.tasks[task.id] = task
                self._before[task.id] = _changing(task)
            if row[-1] is not None:
                self.now = row[-1]

    def run_of(self, task: TaskRow) -> LockedRun | None:
        """Return the locked run of a task; None if it is gone or was not locked."""
        return self.runs.get(task.execution_id)

    def answer(self, task: TaskRow, payload: bytes) -> None:
        """Give the node of a task its stored answer, unless the run has ended or was not locked; `store` writes it."""
        run = self.run_of(task)
        if run is None or run.is_ended:
            return
        run.answers += 1
        self._answers.append(
            {
                "execution_id": task.execution_id,
                "node_id": task.node_id,
                "iteration": task.iteration,
                "shard": task.shard,
                "payload": self._with_logs(task, run, payload).decode(),
                "now": self.now,
            }
        )

    def answer_failure(self, task: TaskRow) -> None:
        """Give the node of a failed task its error as the answer, unless the run has ended."""
        error = decoding.decode(task.error or "{}")
        self.answer(task, _encode({"error": {"code": error["code"], "message": error["message"]}}))

    def add_lines(self, task: TaskRow, lines: Iterable[LogText], max_lines: int) -> None:
        """Add log lines of a task; from the first above `max_lines` on they are dropped, with one warning in
        the log.
        """
        for line in lines:
            if task.log_lines > max_lines:
                return
            task.log_lines += 1
            if task.log_lines > max_lines:
                message = f"More than {max_lines:,} log lines of a task: further lines are dropped"
                line = LogText("warning", message, line.at)  # noqa: PLW2901 - in its place
            self._lines.setdefault(task.execution_id, []).append((task, line))

    async def store(self) -> TaskEffects:
        """Write the changed tasks, answers and log lines; return the effects to announce after the commit.
        The caller commits.
        """
        await self._store_lines()
        await self._store_tasks()
        await self._store_answers()
        return self.effects

    async def _store_tasks(self) -> None:
        """Update the rows of changed tasks, and collect the effects of the changes."""
        changed = [task for task in self.tasks.values() if _changing(task) != self._before[task.id]]
        if not changed:
            return
        self.effects.moved = len(changed)
        for task in changed:
            self._note_effects(task)
        rows = [
            {**task_moves.describe(task), "task_id": task.id, "fence": task.fence, "now": self.now}
            for task in changed
        ]
        await self._connection.execute(_UPDATE_TASK, rows)

    def _note_effects(self, task: TaskRow) -> None:
        """Note which organizations get work or cancellations, and which concurrency key has a free place, by
        the change of a task.
        """
        before = self._before[task.id][CHANGING_COLUMNS.index("state")]
        if task.state == before:
            return
        if task.state == TaskState.READY:
            self.effects.ready_organizations.add(task.organization_id)
        elif task.state == TaskState.CANCEL_REQUESTED:
            self.effects.cancelling_organizations.add(task.organization_id)
        if task.concurrency_key is not None and task.state not in {
            TaskState.READY,
            TaskState.LEASED,
            TaskState.CANCEL_REQUESTED,
        }:
            self.effects.freed_keys.add(task.concurrency_key)

    async def _store_answers(self) -> None:
        """Insert the answers, and wake the runs that wait for them."""
        if not self._answers:
            return
        await self._connection.execute(_INSERT_ANSWER, self._answers)
        answered = [run for run in self.runs.values() if run.answers]
        await self._connection.execute(
            _WAKE_RUN,
            [
                {
                    "execution_id": run.execution_id,
                    "run_shard": run.shard,
                    "answers": run.answers,
                    "now": self.now,
                }
                for run in answered
            ],
        )
        woken = [run for run in answered if run.status == ExecutionStatus.WAITING]
        if woken:
            await self._connection.execute(
                _END_INTERVALS, {"ids": [run.execution_id for run in woken], "now": self.now}
            )
            self.effects.woken += [
                WokenRun(run.execution_id, run.concurrency_key, run.target) for run in woken
            ]

    # ── log lines ───────────────────────────────────────────────────────────────────────────────────────────

    async def _store_lines(self) -> None:
        """Store lines in the logs of runs that no process executes now.

        Lines for running ones are kept with the task until its answer or a later report; those for ended runs
        are dropped.
        """
        for execution_id, lines in self._lines.items():
            run = self.runs.get(execution_id)
            if run is None or run.is_ended:
                continue
            if run.status not in _ALIVE:
                for task, line in lines:
                    kept = decoding.decode(task.pending_logs or "[]")
                    task.pending_logs = _encode([*kept, line]).decode()
                continue
            await self._insert_lines(run, lines)

    async def _insert_lines(self, run: LockedRun, lines: Sequence[tuple[TaskRow, LogText]]) -> None:
        """Insert log lines of tasks into the log of their run, numbered after its last span and line.

        Messages are cut to 8,192 characters, and times in the future set to now.
        """
        values = {"execution_id": run.execution_id, "run_shard": run.shard}
        last = 0
        for table in ("log_line", "span"):
            found = await self._connection.scalar(
                text(
                    f"SELECT max(sequence) FROM {table} WHERE execution_id = :execution_id AND shard = :run_shard"
                ),
                values,
            )
            last = max(last, found or 0)
        rows = [
            {
                "execution_id": run.execution_id,
                "sequence": last + number,
                "shard": run.shard,
                "id": log_id,
                "level": line.level,
                "message": make_storable(line.message)[:MAX_LINE_CHARACTERS],
                "node_id": task.node_id,
                "at": min(line.at, self.now),
            }
            for number, ((task, line), log_id) in enumerate(
                zip(lines, ids.new_ids("log", len(lines)), strict=True), 1
            )
        ]
        await self._connection.execute(_INSERT_LINE, rows)

    def _with_logs(self, task: TaskRow, run: LockedRun, payload: bytes) -> bytes:
        """Return an answer with the task's lines that could not be stored, since the run is executed now;
        else as it is.
        """
        lines = [line for one, line in self._lines.get(task.execution_id, ()) if one is task]
        if run.status in _ALIVE:
            kept = _decode_lines(task.pending_logs or "[]")
            if kept:
                self._lines.setdefault(task.execution_id, [])[:0] = [(task, line) for line in kept]
                task.pending_logs = None
            return payload
        kept = _decode_lines(task.pending_logs or "[]")
        if not kept and not lines:
            return payload
        task.pending_logs = None
        self._lines[task.execution_id] = [
            (one, line) for one, line in self._lines.get(task.execution_id, ()) if one is not task
        ]
        shown = [[line.level, line.message] for line in (*kept, *lines)]
        return b'%b,"logs":%b}' % (payload[:-1], _encode(shown))

    # ── statements ──────────────────────────────────────────────────────────────────────────────────────────

    def _for_update(self, *, skips_locked: bool = False) -> str:
        """Return the SQL that locks the selected rows; empty on SQLite, which has one writer."""
        if not self._is_postgresql:
            return ""
        return " FOR NO KEY UPDATE SKIP LOCKED" if skips_locked else " FOR NO KEY UPDATE"

    async def _select(
        self,
        statement: str,
        ids_: Sequence[str] | None = None,
        **values: Any,  # noqa: ANN401 - values of columns
    ) -> Sequence[Any]:
        """Return the rows of an SQL text; parameters that are lists are expanded."""
        if ids_ is not None:
            values["ids"] = ids_
        prepared = text(statement)
        expanding = [name for name, value in values.items() if isinstance(value, list | tuple)]
        if expanding:
            prepared = prepared.bindparams(*(bindparam(name, expanding=True) for name in expanding))
        return (await self._connection.execute(prepared, values)).all()


def _changing(task: TaskRow) -> tuple[Any, ...]:
    return tuple(getattr(task, name) for name in CHANGING_COLUMNS)


_decode_lines = decoding.build_decoder(list[LogText]).decode
_UPDATE_TASK: Final = text(
    "UPDATE task SET "
    + ", ".join(f"{name} = :{name}" for name in CHANGING_COLUMNS)
    + ", updated_at = :now WHERE id = :task_id AND fence = :fence"
)
_INSERT_ANSWER: Final = text(
    "INSERT INTO wait_answer (execution_id, node_id, iteration, shard, payload, created_at)"
    " VALUES (:execution_id, :node_id, :iteration, :shard, :payload, :now)"
)
# The remaining time of the run's timeout counts from now on, as with every other answer.
_WAKE_RUN: Final = text(
    "UPDATE execution SET wait_answer_count = wait_answer_count + :answers, updated_at = :now,"
    " due_at = CASE WHEN status = 'waiting' THEN NULL ELSE due_at END,"
    " deadline_at = CASE WHEN status = 'waiting' THEN deadline_at + :now ELSE deadline_at END,"
    " status = CASE WHEN status = 'waiting' THEN 'pending' ELSE status END"
    " WHERE id = :execution_id AND shard = :run_shard"
)
_END_INTERVALS: Final = text(
    "UPDATE blocked_interval SET ended_at = :now WHERE execution_id IN :ids AND ended_at IS NULL"
).bindparams(bindparam("ids", expanding=True))
_INSERT_LINE: Final = text(
    "INSERT INTO log_line (execution_id, sequence, shard, id, level, message, node_id, created_at)"
    " VALUES (:execution_id, :sequence, :shard, :id, :level, :message, :node_id, :at)"
)
