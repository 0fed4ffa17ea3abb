"""Endpoints of executions: list, show, follow, stop, cancel and resume them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal

import structlog
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from concurrency import offload
from engine.run_records import LogLevel
from gateway.executions import (
    agent_step_rows,
    execution_pages,
    execution_rows,
    execution_shapes,
    large_outputs,
    live_events,
    live_hints,
    resume_runs,
    run_labels,
    span_details,
)
from gateway.executions.agent_step_rows import StepFilter
from gateway.executions.cancellation import request_end_of_run
from gateway.executions.execution_rows import ExecutionFilter, ShownSpanStatus
from gateway.executions.execution_shapes import (
    ExecutionShape,
    LogShape,
    SpanShape,
    StepQuestions,
    StepShape,
)
from gateway.executions.live_hints import HintTopics
from gateway.executions.run_labels import MetadataParameter
from gateway.http import errors, idempotency, keyset, limits
from gateway.http.downloads import BlobDownload
from gateway.http.errors import ApiError
from gateway.http.keyset import AFTER, KeysetPage
from gateway.http.operation_docs import EVENT_STREAM, JSON
from gateway.http.parameters import (
    LIMIT,
    OFFSET,
    ChoicesParameter,
    FlagParameter,
    IntegerParameter,
    TextParameter,
    TimeParameter,
    sorted_by,
)
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent, location
from gateway.http.wire import StrictWire, WireStruct, body_of, read_json
from gateway.workflows import version_rows
from journal.blobs.blob_storage import BlobLost, BlobOwner, BlobsUnavailable
from journal.explanations.blockers import BlockerCode
from models import ids
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from telemetry import tracing

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection
    from starlette.types import ASGIApp

    from engine.values import Json
    from gateway.executions.execution_rows import Recorded
    from gateway.executions.large_outputs import ShownOutputs
    from gateway.executions.live_events import EventSource
    from gateway.workflows.version_rows import VersionOfRun
    from journal.store import ExecutionKey
    from models.execution import Execution

log = structlog.get_logger()

LIVE_STATUSES: Final = (ExecutionStatus.PENDING, ExecutionStatus.RUNNING, ExecutionStatus.WAITING)
MAX_SEQUENCE: Final = 2**31 - 1
"""Sequence numbers are 4-byte integers."""
MAX_SEQUENCE_DIGITS: Final = 10


class Expansion(StrEnum):
    """Optional part of an answer."""

    BLOBS = "blobs"


WORKFLOW_ID = TextParameter("workflow_id", "Only executions of this workflow.")
STATUS = ChoicesParameter("status", "Only executions in one of these states.", ExecutionStatus)
REASON = ChoicesParameter(
    "reason",
    "Only unfinished executions that wait for one of these reasons now, as `GET /why` counts them: without private"
    " ones.",
    BlockerCode,
)
TRIGGER_TYPE = TextParameter("trigger_type", "Only executions with this type of trigger.")
PARENT_ID = TextParameter("parent_id", "Only executions that a node of this execution has started.")
SINCE = TimeParameter("since", "Only executions accepted at this time or later.")
UNTIL = TimeParameter("until", "Only executions accepted before this time.")
SORT = sorted_by(execution_rows.SORTABLE)
TAG = TextParameter("tag", "Only executions with this tag.")
METADATA = MetadataParameter()
LISTED = (
    *(WORKFLOW_ID, STATUS, REASON, TRIGGER_TYPE, PARENT_ID, SINCE, UNTIL, TAG, METADATA),
    *(LIMIT, OFFSET, AFTER, SORT),
)
WAIT = IntegerParameter(
    "wait",
    "Seconds for which the answer waits for the end of the execution.",
    limits.WAIT_DEFAULT_SECONDS,
    minimum=0,
    maximum=limits.WAIT_SECONDS,
)
RECORDS = IntegerParameter(
    "limit", LIMIT.description, limits.RECORDS_DEFAULT, minimum=1, maximum=limits.RECORDS_MAX
)
NODE_ID = TextParameter("node_id", "Only spans of this node.")
SPAN_STATUS = ChoicesParameter("status", "Only spans in one of these states.", ShownSpanStatus)
LEVEL = ChoicesParameter("level", "Only lines of one of these levels.", LogLevel)
EXPAND = ChoicesParameter(
    "expand",
    "`blobs`: show outputs and webhook bodies that are stored as blobs, up to"
    f" {limits.EXPANDED_BYTES:,} bytes in one answer.",
    Expansion,
)
SUMMARY = FlagParameter("summary", "Leave out `config`, `outputs` and the data of the trigger, as in lists.")
TOPICS = TextParameter(
    "topics",
    "Topics, separated by commas: `executions`, `deliveries`, `execution:` and an id, or, for one execution, `texts:`"
    " and its id, which adds the texts of its models to its hints.",
)
ITERATION = TextParameter(
    "iteration", "Iteration of a loop, such as `3`; the path then has the id of the node.", max_length=200
)
SPANS = (NODE_ID, SPAN_STATUS, EXPAND, RECORDS, OFFSET)
FOLLOW = FlagParameter(
    "follow",
    "Answer with server-sent events: the records so far, then each further one, until the execution has ended. The"
    " header `Accept: text/event-stream` has the same meaning, unless JSON is accepted too.",
)
LOGS = (LEVEL, FOLLOW, RECORDS, OFFSET)
STEPS_OF = TextParameter("node_id", "Only steps of this agent.")
ITERATION_OF_STEPS = TextParameter(
    "iteration", "Only steps in this iteration of a loop, such as `3`.", max_length=200
)
STEPS = (STEPS_OF, ITERATION_OF_STEPS, FOLLOW, RECORDS, OFFSET)


class ExecutionList(KeysetPage, kw_only=True):
    """Page of a list of executions; `count` is the total, with `after` up to 10,000."""

    count: int
    limit: int
    offset: int
    executions: Sequence[ExecutionShape]


class SpanList(WireStruct):
    """Page of a list of spans; `count` is the total."""

    count: int
    limit: int
    offset: int
    spans: Sequence[SpanShape]


class LogList(WireStruct):
    """Page of a run's log; `count` is the total."""

    count: int
    limit: int
    offset: int
    logs: Sequence[LogShape]


