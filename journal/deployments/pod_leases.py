"""Leases of pods: which processes hold runs, and immediate reclaim from processes that have ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
from sqlalchemy import literal_column, select
from sqlmodel import col

from journal import out_of_memory_reclaim
from models.execution import Execution
from models.execution_status import ExecutionStatus
from models.workflow_names import PodProcess, lease_owner, lease_owner_prefix

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from journal.store import JournalStore
    from models.database import Database

log = structlog.get_logger()

# Literals instead of bound parameters: the databases use a partial index only for a condition that they can
# read.
_IS_RUNNING = col(Execution.status) == literal_column(f"'{ExecutionStatus.RUNNING}'")


async def pod_lease_owners(database: Database, workflow_id: str) -> frozenset[PodProcess]:
    """Return the processes of a workflow's pods that hold runs of it; raises `DatabaseUnavailable`."""
    prefix = lease_owner_prefix(workflow_id)
    statement = (
        select(col(Execution.lease_owner))
        .where(col(Execution.workflow_id) == workflow_id, _IS_RUNNING)
        .distinct()
    )
    async with database.read() as connection:
        owners = [owner for owner in await connection.scalars(statement) if owner is not None]
    found = (PodProcess.from_name(owner.removeprefix(prefix)) for owner in owners if owner.startswith(prefix))
    return frozenset(process for process in found if process is not None)


async def reclaim_pod_leases(
    database: Database,
    store: JournalStore,
    workflow_id: str,
    gone: Iterable[PodProcess],
    out_of_memory: Collection[PodProcess] = (),
) -> int:
    """Reclaim the runs of ended processes; returns the number of runs. Raises `DatabaseUnavailable`.

    The processes in `out_of_memory` were killed for lack of memory. If a process still runs after all, as on
    a machine that is cut off, its writes are refused from then on.
    """
    count = 0
    for process in gone:
        owner = lease_owner(workflow_id, process)
        if process in out_of_memory:
            count += await out_of_memory_reclaim.reclaim_out_of_memory(database, store, owner)
        else:
            count += await store.reclaim(owner)
    if count:
        log.info("executions of pods reclaimed", workflow_id=workflow_id, count=count)
    return count
