"""Approvals: the people of a question, votes towards a decision, and the links of assignees.

A decision locks the row of its run first, so that two votes at once can't each count without the other.
"""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct
from sqlalchemy import select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from engine.node_api import OUTPUT, AnswerSource
from journal.waits import node_answers
from journal.waits.node_answers import AnswerReception, AnswerResult, WaitingNode
from models import ids, timestamps
from models.access import UserRole
from models.approval import ApprovalLink, ApprovalRequest, ApprovalVote
from models.column_types import build_row
from models.database_time import DatabaseTime
from models.execution import Execution
from models.ingest import INTAKE_KINDS

if TYPE_CHECKING:
    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from journal.store import ExecutionKey
    from models.access import User

TOKEN_PREFIX: Final = "ap-"  # noqa: S105 - the beginning of every token
ANYONE: Final = "approval-link"
"""Assignee of a link that a workflow sends by itself: whoever holds it."""
ADMIN_ROLE: Final = "role:admin"
"""Assignee that stands for all admins of the organization."""
_PURPOSE: Final = b"pilotflame approval link 1"
_encode = msgspec.json.Encoder().encode


class AnswerRefusal(StrEnum):
    """Reason why a person may not answer a question."""

    NOT_ASSIGNED = "not-assigned"
    SELF_APPROVAL = "self-approval"
    ALREADY_ANSWERED = "already-answered"
    """They have answered a question that needs several people."""


class Approver(Struct, frozen=True):
    """Person with answers to give, or with questions to see."""

    user_id: str
    email: str
    is_admin: bool


class ApprovalDecision(Struct, frozen=True):
    """Answer of one person."""

    by: str
    """Id of the user, or the mail address that has got the link."""
    user_id: str | None
    choice: str | None
    data: Json
    answered_at: datetime
    arguments: Mapping[str, Json] | None = None
    """Arguments of an approved tool call in place of those of the model; None to keep these."""


class DecisionResult(Struct, frozen=True):
    """Result of a decision: the answer of the node, or a vote towards it."""

    answer: AnswerResult
    missing: int = 0
    """Approvals that the choice still needs; above 0 the node waits on."""


def needed_approvals(request: Mapping[str, Json]) -> int:
    """Return how many people must make the same choice for a question's answer; 1 by default."""
    count = request.get("approvals")
    return int(count) if isinstance(count, int | float) else 1


def assignees_of(request: Mapping[str, Json]) -> Sequence[str]:
    """Return the assignees of a question: user ids, mail addresses, or `role:admin`.

    Empty if everybody with access to the workflow's runs may answer.
    """
    return read_assignees(request.get("assignees"))


def read_assignees(assignees: Json) -> Sequence[str]:
    """Return the assignees in the value of a request's field `assignees`; empty for any value but a list."""
    return [str(one) for one in assignees] if isinstance(assignees, list) else []


def find_parameters(request: Mapping[str, Json]) -> Mapping[str, Json] | None:
    """Return the JSON Schema of the arguments that an answer may give in place of those of the tool call.

    None for other questions, and for those that need several people, who have to approve the same arguments.
    """
    asked = request.get("toolCall")
    parameters = asked.get("parameters") if isinstance(asked, dict) else None
    return parameters if isinstance(parameters, dict) and needed_approvals(request) == 1 else None


def find_call_hash(request: Mapping[str, Json]) -> str:
    """Return the hash of the tool call that a question is about; empty for other questions."""
    asked = request.get("toolCall")
    return str(asked.get("hash", "")) if isinstance(asked, dict) else ""


def extra_addresses(request: Mapping[str, Json]) -> Sequence[str]:
    """Return the mail addresses that get a link to a question besides its assignees."""
    notify = request.get("notify")
    extra = notify.get("to") if isinstance(notify, dict) else None
    return [str(one) for one in extra] if isinstance(extra, list) else []


def allows_self(request: Mapping[str, Json]) -> bool:
    """Return whether the user who started the run may answer; by default they may if there are no assignees."""
    return request.get("allowSelf", not assignees_of(request)) is True


def fold_assignee(assignee: str) -> str:
    """Return an assignee in the form by which it is compared: mail addresses in lower case."""
    return assignee.casefold() if "@" in assignee else assignee


def find_refusal(
    request: Mapping[str, Json], approver: Approver, *, starter_id: str, trigger_type: str
) -> AnswerRefusal | None:
    """Return the reason for a person not to answer a question; None if they may. An earlier answer of theirs is not
    looked for.

    They must be among the assignees, if there are any. The person who started the run may answer if `allowSelf` says
    so, by default only a question without assignees. Nobody counts as the starter of a run with a `trigger_type` of
    `INTAKE_KINDS`, such as `webhook`.
    """
    assignees = assignees_of(request)
    names = {approver.user_id, approver.email.casefold()} | ({ADMIN_ROLE} if approver.is_admin else set())
    if assignees and names.isdisjoint(fold_assignee(one) for one in assignees):
        return AnswerRefusal.NOT_ASSIGNED
    was_started_by = trigger_type not in INTAKE_KINDS and approver.user_id == starter_id
    if was_started_by and not allows_self(request):
        return AnswerRefusal.SELF_APPROVAL
    return None


