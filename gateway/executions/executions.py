"""Executions: looked at, followed while they run, ended and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal

import structlog
from msgspec import UNSET, UnsetType

from engine.run_records import SpanStatus
from gateway.executions import execution_rows, execution_shapes, large_outputs, live_events, resume_runs
from gateway.executions.cancellation import ask_to_end
from gateway.executions.execution_rows import ExecutionFilter
from gateway.executions.execution_shapes import ExecutionShape, LogShape, SpanShape
from gateway.http import errors, idempotency, limits
from gateway.http.downloads import BlobDownload
from gateway.http.errors import ApiError
from gateway.http.parameters import (
    LIMIT,
    OFFSET,
    ChoicesParameter,
    IntegerParameter,
    TextParameter,
    TimeParameter,
    sorted_by,
)
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent, location
from gateway.http.wire import WireStruct
from journal.blobs.blob_storage import BlobLost, BlobOwner, BlobsUnavailable
from models import ids
from models.execution_status import ExecutionStatus

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection
    from starlette.types import ASGIApp

    from gateway.executions.large_outputs import ShownOutputs
    from journal.store import ExecutionKey

log = structlog.get_logger()

MAX_SEQUENCE: Final = 2**31 - 1
"""Sequence numbers are integers of four bytes."""
MAX_SEQUENCE_DIGITS: Final = 10


class LogLevel(StrEnum):
    """How much a line of a log matters."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Expansion(StrEnum):
    """What an answer shows besides what it shows anyway."""

    BLOBS = "blobs"


WORKFLOW_ID = TextParameter("workflow_id", "Only executions of this workflow.")
STATUS = ChoicesParameter("status", "Only executions in one of these states.", ExecutionStatus)
TRIGGER_TYPE = TextParameter("trigger_type", "Only executions that this kind of event set off.")
PARENT_ID = TextParameter("parent_id", "Only executions that were started by nodes of this one.")
SINCE = TimeParameter("since", "Only executions that were accepted at this time or later.")
UNTIL = TimeParameter("until", "Only executions that were accepted before this time.")
SORT = sorted_by(execution_rows.SORTABLE)
LISTED = (WORKFLOW_ID, STATUS, TRIGGER_TYPE, PARENT_ID, SINCE, UNTIL, LIMIT, OFFSET, SORT)
WAIT = IntegerParameter(
    "wait",
    "Seconds that the answer waits for the execution to end.",
    limits.WAIT_DEFAULT_SECONDS,
    minimum=0,
    maximum=limits.WAIT_SECONDS,
)
RECORDS = IntegerParameter(
    "limit", LIMIT.description, limits.RECORDS_DEFAULT, minimum=1, maximum=limits.RECORDS_MAX
)
NODE_ID = TextParameter("node_id", "Only spans of this node.")
SPAN_STATUS = ChoicesParameter("status", "Only spans in one of these states.", SpanStatus)
LEVEL = ChoicesParameter("level", "Only lines of one of these levels.", LogLevel)
EXPAND = ChoicesParameter(
    "expand",
    "`blobs`: show outputs and webhook bodies that are stored as blobs, up to"
    f" {limits.EXPANDED_BYTES:,} bytes in one answer.",
    Expansion,
)
SPANS = (NODE_ID, SPAN_STATUS, EXPAND, RECORDS, OFFSET)
LOGS = (LEVEL, RECORDS, OFFSET)


class ExecutionList(WireStruct):
    """A part of a list of executions; `count` tells how many there are in all."""

    count: int
    limit: int
    offset: int
    executions: Sequence[ExecutionShape]


class SpanList(WireStruct):
    """A part of a list of spans; `count` tells how many there are in all."""

    count: int
    limit: int
    offset: int
    spans: Sequence[SpanShape]


class LogList(WireStruct):
    """A part of a run's log; `count` tells how many lines it has in all."""

    count: int
    limit: int
    offset: int
    logs: Sequence[LogShape]


class StreamedEvent(WireStruct):
    """One server-sent event."""

    event: Literal["execution", "span", "log"]
    data: str
    """JSON: a `Span`, a `Log`, or where the execution is, as its progress has it but without outputs."""
    id: str | UnsetType = UNSET
    """For `Last-Event-ID`; only what is committed has one, and the end of the execution is called `end`."""


