"""Human input: list the nodes of an execution that wait for a person, and answer them once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
import structlog
from msgspec import Meta
from sqlalchemy import select
from sqlmodel import col

from concurrency import offload
from engine.values import fingerprint
from gateway.access import audit_log
from gateway.executions import acceptance, answered_runs, input_checks, question_shapes
from gateway.executions.question_shapes import (
    AnsweredInputs,
    AssignedInputs,
    PendingInputs,
    QuestionAssignment,
)
from gateway.http import errors, idempotency, keyset, limits
from gateway.http.errors import ApiError
from gateway.http.keyset import AFTER, KeysetBounds, PageCursor
from gateway.http.parameters import LIMIT, ChoicesParameter, FlagParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import StrictWire, WireStruct, body_of, read_json
from journal.store import AcceptanceVerdict
from journal.waits import approvals, node_answers
from journal.waits.approvals import AnswerRefusal, ApprovalDecision, Approver
from journal.waits.node_answers import AnswerReception, WaitPosition
from models import access_store, ids
from models.approval import ApprovalVote
from models.audit import AuditAction
from models.execution import Execution
from models.execution_visibility import visibility_condition
from models.timestamps import from_microseconds, to_microseconds
from models.workflow import Workflow

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from gateway.access.audit_log import ChangeAuthor
    from journal.store import ExecutionKey, IdempotencyKey
    from journal.waits.approvals import DecisionResult
    from journal.waits.node_answers import OrganizationWait, WaitingNode
    from models.access import ApiCaller

log = structlog.get_logger()

OTHERS: Final = FlagParameter("others", "Also questions that only other people may answer.")
ASSIGNMENT: Final = ChoicesParameter(
    "assignment", "Only questions that are assigned in one of these ways, in pages.", QuestionAssignment
)
ASSIGNED: Final = (OTHERS, ASSIGNMENT, LIMIT, AFTER)
MAX_SEQUENCE: Final = 2**31 - 1
"""Greatest sequence number of a span."""
SHOWN_ITERATIONS: Final = 20
FORBIDDEN: Final = 403


ANSWERED: Final = (LIMIT, AFTER)
_ANSWER_COLUMNS: Final[Sequence[Any]] = (
    *(col(ApprovalVote.id), col(ApprovalVote.execution_id), col(ApprovalVote.node_id)),
    *(col(ApprovalVote.iteration), col(ApprovalVote.voter), col(ApprovalVote.choice)),
    *(col(ApprovalVote.title), col(ApprovalVote.created_at), col(Execution.workflow_id)),
    col(Workflow.name).label("workflow_name"),
)


class InputAnswer(StrictWire):
    """Answer of a person to a waiting node."""

    node_id: Annotated[str, Meta(min_length=1, max_length=64)]
    iteration: Annotated[str, Meta(max_length=limits.LABEL_LENGTH)] | None = None
    """Required if several iterations of a loop wait, and for the tool call of an agent."""
    choice: str | None = None
    data: Any = None
    arguments: dict[str, Any] | None = None
    """Arguments of the tool call of an agent in place of those that the question shows, by its `parameters`."""


class InputAnswerResult(WireStruct):
    """Accepted answer, with which the execution continues if no further approval is missing."""

    execution_id: str
    node_id: str
    status: Literal["accepted", "counted"]
    """`counted`: the node waits until more people have made the same choice."""
    missing_approvals: int = 0
    """Number of people who must still make this choice."""


async def index_assigned(request: GatewayRequest) -> JsonResponse:
    """List the questions that the caller may answer, in all executions, the newest first; at most 1,000.

    With `others`, the list has also those of visible executions that only other people may answer. With `after`,
    `limit` or `assignment`, it has pages of `limit` questions, however many are open. A page examines 500 questions,
    or as many that name the caller for `assignment=caller`, so that it may be shorter although another follows.
    """
    caller, shows_others = request.caller, request.query[OTHERS]
    cursor = request.query[AFTER]
    if cursor is None and (LIMIT.name in request.query_params or request.query[ASSIGNMENT]):
        cursor = PageCursor()
    async with request.gateway.database.read() as connection:
        approver = await find_approver(connection, caller)
        # Otherwise PostgreSQL, which expects few questions, reads and sorts those of all runs for one page.
        await keyset.follow_indexes(connection)

        def may_show(one: OrganizationWait) -> bool:
            return shows_others or question_shapes.find_refusal(one, approver) is None

        if cursor is not None:
            return await _show_page(connection, request, cursor, approver, may_show)
        found = await node_answers.list_organization_waits(
            connection,
            visibility_condition(caller),
            may_show,
            organization_id=caller.organization_id,
            shard=caller.shard,
            at_most=limits.PENDING_INPUTS,
            examined=limits.EXAMINED_QUESTIONS,
        )
        shown = await question_shapes.show_waits(connection, found, approver, caller.organization_id)
    assigned = [one for one in shown if shows_others or one.may_answer]
    return JsonResponse(AssignedInputs(count=len(assigned), inputs=assigned))


async def _show_page(
    connection: AsyncConnection,
    request: GatewayRequest,
    cursor: PageCursor,
    approver: Approver,
    may_show: Callable[[OrganizationWait], bool],
) -> JsonResponse:
    """Return the page of questions behind a cursor that `may_show` accepts and that have a wanted assignment.

    A cursor of this list has the sequence number of a node in place of a time, and the id of its run. Raises a 400
    error for another cursor.
    """
    caller, wanted = request.caller, request.query[ASSIGNMENT]
    bounds = KeysetBounds(request.query[LIMIT], is_descending=True, cursor=cursor)
    sequence = None if cursor.created_at is None else to_microseconds(cursor.created_at)
    # A cursor of another list has a time there, which no sequence number reaches.
    if cursor.is_descending is False or (sequence or 0) > MAX_SEQUENCE:
        raise errors.invalid_query(AFTER.name, "invalid-cursor", "after must be a cursor of this list")
    behind = None if sequence is None else WaitPosition(cursor.item_id, sequence)
    own = (caller.user_id, *filter(None, [approver.email]))
    page = await node_answers.read_organization_waits(
        connection,
        visibility_condition(caller),
        caller.organization_id,
        caller.shard,
        behind,
        limit=limits.QUESTIONS_OF_PAGE,
        mentions=own if list(wanted) == [QuestionAssignment.CALLER] else (),
    )
    counts = dict.fromkeys(QuestionAssignment, 0)
    matching = []
    for one in page.waits:
        if request.query[OTHERS] or may_show(one.decode()):
            assignment = question_shapes.find_assignment(approvals.read_assignees(one.assignees), approver)
            counts[assignment] += 1
            if not wanted or assignment in wanted:
                matching.append(one)
    listed = matching[: bounds.limit]
    last = listed[-1].position if len(matching) > bounds.limit else page.behind
    shown = await question_shapes.show_waits(
        connection, [one.decode() for one in listed], approver, caller.organization_id
    )
    return JsonResponse(
        AssignedInputs(
            count=len(matching),
            count_is_lower_bound=page.behind is not None,
            next=None
            if last is None
            else bounds.cursor_behind(from_microseconds(last.sequence), last.execution_id),
            inputs=[one for one in shown if request.query[OTHERS] or one.may_answer],
            assignments=counts,
        )
    )


async def index_answered(request: GatewayRequest) -> JsonResponse:
    """List the answers of people to questions in visible executions, the newest first.

    They are kept as long as their executions. Answers before the upgrade to this version are missing.
    """
    caller = request.caller
    bounds = keyset.read_newest_first(request.query)
    created_at, item_id = col(ApprovalVote.created_at), col(ApprovalVote.id)
    conditions = (
        col(ApprovalVote.organization_id) == caller.organization_id,
        col(Execution.id) == col(ApprovalVote.execution_id),
        col(Workflow.id) == col(Execution.workflow_id),
        visibility_condition(caller),
    )
    async with request.gateway.database.read() as connection:
        page = await keyset.read_rows(
            connection, _ANSWER_COLUMNS, conditions, bounds, created_at=created_at, item_id=item_id
        )
        voters = {row["voter"] for row in page.rows}
        names = await access_store.read_user_names(connection, caller.organization_id, voters)
    answers = [question_shapes.show_answer(row, names.get(row["voter"], row["voter"])) for row in page.rows]
    return JsonResponse(AnsweredInputs(answers=answers, next=page.next_cursor))


async def index(request: GatewayRequest) -> JsonResponse:
    """List the nodes of an execution that wait for a person, with the mails sent about each."""
    key = await request.gateway.access.find_key(request.path_params["id"], request.caller)
    async with request.gateway.database.read() as connection:
        found = await node_answers.list_input_waits(connection, key)
        mails = await approvals.read_requests(connection, [key.execution_id])
    shown = [
        question_shapes.show_wait(one, mails.get((key.execution_id, one.node_id, one.iteration)))
        for one in found
    ]
    return JsonResponse(PendingInputs(count=len(found), inputs=shown))


async def answer(request: GatewayRequest) -> JsonResponse:
    """Answer a node that waits for a person; the first answer counts.

    Only its assignees may answer, and not the user who started the run if the question excludes that. The
    answer must fit the question's choices and schema. The approval of the tool call of an agent may have other
    `arguments`, with which the call is made, and which the agent is told. A repetition with the same
    `Idempotency-Key` gets the same result.
    """
    gateway, caller = request.gateway, request.caller
    key = await gateway.access.find_key(request.path_params["id"], caller)
    value = await read_json(request)
    body = body_of(request, value, InputAnswer)
    idempotency_key = await offload.run(request.idempotency_key, value, workflow_id=key.execution_id)
    missing = await _find_earlier_result(request, key, idempotency_key)
    if missing is not None:
        return _build_response(key, body, missing, idempotency.REPLAYED)
    try:
        async with gateway.database.read() as connection:
            asked = await find_waiting_node(connection, key, body.node_id, body.iteration)
            await require_assigned(connection, key, asked, caller)
    except ApiError as error:
        if error.status == FORBIDDEN:
            raise
        # A node that no longer waits may have been answered by an earlier copy of this request.
        missing = await _find_earlier_result(request, key, idempotency_key)
        if missing is not None:
            return _build_response(key, body, missing, idempotency.REPLAYED)
        raise
    await input_checks.require_valid_inputs(
        gateway.forms, caller.organization_id, asked.request, body.choice, body.data
    )
    if body.arguments is not None:
        changed = await input_checks.require_valid_arguments(
            gateway.forms, caller.organization_id, asked.request, body.choice, body.arguments
        )
        body = msgspec.structs.replace(body, arguments=changed)
    missing, given = await _store_answer(request, key, asked, body, idempotency_key)
    if given is None:
        return _build_response(key, body, missing, idempotency.REPLAYED)
    await answered_runs.continue_run(
        gateway.database, gateway.acceptances, gateway.pod_services.poll_hub, given.answer
    )
    log.info("input answered", execution_id=key.execution_id, node_id=asked.node_id, user_id=caller.user_id)
    return _build_response(key, body, missing)


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
    content: list[Json] = [key.execution_id, asked.node_id, asked.iteration]
    content += [decision.by, decision.choice, decision.data]
    content += [] if decision.arguments is None else [{**decision.arguments}]
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
    """Raise a 403 error if the caller may not answer a question, assigned to others or asked by the caller's
    own run; 404 if the run is gone.
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
    """Return the caller as rules of approval need it: user id, e-mail address ("" if the user is gone), and
    whether an admin.
    """
    user = await access_store.find_user(connection, caller.organization_id, caller.user_id)
    return Approver(caller.user_id, user.email if user else "", caller.is_admin)


