"""Sessions of PostgreSQL whose opening is canceled: neither an unhandled error nor a session is left."""

from __future__ import annotations

import asyncio
import gc
from contextlib import suppress
from typing import Any

import asyncpg

from models import postgresql_sessions as sessions
from models.database import parse_url
from tests.integration.run_database import MigratedDatabase
from tests.system.wait_conditions import wait_until

STEPS = 40
"""Steps of the event loop after which a session on this machine is open or waits for the server."""


async def test_an_opening_may_be_canceled_at_any_step(on_postgres: MigratedDatabase) -> None:
    address = sessions.driver_address(parse_url(on_postgres.url))
    loop = asyncio.get_running_loop()
    unhandled: list[Any] = []
    usual_handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _loop, context: unhandled.append(context))
    name = "canceled-opening"
    try:
        for steps in range(STEPS):
            opening = asyncio.ensure_future(
                sessions.open_session(address, settings={"application_name": name})
            )
            for _ in range(steps):
                await asyncio.sleep(0)
            opening.cancel()
            with suppress(asyncio.CancelledError):
                await (await opening).close()
        await wait_until(lambda: _have_ended(address, name), what="all sessions that were opened are closed")
        gc.collect()
    finally:
        loop.set_exception_handler(usual_handler)
    assert unhandled == []


async def _have_ended(address: str, application_name: str) -> bool:
    """Return whether the server has no session of this name."""
    connection = await asyncpg.connect(address)
    try:
        query = "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = $1"
        return bool(await connection.fetchval(query, application_name))
    finally:
        await connection.close()