class EndRequestResult(WireStruct):
    """An execution that was asked to end, and the state that it is in now."""

    execution_id: str
    status: ExecutionStatus


class ResumeResult(WireStruct):
    """A new execution, and the failed one that it goes on from."""

    execution_id: str
    resumed_from: str


# ── looked at ───────────────────────────────────────────────────────────────────────────────────────────────


async def index(request: GatewayRequest) -> JsonResponse:
    """List the executions of the workflows that the caller may read."""
    query = request.query
    part, order = query.page(), query[SORT]
    wanted = ExecutionFilter(
        workflow_id=query[WORKFLOW_ID],
        statuses=query[STATUS],
        trigger_type=query[TRIGGER_TYPE],
        parent_id=query[PARENT_ID],
        since=query[SINCE],
        until=query[UNTIL],
    )
    async with request.gateway.database.read() as connection:
        count, found = await execution_rows.list_executions(connection, request.caller, wanted, part, order)
    shown = [execution_shapes.show_summary(one) for one in found]
    return JsonResponse(ExecutionList(count=count, limit=part.limit, offset=part.offset, executions=shown))


async def show(request: GatewayRequest) -> JsonResponse:
    """Show an execution with its trigger, config and outputs."""
    async with request.gateway.database.read() as connection:
        found = await execution_rows.find_execution(connection, request.path_params["id"], request.caller)
    if found is None:
        raise errors.not_found("execution")
    owner = BlobOwner(found.execution.organization_id, found.execution.key_id)
    large = frozenset(found.references)
    texts = [text for node_id, text in found.outputs if node_id in large]
    texts += large_outputs.trigger_references(found.data.trigger)
    outputs = await _outputs_shown(request, found.execution.id, owner, texts)
    return JsonResponse(execution_shapes.show_execution(found, outputs))


async def progress(request: GatewayRequest) -> JsonResponse:
    """Tell where an execution is: as soon as it has ended, or after `wait` seconds."""
    wait_seconds = request.query[WAIT]
    key = await _visible(request)
    found = await request.gateway.waiting.progress(key, wait_seconds)
    if found is None:
        raise errors.not_found("execution")
    outputs = request.gateway.large_outputs.explain(key.execution_id)
    return JsonResponse(execution_shapes.show_progress(found, outputs))


async def spans(request: GatewayRequest) -> JsonResponse:
    """List what each node of an execution was given, did and gave out."""
    query = request.query
    part = query.page(RECORDS)
    node_id, statuses = query[NODE_ID], query[SPAN_STATUS]
    key = await _visible(request)
    async with request.gateway.database.read() as connection:
        count, rows = await execution_rows.list_spans(
            connection, key, part, node_id=node_id, statuses=statuses
        )
    texts = [row.input for row in rows if row.input_is_reference]
    texts += [row.output for row in rows if row.output_is_reference]
    owner = await _owner(request, key) if texts else None
    outputs = await _outputs_shown(request, key.execution_id, owner, texts)
    shown = [execution_shapes.show_span(row, outputs) for row in rows]
    return JsonResponse(SpanList(count=count, limit=part.limit, offset=part.offset, spans=shown))


async def logs(request: GatewayRequest) -> JsonResponse:
    """List the lines that an execution's nodes have written to its log, the oldest first."""
    query = request.query
    part, levels = query.page(RECORDS), query[LEVEL]
    key = await _visible(request)
    async with request.gateway.database.read() as connection:
        count, rows = await execution_rows.list_logs(connection, key, part, levels=levels)
    shown = [execution_shapes.show_log(row) for row in rows]
    return JsonResponse(LogList(count=count, limit=part.limit, offset=part.offset, logs=shown))


async def events(request: GatewayRequest) -> ASGIApp:
    """Stream what is committed of an execution, as server-sent events.

    Each span and log line has an id: send the last one that you saw as `Last-Event-ID`, and the stream goes on from
    there. A client that has seen the end is told by 204 to stop asking.
    """
    last_seen = request.headers.get("last-event-id", "0")
    key = await _visible(request)
    if last_seen == live_events.END:
        return NoContent()
    if not (last_seen.isascii() and last_seen.isdecimal() and len(last_seen) <= MAX_SEQUENCE_DIGITS):
        message = "Last-Event-ID must be the id of an event of this stream"
        raise ApiError(400, "invalid-last-event-id", message)
    return request.gateway.live_events.stream(key, min(int(last_seen), MAX_SEQUENCE))


