"""Journal store on PostgreSQL: each batch is one statement, sent directly through asyncpg.

A statement is its own transaction and keeps no session state, so a transaction pooler may be in between.
Every statement but a claim can be repeated: inserted ids are made here, and updates name the token that they
replace.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import product
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
import msgspec

from engine.agents.agent_steps import AgentStep
from engine.run_records import NodeSpan, RunStatus, encode_error
from journal import run_rows
from journal.blocked_intervals import INTERVAL_COLUMNS_SQL, LEAST_MICROSECONDS
from journal.explanations.blockers import BlockerCode
from journal.postgresql.postgresql_inserts import PostgresqlInserts
from journal.postgresql.postgresql_text import NOW, lock_wait_sql, lookup_sql, transpose_rows, unnest_sql
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
from models import postgresql_sessions as sessions
from models.database import CONNECT_SECONDS, RETRIES, RETRY_SECONDS, STATEMENT_SECONDS
from models.errors import DatabaseUnavailable, LockWaitTimeout, PartialCommit
from models.execution import DELAYED_TARGET, ISOLATION_TARGETS, LIMITED_TARGET, SHARED_TARGET
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from models.loss_limits import MAX_ISOLATION_LOSSES, MAX_LOST_ATTEMPTS, SUSPECT_LOSSES
from models.postgresql_failures import DatabaseFailure, failure_of
from models.task_states import WORK_SINCE_SQL
from models.timestamps import from_microseconds, to_microseconds
from telemetry.process_activity import ACTIVITY, DATABASE

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from models.timestamps import DatabaseClock

T = TypeVar("T")

SESSION_SETTINGS = {
    "application_name": "pilotflame",
    # Planning would take almost half of the time of the statements of a run. A plan may have been made while the tables
    # were empty, so each statement is written such that only one plan is possible; `lookup_sql` says how.
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
    # Each statement is written for one index. With outdated statistics, or an index that was once larger, a
    # claim might read all pending runs again for each workflow.
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
}

BATCH_LOCK_MILLISECONDS = 500
"""Lock wait of a commit of many runs; after it, each run is written alone."""
LONE_LOCK_MILLISECONDS = 100
RENEW_PAUSES_SECONDS = (0.02, 0.1)
"""Pauses before a lease counts as locked. Its row is most likely being written by this same worker."""


async def connect_postgresql(url: URL, *, connections: int, clock: DatabaseClock) -> PostgreSQLStore:
    """Return a store with a pool of at most `connections`; connections open when statements need them.

    It raises nothing for an unreachable server before that. The store updates `clock` by the times of the server.
    """
    pool = await asyncpg.create_pool(
        sessions.driver_address(url),
        min_size=0,
        max_size=connections,
        # Behind a pooler that drops session settings, set them for the whole database.
        connect=partial(sessions.open_session, settings=SESSION_SETTINGS),
        timeout=CONNECT_SECONDS,
        command_timeout=STATEMENT_SECONDS,
        reset=_skip_reset,
    )
    return PostgreSQLStore(url, pool, clock)


async def _skip_reset(_connection: object) -> None:
    """Do nothing when a connection returns to the pool: no statement here changes its session."""


class PostgreSQLStore:
    """`JournalStore` on one PostgreSQL database."""

    def __init__(self, url: URL, pool: asyncpg.Pool[Any], clock: DatabaseClock) -> None:
        self.clock = clock
        self._url = url
        self._address = sessions.driver_address(url)
        self._pool = pool
        self._inserts = PostgresqlInserts(pool, self._fetch, self._repeat)

    async def accept(self, batch: Sequence[RunAcceptance]) -> Sequence[AcceptanceResult]:
        """Insert accepted runs; return, in the order of the batch, whether each is new, repeats an idempotency key, or
        was refused.

        See `JournalStore.accept`. Raises `DatabaseUnavailable`, as all methods do.
        """
        return await self._inserts.accept(batch)

    async def ingest(self, batch: Sequence[InboundRequest]) -> Sequence[IngestResult]:
        """Store inbound requests with their runs; return, in the order of the batch, whether each is new, repeats an
        idempotency key, or was refused.

        See `JournalStore.ingest`. Raises `DatabaseUnavailable`, as all methods do.
        """
        return await self._inserts.ingest(batch)

    async def claim(self, claim: ClaimQuery) -> Sequence[ClaimedRun]:
        """Take up to `limit` pending runs for a process: set lease and fencing token, and count the attempt.

        See `RunStore.claim`. Learns the database time. Raises `DatabaseUnavailable`; only a claim that was
        surely rolled back is repeated.
        """
        asked_at = monotonic()
        # A repeated claim would take other runs, and the first ones would have no executor.
        rows = await self._fetch(*_claim_statement(claim), may_repeat=_was_rolled_back)
        claimed = [decode_claim(row) for row in rows]
        self.clock.learn(claimed[0].claimed_at if claimed else None, asked_at)
        return claimed

    async def has_suspects(self, max_isolation_losses: int, target: str = SHARED_TARGET) -> bool:
        """Return whether suspects of a target (runs that lost several workers) wait to be run on trial.

        Those that lost more than `max_isolation_losses` workers on trial don't count.
        """
        return bool(
            await self._fetch(_HAS_SUSPECTS, ISOLATION_TARGETS.get(target, target), max_isolation_losses)
        )

    async def record(self, batch: Sequence[RunWrite], *, owner: str = "") -> frozenset[str]:
        """Write spans, logs and ends of runs; return the ids of runs whose fencing token was still valid.

        Other runs write nothing. See `RunStore.record`. Raises `PartialCommit` if locked rows prevent some
        writes, and `DatabaseUnavailable`.
        """
        batch = sorted(batch, key=lambda write: write.execution_id)
        try:
            return await self._record(_RECORD, batch, owner)
        except LockWaitTimeout as error:
            if len(batch) == 1:
                raise PartialCommit((), [batch[0].execution_id]) from error
        return await self._record_each(batch, owner)

    async def _record_each(self, batch: Sequence[RunWrite], owner: str) -> frozenset[str]:
        """Write run by run, so that a locked row delays only its own run; return the ids of runs with a valid
        token.

        Raises `PartialCommit` with the runs that were not written, if there are any.
        """
        held: set[str] = set()
        unwritten: set[str] = set()
        for number, write in enumerate(batch):
            try:
                held |= await self._record(_RECORD_ALONE, [write], owner)
            except LockWaitTimeout:
                unwritten.add(write.execution_id)
            except DatabaseUnavailable:
                unwritten.update(one.execution_id for one in batch[number:])
                break
        if unwritten:
            raise PartialCommit(held, unwritten)
        return frozenset(held)

    async def _record(
        self, statements: Mapping[tuple[bool, bool, bool], str], batch: Sequence[RunWrite], owner: str
    ) -> frozenset[str]:
        """Write a batch in one statement that covers its kinds of rows; return the ids of runs with a valid token.

        Raises `LockWaitTimeout` and `DatabaseUnavailable`.
        """
        attempts, blocked = attempt_rows(batch), blocked_rows(batch)
        metadata, asked = metadata_rows(batch), approval_rows(batch)
        tasks, cancelled, steps = task_rows(batch), cancelled_task_rows(batch), step_rows(batch)
        has_more = bool(metadata or asked or tasks or cancelled or steps)
        rows = await self._fetch(
            statements[bool(attempts), bool(blocked), has_more],
            *transpose_rows(map(_run_write_row, batch), len(_WRITE_TYPES)),
            *transpose_rows(span_rows(batch), len(SPAN_COLUMNS)),
            *transpose_rows(log_rows(batch), len(LOG_COLUMNS)),
            owner,
            *(transpose_rows(attempts, len(ATTEMPT_COLUMNS)) if attempts else ()),
            *(transpose_rows(blocked, len(_BLOCKED_TYPES)) if blocked else ()),
            *(transpose_rows(metadata, len(_METADATA_TYPES)) if has_more else ()),
            *(transpose_rows(asked, len(_APPROVAL_TYPES)) if has_more else ()),
            *(transpose_rows(tasks, len(_TASK_TYPES)) if has_more else ()),
            *(transpose_rows(cancelled, len(_APPROVAL_TYPES)) if has_more else ()),
            *(transpose_rows(steps, len(_STEP_TYPES)) if has_more else ()),
        )
        return frozenset(row[0] for row in rows)

    async def renew(
        self, held: Sequence[LeaseRenewal], lease_seconds: float, *, owner: str = ""
    ) -> Sequence[RenewalResult]:
        """Extend leases to `lease_seconds` from now; return a result for each that is still held, with requests to stop
        or cancel.

        A lease without a result is lost. Locked rows are tried three times within 0.2 seconds, and then returned as
        locked, not extended. Learns the database time.
        """
        left = sorted((lease.execution_id, lease.shard, lease.token) for lease in held)
        renewed: list[RenewalResult] = []
        for pause_seconds in (*RENEW_PAUSES_SECONDS, None):
            asked_at = monotonic()
            rows = await self._fetch(_RENEW, *transpose_rows(left, 3), int(lease_seconds * 1_000_000), owner)
            self.clock.learn(from_microseconds(rows[0][2]) if rows else None, asked_at)
            renewed += [RenewalResult(row[0], row[1]) for row in rows]
            returned = {row[0] for row in rows}
            left = [lease for lease in left if lease[0] not in returned]
            if left:
                ours = {row[0] for row in await self._fetch(_STILL_HELD, *transpose_rows(left, 3), owner)}
                left = [lease for lease in left if lease[0] in ours]
            if not left or pause_seconds is None:
                break
            await asyncio.sleep(pause_seconds)
        return [*renewed, *(RenewalResult(execution_id, None, is_locked=True) for execution_id, _, _ in left)]

    async def definitions(self, keys: Sequence[DefinitionKey]) -> dict[DefinitionKey, str]:
        """Return the JSON texts of definition snapshots by their keys; missing ones are left out. Raises
        `DatabaseUnavailable`.
        """
        rows = await self._fetch(_DEFINITIONS, *transpose_rows(keys, 3))
        return {DefinitionKey(row[0], row[1], row[2]): row[3] for row in rows}

    async def spans(self, keys: Sequence[ExecutionKey]) -> dict[str, list[NodeSpan]]:
        """Return the recorded spans of runs by execution id, in their order; an empty list for a run without spans.

        Another process continues the run from them.
        """
        asked = dict.fromkeys(keys)
        found: dict[str, list[NodeSpan]] = {key.execution_id: [] for key in asked}
        for row in await self._fetch(_SPANS, *transpose_rows(asked, 2)):
            found[row[0]].append(decode_span(row))
        return found

    async def steps(self, keys: Sequence[ExecutionKey]) -> dict[str, list[AgentStep]]:
        """Return all steps of those agents that have not ended, by execution id; see `RunStore.steps`."""
        found: dict[str, list[AgentStep]] = {}
        for row in await self._fetch(_STEPS, *transpose_rows(keys, 2)):
            found.setdefault(row[0], []).append(decode_step(row))
        return found

    async def last_log_lines(self, keys: Sequence[ExecutionKey]) -> dict[str, int]:
        """Return the highest sequence number of each run's log, by execution id; runs without a log are left out."""
        return {row[0]: row[1] for row in await self._fetch(_LAST_LOG_LINES, *transpose_rows(keys, 2))}

    async def progress(self, keys: Sequence[ExecutionKey]) -> Sequence[RunProgressReport]:
        """Return status, progress and error of runs, with the outputs of nodes of ended runs; unknown runs are left
        out.

        An output in a blob is its reference, and `references` has the ids of these nodes.
        """
        outputs: dict[str, list[tuple[str, str]]] = {}
        references: dict[str, list[str]] = {}
        rows = await self._fetch(_PROGRESS, *transpose_rows(dict.fromkeys(keys), 2))
        for row in rows:
            of_run = outputs.setdefault(row[0], [])
            if row[5] is not None:
                of_run.append((row[5], row[6]))
                if row[8]:
                    references.setdefault(row[0], []).append(row[5])
        firsts = {row[0]: row for row in reversed(rows)}
        return [
            RunProgressReport(
                row[0],
                ExecutionStatus(row[1]),
                *(row[2], row[3], row[4]),
                outputs[row[0]],
                row[7],
                references.get(row[0], ()),
            )
            for row in firsts.values()
        ]

    async def promote_due(self) -> int:
        """Make runs whose wait or delay has ended pending, except locked ones; return their number. See
        `RunStore.promote_due`.
        """
        return len(await self._fetch(_PROMOTE_DUE))

    async def sweep(self, limit: int) -> SweepResult:
        """Find runs whose lease has ended: up to `limit` become pending, or end; and make due runs pending.

        A run ends that was asked to stop or cancel, or lost too many workers. The result has the numbers, the ended
        ids, and whether pending runs wait.
        """
        # Before due runs: a run of a dead worker has waited longest, for the end of its lease and then for
        # this sweep.
        rows = await self._fetch(_SWEEP, limit, CRASHED_ERROR)
        due = await self.promote_due()
        pending = await self._fetch(_HAS_PENDING)
        ended = {row[0]: row[2] for row in rows if row[1] in TERMINAL_STATUSES}
        return SweepResult(len(rows) - len(ended), ended, due, bool(pending))

    async def reclaim(self, owner_prefix: str, *, out_of_memory: bool = False) -> int:
        """Reclaim the runs of dead owners whose names begin with `owner_prefix`; return their number. See
        `JournalStore.reclaim`.

        After a lack of memory, the loss counts against the runs unless one of them was on trial.
        """
        if not out_of_memory:
            return len(await self._fetch(_RECLAIM_OWNER, owner_prefix, CRASHED_ERROR, False))  # noqa: FBT003 - an argument of the statement
        counts = not await self._fetch(_HAD_TRIAL, owner_prefix)
        return len(await self._fetch(_RECLAIM_OWNER, owner_prefix, OUT_OF_MEMORY_ERROR, counts))

    async def release(self, owner: str, held: Sequence[str]) -> int:
        """Make the running runs of a process pending, except those with ids in `held`; return their number.

        Runs with a request to stop or cancel end instead, and count too. The claims do not count as attempts.
        """
        return len(await self._fetch(_RELEASE, owner, list(held)))

    async def return_direct(self, keys: Sequence[ExecutionKey]) -> int:
        """Make assigned runs pending that their worker has not received; return their number. See
        `JournalStore.return_direct`.
        """
        return len(await self._fetch(_RETURN_DIRECT, [key.execution_id for key in keys]))

    async def request_end(self, key: ExecutionKey, request: str) -> EndRequestOutcome | None:
        """Request a run to `stop` or `cancel`; a run that no process holds ends at once.

        Return its status after that, and its lease owner, channel and organization; None for an unknown run. An ended
        run stays as it is, and a request to cancel is never replaced.
        """
        status = ExecutionStatus.STOPPED if request == "stop" else ExecutionStatus.CANCELLED
        rows = await self._fetch(_REQUEST_END, *key, request, status.value)
        if not rows:
            rows = await self._fetch(
                "SELECT status, NULL, channel, organization_id FROM execution WHERE id = $1 AND shard = $2",
                *key,
            )
        return EndRequestOutcome(ExecutionStatus(rows[0][0]), *rows[0][1:]) if rows else None

    async def for_thread(self) -> PostgreSQLStore:
        """Return a store with one connection of its own, on the running loop."""
        return await connect_postgresql(self._url, connections=1, clock=self.clock)

    async def close(self) -> None:
        """Close the connections after their statements in progress; after ten seconds, cut them off."""
        try:
            await asyncio.wait_for(self._pool.close(), CONNECT_SECONDS)
        except TimeoutError:
            self._pool.terminate()

    async def _fetch(
        self,
        statement: str,
        *arguments: object,
        may_repeat: Callable[[Exception], bool] = lambda _error: True,
    ) -> list[Any]:
        """Run one statement, and repeat it after failures that `may_repeat` allows; return the rows.

        Raises `DatabaseUnavailable` and `LockWaitTimeout`.
        """

        async def fetch() -> list[Any]:
            rows: list[Any] = await self._pool.fetch(statement, *arguments)
            return rows

        return await self._repeat(fetch, may_repeat)

    async def _repeat(
        self, work: Callable[[], Awaitable[T]], may_repeat: Callable[[Exception], bool] = lambda _error: True
    ) -> T:
        """Run work, again after failures that are temporary and that `may_repeat` allows, for some seconds; return its
        result.

        Raises `DatabaseUnavailable` then, and `LockWaitTimeout` at once.
        """
        begun_at = monotonic()
        for attempt in range(1, RETRIES + 1):
            try:
                with sessions.guard_server(self._address):
                    return await work()
            except (
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncpg.InternalClientError,
                OSError,
                TimeoutError,
            ) as error:
                failure = _translate_failure(error)
                if failure is None:
                    raise
                if failure is DatabaseFailure.LOCK_NOT_AVAILABLE:
                    raise LockWaitTimeout("Another transaction holds a lock that this one needs") from error
                is_late = monotonic() - begun_at > RETRY_SECONDS
                if attempt == RETRIES or is_late or not may_repeat(error):
                    ACTIVITY.note_failure(DATABASE, error)
                    raise DatabaseUnavailable("PostgreSQL did not confirm the statement") from error
            await asyncio.sleep(random.uniform(0, 0.02 * 2**attempt))  # noqa: S311 - spreads concurrent retries
        raise AssertionError


