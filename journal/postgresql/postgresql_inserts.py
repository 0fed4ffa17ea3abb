"""Row insertion of accepted runs and inbound requests on PostgreSQL, with one statement per batch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from journal.concurrency_limits import advisory_lock_id
from journal.postgresql.postgresql_text import NOW, lock_wait_sql, lookup_sql, transpose_rows, unnest_sql
from journal.run_rows import TOUCH_INTERVAL_MICROSECONDS, split_rivals
from journal.store import (
    DIRECT_LEASE_SECONDS,
    DIRECT_TOKEN,
    AcceptanceResult,
    AcceptanceVerdict,
    ExecutionKey,
    InboundRequest,
    IngestResult,
    RunAcceptance,
)
from models.execution import (
    DELAYED_TARGET,
    LIMITED_TARGET,
    PRIORITY_MICROSECONDS,
    SHARED_TARGET,
    UNPARSED_TARGET,
)
from models.ids import turn_of_workflow
from models.postgresql_sessions import LOCK_WAIT_MILLISECONDS, timeout_statement
from models.timestamps import from_microseconds, to_microseconds

if TYPE_CHECKING:
    import asyncpg

    from journal.store import IdempotencyKey

T = TypeVar("T")
FetchRows = Callable[..., Awaitable[list[Any]]]


class RepeatWork(Protocol):
    """Function that runs work and retries it after a failure that a retry may cure."""

    async def __call__(self, work: Callable[[], Awaitable[T]], /) -> T: ...


class PostgresqlInserts:
    """Inserter of runs and deliveries for one store."""

    def __init__(
        self,
        pool: asyncpg.Pool[Any],
        fetch: FetchRows,
        repeat: RepeatWork,
    ) -> None:
        self._pool = pool
        self._fetch = fetch
        self._repeat = repeat

    # ── runs ────────────────────────────────────────────────────────────────────────────────────────────────

    async def accept(self, batch: Sequence[RunAcceptance]) -> Sequence[AcceptanceResult]:
        """Insert runs with their definitions and keys; return answers in the order of the batch.

        Runs that need a free slot at once are inserted one by one, each in a transaction. An answer tells
        whether the run is new, repeats a key, or was refused. Raises `DatabaseUnavailable`.
        """
        answers: dict[str, AcceptanceResult] = {}
        for item in batch:
            if not item.may_wait:
                answers |= await self._accept_within_limit(item)
        waiting = [item for item in batch if item.may_wait]
        while waiting:
            # A statement can insert a key once: other runs with the key go into the next statement and find
            # it taken.
            first = {_conflict_order(item): item for item in reversed(waiting)}
            chosen = sorted(first.values(), key=_conflict_order)
            waiting = [item for item in waiting if first[_conflict_order(item)] is not item]
            answers |= await self._accept(chosen)
        return [answers[item.execution_id] for item in batch]

    async def _accept_within_limit(self, item: RunAcceptance) -> dict[str, AcceptanceResult]:
        """Insert a run only if its concurrency key has a free slot; return its answer by execution id.

        Without one the verdict is FULL, unless its idempotency key was used before. Raises
        `DatabaseUnavailable`.
        """

        async def insert() -> list[Any] | None:
            async with self._pool.acquire() as connection, connection.transaction():
                if await _lock_free_slots(connection, item) < 1:
                    return None
                rows: list[Any] = await connection.fetch(_ACCEPT, *_bind_acceptances([item]))
                return rows

        rows = await self._repeat(insert)
        if rows:
            return {item.execution_id: AcceptanceResult(AcceptanceVerdict.ACCEPTED, item.execution_id)}
        answers = await self._explain_refusals([item])
        if rows is None and answers[item.execution_id].verdict is AcceptanceVerdict.STALE:
            return {item.execution_id: AcceptanceResult(AcceptanceVerdict.FULL, item.execution_id)}
        return answers

    async def _accept(self, batch: Sequence[RunAcceptance]) -> dict[str, AcceptanceResult]:
        """Insert runs in one statement, and return their answers by execution id, with reasons for those that
        were not inserted.
        """
        rows = await self._fetch(_ACCEPT, *_bind_acceptances(batch))
        answers = {row[0]: _accepted(*row) for row in rows}
        refused = [item for item in batch if item.execution_id not in answers]
        if refused:
            answers |= await self._explain_refusals(refused)
        return answers

    async def _explain_refusals(self, batch: Sequence[RunAcceptance]) -> dict[str, AcceptanceResult]:
        """Return the answers for runs that a statement has not inserted, by execution id.

        They were accepted by an attempt with a lost answer, repeat an idempotency key, or were built from an
        old revision of their workflow.
        """
        earlier = await self._read_earlier_keys([(item.shard, item.idempotency) for item in batch])
        own = {
            row[0]
            for row in await self._fetch(
                _ACCEPTED, *transpose_rows([_execution_key(item) for item in batch], 2)
            )
        }
        return {item.execution_id: _acceptance_refusal(item, earlier, own) for item in batch}

    async def _read_earlier_keys(
        self, asked: Sequence[tuple[int, IdempotencyKey | None]]
    ) -> dict[tuple[Any, ...], tuple[str, str]]:
        """Return fingerprint and resource id of those keys that exist and have not expired, by shard, scope and key."""
        keys = [(shard, key.scope, key.key) for shard, key in asked if key]
        found = await self._fetch(_EARLIER_KEYS, *transpose_rows(keys, 3)) if keys else []
        return {tuple(row)[:3]: (row[3], row[4]) for row in found}

    # ── inbound requests ────────────────────────────────────────────────────────────────────────────────────

    async def ingest(self, batch: Sequence[InboundRequest]) -> Sequence[IngestResult]:
        """Store inbound requests with their runs; return answers, as `JournalStore.ingest`, in the order of the batch.

        Requests that share idempotency keys are stored one after another, and so are requests with runs that need a
        free slot at once. Raises `DatabaseUnavailable`.
        """
        answers: dict[str, IngestResult] = {}
        waiting: Sequence[InboundRequest] = batch
        while waiting:
            chosen, waiting = split_rivals(waiting)
            deferrable = [one for one in chosen if all(run.may_wait for run in one.runs)]
            if deferrable:
                rows = await self._fetch(_INGEST, *_bind_ingest_writes(deferrable))
                answers |= await self._ingest_results(deferrable, rows)
            for one in chosen:
                if any(not run.may_wait for run in one.runs):
                    answers |= await self._ingest_within_limit(one)
        return [answers[one.delivery_id] for one in batch]

    async def _ingest_within_limit(self, write: InboundRequest) -> dict[str, IngestResult]:
        """Store an inbound request without those runs that need a free slot and get none, which are answered FULL.

        If no run gets a slot, and there is no event, neither delivery nor key is stored, so that the request may be
        repeated. Return its result by delivery id. Raises `DatabaseUnavailable`.
        """
        full: set[str] = set()

        async def insert() -> list[Any]:
            full.clear()
            immediate = sorted(
                (run for run in write.runs if not run.may_wait), key=lambda run: run.concurrency_key or ""
            )
            async with self._pool.acquire() as connection, connection.transaction():
                free: dict[str | None, int] = {}
                for run in immediate:
                    if run.concurrency_key not in free:
                        free[run.concurrency_key] = await _lock_free_slots(connection, run)
                    free[run.concurrency_key] -= 1
                    if free[run.concurrency_key] < 0:
                        full.add(run.execution_id)
                rows: list[Any] = await connection.fetch(_INGEST, *_bind_ingest_writes([write], without=full))
                return rows

        rows = await self._repeat(insert)
        return await self._ingest_results([write], rows, full)

    async def _ingest_results(
        self, batch: Sequence[InboundRequest], rows: Sequence[Any], full: Collection[str] = ()
    ) -> dict[str, IngestResult]:
        """Return the results of inbound requests by delivery id, by `rows`: the ids of the deliveries and runs that
        were inserted.

        Runs in `full` had no free slot. Raises `DatabaseUnavailable`.
        """
        returned = {row[0]: row[1] for row in rows}
        missing = [one for one in batch if one.delivery_id not in returned]
        answers = await self._explain_missing(missing) if missing else {}
        kept = [one for one in batch if one.delivery_id not in answers]
        kept += [one for one in missing if answers[one.delivery_id].verdict is AcceptanceVerdict.ACCEPTED]
        unknown = [run for one in kept for run in one.runs if run.execution_id not in returned]
        refusals = await self._explain_refusals(unknown) if unknown else {}
        for run in unknown:
            if run.execution_id in full and refusals[run.execution_id].verdict is AcceptanceVerdict.STALE:
                refusals[run.execution_id] = AcceptanceResult(AcceptanceVerdict.FULL, run.execution_id)
        for one in kept:
            runs = [
                refusals.get(run.execution_id) or _accepted(run.execution_id, returned[run.execution_id])
                for run in one.runs
            ]
            answers[one.delivery_id] = IngestResult(AcceptanceVerdict.ACCEPTED, one.delivery_id, runs)
        return answers

    async def _explain_missing(self, batch: Sequence[InboundRequest]) -> dict[str, IngestResult]:
        """Return the answers for deliveries that a statement has not inserted, by delivery id.

        They were stored by an attempt with a lost answer, repeat an idempotency key, or were built from an
        old revision.
        """
        bound = await self._read_earlier_keys([(one.shard, one.idempotency) for one in batch])
        found = await self._fetch(
            _STORED_DELIVERIES, *transpose_rows([(one.delivery_id, one.shard) for one in batch], 2)
        )
        own = {row[0] for row in found}
        return {one.delivery_id: _ingest_refusal(one, bound, own) for one in batch}


async def _lock_free_slots(connection: Any, item: RunAcceptance) -> int:  # noqa: ANN401 - the pool's proxy has no type
    """Lock a concurrency key until the transaction ends, and return how many of its slots no run holds or awaits;
    negative if more runs do than the limit allows.
    """
    # A statement of its own, so that the next one sees the commit of the previous holder.
    await connection.execute(
        f"{timeout_statement()}, pg_advisory_xact_lock($1)", advisory_lock_id(item.concurrency_key or "")
    )
    live: int = await connection.fetchval(_LIVE_RUNS, item.concurrency_key)
    return (item.concurrency_limit or 0) - live


# ── statements ──────────────────────────────────────────────────────────────────────────────────────────────

_LEASE = int(DIRECT_LEASE_SECONDS * 1_000_000)
_RUN_TYPES = (
    *("text", "smallint", "text", "text", "integer", "text", "text", "text", "text", "text"),
    *("bigint", "integer", "bigint", "smallint", "text", "text", "text", "bigint", "text"),
    *("text", "text", "integer", "text", "integer", "text", "text", "boolean", "boolean", "text", "text"),
)
_RUN_COLUMNS = """
        id, shard, organization_id, workflow_id, revision, user_id, trigger_type, trigger, config, definition_hash,
        timeout, total_nodes, advance, queue_turn, scope, key, fingerprint, lifetime, channel, parent_id, root_id,
        depth, concurrency_key, concurrency_limit, completion_action, assigned_deployment_id, is_private,
        is_tainted, trace_origin, worker"""
_DEFINITION_TYPES = ("text", "text", "smallint", "text")
_LABEL_TYPES = ("text", "text", "text")
_INGESTED_RUN_TYPES = (*_RUN_TYPES, "text", "bigint", "boolean")
_INGESTED_RUN_COLUMNS = f"{_RUN_COLUMNS}, delivery_id, delay_until, is_unread"
_INGEST_TYPES = (
    *("text", "smallint", "text", "text", "text", "text", "text", "text", "integer", "text", "smallint"),
    *("text", "text", "text", "text", "text", "text", "text", "text", "bigint"),
    *("text", "text", "text", "bigint", "boolean"),
)


def _definitions_sql(first: int) -> str:
    return f"""
    INSERT INTO definition (organization_id, hash, shard, body, created_at)
    SELECT d.*, {NOW} FROM unnest({unnest_sql(first, _DEFINITION_TYPES)}) AS d
    -- A new use renews the age, to the hour, so that retention won't delete the definition before its use.
    ON CONFLICT (organization_id, hash) DO UPDATE SET created_at = excluded.created_at
    WHERE definition.created_at < excluded.created_at - {TOUCH_INTERVAL_MICROSECONDS}"""


def _idempotency_sql(table: str) -> str:
    """Return SQL that stores the idempotency keys of new rows in `idempotency`, with the ids of these rows.

    `table` names the common table expression of the new rows. A key whose entry in `idempotency` has not expired
    is left alone, an expired one is taken over. The SQL yields the ids of rows that got their keys; rows without
    a key are skipped.
    """
    return f"""
    INSERT INTO idempotency AS earlier (shard, scope, key, fingerprint, resource_id, expires_at)
    SELECT shard, scope, key, fingerprint, id, {NOW} + lifetime FROM {table}
    WHERE key IS NOT NULL ORDER BY shard, scope, key
    ON CONFLICT (shard, scope, key) DO UPDATE
    SET fingerprint = excluded.fingerprint, resource_id = excluded.resource_id, expires_at = excluded.expires_at
    WHERE earlier.expires_at <= {NOW}
    RETURNING resource_id"""


def _run_inserts_sql(status: str, target: str, due_at: str, since: str, first_label: int) -> str:
    """Return SQL for common table expressions that insert the runs of the table `winner`: labels, data, executions.

    `target` (possible executors), `due_at` (end of a delay) and `since` (start of the wait in the queue) are SQL
    expressions for each run; `status` is one for runs without an assigned worker, as others are running. Labels
    begin at the parameter number `first_label`.
    """
    return f"""label AS (
    INSERT INTO execution_label (execution_id, key, value, shard, organization_id, created_at)
    SELECT winner.id, label.key, label.value, winner.shard, winner.organization_id, {NOW}
    FROM unnest({unnest_sql(first_label, _LABEL_TYPES)}) AS label (execution_id, key, value)
    JOIN winner ON winner.id = label.execution_id
    ON CONFLICT DO NOTHING
), data AS (
    INSERT INTO execution_data (execution_id, shard, trigger, config, organization_id, workflow_id, created_at)
    SELECT id, shard, trigger, config, organization_id, workflow_id, {NOW} FROM winner ON CONFLICT DO NOTHING
), inserted AS (
    INSERT INTO execution (id, shard, organization_id, workflow_id, user_id, status, target, trigger_type,
        definition_hash, rank, queue_turn, is_fresh, token, attempt, timeout_microseconds, completed_nodes, total_nodes,
        key_id, has_journal, channel, created_at, updated_at, parent_id, root_id, depth, wait_answer_count,
        concurrency_key, concurrency_limit, completion_action, assigned_deployment_id, is_private, is_tainted, due_at,
        trace_origin, lease_owner, lease_until, started_at, deadline_at)
    SELECT id, shard, organization_id, workflow_id, user_id,
        CASE WHEN worker IS NULL THEN {status} ELSE 'running' END, {target}, trigger_type,
        definition_hash, {since} - advance, queue_turn, worker IS NULL,
        CASE WHEN worker IS NULL THEN 0 ELSE {DIRECT_TOKEN} END, (worker IS NOT NULL)::integer, timeout, 0, total_nodes,
        id, false, channel, {NOW}, {NOW}, parent_id, root_id, coalesce(depth, 0), 0, concurrency_key,
        concurrency_limit, completion_action, assigned_deployment_id, coalesce(is_private, false),
        coalesce(is_tainted, false), {due_at}, trace_origin, worker,
        CASE WHEN worker IS NOT NULL THEN {NOW} + {_LEASE} END,
        CASE WHEN worker IS NOT NULL THEN {NOW} END, CASE WHEN worker IS NOT NULL THEN {NOW} + timeout END
    FROM winner ON CONFLICT DO NOTHING
    RETURNING id, started_at
)"""


_CURRENT = """
    SELECT item.* FROM item, LATERAL (
        SELECT id FROM workflow WHERE id = item.workflow_id AND shard = item.shard AND revision = item.revision
            AND organization_id = item.organization_id AND deleted_at IS NULL OFFSET 0
    ) AS unchanged"""
_UNLIMITED_TARGET = f"coalesce(assigned_deployment_id, '{SHARED_TARGET}')"
_TARGET = f"CASE WHEN concurrency_key IS NULL THEN {_UNLIMITED_TARGET} ELSE '{LIMITED_TARGET}' END"
_ACCEPT = f"""
WITH item AS (
    SELECT * FROM unnest({unnest_sql(1, _RUN_TYPES)}) AS item ({_RUN_COLUMNS})
    WHERE {lock_wait_sql(LOCK_WAIT_MILLISECONDS)}
), new_definition AS ({_definitions_sql(len(_RUN_TYPES) + 1)}
), current AS ({_CURRENT}
), kept AS ({_idempotency_sql("current")}
), winner AS (
    SELECT * FROM current WHERE key IS NULL OR id IN (SELECT resource_id FROM kept)
), {_run_inserts_sql("'pending'", _TARGET, "NULL::bigint", NOW, len(_RUN_TYPES) + len(_DEFINITION_TYPES) + 1)}
SELECT id, started_at FROM inserted
"""
_FIRST_INGEST = len(_INGESTED_RUN_TYPES) + len(_DEFINITION_TYPES) + 1
_INGEST = f"""
WITH item AS (
    SELECT * FROM unnest({unnest_sql(1, _INGESTED_RUN_TYPES)}) AS item ({_INGESTED_RUN_COLUMNS})
    WHERE {lock_wait_sql(LOCK_WAIT_MILLISECONDS)}
), arrival AS (
    SELECT * FROM unnest({unnest_sql(_FIRST_INGEST, _INGEST_TYPES)}) AS arrival (
        id, shard, organization_id, workflow_id, user_id, route, sender, content_hash, content_bytes, outcome, status,
        execution_id, event_id, event_type, event_source, event_data, answer, redriven_from, reason, not_before,
        scope, key, fingerprint, lifetime, brings_runs)
), new_definition AS ({_definitions_sql(len(_INGESTED_RUN_TYPES) + 1)}
), current AS ({_CURRENT}
), stale AS (
    SELECT delivery_id FROM item WHERE id NOT IN (SELECT id FROM current)
), whole AS (
    SELECT * FROM arrival WHERE id NOT IN (SELECT delivery_id FROM stale)
), kept_arrival AS ({_idempotency_sql("whole")}
), fresh AS (
    SELECT * FROM whole WHERE key IS NULL OR id IN (SELECT resource_id FROM kept_arrival)
), open AS (
    SELECT * FROM current WHERE delivery_id IN (SELECT id FROM fresh)
), kept AS ({_idempotency_sql("open")}
), winner AS (
    SELECT * FROM open WHERE key IS NULL OR id IN (SELECT resource_id FROM kept)
), {
    _run_inserts_sql(
        "CASE WHEN delay_until IS NULL THEN 'pending' ELSE 'waiting' END",
        f"CASE WHEN is_unread THEN '{UNPARSED_TARGET}' WHEN concurrency_key IS NULL AND delay_until IS NOT NULL"
        f" THEN '{DELAYED_TARGET}' ELSE {_TARGET} END",
        "delay_until",
        f"coalesce(delay_until, {NOW})",
        _FIRST_INGEST + len(_INGEST_TYPES),
    )
}, new_event AS (
    INSERT INTO event (id, shard, organization_id, user_id, event_type, source, data, created_at)
    SELECT event_id, shard, organization_id, user_id, event_type, event_source, event_data, {NOW} FROM fresh
    WHERE event_id IS NOT NULL ON CONFLICT DO NOTHING
), new_delivery AS (
    INSERT INTO delivery (id, shard, organization_id, workflow_id, user_id, route, sender, content_hash, content_bytes,
        outcome, status, execution_id, event_id, answer, redriven_from, reason, not_before, created_at)
    SELECT id, shard, organization_id, workflow_id, user_id, route, sender, content_hash, content_bytes,
        outcome, status, execution_id, event_id,
        CASE WHEN execution_id IS NULL AND event_id IS NULL AND brings_runs THEN
            (SELECT json_agg(winner.id ORDER BY winner.id) FROM winner WHERE winner.delivery_id = fresh.id)::text
        ELSE answer END, redriven_from, reason, not_before, {NOW} FROM fresh
    -- A request without new runs is a duplicate; the first delivery has the details.
    WHERE id IN (SELECT delivery_id FROM winner) OR NOT brings_runs OR event_id IS NOT NULL
    ON CONFLICT DO NOTHING
)
SELECT id, NULL::bigint FROM fresh UNION ALL SELECT id, started_at FROM inserted
"""
_LIVE_RUNS = f"""
SELECT (SELECT count(*) FROM execution WHERE concurrency_key = $1 AND target <> '{LIMITED_TARGET}' AND ended_at IS NULL)
    + (SELECT count(*) FROM execution WHERE concurrency_key = $1 AND target = '{LIMITED_TARGET}' AND status = 'pending')