# ── decisions ───────────────────────────────────────────────────────────────────────────────────────────────


async def record_decision(
    connection: AsyncConnection, key: ExecutionKey, asked: WaitingNode, decision: ApprovalDecision
) -> DecisionResult:
    """Record a person's answer in the caller's transaction; once enough people made the same choice, the node
    gets it.

    The result says if the answer came late, expired or was not awaited, and how many votes are missing. A
    second vote of a person is late. The caller has checked that the person may answer `asked`: an answer to a
    question that was assigned to other people since then is not taken.
    """
    place = (asked.node_id, asked.iteration)
    own: dict[str, Json] = {
        "choice": decision.choice,
        "by": decision.by,
        "at": timestamps.format_timestamp(decision.answered_at),
    }
    value: dict[str, Json] = {"data": decision.data, **own}
    if decision.arguments is not None:
        value["arguments"] = {**decision.arguments}
        value["originalHash"] = find_call_hash(asked.request)
    needed = needed_approvals(asked.request)
    await lock_run(connection, key)
    waiting = {
        (one.node_id, one.iteration): one for one in await node_answers.list_input_waits(connection, key)
    }
    if place in waiting and assignees_of(waiting[place].request) != assignees_of(asked.request):
        return DecisionResult(AnswerResult(AnswerReception.REASSIGNED))
    if needed > 1:
        if place not in waiting:
            is_answered = await node_answers.is_answered(connection, key, *place)
            reception = AnswerReception.LATE if is_answered else AnswerReception.UNAWAITED
            return DecisionResult(AnswerResult(reception))
        if asked.expires_at is not None and asked.expires_at <= decision.answered_at:
            return DecisionResult(AnswerResult(AnswerReception.EXPIRED))
        votes = await _read_votes(connection, key, place)
        if decision.by in votes:
            return DecisionResult(AnswerResult(AnswerReception.LATE))
        votes[decision.by] = own
        await _store_vote(connection, key, asked, decision)
        agreeing = [one for one in votes.values() if one["choice"] == decision.choice]
        if len(agreeing) < needed:
            return DecisionResult(AnswerResult(AnswerReception.TAKEN), needed - len(agreeing))
        value["approvals"] = list(votes.values())
    answer = await node_answers.store_answer(
        connection,
        key,
        *place,
        node_answers.encode_output_answer(value, decision.choice or OUTPUT),
        kind=AnswerSource.INPUT,
        user_id=decision.user_id,
    )
    if needed == 1 and answer.reception is AnswerReception.TAKEN:
        await _store_vote(connection, key, asked, decision)
    return DecisionResult(answer)


async def _store_vote(
    connection: AsyncConnection, key: ExecutionKey, asked: WaitingNode, decision: ApprovalDecision
) -> None:
    """Store the answer of one person, for the list of answers; one that is stored stays."""
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    organization = select(col(Execution.organization_id)).where(
        col(Execution.id) == key.execution_id, col(Execution.shard) == key.shard
    )
    statement = dialect.insert(ApprovalVote).values(
        execution_id=key.execution_id,
        node_id=asked.node_id,
        iteration=asked.iteration,
        voter=decision.by,
        shard=key.shard,
        id=ids.new_id("answer"),
        organization_id=organization.scalar_subquery(),
        title=str(asked.request.get("title") or ""),
        choice=decision.choice,
        data=_encode(decision.data).decode(),
        created_at=DatabaseTime(),
    )
    await connection.execute(statement.on_conflict_do_nothing())


async def _read_votes(
    connection: AsyncConnection, key: ExecutionKey, place: tuple[str, str]
) -> dict[str, dict[str, Json]]:
    """Return the votes of a question so far by voter, the earliest first, as the output of the node shows them.

    `place` is the id of the node and its iteration.
    """
    statement = (
        select(col(ApprovalVote.voter), col(ApprovalVote.choice), col(ApprovalVote.created_at))
        .where(
            col(ApprovalVote.execution_id) == key.execution_id,
            col(ApprovalVote.shard) == key.shard,
            col(ApprovalVote.node_id) == place[0],
            col(ApprovalVote.iteration) == place[1],
        )
        .order_by(col(ApprovalVote.created_at), col(ApprovalVote.voter))
    )
    return {
        row.voter: {"choice": row.choice, "by": row.voter, "at": timestamps.format_timestamp(row.created_at)}
        for row in await connection.execute(statement)
    }


async def read_votes(
    connection: AsyncConnection, execution_ids: Sequence[str]
) -> dict[tuple[str, str, str], Sequence[ApprovalVote]]:
    """Return the votes of questions in these runs by execution id, node id and iteration, the earliest first."""
    found: dict[tuple[str, str, str], list[ApprovalVote]] = {}
    if execution_ids:
        statement = (
            select(ApprovalVote)
            .where(col(ApprovalVote.execution_id).in_(execution_ids))
            .order_by(col(ApprovalVote.created_at), col(ApprovalVote.voter))
        )
        for row in (await connection.execute(statement)).mappings():
            vote = build_row(ApprovalVote, row)
            found.setdefault((vote.execution_id, vote.node_id, vote.iteration), []).append(vote)
    return {**found}


