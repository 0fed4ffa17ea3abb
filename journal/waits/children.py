"""Sub-workflow runs of a parent that has ended without them: they are stopped or cancelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from sqlalchemy import Text, and_, or_, select, type_coerce
from sqlalchemy.orm import aliased
from sqlmodel import col

from journal.store import ExecutionKey
from models.execution import Execution
from models.execution_status import ExecutionStatus

if TYPE_CHECKING:
    from sqlalchemy import Select

    from journal.store import EndRequestOutcome, JournalStore
    from models.database import Database

BATCH_RUNS: Final = 100
PARENT: Final = "parent"
"""Field of a run's completion actions that names the waiting node of its parent."""
_REQUESTS: Final[Mapping[str, str]] = {
    ExecutionStatus.FAILED: "stop",
    ExecutionStatus.STOPPED: "stop",
    ExecutionStatus.CANCELLED: "cancel",
}
"""Request to a child, by the status with which its parent has ended: nothing waits for the child any more."""

_parent_alias = aliased(Execution)
_ABANDONED: Final[Select[str, int, str]] = (
    select(col(Execution.id), col(Execution.shard), col(_parent_alias.status).label("parent_status"))
    .join(
        _parent_alias,
        and_(
            col(_parent_alias.id) == col(Execution.parent_id),
            col(_parent_alias.shard) == col(Execution.shard),
        ),
    )
    .where(
        col(Execution.parent_id).is_not(None),
        col(Execution.ended_at).is_(None),
        col(_parent_alias.status).in_(list(_REQUESTS)),
        # This field is always the first of the object.
        type_coerce(col(Execution.completion_action), Text).startswith(f'{{"{PARENT}":'),
        or_(
            col(Execution.request).is_(None),
            and_(
                col(Execution.request) == "stop", col(_parent_alias.status) == ExecutionStatus.CANCELLED.value
            ),
        ),
    )
    .order_by(col(Execution.id))
    .limit(BATCH_RUNS)
    # Skips locked runs: the next sweep finds them again.
    .with_for_update(of=Execution, key_share=True, skip_locked=True)
)


class AbandonedRun(Struct, frozen=True):
    """Run that was requested to end."""

    execution_id: str
    request: str
    """`stop` or `cancel`."""
    requested: EndRequestOutcome
    """Result of the request, with the addresses to notify."""


def completion_for_parent(parent_id: str, node_id: str, iteration: str) -> dict[str, dict[str, str]]:
    """Return the completion action of a run that answers the waiting node of its parent when it ends.

    It must be the first field of the object of actions.
    """
    return {PARENT: {"executionId": parent_id, "nodeId": node_id, "iteration": iteration}}


async def request_abandoned_ends(database: Database, store: JournalStore) -> Sequence[AbandonedRun]:
    """Request the unfinished awaited sub-workflow runs of failed or stopped parents to stop, and those of canceled ones
    to cancel; return these runs.

    A run that no process holds ends at once, and its own sub-workflow runs are included; those of other runs are left
    to a call after their end. The caller notifies the processes. Runs with the same request, or one to cancel, are
    left out. Raises `DatabaseUnavailable`.
    """
    ended: list[AbandonedRun] = []
    while True:
        async with database.read() as connection:
            found = (await connection.execute(_ABANDONED)).all()
        for child in found:
            request = _REQUESTS[child.parent_status]
            requested = await store.request_end(ExecutionKey(child.id, child.shard), request)
            if requested is not None:
                ended.append(AbandonedRun(child.id, request, requested))
        if not found:
            return ended