def _translate_failure(error: Exception) -> DatabaseFailure | None:
    if isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError):
        # The driver's own error for a connection that ended during a statement. A `ValueError` is about an
        # argument.
        return None if isinstance(error, ValueError) else DatabaseFailure.UNAVAILABLE
    return failure_of(error)


def _was_rolled_back(error: Exception) -> bool:
    """Return whether the server has certainly rolled the statement back, so that it can be repeated safely."""
    return failure_of(error) is DatabaseFailure.ROLLED_BACK


# ── claim ─────────────────────────────────────────────────────────────────────────────────────────

# Organizations with pending runs, and the turns of their workflows, take one index probe each, however many
# rows wait: the first above the previous one, or the first of all after the last, until the circle is closed.
# OFFSET 0 keeps the planner from inlining each probe several times, which more than doubles its time.
_PENDING = f"SELECT {{column}} FROM execution WHERE {run_rows.pending_sql('$1')}"


def _next_organization_sql(after: str) -> str:
    first = _PENDING.format(column="organization_id")
    order = "ORDER BY organization_id, queue_turn LIMIT 1"  # an order that no other index has
    return f"SELECT coalesce(({first} AND organization_id > {after} {order}), ({first} {order})) OFFSET 0"


def _next_turn_sql(least: str) -> str:
    first = _PENDING.format(column="queue_turn") + " AND organization_id = organization.id"
    order = "ORDER BY queue_turn LIMIT 1"
    return f"SELECT coalesce(({first} AND queue_turn >= {least} {order}), ({first} {order})) OFFSET 0"


