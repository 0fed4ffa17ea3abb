"""Pages of the list of executions by keyset, each read from the index that leaves the fewest rows to examine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, exists, literal_column, select
from sqlmodel import col

from gateway.executions import execution_rows
from gateway.http import keyset, limits
from gateway.http.keyset import KeysetBounds, ListPage
from models.execution import Execution, ExecutionData
from models.execution_label import ExecutionLabel
from models.execution_status import ExecutionStatus
from models.execution_visibility import visibility_condition
from models.workflow import Workflow

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import FromClause, Select, SQLColumnExpression

    from gateway.executions.execution_rows import ExecutionFilter
    from models.access import ApiCaller

_INDEXED_STATUSES: Final = (
    (ExecutionStatus.PENDING, ExecutionStatus.RUNNING, ExecutionStatus.WAITING),
    (ExecutionStatus.FAILED, ExecutionStatus.STOPPED, ExecutionStatus.CANCELLED),
)
"""Statuses of the indexes `ix_execution_live` and `ix_execution_unsuccessful`, in the order of their conditions."""


@dataclass(frozen=True, slots=True)
class _RunSource:
    """Part of an index, in the order of the list."""

    table: FromClause
    """Executions, joined with the table of the index unless that is their own."""
    created_at: SQLColumnExpression[Any]
    item_id: SQLColumnExpression[Any]
    within: Sequence[ColumnElement[bool]]
    """Conditions that the index decides."""
    residual: Sequence[ColumnElement[bool]]
    """Conditions for which each row is read."""


async def list_page(
    connection: AsyncConnection, caller: ApiCaller, wanted: ExecutionFilter, bounds: KeysetBounds
) -> ListPage[Execution]:
    """Return a page of the executions that the caller may see and that match, by a cursor.

    Its count is at most 10,000 and may be a lower bound; the cursor of the next page is None on the last one.
    """
    await keyset.follow_indexes(connection)
    found: list[tuple[datetime, Execution]] = []
    count, is_lower_bound = 0, False
    for source in await _choose_sources(connection, caller, wanted):
        rows = await connection.execute(_select_page(source, bounds))
        for row in rows.mappings():
            columns = dict(row)
            found.append((columns.pop("listed_at"), Execution(**columns)))
        counted = await keyset.count_examined(
            connection, source.table, source.within, source.residual, source.created_at
        )
        count, is_lower_bound = count + counted.count, is_lower_bound or counted.is_lower_bound
    found.sort(key=lambda one: (one[0], one[1].id), reverse=bounds.is_descending)
    shown = found[: bounds.limit]
    last = shown[-1] if len(found) > bounds.limit else None
    return ListPage(
        min(count, limits.KEYSET_COUNT),
        [execution for _, execution in shown],
        None if last is None else bounds.cursor_behind(last[0], last[1].id),
        is_lower_bound or count > limits.KEYSET_COUNT,
    )


def _select_page(source: _RunSource, bounds: KeysetBounds) -> Select[*tuple[Any, ...]]:
    """Return the query of a page's rows from one source, and one more, which shows whether another page follows."""
    # One more than shown: then another page follows.
    return (
        select(Execution, source.created_at.label("listed_at"))
        .select_from(source.table)
        .where(*source.within, *source.residual, *bounds.condition(source.created_at, source.item_id))
        .order_by(*bounds.order(source.created_at, source.item_id))
        .limit(bounds.limit + 1)
    )


# ── choice of the index ─────────────────────────────────────────────────────────────────────────────────────


async def _choose_sources(
    connection: AsyncConnection, caller: ApiCaller, wanted: ExecutionFilter
) -> Sequence[_RunSource]:
    """Return the queries whose rows together are the list; no run is in two of them, and each uses an index.

    A list by labels begins with the rarest label, one of children with the parent, one of failed or open runs
    with an index by status.
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
        return [_RunSource(_get_table(), created_at, col(Execution.id), within, residual)]
    indexes = [_INDEXED_STATUSES[0], _INDEXED_STATUSES[1]]
    if wanted.statuses and ExecutionStatus.COMPLETED not in wanted.statuses:
        return [
            _of_status(caller, wanted, status, index)
            for index in indexes
            for status in index
            if status in wanted.statuses
        ]
    return [_by_time(caller, wanted)]


def _by_time(caller: ApiCaller, wanted: ExecutionFilter) -> _RunSource:
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
    return _RunSource(table, created_at, col(ExecutionData.execution_id), within, residual)


def _of_status(
    caller: ApiCaller,
    wanted: ExecutionFilter,
    status: ExecutionStatus,
    index: Sequence[ExecutionStatus],
) -> _RunSource:
    """Return the source for runs of one status that an index lists."""
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
    return _RunSource(_get_table(), created_at, col(Execution.id), within, residual)


async def _select_by_rarest_label(
    connection: AsyncConnection, caller: ApiCaller, wanted: ExecutionFilter
) -> _RunSource:
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
    return _RunSource(table, created_at, col(ExecutionLabel.execution_id), within, residual)


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
    """Return the SQL conditions that hide executions from the caller; none for admins, who see all of their
    organization.
    """
    return () if caller.is_admin else (visibility_condition(caller),)


def _build_status_condition(wanted: ExecutionFilter) -> Sequence[ColumnElement[bool]]:
    return (col(Execution.status).in_(wanted.statuses),) if wanted.statuses else ()


def _of_workflow(wanted: ExecutionFilter) -> Sequence[ColumnElement[bool]]:
    return () if wanted.workflow_id is None else (col(Execution.workflow_id) == wanted.workflow_id,)
