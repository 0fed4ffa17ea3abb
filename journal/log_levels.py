"""Log levels of workflows as a process knows them.

They are read every two seconds, since a claim must not wait for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import structlog
from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from models.column_types import build_row
from models.database_time import DatabaseTime
from models.errors import DatabaseUnavailable
from models.workflow import WorkflowLogLevel

if TYPE_CHECKING:
    from datetime import datetime
    from typing import Any

    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database

log = structlog.get_logger()

READ_SECONDS: Final = 2.0


@asynccontextmanager
async def follow_log_levels(database: Database) -> AsyncIterator[Mapping[str, str]]:
    """Yield the log levels that are set for workflows at present, by workflow id; they are read again every two
    seconds.

    The mapping is empty until the first read, and changes in place until the context ends. While the database is
    unavailable, it stays as it is.
    """
    levels: dict[str, str] = {}
    task = asyncio.create_task(_read_forever(database, levels))
    try:
        yield levels
    finally:
        task.cancel()


async def read_log_level(connection: AsyncConnection, workflow_id: str) -> WorkflowLogLevel | None:
    """Return the log level that was set for a workflow for some time; None if none was set, or it has expired."""
    statement = select(WorkflowLogLevel).where(
        col(WorkflowLogLevel.workflow_id) == workflow_id, col(WorkflowLogLevel.until) > DatabaseTime()
    )
    row = (await connection.execute(statement)).mappings().first()
    return None if row is None else build_row(WorkflowLogLevel, row)


async def store_log_level(
    connection: AsyncConnection, workflow_id: str, level: str | None, until: datetime | None
) -> None:
    """Set the log level of a workflow until a time, in place of an earlier one.

    With None for either, the earlier level is only removed. Expired levels of all workflows are deleted.
    """
    is_over = col(WorkflowLogLevel.until) <= DatabaseTime()
    await connection.execute(
        delete(WorkflowLogLevel).where((col(WorkflowLogLevel.workflow_id) == workflow_id) | is_over)
    )
    if level is None or until is None:
        return
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(WorkflowLogLevel).values(workflow_id=workflow_id, level=level, until=until)
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=[col(WorkflowLogLevel.workflow_id)],
            set_={"level": statement.excluded.level, "until": statement.excluded.until},
        )
    )


async def _read_forever(database: Database, levels: dict[str, str]) -> None:
    """Read the log levels into `levels` every two seconds, until it is canceled."""
    statement = select(col(WorkflowLogLevel.workflow_id), col(WorkflowLogLevel.level)).where(
        col(WorkflowLogLevel.until) > DatabaseTime()
    )
    while True:
        try:
            async with database.read() as connection:
                found = {row.workflow_id: row.level for row in await connection.execute(statement)}
        except DatabaseUnavailable as error:
            log.debug("log levels not read", error=str(error))
        except Exception:
            log.exception("log levels not read")
        else:
            levels.clear()
            levels.update(found)
        await asyncio.sleep(READ_SECONDS)
