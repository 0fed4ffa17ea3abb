"""Endpoint that groups the failed runs of an organization by cause, over whole hours."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final

from msgspec import Meta, Struct
from sqlalchemy import Row, and_, exists, func, or_, select, true
from sqlalchemy.orm import aliased
from sqlmodel import col

from gateway.executions import run_graph_rows
from gateway.http.errors import invalid_query
from gateway.http.parameters import ChoicesParameter, IntegerParameter, TimeParameter
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant
from journal import failure_causes, run_hours
from journal.run_hours import HOUR
from journal.store import ExecutionKey
from models.execution import Execution, SpanRow
from models.execution_status import ExecutionStatus
from models.failure_hour import OTHER_CAUSES, FailureHour
from models.run_hour import RunHour
from models.timestamps import hour_of
from models.workflow import Workflow, is_readable_by

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, ScalarSelect, Select
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from gateway.http.request import GatewayRequest
    from models.access import ApiCaller

SHOWN: Final = 100
SINCE: Final = TimeParameter(
    "since", "Only executions accepted from the begin of this hour on; 24 hours without it."
)
UNTIL: Final = TimeParameter(
    "until", "Only executions accepted before the end of the hour that ends here or later."
)
RANGE: Final = (SINCE, UNTIL)
LISTED: Final = IntegerParameter(
    "limit", "Maximum number of groups in the answer.", SHOWN, minimum=1, maximum=SHOWN
)
EXPANDED: Final = 3
"""Groups whose version before is looked up, from the first: each takes a search among earlier runs."""


class FailureExpansion(StrEnum):
    """Optional part of the groups of failed runs."""

    PREVIOUS_VERSION = "previousVersion"


EXPAND: Final = ChoicesParameter(
    "expand",
    f"`previousVersion`: look up the version to go back to, for the first {EXPANDED} groups.",
    FailureExpansion,
)
QUERY: Final = (*RANGE, LISTED, EXPAND)
_later: Final = aliased(Execution)
_NODE_LABEL: Final = (
    select(col(SpanRow.label))
    .where(
        col(SpanRow.execution_id) == col(FailureHour.execution_id),
        col(SpanRow.node_id) == col(FailureHour.node_id),
    )
    .limit(1)
    .correlate(FailureHour)
    .scalar_subquery()
)
"""Label of a node in its last failed run; a node in a loop has the same in all iterations."""


class FailureGroup(WireStruct):
    """Failed runs of a workflow with the same node, code and kind of message."""

    workflow_id: str
    workflow_name: str | None
    """Null for a workflow that is no longer kept."""
    node_id: str | None
    node_label: str | None
    """Label of the node in the last run; null if the run is no longer kept, or if the node has not started."""
    code: str
    message: str | None
    """That of the last run; null if the run is no longer kept."""
    fingerprint: str
    """Hash of workflow, node, code and kind of message, as groups of dead letters have it."""
    count: int
    workflow_runs: int
    """Runs of the workflow in these hours, of which the group is a share."""
    first_at: Instant
    """Time of the first failure."""
    last_at: Instant
    execution_id: str
    """Run that failed last."""
    previous_version: int | None = None
    """With `expand=previousVersion`: version of the last run that completed before the last failed one, if the
    workflow still has the definition that failed; null for later groups than the first three.
    """
    completed_successor_id: str | None = None
    """Newest completed run that resumes or replays the last failed one, directly or by way of others; null without
    one.
    """


class FailureGroups(WireStruct):
    """Failed runs by cause."""

    as_of: Instant
    since: Instant
    """Begin of the first hour."""
    until: Instant
    """End of the last hour."""
    count: int
    """Failed runs of all groups, listed or not."""
    is_complete: bool
    """Whether all groups are listed: there are no more than `limit`, and none of the hours has over 500 groups."""
    groups: Annotated[Sequence[FailureGroup], Meta(max_length=SHOWN)]
    """Those with the last failure first."""


class _LastRun(Struct, frozen=True):
    """Message of the last failed run of a group, and the newest completed run in its place."""

    message: str
    completed_successor_id: str | None


class _VersionBefore(Struct, frozen=True):
    """Version of a workflow before the definition that failed."""

    workflow_id: str
    definition_hash: str
    """Of the failed run."""
    version: int


async def show(request: GatewayRequest) -> JsonResponse:
    """Group the failed executions of the workflows that the caller may read, over 24 hours or some of them, by
    workflow, node, code and kind of message.

    Numbers, ids and quoted texts of a message do not count. An execution counts in the hour of its acceptance, and
    private executions, such as node tests, don't count. The groups are as old as the counts of
    `GET /executions/statistics`.
    """
    now, caller = request.gateway.clock(), request.caller
    since, until = read_hours(request.query[SINCE], request.query[UNTIL], now)
    async with request.gateway.database.read_snapshot() as connection:
        limit = request.query[LISTED]
        rows = (await connection.execute(groups_statement(caller, since, until, limit))).all()
        shown = rows[:limit]
        last_hours = await _read_last_hours(connection, caller, shown)
        run_counts = await _count_runs(connection, caller, {row.workflow_id for row in shown}, since, until)
        last_runs = await _read_last_runs(connection, caller, last_hours.values())
        has_others = await connection.scalar(others_statement(caller, since, until))
        versions: Mapping[str, _VersionBefore] = {}
        if FailureExpansion.PREVIOUS_VERSION in request.query[EXPAND]:
            versions = await _find_versions_before(connection, caller, shown[:EXPANDED], last_hours)
        named = {one.workflow_id for one in versions.values()}
        revisions = await _read_revisions(connection, caller, named) if named else {}
    # Their definitions as they are now, from memory where nobody has changed them.
    workflows = await request.gateway.workflows.load_several(caller.organization_id, revisions)
    present = {
        fingerprint: one.version
        for fingerprint, one in versions.items()
        if one.workflow_id in workflows and workflows[one.workflow_id].definition_hash == one.definition_hash
    }
    return JsonResponse(
        FailureGroups(
            as_of=instant(now),
            since=instant(since),
            until=instant(until),
            count=int(rows[0].total) if rows else 0,
            is_complete=len(rows) <= limit and not has_others,
            groups=[
                _show_group(
                    row,
                    last_hours[row.fingerprint],
                    last_runs,
                    workflow_runs=run_counts.get(row.workflow_id, 0),
                    previous_version=present.get(row.fingerprint),
                )
                for row in shown
            ],
        )
    )


async def _find_versions_before(
    connection: AsyncConnection,
    caller: ApiCaller,
    groups: Sequence[Row[*tuple[Any, ...]]],
    last_hours: Mapping[str, Row[*tuple[Any, ...]]],
) -> Mapping[str, _VersionBefore]:
    """Return for each group, by fingerprint, the version of the last run that completed before the group's last failed
    run.

    Groups without such a version, or with the same definition, are absent. `last_hours` has the last failure by
    fingerprint.
    """
    found = {}
    for group in groups:
        key = ExecutionKey(last_hours[group.fingerprint].execution_id, caller.shard)
        before = await run_graph_rows.find_version_before(connection, key)
        if before is not None and before[1] is not None:
            found[group.fingerprint] = _VersionBefore(group.workflow_id, before[0], before[1])
    return found


async def _read_revisions(
    connection: AsyncConnection, caller: ApiCaller, workflow_ids: Collection[str]
) -> Mapping[str, int]:
    """Return the revisions of the organization's workflows by id, without the deleted ones."""
    rows = await connection.execute(
        select(col(Workflow.id), col(Workflow.revision)).where(
            col(Workflow.id).in_(workflow_ids),
            col(Workflow.organization_id) == caller.organization_id,
            col(Workflow.deleted_at).is_(None),
        )
    )
    return {row.id: row.revision for row in rows}


