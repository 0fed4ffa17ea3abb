import asyncio

from tests.system import flows
from tests.system.client import Client
from tests.system.harness import RECOVERY_SECONDS, Deployment
from tests.system.ledger import Ledger

LIMIT = 2


async def test_a_killed_worker_s_places_are_taken_again_and_never_more_than_there_are(
    deployment: Deployment, client: Client, ledger: Ledger
) -> None:
    workflow = await client.create(flows.chain(ledger.writes("charge"), concurrency={"limit": LIMIT}))
    seen: list[int] = []
    with ledger.holding("charge") as held:
        runs = [await client.execute(workflow) for _ in range(8)]
        worker = deployment.sender(await held.arrived())
        watch = asyncio.create_task(look(deployment, workflow, seen))
        worker.kill()
        await deployment.revive()
        held.release()
    ended = [await client.end(run, within=2 * RECOVERY_SECONDS) for run in runs]
    assert {one.status for one in ended} == {"completed"}
    watch.cancel()
    assert max(seen) == LIMIT


async def look(deployment: Deployment, workflow_id: str, seen: list[int]) -> None:
    """Note again and again how many runs of a workflow somebody holds."""
    statement = f"SELECT count(*) FROM execution WHERE workflow_id = '{workflow_id}' AND status = 'running'"
    while True:
        (row,) = await deployment.records.fetch(statement)
        seen.append(row[0])
        await asyncio.sleep(0.02)
