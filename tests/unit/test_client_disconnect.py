"""Requests that end with their client, and can be cancelled at any moment."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from starlette.requests import ClientDisconnect

from gateway.deployments.trigger import run_until_disconnect
from gateway.http.request import GatewayRequest


@dataclass
class SlowConnection:
    """Connection whose wait for messages takes a moment to be cancelled."""

    is_being_left: asyncio.Event = field(default_factory=asyncio.Event)
    is_left: asyncio.Event = field(default_factory=asyncio.Event)

    async def receive(self) -> dict[str, Any]:
        try:
            await asyncio.Event().wait()
        finally:
            self.is_being_left.set()
            await self.is_left.wait()
        raise AssertionError


@dataclass
class ClosedConnection:
    async def receive(self) -> dict[str, Any]:
        return {"type": "http.disconnect"}


async def answer() -> str:
    return "done"


async def test_a_cancellation_at_the_end_of_the_work_is_not_lost() -> None:
    connection = SlowConnection()
    running = asyncio.create_task(run_until_disconnect(cast("GatewayRequest", connection), answer()))
    await connection.is_being_left.wait()
    running.cancel()
    await asyncio.sleep(0)
    connection.is_left.set()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_work_ends_with_its_client() -> None:
    never = asyncio.Event().wait()
    with pytest.raises(ClientDisconnect):
        await run_until_disconnect(cast("GatewayRequest", ClosedConnection()), never)