"""
_EARLIER_KEYS = f"""
SELECT asked.*, found.fingerprint, found.resource_id
FROM unnest({unnest_sql(1, ("smallint", "text", "text"))}) AS asked (shard, scope, key),
    {lookup_sql("idempotency", "shard", "scope", "key")} AS found
WHERE found.expires_at > {NOW}
"""
_ACCEPTED = f"""
SELECT found.id FROM unnest({unnest_sql(1, ("text", "smallint"))}) AS asked (id, shard),
    {lookup_sql("execution", "id", "shard")} AS found
"""
_STORED_DELIVERIES = f"""
SELECT found.id FROM unnest({unnest_sql(1, ("text", "smallint"))}) AS asked (id, shard),
    {lookup_sql("delivery", "id", "shard")} AS found
"""


def _accepted(execution_id: str, started_at: int | None) -> AcceptanceResult:
    """Return the answer of an inserted run; `started_at` is given for one that is assigned to a worker."""
    started = None if started_at is None else from_microseconds(started_at)
    return AcceptanceResult(AcceptanceVerdict.ACCEPTED, execution_id, started)


def _acceptance_row(item: RunAcceptance) -> tuple[Any, ...]:
    """Return the values of a run that is accepted, in the order of the statement's columns; times are in
    microseconds.
    """
    key = item.idempotency
    return (
        item.execution_id,
        item.shard,
        item.organization_id,
        item.workflow_id,
        item.workflow_revision,
        item.user_id,
        item.trigger_type,
        item.trigger,
        item.config,
        item.definition_hash,
        int(item.timeout_seconds * 1_000_000),
        item.total_nodes,
        item.priority * PRIORITY_MICROSECONDS,
        turn_of_workflow(item.workflow_id),
        key.scope if key else None,
        key.key if key else None,
        key.fingerprint if key else None,
        key.lifetime_seconds * 1_000_000 if key else None,
        item.channel,
        item.parent_id,
        item.root_id,
        item.depth or None,
        item.concurrency_key,
        item.concurrency_limit,
        item.completion_action,
        item.assigned_deployment_id,
        item.is_private or None,
        item.is_tainted or None,
        item.trace_origin,
        item.worker or None,
    )


def _bind_acceptances(batch: Sequence[RunAcceptance]) -> list[str]:
    rows = map(_acceptance_row, batch)
    return [*transpose_rows(rows, len(_RUN_TYPES)), *_distinct_definitions(batch), *_transpose_labels(batch)]


def _bind_ingest_writes(batch: Sequence[InboundRequest], *, without: Collection[str] = ()) -> list[str]:
    """Return the parameters of `_INGEST` for inbound requests and their runs, except the runs whose ids are in
    `without`.
    """
    runs = [(run, one.delivery_id) for one in batch for run in one.runs if run.execution_id not in without]
    rows = [
        (
            *_acceptance_row(run),
            delivery_id,
            to_microseconds(run.delay_until) if run.delay_until else None,
            None if run.is_read else True,
        )
        for run, delivery_id in runs
    ]
    ingest_rows = sorted(_ingest_row(one, without) for one in batch)
    return [
        *transpose_rows(rows, len(_INGESTED_RUN_TYPES)),
        *_distinct_definitions([run for run, _ in runs]),
        *transpose_rows(ingest_rows, len(_INGEST_TYPES)),
        *_transpose_labels([run for run, _ in runs]),
    ]


def _transpose_labels(batch: Sequence[RunAcceptance]) -> list[str]:
    rows = [(item.execution_id, *label) for item in batch for label in item.labels]
    return transpose_rows(rows, len(_LABEL_TYPES))


def _ingest_row(one: InboundRequest, without: Collection[str]) -> tuple[Any, ...]:
    """Return the values of an inbound request, in the order of the statement's columns.

    Its idempotency key is left out if it has runs and no event, and all its runs are in `without`, so that the sender
    may repeat it.
    """
    event, key = one.event, one.idempotency
    if event is None and one.runs and all(run.execution_id in without for run in one.runs):
        key = None  # no run was accepted, so the sender may repeat the request
    return (
        one.delivery_id,
        one.shard,
        one.organization_id,
        one.workflow_id,
        one.user_id,
        one.route,
        one.sender,
        one.content_hash,
        one.content_bytes,
        one.outcome,
        one.status,
        one.runs[0].execution_id if len(one.runs) == 1 else None,
        event.event_id if event else None,
        event.event_type if event else None,
        event.source if event else None,
        event.data if event else None,
        one.answer,
        one.redriven_from,
        one.reason,
        to_microseconds(one.not_before) if one.not_before else None,
        key.scope if key else None,
        key.key if key else None,
        key.fingerprint if key else None,
        key.lifetime_seconds * 1_000_000 if key else None,
        bool(one.runs),
    )


def _distinct_definitions(batch: Sequence[RunAcceptance]) -> list[str]:
    rows = {
        (item.organization_id, item.definition_hash, item.shard, item.definition)
        for item in batch
        if item.definition is not None
    }
    return transpose_rows(sorted(rows), 4)


def _conflict_order(item: RunAcceptance) -> tuple[str, str]:
    """Return the idempotency key, or else the run's id, by which acceptances conflict; statements insert in
    this order.
    """
    key = item.idempotency
    return (key.scope, key.key) if key else ("", item.execution_id)


def _execution_key(item: RunAcceptance) -> ExecutionKey:
    return ExecutionKey(item.execution_id, item.shard)


def _acceptance_refusal(
    item: RunAcceptance, earlier: dict[tuple[Any, ...], tuple[str, str]], own: set[str]
) -> AcceptanceResult:
    """Return the answer for a run that was not inserted: accepted if an earlier attempt inserted it (`own`), else
    repeated, mismatched or stale.

    `earlier` has the fingerprint and resource id of stored idempotency keys by shard, scope and key.
    """
    if item.execution_id in own:
        return AcceptanceResult(AcceptanceVerdict.ACCEPTED, item.execution_id)
    key = item.idempotency
    found = earlier.get((item.shard, key.scope, key.key)) if key else None
    if key is None or found is None:
        return AcceptanceResult(AcceptanceVerdict.STALE, item.execution_id)
    fingerprint, execution_id = found
    return AcceptanceResult(
        AcceptanceVerdict.REPEATED if fingerprint == key.fingerprint else AcceptanceVerdict.MISMATCH,
        execution_id,
    )


def _ingest_refusal(
    one: InboundRequest, earlier: dict[tuple[Any, ...], tuple[str, str]], own: set[str]
) -> IngestResult:
    """Return the answer for a delivery that was not inserted: accepted if an earlier attempt stored it (`own`), else
    repeated, mismatched or stale.

    `earlier` has the fingerprint and resource id of stored idempotency keys by shard, scope and key.
    """
    if one.delivery_id in own:
        # Stored by an attempt whose answer was lost.
        return IngestResult(AcceptanceVerdict.ACCEPTED, one.delivery_id)
    key = one.idempotency
    found = earlier.get((one.shard, key.scope, key.key)) if key else None
    if key is None or found is None:
        return IngestResult(AcceptanceVerdict.STALE, one.delivery_id)
    fingerprint, delivery_id = found
    if delivery_id == one.delivery_id:
        return IngestResult(AcceptanceVerdict.ACCEPTED, delivery_id)
    return IngestResult(
        AcceptanceVerdict.REPEATED if fingerprint == key.fingerprint else AcceptanceVerdict.MISMATCH,
        delivery_id,
    )
