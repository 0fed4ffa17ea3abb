"""Endpoint of a list of workflows with their pods, newest runs and counts of 24 hours, the worst first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import msgspec
from sqlalchemy import (
    BigInteger,
    Text,
    and_,
    case,
    cast,
    func,
    literal_column,
    or_,
    select,
    true,
    type_coerce,
    union,
)
from sqlmodel import col

from gateway.http.parameters import LIMIT, OFFSET, ChoiceParameter, PageBounds
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from gateway.workflows import workflow_rows, workflow_shapes
from gateway.workflows.workflow_rows import WorkflowFilter
from gateway.workflows.workflow_shapes import WorkflowSummary
from gateway.workflows.workflows import SEARCH, STATUS, TAG
from journal import run_hours
from json_text import decoding
from models import access_store
from models.column_types import build_row
from models.deployment import SERVING_STATES, Deployment, DeploymentStatus, ObservedState, status_of
from models.duration_histogram import estimate_quantile, merge_histograms
from models.execution import Execution, ExecutionData
from models.execution_status import ExecutionStatus
from models.lifecycle_policy import StoppedReason
from models.run_hour import ALL_WORKFLOWS, RunHour
from models.timestamps import to_microseconds
from models.workflow import Workflow
from models.workflow_triggers import TriggerKind, WorkflowTrigger

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import CTE, ColumnElement, Select, UnaryExpression
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import Label, SQLColumnExpression

    from gateway.workflows.workflow_rows import Listed
    from models.access import ApiCaller


class WorkflowState(StrEnum):
    """State of a workflow by its runs of 24 hours and its pods; a workflow may have several."""

    FAILING = "failing"
    """Runs have failed, or its pods can't start."""
    UNFINISHED = "unfinished"
    """Runs are pending, running or waiting."""
    AWAKE = "awake"
    """Its pods serve."""
    ASLEEP = "asleep"
    """It is deployed, and has no pods now."""


class ActivityOrder(StrEnum):
    """Order of a list of workflows."""

    WORST = "worst"
    """The worst first."""
    LAST_RUN = "last-run"
    """By the hour of the last run, the latest first."""
    NAME = "name"


STATE = ChoiceParameter("state", "Only workflows in this state.", WorkflowState)
ORDER = ChoiceParameter("order", "Order of the list; `worst` by default.", ActivityOrder)
LISTED = (STATUS, TAG, SEARCH, STATE, ORDER, LIMIT, OFFSET)


class NewestRun(WireStruct):
    """Newest run of a workflow that is not private."""

    id: str
    status: ExecutionStatus
    created_at: Instant
    ended_at: Instant | None


class WorkflowHour(WireStruct):
    """Runs of a workflow that were accepted within one hour."""

    accepted: int
    failed: int


class WorkflowActivity(WorkflowSummary, kw_only=True):
    """Workflow with its pods, its newest run, and the counts of its runs over 24 hours."""

    owner_name: str | None
    """Name of the owner, or the mail address of one without a name; null for an owner who is gone."""
    triggers: Sequence[TriggerKind]
    """Kinds of its triggers; empty for a workflow that only people and the API start."""
    deployment_status: DeploymentStatus
    reason: str | None
    """Reason why its pods can't start."""
    newest_run: NewestRun | None
    """Null for a workflow that has never run."""
    accepted: int
    unfinished: int
    """Runs of the 24 hours that are pending, running or waiting."""
    completed: int
    failed: int
    run_p50_ms: int | None
    """Median of the times from start to end, within 10 %; null without an ended run."""
    run_p95_ms: int | None
    hours: Sequence[WorkflowHour]
    """The 24 hours, the earliest first."""


class WorkflowActivityList(WireStruct):
    """Page of the list; `count` is the number of all workflows that match."""

    count: int
    limit: int
    offset: int
    since: Instant
    """Begin of the first of the 24 hours."""
    states: Mapping[WorkflowState, int]
    """Number of workflows in each state that match the other filters."""
    workflows: Sequence[WorkflowActivity]


