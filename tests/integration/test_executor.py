"""Executors with a real store and the in-process broker, and changes of their runs by others."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from structlog.testing import capture_logs

from engine import workflow_runner as engine_run
from engine.node_api import EffectRule, NodeCall, NodeEffect, NodeType, RunNode
from engine.run_errors import NodeError
from engine.run_records import RunStatus
from engine.services import ControlRequest, NodeServices, RunControl
from engine.values import Json
from execution import executor as executors
from execution.executor import RunExecutor
from journal.store import ClaimedRun, ClaimQuery, DefinitionKey, ExecutionKey, JournalStore, SweepResult
from messages.broker import Broker, ChangedExecutions, Notification
from messages.broker_connection import connect_broker
from messages.local_broker import LocalBroker
from models.ended_execution import EndedExecution
from models.errors import DatabaseUnavailable
from nodes import catalog
from nodes.catalog import NodeCatalog
from tests.integration.run_database import (
    MigratedDatabase,
    OwnedWorkflow,
    RunDatabase,
    open_run_database,
    write,
)
from tests.node_calls import NoNetwork
from tests.services import PostgresServer
from workers.settings import WorkerSettings

PATIENCE_SECONDS = 60.0
LONG_SECONDS = 3600.0
BOTH = ["on_sqlite", "on_postgres"]
ON_ONE = pytest.mark.parametrize("migrated_database", ["on_sqlite"], indirect=True)
"""For tests that don't depend on the kind of database."""
EVERY = [*BOTH, "behind_pgbouncer", "on_serializable_postgres"]


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Return the loop that workers run on."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(autouse=True)
def _no_tracebacks() -> Iterator[None]:
    """Suppress tracebacks in the log, because printing them takes longer than the tested code."""
    with capture_logs():
        yield


@pytest.fixture(scope="module", params=BOTH)
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def owned_workflow(run_database: RunDatabase) -> OwnedWorkflow:
    return await run_database.workflow()


async def wait_until(condition: Callable[[], Awaitable[bool]], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - rows send no events
            await asyncio.sleep(0.05)


async def wait_soon(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), PATIENCE_SECONDS)


# ── nodes that tests watch and hold back ──────────────────────────────────────────────────────────────────


@dataclass
class NodeStage:
    """Record of the nodes of a test, and gates that hold them."""

    calls: list[str] = field(default_factory=list)
    """Idempotency keys."""
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: int = 0

    def note(self, call: NodeCall) -> Json:
        self.calls.append(call.idempotency_key)
        return call.data

    async def hold(self, call: NodeCall) -> Json:
        self.calls.append(call.idempotency_key)
        self.begun.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return call.data

    async def effect(self, call: NodeCall) -> Json:
        self.calls.append(call.idempotency_key)
        await asyncio.sleep(0)
        return call.data

    def library(self) -> NodeCatalog:
        return ExecutorTestCatalog(
            {
                **catalog.load_catalog().node_types,
                **{
                    name: make_node_type(name, effect)
                    for name, effect in (
                        ("note", NodeEffect.PURE),
                        ("look", NodeEffect.READ),
                        ("hold", NodeEffect.WRITE),
                        ("effect", NodeEffect.WRITE),
                    )
                },
            },
            {"note": self.note, "look": self.hold, "hold": self.hold, "effect": self.effect},
        )


@dataclass(frozen=True)
class ExecutorTestCatalog(NodeCatalog):
    """The library, and nodes made up for a test."""

    runs: dict[str, RunNode] = field(default_factory=dict)

    def implementation(self, type: str) -> RunNode:  # noqa: A002 - the field's own word
        return self.runs[type] if type in self.runs else super().implementation(type)


def make_node_type(name: str, effect: NodeEffect) -> NodeType:
    return NodeType(name, name, "1.0.0", "test", "", EffectRule(effect), {"type": "object"})


