"""Mails about questions: one for each assignee, with a link of their own, and reminders.

The rows of requests are committed with the wait of their runs and are the queue of these mails. A worker that
takes a row sets its `due_at` to a later time, as a lease. A mail may be sent twice if a worker dies, with the
same Message-ID and the same link.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import structlog
from msgspec import Struct
from sqlalchemy import func, or_, select, update
from sqlmodel import col

from concurrency import offload
from engine.run_errors import NodeError
from engine.services import RunCaller
from journal.store import ExecutionKey
from journal.waits import approvals, node_answers
from mail import composition, headers
from mail.composition import OutgoingMail
from models.access import User, UserRole
from models.approval import ApprovalLink, ApprovalRequest, ApprovalVote
from models.column_types import build_row
from models.database_time import DatabaseTime
from models.errors import DatabaseUnavailable
from models.execution import Execution
from models.ingest import INTAKE_KINDS
from workers import webhook_delivery

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from journal.waits.node_answers import WaitingNode
    from models.database import Database
    from nodes.connections.data_source_connections import DataSourceConnections

log = structlog.get_logger()

LEASE_SECONDS: Final = 120.0
BATCH_REQUESTS: Final = 10
MAX_RECIPIENTS: Final = 50
MAX_ROUNDS: Final = 11
"""The question, and ten reminders."""
TIMEOUT_SECONDS: Final = 30.0


class ClaimedRequest(Struct, frozen=True):
    """Due request that this worker has claimed until its lease ends."""

    key: ExecutionKey
    node_id: str
    iteration: str
    organization_id: str
    round: int
    attempts: int
    leased_until: datetime


class OpenQuestion(Struct, frozen=True):
    """Question that still waits, and the people who get a mail about it."""

    asked: WaitingNode
    caller: RunCaller
    recipients: Mapping[str, str]
    """Mail addresses by assignee: the id of a user, or the address itself."""


class ApprovalMailer:
    """Sender of the mails of one worker, by periodic sweeps."""

    def __init__(
        self,
        database: Database,
        connections: DataSourceConnections,
        secret: bytes,
        public_url: str,
        *,
        sweep_seconds: float,
    ) -> None:
        self._database = database
        self._connections = connections
        self._secret = secret
        self._public_url = public_url.rstrip("/")
        self._sweep_seconds = sweep_seconds
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the periodic sweep, which sends the mails of due requests."""
        self._sweeping = asyncio.create_task(self._sweep_forever())

    async def close(self) -> None:
        """End the sweep; a mail that is being sent is interrupted, and other workers take the requests when
        their leases end.
        """
        if self._sweeping is not None:
            self._sweeping.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeping

    async def sweep(self) -> None:
        """Claim up to ten due requests for approval mails, and send their mails, one request after the other.

        Raises `DatabaseUnavailable`.
        """
        for request in await self._claim():
            await self._perform(request)

    async def _sweep_forever(self) -> None:
        """Sweep again and again until canceled; errors are logged."""
        while True:
            # Randomized, so that workers that were started together don't sweep at the same time.
            await asyncio.sleep(self._sweep_seconds * random.uniform(0.8, 1.2))  # noqa: S311 - no secret
            try:
                await self.sweep()
            except DatabaseUnavailable as error:
                log.warning("approval mails interrupted", error=str(error))
            except Exception:
                log.exception("approval mails interrupted")

    async def _claim(self) -> Sequence[ClaimedRequest]:
        """Claim up to ten due requests for approval mails for two minutes, the longest due first; none if
        nothing is due.

        Raises `DatabaseUnavailable`.
        """
        is_due = col(ApprovalRequest.due_at) <= DatabaseTime()
        async with self._database.read() as connection:
            if await connection.scalar(select(col(ApprovalRequest.node_id)).where(is_due).limit(1)) is None:
                return []

        async def take(connection: AsyncConnection) -> Sequence[ClaimedRequest]:
            identity = (
                *(col(ApprovalRequest.execution_id), col(ApprovalRequest.node_id)),
                col(ApprovalRequest.iteration),
            )
            due = (
                select(*identity)
                .where(is_due)
                .order_by(col(ApprovalRequest.due_at))
                .limit(BATCH_REQUESTS)
                .with_for_update(skip_locked=True)
            )
            claimed: list[ClaimedRequest] = []
            for place in (await connection.execute(due)).all():
                statement = (
                    update(ApprovalRequest)
                    .where(*(column == value for column, value in zip(identity, place, strict=True)), is_due)
                    .values(due_at=DatabaseTime() + int(LEASE_SECONDS * 1_000_000))
                    .returning(ApprovalRequest)
                )
                row = (await connection.execute(statement)).mappings().first()
                if row is not None:
                    claimed.append(_build_claim(row))
            return claimed

        return await self._database.transaction(take)

    async def _perform(self, request: ClaimedRequest) -> None:
        """Send the mails of one request, and store when the next round (a reminder) is due; end the request without a
        mail if no answer is awaited any more.

        A `NodeError` is logged and stored, and the round tried again up to nine times. Raises `DatabaseUnavailable`.
        """
        question = await self._read_question(request)
        if question is None:
            await self._settle(request, due_in_seconds=None)
            return
        notify = question.asked.request.get("notify")
        try:
            await self._send_all(request, question, notify if isinstance(notify, dict) else {})
        except NodeError as error:
            attempts = request.attempts + 1
            pause = webhook_delivery.retry_delay_seconds(attempts, random.random())  # noqa: S311 - no secret
            log.warning(
                "approval mail failed",
                execution_id=request.key.execution_id,
                node_id=request.node_id,
                attempts=attempts,
                error=error.message,
            )
            await self._settle(request, due_in_seconds=pause, attempts=attempts, error=error.message)
            return
        reminder = question.asked.request.get("remindAfterSeconds")
        rounds = request.round + 1
        due_in = float(reminder) if isinstance(reminder, int | float) and rounds < MAX_ROUNDS else None
        await self._settle(request, due_in_seconds=due_in, round_=rounds)

    async def _settle(
        self,
        request: ClaimedRequest,
        *,
        due_in_seconds: float | None,
        round_: int | None = None,
        attempts: int = 0,
        error: str | None = None,
    ) -> None:
        """Store the outcome of a round of mails, unless another worker has claimed the request meanwhile.

        `due_in_seconds` is the time until the request is due again; None ends it. `round_` is the next round; None: the
        same. `attempts` is the number of failed attempts at that round, and `error` the last failure, None for a
        success. Raises `DatabaseUnavailable`.
        """
        due_at = None if due_in_seconds is None else DatabaseTime() + int(due_in_seconds * 1_000_000)
        statement = (
            update(ApprovalRequest)
            .where(*_is_request(request), col(ApprovalRequest.due_at) == request.leased_until)
            .values(
                due_at=due_at,
                attempts=attempts,
                error=error,
                round=request.round if round_ is None else round_,
            )
        )
        await self._database.transaction(lambda connection: connection.execute(statement))

    # ── mails ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _send_all(
        self, request: ClaimedRequest, question: OpenQuestion, notify: Mapping[str, Json]
    ) -> None:
        """Send the mail of this round, with an approval link of their own, to each assignee who has not got it yet;
        note each mail.

        `notify` has the question's settings of mails. An assignee whose link was used gets no mail, and the first
        failure ends the round. Raises `NodeError` for a missing setting or a failure of the mail server, and
        `DatabaseUnavailable`.
        """
        if not self._public_url:
            raise NodeError("PILOTFLAME_PUBLIC_URL is not set: links need the address of the gateway")
        server = await self._connections.mail_server(question.caller, str(notify.get("dataSource") or ""))
        sender = _read_sender(str(notify.get("from") or server.login_name))
        for assignee, address in question.recipients.items():
            token = approvals.derive_token(
                self._secret, request.key, request.node_id, request.iteration, assignee
            )
            link = await self._store_link(request, assignee, approvals.hash_token(token))
            if link is None or link.round > request.round:
                continue
            outgoing = OutgoingMail(
                sender=sender,
                message_id=composition.make_message_id(f"{link.hash}:{request.round}", sender.domain),
                date=self._database.clock.now(),
                to=_read_mailboxes(address),
                subject=_build_subject(question.asked, notify, link.round),
                text=_build_text(question.asked, f"{self._public_url}/approve/{token}"),
            )
            content = await offload.run_in_thread(_compose_mail, outgoing)
            await server.send(sender.address, [address], content, timeout_seconds=TIMEOUT_SECONDS)
            await self._note_sent(link, request.round + 1)

    async def _note_sent(self, link: ApprovalLink, round_: int) -> None:
        """Store with a link that a mail was sent, and the number of the next round, so that a repetition leaves the
        mail out.
        """
        statement = update(ApprovalLink).where(col(ApprovalLink.hash) == link.hash).values(round=round_)
        await self._database.transaction(lambda connection: connection.execute(statement))

    async def _store_link(self, request: ClaimedRequest, assignee: str, digest: str) -> ApprovalLink | None:
        """Store the approval link of an assignee before its mail is sent, unless it exists; return it, or None if it
        was used.

        `digest` is the hash of its token. Raises `DatabaseUnavailable`.
        """

        async def store(connection: AsyncConnection) -> ApprovalLink | None:
            place = approvals.LinkPlace(
                request.key, request.organization_id, request.node_id, request.iteration, assignee
            )
            await approvals.store_link(connection, place, digest)
            unused = select(ApprovalLink).where(
                col(ApprovalLink.hash) == digest, col(ApprovalLink.used_at).is_(None)
            )
            row = (await connection.execute(unused)).mappings().first()
            return None if row is None else build_row(ApprovalLink, row)

        return await self._database.transaction(store)

    async def _read_question(self, request: ClaimedRequest) -> OpenQuestion | None:
        """Return the open question of a request, with the addresses of assignees without a vote.

        None if its answer is no longer awaited. Raises `DatabaseUnavailable`.
        """
        async with self._database.read() as connection:
            waiting = [
                one
                for one in await node_answers.list_input_waits(connection, request.key)
                if (one.node_id, one.iteration) == (request.node_id, request.iteration)
            ]
            columns = (
                *(col(Execution.user_id), col(Execution.workflow_id)),
                *(col(Execution.key_id), col(Execution.trigger_type)),
            )
            run = (
                await connection.execute(
                    select(*columns).where(
                        col(Execution.id) == request.key.execution_id,
                        col(Execution.shard) == request.key.shard,
                    )
                )
            ).first()
            if not waiting or run is None:
                return None
            asked = waiting[0]
            voted = select(col(ApprovalVote.voter)).where(
                col(ApprovalVote.execution_id) == request.key.execution_id,
                col(ApprovalVote.shard) == request.key.shard,
                col(ApprovalVote.node_id) == request.node_id,
                col(ApprovalVote.iteration) == request.iteration,
            )
            done = {*await connection.scalars(voted)}
            users = await _read_users(connection, request.organization_id, asked)
        recipients = _list_recipients(asked, users, starter_id=run.user_id, trigger_type=run.trigger_type)
        caller = RunCaller(
            request.organization_id, run.user_id, run.workflow_id, request.key.execution_id, run.key_id
        )
        return OpenQuestion(
            asked, caller, {name: address for name, address in recipients.items() if name not in done}
        )


