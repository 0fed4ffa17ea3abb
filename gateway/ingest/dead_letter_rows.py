"""Queries of the dead letters and deliveries of a whole organization, in bounded batches.

An object that a bulk redrive has run, or that was purged, has used up its redrive key. The key is derived from the
workflow, so that rows are read first and their keys are looked up in batches.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from msgspec import Struct
from sqlalchemy import (
    BigInteger,
    Text,
    func,
    literal,
    or_,
    select,
    text,
    type_coerce,
    union_all,
    update,
)
from sqlmodel import col

from concurrency import offload
from gateway.http import idempotency, keyset, limits
from gateway.http.keyset import KeysetBounds, PageCursor
from gateway.ingest import delivery_rows
from journal import dead_letters, failure_causes
from journal.dead_letters import IS_FAILED, IS_OPEN, IS_TAKEN_UP, OF_INTAKE, list_pairs
from models.execution import UNSUCCESSFUL_CONDITION, Execution, ExecutionData, Idempotency
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from models.execution_visibility import visibility_condition
from models.ingest import Delivery
from models.workflow import Workflow, is_readable_by

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from gateway.ingest.delivery_rows import DeliveryFilter
    from journal.dead_letters import ErrorCount
    from journal.failure_causes import ErrorCause, FailureKind
    from models.access import ApiCaller

Row = TypeVar("Row", bound="IntakeRow")

BATCH: Final = 500
"""Rows whose redrive keys are looked up at once."""
FIRST_BATCH_PAGES: Final = 4
"""Number of pages that the first batch could fill."""
PURGED: Final = "purged"
"""Object of the redrive key of a purged dead letter."""


class IntakeRow(Protocol):
    """Row of a delivery, or of a run that a delivery has started."""

    @property
    def id(self) -> str: ...
    @property
    def workflow_id(self) -> str | None: ...
    @property
    def created_at(self) -> datetime: ...


class FailedRun(Struct, frozen=True):
    """Part of the row of a failed run: thousands of whole rows would take seconds to build."""

    id: str
    shard: int
    workflow_id: str
    trigger_type: str
    definition_hash: str
    error: str | None
    """JSON text: most of hundreds of runs have the same few errors."""
    completed_nodes: int
    total_nodes: int
    created_at: datetime
    ended_at: datetime | None

    @property
    def cause(self) -> ErrorCause:
        return failure_causes.describe_stored(self.workflow_id, self.error)


class LastFailure(Struct, frozen=True):
    """Least part of the row of a failed run that tells its cause."""

    id: str
    error: str | None
    """JSON text."""
    created_at: int
    """Time of acceptance in microseconds."""


class DeliveryKey(Struct, frozen=True):
    """Part of the row of a delivery by which it is selected."""

    id: str
    workflow_id: str | None
    created_at: datetime


class WorkflowHead(Struct, frozen=True):
    """Name and revision of a workflow."""

    name: str
    revision: int


class CompletedRunsFilter(Struct, frozen=True):
    """Runs of a workflow with one definition that were accepted after a time."""

    workflow_id: str
    definition_hash: str
    since: datetime


_ERROR_TEXT: Final = type_coerce(col(Execution.error), Text).label("error")
_COLUMNS: Final = [
    _ERROR_TEXT if name == "error" else getattr(Execution, name) for name in FailedRun.__struct_fields__
]


class DeadLetterFilter(Struct, frozen=True):
    """Filter of the dead letters of an organization."""

    workflow_id: str | None = None
    trigger_type: str | None = None
    group: str | None = None
    """Fingerprint of the error."""
    only_groups: frozenset[str] | None = None
    """Fingerprints of which one must match; None: any."""
    without_groups: frozenset[str] = frozenset()
    """Fingerprints that are left out."""
    failure: FailureKind | None = None
    since: datetime | None = None
    until: datetime | None = None
    """Times of acceptance: `since` is inclusive, `until` is exclusive."""
    execution_ids: Sequence[str] = ()
    """Only these; empty: all."""
    owner_id: str | None = None
    """Only runs of workflows of this user."""

    def allows_cause(self, failed: FailedRun | ErrorCount) -> bool:
        """Return whether the error of failed runs matches the groups and the kind of failure of the filter;
        True if it has neither.
        """
        is_any = self.group is None and self.only_groups is None and not self.without_groups
        if is_any and self.failure is None:
            return True
        cause = failed.cause
        fingerprint = cause.fingerprint
        return (
            (self.failure is None or cause.kind is self.failure)
            and (self.group is None or fingerprint == self.group)
            and (self.only_groups is None or fingerprint in self.only_groups)
            and fingerprint not in self.without_groups
        )


class RunSuccessor(Struct, frozen=True):
    """Run that was started in place of a dead letter."""

    id: str
    status: str


class SettledRun(Struct, frozen=True):
    """Former dead letter with its successor: None for a purged one, and if the successor is no longer kept."""

    failed: FailedRun
    successor: RunSuccessor | None


class SettledRows(Struct, frozen=True):
    """Page of former dead letters."""

    rows: Sequence[SettledRun]
    last_examined: FailedRun | None
    """Last row that was read, unless all were: others follow behind it."""


class OpenRows(Struct, Generic[Row], frozen=True):
    """Rows that are neither redriven nor purged."""

    rows: Sequence[Row]
    last_examined: Row | None
    """Last row that was read, unless all were: others follow behind it."""


async def list_last_failures(
    connection: AsyncConnection, caller: ApiCaller, workflow_id: str, limit: int
) -> Sequence[LastFailure]:
    """Return the failed runs of a workflow that the caller may see, the last to end first, at most `limit`.

    Redriven, resumed and purged runs are included.
    """
    statement = (
        select(
            col(Execution.id),
            _ERROR_TEXT,
            type_coerce(col(Execution.created_at), BigInteger),
        )
        .where(col(Execution.workflow_id) == workflow_id, IS_FAILED, visibility_condition(caller))
        .order_by(col(Execution.ended_at).desc())
        .limit(limit)
    )
    await keyset.follow_indexes(connection)
    return [LastFailure(*row) for row in await connection.execute(statement)]


async def find_dead_letters(
    connection: AsyncConnection,
    caller: ApiCaller,
    wanted: DeadLetterFilter,
    bounds: KeysetBounds,
    *,
    examined: int,
) -> OpenRows[FailedRun]:
    """Return the dead letters behind the cursor of `bounds` that the caller may see and that match, up to its limit.

    A dead letter is a failed run of an inbound request that was neither redriven, resumed, replayed nor purged. Reading
    stops after about `examined` failed runs, so there may be fewer although others follow.
    """
    statement = select(*_COLUMNS).where(*_build_failure_conditions(caller, wanted), *IS_OPEN)
    source = _RowSource(FailedRun, statement, col(Execution.created_at), col(Execution.id))
    return await _find_open(connection, caller, source, bounds, wanted.allows_cause, examined)


async def count_by_error(
    connection: AsyncConnection, caller: ApiCaller, wanted: DeadLetterFilter
) -> Sequence[ErrorCount]:
    """Count all dead letters that the caller may see and that match, by workflow, text of the error and definition."""
    await keyset.follow_indexes(connection)
    counts = await dead_letters.count_by_error(connection, *_build_failure_conditions(caller, wanted))
    # Errors without a common text take tens of microseconds each.
    return await offload.run_in_thread(lambda: [row for row in counts if wanted.allows_cause(row)])


async def find_settled(
    connection: AsyncConnection,
    caller: ApiCaller,
    wanted: DeadLetterFilter,
    bounds: KeysetBounds,
    *,
    is_live: bool,
    examined: int,
) -> SettledRows:
    """Return the runs behind a cursor that were dead letters until they were redriven, resumed, replayed or purged.

    With `is_live`, those with a successor that has not ended; otherwise the others. Reading stops after about
    `examined` rows, so there may be fewer than the limit of `bounds` although others follow.
    """
    is_settled = or_(col(Execution.settled_at).is_not(None), IS_TAKEN_UP)
    statement = select(*_COLUMNS).where(
        # As the partial index of unsuccessful runs has it: the index of open dead letters has no settled ones.
        text(UNSUCCESSFUL_CONDITION),
        *_build_failure_conditions(caller, wanted),
        is_settled,
    )
    source = _RowSource(FailedRun, statement, col(Execution.created_at), col(Execution.id))
    found: list[SettledRun] = []
    count, last = 0, None
    await keyset.follow_indexes(connection)
    async for batch, is_last in _read_batches(connection, source, bounds):
        successors = await _find_successors(connection, caller, batch)
        for row in batch:
            count, last = count + 1, row
            successor = successors.get(row.id)
            is_running = successor is not None and successor.status not in TERMINAL_STATUSES
            if is_running is is_live and wanted.allows_cause(row):
                found.append(SettledRun(row, successor))
                if len(found) == bounds.limit:
                    return SettledRows(found, None if is_last and row is batch[-1] else row)
        if is_last:
            return SettledRows(found, None)
        if count >= examined:
            break
    return SettledRows(found, last)


async def read_runs(
    connection: AsyncConnection, caller: ApiCaller, execution_ids: Sequence[str]
) -> dict[str, FailedRun]:
    """Return the runs with these ids that the caller may see, in any status, by id and in the order of the ids."""
    statement = select(*_COLUMNS).where(col(Execution.id).in_(execution_ids), visibility_condition(caller))
    found = {row.id: FailedRun(*row) for row in await connection.execute(statement)}
    return {execution_id: found[execution_id] for execution_id in execution_ids if execution_id in found}


async def mark_settled(connection: AsyncConnection, execution_ids: Sequence[str], now: datetime) -> None:
    """Set the settled time of those of the runs that have failed, so that lists of dead letters need not read their
    redrive keys.

    A used redrive key alone decides that a run is no dead letter. The caller has checked the organization.
    """
    for start in range(0, len(execution_ids), BATCH):
        some = execution_ids[start : start + BATCH]
        await connection.execute(
            update(Execution).where(col(Execution.id).in_(some), IS_FAILED).values(settled_at=now)
        )


async def mark_purged(
    connection: AsyncConnection, failed: Sequence[Execution | FailedRun], now: datetime
) -> None:
    """Use up the redrive keys of failed runs, so that none can be redriven, and mark the runs as settled; runs that
    were redriven before keep their successor.
    """
    for one in sorted(failed, key=lambda one: one.id):
        idempotency_key = idempotency.redrive_key(one.workflow_id, one.id)
        await idempotency.reserve_key(
            connection, idempotency_key, shard=one.shard, resource_id=PURGED, now=now
        )
    await mark_settled(connection, [one.id for one in failed], now)


async def find_deliveries(
    connection: AsyncConnection,
    caller: ApiCaller,
    wanted: DeliveryFilter,
    bounds: KeysetBounds,
    *,
    examined: int,
) -> OpenRows[DeliveryKey]:
    """Return the deliveries behind a cursor that the caller may see, that match, and that a bulk redrive can still run.

    Their content is kept, and no bulk redrive has run them. Reading stops after about `examined` rows, so there may be
    fewer than the limit of `bounds` although others follow.
    """
    columns = [getattr(Delivery, name) for name in DeliveryKey.__struct_fields__]
    statement = select(*columns).where(
        col(Delivery.organization_id) == caller.organization_id,
        *delivery_rows.conditions(wanted),
        *delivery_rows.redrivable_conditions(),
        *delivery_rows.visible_conditions(caller),
    )
    source = _RowSource(DeliveryKey, statement, col(Delivery.created_at), col(Delivery.id))
    return await _find_open(connection, caller, source, bounds, lambda _: True, examined)


async def read_workflow_names(connection: AsyncConnection, workflow_ids: Iterable[str]) -> dict[str, str]:
    """Return the names of workflows, deleted ones included, by id; missing ones are omitted. The organization
    is not checked.
    """
    found = await read_workflow_heads(connection, workflow_ids)
    return {workflow_id: head.name for workflow_id, head in found.items()}


async def read_workflow_heads(
    connection: AsyncConnection, workflow_ids: Iterable[str]
) -> dict[str, WorkflowHead]:
    """Return names and revisions of workflows, deleted ones included, by id; missing ones are omitted.

    The organization is not checked: the ids belong to objects that the caller may see.
    """
    wanted = sorted(set(workflow_ids))
    if not wanted:
        return {}
    statement = select(col(Workflow.id), col(Workflow.name), col(Workflow.revision)).where(
        col(Workflow.id).in_(wanted)
    )
    return {row.id: WorkflowHead(row.name, row.revision) for row in await connection.execute(statement)}


async def count_completed_since(
    connection: AsyncConnection, wanted: Sequence[CompletedRunsFilter]
) -> Sequence[int]:
    """Return for each filter, in their order, how many runs with its definition were accepted after its time and have
    completed.

    Only the newest 100 runs of a workflow after that time count, and private ones do not.
    """
    if not wanted:
        return []
    counts = [
        select(literal(number).label("number"), _count_completed(one).label("completed"))
        for number, one in enumerate(wanted)
    ]
    found = {row.number: row.completed for row in await connection.execute(union_all(*counts))}
    return [found[number] for number in range(len(wanted))]


def _count_completed(wanted: CompletedRunsFilter) -> ColumnElement[int]:
    """Return the subquery that counts the completed runs of a filter among the newest 100 of the workflow
    after its time.
    """
    newest = (
        select(col(ExecutionData.execution_id))
        .where(
            col(ExecutionData.workflow_id) == wanted.workflow_id,
            col(ExecutionData.created_at) > wanted.since,
        )
        .order_by(col(ExecutionData.created_at).desc())
        .limit(limits.RUNS_AFTER_GROUP)
    )
    return (
        select(func.count())
        .where(
            col(Execution.id).in_(newest),
            col(Execution.status) == ExecutionStatus.COMPLETED,
            col(Execution.definition_hash) == wanted.definition_hash,
            col(Execution.is_private).is_(False),
        )
        .scalar_subquery()
    )


def _build_failure_conditions(caller: ApiCaller, wanted: DeadLetterFilter) -> Iterable[ColumnElement[bool]]:
    """Yield the SQL conditions for failed runs of inbound requests that match, of workflows that the caller may read
    and that are not deleted.

    The groups and the kind of failure are not among them, since they depend on the text of the error.
    """
    yield col(Execution.organization_id) == caller.organization_id
    yield from OF_INTAKE
    yield visibility_condition(caller)
    # Runs of a deleted workflow can't be redriven.
    workflow = select(col(Workflow.id)).where(col(Workflow.id) == col(Execution.workflow_id))
    if wanted.owner_id is not None:
        workflow = workflow.where(col(Workflow.owner_id) == wanted.owner_id)
    yield workflow.where(is_readable_by(caller)).correlate(Execution).exists()
    if wanted.workflow_id is not None:
        yield col(Execution.workflow_id) == wanted.workflow_id
    if wanted.trigger_type is not None:
        yield col(Execution.trigger_type) == wanted.trigger_type
    if wanted.since is not None:
        yield col(Execution.created_at) >= wanted.since
    if wanted.until is not None:
        yield col(Execution.created_at) < wanted.until
    if wanted.execution_ids:
        yield col(Execution.id).in_(wanted.execution_ids)


class _RowSource(Struct, Generic[Row], frozen=True):
    """Statement whose rows are read in batches, and the type to build of each: its fields are the columns in order."""

    kind: Callable[..., Row]
    statement: Select[*tuple[Any, ...]]
    created_at: SQLColumnExpression[Any]
    item_id: SQLColumnExpression[Any]


async def _find_open(
    connection: AsyncConnection,
    caller: ApiCaller,
    source: _RowSource[Row],
    bounds: KeysetBounds,
    matches: Callable[[Row], bool],
    examined_at_most: int,
) -> OpenRows[Row]:
    """Return the rows of a source that match and have no used redrive key (as `_find_settled` finds), up to the limit
    of `bounds`.

    No further batch is read once `examined_at_most` rows were read.
    """
    await keyset.follow_indexes(connection)
    found: list[Row] = []
    examined, last = 0, None
    async for batch, is_last in _read_batches(connection, source, bounds):
        settled = await _find_settled(connection, caller, batch)
        for row in batch:
            examined, last = examined + 1, row
            if row.id not in settled and matches(row):
                found.append(row)
                if len(found) == bounds.limit:
                    is_all = is_last and row is batch[-1]
                    return OpenRows(found, None if is_all else row)
        if is_last:
            return OpenRows(found, None)
        if examined >= examined_at_most:
            break
    return OpenRows(found, last)


async def _read_batches(
    connection: AsyncConnection, source: _RowSource[Row], bounds: KeysetBounds
) -> AsyncIterator[tuple[list[Row], bool]]:
    """Yield the rows behind the cursor of `bounds` in its order, in batches of at most 500, each with whether
    it is the last.
    """
    # Most pages are short, and their rows are found in a short first batch.
    size = min(FIRST_BATCH_PAGES * bounds.limit, BATCH)
    while True:
        rows = await connection.execute(
            source.statement.where(*bounds.condition(source.created_at, source.item_id))
            .order_by(*bounds.order(source.created_at, source.item_id))
            .limit(size + 1)
        )
        batch = [source.kind(*row) for row in rows]
        is_last = len(batch) <= size
        yield batch[:size], is_last
        if is_last:
            return
        behind = PageCursor(bounds.is_descending, batch[size - 1].created_at, batch[size - 1].id)
        bounds = KeysetBounds(bounds.limit, bounds.is_descending, behind)
        size = BATCH


async def _find_settled(
    connection: AsyncConnection, caller: ApiCaller, rows: Sequence[Row]
) -> frozenset[str]:
    """Return the ids of those rows with a used redrive key: of deliveries that a bulk redrive has run, and of runs that
    were redriven in bulk, resumed, replayed or purged.
    """
    return frozenset(await _read_redrive_keys(connection, caller, rows))


async def _find_successors(
    connection: AsyncConnection, caller: ApiCaller, rows: Sequence[FailedRun]
) -> Mapping[str, RunSuccessor]:
    """Return the runs that redrives, resumes and replays have started in place of failed runs, by the id of the failed
    run.

    Runs without a successor, or with one that is no longer stored, are left out.
    """
    successor_ids = await _read_redrive_keys(connection, caller, rows)
    statement = select(col(Execution.id), col(Execution.status)).where(
        col(Execution.id).in_(successor_ids.values()),
        col(Execution.organization_id) == caller.organization_id,
    )
    found = {row.id: RunSuccessor(row.id, row.status) for row in await connection.execute(statement)}
    return {key: found[successor_id] for key, successor_id in successor_ids.items() if successor_id in found}


async def _read_redrive_keys(
    connection: AsyncConnection, caller: ApiCaller, rows: Sequence[Row]
) -> Mapping[str, str]:
    """Return for each row with a used redrive key, by its id, the id of the run that was started, or `purged`."""
    if not rows:
        return {}
    scope_of = {one: idempotency.redrive_key(str(one), "").scope for one in {row.workflow_id for row in rows}}
    pairs = [(scope_of[row.workflow_id], row.id) for row in rows]
    scope, key = list_pairs(pairs, is_sqlite=connection.dialect.name == "sqlite")
    statement = select(col(Idempotency.key), col(Idempotency.resource_id)).where(
        col(Idempotency.shard) == caller.shard, col(Idempotency.scope) == scope, col(Idempotency.key) == key
    )
    return {row.key: row.resource_id for row in await connection.execute(statement)}
