"""Who is next of ten thousand: organisations in turn, workflows in turn, then the priorities of rows."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

import pytest
from structlog.testing import capture_logs

from engine.node_api import EffectRule, NodeCall, NodeEffect, NodeType, RunNode
from engine.services import NodeServices
from engine.values import Json
from execution.executor import RunExecutor
from messages.broker import Broker, connect_broker
from models.execution import PRIORITY_MICROSECONDS
from nodes import catalog
from nodes.catalog import NodeCatalog
from tests.integration.backlogs import BacklogRows, fill
from tests.integration.run_database import (
    MigratedDatabase,
    OwnedWorkflow,
    RunDatabase,
    microseconds_from_now,
    open_run_database,
)
from tests.node_calls import NoNetwork
from workers.settings import WorkerSettings

MANY: Final = 10_000
PATIENCE_SECONDS: Final = 60.0


def make_definition(step: str) -> str:
    nodes = [{"id": "start", "type": "manual"}, {"id": "step", "type": step, "config": {"values": {"a": 1}}}]
    edges = [{"id": "edge", "source": "start", "target": "step"}]
    return json.dumps({"nodes": nodes, "connections": edges, "settings": {}})


QUICK: Final = make_definition("set")
HELD: Final = make_definition("hold")
PRIORITY: Final = "((n * 7919) % 201 - 100)"
"""Every priority from -100 to 100, in no order."""


@pytest.fixture(params=["on_sqlite", "on_postgres"])
def where(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def world(where: MigratedDatabase) -> AsyncIterator[RunDatabase]:
    # What is logged takes longer to print than what is tested.
    with capture_logs():
        async with open_run_database(where) as world:
            yield world


@dataclass(frozen=True)
class HeldNodeCatalog(NodeCatalog):
    """The library, and a node that ends when the test does."""

    hold: RunNode = field(kw_only=True)

    def implementation(self, type: str) -> RunNode:  # noqa: A002 - the field's own word
        return self.hold if type == "hold" else super().implementation(type)


def build_catalog(until: asyncio.Event) -> NodeCatalog:
    async def hold(call: NodeCall) -> Json:
        await until.wait()
        return call.data

    held = NodeType("hold", "Hold", "1.0.0", "test", "", EffectRule(NodeEffect.PURE), {"type": "object"})
    return HeldNodeCatalog({**catalog.load_catalog().node_types, "hold": held}, hold=hold)


async def flood(world: RunDatabase, place: OwnedWorkflow, *, rank: str, definition: str = QUICK) -> None:
    """Let ten thousand runs of a workflow wait."""
    await world.accept(place, definition=definition, total_nodes=2)
    organization = place.organization
    rows = BacklogRows(
        organization.id,
        place.workflow_id,
        MANY,
        shard=organization.shard,
        user_id=place.user_id,
        definition_hash=sha256(definition.encode()).hexdigest(),
        rank=rank,
    )
    await fill(world.database, rows)


@asynccontextmanager
async def serve_worker(world: RunDatabase) -> AsyncIterator[Broker]:
    """Run what waits, until the context ends; yields what it is woken by."""
    broker, end = await connect_broker(None), asyncio.Event()
    settings = WorkerSettings(lease_seconds=30, concurrency=20)
    store, services = await world.another_store(), NodeServices(http=NoNetwork())
    executor = RunExecutor(store, broker, build_catalog(end), services, settings)
    await executor.start()
    try:
        yield broker
    finally:
        end.set()
        await executor.drain()
        await broker.close()


async def count_pending(world: RunDatabase) -> int:
    (row,) = await world.query("SELECT count(*) AS count FROM execution WHERE status = 'pending'")
    count: int = row["count"]
    return count


async def wait_until_begun(world: RunDatabase, count: int) -> None:
    """Wait until so many of the flood don't wait any more."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await count_pending(world) > MANY + 1 - count:  # noqa: ASYNC110 - rows tell nobody
            await asyncio.sleep(0.02)


async def wait_until_ended(world: RunDatabase, execution_id: str) -> dict[str, Any]:
    """Wait until a run has completed, and return its row."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (row := await world.row(execution_id))["ended_at"] is None:  # noqa: ASYNC110 - rows tell nobody
            await asyncio.sleep(0.02)
    assert row["status"] == "completed"
    return row


async def count_overtaking(world: RunDatabase, flooded: OwnedWorkflow, execution_id: str) -> int:
    """Return how many of the flood began between a run's acceptance and its end."""
    row = await wait_until_ended(world, execution_id)
    (found,) = await world.query(
        "SELECT count(*) AS count FROM execution"
        " WHERE workflow_id = :id AND started_at BETWEEN :since AND :until AND id <> :own",
        id=flooded.workflow_id,
        since=row["created_at"],
        until=row["ended_at"],
        own=execution_id,
    )
    count: int = found["count"]
    return count


async def test_the_backlog_of_one_delays_neither_others_nor_what_is_urgent(world: RunDatabase) -> None:
    flooded = await world.workflow()
    neighbour = await world.workflow(flooded.organization)
    other = await world.workflow()
    await flood(world, flooded, rank=f"{microseconds_from_now(0)} + n")
    run = {"definition": QUICK, "total_nodes": 2}
    async with serve_worker(world):
        await wait_until_begun(world, 100)
        patient = await world.accept(flooded, priority=-100, **run)
        urgent = await world.accept(flooded, priority=100, **run)
        accepted = [urgent, await world.accept(neighbour, **run), await world.accept(other, **run)]
        overtaken = [await count_overtaking(world, flooded, one.execution_id) for one in accepted]
        assert await count_pending(world) > MANY / 10, "the backlog was gone too soon to delay anybody"
        assert max(overtaken) < MANY / 50
        assert (await world.row(patient.execution_id))["status"] == "pending"


async def test_an_organisation_waits_for_no_place_that_the_runs_of_another_hold(world: RunDatabase) -> None:
    flooded, other = await world.workflow(), await world.workflow()
    await flood(world, flooded, rank=f"{microseconds_from_now(0)} + n", definition=HELD)
    async with serve_worker(world) as broker:
        await wait_until_begun(world, 20)
        one = await world.accept(other, definition=QUICK, total_nodes=2)
        await broker.wake_workers()
        await wait_until_ended(world, one.execution_id)
        assert await count_pending(world) == MANY + 1 - 20, "nobody has left its place"


async def test_priorities_are_honoured_between_all_rows_that_wait(world: RunDatabase) -> None:
    place = await world.workflow()
    began = 1_000_000_000_000_000
    await flood(world, place, rank=f"{began} + n - {PRIORITY} * {PRIORITY_MICROSECONDS}")
    claims = [await world.claim(limit=50) for _ in range(20)]
    ranks = {row["id"]: row["rank"] for row in await world.query("SELECT id, rank FROM execution")}
    in_turn = [sorted(ranks.pop(one.execution_id) for one in claim) for claim in claims]
    taken = [rank for claim in in_turn for rank in claim]
    assert taken == sorted(taken)
    assert taken[-1] < min(ranks.values())
    priorities = [(began + MANY - rank) // PRIORITY_MICROSECONDS for rank in taken]
    assert (priorities[0], priorities[-1]) == (100, 81)
