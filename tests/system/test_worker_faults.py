from functools import partial

from journal.store import JournalStore
from journal.store_factory import open_store
from models.database import parse_url
from models.errors import DatabaseUnavailable
from tests.system import consistency_checks, workflow_shapes
from tests.system.client import RetryingClient
from tests.system.harness import (
    RECOVERY_SECONDS,
    ManyProcesses,
    SystemUnderTest,
    on_both_run_paths,
    on_many_processes,
    on_many_processes_and_both_run_paths,
)
from tests.system.ledger import EffectLedger
from tests.system.processes import SystemProcess
from tests.system.wait_conditions import wait_until


@on_many_processes
async def test_two_workers_that_race_for_the_same_rows_share_them(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger, *, is_thorough: bool
) -> None:
    workflow = await client.create(
        workflow_shapes.chain_workflow(ledger.writes("charge"), ledger.writes("ship"))
    )
    one, other = deployment.workers
    with one.paused(), other.paused():
        runs = [await client.execute(workflow) for _ in range(100 if is_thorough else 30)]
    await consistency_checks.assert_consistent(deployment, client, ledger, dict.fromkeys(runs, "completed"))
    assert not consistency_checks.count_repeated(ledger.effects())


@on_many_processes
async def test_a_worker_that_slept_past_its_lease_changes_nothing_when_it_wakes(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(
        workflow_shapes.chain_workflow(ledger.reads("look"), ledger.writes("charge"), ledger.writes("ship"))
    )
    with ledger.holding("charge") as held:
        run = await client.execute(workflow)
        sleeper = deployment.sender(await held.next_call())
        with sleeper.paused():
            again = await held.next_call()
            assert deployment.sender(again) is deployment.other_worker(sleeper)
            held.release()
            assert (await client.end(run)).status == "completed"
        await wait_until(lambda: sleeper.has_logged("run abandoned", run))
    await consistency_checks.assert_consistent(deployment, client, ledger, {run: "completed"})
    assert (len(ledger.of("charge")), len(ledger.of("ship"))) == (2, 1)


@on_both_run_paths
async def test_a_worker_suspended_past_its_lease_starts_its_runs_again(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(
        workflow_shapes.chain_workflow(ledger.reads("look"), ledger.writes("charge"), ledger.writes("ship"))
    )
    with ledger.holding("charge") as held:
        run = await client.execute(workflow)
        sleeper = deployment.sender(await held.next_call())
        while not await _pause_until_taken_back(sleeper, deployment, run):
            pass
        await held.next_call()
    await consistency_checks.assert_consistent(
        deployment, client, ledger, {run: "completed"}, within=RECOVERY_SECONDS
    )


@on_many_processes
async def test_a_worker_that_fell_asleep_in_a_commit_begins_no_node_after_it(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(
        workflow_shapes.chain_workflow(ledger.reads("look"), ledger.writes("charge"), ledger.writes("ship"))
    )
    with ledger.holding("look") as held:
        run = await client.execute(workflow)
        sleeper = deployment.sender(await held.next_call())
        # The run's row is locked: the worker is still in the commit before `charge` when it is paused.
        async with deployment.records.row_locked(run) as lock:
            held.release()
            await wait_until(lambda: _is_waited_for(deployment, lock))
            sleeper.pause()
    await wait_until(lambda: ledger.of("charge"), RECOVERY_SECONDS)
    assert (await client.end(run)).status == "completed"
    sleeper.resume()
    await wait_until(lambda: sleeper.has_logged("run abandoned", run))
    await consistency_checks.assert_consistent(deployment, client, ledger, {run: "completed"})
    assert len(ledger.of("charge")) == 1


@on_many_processes
async def test_a_result_that_was_on_its_way_when_the_lease_was_lost_changes_nothing(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(
        workflow_shapes.chain_workflow(ledger.writes("charge"), ledger.writes("ship"))
    )
    one, other = deployment.workers
    with ledger.holding("charge") as charged, ledger.holding("ship") as shipped:
        with other.paused():
            run = await client.execute(workflow)
            late = await charged.next_call()
        # In the literal of an array, quotes are escaped.
        async with deployment.late_requests(rf"\"receipt\":{late.receipt}".encode()):
            charged.release()
            # The other worker has taken over, and is in the middle of the next node, when the result arrives.
            assert deployment.sender(await shipped.next_call()) is other
        await wait_until(lambda: one.has_logged("run abandoned", run))
    ended = await client.end(run)
    assert ended.outputs["charge"]["body"] != {"receipt": late.receipt}
    await consistency_checks.assert_consistent(deployment, client, ledger, {run: "completed"})
    assert (len(ledger.of("charge")), len(ledger.of("ship"))) == (2, 1)


@on_many_processes_and_both_run_paths
async def test_sigterm_hands_runs_over_between_two_nodes(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    ledger.delay_seconds = 0.1
    workflow = await client.create(workflow_shapes.journey_workflow(ledger))
    runs = [await client.execute(workflow) for _ in range(8)]
    leaving = deployment.sender(await ledger.call(2 * len(runs)))
    leaving.terminate()
    assert await leaving.exit_code() == 0
    await consistency_checks.assert_consistent(deployment, client, ledger, dict.fromkeys(runs, "completed"))
    assert not consistency_checks.count_repeated(ledger.effects())


async def test_a_run_ends_when_its_time_is_over_though_its_worker_died_meanwhile(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(
        workflow_shapes.chain_workflow(ledger.writes("charge"), ledger.writes("ship"), timeout=3)
    )
    with ledger.holding("charge") as held:
        run = await client.execute(workflow)
        deployment.sender(await held.next_call()).kill()
        await deployment.revive()
        ended = await client.end(run, within=3 + RECOVERY_SECONDS)
        assert ended.error_code == "timeout"
        await consistency_checks.assert_consistent(deployment, client, ledger, {run: "failed"})
    assert not ledger.of("ship")


async def _pause_until_taken_back(sleeper: SystemProcess, deployment: SystemUnderTest, run: str) -> bool:
    """Pause a worker until its run is reclaimed; return False if a write of it has locked SQLite's file."""
    environment = deployment.gateway.environment
    file = f"sqlite:///{environment['PILOTFLAME_DATA_DIR']}/pilotflame.db"
    store = await open_store(parse_url(environment.get("PILOTFLAME_DATABASE_URL", file)))
    with sleeper.paused():
        try:
            # Reclaimed meanwhile: with a process of its own it might renew its lease before its sweep meets it.
            await wait_until(partial(_is_taken_back, deployment, store, run))
        except DatabaseUnavailable:
            return False
        finally:
            await store.close()
    return True


async def _is_taken_back(deployment: SystemUnderTest, store: JournalStore, run: str) -> bool:
    """Sweep like a worker; return whether the run has no owner or another worker."""
    ((before,),) = await deployment.records.fetch(f"SELECT token FROM execution WHERE id = '{run}'")
    return (await store.sweep(100)).requeued > 0 or before > 1


async def _is_waited_for(deployment: SystemUnderTest, owner: int) -> bool:
    waiting = f"SELECT 1 FROM pg_stat_activity WHERE {owner} = ANY (pg_blocking_pids(pid)) AND query LIKE '%WITH held%'"
    return bool(await deployment.records.fetch(waiting))
