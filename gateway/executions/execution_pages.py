"""Pages of the list of executions by keyset, each read from the index that leaves the fewest rows to examine."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final

from sqlalchemy import and_, exists, literal_column
from sqlmodel import col

from gateway.executions import execution_rows
from gateway.http import keyset, limits
from gateway.http.keyset import KeysetBounds, ListPage, RowSource
from models.column_types import build_row
from models.execution import Execution, ExecutionData
from models.execution_label import ExecutionLabel
from models.execution_status import ExecutionStatus
from models.execution_visibility import visibility_condition
from models.workflow import Workflow

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import FromClause

    from gateway.executions.execution_rows import ExecutionFilter
    from models.access import ApiCaller

_INDEXED_STATUSES: Final = (
    (ExecutionStatus.PENDING, ExecutionStatus.RUNNING, ExecutionStatus.WAITING),
    (ExecutionStatus.FAILED, ExecutionStatus.STOPPED, ExecutionStatus.CANCELLED),
)
"""Statuses of the indexes `ix_execution_live` and `ix_execution_unsuccessful`, in the order of their conditions."""
FEW_RUNS: Final = 500
"""Number of runs up to which all of a workflow are examined for those of a status, wherever they are in the table."""
_COLUMNS: Final = tuple(Execution.__table__.columns)  # type: ignore[attr-defined]  # SQLModel adds it


async def list_page(
    connection: AsyncConnection, caller: ApiCaller, wanted: ExecutionFilter, bounds: KeysetBounds
) -> ListPage[Execution]:
    """Return a page of the executions behind the cursor of `bounds` that the caller may see and that match.

    A page examines at most 10,000 rows of each index, so it may be short or empty although `next_cursor` names another
    one. Its count is at most 10,000 and may be a lower bound. It calls `follow_indexes`, which holds for the rest of
    the transaction.
    """
    await keyset.follow_indexes(connection)
    found: list[tuple[datetime, Execution]] = []
    edges: list[datetime] = []
    count, is_lower_bound = 0, False
    for source in await _choose_sources(connection, caller, wanted):
        columns = (*_COLUMNS, source.created_at.label("listed_at"))
        examined = await keyset.read_examined(connection, columns, source, bounds)
        if examined.edge is not None and len(examined.rows) <= bounds.limit:
            edges.append(examined.edge)
        for row in examined.rows:
            columns_of_run = dict(row)
            found.append((columns_of_run.pop("listed_at"), build_row(Execution, columns_of_run)))
        counted = await keyset.count_page(connection, source, bounds, examined)
        count, is_lower_bound = count + counted.count, is_lower_bound or counted.is_lower_bound
    runs, next_cursor = _cut_page(found, edges, bounds)
    return ListPage(
        min(count, limits.KEYSET_COUNT), runs, next_cursor, is_lower_bound or count > limits.KEYSET_COUNT
    )


def _cut_page(
    found: Sequence[tuple[datetime, Execution]], edges: Sequence[datetime], bounds: KeysetBounds
) -> tuple[Sequence[Execution], str | None]:
    """Return the page of runs in order and the cursor of the next one, None at the end; `found` has the runs of all
    sources.

    The page ends at the first of `edges`, times at which sources stopped reading: behind it, runs may be missing.
    """
    edge = (max if bounds.is_descending else min)(edges, default=None)
    if edge is not None:
        found = [one for one in found if (one[0] >= edge if bounds.is_descending else one[0] <= edge)]
    ordered = sorted(found, key=lambda one: (one[0], one[1].id), reverse=bounds.is_descending)
    shown = ordered[: bounds.limit]
    if len(ordered) > bounds.limit:
        last = shown[-1]
        next_cursor: str | None = bounds.cursor_behind(last[0], last[1].id)
    else:
        next_cursor = None if edge is None else bounds.cursor_behind_time(edge)
    return [execution for _, execution in shown], next_cursor


# ── choice of the index ─────────────────────────────────────────────────────────────────────────────────────


async def _choose_sources(
    connection: AsyncConnection, caller: ApiCaller, wanted: ExecutionFilter
) -> Sequence[RowSource]:
    """Return the queries that together give the list, each by an index; no run is in two of them.

    Runs with labels are read by the rarest label, children by the id of their parent, a list without completed runs by
    an index for each status, and all others by time.
    """
    if wanted.labels:
        return [await _select_by_rarest_label(connection, caller, wanted)]
    if wanted.parent_id is not None:
        own = (col(Execution.organization_id) == caller.organization_id, col(Execution.shard) == caller.shard)
        children = execution_rows.is_child_of(wanted.parent_id)
        created_at = col(Execution.created_at)
        within = (*own, *children, *execution_rows.time_conditions(wanted, created_at))
        residual = [
            *_build_visibility(caller),
            *execution_rows.column_conditions(wanted),
            *_of_workflow(wanted),
        ]
        return [RowSource(_get_table(), created_at, col(Execution.id), within, residual)]
    by_time = _by_time(caller, wanted)
    if not wanted.statuses or ExecutionStatus.COMPLETED in wanted.statuses:
        return [by_time]
    by_status = [
        _of_status(caller, wanted, status, index)
        for index in _INDEXED_STATUSES
        for status in index
        if status in wanted.statuses
    ]
    if wanted.workflow_id is not None and await keyset.has_at_most(connection, by_time, FEW_RUNS):
        return [by_time]
    return by_status


def _by_time(caller: ApiCaller, wanted: ExecutionFilter) -> RowSource:
    """Return the source for runs by the time of acceptance, of the organization or of the filter's workflow."""
    within = [col(ExecutionData.organization_id) == caller.organization_id]
    if wanted.workflow_id is not None:
        # Checked once, not run by run: the organization is in another index, which has the same order.
        is_own = exists().where(
            col(Workflow.id) == wanted.workflow_id, col(Workflow.organization_id) == caller.organization_id
        )
        within = [col(ExecutionData.workflow_id) == wanted.workflow_id, is_own]
    created_at = col(ExecutionData.created_at)
    within += execution_rows.time_conditions(wanted, created_at)
    residual = [
        *_build_visibility(caller),
        *execution_rows.column_conditions(wanted),
        *_build_status_condition(wanted),
    ]
    table = _get_table().join(ExecutionData.__table__, execution_rows.SAME_RUN)  # type: ignore[attr-defined]  # SQLModel adds it
    return RowSource(table, created_at, col(ExecutionData.execution_id), within, residual)


