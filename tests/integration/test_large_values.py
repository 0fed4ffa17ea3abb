"""Inputs and outputs too large for a row: moved to blobs when a run is stored, and loaded when it continues."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from engine.node_api import NodeCall
from engine.run_errors import LeaseLost
from engine.run_records import NodeSpan, RunOutcome, RunStatus, SpanStatus
from engine.services import ControlRequest, NodeServices, RunControl
from engine.values import Json
from execution.executor import RunExecutor
from journal import recorder
from journal.blobs import orphan_blobs
from journal.blobs.blob_reference import BlobReference
from journal.blobs.blob_storage import BlobLabel, BlobOwner, BlobsUnavailable
from journal.blobs.blob_store import BlobStore
from journal.blobs.folder_storage import FolderBlobStorage
from journal.blobs.large_values import LargeValues
from journal.recorder import RunJournal, RunLease, RunRecorder
from journal.store import ClaimedRun, ExecutionKey
from messages.local_broker import LocalBroker
from models.database import Database, parse_url
from tests.forks import ForkedProcess
from tests.integration import dies_before_commit
from tests.integration.large_outputs import build_catalog
from tests.integration.run_database import (
    MigratedDatabase,
    OwnedWorkflow,
    RunDatabase,
    key_of,
)
from tests.node_calls import NoNetwork
from workers.settings import WorkerSettings

PATIENCE_SECONDS = 60.0
MEGABYTE = 1_000_000


@pytest.fixture(autouse=True)
def _no_tracebacks() -> Iterator[None]:
    with capture_logs():
        yield


@pytest.fixture(scope="module", params=["on_sqlite", "on_postgres"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def owned_workflow(run_database: RunDatabase) -> OwnedWorkflow:
    return await run_database.workflow()


class CountingFolder(FolderBlobStorage):
    """Blob folder that counts its writes, and is unavailable while a test says so."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.puts = 0
        self.is_away = False
        self.refused = asyncio.Event()

    async def put(self, owner: BlobOwner, sha256: str, content: bytes, label: BlobLabel) -> None:
        if self.is_away:
            self.refused.set()
            raise BlobsUnavailable("away")
        self.puts += 1
        await super().put(owner, sha256, content, label)


@pytest.fixture
async def counting_folder(tmp_path: Path) -> AsyncIterator[CountingFolder]:
    counting_folder = CountingFolder(tmp_path / "blobs")
    yield counting_folder
    await counting_folder.close()


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await condition():  # noqa: ASYNC110 - rows send no events
            await asyncio.sleep(0.02)


# ── workers ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class RunStage:
    """Gate between two nodes of a run, and a record of node inputs."""

    begun: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    keys: list[str] = field(default_factory=list)

    async def effect(self, call: NodeCall) -> Json:
        self.keys.append(call.idempotency_key)
        self.begun.set()
        await self.go_on.wait()
        return call.data


class LargeValueWorkers:
    """Starts workers over one folder."""

    def __init__(
        self, run_database: RunDatabase, counting_folder: CountingFolder, stack: AsyncExitStack
    ) -> None:
        self._run_database = run_database
        self._folder = counting_folder
        self._stack = stack
        self.stage = RunStage()

    async def start(self) -> RunExecutor:
        executor = RunExecutor(
            await self._run_database.another_store(),
            LocalBroker(channel=uuid4().hex),
            build_catalog(effect=self.stage.effect),
            NodeServices(http=NoNetwork()),
            WorkerSettings(lease_seconds=3600, sweep_seconds=3600, commit_seconds=0.02),
            blobs=BlobStore(self._folder),
        )
        await executor.start()
        self._stack.push_async_callback(executor.drain)
        return executor


@pytest.fixture
async def workers(
    run_database: RunDatabase, counting_folder: CountingFolder
) -> AsyncIterator[LargeValueWorkers]:
    async with AsyncExitStack() as stack:
        workers = LargeValueWorkers(run_database, counting_folder, stack)
        yield workers
        workers.stage.go_on.set()


