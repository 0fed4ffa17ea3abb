"""Bulk operations: one act on many executions or dead letters, which a gateway performs step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    SmallInteger,
    case,
    func,
    insert,
    select,
    text,
    type_coerce,
    update,
)
from sqlmodel import Field, SQLModel, col

from models.column_types import JsonTextColumn, TimestampColumn, build_row, column_values
from models.database_time import DatabaseTime

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.access import ApiCaller


class BulkAction(StrEnum):
    """Action on each selected object."""

    REDRIVE_DEAD_LETTERS = "redrive-dead-letters"
    REPLAY_DEAD_LETTERS = "replay-dead-letters"
    PURGE_DEAD_LETTERS = "purge-dead-letters"
    CANCEL_EXECUTIONS = "cancel-executions"
    RETRY_EXECUTIONS = "retry-executions"
    REPLAY_EXECUTIONS = "replay-executions"


class BulkStatus(StrEnum):
    """Status of a bulk operation."""

    RUNNING = "running"
    STOPPING = "stopping"
    """A user has stopped it; the step in progress ends first."""
    COMPLETED = "completed"
    STOPPED = "stopped"
    FAILED = "failed"
    """It ended before its last object; `end_reason` says why."""


class BulkOperation(SQLModel, table=True):
    """One bulk operation with its progress.

    A gateway that performs it holds a lease, and stores each step before it acts: after the death of that gateway,
    another one repeats the step, which changes nothing that is done.
    """

    __tablename__ = "bulk_operation"
    __table_args__ = (
        Index("ix_bulk_operation_organization", "organization_id", "created_at"),
        Index(
            "ix_bulk_operation_open",
            "leased_until",
            postgresql_where=text("ended_at IS NULL"),
            sqlite_where=text("ended_at IS NULL"),
        ),
    )

    id: str = Field(primary_key=True)
    organization_id: str = Field(foreign_key="organization.id")
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    user_id: str
    key_id: str
    """User who began it, and the key: each step needs both to be valid still."""
    action: str
    selection: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    """Filter, as the request has it."""
    options: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    """Choices of a replay; empty for other acts."""
    total: int
    """Objects that it acts on at most: the number that the user has confirmed."""
    per_second: int
    first_alone: bool
    """Whether the run of the first object must complete before the others follow."""
    status: str
    done: int = 0
    refused: int = 0
    refusals: dict[str, int] = Field(default_factory=dict, sa_column=Column(JsonTextColumn, nullable=False))
    """Numbers of refused objects by the code of the refusal."""
    first_execution_id: str | None = None
    """Run that was started first."""
    step: list[str] = Field(default_factory=list, sa_column=Column(JsonTextColumn, nullable=False))
    """Ids of the objects of the step in progress."""
    cursor_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    cursor_id: str = ""
    """Time and id of the last object that was examined; None and empty at the begin."""
    leased_until: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    """End of the lease of the gateway that performs it."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    ended_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    end_reason: str | None = None
    """Reason of the end of a failed one."""
    request_id: str | None = None
    address_hash: str | None = None
    """Request that began it, and the keyed hash of its address, for the audit trail."""


MICROSECONDS: Final = 1_000_000
LEASE_SECONDS: Final = 15.0
"""Lease of a gateway on an operation, which each step renews; longer than a step may take."""
IS_OPEN: Final = col(BulkOperation.ended_at).is_(None)


async def insert_operation(connection: AsyncConnection, operation: BulkOperation) -> None:
    await connection.execute(insert(BulkOperation).values(column_values(operation)))


async def count_open(connection: AsyncConnection, organization_id: str) -> int:
    """Return the number of operations of an organization that have not ended."""
    statement = select(func.count()).where(col(BulkOperation.organization_id) == organization_id, IS_OPEN)
    return await connection.scalar(statement) or 0


async def find_operation(
    connection: AsyncConnection, caller: ApiCaller, operation_id: str
) -> BulkOperation | None:
    """Return an operation by its id; None if it is missing, or the caller may not see it."""
    statement = select(BulkOperation).where(
        col(BulkOperation.id) == operation_id, *visible_conditions(caller)
    )
    row = (await connection.execute(statement)).mappings().first()
    return None if row is None else build_row(BulkOperation, row)


