"""Runs that another run has started and waits for: they don't outlive it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

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
"""The field of a run's follow-up that says which node waits for its end."""
_REQUESTS: Final[Mapping[str, str]] = {
    ExecutionStatus.FAILED: "stop",
    ExecutionStatus.STOPPED: "stop",
    ExecutionStatus.CANCELLED: "cancel",
}
"""What is asked of a child whose parent has ended so: nobody waits for it any more."""

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
        # It stands first wherever it stands.
        type_coerce(col(Execution.follow_up), Text).startswith(f'{{"{PARENT}":'),
        or_(
            col(Execution.request).is_(None),
            and_(
                col(Execution.request) == "stop", col(_parent_alias.status) == ExecutionStatus.CANCELLED.value
            ),
        ),
    )
    .order_by(col(Execution.id))
    .limit(BATCH_RUNS)
    # Not those that can't be asked now: they are found again by the next sweep.
    .with_for_update(of=Execution, key_share=True, skip_locked=True)
)


@dataclass(frozen=True, slots=True)
class AbandonedRun:
    """A run that was asked to end."""

    execution_id: str
    request: str
    """`stop` or `cancel`."""
    requested: EndRequestOutcome
    """Whom to tell of that."""


def completion_for_parent(parent_id: str, node_id: str, iteration: str) -> dict[str, dict[str, str]]:
    """Return what is to be done about the end of a run that a node waits for; nothing may stand before it."""
    return {PARENT: {"executionId": parent_id, "nodeId": node_id, "iteration": iteration}}


async def request_abandoned_ends(database: Database, store: JournalStore) -> Sequence[AbandonedRun]:
    """Ask runs to end whose parent has ended without them, and in turn those that they have started.

    What is found was not asked before, so each is asked once; raises `DatabaseUnavailable`.
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