async def index(request: GatewayRequest) -> JsonResponse:
    """List the workflows that the caller may read with pods, newest runs and counts of 24 hours, the worst first.

    Those without a start of their pods come first, then those with the latest failed runs, those with unfinished
    runs, those with the latest runs, and the others by their last change; `order` has other orders. The counts are
    a few seconds old, on a server with thousands of runs per minute up to a few minutes.
    """
    query, caller, now = request.query, request.caller, request.gateway.clock()
    part, state, order = query.page(), query[STATE], query[ORDER] or ActivityOrder.WORST
    wanted = WorkflowFilter(query[STATUS], query[TAG], query[SEARCH])
    since = run_hours.first_hour(now)
    # A snapshot: a workflow whose first run is counted between the two statements of a page would be in neither.
    async with request.gateway.database.read_snapshot() as connection:
        listed = page_statement(caller, wanted, part, since, state=state, order=order)
        found = (await connection.execute(listed)).all()
        totals = found[0]
        rows = [row for row in found if row.id is not None]
        if len(rows) < part.limit and state is None and order is not ActivityOrder.NAME:
            behind = PageBounds(part.limit - len(rows), max(part.offset - (totals.busy or 0), 0))
            rows += (await connection.execute(quiet_statement(caller, wanted, behind, since, order))).all()
        shown = [row.id for row in rows]
        hours = await _read_hours(connection, caller.organization_id, shown, since)
        triggers = await _read_triggers(connection, shown)
        deployments = await _read_deployments(connection, shown)
        newest_runs = await _read_newest_runs(connection, shown)
        owners = {row.owner_id for row in rows}
        names = await access_store.read_user_names(connection, caller.organization_id, owners)
    count = totals.total if state is None else getattr(totals, state.value)
    workflows = [
        _show_workflow(
            row,
            hours.get(row.id, ()),
            since,
            triggers.get(row.id, ()),
            deployments.get(row.id),
            newest_runs.get(row.id),
            names.get(row.owner_id),
        )
        for row in rows
    ]
    return JsonResponse(
        WorkflowActivityList(
            count=count or 0,
            limit=part.limit,
            offset=part.offset,
            since=instant(since),
            states={one: getattr(totals, one.value) or 0 for one in WorkflowState},
            workflows=workflows,
        )
    )


def page_statement(
    caller: ApiCaller,
    wanted: WorkflowFilter,
    part: PageBounds,
    since: datetime,
    *,
    state: WorkflowState | None = None,
    order: ActivityOrder = ActivityOrder.WORST,
) -> Select[*tuple[Any, ...]]:
    """Return the statement of a page of matching workflows in an order, by the counts of their runs from `since` on.

    Each row also has the number of all that match (`total`), of `busy` ones, and of those in each state; a page without
    workflows is one row with these numbers. With the state None, meaning any, the page has only busy workflows (those
    with runs, or whose pods can't start), unless it is ordered by name: `quiet_statement` lists the others behind them.
    So few rows are read and sorted, however many workflows have neither runs nor pods.
    """
    conditions = workflow_rows.list_conditions(caller, wanted)
    if wanted.search is not None:
        # The texts of all workflows are searched once, not for each part of the statement.
        found = select(col(Workflow.id)).where(*conditions).cte("found").prefix_with("MATERIALIZED")
        conditions = [col(Workflow.id).in_(select(found.c.id))]
    is_by_name = state is None and order is ActivityOrder.NAME
    ranked, terms = _rank_active(caller, conditions, since, order, is_ranked=not is_by_name)
    total = select(func.count()).select_from(Workflow).where(*conditions)
    totals = select(
        total.scalar_subquery().label("total"),
        *(func.sum(ranked.c[name]).label(name) for name in ("busy", *(one.value for one in WorkflowState))),
    ).subquery("totals")
    if is_by_name:
        ranks: Sequence[ColumnElement[Any]] = terms
        listed = select(col(Workflow.id), *ranks).where(*conditions)
    else:
        ranks = [ranked.c[term.name] for term in terms]
        is_shown = ranked.c["busy" if state is None else state.value] == literal_column("1")
        listed = select(ranked.c.id, *ranks).where(is_shown)
    is_descending = order is not ActivityOrder.NAME
    page = (
        listed.order_by(*_direct(ranks, is_descending=is_descending))
        .limit(part.limit)
        .offset(part.offset)
        .subquery("page")
    )
    return (
        select(totals, *workflow_rows.LISTED)
        .select_from(totals)
        .outerjoin(page, true())
        .outerjoin(Workflow, col(Workflow.id) == page.c.id)
        .order_by(*_direct([page.c[term.name] for term in terms], is_descending=is_descending))
    )


