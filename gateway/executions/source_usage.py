"""Endpoint about the use of a data source: nodes that name it, and how long these take and how often they fail."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from sqlalchemy import select
from sqlmodel import col

from engine.run_records import SpanStatus
from gateway.data_sources import data_source_rows
from gateway.data_sources.data_source_editing import find_readable
from gateway.executions.node_statistics import quantile
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant
from json_text import decoding
from models.access import KeyScope
from models.column_types import build_row
from models.deployment import Deployment, DeploymentStatus, status_of
from models.execution import Execution, ExecutionData, SpanRow
from models.execution_visibility import visibility_condition
from models.workflow import Workflow, WorkflowGraph

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.executions.execution_rows import Recorded
    from models.access import ApiCaller

HOURS: Final = 24
HOUR: Final = timedelta(hours=1)
WORKFLOWS: Final = 20
"""Workflows that are listed at most."""
RUNS: Final = 100
"""Newest runs of each workflow that are read."""
SPANS: Final = 1_000
"""Spans of each workflow that are read."""
_MILLISECOND: Final = timedelta(milliseconds=1)


class SourceNode(WireStruct):
    """Node with the data source in its config."""

    node_id: str
    label: str
    type: str


class SourceWorkflow(WireStruct):
    """Workflow with nodes that name the data source."""

    workflow_id: str
    name: str
    version: int
    """Newest stored version; the graph may have been edited since."""
    deployed_version: int | None
    """Version that its deployment runs; null for a workflow that is not deployed."""
    is_named_by_deployed: bool
    """Whether the deployed version names it, though the graph may not any more."""
    deployment_status: DeploymentStatus
    """Its pods take changed settings and secrets within two seconds, and need no restart."""
    nodes: Sequence[SourceNode]
    """Nodes of the graph; empty if the deployed version alone names it."""


class SourceModel(WireStruct):
    """Language model that gets its address and key from the data source."""

    model_id: str
    name: str


class SourceHour(WireStruct):
    """Ends of nodes that name the data source within one hour."""

    starts_at: Instant
    ended: int
    failed: int


class SourceFailure(WireStruct):
    """Last failure of a node that names the data source."""

    at: Instant
    workflow_id: str
    node_id: str
    execution_id: str | None
    """Null for a run that the caller may not see."""
    code: str
    message: str
    """Empty for a run that the caller may not see."""


class DataSourceUsage(WireStruct):
    """Use of a data source by workflows that the caller may read."""

    data_source_id: str
    workflows: Sequence[SourceWorkflow]
    """At most 20; their runs fail if the data source is deleted. Empty without the scope `workflows:read`."""
    models: Sequence[SourceModel]
    """At most 20. Empty without the scope `models:read`."""
    since: Instant
    """Begin of the statistics, at most 24 hours ago; later if a workflow has more runs than are read."""
    ended: int
    """Number of times that such a node completed or failed."""
    failed: int
    p50_ms: int | None
    p95_ms: int | None
    """Null if none has ended."""
    hours: Sequence[SourceHour]
    """The last 24 hours, the earliest first."""
    last_success_at: Instant | None
    """In the newest 100 runs of each workflow, also before `since`."""
    last_failure: SourceFailure | None
    """The same."""


class _SpansOfWorkflow(Struct, frozen=True):
    """Spans of the nodes of one workflow, and the time since which all are read."""

    workflow_id: str
    rows: Sequence[Recorded]
    since: datetime


async def show(request: GatewayRequest) -> JsonResponse:
    """Show the workflows and models that name a data source, and the failures and durations of their nodes in 24 hours.

    Of each workflow, the newest 100 runs count.
    """
    caller, now = request.caller, request.gateway.clock()
    earliest = now.replace(minute=0, second=0, microsecond=0) - (HOURS - 1) * HOUR
    async with request.gateway.database.read() as connection:
        stored = await find_readable(connection, request.requested_object)
        source_id = stored.source.id
        workflows = (
            await _list_workflows(connection, source_id, caller)
            if caller.has_scope(KeyScope.WORKFLOWS_READ)
            else []
        )
        models = (
            await data_source_rows.list_models(connection, source_id, caller, WORKFLOWS)
            if caller.has_scope(KeyScope.MODELS_READ)
            else []
        )
        found = [await _read_spans(connection, one, stored.source.shard, earliest) for one in workflows]
        failure = await _find_last_failure(connection, found, stored.source.shard, caller)
    shape = DataSourceUsage(
        data_source_id=source_id,
        workflows=workflows,
        models=[SourceModel(model_id=model_id, name=name) for model_id, name in models],
        since=instant(max((one.since for one in found), default=earliest)),
        last_failure=failure,
        **await asyncio.to_thread(_sum_up, found, earliest),
    )
    return JsonResponse(shape)


async def _list_workflows(
    connection: AsyncConnection, source_id: str, caller: ApiCaller
) -> Sequence[SourceWorkflow]:
    """Return up to 20 workflows that the caller may read and that name the data source, each with its deployment and
    the nodes that name the source.
    """
    names = dict(await data_source_rows.list_referring_workflows(connection, source_id, caller, WORKFLOWS))
    found = select(col(Workflow.id), col(Workflow.version)).where(col(Workflow.id).in_(names))
    versions = {row.id: row.version for row in await connection.execute(found)}
    naming = data_source_rows.select_referring_deployments(caller.organization_id, source_id)
    by_deployed = {
        row.workflow_id
        for row in await connection.execute(naming.where(col(Deployment.workflow_id).in_(names)))
    }
    statement = select(WorkflowGraph).where(col(WorkflowGraph.workflow_id).in_(names))
    graphs = {row["workflow_id"]: row["nodes"] for row in (await connection.execute(statement)).mappings()}
    deployed = select(Deployment).where(col(Deployment.workflow_id).in_(names))
    deployments = {
        row["workflow_id"]: build_row(Deployment, row)
        for row in (await connection.execute(deployed)).mappings()
    }
    return [
        SourceWorkflow(
            workflow_id=workflow_id,
            name=name,
            version=versions[workflow_id],
            deployed_version=_deployed_version(deployments.get(workflow_id)),
            is_named_by_deployed=workflow_id in by_deployed,
            deployment_status=status_of(deployments.get(workflow_id)),
            nodes=[
                SourceNode(node_id=node["id"], label=node.get("label") or node["id"], type=node["type"])
                for node in graphs.get(workflow_id, ())
                if _names_text(node.get("config"), source_id)
            ],
        )
        for workflow_id, name in names.items()
        if workflow_id in versions  # it was deleted between the two reads
    ]


def _deployed_version(deployment: Deployment | None) -> int | None:
    """Return the version that a deployment runs; None without one."""
    return deployment.version if deployment is not None and deployment.is_deployed else None


def _names_text(value: Any, text: str) -> bool:  # noqa: ANN401 - any JSON value
    """Return whether a JSON value is or contains a text, however deep; keys of objects don't count."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case dict() as fields:
                waiting.extend(fields.values())
            case list() as items:
                waiting.extend(items)
            case found if found == text:
                return True
    return False


