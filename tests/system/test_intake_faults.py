"""Ingest under every fault: each sender gets an answer that makes it retry, and each delivery runs once."""

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
    """Deployment, all its senders, and a client without a key."""

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
        """Return all runs of the senders' deliveries."""
        return await _read_runs(self.deployment, self.senders) - {*self.earlier}

    async def assert_run_once(self, runs: Collection[str], within: float = RECOVERY_SECONDS) -> None:
        """Check that exactly these runs exist, and that each ends once."""
        ended = [await self.client.end(run, within=within) for run in runs]
        assert {one.status for one in ended} == {"completed"}
        assert await self.runs() == set(runs)
        notes = await self.deployment.records.notes(runs)
        ends = Counter(note.execution_id for note in notes if note.kind == "ended")
        assert ends == Counter(runs)


@pytest.fixture(scope="module")
async def all_senders(shared_deployment: SystemUnderTest) -> AllSenders:
    await shared_deployment.revive()
    client = RetryingClient(shared_deployment.url)
    all_senders = await ingest_senders.set_up(partial(client.answer, "POST"), API_KEY)
    await client.close()
    return all_senders


@pytest.fixture
async def ingest_deployment(
    deployment: SystemUnderTest, client: RetryingClient, all_senders: AllSenders
) -> AsyncIterator[IngestDeployment]:
    async with ingest_senders.open_client(deployment.url) as http:
        yield IngestDeployment(
            deployment, client, all_senders, http, await _read_runs(deployment, all_senders)
        )


@on_many_processes
async def test_senders_get_503_while_the_database_is_down_and_their_later_requests_run(
    ingest_deployment: IngestDeployment,
) -> None:
    assert isinstance(ingest_deployment.deployment, ManyProcesses)
    deliveries = ingest_deployment.senders.deliveries()
    async with ingest_deployment.deployment.database_down():
        answers = await asyncio.gather(*(one.send(ingest_deployment.http) for one in deliveries))
        for one, answer in zip(deliveries, answers, strict=True):
            assert answer.status_code == 503, (one.sender.name, answer.text)
            assert int(answer.headers["Retry-After"]) > 0
    runs = await ingest_deployment.deliver(deliveries)
    assert await ingest_deployment.deliver(deliveries) == runs
    await ingest_deployment.assert_run_once(runs)


@on_many_processes
async def test_while_redis_is_down_everything_is_taken_in_and_runs(
    ingest_deployment: IngestDeployment,
) -> None:
    assert isinstance(ingest_deployment.deployment, ManyProcesses)
    deliveries = ingest_deployment.senders.deliveries()
    async with ingest_deployment.deployment.redis_down():
        answers = await asyncio.gather(*(one.send(ingest_deployment.http) for one in deliveries))
        runs = [ingest_senders.read_execution_id(answer) for answer in answers]
        await ingest_deployment.assert_run_once(runs)


async def test_a_request_ingested_by_a_killed_gateway_is_not_run_twice(
    ingest_deployment: IngestDeployment,
) -> None:
    deliveries = ingest_deployment.senders.deliveries()
    async with (
        proxy.run_proxy(ingest_deployment.deployment.url) as way,
        ingest_senders.open_client(way.in_front_of(ingest_deployment.deployment.url)) as http,
    ):
        way.keep_answers(b"POST")
        requests = [asyncio.create_task(one.send(http)) for one in deliveries]
        taken = await wait_until(lambda: _runs_when_complete(ingest_deployment, len(deliveries)))
        ingest_deployment.deployment.gateway.kill()
        way.cut()
        lost = await asyncio.gather(*requests, return_exceptions=True)
        assert all(isinstance(one, httpx2.TransportError) for one in lost)
    await ingest_deployment.deployment.revive()
    answers = await asyncio.gather(*(one.deliver(ingest_deployment.http) for one in deliveries))
    assert {answer.headers["Idempotent-Replayed"] for answer in answers} == {"true"}
    runs = [ingest_senders.read_execution_id(answer) for answer in answers]
    assert set(runs) == set(taken)
    await ingest_deployment.assert_run_once(runs)


@on_many_processes
async def test_requests_read_but_not_ingested_by_a_killed_gateway_are_not_lost(
    ingest_deployment: IngestDeployment,
) -> None:
    assert isinstance(ingest_deployment.deployment, ManyProcesses)
    way = ingest_deployment.deployment.ways.gateway_to_database
    deliveries = ingest_deployment.senders.deliveries()
    # Prefix of delivery ids, which go to the database with ingested requests only.
    way.keep_requests(b"dlv_")
    requests = [asyncio.create_task(one.send(ingest_deployment.http)) for one in deliveries]
    await way.kept_one()
    ingest_deployment.deployment.gateway.kill()
    way.cut()
    lost = await asyncio.gather(*requests, return_exceptions=True)
    assert all(isinstance(one, httpx2.TransportError) for one in lost)
    assert not await ingest_deployment.runs()
    await ingest_deployment.deployment.revive()
    await ingest_deployment.assert_run_once(await ingest_deployment.deliver(deliveries))


@on_many_processes
async def test_a_mail_of_a_killed_parser_is_parsed_by_another(ingest_deployment: IngestDeployment) -> None:
    deployment = ingest_deployment.deployment
    assert isinstance(deployment, ManyProcesses)
    delivery = ingest_deployment.senders.one("SendGrid").delivery()
    way = deployment.ways.worker_to_database
    with deployment.workers[1].paused():
        # It has read the mail, and its commit is held back.
        way.keep_requests(f"Number {delivery.number}".encode())
        (run,) = await ingest_deployment.deliver([delivery])
        await way.kept_one()
        deployment.workers[0].kill()
        way.cut()
    await ingest_deployment.assert_run_once([run])


async def _read_runs(deployment: SystemUnderTest, all_senders: AllSenders) -> set[str]:
    ids = ", ".join(f"'{one}'" for one in all_senders.workflows)
    rows = await deployment.records.fetch(f"SELECT id FROM execution WHERE workflow_id IN ({ids})")
    return {row[0] for row in rows}


async def _runs_when_complete(ingest_deployment: IngestDeployment, count: int) -> Collection[str] | None:
    runs = await ingest_deployment.runs()
    return runs if len(runs) == count else None