def _claim_update_sql(also: str = "") -> str:
    """Return the SQL that ends a claim statement: it updates the runs of `chosen`, and returns them in the
    order of its column `place`.

    `also` has further assignments.
    """
    return f"""
), taken AS (
    UPDATE execution SET status = 'running', token = token + 1, attempt = attempt + 1, is_fresh = false,
        lease_owner = $5, lease_until = {NOW} + $6::bigint, started_at = coalesce(started_at, {NOW}),
        updated_at = {NOW}, deadline_at = coalesce(deadline_at, {NOW} + timeout_microseconds){also}
    -- An array of ids, an expression instead of the bare column, and a value for each row below: with outdated
    -- statistics, the planner would scan whole tables to find the few chosen rows.
    WHERE id = ANY (ARRAY(SELECT id FROM chosen)) AND status || '' = 'pending'
    RETURNING *
), resumed AS (
    -- Runs without an earlier attempt have no interval to end, and cost nothing here.
    UPDATE blocked_interval SET ended_at = coalesce(ended_at, {NOW}), resumed_at = {NOW}
    WHERE execution_id = ANY (ARRAY(SELECT id FROM taken WHERE has_journal)) AND resumed_at IS NULL
)
SELECT taken.id, shard, organization_id, workflow_id, definition_hash, token, attempt, key_id, has_journal,
    (SELECT trigger FROM execution_data AS data WHERE data.execution_id = taken.id AND data.shard = taken.shard),
    started_at, deadline_at, request, channel, user_id, wait_answer_count, concurrency_key, completion_action,
    write_key_id, trace_origin, is_tainted, is_share_used_up, updated_at
FROM taken JOIN chosen ON chosen.id = taken.id ORDER BY place
"""


