"""Duration of a claim with few and with many pending rows, of one organization and of a thousand.

SQL inserts the rows, and the store of each database claims them, without servers in between.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from time import perf_counter

import asyncpg

from benchmarks.postgres_counters import asyncpg_dsn
from journal.store import ClaimQuery, JournalStore
from journal.store_factory import open_store
from models import schema_migration
from models.database import parse_url
from tests.services import PostgresServer

FEW, MANY = 1_000, 1_000_000
ORGANIZATIONS = (1, 1_000)
CLAIMS = 18
CLAIM_LIMIT = 50
"""Executions that a worker requests at once."""
LEASE_SECONDS = 600.0

# Rows as gateways insert them: one per microsecond, from each organization in turn, for four workflows of
# each.
_EXECUTIONS = """
INSERT INTO execution (id, shard, organization_id, workflow_id, user_id, status, target, trigger_type, definition_hash,
    rank, queue_turn, is_fresh, token, attempt, timeout_microseconds, completed_nodes, total_nodes, key_id, has_journal,
    channel, depth, wait_answer_count, created_at, updated_at)
SELECT 'exec_' || (10000000 + number), 0, 'org_' || number % {organizations}, 'wf_' || number / {organizations} % 4,
    'user', 'pending', 'shared', 'api', 'hash', 1700000000000000 + number, number / {organizations} % 4, true, 0, 0,
    3600000000, 0, 4, 'exec_' || (10000000 + number), false, '', 0, 0, 1700000000000000 + number,
    1700000000000000 + number
FROM {numbers}
"""
_DATA = """
INSERT INTO execution_data (execution_id, shard, trigger, config, organization_id, workflow_id, created_at)
SELECT 'exec_' || (10000000 + number), 0, '{{"body":{{"x":1}}}}', '{{}}', 'org_' || number % {organizations},
    'wf_' || number / {organizations} % 4, 1700000000000000 + number FROM {numbers}
"""
_NUMBERS_OF_POSTGRES = "generate_series(0, {last}) AS number"
_NUMBERS_OF_SQLITE = """
(WITH RECURSIVE series (number) AS (SELECT 0 UNION ALL SELECT number + 1 FROM series WHERE number < {last})
SELECT number FROM series)
"""


async def measure(postgres: PostgresServer, folder: Path) -> dict[str, float]:
    """Return the median milliseconds of a claim for each database, size and number of organizations,
    and the ratios of sizes.
    """
    figures: dict[str, float] = {}
    for organizations in ORGANIZATIONS:
        async with (
            _prepare_sqlite(folder, FEW, organizations) as few,
            _prepare_sqlite(folder, MANY, organizations) as many,
        ):
            figures |= await _compare(f"sqlite_of_{organizations}", few, many)
        async with (
            _prepare_postgres(postgres, FEW, organizations) as few,
            _prepare_postgres(postgres, MANY, organizations) as many,
        ):
            figures |= await _compare(f"postgresql_of_{organizations}", few, many)
    return figures


async def _compare(name: str, few: JournalStore, many: JournalStore) -> dict[str, float]:
    """Return the median milliseconds of claims from both stores, in turn so that
    other load slows both down, and their ratio.
    """
    claimers = {FEW: _BenchmarkClaimer(few), MANY: _BenchmarkClaimer(many)}
    for claimer in claimers.values():
        await claimer.claim_ms(1)  # opens the connection
    times: dict[int, list[float]] = {FEW: [], MANY: []}
    for number in range(CLAIMS):
        for rows in (FEW, MANY) if number % 2 else (MANY, FEW):
            times[rows].append(await claimers[rows].claim_ms(CLAIM_LIMIT))
    few_ms, many_ms = median(times[FEW]), median(times[MANY])
    return {
        f"{name}_with_{FEW}_ms": few_ms,
        f"{name}_with_{MANY}_ms": many_ms,
        f"{name}_ratio": many_ms / few_ms,
    }


class _BenchmarkClaimer:
    """Claimer that works like a worker: organizations in turn, continuing after the last one."""

    def __init__(self, store: JournalStore) -> None:
        self._store = store
        self._served = ""

    async def claim_ms(self, limit: int) -> float:
        claim = ClaimQuery("benchmark", LEASE_SECONDS, limit, after_organization=self._served)
        begun_at = perf_counter()
        claimed = await self._store.claim(claim)
        seconds = perf_counter() - begun_at
        assert len(claimed) == limit
        self._served = claimed[-1].organization_id
        return seconds * 1000


# ── rows that wait ──────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def _prepare_sqlite(folder: Path, rows: int, organizations: int) -> AsyncIterator[JournalStore]:
    path = folder / f"claims-{rows}-of-{organizations}.db"
    url = parse_url(f"sqlite:///{path}")
    await schema_migration.migrate(url)
    await asyncio.to_thread(_fill_sqlite, path, rows, organizations)
    store = await open_store(url)
    try:
        yield store
    finally:
        await store.close()
        for file in folder.glob(f"{path.name}*"):  # noqa: ASYNC240 - nothing else is under way
            file.unlink()


def _fill_sqlite(path: Path, rows: int, organizations: int) -> None:
    connection = sqlite3.connect(path)
    with connection:
        for statement in _fill_statements(_NUMBERS_OF_SQLITE, rows, organizations):
            connection.execute(statement)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


@asynccontextmanager
async def _prepare_postgres(
    postgres: PostgresServer, rows: int, organizations: int
) -> AsyncIterator[JournalStore]:
    """Yield a store on a new database with so many pending runs, dealt out to so many organizations."""
    url = parse_url(await postgres.create_database(f"claims_{rows}_of_{organizations}"))
    await schema_migration.migrate(url)
    connection = await asyncpg.connect(asyncpg_dsn(url.render_as_string(hide_password=False)))
    try:
        for statement in _fill_statements(_NUMBERS_OF_POSTGRES, rows, organizations):
            await connection.execute(statement)
        # As autovacuum would have done during the inserts; it must not run during the claims.
        await connection.execute("VACUUM (ANALYZE)")
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()
    store = await open_store(url)
    try:
        yield store
    finally:
        await store.close()


def _fill_statements(numbers: str, rows: int, organizations: int) -> Sequence[str]:
    values = {"numbers": numbers.format(last=rows - 1), "organizations": organizations}
    return [statement.format(**values) for statement in (_EXECUTIONS, _DATA)]