async def accept(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, *types: str, text: str = ""
) -> ExecutionKey:
    """Accept a run of a chain with `text` as output of its trigger."""
    nodes = [
        {"id": "start", "type": "manual"},
        *({"id": kind, "type": kind} for kind in types),
    ]
    edges = [
        {"id": f"e{number}", "source": nodes[number]["id"], "target": nodes[number + 1]["id"]}
        for number in range(len(types))
    ]
    definition = json.dumps({"nodes": nodes, "connections": edges, "settings": {}})
    return await run_database.accept(
        owned_workflow, definition=definition, trigger=json.dumps({"text": text}), total_nodes=len(nodes)
    )


async def has_ended(run_database: RunDatabase, key: ExecutionKey) -> bool:
    return (await run_database.row(key.execution_id))["ended_at"] is not None


async def read_span_rows(run_database: RunDatabase, key: ExecutionKey) -> dict[str, dict[str, Any]]:
    rows = await run_database.query("SELECT * FROM span WHERE execution_id = :id", id=key.execution_id)
    return {row["node_id"]: row for row in rows}


async def test_a_large_output_is_a_reference_in_its_row_and_whole_again_after_a_restart(
    run_database: RunDatabase,
    owned_workflow: OwnedWorkflow,
    workers: LargeValueWorkers,
    counting_folder: CountingFolder,
) -> None:
    text = "ü" * MEGABYTE
    key = await accept(run_database, owned_workflow, "effect", "length", text=text)
    first = await workers.start()
    await asyncio.wait_for(workers.stage.begun.wait(), PATIENCE_SECONDS)
    await run_database.query("UPDATE execution SET lease_until = 1")
    await run_database.store.sweep(10)  # as if the first worker had died: its write has no owner any more
    workers.stage.begun.clear()
    await workers.start()
    first.wake()
    await asyncio.wait_for(workers.stage.begun.wait(), PATIENCE_SECONDS)
    workers.stage.go_on.set()
    await wait_until(lambda: has_ended(run_database, key))

    assert (await run_database.row(key.execution_id))["status"] == "completed"
    assert len(workers.stage.keys) == 2
    assert len(set(workers.stage.keys)) == 1
    found = await read_span_rows(run_database, key)
    assert json.loads(found["length"]["output"]) == {"length": MEGABYTE}
    content = json.dumps({"text": text}, ensure_ascii=False, separators=(",", ":")).encode()
    reference = BlobReference.from_text(found["start"]["output_blob"].encode())
    assert reference == BlobReference(sha256(content).hexdigest(), len(content), "application/json")
    for name in ("start", "effect"):
        assert found[name]["output"] is None
        assert BlobReference.from_text(found[name]["output_blob"].encode()) == reference
    (progress,) = await run_database.store.progress([key])
    shown = {node_id: json.loads(output) for node_id, output in progress.outputs}
    assert shown["start"] == reference.as_json()
    assert set(progress.references) == {"start", "effect"}
    attempts = await run_database.query(
        "SELECT node_id, attempt, status, error FROM attempt_span ORDER BY attempt"
    )
    assert [(row["node_id"], row["attempt"], row["status"]) for row in attempts] == [
        ("effect", 1, "failed"),
        ("effect", 2, "completed"),
    ]
    assert json.loads(attempts[0]["error"])["code"] == "lost-attempt"
    owner = BlobOwner(owned_workflow.organization.id, key.execution_id)
    assert await BlobStore(counting_folder).get(owner, reference.sha256) == content


