"""Human input: list the nodes of an execution that wait for a person, and answer them once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import structlog
from msgspec import Meta, structs
from sqlalchemy import select
from sqlmodel import col

from concurrency import offload
from engine.values import Json, fingerprint
from gateway.access import audit_log
from gateway.executions import acceptance, input_checks
from gateway.http import errors, idempotency, limits
from gateway.http.errors import ApiError
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, StrictWire, WireStruct, body_of, optional_instant, read_json
from journal import concurrency_limits
from journal.store import AcceptanceVerdict
from journal.waits import approvals, node_answers
from journal.waits.approvals import AnswerRefusal, ApprovalDecision, Approver
from journal.waits.node_answers import AnswerReception
from models import access_store, ids
from models.audit import AuditAction
from models.execution import Execution
from models.execution_visibility import visibility_condition

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.access.audit_log import ChangeAuthor
    from gateway.executions.acceptance import RunAcceptor
    from journal.store import ExecutionKey, IdempotencyKey
    from journal.waits.approvals import DecisionResult
    from journal.waits.node_answers import OrganizationWait, WaitingNode
    from models.access import ApiCaller
    from models.approval import ApprovalRequest
    from models.database import Database

log = structlog.get_logger()

SHOWN_ITERATIONS: Final = 20
FORBIDDEN: Final = 403


class QuestionMails(WireStruct):
    """Mails to the assignees of a question."""

    rounds: int
    """Number of times that all who had not answered got a mail: the question, then reminders."""
    next_at: Instant | None
    """Time of the next attempt or reminder; null if none follows."""
    last_error: str | None
    """Error of the last attempt, if it failed."""


class AwaitedToolCall(WireStruct):
    """Tool call of an agent that waits for an approval."""

    agent_id: str
    """Node id of the agent."""
    tool: str
    arguments: Mapping[str, Any]
    """Exact arguments of the call; other ones are another question."""
    hash: str
    """SHA-256 of the call in hexadecimal, to which an answer is bound."""


class PendingInput(WireStruct):
    """Node that waits for a person."""

    node_id: str
    iteration: str
    """Turn of the enclosing loops; empty outside of loops."""
    node_label: str
    title: str
    description: str
    schema: Mapping[str, Any] | None
    """JSON Schema of `data` in the answer; null allows any value."""
    choices: Sequence[Any]
    """Allowed values of `choice` in the answer; empty if the answer has no choice."""
    assignees: Sequence[str]
    """Ids of users, `role:admin`, or mail addresses; empty: everybody who may execute the workflow."""
    approvals: int
    """Number of people who must make the same choice."""
    requested_at: Instant | None
    expires_at: Instant | None
    mails: QuestionMails | None
    """Mails about the question; null if its node sends none."""
    tool_call: AwaitedToolCall | None
    """Tool call of an agent that the question is about; null for other questions."""


class PendingInputs(WireStruct):
    """Nodes of an execution that wait for a person."""

    count: int
    inputs: Sequence[PendingInput]


class AssignedInput(PendingInput, kw_only=True):
    """Question that the caller may answer."""

    execution_id: str
    workflow_id: str
    workflow_name: str


class AssignedInputs(WireStruct):
    """Questions that the caller may answer."""

    count: int
    inputs: Sequence[AssignedInput]


class InputAnswer(StrictWire):
    """Answer of a person to a waiting node."""

    node_id: Annotated[str, Meta(min_length=1, max_length=64)]
    iteration: Annotated[str, Meta(max_length=limits.LABEL_LENGTH)] | None = None
    """Required if several iterations of a loop wait, and for the tool call of an agent."""
    choice: str | None = None
    data: Any = None


class InputAnswerResult(WireStruct):
    """Accepted answer, with which the execution continues if no further approval is missing."""

    execution_id: str
    node_id: str
    status: Literal["accepted", "counted"]
    """`counted`: the node waits until more people have made the same choice."""
    missing_approvals: int = 0
    """Number of people who must still make this choice."""


async def index_assigned(request: GatewayRequest) -> JsonResponse:
    """List the questions that the caller may answer, in all executions, the newest first; at most 1,000."""
    caller = request.caller
    async with request.gateway.database.read() as connection:
        approver = await find_approver(connection, caller)
        found = await node_answers.list_organization_waits(
            connection,
            visibility_condition(caller),
            lambda one: _is_assigned(one, approver),
            shard=caller.shard,
            at_most=limits.PENDING_INPUTS,
            examined=limits.EXAMINED_QUESTIONS,
        )
        mails = await approvals.read_requests(connection, [one.execution_id for one in found])
    assigned = [
        AssignedInput(
            execution_id=one.execution_id,
            workflow_id=one.workflow_id,
            workflow_name=one.workflow_name,
            **structs.asdict(
                _show_wait(one.node, mails.get((one.execution_id, one.node.node_id, one.node.iteration)))
            ),
        )
        for one in found
    ]
    return JsonResponse(AssignedInputs(count=len(assigned), inputs=assigned))


def _is_assigned(wait: OrganizationWait, approver: Approver) -> bool:
    """Return whether a person may answer a question."""
    refusal = approvals.find_refusal(
        wait.node.request, approver, starter_id=wait.user_id, trigger_type=wait.trigger_type
    )
    return refusal is None


async def index(request: GatewayRequest) -> JsonResponse:
    """List the nodes of an execution that wait for a person, with the mails sent about each."""
    key = await request.gateway.access.key(request.path_params["id"], request.caller)
    async with request.gateway.database.read() as connection:
        found = await node_answers.list_input_waits(connection, key)
        mails = await approvals.read_requests(connection, [key.execution_id])
    shown = [_show_wait(one, mails.get((key.execution_id, one.node_id, one.iteration))) for one in found]
    return JsonResponse(PendingInputs(count=len(found), inputs=shown))


async def answer(request: GatewayRequest) -> JsonResponse:
    """Answer a node that waits for a person; the first answer counts.

    Only its assignees may answer, and not the user who started the run if the question excludes that. The
    answer must fit the question's choices and schema. A repetition with the same `Idempotency-Key` gets the
    same result.
    """
    gateway, caller = request.gateway, request.caller
    key = await gateway.access.key(request.path_params["id"], caller)
    value = await read_json(request)
    body = body_of(request, value, InputAnswer)
    idempotency_key = await offload.run(request.idempotency_key, value, workflow_id=key.execution_id)
    if await _is_repeated(request, key, idempotency_key):
        return _build_response(key, body, idempotency.REPLAYED)
    try:
        async with gateway.database.read() as connection:
            asked = await _find_waiting_node(connection, key, body)
            await require_assigned(connection, key, asked, caller)
    except ApiError as error:
        if error.status == FORBIDDEN:
            raise
        # A node that no longer waits may have been answered by an earlier copy of this request.
        if await _is_repeated(request, key, idempotency_key):
            return _build_response(key, body, idempotency.REPLAYED)
        raise
    await input_checks.require_valid_inputs(
        gateway.forms, caller.organization_id, asked.request, body.choice, body.data
    )
    given = await _store_answer(request, key, asked, body, idempotency_key)
    if given is None:
        return _build_response(key, body, idempotency.REPLAYED)
    await continue_run(gateway.database, gateway.acceptances, given)
    log.info("input answered", execution_id=key.execution_id, node_id=asked.node_id, user_id=caller.user_id)
    return _build_response(key, body, {}, missing=given.missing)


async def continue_run(database: Database, acceptances: RunAcceptor, given: DecisionResult) -> None:
    """Make a run continue after a committed decision: admit runs of its concurrency key, and wake the workers.

    Workers are woken only if the decision has woken the run.
    """
    if given.answer.concurrency_key is not None:
        await concurrency_limits.admit_waiting_runs(database, given.answer.concurrency_key)
    if given.answer.is_woken:
        acceptances.wake_workers()


async def audit_decision(
    connection: AsyncConnection,
    key: ExecutionKey,
    asked: WaitingNode,
    decision: ApprovalDecision,
    author: ChangeAuthor,
) -> None:
    """Record the author and a hash of a decision in the audit trail, in the transaction of the decision."""
    workflow_id = await connection.scalar(
        select(col(Execution.workflow_id)).where(
            col(Execution.id) == key.execution_id, col(Execution.shard) == key.shard
        )
    )
    content = [key.execution_id, asked.node_id, asked.iteration, decision.by, decision.choice, decision.data]
    await audit_log.record_change(
        connection,
        author,
        AuditAction.INPUT_ANSWERED,
        str(workflow_id),
        before=None,
        after=fingerprint(content),
    )


async def require_assigned(
    connection: AsyncConnection, key: ExecutionKey, asked: WaitingNode, caller: ApiCaller
) -> None:
    """Raise a 403 error if the caller may not answer a question: assigned to others, or asked by their own
    run; 404 if the run is gone.
    """
    run = (
        await connection.execute(
            select(col(Execution.user_id), col(Execution.trigger_type)).where(
                col(Execution.id) == key.execution_id, col(Execution.shard) == key.shard
            )
        )
    ).first()
    approver = await find_approver(connection, caller)
    if run is None:
        raise errors.not_found("execution")
    refusal = approvals.find_refusal(
        asked.request, approver, starter_id=run.user_id, trigger_type=run.trigger_type
    )
    if refusal is AnswerRefusal.SELF_APPROVAL:
        raise ApiError(403, "self-approval", "The user who started the run may not answer this question")
    if refusal is AnswerRefusal.NOT_ASSIGNED:
        raise ApiError(403, "not-assigned", "This question is assigned to other people")


async def find_approver(connection: AsyncConnection, caller: ApiCaller) -> Approver:
    """Return the caller as rules of approval need it: with e-mail address ("" if the user is gone), and
    whether an admin.
    """
    user = await access_store.find_user(connection, caller.organization_id, caller.user_id)
    return Approver(caller.user_id, user.email if user else "", caller.is_admin)


async def _is_repeated(
    request: GatewayRequest, key: ExecutionKey, idempotency_key: IdempotencyKey | None
) -> bool:
    """Return whether an earlier request with this idempotency key was answered; False without a key.

    Raises a 422 error if the body of that request differs.
    """
    if idempotency_key is None:
        return False
    earlier = await acceptance.find_earlier(request.gateway.database, key.shard, idempotency_key)
    if earlier is not None and earlier.verdict is AcceptanceVerdict.MISMATCH:
        raise idempotency.mismatch_error()
    return earlier is not None


async def _find_waiting_node(
    connection: AsyncConnection, key: ExecutionKey, body: InputAnswer
) -> WaitingNode:
    """Return the waiting node that an answer is for, by node and iteration.

    Raises a 409 error if none waits or it was answered, and 422 if the body names no iteration although several
    wait, or a tool call of an agent: another call may wait at the same node since the caller has read its arguments.
    """
    waiting = [
        one
        for one in await node_answers.list_input_waits(connection, key)
        if one.node_id == body.node_id and body.iteration in {None, one.iteration}
    ]
    if len(waiting) > 1:
        iterations = ", ".join(one.iteration for one in waiting[:SHOWN_ITERATIONS])
        message = f"iteration is required: {len(waiting)} iterations of a loop wait, {iterations}"
        raise errors.invalid([errors.problem("iteration", "required", message)])
    if waiting and body.iteration is None and "toolCall" in waiting[0].request:
        message = f"iteration is required: it names the tool call, {waiting[0].iteration}"
        raise errors.invalid([errors.problem("iteration", "required", message)])
    if not waiting:
        is_answered = await node_answers.is_answered(connection, key, body.node_id, body.iteration)
        raise refusal_of(AnswerReception.LATE if is_answered else AnswerReception.UNAWAITED)
    return waiting[0]


async def _store_answer(
    request: GatewayRequest,
    key: ExecutionKey,
    asked: WaitingNode,
    body: InputAnswer,
    idempotency_key: IdempotencyKey | None,
) -> DecisionResult | None:
    """Store an answer in the journal and the audit trail in one transaction, and return its effect.

    None if an earlier request with the same key has stored it. Raises a 409 error for a late or repeated
    answer, and 422 if the body of the earlier request differs.
    """
    caller, answered_at = request.caller, request.gateway.clock()
    decision = ApprovalDecision(caller.user_id, caller.user_id, body.choice, body.data, answered_at)
    answer_id = ids.new_id("answer")

    async def work(connection: AsyncConnection) -> DecisionResult | None:
        if idempotency_key is not None:
            bound = await idempotency.reserve_key(
                connection, idempotency_key, shard=key.shard, resource_id=answer_id, now=answered_at
            )
            if bound != answer_id:
                return None
        given = await approvals.record_decision(connection, key, asked, decision)
        if given.answer.reception is not AnswerReception.TAKEN:
            raise refusal_of(given.answer.reception)
        await audit_decision(connection, key, asked, decision, caller)
        return given

    return await request.gateway.database.transaction(work, locks=key.execution_id)


def refusal_of(reception: AnswerReception) -> ApiError:
    """Return the 409 error for an answer that was not accepted: too late, after the deadline, or for a node
    that doesn't wait.
    """
    if reception is AnswerReception.LATE:
        return errors.conflict("already-answered", "This node was answered already")
    if reception is AnswerReception.EXPIRED:
        return errors.conflict(
            "input-expired", "The node has stopped waiting at its deadline and continued without input"
        )
    message = "No node with this id waits for input: `pending-inputs` of the execution lists those that do"
    return errors.conflict("no-input-pending", message)


def _build_response(
    key: ExecutionKey, body: InputAnswer, headers: Mapping[str, str], *, missing: int = 0
) -> JsonResponse:
    """Return the answer to an accepted input: `counted` while `missing` approvals are missing, else `accepted`."""
    taken = InputAnswerResult(
        execution_id=key.execution_id,
        node_id=body.node_id,
        status="counted" if missing else "accepted",
        missing_approvals=missing,
    )
    return JsonResponse(taken, headers=headers)


def _show_wait(one: WaitingNode, mails: ApprovalRequest | None) -> PendingInput:
    schema = one.request.get("schema")
    return PendingInput(
        node_id=one.node_id,
        iteration=one.iteration,
        node_label=one.label,
        title=str(one.request.get("title") or ""),
        description=str(one.request.get("description") or ""),
        schema=schema if isinstance(schema, dict) else None,
        choices=input_checks.read_choices(one.request),
        assignees=approvals.assignees_of(one.request),
        approvals=approvals.needed_approvals(one.request),
        requested_at=optional_instant(one.started_at),
        expires_at=optional_instant(one.expires_at),
        mails=None
        if mails is None
        else QuestionMails(
            rounds=mails.round, next_at=optional_instant(mails.due_at), last_error=mails.error
        ),
        tool_call=_show_tool_call(one.request.get("toolCall")),
    )


def _show_tool_call(asked: Json) -> AwaitedToolCall | None:
    """Return the tool call in the request of a question; None for a question without one."""
    if not isinstance(asked, dict):
        return None
    arguments = asked.get("arguments")
    return AwaitedToolCall(
        agent_id=str(asked.get("agentId", "")),
        tool=str(asked.get("tool", "")),
        arguments=arguments if isinstance(arguments, dict) else {},
        hash=str(asked.get("hash", "")),
    )