def quiet_statement(
    caller: ApiCaller, wanted: WorkflowFilter, part: PageBounds, since: datetime, order: ActivityOrder
) -> Select[*tuple[Any, ...]]:
    """Return the statement of a page of the matching workflows that are not busy, the latest change first.

    Busy are those with runs from `since` on, and, if `order` is `WORST`, those whose pods can't start. The statement
    follows the index of lists by the last change, in which rows are skipped without being read.
    """
    busy = [
        select(col(RunHour.workflow_id)).where(
            col(RunHour.organization_id) == caller.organization_id,
            col(RunHour.workflow_id) > ALL_WORKFLOWS,
            col(RunHour.starts_at) >= since,
        )
    ]
    if order is ActivityOrder.WORST:
        busy.append(
            select(col(Deployment.workflow_id)).where(
                col(Deployment.organization_id) == caller.organization_id, _CANNOT_START
            )
        )
    newest = (col(Workflow.updated_at).desc(), col(Workflow.id).desc())
    page = (
        select(col(Workflow.id))
        .where(*workflow_rows.list_conditions(caller, wanted), col(Workflow.id).not_in(union(*busy)))
        .order_by(*newest)
        .limit(part.limit)
        .offset(part.offset)
        .subquery("page")
    )
    return select(*workflow_rows.LISTED).join(page, page.c.id == col(Workflow.id)).order_by(*newest)


def _rank_active(
    caller: ApiCaller,
    conditions: Sequence[ColumnElement[bool]],
    since: datetime,
    order: ActivityOrder,
    *,
    is_ranked: bool,
) -> tuple[CTE, Sequence[Label[Any]]]:
    """Return a CTE of the workflows with runs or a deployment that meet conditions, and the terms of an order.

    Its columns are their ids, the terms if `is_ranked`, and 1 or 0 for `busy` and for each state. Busy workflows
    precede all others in the order: those with runs, and, if `order` is `WORST`, those whose pods can't start.
    """
    sums = _sum_recent_runs(caller, since)
    active = union(
        select(sums.c.workflow_id),
        select(col(Deployment.workflow_id)).where(
            col(Deployment.organization_id) == caller.organization_id, col(Deployment.is_deployed)
        ),
    )
    terms: Sequence[Label[Any]] = [
        term.label(f"rank_{number}") for number, term in enumerate(_list_order_terms(order, sums))
    ]
    has_runs = sums.c.workflow_id.is_not(None)
    is_busy = or_(has_runs, _CANNOT_START) if order is ActivityOrder.WORST else has_runs
    flags = {"busy": is_busy} | {one.value: _state_condition(one, sums) for one in WorkflowState}
    ranked = (
        select(
            col(Workflow.id),
            *(terms if is_ranked else ()),
            *(case((condition, 1), else_=0).label(name) for name, condition in flags.items()),
        )
        .select_from(Workflow)
        .outerjoin(sums, sums.c.workflow_id == col(Workflow.id))
        .outerjoin(Deployment, col(Deployment.workflow_id) == col(Workflow.id))
        .where(col(Workflow.id).in_(active), *conditions)
        .cte("ranked")
        # SQLite would compute it for the numbers, and again for the page.
        .prefix_with("MATERIALIZED")
    )
    return ranked, terms


def _direct(terms: Sequence[ColumnElement[Any]], *, is_descending: bool) -> Sequence[UnaryExpression[Any]]:
    """Return the terms of an ORDER BY in one direction."""
    return [term.desc() if is_descending else term.asc() for term in terms]


def _sum_recent_runs(caller: ApiCaller, since: datetime) -> CTE:
    """Return a CTE with the numbers of failed and unfinished runs by workflow, of the hours from `since` on.

    `accepted_at` and `failed_at` are the hours of the last run and of the last failed one, 0 without a failed one.
    Workflows of the caller's organization without runs are missing.
    """
    starts_at = col(RunHour.starts_at)
    return (
        select(
            col(RunHour.workflow_id).label("workflow_id"),
            func.max(case((col(RunHour.failed) > 0, starts_at), else_=0)).label("failed_at"),
            func.sum(col(RunHour.failed)).label("failed"),
            func.max(starts_at).label("accepted_at"),
            func.sum(_UNFINISHED).label("unfinished"),
        )
        .where(
            col(RunHour.organization_id) == caller.organization_id,
            col(RunHour.workflow_id) > ALL_WORKFLOWS,
            starts_at >= since,
        )
        .group_by(col(RunHour.workflow_id))
        .cte("sums")
    )