class StepList(WireStruct):
    """Page of the steps of a run's agents; `count` is the total."""

    count: int
    limit: int
    offset: int
    steps: Sequence[StepShape]


class StreamedEvent(WireStruct):
    """Server-sent event."""

    event: Literal["execution", "span", "log", "step", "token", "retry"]
    data: str
    """JSON: a `Span`, `Log` or `Step`, the progress of the execution without its outputs, or a text of a model."""
    id: str | UnsetType = UNSET
    """Value for `Last-Event-ID`; only committed records have one. The end of the execution has the id `end`.
    """


class StreamedHint(WireStruct):
    """Server-sent event of the stream of hints."""

    event: Literal["hint", "resync", "token", "retry"]
    data: str
    """JSON. Of a hint: `topic`, `id` of the changed object (empty for a list), and `version`, which differs after a
    change. Of `token` and `retry`: as in the stream of steps.
    """


class EndRequestResult(WireStruct):
    """Execution with a stop or cancel request, and its current status."""

    execution_id: str
    status: ExecutionStatus


class ResumeRequest(StrictWire):
    """Body of a resume, which may be absent."""

    fresh: bool = False
    """Agents without a result begin new conversations, in which their tools may do again what they have done."""


class ResumeResult(WireStruct):
    """New execution, and the failed one that it resumes."""

    execution_id: str
    resumed_from: str


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────


async def index(request: GatewayRequest) -> JsonResponse:
    """List the executions of the workflows that the caller may read.

    With `after`, one request examines 10,000 executions for filters that no index has, so that a page may be
    shorter than `limit`, or empty, although another follows.
    """
    query = request.query
    part, order = query.page(), query[SORT]
    wanted = ExecutionFilter(
        organization_id=request.caller.organization_id,
        workflow_id=query[WORKFLOW_ID],
        statuses=query[STATUS],
        trigger_type=query[TRIGGER_TYPE],
        parent_id=query[PARENT_ID],
        since=query[SINCE],
        until=query[UNTIL],
        labels=run_labels.filter_labels(query[TAG], query[METADATA]),
    )
    bounds = keyset.read_bounds(query, SORT)
    async with request.gateway.database.read() as connection:
        if query[REASON]:
            wanted = await _add_reason(connection, wanted, query[REASON])
        if bounds is None:
            page = await execution_rows.list_executions(connection, request.caller, wanted, part, order)
        else:
            page = await execution_pages.list_page(connection, request.caller, wanted, bounds)
        listed = [one.id for one in page.items]
        labels = await execution_rows.read_labels(connection, request.caller, listed)
        versions = await version_rows.find_versions_of_runs(connection, request.caller.shard, listed)
    return JsonResponse(
        ExecutionList(
            count=page.count,
            count_is_lower_bound=page.is_lower_bound,
            limit=part.limit,
            offset=part.offset,
            next=page.next_cursor,
            executions=[
                execution_shapes.show_summary(one, labels.get(one.id, ()), versions.get(one.id))
                for one in page.items
            ],
        )
    )