_CLAIM = f"""
WITH RECURSIVE circle (id, first, place) AS (
    SELECT start.id, start.id, 1 FROM ({_next_organization_sql("$2")}) AS start (id)
    WHERE start.id IS NOT NULL
    UNION ALL
    SELECT next.id, circle.first, circle.place + 1
    FROM circle, LATERAL ({_next_organization_sql("circle.id")}) AS next (id)
    WHERE next.id <> circle.first AND circle.place < $4::integer + cardinality($7::text[])
), organization AS MATERIALIZED (
    SELECT id, place, ceil($4::numeric / count(*) OVER ())::integer AS share FROM circle
    WHERE id <> ALL ($7::text[])
), chosen AS MATERIALIZED (
    SELECT best.id, row_number() OVER (ORDER BY organization.place, workflow.place) AS place,
        count(*) OVER (PARTITION BY organization.place, workflow.place) = workflow.share AS is_share_used_up
    FROM organization, LATERAL (
        WITH RECURSIVE circle (queue_turn, first, place) AS (
            SELECT start.queue_turn, start.queue_turn, 1
            FROM ({_next_turn_sql("coalesce(($3::jsonb ->> organization.id)::smallint, 0)")}) AS start (queue_turn)
            WHERE start.queue_turn IS NOT NULL
            UNION ALL
            SELECT next.queue_turn, circle.first, circle.place + 1
            FROM circle, LATERAL ({_next_turn_sql("circle.queue_turn + 1")}) AS next (queue_turn)
            WHERE next.queue_turn <> circle.first AND circle.place < organization.share
        )
        SELECT queue_turn, ceil(organization.share::numeric / count(*) OVER ())::integer AS share, place FROM circle
    ) AS workflow, LATERAL (
        {_PENDING.format(column="id")} AND organization_id = organization.id AND queue_turn = workflow.queue_turn
            AND {run_rows.IS_NO_SUSPECT_SQL}
        ORDER BY {", ".join(run_rows.CLAIM_ORDER)} LIMIT workflow.share FOR UPDATE SKIP LOCKED
    ) AS best
    ORDER BY organization.place, workflow.place LIMIT $4::integer
{_claim_update_sql()}"""
_IS_SUSPECT = run_rows.suspect_sql("$2::smallint")
_HAS_SUSPECTS = f"{_PENDING.format(column='1')} AND {_IS_SUSPECT} LIMIT 1"
_CLAIM_FOR_TRIAL = f"""
WITH chosen AS MATERIALIZED (
    SELECT id, row_number() OVER () AS place, false AS is_share_used_up FROM (
        {_PENDING.format(column="id")} AND {_IS_SUSPECT}
        ORDER BY {", ".join(run_rows.TRIAL_ORDER)} LIMIT $4::integer FOR UPDATE SKIP LOCKED
    ) AS best
{_claim_update_sql(", isolated = true, target = $3::text")}"""


