"""Endpoint that lists the runs of a workflow that have failed in the same way as one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final

from msgspec import Meta
from sqlalchemy import select
from sqlmodel import col

from gateway.executions import execution_rows, execution_shapes
from gateway.executions.execution_shapes import ExecutionShape
from gateway.http import errors
from gateway.http.parameters import IntegerParameter
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant
from gateway.ingest import dead_letter_rows
from gateway.workflows import version_rows
from journal import failure_causes
from models.column_types import build_row
from models.execution import Execution
from models.execution_status import ExecutionStatus
from models.execution_visibility import visibility_condition
from models.timestamps import from_microseconds, to_microseconds

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.request import GatewayRequest
    from gateway.ingest.dead_letter_rows import LastFailure
    from models.access import ApiCaller

EXAMINED: Final = 500
"""Failed runs of the workflow that are read, those that ended last."""
SHOWN: Final = 50
LISTED: Final = IntegerParameter(
    "limit", "Maximum number of executions in the answer; all are counted.", SHOWN, minimum=1, maximum=SHOWN
)


class SameFailures(WireStruct):
    """Runs of a workflow that failed in the same node with the same code and kind of message."""

    execution_id: str
    node_id: str | None
    code: str
    count: int
    """Among the last 500 failed runs of the workflow, with this one; 0 unless this one has failed."""
    count_is_lower_bound: bool
    """Whether older failed runs were not read."""
    first_at: Instant | None
    """Acceptance of the oldest that was counted."""
    executions: Annotated[Sequence[ExecutionShape], Meta(max_length=SHOWN)]
    """Those that ended last, as in lists."""


async def index(request: GatewayRequest) -> JsonResponse:
    """List the executions of the workflow that have failed in the same way: same node, code and kind of message.

    Numbers, ids and quoted texts of a message do not count. The last 500 failed executions are compared.
    """
    caller, execution_id = request.caller, request.path_params["id"]
    async with request.gateway.database.read_snapshot() as connection:
        execution = await execution_rows.find_head(connection, execution_id, caller)
        if execution is None:
            raise errors.not_found("execution")
        failed: Sequence[LastFailure] = ()
        if execution.status == ExecutionStatus.FAILED:
            failed = await dead_letter_rows.list_last_failures(
                connection, caller, execution.workflow_id, EXAMINED
            )
        cause = failure_causes.describe_error(execution.workflow_id, execution.error)
        same = {
            error
            for error in {one.error for one in failed}
            if failure_causes.describe_stored(execution.workflow_id, error).fingerprint == cause.fingerprint
        }
        accepted = {one.id: one.created_at for one in failed if one.error in same}
        if failed and execution_id not in accepted:
            # It ended before those that were read.
            accepted[execution_id] = to_microseconds(execution.created_at)
        shown = await _read_summaries(connection, caller, [*accepted][: request.query[LISTED]])
    return JsonResponse(
        SameFailures(
            execution_id=execution_id,
            node_id=cause.node_id,
            code=cause.code,
            count=len(accepted),
            count_is_lower_bound=len(failed) == EXAMINED,
            first_at=instant(from_microseconds(min(accepted.values()))) if accepted else None,
            executions=shown,
        )
    )


async def _read_summaries(
    connection: AsyncConnection, caller: ApiCaller, execution_ids: Sequence[str]
) -> Sequence[ExecutionShape]:
    """Return executions as lists show them, in the order of the ids; those that the caller may not see are left out."""
    if not execution_ids:
        return ()
    statement = select(Execution).where(col(Execution.id).in_(execution_ids), visibility_condition(caller))
    found = {row["id"]: build_row(Execution, row) for row in (await connection.execute(statement)).mappings()}
    labels = await execution_rows.read_labels(connection, caller, execution_ids)
    versions = await version_rows.find_versions_of_runs(connection, caller.shard, execution_ids)
    return [
        execution_shapes.show_summary(found[one], labels.get(one, ()), versions.get(one))
        for one in execution_ids
        if one in found
    ]
