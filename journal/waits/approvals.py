"""Approvals: who may answer a question, votes towards a decision, and the links of assignees.

A decision locks the row of its run first, so that two votes at once can't each count without the other.
"""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from engine.node_api import OUTPUT, AnswerSource
from journal.waits import node_answers
from journal.waits.node_answers import AnswerReception, AnswerResult, WaitingNode
from models import timestamps
from models.approval import ApprovalLink, ApprovalRequest, ApprovalVote
from models.database_time import DatabaseTime
from models.execution import Execution
from models.ingest import INTAKE_KINDS

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from journal.store import ExecutionKey

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


@dataclass(frozen=True, slots=True)
class Approver:
    """Person who answers, or wants to know the questions."""

    user_id: str
    email: str
    is_admin: bool


@dataclass(frozen=True, slots=True)
class ApprovalDecision:
    """Answer of one person."""

    by: str
    """Id of the user, or the mail address that has got the link."""
    user_id: str | None
    choice: str | None
    data: Json
    answered_at: datetime


@dataclass(frozen=True, slots=True)
class DecisionResult:
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
    assignees = request.get("assignees")
    return [str(one) for one in assignees] if isinstance(assignees, list) else []


def find_refusal(
    request: Mapping[str, Json], approver: Approver, *, starter_id: str, trigger_type: str
) -> AnswerRefusal | None:
    """Return the reason why a person may not answer a question; None if they may.

    They must be among the assignees, if there are any. The person who started the run may answer if
    `allowSelf` says so, by default only a question without assignees.
    """
    assignees = assignees_of(request)
    names = {approver.user_id, approver.email.casefold()} | ({ADMIN_ROLE} if approver.is_admin else set())
    if assignees and names.isdisjoint(one.casefold() if "@" in one else one for one in assignees):
        return AnswerRefusal.NOT_ASSIGNED
    was_started_by = trigger_type not in INTAKE_KINDS and approver.user_id == starter_id
    if was_started_by and request.get("allowSelf", not assignees) is not True:
        return AnswerRefusal.SELF_APPROVAL
    return None


# ── decisions ───────────────────────────────────────────────────────────────────────────────────────────────


async def record_decision(
    connection: AsyncConnection, key: ExecutionKey, asked: WaitingNode, decision: ApprovalDecision
) -> DecisionResult:
    """Record a person's answer in the caller's transaction; once enough people made the same choice, the node
    gets it.

    The result says if the answer came late, expired or was not awaited, and how many votes are missing. A
    second vote of a person is late. The caller has checked that the person may answer.
    """
    place = (asked.node_id, asked.iteration)
    own: dict[str, Json] = {
        "choice": decision.choice,
        "by": decision.by,
        "at": timestamps.format_timestamp(decision.answered_at),
    }
    value: dict[str, Json] = {"data": decision.data, **own}
    needed = needed_approvals(asked.request)
    if needed > 1:
        locked = select(col(Execution.id)).where(col(Execution.id) == key.execution_id).with_for_update()
        await connection.execute(locked)
        if all(
            (one.node_id, one.iteration) != place
            for one in await node_answers.list_input_waits(connection, key)
        ):
            is_answered = await node_answers.is_answered(connection, key, *place)
            reception = AnswerReception.LATE if is_answered else AnswerReception.UNAWAITED
            return DecisionResult(AnswerResult(reception))
        if asked.expires_at is not None and asked.expires_at <= decision.answered_at:
            return DecisionResult(AnswerResult(AnswerReception.EXPIRED))
        votes = await _read_votes(connection, key, place)
        if decision.by in votes:
            return DecisionResult(AnswerResult(AnswerReception.LATE))
        votes[decision.by] = own
        await connection.execute(
            insert(ApprovalVote).values(
                execution_id=key.execution_id,
                node_id=asked.node_id,
                iteration=asked.iteration,
                voter=decision.by,
                shard=key.shard,
                choice=decision.choice,
                data=_encode(decision.data).decode(),
                created_at=DatabaseTime(),
            )
        )
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
    return DecisionResult(answer)


async def _read_votes(
    connection: AsyncConnection, key: ExecutionKey, place: tuple[str, str]
) -> dict[str, dict[str, Json]]:
    """Return the votes of a question so far by voter, the earliest first, as the output of the node shows them."""
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


async def read_requests(
    connection: AsyncConnection, execution_ids: Sequence[str]
) -> dict[tuple[str, str, str], ApprovalRequest]:
    """Return the stored requests for approval mails of these runs, by execution id, node id and iteration."""
    if not execution_ids:
        return {}
    statement = select(ApprovalRequest).where(col(ApprovalRequest.execution_id).in_(execution_ids))
    found = [ApprovalRequest(**row) for row in (await connection.execute(statement)).mappings()]
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


@dataclass(frozen=True, slots=True)
class LinkPlace:
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
    return None if row is None else ApprovalLink(**row)


async def use_link(connection: AsyncConnection, link: ApprovalLink) -> bool:
    """Mark a link as used, in the transaction of its answer; False if it was used before."""
    statement = (
        update(ApprovalLink)
        .where(col(ApprovalLink.hash) == link.hash, col(ApprovalLink.used_at).is_(None))
        .values(used_at=DatabaseTime())
        .returning(col(ApprovalLink.hash))
    )
    return (await connection.execute(statement)).first() is not None
