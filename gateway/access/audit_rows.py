"""Queries of the audit trail: changes by users, and decisions of the system, as one list in the order of time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from msgspec import Struct
from sqlalchemy import BigInteger, String, func, literal_column, select, type_coerce, union_all
from sqlalchemy import cast as cast_sql
from sqlmodel import col

from gateway.http import keyset, limits
from gateway.http.keyset import ListPage
from journal.explanations.blockers import BlockerCode
from models.access import ApiCaller
from models.audit import AuditAction, AuditEntry, SystemDecision
from models.blocked_interval import BlockedInterval
from models.column_types import build_row
from models.deployment import LifecycleDecision
from models.execution import Execution
from models.ingest import Delivery
from models.lifecycle_policy import LifecycleAction, LifecycleReason

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, RowMapping
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from gateway.http.keyset import KeysetBounds
    from gateway.http.parameters import PageBounds


class DeferredDelivery(Struct, frozen=True):
    """Part of the row of a delivery whose run starts later."""

    id: str
    workflow_id: str
    route: str
    reason: str | None
    not_before: datetime | None
    execution_id: str | None
    created_at: datetime


class ReclaimedExecution(Struct, frozen=True):
    """Execution that was taken back from a lost worker, at one time."""

    id: str
    """Id of the execution, `-`, and the time in microseconds: an execution may lose several workers."""
    execution_id: str
    workflow_id: str
    started_at: datetime
    """End of the lease of the lost worker."""
    created_at: datetime
    """Time at which the execution was taken back."""


AuditRow: TypeAlias = (
    "AuditEntry | LifecycleDecision | SystemDecision | DeferredDelivery | ReclaimedExecution"
)
SORTABLE: Final[Mapping[str, SQLColumnExpression[Any]]] = {"createdAt": col(AuditEntry.created_at)}


class AuditKind(StrEnum):
    """Kind of entries of the audit trail."""

    CHANGE = "change"
    """Change of an object by a user or the operator of the server."""
    DECISION = "decision"
    """Decision of the system: about the pods of a workflow, a deferred delivery, or reclaimed or deleted
    executions.
    """


class AuditSelection(StrEnum):
    """Kinds of entries that a list contains."""

    CHANGE = "change"
    DECISION = "decision"
    ALL = "all"


SYSTEM: Final = "system"
"""Author of a decision that no user has asked for."""
LIFECYCLE_ACTIONS: Final[Mapping[AuditAction, LifecycleAction]] = {
    AuditAction.DEPLOYMENT_STARTED: LifecycleAction.START,
    AuditAction.DEPLOYMENT_WOKEN: LifecycleAction.WAKE,
    AuditAction.DEPLOYMENT_DRAINED: LifecycleAction.DRAIN,
    AuditAction.DEPLOYMENT_STOPPED: LifecycleAction.STOP,
}


class AuditFilter(Struct, frozen=True):
    """Filter of a list of audit entries; None selects every value."""

    selection: AuditSelection = AuditSelection.CHANGE
    object_id: str | None = None
    action: AuditAction | None = None
    user_id: str | None = None
    key_id: str | None = None
    request_id: str | None = None
    address_hash: str | None = None
    reason: LifecycleReason | None = None
    since: datetime | None = None
    until: datetime | None = None
    """Times of the entries: `since` is inclusive, `until` is exclusive."""


class _AuditTable(Struct, frozen=True):
    """Table of entries of one kind, with the conditions of a filter on it."""

    model: type[AuditEntry | LifecycleDecision | SystemDecision | Delivery | BlockedInterval]
    created_at: SQLColumnExpression[Any]
    conditions: Sequence[ColumnElement[bool]]

    @property
    def item_id(self) -> SQLColumnExpression[Any]:
        return col(self.model.id)  # type: ignore[union-attr]  # `_ReclaimTable` has its own

    @property
    def columns(self) -> Sequence[SQLColumnExpression[Any]]:
        """Columns that `build` needs, with the time of the entry as `created_at`."""
        if self.model is Delivery:
            return [getattr(Delivery, name) for name in DeferredDelivery.__struct_fields__]
        columns = self.model.__table__.columns  # type: ignore[union-attr]  # SQLModel adds it
        return [*columns] if "created_at" in columns else [*columns, self.created_at.label("created_at")]

    def build(self, row: RowMapping) -> AuditRow:
        """Return the entry of a row, which has the columns of the table."""
        if self.model is Delivery:
            return DeferredDelivery(**{name: row[name] for name in DeferredDelivery.__struct_fields__})
        built = build_row(self.model, {name: row[name] for name in self.model.model_fields})
        return cast("AuditRow", built)

    def matches_ids(self, ids: Sequence[str]) -> Sequence[ColumnElement[bool]]:
        """Return the SQL conditions for the rows whose entry id is in `ids`, which may contain ids of other tables."""
        return (self.item_id.in_(ids),)


_IS_LOSS: Final = (
    # A literal, by which the databases recognize the partial index.
    col(BlockedInterval.code) == literal_column(f"'{BlockerCode.WORKER_LOST.value}'"),
    # Intervals have no workflow.
    col(Execution.id) == col(BlockedInterval.execution_id),
)


class _ReclaimTable(_AuditTable, frozen=True):
    """Table of blocked intervals, with conditions for those by lost workers, which end as the run is taken back."""

    @property
    def item_id(self) -> SQLColumnExpression[Any]:
        ended_at = cast_sql(type_coerce(col(BlockedInterval.ended_at), BigInteger), String)
        return col(BlockedInterval.execution_id).concat("-").concat(ended_at)

    @property
    def columns(self) -> Sequence[SQLColumnExpression[Any]]:
        return [
            self.item_id.label("id"),
            *(col(BlockedInterval.execution_id), col(Execution.workflow_id), col(BlockedInterval.started_at)),
            self.created_at.label("created_at"),
        ]

    def build(self, row: RowMapping) -> AuditRow:
        return ReclaimedExecution(**{name: row[name] for name in ReclaimedExecution.__struct_fields__})

    def matches_ids(self, ids: Sequence[str]) -> Sequence[ColumnElement[bool]]:
        """Return the conditions for all reclaims of the executions that the entry ids begin with.

        So the rows are found by the index of executions; they may include reclaims whose ids are not in `ids`.
        """
        execution_ids = {one.rpartition("-")[0] for one in ids}
        return (*_IS_LOSS, col(BlockedInterval.execution_id).in_(execution_ids))


async def list_entries(
    connection: AsyncConnection,
    caller: ApiCaller,
    wanted: AuditFilter,
    part: PageBounds,
    bounds: KeysetBounds | None,
    *,
    is_newest_first: bool,
) -> ListPage[AuditRow]:
    """Return a page of the matching entries of the caller's organization, and the number of all that match.

    With `bounds`, the page follows its cursor, `part` and `is_newest_first` are ignored, and the number counts to
    10,000 at most. With None, the page has limit and offset of `part`.
    """
    tables = [*_choose_tables(caller, wanted)]
    if bounds is not None:
        return await _list_by_cursor(connection, tables, bounds)
    return await _list_by_offset(connection, tables, part, is_newest_first=is_newest_first)


async def _list_by_cursor(
    connection: AsyncConnection, tables: Sequence[_AuditTable], bounds: KeysetBounds
) -> ListPage[AuditRow]:
    """Return the page behind a cursor: a page of each table, merged in the order of time and cut to the limit.

    The number of all entries counts to 10,000 at most.
    """
    pages = [
        (
            await keyset.list_rows(
                connection,
                table.columns,
                table.conditions,
                bounds,
                created_at=table.created_at,
                item_id=table.item_id,
            )
        ).convert(table.build)
        for table in tables
    ]
    # Rows of a table stay in the order in which the database compares ids; those of two tables differ in the prefix.
    merged = sorted(
        (row for page in pages for row in page.items), key=_order_key, reverse=bounds.is_descending
    )
    has_more = len(merged) > bounds.limit or any(page.next_cursor for page in pages)
    items = merged[: bounds.limit]
    next_cursor = bounds.cursor_behind(time_of(items[-1]), items[-1].id) if has_more else None
    count = sum(page.count for page in pages)
    is_lower_bound = count > limits.KEYSET_COUNT or any(page.is_lower_bound is True for page in pages)
    return ListPage(min(count, limits.KEYSET_COUNT), items, next_cursor, is_lower_bound)


async def _list_by_offset(
    connection: AsyncConnection, tables: Sequence[_AuditTable], part: PageBounds, *, is_newest_first: bool
) -> ListPage[AuditRow]:
    """Return the page `part` of the entries of all tables together, in the order of time, with the number of all.

    The ids of the page are read first, then their rows.
    """
    if not tables:
        return ListPage(0, [])
    count = 0
    for table in tables:
        counted = select(func.count()).select_from(table.model).where(*table.conditions)
        count += await connection.scalar(counted) or 0
    listed = union_all(
        *(
            select(table.item_id.label("id"), table.created_at.label("created_at")).where(*table.conditions)
            for table in tables
        )
    ).subquery()
    created_at, item_id = listed.c.created_at, listed.c.id
    order = created_at.desc() if is_newest_first else created_at.asc()
    page = select(item_id).order_by(order, item_id.desc()).limit(part.limit).offset(part.offset)
    ids = (await connection.scalars(page)).all()
    found: dict[str, AuditRow] = {}
    for table in tables:
        rows = await connection.execute(select(*table.columns).where(*table.matches_ids(ids)))
        found |= {row["id"]: table.build(row) for row in rows.mappings()}
    return ListPage(count, [found[item] for item in ids if item in found])


def time_of(row: AuditRow) -> datetime:
    """Return the time of a change or decision."""
    return row.at if isinstance(row, LifecycleDecision | SystemDecision) else row.created_at


def _order_key(row: AuditRow) -> tuple[datetime, str]:
    return time_of(row), row.id.partition("_")[0]


def _choose_tables(caller: ApiCaller, wanted: AuditFilter) -> Iterable[_AuditTable]:
    """Yield the tables that may have entries for a filter, each with its conditions.

    Decisions have no key, request and address, so a filter by one of these selects only changes.
    """
    if wanted.selection is not AuditSelection.DECISION and wanted.reason is None:
        created_at = col(AuditEntry.created_at)
        conditions = [
            col(AuditEntry.organization_id) == caller.organization_id,
            *_equals(col(AuditEntry.object_id), wanted.object_id),
            *_equals(col(AuditEntry.action), wanted.action),
            *_equals(col(AuditEntry.user_id), wanted.user_id),
            *_equals(col(AuditEntry.key_id), wanted.key_id),
            *_equals(col(AuditEntry.request_id), wanted.request_id),
            *_equals(col(AuditEntry.address_hash), wanted.address_hash),
            *_within(created_at, wanted),
        ]
        yield _AuditTable(AuditEntry, created_at, conditions)
    names_request = any((wanted.key_id, wanted.request_id, wanted.address_hash))
    is_decision = wanted.action is None or wanted.action in LIFECYCLE_ACTIONS
    if wanted.selection is not AuditSelection.CHANGE and is_decision and not names_request:
        at, user_id = col(LifecycleDecision.at), col(LifecycleDecision.user_id)
        action = None if wanted.action is None else LIFECYCLE_ACTIONS[wanted.action]
        organization_id: SQLColumnExpression[Any] = col(LifecycleDecision.organization_id)
        if wanted.object_id is not None:
            # Decisions of one workflow are read from its index: that of the organization has those of all others.
            organization_id = func.coalesce(organization_id, "")
        conditions = [
            organization_id == caller.organization_id,
            *_equals(col(LifecycleDecision.workflow_id), wanted.object_id),
            *_equals(col(LifecycleDecision.action), action),
            *([user_id.is_(None)] if wanted.user_id == SYSTEM else _equals(user_id, wanted.user_id)),
            *_equals(col(LifecycleDecision.reason), wanted.reason),
            *_within(at, wanted),
        ]
        yield _AuditTable(LifecycleDecision, at, conditions)
    is_by_system = wanted.reason is None and wanted.user_id in {None, SYSTEM} and not names_request
    if wanted.selection is not AuditSelection.CHANGE and is_by_system:
        yield from _choose_system_tables(caller, wanted)


def _choose_system_tables(caller: ApiCaller, wanted: AuditFilter) -> Iterable[_AuditTable]:
    """Yield the tables of decisions that no user has asked for: deferred deliveries, reclaimed and
    deleted executions.
    """
    if wanted.action in {None, AuditAction.DELIVERY_DEFERRED}:
        created_at = col(Delivery.created_at)
        conditions = [
            # Literals, by which the databases recognize the partial index.
            col(Delivery.outcome) != literal_column("'accepted'"),
            col(Delivery.outcome) == literal_column("'deferred'"),
            col(Delivery.organization_id) == caller.organization_id,
            *_equals(col(Delivery.workflow_id), wanted.object_id),
            *_within(created_at, wanted),
        ]
        yield _AuditTable(Delivery, created_at, conditions)
    if wanted.action in {None, AuditAction.EXECUTION_RECLAIMED}:
        reclaimed_at = col(BlockedInterval.ended_at)
        conditions = [
            *_IS_LOSS,
            col(BlockedInterval.organization_id) == caller.organization_id,
            *_equals(col(Execution.workflow_id), wanted.object_id),
            *_within(reclaimed_at, wanted),
        ]
        yield _ReclaimTable(BlockedInterval, reclaimed_at, conditions)
    if wanted.action in {None, AuditAction.EXECUTIONS_PRUNED}:
        at = col(SystemDecision.at)
        conditions = [
            col(SystemDecision.organization_id) == caller.organization_id,
            *_equals(col(SystemDecision.workflow_id), wanted.object_id),
            *_equals(col(SystemDecision.action), wanted.action),
            *_within(at, wanted),
        ]
        yield _AuditTable(SystemDecision, at, conditions)


def _equals(column: SQLColumnExpression[Any], value: str | None) -> Sequence[ColumnElement[bool]]:
    """Return the condition that a column has a value; none for None."""
    return () if value is None else (column == value,)


def _within(moment: SQLColumnExpression[Any], wanted: AuditFilter) -> Iterable[ColumnElement[bool]]:
    """Yield the conditions for the time range of a filter; `since` is included, `until` excluded."""
    if wanted.since is not None:
        yield moment >= wanted.since
    if wanted.until is not None:
        yield moment < wanted.until
