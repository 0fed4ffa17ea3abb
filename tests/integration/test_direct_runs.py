"""Runs that a gateway assigns to a worker: the way from grant to end, and every way on which a run may get lost."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from engine.node_api import EffectRule, NodeCall, NodeEffect, NodeType, RunNode
from engine.services import NodeServices
from engine.values import Json
from execution import executor as executors
from execution.executor import RunExecutor
from gateway.executions import run_assignment
from gateway.executions.run_assignment import RunAssigner
from journal.store import (
    AcceptanceResult,
    AcceptanceVerdict,
    ClaimedRun,
    ClaimQuery,
    ExecutionKey,
    InboundRequest,
    RunAcceptance,
)
from messages.broker import SLOT_GRANTS, Broker, DirectRuns, SlotGrant
from messages.broker_connection import connect_broker
from messages.message_seal import MessageSeal
from models.timestamps import DatabaseClock
from nodes import catalog
from nodes.catalog import NodeCatalog
from tests.integration.run_database import (
    MigratedDatabase,
    OwnedWorkflow,
    RunDatabase,
)
from tests.node_calls import NoNetwork
from tests.services import RedisServer
from workers.settings import WorkerSettings

PATIENCE_SECONDS = 60.0
QUIET_SECONDS = 3600.0
SECRET = b"0" * 32
TRIGGER = {"id": "start", "type": "manual"}


@pytest.fixture(scope="module", params=["on_sqlite", "on_postgres"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@dataclass(frozen=True)
class HeldNodeCatalog(NodeCatalog):
    """The library, and a node that ends when the test says so."""

    hold: RunNode = field(kw_only=True)

    def implementation(self, type: str) -> RunNode:  # noqa: A002 - the field's own word
        return self.hold if type == "hold" else super().implementation(type)


def definition_of(kind: str) -> str:
    nodes = [TRIGGER, {"id": "node", "type": kind, "config": {"values": {"a": 1}} if kind == "set" else {}}]
    return json.dumps({"nodes": nodes, "connections": [{"id": "e", "source": "start", "target": "node"}]})


QUICK, HELD = definition_of("set"), definition_of("hold")


class AssigningGateway:
    """One gateway, as far as it accepts and assigns runs."""

    def __init__(self, run_database: RunDatabase, broker: Broker) -> None:
        self.broker = broker
        self.wakeups = 0
        self.assigner = RunAssigner(run_database.store, broker, self.wake)
        self._database = run_database

    def wake(self) -> None:
        self.wakeups += 1
        self._waking = asyncio.create_task(self.broker.wake_workers())

    async def accept(self, place: OwnedWorkflow, definition: str = QUICK, **changes: Any) -> RunAcceptance:  # noqa: ANN401 - any field of an Acceptance
        """Accept a run, and wake workers unless it is assigned to one."""
        given = place.run(definition=definition, total_nodes=2, channel=self.broker.channel, **changes)
        (run,) = self.assigner.assign([given])
        answers = await self._database.store.accept([run])
        self.assigner.send([run], answers)
        if not run.worker:
            await self.broker.wake_workers()
        return run

    async def accept_direct(self, place: OwnedWorkflow, definition: str = QUICK) -> RunAcceptance:
        """Accept runs until one is assigned."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (run := await self.accept(place, definition)).worker:  # noqa: ASYNC110 - as grants arrive
                await asyncio.sleep(0.02)
        return run