async def _find_earlier_result(
    request: GatewayRequest, key: ExecutionKey, idempotency_key: IdempotencyKey | None
) -> int | None:
    """Return the number of approvals that were missing after an earlier request with this idempotency key, 0 if the
    node got its answer; None if there is none, and without a key.

    Raises a 422 error if the body of that request differs.
    """
    if idempotency_key is None:
        return None
    earlier = await acceptance.find_earlier(request.gateway.database, key.shard, idempotency_key)
    if earlier is not None and earlier.verdict is AcceptanceVerdict.MISMATCH:
        raise idempotency.mismatch_error()
    return None if earlier is None else _read_missing(earlier.execution_id)


def _read_missing(resource_id: str) -> int:
    """Return the number of missing approvals, 0 if the node got its answer, from the resource of an idempotency key:
    the id of the answer, and behind a colon the number unless it is 0.
    """
    return int(resource_id.partition(":")[2] or 0)


async def find_waiting_node(
    connection: AsyncConnection, key: ExecutionKey, node_id: str, iteration: str | None
) -> WaitingNode:
    """Return the waiting node that a request is for, by node and iteration, also one whose deadline is over.

    Raises a 409 error if none waits or it was answered, and 422 if the body names no iteration although several wait,
    or a tool call of an agent: another call may wait at the same node since the caller has read its arguments.
    """
    waiting = [
        one
        for one in await node_answers.list_input_waits(connection, key)
        if one.node_id == node_id and iteration in {None, one.iteration}
    ]
    if len(waiting) > 1:
        shown = ", ".join(one.iteration for one in waiting[:SHOWN_ITERATIONS])
        message = f"iteration is required: {len(waiting)} iterations of a loop wait, {shown}"
        raise errors.invalid([errors.problem("iteration", "required", message)])
    if waiting and iteration is None and "toolCall" in waiting[0].request:
        message = f"iteration is required: it names the tool call, {waiting[0].iteration}"
        raise errors.invalid([errors.problem("iteration", "required", message)])
    if not waiting:
        is_answered = await node_answers.is_answered(connection, key, node_id, iteration)
        raise refusal_of(AnswerReception.LATE if is_answered else AnswerReception.UNAWAITED)
    return waiting[0]


