"""Queries of executions, spans and log lines for lists and streams; every WHERE restricts the organization."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from msgspec import Struct
from sqlalchemy import (
    BigInteger,
    LargeBinary,
    Row,
    Text,
    and_,
    cast,
    exists,
    false,
    func,
    literal,
    literal_column,
    null,
    or_,
    select,
    union_all,
)
from sqlalchemy.orm import aliased
from sqlmodel import col

from engine.run_records import CANDIDATE_STATUSES, SpanStatus
from gateway.http import limits
from gateway.http.keyset import ListPage
from journal.blobs.blob_storage import BlobOwner
from models.column_types import build_row
from models.execution import AttemptRow, Execution, ExecutionData, LogRow, SpanRow
from models.execution_label import ExecutionLabel
from models.execution_visibility import visibility_condition

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, CompoundSelect, Select
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from gateway.http.keyset import KeysetBounds
    from gateway.http.parameters import PageBounds
    from journal.run_labels import RunLabel
    from journal.store import ExecutionKey
    from models.access import ApiCaller
    from models.execution_status import ExecutionStatus

Recorded: TypeAlias = Row[*tuple[Any, ...]]
"""Row of a span or a log line, with its columns as attributes."""


def _nulls_first(moment: SQLColumnExpression[Any]) -> ColumnElement[Any]:
    """Return an expression that sorts null times before all others, which SQLite and PostgreSQL place differently."""
    return func.coalesce(moment, literal(0, BigInteger))


class ShownSpanStatus(StrEnum):
    """State of a node, an iteration or an attempt that is shown; candidates of a replay are not."""

    RUNNING = SpanStatus.RUNNING.value
    WAITING = SpanStatus.WAITING.value
    RETRYING = SpanStatus.RETRYING.value
    COMPLETED = SpanStatus.COMPLETED.value
    FAILED = SpanStatus.FAILED.value
    SKIPPED = SpanStatus.SKIPPED.value
    CANCELLED = SpanStatus.CANCELLED.value


class SpanKind(StrEnum):
    """Subject of a span."""

    NODE = "node"
    TURN = "turn"
    ATTEMPT = "attempt"


SHOWN_SUCCESSORS: Final = 5
SAME_RUN: Final = and_(
    col(ExecutionData.execution_id) == col(Execution.id), col(ExecutionData.shard) == col(Execution.shard)
)
"""Join of executions with their data."""
SORTABLE: Final[Mapping[str, SQLColumnExpression[Any]]] = {
    "createdAt": col(ExecutionData.created_at),
    "startedAt": _nulls_first(col(Execution.started_at)),
    "endedAt": _nulls_first(col(Execution.ended_at)),
}

_source = aliased(SpanRow)
_SHOWN: Final = func.coalesce(col(SpanRow.output), col(SpanRow.output_blob))
"""Output, or the reference to an output that is too large for a row."""
_IS_REFERENCE: Final = and_(col(SpanRow.output).is_(None), col(SpanRow.output_blob).is_not(None)).label(
    "output_is_reference"
)


class ExecutionFilter(Struct, frozen=True):
    """Filter of a list of executions of an organization."""

    organization_id: str
    workflow_id: str | None
    statuses: Sequence[ExecutionStatus]
    """Empty: all statuses."""
    trigger_type: str | None
    parent_id: str | None
    since: datetime | None
    until: datetime | None
    """Accepted at `since` or later, and before `until`."""
    labels: Sequence[tuple[str, str]] = ()
    """Metadata as key and value, and tags as `TAG_KEY` and tag; a match has all of them."""
    execution_ids: Sequence[str] = ()
    """Ids of the executions of which the filter selects some; empty: any."""
    condition: ColumnElement[bool] | None = None
    """Further condition on rows of executions, such as that of a reason to wait."""


class ExecutionRecord(Struct, frozen=True):
    """Execution with its data and outputs."""

    execution: Execution
    data: ExecutionData
    outputs: Sequence[tuple[str, str]]
    """Node id and JSON text of each output so far."""
    references: Sequence[str]
    """Ids of the nodes whose text is a reference to a blob."""
    labels: Sequence[RunLabel]
    """Its tags and metadata."""
    model_calls: Sequence[str]
    """JSON of the calls of language models of each of its nodes that has called one."""


async def list_executions(
    connection: AsyncConnection,
    caller: ApiCaller,
    wanted: ExecutionFilter,
    part: PageBounds,
    order: ColumnElement[Any],
) -> ListPage[Execution]:
    """Return the page `part`, in `order`, of the executions that the caller may see and that match, with the
    exact number of all.
    """
    conditions = [visibility_condition(caller), *_build_conditions(wanted)]
    if not wanted.labels:
        # A list by labels begins with their index; another condition would make SQLite read that of the
        # organization.
        conditions.append(col(ExecutionData.organization_id) == caller.organization_id)
    count = await connection.scalar(
        select(func.count()).select_from(Execution).join(ExecutionData, SAME_RUN).where(*conditions)
    )
    rows = await connection.execute(
        select(Execution)
        .join(ExecutionData, SAME_RUN)
        .where(*conditions)
        .order_by(order, col(ExecutionData.execution_id).desc())
        .limit(part.limit)
        .offset(part.offset)
    )
    return ListPage(count or 0, [build_row(Execution, row) for row in rows.mappings()])


async def find_oldest(
    connection: AsyncConnection, wanted: ExecutionFilter, *conditions: ColumnElement[bool], limit: int
) -> tuple[int, Sequence[Recorded]]:
    """Return the number of matching executions, up to 10,001, and id and workflow id of the oldest, at most `limit`.

    `conditions` are SQL conditions besides the filter; visibility must be among them.
    """
    required = [*conditions, *_build_conditions(wanted)]
    # Of a million runs, a full count takes seconds.
    some = (
        select(col(Execution.id))
        .join(ExecutionData, SAME_RUN)
        .where(*required)
        .limit(limits.BULK_OBJECTS + 1)
        .subquery()
    )
    count = await connection.scalar(select(func.count()).select_from(some))
    rows = await connection.execute(
        select(col(Execution.id), col(Execution.workflow_id))
        .join(ExecutionData, SAME_RUN)
        .where(*required)
        .order_by(col(ExecutionData.created_at), col(ExecutionData.execution_id))
        .limit(limit)
    )
    return count or 0, rows.all()


async def find_behind(
    connection: AsyncConnection,
    wanted: ExecutionFilter,
    *conditions: ColumnElement[bool],
    bounds: KeysetBounds,
) -> Sequence[Row[*tuple[Any, ...]]]:
    """Return id and time (`created_at`) of the matching executions behind a cursor, up to the limit of `bounds`.

    `conditions` are SQL conditions besides the filter; visibility must be one of them.
    """
    created_at, item_id = col(ExecutionData.created_at), col(ExecutionData.execution_id)
    required = [*conditions, *_build_conditions(wanted), *bounds.condition(created_at, item_id)]
    columns: Sequence[Any] = (col(Execution.id), created_at)
    rows = await connection.execute(
        select(*columns)
        .select_from(Execution)
        .join(ExecutionData, SAME_RUN)
        .where(*required)
        .order_by(*bounds.order(created_at, item_id))
        .limit(bounds.limit)
    )
    return rows.all()


def _build_conditions(wanted: ExecutionFilter) -> Iterable[ColumnElement[bool]]:
    """Yield the SQL conditions of a filter on executions joined with their data.

    Only labels are restricted to the filter's organization: the caller must restrict the executions.
    """
    if wanted.workflow_id is not None:
        yield col(ExecutionData.workflow_id) == wanted.workflow_id
    if wanted.execution_ids:
        yield col(Execution.id).in_(wanted.execution_ids)
    if wanted.statuses:
        yield col(Execution.status).in_(wanted.statuses)
    yield from column_conditions(wanted)
    if wanted.parent_id is not None:
        yield from is_child_of(wanted.parent_id)
    yield from time_conditions(wanted, col(ExecutionData.created_at))
    for key, value in wanted.labels:
        # A list of ids, which both databases look up first: a correlated condition would examine every run.
        labelled = select(col(ExecutionLabel.execution_id)).where(
            col(ExecutionLabel.organization_id) == wanted.organization_id,
            col(ExecutionLabel.key) == key,
            col(ExecutionLabel.value) == value,
        )
        yield col(Execution.id).in_(labelled)


def column_conditions(wanted: ExecutionFilter) -> Iterable[ColumnElement[bool]]:
    """Yield the SQL conditions for the trigger type and the further `condition` of a filter, which no index of a list
    supports.
    """
    if wanted.trigger_type is not None:
        yield col(Execution.trigger_type) == wanted.trigger_type
    if wanted.condition is not None:
        yield wanted.condition


def is_child_of(parent_id: str) -> Sequence[ColumnElement[bool]]:
    """Return the SQL conditions for the executions that a node of the execution `parent_id` has started."""
    # A redundant condition on the root: the index of trees of runs begins with it.
    parent = aliased(Execution)
    root = select(col(parent.root_id)).where(col(parent.id) == parent_id).scalar_subquery()
    return col(Execution.parent_id) == parent_id, col(Execution.root_id) == func.coalesce(root, parent_id)


def time_conditions(
    wanted: ExecutionFilter, created_at: SQLColumnExpression[Any]
) -> Iterable[ColumnElement[bool]]:
    """Yield the SQL conditions of a filter on the time of acceptance in a column: `since` included, `until`
    excluded.
    """
    if wanted.since is not None:
        yield created_at >= wanted.since
    if wanted.until is not None:
        yield created_at < wanted.until


def has_label(label: tuple[str, str]) -> ColumnElement[bool]:
    """Return the SQL condition for executions with a tag or metadata entry, evaluated run by run."""
    key, value = label
    one = aliased(ExecutionLabel)
    return (
        exists()
        .where(
            col(one.execution_id) == col(Execution.id),
            col(one.shard) == col(Execution.shard),
            col(one.key) == key,
            col(one.value) == value,
        )
        .correlate(Execution)
    )


async def find_head(connection: AsyncConnection, execution_id: str, caller: ApiCaller) -> Execution | None:
    """Return the row of an execution without its data; None if it is missing or the caller may not see it."""
    condition = and_(col(Execution.id) == execution_id, visibility_condition(caller))
    row = (await connection.execute(select(Execution).where(condition))).mappings().first()
    return None if row is None else build_row(Execution, row)


async def find_execution(
    connection: AsyncConnection, execution_id: str, caller: ApiCaller
) -> ExecutionRecord | None:
    """Return an execution with its trigger, config, labels and the outputs of its nodes outside of loops.

    None if it is missing, being deleted, or the caller may not see it. Large outputs are references to blobs.
    """
    execution = await find_head(connection, execution_id, caller)
    if execution is None:
        return None
    heavy = select(ExecutionData).where(
        col(ExecutionData.execution_id) == execution_id, col(ExecutionData.shard) == caller.shard
    )
    data = (await connection.execute(heavy)).mappings().first()
    if data is None:
        return None  # its deletion by retention is in progress
    outputs = (
        select(col(SpanRow.node_id), _SHOWN.label("output"), _IS_REFERENCE)
        .where(
            col(SpanRow.execution_id) == execution_id,
            col(SpanRow.shard) == caller.shard,
            col(SpanRow.iteration) == "",
            _SHOWN.is_not(None),
            col(SpanRow.ended_at).is_not(None),
        )
        .order_by(col(SpanRow.sequence))
    )
    rows = (await connection.execute(outputs)).all()
    return ExecutionRecord(
        execution,
        build_row(ExecutionData, data),
        [(row.node_id, row.output) for row in rows],
        [row.node_id for row in rows if row.output_is_reference],
        (await read_labels(connection, caller, [execution_id])).get(execution_id, ()),
        await read_model_calls(connection, execution_id, caller.shard),
    )


async def find_successors(
    connection: AsyncConnection, caller: ApiCaller, execution: Execution
) -> Sequence[Recorded]:
    """Return the newest five executions that resume or replay an execution and that the caller may see, the newest
    first.

    Each has id, status, `resumed_from` and creation time.
    """
    return (await connection.execute(successors_statement(caller, execution.id, execution.key_id))).all()


def successors_statement(caller: ApiCaller, execution_id: str, key_id: str) -> Select[*tuple[Any, ...]]:
    """Return the statement of `find_successors`; `key_id` is the execution's column, which runs that resume it have in
    common.
    """
    columns: Sequence[Any] = (
        *(col(Execution.id), col(Execution.status), col(Execution.resumed_from)),
        col(Execution.created_at),
    )
    resumed = select(*columns).where(
        # Resumed executions keep the key of the first one, by which they are indexed.
        col(Execution.key_id) == key_id,
        col(Execution.resumed_from).is_not(None),
        col(Execution.resumed_from) == execution_id,
        visibility_condition(caller),
    )
    replayed = select(*columns).where(
        col(Execution.replay_of).is_not(None),
        col(Execution.replay_of) == execution_id,
        visibility_condition(caller),
    )
    found = resumed.union(replayed).subquery()
    return select(found).order_by(found.c.created_at.desc(), found.c.id.desc()).limit(SHOWN_SUCCESSORS)


async def read_model_calls(connection: AsyncConnection, execution_id: str, shard: int) -> Sequence[str]:
    """Return the calls of language models of an execution: one JSON text for each node that has made some."""
    statement = select(col(SpanRow.model_calls)).where(
        col(SpanRow.execution_id) == execution_id,
        col(SpanRow.shard) == shard,
        col(SpanRow.model_calls).is_not(None),
    )
    return [text for text in await connection.scalars(statement) if text is not None]


async def read_labels(
    connection: AsyncConnection, caller: ApiCaller, execution_ids: Sequence[str]
) -> dict[str, list[RunLabel]]:
    """Return tags and metadata of executions as sorted pairs of key and value, by execution id; those without any are
    left out.

    Visibility is not checked: pass ids that the caller may see.
    """
    if not execution_ids:
        return {}
    statement = select(
        col(ExecutionLabel.execution_id), col(ExecutionLabel.key), col(ExecutionLabel.value)
    ).where(col(ExecutionLabel.execution_id).in_(execution_ids), col(ExecutionLabel.shard) == caller.shard)
    found: dict[str, list[RunLabel]] = {}
    for execution_id, key, value in await connection.execute(statement):
        found.setdefault(execution_id, []).append((key, value))
    return {execution_id: sorted(labels) for execution_id, labels in found.items()}


async def find_blob_owner(connection: AsyncConnection, key: ExecutionKey) -> BlobOwner | None:
    """Return the owner under which the blobs of a run are stored; None if the run is missing."""
    statement = select(col(Execution.organization_id), col(Execution.key_id)).where(
        col(Execution.id) == key.execution_id, col(Execution.shard) == key.shard
    )
    row = (await connection.execute(statement)).first()
    return None if row is None else BlobOwner(*row)


# ── spans and log lines ─────────────────────────────────────────────────────────────────────────────────────

_SPANS: Final = select(
    literal(SpanKind.NODE.value, Text).label("kind"),
    col(SpanRow.id),
    col(SpanRow.execution_id),
    col(SpanRow.node_id),
    col(SpanRow.iteration),
    col(SpanRow.sequence),
    col(SpanRow.label),
    col(SpanRow.type),
    col(SpanRow.status),
    col(SpanRow.port),
    col(SpanRow.attempt),
    col(SpanRow.started_at),
    col(SpanRow.ended_at),
    col(SpanRow.wake_at),
    # An input that equals another node's output is stored as that node's id.
    func.coalesce(
        col(SpanRow.input), col(SpanRow.input_blob), col(_source.output), col(_source.output_blob)
    ).label("input"),
    and_(
        col(SpanRow.input).is_(None),
        or_(
            col(SpanRow.input_blob).is_not(None),
            and_(col(_source.output).is_(None), col(_source.output_blob).is_not(None)),
        ),
    ).label("input_is_reference"),
    _SHOWN.label("output"),
    _IS_REFERENCE,
    col(SpanRow.error),
    col(SpanRow.unresolved),
    col(SpanRow.hashes),
    col(SpanRow.reused_from),
    col(SpanRow.model_calls),
).outerjoin(
    _source,
    and_(
        # An expression, so that PostgreSQL looks each source up by its key. With the column alone, it reads the
        # spans of the run once more, and compares each with each where it expects few.
        col(_source.execution_id) == col(SpanRow.execution_id).concat(literal_column("''")),
        col(_source.shard) == col(SpanRow.shard),
        col(_source.node_id) == col(SpanRow.input_node),
        col(_source.iteration) == col(SpanRow.iteration),
    ),
)

_NO_TEXT: Final = cast(null(), Text)
_ATTEMPTS: Final = select(
    literal(SpanKind.ATTEMPT.value, Text).label("kind"),
    *(col(AttemptRow.id), col(AttemptRow.execution_id), col(AttemptRow.node_id), col(AttemptRow.iteration)),
    *(col(AttemptRow.sequence), col(AttemptRow.label), col(AttemptRow.type), col(AttemptRow.status)),
    _NO_TEXT.label("port"),
    *(col(AttemptRow.attempt), col(AttemptRow.started_at), col(AttemptRow.ended_at)),
    col(AttemptRow.next_attempt_at).label("wake_at"),
    _NO_TEXT.label("input"),
    false().label("input_is_reference"),
    _NO_TEXT.label("output"),
    false().label("output_is_reference"),
    col(AttemptRow.error),
    _NO_TEXT.label("unresolved"),
    cast(null(), LargeBinary).label("hashes"),
    _NO_TEXT.label("reused_from"),
    _NO_TEXT.label("model_calls"),
)
"""The columns of `_SPANS`, for attempts."""


async def list_spans(
    connection: AsyncConnection,
    key: ExecutionKey,
    part: PageBounds,
    *,
    node_id: str | None,
    statuses: Sequence[ShownSpanStatus],
) -> tuple[int, Sequence[Recorded]]:
    """Return the number of spans (node executions) and attempts of a run, and the page `part` of them, in the order of
    their last changes.

    With a `node_id` or `statuses`, only matching ones; None or empty means all.
    """

    def conditions(table: type[SpanRow | AttemptRow]) -> Iterable[ColumnElement[bool]]:
        yield from _select_run(table, key)
        if node_id is not None:
            yield col(table.node_id) == node_id
        if statuses:
            yield col(table.status).in_(statuses)

    counts = [
        select(func.count()).select_from(table).where(*conditions(table)).scalar_subquery()
        for table in (SpanRow, AttemptRow)
    ]
    statement = _spans_and_attempts(conditions(SpanRow), conditions(AttemptRow))
    return await _read_page(connection, select(counts[0] + counts[1]), statement, part)


async def find_span(
    connection: AsyncConnection, key: ExecutionKey, span_id: str, iteration: str = ""
) -> Recorded | None:
    """Return a span or attempt by its id, or a span by the id of a node and its `iteration` of a loop.

    The iteration is empty outside of loops. None if it is missing.
    """
    statement = _spans_and_attempts(
        [*_select_run(SpanRow, key), col(SpanRow.id) == span_id],
        [*_select_run(AttemptRow, key), col(AttemptRow.id) == span_id],
    )
    found = (await connection.execute(statement)).first()
    if found is not None:
        return found
    of_node = _SPANS.where(
        *_select_run(SpanRow, key), col(SpanRow.node_id) == span_id, col(SpanRow.iteration) == iteration
    )
    return (await connection.execute(of_node)).first()


async def list_attempts(
    connection: AsyncConnection, key: ExecutionKey, node_id: str, iteration: str, at_most: int
) -> Sequence[Recorded]:
    """Return the first `at_most` attempts of a node in an iteration, in order; none if it was tried only once."""
    statement = (
        _ATTEMPTS.where(
            *_select_run(AttemptRow, key),
            col(AttemptRow.node_id) == node_id,
            col(AttemptRow.iteration) == iteration,
        )
        .order_by(col(AttemptRow.attempt))
        .limit(at_most)
    )
    return (await connection.execute(statement)).all()


def _spans_and_attempts(
    of_spans: Iterable[ColumnElement[bool]], of_attempts: Iterable[ColumnElement[bool]]
) -> CompoundSelect[*tuple[Any, ...]]:
    """Return the statement that reads spans of nodes and attempts, ordered by sequence number."""
    return union_all(_SPANS.where(*of_spans), _ATTEMPTS.where(*of_attempts)).order_by("sequence")


async def list_logs(
    connection: AsyncConnection, key: ExecutionKey, part: PageBounds, *, levels: Sequence[str]
) -> tuple[int, Sequence[Recorded]]:
    """Return the number of log lines of a run, and the page `part` of them, the oldest first.

    Lines of other levels than `levels` are neither counted nor returned; empty means all levels.
    """
    conditions = list(_select_run(LogRow, key))
    if levels:
        conditions.append(col(LogRow.level).in_(levels))
    statement = select(LogRow).where(*conditions).order_by(col(LogRow.sequence))
    return await _read_page(
        connection, select(func.count()).select_from(LogRow).where(*conditions), statement, part
    )


async def _read_page(
    connection: AsyncConnection,
    counted: Select[int],
    statement: Select[*tuple[Any, ...]] | CompoundSelect[*tuple[Any, ...]],
    part: PageBounds,
) -> tuple[int, Sequence[Recorded]]:
    """Return the number that `counted` selects, and the rows of `statement` on the page `part`."""
    count: int | None = await connection.scalar(counted)
    rows = (await connection.execute(statement.limit(part.limit).offset(part.offset))).all()
    return count or 0, rows


def _select_run(
    table: type[SpanRow | AttemptRow | LogRow], key: ExecutionKey
) -> Iterable[ColumnElement[bool]]:
    yield col(table.execution_id) == key.execution_id
    yield col(table.shard) == key.shard
    if table is SpanRow:
        yield col(SpanRow.status).not_in(CANDIDATE_STATUSES)


# ── event streams ───────────────────────────────────────────────────────────────────────────────────────────


class RunChanges(Struct, frozen=True):
    """Spans and log lines that were recorded since the last read of a stream, in order."""

    spans: Sequence[Recorded]
    logs: Sequence[Recorded]
    is_all: bool
    """False if `at_most` has cut the result."""


async def read_heads(connection: AsyncConnection, keys: Sequence[ExecutionKey]) -> dict[str, Execution]:
    """Return the rows of several executions by id, without their data and without a check of visibility;
    missing ones are omitted.
    """
    ids, shards = {key.execution_id for key in keys}, {key.shard for key in keys}
    statement = select(Execution).where(col(Execution.id).in_(ids), col(Execution.shard).in_(shards))
    rows = await connection.execute(statement)
    return {row["id"]: build_row(Execution, row) for row in rows.mappings()}


async def read_changes(
    connection: AsyncConnection, key: ExecutionKey, after: int, *, at_most: int
) -> RunChanges:
    """Return the spans, attempts and log lines with sequence numbers above `after`, in their order: at most `at_most`
    spans and attempts, and as many lines.

    If a list is that long, the other ends at the same number, and `is_all` is False.
    """
    # Commits may happen between the two statements: both end at the highest number of one moment.
    newest = (await connection.execute(_select_newest(key))).one()
    last = max(newest)
    found_spans = (
        await connection.execute(
            _spans_and_attempts(
                [*_select_run(SpanRow, key), *_select_between(SpanRow, after, last)],
                [*_select_run(AttemptRow, key), *_select_between(AttemptRow, after, last)],
            ).limit(at_most)
        )
    ).all()
    found_logs = (
        await connection.execute(
            select(LogRow)
            .where(*_select_run(LogRow, key), *_select_between(LogRow, after, last))
            .order_by(col(LogRow.sequence))
            .limit(at_most)
        )
    ).all()
    # A list that was cut may have more of its kind behind the cut: the other list ends at the same number.
    cuts = [rows[-1].sequence for rows in (found_spans, found_logs) if len(rows) == at_most]
    if not cuts:
        return RunChanges(found_spans, found_logs, is_all=True)
    cut = min(cuts)
    return RunChanges(
        [row for row in found_spans if row.sequence <= cut],
        [row for row in found_logs if row.sequence <= cut],
        is_all=False,
    )


def _select_between(
    table: type[SpanRow | AttemptRow | LogRow], after: int, last: int
) -> Iterable[ColumnElement[bool]]:
    yield col(table.sequence) > after
    yield col(table.sequence) <= last


def _select_newest(key: ExecutionKey) -> Select[int, int]:
    """Return the statement that reads the highest sequence number of spans and of log lines, 0 without any."""
    of_span, of_line = (
        select(func.coalesce(func.max(col(table.sequence)), 0))
        .where(*_select_run(table, key))
        .scalar_subquery()
        for table in (SpanRow, LogRow)
    )
    return select(of_span, of_line)
