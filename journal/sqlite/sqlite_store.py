"""Journal store on SQLite: a writer thread and a reader thread, each with one connection.

Work that waits for the writer shares its next transaction and its one fsync, for any kind of statement.
Times are those of this host: SQLite has no clock of its own.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from engine.agents.agent_steps import AgentStep
from engine.run_records import NodeSpan, RunStatus, encode_error
from journal import run_rows
from journal.blocked_intervals import INTERVAL_COLUMNS_SQL, LEAST_MICROSECONDS
from journal.explanations.blockers import BlockerCode
from journal.run_rows import (
    ATTEMPT_CHANGES,
    ATTEMPT_COLUMNS,
    ATTEMPT_KEY,
    CRASHED_ERROR,
    LOG_COLUMNS,
    LOSS_PLACEHOLDER,
    OUT_OF_MEMORY_ERROR,
    SPAN_COLUMNS,
    SPAN_FIXED_COLUMNS,
    SPAN_KEY,
    STEP_CHANGES,
    STEP_COLUMNS,
    STEP_KEY,
    TASK_COLUMNS,
    TASK_INSERT_COLUMNS,
    approval_rows,
    attempt_rows,
    blocked_rows,
    cancel_tasks_sql,
    cancelled_task_rows,
    decode_claim,
    decode_span,
    decode_step,
    log_rows,
    metadata_rows,
    release_target_sql,
    span_rows,
    step_rows,
    task_rows,
    task_values_sql,
)
from journal.sqlite import sqlite_inserts
from journal.store import (
    DIRECT_TOKEN,
    STATUS_AFTER,
    AcceptanceResult,
    ClaimedRun,
    ClaimQuery,
    DefinitionKey,
    EndRequestOutcome,
    ExecutionKey,
    InboundRequest,
    IngestResult,
    LeaseRenewal,
    RenewalResult,
    RunAcceptance,
    RunProgressReport,
    RunWrite,
    SweepResult,
)
from models import database
from models.database import SQLITE_BUSY_SECONDS
from models.errors import DatabaseUnavailable
from models.execution import DELAYED_TARGET, ISOLATION_TARGETS, LIMITED_TARGET, SHARED_TARGET
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from models.loss_limits import MAX_ISOLATION_LOSSES, MAX_LOST_ATTEMPTS, SUSPECT_LOSSES
from models.task_states import WORK_SINCE_SQL
from models.timestamps import HOST_TIME, DatabaseClock, to_microseconds

T = TypeVar("T")
DatabaseWork = Callable[[sqlite3.Connection], T]

MAX_TRANSACTION_WORKS = 64


class SQLiteStore:
    """`JournalStore` on one SQLite file."""

    def __init__(self, path: str, clock: DatabaseClock) -> None:
        self.clock = clock
        clock.follow_host()
        self._writer = _ConnectionThread(path, "sqlite-writer", writes=True)
        self._reader = _ConnectionThread(path, "sqlite-reader", writes=False)

    async def accept(self, batch: Sequence[RunAcceptance]) -> Sequence[AcceptanceResult]:
        """Insert accepted runs; return, in the order of the batch, whether each is new, repeats an idempotency key, or
        was refused.

        See `JournalStore.accept`. Raises `DatabaseUnavailable`, as all methods do.
        """
        return await self._writer.run(
            lambda connection: sqlite_inserts.insert_runs(connection, batch, _now_microseconds())
        )

    async def ingest(self, batch: Sequence[InboundRequest]) -> Sequence[IngestResult]:
        """Store inbound requests with their runs; return, in the order of the batch, whether each is new, repeats an
        idempotency key, or was refused.

        See `JournalStore.ingest`. Raises `DatabaseUnavailable`, as all methods do.
        """
        return await self._writer.run(
            lambda connection: sqlite_inserts.ingest(connection, batch, _now_microseconds())
        )

    async def claim(self, claim: ClaimQuery) -> Sequence[ClaimedRun]:
        """Take up to `limit` pending runs for a process: set lease and fencing token, and count the attempt.

        See `RunStore.claim`. Raises `DatabaseUnavailable`.
        """
        claimed = await self._writer.run(lambda connection: _claim(connection, claim))
        self.clock.follow_host()
        return claimed

    async def has_suspects(self, max_isolation_losses: int, target: str = SHARED_TARGET) -> bool:
        """Return whether suspects of a target (runs that lost several workers) wait to be run on trial.

        Those that lost more than `max_isolation_losses` workers on trial don't count.
        """
        return await self._reader.run(
            lambda connection: _has_suspects(connection, target, max_isolation_losses)
        )

    async def record(self, batch: Sequence[RunWrite], *, owner: str = "") -> frozenset[str]:
        """Write spans, logs and ends of runs; return the ids of runs whose fencing token was still valid.

        Other runs write nothing. See `RunStore.record`.
        """
        return await self._writer.run(lambda connection: _record(connection, batch, owner))

    async def renew(
        self, held: Sequence[LeaseRenewal], lease_seconds: float, *, owner: str = ""
    ) -> Sequence[RenewalResult]:
        """Extend leases to `lease_seconds` from now; return a result for each that is still held, with requests to stop
        or cancel.

        A lease without a result is lost.
        """
        renewed = await self._writer.run(lambda connection: _renew(connection, held, lease_seconds, owner))
        self.clock.follow_host()
        return renewed

    async def definitions(self, keys: Sequence[DefinitionKey]) -> dict[DefinitionKey, str]:
        """Return the JSON texts of definition snapshots by their keys; missing ones are left out."""
        return await self._reader.run(lambda connection: _read_definitions(connection, keys))

    async def spans(self, keys: Sequence[ExecutionKey]) -> dict[str, list[NodeSpan]]:
        """Return the recorded spans of runs by execution id, in their order; an empty list for a run without spans.

        Another process continues the run from them.
        """
        return await self._reader.run(lambda connection: _read_spans(connection, keys))

    async def steps(self, keys: Sequence[ExecutionKey]) -> dict[str, list[AgentStep]]:
        """Return all steps of those agents that have not ended, by execution id; see `RunStore.steps`."""
        return await self._reader.run(lambda connection: _read_steps(connection, keys))

    async def last_log_lines(self, keys: Sequence[ExecutionKey]) -> dict[str, int]:
        """Return the highest sequence number of each run's log, by execution id; runs without a log are left out."""
        return await self._reader.run(lambda connection: _last_log_lines(connection, keys))

    async def progress(self, keys: Sequence[ExecutionKey]) -> Sequence[RunProgressReport]:
        """Return status, progress and error of runs, with the outputs of nodes of ended runs; unknown runs are left
        out.

        An output in a blob is its reference, and `references` has the ids of these nodes.
        """
        return await self._reader.run(lambda connection: _read_progress(connection, keys))

    async def promote_due(self) -> int:
        """Make runs whose wait or delay has ended pending; return their number. See `RunStore.promote_due`."""
        return await self._writer.run(_promote_due)

    async def sweep(self, limit: int) -> SweepResult:
        """Find runs whose lease has ended: up to `limit` become pending, or end; and make due runs pending.

        A run ends that was asked to stop or cancel, or lost too many workers. The result has the numbers, the ended
        ids, and whether pending runs wait.
        """
        return await self._writer.run(lambda connection: _sweep(connection, limit))

    async def reclaim(self, owner_prefix: str, *, out_of_memory: bool = False) -> int:
        """Reclaim the runs of dead owners whose names begin with `owner_prefix`; return their number. See
        `JournalStore.reclaim`.

        After a lack of memory, the loss counts against the runs unless one of them was on trial.
        """
        return await self._writer.run(
            lambda connection: _reclaim(connection, owner_prefix, out_of_memory=out_of_memory)
        )

    async def release(self, owner: str, held: Sequence[str]) -> int:
        """Make the running runs of a process pending, except those with ids in `held`; return their number.

        Runs with a request to stop or cancel end instead, and count too. The claims do not count as attempts.
        """
        return await self._writer.run(lambda connection: _release(connection, owner, held))

    async def return_direct(self, keys: Sequence[ExecutionKey]) -> int:
        """Make assigned runs pending that their worker has not received; return their number. See
        `JournalStore.return_direct`.
        """
        return await self._writer.run(lambda connection: _return_direct(connection, keys))

    async def request_end(self, key: ExecutionKey, request: str) -> EndRequestOutcome | None:
        """Request a run to `stop` or `cancel`; a run that no process holds ends at once.

        Return its status after that, and its lease owner, channel and organization; None for an unknown run. An ended
        run stays as it is, and a request to cancel is never replaced.
        """
        return await self._writer.run(lambda connection: _request_end(connection, key, request))

    async def for_thread(self) -> SQLiteStore:
        """Return this store itself: its threads serve any event loop."""
        return self

    async def close(self) -> None:
        """Close the writing and the reading thread, and wait until their queued work is done and they have ended."""
        await asyncio.to_thread(self._writer.close)
        await asyncio.to_thread(self._reader.close)


