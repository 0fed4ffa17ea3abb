"""Answers to waiting nodes, before and after the commit that puts their run to sleep."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest
from sqlmodel import col

from engine.node_api import AnswerSource
from engine.run_records import NodeSpan, RunStatus, SpanStatus
from journal.store import ClaimedRun, ExecutionKey
from journal.waits import node_answers
from journal.waits.node_answers import AnswerReception, AnswerResult
from models.database import Database
from models.execution import Execution
from models.execution_status import ExecutionStatus
from tests.integration import input_waits
from tests.integration.query_plans import explain_statement
from tests.integration.run_database import (
    MigratedDatabase,
    RunDatabase,
    key_of,
    microseconds_from_now,
    write,
)

pytestmark = pytest.mark.every_database

YES = node_answers.encode_output_answer({"choice": "approve"}, "approve")


@pytest.fixture(scope="module", params=["on_sqlite", "on_postgres", "on_serializable_postgres"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


async def give(
    run_database: RunDatabase,
    key: ExecutionKey,
    payload: bytes = YES,
    *,
    iteration: str = "",
    kind: AnswerSource = AnswerSource.INPUT,
    database: Database | None = None,
) -> AnswerResult:
    return await (database or run_database.database).transaction(
        lambda connection: node_answers.store_answer(
            connection, key, "approval", iteration, payload, kind=kind, user_id="user_1"
        )
    )


def waiting_span(*, kind: str = "input", expires_at: datetime | None = None) -> NodeSpan:
    """Return the recorded span of a node that waits for an answer."""
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


async def go_to_sleep(run_database: RunDatabase, run: ClaimedRun) -> None:
    ended = write(run, spans=[waiting_span()], end=RunStatus.WAITING, wait_answer_count=run.wait_answer_count)
    assert await run_database.store.record([ended]) == {run.execution_id}


async def test_an_answer_wakes_a_waiting_run_and_is_read_by_its_next_owner(
    run_database: RunDatabase,
) -> None:
    run = await run_database.accept_and_claim(timeout_seconds=100.0)
    await go_to_sleep(run_database, run)
    assert (await run_database.row(run.execution_id))["status"] == "waiting"
    assert await run_database.store.promote_due() == 0

    assert await give(run_database, key_of(run)) == AnswerResult(AnswerReception.TAKEN, is_woken=True)
    row = await run_database.row(run.execution_id)
    assert (row["status"], row["wait_answer_count"], row["due_at"]) == ("pending", 1, None)
    assert microseconds_from_now(90) < row["deadline_at"] <= microseconds_from_now(100)
    (again,) = await run_database.claim()
    assert again.wait_answer_count == 1
    assert await node_answers.read_answers(run_database.database, [key_of(again)]) == {
        run.execution_id: {("approval", ""): YES}
    }


async def test_a_run_that_was_answered_while_it_worked_does_not_go_to_sleep(
    run_database: RunDatabase,
) -> None:
    run = await run_database.accept_and_claim()
    await run_database.store.record([write(run, spans=[waiting_span()])])
    answer = await give(run_database, key_of(run))
    assert (answer.reception, answer.is_woken) == (AnswerReception.TAKEN, False)
    assert answer.held is not None  # the worker of the run can be notified
    await go_to_sleep(run_database, run)
    assert (await run_database.row(run.execution_id))["status"] == "pending"
    (again,) = await run_database.claim()
    assert again.wait_answer_count == 1
    # The run has seen the answer, and its new wait is a different one.
    await go_to_sleep(run_database, again)
    assert (await run_database.row(run.execution_id))["status"] == "waiting"


async def test_an_answer_and_the_write_that_it_races_lose_nothing(run_database: RunDatabase) -> None:
    for _ in range(5):
        run = await run_database.accept_and_claim()
        await run_database.store.record([write(run, spans=[waiting_span()])])
        given, _ = await asyncio.gather(give(run_database, key_of(run)), go_to_sleep(run_database, run))
        assert given.reception is AnswerReception.TAKEN
        (again,) = await run_database.claim()
        assert (again.execution_id, again.wait_answer_count) == (run.execution_id, 1)


async def test_of_two_answers_at_once_one_counts(run_database: RunDatabase) -> None:
    run = await run_database.accept_and_claim()
    await go_to_sleep(run_database, run)
    other = Database(run_database.url)
    try:
        both = await asyncio.gather(
            give(run_database, key_of(run)),
            give(run_database, key_of(run), node_answers.encode_error_answer("no", "No"), database=other),
        )
    finally:
        await other.close()
    assert {one.reception for one in both} == {AnswerReception.TAKEN, AnswerReception.LATE}
    assert (await run_database.row(run.execution_id))["wait_answer_count"] == 1
    first = (
        YES if both[0].reception is AnswerReception.TAKEN else node_answers.encode_error_answer("no", "No")
    )
    assert (await node_answers.read_answers(run_database.database, [key_of(run)]))[run.execution_id] == {
        ("approval", ""): first
    }
    # A client that missed the acknowledgment may repeat the answer.
    assert (await give(run_database, key_of(run), first)).reception is AnswerReception.TAKEN


async def test_unawaited_answers_are_refused(run_database: RunDatabase) -> None:
    place = await run_database.workflow()
    fresh = await run_database.accept(place)
    assert (await give(run_database, fresh)).reception is AnswerReception.UNAWAITED
    assert (await give(run_database, ExecutionKey("exec_absent", 0))).reception is AnswerReception.UNAWAITED

    key = await run_database.accept(place)
    await input_waits.wait_for_input(
        run_database.database, key.execution_id, expires_in=-timedelta(seconds=1)
    )
    assert (await give(run_database, key)).reception is AnswerReception.EXPIRED
    await input_waits.wait_for_input(run_database.database, key.execution_id, iteration="1", kind="run")
    assert (await give(run_database, key, iteration="1")).reception is AnswerReception.UNAWAITED
    assert (
        await give(run_database, key, iteration="1", kind=AnswerSource.RUN)
    ).reception is AnswerReception.TAKEN

    ended = await run_database.accept(place)
    await input_waits.wait_for_input(
        run_database.database, ended.execution_id, status=ExecutionStatus.STOPPED
    )
    assert (await give(run_database, ended)).reception is AnswerReception.UNAWAITED


async def test_a_run_may_answer_before_the_one_that_started_it_has_gone_to_sleep(
    run_database: RunDatabase,
) -> None:
    run = await run_database.accept_and_claim()
    starting = NodeSpan(
        "approval", "Sub", "sub-workflow", SpanStatus.RUNNING, sequence=1, started_at=datetime.now(UTC)
    )
    await run_database.store.record([write(run, spans=[starting])])
    assert (await give(run_database, key_of(run))).reception is AnswerReception.UNAWAITED
    assert (await give(run_database, key_of(run), kind=AnswerSource.RUN)).reception is AnswerReception.TAKEN
    await go_to_sleep(run_database, run)
    assert (await run_database.row(run.execution_id))["status"] == "pending"


async def test_a_run_that_shares_its_places_waits_for_one_when_it_is_woken(run_database: RunDatabase) -> None:
    key = await run_database.accept(await run_database.workflow(), concurrency_key="wf", concurrency_limit=1)
    await input_waits.wait_for_input(run_database.database, key.execution_id)
    assert await give(run_database, key) == AnswerResult(
        AnswerReception.TAKEN, is_woken=True, concurrency_key="wf"
    )
    row = await run_database.row(key.execution_id)
    assert (row["status"], row["target"]) == ("pending", "limited")
    assert await run_database.claim() == []


async def test_open_questions_of_an_organization_are_found_without_its_other_waiting_runs(
    run_database: RunDatabase,
) -> None:
    visible = col(Execution.organization_id) == "org_1"
    behind = node_answers.WaitPosition("exec_9", 3)
    for statement in (
        node_answers.organization_waits_statement(visible, "org_1", 1, limit=10),
        node_answers.organization_waits_statement(
            visible, "org_1", 1, behind, limit=10, mentions=("user_1", "a@b.example")
        ),
    ):
        plan = await explain_statement(run_database.database, statement)
        assert "ix_span_input" in plan
        assert "span_pkey" not in plan
        assert "autoindex_span" not in plan
