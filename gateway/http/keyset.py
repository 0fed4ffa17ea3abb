"""Pages of lists by keyset: each page begins behind the last item of the one before, at any depth and cost alike.

Rows that are added or removed meanwhile neither repeat nor hide others. The order is that of `createdAt`, and
of the ids within one time.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from msgspec import UNSET, Struct, UnsetType
from sqlalchemy import and_, case, func, literal, or_, select, true
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.expression import SQLColumnExpression

from gateway.http import limits
from gateway.http.errors import invalid_query
from gateway.http.parameters import LIMIT, OFFSET, OrderParameter, QueryParameter
from gateway.http.wire import WireStruct
from models.column_types import TimestampColumn
from models.database import share_transaction
from models.timestamps import from_microseconds, to_microseconds

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, RowMapping
    from sqlalchemy.sql.expression import FromClause

    from engine.values import Json
    from gateway.http.parameters import QueryValues

Item = TypeVar("Item")
Shown = TypeVar("Shown")

START: Final = "start"
"""Cursor of the first page."""
_CURSOR: Final = re.compile(r"([ad])([0-9]{1,16})\.([A-Za-z0-9_-]{1,64})\Z")
_BEFORE_IDS: Final = "-"
"""Text that sorts before every id."""
_MICROSECOND: Final = timedelta(microseconds=1)
_INVALID: Final = "after must be `start`, or the `next` of an answer of this list in the same order"


class PageCursor(Struct, frozen=True):
    """Position behind an item of a list; without an item, the beginning of the list."""

    is_descending: bool | None = None
    created_at: datetime | None = None
    item_id: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class CursorParameter(QueryParameter[PageCursor | None]):
    """Cursor of a page; None when absent: then `offset` selects the page."""

    @property
    def schema(self) -> dict[str, Json]:
        return {"type": "string", "pattern": "^(start|[A-Za-z0-9_-]{1,200})$", "examples": [START]}

    def read(self, given: Sequence[str]) -> PageCursor | None:
        """Return the position that a cursor names, None without one; `start` is the beginning. Raises a 400
        error for others.
        """
        if not given:
            return None
        text = given[-1]
        if text == START:
            return PageCursor()
        found = _CURSOR.match(_decode(text)) if len(text) <= limits.SEARCH_LENGTH else None
        if found is None:
            raise invalid_query(self.name, "invalid-cursor", _INVALID)
        return PageCursor(found[1] == "d", from_microseconds(int(found[2])), found[3])


def _decode(text: str) -> str:
    """Return the text in base64url decoded; empty for invalid text."""
    try:
        return urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("ascii", "replace")
    except ValueError:
        return ""


AFTER: Final = CursorParameter(
    "after",
    "Page behind this cursor: `start`, then the `next` of each answer. The pages stay in step with each other"
    " while items are added, and the list must be sorted by `createdAt`.",
)


class KeysetPage(WireStruct, kw_only=True):
    """Fields of an answer to a request with `after`."""

    next: str | UnsetType | None = UNSET
    """Cursor of the next page; null on the last page, and absent without `after`."""
    count_is_lower_bound: bool | UnsetType = UNSET
    """With `after`, whether more items match than `count` says: it goes up to 10,000 then."""


class KeysetBounds(Struct, frozen=True):
    """Number of items, order and beginning of a page."""

    limit: int
    is_descending: bool
    cursor: PageCursor

    def condition(
        self, created_at: SQLColumnExpression[Any], item_id: SQLColumnExpression[Any]
    ) -> Sequence[ColumnElement[bool]]:
        """Return the SQL conditions for items after the cursor in the list's order; none for the first page."""
        if self.cursor.created_at is None:
            return ()
        moment = literal(self.cursor.created_at, TimestampColumn)
        if self.is_descending:
            ties = or_(created_at < moment, item_id < self.cursor.item_id)
            return (and_(created_at <= moment, ties),)
        return (and_(created_at >= moment, or_(created_at > moment, item_id > self.cursor.item_id)),)

    def order(
        self, created_at: SQLColumnExpression[Any], item_id: SQLColumnExpression[Any]
    ) -> Sequence[ColumnElement[Any]]:
        """Return the ORDER BY terms of a list: by time, then id, in the direction of the request."""
        if self.is_descending:
            return created_at.desc(), item_id.desc()
        return created_at.asc(), item_id.asc()

    def cursor_behind_time(self, moment: datetime) -> str:
        """Return the cursor of the page after all items of a time, as the text that clients send."""
        if self.is_descending:
            return self.cursor_behind(moment, _BEFORE_IDS)
        return self.cursor_behind(moment + _MICROSECOND, _BEFORE_IDS)

    def cursor_behind(self, created_at: datetime, item_id: str) -> str:
        """Return the cursor of the page after an item, as the text that clients send."""
        text = f"{'d' if self.is_descending else 'a'}{to_microseconds(created_at)}.{item_id}"
        return urlsafe_b64encode(text.encode()).decode().rstrip("=")