async def _store_answer(
    request: GatewayRequest,
    key: ExecutionKey,
    asked: WaitingNode,
    body: InputAnswer,
    idempotency_key: IdempotencyKey | None,
) -> tuple[int, DecisionResult | None]:
    """Store an answer in the journal and the audit trail in one transaction; return the number of approvals that are
    missing then, and its effect.

    The effect is None if an earlier request with the same key has stored the answer. Raises a 409 error for a late or
    repeated answer, 403 if the question was passed on meanwhile, and 422 if the body of the earlier request differs.
    """
    caller, answered_at = request.caller, request.gateway.clock()
    decision = ApprovalDecision(
        caller.user_id, caller.user_id, body.choice, body.data, answered_at, body.arguments
    )
    answer_id = ids.new_id("answer")

    async def work(connection: AsyncConnection) -> tuple[int, DecisionResult | None]:
        if idempotency_key is not None:
            bound = await idempotency.reserve_key(
                connection, idempotency_key, shard=key.shard, resource_id=answer_id, now=answered_at
            )
            if bound != answer_id:
                return _read_missing(bound), None
        given = await approvals.record_decision(connection, key, asked, decision)
        if given.answer.reception is not AnswerReception.TAKEN:
            raise refusal_of(given.answer.reception)
        await audit_decision(connection, key, asked, decision, caller)
        if idempotency_key is not None and given.missing:
            result = f"{answer_id}:{given.missing}"
            await idempotency.bind_key(connection, idempotency_key, shard=key.shard, resource_id=result)
        return given.missing, given

    return await request.gateway.database.transaction(work, locks=key.execution_id)


def refusal_of(reception: AnswerReception) -> ApiError:
    """Return the error for an answer that was not accepted: 403 for a question that was passed on meanwhile, and
    409 for an answer that is late, after the deadline, or for a node that doesn't wait.
    """
    if reception is AnswerReception.REASSIGNED:
        message = "The question was assigned to other people meanwhile: read it again"
        return ApiError(403, "not-assigned", message)
    if reception is AnswerReception.LATE:
        return errors.conflict("already-answered", "This node was answered already")
    if reception is AnswerReception.EXPIRED:
        return errors.conflict(
            "input-expired", "The node has stopped waiting at its deadline and continued without input"
        )
    message = "No node with this id waits for input: `pending-inputs` of the execution lists those that do"
    return errors.conflict("no-input-pending", message)


def _build_response(
    key: ExecutionKey, body: InputAnswer, missing: int, headers: Mapping[str, str] | None = None
) -> JsonResponse:
    """Return the answer to an accepted input: `counted` while `missing` approvals are missing, else `accepted`."""
    taken = InputAnswerResult(
        execution_id=key.execution_id,
        node_id=body.node_id,
        status="counted" if missing else "accepted",
        missing_approvals=missing,
    )
    return JsonResponse(taken, headers=headers)
