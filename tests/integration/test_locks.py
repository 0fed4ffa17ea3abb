"""PostgreSQL locks held by others: a locked row or key delays only its own operations."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import QueuePool

from engine.run_records import RunStatus
from gateway.pods import lease_checks
from gateway.pods.lease_checks import LeaseHolder
from journal import concurrency_limits
from journal.recorder import LeaseKeeper, RunLease, RunRecorder
from journal.run_deletion import delete_runs
from journal.store import ExecutionKey
from journal.waits import children, completion
from models import postgresql_sessions as sessions
from models.database import Database, parse_url
from models.errors import DatabaseUnavailable, LockWaitTimeout, PartialCommit
from models.pod_identity import PodProcess
from tests.integration.lock_holders import (
    PROMPT_SECONDS,
    hold_transaction_open,
    open_impatient_database,
    require_prompt,
)
from tests.integration.run_database import (
    MigratedDatabase,
    OwnedWorkflow,
    RunDatabase,
    key_of,
    lease_of,
    microseconds_from_now,
    write,
)
from tests.system.wait_conditions import wait_until


@pytest.fixture(scope="module", params=["on_postgres", "behind_pgbouncer"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def owned_workflow(run_database: RunDatabase) -> OwnedWorkflow:
    return await run_database.workflow()


@pytest.fixture
async def database(run_database: RunDatabase) -> AsyncIterator[Database]:
    """Yield the database as a process reaches it, by way of the pooler where there is one."""
    database = Database(run_database.url)
    yield database
    await database.close()


def lock_execution(run_database: RunDatabase, execution_id: str) -> AbstractAsyncContextManager[None]:
    return hold_transaction_open(
        run_database.database.url, "SELECT FROM execution WHERE id = $1 FOR UPDATE", execution_id
    )


def hold_key_lock(run_database: RunDatabase, key: str) -> AbstractAsyncContextManager[None]:
    return hold_transaction_open(
        run_database.database.url,
        "SELECT pg_advisory_xact_lock($1)",
        concurrency_limits.advisory_lock_id(key),
    )


def count_connections(database: Database) -> int:
    """Return how many connections are in use."""
    pool = database.engine.pool
    assert isinstance(pool, QueuePool)
    return pool.checkedout()


async def read_status(run_database: RunDatabase, execution_id: str) -> str:
    found: str = (await run_database.row(execution_id))["status"]
    return found


async def create_due_runs(run_database: RunDatabase, owned_workflow: OwnedWorkflow, count: int) -> list[str]:
    """Create runs with expired waits, and return their ids."""
    due_at = datetime.now(UTC) - timedelta(seconds=1)
    runs = [await run_database.accept_and_claim(owned_workflow) for _ in range(count)]
    await run_database.store.record([write(one, end=RunStatus.WAITING, due_at=due_at) for one in runs])
    return [one.execution_id for one in runs]


async def test_a_locked_wait_holds_up_no_other_wait_and_no_dead_worker_s_run(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    kept, *others = await create_due_runs(run_database, owned_workflow, 3)
    orphan = await run_database.accept_and_claim(owned_workflow)
    await run_database.expire(orphan)
    async with lock_execution(run_database, kept):
        swept = await require_prompt(run_database.store.sweep(10))
        assert (swept.requeued, swept.due) == (1, 2)
        assert await require_prompt(run_database.store.promote_due()) == 0
        assert [await read_status(run_database, one) for one in (kept, *others)] == [
            "waiting",
            "pending",
            "pending",
        ]
    assert await run_database.store.promote_due() == 1


async def test_a_locked_wait_of_a_deployment_holds_up_no_other_of_it(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    kept, other = await create_due_runs(run_database, owned_workflow, 2)
    await run_database.query("UPDATE execution SET target = :id", id=owned_workflow.workflow_id)
    process = PodProcess.new("pod-1")
    holder = LeaseHolder(
        owned_workflow.workflow_id, owned_workflow.organization.id, owned_workflow.organization.shard, process
    )
    async with lock_execution(run_database, kept):
        assert await require_prompt(lease_checks.promote_due(run_database.database, holder)) == 1
        assert [await read_status(run_database, one) for one in (kept, other)] == ["waiting", "pending"]
    assert await lease_checks.promote_due(run_database.database, holder) == 1


async def test_a_locked_run_of_a_dead_worker_holds_up_no_other_of_them(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    runs = [await run_database.accept_and_claim(owned_workflow) for _ in range(3)]
    async with lock_execution(run_database, runs[0].execution_id):
        assert await require_prompt(run_database.store.release("worker", [runs[1].execution_id])) == 1
        assert await require_prompt(run_database.store.reclaim("worker")) == 1
        assert await read_status(run_database, runs[0].execution_id) == "running"
    assert await run_database.store.reclaim("worker") == 1


# ── running runs ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_locked_run_costs_its_worker_no_other_lease(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    kept, lost, *others = [await run_database.accept_and_claim(owned_workflow) for _ in range(4)]
    await run_database.store.record([write(lost, end=RunStatus.COMPLETED)])
    leases = [lease_of(one) for one in (kept, lost, *others)]
    async with lock_execution(run_database, kept.execution_id):
        renewed = await require_prompt(run_database.store.renew(leases, 500.0))
        assert {one.execution_id: one.is_locked for one in renewed} == {
            kept.execution_id: True,
            **{one.execution_id: False for one in others},
        }
        for one in others:
            assert (await run_database.row(one.execution_id))["lease_until"] > microseconds_from_now(400)
    (now_free,) = await run_database.store.renew([lease_of(kept)], 500.0)
    assert not now_free.is_locked


async def test_a_lease_with_a_briefly_locked_row_is_renewed_before_it_ends(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    one = await run_database.accept_and_claim(owned_workflow)
    lost: list[RunLease] = []
    keeper = LeaseKeeper(
        run_database.store, 6.0, on_lost=lost.append, on_request=lambda _lease, _request: None
    )
    lease = keeper.hold(key_of(one), one.token, monotonic())
    until = lease.until
    async with lock_execution(run_database, one.execution_id):
        keeper.start()
        await wait_until(lambda: monotonic() > until - 3)
        assert lease.until == until
    await wait_until(lambda: lease.until > until)
    keeper.stop()
    assert not lost


async def test_a_batch_that_meets_a_locked_run_is_written_without_it(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    kept, lost, *others = [await run_database.accept_and_claim(owned_workflow) for _ in range(4)]
    await run_database.store.record([write(lost, end=RunStatus.COMPLETED)])
    ends = [write(one, end=RunStatus.COMPLETED) for one in (kept, lost, *others)]
    async with lock_execution(run_database, kept.execution_id):
        with pytest.raises(PartialCommit) as raised:
            await require_prompt(run_database.store.record(ends))
        assert raised.value.held == {one.execution_id for one in others}
        assert raised.value.unwritten == {kept.execution_id}
        assert {await read_status(run_database, one.execution_id) for one in others} == {"completed"}
    assert await run_database.store.record(ends[:1]) == {kept.execution_id}


async def test_records_batched_with_a_locked_run_wait_for_its_lock_once(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    kept, other = [await run_database.accept_and_claim(owned_workflow) for _ in range(2)]
    recorder = RunRecorder(run_database.store, lambda _channels, _outcomes: None)
    async with lock_execution(run_database, kept.execution_id):
        first = [recorder.submit(write(one)) for one in (kept, other)]
        answers = await require_prompt(asyncio.gather(*first, return_exceptions=True))
        assert [type(answers[0]), answers[1]] == [PartialCommit, True]
        stuck = recorder.submit(write(kept))
        for _ in range(20):
            assert await require_prompt(recorder.submit(write(other)))
            assert not stuck.done()
        with pytest.raises(PartialCommit):
            await stuck
    assert await require_prompt(recorder.submit(write(kept)))


# ── concurrency keys ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_key_that_a_frozen_process_has_locked_holds_up_no_other_key(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = [{"concurrency_key": key, "concurrency_limit": 1} for key in ("a", "b", "b")]
    runs = [owned_workflow.run(**limit) for limit in limits]
    await run_database.store.accept(runs)
    async with (
        open_impatient_database(run_database.url, monkeypatch) as database,
        hold_key_lock(run_database, "a"),
    ):
        assert await require_prompt(concurrency_limits.admit_waiting_keys(database)) == (1, "")
        # Many at once use one connection, so that others remain.
        waiting = [
            asyncio.create_task(concurrency_limits.admit_waiting_runs(database, "a")) for _ in range(30)
        ]
        assert await require_prompt(concurrency_limits.admit_waiting_runs(database, "b")) == 0
        assert count_connections(database) <= 1
        assert await require_prompt(asyncio.gather(*waiting)) == [0] * 30
    assert await concurrency_limits.admit_waiting_runs(run_database.database, "a") == 1


async def test_a_locked_run_that_waits_for_a_place_leaves_it_to_the_next(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    first, second = [owned_workflow.run(concurrency_key="a", concurrency_limit=1) for _ in range(2)]
    await run_database.store.accept([first, second])
    async with lock_execution(run_database, first.execution_id):
        assert await require_prompt(concurrency_limits.admit_waiting_keys(run_database.database)) == (1, "")
    targets = [(await run_database.row(run.execution_id))["target"] for run in (first, second)]
    assert targets == ["limited", "shared"]


# ── sessions ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_request_blocked_by_a_lasting_lock_is_told_to_try_again(
    run_database: RunDatabase, database: Database, owned_workflow: OwnedWorkflow
) -> None:
    run, ended = owned_workflow.run(), owned_workflow.run()
    await run_database.store.accept([run, ended])
    other = await run_database.workflow()
    theirs = other.run(definition='{"nodes":[1],"connections":[]}', definition_hash="1" * 64)

    async def touch(connection: AsyncConnection) -> None:
        await connection.execute(
            text("UPDATE execution SET shard = shard WHERE id = :id"), {"id": run.execution_id}
        )

    all_rows = "SELECT FROM execution, definition FOR UPDATE"
    async with hold_transaction_open(run_database.database.url, all_rows):
        started_at = monotonic()
        answers = await asyncio.gather(
            database.transaction(touch),
            run_database.store.request_end(ExecutionKey(ended.execution_id, ended.shard), "stop"),
            run_database.store.accept([owned_workflow.run()]),
            return_exceptions=True,
        )
        assert [type(answer) for answer in answers] == [LockWaitTimeout] * 3
        assert monotonic() - started_at < PROMPT_SECONDS
        await require_prompt(run_database.store.accept([theirs]))


async def test_transactions_that_wait_for_one_row_take_one_connection_and_fail_together(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = owned_workflow.run()
    await run_database.store.accept([run])

    async def touch(connection: AsyncConnection) -> None:
        await connection.execute(
            text("UPDATE execution SET shard = shard WHERE id = :id"), {"id": run.execution_id}
        )

    async with open_impatient_database(run_database.url, monkeypatch) as database:
        async with lock_execution(run_database, run.execution_id):
            waiting = [
                asyncio.create_task(database.transaction(touch, locks=run.execution_id)) for _ in range(100)
            ]
            await require_prompt(database.ping())
            assert count_connections(database) <= 1
            answers = await require_prompt(asyncio.gather(*waiting, return_exceptions=True))
            assert {type(answer) for answer in answers} == {LockWaitTimeout}
        await asyncio.gather(*(database.transaction(touch, locks=run.execution_id) for _ in range(20)))


async def test_a_transaction_of_a_frozen_process_ends_by_itself(database: Database) -> None:
    async def timeouts(connection: AsyncConnection) -> list[str]:
        names = ("lock_timeout", "idle_in_transaction_session_timeout")
        return [
            str(await connection.scalar(text("SELECT current_setting(:name)"), {"name": name}))
            for name in names
        ]

    assert await database.transaction(timeouts) == ["2s", "5s"]


async def test_connections_to_a_machine_that_is_gone_end_on_both_sides(on_postgres: MigratedDatabase) -> None:
    connection = await sessions.open_session(sessions.driver_address(parse_url(on_postgres.url)), settings={})
    try:
        assert await connection.fetchval("SELECT current_setting('tcp_user_timeout')") == "10000"
        ours = connection._transport.get_extra_info("socket")  # noqa: SLF001 - nothing else tells
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
    finally:
        await connection.close()


# ── failures of the server ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sqlstate", ["25006", "53100", "53200", "57014", "58030"])
async def test_a_server_that_reads_only_or_is_full_is_unavailable_on_every_path(
    run_database: RunDatabase, database: Database, owned_workflow: OwnedWorkflow, sqlstate: str
) -> None:
    await run_database.query(
        f"""CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN RAISE EXCEPTION 'out of order' USING ERRCODE = '{sqlstate}'; END $$"""
    )
    await run_database.query("CREATE TRIGGER fails BEFORE INSERT ON definition EXECUTE FUNCTION fail()")
    try:
        with pytest.raises(DatabaseUnavailable):
            await run_database.store.accept([owned_workflow.run()])
        with pytest.raises(DatabaseUnavailable):
            await database.transaction(
                lambda connection: connection.execute(text("INSERT INTO definition SELECT * FROM definition"))
            )
    finally:
        await run_database.query("DROP FUNCTION fail CASCADE")
    await run_database.store.accept([owned_workflow.run()])


async def test_a_value_that_the_driver_refuses_is_no_fault_of_the_server(
    run_database: RunDatabase, database: Database, owned_workflow: OwnedWorkflow
) -> None:
    with pytest.raises(asyncpg.DataError):
        await run_database.store.accept([owned_workflow.run(timeout_seconds=1e30)])
    with pytest.raises(DBAPIError):
        await database.transaction(
            lambda connection: connection.execute(text("SELECT CAST(:n AS bigint)"), {"n": 2**70})
        )


# ── bulk operations ───────────────────────────────────────────────────────────────────────────────────────


async def create_ended_runs(
    run_database: RunDatabase,
    owned_workflow: OwnedWorkflow,
    **changes: Any,  # noqa: ANN401 - any field of an Acceptance
) -> list[ExecutionKey]:
    """Create two completed runs, and return their ids."""
    runs = [await run_database.accept_and_claim(owned_workflow, **changes) for _ in range(2)]
    await run_database.store.record([write(one, end=RunStatus.COMPLETED) for one in runs])
    return [key_of(one) for one in runs]


async def test_a_locked_run_holds_up_the_follow_up_of_no_other(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    kept, other = keys = await create_ended_runs(
        run_database, owned_workflow, completion_action='{"callback":{"url":"http://127.0.0.1"}}'
    )
    async with lock_execution(run_database, kept.execution_id):
        due = await require_prompt(completion.claim_completions(run_database.database, keys, 30.0))
        assert [one.key for one in due] == [other]
    assert [one.key for one in await completion.claim_completions(run_database.database, keys, 30.0)] == [
        kept
    ]


async def test_a_locked_run_holds_up_the_deletion_of_no_other(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    kept, other = [key.execution_id for key in await create_ended_runs(run_database, owned_workflow)]
    async with lock_execution(run_database, kept):
        assert [*await require_prompt(delete_runs(run_database.database, [kept, other]))] == [other]
    assert [*await delete_runs(run_database.database, [kept, other])] == [kept]


async def test_a_locked_child_holds_up_the_end_of_no_other(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    parent = await run_database.accept_and_claim(owned_workflow)
    completion_action = json.dumps(children.completion_for_parent(parent.execution_id, "node", ""))
    family = {"parent_id": parent.execution_id, "root_id": parent.execution_id, "depth": 1}
    kept, other = [
        await run_database.accept(owned_workflow, completion_action=completion_action, **family)
        for _ in range(2)
    ]
    await run_database.store.record([write(parent, end=RunStatus.STOPPED)])
    async with lock_execution(run_database, kept.execution_id):
        abandoned = await require_prompt(
            children.request_abandoned_ends(run_database.database, run_database.store)
        )
        assert [one.execution_id for one in abandoned] == [other.execution_id]
    abandoned = await children.request_abandoned_ends(run_database.database, run_database.store)
    assert [one.execution_id for one in abandoned] == [kept.execution_id]