def read_hours(since: datetime | None, until: datetime | None, now: datetime) -> tuple[datetime, datetime]:
    """Return the begin of the first and the end of the last hour that a time range touches, limited to the 24 hours
    that are kept, up to the present one.

    None as `since` or `until` means the limit. Raises a 400 error unless `until` is later than `since`.
    """
    if since is not None and until is not None and until <= since:
        raise invalid_query(UNTIL.name, "invalid-value", "until must be later than since")
    first, end = run_hours.first_hour(now), hour_of(now) + HOUR
    begin = first if since is None else min(max(hour_of(since), first), end)
    if until is not None:
        last = hour_of(until)
        end = min(max(last if last == until else last + HOUR, begin), end)
    return begin, end


def groups_statement(
    caller: ApiCaller, since: datetime, until: datetime, limit: int
) -> Select[*tuple[Any, ...]]:
    """Return the statement of the groups that a caller may see over some hours, those with the last failure first.

    It reads one group more than `limit`; `total` of each row is the number of failed runs of all groups.
    """
    last_at = func.max(col(FailureHour.last_at))
    return (
        select(
            *(col(FailureHour.fingerprint), col(FailureHour.workflow_id), col(Workflow.name)),
            func.sum(col(FailureHour.runs)).label("runs"),
            func.min(col(FailureHour.first_at)).label("first_at"),
            last_at.label("last_at"),
            func.sum(func.sum(col(FailureHour.runs))).over().label("total"),
        )
        .outerjoin(Workflow, col(Workflow.id) == col(FailureHour.workflow_id))
        .where(
            *_is_within(caller, since, until),
            col(FailureHour.fingerprint) != OTHER_CAUSES,
            _is_visible(caller),
        )
        .group_by(col(FailureHour.fingerprint), col(FailureHour.workflow_id), col(Workflow.name))
        .order_by(last_at.desc(), col(FailureHour.fingerprint))
        .limit(limit + 1)
    )


