"""Second gateway beside that of a `GatewayHarness`, as behind a load balancer: another process in all that it
remembers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import httpx2

from gateway import state
from gateway.main import create_app
from tests.integration.gateway_harness import GatewayHarness, UserClient


@asynccontextmanager
async def run_second_gateway(
    harness: GatewayHarness,
) -> AsyncIterator[Callable[[UserClient], httpx2.AsyncClient]]:
    """Run a second gateway on the same database; yield a function that returns a client of it with a user's
    key.
    """
    app = create_app(lambda: state.open_state(harness.gateway.settings))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))

        def client(person: UserClient) -> httpx2.AsyncClient:
            return httpx2.AsyncClient(
                transport=httpx2.ASGITransport(app),
                base_url="http://gateway",
                headers={"X-API-Key": person.key},
            )

        yield client