def _build_claim(row: Mapping[Any, Any]) -> ClaimedRequest:
    return ClaimedRequest(
        key=ExecutionKey(row["execution_id"], row["shard"]),
        node_id=row["node_id"],
        iteration=row["iteration"],
        organization_id=row["organization_id"],
        round=row["round"],
        attempts=row["attempts"],
        leased_until=row["due_at"],
    )


def _is_request(request: ClaimedRequest) -> Sequence[Any]:
    return (
        col(ApprovalRequest.execution_id) == request.key.execution_id,
        col(ApprovalRequest.node_id) == request.node_id,
        col(ApprovalRequest.iteration) == request.iteration,
    )


async def _read_users(
    connection: AsyncConnection, organization_id: str, asked: WaitingNode
) -> Sequence[User]:
    """Return the organization's users among the assignees and mail addresses of a question, and all admins if
    the role of admins is an assignee.

    At most 50, ordered by id.
    """
    assignees = approvals.assignees_of(asked.request)
    addresses = [
        one.casefold() for one in [*assignees, *approvals.extra_addresses(asked.request)] if "@" in one
    ]
    condition: ColumnElement[bool] = or_(
        col(User.id).in_([one for one in assignees if "@" not in one]),
        func.lower(col(User.email)).in_(addresses),
    )
    if approvals.ADMIN_ROLE in assignees:
        condition = condition | (col(User.role) == UserRole.ADMIN)
    statement = select(User).where(col(User.organization_id) == organization_id, condition)
    rows = await connection.execute(statement.order_by(col(User.id)).limit(MAX_RECIPIENTS))
    return [build_row(User, row) for row in rows.mappings()]


