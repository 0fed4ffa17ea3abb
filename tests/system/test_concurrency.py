import asyncio

from journal import concurrency_limits
from tests.system import consistency_checks, workflow_shapes
from tests.system.client import RetryingClient
from tests.system.harness import RECOVERY_SECONDS, ManyProcesses, SystemUnderTest, on_many_processes
from tests.system.ledger import EffectLedger

LIMIT = 2


async def test_a_killed_worker_s_places_are_taken_again_and_never_more_than_there_are(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(
        workflow_shapes.chain_workflow(ledger.writes("charge"), concurrency={"limit": LIMIT})
    )
    seen: list[int] = []
    with ledger.holding("charge") as held:
        runs = [await client.execute(workflow) for _ in range(8)]
        worker = deployment.sender(await held.next_call())
        watch = asyncio.create_task(look(deployment, workflow, seen))
        worker.kill()
        await deployment.revive()
        held.release()
    ended = [await client.end(run, within=2 * RECOVERY_SECONDS) for run in runs]
    assert {one.status for one in ended} == {"completed"}
    watch.cancel()
    assert max(seen) == LIMIT


@on_many_processes
async def test_a_worker_frozen_while_it_gives_places_holds_up_neither_its_workflow_nor_another(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    # In the order in which sweeps go through them.
    first, second = sorted(
        [
            await client.create(
                workflow_shapes.chain_workflow(ledger.writes("charge"), concurrency={"limit": 1})
            )
            for _ in range(2)
        ]
    )
    way = deployment.ways.worker_to_database
    frozen, other = deployment.workers
    with other.paused():
        way.keep_answers(concurrency_limits.advisory_lock_id(first).to_bytes(8, "big", signed=True))
        runs = [await client.execute(first)]
        await way.kept_one()
        frozen.pause()
    runs += [await client.execute(workflow) for workflow in (first, second) for _ in range(3)]
    for run in reversed(runs):
        assert (await client.end(run, within=RECOVERY_SECONDS)).status == "completed"
    way.let_go()
    frozen.resume()
    await consistency_checks.assert_consistent(deployment, client, ledger, dict.fromkeys(runs, "completed"))


async def look(deployment: SystemUnderTest, workflow_id: str, seen: list[int]) -> None:
    """Record repeatedly the number of running executions of a workflow."""
    statement = f"SELECT count(*) FROM execution WHERE workflow_id = '{workflow_id}' AND status = 'running'"
    while True:
        (row,) = await deployment.records.fetch(statement)
        seen.append(row[0])
        await asyncio.sleep(0.02)
