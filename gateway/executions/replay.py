"""Endpoint that replays an ended execution: the plan first, then the run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import structlog
from msgspec import UNSET, Meta, UnsetType

from engine.agents.agent_steps import StepReuse
from engine.node_api import NodeEffect
from engine.replay_plan import NodeReplay, ReplayDecision, ReplayReasonCode
from gateway.executions import acceptance, replay_runs
from gateway.executions.replay_planning import ORIGINAL, ReplayChoice
from gateway.http import errors, idempotency, limits
from gateway.http.responses import JsonResponse, location
from gateway.http.wire import StrictWire, WireStruct, body_of, read_json
from gateway.workflows.graph_shapes import GRAPH_ID_PATTERN
from journal.store import AcceptanceVerdict
from models import ids

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.executions.replay_planning import PlannedReplay
    from gateway.http.request import GatewayRequest
    from journal.store import ExecutionKey, IdempotencyKey

log = structlog.get_logger()

NodeId = Annotated[
    str, Meta(pattern=GRAPH_ID_PATTERN, description="an id of up to 64 letters, digits, `_` and `-`")
]
NodeIds = Annotated[list[NodeId], Meta(max_length=limits.NODES)]
_SEPARATOR = " "


class ReplayRequest(StrictWire):
    """Body of a replay; without fields it replays the same definition and input."""

    from_: NodeIds = msgspec.field(name="from", default_factory=list)
    """Nodes that run again in any case; a node in a loop runs again with its loop."""
    definition: Literal["original", "current"] | Annotated[int, Meta(ge=1, le=999_999_999)] = ORIGINAL
    """Definition to run: that of the execution, the workflow as it is now, or the number of a version."""
    input: dict[str, Any] | None = None
    """Inputs of the trigger, like `inputs` of `execute`; null: those of the execution."""
    refresh: Annotated[list[Literal["read", "model"]], Meta(max_length=2)] = msgspec.field(
        default_factory=list
    )
    """`read`: nodes that read the outside, the clock or chance run again. `model`: agents ask their models from the
    first request on that isn't the recorded one."""
    confirm: NodeIds = msgspec.field(default_factory=list)
    """Writes that may be repeated, with a new idempotency key."""
    skip: NodeIds = msgspec.field(default_factory=list)
    """Writes that do not run: their recorded output is used again, and without one they are skipped, with the nodes
    that only they lead to. A loop that writes is left out as a whole.
    """
    failed_only: bool = False
    """Loops keep their completed iterations although their bodies have changed."""
    dry_run: bool = False
    """Return the plan without running it."""
    plan_hash: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    """Hash of the plan that the caller has seen; another plan is refused."""
    again: bool = False
    """Replay an execution that was resumed, replayed or redriven before."""

    def to_choice(self) -> ReplayChoice:
        """Return the choices of the body as the planner takes them."""
        return ReplayChoice(
            definition=self.definition,
            input=self.input,
            forced=frozenset(self.from_),
            refreshes_reads="read" in self.refresh,
            refreshes_models="model" in self.refresh,
            confirmed=frozenset(self.confirm),
            left_out=frozenset(self.skip),
            failed_only=self.failed_only,
        )


class ReplayReasonShape(WireStruct):
    """Reason for the decision about a node."""

    code: ReplayReasonCode
    paths: Sequence[str]
    """Places that have changed: in the config, the mappings or the input, or ids of nodes or data sources."""


class ReusedAnswers(WireStruct):
    """Answers of the model of an agent, which are used again with their tool calls while its requests are the same."""

    count: int
    on_difference: Literal["fail", "ask"]
    """Action at the first request that differs from the recorded one: the agent fails with `replay-diverged`, or asks
    its model from there on.
    """


class NodeReplayShape(WireStruct):
    """Decision about one node."""

    node_id: str
    decision: ReplayDecision
    effect: NodeEffect
    reasons: Sequence[ReplayReasonShape]
    failed_only: bool
    """Whether a loop runs its failed iterations alone."""
    confirmed: bool
    """Whether `confirm` names this write, which would be asked for otherwise."""
    skippable: bool
    """Whether `skip` may name it: a write outside of loops, or a loop that writes."""
    answers: ReusedAnswers | UnsetType = UNSET
    """Recorded answers of an agent that are used again; absent without any."""


class ReplayCounts(WireStruct):
    """Number of nodes by decision."""

    reuse: int
    rerun: int
    maybe: int
    ask: int
    skip: int | UnsetType = UNSET
    """Nodes that do not run since writes are left out; absent without any."""


class ReplayPlanShape(WireStruct):
    """Plan of a replay: nodes in the order of the graph, without those on branches that are not taken."""

    execution_id: str
    definition: str
    """Definition to run: `original`, `current`, or `version 3`."""
    plan_hash: str
    counts: ReplayCounts
    predicted_seconds: float
    """Sum of the recorded durations of the nodes that may run."""
    nodes: Sequence[NodeReplayShape]
    removed: Sequence[str]
    """Nodes of the execution that the definition to run lacks."""


class ReplayResult(WireStruct):
    """New execution, and the one that it replays."""

    execution_id: str
    replay_of: str
    plan_hash: str