class _ConnectionThread:
    """Thread with a connection of its own; queued work shares one transaction."""

    def __init__(self, path: str, name: str, *, writes: bool) -> None:
        self._path = path
        self._breaker = database.write_breaker(path) if writes else None
        self._works: queue.SimpleQueue[tuple[DatabaseWork[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    async def run(self, work: DatabaseWork[T]) -> T:
        """Run work with the connection in the thread, in a transaction that other work may share; return its
        result.

        Raises its error, and `DatabaseUnavailable`.
        """
        if self._is_closed:
            raise DatabaseUnavailable("The store is closed")
        future: Future[T] = Future()
        self._works.put((work, future))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Refuse new work, and wait until the queued work is done and the thread has ended."""
        self._is_closed = True
        self._works.put(None)
        self._thread.join()

    def _serve(self) -> None:
        """Serve queued work, up to `MAX_TRANSACTION_WORKS` in one transaction, until `close`."""
        connection: sqlite3.Connection | None = None
        while (first := self._works.get()) is not None:
            works = [first]
            is_last = False
            while len(works) < MAX_TRANSACTION_WORKS and not is_last:
                try:
                    more = self._works.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    is_last = True
                else:
                    works.append(more)
            try:
                connection = connection or _open_connection(self._path)
            except sqlite3.Error as error:
                _fail_works(works, error)
            else:
                self._transact(connection, works)
            if is_last:
                break
        if connection is not None:
            connection.close()

    def _transact(
        self, connection: sqlite3.Connection, works: list[tuple[DatabaseWork[Any], Future[Any]]]
    ) -> None:
        """Run queued work in one transaction, and give each future its result or error.

        If one piece of several fails, each runs again in a transaction of its own. If no transaction can
        begin, all get that error.
        """
        try:
            self._begin(connection)
        except (sqlite3.Error, DatabaseUnavailable) as error:
            _fail_works(
                works, error
            )  # not the fault of any of them, and each alone would only wait as long again
            return
        failure: Exception | None = None
        results: list[Any] = []
        try:
            results = [work(connection) for work, _ in works]
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - it belongs to one caller, and the thread continues
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            failure = error
        finally:
            if self._breaker is not None:
                self._breaker.end()
        if failure is None:
            for (_, future), result in zip(works, results, strict=True):
                _resolve_future(future, result)
        elif len(works) == 1:
            _fail_works(works, failure)
        else:
            for one in works:
                self._transact(connection, [one])

    def _begin(self, connection: sqlite3.Connection) -> None:
        """Begin a transaction; a writer waits for the lock of the file, and fails fast after earlier failures."""
        if self._breaker is None:
            connection.execute("BEGIN")
        else:
            self._breaker.begin(connection.execute, busy_seconds=SQLITE_BUSY_SECONDS)


def _fail_works(works: Sequence[tuple[DatabaseWork[Any], Future[Any]]], error: Exception) -> None:
    for _, future in works:
        if future.set_running_or_notify_cancel():
            future.set_exception(_translate_error(error))


def _resolve_future(future: Future[Any], result: object) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(result)


def _translate_error(error: Exception) -> Exception:
    if not isinstance(error, sqlite3.OperationalError):
        return error
    unavailable = DatabaseUnavailable(f"SQLite did not commit the transaction: {error}")
    unavailable.__cause__ = error
    return unavailable


def _open_connection(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path,
        timeout=SQLITE_BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
    )
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "temp_store = MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _now_microseconds() -> int:
    return HOST_TIME.microseconds()


# ── claim ─────────────────────────────────────────────────────────────────────────────────────────


def _claim(connection: sqlite3.Connection, claim: ClaimQuery) -> list[ClaimedRun]:
    """Claim runs: organizations in turn, each with an equal share of the limit."""
    if claim.is_trial:
        return _claim_for_trial(connection, claim)
    chosen: list[tuple[str, bool]] = []
    organizations = _pending_organizations(connection, claim)
    for served, organization_id in enumerate(organizations):
        share = -(-(claim.limit - len(chosen)) // (len(organizations) - served))
        chosen.extend(_organization_runs(connection, claim, organization_id, share))
    now = _now_microseconds()
    return [
        _take_run(connection, claim, execution_id, now, may_have_more=may_have_more)
        for execution_id, may_have_more in chosen
    ]


def _claim_for_trial(connection: sqlite3.Connection, claim: ClaimQuery) -> list[ClaimedRun]:
    """Claim the suspects that lost the fewest workers on trial, and mark them as isolated."""
    rows = connection.execute(
        f"SELECT id FROM execution {_IS_SUSPECT} ORDER BY {', '.join(run_rows.TRIAL_ORDER)} LIMIT ?",
        (ISOLATION_TARGETS.get(claim.target, claim.target), claim.max_isolation_losses, claim.limit),
    ).fetchall()
    now = _now_microseconds()
    return [_take_run(connection, claim, row[0], now, may_have_more=False) for row in rows]


def _pending_organizations(connection: sqlite3.Connection, claim: ClaimQuery) -> list[str]:
    """Return up to `claim.limit` organizations with pending runs, in the order of ids after the last one served.

    After the last id it begins again. Excluded organizations are left out. It makes one index probe for each.
    """
    statement = (
        "SELECT min(organization_id) FROM execution"
        " WHERE status = 'pending' AND target = ? AND organization_id > ?"
    )

    def following(organization_id: str) -> str | None:
        found: str | None = connection.execute(statement, (claim.target, organization_id)).fetchone()[0]
        return found

    organizations: list[str] = []
    first = current = following(claim.after_organization) or following("")
    while current is not None and len(organizations) < claim.limit:
        if current not in claim.excluded_organizations:
            organizations.append(current)
        current = following(current) or following("")
        if current == first:
            break
    return organizations


def _organization_runs(
    connection: sqlite3.Connection, claim: ClaimQuery, organization_id: str, share: int
) -> list[tuple[str, bool]]:
    """Return the ids of up to `share` next runs of an organization, its queue turns (hashes of workflows) served one
    after another.

    Each has a flag: whether its turn may have more runs.
    """
    statement = (
        "SELECT min(queue_turn) FROM execution"
        " WHERE status = 'pending' AND target = ? AND organization_id = ? AND queue_turn >= ?"
    )

    def following(queue_turn: int) -> int | None:
        found: int | None = connection.execute(
            statement, (claim.target, organization_id, queue_turn)
        ).fetchone()[0]
        return found

    turns: list[int] = []
    current = _first_given(following(claim.turns.get(organization_id, 0)), following(0))
    while current is not None and len(turns) < share:
        turns.append(current)
        current = _first_given(following(current + 1), following(0))
        if current == turns[0]:
            break
    # At other targets, suspects wait at a separate isolation target.
    is_no_suspect = "" if claim.target in ISOLATION_TARGETS else f" AND {run_rows.IS_NO_SUSPECT_SQL}"
    chosen: list[tuple[str, bool]] = []
    for served, queue_turn in enumerate(turns):
        part = -(-(share - len(chosen)) // (len(turns) - served))
        rows = connection.execute(
            f"SELECT id FROM execution WHERE {run_rows.pending_sql('?')} AND organization_id = ?"
            f" AND queue_turn = ?{is_no_suspect} ORDER BY {', '.join(run_rows.CLAIM_ORDER)} LIMIT ?",
            (claim.target, organization_id, queue_turn, part),
        ).fetchall()
        chosen.extend((row[0], len(rows) == part) for row in rows)
    return chosen


def _first_given(one: int | None, other: int | None) -> int | None:
    """Return the first of two values that is not None."""
    return one if one is not None else other


# Written only when it changes: `target` is a column of several indexes.
_PUTS_ISOLATED = " isolated = 1, target = ?5,"


def _take_run(
    connection: sqlite3.Connection, claim: ClaimQuery, execution_id: str, now: int, *, may_have_more: bool
) -> ClaimedRun:
    """Set the lease of a run, count the attempt, end its blocked interval, and return the claimed run.

    `may_have_more` is passed on in the result: whether more runs of its workflow may be pending. `now` is in
    microseconds since 1970.
    """
    row = connection.execute(
        "UPDATE execution SET status = 'running', token = token + 1, attempt = attempt + 1, is_fresh = 0,"
        f"{_PUTS_ISOLATED if claim.is_trial else ''}"
        " lease_owner = ?1, lease_until = ?2, started_at = coalesce(started_at, ?3), updated_at = ?3,"
        " deadline_at = coalesce(deadline_at, ?3 + timeout_microseconds)"
        " WHERE id = ?4 AND status = 'pending'"
        " RETURNING id, shard, organization_id, workflow_id, definition_hash, token, attempt, key_id, has_journal,"
        " (SELECT trigger FROM execution_data WHERE execution_id = execution.id), started_at, deadline_at, request,"
        " channel, user_id, wait_answer_count, concurrency_key, completion_action, write_key_id, trace_origin,"
        " is_tainted",
        (
            *(claim.owner, now + int(claim.lease_seconds * 1_000_000), now, execution_id),
            *((claim.target,) if claim.is_trial else ()),
        ),
    ).fetchone()
    if row[_HAS_JOURNAL]:
        # Runs without an earlier attempt have no interval to end.
        connection.execute(_RESUME_INTERVALS, {"now": now, "id": execution_id})
    return decode_claim((*row, may_have_more, now))


_HAS_JOURNAL = ClaimedRun.__struct_fields__.index("has_journal")
_RESUME_INTERVALS = (
    "UPDATE blocked_interval SET ended_at = coalesce(ended_at, :now), resumed_at = :now"
    " WHERE execution_id = :id AND resumed_at IS NULL"
)
_END_INTERVALS = "UPDATE blocked_interval SET ended_at = :now WHERE execution_id = :id AND ended_at IS NULL"
_INSERT_INTERVALS = f"INSERT OR IGNORE INTO blocked_interval ({INTERVAL_COLUMNS_SQL})"
_BLOCK_RUN = (
    f"{_INSERT_INTERVALS} SELECT id, :now, shard, organization_id,"
    f" CASE WHEN status = 'waiting' THEN :code ELSE '{BlockerCode.QUEUED_BEHIND}' END, :node,"
    " CASE WHEN status = 'waiting' THEN NULL ELSE :now END"
    " FROM execution WHERE id = :id AND status IN ('waiting', 'pending')"
)


_IS_SUSPECT = f"WHERE {run_rows.pending_sql('?')} AND {run_rows.suspect_sql('?')}"


def _has_suspects(connection: sqlite3.Connection, target: str, max_isolation_losses: int) -> bool:
    statement = f"SELECT 1 FROM execution {_IS_SUSPECT} LIMIT 1"
    values = (ISOLATION_TARGETS.get(target, target), max_isolation_losses)
    return connection.execute(statement, values).fetchone() is not None


# ── record and renew ──────────────────────────────────────────────────────────────────────────────

_UPSERT_SPANS = (
    f"INSERT INTO span ({', '.join(SPAN_COLUMNS)}) VALUES ({', '.join('?' * len(SPAN_COLUMNS))})"
    f" ON CONFLICT ({', '.join(SPAN_KEY)}) DO UPDATE SET "
    + ", ".join(
        f"{column} = excluded.{column}" for column in SPAN_COLUMNS if column not in SPAN_FIXED_COLUMNS
    )
)
_UPSERT_ATTEMPTS = (
    f"INSERT INTO attempt_span ({', '.join(ATTEMPT_COLUMNS)}) VALUES ({', '.join('?' * len(ATTEMPT_COLUMNS))})"
    f" ON CONFLICT ({', '.join(ATTEMPT_KEY)}) DO UPDATE SET {ATTEMPT_CHANGES}"
)
_UPSERT_STEPS = (
    f"INSERT INTO execution_step ({', '.join(STEP_COLUMNS)}) VALUES ({', '.join('?' * len(STEP_COLUMNS))})"
    f" ON CONFLICT ({', '.join(STEP_KEY)}) DO UPDATE SET {STEP_CHANGES}"
)
_INSERT_LOGS = (
    f"INSERT OR IGNORE INTO log_line ({', '.join(LOG_COLUMNS)}) VALUES ({', '.join('?' * len(LOG_COLUMNS))})"
)
_INSERT_APPROVAL = (
    "INSERT INTO approval_request (execution_id, node_id, iteration, shard, organization_id, round, attempts,"
    " due_at, created_at) SELECT id, ?2, ?3, shard, organization_id, 0, 0, ?4, ?4 FROM execution WHERE id = ?1"
    " ON CONFLICT DO NOTHING"
)
_INSERT_TASK = (
    f"INSERT INTO task ({', '.join(TASK_INSERT_COLUMNS)})"
    f" SELECT {task_values_sql('given', 'execution', ':now', '1', '0')}"
    f" FROM (SELECT {', '.join(f':{name} AS {name}' for name in TASK_COLUMNS)}) AS given"
    " JOIN execution ON execution.id = given.execution_id WHERE true ON CONFLICT DO NOTHING"
)
_CANCEL_TASKS = f"{cancel_tasks_sql(':now')} AND execution_id = :execution_id"
_DELETE_METADATA = "DELETE FROM execution_label WHERE execution_id = ?1 AND key = ?3 AND value <> ?4"
_INSERT_METADATA = (
    "INSERT INTO execution_label (execution_id, key, value, shard, organization_id, created_at)"
    " SELECT execution_id, ?3, ?4, shard, organization_id, created_at FROM execution_data"
    " WHERE execution_id = ?1 AND shard = ?2 ON CONFLICT DO NOTHING"
)
_LEASE_GUARD = (
    " WHERE id = :id AND shard = :shard AND token = :token AND status = 'running'"
    " AND (:owner = '' OR lease_owner = :owner)"
)
_DONE = "completed_nodes = :completed, progress = max(progress, :progress)"
_UPDATE_PROGRESS = (
    f"UPDATE execution SET {_DONE}, has_journal = 1, updated_at = :now,"
    # A new result clears the attempts lost before it; the present attempt still counts.
    " attempt = CASE WHEN :has_new_result THEN 1 ELSE attempt END,"
    " isolation_losses = CASE WHEN :has_new_result THEN 0 ELSE isolation_losses END,"
    " isolated = isolated AND NOT (:has_new_result OR :has_passed)" + _LEASE_GUARD
)
_UPDATE_END = (
    f"UPDATE execution SET status = :status, {_DONE}, error = :error, ended_at = :now,"
    " updated_at = :now, lease_owner = NULL, lease_until = NULL" + _LEASE_GUARD
)
_ENDS_WAITING = "(:status = 'waiting' AND wait_answer_count <= :wait_answer_count)"
"""A run that got an answer while it was running doesn't wait: the next executor that claims it reads the
answer.
"""
_UPDATE_RELEASE = (
    f"UPDATE execution SET {_DONE}, has_journal = 1, updated_at = :now,"
    f" due_at = CASE WHEN {_ENDS_WAITING} THEN :due_at END,"
    " status = CASE WHEN request = 'stop' THEN 'stopped' WHEN request = 'cancel' THEN 'cancelled'"
    f" WHEN {_ENDS_WAITING} THEN 'waiting' ELSE 'pending' END,"
    " ended_at = CASE WHEN request IS NULL THEN NULL ELSE :now END,"
    # A wait stops the clock of the run's timeout: the remaining time is stored as a time since 1970.
    f" deadline_at = CASE WHEN {_ENDS_WAITING} THEN deadline_at - :now ELSE deadline_at END,"
    f" target = CASE WHEN concurrency_key IS NULL OR :keeps_place THEN target ELSE '{LIMITED_TARGET}' END,"
    " token = token + 1, attempt = 0, isolation_losses = 0, isolated = 0, lease_owner = NULL, lease_until = NULL"
    + _LEASE_GUARD
)


def _record(connection: sqlite3.Connection, batch: Sequence[RunWrite], owner: str) -> frozenset[str]:
    """Write the records of runs whose token is valid, and return the ids of these runs."""
    now = _now_microseconds()
    for write in batch:
        # Nobody moves the clock during this transaction: that is a transaction too.
        if write.clock_moved != HOST_TIME.moved:
            write.follow_clock(HOST_TIME.moved)
    held = [write for write in batch if connection.execute(*_build_update(write, owner, now)).rowcount == 1]
    connection.executemany(_UPSERT_SPANS, span_rows(held))
    connection.executemany(_UPSERT_ATTEMPTS, attempt_rows(held))
    connection.executemany(_UPSERT_STEPS, step_rows(held))
    connection.executemany(_INSERT_LOGS, log_rows(held))
    for execution_id, node_id, iteration in approval_rows(held):
        connection.execute(_INSERT_APPROVAL, (execution_id, node_id, iteration, now))
    if metadata := metadata_rows(held):
        connection.executemany(_DELETE_METADATA, metadata)
        connection.executemany(_INSERT_METADATA, metadata)
    _record_tasks(connection, held, now)
    for execution_id, code, node_id in blocked_rows(held):
        connection.execute(_BLOCK_RUN, {"id": execution_id, "code": code, "node": node_id, "now": now})
    return frozenset(write.execution_id for write in held)


def _record_tasks(connection: sqlite3.Connection, held: Sequence[RunWrite], now: int) -> None:
    """Insert the tasks that nodes wait for, and cancel those that runs have no use for.

    `now` is in microseconds since 1970.
    """
    for row in task_rows(held):
        connection.execute(_INSERT_TASK, {**dict(zip(TASK_COLUMNS, row, strict=True)), "now": now})
    for execution_id, node_id, iteration in cancelled_task_rows(held):
        values = {"now": now, "execution_id": execution_id, "node_id": node_id, "iteration": iteration}
        connection.execute(f"{_CANCEL_TASKS} AND node_id = :node_id AND iteration = :iteration", values)


def _build_update(write: RunWrite, owner: str, now: int) -> tuple[str, dict[str, Any]]:
    """Return the SQL update of a run's row for a write, with its parameters; it changes no row without a valid token.

    With an `owner`, only a row that it has leased is changed. `now` is in microseconds since 1970.
    """
    values: dict[str, Any] = {
        "id": write.execution_id,
        "shard": write.shard,
        "token": write.token,
        "owner": owner,
        "completed": write.completed_nodes,
        "progress": write.progress,
        "now": now,
    }
    if write.end is None:
        return _UPDATE_PROGRESS, values | {
            "has_new_result": write.has_new_result,
            "has_passed": write.has_passed,
        }
    values["status"] = STATUS_AFTER[write.end].value
    if write.end in {RunStatus.WAITING, RunStatus.RELEASED}:
        due_at = to_microseconds(write.due_at) if write.due_at else None
        return _UPDATE_RELEASE, values | {
            "due_at": due_at,
            "wait_answer_count": write.wait_answer_count,
            "keeps_place": write.keeps_place,
        }
    return _UPDATE_END, values | {"error": encode_error(write.error)}


def _renew(
    connection: sqlite3.Connection, held: Sequence[LeaseRenewal], lease_seconds: float, owner: str
) -> list[RenewalResult]:
    until = _now_microseconds() + int(lease_seconds * 1_000_000)
    renewed: list[RenewalResult] = []
    for lease in held:
        row = connection.execute(
            f"UPDATE execution SET lease_until = :until{_LEASE_GUARD} RETURNING request",
            {
                "until": until,
                "id": lease.execution_id,
                "shard": lease.shard,
                "token": lease.token,
                "owner": owner,
            },
        ).fetchone()
        if row is not None:
            renewed.append(RenewalResult(lease.execution_id, row[0]))
    return renewed


# ── read ──────────────────────────────────────────────────────────────────────────────────────────


def _read_definitions(
    connection: sqlite3.Connection, keys: Sequence[DefinitionKey]
) -> dict[DefinitionKey, str]:
    statement = "SELECT body FROM definition WHERE organization_id = ? AND hash = ? AND shard = ?"
    found = {key: connection.execute(statement, key).fetchone() for key in keys}
    return {key: row[0] for key, row in found.items() if row is not None}


def _read_spans(connection: sqlite3.Connection, keys: Sequence[ExecutionKey]) -> dict[str, list[NodeSpan]]:
    statement = (
        f"SELECT {', '.join(SPAN_COLUMNS)} FROM span WHERE execution_id = ? AND shard = ? ORDER BY sequence"
    )
    return {
        key.execution_id: [decode_span(row) for row in connection.execute(statement, key)] for key in keys
    }


def _read_steps(connection: sqlite3.Connection, keys: Sequence[ExecutionKey]) -> dict[str, list[AgentStep]]:
    statement = (
        f"SELECT {', '.join(f'step.{column}' for column in STEP_COLUMNS)} FROM execution_step AS step"
        f" LEFT JOIN span USING ({', '.join(SPAN_KEY)})"
        " WHERE step.execution_id = ? AND step.shard = ? AND span.ended_at IS NULL"
        " ORDER BY step.number"
    )
    found = {
        key.execution_id: [decode_step(row) for row in connection.execute(statement, key)] for key in keys
    }
    return {execution_id: steps for execution_id, steps in found.items() if steps}


def _last_log_lines(connection: sqlite3.Connection, keys: Sequence[ExecutionKey]) -> dict[str, int]:
    statement = "SELECT max(sequence) FROM log_line WHERE execution_id = ? AND shard = ?"
    found = {key.execution_id: connection.execute(statement, key).fetchone()[0] for key in keys}
    return {execution_id: last for execution_id, last in found.items() if last is not None}


def _read_progress(connection: sqlite3.Connection, keys: Sequence[ExecutionKey]) -> list[RunProgressReport]:
    found: list[RunProgressReport] = []
    for key in keys:
        row = connection.execute(
            "SELECT status, completed_nodes, total_nodes, error, progress FROM execution WHERE id = ? AND shard = ?",
            key,
        ).fetchone()
        if row is None:
            continue
        found_outputs = connection.execute(_OUTPUTS, key).fetchall() if row[0] in TERMINAL_STATUSES else ()
        outputs = [(node_id, text) for node_id, text, _ in found_outputs]
        references = [node_id for node_id, _, is_reference in found_outputs if is_reference]
        status, completed_nodes, total_nodes, error, percent = row
        found.append(
            RunProgressReport(
                key.execution_id,
                ExecutionStatus(status),
                completed_nodes,
                total_nodes,
                error,
                outputs,
                percent,
                references,
            )
        )
    return found


_OUTPUTS = (
    "SELECT node_id, coalesce(output, output_blob) AS shown, output IS NULL FROM span"
    " WHERE execution_id = ? AND shard = ? AND iteration = '' AND shown IS NOT NULL AND ended_at IS NOT NULL"
)


# ── sweep ─────────────────────────────────────────────────────────────────────────────────────────


_IS_DUE = "status = 'waiting' AND due_at <= :now"
_END_DEFERRALS = (
    f"{_INSERT_INTERVALS} SELECT id, updated_at, shard, organization_id, CASE target WHEN '{DELAYED_TARGET}'"
    f" THEN '{BlockerCode.TIMER}' ELSE '{BlockerCode.WINDOW_CLOSED}' END, NULL, :now"
    # The release of held runs has added their interval, and set both times to the same moment.
    f" FROM execution WHERE {_IS_DUE} AND is_fresh AND due_at > updated_at + {LEAST_MICROSECONDS}"
)
_END_WAITS = (
    "UPDATE blocked_interval SET ended_at = :now WHERE ended_at IS NULL"
    f" AND execution_id IN (SELECT id FROM execution WHERE {_IS_DUE} AND NOT is_fresh)"
)
# The leases of an owner that is known to be dead end at once, often before their time. An interval may begin where
# the last one ended: its start, which is its key, is never its end.
_NAME_LOSSES = (
    f"{_INSERT_INTERVALS} SELECT id, min(lease_until, :now - 1), shard, organization_id, '{BlockerCode.WORKER_LOST}',"
    " NULL, :now FROM execution"
)


def _promote_due(connection: sqlite3.Connection) -> int:
    """Make due runs pending, end their blocked intervals, and return their number."""
    now = _now_microseconds()
    connection.execute(_END_DEFERRALS, {"now": now})
    connection.execute(_END_WAITS, {"now": now})
    return connection.execute(
        "UPDATE execution SET status = 'pending', due_at = NULL, updated_at = ?1,"
        f" deadline_at = deadline_at + coalesce({WORK_SINCE_SQL}, ?1),"
        f" target = CASE target WHEN '{DELAYED_TARGET}'"
        f" THEN coalesce(assigned_deployment_id, '{SHARED_TARGET}') ELSE target END"
        " WHERE status = 'waiting' AND due_at <= ?1",
        (now,),
    ).rowcount


_ISOLATION_LOSSES = "isolation_losses + (CASE WHEN isolated THEN 1 ELSE 0 END)"
_HAS_CRASHED = f"(attempt >= {MAX_LOST_ATTEMPTS} OR {_ISOLATION_LOSSES} >= {MAX_ISOLATION_LOSSES})"
_IS_NEXT_ISOLATED = (
    f"request IS NULL AND NOT {_HAS_CRASHED} AND max(attempt, :least_losses) >= {SUSPECT_LOSSES}"
)
_RECLAIM = (
    "UPDATE execution SET token = token + 1, lease_owner = NULL, lease_until = NULL, updated_at = :now,"
    f" has_journal = 1, isolated = 0, isolation_losses = max({_ISOLATION_LOSSES}, :least_isolation_losses),"
    " attempt = max(attempt, :least_losses),"
    " status = CASE WHEN request = 'stop' THEN 'stopped' WHEN request = 'cancel' THEN 'cancelled'"
    f" WHEN {_HAS_CRASHED} THEN 'failed' ELSE 'pending' END,"
    f" ended_at = CASE WHEN request IS NOT NULL OR {_HAS_CRASHED} THEN :now END,"
    f" error = CASE WHEN request IS NULL AND {_HAS_CRASHED} THEN replace(:crashed, '{LOSS_PLACEHOLDER}', attempt) END,"
    f" target = {release_target_sql(_IS_NEXT_ISOLATED)}"
)


_NO_LEAST = {"least_isolation_losses": 0, "least_losses": 0}
_RELEASE = (
    "UPDATE execution SET token = token + 1, attempt = attempt - 1, isolated = 0, lease_owner = NULL,"
    f" lease_until = NULL, updated_at = :now, target = {release_target_sql(f'attempt > {SUSPECT_LOSSES}')},"
    " status = CASE request WHEN 'stop' THEN 'stopped' WHEN 'cancel' THEN 'cancelled' ELSE 'pending' END,"
    " ended_at = CASE WHEN request IS NOT NULL THEN :now END WHERE id = :id AND status = 'running'"
)


def _sweep(connection: sqlite3.Connection, limit: int) -> SweepResult:
    now = _now_microseconds()
    due = _promote_due(connection)
    expired = " WHERE status = 'running' AND lease_until < :now LIMIT :limit"
    connection.execute(_NAME_LOSSES + expired, {"now": now, "limit": limit})
    rows = connection.execute(
        f"{_RECLAIM} WHERE id IN (SELECT id FROM execution{expired}) RETURNING id, status, channel",
        {"now": now, "crashed": CRASHED_ERROR, "limit": limit, **_NO_LEAST},
    ).fetchall()
    has_pending = connection.execute("SELECT 1 FROM execution WHERE status = 'pending' LIMIT 1").fetchone()
    ended = {row[0]: row[2] for row in rows if row[1] in TERMINAL_STATUSES}
    return SweepResult(len(rows) - len(ended), ended, due, has_pending is not None)


def _reclaim(connection: sqlite3.Connection, owner_prefix: str, *, out_of_memory: bool) -> int:
    of_owner = " WHERE status = 'running' AND substr(lease_owner, 1, length(:owner)) = :owner"
    values = {"now": _now_microseconds(), "crashed": CRASHED_ERROR, "owner": owner_prefix, **_NO_LEAST}
    if out_of_memory:
        values["crashed"] = OUT_OF_MEMORY_ERROR
        isolated = f"SELECT 1 FROM execution{of_owner} AND isolated LIMIT 1"
        if connection.execute(isolated, {"owner": owner_prefix}).fetchone() is None:
            values |= {"least_isolation_losses": 1, "least_losses": SUSPECT_LOSSES}
    connection.execute(_NAME_LOSSES + of_owner, {"now": values["now"], "owner": owner_prefix})
    return connection.execute(_RECLAIM + of_owner, values).rowcount


def _release(connection: sqlite3.Connection, owner: str, held: Sequence[str]) -> int:
    rows = connection.execute(
        "SELECT id FROM execution WHERE status = 'running' AND lease_owner = ?", (owner,)
    ).fetchall()
    unheld = {row[0] for row in rows} - set(held)
    connection.executemany(
        _RELEASE, [{"now": _now_microseconds(), "id": execution_id} for execution_id in unheld]
    )
    return len(unheld)


def _return_direct(connection: sqlite3.Connection, keys: Sequence[ExecutionKey]) -> int:
    now = _now_microseconds()
    statement = f"{_RELEASE} AND token = {DIRECT_TOKEN}"
    return sum(connection.execute(statement, {"id": key.execution_id, "now": now}).rowcount for key in keys)


def _request_end(connection: sqlite3.Connection, key: ExecutionKey, request: str) -> EndRequestOutcome | None:
    """Record a `stop` or `cancel` request of a run, and return its state; a run without a valid lease ends at once.

    Its tasks are canceled then. An ended run does not change, and `stop` does not replace `cancel`. None for
    a missing run.
    """
    now = _now_microseconds()
    row = connection.execute(
        "UPDATE execution SET updated_at = :now,"
        " request = CASE WHEN request = 'cancel' THEN request ELSE :request END,"
        " token = CASE WHEN status = 'running' AND lease_until >= :now THEN token ELSE token + 1 END,"
        " ended_at = CASE WHEN status = 'running' AND lease_until >= :now THEN NULL ELSE :now END,"
        " lease_owner = CASE WHEN status = 'running' AND lease_until >= :now THEN lease_owner END,"
        " status = CASE WHEN status = 'running' AND lease_until >= :now THEN status"
        " WHEN request = 'cancel' THEN 'cancelled' ELSE :status END"
        " WHERE id = :id AND shard = :shard AND status IN ('pending', 'running', 'waiting')"
        " RETURNING status, lease_owner, channel, organization_id",
        {
            "now": now,
            "request": request,
            "id": key.execution_id,
            "shard": key.shard,
            "status": (ExecutionStatus.STOPPED if request == "stop" else ExecutionStatus.CANCELLED).value,
        },
    ).fetchone()
    if row is not None and row[0] in TERMINAL_STATUSES:
        connection.execute(_END_INTERVALS, {"now": now, "id": key.execution_id})
        connection.execute(_CANCEL_TASKS, {"now": now, "execution_id": key.execution_id})
    if row is None:
        row = connection.execute(
            "SELECT status, NULL, channel, organization_id FROM execution WHERE id = ? AND shard = ?", key
        ).fetchone()
    return None if row is None else EndRequestOutcome(ExecutionStatus(row[0]), *row[1:])
