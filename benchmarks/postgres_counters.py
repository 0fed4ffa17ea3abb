"""PostgreSQL's counters of its own work: commits, WAL bytes, transaction ids."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg

_READ = """
SELECT xact_commit, (pg_current_wal_insert_lsn() - '0/0')::bigint,
    pg_snapshot_xmax(pg_current_snapshot())::text::bigint
FROM pg_stat_database WHERE datname = current_database()
"""


class NotDurable(Exception):
    """The server may lose committed transactions, so its figures would be meaningless."""


@dataclass(frozen=True, slots=True)
class PostgresCounters:
    """Totals of a PostgreSQL server since its start; commits lag by up to a second."""

    commits: int
    wal_bytes: int
    transaction_ids: int
    """Assigned to writing transactions only."""

    def per_run(self, before: PostgresCounters, runs: int) -> dict[str, float]:
        """Return the increase since `before`, divided by the number of runs."""
        return {
            "commits_per_run": (self.commits - before.commits) / runs,
            "wal_bytes_per_run": (self.wal_bytes - before.wal_bytes) / runs,
            "transaction_ids_per_run": (self.transaction_ids - before.transaction_ids) / runs,
        }


async def read_counters(database_url: str) -> PostgresCounters:
    """Read the counters of a database's server."""
    connection = await asyncpg.connect(asyncpg_dsn(database_url))
    try:
        [row] = await connection.fetch(_READ)
        return PostgresCounters(*row)
    finally:
        await connection.close()


async def require_durable(database_url: str) -> None:
    """Raise `NotDurable` unless a commit is on the disk before it is answered."""
    connection = await asyncpg.connect(asyncpg_dsn(database_url))
    try:
        for name in ("fsync", "synchronous_commit"):
            value = await connection.fetchval("SELECT current_setting($1)", name)
            if value != "on":
                raise NotDurable(f"PostgreSQL runs with {name} = {value}")
    finally:
        await connection.close()


def asyncpg_dsn(database_url: str) -> str:
    """Return the database URL in the form that asyncpg accepts."""
    return database_url.replace("+asyncpg", "", 1)
