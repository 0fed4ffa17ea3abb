"""Trigger: run a deployed workflow in its pods, and start them for it if they are stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from enum import StrEnum
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Struct
from sqlalchemy import select
from sqlmodel import col
from starlette.requests import ClientDisconnect

from concurrency import offload
from engine.triggers import trigger_output
from engine.values import encode_json
from gateway.deployments.activation import BadNews, PodUnavailable, StartBlockage, StartFailure
from gateway.executions import acceptance, awaited_end, run_labels
from gateway.executions.acceptance import RunRequest
from gateway.http import errors, limits, text_rules
from gateway.http.errors import ApiError
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import GuardedWire, WireStruct, body_of, read_json
from journal import run_outputs
from journal.run_outputs import OutputsTooLarge
from journal.store import AcceptanceVerdict, DefinitionKey, ExecutionKey
from models.deployment import is_ready
from models.execution import Execution
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from models.lifecycle_policy import StartRefusal
from models.workflow import WorkflowStatus
from telemetry import instruments, tracing

if TYPE_CHECKING:
    from gateway.executions.awaited_end import OutcomeShape
    from journal.definition_snapshot import LoadedWorkflow
    from journal.store import AcceptanceResult, RunProgressReport

Answer = TypeVar("Answer")

API: Final = "api"


class TriggerRequest(GuardedWire):
    """Inputs of a run, and whether to wait for its end."""

    trigger_type: Annotated[str, text_rules.describe_length(limits.TRIGGER_TYPE_LENGTH, min_length=1)] = (
        msgspec.field(default=API, name="trigger_type")
    )
    """Label by which executions can be filtered."""
    inputs: dict[str, Any] | None = None
    trigger_inputs: dict[str, Any] | None = None
    """Alias of `inputs`."""
    sync: bool = False
    """Wait for the end of the run, not just until a pod has taken it."""
    tags: run_labels.Tags | None = None
    """Tags by which lists find the run."""
    metadata: run_labels.Metadata | None = None
    """Metadata by which lists find the run, as in `?metadata.order=7`."""


class TriggerStatus(StrEnum):
    """Status of a triggered run at the time of the answer."""

    STARTED = "started"
    """A pod has taken it."""
    COMPLETED = "completed"
    FAILED = "failed"
    """With `sync`, also a stopped or canceled run."""
    STOPPED = "stopped"
    """With `Prefer: wait` only."""
    CANCELLED = "cancelled"
    """With `Prefer: wait` only."""
    RUNNING = "running"
    """The run is still running at the end of the wait."""
    PENDING = "pending"
    """No pod has taken the run by the end of the wait; it runs as soon as a pod takes it."""


class TriggerResult(WireStruct):
    """Run of a deployed workflow."""

    status: TriggerStatus
    execution_id: str = msgspec.field(name="execution_id")
    workflow_id: str = msgspec.field(name="workflow_id")
    output: Mapping[str, msgspec.Raw] = {}
    """Outputs of the leaf nodes by node ID; empty before the end."""
    error: msgspec.Raw | None = None
    """Error of a failed run."""
    outputs: Mapping[str, msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET
    """With `Prefer: wait` after the end: outputs of all nodes by node id, as in `progress`."""
    outputs_omitted: bool | msgspec.UnsetType = msgspec.UNSET
    """`true` if `outputs` would have more than 1,000,000 characters: read them at the execution."""


class TriggerTimings(Struct):
    """Durations of a request in seconds, and whether its deployment had to start."""

    began: float
    accepted: float = 0.0
    taken: float | None = None
    """None if the run was not taken in time."""
    is_cold: bool = False
    definition_hash: str = ""
    """Hash of the deployed definition."""

    def headers(self) -> dict[str, str]:
        """Return the headers `Server-Timing`, with milliseconds for acceptance, wake and run, and `X-Cold-Start`."""
        now = perf_counter()
        taken = now if self.taken is None else self.taken
        parts = {"accept": self.accepted - self.began, "wake": taken - self.accepted, "run": now - taken}
        shown = ", ".join(f"{name};dur={seconds * 1_000:.1f}" for name, seconds in parts.items())
        return {"Server-Timing": shown, "X-Cold-Start": str(self.is_cold).lower()}


async def start(request: GatewayRequest) -> JsonResponse:
    """Run a deployed workflow in its pods; stopped pods are started first if the lifecycle policy allows it.

    The request is answered when a pod has taken the run, after 30 seconds at the latest. With `sync` it is
    answered when the run has ended, after 5 minutes at the latest, including the start of a pod. With
    `Prefer: wait=N` and without `sync`, a run that ends within N seconds is answered with its outputs. The run
    continues when that time is over, and when the client disconnects.
    """
    times = TriggerTimings(perf_counter())
    workflow_id = request.path_params["id"]
    value = await read_json(request)
    body = _check_body(body_of(request, value, TriggerRequest))
    idempotency_key = await offload.run(request.idempotency_key, value, workflow_id=workflow_id)

    async def plan(workflow: LoadedWorkflow) -> RunRequest:
        return await _plan_run(request, workflow, body, times)

    if body.sync and tracing.tracer is not None:
        tracing.mark_awaited()
    preference = None if body.sync else awaited_end.read_preference(request.headers, request.caller)
    with request.gateway.activation.count_waiting(workflow_id):
        accepted = await request.gateway.workflow_runs.accept(request, workflow_id, plan, idempotency_key)
        times.accepted = perf_counter()
        # The inputs are committed; don't hold them in memory during the wait.
        value, body.inputs, body.trigger_inputs = None, None, None
        request.release_body()
        seconds = limits.TRIGGER_SYNC_SECONDS if body.sync else limits.TRIGGER_ASYNC_SECONDS
        until = asyncio.get_running_loop().time() + seconds - (times.accepted - times.began)
        headers = acceptance.response_headers(request.gateway.settings, accepted)
        try:
            await run_until_disconnect(request, _wait_for_pod(request, accepted, times, until))
        except PodUnavailable as error:
            refusal = _build_refusal(error.news, accepted.execution_id)
            if refusal is not None:
                refusal.headers |= {**headers, **times.headers()}
                raise refusal from error
            # Stopped since the run was accepted: the run is kept until the workflow may start.
            until = 0.0
    if preference is not None:
        headers |= preference.headers
        left_seconds = preference.seconds - (perf_counter() - times.began)
        ended = request.gateway.ends.wait_for_end(
            accepted.execution_id, request.caller, max(left_seconds, 0.0)
        )
        outcome = await run_until_disconnect(request, ended)
        if outcome is not None:
            result = await _show_ended_run(request, accepted, times, outcome)
            return JsonResponse(result, headers={**headers, **times.headers()})
    else:
        request.gateway.access.allow(accepted.execution_id, request.caller)
    progress = await run_until_disconnect(request, _read_progress(request, accepted, body, times, until))
    shape = await _show_result(request, accepted, body, times, progress)
    return JsonResponse(shape, headers={**headers, **times.headers()})


def _build_refusal(news: BadNews, execution_id: str) -> ApiError | None:
    """Return the API error for a run whose pods can't start: failed or without capacity.

    None if its policy refuses a start: the run is kept until they may start.
    """
    match news:
        case StartFailure(reason):
            return errors.start_failed(reason, execution_id)
        case StartBlockage(reason):
            return errors.start_blocked(reason, execution_id)
        case StartRefusal():
            return None


def _check_body(body: TriggerRequest) -> TriggerRequest:
    """Return the body after checks, with its trigger type without spaces around it; raises a 422 error for
    invalid fields.
    """
    acceptance.require_one_spelling(body.trigger_inputs, body.inputs)
    problems = ProblemCollector()
    run_labels.read_labels(body.tags, body.metadata)
    body.trigger_type = text_rules.check_line(
        body.trigger_type, "trigger_type", problems, max_length=limits.TRIGGER_TYPE_LENGTH
    )
    problems.raise_any()
    return body


async def _plan_run(
    request: GatewayRequest, workflow: LoadedWorkflow, body: TriggerRequest, times: TriggerTimings
) -> RunRequest:
    """Record activity of the deployment, and return the run to accept, with the deployed definition; note in `times`
    whether its pods must start.

    Raises a 409 error if the workflow accepts no runs, isn't active, isn't deployed or may not start, 503 if over 1,000
    requests wait, 422 for invalid labels.
    """
    acceptance.require_open(workflow.status)
    deployment = await request.gateway.activation.record_request(workflow.id)
    if workflow.status is WorkflowStatus.DRAFT:
        raise errors.workflow_not_active()
    times.is_cold = not is_ready(deployment)
    times.definition_hash = deployment.definition_hash
    deployed = await request.gateway.deployed.load(workflow, deployment)
    given = body.inputs or body.trigger_inputs or {}
    inputs = trigger_output(deployed.trigger_kind or "manual", given, request.gateway.clock())
    labels = run_labels.read_labels(body.tags, body.metadata)
    return RunRequest(deployed, body.trigger_type, inputs, assigned_deployment_id=workflow.id, labels=labels)


async def _wait_for_pod(
    request: GatewayRequest, accepted: AcceptanceResult, times: TriggerTimings, until: float
) -> None:
    """Wait until a pod has claimed the run or the loop's time `until` is over, and measure the wait.

    `times.taken` becomes the time of the claim, or None. Raises `PodUnavailable` if pods can't start, or may not start
    now.
    """
    is_taken = await request.gateway.activation.await_claim(
        _build_key(request, accepted),
        request.path_params["id"],
        is_new=accepted.verdict is AcceptanceVerdict.ACCEPTED,
        is_ready=not times.is_cold,
        seconds=_seconds_left(until),
    )
    times.taken = perf_counter() if is_taken else None
    if times.taken is None:
        return
    seconds = times.taken - times.accepted
    if times.is_cold:
        instruments.histogram("wake_seconds", "decide").observe(times.accepted - times.began)
        instruments.histogram("wake_seconds", "total").observe(seconds)
    else:
        instruments.histogram("wake_seconds", "forward").observe(seconds)


async def _read_progress(
    request: GatewayRequest,
    accepted: AcceptanceResult,
    body: TriggerRequest,
    times: TriggerTimings,
    until: float,
) -> RunProgressReport | None:
    """Return the progress of the run: with `sync` at its end or at the loop's time `until`, else the present one.

    None without `sync` if a pod has claimed the run during this request.
    """
    if times.taken is not None and not body.sync:
        return None
    return await request.gateway.waiting.wait_for_progress(
        _build_key(request, accepted), request.caller, _seconds_left(until) if body.sync else 0
    )


async def _show_result(
    request: GatewayRequest,
    accepted: AcceptanceResult,
    body: TriggerRequest,
    times: TriggerTimings,
    progress: RunProgressReport | None,
) -> TriggerResult:
    """Return the run as the API shows it: `started` after its claim without `sync`, else by `progress`.

    An ended run has the outputs of its leaf nodes, or its error. `progress` is None for a run that was just claimed.
    """
    shape = TriggerResult(
        status=TriggerStatus.STARTED,
        execution_id=accepted.execution_id,
        workflow_id=request.path_params["id"],
    )
    if progress is None or (times.taken is not None and not body.sync):
        return shape
    if progress.status not in TERMINAL_STATUSES:
        has_begun = times.taken is not None or progress.completed_nodes > 0
        is_pending = not has_begun and progress.status is not ExecutionStatus.RUNNING
        shape.status = TriggerStatus.PENDING if is_pending else TriggerStatus.RUNNING
        return shape
    has_completed = progress.status is ExecutionStatus.COMPLETED
    shape.status = TriggerStatus.COMPLETED if has_completed else TriggerStatus.FAILED
    if not has_completed:
        shape.error = msgspec.Raw(progress.error) if progress.error else _end_request_error(progress.status)
    try:
        shape.output = await _read_output(request, accepted, times)
    except OutputsTooLarge as error:
        message = f"{error}, more than an answer can hold: read them at the execution"
        shape.error = msgspec.Raw(encode_json({"code": "output-too-large", "message": message}))
    return shape


async def _show_ended_run(
    request: GatewayRequest, accepted: AcceptanceResult, times: TriggerTimings, outcome: OutcomeShape
) -> TriggerResult:
    """Return the result of a run that ended in time, with the outputs of its leaf nodes unless all outputs are too
    large.
    """
    output = {} if outcome.outputs_omitted else await _read_output(request, accepted, times)
    return TriggerResult(
        status=TriggerStatus(outcome.status),
        execution_id=accepted.execution_id,
        workflow_id=request.path_params["id"],
        output=output,
        error=outcome.error or None,
        outputs=outcome.outputs,
        outputs_omitted=outcome.outputs_omitted,
    )


async def _read_output(
    request: GatewayRequest, accepted: AcceptanceResult, times: TriggerTimings
) -> dict[str, msgspec.Raw]:
    """Return the outputs of the run's leaf nodes as JSON, by node id; raises `OutputsTooLarge` over 20 million
    characters.
    """
    caller, key = request.caller, _build_key(request, accepted)
    async with request.gateway.database.read() as connection:
        hashed = times.definition_hash
        if accepted.verdict is not AcceptanceVerdict.ACCEPTED:
            pinned = select(col(Execution.definition_hash)).where(
                col(Execution.id) == key.execution_id, col(Execution.shard) == key.shard
            )
            hashed = await connection.scalar(pinned) or ""
        definition = DefinitionKey(caller.organization_id, hashed, caller.shard)
        found = await run_outputs.read_leaf_outputs(
            connection, key, definition, max_characters=limits.TRIGGER_OUTPUT_CHARACTERS
        )
    outputs = request.gateway.large_outputs.explain(key.execution_id)
    return {
        node_id: outputs.show(leaf.text.decode(), is_reference=leaf.is_blob)
        for node_id, leaf in found.items()
    }


def _end_request_error(status: ExecutionStatus) -> msgspec.Raw:
    return msgspec.Raw(
        encode_json({"code": status.value, "message": f"The run was {status.value} by request"})
    )


def _build_key(request: GatewayRequest, accepted: AcceptanceResult) -> ExecutionKey:
    return ExecutionKey(accepted.execution_id, request.caller.shard)


def _seconds_left(until: float) -> float:
    return max(until - asyncio.get_running_loop().time(), 0.0)


async def run_until_disconnect(request: GatewayRequest, work: Awaitable[Answer]) -> Answer:
    """Return the result of `work`, or raise `ClientDisconnect` if the client leaves first.

    `work` is canceled then, but not the run that it waits for.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_wait_disconnect(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        # Not awaited one by one with their errors suppressed: that would suppress a cancellation of this request too.
        await asyncio.gather(working, gone, return_exceptions=True)


async def _wait_disconnect(request: GatewayRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
