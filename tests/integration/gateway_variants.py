"""Another gateway beside that of a `GatewayHarness`, with settings or a broker of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2

from gateway import state
from gateway.main import create_app
from messages.broker import Broker
from messages.broker_connection import connect_broker
from tests.integration.gateway_harness import GatewayHarness, UserClient


@asynccontextmanager
async def run_with_settings(
    harness: GatewayHarness,
    broker: Broker | None = None,
    **settings: Any,  # noqa: ANN401 - any setting
) -> AsyncIterator[GatewayHarness]:
    """Run another gateway on the database of a harness, with settings changed
    and a broker of its own, during the block.
    """
    here = harness.gateway
    broker = broker or await connect_broker(None)
    told = here.settings.model_copy(update=settings)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(broker.close)
        app = create_app(lambda: state.assemble_state(told, here.database, here.store, broker))
        await stack.enter_async_context(app.router.lifespan_context(app))
        yield GatewayHarness(app, app.state.gateway, stack)


async def execute_workflow(
    harness: GatewayHarness, person: UserClient, workflow_id: str, headers: Mapping[str, str] | None = None
) -> httpx2.Response:
    """Execute a workflow by the gateway of this harness as a user; return the answer of any status."""
    client = await harness.client(person.key)
    return await client.post(f"/api/v1/workflows/{workflow_id}/execute", headers=dict(headers or {}))