async def _add_reason(
    connection: AsyncConnection, wanted: ExecutionFilter, codes: Sequence[BlockerCode]
) -> ExecutionFilter:
    """Return a filter restricted to unfinished runs that wait now for a reason in `codes`.

    A filter for statuses of ended runs alone then matches no run, and none is examined.
    """
    # Loaded with the first such list: other starts of a gateway do without it.
    from journal.explanations import reason_conditions  # noqa: PLC0415 - see above

    unfinished = [one for one in LIVE_STATUSES if not wanted.statuses or one in wanted.statuses]
    condition = await reason_conditions.build_condition(
        connection, wanted.organization_id, codes if unfinished else ()
    )
    return replace(wanted, condition=condition, statuses=unfinished or LIVE_STATUSES)


async def show(request: GatewayRequest) -> JsonResponse:
    """Show an execution with its trigger, config and outputs.

    Large outputs are explained; with `expand=blobs` they are shown, up to a limit.
    """
    async with request.gateway.database.read() as connection:
        if request.query[SUMMARY]:
            return await _show_summary(connection, request)
        found = await execution_rows.find_execution(connection, request.path_params["id"], request.caller)
        if found is None:
            raise errors.not_found("execution")
        version = await version_rows.find_version_of_run(connection, found.execution)
        successors = await _find_successors(connection, request, found.execution)
    owner = BlobOwner(found.execution.organization_id, found.execution.key_id)
    large = frozenset(found.references)
    texts = [text for node_id, text in found.outputs if node_id in large]
    texts += large_outputs.trigger_references(found.data.trigger)
    outputs = await _select_view(request, found.execution.id, owner, texts)
    shown = execution_shapes.show_execution(found, outputs, version)
    return JsonResponse(_add_own_fields(shown, found.execution, version, successors, request))


async def _show_summary(connection: AsyncConnection, request: GatewayRequest) -> JsonResponse:
    """Return the execution of the path without its large fields; raises a 404 error unless the caller may see it."""
    execution_id, caller = request.path_params["id"], request.caller
    execution = await execution_rows.find_head(connection, execution_id, caller)
    if execution is None:
        raise errors.not_found("execution")
    labels = await execution_rows.read_labels(connection, caller, [execution_id])
    version = await version_rows.find_version_of_run(connection, execution)
    shown = execution_shapes.show_summary(execution, labels.get(execution_id, ()), version.number)
    successors = await _find_successors(connection, request, execution)
    return JsonResponse(_add_own_fields(shown, execution, version, successors, request))


async def _find_successors(
    connection: AsyncConnection, request: GatewayRequest, execution: Execution
) -> Sequence[Recorded]:
    """Return the rows of the executions that resume or replay an ended execution; empty for one that has not ended."""
    if execution.status not in TERMINAL_STATUSES:
        return ()
    return await execution_rows.find_successors(connection, request.caller, execution)


def _add_own_fields(
    shown: ExecutionShape,
    execution: Execution,
    version: VersionOfRun,
    successors: Sequence[Recorded],
    request: GatewayRequest,
) -> ExecutionShape:
    """Set the fields of a shown execution that lists omit: successors, base version, attempt, lease and
    trace; return it.
    """
    if successors:
        shown.successors = execution_shapes.show_successors(successors, execution.id)
    if version.base is not None:
        shown.base_version = version.base
    shown.attempt, shown.lease = execution.attempt, execution_shapes.show_lease(execution)
    template = request.gateway.settings.trace_url
    page = tracing.find_trace_page(template, execution.id, execution.trace_origin)
    if page is not None:
        shown.trace_url = page
    return shown


async def progress(request: GatewayRequest) -> JsonResponse:
    """Show the progress of an execution: when it has ended, or after `wait` seconds at the latest."""
    wait_seconds = request.query[WAIT]
    key = await _find_key(request)
    found = await request.gateway.waiting.wait_for_progress(key, request.caller, wait_seconds)
    if found is None:
        raise errors.not_found("execution")
    outputs = request.gateway.large_outputs.explain(key.execution_id)
    return JsonResponse(execution_shapes.show_progress(found, outputs))


