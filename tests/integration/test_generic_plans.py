"""Plans of the run path, made once per connection: their cost doesn't depend on the rows or on statistics."""

from __future__ import annotations

import pytest

from tests import databases
from tests.integration import generic_plans
from tests.integration.generic_plans import RUNS
from tests.integration.run_database import MigratedDatabase, open_run_database
from tests.services import PostgresServer

ROWS = 2_000
READS_PER_RUN = 6
"""Rows of one table that a statement may read for each of its runs."""


@pytest.mark.parametrize(
    ("statistics", "organizations"), [("missing", 1), ("stale", 1), ("stale", 1_000), ("fresh", 1_000)]
)
async def test_a_plan_reads_as_few_rows_of_a_large_table_as_of_an_empty_one(
    postgres: PostgresServer, statistics: str, organizations: int
) -> None:
    url = await databases.create_database(postgres, f"plans_{statistics}_{organizations}")
    async with open_run_database(MigratedDatabase(url)) as run_database:
        read = await generic_plans.measure_rows_read(run_database, url, ROWS, organizations, statistics)
    assert {
        (name, table): rows
        for name, of_tables in read.items()
        for table, rows in of_tables.items()
        if rows > READS_PER_RUN * RUNS
    } == {}
