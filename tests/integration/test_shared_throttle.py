"""Places at a limited rate, taken by several processes at once."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from msgspec import structs

from engine.run_errors import NodeError
from execution.shared_throttle import SharedThrottle
from models.database import Database
from scheduler import retention
from tests.integration.run_database import MigratedDatabase, RunDatabase
from tests.node_calls import CALLER

pytestmark = pytest.mark.every_database

SECOND = timedelta(seconds=1)


@pytest.fixture(scope="module", params=["on_sqlite", "on_postgres"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


async def reserve(
    database: Database, key: str = "crm", organization_id: str = "org_1", max_wait_seconds: float = 3600
) -> datetime:
    caller = structs.replace(CALLER, organization_id=organization_id)
    throttle = SharedThrottle(database)
    return await throttle.reserve(caller, key, limit=6, per_seconds=60.0, max_wait_seconds=max_wait_seconds)


async def test_reserved_times_are_spread_evenly_over_processes(run_database: RunDatabase) -> None:
    other = Database(run_database.url)
    try:
        before = datetime.now(UTC)
        taken = await asyncio.gather(*(reserve(database) for database in (run_database.database, other) * 4))
        elsewhere = [await reserve(other, "erp"), await reserve(other, organization_id="org_2")]
    finally:
        await other.close()
    after = datetime.now(UTC)
    first, *later = sorted(taken)
    assert before - SECOND < first < after + SECOND
    assert later == [first + count * 10 * SECOND for count in range(1, 8)]
    assert all(before - SECOND < place < after + SECOND for place in elsewhere)


async def test_a_place_that_is_too_far_away_is_not_taken(run_database: RunDatabase) -> None:
    first = await reserve(run_database.database)
    assert await reserve(run_database.database) == first + 10 * SECOND
    with pytest.raises(NodeError) as refused:
        await reserve(run_database.database, max_wait_seconds=15)
    assert (refused.value.code, refused.value.retryable) == ("throttled", True)
    assert await reserve(run_database.database, max_wait_seconds=25) == first + 20 * SECOND


async def test_a_rate_that_nothing_happened_at_lately_is_forgotten_and_begins_anew(
    run_database: RunDatabase,
) -> None:
    for key in ("old", "new"):
        await reserve(run_database.database, key)
    await run_database.query("UPDATE throttle SET next_at = 1 WHERE key = 'old'")
    await retention.forget_expired_throttles(run_database.database)
    assert await run_database.query("SELECT key FROM throttle") == [{"key": "new"}]

    await run_database.query("UPDATE throttle SET next_at = 1")
    before = datetime.now(UTC)
    first = await reserve(run_database.database, "new")
    assert before - SECOND < first < datetime.now(UTC) + SECOND
    assert await reserve(run_database.database, "new") == first + 10 * SECOND