def _claim_statement(claim: ClaimQuery) -> tuple[Any, ...]:
    """Return the statement of a claim, for trial or normal, followed by its arguments."""
    lease = claim.owner, int(claim.lease_seconds * 1_000_000)
    if claim.is_trial:
        queue = ISOLATION_TARGETS.get(claim.target, claim.target)
        return (_CLAIM_FOR_TRIAL, queue, claim.max_isolation_losses, claim.target, claim.limit, *lease)
    turns = msgspec.json.encode(claim.turns).decode()
    return (
        _CLAIM,
        claim.target,
        claim.after_organization,
        turns,
        claim.limit,
        *lease,
        list(claim.excluded_organizations),
    )


# ── record and renew ──────────────────────────────────────────────────────────────────────────────

_WRITE_TYPES = (
    "text",
    "smallint",
    "bigint",
    "text",
    "text",
    "integer",
    "smallint",
    "boolean",
    "boolean",
    "text",
    "bigint",
    "integer",
    "boolean",
)
_SPAN_TYPES = (
    *("text", "text", "text", "smallint", "text", "integer", "text", "text", "text", "text", "integer"),
    *(
        "bigint",
        "bigint",
        "bigint",
        "text",
        "text",
        "text",
        "text",
        "text",
        "text",
        "text",
        "bytea",
        *("text", "text", "text", "text", "text", "text"),
    ),
)
_LOG_TYPES = ("text", "integer", "smallint", "text", "text", "text", "text", "bigint")
_FIRST_SPAN = len(_WRITE_TYPES) + 1
_FIRST_LOG = _FIRST_SPAN + len(_SPAN_TYPES)
_OWNER = _FIRST_LOG + len(_LOG_TYPES)
_ATTEMPT_TYPES = (
    *("text", "text", "text", "integer", "smallint", "text", "integer", "text", "text", "text"),
    *("bigint", "bigint", "bigint", "text"),
)
_NEW_ATTEMPTS = f"""
, new_attempt AS (
    INSERT INTO attempt_span ({", ".join(ATTEMPT_COLUMNS)})
    SELECT written.* FROM unnest({unnest_sql(_OWNER + 1, _ATTEMPT_TYPES)}) AS written ({", ".join(ATTEMPT_COLUMNS)})
    JOIN held ON held.id = written.execution_id
    ON CONFLICT ({", ".join(ATTEMPT_KEY)}) DO UPDATE SET {ATTEMPT_CHANGES}
)
"""
"""Only in statements for batches with attempts of nodes: most batches have none and should not pay for it."""
_BLOCKED_TYPES = ("text", "text", "text")
_NEW_INTERVALS = """
, new_interval AS (
    INSERT INTO blocked_interval ({columns})
    SELECT held.id, {now}, held.shard, held.organization_id,
        CASE WHEN held.status = 'waiting' THEN blocked.code ELSE '{queued}' END,
        blocked.node_id, CASE WHEN held.status = 'waiting' THEN NULL ELSE {now} END
    FROM unnest({blocked}) AS blocked (execution_id, code, node_id)
    JOIN held ON held.id = blocked.execution_id
    WHERE held.status IN ('waiting', 'pending')
    ON CONFLICT DO NOTHING
)
"""
"""Only in statements for batches with runs that wait or are released, like `_NEW_ATTEMPTS`."""
_METADATA_TYPES = ("text", "smallint", "text", "text")
_NEW_METADATA = """
, metadata AS (
    SELECT written.* FROM unnest({types}) AS written (execution_id, shard, key, value)
    JOIN held ON held.id = written.execution_id
), old_metadata AS (
    DELETE FROM execution_label AS old USING metadata
    WHERE old.execution_id = metadata.execution_id AND old.key = metadata.key AND old.value <> metadata.value
), new_metadata AS (
    INSERT INTO execution_label (execution_id, key, value, shard, organization_id, created_at)
    SELECT data.execution_id, metadata.key, metadata.value, data.shard, data.organization_id, data.created_at
    FROM metadata JOIN execution_data AS data
        ON data.execution_id = metadata.execution_id AND data.shard = metadata.shard
    ON CONFLICT DO NOTHING
), new_approval AS (
    INSERT INTO approval_request (execution_id, node_id, iteration, shard, organization_id, round, attempts, due_at,
        created_at)
    SELECT held.id, asked.node_id, asked.iteration, held.shard, held.organization_id, 0, 0, {now}, {now}
    FROM unnest({approvals}) AS asked (execution_id, node_id, iteration)
    JOIN held ON held.id = asked.execution_id
    ON CONFLICT DO NOTHING
), new_task AS (
    INSERT INTO task ({task_columns}) SELECT {task_values}
    FROM unnest({tasks}) AS given ({given_columns})
    JOIN held ON held.id = given.execution_id
    ON CONFLICT DO NOTHING
), cancelled_task AS (
    {cancel} AND (execution_id, node_id, iteration) IN (
        SELECT gone.execution_id, gone.node_id, gone.iteration
        FROM unnest({cancelled}) AS gone (execution_id, node_id, iteration)
        JOIN held ON held.id = gone.execution_id)
), new_step AS (
    INSERT INTO execution_step ({step_columns})
    SELECT written.* FROM unnest({steps}) AS written ({step_columns})
    JOIN held ON held.id = written.execution_id
    ON CONFLICT ({step_key}) DO UPDATE SET {step_changes}
)
"""
"""Only in statements for batches with runs whose nodes have set metadata, ask people by mail, have tasks or steps."""
_APPROVAL_TYPES = ("text", "text", "text")
_TASK_TYPES = (
    *("text", "text", "text", "text", "text", "text", "text", "text", "text", "text", "text", "text"),
    *("integer", "bigint", "bigint", "smallint", "bigint", "bigint", "boolean", "text", "integer", "text"),
    *("bigint", "boolean", "boolean"),
)
_STEP_TYPES = (
    *("text", "text", "text", "integer", "smallint", "text", "integer", "text", "text", "text"),
    *("integer", "integer", "text", "text", "text", "text", "text", "text", "text"),
    *("bigint", "text", "bigint", "bigint", "integer"),
)
# A run that got an answer while it was running doesn't wait: the next executor that claims it reads the
# answer.
_ENDS_WAITING = "(write.status = 'waiting' AND execution.wait_answer_count <= write.wait_answer_count)"
_RECORD_TEMPLATE = f"""
WITH held AS (
    UPDATE execution SET
        status = CASE WHEN write.move = 'continues' THEN execution.status
            WHEN write.move = 'ends' THEN write.status
            WHEN request = 'stop' THEN 'stopped' WHEN request = 'cancel' THEN 'cancelled'
            WHEN {_ENDS_WAITING} THEN 'waiting' ELSE 'pending' END,
        ended_at = CASE WHEN write.move = 'ends' OR (write.move = 'releases' AND request IS NOT NULL)
            THEN {NOW} END,
        error = write.error,
        completed_nodes = write.completed_nodes,
        progress = greatest(execution.progress, write.progress),
        has_journal = true,
        -- A new result clears the attempts lost before it; the present attempt still counts.
        attempt = CASE WHEN write.move = 'releases' THEN 0 WHEN write.has_new_result THEN 1 ELSE attempt END,
        isolation_losses = CASE WHEN write.move = 'releases' OR write.has_new_result THEN 0 ELSE isolation_losses END,
        isolated = isolated AND write.move = 'continues' AND NOT (write.has_new_result OR write.has_passed),
        due_at = CASE WHEN {_ENDS_WAITING} THEN write.due_at END,
        -- A wait stops the clock of the run's timeout: the remaining time is stored as a time since 1970.
        deadline_at = CASE WHEN {_ENDS_WAITING} THEN deadline_at - {NOW} ELSE deadline_at END,
        target = CASE
            WHEN write.move = 'releases' AND concurrency_key IS NOT NULL AND NOT write.keeps_place
            THEN '{LIMITED_TARGET}' ELSE target
        END,
        token = CASE WHEN write.move = 'releases' THEN execution.token + 1 ELSE execution.token END,
        lease_owner = CASE WHEN write.move = 'continues' THEN lease_owner END,
        lease_until = CASE WHEN write.move = 'continues' THEN lease_until END,
        updated_at = {NOW}
    FROM unnest({unnest_sql(1, _WRITE_TYPES)}) AS write (
        id, shard, token, move, status, completed_nodes, progress, has_new_result, has_passed, error, due_at,
        wait_answer_count, keeps_place)
    -- The array and the expression leave one index to choose, as in a claim.
    WHERE execution.id = ANY ($1::text::text[])
        AND execution.id = write.id AND execution.shard = write.shard AND execution.token = write.token
        AND execution.status || '' = 'running' AND (${_OWNER}::text = '' OR execution.lease_owner = ${_OWNER})
        AND {{lock_wait}}
    RETURNING execution.id, execution.shard, execution.organization_id, execution.status, execution.workflow_id,
        execution.queue_turn, execution.rank
), new_span AS (
    INSERT INTO span ({", ".join(SPAN_COLUMNS)})
    SELECT written.* FROM unnest({unnest_sql(_FIRST_SPAN, _SPAN_TYPES)}) AS written ({", ".join(SPAN_COLUMNS)})
    JOIN held ON held.id = written.execution_id
    ON CONFLICT ({", ".join(SPAN_KEY)}) DO UPDATE SET
    {", ".join(f"{column} = excluded.{column}" for column in SPAN_COLUMNS if column not in SPAN_FIXED_COLUMNS)}
), new_log AS (
    INSERT INTO log_line ({", ".join(LOG_COLUMNS)})
    SELECT written.* FROM unnest({unnest_sql(_FIRST_LOG, _LOG_TYPES)}) AS written ({", ".join(LOG_COLUMNS)})
    JOIN held ON held.id = written.execution_id
    ON CONFLICT DO NOTHING
)
{{attempts}}
{{intervals}}
{{metadata}}
SELECT id FROM held
"""