async def spans(request: GatewayRequest) -> JsonResponse:
    """List the spans of an execution, with the input, output and error of each node."""
    query = request.query
    part = query.page(RECORDS)
    node_id, statuses = query[NODE_ID], query[SPAN_STATUS]
    key = await _find_key(request)
    async with request.gateway.database.read() as connection:
        count, rows = await execution_rows.list_spans(
            connection, key, part, node_id=node_id, statuses=statuses
        )
    texts = [row.input for row in rows if row.input_is_reference]
    texts += [row.output for row in rows if row.output_is_reference]
    owner = await _find_owner(request, key) if texts else None
    outputs = await _select_view(request, key.execution_id, owner, texts)
    shown = [execution_shapes.show_span(row, outputs) for row in rows]
    return JsonResponse(SpanList(count=count, limit=part.limit, offset=part.offset, spans=shown))


async def span(request: GatewayRequest) -> JsonResponse:
    """Show a span: input, rendered config, output, log, attempts, hashes, and the duration in the run before."""
    gateway, key = request.gateway, await _find_key(request)
    async with gateway.database.read() as connection:
        found = await span_details.read_span(
            connection, key, request.path_params["sub"], request.query[ITERATION] or ""
        )
    if found is None:
        raise errors.not_found("span")
    one = found.span
    texts = [one.input] if one.input_is_reference else []
    texts += [one.output] if one.output_is_reference else []
    owner = await _find_owner(request, key) if texts else None
    outputs = await _select_view(request, key.execution_id, owner, texts)
    config = await offload.run(span_details.show_config, found, gateway.catalog)
    questions = StepQuestions(gateway.settings.public_url, key.execution_id, found.questions)
    return JsonResponse(execution_shapes.show_span_details(found, config, outputs, questions))


async def logs(request: GatewayRequest) -> JsonResponse | ASGIApp:
    """List the log lines of an execution, the oldest first, or follow them.

    With `follow=true` each line is an event with an id: send the last one as `Last-Event-ID`, and the stream
    continues behind it. The end of the execution has the id `end`; a client that sends it gets 204.
    """
    query = request.query
    part, levels = query.page(RECORDS), query[LEVEL]
    if _wants_events(request):
        return await _follow(request, live_events.LogLineSource(frozenset(levels)))
    key = await _find_key(request)
    async with request.gateway.database.read() as connection:
        count, rows = await execution_rows.list_logs(connection, key, part, levels=levels)
    shown = [execution_shapes.show_log(row) for row in rows]
    return JsonResponse(LogList(count=count, limit=part.limit, offset=part.offset, logs=shown))


async def steps(request: GatewayRequest) -> JsonResponse | ASGIApp:
    """List the steps of the agents of an execution by node, iteration and number, or follow them.

    With `follow=true` each state of a step is an event `step` with an id: send the last one as `Last-Event-ID`, and the
    stream continues behind it. The end of the execution has the id `end`; a client that sends it gets 204. Events
    `token` add `text` at `offset` to the answer that a model is writing, of any node; `retry` says that this text is
    dropped, since its call has failed or its worker was lost. Neither has an id, and neither is sent again: a new
    stream begins with the texts that are being written then.
    """
    query = request.query
    part, wanted = query.page(RECORDS), StepFilter(query[STEPS_OF], query[ITERATION_OF_STEPS])
    if _wants_events(request):
        return await _follow(
            request, live_events.AgentStepSource(wanted, request.gateway.settings.public_url)
        )
    key = await _find_key(request)
    async with request.gateway.database.read() as connection:
        count, found = await agent_step_rows.list_steps(connection, key, wanted, part)
        nodes = await agent_step_rows.read_questions(connection, key, found)
    questions = StepQuestions(request.gateway.settings.public_url, key.execution_id, nodes)
    shown = [execution_shapes.show_step(step, questions) for step in found]
    return JsonResponse(StepList(count=count, limit=part.limit, offset=part.offset, steps=shown))


async def events(request: GatewayRequest) -> ASGIApp:
    """Stream the committed spans, log lines and progress of an execution as server-sent events.

    Each span and log line has an id: send the last one as `Last-Event-ID`, and the stream continues behind
    it. A client that sends the id `end` gets 204, which ends its reconnections.
    """
    return await _follow(request, live_events.RunRecordSource(request.gateway.large_outputs))


