"""`pilotflame dev` alone: one process, which is its own only hope."""

from collections.abc import AsyncIterator

import pytest

from tests.system import flows, harness, promises
from tests.system.client import Client
from tests.system.harness import Deployment
from tests.system.ledger import Ledger

LONG_LEASE_SECONDS = 600


@pytest.fixture(scope="module")
async def dev(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    """One whose leases outlast the test."""
    folder = tmp_path_factory.mktemp("dev")
    async with harness.one_process(folder, LEASE_SECONDS=str(LONG_LEASE_SECONDS)) as deployment:
        yield deployment


@pytest.fixture
async def client(dev: Deployment) -> AsyncIterator[Client]:
    client = Client(dev.url)
    yield client
    await client.close()


async def test_a_restart_takes_up_at_once_what_the_killed_process_held(
    dev: Deployment, client: Client, ledger: Ledger
) -> None:
    workflow = await client.create(flows.journey(ledger))
    with ledger.holding("ship") as held:
        run = await client.execute(workflow)
        await held.arrived()
        dev.gateway.kill()
    await dev.revive()
    await promises.assert_kept(dev, client, ledger, {run: "completed"})
    assert promises.repeated(ledger.effects()) == {run: 1}


async def test_sigterm_lets_the_node_in_hand_finish_and_a_restart_goes_on_behind_it(
    dev: Deployment, client: Client, ledger: Ledger
) -> None:
    ledger.delay_seconds = 0.3  # a node then takes as long as the gateway does to close
    run = await client.execute(await client.create(flows.journey(ledger)))
    await ledger.call(2)
    dev.gateway.terminate()
    assert await dev.gateway.exit_code() == 0
    assert await dev.records.status(run) == "pending"
    ledger.delay_seconds = 0
    await dev.revive()
    await promises.assert_kept(dev, client, ledger, {run: "completed"})
    assert not promises.repeated(ledger.effects())


async def test_a_second_process_does_not_start_on_the_same_folder(dev: Deployment) -> None:
    second = dev.gateway.twin()
    second.start()
    assert await second.exit_code() != 0
    assert f"in use by process {dev.gateway.process_id}" in second.log()
    assert len(second.log().splitlines()) == 1
