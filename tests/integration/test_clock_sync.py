"""Clock changes of an SQLite host: durations keep their remaining length."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import SQLModel

from engine.run_records import NodeSpan, RunOutcome, RunStatus, SpanStatus
from journal import clock_sync
from journal.recorder import RunJournal, RunLease, RunRecorder
from journal.store import IdempotencyKey, RunWrite
from models import (
    access,
    deployment,
    event_wait,
    execution,
    ingest,
    invitation,
    schedule,
    signing_secrets,
    task,
    workflow,
)
from models.column_types import TimestampColumn
from models.errors import DatabaseUnavailable
from models.timestamps import HOST_TIME, from_microseconds, to_microseconds
from tests.integration.run_database import MigratedDatabase, RunDatabase, key_of, open_run_database, write

DAY = 86_400_000_000
MOMENT = 60_000_000
"""Microseconds: longer than anything here takes, and far less than the change of the clock."""
MODULES = (
    *(access, deployment, event_wait, execution, ingest, invitation, schedule, signing_secrets, task),
    workflow,
)
"""Modules with tables of deadlines, imported so that the metadata contains them."""
ENDING_NAMES = {
    "expires_at",
    "due_at",
    "check_at",
    "until",
    "next_at",
    "wake_at",
    "deadline_at",
    "claimed_at",
    "completion_due_at",
    "next_run_at",
}
CALENDAR = {
    *("api_key.expires_at", "intake_token.expires_at", "signing_secret.expires_at"),
    *("deployment.kept_awake_until", "schedule.due_at", "schedule.next_run_at", "workflow_log_level.until"),
}
"""Moments that a person has named, or a calendar: a clock is set so that these are right."""


@pytest.fixture
async def run_database(on_sqlite: MigratedDatabase) -> AsyncIterator[RunDatabase]:
    async with open_run_database(on_sqlite) as run_database:
        yield run_database


@pytest.fixture(params=[DAY, -DAY], ids=["ahead", "back"])
def step(request: pytest.FixtureRequest) -> Iterator[int]:
    """By how many microseconds the host's clock was set, which the process has not followed yet."""
    step: int = request.param
    HOST_TIME.move(-step)
    yield step
    HOST_TIME.move(HOST_TIME.step())


def test_each_column_that_ends_something_is_moved_or_is_a_moment_of_the_calendar() -> None:
    ends = {
        f"{table.name}.{column.name}"
        for table in SQLModel.metadata.tables.values()
        for column in table.columns
        if isinstance(column.type, TimestampColumn)
        and (column.name.endswith("_until") or column.name in ENDING_NAMES)
    }
    moved = {f"{table.__tablename__}.{name}" for table, name, _ in clock_sync.deadline_columns()}
    assert moved.isdisjoint(CALENDAR)
    assert ends == moved | CALENDAR


async def test_leases_deadlines_waits_and_keys_last_as_long_as_they_would_have(
    run_database: RunDatabase, step: int
) -> None:
    await create_runs(run_database)
    before = await read_deadlines(run_database)
    await clock_sync.follow_host_clock(run_database.database)
    assert abs(HOST_TIME.step()) < MOMENT
    after = await read_deadlines(run_database)
    assert {name: moment - before[name] for name, moment in after.items()} == {
        # A waiting run keeps its remaining time, which is independent of the clock.
        name: 0 if name == "waiting deadline_at" else pytest.approx(step, abs=MOMENT)
        for name in before
    }
    swept = await run_database.store.sweep(10)
    assert (swept.requeued, swept.due, len(swept.ended)) == (0, 0, 0)


async def test_a_clock_is_not_followed_where_the_rows_could_not_be_moved(
    run_database: RunDatabase, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    transaction = run_database.database.transaction

    async def fails(work: Callable[[AsyncConnection], Awaitable[Any]]) -> None:
        async def undone(connection: AsyncConnection) -> None:
            await work(connection)
            raise DatabaseUnavailable

        await transaction(undone)

    await create_runs(run_database)
    before = await read_deadlines(run_database)
    monkeypatch.setattr(run_database.database, "transaction", fails)
    with pytest.raises(DatabaseUnavailable):
        await clock_sync.follow_host_clock(run_database.database)
    monkeypatch.undo()
    assert abs(HOST_TIME.step() - step) < MOMENT
    assert await read_deadlines(run_database) == before


async def test_a_process_on_sqlite_takes_the_time_of_its_host_again_and_again(
    run_database: RunDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock_sync, "CHECK_SECONDS", 0.01)
    clock = run_database.database.clock
    async with clock_sync.run_clock_sync(run_database.database):
        # As after a night of sleep, during which the monotonic clock did not run.
        clock.learn(clock.now() - timedelta(hours=8), time.monotonic())
        async with asyncio.timeout(60):
            while datetime.now(UTC) - clock.now() > timedelta(hours=1):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("seconds_of_wait", [2, 3_600])
async def test_a_wait_that_is_written_after_the_clock_was_set_keeps_its_length(
    run_database: RunDatabase, step: int, seconds_of_wait: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed = await run_database.accept_and_claim()
    record, clock = run_database.store.record, run_database.store.clock

    async def record_after_the_step(batch: Sequence[RunWrite], *, owner: str = "") -> frozenset[str]:
        await clock_sync.follow_host_clock(run_database.database)
        return await record(batch, owner=owner)

    monkeypatch.setattr(run_database.store, "record", record_after_the_step)
    lease = RunLease(key_of(claimed), claimed.token, time.monotonic() + 60)
    journal = RunJournal(RunRecorder(run_database.store, lambda _channels, _outcomes: None), lease)
    due_at = clock.now() + timedelta(seconds=seconds_of_wait)
    span = NodeSpan("wait", "wait", "wait", SpanStatus.WAITING, 1, clock.now(), None, wake_at=due_at)
    journal.record(span)
    await journal.end(RunOutcome(RunStatus.WAITING, due_at=due_at))
    (row,) = await run_database.query("SELECT due_at, wake_at FROM execution, span")
    expected = pytest.approx(to_microseconds(due_at) + step, abs=MOMENT)
    assert (row["due_at"], row["wake_at"]) == (expected, expected)


async def create_runs(run_database: RunDatabase) -> None:
    """Create a running run, a run that sleeps for an hour, and an idempotency key of one of them."""
    place = await run_database.workflow()
    await run_database.accept_and_claim(place, idempotency=IdempotencyKey("scope", "key", "fingerprint"))
    asleep = await run_database.accept_and_claim(place)
    due_at = from_microseconds(HOST_TIME.microseconds() + 3_600_000_000)
    await run_database.store.record([write(asleep, end=RunStatus.WAITING, due_at=due_at)])


async def read_deadlines(run_database: RunDatabase) -> dict[str, int]:
    rows = await run_database.query(
        "SELECT status, lease_until, deadline_at, due_at FROM execution"
        " UNION ALL SELECT 'key', NULL, NULL, expires_at FROM idempotency"
    )
    return {
        f"{row['status']} {name}": row[name]
        for row in rows
        for name in ("lease_until", "deadline_at", "due_at")
        if row[name] is not None
    }
