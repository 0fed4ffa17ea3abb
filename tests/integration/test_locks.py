"""Locks that somebody else holds in PostgreSQL: a locked row or key holds up itself, and nothing beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import asyncpg
import pytest

from engine.events import RunStatus
from gateway.internal import holding
from gateway.internal.holding import Holder
from models.pod_processes import PodProcess
from tests.integration.run_world import Place, Where, World, opened, write

Answer = TypeVar("Answer")

PROMPT_SECONDS = 10.0
"""Far above the time of any statement on a busy machine, far below waiting for a lock that is never let go."""


@pytest.fixture(scope="module", params=["on_postgres", "behind_pgbouncer"])
def where(request: pytest.FixtureRequest) -> Where:
    found: Where = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
async def shared_world(where: Where) -> AsyncIterator[World]:
    async with opened(where) as world:
        yield world


@pytest.fixture
async def world(shared_world: World) -> World:
    await shared_world.clear()
    return shared_world


@pytest.fixture
async def place(world: World) -> Place:
    return await world.workflow()


@asynccontextmanager
async def locked(world: World, execution_id: str) -> AsyncIterator[None]:
    """Hold the row of a run, as an operator's transaction might that was left open."""
    url = world.database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT FROM execution WHERE id = $1 FOR UPDATE", execution_id)
            yield
    finally:
        await connection.close()


async def prompt(call: Awaitable[Answer]) -> Answer:
    async with asyncio.timeout(PROMPT_SECONDS):
        return await call


async def status(world: World, execution_id: str) -> str:
    found: str = (await world.row(execution_id))["status"]
    return found


async def waiting(world: World, place: Place, count: int) -> list[str]:
    """Return runs whose waits are over."""
    due_at = datetime.now(UTC) - timedelta(seconds=1)
    runs = [await world.claimed(place) for _ in range(count)]
    await world.store.record([write(one, end=RunStatus.WAITING, due_at=due_at) for one in runs])
    return [one.execution_id for one in runs]


async def test_a_locked_wait_holds_up_no_other_wait_and_no_dead_worker_s_run(
    world: World, place: Place
) -> None:
    kept, *others = await waiting(world, place, 3)
    orphan = await world.claimed(place)
    await world.expire(orphan)
    async with locked(world, kept):
        swept = await prompt(world.store.sweep(10))
        assert (swept.requeued, swept.due) == (1, 2)
        assert await prompt(world.store.promote_due()) == 0
        assert [await status(world, one) for one in (kept, *others)] == ["waiting", "pending", "pending"]
    assert await world.store.promote_due() == 1


async def test_a_locked_wait_of_a_deployment_holds_up_no_other_of_it(world: World, place: Place) -> None:
    kept, other = await waiting(world, place, 2)
    await world.query("UPDATE execution SET target = :id", id=place.workflow_id)
    process = PodProcess.started_now("pod-1")
    holder = Holder(place.workflow_id, place.organization.id, place.organization.lane, process)
    async with locked(world, kept):
        assert await prompt(holding.promote_due(world.database, holder)) == 1
        assert [await status(world, one) for one in (kept, other)] == ["waiting", "pending"]
    assert await holding.promote_due(world.database, holder) == 1


async def test_a_locked_run_of_a_dead_worker_holds_up_no_other_of_them(world: World, place: Place) -> None:
    runs = [await world.claimed(place) for _ in range(3)]
    async with locked(world, runs[0].execution_id):
        assert await prompt(world.store.give_back("worker", [runs[1].execution_id])) == 1
        assert await prompt(world.store.take_back("worker")) == 1
        assert await status(world, runs[0].execution_id) == "running"
    assert await world.store.take_back("worker") == 1