@pytest.mark.parametrize("migrated_database", ["on_sqlite"], indirect=True)
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b'{"type":"","name":""}\n{}')])
async def test_a_run_with_a_lost_output_fails_with_that_reason(
    run_database: RunDatabase,
    owned_workflow: OwnedWorkflow,
    workers: LargeValueWorkers,
    tmp_path: Path,
    harm: Callable[[Path], object],
) -> None:
    key = await accept(run_database, owned_workflow, "effect", "length", text="x" * MEGABYTE)
    await workers.start()
    await asyncio.wait_for(workers.stage.begun.wait(), PATIENCE_SECONDS)
    (kept,) = (path for path in (tmp_path / "blobs").rglob("*") if path.is_file())
    harm(kept)
    await run_database.query("UPDATE execution SET lease_until = 1")
    await run_database.store.sweep(10)
    await workers.start()
    await wait_until(lambda: has_ended(run_database, key))
    row = await run_database.row(key.execution_id)
    assert row["status"] == "failed"
    error = json.loads(row["error"])
    assert (error["code"], error["nodeId"]) == ("value-lost", "start")
    assert error["message"].startswith("The output of the node 'start' is gone from the blob storage")


@pytest.mark.parametrize("migrated_database", ["on_sqlite"], indirect=True)
async def test_a_worker_killed_between_a_blob_and_its_commit_leaves_an_orphan_and_a_run_that_ends_right(
    run_database: RunDatabase,
    migrated_database: MigratedDatabase,
    owned_workflow: OwnedWorkflow,
    workers: LargeValueWorkers,
    counting_folder: CountingFolder,
    tmp_path: Path,
) -> None:
    key = await accept(run_database, owned_workflow, "unlike", "length")
    process = ForkedProcess(dies_before_commit.execute_runs, migrated_database.url, tmp_path)
    assert await asyncio.to_thread(process.wait, PATIENCE_SECONDS) == -signal.SIGKILL
    await run_database.query("UPDATE execution SET lease_until = 1")
    await run_database.store.sweep(10)
    await workers.start()
    await wait_until(lambda: has_ended(run_database, key))

    found = await read_span_rows(run_database, key)
    assert json.loads(found["length"]["output"]) == {"length": MEGABYTE}
    reference = BlobReference.from_text(found["unlike"]["output_blob"].encode())
    kept = {path.name for path in (tmp_path / "blobs").rglob("*") if path.is_file()}
    assert reference.sha256 in kept
    assert len(kept) == 2, "one of them is named by no row"

    database = Database(parse_url(migrated_database.url))
    os.utime(tmp_path / "blobs" / owned_workflow.organization.id / key.execution_id, (1, 1))
    await orphan_blobs.delete_orphans(BlobStore(counting_folder), database)
    assert {path.name for path in (tmp_path / "blobs").rglob("*") if path.is_file()} == kept
    await run_database.query("DELETE FROM execution")
    await orphan_blobs.delete_orphans(BlobStore(counting_folder), database)
    await database.close()
    assert not [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]


# ── the journal of a run ──────────────────────────────────────────────────────────────────────────────────


@dataclass
class LargeValueJournal:
    """A claimed run, and its journal."""

    run: ClaimedRun
    lease: RunLease
    journal: RunJournal
    control: RunControl


@pytest.fixture
async def large_value_journal(
    run_database: RunDatabase, counting_folder: CountingFolder, monkeypatch: pytest.MonkeyPatch
) -> LargeValueJournal:
    monkeypatch.setattr(recorder, "RETRY_SECONDS", 0.01)
    run = await run_database.accept_and_claim()
    lease = RunLease(key_of(run), run.token, time.monotonic() + 60)
    control = RunControl()
    large = LargeValues(BlobStore(counting_folder), BlobOwner(run.organization_id, run.key_id), 1_024)
    writer = RunRecorder(run_database.store, lambda _channels, _outcomes: None)
    return LargeValueJournal(run, lease, RunJournal(writer, lease, large=large, control=control), control)


def make_span(node_id: str, status: SpanStatus = SpanStatus.COMPLETED, **fields: Any) -> NodeSpan:  # noqa: ANN401 - fields of a span
    return NodeSpan(node_id, node_id, "set", status, int(fields.pop("sequence", 1)), None, **fields)


async def read_spans(
    run_database: RunDatabase, large_value_journal: LargeValueJournal
) -> dict[str, NodeSpan]:
    found = await run_database.store.spans([key_of(large_value_journal.run)])
    return {one.node_id: one for one in found[large_value_journal.run.execution_id]}