def chain_definition(*types: str, **configs: dict[str, Json]) -> str:
    """Return a definition: the trigger, then one node of each type, each with the type and its place for an id."""
    nodes: list[dict[str, Json]] = [{"id": "start", "type": "manual"}]
    nodes += [
        {"id": f"{kind}{owned_workflow}", "type": kind, "config": configs.get(f"{kind}{owned_workflow}", {})}
        for owned_workflow, kind in enumerate(types, start=1)
    ]
    edges = [
        {
            "id": f"e{owned_workflow}",
            "source": nodes[owned_workflow]["id"],
            "target": nodes[owned_workflow + 1]["id"],
        }
        for owned_workflow in range(len(types))
    ]
    return json.dumps({"nodes": nodes, "connections": edges, "settings": {}})


# ── workers ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class WorkerUnderTest:
    """One worker's process, but for the process."""

    executor: RunExecutor
    broker: Broker


class DeafBroker(LocalBroker):
    """Broker that loses every wakeup, and stops at once."""

    def start_worker(self, on_wakeup: Callable[[int], None]) -> None:
        pass


class WorkerStarter:
    """Factory of workers on a database; leases and sweep intervals are long by default."""

    def __init__(self, run_database: RunDatabase, stack: AsyncExitStack) -> None:
        self._run_database = run_database
        self._stack = stack
        self.stage = NodeStage()

    async def start(
        self,
        *,
        store: JournalStore | None = None,
        broker: Broker | None = None,
        **settings: Any,  # noqa: ANN401 - a field of WorkerSettings
    ) -> WorkerUnderTest:
        store = store or await self._run_database.another_store()
        broker = broker or DeafBroker(channel=uuid4().hex)
        self._stack.push_async_callback(broker.close)
        defaults = {"lease_seconds": LONG_SECONDS, "sweep_seconds": LONG_SECONDS, "commit_seconds": 0.02}
        executor = RunExecutor(
            store,
            broker,
            self.stage.library(),
            NodeServices(http=NoNetwork()),
            WorkerSettings(**{**defaults, **settings}),
        )
        await executor.start()
        self._stack.push_async_callback(executor.drain)
        return WorkerUnderTest(executor, broker)

    async def accept(
        self, owned_workflow: OwnedWorkflow, *types: str, count: int = 1, **configs: dict[str, Json]
    ) -> list[str]:
        """Accept runs of a chain, and return their ids."""
        runs = [
            owned_workflow.run(definition=chain_definition(*types, **configs), total_nodes=len(types) + 1)
            for _ in range(count)
        ]
        await self._run_database.store.accept(runs)
        return [run.execution_id for run in runs]

    async def statuses(self) -> Counter[str]:
        rows = await self._run_database.query(
            "SELECT status, count(*) AS count FROM execution GROUP BY status"
        )
        return Counter({row["status"]: row["count"] for row in rows})

    async def are_all(self, status: str) -> bool:
        return set(await self.statuses()) == {status}


@pytest.fixture
async def workers(run_database: RunDatabase) -> AsyncIterator[WorkerStarter]:
    async with AsyncExitStack() as stack:
        workers = WorkerStarter(run_database, stack)
        yield workers
        workers.stage.go_on.set()