@dataclass
class DirectRunHarness:
    """A gateway and a worker, with brokers of their own or a common one."""

    run_database: RunDatabase
    gateway: AssigningGateway
    worker: Broker
    stack: AsyncExitStack
    claims: int = 0
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, **settings: Any) -> RunExecutor:  # noqa: ANN401 - any field of WorkerSettings
        async def hold(call: NodeCall) -> Json:
            await self.go_on.wait()
            return call.data

        held = NodeType("hold", "Hold", "1.0.0", "test", "", EffectRule(NodeEffect.PURE), {"type": "object"})
        store = await self.run_database.another_store()
        claim_runs = store.claim

        async def count_and_claim(claim: ClaimQuery) -> Sequence[ClaimedRun]:
            self.claims += 1
            return await claim_runs(claim)

        store.claim = count_and_claim  # type: ignore[method-assign]
        executor = RunExecutor(
            store,
            self.worker,
            HeldNodeCatalog({**catalog.load_catalog().node_types, "hold": held}, hold=hold),
            NodeServices(http=NoNetwork()),
            WorkerSettings(**{"sweep_seconds": QUIET_SECONDS, **settings}),
        )
        await executor.start()
        self.stack.push_async_callback(executor.drain)
        return executor

    async def row(self, run: RunAcceptance) -> dict[str, Any]:
        return await self.run_database.row(run.execution_id)

    async def wait_for(self, run: RunAcceptance, **columns: object) -> dict[str, Any]:
        """Wait until columns of a run have these values, and return its row."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (row := await self.row(run)) | columns != row:  # noqa: ASYNC110 - rows send no events
                await asyncio.sleep(0.02)
        return row


@pytest.fixture(params=["local", "redis"])
async def harness(
    request: pytest.FixtureRequest, run_database: RunDatabase, redis_server: RedisServer
) -> AsyncIterator[DirectRunHarness]:
    async with open_harness(run_database, redis_server.url if request.param == "redis" else None) as harness:
        yield harness


@asynccontextmanager
async def open_harness(run_database: RunDatabase, redis_url: str | None) -> AsyncIterator[DirectRunHarness]:
    seal = MessageSeal(SECRET, (), DatabaseClock())
    async with AsyncExitStack() as stack:
        worker = await connect_broker(redis_url, channel=uuid4().hex, seal=seal)
        stack.push_async_callback(worker.close)
        broker = await connect_broker(redis_url, channel=uuid4().hex, seal=seal) if redis_url else worker
        stack.push_async_callback(broker.close)
        gateway = AssigningGateway(run_database, broker)
        await gateway.assigner.start()
        harness = DirectRunHarness(run_database, gateway, worker, stack)
        stack.callback(harness.go_on.set)
        yield harness


ON_ONE = pytest.mark.parametrize(("migrated_database", "harness"), [("on_sqlite", "local")], indirect=True)
"""For tests that depend on neither database nor broker."""


async def test_an_assigned_run_is_inserted_as_claimed_and_ends_without_a_claim(
    harness: DirectRunHarness,
) -> None:
    place = await harness.run_database.workflow()
    await harness.start()
    first = await harness.gateway.accept(place)
    assert not first.worker
    await harness.wait_for(first, status="completed")
    await harness.gateway.accept_direct(place)
    claims = harness.claims
    runs = [await harness.gateway.accept(place) for _ in range(20)]
    assert {run.worker for run in runs} == {harness.worker.channel}
    for run in runs:
        row = await harness.wait_for(run, status="completed")
        assert (row["token"], row["attempt"], row["is_fresh"]) == (1, 1, False)
        assert row["started_at"] == row["created_at"]
        assert row["deadline_at"] - row["started_at"] == 3600 * 1_000_000
    assert harness.claims <= claims + 1, "one wakeup of the first run may come late, and finds nothing"


async def test_a_run_without_a_listening_worker_is_pending_at_once(harness: DirectRunHarness) -> None:
    place = await harness.run_database.workflow()
    harness.gateway.assigner._handle_notification(SlotGrant("gone", 0, 10))  # noqa: SLF001 - as a dead worker's last grant
    run = await harness.gateway.accept(place)
    assert run.worker == "gone"
    row = await harness.wait_for(run, status="pending")
    assert (row["attempt"], row["lease_owner"], row["token"]) == (0, None, 2)
    await harness.gateway.assigner.drain()
    assert harness.gateway.wakeups == 1
    assert not (await harness.gateway.accept(place)).worker
    await harness.start()
    await harness.wait_for(run, status="completed")


async def test_a_lost_message_costs_the_first_lease(
    harness: DirectRunHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = await harness.run_database.workflow()

    async def lose(_worker: str, _message: DirectRuns) -> bool:
        return True

    monkeypatch.setattr(harness.gateway.broker, "send_direct", lose)
    harness.gateway.assigner._handle_notification(SlotGrant("deaf", 0, 10))  # noqa: SLF001 - as a message
    run = await harness.gateway.accept(place)
    await harness.gateway.assigner.drain()
    row = await harness.row(run)
    assert (row["status"], row["lease_owner"]) == ("running", "deaf")
    assert row["lease_until"] - row["created_at"] == 5_000_000
    await harness.run_database.query("UPDATE execution SET lease_until = 1")
    await harness.start(sweep_seconds=0.05)
    row = await harness.wait_for(run, status="completed")
    assert row["token"] > 2


async def test_slots_are_granted_only_while_no_run_waits(harness: DirectRunHarness) -> None:
    place = await harness.run_database.workflow()
    executor = await harness.start(concurrency=4)
    await harness.wait_for(await harness.gateway.accept_direct(place), status="completed")
    held: list[RunAcceptance] = []
    while executor.count_held_runs() < 4:
        held.append(await harness.gateway.accept(place, HELD))
        await asyncio.sleep(0.01)
    # Runs of earlier grants are taken beyond the limit; then nothing is granted until no run waits.
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (waiting := await harness.gateway.accept(place)).worker:
            held.append(waiting)
            await asyncio.sleep(0.05)
    await asyncio.sleep(2.2)  # the slots of all earlier grants have expired
    later = [await harness.gateway.accept(place) for _ in range(3)]
    assert not any(run.worker for run in later)
    harness.go_on.set()
    for run in (*held, waiting, *later):
        await harness.wait_for(run, status="completed")
    await harness.gateway.accept_direct(place)


@pytest.mark.parametrize("reason", ["late", "draining", "trial"])
@ON_ONE
async def test_a_worker_makes_pending_the_runs_that_it_may_not_begin(
    harness: DirectRunHarness, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = await harness.run_database.workflow()
    executor = await harness.start()
    await harness.gateway.accept_direct(place)
    monkeypatch.setattr(executors, "MAX_DIRECT_AGE_SECONDS", -1.0 if reason == "late" else 60.0)
    if reason == "draining":
        monkeypatch.setattr(executor, "_is_draining", True)
    elif reason == "trial":
        executor._isolation._is_open.clear()  # noqa: SLF001 - as during a trial
    run = await harness.gateway.accept(place)
    assert run.worker
    row = await harness.wait_for(run, lease_owner=None)
    assert row["token"] > 1
    if reason == "trial":
        executor._isolation._is_open.set()  # noqa: SLF001 - its end
    if reason != "draining":
        await harness.wait_for(run, status="completed")


@ON_ONE
async def test_a_repeated_message_begins_nothing(harness: DirectRunHarness) -> None:
    place = await harness.run_database.workflow()
    executor = await harness.start()
    sent: list[DirectRuns] = []
    send = harness.gateway.broker.send_direct

    async def note_and_send(worker: str, message: DirectRuns) -> bool:
        sent.append(message)
        return await send(worker, message)

    harness.gateway.broker.send_direct = note_and_send  # type: ignore[method-assign]
    run = await harness.gateway.accept_direct(place)
    await harness.wait_for(run, status="completed")
    executor._on_direct(sent[-1])  # noqa: SLF001 - as a message
    assert not executor.count_held_runs()
    unreadable = msgspec.structs.replace(
        sent[-1], number=10_000, content=msgspec.Raw(b'[{"execution_id": 1}]')
    )
    executor._on_direct(unreadable)  # noqa: SLF001 - as a message
    assert not executor.count_held_runs()


@ON_ONE
async def test_runs_that_are_large_or_wait_for_something_are_claimed(harness: DirectRunHarness) -> None:
    place = await harness.run_database.workflow()
    assigner = harness.gateway.assigner
    assigner._handle_notification(SlotGrant("worker", 0, 1_000))  # noqa: SLF001 - as a message
    large = place.run(trigger=json.dumps({"body": "x" * run_assignment.MAX_DIRECT_CHARACTERS}))
    others = [place.run(concurrency_key="key"), place.run(assigned_deployment_id="wf"), large]
    assigned = assigner.assign([*others, place.run()])
    assert [bool(run.worker) for run in assigned] == [False, False, False, True]
    delayed = msgspec.structs.replace(place.inbound(place.run()).runs[0], delay_until=datetime.now(UTC))
    unparsed = msgspec.structs.replace(delayed, delay_until=None, is_read=False)
    assert not any(run.worker for run in assigner.assign([delayed, unparsed]))


@ON_ONE
async def test_messages_have_a_limited_size(harness: DirectRunHarness) -> None:
    place = await harness.run_database.workflow()
    await harness.start()
    await harness.gateway.accept_direct(place)
    await harness.gateway.assigner.drain()
    sent: list[DirectRuns] = []
    send = harness.gateway.broker.send_direct

    async def note_and_send(worker: str, message: DirectRuns) -> bool:
        sent.append(message)
        return await send(worker, message)

    harness.gateway.broker.send_direct = note_and_send  # type: ignore[method-assign]
    trigger = json.dumps({"body": {"text": "x" * 6_000}})
    runs = harness.gateway.assigner.assign(
        [place.run(definition=QUICK, total_nodes=2, trigger=trigger) for _ in range(5)]
    )
    harness.gateway.assigner.send(runs, await harness.run_database.store.accept(runs))
    for run in runs:
        assert run.worker
        await harness.wait_for(run, status="completed", token=1)
    assert [len(json.loads(bytes(message.content))) for message in sent] == [2, 2, 1]


async def test_the_runs_of_an_inbound_request_are_all_assigned_or_all_claimed(
    harness: DirectRunHarness,
) -> None:
    place = await harness.run_database.workflow()
    assigner, store = harness.gateway.assigner, harness.run_database.store
    await harness.start()
    await harness.gateway.accept_direct(place)

    def arrival(count: int) -> InboundRequest:
        fields = {"definition": QUICK, "total_nodes": 2, "channel": harness.gateway.broker.channel}
        return place.inbound(*(place.run(**fields) for _ in range(count)))

    for count, is_direct in ((3, True), (60, False)):
        (request,) = assigner.assign_requests([arrival(count)])
        assert [bool(run.worker) for run in request.runs] == [is_direct] * count
        (answer,) = await store.ingest([request])
        assigner.send(request.runs, answer.runs)
        await harness.gateway.broker.wake_workers()
        for run in request.runs:
            row = await harness.wait_for(run, status="completed")
            assert row["token"] == 1
            assert (row["started_at"] == row["created_at"]) == is_direct


@ON_ONE
async def test_slots_of_runs_that_were_refused_or_lost_are_used_again(harness: DirectRunHarness) -> None:
    place = await harness.run_database.workflow()
    assigner = harness.gateway.assigner

    def assign(count: int) -> list[RunAcceptance]:
        return [run for run in assigner.assign([place.run() for _ in range(count)]) if run.worker]

    assigner._handle_notification(SlotGrant("worker", 0, 5))  # noqa: SLF001 - as a message
    refused = assign(9)
    assert len(refused) == 5
    assert not assign(1)
    assigner._handle_notification(SlotGrant("worker", 0, 5))  # noqa: SLF001 - as a message
    assert not assign(1), "the first five may still arrive"
    assigner.send(refused, [AcceptanceResult(AcceptanceVerdict.STALE, run.execution_id) for run in refused])
    assigner._handle_notification(SlotGrant("worker", 0, 5))  # noqa: SLF001 - as a message
    assert len(assign(9)) == 5
    (worker,) = assigner._workers.values()  # noqa: SLF001 - time passes
    worker.assigned_at -= 3
    assigner._handle_notification(SlotGrant("worker", 0, 5))  # noqa: SLF001 - as a message
    assert len(assign(9)) == 5
    worker.until = 0
    assert not assign(1), "the grant has expired"


async def test_an_assigned_run_that_lasts_keeps_its_lease(harness: DirectRunHarness) -> None:
    place = await harness.run_database.workflow()
    await harness.start(lease_seconds=30)
    run = await harness.gateway.accept_direct(place, HELD)
    begun_at = time.monotonic()
    row = await harness.row(run)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await harness.row(run))["lease_until"] == row["lease_until"]:  # noqa: ASYNC110 - rows send no events
            await asyncio.sleep(0.1)
    assert time.monotonic() - begun_at < 25, "the lease of 30 s had not ended"
    harness.go_on.set()
    row = await harness.wait_for(run, status="completed")
    assert row["token"] == 1


async def test_only_runs_that_no_other_process_has_claimed_since_are_returned(
    run_database: RunDatabase,
) -> None:
    place = await run_database.workflow()
    runs = [msgspec.structs.replace(place.run(), worker="w") for _ in range(2)]
    keys = [ExecutionKey(run.execution_id, run.shard) for run in runs]
    await run_database.store.accept(runs)
    assert not await run_database.claim()
    assert await run_database.store.return_direct(keys[:1]) == 1
    (claimed,) = await run_database.claim()
    assert (claimed.execution_id, claimed.attempt) == (keys[0].execution_id, 1)
    assert await run_database.store.return_direct(keys) == 1
    assert (await run_database.row(keys[0].execution_id))["status"] == "running"


@ON_ONE
async def test_a_worker_without_direct_runs_claims_all(harness: DirectRunHarness) -> None:
    place = await harness.run_database.workflow()
    grants: list[object] = []
    await harness.gateway.broker.listen(grants.append, subject=SLOT_GRANTS)
    await harness.start(direct_runs=False)
    for _ in range(3):
        run = await harness.gateway.accept(place)
        assert not run.worker
        await harness.wait_for(run, status="completed")
    assert not grants
