"""Task workers: claims by long poll, reports, input and output of tasks, and the end of a worker."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from msgspec import Meta, Raw, field

from concurrency import offload
from engine import values
from engine.run_limits import RunLimits
from engine.values import InvalidJson
from gateway.http import errors, limits
from gateway.http.errors import ApiError
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent
from gateway.http.wire import Instant, StrictWire, WireStruct, decode_body, instant
from gateway.tasks.worker_presence import WorkerDescription
from journal.tasks.task_items import Completion, Failure, Heartbeat, LogLines, Release, WorkerReport
from journal.tasks.task_moves import ReportStatus
from journal.tasks.task_polls import TaskPoll
from journal.tasks.task_transaction import LogText
from models import timestamps
from models.errors import DatabaseUnavailable
from models.task_states import HELD_STATES
from telemetry import tracing

if TYPE_CHECKING:
    from gateway.tasks.held_polls import HeldPollResponse
    from gateway.tasks.large_task_inputs import HeldTask
    from gateway.tasks.parked_polls import PollAnswer
    from journal.tasks.task_items import ItemKind, ItemResult
    from journal.tasks.task_polls import ClaimedTask
    from models.access import ApiCaller
    from models.database import Database

BLOB: Final = "$blob"
LEASE_HEADER: Final = "x-task-lease"
MAX_WAIT_SECONDS: Final = 300
MAX_SILENT_SECONDS: Final = 60
"""Longest wait of a poll without heartbeats, which clients of earlier versions don't expect."""
NEVER: Final = 2**62
"""Time after all others, in microseconds: the time of the report replaces it."""
JITTER: Final = 0.2
"""Share by which the wait of a poll is longer or shorter, so that workers don't poll in step."""
MAX_PROGRESS_BYTES: Final = 4_096
MAX_CHECKPOINT_BYTES: Final = 65_536
MAX_LOG_CHARACTERS: Final = 1_000_000
MAX_OUTPUT_BYTES: Final = RunLimits.max_output_bytes
"""Largest output that a run may have; the setting of its executor may be smaller."""
_CODE: Final = re.compile(r"[^a-z0-9]+")

WorkerId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="an id of 1 to 64 characters")]
TaskText = Annotated[str, Meta(max_length=64)]
LeaseText = Annotated[str, Meta(max_length=100)]


class WorkerInput(StrictWire):
    """Worker process; each start of a process has an id of its own."""

    id: WorkerId
    name: Annotated[str, Meta(max_length=200)] = ""
    sdk: Annotated[str, Meta(max_length=64)] = ""


class ServedType(StrictWire):
    """Node type that a worker performs: tasks of this version and of older ones with the same major version."""

    type: Annotated[str, Meta(max_length=limits.NODE_TYPE_LENGTH)]
    version: Annotated[
        str, Meta(pattern=r"^\d{1,6}\.\d{1,6}\.\d{1,6}$", description="three numbers, such as 1.2.0")
    ]


class ClaimTasks(StrictWire):
    """Poll for tasks; `max: 0` only waits for cancellations."""

    worker: WorkerInput
    request_id: WorkerId
    """Id of this poll. Send a poll without an answer again with the same id: it gets the same tasks."""
    types: Annotated[list[ServedType], Meta(max_length=limits.NODE_TYPES)] = field(default_factory=list)
    pools: Annotated[list[TaskText], Meta(max_length=20)] = field(default_factory=lambda: ["default"])
    max: Annotated[int, Meta(ge=0, le=10_000)] = 1
    """Free slots of the worker; an answer has at most 100 tasks."""
    wait: Annotated[float, Meta(ge=0, le=MAX_WAIT_SECONDS)] = 30
    """Seconds, changed by up to a fifth. The answer to a wait over 60 begins with a space every 25 seconds."""


class TaskAssignment(WireStruct):
    """Task for a worker, under a lease."""

    id: str
    lease: str
    """Proof that this worker holds the task, for reports."""
    lease_seconds: float
    """Report within this time. The first report must come within 10 seconds after the claim."""
    deadline: Instant
    timeout_seconds: float
    """From the claim to `deadline`, for workers whose clocks differ from that of the database."""
    type: str
    version: str
    attempt: int
    execution_id: str
    node_id: str
    idempotency_key: str
    """The same in all attempts, for writes to other systems."""
    config: Any
    input: Any
    """`{"$blob": {"bytes": …}}` for a large input: read it with GET `/tasks/{id}/input`."""
    checkpoint: Any
    """Last checkpoint of an earlier attempt, or null."""
    traceparent: str | None = None
    """Span of the node, as the parent of the worker's spans; null without traces."""


