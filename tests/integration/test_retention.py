"""Retention on both databases: expired data is deleted, and all else is kept."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from engine.agents.agent_steps import AgentStep, StepKind, StepStatus
from engine.run_records import AttemptSpan, LogLine, NodeSpan, RunStatus, SpanStatus
from journal import run_deletion
from journal.blobs.blob_storage import BlobLost, BlobOwner
from journal.blobs.blob_store_factory import open_blobs
from journal.store import AcceptanceVerdict, ClaimedRun, RunAcceptance
from models.database import is_sqlite
from models.timestamps import to_microseconds
from scheduler import old_executions, retention, unused_definitions
from scheduler.settings import SchedulerSettings
from tests.integration.query_plans import explain_statement
from tests.integration.run_database import (
    MigratedDatabase,
    OwnedWorkflow,
    RunDatabase,
    write,
)

pytestmark = pytest.mark.every_database

NOW = datetime.now(UTC)
DAY = 86_400_000_000
PATIENCE_SECONDS = 60.0
RECORDS = ("execution", "execution_data", "span", "attempt_span", "execution_step", "log_line", "wait_answer")


@pytest.fixture(scope="module", params=["on_sqlite", "on_postgres"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def settings(tmp_path: Path) -> SchedulerSettings:
    return SchedulerSettings(data_dir=tmp_path, retention_days=14, retention_runs=3)


async def create_ended_run(
    run_database: RunDatabase,
    owned_workflow: OwnedWorkflow,
    *,
    days: float,
    **columns: Any,  # noqa: ANN401 - columns
) -> ClaimedRun:
    """Create a run that ended `days` ago, with a row in every table."""
    run = await run_database.accept_and_claim(owned_workflow)
    spans = [
        NodeSpan(f"n{number}", "", "set", SpanStatus.COMPLETED, number, NOW, NOW, output=b"1")
        for number in range(3)
    ]
    logs = [LogLine("info", "said", None, 9, NOW)]
    attempts = [AttemptSpan("n0", "", "set", "", 1, SpanStatus.FAILED, 8, NOW)]
    steps = [AgentStep("n0", "", 0, 7, StepKind.MODEL, "echo", StepStatus.COMPLETED, NOW, NOW)]
    done = write(run, end=RunStatus.COMPLETED, spans=spans, logs=logs, attempts=attempts, steps=steps)
    await run_database.store.record([done])
    await run_database.query(
        "INSERT INTO wait_answer (execution_id, node_id, iteration, shard, payload, created_at)"
        " VALUES (:id, 'n0', '', 1, '{}', 1)",
        id=run.execution_id,
    )
    await change(run_database, run.execution_id, ended_at=microseconds_ago(days), **columns)
    await run_database.query(
        "UPDATE execution_data SET created_at = :at WHERE execution_id = :id",
        at=microseconds_ago(days),
        id=run.execution_id,
    )
    return run


def microseconds_ago(days: float) -> int:
    return to_microseconds(datetime.now(UTC)) - int(days * DAY)


async def change(run_database: RunDatabase, execution_id: str, **columns: Any) -> None:  # noqa: ANN401 - columns
    changes = ", ".join(f"{column} = :{column}" for column in columns)
    await run_database.query(f"UPDATE execution SET {changes} WHERE id = :id", id=execution_id, **columns)


async def remaining_executions(run_database: RunDatabase) -> set[str]:
    """Return the remaining executions, each of which must be complete."""
    found = [
        {
            row["id"]
            for row in await run_database.query(
                f"SELECT {'id' if table == 'execution' else 'execution_id AS id'} FROM {table}"
            )
        }
        for table in RECORDS
    ]
    assert all(ids == found[0] for ids in found), found
    return found[0]


async def test_ended_runs_go_after_their_days_with_all_that_belongs_to_them(
    run_database: RunDatabase, settings: SchedulerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(old_executions, "BATCH_RUNS", 2)
    monkeypatch.setattr(run_deletion, "BATCH_ROWS", 2)
    monkeypatch.setattr(old_executions, "BATCH_WORKFLOWS", 1)
    owned_workflow, other = await run_database.workflow(), await run_database.workflow()
    for one in (owned_workflow, other, owned_workflow, other, owned_workflow):
        await create_ended_run(run_database, one, days=14.1)
    young = await create_ended_run(run_database, owned_workflow, days=13.9)
    await old_executions.delete_old_executions(settings, run_database.database)
    assert await remaining_executions(run_database) == {young.execution_id}
    await old_executions.delete_old_executions(settings, run_database.database)
    assert await remaining_executions(run_database) == {young.execution_id}
    decided = await run_database.query("SELECT workflow_id, action, reason, inputs FROM system_decision")
    assert {one["workflow_id"]: json.loads(one["inputs"])["executions"] for one in decided} == {
        owned_workflow.workflow_id: 3,
        other.workflow_id: 2,
    }
    assert {(one["action"], one["reason"]) for one in decided} == {("executions.pruned", "retention")}
    await retention.forget_system_decisions(run_database.database)
    assert len(await run_database.query("SELECT id FROM system_decision")) == 2
    await run_database.query("UPDATE system_decision SET at = 0 RETURNING id")
    await retention.forget_system_decisions(run_database.database)
    assert await run_database.query("SELECT id FROM system_decision") == []


async def test_blobs_of_present_or_referenced_runs_stay_at_any_age(
    run_database: RunDatabase, settings: SchedulerSettings
) -> None:
    owned_workflow = await run_database.workflow()
    waiting = await create_ended_run(run_database, owned_workflow, days=50, status="waiting")
    await change(run_database, waiting.execution_id, ended_at=None)
    untold = await create_ended_run(
        run_database, owned_workflow, days=50, completion_action='{"callback":{"url":"http://example.com"}}'
    )
    child = await create_ended_run(run_database, owned_workflow, days=50, parent_id=waiting.execution_id)
    orphan = await create_ended_run(run_database, owned_workflow, days=50, parent_id="exec_gone")
    pending = await create_ended_run(run_database, owned_workflow, days=50)
    await change(run_database, pending.execution_id, ended_at=None, status="pending", token=9)
    await old_executions.delete_old_executions(settings, run_database.database)
    stays = {run.execution_id for run in (waiting, pending, untold, child)}
    assert await remaining_executions(run_database) == stays
    assert orphan.execution_id not in stays


async def test_of_more_than_a_workflow_may_have_the_oldest_go_but_not_within_a_day(
    run_database: RunDatabase, settings: SchedulerSettings
) -> None:
    owned_workflow, other = await run_database.workflow(), await run_database.workflow()
    old = [await create_ended_run(run_database, owned_workflow, days=days) for days in (6, 5, 4, 3, 2)]
    of_other = [await create_ended_run(run_database, other, days=days) for days in (6, 5, 4)]
    today = [await create_ended_run(run_database, owned_workflow, days=0.1) for _ in range(1)]
    await old_executions.delete_old_executions(settings, run_database.database)
    assert await remaining_executions(run_database) == {
        run.execution_id for run in (*old[3:], *today, *of_other)
    }
    await run_database.query("UPDATE execution_data SET created_at = :at", at=microseconds_ago(0.9))
    await old_executions.delete_old_executions(
        settings.model_copy(update={"retention_runs": 1}), run_database.database
    )
    assert len(await remaining_executions(run_database)) == 6


async def test_a_deletion_that_broke_off_is_finished_by_the_next(
    run_database: RunDatabase, settings: SchedulerSettings
) -> None:
    run = await create_ended_run(run_database, await run_database.workflow(), days=50)
    await run_database.query("DELETE FROM execution")
    await run_database.query("DELETE FROM span WHERE node_id = 'n0'")
    await old_executions.delete_old_executions(settings, run_database.database)
    assert await remaining_executions(run_database) == set()
    assert [await run_database.count(table) for table in RECORDS] == [0] * len(RECORDS), run


async def test_contents_go_with_the_last_run_of_a_line(
    run_database: RunDatabase, settings: SchedulerSettings
) -> None:
    owned_workflow = await run_database.workflow()
    first = await create_ended_run(run_database, owned_workflow, days=50)
    alone = await create_ended_run(run_database, owned_workflow, days=50)
    await create_ended_run(
        run_database, owned_workflow, days=1.5, resumed_from=first.execution_id, key_id=first.key_id
    )
    blobs = open_blobs(settings)
    owners = [BlobOwner(owned_workflow.organization.id, run.key_id) for run in (first, alone)]
    references = [await blobs.put(owner, b"content", media_type="text/plain") for owner in owners]
    await old_executions.delete_old_executions(settings, run_database.database)
    assert await blobs.get(owners[0], references[0].sha256) == b"content"
    with pytest.raises(BlobLost):
        await blobs.get(owners[1], references[1].sha256)
    await run_database.query("UPDATE execution SET ended_at = :at", at=microseconds_ago(15))
    await run_database.query("UPDATE execution_data SET created_at = :at", at=microseconds_ago(15))
    await old_executions.delete_old_executions(settings, run_database.database)
    with pytest.raises(BlobLost):
        await blobs.get(owners[0], references[0].sha256)


async def test_old_runs_are_found_by_indexes(run_database: RunDatabase) -> None:
    periods = old_executions.RetentionPeriods(14, 10_000)
    if not is_sqlite(run_database.url):
        # PostgreSQL takes any index of a table that is empty by its statistics.
        place = await run_database.workflow()
        await run_database.store.accept([place.run() for _ in range(300)])
        await run_database.query("ANALYZE execution, execution_data")
    plan = await explain_statement(run_database.database, old_executions.workflows_statement("", periods))
    assert plan.count("ix_execution_data_workflow") == 2
    plan = await explain_statement(
        run_database.database, old_executions.expired_statement("wf_1", NOW, periods)
    )
    assert "ix_execution_data_workflow" in plan
    assert "SCAN" not in plan.replace("Index Scan", "")


# ── definitions ─────────────────────────────────────────────────────────────────────────────────────────────


def run_with_definition(owned_workflow: OwnedWorkflow, number: int, *, is_sent: bool = True) -> RunAcceptance:
    run = owned_workflow.run(definition=f'{{"nodes":[],"connections":[],"number":{number}}}')
    return run if is_sent else owned_workflow.run(definition=None, definition_hash=run.definition_hash)


async def age_definitions(run_database: RunDatabase) -> None:
    await run_database.query("UPDATE definition SET created_at = :at", at=microseconds_ago(1.1))


async def read_definition_hashes(run_database: RunDatabase) -> set[str]:
    return {row["hash"] for row in await run_database.query("SELECT hash FROM definition")}


async def test_definitions_that_no_execution_names_go_after_a_day(
    run_database: RunDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unused_definitions, "BATCH_RUNS", 2)
    monkeypatch.setattr(unused_definitions, "BATCH_DEFINITIONS", 2)
    owned_workflow = await run_database.workflow()
    runs = [run_with_definition(owned_workflow, number) for number in range(8)]
    await run_database.store.accept(runs)
    await run_database.store.accept([run_with_definition(owned_workflow, 5, is_sent=False)])
    for run in runs[:6]:
        await run_database.query("DELETE FROM execution WHERE id = :id", id=run.execution_id)
    await unused_definitions.delete_unused_definitions(run_database.database)
    assert len(await read_definition_hashes(run_database)) == 8
    await age_definitions(run_database)
    await unused_definitions.delete_unused_definitions(run_database.database)
    assert await read_definition_hashes(run_database) == {run.definition_hash for run in runs[5:]}


async def test_a_definition_that_is_sent_again_is_young_again(run_database: RunDatabase) -> None:
    owned_workflow = await run_database.workflow()
    runs = [run_with_definition(owned_workflow, number) for number in range(2)]
    await run_database.store.accept(runs)
    await age_definitions(run_database)
    await run_database.store.accept([run_with_definition(owned_workflow, 0)])
    await run_database.query("DELETE FROM execution")
    await unused_definitions.delete_unused_definitions(run_database.database)
    # Clients that have sent it may omit it for an hour from now.
    assert await read_definition_hashes(run_database) == {runs[0].definition_hash}


async def test_no_run_that_is_accepted_while_definitions_are_deleted_loses_its_own(
    run_database: RunDatabase,
) -> None:
    owned_workflow = await run_database.workflow()
    store = await run_database.another_store()
    for number in range(12):
        await run_database.store.accept([run_with_definition(owned_workflow, number)])
        await age_definitions(run_database)
        await run_database.query("DELETE FROM execution")
        run = run_with_definition(owned_workflow, number)
        (accepted,), _ = await asyncio.gather(
            store.accept([run]), unused_definitions.delete_unused_definitions(run_database.database)
        )
        assert accepted.verdict is AcceptanceVerdict.ACCEPTED
        assert run.definition_hash in await read_definition_hashes(run_database)


@pytest.mark.parametrize("migrated_database", ["on_postgres"], indirect=True)
async def test_a_definition_that_was_sent_and_is_not_committed_yet_is_kept(run_database: RunDatabase) -> None:
    owned_workflow = await run_database.workflow()
    run = run_with_definition(owned_workflow, 1)
    await run_database.store.accept([run])
    await age_definitions(run_database)
    await run_database.query("DELETE FROM execution")
    url = run_database.url.set(drivername="postgresql").render_as_string(hide_password=False)
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
            await unused_definitions.delete_unused_definitions(run_database.database)
        await transaction.commit()
        await unused_definitions.delete_unused_definitions(run_database.database)
    finally:
        await sender.close()
    assert await read_definition_hashes(run_database) == {run.definition_hash}
