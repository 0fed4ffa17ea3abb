import asyncio

from redis.asyncio import Redis

from messages.redis_consumer import REDIS_TIMEOUT_SECONDS
from tests.system import consistency_checks, workflow_shapes
from tests.system.client import RetryingClient
from tests.system.harness import RECOVERY_SECONDS, ManyProcesses, on_many_processes_and_both_run_paths
from tests.system.ledger import EffectLedger
from tests.system.wait_conditions import wait_until

pytestmark = on_many_processes_and_both_run_paths

RUNS = 6
PROMPT_SECONDS = 0.5
"""Sooner than a sweep: the run was woken."""


async def test_runs_finish_though_redis_forgets_everything(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    ledger.delay_seconds = 0.02
    workflow = await client.create(workflow_shapes.journey_workflow(ledger))
    runs = [await client.execute(workflow) for _ in range(RUNS)]
    await ledger.call(5 * RUNS)
    async with Redis.from_url(deployment.redis.url) as server:
        await server.flushall()
    runs += [await client.execute(workflow) for _ in range(RUNS)]
    await consistency_checks.assert_consistent(deployment, client, ledger, dict.fromkeys(runs, "completed"))
    assert not consistency_checks.count_repeated(ledger.effects())


async def test_runs_are_accepted_and_finish_while_redis_is_down(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(
        workflow_shapes.chain_workflow(ledger.reads("look"), ledger.writes("charge"))
    )
    async with deployment.redis_down():
        requests = [client.execute_once(workflow) for _ in range(RUNS)]
        answers = await asyncio.gather(*requests)
        assert {answer.status_code for answer in answers} == {201}
        runs = [answer.json()["executionId"] for answer in answers]
        await consistency_checks.assert_consistent(
            deployment, client, ledger, dict.fromkeys(runs, "completed"), within=RECOVERY_SECONDS
        )


async def test_runs_go_on_over_a_restart_of_redis_and_are_woken_again_after_it(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    ledger.delay_seconds = 0.02
    workflow = await client.create(workflow_shapes.journey_workflow(ledger))
    runs = [await client.execute(workflow) for _ in range(RUNS)]
    await ledger.call(3 * RUNS)
    async with deployment.redis_down():
        await ledger.call(6 * RUNS)
    await consistency_checks.assert_consistent(deployment, client, ledger, dict.fromkeys(runs, "completed"))
    assert not consistency_checks.count_repeated(ledger.effects())
    await wait_until(lambda: _is_prompt(client))


async def test_a_silent_redis_delays_requests_only_briefly(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(
        workflow_shapes.chain_workflow(ledger.reads("look"), ledger.writes("charge"))
    )
    with deployment.redis_paused():
        async with asyncio.timeout(RUNS * REDIS_TIMEOUT_SECONDS / 2):
            runs = [await client.execute(workflow) for _ in range(RUNS)]
        await consistency_checks.assert_consistent(
            deployment, client, ledger, dict.fromkeys(runs, "completed"), within=RECOVERY_SECONDS
        )
    await wait_until(lambda: _is_prompt(client))


async def test_a_wake_up_that_arrived_though_its_answer_was_lost_changes_nothing(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    way = deployment.ways.gateway_to_redis
    workflow = await client.create(workflow_shapes.chain_workflow(ledger.writes("charge")))
    way.keep_answers(b"EVALSHA")
    run = await client.execute(workflow)
    await way.kept_one()
    way.cut()
    await consistency_checks.assert_consistent(deployment, client, ledger, {run: "completed"})
    assert len(ledger.of("charge")) == 1


async def _is_prompt(client: RetryingClient) -> bool:
    """Return whether a new run completes before any sweep would have found it."""
    run = await client.execute(
        await client.create(workflow_shapes.chain_workflow(workflow_shapes.set_node("done")))
    )
    try:
        return (await client.end(run, within=PROMPT_SECONDS)).status == "completed"
    except TimeoutError:
        return False