async def replay(request: GatewayRequest) -> JsonResponse:
    """Replay an ended execution: start a new one that reuses each result whose node has the same key.

    A key consists of the type, code, config, mappings, input and data sources of a node. Nodes with another key run
    again, and those behind them only if their input changes. With `{"definition": "current"}`, a failed execution
    continues behind the last good node with the mended workflow. A completed write is never repeated unless `confirm`
    names it; `skip` leaves writes out. `dryRun` returns the plan. An execution is replayed once, or with `again`.
    """
    value = await read_json(request)
    body = body_of(request, value, ReplayRequest)
    key = await request.gateway.access.find_key(request.path_params["id"], request.caller)
    idempotency_key = request.idempotency_key(value, workflow_id=key.execution_id)
    if not body.dry_run:
        earlier = await _find_answer(request, key, idempotency_key)
        if earlier is not None:
            return earlier
    planned = await request.gateway.replays.plan(key, request.caller, body.to_choice())
    if body.dry_run:
        return JsonResponse(show_plan(planned))
    if body.plan_hash is not None and body.plan_hash != planned.hash:
        message = "The plan has changed since it was shown: see details"
        raise errors.conflict(
            "plan-changed", message, details=_build_details("plan-changed", message, planned)
        )
    if planned.plan.unconfirmed:
        named = ", ".join(planned.plan.unconfirmed[: limits.FINDINGS])
        message = f"The replay would repeat writes: name them in `confirm` to allow that: {named}"
        details = _build_details("confirmation-required", message, planned)
        raise errors.conflict("confirmation-required", message, details=details)
    return await _start(request, key, planned, idempotency_key, again=body.again)


async def _start(
    request: GatewayRequest,
    key: ExecutionKey,
    planned: PlannedReplay,
    idempotency_key: IdempotencyKey | None,
    *,
    again: bool,
) -> JsonResponse:
    """Start a planned replay as a new execution, and return the answer 201; with `again`, also of an execution that was
    resumed or replayed before.

    A used idempotency key gives the answer to its first request. Raises 404, 409, 429 for a full backlog, and 422 for a
    key with another body.
    """
    caller, gateway = request.caller, request.gateway
    await gateway.backlog.require_capacity(caller.organization_id, planned.workflow_id)
    new_id, now = ids.new_id("exec"), gateway.clock()
    answer = f"{new_id}{_SEPARATOR}{planned.hash}"

    async def insert(connection: AsyncConnection) -> str:
        if idempotency_key is not None:
            bound = await idempotency.reserve_key(
                connection, idempotency_key, shard=key.shard, resource_id=answer, now=now
            )
            if bound != answer:
                return bound
        await replay_runs.start_replay(connection, key, new_id, caller, planned, now=now, again=again)
        return answer

    begun = await gateway.database.transaction(insert)
    if begun != answer:
        return _show_result(request, key, begun, is_repeated=True)
    gateway.access.allow(new_id, caller)
    gateway.acceptances.dispatch(planned.concurrency_key)
    log.info("execution replayed", execution_id=new_id, replay_of=key.execution_id)
    return _show_result(request, key, answer, is_repeated=False)


async def _find_answer(
    request: GatewayRequest, key: ExecutionKey, idempotency_key: IdempotencyKey | None
) -> JsonResponse | None:
    """Return the answer to an earlier request with the same idempotency key; None if there was none, and without a key.

    Raises a 422 error if that request had another body.
    """
    if idempotency_key is None:
        return None
    earlier = await acceptance.find_earlier(request.gateway.database, key.shard, idempotency_key)
    if earlier is None:
        return None
    if earlier.verdict is AcceptanceVerdict.MISMATCH:
        raise idempotency.mismatch_error()
    return _show_result(request, key, earlier.execution_id, is_repeated=True)


def _show_result(
    request: GatewayRequest,
    key: ExecutionKey,
    answer: str,
    *,
    is_repeated: bool,
) -> JsonResponse:
    execution_id, _, plan_hash = answer.partition(_SEPARATOR)
    headers = location(request.gateway.settings, execution_id)
    if is_repeated:
        headers = {**headers, **idempotency.REPLAYED}
    result = ReplayResult(execution_id=execution_id, replay_of=key.execution_id, plan_hash=plan_hash)
    return JsonResponse(result, status=201, headers=headers)


def _build_details(code: str, message: str, planned: PlannedReplay) -> list[dict[str, Any]]:
    """Return the details of an error response, with the plan of the replay, so that clients can show it."""
    plan: Mapping[str, Any] = msgspec.to_builtins(show_plan(planned))
    return [{**errors.problem("", code, message), "plan": dict(plan)}]


def show_plan(planned: PlannedReplay) -> ReplayPlanShape:
    """Return the plan of a replay in API form, with the number of nodes by decision."""
    nodes = planned.plan.nodes
    counts = {decision.value: 0 for decision in ReplayDecision}
    for node in nodes:
        counts[node.decision.value] += 1
    return ReplayPlanShape(
        execution_id=planned.execution_id,
        definition=planned.definition.label,
        plan_hash=planned.hash,
        counts=ReplayCounts(**{name: count for name, count in counts.items() if count or name != "skip"}),
        predicted_seconds=round(planned.plan.predicted_seconds, 3),
        nodes=[_show_node(node, planned.writes) for node in nodes],
        removed=planned.plan.removed,
    )


def _show_node(node: NodeReplay, writes: Collection[str]) -> NodeReplayShape:
    """Return the decision about a node as the API shows it; `writes` are the nodes that a replay may leave out."""
    return NodeReplayShape(
        node_id=node.node_id,
        decision=node.decision,
        effect=node.effect,
        reasons=[ReplayReasonShape(code=reason.code, paths=reason.paths) for reason in node.reasons],
        failed_only=node.failed_only,
        confirmed=node.confirmed,
        skippable=node.node_id in writes,
        answers=UNSET
        if node.answer_reuse is None
        else ReusedAnswers(
            count=node.answers, on_difference="fail" if node.answer_reuse is StepReuse.BINDING else "ask"
        ),
    )