def others_statement(caller: ApiCaller, since: datetime, until: datetime) -> Select[*tuple[Any, ...]]:
    """Return the statement that reads whether an hour of the range had more groups than are kept."""
    return select(
        exists().where(*_is_within(caller, since, until), col(FailureHour.fingerprint) == OTHER_CAUSES)
    )


def _is_within(caller: ApiCaller, since: datetime, until: datetime) -> Sequence[ColumnElement[bool]]:
    return (
        col(FailureHour.organization_id) == caller.organization_id,
        col(FailureHour.starts_at) >= since,
        col(FailureHour.starts_at) < until,
    )


def _is_visible(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the SQL condition for groups of workflows whose runs the caller may see, as `visibility_condition` has
    it for runs: those of a deleted workflow are for admins and its owner.
    """
    if caller.is_admin:
        return true()
    is_own_deleted = and_(
        col(Workflow.organization_id) == caller.organization_id,
        col(Workflow.deleted_at).is_not(None),
        col(Workflow.owner_id) == caller.user_id,
    )
    return or_(is_readable_by(caller), is_own_deleted)


async def _read_last_hours(
    connection: AsyncConnection, caller: ApiCaller, groups: Sequence[Row[*tuple[Any, ...]]]
) -> Mapping[str, Row[*tuple[Any, ...]]]:
    """Return for each group, by fingerprint, the row of the hour with its last failure: node with label, code
    and last run.
    """
    if not groups:
        return {}
    last_at = {group.fingerprint: group.last_at for group in groups}
    rows = await connection.execute(
        select(
            *(col(FailureHour.fingerprint), col(FailureHour.last_at), col(FailureHour.node_id)),
            *(col(FailureHour.code), col(FailureHour.execution_id), _NODE_LABEL.label("node_label")),
        ).where(
            col(FailureHour.organization_id) == caller.organization_id,
            col(FailureHour.fingerprint).in_(last_at),
            # Few others than the last hour of each: all hours would take longer to read than to group.
            col(FailureHour.last_at).in_({*last_at.values()}),
        )
    )
    return {row.fingerprint: row for row in rows if row.last_at == last_at[row.fingerprint]}


async def _count_runs(
    connection: AsyncConnection,
    caller: ApiCaller,
    workflow_ids: Collection[str],
    since: datetime,
    until: datetime,
) -> Mapping[str, int]:
    """Return the numbers of runs of workflows that were accepted within some hours, by workflow id."""
    rows = await connection.execute(
        select(col(RunHour.workflow_id), func.sum(col(RunHour.accepted)))
        .where(
            col(RunHour.organization_id) == caller.organization_id,
            col(RunHour.workflow_id).in_(workflow_ids),
            col(RunHour.starts_at) >= since,
            col(RunHour.starts_at) < until,
        )
        .group_by(col(RunHour.workflow_id))
    )
    return {workflow_id: int(count) for workflow_id, count in rows}


async def _read_last_runs(
    connection: AsyncConnection, caller: ApiCaller, last_hours: Iterable[Row[*tuple[Any, ...]]]
) -> Mapping[str, _LastRun]:
    """Return the last failed run of each group, by execution id; runs that are no longer kept are absent."""
    rows = await connection.execute(last_runs_statement(caller, [one.execution_id for one in last_hours]))
    return {
        row.id: _LastRun(
            failure_causes.describe_error(row.workflow_id, row.error).message,
            # Ids ascend with the time of acceptance.
            max(filter(None, (row.resumed_id, row.replayed_id)), default=None),
        )
        for row in rows
    }


def last_runs_statement(caller: ApiCaller, execution_ids: Sequence[str]) -> Select[*tuple[Any, ...]]:
    """Return the statement that reads the errors of failed runs, and the ids of the newest completed runs that resume
    or replay them.
    """
    return select(
        *(col(Execution.id), col(Execution.workflow_id), col(Execution.error)),
        _select_completed(col(_later.resumed_from)).label("resumed_id"),
        _select_completed(col(_later.replay_of)).label("replayed_id"),
    ).where(
        col(Execution.id).in_(execution_ids),
        col(Execution.organization_id) == caller.organization_id,
        col(Execution.shard) == caller.shard,
    )


def _select_completed(link: SQLColumnExpression[str | None]) -> ScalarSelect[Any]:
    """Return the subquery of the id of the newest completed run that was accepted after an execution and continues it.

    `link` is the column that such a run has set, `resumed_from` or `replay_of`. Both runs are of one chain, and have
    the same `key_id`.
    """
    return (
        select(func.max(col(_later.id)))
        .where(
            col(_later.key_id) == col(Execution.key_id),
            link.is_not(None),
            col(_later.organization_id) == col(Execution.organization_id),
            col(_later.status) == ExecutionStatus.COMPLETED,
            col(_later.created_at) > col(Execution.created_at),
        )
        .correlate(Execution)
        .scalar_subquery()
    )


def _show_group(
    group: Row[*tuple[Any, ...]],
    last: Row[*tuple[Any, ...]],
    last_runs: Mapping[str, _LastRun],
    *,
    workflow_runs: int,
    previous_version: int | None,
) -> FailureGroup:
    """Return a group as the API shows it; `last` is the row of the hour with its last failure, and `last_runs` has its
    last run unless that is no longer kept.

    `previous_version` is the version before the failures; None for none, or if the workflow has changed since.
    """
    last_run = last_runs.get(last.execution_id)
    return FailureGroup(
        workflow_id=group.workflow_id,
        workflow_name=group.name,
        node_id=last.node_id,
        node_label=last.node_label,
        code=last.code,
        message=None if last_run is None else last_run.message,
        fingerprint=group.fingerprint,
        count=group.runs,
        workflow_runs=max(workflow_runs, group.runs),
        first_at=instant(group.first_at),
        last_at=instant(group.last_at),
        execution_id=last.execution_id,
        previous_version=previous_version,
        completed_successor_id=None if last_run is None else last_run.completed_successor_id,
    )