ON_SQLITE = pytest.mark.parametrize("migrated_database", ["on_sqlite"], indirect=True)


@ON_SQLITE
async def test_a_value_that_fits_into_a_row_stays_there(
    run_database: RunDatabase, counting_folder: CountingFolder, large_value_journal: LargeValueJournal
) -> None:
    large_value_journal.journal.record(make_span("a", output=b"1" * 1_024, input=b"2" * 1_024))
    await large_value_journal.journal.commit()
    assert counting_folder.puts == 0
    assert (await read_spans(run_database, large_value_journal))["a"].output == b"1" * 1_024


@ON_SQLITE
async def test_a_content_that_several_nodes_share_is_put_once_and_one_that_was_replaced_not_at_all(
    run_database: RunDatabase, counting_folder: CountingFolder, large_value_journal: LargeValueJournal
) -> None:
    large = b"1" * 5_000
    large_value_journal.journal.record(make_span("a", SpanStatus.RUNNING, input=b"2" * 5_000))
    large_value_journal.journal.record(make_span("a", output=large))
    large_value_journal.journal.record(make_span("b", output=large, input=large, sequence=2))
    await large_value_journal.journal.commit()
    assert counting_folder.puts == 1
    found = await read_spans(run_database, large_value_journal)
    assert found["a"].output_blob == found["b"].output_blob == found["b"].input_blob
    assert (found["b"].output, found["b"].input) == (None, None)


@ON_SQLITE
async def test_inputs_come_back_only_for_nodes_that_will_run_again(
    run_database: RunDatabase, large_value_journal: LargeValueJournal
) -> None:
    large, other = b"1" * 5_000, b"2" * 5_000
    large_value_journal.journal.record(make_span("a", SpanStatus.RUNNING, input=large))
    large_value_journal.journal.record(make_span("b", input=large, output=other, sequence=2))
    await large_value_journal.journal.commit()
    found = await read_spans(run_database, large_value_journal)
    restored = await large_value_journal.journal.restore(list(found.values()))
    assert [(one.input, one.output) for one in restored] == [(large, None), (None, other)]


@ON_SQLITE
async def test_a_storage_that_comes_back_is_waited_for_and_nothing_is_lost(
    run_database: RunDatabase, counting_folder: CountingFolder, large_value_journal: LargeValueJournal
) -> None:
    counting_folder.is_away = True
    large_value_journal.journal.record(make_span("a", output=b"1" * 5_000))
    ending = asyncio.create_task(large_value_journal.journal.end(RunOutcome(RunStatus.COMPLETED)))
    await asyncio.wait_for(counting_folder.refused.wait(), PATIENCE_SECONDS)
    assert not ending.done()
    assert await run_database.count("span") == 0
    counting_folder.is_away = False
    await ending
    assert (await run_database.row(large_value_journal.run.execution_id))["status"] == "completed"
    (restored,) = await large_value_journal.journal.restore(
        list((await read_spans(run_database, large_value_journal)).values())
    )
    assert restored.output == b"1" * 5_000


@ON_SQLITE
@pytest.mark.parametrize("reason", ["lease", *(ControlRequest(number) for number in (3, 4, 5))])
async def test_an_absent_blob_storage_holds_no_run_after_its_lease_or_cancellation(
    run_database: RunDatabase,
    counting_folder: CountingFolder,
    large_value_journal: LargeValueJournal,
    reason: str | ControlRequest,
) -> None:
    counting_folder.is_away = True
    large_value_journal.journal.record(make_span("a", output=b"1" * 5_000))
    commit = asyncio.create_task(large_value_journal.journal.commit())
    await asyncio.wait_for(counting_folder.refused.wait(), PATIENCE_SECONDS)
    if isinstance(reason, ControlRequest):
        large_value_journal.control.ask(reason)
    else:
        large_value_journal.lease.until = time.monotonic()
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(commit, PATIENCE_SECONDS)
    assert await run_database.count("span") == 0
    assert not large_value_journal.journal.holds_lease()
