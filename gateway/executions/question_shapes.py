"""Questions to people: their form, mails and votes, and for one person assignment and reasons of refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from msgspec import UNSET, UnsetType, structs

from gateway.executions import input_checks
from gateway.http.keyset import KeysetPage
from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from journal.waits import approvals
from journal.waits.approvals import AnswerRefusal
from models import access_store
from models.ingest import INTAKE_KINDS

if TYPE_CHECKING:
    from sqlalchemy import RowMapping
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from journal.waits.approvals import Approver
    from journal.waits.node_answers import OrganizationWait, WaitingNode
    from models.approval import ApprovalRequest, ApprovalVote


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
    parameters: Mapping[str, Any] | None
    """JSON Schema of `arguments` in the answer, which replace those of the call; null if it takes none."""


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


class QuestionAssignment(StrEnum):
    """Way in which a question is assigned, as the caller sees it."""

    CALLER = "caller"
    """By the id or the mail address of the caller."""
    ROLE = "role"
    """By a role that the caller has."""
    ANYONE = "anyone"
    """To nobody: everybody who may execute the workflow may answer."""
    OTHERS = "others"
    """To other people only."""


class ExpiryActionShape(StrEnum):
    """Action of a question that nobody answers in time."""

    FAIL = "fail"
    """The node fails."""
    CONTINUE = "continue"
    """The run continues by the port `expired`."""


class QuestionVote(WireStruct):
    """Answer of one person to a question that needs several."""

    by: str
    """Id of the user, or the mail address that has got the link."""
    by_name: str
    """Name of the user; the mail address of a user without one, and of a person without an account."""
    choice: str | None
    at: Instant


class AssignedInput(PendingInput, kw_only=True):
    """Question in the inbox of the caller."""

    execution_id: str
    workflow_id: str
    workflow_name: str
    assignment: QuestionAssignment
    may_answer: bool
    refusal: AnswerRefusal | None
    """Reason why the caller may not answer; null if the caller may."""
    assignee_names: Mapping[str, str]
    """Names of the users among the assignees by id; mail addresses of those without a name."""
    votes: Sequence[QuestionVote]
    """Answers so far to a question that needs several, the earliest first."""
    started_by: str | None
    """Id of the user who started the run; null for runs by messages, mails, webhooks, events and schedules."""
    started_by_name: str | None
    """Name of that user; null for other runs, and for a user who is gone."""
    allows_self: bool
    """Whether the user who started the run may answer."""
    on_expiry: ExpiryActionShape | None
    """Action if nobody answers in time; null without an end."""


class AssignedInputs(KeysetPage, kw_only=True):
    """Questions in the inbox of the caller; with `after`, a page of them.

    `count` is the number of those that match; with `after`, among the 500 that a page examines.
    """

    count: int
    inputs: Sequence[AssignedInput]
    assignments: Mapping[QuestionAssignment, int] | UnsetType = UNSET
    """With `after`, the number of questions of each assignment among those that the page examines."""


class AnsweredInput(WireStruct):
    """Answer of a person to a question."""

    id: str
    execution_id: str
    workflow_id: str
    workflow_name: str
    node_id: str
    iteration: str
    """Turn of the enclosing loops; empty outside of loops."""
    title: str
    choice: str | None
    """Port of the choice; null for an answer without one."""
    by: str
    """Id of the user, or the mail address that has got the link."""
    by_name: str
    """Name of the user; the mail address of a user without one, and of a person without an account."""
    answered_at: Instant


class AnsweredInputs(WireStruct):
    """Page of the answers to questions."""

    answers: Sequence[AnsweredInput]
    next: str | None
    """Cursor of the next page for `after`; null on the last page."""


def find_refusal(wait: OrganizationWait, approver: Approver) -> AnswerRefusal | None:
    """Return the reason why a person may not answer a question by its rules; None if they may, although they may have
    answered it already.
    """
    return approvals.find_refusal(
        wait.node.request, approver, starter_id=wait.user_id, trigger_type=wait.trigger_type
    )


async def show_waits(
    connection: AsyncConnection, waits: Sequence[OrganizationWait], approver: Approver, organization_id: str
) -> Sequence[AssignedInput]:
    """Return waiting nodes as the API shows them to a person, with their mails, votes and names."""
    execution_ids = list({one.execution_id for one in waits})
    mails = await approvals.read_requests(connection, execution_ids)
    votes = await approvals.read_votes(connection, execution_ids)
    people = {name for one in waits for name in approvals.assignees_of(one.node.request) if "@" not in name}
    people |= {one.user_id for one in waits} | {vote.voter for given in votes.values() for vote in given}
    names = await access_store.read_user_names(connection, organization_id, people)
    shown = []
    for one in waits:
        place = (one.execution_id, one.node.node_id, one.node.iteration)
        shown.append(_show_wait(one, approver, mails.get(place), votes.get(place, ()), names))
    return shown


def _show_wait(
    wait: OrganizationWait,
    approver: Approver,
    mails: ApprovalRequest | None,
    votes: Sequence[ApprovalVote],
    names: Mapping[str, str],
) -> AssignedInput:
    """Return a waiting node as the API shows it to a person; `names` are those of users by id."""
    asked = wait.node.request
    assignees = approvals.assignees_of(asked)
    refusal = find_refusal(wait, approver)
    has_answered = any(vote.voter == approver.user_id for vote in votes)
    reason = AnswerRefusal.ALREADY_ANSWERED if has_answered else refusal
    starter = None if wait.trigger_type in INTAKE_KINDS else wait.user_id
    return AssignedInput(
        **structs.asdict(show_wait(wait.node, mails)),
        execution_id=wait.execution_id,
        workflow_id=wait.workflow_id,
        workflow_name=wait.workflow_name,
        assignment=find_assignment(assignees, approver),
        may_answer=reason is None,
        refusal=reason,
        assignee_names={one: names[one] for one in assignees if one in names},
        votes=[
            QuestionVote(
                by=vote.voter,
                by_name=names.get(vote.voter, vote.voter),
                choice=vote.choice,
                at=instant(vote.created_at),
            )
            for vote in votes
        ],
        started_by=starter,
        started_by_name=None if starter is None else names.get(starter),
        allows_self=approvals.allows_self(asked),
        on_expiry=_find_expiry_action(wait.node),
    )


def _find_expiry_action(node: WaitingNode) -> ExpiryActionShape | None:
    """Return the action of a node if nobody answers in time; None if it waits without an end."""
    if node.expires_at is None:
        return None
    return ExpiryActionShape.CONTINUE if node.continues_at_expiry else ExpiryActionShape.FAIL


def find_assignment(assignees: Sequence[str], approver: Approver) -> QuestionAssignment:
    """Return the assignment of a question from the view of a person: to anyone, to them, to a role of theirs, or to
    others.

    An assignment by their id or address takes precedence over that by a role.
    """
    if not assignees:
        return QuestionAssignment.ANYONE
    if {approver.user_id, approver.email.casefold()} & {approvals.fold_assignee(one) for one in assignees}:
        return QuestionAssignment.CALLER
    if approver.is_admin and approvals.ADMIN_ROLE in assignees:
        return QuestionAssignment.ROLE
    return QuestionAssignment.OTHERS


def show_wait(one: WaitingNode, mails: ApprovalRequest | None) -> PendingInput:
    """Return a waiting node as the API shows it; `mails` is None if its node sends none."""
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
        tool_call=_show_tool_call(one.request),
    )


def _show_tool_call(request: Mapping[str, Json]) -> AwaitedToolCall | None:
    """Return the tool call in the request of a question; None for a question without one."""
    asked = request.get("toolCall")
    if not isinstance(asked, dict):
        return None
    arguments = asked.get("arguments")
    return AwaitedToolCall(
        agent_id=str(asked.get("agentId", "")),
        tool=str(asked.get("tool", "")),
        arguments=arguments if isinstance(arguments, dict) else {},
        hash=str(asked.get("hash", "")),
        parameters=approvals.find_parameters(request),
    )


def show_answer(row: RowMapping, name: str) -> AnsweredInput:
    """Return a row of an answer as the API shows it, with the name of its person."""
    return AnsweredInput(
        id=row["id"],
        execution_id=row["execution_id"],
        workflow_id=row["workflow_id"],
        workflow_name=row["workflow_name"],
        node_id=row["node_id"],
        iteration=row["iteration"],
        title=row["title"] or "",
        choice=row["choice"],
        by=row["voter"],
        by_name=name,
        answered_at=instant(row["created_at"]),
    )
