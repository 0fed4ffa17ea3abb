"""Leadership and duties on both databases, and then two schedulers in real processes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from apscheduler.schedulers import base

from messages.broker import ChangedExecutions, Notification
from messages.broker_connection import connect_broker
from models.database import Database
from models.errors import DatabaseUnavailable
from models.loss_limits import MAX_LOST_ATTEMPTS
from scheduler import main, recovery, retention
from scheduler.leadership import LeaderElection
from scheduler.main import PeriodicDuty, run_duties
from telemetry.process_activity import ACTIVITY
from tests import command_runs, services
from tests.command_runs import RunningCommand, command_environment
from tests.integration.run_database import (
    MigratedDatabase,
    RunDatabase,
    microseconds_from_now,
    open_run_database,
)

pytestmark = pytest.mark.every_database

LEASE_SECONDS = 3.0
"""Longer than the pauses of a process on a busy machine."""
PATIENCE_SECONDS = 60.0
SECRET = "a secret of more than thirty-two characters"


@pytest.fixture(scope="module", params=["on_sqlite", "on_postgres", "on_serializable_postgres"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def run_database(run_database: RunDatabase) -> RunDatabase:
    await run_database.query("DELETE FROM leadership")
    return run_database


@pytest.fixture
async def database(run_database: RunDatabase) -> AsyncIterator[Database]:
    database = Database(run_database.url)
    yield database
    await database.close()


# ── leadership ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_one_of_two_leads_until_it_no_longer_renews(
    run_database: RunDatabase, database: Database
) -> None:
    first, second = LeaderElection(database, LEASE_SECONDS), LeaderElection(database, LEASE_SECONDS)
    await first.renew()
    await second.renew()
    assert (first.is_leading(), second.is_leading()) == (True, False)
    assert ACTIVITY.lead is not None
    assert ACTIVITY.lead.owner == first.owner
    since = ACTIVITY.lead.since
    await first.renew()
    assert (ACTIVITY.lead.since, (ACTIVITY.renewed_at or 0) > since) == (since, True)
    while not second.is_leading():
        assert not (first.is_leading() and second.is_leading())
        await second.renew()
        await asyncio.sleep(0.02)
    assert not first.is_leading()
    await first.renew()
    assert not first.is_leading()
    assert await read_epochs(run_database) == [2]


async def test_a_leader_that_renews_goes_on_leading_in_the_same_epoch(
    run_database: RunDatabase, database: Database
) -> None:
    first, second = LeaderElection(database, LEASE_SECONDS), LeaderElection(database, LEASE_SECONDS)
    began = time.monotonic()
    while time.monotonic() - began < 1.2 * LEASE_SECONDS:
        await first.renew()
        assert first.is_leading()
        await second.renew()
        await asyncio.sleep(0.1)
    assert await read_epochs(run_database) == [1]


async def test_a_resigning_leader_is_followed_at_once(run_database: RunDatabase, database: Database) -> None:
    first, second = LeaderElection(database, 3600), LeaderElection(database, 3600)
    await first.renew()
    await first.resign()
    assert not first.is_leading()
    assert ACTIVITY.lead is None
    await second.renew()
    assert second.is_leading()
    await first.resign()
    assert await read_epochs(run_database) == [2]
    await first.renew()
    assert not first.is_leading()


async def test_of_many_that_ask_at_once_one_leads(run_database: RunDatabase, database: Database) -> None:
    leaders = [LeaderElection(database, 3600) for _ in range(8)]
    await asyncio.gather(*(leader.renew() for leader in leaders))
    assert [leader.is_leading() for leader in leaders].count(True) == 1
    assert await read_epochs(run_database) == [1]


async def read_epochs(run_database: RunDatabase) -> list[int]:
    return [row["epoch"] for row in await run_database.query("SELECT epoch FROM leadership")]


# ── duties ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_recovery_takes_back_all_lost_leases_and_tells_of_those_that_end(
    run_database: RunDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "SWEEP_ROWS", 2)
    place = await run_database.workflow()
    lost = [await run_database.accept_and_claim(place) for _ in range(5)]
    await run_database.expire(*lost)
    poison = lost[0].execution_id
    await run_database.query(
        "UPDATE execution SET attempt = :most WHERE id = :id", most=MAX_LOST_ATTEMPTS, id=poison
    )
    notifications: asyncio.Queue[Notification] = asyncio.Queue()
    wakeups: asyncio.Queue[int] = asyncio.Queue()
    broker = await connect_broker(None)
    await broker.listen(notifications.put_nowait)
    broker.start_worker(wakeups.put_nowait)
    await broker.watch([run.execution_id for run in lost])

    await recovery.recover_runs(run_database.store, broker)
    statuses = [(await run_database.row(run.execution_id))["status"] for run in lost]
    assert statuses == ["failed", "pending", "pending", "pending", "pending"]
    assert await asyncio.wait_for(notifications.get(), PATIENCE_SECONDS) == ChangedExecutions((poison,))
    await asyncio.wait_for(wakeups.get(), PATIENCE_SECONDS)
    await broker.close()


async def test_delayed_runs_are_promoted_when_due_and_workers_are_woken(
    run_database: RunDatabase,
) -> None:
    place = await run_database.workflow()
    now = datetime.now(UTC)
    due, later = (
        msgspec.structs.replace(
            place.inbound(place.run()).runs[0], delay_until=now + timedelta(seconds=delay)
        )
        for delay in (0, 60)
    )
    await run_database.store.ingest([place.inbound(runs=[due, later])])
    wakeups: asyncio.Queue[int] = asyncio.Queue()
    broker = await connect_broker(None)
    broker.start_worker(wakeups.put_nowait)
    await recovery.promote_due_runs(run_database.store, broker)
    assert [(await run_database.row(run.execution_id))["status"] for run in (due, later)] == [
        "pending",
        "waiting",
    ]
    await asyncio.wait_for(wakeups.get(), PATIENCE_SECONDS)
    await broker.close()


async def test_recovery_goes_on_though_the_broker_is_away(run_database: RunDatabase) -> None:
    lost = await run_database.accept_and_claim()
    await run_database.expire(lost)
    broker = await connect_broker("redis://127.0.0.1:1")
    await recovery.recover_runs(run_database.store, broker)
    assert (await run_database.row(lost.execution_id))["status"] == "pending"
    await broker.close()


async def test_only_expired_idempotency_keys_are_deleted(
    run_database: RunDatabase, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH_ROWS", 3)
    for number in range(7):
        await keep_key(run_database, f"old-{number}", seconds=-1)
    await keep_key(run_database, "young", seconds=60)
    await retention.forget_expired_keys(database)
    assert [row["key"] for row in await run_database.query("SELECT key FROM idempotency")] == ["young"]


async def keep_key(run_database: RunDatabase, key: str, *, seconds: float) -> None:
    await run_database.query(
        "INSERT INTO idempotency (shard, scope, key, fingerprint, resource_id, expires_at)"
        " VALUES (1, 'scope', :key, 'body', 'exec_1', :expires_at)",
        key=key,
        expires_at=microseconds_from_now(seconds),
    )


async def test_a_duty_that_fails_is_done_again_and_holds_up_no_other() -> None:
    failures, successes = 0, asyncio.Event()

    async def fail() -> None:
        nonlocal failures
        failures += 1
        raise DatabaseUnavailable if failures == 1 else ValueError

    async def succeed() -> None:
        if failures > 2:
            successes.set()

    async with run_duties([PeriodicDuty("fail", 0.01, fail), PeriodicDuty("succeed", 0.01, succeed)]):
        await asyncio.wait_for(successes.wait(), PATIENCE_SECONDS)


async def test_work_in_progress_at_the_end_is_finished() -> None:
    begun, finish, finished = asyncio.Event(), asyncio.Event(), False

    async def work() -> None:
        nonlocal finished
        begun.set()
        await finish.wait()
        finished = True

    async with run_duties([PeriodicDuty("work", 60, work)]):
        await begun.wait()
        asyncio.get_running_loop().call_later(0.05, finish.set)
    assert finished


async def test_duties_go_on_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead_seconds = 3600.0
    times, again = 0, asyncio.Event()

    class FaultyWallClock(datetime):
        """Current time by a clock that runs wrong."""

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # the class's own is a subclass
            return datetime.now(tz) + timedelta(seconds=ahead_seconds)

    def wall_time() -> float:
        return time.time() + ahead_seconds

    async def work() -> None:
        nonlocal times, ahead_seconds
        times += 1
        if times == 3:
            ahead_seconds = 0
        if times == 6:
            again.set()

    monkeypatch.setattr(main, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(main, "time", SimpleNamespace(time=wall_time, monotonic=time.monotonic))
    monkeypatch.setattr(main, "datetime", FaultyWallClock)
    monkeypatch.setattr(base, "datetime", FaultyWallClock)
    async with run_duties([PeriodicDuty("work", 0.02, work)]):
        await asyncio.wait_for(again.wait(), PATIENCE_SECONDS)


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_another_scheduler_takes_over_from_one_that_is_killed_and_from_one_that_stops(
    on_postgres: MigratedDatabase, redis_server: services.RedisServer, tmp_path: Path
) -> None:
    given = command_environment(
        tmp_path,
        DATABASE_URL=on_postgres.url,
        REDIS_URL=redis_server.url,
        SECRET_KEY=SECRET,
        LEADERSHIP_SECONDS="3",
        SWEEP_SECONDS="0.2",
    )
    async with open_run_database(on_postgres) as run_database, AsyncExitStack() as stack:
        await run_database.query("DELETE FROM leadership")

        def scheduler(number: int) -> RunningCommand:
            log = tmp_path / f"{number}.log"
            return stack.enter_context(command_runs.run_command("scheduler", given=given, log=log))

        first = scheduler(1)
        assert wait_for_leader(first) == 1
        second = scheduler(2)
        second.says("scheduler ready")
        assert '"leading"' not in second.log()

        first.kill()
        assert wait_for_leader(second) == 2
        lost = await run_database.accept_and_claim()
        await run_database.expire(lost)
        second.says("leases reclaimed")
        assert (await run_database.row(lost.execution_id))["status"] == "pending"

        third = scheduler(3)
        third.says("scheduler ready")
        assert second.stop() == 0
        assert wait_for_leader(third) == 3
        assert third.stop() == 0
        assert all(is_clean(line) for one in (second, third) for line in one.log().splitlines())


def wait_for_leader(scheduler: RunningCommand) -> int:
    """Wait until a scheduler leads, and return its epoch."""
    return int(scheduler.says(r'"event":"leading","epoch":(\d+)')[1])


def is_clean(line: str) -> bool:
    """Return whether a line of the log is JSON without an error."""
    return bool(json.loads(line)["level"] == "info")