def _record_statements(lock_milliseconds: int) -> Mapping[tuple[bool, bool, bool], str]:
    """Return the statements that record a batch, by whether it has attempts of nodes, blocked runs, and metadata,
    approvals, tasks or steps.

    `lock_milliseconds` limits the wait for locked rows.
    """
    statements: dict[tuple[bool, bool, bool], str] = {}
    for has_attempts, has_blocked, has_metadata in product((False, True), repeat=3):
        first_blocked = _OWNER + 1 + (len(_ATTEMPT_TYPES) if has_attempts else 0)
        first_metadata = first_blocked + (len(_BLOCKED_TYPES) if has_blocked else 0)
        first_approval = first_metadata + len(_METADATA_TYPES)
        first_task = first_approval + len(_APPROVAL_TYPES)
        first_cancelled = first_task + len(_TASK_TYPES)
        metadata = _NEW_METADATA.format(
            types=unnest_sql(first_metadata, _METADATA_TYPES),
            approvals=unnest_sql(first_approval, _APPROVAL_TYPES),
            tasks=unnest_sql(first_task, _TASK_TYPES),
            cancelled=unnest_sql(first_cancelled, _APPROVAL_TYPES),
            steps=unnest_sql(first_cancelled + len(_APPROVAL_TYPES), _STEP_TYPES),
            step_columns=", ".join(STEP_COLUMNS),
            step_key=", ".join(STEP_KEY),
            step_changes=STEP_CHANGES,
            task_columns=", ".join(TASK_INSERT_COLUMNS),
            given_columns=", ".join(TASK_COLUMNS),
            task_values=task_values_sql("given", "held", NOW, "true", "false"),
            cancel=cancel_tasks_sql(NOW),
            now=NOW,
        )
        statements[has_attempts, has_blocked, has_metadata] = _RECORD_TEMPLATE.format(
            lock_wait=lock_wait_sql(lock_milliseconds),
            attempts=_NEW_ATTEMPTS if has_attempts else "",
            intervals=_new_intervals_sql(first_blocked) if has_blocked else "",
            metadata=metadata if has_metadata else "",
        )
    return statements