def _list_order_terms(order: ActivityOrder, sums: CTE) -> Sequence[SQLColumnExpression[Any]]:
    """Return the terms by which workflows with counts are sorted: by name, to be sorted ascending, else descending."""
    last_run = func.coalesce(sums.c.accepted_at, 0)
    newest: Sequence[SQLColumnExpression[Any]] = (col(Workflow.updated_at), col(Workflow.id))
    if order is ActivityOrder.NAME:
        return func.lower(col(Workflow.name)), col(Workflow.id)
    if order is ActivityOrder.LAST_RUN:
        return last_run, *newest
    return (
        case((_CANNOT_START, 1), else_=0),
        func.coalesce(sums.c.failed_at, 0),
        func.coalesce(sums.c.failed, 0),
        case((sums.c.unfinished > 0, 1), else_=0),
        last_run,
        *newest,
    )


def _state_condition(state: WorkflowState, sums: CTE) -> ColumnElement[bool]:
    """Return the SQL condition of workflows in a state; it may be NULL instead of false."""
    match state:
        case WorkflowState.FAILING:
            return or_(sums.c.failed > 0, _CANNOT_START)
        case WorkflowState.UNFINISHED:
            return sums.c.unfinished > 0
        case WorkflowState.AWAKE:
            serving = [one.value for one in SERVING_STATES]
            return and_(col(Deployment.is_deployed), col(Deployment.observed).in_(serving))
        case WorkflowState.ASLEEP:
            is_down = col(Deployment.observed) == ObservedState.STOPPED.value
            return and_(col(Deployment.is_deployed), col(Deployment.replicas) == 0, is_down, ~_FAILED_START)


_UNFINISHED = (
    col(RunHour.accepted)
    - col(RunHour.completed)
    - col(RunHour.failed)
    - col(RunHour.stopped)
    - col(RunHour.cancelled)
)
_FAILED_START = func.coalesce(col(Deployment.stopped_reason), "") == StoppedReason.FAILED.value
_CANNOT_START = and_(
    col(Deployment.is_deployed),
    or_(
        col(Deployment.observed).in_((ObservedState.FAILED.value, ObservedState.OUTDATED.value)),
        _FAILED_START,
    ),
)


class CountedHour(msgspec.Struct, array_like=True):
    """Counts of a workflow's runs within one hour, in the order of `hours_statement`."""

    starts_at: int
    """Begin of the hour, in microseconds."""
    accepted: int
    completed: int
    failed: int
    stopped: int
    cancelled: int
    run_times: dict[str, int]


async def _read_hours(
    connection: AsyncConnection, organization_id: str, workflow_ids: Sequence[str], since: datetime
) -> Mapping[str, Sequence[CountedHour]]:
    """Return the counts of each hour with runs in the 24 hours from `since` on, in no order, by workflow id.

    Workflows without runs in that time are absent.
    """
    rows = await connection.execute(hours_statement(organization_id, workflow_ids, since))
    return {row.workflow_id: _decode_hours(f"[{row.hours}]") for row in rows}


def hours_statement(
    organization_id: str, workflow_ids: Sequence[str], since: datetime
) -> Select[*tuple[Any, ...]]:
    """Return the statement of the counts of workflows of 24 hours: one row with JSON arrays of each workflow.

    A row of each hour would take far longer to fetch than to read: a page has 1,200.
    """
    numbers = (
        type_coerce(col(RunHour.starts_at), BigInteger),
        *(col(RunHour.accepted), col(RunHour.completed), col(RunHour.failed)),
        *(col(RunHour.stopped), col(RunHour.cancelled)),
    )
    array: ColumnElement[str] = literal_column("'['", Text)
    for number in numbers:
        array = array.concat(cast(number, Text)).concat(literal_column("','", Text))
    array = array.concat(type_coerce(col(RunHour.run_times), Text)).concat(literal_column("']'", Text))
    return (
        select(
            col(RunHour.workflow_id),
            func.aggregate_strings(array, ",").label("hours"),
        )
        .where(
            col(RunHour.organization_id) == organization_id,
            col(RunHour.workflow_id).in_(workflow_ids),
            col(RunHour.starts_at) >= since,
            # A process whose clock is ahead counts runs of the next hour already.
            col(RunHour.starts_at) < since + run_hours.HOURS * run_hours.HOUR,
        )
        .group_by(col(RunHour.workflow_id))
    )


