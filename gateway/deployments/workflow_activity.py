"""Endpoint of a list of workflows with their pods, newest runs and counts of 24 hours, the worst first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, case, func, literal_column, or_, select
from sqlmodel import col

from gateway.executions import run_statistics
from gateway.http.parameters import LIMIT, OFFSET, ChoiceParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from gateway.workflows import workflow_rows, workflow_shapes
from gateway.workflows.workflow_rows import WorkflowFilter
from gateway.workflows.workflow_shapes import WorkflowSummary
from gateway.workflows.workflows import SEARCH, STATUS, TAG
from journal import run_hours
from models import access_store
from models.column_types import build_row
from models.deployment import SERVING_STATES, Deployment, DeploymentStatus, ObservedState, status_of
from models.execution import Execution, ExecutionData
from models.execution_status import ExecutionStatus
from models.lifecycle_policy import StoppedReason
from models.run_hour import ALL_WORKFLOWS, RunHour
from models.workflow import Workflow
from models.workflow_triggers import TriggerKind, WorkflowTrigger

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import ColumnElement, Select, Subquery
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import Label, SQLColumnExpression

    from gateway.executions.run_statistics import CountedHour
    from gateway.http.parameters import PageBounds
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
    async with request.gateway.database.read() as connection:
        totals = (await connection.execute(states_statement(caller, wanted, since))).one()
        listed = page_statement(caller, wanted, part, since, state=state, order=order)
        rows = (await connection.execute(listed)).all()
        shown = [row.id for row in rows]
        hours = await run_statistics.read_hours(connection, caller.organization_id, shown, now)
        triggers = await _read_triggers(connection, shown)
        deployments = await _read_deployments(connection, shown)
        newest_runs = await _read_newest_runs(connection, shown)
        owners = {row.owner_id for row in rows}
        names = await access_store.read_user_names(connection, caller.organization_id, owners)
    count = totals.total if state is None else getattr(totals, state.value)
    workflows = [
        _show_workflow(
            row,
            hours[row.id],
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


def states_statement(caller: ApiCaller, wanted: WorkflowFilter, since: datetime) -> Select[*tuple[Any, ...]]:
    """Return the statement of the number of workflows in each state, by their counts from an hour on, and in total."""
    sums = _sum_hours(caller, since)
    return (
        select(
            func.count().label("total"),
            *(
                func.sum(case((_state_condition(one, sums), 1), else_=0)).label(one.value)
                for one in WorkflowState
            ),
        )
        .select_from(Workflow)
        .outerjoin(sums, sums.c.workflow_id == col(Workflow.id))
        .outerjoin(Deployment, col(Deployment.workflow_id) == col(Workflow.id))
        .where(*workflow_rows.list_conditions(caller, wanted))
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
    """Return the statement of a page of workflows in an order, by their counts from an hour on; in any state for None.

    Only ids are sorted, without the rest of their rows, and only as far as the page reaches: a number of each row
    would need all of them in order.
    """
    sums = _sum_hours(caller, since)
    terms: list[tuple[Label[Any], bool]] = [
        (term.label(f"rank_{number}"), is_descending)
        for number, (term, is_descending) in enumerate(_list_order_terms(order, sums))
    ]
    conditions = [*workflow_rows.list_conditions(caller, wanted)]
    if state is not None:
        conditions.append(_state_condition(state, sums))
    ranked = (
        select(col(Workflow.id), *(term for term, _ in terms))
        .outerjoin(sums, sums.c.workflow_id == col(Workflow.id))
        .outerjoin(Deployment, col(Deployment.workflow_id) == col(Workflow.id))
        .where(*conditions)
        .order_by(*(term.desc() if is_descending else term.asc() for term, is_descending in terms))
        .limit(part.limit)
        .offset(part.offset)
        .subquery()
    )
    ranks = [(ranked.c[term.name], is_descending) for term, is_descending in terms]
    return (
        select(*workflow_rows.LISTED)
        .join(ranked, ranked.c.id == col(Workflow.id))
        .order_by(*(rank.desc() if is_descending else rank.asc() for rank, is_descending in ranks))
    )


def _sum_hours(caller: ApiCaller, since: datetime) -> Subquery:
    """Return the counts of runs by workflow from an hour on."""
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
        .subquery()
    )


def _list_order_terms(
    order: ActivityOrder, sums: Subquery
) -> Sequence[tuple[SQLColumnExpression[Any], bool]]:
    """Return the terms by which workflows with the counts of their runs are sorted, and whether the greatest come
    first.
    """
    last_run = (func.coalesce(sums.c.accepted_at, 0), True)
    newest: Sequence[tuple[SQLColumnExpression[Any], bool]] = (
        (col(Workflow.updated_at), True),
        (col(Workflow.id), True),
    )
    if order is ActivityOrder.NAME:
        return (func.lower(col(Workflow.name)), False), (col(Workflow.id), False)
    if order is ActivityOrder.LAST_RUN:
        return last_run, *newest
    return (
        (case((_CANNOT_START, 1), else_=0), True),
        (func.coalesce(sums.c.failed_at, 0), True),
        (func.coalesce(sums.c.failed, 0), True),
        (case((sums.c.unfinished > 0, 1), else_=0), True),
        last_run,
        *newest,
    )


def _state_condition(state: WorkflowState, sums: Subquery) -> ColumnElement[bool]:
    """Return the condition of workflows in a state; it may be unknown instead of false."""
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
    """Return the newest run of workflows by id; those without a run are absent."""
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
    """Return the statement of the newest run of each workflow that is not private, by the index of lists."""
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
    hours: Sequence[CountedHour | None],
    triggers: Sequence[TriggerKind],
    deployment: Deployment | None,
    newest_run: NewestRun | None,
    owner_name: str | None,
) -> WorkflowActivity:
    """Return a workflow as the list shows it."""
    sums = run_statistics.sum_hours([hour for hour in hours if hour is not None])
    status = status_of(deployment)
    is_failed = deployment is not None and status is DeploymentStatus.FAILED
    return WorkflowActivity(
        **workflow_shapes.summary_fields(row),
        owner_name=owner_name,
        triggers=triggers,
        deployment_status=status,
        reason=(deployment.observed_reason or deployment.failed_reason) if deployment and is_failed else None,
        newest_run=newest_run,
        hours=[WorkflowHour(hour.accepted, hour.failed) if hour else WorkflowHour(0, 0) for hour in hours],
        **{name: sums[name] for name in _SUMMED},
    )


_SUMMED = ("accepted", "unfinished", "completed", "failed", "run_p50_ms", "run_p95_ms")
