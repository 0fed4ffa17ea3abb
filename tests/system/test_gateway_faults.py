import asyncio
from uuid import uuid4

import httpx2
import pytest

from tests.system import consistency_checks, proxy, workflow_shapes
from tests.system.client import RetryingClient
from tests.system.harness import RECOVERY_SECONDS, ManyProcesses, SystemUnderTest, on_many_processes
from tests.system.ledger import EffectLedger
from tests.system.wait_conditions import wait_until


async def test_a_burst_of_requests_acts_once_though_the_gateway_is_killed_in_its_middle(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(workflow_shapes.chain_workflow(ledger.writes("charge")))
    keys = [str(uuid4()) for _ in range(40)]
    async with deployment.supervised():
        # Each is sent twice at once, as by a client that lost patience.
        requests = [asyncio.create_task(client.execute(workflow, key=key)) for key in keys + keys]
        await wait_until(lambda: sum(request.done() for request in requests) > len(keys) // 4)
        deployment.gateway.kill()
        runs = await asyncio.gather(*requests)
        assert runs[: len(keys)] == runs[len(keys) :]
        assert len(set(runs)) == len(keys)
        await consistency_checks.assert_consistent(
            deployment, client, ledger, dict.fromkeys(runs, "completed")
        )
    assert await _read_accepted(deployment, workflow) == set(runs)


async def test_a_request_repeated_after_a_killed_gateway_gets_the_same_execution(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(workflow_shapes.chain_workflow(ledger.writes("charge")))
    key = str(uuid4())
    async with proxy.run_proxy(deployment.url) as way:
        hurried = RetryingClient(way.in_front_of(deployment.url))
        way.keep_answers(key.encode())
        request = asyncio.create_task(hurried.execute_once(workflow, key=key))
        await way.kept_one()
        deployment.gateway.kill()
        way.cut()
        with pytest.raises(httpx2.TransportError):
            await request
        await hurried.close()
    await deployment.revive()
    again = await client.execute_once(workflow, key=key)
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (201, "true")
    run = again.json()["executionId"]
    assert await _read_accepted(deployment, workflow) == {run}
    await consistency_checks.assert_consistent(deployment, client, ledger, {run: "completed"})


@on_many_processes
async def test_a_gateway_killed_between_commit_and_answer_has_accepted_the_run(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    way = deployment.ways.gateway_to_database
    workflow = await client.create(workflow_shapes.chain_workflow(ledger.writes("charge")))
    key = str(uuid4())
    way.keep_answers(key.encode())
    request = asyncio.create_task(client.execute_once(workflow, key=key))
    (run,) = await wait_until(lambda: _read_accepted(deployment, workflow))
    await way.kept_one()
    assert not request.done()
    deployment.gateway.kill()
    way.cut()
    with pytest.raises(httpx2.TransportError):
        await request
    # A worker claims it without the gateway.
    await wait_until(lambda: ledger.of("charge"), RECOVERY_SECONDS)
    await deployment.revive()
    assert await client.execute(workflow, key=key) == run
    await consistency_checks.assert_consistent(deployment, client, ledger, {run: "completed"})


@on_many_processes
async def test_a_gateway_killed_between_commit_and_wake_up_has_accepted_the_run(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(workflow_shapes.chain_workflow(ledger.writes("charge")))
    with deployment.redis_paused():
        run = await client.execute(workflow)
        deployment.gateway.kill()
        # Redis is still paused, so the sweep finds the run.
        await wait_until(lambda: ledger.of("charge"), RECOVERY_SECONDS)
    await deployment.revive()
    await consistency_checks.assert_consistent(deployment, client, ledger, {run: "completed"})


@on_many_processes
async def test_the_gateway_looks_up_a_commit_with_a_lost_outcome_before_it_answers(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    way = deployment.ways.gateway_to_database
    workflow = await client.create(workflow_shapes.chain_workflow(ledger.writes("charge")))
    way.keep_answers(b"a mark")
    request = asyncio.create_task(client.execute_once(workflow, {"note": "a mark"}))
    (run,) = await wait_until(lambda: _read_accepted(deployment, workflow))
    await way.kept_one()
    way.cut()
    answer = await request
    assert (answer.status_code, answer.json()) == (201, {"executionId": run})
    assert await _read_accepted(deployment, workflow) == {run}
    await consistency_checks.assert_consistent(deployment, client, ledger, {run: "completed"})


async def _read_accepted(deployment: SystemUnderTest, workflow: str) -> set[str]:
    rows = await deployment.records.fetch(f"SELECT id FROM execution WHERE workflow_id = '{workflow}'")
    return {row[0] for row in rows}
