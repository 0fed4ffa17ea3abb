"""Concurrency limits by key: slots acquired, refused, awaited and released, on both databases."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from engine.run_records import RunStatus
from journal import concurrency_limits
from journal.concurrency_limits import ConcurrencyLimit, LimitAction
from journal.store import AcceptanceResult, AcceptanceVerdict, IdempotencyKey, RunAcceptance
from models.database import Database
from tests.integration.query_plans import explain_statement
from tests.integration.run_database import (
    MigratedDatabase,
    OwnedWorkflow,
    RunDatabase,
    key_of,
    write,
)

pytestmark = pytest.mark.every_database

KEY = "wf:somebody"


@pytest.fixture(scope="module", params=["on_sqlite", "on_postgres", "on_serializable_postgres"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def database(run_database: RunDatabase) -> Database:
    return run_database.database


@pytest.fixture
async def owned_workflow(run_database: RunDatabase) -> OwnedWorkflow:
    return await run_database.workflow()


def limited_run(
    owned_workflow: OwnedWorkflow,
    key: str = KEY,
    *,
    limit: int = 2,
    **fields: Any,  # noqa: ANN401 - any field of an Acceptance
) -> RunAcceptance:
    return owned_workflow.run(concurrency_key=key, concurrency_limit=limit, **fields)


async def accept(run_database: RunDatabase, *runs: RunAcceptance) -> list[str]:
    answers = await run_database.store.accept(runs)
    assert {answer.verdict for answer in answers} == {AcceptanceVerdict.ACCEPTED}
    return [run.execution_id for run in runs]


async def admitted_ids(run_database: RunDatabase) -> set[str]:
    rows = await run_database.query("SELECT id FROM execution WHERE target = 'shared' AND ended_at IS NULL")
    return {row["id"] for row in rows}


# ── places ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_run_that_waits_for_a_slot_is_not_claimed(
    run_database: RunDatabase, database: Database, owned_workflow: OwnedWorkflow
) -> None:
    first, second, _ = await accept(run_database, *(limited_run(owned_workflow) for _ in range(3)))
    assert await run_database.claim() == []
    assert await concurrency_limits.admit_waiting_runs(database, KEY) == 2
    assert {run.execution_id for run in await run_database.claim()} == {first, second}
    assert await concurrency_limits.admit_waiting_runs(database, KEY) == 0


async def test_a_slot_passes_to_the_next_run_after_any_outcome(
    run_database: RunDatabase, database: Database, owned_workflow: OwnedWorkflow
) -> None:
    ids = await accept(run_database, *(limited_run(owned_workflow, limit=1) for _ in range(5)))
    ends = (RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.STOPPED, RunStatus.WAITING)
    for execution_id, status in zip(ids, ends, strict=False):
        assert await concurrency_limits.admit_waiting_runs(database, KEY) == 1
        (run,) = await run_database.claim()
        assert run.execution_id == execution_id
        assert run.concurrency_key == KEY
        assert await concurrency_limits.admit_waiting_runs(database, KEY) == 0
        assert await run_database.store.record([write(run, end=status)])
    assert await concurrency_limits.admit_waiting_runs(database, KEY) == 1
    (last,) = await run_database.claim()
    assert await run_database.store.request_end(key_of(last), "cancel")
    assert (
        await concurrency_limits.admit_waiting_runs(database, KEY) == 0
    )  # stop requested, but still running


async def test_begun_runs_go_first_then_the_better_rank(
    run_database: RunDatabase, database: Database, owned_workflow: OwnedWorkflow
) -> None:
    (begun,) = await accept(run_database, limited_run(owned_workflow, limit=1))
    await concurrency_limits.admit_waiting_runs(database, KEY)
    (run,) = await run_database.claim()
    late, urgent = await accept(
        run_database, limited_run(owned_workflow, limit=1), limited_run(owned_workflow, limit=1, priority=1)
    )
    await run_database.store.record([write(run, end=RunStatus.RELEASED)])
    for expected in (begun, urgent, late):
        assert await concurrency_limits.admit_waiting_runs(database, KEY) == 1
        (run,) = await run_database.claim()
        assert run.execution_id == expected
        await run_database.store.record([write(run, end=RunStatus.COMPLETED)])


async def test_a_worker_that_dies_frees_no_place_since_its_run_goes_on(
    run_database: RunDatabase, database: Database, owned_workflow: OwnedWorkflow
) -> None:
    first, second = await accept(run_database, *(limited_run(owned_workflow, limit=1) for _ in range(2)))
    await concurrency_limits.admit_waiting_runs(database, KEY)
    (run,) = await run_database.claim()
    await run_database.expire(run)
    await run_database.store.sweep(10)
    assert await concurrency_limits.admit_waiting_runs(database, KEY) == 0
    (again,) = await run_database.claim()
    assert again.execution_id == first
    await run_database.store.record([write(again, end=RunStatus.COMPLETED)])
    assert await concurrency_limits.admit_waiting_runs(database, KEY) == 1
    assert await admitted_ids(run_database) == {second}


async def test_keys_do_not_share_their_places_and_limits_hold_for_those_that_have_them(
    run_database: RunDatabase, database: Database, owned_workflow: OwnedWorkflow
) -> None:
    one = await accept(run_database, *(limited_run(owned_workflow, "one", limit=3) for _ in range(2)))
    await accept(run_database, *(limited_run(owned_workflow, "two", limit=1) for _ in range(2)))
    assert [
        await concurrency_limits.admit_waiting_runs(database, key) for key in ("one", "two", "three")
    ] == [2, 1, 0]
    # The limit was lowered: waiting runs wait until fewer are running, and later ones queue behind them.
    await accept(
        run_database, limited_run(owned_workflow, "one", limit=1), limited_run(owned_workflow, "one", limit=3)
    )
    assert await concurrency_limits.admit_waiting_runs(database, "one") == 0
    await run_database.query(
        "UPDATE execution SET ended_at = 1, status = 'completed' WHERE id = :id", id=one[0]
    )
    assert await concurrency_limits.admit_waiting_runs(database, "one") == 0
    await run_database.query(
        "UPDATE execution SET ended_at = 1, status = 'completed' WHERE id = :id", id=one[1]
    )
    assert await concurrency_limits.admit_waiting_runs(database, "one") == 2


async def test_two_that_count_at_once_do_not_both_give_the_last_place(
    run_database: RunDatabase, database: Database, owned_workflow: OwnedWorkflow
) -> None:
    await accept(run_database, *(limited_run(owned_workflow, limit=5) for _ in range(30)))
    other = Database(run_database.url)
    counts = await asyncio.gather(
        *(concurrency_limits.admit_waiting_runs(one, KEY) for one in (database, other) for _ in range(6))
    )
    await other.close()
    assert sum(counts) == len(await admitted_ids(run_database)) == 5


async def test_a_sweep_finds_every_concurrency_key_with_unassigned_free_slots(
    run_database: RunDatabase,
    database: Database,
    owned_workflow: OwnedWorkflow,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = [f"{number:03}" for number in range(7)]
    await accept(run_database, *(limited_run(owned_workflow, key, limit=1) for key in keys for _ in range(2)))
    await concurrency_limits.admit_waiting_runs(database, "003")
    monkeypatch.setattr(concurrency_limits, "BATCH_KEYS", 3)
    swept, after = [], ""
    while True:
        count, after = await concurrency_limits.admit_waiting_keys(database, after)
        swept.append(count)
        if not after:
            break
    assert swept == [3, 2, 1]
    assert len(await admitted_ids(run_database)) == 7
    assert await concurrency_limits.admit_waiting_keys(database) == (0, "002")


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_run_that_may_not_wait_is_refused_and_leaves_nothing(
    run_database: RunDatabase, database: Database, owned_workflow: OwnedWorkflow
) -> None:
    key = IdempotencyKey("scope", "first", "body")
    first = limited_run(owned_workflow, limit=1, may_wait=False, idempotency=key)
    await accept(run_database, first)
    refused = limited_run(
        owned_workflow, limit=1, may_wait=False, idempotency=IdempotencyKey("scope", "2", "body")
    )
    assert await run_database.store.accept([refused]) == [
        AcceptanceResult(AcceptanceVerdict.FULL, refused.execution_id)
    ]
    assert [await run_database.count(table) for table in ("execution", "execution_data", "idempotency")] == [
        1
    ] * 3
    # A repeated request gets its first answer, although no slot is free any more.
    again = limited_run(owned_workflow, limit=1, may_wait=False, idempotency=key)
    assert await run_database.store.accept([again]) == [
        AcceptanceResult(AcceptanceVerdict.REPEATED, first.execution_id)
    ]
    assert await run_database.store.accept([first]) == [
        AcceptanceResult(AcceptanceVerdict.ACCEPTED, first.execution_id)
    ]
    await concurrency_limits.admit_waiting_runs(database, KEY)
    (run,) = await run_database.claim()
    assert (await run_database.store.accept([refused]))[0].verdict is AcceptanceVerdict.FULL
    await run_database.store.record([write(run, end=RunStatus.COMPLETED)])
    assert (await run_database.store.accept([refused]))[0].verdict is AcceptanceVerdict.ACCEPTED


async def test_of_many_at_once_that_may_not_wait_as_many_are_accepted_as_there_are_places(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    stores = [run_database.store, await run_database.another_store()]
    runs = [[limited_run(owned_workflow, limit=4, may_wait=False), owned_workflow.run()] for _ in range(12)]
    answers = await asyncio.gather(*(stores[number % 2].accept(batch) for number, batch in enumerate(runs)))
    assert Counter(one.verdict for one, _ in answers) == {
        AcceptanceVerdict.ACCEPTED: 4,
        AcceptanceVerdict.FULL: 8,
    }
    assert Counter(other.verdict for _, other in answers) == {AcceptanceVerdict.ACCEPTED: 12}


# ── reads ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("migrated_database", ["on_sqlite", "on_postgres"], indirect=True)
async def test_places_and_those_that_wait_are_found_by_their_indexes(
    run_database: RunDatabase, database: Database, owned_workflow: OwnedWorkflow
) -> None:
    await accept(run_database, *(limited_run(owned_workflow, f"{number % 50}") for number in range(400)))
    await accept(run_database, *(owned_workflow.run() for _ in range(400)))
    await run_database.query("ANALYZE")  # autovacuum may have done it while the table was half full
    plan = await explain_statement(database, concurrency_limits.waiting_keys_statement(""))
    assert "ix_execution_limited" in plan
    assert "ix_execution_admitted" in plan
    assert "SCAN execution" not in plan


def test_the_concurrency_key_is_the_workflow_or_the_value_of_its_expression() -> None:
    def key(expression: str | None, trigger: Any) -> ConcurrencyLimit | None:  # noqa: ANN401 - any JSON value
        concurrency: dict[str, Any] = {"limit": 2, "key": expression, "onLimit": "reject"}
        return concurrency_limits.concurrency_limit({"concurrency": concurrency}, "wf_1", trigger)

    assert concurrency_limits.concurrency_limit({}, "wf_1", {}) is None
    assert key(None, {}) == ConcurrencyLimit("wf_1", 2, LimitAction.REJECT)
    by_customer = [key("{{ trigger.body.customer }}", {"body": {"customer": one}}) for one in (1, 1, "1", 2)]
    keys = [limit.key for limit in by_customer if limit]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert all(one.startswith("wf_1:") and len(one) < 64 for one in keys)
    nowhere = key("{{ trigger.body.customer }}", {"body": "x" * 100_000})
    assert nowhere == key("{{ trigger.body.customer }}", {})
