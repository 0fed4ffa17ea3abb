"""Bridge against a real gateway: the answers match those of the fake in the bridge's other tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import uvicorn
from pydantic import SecretStr

from bridge.bridge_errors import BridgeRefused, BridgeUnavailable, ContentRefused
from bridge.message_source import SourceMessage
from bridge.queue_gateway import QueueGateway
from bridge.settings import BridgeSettings
from tests.integration.gateway_harness import GRAPH, GatewayHarness, OrganizationUsers
from tests.integration.test_gateway_enqueue import QUEUE, WORKFLOWS, create_active_workflow

LIMITED = {**QUEUE, "settings": {"concurrency": {"limit": 1, "onLimit": "reject"}}}


@pytest.fixture
async def url(harness: GatewayHarness) -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(harness.app, port=0, log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - nothing signals the change
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await serving


def queue_gateway(url: str, workflow_id: str, key: str) -> QueueGateway:
    return QueueGateway(BridgeSettings(url=url, bridge_workflow=workflow_id, api_key=SecretStr(key)))


def make_message(name: str, body: bytes = b"1") -> SourceMessage:
    return SourceMessage(id=name, body=body, deduplication_id=f"redis:orders/{name}")


async def test_messages_are_ingested_once_and_refusals_say_if_a_retry_may_help(
    url: str, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await create_active_workflow(owner)
    queue = queue_gateway(url, workflow_id, owner.key)
    first = await queue.enqueue([make_message("1"), make_message("2")], source="redis:orders")
    again = await queue.enqueue([make_message("2"), make_message("3")], source="redis:orders")
    assert [one.status for one in (*first, *again)] == ["accepted", "accepted", "duplicate", "accepted"]
    assert again[0].execution_id == first[1].execution_id
    with pytest.raises(ContentRefused):
        await queue.enqueue([make_message("4", b'{"a":1,"a":2}')], source="redis:orders")
    await owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "paused"})
    with pytest.raises(BridgeUnavailable):
        await queue.enqueue([make_message("5")], source="redis:orders")
    await queue.close()

    limited = queue_gateway(url, await create_active_workflow(owner, **LIMITED), owner.key)
    with pytest.raises(BridgeUnavailable):
        await limited.enqueue([make_message("1"), make_message("2")], source="redis:orders")
    await limited.close()
    for target, key in (
        (await create_active_workflow(owner, **GRAPH), owner.key),
        (workflow_id, "sk-unknown"),
    ):
        wrong = queue_gateway(url, target, key)
        with pytest.raises(BridgeRefused):
            await wrong.enqueue([make_message("1")], source="redis:orders")
        await wrong.close()