def visible_conditions(caller: ApiCaller) -> Sequence[ColumnElement[bool]]:
    """Return the SQL conditions, all to be met, for operations that a caller may see and stop: the caller's own; for an
    admin, all of the organization.
    """
    of_organization = col(BulkOperation.organization_id) == caller.organization_id
    own = () if caller.is_admin else (col(BulkOperation.user_id) == caller.user_id,)
    return (of_organization, *own)


async def change_open(
    connection: AsyncConnection, caller: ApiCaller, operation_id: str, values: Mapping[str, Any]
) -> None:
    """Store `values`, by column name, in an operation; changes nothing if it has ended or the caller may
    not stop it.
    """
    await connection.execute(
        update(BulkOperation)
        .where(col(BulkOperation.id) == operation_id, *visible_conditions(caller), IS_OPEN)
        .values(**values)
    )


# ── execution ───────────────────────────────────────────────────────────────────────────────────────────────


def due_statement(limit: int) -> Select[str]:
    """Return the statement for the ids of at most `limit` open operations, of all organizations, whose lease has ended,
    the longest ended first.
    """
    return (
        select(col(BulkOperation.id))
        .where(IS_OPEN, col(BulkOperation.leased_until) <= DatabaseTime())
        .order_by(col(BulkOperation.leased_until))
        .limit(limit)
    )


async def claim_operations(
    connection: AsyncConnection, limit: int, lease_seconds: float
) -> Sequence[BulkOperation]:
    """Lease at most `limit` open operations, of all organizations, whose lease has ended; return them with their new
    lease.
    Operations locked by another transaction are skipped.
    """
    due = due_statement(limit).with_for_update(skip_locked=True).cte("due")
    statement = (
        update(BulkOperation)
        .where(col(BulkOperation.id).in_(select(due.c.id)))
        .values(leased_until=_lease_end(lease_seconds))
        .returning(BulkOperation)
    )
    return [build_row(BulkOperation, row) for row in (await connection.execute(statement)).mappings()]


async def store_progress(
    connection: AsyncConnection, operation: BulkOperation, values: Mapping[str, Any], lease_seconds: float
) -> BulkOperation | None:
    """Store `values`, by column name, in an operation and renew its lease; return the new row.

    None, without a change, if the operation has ended, or its lease has changed since it was read: then another gateway
    performs it.
    """
    statement = (
        update(BulkOperation)
        .where(*_is_leased(operation))
        .values(**values, leased_until=_lease_end(lease_seconds))
        .returning(BulkOperation)
    )
    row = (await connection.execute(statement)).mappings().first()
    return None if row is None else build_row(BulkOperation, row)


async def store_end(
    connection: AsyncConnection, operation: BulkOperation, status: BulkStatus, reason: str | None
) -> bool:
    """Store status, reason and time of the end of an operation, and empty its step.

    Return False, without a change, if it has ended already or its lease was lost.
    """
    statement = (
        update(BulkOperation)
        .where(*_is_leased(operation))
        .values(status=status.value, end_reason=reason, ended_at=DatabaseTime(), step=[])
    )
    return (await connection.execute(statement)).rowcount > 0


async def release(connection: AsyncConnection, operation: BulkOperation) -> None:
    """End the lease of an operation, so that another gateway may perform it at once; changes nothing if the operation
    has ended or the lease was lost.
    """
    await connection.execute(
        update(BulkOperation).where(*_is_leased(operation)).values(leased_until=DatabaseTime())
    )


def _is_leased(operation: BulkOperation) -> Sequence[ColumnElement[bool]]:
    """Return the SQL conditions for an open operation whose lease is the one that `operation` was read with."""
    return (
        col(BulkOperation.id) == operation.id,
        col(BulkOperation.leased_until) == operation.leased_until,
        IS_OPEN,
    )


def _lease_end(seconds: float) -> ColumnElement[int]:
    """Return the SQL expression for the end of a new lease, always later than the stored one.

    Two renewals within one microsecond would otherwise have the same end, by which a lease is identified.
    """
    end = DatabaseTime() + int(seconds * MICROSECONDS)
    following = type_coerce(col(BulkOperation.leased_until), BigInteger) + 1
    return case((following > end, following), else_=end)