async def lock_run(connection: AsyncConnection, key: ExecutionKey) -> Row[*tuple[str, str, str]] | None:
    """Lock the row of a run until the end of the transaction, so that no other transaction decides about its questions
    meanwhile.

    Return its workflow, user and kind of trigger; None if it is gone.
    """
    statement = (
        select(col(Execution.workflow_id), col(Execution.user_id), col(Execution.trigger_type))
        .where(col(Execution.id) == key.execution_id, col(Execution.shard) == key.shard)
        .with_for_update()
    )
    return (await connection.execute(statement)).first()


async def replace_assignees(
    connection: AsyncConnection, key: ExecutionKey, asked: WaitingNode, assignees: Sequence[str]
) -> None:
    """Replace the assignees of a waiting question, in the caller's transaction, which has locked the run.

    The rule about the user who started the run stays as it was. The question is due for mails again, if it is
    sent by mail.
    """
    request: dict[str, Json] = dict(asked.request)
    request |= {"assignees": list(assignees), "allowSelf": allows_self(asked.request)}
    await node_answers.replace_request(connection, key, asked, request)
    await connection.execute(
        update(ApprovalRequest)
        .where(
            col(ApprovalRequest.execution_id) == key.execution_id,
            col(ApprovalRequest.node_id) == asked.node_id,
            col(ApprovalRequest.iteration) == asked.iteration,
        )
        .values(due_at=DatabaseTime(), attempts=0, error=None)
    )


async def read_requests(
    connection: AsyncConnection, execution_ids: Sequence[str]
) -> dict[tuple[str, str, str], ApprovalRequest]:
    """Return the stored requests for approval mails of these runs, by execution id, node id and iteration."""
    if not execution_ids:
        return {}
    statement = select(ApprovalRequest).where(col(ApprovalRequest.execution_id).in_(execution_ids))
    found = [build_row(ApprovalRequest, row) for row in (await connection.execute(statement)).mappings()]
    return {(one.execution_id, one.node_id, one.iteration): one for one in found}


# ── links ───────────────────────────────────────────────────────────────────────────────────────────────────


def derive_token(secret: bytes, key: ExecutionKey, node_id: str, iteration: str, assignee: str) -> str:
    """Return the token of an assignee's approval link, the same each time: `ap-` and 256 bits derived from
    the server's secret.
    """
    parts = [_PURPOSE.decode(), key.execution_id, node_id, iteration, assignee]
    digest = hmac.digest(secret, _encode(parts), "sha256")
    return TOKEN_PREFIX + urlsafe_b64encode(digest).decode().rstrip("=")


def hash_token(token: str) -> str:
    """Return the stored form of a token: its SHA-256 in hexadecimal."""
    return sha256(token.encode()).hexdigest()


def is_addressed(request: Mapping[str, Json], link: ApprovalLink, user: User | None) -> bool:
    """Return whether the assignee of a link is among the people of a question, or further addresses of `notify`.

    True for a link that the workflow sends by itself (`ANYONE`), and for a question without assignees. `user` is the
    assignee of the link, None for an address without a user.
    """
    assignees = assignees_of(request)
    if not assignees or link.assignee == ANYONE:
        return True
    people = {fold_assignee(one) for one in [*assignees, *extra_addresses(request)]}
    names = {fold_assignee(link.assignee)}
    if user is not None:
        names |= {user.email.casefold()} | ({ADMIN_ROLE} if user.role == UserRole.ADMIN else set())
    return not people.isdisjoint(names)


class LinkPlace(Struct, frozen=True):
    """Question and assignee of a link."""

    key: ExecutionKey
    organization_id: str
    node_id: str
    iteration: str
    assignee: str


async def store_link(connection: AsyncConnection, place: LinkPlace, digest: str) -> None:
    """Store an approval link for an assignee by the hash of its token; one that is stored stays."""
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(ApprovalLink).values(
        hash=digest,
        execution_id=place.key.execution_id,
        node_id=place.node_id,
        iteration=place.iteration,
        shard=place.key.shard,
        organization_id=place.organization_id,
        assignee=place.assignee,
        round=0,
        created_at=DatabaseTime(),
    )
    await connection.execute(statement.on_conflict_do_nothing())


async def find_link(connection: AsyncConnection, token: str) -> ApprovalLink | None:
    """Return the approval link with a token, used or not; None if there is none."""
    statement = select(ApprovalLink).where(col(ApprovalLink.hash) == hash_token(token))
    row = (await connection.execute(statement)).mappings().first()
    return None if row is None else build_row(ApprovalLink, row)


async def use_link(connection: AsyncConnection, link: ApprovalLink) -> bool:
    """Mark a link as used, in the transaction of its answer; False if it was used before."""
    statement = (
        update(ApprovalLink)
        .where(col(ApprovalLink.hash) == link.hash, col(ApprovalLink.used_at).is_(None))
        .values(used_at=DatabaseTime())
        .returning(col(ApprovalLink.hash))
    )
    return (await connection.execute(statement)).first() is not None
