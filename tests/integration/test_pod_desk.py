"""Poll hub of pods: work accepted by one gateway reaches pods that wait at another at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

from execution.pod_api import WorkPollRequest
from gateway.pods import poll_hub as desks
from gateway.pods.forwarding import WakeupForwarder
from gateway.pods.lease_checks import LeaseHolder
from gateway.pods.poll_hub import PodPollHub
from messages.broker import Broker
from messages.broker_connection import connect_broker
from models.pod_identity import PodProcess

if TYPE_CHECKING:
    from tests.integration.gateway_harness import GatewayHarness
    from tests.services import RedisServer

POD = LeaseHolder("wf_1", "org_1", 0, PodProcess.new("a"))
SECONDS = 5.0


@pytest.fixture
async def two_brokers(redis_server: RedisServer) -> AsyncIterator[tuple[Broker, Broker]]:
    """Yield the brokers of two gateways."""
    one, other = (
        await connect_broker(redis_server.url),
        await connect_broker(redis_server.url),
    )
    yield one, other
    await one.close()
    await other.close()


@pytest.fixture(autouse=True)
def disable_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable polling, so that only notifications deliver work."""
    monkeypatch.setattr(desks, "LOOK_SECONDS", 3_600.0)


async def open_hub(harness: GatewayHarness, broker: Broker) -> PodPollHub:
    poll_hub = PodPollHub(harness.gateway.database, broker, WakeupForwarder(harness.gateway.database, broker))
    await poll_hub.start()
    return poll_hub


async def test_an_arrival_is_told_wherever_a_pod_waits(
    harness: GatewayHarness, two_brokers: tuple[Broker, Broker]
) -> None:
    here, there = [await open_hub(harness, broker) for broker in two_brokers]
    for poll_hub in (here, there, there):
        waiting = asyncio.create_task(poll_hub.wait(POD, WorkPollRequest(SECONDS, wants_work=False)))
        while not poll_hub.has_waiting_pod(POD.workflow_id):  # noqa: ASYNC110 - a desk has no event for it
            await asyncio.sleep(0.01)
        await here.notify_pods([POD.workflow_id])
        assert (await waiting).has_work
    await here.close()
    await there.close()


async def test_a_change_between_two_polls_is_in_the_next_answer(
    harness: GatewayHarness, two_brokers: tuple[Broker, Broker]
) -> None:
    poll_hub = await open_hub(harness, two_brokers[0])
    first = await poll_hub.wait(POD, WorkPollRequest(0, wants_work=True))
    assert not first.has_work
    known = {first.gateway: first.run_count}
    await poll_hub.notify_pods([POD.workflow_id])
    second = await poll_hub.wait(POD, WorkPollRequest(SECONDS, wants_work=False, run_counts=known))
    assert second.has_work
    known = {second.gateway: second.run_count}
    assert not (await poll_hub.wait(POD, WorkPollRequest(0, wants_work=False, run_counts=known))).has_work
    await poll_hub.close()
