import asyncio
import json
import random
from functools import partial
from typing import cast

import httpx2

from engine.values import Json
from models.loss_limits import MAX_ISOLATION_LOSSES, SUSPECT_LOSSES
from tests.system import consistency_checks, workflow_shapes
from tests.system.client import RetryingClient
from tests.system.harness import RECOVERY_SECONDS, SystemUnderTest, on_both_run_paths
from tests.system.ledger import EffectLedger, LedgerCall
from tests.system.wait_conditions import act_after, wait_until

RUNS = 8
CALLS = 11 * RUNS
KILLS = 2
BESIDE = 10


@on_both_run_paths
async def test_runs_finish_though_their_worker_is_killed_at_random_points(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    chance = random.Random(7)
    ledger.delay_seconds = 0.02
    workflow = await client.create(workflow_shapes.journey_workflow(ledger))
    async with deployment.supervised():
        starting = asyncio.gather(*(client.execute(workflow) for _ in range(RUNS)))
        for kill in range(KILLS):
            await ledger.call((CALLS * kill + chance.randint(1, CALLS)) // KILLS)
            # Within the recovery time of the previous kill, a worker holds the run again.
            victim = await wait_until(
                lambda: deployment.worker_behind(ledger.calls[-1].port), RECOVERY_SECONDS
            )
            # Before the ledger's answer, while that is on its way, or after it has been committed.
            await act_after(chance.uniform(0, 2 * ledger.delay_seconds), victim.kill)
        runs = await starting
        await consistency_checks.assert_consistent(
            deployment, client, ledger, dict.fromkeys(runs, "completed")
        )


async def test_a_run_that_kills_its_worker_fails_as_crashed_after_two_trials(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    poison = await client.create(
        workflow_shapes.chain_workflow(ledger.reads("look"), ledger.writes("poison"))
    )
    harmless = await client.create(
        workflow_shapes.chain_workflow(
            ledger.reads("before"), ledger.writes("within"), ledger.writes("after")
        )
    )
    ledger.delay_seconds = 0.1

    def kill(call: LedgerCall) -> None:
        deployment.sender(call).kill()

    with ledger.on_arrival("poison", kill):
        async with deployment.supervised():
            beside = await asyncio.gather(*(client.execute(harmless) for _ in range(BESIDE)))
            run = await client.execute(poison)
            ended = await client.end(run, within=4 * RECOVERY_SECONDS)
            expected = {run: "failed"} | dict.fromkeys(beside, "completed")
            await consistency_checks.assert_consistent(deployment, client, ledger, expected)
            losses = await client.answer(
                "GET", f"/audit?kind=decision&action=execution.reclaimed&objectId={poison}"
            )
    assert ended.error_code == "crashed"
    # Each call has killed its worker, and the run was taken back each time.
    reclaims = losses.json()["entries"]
    assert len(reclaims) >= len(ledger.of("poison"))
    assert {one["inputs"]["executionId"] for one in reclaims} == {run}
    # A lease that ends on a busy machine, while its worker gets no processor, is a loss without a call.
    assert SUSPECT_LOSSES <= len(ledger.of("poison")) <= SUSPECT_LOSSES + MAX_ISOLATION_LOSSES


async def test_a_wait_and_the_next_attempt_at_a_node_outlive_every_process(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    waiting = await client.create(
        workflow_shapes.chain_workflow(
            ledger.writes("before"), workflow_shapes.wait_node("wait", 2), ledger.writes("after")
        )
    )
    retry: Json = {"maxAttempts": 2, "backoff": 2, "jitter": 0}
    retrying = await client.create(workflow_shapes.chain_workflow(ledger.writes("charge", retry=retry)))
    with ledger.refusing("charge", status=503):
        requests = [await client.execute_once(workflow) for workflow in (waiting, retrying)]
        runs = [request.json()["executionId"] for request in requests]
        for run in runs:
            await wait_until(partial(client.has_status, run, "waiting"))
    for process in deployment.processes:
        process.kill()
    await deployment.revive()
    await consistency_checks.assert_consistent(
        deployment, client, ledger, dict.fromkeys(runs, "completed"), within=2 + RECOVERY_SECONDS
    )
    (first,), (second,) = ledger.of("before"), ledger.of("after")
    assert second.arrived_at - first.arrived_at >= 2
    assert len(ledger.of("charge")) == 2
    for run, request in zip(runs, requests, strict=True):
        (line,) = await wait_until(partial(logged_ends, deployment, run), what="the end is logged")
        assert line["request_id"] == request.headers["X-Request-Id"], "it outlives claims too"


async def test_a_callback_ends_a_wait_though_every_process_was_killed_before(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    secret = await client.answer("POST", "/auth/signing-secret")
    assert secret.status_code in {httpx2.codes.CREATED, httpx2.codes.CONFLICT}, secret.text
    workflows = []
    for node_id in ("asked", "asking"):
        node = ledger.writes(node_id)
        node["config"] = {**cast("dict[str, Json]", node["config"]), "waitForCallback": True}
        workflows.append(
            await client.create(workflow_shapes.chain_workflow(node, ledger.writes(f"{node_id}_after")))
        )
    with ledger.holding("asking") as held:
        waiting, requesting = [await client.execute(workflow) for workflow in workflows]
        await wait_until(partial(client.has_status, waiting, "waiting"))
        await held.next_call()
        # One run waits; the other one's request is received, and its wait not recorded.
        for process in deployment.processes:
            process.kill()
    await deployment.revive()
    for run, node_id in ((waiting, "asked"), (requesting, "asking")):
        url = json.loads(ledger.of(node_id)[0].body)["callbackUrl"]
        path = url.partition("/api/v1")[2]
        answers = [await client.answer("POST", path, {"run": run}) for _ in range(2)]
        assert [one.status_code for one in answers] == [httpx2.codes.OK] * 2, answers[0].text
        assert (await client.end(run, within=4 * RECOVERY_SECONDS)).status == "completed"
        assert len({call.key for call in ledger.of(node_id)}) == 1, "a repeated request has the same key"
        (after,) = ledger.of(f"{node_id}_after")
        assert cast("dict[str, Json]", after.carried[node_id])["body"] == {"run": run}
    assert len(ledger.of("asked")) == 1


def logged_ends(deployment: SystemUnderTest, execution_id: str) -> list[dict[str, str]]:
    """Return the log lines of the end of a run."""
    lines = [line for process in deployment.processes for line in process.log().splitlines()]
    decoded = [json.loads(line) for line in lines if '"execution left"' in line and execution_id in line]
    return [line for line in decoded if line["status"] == "completed"]
