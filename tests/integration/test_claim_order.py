"""Claim order among ten thousand runs: organizations in turn, workflows in turn, then the priorities of rows."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
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
from messages.broker_connection import connect_broker
from models.execution import PRIORITY_MICROSECONDS
from nodes import catalog
from nodes.catalog import NodeCatalog
from tests.integration.backlogs import BacklogRows, fill
from tests.integration.run_database import (
    MigratedDatabase,
    OwnedWorkflow,
    RunDatabase,
    microseconds_from_now,
)
from tests.integration.test_direct_runs import AssigningGateway
from tests.node_calls import NoNetwork
from workers.settings import WorkerSettings

pytestmark = pytest.mark.every_database

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


@pytest.fixture(scope="module", params=["on_sqlite", "on_postgres"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture(autouse=True)
def _quiet_log() -> Iterator[None]:
    """Print no log, which takes longer than the tested code."""
    with capture_logs():
        yield


@dataclass(frozen=True)
class EndlessNodeCatalog(NodeCatalog):
    """The library, and a node that ends when the test does."""

    hold: RunNode = field(kw_only=True)

    def implementation(self, type: str) -> RunNode:  # noqa: A002 - the field's own word
        return self.hold if type == "hold" else super().implementation(type)


def build_catalog(until: asyncio.Event) -> NodeCatalog:
    async def hold(call: NodeCall) -> Json:
        await until.wait()
        return call.data

    held = NodeType("hold", "Hold", "1.0.0", "test", "", EffectRule(NodeEffect.PURE), {"type": "object"})
    return EndlessNodeCatalog({**catalog.load_catalog().node_types, "hold": held}, hold=hold)


async def flood(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, *, rank: str, definition: str = QUICK
) -> None:
    """Insert ten thousand pending runs of a workflow."""
    await run_database.accept(owned_workflow, definition=definition, total_nodes=2)
    organization = owned_workflow.organization
    rows = BacklogRows(
        organization.id,
        owned_workflow.workflow_id,
        MANY,
        shard=organization.shard,
        user_id=owned_workflow.user_id,
        definition_hash=sha256(definition.encode()).hexdigest(),
        rank=rank,
    )
    await fill(run_database.database, rows)


@asynccontextmanager
async def serve_worker(run_database: RunDatabase, *, is_direct: bool) -> AsyncIterator[AssigningGateway]:
    """Run a worker until the context ends, and yield a gateway that may send it runs, or only wakes it."""
    broker, end = await connect_broker(None), asyncio.Event()
    settings = WorkerSettings(lease_seconds=30, concurrency=20, direct_runs=is_direct)
    store, services = await run_database.another_store(), NodeServices(http=NoNetwork())
    executor = RunExecutor(store, broker, build_catalog(end), services, settings)
    gateway = AssigningGateway(run_database, broker)
    await gateway.assigner.start()
    await executor.start()
    try:
        if is_direct:
            await gateway.accept_direct(await run_database.workflow(), QUICK)
        yield gateway
    finally:
        end.set()
        await executor.drain()
        await gateway.assigner.drain()
        await broker.close()


async def count_pending(run_database: RunDatabase) -> int:
    (row,) = await run_database.query("SELECT count(*) AS count FROM execution WHERE status = 'pending'")
    count: int = row["count"]
    return count


async def wait_until_begun(run_database: RunDatabase, count: int) -> None:
    """Wait until `count` runs of the flood have started."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await count_pending(run_database) > MANY + 1 - count:  # noqa: ASYNC110 - rows send no events
            await asyncio.sleep(0.02)


async def wait_until_ended(run_database: RunDatabase, execution_id: str) -> dict[str, Any]:
    """Wait until a run has completed, and return its row."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (row := await run_database.row(execution_id))["ended_at"] is None:  # noqa: ASYNC110 - rows send no events
            await asyncio.sleep(0.02)
    assert row["status"] == "completed"
    return row


async def count_overtaking(run_database: RunDatabase, flooded: OwnedWorkflow, execution_id: str) -> int:
    """Return how many of the flood began between a run's acceptance and its end."""
    row = await wait_until_ended(run_database, execution_id)
    (found,) = await run_database.query(
        "SELECT count(*) AS count FROM execution"
        " WHERE workflow_id = :id AND started_at BETWEEN :since AND :until AND id <> :own",
        id=flooded.workflow_id,
        since=row["created_at"],
        until=row["ended_at"],
        own=execution_id,
    )
    count: int = found["count"]
    return count


both_run_paths = pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "claimed"])
"""Whether a gateway may send runs straight to the worker."""


@both_run_paths
async def test_the_backlog_of_one_organization_delays_neither_others_nor_urgent_runs(
    run_database: RunDatabase,
    is_direct: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    flooded = await run_database.workflow()
    neighbour = await run_database.workflow(flooded.organization)
    other = await run_database.workflow()
    async with serve_worker(run_database, is_direct=is_direct) as gateway:
        await flood(run_database, flooded, rank=f"{microseconds_from_now(0)} + n")
        await gateway.broker.wake_workers()
        await wait_until_begun(run_database, 100)
        # Slots that were granted before the backlog are used up, so that this run has to wait in it.
        while (patient := await gateway.accept(flooded, QUICK, priority=-100)).worker:
            pass
        urgent = await gateway.accept(flooded, QUICK, priority=100)
        accepted = [urgent, await gateway.accept(neighbour, QUICK), await gateway.accept(other, QUICK)]
        overtaken = [await count_overtaking(run_database, flooded, one.execution_id) for one in accepted]
        assert await count_pending(run_database) > MANY / 10, "the backlog was gone too soon to delay anybody"
        assert max(overtaken) < MANY / 50
        assert (await run_database.row(patient.execution_id))["status"] == "pending"


@both_run_paths
async def test_an_organisation_waits_for_no_place_that_the_runs_of_another_hold(
    run_database: RunDatabase,
    is_direct: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    flooded, other = await run_database.workflow(), await run_database.workflow()
    async with serve_worker(run_database, is_direct=is_direct) as gateway:
        await flood(run_database, flooded, rank=f"{microseconds_from_now(0)} + n", definition=HELD)
        await gateway.broker.wake_workers()
        await wait_until_begun(run_database, 20)
        while (unused := gateway.assigner.assign([other.run()]))[0].worker:
            gateway.assigner.withdraw(unused)  # a slot that was granted before the backlog, and expires soon
            await asyncio.sleep(0.05)
        one = await gateway.accept(other, QUICK)
        await wait_until_ended(run_database, one.execution_id)
        assert await count_pending(run_database) == MANY + 1 - 20, "nobody has left its place"


async def test_priorities_are_honoured_between_all_rows_that_wait(run_database: RunDatabase) -> None:
    owned_workflow = await run_database.workflow()
    began = 1_000_000_000_000_000
    await flood(run_database, owned_workflow, rank=f"{began} + n - {PRIORITY} * {PRIORITY_MICROSECONDS}")
    claims = [await run_database.claim(limit=50) for _ in range(20)]
    ranks = {row["id"]: row["rank"] for row in await run_database.query("SELECT id, rank FROM execution")}
    in_turn = [sorted(ranks.pop(one.execution_id) for one in claim) for claim in claims]
    taken = [rank for claim in in_turn for rank in claim]
    assert taken == sorted(taken)
    assert taken[-1] < min(ranks.values())
    priorities = [(began + MANY - rank) // PRIORITY_MICROSECONDS for rank in taken]
    assert (priorities[0], priorities[-1]) == (100, 81)