async def _read_triggers(
    connection: AsyncConnection, workflow_ids: Sequence[str]
) -> Mapping[str, Sequence[TriggerKind]]:
    """Return the kinds of triggers of workflows by id, in the order of `TriggerKind`; workflows without any are
    absent.
    """
    statement = (
        select(col(WorkflowTrigger.workflow_id), col(WorkflowTrigger.kind))
        .where(col(WorkflowTrigger.workflow_id).in_(workflow_ids))
        .distinct()
    )
    found: dict[str, list[TriggerKind]] = {}
    for row in await connection.execute(statement):
        found.setdefault(row.workflow_id, []).append(TriggerKind(row.kind))
    order = list(TriggerKind)
    return {workflow_id: sorted(kinds, key=order.index) for workflow_id, kinds in found.items()}


async def _read_deployments(
    connection: AsyncConnection, workflow_ids: Sequence[str]
) -> Mapping[str, Deployment]:
    """Return the deployments of workflows by id; those that were never deployed are absent."""
    statement = select(Deployment).where(col(Deployment.workflow_id).in_(workflow_ids))
    rows = (await connection.execute(statement)).mappings()
    return {row["workflow_id"]: build_row(Deployment, row) for row in rows}


async def _read_newest_runs(
    connection: AsyncConnection, workflow_ids: Sequence[str]
) -> Mapping[str, NewestRun]:
    """Return the newest run that is not private of each workflow, by workflow id; those without one are absent."""
    return {
        row.workflow_id: NewestRun(
            id=row.id,
            status=ExecutionStatus(row.status),
            created_at=instant(row.created_at),
            ended_at=optional_instant(row.ended_at),
        )
        for row in await connection.execute(newest_runs_statement(workflow_ids))
    }


def newest_runs_statement(workflow_ids: Sequence[str]) -> Select[*tuple[Any, ...]]:
    """Return the statement of the newest run that is not private of each workflow, by the index of lists."""
    newest = (
        select(col(ExecutionData.execution_id))
        .join(Execution, col(Execution.id) == col(ExecutionData.execution_id))
        .where(
            col(ExecutionData.workflow_id) == col(Workflow.id),
            col(Execution.is_private) == literal_column("false"),
        )
        .order_by(col(ExecutionData.created_at).desc())
        .limit(1)
        .correlate(Workflow)
        .scalar_subquery()
    )
    run = Execution.__table__.alias("run")  # type: ignore[attr-defined]  # SQLModel adds it
    return (
        select(
            col(Workflow.id).label("workflow_id"), run.c.id, run.c.status, run.c.created_at, run.c.ended_at
        )
        .join(run, run.c.id == newest)
        .where(col(Workflow.id).in_(workflow_ids))
    )


def _show_workflow(
    row: Listed,
    hours: Sequence[CountedHour],
    since: datetime,
    triggers: Sequence[TriggerKind],
    deployment: Deployment | None,
    newest_run: NewestRun | None,
    owner_name: str | None,
) -> WorkflowActivity:
    """Return a workflow as the list shows it."""
    status = status_of(deployment)
    is_failed = deployment is not None and status is DeploymentStatus.FAILED
    accepted, completed, failed = (
        sum(getattr(hour, name) for hour in hours) for name in ("accepted", "completed", "failed")
    )
    run_times = merge_histograms(hour.run_times for hour in hours)
    return WorkflowActivity(
        **workflow_shapes.summary_fields(row),
        owner_name=owner_name,
        triggers=triggers,
        deployment_status=status,
        reason=(deployment.observed_reason or deployment.failed_reason) if deployment and is_failed else None,
        newest_run=newest_run,
        accepted=accepted,
        unfinished=accepted - completed - failed - sum(hour.stopped + hour.cancelled for hour in hours),
        completed=completed,
        failed=failed,
        run_p50_ms=estimate_quantile(run_times, 50),
        run_p95_ms=estimate_quantile(run_times, 95),
        hours=_list_hours(hours, since),
    )


def _list_hours(hours: Sequence[CountedHour], since: datetime) -> Sequence[WorkflowHour]:
    """Return the counts of the 24 hours from `since` on, the earliest first, with zeros for hours without runs."""
    shown = [_NO_RUNS] * run_hours.HOURS
    first = to_microseconds(since)
    for hour in hours:
        number = (hour.starts_at - first) // run_hours.HOUR_MICROSECONDS
        shown[number] = WorkflowHour(hour.accepted, hour.failed)
    return shown


_NO_RUNS = WorkflowHour(0, 0)
_decode_hours = decoding.build_decoder(list[CountedHour]).decode