def _new_intervals_sql(first: int) -> str:
    return _NEW_INTERVALS.format(
        columns=INTERVAL_COLUMNS_SQL,
        now=NOW,
        queued=BlockerCode.QUEUED_BEHIND.value,
        blocked=unnest_sql(first, _BLOCKED_TYPES),
    )


_RECORD = _record_statements(BATCH_LOCK_MILLISECONDS)
_RECORD_ALONE = _record_statements(LONE_LOCK_MILLISECONDS)
_HELD_LEASES = f"""
execution JOIN unnest({unnest_sql(1, ("text", "smallint", "bigint"))}) AS held (id, shard, token)
    ON execution.id = held.id AND execution.shard = held.shard AND execution.token = held.token
WHERE execution.id = ANY ($1::text::text[]) AND status || '' = 'running'
    AND ({{owner}}::text = '' OR lease_owner = {{owner}})
"""
_RENEW = f"""
UPDATE execution SET lease_until = {NOW} + $4::bigint
WHERE id = ANY (ARRAY(
    SELECT execution.id FROM {_HELD_LEASES.format(owner="$5")} FOR NO KEY UPDATE OF execution SKIP LOCKED))
RETURNING id, request, {NOW}
"""
_STILL_HELD = f"SELECT execution.id FROM {_HELD_LEASES.format(owner='$4')}"


def _run_write_row(write: RunWrite) -> tuple[Any, ...]:
    if write.end is None:
        move, status = "continues", None
    else:
        move = "releases" if write.end in {RunStatus.WAITING, RunStatus.RELEASED} else "ends"
        status = STATUS_AFTER[write.end].value
    return (
        write.execution_id,
        write.shard,
        write.token,
        move,
        status,
        write.completed_nodes,
        write.progress,
        write.has_new_result,
        write.has_passed,
        encode_error(write.error),
        to_microseconds(write.due_at) if write.due_at else None,
        write.wait_answer_count if move == "releases" else None,
        write.keeps_place,
    )


# ── read ──────────────────────────────────────────────────────────────────────────────────────────

_DEFINITIONS = f"""
SELECT asked.*, found.body FROM unnest({unnest_sql(1, ("text", "text", "smallint"))})
    AS asked (organization_id, hash, shard),
    {lookup_sql("definition", "organization_id", "hash", "shard")} AS found
"""
_ASKED = f"unnest({unnest_sql(1, ('text', 'smallint'))}) AS asked"
_SPANS = f"""
SELECT {", ".join(f"found.{column}" for column in SPAN_COLUMNS)} FROM {_ASKED} (execution_id, shard),
    {lookup_sql("span", "execution_id", "shard")} AS found
ORDER BY found.execution_id, found.sequence
"""
_STEPS = f"""
SELECT {", ".join(f"step.{column}" for column in STEP_COLUMNS)} FROM {_ASKED} (execution_id, shard),
    {lookup_sql("execution_step", "execution_id", "shard")} AS step
    LEFT JOIN span USING ({", ".join(SPAN_KEY)})
WHERE span.ended_at IS NULL
ORDER BY step.number
"""
_LAST_LOG_LINES = f"""
SELECT asked.execution_id, max(found.sequence) FROM {_ASKED} (execution_id, shard),
    {lookup_sql("log_line", "execution_id", "shard")} AS found
GROUP BY asked.execution_id
"""
_PROGRESS = f"""
SELECT run.id, run.status, run.completed_nodes, run.total_nodes, run.error, result.node_id,
    coalesce(result.output, result.output_blob), run.progress, result.output IS NULL
FROM {_ASKED} (id, shard), {lookup_sql("execution", "id", "shard")} AS run
LEFT JOIN LATERAL (
    SELECT * FROM span WHERE execution_id = run.id AND shard = run.shard AND run.ended_at IS NOT NULL
        AND ended_at IS NOT NULL AND iteration = '' AND coalesce(output, output_blob) IS NOT NULL OFFSET 0
) AS result ON true
"""

# ── sweep ─────────────────────────────────────────────────────────────────────────────────────────


def _skip_locked_sql(condition: str, limit: str = "") -> str:
    """Return the SQL condition that selects rows with a condition, up to the LIMIT clause `limit`, and locks them;
    locked rows are skipped.
    """
    # An array is evaluated once; a subquery may run again for each row, and select other rows each time.
    return (
        f"id = ANY (ARRAY(SELECT id FROM execution WHERE {condition} {limit} FOR NO KEY UPDATE SKIP LOCKED))"
    )