def _list_recipients(
    asked: WaitingNode, users: Sequence[User], *, starter_id: str, trigger_type: str
) -> Mapping[str, str]:
    """Return the mail addresses by assignee (user id, or address without a user), at most 50.

    The user who started the run is left out if they may not answer; a run whose `trigger_type` is among `INTAKE_KINDS`
    was started by nobody. The address of a user counts as the user: one person has one link and one vote.
    """
    listed = [*approvals.assignees_of(asked.request), *approvals.extra_addresses(asked.request)]
    addresses = [one for one in listed if "@" in one]
    may_self = approvals.allows_self(asked.request) or trigger_type in INTAKE_KINDS
    found = {user.id: user.email for user in users if may_self or user.id != starter_id}
    known = {user.email.casefold() for user in users}
    for address in addresses:
        if address.casefold() not in known:
            known.add(address.casefold())
            found[address] = address
    return dict([*found.items()][:MAX_RECIPIENTS])


def _read_mailboxes(text: str) -> Sequence[headers.Mailbox]:
    try:
        return headers.parse_mailboxes(text)
    except ValueError as error:
        raise NodeError(f"{text} is not a mail address: {error}", code="invalid-address") from error


def _read_sender(text: str) -> headers.Mailbox:
    found = _read_mailboxes(text) if "@" in text else ()
    if len(found) != 1:
        raise NodeError("notify.from must be one mail address", code="invalid-address")
    return found[0]


def _build_subject(asked: WaitingNode, notify: Mapping[str, Json], earlier: int) -> str:
    """Return the subject of a mail to an assignee, by the config or the title; it is a reminder if `earlier` mails were
    sent with the link.
    """
    subject = str(notify.get("subject") or asked.request.get("title") or "A question for you")
    text = " ".join(subject.split())
    return f"Reminder: {text}" if earlier else text


def _build_text(asked: WaitingNode, url: str) -> str:
    lines = [str(asked.request.get("title") or "")]
    if description := str(asked.request.get("description") or ""):
        lines += ["", description]
    lines += ["", "Answer here, without an account:", url, "", "The link is yours and works for one answer."]
    if asked.expires_at is not None:
        lines.append(f"It is open until {asked.expires_at.strftime('%Y-%m-%d %H:%M')} UTC.")
    return "\n".join(lines)


def _compose_mail(outgoing: OutgoingMail) -> bytes:
    try:
        return composition.compose_mail(outgoing)
    except ValueError as error:
        raise NodeError(f"The mail can't be written: {error}", code="invalid-header") from error
