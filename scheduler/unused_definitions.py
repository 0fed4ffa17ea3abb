"""Deletion of definitions that no run and no deployment uses.

The age of a definition counts from the last acceptance of a run that sent its text. A gateway that omits the text has
sent it within the last hours. So a definition that is a day old, and that no execution names now, will be named only by
executions that send its text again. These find it deleted, or renew its age under the same lock that deletes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import structlog
from sqlalchemy import delete, func, select, tuple_
from sqlmodel import col

from models.database_time import DatabaseTime
from models.deployment import Deployment
from models.execution import Execution
from models.workflow import Definition

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database

log = structlog.get_logger()

KEPT_MICROSECONDS: Final = 24 * 3_600_000_000
BATCH_RUNS: Final = 5_000
BATCH_DEFINITIONS: Final = 500

_IDENTITY: Final = (col(Definition.organization_id), col(Definition.hash))


async def delete_unused_definitions(database: Database) -> None:
    """Delete definitions that are over a day old and that no execution and no deployment refers to.

    A log line has their number. Raises `DatabaseUnavailable`.
    """
    async with database.read() as connection:
        if await connection.scalar(select(col(Definition.hash)).where(_is_old()).limit(1)) is None:
            return
    used = await _find_used(database)
    deleted = 0
    after = ("", "")
    while found := await _find_old(database, after):
        after = found[-1]
        deleted += await _delete(database, [one for one in found if one not in used])
    if deleted:
        log.info("unused definitions deleted", definitions=deleted)


async def _find_used(database: Database) -> set[tuple[str, str]]:
    """Return organization id and hash of the definitions of all executions and deployments.

    Executions are read in batches in the order of their ids, so that no read is long. Raises
    `DatabaseUnavailable`.
    """
    used: set[tuple[str, str]] = set()
    after: str | None = ""
    while after is not None:
        async with database.read() as connection:
            rows = (await connection.execute(_names_statement(after))).all()
        used |= {(row.organization_id, row.definition_hash) for row in rows}
        after = max((row.last for row in rows), default=None)
    async with database.read() as connection:
        deployed = await connection.execute(
            select(col(Deployment.organization_id), col(Deployment.definition_hash))
        )
        # A definition that is deployed after this read has been renewed by that deploy.
        return used | {(row.organization_id, row.definition_hash) for row in deployed}


def _names_statement(after: str) -> Select[*tuple[Any, ...]]:
    some = (
        select(col(Execution.id), col(Execution.organization_id), col(Execution.definition_hash))
        .where(col(Execution.id) > after)
        .order_by(col(Execution.id))
        .limit(BATCH_RUNS)
        .subquery()
    )
    names = (some.c.organization_id, some.c.definition_hash)
    return select(*names, func.max(some.c.id).label("last")).group_by(*names)


async def _find_old(database: Database, after: tuple[str, str]) -> list[tuple[str, str]]:
    """Return the keys (organization id and hash) of up to 500 definitions over a day old, the next after the key
    `after`.
    """
    statement = (
        select(*_IDENTITY)
        .where(tuple_(*_IDENTITY) > tuple_(*after), _is_old())
        .order_by(*_IDENTITY)
        .limit(BATCH_DEFINITIONS)
    )
    async with database.read() as connection:
        return [(row.organization_id, row.hash) for row in await connection.execute(statement)]


async def _delete(database: Database, unused: list[tuple[str, str]]) -> int:
    """Delete definitions that are still old and not locked; return their number."""
    if not unused:
        return 0

    async def work(connection: AsyncConnection) -> int:
        unlocked = (
            select(*_IDENTITY)
            .where(tuple_(*_IDENTITY).in_(unused), _is_old())
            .with_for_update(skip_locked=True)
        )
        result = await connection.execute(delete(Definition).where(tuple_(*_IDENTITY).in_(unlocked)))
        return result.rowcount

    return await database.transaction(work)


def _is_old() -> ColumnElement[bool]:
    return col(Definition.created_at) < DatabaseTime() - KEPT_MICROSECONDS