_PROMOTE_DUE = f"""
WITH due AS MATERIALIZED (
    SELECT id, shard, organization_id, target, is_fresh, due_at, updated_at FROM execution
    WHERE status = 'waiting' AND due_at <= {NOW} FOR NO KEY UPDATE SKIP LOCKED
), new_interval AS (
    INSERT INTO blocked_interval ({INTERVAL_COLUMNS_SQL})
    SELECT id, updated_at, shard, organization_id,
        CASE target WHEN '{DELAYED_TARGET}' THEN '{BlockerCode.TIMER}' ELSE '{BlockerCode.WINDOW_CLOSED}' END,
        NULL, {NOW}
    -- The release of held runs has added their interval, and set both times to the same moment.
    FROM due WHERE is_fresh AND due_at > updated_at + {LEAST_MICROSECONDS}
    ON CONFLICT DO NOTHING
), ended AS (
    UPDATE blocked_interval SET ended_at = {NOW}
    WHERE execution_id = ANY (ARRAY(SELECT id FROM due WHERE NOT is_fresh)) AND ended_at IS NULL
)
UPDATE execution SET status = 'pending', due_at = NULL, updated_at = {NOW},
    deadline_at = deadline_at + coalesce({WORK_SINCE_SQL}, {NOW}),
    target = CASE target
        WHEN '{DELAYED_TARGET}' THEN coalesce(assigned_deployment_id, '{SHARED_TARGET}') ELSE target
    END
WHERE id = ANY (ARRAY(SELECT id FROM due)) RETURNING id
"""
_ISOLATION_LOSSES = "isolation_losses + CASE WHEN isolated THEN 1 ELSE 0 END"
_HAS_CRASHED = f"(attempt >= {MAX_LOST_ATTEMPTS} OR {_ISOLATION_LOSSES} >= {MAX_ISOLATION_LOSSES})"
_IS_NEXT_ISOLATED = (
    f"request IS NULL AND NOT {_HAS_CRASHED} AND greatest(attempt, {{least_losses}}) >= {SUSPECT_LOSSES}"
)
_RECLAIM = f"""
UPDATE execution SET token = token + 1, lease_owner = NULL, lease_until = NULL, updated_at = {NOW},
    has_journal = true, isolated = false, isolation_losses = greatest({_ISOLATION_LOSSES}, {{least_isolation_losses}}),
    attempt = greatest(attempt, {{least_losses}}),
    status = CASE WHEN request = 'stop' THEN 'stopped' WHEN request = 'cancel' THEN 'cancelled'
        WHEN {_HAS_CRASHED} THEN 'failed' ELSE 'pending' END,
    ended_at = CASE WHEN request IS NOT NULL OR {_HAS_CRASHED} THEN {NOW} END,
    error = CASE
        WHEN request IS NULL AND {_HAS_CRASHED} THEN replace($2::text, '{LOSS_PLACEHOLDER}', attempt::text)
    END,
    target = {release_target_sql(_IS_NEXT_ISOLATED)}
"""
# The leases of an owner that is known to be dead end at once, often before their time. An interval may begin where
# the last one ended: its start, which is its key, is never its end.
_FIND_LOST = f"""
WITH lost AS MATERIALIZED (
    SELECT id, shard, organization_id, lease_until FROM execution
    WHERE status = 'running' AND {{condition}} FOR NO KEY UPDATE SKIP LOCKED
), new_interval AS (
    INSERT INTO blocked_interval ({INTERVAL_COLUMNS_SQL})
    SELECT id, least(lease_until, {NOW} - 1), shard, organization_id, '{BlockerCode.WORKER_LOST}', NULL, {NOW} FROM lost
    ON CONFLICT DO NOTHING
)
"""
_SWEEP = f"""
{_FIND_LOST.format(condition=f"lease_until < {NOW} LIMIT $1::integer")}
{_RECLAIM.format(least_isolation_losses=0, least_losses=0)}
WHERE id = ANY (ARRAY(SELECT id FROM lost))
RETURNING id, status, channel
"""
_HAD_TRIAL = (
    "SELECT 1 FROM execution WHERE status = 'running' AND starts_with(lease_owner, $1) AND isolated LIMIT 1"
)
_COUNT_LOSS = "CASE WHEN $3::boolean THEN {} ELSE 0 END"
_RECLAIM_OWNER = f"""
{_FIND_LOST.format(condition="starts_with(lease_owner, $1)")}
{_RECLAIM.format(least_isolation_losses=_COUNT_LOSS.format(1), least_losses=_COUNT_LOSS.format(SUSPECT_LOSSES))}
WHERE id = ANY (ARRAY(SELECT id FROM lost))
RETURNING id
"""
_RELEASE_RUNS = f"""
UPDATE execution SET token = token + 1, attempt = attempt - 1, isolated = false, lease_owner = NULL,
    lease_until = NULL, updated_at = {NOW}, target = {release_target_sql(f"attempt > {SUSPECT_LOSSES}")},
    status = CASE request WHEN 'stop' THEN 'stopped' WHEN 'cancel' THEN 'cancelled' ELSE 'pending' END,
    ended_at = CASE WHEN request IS NOT NULL THEN {NOW} END
"""
_RELEASE = f"""
{_RELEASE_RUNS}
WHERE {_skip_locked_sql("status = 'running' AND lease_owner = $1 AND id <> ALL($2::text[])")}
RETURNING id
"""
_RETURN_DIRECT = f"""
{_RELEASE_RUNS}
WHERE {_skip_locked_sql(f"id = ANY ($1::text[]) AND status || '' = 'running' AND token = {DIRECT_TOKEN}")}
RETURNING id
"""
# In the order of the index of pending runs: otherwise a table full of ended runs might be scanned from its
# start.
_HAS_PENDING = (
    "SELECT 1 FROM execution WHERE status = 'pending' ORDER BY target, organization_id, queue_turn LIMIT 1"
)
_IS_HELD = f"(status = 'running' AND lease_until >= {NOW})"
_REQUEST_END = f"""
WITH requested AS (
UPDATE execution SET updated_at = {NOW},
    request = CASE WHEN request = 'cancel' THEN request ELSE $3::text END,
    token = CASE WHEN {_IS_HELD} THEN token ELSE token + 1 END,
    ended_at = CASE WHEN {_IS_HELD} THEN NULL ELSE {NOW} END,
    lease_owner = CASE WHEN {_IS_HELD} THEN lease_owner END,
    status = CASE WHEN {_IS_HELD} THEN status WHEN request = 'cancel' THEN 'cancelled' ELSE $4::text END
WHERE id = $1 AND shard = $2 AND status IN ('pending', 'running', 'waiting')
    AND {lock_wait_sql(sessions.LOCK_WAIT_MILLISECONDS)}
RETURNING id, status, lease_owner, channel, ended_at, organization_id
), cancelled_task AS (
    {cancel_tasks_sql(NOW)}
        AND execution_id = ANY (ARRAY(SELECT id FROM requested WHERE ended_at IS NOT NULL))
), ended AS (
    UPDATE blocked_interval SET ended_at = {NOW}
    WHERE execution_id = ANY (ARRAY(SELECT id FROM requested WHERE ended_at IS NOT NULL))
        AND blocked_interval.ended_at IS NULL
)
SELECT status, lease_owner, channel, organization_id FROM requested
"""
