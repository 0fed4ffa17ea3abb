"""What senders send, while everything breaks: each gets the answer that makes it come again, and runs once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable
from dataclasses import dataclass
from functools import partial

import httpx2
import pytest

from tests import ingest_senders
from tests.ingest_senders import AllSenders, SenderDelivery
from tests.system import proxy
from tests.system.client import API_KEY, RetryingClient
from tests.system.harness import RECOVERY_SECONDS, ManyProcesses, SystemUnderTest, on_many_processes
from tests.system.wait_conditions import wait_until


@dataclass(frozen=True)
class IngestDeployment:
    """A deployment, everybody who sends to it, and a client that has no key."""

    deployment: SystemUnderTest
    client: RetryingClient
    senders: AllSenders
    http: httpx2.AsyncClient
    earlier: Collection[str]
    """Runs of other tests."""

    async def deliver(self, deliveries: Iterable[SenderDelivery]) -> list[str]:
        """Send deliveries until they are taken; returns the run of each."""
        answers = await asyncio.gather(*(one.deliver(self.http) for one in deliveries))
        return [ingest_senders.read_execution_id(answer) for answer in answers]

    async def runs(self) -> Collection[str]:
        """Return all runs that there are of what was sent."""
        return await _read_runs(self.deployment, self.senders) - {*self.earlier}

    async def assert_run_once(self, runs: Collection[str], within: float = RECOVERY_SECONDS) -> None:
        """Check that these are all the runs that there are, and that each comes to its end once."""
        ended = [await self.client.end(run, within=within) for run in runs]
        assert {one.status for one in ended} == {"completed"}
        assert await self.runs() == set(runs)
        notes = await self.deployment.records.notes(runs)
        ends = Counter(note.execution_id for note in notes if note.kind == "ended")
        assert ends == Counter(runs)


@pytest.fixture(scope="module")
async def everybody(shared_deployment: SystemUnderTest) -> AllSenders:
    client = RetryingClient(shared_deployment.url)
    everybody = await ingest_senders.set_up(partial(client.answer, "POST"), API_KEY)
    await client.close()
    return everybody


@pytest.fixture
async def world(
    deployment: SystemUnderTest, client: RetryingClient, everybody: AllSenders
) -> AsyncIterator[IngestDeployment]:
    async with ingest_senders.open_client(deployment.url) as http:
        yield IngestDeployment(deployment, client, everybody, http, await _read_runs(deployment, everybody))


@on_many_processes
async def test_while_the_database_is_down_senders_are_told_to_come_again_and_what_they_send_then_runs(
    world: IngestDeployment,
) -> None:
    assert isinstance(world.deployment, ManyProcesses)
    deliveries = world.senders.deliveries()
    async with world.deployment.database_down():
        answers = await asyncio.gather(*(one.send(world.http) for one in deliveries))
        for one, answer in zip(deliveries, answers, strict=True):
            assert answer.status_code == 503, (one.sender.name, answer.text)
            assert int(answer.headers["Retry-After"]) > 0
    runs = await world.deliver(deliveries)
    assert await world.deliver(deliveries) == runs
    await world.assert_run_once(runs)


@on_many_processes
async def test_while_redis_is_down_everything_is_taken_in_and_runs(world: IngestDeployment) -> None:
    assert isinstance(world.deployment, ManyProcesses)
    deliveries = world.senders.deliveries()
    async with world.deployment.redis_down():
        answers = await asyncio.gather(*(one.send(world.http) for one in deliveries))
        runs = [ingest_senders.read_execution_id(answer) for answer in answers]
        await world.assert_run_once(runs)


async def test_what_a_gateway_had_taken_in_when_it_was_killed_is_not_run_twice(
    world: IngestDeployment,
) -> None:
    deliveries = world.senders.deliveries()
    async with (
        proxy.run_proxy(world.deployment.url) as way,
        ingest_senders.open_client(way.in_front_of(world.deployment.url)) as http,
    ):
        way.keep_answers(b"POST")
        requests = [asyncio.create_task(one.send(http)) for one in deliveries]
        taken = await wait_until(lambda: _runs_when_complete(world, len(deliveries)))
        world.deployment.gateway.kill()
        way.cut()
        lost = await asyncio.gather(*requests, return_exceptions=True)
        assert all(isinstance(one, httpx2.TransportError) for one in lost)
    await world.deployment.revive()
    answers = await asyncio.gather(*(one.deliver(world.http) for one in deliveries))
    assert {answer.headers["Idempotent-Replayed"] for answer in answers} == {"true"}
    runs = [ingest_senders.read_execution_id(answer) for answer in answers]
    assert set(runs) == set(taken)
    await world.assert_run_once(runs)


@on_many_processes
async def test_what_a_gateway_had_read_and_not_yet_taken_in_when_it_was_killed_is_lost_on_nobody(
    world: IngestDeployment,
) -> None:
    assert isinstance(world.deployment, ManyProcesses)
    way = world.deployment.ways.gateway_to_database
    deliveries = world.senders.deliveries()
    # Ids of deliveries begin so: they go to the database with what is taken in, and at no other time.
    way.keep_requests(b"dlv_")
    requests = [asyncio.create_task(one.send(world.http)) for one in deliveries]
    await way.kept_one()
    world.deployment.gateway.kill()
    way.cut()
    lost = await asyncio.gather(*requests, return_exceptions=True)
    assert all(isinstance(one, httpx2.TransportError) for one in lost)
    assert not await world.runs()
    await world.deployment.revive()
    await world.assert_run_once(await world.deliver(deliveries))


@on_many_processes
async def test_a_mail_whose_reader_is_killed_is_read_by_another(world: IngestDeployment) -> None:
    deployment = world.deployment
    assert isinstance(deployment, ManyProcesses)
    delivery = world.senders.one("SendGrid").delivery()
    way = deployment.ways.worker_to_database
    with deployment.workers[1].paused():
        # It has read the mail, and says so to nobody.
        way.keep_requests(f"Number {delivery.number}".encode())
        (run,) = await world.deliver([delivery])
        await way.kept_one()
        deployment.workers[0].kill()
        way.cut()
    await world.assert_run_once([run])


async def _read_runs(deployment: SystemUnderTest, everybody: AllSenders) -> set[str]:
    ids = ", ".join(f"'{one}'" for one in everybody.workflows)
    rows = await deployment.records.fetch(f"SELECT id FROM execution WHERE workflow_id IN ({ids})")
    return {row[0] for row in rows}


async def _runs_when_complete(world: IngestDeployment, count: int) -> Collection[str] | None:
    runs = await world.runs()
    return runs if len(runs) == count else None