def _wants_events(request: GatewayRequest) -> bool:
    """Return whether a list is requested as a stream: by `follow`, or by an `Accept` of events without JSON."""
    accepted = request.headers.get("accept", "")
    return request.query[FOLLOW] or (EVENT_STREAM in accepted and JSON not in accepted)


async def _follow(request: GatewayRequest, source: EventSource) -> ASGIApp:
    """Return the event stream of the records of a source, such as log lines or steps, of the path's execution.

    `Last-Event-ID` is the number after which it begins; `end` is answered with 204. Raises a 400 error for an invalid
    `Last-Event-ID`, 404, and 503 if too many streams are open.
    """
    last_seen = request.headers.get("last-event-id", "0")
    key = await _find_key(request)
    if last_seen == live_events.END:
        return NoContent()
    if not (last_seen.isascii() and last_seen.isdecimal() and len(last_seen) <= MAX_SEQUENCE_DIGITS):
        message = "Last-Event-ID must be the id of an event of this stream"
        raise ApiError(400, "invalid-last-event-id", message)
    return request.gateway.live_events.stream(key, request.caller, min(int(last_seen), MAX_SEQUENCE), source)


async def blob(request: GatewayRequest) -> BlobDownload:
    """Download a blob of an execution, named by the hash in `{"$blob": …}`.

    The content type is that of the reference; browsers save the file and never show it.
    """
    key = await _find_key(request)
    owner = await _find_owner(request, key)
    try:
        return await BlobDownload.of(request.gateway.blobs, owner, request.path_params["sha256"])
    except BlobLost as error:
        raise errors.not_found("blob") from error
    except BlobsUnavailable as error:
        raise errors.not_ready("The blob storage does not answer: try again") from error


# ── cancellation and resume ─────────────────────────────────────────────────────────────────────────────────


async def live(request: GatewayRequest) -> ASGIApp:
    """Stream hints that runs or deliveries have changed, as server-sent events; ask the other routes what has changed.

    After `resync`, hints were dropped: load everything again. A comment is sent every 15 seconds. The topic `texts:`
    adds the events `token` and `retry` of one run, as `GET /executions/{id}/steps?follow=true` has them. Topics that
    only name ended runs are answered with 204.
    """
    topics = [topic for topic in (request.query[TOPICS] or "").split(",") if topic]
    if not topics or len(topics) > limits.LIVE_TOPICS:
        text = f"topics must name 1 to {limits.LIVE_TOPICS} topics, separated by commas"
        raise errors.invalid_query(TOPICS.name, "invalid-value", text)
    asked = await _find_topics(request, topics)
    if not asked.lists and await request.gateway.live_hints.have_ended(asked.runs):
        return NoContent()
    return request.gateway.live_hints.stream(request.caller, asked)


async def _find_topics(request: GatewayRequest, topics: Sequence[str]) -> HintTopics:
    """Return the runs and lists that the topics of a stream name.

    Raises a 400 error for an unknown topic, and for texts of several runs; 404 for a run that the caller may not see.
    """
    runs: list[ExecutionKey] = []
    texts: list[ExecutionKey] = []
    for topic in topics:
        if topic.startswith((live_hints.EXECUTION, live_hints.TEXTS)):
            runs.append(await request.gateway.access.find_key(topic.partition(":")[2], request.caller))
            texts += runs[-1:] if topic.startswith(live_hints.TEXTS) else []
        elif topic not in live_hints.LISTS:
            text = "topics must be executions, deliveries, execution: or texts: with an id"
            raise errors.invalid_query(TOPICS.name, "invalid-value", text)
    if len(texts) > 1:
        # Their events name nodes, and no run.
        raise errors.invalid_query(TOPICS.name, "invalid-value", "topics may name the texts of one run")
    return HintTopics(runs, live_hints.LISTS.intersection(topics), texts[0] if texts else None)


async def stop(request: GatewayRequest) -> JsonResponse:
    """Stop an execution: running nodes finish, and no other node starts. An ended execution does not change."""
    return await _ask_to_end(request, "stop")


async def cancel(request: GatewayRequest) -> JsonResponse:
    """Cancel an execution: running nodes are interrupted. An ended execution does not change."""
    return await _ask_to_end(request, "cancel")