class ClaimedTasks(WireStruct):
    """Answer to a poll."""

    tasks: Sequence[TaskAssignment]
    cancel: Sequence[str]
    """Ids of tasks that the worker should stop."""
    drain: bool
    """True if an operator has asked the worker to stop."""


class RetryDelay(StrictWire):
    """Delay before the next attempt."""

    after_seconds: Annotated[float, Meta(ge=0, le=86_400)]


class TaskFault(StrictWire):
    """Error of a task."""

    code: str = "task-failed"
    message: str = ""


class LogLineInput(StrictWire):
    """Line for the log of the run."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    at: datetime | None = None
    """By default the time of the report."""
    message: str = ""


class ReportItem(StrictWire):
    """News of one task: `kind` says which other fields it has."""

    id: TaskText
    lease: LeaseText
    kind: Literal["heartbeat", "complete", "fail", "release", "log"]
    progress: Any = None
    """`heartbeat`: any JSON up to 4 kB, such as `{done, total, message}`."""
    checkpoint: Any = None
    """`heartbeat`: state for the next attempt, up to 64 kB."""
    port: Annotated[str, Meta(max_length=limits.LABEL_LENGTH)] = "output"
    output: Any = None
    """`complete`: the output, or `{"$blob": {}}` if it was sent with PUT `/tasks/{id}/output`."""
    error: TaskFault | None = None
    """`fail`: code and message."""
    retry: bool | RetryDelay | None = None
    """`fail`: false for a final failure, or a delay in place of that of the node type."""
    lines: Annotated[list[LogLineInput], Meta(max_length=10_000)] = field(default_factory=list)
    """`log`: up to 1,000,000 characters."""


class HeldAttemptInput(StrictWire):
    """Attempt that a worker holds: a task under the lease of its claim."""

    id: TaskText
    lease: LeaseText


class ReportTasks(StrictWire):
    """Report of a worker: the attempts that it holds, and news of them."""

    worker: WorkerId
    claimed: WorkerId | None = None
    """`requestId` of the last poll whose answer has arrived: unreported tasks of it that are not held are free."""
    held: Annotated[list[TaskText | HeldAttemptInput], Meta(max_length=10_000)] = field(default_factory=list)
    """Every attempt until its final report is answered; their leases are renewed. Workers of earlier versions
    send ids of tasks.
    """
    items: Annotated[list[ReportItem], Meta(max_length=1_000)] = field(default_factory=list)


class ItemError(WireStruct):
    """Reason of a refused item."""

    code: str
    message: str


class ReportResult(WireStruct):
    """Result of one item, or of a held attempt that the worker has lost."""

    id: str
    lease: str | None
    """Null for a task that `held` names without its lease."""
    status: ReportStatus
    error: ItemError | None


class ReportResults(WireStruct):
    """Results in the order of the items; held attempts that are lost or cancelled follow."""

    results: Sequence[ReportResult]


class StopWorker(StrictWire):
    """Worker that takes no more tasks."""

    worker: WorkerId


class StoppedWorker(WireStruct):
    """Worker that gets no more tasks."""

    worker: str
    stopped: Literal[True] = True


# ── claims ──────────────────────────────────────────────────────────────────────────────────────────────────


async def claim(request: GatewayRequest) -> JsonResponse | HeldPollResponse:
    """Claim tasks of executions that the key's user may see, or wait until there are any. The answer also has
    cancellations.

    A claimed task has a lease of 10 seconds until a report names it. The same `requestId` gives the same tasks.
    With `wait` over 60, the answer begins after 25 seconds: with status 200, and spaces before its JSON.
    """
    from gateway.tasks.held_polls import LOST_SECONDS, HeldPollResponse  # noqa: PLC0415 - loaded with the first worker

    body = await decode_body(request, ClaimTasks)
    caller = request.caller
    _require_allowed(caller, body.types)
    poll = TaskPoll(
        organization_id=caller.organization_id,
        worker_id=body.worker.id,
        request_id=body.request_id,
        limit=body.max,
        versions={one.type: one.version for one in body.types},
        pools=frozenset(body.pools),
        viewer=None if caller.is_admin else caller,
    )
    worker = WorkerDescription(
        organization_id=caller.organization_id,
        shard=caller.shard,
        id=body.worker.id,
        name=body.worker.name,
        sdk=body.worker.sdk,
        key_id=caller.key_id,
        user_id=caller.user_id,
        is_limited=poll.viewer is not None,
        types=[{"type": one.type, "version": one.version} for one in body.types],
        pools=body.pools,
    )
    seconds = body.wait * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - no secret
    hub = request.gateway.task_hub

    async def encode(answer: PollAnswer) -> JsonResponse:
        return _answer(answer, await _find_traceparents(request.gateway.database, answer))

    if body.wait <= MAX_SILENT_SECONDS:
        return await encode(await hub.wait(poll, worker, seconds, request.call_on_disconnect))
    held = await hub.hold(poll, worker, seconds, request.call_on_disconnect)
    answer = await held.wait_first()
    if answer is not None:
        return await encode(answer)
    request.release_body()
    request.bound_silence(LOST_SECONDS)
    return HeldPollResponse(held, encode)


async def _find_traceparents(database: Database, answer: PollAnswer) -> Mapping[str, str]:
    """Return the trace contexts of claimed tasks by their ids; empty in a process without traces, and while
    the database is away: the tasks are claimed, and must arrive.
    """
    if tracing.tracer is None:
        return {}
    from gateway.tasks import task_traces  # noqa: PLC0415 - loaded where traces are exported

    try:
        return await task_traces.find_traceparents(database, tracing.tracer, [one.id for one in answer.tasks])
    except DatabaseUnavailable:
        return {}


def _require_allowed(caller: ApiCaller, types: Sequence[ServedType]) -> None:
    """Raise a 403 error for a node type that the key may not perform; a key without a list performs all."""
    allowed = caller.node_types
    if allowed is None:
        return
    refused = [one.type for one in types if not is_allowed_type(one.type, allowed)]
    if refused:
        raise ApiError(
            403,
            "node-type-not-allowed",
            f"The key performs only {', '.join(allowed)}, not {refused[0]}",
            details=[
                errors.problem("types", "node-type-not-allowed", one) for one in refused[: limits.FINDINGS]
            ],
        )


def is_allowed_type(name: str, allowed: Sequence[str]) -> bool:
    """Return whether a list of node types, which may have namespaces such as `acme/*`, includes this type."""
    namespace = name.partition("/")[0]
    return any(one in {name, f"{namespace}/*"} for one in allowed)


def _answer(answer: PollAnswer, traceparents: Mapping[str, str]) -> JsonResponse:
    """Return the answer to a claim: its tasks with their trace contexts, cancellations, and whether the
    worker has to drain.
    """
    return JsonResponse(
        ClaimedTasks(
            tasks=[_shown(task, traceparents.get(task.id)) for task in answer.tasks],
            cancel=answer.cancelling,
            drain=answer.is_draining or answer.is_stopped,
        )
    )


def _shown(task: ClaimedTask, traceparent: str | None) -> TaskAssignment:
    """Return a claimed task as workers get it; an input that is too large for the answer is replaced by its size."""
    given: Any = {BLOB: {"bytes": task.input_bytes}} if task.input is None else Raw(task.input.encode())
    return TaskAssignment(
        id=task.id,
        lease=task.lease,
        lease_seconds=task.lease_microseconds / 1_000_000,
        deadline=instant(timestamps.from_microseconds(task.deadline_at)),
        timeout_seconds=(task.deadline_at - task.claimed_at) / 1_000_000,
        type=task.type,
        version=task.version,
        attempt=task.attempt,
        execution_id=task.execution_id,
        node_id=task.node_id,
        idempotency_key=task.key,
        config=Raw(task.config.encode()),
        input=given,
        checkpoint=None if task.checkpoint is None else Raw(task.checkpoint.encode()),
        traceparent=traceparent,
    )


# ── reports ─────────────────────────────────────────────────────────────────────────────────────────────────


async def report(request: GatewayRequest) -> JsonResponse:
    """Report progress and ends of tasks, and renew the leases of those held; each item has a result of its own.

    `repeated`: the same report was stored before. `lost`: another worker may perform the task. `cancelled`: its
    run has no use for it. `refused`: `error` says why.
    """
    body = await decode_body(request, ReportTasks)
    caller = request.caller
    await request.gateway.task_hub.presence.require_own(caller.organization_id, body.worker, caller.key_id)
    items: list[ItemKind] = []
    refused: dict[int, ItemError] = {}
    for number, one in enumerate(body.items):
        made = await offload.run(_item, one)
        if isinstance(made, ItemError):
            refused[number] = made
        else:
            items.append(made)
    held = [(one, None) if isinstance(one, str) else (one.id, one.lease) for one in body.held]
    results = await request.gateway.task_hub.report(
        WorkerReport(caller.organization_id, body.worker, body.claimed, held, items)
    )
    return JsonResponse(ReportResults(results=_merge(body, results, refused)))


def _merge(
    body: ReportTasks, results: Sequence[ItemResult], refused: dict[int, ItemError]
) -> list[ReportResult]:
    """Return the results of all items in their order, then those of held attempts that are lost or canceled.

    `refused` holds refused items by their index; `results` are those of the others.
    """
    stored = iter(results)
    merged = [
        ReportResult(id=one.id, lease=one.lease, status=ReportStatus.REFUSED, error=refused[number])
        if number in refused
        else _result(next(stored))
        for number, one in enumerate(body.items)
    ]
    return [*merged, *map(_result, stored)]


def _result(one: ItemResult) -> ReportResult:
    """Return the result of an item of a report in the form of the API."""
    error = None if one.code is None else ItemError(code=one.code, message=one.message or "")
    return ReportResult(id=one.id, lease=one.lease, status=one.status, error=error)


def _item(one: ReportItem) -> ItemKind | ItemError:
    """Return the item of a report in its stored form, or the error with which it is refused."""
    try:
        match one.kind:
            case "heartbeat":
                return _heartbeat(one)
            case "complete":
                return _completion(one)
            case "fail":
                return _failure(one)
            case "release":
                return Release(one.id, one.lease)
            case "log":
                return _log_lines(one)
    except InvalidJson as error:
        return ItemError(code=error.code, message=error.message)


def _heartbeat(one: ReportItem) -> ItemKind | ItemError:
    """Return a heartbeat with progress (up to 4 kB) and checkpoint (up to 64 kB) as JSON, or an error for
    larger ones.
    """
    progress = None if one.progress is None else values.encode_json(one.progress)
    checkpoint = None if one.checkpoint is None else values.encode_json(one.checkpoint)
    if progress is not None and len(progress) > MAX_PROGRESS_BYTES:
        return ItemError(
            code="progress-too-large", message=f"Progress is at most {MAX_PROGRESS_BYTES:,} bytes"
        )
    if checkpoint is not None and len(checkpoint) > MAX_CHECKPOINT_BYTES:
        message = f"A checkpoint is at most {MAX_CHECKPOINT_BYTES:,} bytes"
        return ItemError(code="checkpoint-too-large", message=message)
    return Heartbeat(one.id, one.lease, _text(progress), _text(checkpoint))


def _text(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode()


def _completion(one: ReportItem) -> ItemKind:
    """Return the completion of a task; an output over the maximum becomes a final failure `result-too-large`.

    `{"$blob": ...}` stands for an output that was uploaded before.
    """
    if isinstance(one.output, dict) and one.output.keys() == {BLOB}:
        return Completion(one.id, one.lease, one.port, is_uploaded=True)
    output = values.encode_json(one.output)
    if len(output) > MAX_OUTPUT_BYTES:
        message = f"The output is larger than the maximum of {MAX_OUTPUT_BYTES:,} bytes"
        return Failure(one.id, one.lease, "result-too-large", message, is_final=True, is_refusal=True)
    return Completion(one.id, one.lease, one.port, output)


def _failure(one: ReportItem) -> ItemKind:
    """Return the failure of a task, with its code in lower case with hyphens, and a delay of its retry in
    microseconds if given.
    """
    fault = one.error or TaskFault()
    code = _CODE.sub("-", fault.code.lower()).strip("-")[:64] or "task-failed"
    delay = round(one.retry.after_seconds * 1_000_000) if isinstance(one.retry, RetryDelay) else None
    return Failure(one.id, one.lease, code, fault.message, is_final=one.retry is False, delay=delay)


def _log_lines(one: ReportItem) -> ItemKind | ItemError:
    """Return log lines, or an error for over 1,000,000 characters together."""
    if sum(len(line.message) for line in one.lines) > MAX_LOG_CHARACTERS:
        message = f"The lines of one item have at most {MAX_LOG_CHARACTERS:,} characters"
        return ItemError(code="log-too-large", message=message)
    return LogLines(one.id, one.lease, [_line(line) for line in one.lines])


def _line(line: LogLineInput) -> LogText:
    """Return a log line in its stored form; a time without zone is UTC, and a missing one `NEVER`, in place of which
    the time of the report is stored.
    """
    if line.at is None:
        return LogText(line.level, line.message, NEVER)
    moment = line.at if line.at.tzinfo else line.at.replace(tzinfo=UTC)
    return LogText(line.level, line.message, timestamps.to_microseconds(moment))


# ── large values ────────────────────────────────────────────────────────────────────────────────────────────


async def show_input(request: GatewayRequest) -> JsonResponse:
    """Return the input of a task that this worker holds, for inputs that are too large for a claim."""
    from gateway.tasks import large_task_inputs  # noqa: PLC0415 - loaded with the first large input

    task = await _held_task(request)
    if task.input is not None:
        return JsonResponse(Raw(task.input.encode()))
    return JsonResponse(
        Raw(await large_task_inputs.read(request.gateway.database, request.gateway.blobs, task))
    )


async def store_output(request: GatewayRequest) -> NoContent:
    """Send the output of a task that this worker holds, as JSON, before the report that completes it.

    That report has `"output": {"$blob": {}}`.
    """
    task = await _held_task(request)
    raw = await request.body()
    try:
        output = await offload.run(_normalized, raw or b"null")
    except InvalidJson as error:
        raise ApiError(400, "malformed-json", error.message) from error
    if len(output) > MAX_OUTPUT_BYTES:
        raise errors.too_large(MAX_OUTPUT_BYTES, "PILOTFLAME_MAX_OUTPUT_BYTES")
    reports = request.gateway.task_hub.tasks.reports
    if not await reports.upload(request.caller.organization_id, task.id, _lease(request), output):
        raise errors.conflict("lease-lost", "The worker no longer holds this task")
    return NoContent()


def _normalized(raw: bytes) -> bytes:
    """Return JSON in the form in which outputs are stored; raises `InvalidJson`."""
    return values.encode_json(values.decode_json(raw))


def _lease(request: GatewayRequest) -> str:
    return request.headers.get(LEASE_HEADER, "")


async def _held_task(request: GatewayRequest) -> HeldTask:
    """Return the task of the path under the lease of the request's header.

    Raises a 404 error for an unknown one, and 409 `lease-lost` unless the worker holds it.
    """
    from gateway.tasks import large_task_inputs  # noqa: PLC0415 - loaded with the first large input

    task = await large_task_inputs.find_task(
        request.gateway.database, request.caller.organization_id, request.path_params["id"]
    )
    if task is None:
        raise errors.not_found("task")
    if task.state not in HELD_STATES or task.lease != _lease(request) or not task.lease or not task.worker_id:
        raise errors.conflict("lease-lost", "The worker no longer holds this task")
    presence, caller = request.gateway.task_hub.presence, request.caller
    await presence.require_own(caller.organization_id, task.worker_id, caller.key_id)
    return task


async def stop(request: GatewayRequest) -> JsonResponse:
    """Store that a worker takes no more tasks; its open polls end without any. It may still report. An unknown worker
    is ignored.
    """
    body = await decode_body(request, StopWorker)
    hub, caller = request.gateway.task_hub, request.caller
    await hub.presence.require_own(caller.organization_id, body.worker, caller.key_id)
    await hub.stop(caller.organization_id, body.worker)
    return JsonResponse(StoppedWorker(worker=body.worker))