class BoundedCount(Struct, frozen=True):
    """Number of items, counted up to a limit."""

    count: int
    is_lower_bound: bool


class ListPage(Struct, Generic[Item], frozen=True):
    """Page of a list, selected by a number of items to skip or by a cursor."""

    count: int
    items: Sequence[Item]
    next_cursor: str | UnsetType | None = UNSET
    is_lower_bound: bool | UnsetType = UNSET
    """Whether more items match than `count` says; both are only set for a page by a cursor."""

    def convert(self, show: Callable[[Item], Shown]) -> ListPage[Shown]:
        """Return the page with `show` applied to each item, such as a row converted for the answer."""
        return ListPage(self.count, [show(one) for one in self.items], self.next_cursor, self.is_lower_bound)


def read_bounds(query: QueryValues, sort: OrderParameter | None = None) -> KeysetBounds | None:
    """Return order, limit and beginning of the page that the parameter `after` selects; None without it.

    Lists without `sort` begin with the newest. Raises a 400 error for a cursor of another order, for an order
    that is not by `createdAt`, and for an `offset` beside it.
    """
    cursor = query[AFTER]
    if cursor is None:
        return None
    if query[OFFSET]:
        raise invalid_query(OFFSET.name, "ambiguous", "offset and after exclude each other: send one of them")
    is_descending = True if sort is None else sort.is_newest_first(query[sort])
    if is_descending is None:
        message = "Pages by after are sorted by createdAt: send sort=createdAt:desc or createdAt:asc"
        raise invalid_query("sort", "invalid-value", message)
    if cursor.is_descending not in {None, is_descending}:
        raise invalid_query(AFTER.name, "invalid-cursor", _INVALID)
    return KeysetBounds(query[LIMIT], is_descending, cursor)


def read_newest_first(query: QueryValues) -> KeysetBounds:
    """Return limit and beginning of a page of a list without other orders and without `offset`, the newest first.

    Raises a 400 error for a cursor of another order.
    """
    cursor = query[AFTER] or PageCursor()
    if cursor.is_descending is False:
        raise invalid_query(AFTER.name, "invalid-cursor", _INVALID)
    return KeysetBounds(query[LIMIT], is_descending=True, cursor=cursor)


async def list_rows(
    connection: AsyncConnection,
    columns: Sequence[SQLColumnExpression[Any]],
    conditions: Sequence[ColumnElement[bool]],
    bounds: KeysetBounds,
    *,
    created_at: SQLColumnExpression[Any],
    item_id: SQLColumnExpression[Any],
) -> ListPage[RowMapping]:
    """Return a page of the rows that match `conditions`, with the number of all of these, up to 10,000.

    Rows are in the order of `created_at`, then `item_id`, in the direction of `bounds`; `columns` contain both, as
    `created_at` and `id`. It calls `follow_indexes`, which holds for the rest of the transaction.
    """
    page = await read_rows(connection, columns, conditions, bounds, created_at=created_at, item_id=item_id)
    counted = await count_rows(connection, conditions, created_at)
    return ListPage(counted.count, page.rows, page.next_cursor, counted.is_lower_bound)


