"""Rows that each statement of the run path reads of a million, by the plan that it made on empty tables."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from journal.store_factory import open_store
from models.database import Database, parse_url
from tests import databases, services
from tests.integration import generic_plans
from tests.integration.run_database import RunDatabase
from tests.services import PostgresServer

ROWS = 1_000_000
ORGANIZATIONS = (1, 1_000)
DISK = Path("/var/tmp")  # noqa: S108 - each run makes a folder of its own in it


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of each table (default: {ROWS:,})")
    rows = parser.parse_args().rows
    tempfile.tempdir = str(DISK)
    with services.run_postgres() as postgres:
        for organizations in ORGANIZATIONS:
            print(f"{rows:,} rows, organizations: {organizations:,}", flush=True)
            for name, read in asyncio.run(_measure(postgres, rows, organizations)).items():
                tables = ", ".join(f"{table} {count:,.0f}" for table, count in read.items())
                print(f"  {name:24}{tables or 'none'}", flush=True)


async def _measure(postgres: PostgresServer, rows: int, organizations: int) -> dict[str, dict[str, float]]:
    url = await databases.create_database(postgres, f"plans_of_{organizations}")
    address = parse_url(url)
    database, store = Database(address), await open_store(address)
    try:
        run_database = RunDatabase(address, database, store)
        return await generic_plans.measure_rows_read(run_database, url, rows, organizations, "stale")
    finally:
        await store.close()
        await database.close()


if __name__ == "__main__":
    main()
