"""Visibility of executions to callers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import select
from sqlmodel import col

from concurrency.ttl_cache import TTLCache
from gateway.http import errors
from journal.store import ExecutionKey
from models.execution import Execution
from models.execution_visibility import visibility_condition

if TYPE_CHECKING:
    from models.access import ApiCaller, UserRole
    from models.database import Database

VISIBLE_SECONDS: Final = 5.0
"""Seconds for which a caller who has lost access to a workflow still sees runs that were checked before."""
MAX_VISIBLE: Final = 20_000


class ExecutionAccess:
    """Cache of visible executions by caller, so that polls query the database once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._visible: TTLCache[tuple[str, str, UserRole], bool] = TTLCache(VISIBLE_SECONDS, MAX_VISIBLE)

    async def key(self, execution_id: str, caller: ApiCaller) -> ExecutionKey:
        """Return the key of the rows of an execution; raises 404 unless the caller may see it."""
        if self._visible.get((execution_id, caller.user_id, caller.role)) is None:
            statement = select(col(Execution.id)).where(
                col(Execution.id) == execution_id, visibility_condition(caller)
            )
            async with self._database.read() as connection:
                if await connection.scalar(statement) is None:
                    raise errors.not_found("execution")
            self.allow(execution_id, caller)
        return ExecutionKey(execution_id, caller.shard)

    def allow(self, execution_id: str, caller: ApiCaller) -> None:
        """Record that the caller may see an execution that it has just started."""
        self._visible.put((execution_id, caller.user_id, caller.role), value=True)

    def forget(self) -> None:
        """Clear the cache after a change that may reduce visibility."""
        self._visible = TTLCache(VISIBLE_SECONDS, MAX_VISIBLE)
