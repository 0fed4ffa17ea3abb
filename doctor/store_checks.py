"""Checks of the stores: tables and indexes, leader, workers, clocks, and blobs."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy import ColumnElement, Select, func, literal, or_, select, text
from sqlmodel import col

from doctor.findings import DriftClass, DriftFinding, DriftSeverity, DriftSubject
from doctor.row_checks import SHOWN_ROWS, before
from journal import audit_chain
from journal.blobs.blob_reference import BlobReference, InvalidBlobReference
from journal.blobs.blob_storage import BlobLost, BlobOwner
from journal.blobs.orphan_blobs import MIN_AGE_HOURS, find_unused
from journal.presence_reports import ABSENT_SECONDS, program_version
from models import schema_migration
from models.database_time import read_database_time
from models.execution import Execution, Leadership, SpanRow
from models.process_presence import ProcessPresence
from models.worker_presence import WorkerPresence
from models.worker_processes import ALL_IN_ONE_OWNER

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.blobs.blob_store import BlobStore
    from models.database import Database

SKEW_SECONDS: Final = 2.0
CHECKED_BLOBS: Final = 200
"""Number of the newest large outputs whose blobs are looked for."""
DATABASE: Final = DriftSubject("database", "database")
_INVALID_INDEXES: Final = text(
    "SELECT relname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid"
    " WHERE NOT indisvalid AND pg_table_is_visible(indexrelid)"
)


async def check_tables(database: Database) -> Sequence[DriftFinding]:
    """Return a critical finding if the tables are older or newer than this code; else none.

    Raises `DatabaseUnavailable`.
    """
    try:
        await schema_migration.require_current(database)
    except (schema_migration.OutdatedDatabase, schema_migration.NewerDatabase) as error:
        return [
            DriftFinding(
                DriftClass.MIGRATION_BEHIND,
                DATABASE,
                str(error),
                {"expected": schema_migration.HEAD_REVISION},
                DriftSeverity.CRITICAL,
                "Run `pilotflame migrate` with the newest version, then restart all processes with it.",
            )
        ]
    return ()


async def check_database(connection: AsyncConnection) -> Sequence[DriftFinding]:
    """Return findings about an absent leading scheduler, absent workers, and processes of another version.

    On PostgreSQL also about invalid indexes and a clock that differs by over 2 seconds from this host's.
    """
    found = [
        *await _check_leader(connection),
        *await _check_workers(connection),
        *await _check_versions(connection),
    ]
    if connection.dialect.name == "postgresql":
        found += await _check_postgresql(connection)
    return found


async def check_blobs(database: Database, blobs: BlobStore) -> Sequence[DriftFinding]:
    """Return one finding for all blobs that have had no run for over a day, and a critical one for each large output
    without its blob.

    Only the newest 200 outputs are looked up. Raises `DatabaseUnavailable` and `BlobsUnavailable`.
    """
    orphans = 0
    async for owners in blobs.backend.idle_owners(timedelta(hours=MIN_AGE_HOURS + 1)):
        orphans += len(await find_unused(database, owners))
    found: list[DriftFinding] = []
    if orphans:
        message = f"{orphans} runs without a row have had blobs for over a day."
        found.append(
            DriftFinding(
                DriftClass.BLOB_WITHOUT_ROW, DriftSubject("blobs", "blobs"), message, {"runs": orphans}
            )
        )
    async for owner, reference in _newest_references(database):
        try:
            async with blobs.open(owner, reference.sha256):
                pass
        except BlobLost:
            found.append(
                DriftFinding(
                    DriftClass.ROW_WITHOUT_BLOB,
                    DriftSubject("execution", owner.key_id, owner.organization_id),
                    "A large output of the run is gone from the storage of blobs.",
                    {"sha256": reference.sha256, "bytes": reference.size},
                    DriftSeverity.CRITICAL,
                    "Restore the storage of blobs from a backup that is at least as new as the database.",
                )
            )
    return found


async def _check_leader(connection: AsyncConnection) -> Sequence[DriftFinding]:
    """Return a critical finding if no scheduler leads; none while a process
    with all roles (`pilotflame dev`) is running.
    """
    leads = select(func.count()).where(col(Leadership.lease_until) > before(0))
    # One process that has all roles needs no election.
    has_all_roles = _select_present().where(col(WorkerPresence.owner).startswith(ALL_IN_ONE_OWNER))
    if await connection.scalar(leads) or await connection.scalar(has_all_roles):
        return ()
    message = "No scheduler leads: schedules, timers and lifecycle policies stand still."
    remedy = "Start `pilotflame scheduler`, and read its log if it runs."
    return [_server_finding(DriftClass.NO_LEADER, "scheduler", message, remedy)]


async def _check_workers(connection: AsyncConnection) -> Sequence[DriftFinding]:
    """Return a critical finding if no worker is running (seen lately and not ended); otherwise none."""
    if await connection.scalar(_select_present()):
        return ()
    message = "No worker is present: runs that no pod executes stay pending."
    return [_server_finding(DriftClass.NO_WORKER, "worker", message, "Start `pilotflame worker`.")]


async def _check_versions(connection: AsyncConnection) -> Sequence[DriftFinding]:
    """Return a finding for each running process of another version than this program's, at most 100 of workers
    and of others.
    """
    own = program_version()
    workers = select(literal("worker"), col(WorkerPresence.owner), col(WorkerPresence.version)).where(
        *_are_present(), or_(col(WorkerPresence.version) != own, col(WorkerPresence.version).is_(None))
    )
    others = select(
        col(ProcessPresence.role), col(ProcessPresence.owner), col(ProcessPresence.version)
    ).where(col(ProcessPresence.seen_at) > before(ABSENT_SECONDS), col(ProcessPresence.version) != own)
    return [
        DriftFinding(
            DriftClass.VERSIONS_DIFFER,
            DriftSubject("process", owner),
            f"The {role} runs version {version or 'before 0.2'}, and this program is version {own}.",
            {role: version, "here": own},
            remedy="Finish the upgrade, or roll it back: restart the processes of the other version.",
        )
        for statement in (workers, others)
        for role, owner, version in (await connection.execute(statement.limit(SHOWN_ROWS))).all()
    ]


async def check_audit_chain(
    connection: AsyncConnection, *, organization_id: str | None = None, newest: int | None = None
) -> Sequence[DriftFinding]:
    """Return a critical finding for each organization with a broken chain of audit entries.

    `organization_id` None: all organizations. `newest` is the number of entries to read of each, None for whole chains.
    """
    return [
        DriftFinding(
            DriftClass.AUDIT_CHAIN_BROKEN,
            DriftSubject("organization", broken.organization_id, broken.organization_id),
            f"The audit trail is broken at entry {broken.sequence}: {broken.reason}.",
            {"sequence": broken.sequence, "entry": broken.entry_id},
            DriftSeverity.CRITICAL,
            "Compare the audit trail with a backup, and find out who has changed rows of the database.",
        )
        for broken in await audit_chain.find_breaks(
            connection, organization_id=organization_id, newest=newest
        )
    ]


def _select_present() -> Select[int]:
    """Return the statement that counts running workers (seen lately and not ended)."""
    return select(func.count()).where(*_are_present())


def _are_present() -> Sequence[ColumnElement[bool]]:
    """Return the SQL conditions that a worker is running: seen lately and not ended."""
    return col(WorkerPresence.seen_at) > before(ABSENT_SECONDS), col(WorkerPresence.ended_at).is_(None)


async def _check_postgresql(connection: AsyncConnection) -> Sequence[DriftFinding]:
    """Return findings about indexes that PostgreSQL has marked invalid, and about a clock that differs by
    over 2 seconds.
    """
    found = [
        DriftFinding(
            DriftClass.INVALID_INDEX,
            DriftSubject("index", name),
            f"The index {name} is invalid: PostgreSQL maintains it and does not use it.",
            remedy=f"Run REINDEX INDEX CONCURRENTLY {name}",
        )
        for name in await connection.scalars(_INVALID_INDEXES)
    ]
    asked_at = time.time()  # noqa: TID251 - the clock of this host is the one that is examined
    database_time = (await read_database_time(connection)).timestamp()
    answered_at = time.time()  # noqa: TID251 - the clock of this host is the one that is examined
    skew = max(asked_at - database_time, database_time - answered_at)
    if skew > SKEW_SECONDS:
        found.append(
            DriftFinding(
                DriftClass.CLOCK_SKEW,
                DriftSubject("host", "clock"),
                f"The clock of this host differs from the database's by {skew:.0f} s.",
                {"seconds": round(skew, 1)},
                remedy="Synchronize the clocks of all hosts by NTP: certificates and object storage depend on them.",
            )
        )
    return found


async def _newest_references(database: Database) -> AsyncIterator[tuple[BlobOwner, BlobReference]]:
    """Yield owner and reference of the newest 200 large outputs; invalid references are left out."""
    statement = (
        select(*(col(Execution.organization_id), col(Execution.key_id), col(SpanRow.output_blob)))
        .join(Execution, col(Execution.id) == col(SpanRow.execution_id))
        .where(col(SpanRow.output_blob).is_not(None))
        .order_by(col(SpanRow.execution_id).desc())
        .limit(CHECKED_BLOBS)
    )
    async with database.read() as connection:
        rows = (await connection.execute(statement)).all()
    for organization_id, key_id, written in rows:
        try:
            yield BlobOwner(organization_id, key_id), BlobReference.from_text((written or "").encode())
        except InvalidBlobReference:
            continue


def _server_finding(drift_class: DriftClass, process: str, message: str, remedy: str) -> DriftFinding:
    return DriftFinding(
        drift_class, DriftSubject("process", process), message, {}, DriftSeverity.CRITICAL, remedy
    )
