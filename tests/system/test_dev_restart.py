"""Restart of `pilotflame dev`: a single process that recovers its own runs."""

from collections.abc import AsyncIterator

import pytest

from tests.system import consistency_checks, harness, workflow_shapes
from tests.system.client import RetryingClient
from tests.system.harness import SystemUnderTest
from tests.system.ledger import EffectLedger

LONG_LEASE_SECONDS = 600


@pytest.fixture(scope="module")
async def dev(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SystemUnderTest]:
    """Deployment with leases that outlast the test."""
    folder = tmp_path_factory.mktemp("dev")
    async with harness.run_one_process(folder, LEASE_SECONDS=str(LONG_LEASE_SECONDS)) as deployment:
        yield deployment


@pytest.fixture
async def client(dev: SystemUnderTest) -> AsyncIterator[RetryingClient]:
    client = RetryingClient(dev.url)
    yield client
    await client.close()


async def test_a_restarted_process_continues_runs_of_the_killed_one_at_once(
    dev: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(workflow_shapes.journey_workflow(ledger))
    with ledger.holding("ship") as held:
        run = await client.execute(workflow)
        await held.next_call()
        dev.gateway.kill()
    await dev.revive()
    await consistency_checks.assert_consistent(dev, client, ledger, {run: "completed"})
    assert consistency_checks.count_repeated(ledger.effects()) == {run: 1}


async def test_sigterm_lets_the_node_in_hand_finish_and_a_restart_goes_on_behind_it(
    dev: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    ledger.delay_seconds = 0.3  # a node then takes as long as the gateway's shutdown
    run = await client.execute(await client.create(workflow_shapes.journey_workflow(ledger)))
    await ledger.call(2)
    dev.gateway.terminate()
    assert await dev.gateway.exit_code() == 0
    assert await dev.records.status(run) == "pending"
    ledger.delay_seconds = 0
    await dev.revive()
    await consistency_checks.assert_consistent(dev, client, ledger, {run: "completed"})
    assert not consistency_checks.count_repeated(ledger.effects())


async def test_a_second_process_does_not_start_on_the_same_folder(dev: SystemUnderTest) -> None:
    second = dev.gateway.twin()
    second.start()
    assert await second.exit_code() != 0
    assert f"in use by process {dev.gateway.process_id}" in second.log()
    assert len(second.log().splitlines()) == 1
