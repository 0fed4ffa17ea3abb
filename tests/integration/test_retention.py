"""What goes when its days are over, and what stays, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from engine.run_records import AttemptSpan, LogLine, NodeSpan, RunStatus, SpanStatus
from journal import run_deletion
from journal.blobs.blob_storage import BlobLost, BlobOwner
from journal.blobs.blob_store_factory import open_blobs
from journal.store import AcceptanceVerdict, ClaimedRun, RunAcceptance
from models.timestamps import to_microseconds
from scheduler import old_executions, unused_definitions
from scheduler.settings import SchedulerSettings
from tests.integration.query_plans import explain_statement
from tests.integration.run_database import (
    MigratedDatabase,
    OwnedWorkflow,
    RunDatabase,
    open_run_database,
    write,
)

NOW = datetime.now(UTC)
DAY = 86_400_000_000
PATIENCE_SECONDS = 60.0
RECORDS = ("execution", "execution_data", "span", "attempt_span", "log_line", "wait_answer")


@pytest.fixture(params=["on_sqlite", "on_postgres"])
def where(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def world(where: MigratedDatabase) -> AsyncIterator[RunDatabase]:
    async with open_run_database(where) as world:
        yield world


@pytest.fixture
def settings(tmp_path: Path) -> SchedulerSettings:
    return SchedulerSettings(data_dir=tmp_path, retention_days=14, retention_runs=3)


async def create_ended_run(
    world: RunDatabase,
    place: OwnedWorkflow,
    *,
    days: float,
    **columns: Any,  # noqa: ANN401 - columns
) -> ClaimedRun:
    """Have a run accepted and ended so many days ago, with a row in every table."""
    run = await world.claimed(place)
    spans = [
        NodeSpan(f"n{number}", "", "set", SpanStatus.COMPLETED, number, NOW, NOW, output=b"1")
        for number in range(3)
    ]
    logs = [LogLine("info", "said", None, 9, NOW)]
    attempts = [AttemptSpan("n0", "", "set", "", 1, SpanStatus.FAILED, 8, NOW)]
    done = write(run, end=RunStatus.COMPLETED, spans=spans, logs=logs, attempts=attempts)
    await world.store.record([done])
    await world.query(
        "INSERT INTO wait_answer (execution_id, node_id, iteration, shard, payload, created_at)"
        " VALUES (:id, 'n0', '', 1, '{}', 1)",
        id=run.execution_id,
    )
    await change(world, run.execution_id, ended_at=microseconds_ago(days), **columns)
    await world.query(
        "UPDATE execution_data SET created_at = :at WHERE execution_id = :id",
        at=microseconds_ago(days),
        id=run.execution_id,
    )
    return run


def microseconds_ago(days: float) -> int:
    return to_microseconds(datetime.now(UTC)) - int(days * DAY)


async def change(world: RunDatabase, execution_id: str, **columns: Any) -> None:  # noqa: ANN401 - columns
    changes = ", ".join(f"{column} = :{column}" for column in columns)
    await world.query(f"UPDATE execution SET {changes} WHERE id = :id", id=execution_id, **columns)


async def remaining_executions(world: RunDatabase) -> set[str]:
    """Return the executions that are left, of which nothing is missing."""
    found = [
        {
            row["id"]
            for row in await world.query(
                f"SELECT {'id' if table == 'execution' else 'execution_id AS id'} FROM {table}"
            )
        }
        for table in RECORDS
    ]
    assert all(ids == found[0] for ids in found), found
    return found[0]


async def test_ended_runs_go_after_their_days_with_all_that_belongs_to_them(
    world: RunDatabase, settings: SchedulerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(old_executions, "BATCH_RUNS", 2)
    monkeypatch.setattr(run_deletion, "BATCH_ROWS", 2)
    monkeypatch.setattr(old_executions, "BATCH_WORKFLOWS", 1)
    place, other = await world.workflow(), await world.workflow()
    for one in (place, other, place, other, place):
        await create_ended_run(world, one, days=14.1)
    young = await create_ended_run(world, place, days=13.9)
    await old_executions.delete_old_executions(settings, world.database)
    assert await remaining_executions(world) == {young.execution_id}
    await old_executions.delete_old_executions(settings, world.database)
    assert await remaining_executions(world) == {young.execution_id}


async def test_what_is_alive_or_still_asked_for_stays_however_old(
    world: RunDatabase, settings: SchedulerSettings
) -> None:
    place = await world.workflow()
    waiting = await create_ended_run(world, place, days=50, status="waiting")
    await change(world, waiting.execution_id, ended_at=None)
    untold = await create_ended_run(
        world, place, days=50, follow_up='{"callback":{"url":"http://example.com"}}'
    )
    child = await create_ended_run(world, place, days=50, parent_id=waiting.execution_id)
    orphan = await create_ended_run(world, place, days=50, parent_id="exec_gone")
    pending = await create_ended_run(world, place, days=50)
    await change(world, pending.execution_id, ended_at=None, status="pending", token=9)
    await old_executions.delete_old_executions(settings, world.database)
    stays = {run.execution_id for run in (waiting, pending, untold, child)}
    assert await remaining_executions(world) == stays
    assert orphan.execution_id not in stays


async def test_of_more_than_a_workflow_may_have_the_oldest_go_but_not_within_a_day(
    world: RunDatabase, settings: SchedulerSettings
) -> None:
    place, other = await world.workflow(), await world.workflow()
    old = [await create_ended_run(world, place, days=days) for days in (6, 5, 4, 3, 2)]
    of_other = [await create_ended_run(world, other, days=days) for days in (6, 5, 4)]
    today = [await create_ended_run(world, place, days=0.1) for _ in range(1)]
    await old_executions.delete_old_executions(settings, world.database)
    assert await remaining_executions(world) == {run.execution_id for run in (*old[3:], *today, *of_other)}
    await world.query("UPDATE execution_data SET created_at = :at", at=microseconds_ago(0.9))
    await old_executions.delete_old_executions(
        settings.model_copy(update={"retention_runs": 1}), world.database
    )
    assert len(await remaining_executions(world)) == 6


async def test_a_deletion_that_broke_off_is_finished_by_the_next(
    world: RunDatabase, settings: SchedulerSettings
) -> None:
    run = await create_ended_run(world, await world.workflow(), days=50)
    await world.query("DELETE FROM execution")
    await world.query("DELETE FROM span WHERE node_id = 'n0'")
    await old_executions.delete_old_executions(settings, world.database)
    assert await remaining_executions(world) == set()
    assert [await world.count(table) for table in RECORDS] == [0] * len(RECORDS), run


async def test_contents_go_with_the_last_run_of_a_line(
    world: RunDatabase, settings: SchedulerSettings
) -> None:
    place = await world.workflow()
    first = await create_ended_run(world, place, days=50)
    alone = await create_ended_run(world, place, days=50)
    await create_ended_run(world, place, days=1.5, resumed_from=first.execution_id, key_id=first.key_id)
    blobs = open_blobs(settings)
    owners = [BlobOwner(place.organization.id, run.key_id) for run in (first, alone)]
    references = [await blobs.put(owner, b"content", media_type="text/plain") for owner in owners]
    await old_executions.delete_old_executions(settings, world.database)
    assert await blobs.get(owners[0], references[0].sha256) == b"content"
    with pytest.raises(BlobLost):
        await blobs.get(owners[1], references[1].sha256)
    await world.query("UPDATE execution SET ended_at = :at", at=microseconds_ago(15))
    await world.query("UPDATE execution_data SET created_at = :at", at=microseconds_ago(15))
    await old_executions.delete_old_executions(settings, world.database)
    with pytest.raises(BlobLost):
        await blobs.get(owners[0], references[0].sha256)


async def test_old_runs_are_found_by_indexes(world: RunDatabase) -> None:
    retention = old_executions.RetentionPeriods(14, 10_000)
    plan = await explain_statement(world.database, old_executions.workflows("", retention))
    assert plan.count("ix_execution_data_workflow") == 2
    plan = await explain_statement(world.database, old_executions.old("wf_1", NOW, retention))
    assert "ix_execution_data_workflow" in plan
    assert "SCAN" not in plan.replace("Index Scan", "")


# ── definitions ─────────────────────────────────────────────────────────────────────────────────────────────


def run_with_definition(place: OwnedWorkflow, number: int, *, is_sent: bool = True) -> RunAcceptance:
    run = place.run(definition=f'{{"nodes":[],"connections":[],"number":{number}}}')
    return run if is_sent else place.run(definition=None, definition_hash=run.definition_hash)


async def age_definitions(world: RunDatabase) -> None:
    await world.query("UPDATE definition SET created_at = :at", at=microseconds_ago(1.1))


async def read_definition_hashes(world: RunDatabase) -> set[str]:
    return {row["hash"] for row in await world.query("SELECT hash FROM definition")}


async def test_definitions_that_no_execution_names_go_after_a_day(
    world: RunDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unused_definitions, "BATCH_RUNS", 2)
    monkeypatch.setattr(unused_definitions, "BATCH_DEFINITIONS", 2)
    place = await world.workflow()
    runs = [run_with_definition(place, number) for number in range(8)]
    await world.store.accept(runs)
    await world.store.accept([run_with_definition(place, 5, is_sent=False)])
    for run in runs[:6]:
        await world.query("DELETE FROM execution WHERE id = :id", id=run.execution_id)
    await unused_definitions.delete_unused_definitions(world.database)
    assert len(await read_definition_hashes(world)) == 8
    await age_definitions(world)
    await unused_definitions.delete_unused_definitions(world.database)
    assert await read_definition_hashes(world) == {run.definition_hash for run in runs[5:]}


async def test_a_definition_that_is_sent_again_is_young_again(world: RunDatabase) -> None:
    place = await world.workflow()
    runs = [run_with_definition(place, number) for number in range(2)]
    await world.store.accept(runs)
    await age_definitions(world)
    await world.store.accept([run_with_definition(place, 0)])
    await world.query("DELETE FROM execution")
    await unused_definitions.delete_unused_definitions(world.database)
    # Whoever has sent it may leave it out for an hour from now.
    assert await read_definition_hashes(world) == {runs[0].definition_hash}


async def test_no_run_that_is_accepted_while_definitions_are_deleted_loses_its_own(
    world: RunDatabase,
) -> None:
    place = await world.workflow()
    store = await world.another_store()
    for number in range(12):
        await world.store.accept([run_with_definition(place, number)])
        await age_definitions(world)
        await world.query("DELETE FROM execution")
        run = run_with_definition(place, number)
        (accepted,), _ = await asyncio.gather(
            store.accept([run]), unused_definitions.delete_unused_definitions(world.database)
        )
        assert accepted.verdict is AcceptanceVerdict.ACCEPTED
        assert run.definition_hash in await read_definition_hashes(world)


@pytest.mark.parametrize("where", ["on_postgres"], indirect=True)
async def test_a_definition_that_was_sent_and_is_not_committed_yet_is_kept(world: RunDatabase) -> None:
    place = await world.workflow()
    run = run_with_definition(place, 1)
    await world.store.accept([run])
    await age_definitions(world)
    await world.query("DELETE FROM execution")
    url = world.url.set(drivername="postgresql").render_as_string(hide_password=False)
    sender = await asyncpg.connect(url)
    try:
        transaction = sender.transaction()
        await transaction.start()
        await sender.execute(
            "INSERT INTO definition SELECT * FROM definition ON CONFLICT (organization_id, hash)"
            " DO UPDATE SET created_at = $1",
            to_microseconds(datetime.now(UTC)),
        )
        async with asyncio.timeout(PATIENCE_SECONDS):
            await unused_definitions.delete_unused_definitions(world.database)
        await transaction.commit()
        await unused_definitions.delete_unused_definitions(world.database)
    finally:
        await sender.close()
    assert await read_definition_hashes(world) == {run.definition_hash}
