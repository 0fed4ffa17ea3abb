"""Loops, human inputs and sub-workflows, in runs with a worker that is killed midway."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tests.system import workflow_shapes
from tests.system.harness import RECOVERY_SECONDS, SystemUnderTest, on_many_processes, on_one_process
from tests.system.journal_records import NoteKind
from tests.system.wait_conditions import act_after, wait_until

if TYPE_CHECKING:
    from engine.values import Json
    from tests.system.client import RetryingClient
    from tests.system.ledger import EffectLedger, LedgerCall

RUNS = 3
ITEMS = 4
CALLS_OF_A_TURN = 3


def loop_node(node_id: str, **config: Json) -> workflow_shapes.Node:
    return {"id": node_id, "nodeId": "loop", "config": config}


async def kill_in_the_middle(deployment: SystemUnderTest, ledger: EffectLedger, *calls: int) -> None:
    """Kill whichever worker made a call: before the answer, while that is on its way, or after its commit."""
    chance = random.Random(11)
    for number in calls:
        await ledger.call(number)
        victim = await wait_until(lambda: deployment.worker_behind(ledger.calls[-1].port), RECOVERY_SECONDS)
        await act_after(chance.uniform(0, 2 * ledger.delay_seconds), victim.kill)


async def read_outputs(deployment: SystemUnderTest, execution_id: str) -> dict[tuple[str, str], Any]:
    """Return the outputs in the journal by node and iteration."""
    rows = await deployment.records.fetch(
        f"SELECT node_id, iteration, output FROM span WHERE execution_id = '{execution_id}' AND output IS NOT NULL"
    )
    return {(node_id, iteration): json.loads(output) for node_id, iteration, output in rows}


async def assert_once(
    deployment: SystemUnderTest,
    client: RetryingClient,
    ledger: EffectLedger,
    runs: list[str],
    writes: Mapping[str, list[str]],
) -> None:
    """Check that runs completed once, and that each write had its effect once, unless its worker died over it.

    `writes` are the iterations of each node that writes.
    """
    for run in runs:
        ended = await client.end(run, within=3 * RECOVERY_SECONDS)
        assert ended.status == "completed", ended
    notes = await deployment.records.notes(runs)
    assert Counter(note.execution_id for note in notes if note.kind is NoteKind.ENDED) == dict.fromkeys(
        runs, 1
    )
    assert not [note for note in notes if note.kind is NoteKind.REWRITTEN]
    by_key: dict[str | None, list[LedgerCall]] = {}
    for (execution_id, _), calls in ledger.effects().items():
        for call in calls if execution_id in runs else ():
            by_key.setdefault(call.key, []).append(call)
    expected = {
        f"{run}:{node_id}:{iteration}"
        for run in runs
        for node_id, iterations in writes.items()
        for iteration in iterations
    }
    assert by_key.keys() == expected
    abandoned = {execution_id for process in deployment.processes for execution_id in process.abandoned()}
    for key, calls in by_key.items():
        run, node_id, iteration = str(key).split(":")
        for earlier, call in pairwise(calls):
            assert call.body == earlier.body, key
            assert run in abandoned or any(
                fault.lies_between(earlier.unread_since, call.arrived_at) for fault in deployment.faults
            ), key
        outputs = await read_outputs(deployment, run)
        # Outside of loops, the idempotency key has iteration 0, and the journal an empty one.
        kept = outputs[node_id, iteration] if len(writes[node_id]) > 1 else outputs[node_id, ""]
        assert kept["body"]["receipt"] in {call.receipt for call in calls}, key


async def test_a_loop_goes_on_at_the_first_turn_that_is_not_committed(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    ledger.delay_seconds = 0.02
    nodes = [
        *(workflow_shapes.START, loop_node("loop", items=list(range(ITEMS)), concurrency=2)),
        *(ledger.writes("charge"), ledger.reads("look"), ledger.writes("ship"), ledger.writes("report")),
    ]
    edges = "start>loop loop:continue>charge charge>look look>ship loop:done>report"
    workflow = await client.create(workflow_shapes.build_workflow(nodes, edges))
    calls = RUNS * (ITEMS * CALLS_OF_A_TURN + 1)
    async with deployment.supervised():
        runs = [await client.execute(workflow) for _ in range(RUNS)]
        await kill_in_the_middle(deployment, ledger, calls // 4, 3 * calls // 4)
        turns = [str(turn) for turn in range(ITEMS)]
        await assert_once(deployment, client, ledger, runs, {"charge": turns, "ship": turns, "report": ["0"]})
    for run in runs:
        outputs = await read_outputs(deployment, run)
        assert outputs["loop", ""] == {
            "results": [outputs["ship", turn] for turn in turns],
            "count": ITEMS,
            "errors": [],
        }


@on_one_process
async def test_a_question_in_a_loop_outlives_every_process_and_is_answered_once(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    ask: workflow_shapes.Node = {
        "id": "ask",
        "nodeId": "human-input",
        "config": {"title": "Ship {{ item }}?"},
    }
    nodes = [
        *(workflow_shapes.START, loop_node("loop", items=["a", "b"], concurrency=2)),
        *(ledger.writes("charge"), ask, ledger.writes("ship")),
    ]
    workflow = await client.create(
        workflow_shapes.build_workflow(nodes, "start>loop loop:continue>charge charge>ask ask>ship")
    )
    run = await client.execute(workflow)

    async def pending() -> dict[str, str]:
        response = await client.answer("GET", f"/executions/{run}/pending-inputs")
        return {one["iteration"]: one["title"] for one in response.json()["inputs"]}

    async def are_both_asked() -> bool:
        return await pending() == {"0": "Ship a?", "1": "Ship b?"}

    await wait_until(are_both_asked)
    for process in deployment.processes:
        process.kill()
    await deployment.revive()
    assert await are_both_asked()
    with ledger.holding("ship") as held:
        for turn in ("1", "0"):
            answer: Json = {"nodeId": "ask", "iteration": turn, "data": f"yes {turn}"}
            response = await client.answer("POST", f"/executions/{run}/input", answer, key=f"answer-{turn}")
            assert response.is_success, response.text
        async with deployment.supervised():
            deployment.sender(await held.next_call()).kill()
            held.release()
            await assert_once(deployment, client, ledger, [run], {"charge": ["0", "1"], "ship": ["0", "1"]})
    outputs = await read_outputs(deployment, run)
    assert [outputs["ask", turn]["data"] for turn in ("0", "1")] == ["yes 0", "yes 1"]
    assert len(ledger.of("charge")) == 2


@on_many_processes
async def test_workflows_that_a_loop_runs_are_not_doubled(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    child = await client.create(workflow_shapes.chain_workflow(ledger.writes("pay")))
    turns = ["0", "1", "2"]
    sub: workflow_shapes.Node = {"id": "sub", "nodeId": "sub-workflow", "config": {"workflowId": child}}
    nodes = [
        *(workflow_shapes.START, loop_node("loop", items=list(turns), concurrency=3)),
        sub,
        *(ledger.writes("note"), ledger.writes("report")),
    ]
    parent = await client.create(
        workflow_shapes.build_workflow(nodes, "start>loop loop:continue>sub sub>note loop:done>report")
    )

    async def are_all_answered() -> bool:
        answers = await deployment.records.fetch(
            f"SELECT node_id FROM wait_answer WHERE execution_id = '{run}'"
        )
        return len(answers) == len(turns)

    async with deployment.supervised():
        with ledger.holding("pay") as pay, ledger.holding("note") as note:
            run = await client.execute(parent)
            deployment.sender(await pay.next_call()).kill()
            pay.release()
            call = await note.next_call()
            await wait_until(are_all_answered)
            deployment.sender(call).kill()
            note.release()
        await assert_once(deployment, client, ledger, [run], {"note": turns, "report": ["0"]})
        children = await deployment.records.fetch(f"SELECT id FROM execution WHERE parent_id = '{run}'")
        assert len(children) == len(turns)
        await assert_once(deployment, client, ledger, [row[0] for row in children], {"pay": ["0"]})
    outputs = await read_outputs(deployment, run)
    receipts = {outputs["sub", turn]["body"]["receipt"] for turn in turns}
    assert receipts <= {call.receipt for call in ledger.of("pay")}
    assert len(receipts) == len(turns)