class PatchedStore:
    """A store of which one method is another's."""

    def __init__(self, store: JournalStore, **methods: Any) -> None:  # noqa: ANN401 - any JSON value
        self._store = store
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any JSON value
        return getattr(self._store, name)


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("migrated_database", EVERY, indirect=True)
async def test_a_run_goes_from_its_row_to_its_outputs(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    # An outcome is published with a run that one commit begins and ends.
    worker = await workers.start(broker=await connect_broker(None), commit_seconds=LONG_SECONDS)
    notifications: list[Notification] = []
    await worker.broker.listen(notifications.append)
    definition = {
        "nodes": [
            {"id": "start", "type": "rest-api"},
            {
                "id": "double",
                "type": "set",
                "config": {"values": {"n": {"$op": "multiply", "args": ["{{ data.body.n }}", 2]}}},
            },
            {
                "id": "large",
                "type": "conditional",
                "config": {"condition": {"left": "{{ data.n }}", "operator": "greater-than", "right": 10}},
            },
            {"id": "yes", "type": "log", "config": {"message": "{{ data.n }} is large"}},
            {"id": "no", "type": "log", "config": {"message": "no"}},
        ],
        "connections": [
            {"id": "1", "source": "start", "target": "double"},
            {"id": "2", "source": "double", "target": "large"},
            {"id": "3", "source": "large", "sourcePort": "true", "target": "yes"},
            {"id": "4", "source": "large", "sourcePort": "false", "target": "no"},
        ],
    }
    run = owned_workflow.run(
        definition=json.dumps(definition),
        trigger='{"body":{"n":21}}',
        total_nodes=5,
        channel=worker.broker.channel,
    )
    await run_database.store.accept([run])
    await worker.broker.wake_workers()
    await wait_until(lambda: workers.are_all("completed"))

    (progress,) = await run_database.store.progress([ExecutionKey(run.execution_id, run.shard)])
    assert (progress.completed_nodes, progress.total_nodes, progress.error) == (5, 5, None)
    outputs = {node_id: json.loads(output) for node_id, output in progress.outputs}
    assert outputs["yes"]["n"] == 42
    assert "no" not in outputs
    (line,) = await run_database.query("SELECT message, node_id FROM log_line")
    assert tuple(line.values()) == ("42 is large", "yes")
    # The notification has the outcome as it would be read.
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not notifications:  # noqa: ASYNC110 - nothing signals the change
            await asyncio.sleep(0.02)
    ended = EndedExecution(
        *(run.execution_id, progress.status, 5, progress.percent, None),
        outputs=tuple(sorted(progress.outputs)),
    )
    (notification,) = (one for one in notifications if isinstance(one, ChangedExecutions))
    assert notification.execution_ids == (run.execution_id,)
    (outcome,) = notification.outcomes
    assert msgspec.structs.replace(outcome, outputs=tuple(sorted(outcome.outputs)), size=0) == ended


@pytest.mark.parametrize("migrated_database", EVERY, indirect=True)
async def test_a_loop_leaves_a_span_for_each_turn_and_its_nodes_count_once(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    definition = {
        "nodes": [
            {"id": "start", "type": "rest-api"},
            {"id": "loop", "type": "loop", "config": {"items": [1, 2, 3], "concurrency": 2}},
            {"id": "step", "type": "log", "config": {"message": "{{ item }}"}},
            {"id": "last", "type": "log", "config": {"message": "done"}},
        ],
        "connections": [
            {"id": "1", "source": "start", "target": "loop"},
            {"id": "2", "source": "loop", "sourcePort": "continue", "target": "step"},
            {"id": "3", "source": "loop", "sourcePort": "done", "target": "last"},
        ],
    }
    run = owned_workflow.run(definition=json.dumps(definition), total_nodes=4)
    await run_database.store.accept([run])
    await workers.start()
    await wait_until(lambda: workers.are_all("completed"))
    (progress,) = await run_database.store.progress([ExecutionKey(run.execution_id, run.shard)])
    assert (progress.completed_nodes, progress.percent) == (4, 99)
    assert {node_id for node_id, _ in progress.outputs} == {"start", "loop", "last"}
    spans = await run_database.query(
        "SELECT node_id, iteration, output FROM span WHERE iteration <> '' ORDER BY 1, 2"
    )
    assert [tuple(span.values()) for span in spans] == [
        (node_id, str(turn), str(turn + 1)) for node_id in ("loop", "step") for turn in range(3)
    ]


@ON_ONE
async def test_the_accepting_gateway_is_notified_of_the_end_once_without_a_watch(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    worker = await workers.start(broker=await connect_broker(None))
    notifications: list[Notification] = []
    await worker.broker.listen(notifications.append)
    run = owned_workflow.run(
        definition=json.dumps({"nodes": [{"id": "start", "type": "manual"}], "connections": []}),
        total_nodes=1,
        channel=worker.broker.channel,
    )
    await run_database.store.accept([run])
    await worker.broker.wake_workers()
    await wait_until(lambda: workers.are_all("completed"))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not notifications:  # noqa: ASYNC110 - nothing signals the change
            await asyncio.sleep(0.02)
    (notification,) = (one for one in notifications if isinstance(one, ChangedExecutions))
    assert notification.execution_ids == (run.execution_id,)


async def test_all_that_waits_is_run_without_another_word(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    other = await run_database.workflow()
    await workers.accept(owned_workflow, "note", "effect", count=40)
    await workers.accept(other, "note", "effect", count=3)
    await workers.start(concurrency=4)
    await wait_until(lambda: workers.are_all("completed"))
    assert len(workers.stage.calls) == 2 * 43


async def test_a_workflow_waits_for_its_turn_and_not_for_its_neighbour_s_flood(
    run_database: RunDatabase, workers: WorkerStarter
) -> None:
    organization = await run_database.organization()
    flood = await run_database.workflow(organization, turn=500)
    one = await run_database.workflow(organization, turn=501)
    await workers.accept(flood, "note", count=30)
    (lonely,) = await workers.accept(one, "note")
    await workers.start(concurrency=1)
    await wait_until(lambda: workers.are_all("completed"))
    assert f"{lonely}:note1:0" in workers.stage.calls[:3]


async def test_two_workers_that_race_for_runs_run_each_once(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    await workers.accept(owned_workflow, "effect", count=100)
    await asyncio.gather(*(workers.start(concurrency=7, sweep_seconds=0.2) for _ in range(2)))
    await wait_until(lambda: workers.are_all("completed"))
    assert set(Counter(workers.stage.calls).values()) == {1}
    assert len(workers.stage.calls) == 100
    assert await run_database.count("span") == 200


async def test_a_run_that_waits_is_woken_when_it_is_due_without_a_sweep(
    run_database: RunDatabase,
    owned_workflow: OwnedWorkflow,
    workers: WorkerStarter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_run, "SHORT_WAIT_SECONDS", 0)
    store = await run_database.another_store()
    promoted: list[int] = []

    async def promote_due() -> int:
        promoted.append(await store.promote_due())
        return promoted[-1]

    worker = await workers.start(store=PatchedStore(store, promote_due=promote_due))
    for _ in range(8):
        await workers.accept(owned_workflow, "wait", "note", wait1={"seconds": 0.05})
        worker.executor.wake()
        await wait_until(lambda: workers.are_all("completed"))
    assert promoted == [1] * 8
    waits = await run_database.query(
        "SELECT ended_at - started_at AS lasted FROM span WHERE node_id = 'wait1'"
    )
    assert all(row["lasted"] >= 50_000 for row in waits)


async def test_results_without_effects_are_committed_before_long(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    await workers.accept(owned_workflow, "note", "look")
    await workers.start()
    await wait_soon(workers.stage.begun)

    async def is_committed() -> bool:
        (row,) = await run_database.query("SELECT status, completed_nodes FROM execution")
        return tuple(row.values()) == ("running", 2)

    await wait_until(is_committed)


# ── runs that can't execute ─────────────────────────────────────────────────────────────────────────────────


BROKEN = {
    "an unknown type": '{"nodes":[{"id":"a","type":"no-such-type"}],"connections":[]}',
    "a bad expression": '{"nodes":[{"id":"a","type":"set","config":{"values":{"b":"{{ c }}"}}}],"connections":[]}',
    "a node without an id": '{"nodes":[{"type":"set"}],"connections":[]}',
    "no graph at all": "[1,2]",
    "no JSON": "{",
}


@ON_ONE
@pytest.mark.parametrize("definition", BROKEN.values(), ids=list(BROKEN))
async def test_a_definition_that_cannot_run_fails_its_run_and_no_other(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter, definition: str
) -> None:
    run = owned_workflow.run(definition=definition)
    await run_database.store.accept([run])
    (good,) = await workers.accept(owned_workflow, "note")
    await workers.start()
    await wait_until(lambda: has_status(run_database, good, "completed"))
    await wait_until(lambda: has_status(run_database, run.execution_id, "failed"))
    assert json.loads((await run_database.row(run.execution_id))["error"])["code"] == "invalid-definition"


async def is_requested(control: RunControl) -> bool:
    return control.request is not None


async def has_status(run_database: RunDatabase, execution_id: str, status: str) -> bool:
    found: str = (await run_database.row(execution_id))["status"]
    return found == status


@ON_ONE
async def test_a_definition_that_was_not_there_is_looked_for_again(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    run, again = [owned_workflow.run(definition=chain_definition("note")) for _ in range(2)]
    await run_database.store.accept([run])
    await run_database.query("DELETE FROM definition")
    worker = await workers.start()
    await wait_until(lambda: has_status(run_database, run.execution_id, "failed"))
    await run_database.store.accept([again])
    worker.executor.wake()
    await wait_until(lambda: has_status(run_database, again.execution_id, "completed"))


@ON_ONE
async def test_a_run_with_an_unreadable_journal_fails_alone(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    poison = await run_database.accept_and_claim(owned_workflow, definition=chain_definition("note"))
    good = await run_database.accept_and_claim(owned_workflow, definition=chain_definition("note"))
    await run_database.store.record([write(one, end=RunStatus.RELEASED) for one in (poison, good)])
    await run_database.query(
        "INSERT INTO span (execution_id, node_id, iteration, shard, id, sequence, label, type, status, attempt)"
        " VALUES (:id, 'note1', '', :shard, 'span_1', 1, 'note', 'note', 'of a newer version', 1)",
        id=poison.execution_id,
        shard=poison.shard,
    )
    await workers.start(lease_seconds=0.2, sweep_seconds=0.05)
    await wait_until(lambda: has_status(run_database, good.execution_id, "completed"))
    await wait_until(lambda: has_status(run_database, poison.execution_id, "failed"))
    assert json.loads((await run_database.row(poison.execution_id))["error"])["code"] == "crashed"


# ── suspects ──────────────────────────────────────────────────────────────────────────────────────────────


@ON_ONE
async def test_a_suspect_runs_alone_until_it_has_recorded_a_result(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    suspect = await run_database.suspect(owned_workflow, definition=chain_definition("hold", "note"))
    others = await workers.accept(owned_workflow, "note", count=3)
    await workers.start(sweep_seconds=0.05)
    await wait_soon(workers.stage.begun)
    await asyncio.sleep(0.3)  # it would be claimed by now
    assert await workers.statuses() == Counter(running=1, pending=3)
    workers.stage.go_on.set()
    await wait_until(lambda: workers.are_all("completed"))
    assert workers.stage.calls[0] == f"{suspect.execution_id}:hold1:0"
    assert len(workers.stage.calls) == 2 + len(others)


@ON_ONE
async def test_work_that_arrives_during_a_trial_waits_for_its_end(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    await run_database.suspect(owned_workflow, definition=chain_definition("hold"))
    await run_database.query("UPDATE execution SET status = 'waiting'")
    await workers.start(sweep_seconds=0.05)
    await workers.accept(owned_workflow, "note")
    await wait_until(lambda: has_completed(run_database, 1))
    await run_database.query("UPDATE execution SET status = 'pending' WHERE status = 'waiting'")
    await wait_soon(workers.stage.begun)
    await workers.accept(owned_workflow, "note")
    await asyncio.sleep(0.3)
    assert await workers.statuses() == Counter(completed=1, running=1, pending=1)
    workers.stage.go_on.set()
    await wait_until(lambda: workers.are_all("completed"))


@ON_ONE
async def test_a_suspect_waits_for_unproven_runs_and_a_trial_also_ends_by_time(
    run_database: RunDatabase,
    owned_workflow: OwnedWorkflow,
    workers: WorkerStarter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = [await run_database.suspect(owned_workflow, definition=chain_definition("hold")) for _ in range(2)]
    await run_database.query("UPDATE execution SET status = 'waiting'")
    keys = [await run_database.begun(owned_workflow, definition=chain_definition("hold")), *keys]
    await workers.start(sweep_seconds=0.05)
    await wait_soon(workers.stage.begun)
    await run_database.query("UPDATE execution SET status = 'pending' WHERE status = 'waiting'")
    await asyncio.sleep(0.3)
    assert await workers.statuses() == Counter(running=1, pending=2)
    # A run of this length ends its trial: others continue, and a later loss is no longer counted against it.
    monkeypatch.setattr(executors, "TRIAL_SECONDS", 0.1)
    await wait_until(lambda: workers.are_all("running"))
    await wait_until(lambda: are_off_trial(run_database))
    assert workers.stage.calls == [f"{key.execution_id}:hold1:0" for key in keys]
    workers.stage.go_on.set()
    await wait_until(lambda: workers.are_all("completed"))


async def has_completed(run_database: RunDatabase, count: int) -> bool:
    rows = await run_database.query("SELECT id FROM execution WHERE status = 'completed'")
    return len(rows) == count


async def are_off_trial(run_database: RunDatabase) -> bool:
    (row,) = await run_database.query("SELECT count(*) AS count FROM execution WHERE isolated")
    return not row["count"]


# ── ends on request ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("request_", "status"), [("stop", "stopped"), ("cancel", "cancelled")])
@pytest.mark.parametrize("way", ["by message", "by renewal"])
async def test_a_run_ends_when_it_is_asked_to(
    run_database: RunDatabase,
    owned_workflow: OwnedWorkflow,
    workers: WorkerStarter,
    way: str,
    request_: str,
    status: str,
) -> None:
    (execution_id,) = await workers.accept(owned_workflow, "look", "note")
    worker = await workers.start(lease_seconds=LONG_SECONDS if way == "by message" else 3.0)
    await wait_soon(workers.stage.begun)
    requested = await run_database.store.request_end(
        ExecutionKey(execution_id, owned_workflow.organization.shard), request_
    )
    assert requested is not None
    assert requested.lease_owner == worker.broker.channel
    if way == "by message":
        direct_message = {"execution_id": execution_id, "request": request_}
        await worker.broker.send(worker.broker.channel, direct_message)
    if request_ == "stop":
        (active,) = worker.executor._active.values()  # noqa: SLF001 - not public elsewhere
        await wait_until(lambda: is_requested(active.control))
        assert await has_status(run_database, execution_id, "running")
        workers.stage.go_on.set()
    await wait_until(lambda: has_status(run_database, execution_id, status))
    assert workers.stage.cancelled == (request_ == "cancel")
    assert f"{execution_id}:note2:0" not in workers.stage.calls


@ON_ONE
async def test_a_letter_in_words_of_a_newer_version_ends_nothing(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    (execution_id,) = await workers.accept(owned_workflow, "look")
    worker = await workers.start()
    await wait_soon(workers.stage.begun)
    for request in ("pause", ""):
        await worker.broker.send(worker.broker.channel, {"execution_id": execution_id, "request": request})
    await worker.broker.send(worker.broker.channel, {"execution_id": "exec_unknown", "request": "cancel"})
    await worker.broker.send(worker.broker.channel, {"other": "thing"})
    await asyncio.sleep(0)
    workers.stage.go_on.set()
    await wait_until(lambda: has_status(run_database, execution_id, "completed"))


# ── hand-over ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_worker_that_stops_hands_its_runs_over_at_a_node_s_boundary(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    (execution_id,) = await workers.accept(owned_workflow, "note", "hold", "effect")
    first = await workers.start()
    await wait_soon(workers.stage.begun)
    (active,) = first.executor._active.values()  # noqa: SLF001 - not public elsewhere
    draining = asyncio.create_task(first.executor.drain())
    await wait_soon(active.control.changed)
    assert active.control.request is ControlRequest.HAND_OFF
    workers.stage.go_on.set()
    await draining
    row = await run_database.row(execution_id)
    assert (row["status"], row["attempt"], row["lease_owner"]) == ("pending", 0, None)

    await workers.start()
    await wait_until(lambda: workers.are_all("completed"))
    assert Counter(workers.stage.calls) == {
        f"{execution_id}:{node}:0": 1 for node in ("note1", "hold2", "effect3")
    }


async def test_a_stopping_worker_interrupts_long_nodes(
    run_database: RunDatabase,
    owned_workflow: OwnedWorkflow,
    workers: WorkerStarter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(executors, "HAND_OFF_SECONDS", 0.1)
    (execution_id,) = await workers.accept(owned_workflow, "hold")
    first = await workers.start()
    await wait_soon(workers.stage.begun)
    await first.executor.drain()
    assert workers.stage.cancelled == 1
    assert (await run_database.row(execution_id))["status"] == "pending"
    workers.stage.go_on.set()
    await workers.start()
    await wait_until(lambda: workers.are_all("completed"))
    assert workers.stage.calls == [f"{execution_id}:hold1:0"] * 2


@ON_ONE
async def test_a_worker_that_stops_loses_no_attempt_over_a_node_that_cannot_be_broken_off(
    run_database: RunDatabase,
    owned_workflow: OwnedWorkflow,
    workers: WorkerStarter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def stubborn(call: NodeCall) -> Json:
        workers.stage.begun.set()
        while not workers.stage.go_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await workers.stage.go_on.wait()
        return call.data

    library = workers.stage.library()
    assert isinstance(library, ExecutorTestCatalog)
    library.runs["hold"] = stubborn
    workers.stage.library = lambda: library  # type: ignore[method-assign]  # replaced for the test
    for name in ("HAND_OFF_SECONDS", "CANCEL_SECONDS"):
        monkeypatch.setattr(executors, name, 0.1)
    (execution_id,) = await workers.accept(owned_workflow, "hold")
    first = await workers.start()
    await wait_soon(workers.stage.begun)
    await first.executor.drain()
    row = await run_database.row(execution_id)
    assert (row["status"], row["attempt"], row["lease_owner"]) == ("pending", 0, None)


async def test_a_claim_under_way_when_a_worker_stops_leaves_nothing_behind(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    is_claiming, may_answer = asyncio.Event(), asyncio.Event()
    store = await run_database.another_store()

    async def claim(claim: ClaimQuery) -> Sequence[ClaimedRun]:
        claimed = await store.claim(claim)
        is_claiming.set()
        await may_answer.wait()
        return claimed

    (execution_id,) = await workers.accept(owned_workflow, "note")
    worker = await workers.start(store=PatchedStore(store, claim=claim))
    await wait_soon(is_claiming)
    draining = asyncio.create_task(worker.executor.drain())
    await asyncio.sleep(0.1)
    may_answer.set()
    await draining
    row = await run_database.row(execution_id)
    assert (row["status"], row["attempt"]) == ("pending", 0)
    assert workers.stage.calls == []


# ── changes by others ───────────────────────────────────────────────────────────────────────────────────────


async def take_away(run_database: RunDatabase) -> None:
    """Reclaim all runs, as a sweep does after their leases have expired, before a renewal."""
    await run_database.query(
        "UPDATE execution SET status = 'pending', token = token + 1, lease_owner = NULL, lease_until = NULL"
    )


async def test_a_worker_that_has_lost_a_run_abandons_it_and_another_finishes_it(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    (execution_id,) = await workers.accept(owned_workflow, "hold", "effect")
    first = await workers.start(lease_seconds=2.4)
    await wait_soon(workers.stage.begun)
    (active,) = first.executor._active.values()  # noqa: SLF001 - not public elsewhere
    first.executor._is_draining = True  # noqa: SLF001 - it must not win its own run back
    await take_away(run_database)

    async def is_abandoned() -> bool:
        return workers.stage.cancelled == 1

    await wait_until(is_abandoned)
    assert active.lease.is_held()  # by the clock: it learnt from a renewal
    workers.stage.go_on.set()
    await workers.start()
    await wait_until(lambda: workers.are_all("completed"))
    keys = Counter(workers.stage.calls)
    assert keys == {f"{execution_id}:hold1:0": 2, f"{execution_id}:effect2:0": 1}


@ON_ONE
async def test_a_run_that_was_lost_and_came_back_to_the_same_worker_still_hears_requests(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    (execution_id,) = await workers.accept(owned_workflow, "look")
    worker = await workers.start(lease_seconds=1.0)
    await wait_soon(workers.stage.begun)
    await take_away(run_database)
    worker.executor.wake()

    async def has_left_the_first_one() -> bool:
        return len(workers.stage.calls) == 2 and workers.stage.cancelled == 1

    await wait_until(has_left_the_first_one)
    assert await has_status(run_database, execution_id, "running")
    await run_database.store.request_end(
        ExecutionKey(execution_id, owned_workflow.organization.shard), "cancel"
    )
    await wait_until(lambda: has_status(run_database, execution_id, "cancelled"))


@pytest.mark.parametrize("method", ["definitions", "spans", "last_log_lines"])
async def test_runs_that_cannot_be_begun_for_lack_of_a_database_are_given_back_uncounted(
    run_database: RunDatabase,
    owned_workflow: OwnedWorkflow,
    workers: WorkerStarter,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(executors, "PAUSE_SECONDS", 0.01)
    store = await run_database.another_store()
    failures = 0

    async def fail_often(keys: Sequence[DefinitionKey]) -> Any:  # noqa: ANN401 - any JSON value
        nonlocal failures
        if failures < 5:
            failures += 1
            raise DatabaseUnavailable
        return await getattr(store, method)(keys)

    begun = await run_database.accept_and_claim(owned_workflow, definition=chain_definition("note"))
    await run_database.store.record([write(begun, end=RunStatus.RELEASED)])
    await workers.start(store=PatchedStore(store, **{method: fail_often}))
    await wait_until(lambda: workers.are_all("completed"))
    assert failures == 5


async def test_a_claim_in_doubt_is_given_back_uncounted(
    run_database: RunDatabase,
    owned_workflow: OwnedWorkflow,
    workers: WorkerStarter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(executors, "PAUSE_SECONDS", 0.01)
    store = await run_database.another_store()
    claims = 0

    async def claim(claim: ClaimQuery) -> Sequence[ClaimedRun]:
        nonlocal claims
        claims += 1
        claimed = await store.claim(claim)
        if claims <= 4:
            raise DatabaseUnavailable
        return claimed

    await workers.accept(owned_workflow, "note", count=3)
    await workers.start(store=PatchedStore(store, claim=claim))
    await wait_until(lambda: workers.are_all("completed"))
    assert len(workers.stage.calls) == 3


@ON_ONE
async def test_a_write_that_cannot_be_recorded_ends_the_run_as_crashed_and_no_other(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, workers: WorkerStarter
) -> None:
    def unstorable(_call: NodeCall) -> Json:
        raise NodeError("broken", code="code\ud800")

    library = workers.stage.library()
    assert isinstance(library, ExecutorTestCatalog)
    library.runs["note"] = unstorable
    workers.stage.library = lambda: library  # type: ignore[method-assign]  # replaced for the test
    (poison,) = await workers.accept(owned_workflow, "note")
    (good,) = await workers.accept(owned_workflow, "effect")
    await workers.start(lease_seconds=0.2, sweep_seconds=0.05)
    await wait_until(lambda: has_status(run_database, good, "completed"))
    await wait_until(lambda: has_status(run_database, poison, "failed"))
    assert json.loads((await run_database.row(poison))["error"])["code"] == "crashed"


@ON_ONE
async def test_a_sweep_goes_on_until_nothing_is_left_to_reclaim(
    run_database: RunDatabase,
    owned_workflow: OwnedWorkflow,
    workers: WorkerStarter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(executors, "SWEEP_ROWS", 5)
    await workers.accept(owned_workflow, "note", count=12)
    await run_database.claim(owner="a dead one", lease_seconds=0)
    store, is_swept = await run_database.another_store(), asyncio.Event()

    async def sweep(limit: int) -> SweepResult:
        is_swept.set()
        return await store.sweep(limit)

    pauses = property(lambda _: LONG_SECONDS if is_swept.is_set() else 0.2)  # there is no second round
    monkeypatch.setattr(WorkerSettings, "seconds_between_sweeps", pauses)
    await workers.start(store=PatchedStore(store, sweep=sweep))
    await wait_until(lambda: workers.are_all("completed"))


async def test_runs_outlast_a_restart_of_the_database(
    on_postgres: MigratedDatabase, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "PAUSE_SECONDS", 0.05)
    async with open_run_database(on_postgres) as run_database, AsyncExitStack() as stack:
        workers = WorkerStarter(run_database, stack)
        ids = await workers.accept(await run_database.workflow(), "effect", "hold", "effect", count=20)
        await workers.start(lease_seconds=20.0, sweep_seconds=0.5)
        await wait_soon(workers.stage.begun)
        await asyncio.to_thread(postgres.kill)
        workers.stage.go_on.set()
        await asyncio.to_thread(postgres.start)
        await wait_until(lambda: workers.are_all("completed"))
        assert Counter(workers.stage.calls) == {
            f"{execution_id}:{node}:0": 1 for execution_id in ids for node in ("effect1", "hold2", "effect3")
        }
