"""Packed spans: the view shows them as the rows that they would otherwise have, and only plain runs are packed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from engine.run_records import AttemptSpan, NodeSpan, RunError, RunStatus, SpanStatus
from journal import process_presence, run_deletion, worker_presence
from journal.process_revisions import PACKED_SPANS_REVISION, can_all_read_packed_spans
from journal.run_rows import MAX_PACKED_BYTES, MAX_PACKED_SPANS
from journal.store import ClaimedRun
from models import schema_migration
from models.database import parse_url
from models.timestamps import from_microseconds
from tests import databases
from tests.integration.run_database import (
    MigratedDatabase,
    RunDatabase,
    key_of,
    open_run_database,
    write,
)
from tests.services import PostgresServer
from tests.upgrades import schemas

PATIENCE_SECONDS = 60.0
EARLIER_REVISION = f"{int(PACKED_SPANS_REVISION) - 1:04}"
START = from_microseconds(1_767_225_600_000_001)
END = from_microseconds(1_767_225_600_000_017)
TEXT = '{"text":"a\\u0000b \\ud800 \\"c\\" \u00e9","number":1.0,"large":12345678901234567890}'.encode()


def plain_span(**fields: Any) -> NodeSpan:  # noqa: ANN401 - any field of a span
    """Return a completed span, such as a packed run may have."""
    values: dict[str, Any] = {
        "node_id": "add",
        "label": "Add",
        "type": "set",
        "status": SpanStatus.COMPLETED,
        "sequence": 1,
        "started_at": START,
        "ended_at": END,
        "port": "output",
        "input": b"{}",
        "output": TEXT,
    }
    return NodeSpan(**values | fields)


SPANS = (
    plain_span(hashes=os.urandom(200), unresolved=("a.b", "c"), rendered_config=b'{"a":[1]}'),
    plain_span(
        node_id="same", sequence=3, input=None, input_node="add", output=b"null", hashes=os.urandom(7)
    ),
    plain_span(
        node_id="none", sequence=4, status=SpanStatus.SKIPPED, started_at=None, input=None, output=None
    ),
    plain_span(node_id="loop", sequence=5, iteration="0", port="continue", output=b"2"),
    plain_span(node_id="loop", sequence=6, iteration="1", port="continue", output=b"3", hashes=b""),
)


@pytest.fixture(params=["on_sqlite", "on_postgres"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def run_database(migrated_database: MigratedDatabase) -> AsyncIterator[RunDatabase]:
    async with open_run_database(migrated_database) as run_database:
        yield run_database


async def record(run_database: RunDatabase, **fields: Any) -> ClaimedRun:  # noqa: ANN401 - any field of a RunWrite
    """Record a run with one write, by default completed with all its records."""
    run = await run_database.claimed()
    whole = {"spans": list(SPANS), "end": RunStatus.COMPLETED, "is_whole_run": True}
    assert await run_database.store.record([write(run, **whole | fields)]) == {run.execution_id}
    return run


async def read_spans(run_database: RunDatabase, run: ClaimedRun, table: str) -> list[dict[str, Any]]:
    rows = await run_database.query(
        f"SELECT * FROM {table} WHERE execution_id = :id ORDER BY sequence", id=run.execution_id
    )
    return [
        {key: value for key, value in row.items() if key not in {"id", "execution_id", "shard"}}
        for row in rows
    ]


async def test_the_view_shows_a_packed_span_as_the_row_that_it_would_have(run_database: RunDatabase) -> None:
    packed = await record(run_database)
    run_database.store.packs_spans = False
    plain = await record(run_database)
    assert await read_spans(run_database, packed, "span") == []
    assert await run_database.count("span_pack") == 1
    expected = await read_spans(run_database, plain, "span")
    assert len(expected) == len(SPANS)
    assert await read_spans(run_database, packed, "recorded_span") == expected
    assert await read_spans(run_database, plain, "recorded_span") == expected
    ids = await run_database.query("SELECT id FROM recorded_span")
    assert len({row["id"] for row in ids}) == 2 * len(SPANS)


@pytest.mark.parametrize(
    "fields",
    [
        {"status": SpanStatus.FAILED, "port": "error"},
        {"error": RunError("node-failed", "No")},
        {"attempt": 2},
        {"wake_at": END},
        {"awaits": b"{}"},
        {"resolved_config": b"{}"},
        {"input_blob": b"{}"},
        {"output_blob": b"{}"},
        {"reused_from": "exec_1"},
        {"key_id": "exec_1"},
        {"model_calls": b"[]"},
        {"output": b'"' + b"x" * MAX_PACKED_BYTES + b'"'},
    ],
    ids=lambda fields: " ".join(f"{name}={value}"[:30] for name, value in fields.items()),
)
async def test_a_run_with_a_span_that_is_not_plain_has_rows(
    run_database: RunDatabase, fields: dict[str, Any]
) -> None:
    run = await record(run_database, spans=[*SPANS, plain_span(node_id="odd", sequence=9, **fields)])
    assert len(await read_spans(run_database, run, "span")) == len(SPANS) + 1
    assert await run_database.count("span_pack") == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"is_whole_run": False},
        {"end": RunStatus.FAILED},
        {"end": RunStatus.RELEASED},
        {"end": None},
        {"attempts": [AttemptSpan("add", "Add", "set", "", 1, SpanStatus.FAILED, 1, START)]},
        {
            "spans": [
                plain_span(node_id=f"n{number}", sequence=number) for number in range(MAX_PACKED_SPANS + 1)
            ]
        },
    ],
    ids=lambda fields: " ".join(f"{name}={value}"[:30] for name, value in fields.items()),
)
async def test_a_run_that_is_not_short_and_completed_at_once_has_rows(
    run_database: RunDatabase, fields: dict[str, Any]
) -> None:
    run = await record(run_database, **fields)
    assert len(await read_spans(run_database, run, "span")) == len(fields.get("spans", SPANS))
    assert await run_database.count("span_pack") == 0


async def test_one_batch_records_packed_runs_and_others(run_database: RunDatabase) -> None:
    first, second = await run_database.claimed(), await run_database.claimed()
    whole = {"spans": list(SPANS), "end": RunStatus.COMPLETED, "is_whole_run": True}
    failed = [*SPANS, plain_span(node_id="odd", sequence=9, attempt=2)]
    await run_database.store.record([write(first, **whole), write(second, **whole | {"spans": failed})])
    assert (await run_database.count("span_pack"), await run_database.count("span")) == (1, len(failed))
    (progress,) = await run_database.store.progress([key_of(first)])
    assert progress.outputs == [("add", TEXT.decode()), ("same", "null")]


async def test_a_lost_lease_packs_nothing(run_database: RunDatabase) -> None:
    run = await run_database.claimed()
    stale = write(run, spans=list(SPANS), end=RunStatus.COMPLETED, is_whole_run=True)
    stale.token += 1
    assert await run_database.store.record([stale]) == frozenset()
    assert await run_database.count("span_pack") == 0


async def test_the_deletion_of_a_run_deletes_its_packed_spans(run_database: RunDatabase) -> None:
    run, kept = await record(run_database), await record(run_database)
    assert set(await run_deletion.delete_runs(run_database.database, [run.execution_id])) == {
        run.execution_id
    }
    (left,) = await run_database.query("SELECT execution_id FROM span_pack")
    assert left["execution_id"] == kept.execution_id


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - nothing signals the change
            await asyncio.sleep(0.01)


async def test_spans_are_packed_while_all_present_processes_can_read_them(run_database: RunDatabase) -> None:
    database, store = run_database.database, run_database.store
    store.packs_spans = False
    await database.transaction(
        lambda connection: process_presence.store_process(connection, owner="gateway:1", role="gateway")
    )
    await run_database.query("UPDATE process_presence SET revision = NULL")
    async with database.read() as connection:
        assert not await can_all_read_packed_spans(connection)
    await run_database.query("UPDATE process_presence SET revision = :old", old=EARLIER_REVISION)
    async with database.read() as connection:
        assert not await can_all_read_packed_spans(connection)
    await run_database.query("UPDATE process_presence SET seen_at = 1")
    async with worker_presence.report_presence(database, store, "worker-1", 1, lambda: 0):
        await wait_until(lambda: store.packs_spans)
    await run_database.query("UPDATE worker_presence SET revision = NULL")
    async with database.read() as connection:
        assert await can_all_read_packed_spans(connection)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_a_downgrade_unpacks_spans(kind: str, postgres: PostgresServer, tmp_path: Path) -> None:
    if kind == "postgresql":
        url = await databases.create_database(postgres, "unpacked_spans")
    else:
        url = await databases.create_sqlite_database(tmp_path / "pilotflame.db")
    async with open_run_database(MigratedDatabase(url)) as run_database:
        run = await record(run_database)
        packed = await read_spans(run_database, run, "recorded_span")
        await schemas.downgrade(url, EARLIER_REVISION)
        assert await read_spans(run_database, run, "span") == packed
        await schema_migration.migrate(parse_url(url))
        assert await read_spans(run_database, run, "recorded_span") == packed
