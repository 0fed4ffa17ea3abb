"""Counts of runs that have not started, read from partial indexes and stopped at a given number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import and_, func, literal_column, select
from sqlmodel import col

from models.deployment import Deployment
from models.execution import DELAYED_TARGET, LIMITED_TARGET, SHARED_TARGET, UNPARSED_TARGET, Execution
from models.execution_status import ExecutionStatus
from models.ids import turn_of_workflow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

_SHARED_TARGETS: Final = (SHARED_TARGET, LIMITED_TARGET, DELAYED_TARGET, UNPARSED_TARGET)
# Literals instead of bound parameters: the databases use a partial index only for a condition that they can
# read.
_PENDING: Final = and_(
    col(Execution.status) == literal_column(f"'{ExecutionStatus.PENDING}'"), col(Execution.is_fresh)
)
_DEFERRED: Final = and_(
    col(Execution.status) == literal_column(f"'{ExecutionStatus.WAITING}'"),
    col(Execution.started_at).is_(None),
)


async def count_organization_backlog(
    connection: AsyncConnection, organization_id: str, *, at_most: int
) -> int:
    """Return how many runs of an organization have not started, counted no further than `at_most`.

    Pending runs count, also those that wait for a concurrency slot or for the parsing of their mail, and so do delayed
    and deferred ones.
    """
    deployed = select(col(Deployment.workflow_id)).where(
        col(Deployment.organization_id) == organization_id, col(Deployment.is_deployed)
    )
    targets = [*_SHARED_TARGETS, *(await connection.scalars(deployed))]
    return await _count_up_to(connection, organization_statements(organization_id, targets), at_most)


async def count_workflow_backlog(
    connection: AsyncConnection, organization_id: str, workflow_id: str, *, at_most: int
) -> int:
    """Return how many runs of a workflow have not started, counted no further than `at_most`: the same runs as in
    `count_organization_backlog`.
    """
    return await _count_up_to(connection, workflow_statements(organization_id, workflow_id), at_most)


def organization_statements(organization_id: str, targets: Sequence[str]) -> Sequence[Select[str]]:
    """Return two statements with a row, its target, for each unstarted run of an organization at the given targets: one
    for pending runs, one for deferred runs.

    A target is the queue of a run: a deployment's workflow id, or a word such as `shared` for the workers.
    """
    of_organization = and_(
        col(Execution.target).in_(targets), col(Execution.organization_id) == organization_id
    )
    return _select_unstarted(and_(_PENDING, of_organization), and_(_DEFERRED, of_organization))


def workflow_statements(organization_id: str, workflow_id: str) -> Sequence[Select[str]]:
    """Return two statements with a row, its target, for each unstarted run of a workflow: one for pending runs, one for
    deferred runs.

    The condition for pending runs names their queue turn, a hash of the workflow id, since the index begins with it.
    """
    own = and_(
        col(Execution.target).in_([*_SHARED_TARGETS, workflow_id]),
        col(Execution.organization_id) == organization_id,
        col(Execution.workflow_id) == workflow_id,
    )
    return _select_unstarted(
        and_(_PENDING, own, col(Execution.queue_turn) == turn_of_workflow(workflow_id)), and_(_DEFERRED, own)
    )


def _select_unstarted(*conditions: ColumnElement[bool]) -> Sequence[Select[str]]:
    return [select(col(Execution.target)).where(condition) for condition in conditions]


async def _count_up_to(connection: AsyncConnection, statements: Sequence[Select[str]], at_most: int) -> int:
    found = 0
    for statement in statements:
        some = statement.limit(at_most - found).subquery()
        found += await connection.scalar(select(func.count()).select_from(some)) or 0
    return found