def _of_status(
    caller: ApiCaller,
    wanted: ExecutionFilter,
    status: ExecutionStatus,
    index: Sequence[ExecutionStatus],
) -> RowSource:
    """Return the source for runs of one status; `index` has all statuses that the partial index with this status
    contains.
    """
    # Literals, not bound parameters: databases use a partial index only for a condition that they can read.
    is_indexed = col(Execution.status).in_([literal_column(f"'{one}'") for one in index])
    created_at = col(Execution.created_at)
    within = [
        is_indexed,
        col(Execution.organization_id) == caller.organization_id,
        col(Execution.status) == literal_column(f"'{status}'"),
        *execution_rows.time_conditions(wanted, created_at),
    ]
    residual = [*_build_visibility(caller), *execution_rows.column_conditions(wanted), *_of_workflow(wanted)]
    return RowSource(_get_table(), created_at, col(Execution.id), within, residual)


async def _select_by_rarest_label(
    connection: AsyncConnection, caller: ApiCaller, wanted: ExecutionFilter
) -> RowSource:
    """Return the source for runs with the rarest of the labels; the others are checked run by run."""
    rarest = wanted.labels[0]
    if len(wanted.labels) > 1:
        counts = {
            label: (
                await keyset.count_rows(connection, _has_label(caller, label), col(ExecutionLabel.created_at))
            ).count
            for label in wanted.labels
        }
        rarest = min(counts, key=lambda label: counts[label])
    created_at = col(ExecutionLabel.created_at)
    within = [*_has_label(caller, rarest), *execution_rows.time_conditions(wanted, created_at)]
    others = [execution_rows.has_label(label) for label in wanted.labels if label != rarest]
    residual = [
        *others,
        *_build_visibility(caller),
        *execution_rows.column_conditions(wanted),
        *_of_workflow(wanted),
        *_build_status_condition(wanted),
    ]
    if wanted.parent_id is not None:
        residual += execution_rows.is_child_of(wanted.parent_id)
    same_run = and_(
        col(ExecutionLabel.execution_id) == col(Execution.id),
        col(ExecutionLabel.shard) == col(Execution.shard),
    )
    table = _get_table().join(ExecutionLabel.__table__, same_run)  # type: ignore[attr-defined]  # SQLModel adds it
    return RowSource(table, created_at, col(ExecutionLabel.execution_id), within, residual)


def _has_label(caller: ApiCaller, label: tuple[str, str]) -> Sequence[ColumnElement[bool]]:
    key, value = label
    return (
        col(ExecutionLabel.organization_id) == caller.organization_id,
        col(ExecutionLabel.key) == key,
        col(ExecutionLabel.value) == value,
    )


def _get_table() -> FromClause:
    table: FromClause = Execution.__table__  # type: ignore[attr-defined]  # SQLModel adds it
    return table


def _build_visibility(caller: ApiCaller) -> Sequence[ColumnElement[bool]]:
    """Return the SQL conditions that restrict executions to those that the caller may see; none for admins,
    who see all of their organization.
    """
    return () if caller.is_admin else (visibility_condition(caller),)


def _build_status_condition(wanted: ExecutionFilter) -> Sequence[ColumnElement[bool]]:
    return (col(Execution.status).in_(wanted.statuses),) if wanted.statuses else ()


def _of_workflow(wanted: ExecutionFilter) -> Sequence[ColumnElement[bool]]:
    return () if wanted.workflow_id is None else (col(Execution.workflow_id) == wanted.workflow_id,)
