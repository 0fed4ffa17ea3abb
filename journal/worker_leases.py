"""Leases that earlier processes of a worker have left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, literal_column, select
from sqlmodel import col

from models.execution import Execution
from models.execution_status import ExecutionStatus
from models.worker_processes import lease_owner_prefix

if TYPE_CHECKING:
    from models.database import Database

# Literals instead of bound parameters: the databases use a partial index only for a condition that they can
# read.
_IS_RUNNING = col(Execution.status) == literal_column(f"'{ExecutionStatus.RUNNING}'")


async def worker_lease_owners(database: Database, name: str) -> frozenset[str]:
    """Return the processes of a worker that hold leases of running runs, by their names as lease owners.

    Expired leases and the calling process are included. Owners such as `<process>.reader` are returned as `<process>`.
    Raises `DatabaseUnavailable`.
    """
    prefix = lease_owner_prefix(name)
    owner = col(Execution.lease_owner)
    statement = select(owner).where(_IS_RUNNING, func.substr(owner, 1, len(prefix)) == prefix).distinct()
    async with database.read() as connection:
        found = [one for one in await connection.scalars(statement) if one is not None]
    return frozenset(prefix + one.removeprefix(prefix).partition(".")[0] for one in found)
