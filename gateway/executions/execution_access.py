"""Which executions a caller may see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import ColumnElement, and_, exists, or_, select
from sqlmodel import col

from concurrency.ttl_cache import TTLCache
from gateway.http import errors
from journal.store import ExecutionKey
from models.execution import Execution
from models.workflow import Workflow, is_readable_by

if TYPE_CHECKING:
    from models.access import ApiCaller, UserRole
    from models.database import Database

VISIBLE_SECONDS: Final = 5.0
"""How long whoever may no longer read a workflow can still see the runs that were looked at before."""
MAX_VISIBLE: Final = 20_000


def visibility_condition(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the condition under which a caller may see an execution: its workflow is readable.

    Of a deleted workflow, the history stays with admins, the owner, and whoever ran it. So does a private execution.
    """
    own = and_(col(Execution.organization_id) == caller.organization_id, col(Execution.shard) == caller.shard)
    if caller.is_admin:
        return own
    concerns = or_(col(Workflow.owner_id) == caller.user_id, col(Execution.user_id) == caller.user_id)
    kept = and_(
        col(Workflow.organization_id) == caller.organization_id,
        col(Workflow.deleted_at).is_not(None),
        concerns,
    )
    workflow = exists().where(
        col(Workflow.id) == col(Execution.workflow_id),
        or_(is_readable_by(caller), kept),
        or_(col(Execution.is_private).is_(False), concerns),
    )
    return and_(own, workflow.correlate(Execution))


class ExecutionAccess:
    """Remembers for some seconds who may see what, so that a poll asks once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._visible: TTLCache[tuple[str, str, UserRole], bool] = TTLCache(VISIBLE_SECONDS, MAX_VISIBLE)

    async def key(self, execution_id: str, caller: ApiCaller) -> ExecutionKey:
        """Return where the rows of an execution are that the caller may see; raises 404."""
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
        """Remember that the caller may see an execution: it has just started it."""
        self._visible.put((execution_id, caller.user_id, caller.role), value=True)

    def forget(self) -> None:
        """Ask about everything again: somebody may see less than before."""
        self._visible = TTLCache(VISIBLE_SECONDS, MAX_VISIBLE)