async def list_examined(
    connection: AsyncConnection,
    columns: Sequence[SQLColumnExpression[Any]],
    source: RowSource,
    bounds: KeysetBounds,
) -> ListPage[RowMapping]:
    """Return a page of the rows of a source that match, with their number; `columns` contain `created_at` and `id`.

    At most 10,000 rows are examined for the page, and 5,000 for the number, so that a page may be short, or empty,
    although another follows. It calls `follow_indexes`, which holds for the rest of the transaction.
    """
    found = await read_examined(connection, columns, source, bounds)
    counted = await count_page(connection, source, bounds, found)
    rows, next_cursor = found.rows, None
    if len(rows) > bounds.limit:
        rows = rows[: bounds.limit]
        next_cursor = bounds.cursor_behind(rows[-1]["created_at"], rows[-1]["id"])
    elif found.edge is not None:
        next_cursor = bounds.cursor_behind_time(found.edge)
    return ListPage(counted.count, rows, next_cursor, counted.is_lower_bound)


class RowPage(Struct, frozen=True):
    """Rows of a page, and the cursor of the next one; None on the last page."""

    rows: Sequence[RowMapping]
    next_cursor: str | None


async def read_rows(
    connection: AsyncConnection,
    columns: Sequence[SQLColumnExpression[Any]],
    conditions: Sequence[ColumnElement[bool]],
    bounds: KeysetBounds,
    *,
    created_at: SQLColumnExpression[Any],
    item_id: SQLColumnExpression[Any],
) -> RowPage:
    """Return a page of the rows that match and the cursor of the next one, without a count of all.

    `columns` contain `created_at` and `item_id`, the latter as `id`. It calls `follow_indexes`, which holds for the
    rest of the transaction.
    """
    await follow_indexes(connection)
    statement = select(*columns).where(*conditions, *bounds.condition(created_at, item_id))
    # One more than shown: then another page follows.
    ordered = statement.order_by(*bounds.order(created_at, item_id)).limit(bounds.limit + 1)
    rows = (await connection.execute(ordered)).mappings().all()
    next_cursor = None
    if len(rows) > bounds.limit:
        rows = rows[: bounds.limit]
        next_cursor = bounds.cursor_behind(rows[-1]["created_at"], rows[-1]["id"])
    return RowPage(rows, next_cursor)


class RowSource(Struct, frozen=True):
    """Part of an index, in the order of a list."""

    table: FromClause
    """Table of the rows, joined with that of the index unless that is its own."""
    created_at: SQLColumnExpression[Any]
    item_id: SQLColumnExpression[Any]
    within: Sequence[ColumnElement[bool]]
    """Conditions that the index decides, on the table of the index alone."""
    residual: Sequence[ColumnElement[bool]]
    """Conditions for which each row is read."""


class ExaminedRows(Struct, frozen=True):
    """Matching rows among those that a page examines, one more than the page shows at most."""

    rows: Sequence[RowMapping]
    edge: datetime | None
    """Time up to which rows were examined, with all rows of this time; None if no row is behind them."""


async def read_examined(
    connection: AsyncConnection,
    columns: Sequence[SQLColumnExpression[Any]],
    source: RowSource,
    bounds: KeysetBounds,
) -> ExaminedRows:
    """Return the rows of a source that match, among the first 10,000 after the cursor: at most one more than the page
    shows.

    Without residual conditions (those that the index doesn't decide), each row matches and the limit of 10,000 does not
    apply. It calls `follow_indexes`, which holds for the rest of the transaction.
    """
    await follow_indexes(connection)
    edge = await _find_edge(connection, source, bounds) if source.residual else None
    inside = []
    if edge is not None:
        moment = literal(edge, TimestampColumn)
        inside = [source.created_at >= moment if bounds.is_descending else source.created_at <= moment]
    statement = (
        select(*columns)
        .select_from(source.table)
        .where(
            *source.within, *inside, *source.residual, *bounds.condition(source.created_at, source.item_id)
        )
        .order_by(*bounds.order(source.created_at, source.item_id))
        .limit(bounds.limit + 1)
    )
    return ExaminedRows((await connection.execute(statement)).mappings().all(), edge)


