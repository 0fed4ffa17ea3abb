"""Answers to waiting nodes, in both orders with the write by which their run goes to sleep."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from engine.node_api import AnswerSource
from engine.run_records import NodeSpan, RunStatus, SpanStatus
from journal.store import ClaimedRun, ExecutionKey
from journal.waits import node_answers
from journal.waits.node_answers import AnswerReception, AnswerResult
from models.database import Database
from models.execution_status import ExecutionStatus
from tests.integration import input_waits
from tests.integration.run_database import (
    MigratedDatabase,
    RunDatabase,
    key_of,
    microseconds_from_now,
    open_run_database,
    write,
)

YES = node_answers.encode_output_answer({"choice": "approve"}, "approve")


@pytest.fixture(params=["on_sqlite", "on_postgres", "on_serializable_postgres"])
def where(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def world(where: MigratedDatabase) -> AsyncIterator[RunDatabase]:
    async with open_run_database(where) as world:
        yield world


async def give(
    world: RunDatabase,
    key: ExecutionKey,
    payload: bytes = YES,
    *,
    iteration: str = "",
    kind: AnswerSource = AnswerSource.INPUT,
    database: Database | None = None,
) -> AnswerResult:
    return await (database or world.database).transaction(
        lambda connection: node_answers.store_answer(
            connection, key, "approval", iteration, payload, kind=kind, user_id="user_1"
        )
    )


def waiting_span(*, kind: str = "input", expires_at: datetime | None = None) -> NodeSpan:
    """Return what a run records of a node that waits for an answer."""
    awaits = json.dumps({"kind": kind, "request": {}, "expired": None}).encode()
    return NodeSpan(
        "approval",
        "Approval",
        "human-input",
        SpanStatus.WAITING,
        sequence=1,
        started_at=datetime.now(UTC),
        wake_at=expires_at,
        awaits=awaits,
    )


async def go_to_sleep(world: RunDatabase, run: ClaimedRun) -> None:
    ended = write(run, spans=[waiting_span()], end=RunStatus.WAITING, wait_answer_count=run.wait_answer_count)
    assert await world.store.record([ended]) == {run.execution_id}


async def test_an_answer_wakes_a_run_that_sleeps_and_is_there_for_whoever_claims_it(
    world: RunDatabase,
) -> None:
    run = await world.claimed(timeout_seconds=100.0)
    await go_to_sleep(world, run)
    assert (await world.row(run.execution_id))["status"] == "waiting"
    assert await world.store.promote_due() == 0

    assert await give(world, key_of(run)) == AnswerResult(AnswerReception.TAKEN, is_woken=True)
    row = await world.row(run.execution_id)
    assert (row["status"], row["wait_answer_count"], row["due_at"]) == ("pending", 1, None)
    assert microseconds_from_now(90) < row["deadline_at"] <= microseconds_from_now(100)
    (again,) = await world.claim()
    assert again.wait_answer_count == 1
    assert await node_answers.read_answers(world.database, [key_of(again)]) == {
        run.execution_id: {("approval", ""): YES}
    }


async def test_a_run_that_was_answered_while_it_worked_does_not_go_to_sleep(world: RunDatabase) -> None:
    run = await world.claimed()
    await world.store.record([write(run, spans=[waiting_span()])])
    assert await give(world, key_of(run)) == AnswerResult(AnswerReception.TAKEN)
    await go_to_sleep(world, run)
    assert (await world.row(run.execution_id))["status"] == "pending"
    (again,) = await world.claim()
    assert again.wait_answer_count == 1
    # It has seen the answer: what it waits for now is another one.
    await go_to_sleep(world, again)
    assert (await world.row(run.execution_id))["status"] == "waiting"


async def test_an_answer_and_the_write_that_it_races_lose_nothing(world: RunDatabase) -> None:
    for _ in range(5):
        run = await world.claimed()
        await world.store.record([write(run, spans=[waiting_span()])])
        given, _ = await asyncio.gather(give(world, key_of(run)), go_to_sleep(world, run))
        assert given.reception is AnswerReception.TAKEN
        (again,) = await world.claim()
        assert (again.execution_id, again.wait_answer_count) == (run.execution_id, 1)


async def test_of_two_answers_at_once_one_counts(world: RunDatabase) -> None:
    run = await world.claimed()
    await go_to_sleep(world, run)
    other = Database(world.url)
    try:
        both = await asyncio.gather(
            give(world, key_of(run)),
            give(world, key_of(run), node_answers.encode_error_answer("no", "No"), database=other),
        )
    finally:
        await other.close()
    assert {one.reception for one in both} == {AnswerReception.TAKEN, AnswerReception.LATE}
    assert (await world.row(run.execution_id))["wait_answer_count"] == 1
    first = (
        YES if both[0].reception is AnswerReception.TAKEN else node_answers.encode_error_answer("no", "No")
    )
    assert (await node_answers.read_answers(world.database, [key_of(run)]))[run.execution_id] == {
        ("approval", ""): first
    }
    # Whoever didn't hear that it was committed may say the same again.
    assert (await give(world, key_of(run), first)).reception is AnswerReception.TAKEN


async def test_what_nobody_waits_for_is_refused(world: RunDatabase) -> None:
    place = await world.workflow()
    fresh = await world.accept(place)
    assert (await give(world, fresh)).reception is AnswerReception.UNAWAITED
    assert (await give(world, ExecutionKey("exec_absent", 0))).reception is AnswerReception.UNAWAITED

    key = await world.accept(place)
    await input_waits.wait_for_input(world.database, key.execution_id, expires_in=-timedelta(seconds=1))
    assert (await give(world, key)).reception is AnswerReception.EXPIRED
    await input_waits.wait_for_input(world.database, key.execution_id, iteration="1", kind="run")
    assert (await give(world, key, iteration="1")).reception is AnswerReception.UNAWAITED
    assert (await give(world, key, iteration="1", kind=AnswerSource.RUN)).reception is AnswerReception.TAKEN

    ended = await world.accept(place)
    await input_waits.wait_for_input(world.database, ended.execution_id, status=ExecutionStatus.STOPPED)
    assert (await give(world, ended)).reception is AnswerReception.UNAWAITED


async def test_a_run_may_answer_before_the_one_that_started_it_has_gone_to_sleep(world: RunDatabase) -> None:
    run = await world.claimed()
    starting = NodeSpan(
        "approval", "Sub", "sub-workflow", SpanStatus.RUNNING, sequence=1, started_at=datetime.now(UTC)
    )
    await world.store.record([write(run, spans=[starting])])
    assert (await give(world, key_of(run))).reception is AnswerReception.UNAWAITED
    assert (await give(world, key_of(run), kind=AnswerSource.RUN)).reception is AnswerReception.TAKEN
    await go_to_sleep(world, run)
    assert (await world.row(run.execution_id))["status"] == "pending"


async def test_a_run_that_shares_its_places_waits_for_one_when_it_is_woken(world: RunDatabase) -> None:
    key = await world.accept(await world.workflow(), concurrency_key="wf", concurrency_limit=1)
    await input_waits.wait_for_input(world.database, key.execution_id)
    assert await give(world, key) == AnswerResult(AnswerReception.TAKEN, is_woken=True, concurrency_key="wf")
    row = await world.row(key.execution_id)
    assert (row["status"], row["target"]) == ("pending", "limited")
    assert await world.claim() == []
