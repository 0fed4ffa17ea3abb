"""Choice of the next tasks for workers whose user may not see all runs of the organization.

The workflows that the user may read decide which turns of a queue are looked at, so that a claim never reads through
the tasks of others, however many wait.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any

from sqlalchemy import Integer, bindparam, or_, select, text
from sqlmodel import col

from models.execution import Execution
from models.execution_visibility import visibility_condition
from models.ids import turn_of_workflow
from models.task import Task
from models.workflow import MOST_CALLERS, Workflow, is_readable_by

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.access import ApiCaller


async def choose(
    connection: AsyncConnection, viewer: ApiCaller, queue: str, turns: Sequence[int], limit: int
) -> list[str]:
    """Return the ids of up to `limit` next tasks of a queue among those of runs that `viewer` may see.

    `turns` are those with tasks in the queue, in the order in which they are served.
    """
    readable: dict[int, list[str]] = {}
    for (workflow_id,) in await connection.execute(_select_workflows(viewer)):
        readable.setdefault(turn_of_workflow(workflow_id), []).append(workflow_id)
    by_turn: list[Sequence[str]] = []
    for turn in turns:
        if turn in readable and len(by_turn) < limit:
            values = {"queue": queue, "turn": turn, "workflow_ids": readable[turn], "limit": limit}
            if rows := (await connection.execute(_select_tasks(viewer), values)).all():
                by_turn.append([row.id for row in rows])
    in_turn = (task_id for level in zip_longest(*by_turn) for task_id in level if task_id is not None)
    return list(islice(in_turn, limit))


@lru_cache(MOST_CALLERS)
def _select_workflows(viewer: ApiCaller) -> Select[*tuple[Any, ...]]:
    """Return the statement for the workflows that a user may read, and for deleted ones, of which a user sees its own
    runs.
    """
    is_kept = col(Workflow.deleted_at).is_not(None)
    return select(col(Workflow.id)).where(
        col(Workflow.organization_id) == viewer.organization_id, or_(is_readable_by(viewer), is_kept)
    )


@lru_cache(MOST_CALLERS)
def _select_tasks(viewer: ApiCaller) -> Select[*tuple[Any, ...]]:
    """Return the statement for the next tasks of workflows with one turn in a queue that a user may see."""
    return (
        select(col(Task.id))
        .join(
            Execution,
            (col(Execution.id) == col(Task.execution_id)) & (col(Execution.shard) == col(Task.shard)),
        )
        .where(
            text("task.state = 'ready'"),  # in the words of the index
            col(Task.organization_id) == viewer.organization_id,
            col(Task.queue) == bindparam("queue"),
            col(Task.queue_turn) == bindparam("turn"),
            col(Task.workflow_id).in_(bindparam("workflow_ids", expanding=True)),
            visibility_condition(viewer),
        )
        .order_by(col(Task.is_fresh), col(Task.rank), col(Task.id))
        .limit(bindparam("limit", type_=Integer))
    )