async def blob(request: GatewayRequest) -> BlobDownload:
    """Give out a content that is kept for an execution: what the value `{"$blob": …}` stands for.

    The kind of content is that of the value; browsers are told to save it and not to show it.
    """
    key = await _visible(request)
    owner = await _owner(request, key)
    try:
        return await BlobDownload.of(request.gateway.blobs, owner, request.path_params["sha256"])
    except BlobLost as error:
        raise errors.not_found("blob") from error
    except BlobsUnavailable as error:
        raise errors.not_ready("The blob storage does not answer: try again") from error


# ── ended and resumed ───────────────────────────────────────────────────────────────────────────────────────


async def stop(request: GatewayRequest) -> JsonResponse:
    """Let what has begun finish, and start nothing more; of an execution that has ended, nothing changes."""
    return await _ask_to_end(request, "stop")


async def cancel(request: GatewayRequest) -> JsonResponse:
    """Break off what has begun; of an execution that has ended, nothing changes."""
    return await _ask_to_end(request, "cancel")


async def _ask_to_end(request: GatewayRequest, wish: str) -> JsonResponse:
    key = await _visible(request)
    requested = await ask_to_end(request.gateway, key, wish)
    if requested is None:
        raise errors.not_found("execution")
    log.info("execution asked to end", execution_id=key.execution_id, request=wish, status=requested.status)
    return JsonResponse(
        EndRequestResult(execution_id=key.execution_id, status=ExecutionStatus(requested.status))
    )


async def resume(request: GatewayRequest) -> JsonResponse:
    """Begin a new execution from what a failed one has committed.

    It is resumed once: after that, resume the newest execution that goes on from it, which `details` names.
    """
    caller, gateway = request.caller, request.gateway
    failed = await _visible(request)
    idempotency_key = idempotency.requested_key(request, None, workflow_id=failed.execution_id)
    new_id, now = ids.new_id("exec"), gateway.clock()

    async def insert(connection: AsyncConnection) -> tuple[str, str | None]:
        if idempotency_key is not None:
            bound = await idempotency.reserve_key(
                connection, idempotency_key, shard=failed.shard, resource_id=new_id, now=now
            )
            if bound != new_id:
                return bound, None
        return new_id, await resume_runs.resume_execution(connection, failed, new_id, caller)

    begun_id, concurrency_key = await gateway.database.transaction(insert)
    headers = location(gateway.settings, begun_id)
    resumed = ResumeResult(execution_id=begun_id, resumed_from=failed.execution_id)
    if begun_id != new_id:
        return JsonResponse(resumed, status=201, headers={**headers, **idempotency.REPLAYED})
    gateway.access.allow(new_id, caller)
    gateway.acceptances.follow(concurrency_key)
    log.info("execution resumed", execution_id=new_id, resumed_from=failed.execution_id)
    return JsonResponse(resumed, status=201, headers=headers)


# ── what they share ─────────────────────────────────────────────────────────────────────────────────────────


async def _owner(request: GatewayRequest, key: ExecutionKey) -> BlobOwner:
    """Return under whose name the contents of an execution are kept; raises 404."""
    async with request.gateway.database.read() as connection:
        owner = await execution_rows.blob_owner(connection, key)
    if owner is None:
        raise errors.not_found("execution")
    return owner


async def _outputs_shown(
    request: GatewayRequest, execution_id: str, owner: BlobOwner | None, references: Sequence[str]
) -> ShownOutputs:
    """Return the view of an execution's outputs that the query asks for."""
    shown = request.gateway.large_outputs
    if owner is None or not references or Expansion.BLOBS not in request.query[EXPAND]:
        return shown.explain(execution_id)
    return await shown.expand(execution_id, owner, references)


async def _visible(request: GatewayRequest) -> ExecutionKey:
    """Return where the rows of the execution of the path are; raises 404 unless the caller may see it."""
    return await request.gateway.access.key(request.path_params["id"], request.caller)
