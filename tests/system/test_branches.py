"""Branches that split and merge, in runs with a worker that is killed midway."""

import random

from engine.values import Json
from tests.system import consistency_checks, workflow_shapes
from tests.system.client import RetryingClient
from tests.system.harness import RECOVERY_SECONDS, SystemUnderTest, on_one_process
from tests.system.ledger import EffectLedger
from tests.system.wait_conditions import act_after, wait_until

RUNS = 6
CALLS = 5 * RUNS
KILLS = 2


def race_workflow(ledger: EffectLedger) -> dict[str, Json]:
    """Return a workflow with two branches, of which the first to arrive leads on at once, and both at the end."""
    cases: Json = [{"port": "urgent", "equals": 1}, {"port": "idle", "equals": 2}]
    route: workflow_shapes.Node = {"id": "route", "nodeId": "switch", "config": {"value": 1, "cases": cases}}
    first: workflow_shapes.Node = {"id": "first", "nodeId": "merge", "config": {"mode": "any"}}
    both: workflow_shapes.Node = {"id": "both", "nodeId": "merge"}
    nodes = [
        *(workflow_shapes.START, route, ledger.writes("east"), ledger.reads("look"), ledger.writes("west")),
        *(ledger.writes("never"), first, ledger.writes("ship"), both, ledger.writes("report")),
    ]
    edges = """
        start>route route:urgent>east route:urgent>look look>west route:idle>never route:default>never
        east>first west>first never>first first>ship
        east>both west>both ship>both never>both both>report
    """
    return workflow_shapes.build_workflow(nodes, edges)


@on_one_process
async def test_branches_meet_as_they_would_have_though_the_worker_is_killed(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    chance = random.Random(4)
    ledger.delay_seconds = 0.02
    workflow = await client.create(race_workflow(ledger))
    runs = [await client.execute(workflow) for _ in range(RUNS)]
    async with deployment.supervised():
        for kill in range(KILLS):
            await ledger.call((CALLS * kill + chance.randint(1, CALLS)) // KILLS)
            victim = await wait_until(
                lambda: deployment.worker_behind(ledger.calls[-1].port), within=RECOVERY_SECONDS
            )
            await act_after(chance.uniform(0, 2 * ledger.delay_seconds), victim.kill)
        await consistency_checks.assert_consistent(
            deployment, client, ledger, dict.fromkeys(runs, "completed")
        )
    assert not ledger.of("never")
    for call in (*ledger.of("ship"), *ledger.of("report")):
        assert call.carried["first"] in (call.carried.get("east"), call.carried.get("west"))
    shipped = {call.execution_id: call.carried["first"] for call in ledger.of("ship")}
    for call in ledger.of("report"):
        assert call.carried["first"] == shipped[call.execution_id]
        assert call.carried["both"] == {name: call.carried[name] for name in ("east", "west", "ship")}
