"""One transaction on tasks and their runs: locks, moves, answers to nodes and log lines.

Runs are locked before tasks, both in the order of their ids, as everywhere; so transactions can't deadlock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct, field
from sqlalchemy import text

from engine.run_records import make_storable
from journal.tasks.task_moves import CHANGING_COLUMNS, ROW_COLUMNS, TaskRow
from journal.tasks.task_sql import DIALECTS, NOW, POSTGRESQL, RowsParameter, is_in, is_in_query, texts
from journal.waits.node_answers import HeldRun
from json_text import decoding
from models import ids
from models.execution import SHARED_TARGET
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from models.task_states import HELD_CONDITION, WORK_SINCE_SQL, TaskState
from models.timestamps import HOST_TIME

if TYPE_CHECKING:
    from sqlalchemy import TextClause
    from sqlalchemy.ext.asyncio import AsyncConnection

MAX_LINE_CHARACTERS: Final = 8_192
_RUN_COLUMNS: Final = "id, shard, status, concurrency_key, target, lease_owner"
_ALIVE: Final = frozenset({ExecutionStatus.PENDING, ExecutionStatus.WAITING})
"""Statuses in which no process numbers the log lines of a run."""
_encode = msgspec.json.Encoder().encode


class WokenRun(Struct, frozen=True):
    """Run that an answer has made pending."""

    execution_id: str
    concurrency_key: str | None
    target: str


class TaskEffects(Struct):
    """Consequences of a transaction on tasks, for messages after its commit."""

    woken: list[WokenRun] = field(default_factory=list)
    answered: list[HeldRun] = field(default_factory=list)
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


class LockedRun(Struct):
    """Run whose row the transaction has locked."""

    execution_id: str
    shard: int
    status: str
    concurrency_key: str | None
    target: str
    lease_owner: str | None
    answers: int = 0

    @property
    def is_ended(self) -> bool:
        return self.status in TERMINAL_STATUSES


class TaskTransaction:
    """Locked rows of tasks and runs, with the changes that `store` writes."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._dialect = connection.dialect.name
        self.now = HOST_TIME.microseconds()
        self.tasks: dict[str, TaskRow] = {}
        self.runs: dict[str, LockedRun] = {}
        self.effects = TaskEffects()
        self._before: dict[str, tuple[Any, ...]] = {}
        self._answers: list[tuple[object, ...]] = []
        self._lines: dict[str, list[tuple[TaskRow, LogText]]] = {}
        self._counted: set[str] = set()

    async def lock_runs(self, execution_ids: Sequence[str]) -> None:
        """Lock runs and add them to `runs`, so that their status can't change; those that don't exist are left out."""
        if not execution_ids:
            return
        values = {"ids": texts(self._connection, execution_ids)}
        for row in await self._connection.execute(_LOCK_RUNS[self._dialect], values):
            self.runs[row[0]] = LockedRun(*row)

    async def lock_tasks(self, task_ids: Sequence[str], *, skips_locked: bool = False) -> None:
        """Lock tasks and add them to `tasks`; missing ones, and with `skips_locked` those that others have locked, are
        left out.
        """
        if task_ids:
            statement = _LOCK_FREE_TASKS if skips_locked else _LOCK_TASKS
            await self._lock_tasks(statement, {"ids": texts(self._connection, task_ids)})

    async def lock_reported(
        self, task_ids: Sequence[str], organization_ids: Sequence[str], worker_ids: Sequence[str]
    ) -> None:
        """Lock the given tasks, and all tasks that the given workers of these organizations hold and no report has
        named since their claim.
        """
        if worker_ids:
            values = {
                "ids": texts(self._connection, task_ids),
                "organizations": texts(self._connection, organization_ids),
                "workers": texts(self._connection, worker_ids),
            }
            await self._lock_tasks(_LOCK_REPORTED, values)
        else:
            await self.lock_tasks(task_ids)

    async def _lock_tasks(self, statements: Mapping[str, TextClause], values: Mapping[str, object]) -> None:
        """Lock and read tasks by a statement, and remember their states before changes."""
        for row in await self._connection.execute(statements[self._dialect], values):
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
        """Give the node of a task the answer `payload`, unless its run has ended or was not locked.

        `store` writes it.
        """
        run = self.run_of(task)
        if run is None or run.is_ended:
            return
        run.answers += 1
        self._answers.append(
            (
                task.execution_id,
                task.node_id,
                task.iteration,
                task.shard,
                self._with_logs(task, run, payload).decode(),
                self.now,
            )
        )

    def answer_failure(self, task: TaskRow) -> None:
        """Give the node of a failed task its error as the answer, unless the run has ended."""
        stored = decoding.decode(task.error or "{}")
        error = {
            "code": stored["code"],
            "message": stored["message"],
            "attempt": task.failures + task.losses or 1,
        }
        self.answer(task, _encode({"error": error}))

    def add_lines(self, task: TaskRow, lines: Iterable[LogText], max_lines: int) -> None:
        """Add log lines of a task; from the first above `max_lines` on they are dropped and counted, with one
        warning in the log.
        """
        for line in lines:
            task.log_lines += 1
            if task.log_lines > max_lines + 1:
                continue
            if task.log_lines > max_lines:
                message = f"More than {max_lines:,} log lines of a task: further lines are dropped"
                line = LogText("warning", message, line.at)  # noqa: PLW2901 - in its place
            self._lines.setdefault(task.execution_id, []).append((task, line))

    def count_time(self, task: TaskRow) -> None:
        """Count the time for which a worker has held the task against the timeout of its run, if that waits and was
        locked; a run without remaining time continues, and fails.

        `store` does so for tasks that are no longer leased, and whose nodes get no answer.
        """
        run = self.run_of(task)
        if run is not None and run.status == ExecutionStatus.WAITING and not run.answers:
            self._counted.add(run.execution_id)

    async def store(self) -> TaskEffects:
        """Write the changed tasks, answers and log lines; return the effects to announce after the commit.
        The caller commits.
        """
        await self._store_lines()
        changed = [task for task in self.tasks.values() if _changing(task) != self._before[task.id]]
        if not changed:
            return self.effects
        self.effects.moved = len(changed)
        for task in changed:
            self._note_effects(task)
        await self._store_counted()
        rows = [(task.id, task.fence, *_changing(task)) for task in changed]
        values = {"now": self.now, **_CHANGED.values(self._connection, rows)}
        statements: Sequence[TextClause] = [_UPDATE_TASKS[self._dialect]]
        if self._answers:
            statements = _STORE_ANSWERS[self._dialect]
            values |= self._answer_values()
        for statement in statements:
            await self._connection.execute(statement, values)
        return self.effects

    async def _store_counted(self) -> None:
        """Write the remaining time of the runs whose time `count_time` counts, before their tasks change."""
        if not self._counted:
            return
        values = {"now": self.now, "ids": texts(self._connection, sorted(self._counted))}
        counted = await self._connection.execute(_COUNT_TIME[self._dialect], values)
        woken = [WokenRun(*row) for *row, status in counted if status == ExecutionStatus.PENDING]
        if woken:
            self.effects.woken += woken
            values["woken_ids"] = texts(self._connection, [run.execution_id for run in woken])
            await self._connection.execute(_END_INTERVALS[self._dialect], values)

    def _answer_values(self) -> dict[str, object]:
        """Return the parameters of the statement that stores the answers, and note the waiting runs that they
        wake, and the workers that hold the others.
        """
        answered = [run for run in self.runs.values() if run.answers]
        woken = [run for run in answered if run.status == ExecutionStatus.WAITING]
        self.effects.woken += [WokenRun(run.execution_id, run.concurrency_key, run.target) for run in woken]
        self.effects.answered += [
            HeldRun(run.execution_id, run.lease_owner)
            for run in answered
            if run.lease_owner is not None and run.target == SHARED_TARGET
        ]
        rows = [(run.execution_id, run.shard, run.answers) for run in answered]
        return {
            **_ANSWERS.values(self._connection, self._answers),
            **_ANSWERED.values(self._connection, rows),
            "run_ids": texts(self._connection, [run.execution_id for run in answered]),
            "woken_ids": texts(self._connection, [run.execution_id for run in woken]),
        }

    def _note_effects(self, task: TaskRow) -> None:
        """Note which organizations get work or cancellations, and which concurrency key has a free place, by
        the change of a task.
        """
        before = self._before[task.id][CHANGING_COLUMNS.index("state")]
        if task.state == before:
            return
        if before == TaskState.LEASED:
            self.count_time(task)
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
        """Return the answer of a task with all its log lines if a process executes the run now: that process stores
        them.

        Otherwise the answer stays as it is, and this transaction stores the lines, also those kept with the task.
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


_read_changing = attrgetter(*CHANGING_COLUMNS)


def _changing(task: TaskRow) -> tuple[Any, ...]:
    values: tuple[Any, ...] = _read_changing(task)
    return values


_decode_lines = decoding.build_decoder(list[LogText]).decode
_TYPES: Final[Mapping[object, str]] = {bool: "boolean", int: "bigint", int | None: "bigint"}
_CHANGING_FIELDS: Final = tuple(
    (f"new_{field.name}", _TYPES.get(field.type, "text"))
    for field in msgspec.structs.fields(TaskRow)
    if field.name in CHANGING_COLUMNS
)
_CHANGED: Final = RowsParameter("changed", (("task_id", "text"), ("task_fence", "bigint"), *_CHANGING_FIELDS))
_ANSWER_COLUMNS: Final = ("execution_id", "node_id", "iteration", "shard", "payload", "created_at")
_ANSWERS: Final = RowsParameter(
    "answer",
    tuple(
        (f"answer_{name}", {"shard": "smallint", "created_at": "bigint"}.get(name, "text"))
        for name in _ANSWER_COLUMNS
    ),
)
_ANSWERED: Final = RowsParameter(
    "answered", (("run_id", "text"), ("run_shard", "smallint"), ("answers", "integer"))
)


def _by_dialect(build: Callable[[str], str]) -> Mapping[str, TextClause]:
    return {dialect: text(build(dialect)) for dialect in DIALECTS}


def _lock_sql(dialect: str, *, skips_locked: bool = False) -> str:
    """Return the SQL that locks rows, or with `skips_locked` only unlocked ones; empty for SQLite, whose transactions
    lock the file.
    """
    if dialect != POSTGRESQL:
        return ""
    return " FOR NO KEY UPDATE SKIP LOCKED" if skips_locked else " FOR NO KEY UPDATE"


def _locked_tasks_sql(dialect: str, condition: str, *, skips_locked: bool = False) -> str:
    """Return the SQL that locks and reads tasks under a condition, in order of id, with the time of the
    transaction (NULL for SQLite). With `skips_locked`, tasks that others have locked are left out.
    """
    now = NOW[POSTGRESQL] if dialect == POSTGRESQL else "NULL"
    lock = _lock_sql(dialect, skips_locked=skips_locked)
    return f"SELECT {', '.join(ROW_COLUMNS)}, {now} FROM task WHERE {condition} ORDER BY id{lock}"


_LOCK_RUNS: Final = _by_dialect(
    lambda dialect: (
        f"SELECT {_RUN_COLUMNS} FROM execution WHERE {is_in(dialect, 'id', 'ids')} ORDER BY id{_lock_sql(dialect)}"
    )
)
_LOCK_TASKS: Final = _by_dialect(lambda dialect: _locked_tasks_sql(dialect, is_in(dialect, "id", "ids")))
_LOCK_FREE_TASKS: Final = _by_dialect(
    lambda dialect: _locked_tasks_sql(dialect, is_in(dialect, "id", "ids"), skips_locked=True)
)
_LOCK_REPORTED: Final = _by_dialect(
    lambda dialect: _locked_tasks_sql(
        dialect,
        is_in_query(
            dialect,
            "id",
            f"SELECT id FROM task WHERE {is_in(dialect, 'id', 'ids')} UNION SELECT id FROM task"
            f" WHERE {is_in(dialect, 'organization_id', 'organizations')}"
            f" AND {is_in(dialect, 'worker_id', 'workers')} AND {HELD_CONDITION} AND NOT is_acknowledged",
        ),
    )
)
_UPDATE_TASKS: Final = _by_dialect(
    lambda dialect: (
        "UPDATE task SET "
        + ", ".join(f"{name} = new_{name}" for name in CHANGING_COLUMNS)
        + f", updated_at = :now FROM {_CHANGED.sql(dialect)}"
        " WHERE task.id = changed.task_id AND task.fence = changed.task_fence"
    )
)


_RESUMED: Final = f"deadline_at + coalesce({WORK_SINCE_SQL}, :now)"
_COUNT_TIME: Final = _by_dialect(
    lambda dialect: (
        f"UPDATE execution SET status = CASE WHEN {_RESUMED} > :now THEN 'waiting' ELSE 'pending' END,"
        f" due_at = CASE WHEN {_RESUMED} > :now THEN due_at END,"
        f" deadline_at = CASE WHEN {_RESUMED} > :now THEN {_RESUMED} - :now ELSE {_RESUMED} END, updated_at = :now"
        f" WHERE {is_in(dialect, 'id', 'ids')} AND status = 'waiting'"
        " RETURNING id, concurrency_key, target, status"
    )
)
_END_INTERVALS: Final = _by_dialect(
    lambda dialect: (
        "UPDATE blocked_interval SET ended_at = :now"
        f" WHERE {is_in(dialect, 'execution_id', 'woken_ids')} AND ended_at IS NULL"
    )
)


def _answer_statements(dialect: str) -> Sequence[TextClause]:
    """Return the statements that store changed tasks, and answer their nodes; one alone for PostgreSQL."""
    insert = (
        f"INSERT INTO wait_answer ({', '.join(_ANSWER_COLUMNS)}) SELECT answer.* FROM {_ANSWERS.sql(dialect)}"
    )
    # Before the tasks: those that are still leased say since when the clock of the run counts.
    wake = (
        "UPDATE execution SET wait_answer_count = wait_answer_count + answers, updated_at = :now,"
        " due_at = CASE WHEN status = 'waiting' THEN NULL ELSE due_at END,"
        f" deadline_at = CASE WHEN status = 'waiting' THEN {_RESUMED} ELSE deadline_at END,"
        " status = CASE WHEN status = 'waiting' THEN 'pending' ELSE status END"
        f" FROM {_ANSWERED.sql(dialect)}"
        f" WHERE {is_in(dialect, 'execution.id', 'run_ids')}"
        " AND execution.id = answered.run_id AND execution.shard = answered.run_shard"
    )
    end = _END_INTERVALS[dialect].text
    update = _UPDATE_TASKS[dialect].text
    if dialect == POSTGRESQL:
        parts = f"stored AS ({update}), inserted AS ({insert}), ended AS ({end})"
        return [text(f"WITH {parts} {wake}")]
    return [text(statement) for statement in (wake, update, insert, end)]


_STORE_ANSWERS: Final = {dialect: _answer_statements(dialect) for dialect in DIALECTS}
_INSERT_LINE: Final = text(
    "INSERT INTO log_line (execution_id, sequence, shard, id, level, message, node_id, created_at)"
    " VALUES (:execution_id, :sequence, :shard, :id, :level, :message, :node_id, :at)"
)
