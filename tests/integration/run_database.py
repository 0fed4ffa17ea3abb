"""Databases of each kind with workflows in them, runs to be accepted there, and a look at their rows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import msgspec
from msgspec.structs import replace
from sqlalchemy import URL, insert, text
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.run_records import NodeSpan, RunStatus, SpanStatus
from journal.store import (
    AcceptanceResult,
    AcceptanceVerdict,
    ClaimedRun,
    ClaimQuery,
    ExecutionKey,
    InboundRequest,
    IngestedRun,
    JournalStore,
    LeaseRenewal,
    RunAcceptance,
    RunWrite,
)
from journal.store_factory import open_store
from models import access_store, ids
from models.access import Organization, UserRole
from models.database import Database, parse_url
from models.loss_limits import MAX_ISOLATION_LOSSES, SUSPECT_LOSSES
from models.timestamps import to_microseconds
from models.workflow import Workflow

TABLES = (
    *("delivery", "event", "event_wait"),
    *(
        "execution",
        "execution_data",
        "span",
        "attempt_span",
        "execution_step",
        "log_line",
        "wait_answer",
        "published_value",
        "signal",
        "signal_wait",
        "blocked_interval",
        "execution_label",
        "model_charge",
        "model_cost",
        "model_hour",
        "failure_hour",
        "bulk_operation",
        "system_decision",
        "ai_settings",
        "approval_request",
        "approval_link",
        "approval_vote",
        "worker_presence",
        "process_presence",
        "throttle",
        "idempotency",
        "definition",
    ),
    *("deployment", "deployment_token", "lifecycle_decision", "data_source_share", "data_source"),
    *("ai_model_share", "ai_model"),
    *("workflow_trigger_match", "workflow_trigger", "schedule"),
    *("workflow_graph", "workflow_tag", "workflow_share", "workflow_version", "workflow"),
    *("audit_entry", "api_key", "signing_secret", "user_account", "organization"),
)
TABLES_WITH_ROWS = text(
    " UNION ALL ".join(f"SELECT '{table}' WHERE EXISTS (SELECT 1 FROM {table})" for table in TABLES)
)
"""One statement instead of many: most tables are empty."""
DEFINITION = '{"nodes":[],"connections":[]}'
LEASE_SECONDS = 30.0


@dataclass(frozen=True)
class OwnedWorkflow:
    """Workflow with the organization and the user that own it."""

    organization: Organization
    workflow_id: str
    user_id: str

    def run(self, **changes: Any) -> RunAcceptance:  # noqa: ANN401 - any field of an Acceptance
        """Return a new run of this workflow for `store.accept`, with fields changed."""
        definition = changes.get("definition", DEFINITION)
        fields: dict[str, Any] = {
            "execution_id": ids.new_id("exec"),
            "shard": self.organization.shard,
            "organization_id": self.organization.id,
            "workflow_id": self.workflow_id,
            "workflow_revision": 1,
            "user_id": self.user_id,
            "trigger_type": "api",
            "trigger": '{"body":{}}',
            "config": "{}",
            "definition_hash": sha256((definition or DEFINITION).encode()).hexdigest(),
            "definition": definition,
            "timeout_seconds": 3600.0,
            "total_nodes": 3,
            "channel": "gateway",
        }
        return RunAcceptance(**fields | changes)

    def inbound(self, *runs: RunAcceptance, **changes: Any) -> InboundRequest:  # noqa: ANN401 - any field of the request
        """Return an accepted inbound request with these runs for `store.ingest`, with fields changed."""
        fields: dict[str, Any] = {
            "delivery_id": ids.new_id("dlv"),
            "shard": self.organization.shard,
            "organization_id": self.organization.id,
            "user_id": self.user_id,
            "workflow_id": self.workflow_id,
            "route": "enqueue",
            "sender": "api-key:key_1",
            "content_hash": "0" * 64,
            "content_bytes": 2,
            "outcome": "accepted",
            "status": 201,
            "runs": [msgspec.convert(run, IngestedRun, from_attributes=True) for run in runs],
        }
        return InboundRequest(**fields | changes)


class RunDatabase:
    """Database with a store on it, for tests that look at its rows."""

    def __init__(self, url: URL, database: Database, store: JournalStore) -> None:
        self.url = url
        self.store = store
        self.database = database
        self._others = AsyncExitStack()

    async def another_store(self) -> JournalStore:
        """Open another store on the database, as another process would; `clear` closes it."""
        store = await open_store(self.url)
        self._others.push_async_callback(store.close)
        return store

    async def clear(self) -> None:
        """Close other stores, and delete all rows of the database."""
        await self._others.aclose()

        async def work(connection: AsyncConnection) -> None:
            with_rows = set((await connection.execute(TABLES_WITH_ROWS)).scalars())
            for table in TABLES:
                if table in with_rows:
                    await connection.execute(text(f"DELETE FROM {table}"))

        await self.database.transaction(work)

    # ── stored state ────────────────────────────────────────────────────────────────────────────────────────

    async def query(self, statement: str, **parameters: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - any JSON value
        """Execute a statement in a transaction of its own; return its rows, empty if it returns none."""

        async def work(connection: AsyncConnection) -> list[dict[str, Any]]:
            result = await connection.execute(text(statement), parameters)
            return [dict(row) for row in result.mappings()] if result.returns_rows else []

        return await self.database.transaction(work)

    async def row(self, execution_id: str) -> dict[str, Any]:
        """Return all columns of a run; raises ValueError if there is no such run."""
        (row,) = await self.query("SELECT * FROM execution WHERE id = :id", id=execution_id)
        return row

    async def count(self, table: str) -> int:
        """Return the number of rows of a table."""
        (row,) = await self.query(f"SELECT count(*) AS count FROM {table}")
        count: int = row["count"]
        return count

    # ── new state ───────────────────────────────────────────────────────────────────────────────────────────

    async def organization(self) -> Organization:
        now = datetime.now(UTC)
        return await self.database.transaction(
            lambda connection: access_store.create_organization(connection, name="An organisation", now=now)
        )

    async def workflow(
        self, organization: Organization | None = None, *, turn: int | None = None
    ) -> OwnedWorkflow:
        """Create a workflow, by default in a new organization, and with this queue turn if one is given."""
        owner = organization or await self.organization()
        workflow_id = ids.new_id("wf")
        while turn is not None and ids.turn_of_workflow(workflow_id) != turn:
            workflow_id = ids.new_id("wf")
        now = datetime.now(UTC)

        async def make(connection: AsyncConnection) -> OwnedWorkflow:
            user = await access_store.create_user(
                connection,
                organization=owner,
                email=f"{ids.new_id('mail')}@example.com",
                name="Somebody",
                role=UserRole.MEMBER,
                now=now,
            )
            workflow = Workflow(
                id=workflow_id,
                organization_id=owner.id,
                shard=owner.shard,
                owner_id=user.id,
                name="A workflow",
                tags=[],
                settings={},
                config={},
                scopes=[],
                created_at=now,
                updated_at=now,
            )
            await connection.execute(insert(Workflow).values(**workflow.model_dump()))
            return OwnedWorkflow(owner, workflow_id, user.id)

        return await self.database.transaction(make)

    async def accept(self, place: OwnedWorkflow, **changes: Any) -> ExecutionKey:  # noqa: ANN401 - any field of an Acceptance
        """Accept a new run of a workflow, with fields changed; return its key."""
        run = place.run(**changes)
        assert await self.store.accept([run]) == [
            AcceptanceResult(AcceptanceVerdict.ACCEPTED, run.execution_id)
        ]
        return ExecutionKey(run.execution_id, run.shard)

    async def claim(
        self, limit: int = 100, owner: str = "worker", lease_seconds: float = LEASE_SECONDS
    ) -> Sequence[ClaimedRun]:
        """Claim up to `limit` pending runs as a worker with this name."""
        return await self.store.claim(ClaimQuery(owner, lease_seconds, limit))

    async def accept_and_claim(self, place: OwnedWorkflow | None = None, **changes: Any) -> ClaimedRun:  # noqa: ANN401 - any JSON value
        """Accept a run, claim it, and return the claim; no other run may be pending."""
        key = await self.accept(place or await self.workflow(), **changes)
        (one,) = await self.claim()
        assert one.execution_id == key.execution_id
        return one

    async def trial(
        self,
        max_isolation_losses: int = MAX_ISOLATION_LOSSES,
        **changes: Any,  # noqa: ANN401 - any field of a claim
    ) -> Sequence[ClaimedRun]:
        """Claim a suspect for a trial, if there is one."""
        claim = ClaimQuery(
            "worker", LEASE_SECONDS, 1, is_trial=True, max_isolation_losses=max_isolation_losses
        )
        return await self.store.claim(replace(claim, **changes))

    async def begun(self, place: OwnedWorkflow | None = None, **changes: Any) -> ExecutionKey:  # noqa: ANN401 - any field of an Acceptance
        """Accept a run, record its trigger as a worker would, and release it; return its key."""
        one = await self.accept_and_claim(place, **changes)
        now = datetime.now(UTC)
        trigger = NodeSpan(
            "start", "start", "manual", SpanStatus.COMPLETED, 1, now, now, port="output", output=b"{}"
        )
        await self.store.record([write(one, spans=[trigger], end=RunStatus.RELEASED, completed_nodes=1)])
        return key_of(one)

    async def suspect(self, place: OwnedWorkflow | None = None, **changes: Any) -> ExecutionKey:  # noqa: ANN401 - any field of an Acceptance
        """Accept a run, and let workers lose it until it is a suspect; return its key."""
        key = await self.begun(place, **changes)
        (one,) = await self.claim()
        assert one.execution_id == key.execution_id
        for losses in range(1, SUSPECT_LOSSES + 1):
            await self.expire(one)
            await self.store.sweep(10)
            if losses < SUSPECT_LOSSES:
                (one,) = await self.claim()
        return key_of(one)

    async def expire(self, *runs: ClaimedRun) -> None:
        """Make the leases of these runs expire."""
        for run in runs:
            await self.query("UPDATE execution SET lease_until = 1 WHERE id = :id", id=run.execution_id)


def key_of(run: ClaimedRun) -> ExecutionKey:
    return ExecutionKey(run.execution_id, run.shard)


def lease_of(run: ClaimedRun) -> LeaseRenewal:
    return LeaseRenewal(run.execution_id, run.shard, run.token)


def write(run: ClaimedRun, **fields: Any) -> RunWrite:  # noqa: ANN401 - any field of a RunWrite
    return RunWrite(run.execution_id, run.shard, run.token, **fields)


def microseconds_from_now(seconds: float) -> int:
    return to_microseconds(datetime.now(UTC)) + int(seconds * 1_000_000)


# ── databases ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class MigratedDatabase:
    """Migrated database: the URL for stores, and the one by which tests look at its rows, if that differs."""

    url: str
    direct_url: str | None = None


@asynccontextmanager
async def open_run_database(migrated_database: MigratedDatabase) -> AsyncIterator[RunDatabase]:
    """Open a migrated database and a store on it during the block; all its rows are deleted before and after."""
    database = Database(parse_url(migrated_database.direct_url or migrated_database.url))
    url = parse_url(migrated_database.url)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(database.close)
        store = await open_store(url)
        stack.push_async_callback(store.close)
        run_database = RunDatabase(url, database, store)
        stack.push_async_callback(run_database.clear)
        await run_database.clear()
        yield run_database
