"""Blocked intervals: every reason that keeps a run from moving leaves its time, on both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from engine.node_api import AnswerSource
from engine.run_records import NodeSpan, RunStatus, SpanStatus
from journal import blocked_intervals, concurrency_limits, held_runs
from journal.deployments import wakes
from journal.explanations.blockers import BlockerCode
from journal.store import ExecutionKey
from journal.waits import node_answers
from models.execution import DELAYED_TARGET
from models.timestamps import to_microseconds
from tests.integration.run_database import (
    MigratedDatabase,
    RunDatabase,
    key_of,
    microseconds_from_now,
    open_run_database,
    write,
)

pytestmark = pytest.mark.every_database

FOREVER = to_microseconds(held_runs.UNTIL_RESUMED)


@pytest.fixture(params=["on_sqlite", "on_postgres"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def runs(migrated_database: MigratedDatabase) -> AsyncIterator[RunDatabase]:
    with capture_logs():
        async with open_run_database(migrated_database) as run_database:
            yield run_database


async def intervals(runs: RunDatabase, key: ExecutionKey) -> list[dict[str, Any]]:
    return await runs.query(
        "SELECT code, node_id, started_at, ended_at, resumed_at, pod_started_at FROM blocked_interval"
        " WHERE execution_id = :id ORDER BY started_at",
        id=key.execution_id,
    )


async def waiting(runs: RunDatabase, *, blocked_by: BlockerCode = BlockerCode.TIMER) -> ExecutionKey:
    """Return a run with a node that waits for an answer or the end of an hour."""
    one = await runs.accept_and_claim()
    now = datetime.now(UTC)
    span = NodeSpan(
        "ask",
        "Ask",
        "human-input",
        SpanStatus.WAITING,
        1,
        now,
        wake_at=now + timedelta(hours=1),
        awaits=b'{"kind":"input","request":{},"expired":null}',
    )
    await runs.store.record(
        [
            write(
                one,
                spans=[span],
                end=RunStatus.WAITING,
                due_at=span.wake_at,
                blocked_by=blocked_by,
                blocked_node="ask",
            )
        ]
    )
    return key_of(one)


async def age(runs: RunDatabase, key: ExecutionKey, **columns: int) -> None:
    """Let the last change of a run be ten seconds ago, and set further columns."""
    changes = "".join(f", {name} = {value}" for name, value in columns.items())
    await runs.query(
        f"UPDATE execution SET updated_at = updated_at - 10000000{changes} WHERE id = :id",
        id=key.execution_id,
    )


async def test_a_run_that_never_waits_leaves_no_interval(runs: RunDatabase) -> None:
    one = await runs.accept_and_claim()
    await runs.store.record([write(one, end=RunStatus.COMPLETED)])
    assert await runs.count("blocked_interval") == 0


async def test_a_timer_ends_when_it_is_due_and_the_claim_ends_the_queue(runs: RunDatabase) -> None:
    key = await waiting(runs)
    (row,) = await intervals(runs, key)
    assert (row["code"], row["node_id"], row["ended_at"], row["resumed_at"]) == ("timer", "ask", None, None)
    await age(runs, key, due_at=1)
    assert await runs.store.promote_due() == 1
    (row,) = await intervals(runs, key)
    assert row["ended_at"] is not None
    assert row["resumed_at"] is None
    await runs.claim()
    (row,) = await intervals(runs, key)
    assert row["started_at"] <= row["ended_at"] <= row["resumed_at"]


async def test_an_answer_ends_the_interval(runs: RunDatabase) -> None:
    key = await waiting(runs, blocked_by=BlockerCode.AWAITING_INPUT)
    payload = node_answers.encode_output_answer({})
    await runs.database.transaction(
        lambda connection: node_answers.store_answer(
            connection, key, "ask", "", payload, kind=AnswerSource.INPUT
        )
    )
    (row,) = await intervals(runs, key)
    assert row["code"] == "awaiting-input"
    assert row["ended_at"] is not None


async def test_an_answer_before_the_wait_leaves_time_in_the_queue(runs: RunDatabase) -> None:
    one = await runs.accept_and_claim()
    await runs.query("UPDATE execution SET wait_answer_count = 1 WHERE id = :id", id=one.execution_id)
    await runs.store.record([write(one, end=RunStatus.WAITING, blocked_by=BlockerCode.AWAITING_INPUT)])
    (row,) = await intervals(runs, key_of(one))
    assert row["code"] == "queued-behind"
    assert row["ended_at"] is not None


async def test_a_cancelled_wait_is_over(runs: RunDatabase) -> None:
    key = await waiting(runs)
    await runs.store.request_end(key, "cancel")
    (row,) = await intervals(runs, key)
    assert row["ended_at"] is not None


async def test_a_lost_worker_counts_from_the_end_of_its_lease(runs: RunDatabase) -> None:
    one = await runs.accept_and_claim()
    lost_at = microseconds_from_now(-5)
    await runs.query("UPDATE execution SET lease_until = :at WHERE id = :id", at=lost_at, id=one.execution_id)
    await runs.store.sweep(10)
    (row,) = await intervals(runs, key_of(one))
    assert (row["code"], row["started_at"]) == ("worker-lost", lost_at)
    assert row["ended_at"] > lost_at
    await runs.claim()
    (row,) = await intervals(runs, key_of(one))
    assert row["resumed_at"] >= row["ended_at"]


@pytest.mark.parametrize("out_of_memory", [False, True])
async def test_a_worker_that_is_known_to_be_dead_counts_from_its_reclaim(
    runs: RunDatabase, *, out_of_memory: bool
) -> None:
    one, other = await runs.accept_and_claim(), await runs.accept_and_claim()
    await runs.query("UPDATE execution SET lease_owner = 'other' WHERE id = :id", id=other.execution_id)
    for number in (1, 2):
        await runs.query("UPDATE execution SET lease_until = :at", at=microseconds_from_now(3_600))
        assert await runs.store.reclaim("worker", out_of_memory=out_of_memory) == 1
        rows = await intervals(runs, key_of(one))
        assert [row["code"] for row in rows] == ["worker-lost"] * number
        assert rows[-1]["ended_at"] - rows[-1]["started_at"] == 1, "it did not wait for the end of its lease"
        assert rows[-1]["resumed_at"] is None
        if out_of_memory:
            assert await runs.trial()
            break
        assert await (runs.claim() if number == 1 else runs.trial())
        (*_, row) = await intervals(runs, key_of(one))
        assert row["resumed_at"] >= row["ended_at"]
    assert await intervals(runs, key_of(other)) == []


async def test_a_wait_for_a_slot_is_kept_unless_it_was_short(runs: RunDatabase) -> None:
    place = await runs.workflow()
    limit = {"concurrency_key": place.workflow_id, "concurrency_limit": 1}
    short, long = await runs.accept(place, **limit), await runs.accept(place, **limit)
    await concurrency_limits.admit_waiting_runs(runs.database, place.workflow_id)
    assert await runs.count("blocked_interval") == 0
    (one,) = await runs.claim()
    assert one.execution_id == short.execution_id
    await runs.store.record([write(one, end=RunStatus.COMPLETED)])
    await age(runs, long)
    await concurrency_limits.admit_waiting_runs(runs.database, place.workflow_id)
    (row,) = await intervals(runs, long)
    assert row["code"] == "waiting-for-slot"
    assert row["ended_at"] - row["started_at"] >= 10_000_000


@pytest.mark.parametrize(
    ("target", "code"), [(DELAYED_TARGET, "workflow-paused"), ("wf_deployed", "stopped-manually")]
)
async def test_held_and_deferred_runs_keep_their_wait(runs: RunDatabase, target: str, code: str) -> None:
    place = await runs.workflow()
    key = await runs.accept(place)
    await age(runs, key, due_at=FOREVER)
    await runs.query(
        "UPDATE execution SET status = 'waiting', target = :target WHERE id = :id",
        target=target,
        id=key.execution_id,
    )

    async def release(connection: Any) -> None:  # noqa: ANN401 - a connection
        if target == DELAYED_TARGET:
            await held_runs.release_held_runs(connection, place.workflow_id)
        else:
            await wakes.release_deferred_runs(connection, target)

    await runs.database.transaction(release)
    (row,) = await intervals(runs, key)
    assert row["code"] == code
    assert row["ended_at"] - row["started_at"] >= 10_000_000
    await runs.store.promote_due()
    assert len(await intervals(runs, key)) == 1


async def test_a_window_that_opens_by_the_clock_ends_the_interval(runs: RunDatabase) -> None:
    key = await runs.accept(await runs.workflow())
    await age(runs, key, due_at=microseconds_from_now(-1))
    await runs.query(
        "UPDATE execution SET status = 'waiting', target = 'wf_deployed' WHERE id = :id", id=key.execution_id
    )
    await runs.store.promote_due()
    (row,) = await intervals(runs, key)
    assert row["code"] == "window-closed"


async def test_the_start_of_a_pod_counts_for_the_runs_that_waited_for_it(runs: RunDatabase) -> None:
    place = await runs.workflow()
    early, late = await runs.accept(place), await runs.accept(place)
    await runs.query(
        "UPDATE execution SET created_at = created_at - 10000000 WHERE id = :id", id=early.execution_id
    )
    claimed = [one.execution_id for one in await runs.claim()]
    pod_started_at = datetime.now(UTC) - timedelta(seconds=5)
    await runs.database.transaction(
        lambda connection: blocked_intervals.add_waking_intervals(connection, claimed, pod_started_at)
    )
    (row,) = await intervals(runs, early)
    assert row["code"] == "waking"
    assert row["ended_at"] - row["started_at"] >= 10_000_000
    assert row["pod_started_at"] == to_microseconds(pod_started_at)
    assert await intervals(runs, late) == []