async def _find_edge(connection: AsyncConnection, source: RowSource, bounds: KeysetBounds) -> datetime | None:
    """Return the time of the last row that a page examines; None if fewer rows are left than it may examine.

    Only the times are read, without the ids that order rows of one time: then the index has all columns.
    """
    behind = []
    if bounds.cursor.created_at is not None:
        moment = literal(bounds.cursor.created_at, TimestampColumn)
        if not bounds.is_descending:
            behind = [source.created_at >= moment]
        elif bounds.cursor.item_id == _BEFORE_IDS:
            # All rows of this time were examined: however many they are, the page begins behind them.
            behind = [source.created_at < moment]
        else:
            behind = [source.created_at <= moment]
    statement = (
        select(source.created_at)
        .where(*source.within, *behind)
        .order_by(source.created_at.desc() if bounds.is_descending else source.created_at.asc())
        .offset(limits.EXAMINED_FOR_PAGE - 1)
        .limit(1)
    )
    edge: datetime | None = await connection.scalar(statement)
    return edge


async def follow_indexes(connection: AsyncConnection) -> None:
    """Turn off table scans, full sorts, hash and merge joins, parallel workers and JIT in PostgreSQL for the rest of a
    transaction.

    Lists are then read in the order of their indexes. After many inserts, or by an unlucky sample, PostgreSQL
    estimates the rows of a filter wrongly by orders of magnitude, and would read and sort a whole table for one
    page. The start of parallel workers takes longer than all rows that a page examines. SQLite needs nothing and
    is left alone.
    """
    if connection.dialect.name == "postgresql":
        await share_transaction(connection)
        await connection.execute(_FOLLOW_INDEXES)


# Incremental sorts stay on: within one time, rows are sorted by id. Plans that PostgreSQL likes least count as
# costly, and would be compiled first.
_FOLLOW_INDEXES: Final = select(
    *(
        func.set_config(name, "off", true())
        for name in ("enable_seqscan", "enable_sort", "enable_hashjoin", "enable_mergejoin", "jit")
    ),
    func.set_config("max_parallel_workers_per_gather", "0", true()),
)


async def count_rows(
    connection: AsyncConnection,
    conditions: Sequence[ColumnElement[bool]],
    created_at: SQLColumnExpression[Any],
) -> BoundedCount:
    """Count the rows of the table of `created_at` that match, up to 10,000, reading no more; beyond it is a
    lower bound.
    """
    # In the order of the list, so that its index is read: where most rows match, a scan would cost as much.
    ordered = select(created_at).where(*conditions).order_by(created_at.desc())
    some = ordered.limit(limits.KEYSET_COUNT + 1).subquery()
    count = await connection.scalar(select(func.count()).select_from(some)) or 0
    return BoundedCount(min(count, limits.KEYSET_COUNT), count > limits.KEYSET_COUNT)


async def count_page(
    connection: AsyncConnection, source: RowSource, bounds: KeysetBounds, page: ExaminedRows
) -> BoundedCount:
    """Count the rows of a source that match, of which a page was read; a lower bound if there may be more.

    A first page that is not full has all rows among those that it has examined. For any other page, the newest
    5,000 rows of the source are examined.
    """
    if bounds.cursor.created_at is None and len(page.rows) <= bounds.limit:
        return BoundedCount(len(page.rows), is_lower_bound=page.edge is not None)
    return await _count_examined(connection, source)


async def has_at_most(connection: AsyncConnection, source: RowSource, number: int) -> bool:
    """Return whether the index of a source has at most this number of rows; its residual conditions do not count."""
    some = select(source.created_at).where(*source.within).limit(number + 1).subquery()
    return (await connection.scalar(select(func.count()).select_from(some)) or 0) <= number


async def _count_examined(connection: AsyncConnection, source: RowSource) -> BoundedCount:
    """Count the rows that match among the newest 5,000 rows of a source; a lower bound if there are more.

    Without residual conditions, up to 10,000 rows of its index are counted.
    """
    if not source.residual:
        # From the table of the index alone.
        return await count_rows(connection, source.within, source.created_at)
    matches = case((and_(*source.residual), 1), else_=0).label("matches")
    examined = (
        select(matches)
        .select_from(source.table)
        .where(*source.within)
        .order_by(source.created_at.desc())
        .limit(limits.EXAMINED_RUNS)
        .subquery()
    )
    totals = select(func.count(), func.coalesce(func.sum(examined.c.matches), 0)).select_from(examined)
    examined_rows, matching_rows = (await connection.execute(totals)).one()
    is_lower_bound = examined_rows == limits.EXAMINED_RUNS or matching_rows > limits.KEYSET_COUNT
    return BoundedCount(min(matching_rows, limits.KEYSET_COUNT), is_lower_bound)