async def _ask_to_end(request: GatewayRequest, action: str) -> JsonResponse:
    """Request the end of the path's execution by `stop` or `cancel`, and return its status at once, without a wait for
    the end.

    Raises a 404 error unless the caller may see it; an ended one does not change.
    """
    key = await _find_key(request)
    requested = await request_end_of_run(request.gateway.store, request.gateway.broker, key, action)
    if requested is None:
        raise errors.not_found("execution")
    log.info(
        "execution end requested", execution_id=key.execution_id, request=action, status=requested.status
    )
    return JsonResponse(
        EndRequestResult(execution_id=key.execution_id, status=ExecutionStatus(requested.status))
    )


async def resume(request: GatewayRequest) -> JsonResponse:
    """Resume a failed execution: start a new one from its committed results.

    An execution is resumed once. After that, a 409 error names in `details` the newest execution that continues it, to
    be resumed instead. The definition is that of the failed execution: to run the mended workflow, or to see a plan
    first, replay it. Agents continue behind their last steps, or begin new conversations with `fresh`.
    """
    value = await read_json(request)
    _refuse_fields_of_replays(value)
    is_fresh = body_of(request, value, ResumeRequest).fresh
    caller, gateway = request.caller, request.gateway
    failed = await _find_key(request)
    fingerprinted: Json = {"fresh": True} if is_fresh else None
    idempotency_key = request.idempotency_key(fingerprinted, workflow_id=failed.execution_id)
    new_id, now = ids.new_id("exec"), gateway.clock()

    async def insert(connection: AsyncConnection) -> tuple[str, str | None]:
        if idempotency_key is not None:
            bound = await idempotency.reserve_key(
                connection, idempotency_key, shard=failed.shard, resource_id=new_id, now=now
            )
            if bound != new_id:
                return bound, None
        concurrency_key = await resume_runs.resume_execution(
            connection, failed, new_id, caller, now, keeps_conversations=not is_fresh
        )
        return new_id, concurrency_key

    begun_id, concurrency_key = await gateway.database.transaction(insert)
    headers = location(gateway.settings, begun_id)
    resumed = ResumeResult(execution_id=begun_id, resumed_from=failed.execution_id)
    if begun_id != new_id:
        return JsonResponse(resumed, status=201, headers={**headers, **idempotency.REPLAYED})
    gateway.access.allow(new_id, caller)
    gateway.acceptances.dispatch(concurrency_key)
    log.info("execution resumed", execution_id=new_id, resumed_from=failed.execution_id)
    return JsonResponse(resumed, status=201, headers=headers)


def _refuse_fields_of_replays(body: Json) -> None:
    """Raise a 422 error for every field but `fresh` in the body of a resume, and for a body that is no object; the
    message refers to the replay, which has most of these fields.
    """
    if body is None or (isinstance(body, dict) and body.keys() <= {"fresh"}):
        return
    names = [name for name in body if name != "fresh"] if isinstance(body, dict) else ["body"]
    hint = (
        "a resume takes `fresh` alone, since it continues the failed run as it was; to choose its definition, its"
        " input, or the nodes that run again, send them with POST /api/v1/executions/{id}/replay"
    )
    raise errors.invalid(
        [
            errors.problem(name[:64], "unknown-field", f"{name[:64]}: {hint}")
            for name in names[: limits.FINDINGS]
        ]
    )


# ── shared helpers ──────────────────────────────────────────────────────────────────────────────────────────


async def _find_owner(request: GatewayRequest, key: ExecutionKey) -> BlobOwner:
    """Return the owner of the blobs of an execution; raises a 404 error if the execution is gone."""
    async with request.gateway.database.read() as connection:
        owner = await execution_rows.find_blob_owner(connection, key)
    if owner is None:
        raise errors.not_found("execution")
    return owner


async def _select_view(
    request: GatewayRequest, execution_id: str, owner: BlobOwner | None, references: Sequence[str]
) -> ShownOutputs:
    """Return the view of an execution's outputs that the query selects: large ones explained, or with `expand=blobs`
    shown.

    `references` are the texts of the references to the large ones that are shown, `owner` is None without any. Raises a
    503 error if the blob storage does not answer.
    """
    shown = request.gateway.large_outputs
    if owner is None or not references or Expansion.BLOBS not in request.query[EXPAND]:
        return shown.explain(execution_id)
    return await shown.expand(execution_id, owner, references)


async def _find_key(request: GatewayRequest) -> ExecutionKey:
    """Return the key of the execution in the path; raises a 404 error unless the caller may see it."""
    return await request.gateway.access.find_key(request.path_params["id"], request.caller)