async def _read_spans(
    connection: AsyncConnection, workflow: SourceWorkflow, shard: int, earliest: datetime
) -> _SpansOfWorkflow:
    """Return the ended spans of a workflow's nodes that name the data source, in its 100 newest runs, at most 1,000.

    The result says since when all of them are read, `earliest` or later. Errors are not read: they may be large.
    """
    newest = (
        select(col(ExecutionData.execution_id), col(ExecutionData.created_at))
        .where(col(ExecutionData.workflow_id) == workflow.workflow_id)
        .order_by(col(ExecutionData.created_at).desc(), col(ExecutionData.execution_id).desc())
        .limit(RUNS)
    )
    runs = (await connection.execute(newest)).all()
    started = {row.execution_id: row.created_at for row in runs}
    statement = (
        select(
            *(col(SpanRow.execution_id), col(SpanRow.node_id), col(SpanRow.iteration), col(SpanRow.status)),
            *(col(SpanRow.started_at), col(SpanRow.ended_at)),
        )
        .where(
            col(SpanRow.execution_id).in_(started),
            col(SpanRow.shard) == shard,
            col(SpanRow.node_id).in_([node.node_id for node in workflow.nodes]),
            col(SpanRow.status).in_((SpanStatus.COMPLETED.value, SpanStatus.FAILED.value)),
            col(SpanRow.reused_from).is_(None),
        )
        .order_by(col(SpanRow.execution_id).desc())
        .limit(SPANS)
    )
    rows = (await connection.execute(statement)).all()
    since = max(runs[-1].created_at, earliest) if len(runs) == RUNS else earliest
    if len(rows) == SPANS:
        since = max(since, started[rows[-1].execution_id])
    return _SpansOfWorkflow(workflow.workflow_id, rows, since)


async def _find_last_failure(
    connection: AsyncConnection, found: Sequence[_SpansOfWorkflow], shard: int, caller: ApiCaller
) -> SourceFailure | None:
    """Return the failure that ended last; its run and message are left out if the caller may not see the run.
    None without one.
    """
    failures = [
        (row.ended_at, of_workflow.workflow_id, row)
        for of_workflow in found
        for row in of_workflow.rows
        if row.status == SpanStatus.FAILED.value
    ]
    if not failures:
        return None
    at, workflow_id, row = max(failures, key=lambda one: one[:2])
    recorded = select(col(SpanRow.error)).where(
        col(SpanRow.execution_id) == row.execution_id,
        col(SpanRow.shard) == shard,
        col(SpanRow.node_id) == row.node_id,
        col(SpanRow.iteration) == row.iteration,
    )
    error: Mapping[str, Any] = decoding.decode(await connection.scalar(recorded) or "{}")
    visible = select(col(Execution.id)).where(
        col(Execution.id) == row.execution_id, visibility_condition(caller)
    )
    execution_id = await connection.scalar(visible)
    return SourceFailure(
        at=instant(at),
        workflow_id=workflow_id,
        node_id=row.node_id,
        execution_id=execution_id,
        code=str(error.get("code", "unknown")),
        message="" if execution_id is None else str(error.get("message", "")),
    )


def _sum_up(found: Sequence[_SpansOfWorkflow], earliest: datetime) -> dict[str, Any]:
    """Return counts, percentiles of durations and hours of the spans, as fields of the answer."""
    every = [row for of_workflow in found for row in of_workflow.rows]
    rows = [row for row in every if row.ended_at >= earliest]
    ended = Counter((row.ended_at - earliest) // HOUR for row in rows)
    failed = Counter(
        (row.ended_at - earliest) // HOUR for row in rows if row.status == SpanStatus.FAILED.value
    )
    durations = sorted(
        max((row.ended_at - row.started_at) // _MILLISECOND, 0) for row in rows if row.started_at is not None
    )
    succeeded = [row.ended_at for row in every if row.status == SpanStatus.COMPLETED.value]
    return {
        "ended": len(rows),
        "failed": failed.total(),
        "p50_ms": quantile(durations, 50),
        "p95_ms": quantile(durations, 95),
        "hours": [
            SourceHour(
                starts_at=instant(earliest + number * HOUR), ended=ended[number], failed=failed[number]
            )
            for number in range(HOURS)
        ],
        "last_success_at": instant(max(succeeded)) if succeeded else None,
    }
