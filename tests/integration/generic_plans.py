"""Cost of the statements of the run path with plans that were made for an empty database and kept since."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from unittest import mock

import asyncpg

from engine.run_records import AttemptSpan, LogLine, NodeSpan, SpanStatus
from journal.postgresql.postgresql_store import SESSION_SETTINGS
from journal.store import ClaimQuery, DefinitionKey, ExecutionKey, IdempotencyKey, RunAcceptance
from tests.integration.run_database import OwnedWorkflow, RunDatabase, lease_of, write

RUNS = 50
ROWS_AT_ONCE = 20_000
NOW = datetime(2026, 1, 1, tzinfo=UTC)
TABLES = (
    "execution",
    "execution_data",
    "span",
    "attempt_span",
    "log_line",
    "idempotency",
    "definition",
    "workflow",
)

SentStatement = tuple[str, tuple[Any, ...]]


async def collect_statements(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> dict[str, SentStatement]:
    """Take 50 new runs along the run path, and return its statements with their arguments, by name."""
    sent: list[SentStatement] = []
    fetch = asyncpg.Pool.fetch

    async def record_and_fetch(pool: Any, statement: str, *arguments: Any) -> Any:  # noqa: ANN401 - asyncpg's own
        sent.append((statement, arguments))
        return await fetch(pool, statement, *arguments)

    store = run_database.store
    runs = [_run(owned_workflow, number) for number in range(RUNS)]
    keys = [ExecutionKey(run.execution_id, run.shard) for run in runs]
    found: dict[str, SentStatement] = {}
    with mock.patch.object(asyncpg.Pool, "fetch", record_and_fetch):
        await store.accept(runs)
        found["accept"] = sent[-1]
        claimed = await store.claim(ClaimQuery("worker", 600.0, RUNS))
        found["claim"] = sent[-1]
        await store.definitions(
            [DefinitionKey(runs[0].organization_id, runs[0].definition_hash, runs[0].shard)]
        )
        found["definitions"] = sent[-1]
        sent.clear()
        await store.renew([lease_of(one) for one in claimed], 600.0)
        found["renew"] = sent[0]
        spans = [NodeSpan(node, node, "set", SpanStatus.COMPLETED, 1, NOW, NOW, output=b"1") for node in "ab"]
        lines = [LogLine("info", "a line", None, 2, NOW)]
        await store.record([write(one, spans=spans, logs=lines) for one in claimed])
        found["record"] = sent[-1]
        attempts = [AttemptSpan("a", "a", "set", "", 1, SpanStatus.FAILED, 1, NOW)]
        await store.record([write(one, spans=spans, attempts=attempts) for one in claimed])
        found["record attempts"] = sent[-1]
        await store.progress(keys)
        found["read"] = sent[-1]
        await store.spans(keys)
        found["recover"] = sent[-1]
        await store.last_log_lines(keys)
        found["recover logs"] = sent[-1]
        await store.ingest(
            [owned_workflow.inbound(_run(owned_workflow, RUNS + number)) for number in range(RUNS)]
        )
        found["ingest"] = sent[-1]
        sent.clear()
        await store.release("worker", [])
        found["release"] = sent[-1]
        sent.clear()
        await store.sweep(100)
        found |= dict(zip(("sweep", "promote due runs", "look for pending runs"), sent, strict=True))
    return found


def _run(owned_workflow: OwnedWorkflow, number: int) -> RunAcceptance:
    return owned_workflow.run(idempotency=IdempotencyKey("caller", f"key {number}", "fingerprint"))


async def multiply_rows(run_database: RunDatabase, times: int, organizations: int) -> None:
    """Copy one row of each table of the run path `times` times: half as runs that have ended, half as pending ones.

    The copies are spread over so many organizations.
    """
    organization = "'organization_id', 'org_' || n % CAST(:organizations AS integer)"
    changes = {
        "workflow": "'id', 'wf_x' || n",
        "definition": f"'hash', 'hash' || n, {organization}",
        "idempotency": "'key', 'other key ' || n",
        "execution": (
            f"'id', 'exec_x' || n, {organization}, 'workflow_id', 'wf_x' || n,"
            " 'queue_turn', n % 1024, 'rank', n, 'lease_owner', NULL, 'is_fresh', true, 'attempt', 0,"
            " 'lease_until', NULL, 'status', CASE n % 2 WHEN 0 THEN 'pending' ELSE 'completed' END,"
            " 'ended_at', CASE n % 2 WHEN 1 THEN n END"
        ),
        "execution_data": f"'execution_id', 'exec_x' || n, {organization}",
        "span": "'execution_id', 'exec_x' || n, 'id', 'span_x' || n",
        "attempt_span": "'execution_id', 'exec_x' || n, 'id', 'span_x' || n",
        "log_line": "'execution_id', 'exec_x' || n, 'id', 'log_x' || n",
    }
    for table, changed in changes.items():
        for first in range(1, times + 1, ROWS_AT_ONCE):
            parameters = {"first": first, "last": min(first + ROWS_AT_ONCE, times + 1) - 1}
            if ":organizations" in changed:
                parameters["organizations"] = organizations
            await run_database.query(
                f"INSERT INTO {table} SELECT copy.* FROM {table} AS one,"
                " generate_series(CAST(:first AS integer), CAST(:last AS integer)) AS n,"
                f" LATERAL jsonb_populate_record(one, jsonb_build_object({changed})) AS copy"
                f" WHERE one.ctid = (SELECT ctid FROM {table} LIMIT 1)",
                **parameters,
            )


async def measure_rows_read(
    run_database: RunDatabase, url: str, rows: int, organizations: int, statistics: str
) -> dict[str, dict[str, float]]:
    """Return the number of rows that each statement reads for 50 runs, by table, beside so many other rows.

    `statistics` are `missing`, `stale` (of empty tables), or `fresh`; plans are made when they are gathered.
    """
    async with open_generic_plans(url) as plans:
        for table in TABLES:
            # Statistics that autovacuum gathers meanwhile would discard the plans.
            await run_database.query(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
        statements = await collect_statements(run_database, await run_database.workflow())
        if statistics != "fresh":
            await run_database.clear()
            if statistics == "stale":
                await vacuum(url)
            await plans.prepare(statements)
            await collect_statements(run_database, await run_database.workflow())
        await multiply_rows(run_database, rows, organizations)
        if statistics == "fresh":
            await vacuum(url)
            await plans.prepare(statements)
        sent = await collect_statements(run_database, await run_database.workflow())
        return {name: await plans.rows_read(name, arguments) for name, (_, arguments) in sent.items()}


class GenericPlans:
    """Prepared statements on one connection with the settings of the run path; each keeps its first plan."""

    def __init__(self, connection: Any) -> None:  # noqa: ANN401 - asyncpg's own
        self._connection = connection
        self._names: dict[str, str] = {}

    async def prepare(self, sent: dict[str, SentStatement]) -> None:
        """Prepare statements under their names, and let the server make their plans, which it keeps."""
        for number, (name, (statement, arguments)) in enumerate(sent.items()):
            self._names[name] = f"statement_{number}"
            await self._connection.execute(f"PREPARE statement_{number} AS {statement}")
            await self._explain(name, arguments, "FORMAT JSON")

    async def rows_read(self, name: str, arguments: Sequence[Any]) -> dict[str, float]:
        """Execute a prepared statement, roll it back, and return the number of rows that it read, by table."""
        transaction = self._connection.transaction()
        await transaction.start()
        try:
            plan = await self._explain(name, arguments, "ANALYZE, FORMAT JSON")
        finally:
            await transaction.rollback()
        read: dict[str, float] = {}
        for node in plan_nodes(plan):
            if "Scan" in node["Node Type"] and node.get("Relation Name") in TABLES:
                rows = node["Actual Rows"] + sum(
                    node.get(f"Rows Removed by {reason}", 0) for reason in ("Filter", "Index Recheck")
                )
                table = node["Relation Name"]
                read[table] = read.get(table, 0) + rows * node["Actual Loops"]
        return read

    async def _explain(self, name: str, arguments: Sequence[Any], options: str) -> dict[str, Any]:
        """Return the plan of a prepared statement with these arguments, by EXPLAIN with `options`."""
        types = await self._connection.fetchval(
            "SELECT parameter_types::text[] FROM pg_prepared_statements WHERE name = $1", self._names[name]
        )
        # EXECUTE takes no parameters, so each argument becomes a literal.
        quoted = ", ".join(
            f"quote_nullable(${number}::{kind}::text) || '::{kind}'" for number, kind in enumerate(types, 1)
        )
        literals = await self._connection.fetchrow(f"SELECT {quoted}", *arguments) if types else ()
        called = self._names[name] + (f"({', '.join(literals)})" if literals else "")
        (explained,) = json.loads(await self._connection.fetchval(f"EXPLAIN ({options}) EXECUTE {called}"))
        plan: dict[str, Any] = explained["Plan"]
        return plan


def plan_nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all nodes of a plan of PostgreSQL, the root first."""
    return [plan, *(node for inner in plan.get("Plans", []) for node in plan_nodes(inner))]


@asynccontextmanager
async def open_generic_plans(url: str) -> AsyncIterator[GenericPlans]:
    """Open a connection with the settings of the run path, for prepared statements, during the block."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""), server_settings=SESSION_SETTINGS)
    try:
        yield GenericPlans(connection)
    finally:
        await connection.close()


async def vacuum(url: str) -> None:
    """Have PostgreSQL gather statistics of all tables, as autovacuum does now and then."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        await connection.execute("VACUUM (ANALYZE)")
    finally:
        await connection.close()
