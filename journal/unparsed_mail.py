"""Unparsed mail: stored in place of a run's trigger until a mail parser replaces it.

The row of its run has the target `intake`, which executors never claim. Mail parsers claim it under a lease,
as workers claim runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct
from sqlalchemy import case, func, null, select, update
from sqlmodel import col

from engine.run_records import RunError
from journal import concurrency_limits, run_labels
from journal.blobs.blob_reference import BlobReference
from journal.concurrency_limits import LimitAction
from json_text import decoding
from mail import mail_parsing, service_forms
from mail.mail_limits import InvalidMail
from models.database_time import DatabaseTime
from models.execution import LIMITED_TARGET, SHARED_TARGET, UNPARSED_TARGET, Execution, ExecutionData
from models.execution_status import ExecutionStatus
from models.ingest import Delivery
from senders import mail_kinds, sender_request
from senders.mail_kinds import MailKind
from senders.request_refusal import RequestRefused

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from engine.values import Json
    from journal.concurrency_limits import ConcurrencyLimit
    from journal.store import ExecutionKey
    from mail.mail_content import KeepAttachment, ParsedMailContent
    from mail.service_forms import MailReception

MAIL_PREFIX: Final = '{"$intake":'
"""Start of the text of an unparsed mail; no parsed mail begins with it."""
_ROWS_AT_ONCE: Final = 500


class StoredMailObject(msgspec.Struct, frozen=True, rename="camel"):
    """Object of a bucket that contains a whole mail."""

    source_id: str
    """Id of the data source with which it is read."""
    key: str
    """Key below the prefix of the data source."""


class ScreeningRules(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Rules of an email trigger for mails that are accepted but not run."""

    reject_on: Sequence[str] = ()
    """Checks of the mail service that a mail must not have failed: `spf`, `dkim`, `dmarc`, `spam`, `virus`.
    """
    max_spam_score: float | None = None
    accept_automatic: bool = False
    """Whether automatic replies, bounces and receipts are run too."""

    def rejection_reason(self, received: MailReception) -> str | None:
        """Return the reason why the rules reject a mail, by the report of its mail service; None if they accept it.

        A failed check that `reject_on` names has precedence over a spam score above the maximum. `accept_automatic` is
        not looked at.
        """
        if (check := received.failed_check(self.reject_on)) is not None:
            return f"The mail service reports that the mail failed its {check} check, which `rejectOn` names"
        score, most = received.spam_score, self.max_spam_score
        if score is not None and most is not None and score > most:
            return f"The mail service gives the mail a spam score of {score:g}, above `maxSpamScore` {most:g}"
        return None


class UnparsedMail(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Mail as it was received; its content is inline, in a blob of the run, or in a bucket."""

    kind: MailKind
    received_at: datetime
    content_type: str = ""
    """Media type of the request body; empty if the content is the mail itself."""
    content: bytes = b""
    blob: BlobReference | None = None
    stored: StoredMailObject | None = None
    sender: str = ""
    """Sender in the envelope; `recipients` are those of the envelope too."""
    recipients: Sequence[str] = ()
    verdicts: Mapping[str, str] = {}
    """Results of the checks of Amazon SES, by their names."""
    screening: ScreeningRules | None = None
    """Rules of the trigger; None: the mail is run in any case, since a user has redriven it."""

    @classmethod
    def from_text(cls, text: str | bytes) -> UnparsedMail:
        """Parse the text that the row of a run has instead of a trigger until its mail is parsed; raises
        `ValueError` for other texts.
        """
        return _decode(text).intake

    def parse(self, contents: list[bytes], keep: KeepAttachment) -> tuple[ParsedMailContent, MailReception]:
        """Return the parsed mail and the report of its mail service; attachments are passed to `keep`.

        `contents` holds the bytes, which are removed from it to free memory. It is CPU work and belongs into
        a thread. Raises `InvalidMail`, and the errors of `keep`.
        """
        if not self.content_type:
            mail = mail_parsing.parse_mail(contents.pop(), keep)
            received = service_forms.parse_ses_reception(self.verdicts)
        else:
            try:
                form = sender_request.parse_form(
                    sender_request.parse_media_type(self.content_type), contents.pop()
                )
                mail, received = mail_kinds.parse_mail_form(form, self.kind, keep)
            except RequestRefused as error:
                raise InvalidMail(error.message) from error
        return mail, service_forms.add_envelope(received, self.sender, self.recipients)

    def as_json(self) -> dict[str, Json]:
        """Return the JSON value that is stored in place of a trigger's output until the mail is parsed."""
        wrapped: dict[str, Any] = msgspec.to_builtins(_UnparsedMailEnvelope(self))
        return wrapped


class _UnparsedMailEnvelope(msgspec.Struct, frozen=True):
    intake: UnparsedMail = msgspec.field(name="$intake")


_decode = decoding.build_decoder(_UnparsedMailEnvelope).decode


def is_unparsed(trigger: str) -> bool:
    """Return whether the text of a trigger is an unparsed mail."""
    return trigger.startswith(MAIL_PREFIX)


def visible_trigger(trigger: str) -> str:
    """Return the JSON text of a trigger's output as the API shows it: an empty object for an unparsed mail."""
    return "{}" if is_unparsed(trigger) else trigger


def is_unparsed_column(column: SQLColumnExpression[str]) -> ColumnElement[bool]:
    """Return the condition that a column holds an unparsed mail."""
    return func.substr(column, 1, len(MAIL_PREFIX)) == MAIL_PREFIX


# ── release of parsed mail ──────────────────────────────────────────────────────────────────────────────────


class MailParseResult(Struct, frozen=True):
    """Parsed mail, and the lease under which it was parsed."""

    key: ExecutionKey
    token: int
    owner: str
    workflow_id: str
    trigger: Mapping[str, Json]
    text: str
    """The trigger as JSON text."""


class MailRunState(Struct, frozen=True):
    """State of a run after its mail was parsed."""

    status: ExecutionStatus
    channel: str
    assigned_deployment_id: str | None
    concurrency_key: str | None
    error: RunError | None = None


async def release_parsed(
    connection: AsyncConnection, batch: Sequence[MailParseResult]
) -> list[MailRunState | None]:
    """Store the output of parsed mails and let their runs be claimed; return the state of each run, None for a lost
    lease.

    No attempt is counted. A run with a stop or cancel request ends, and a run that may not wait and finds no free
    concurrency slot fails. Each run gets the metadata of its workflow's settings.
    """
    settings = await _read_settings(connection, batch)
    limits = {
        one.key.execution_id: concurrency_limits.concurrency_limit(
            settings[one.key.execution_id], one.workflow_id, dict(one.trigger)
        )
        for one in batch
    }
    found: dict[str, MailRunState | None] = {}
    # In the order of the locked keys, so that concurrent transactions can't deadlock.
    for one in sorted(batch, key=lambda one: _limit_key(limits.get(one.key.execution_id))):
        found[one.key.execution_id] = await _release_one(connection, one, limits.get(one.key.execution_id))
        if found[one.key.execution_id] is not None:
            labels = run_labels.read_settings_metadata(settings[one.key.execution_id], dict(one.trigger))
            await run_labels.insert_labels(connection, one.key, labels)
    return [found[one.key.execution_id] for one in batch]


async def note_rejection(connection: AsyncConnection, key: ExecutionKey, reason: str) -> None:
    """Store the reason for which a mail was rejected in the delivery of its run, where senders and owners read it."""
    await connection.execute(
        update(Delivery)
        .where(col(Delivery.execution_id) == key.execution_id, col(Delivery.shard) == key.shard)
        .values(reason=reason)
    )


async def _read_settings(
    connection: AsyncConnection, batch: Sequence[MailParseResult]
) -> dict[str, Mapping[str, Json]]:
    """Return the settings under which runs were accepted, by execution id; empty for missing ones."""
    ids = [one.key.execution_id for one in batch]
    configs: dict[str, str] = {}
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        some = ids[start : start + _ROWS_AT_ONCE]
        statement = select(col(ExecutionData.execution_id), col(ExecutionData.config)).where(
            col(ExecutionData.execution_id).in_(some)
        )
        configs |= {row.execution_id: row.config for row in await connection.execute(statement)}
    return {execution_id: decoding.decode(configs.get(execution_id, "{}")) for execution_id in ids}


def _limit_key(limit: ConcurrencyLimit | None) -> str:
    return limit.key if limit else ""


async def _release_one(
    connection: AsyncConnection, one: MailParseResult, limit: ConcurrencyLimit | None
) -> MailRunState | None:
    """Store the output of a parsed mail and make its run pending, as a fresh one; return its state.

    The run fails at a limit that rejects, and ends if that was requested. None if the mail's lease was lost.
    """
    is_full = (
        limit is not None
        and limit.on_limit is LimitAction.REJECT
        and await concurrency_limits.count_unended(connection, limit.key) >= limit.runs
    )
    error = (
        RunError("concurrency-limit", "The limit of concurrent runs in settings.concurrency is reached")
        if is_full
        else None
    )
    is_asked = col(Execution.request).is_not(None)
    goes_on = ExecutionStatus.FAILED if is_full else ExecutionStatus.PENDING
    ended_at = DatabaseTime() if is_full else case((is_asked, DatabaseTime()), else_=null())
    target = (
        LIMITED_TARGET
        if limit is not None
        else func.coalesce(col(Execution.assigned_deployment_id), SHARED_TARGET)
    )
    statement = (
        update(Execution)
        .where(*_is_held(one))
        .values(
            status=case(
                (col(Execution.request) == "stop", ExecutionStatus.STOPPED.value),
                (col(Execution.request) == "cancel", ExecutionStatus.CANCELLED.value),
                else_=goes_on.value,
            ),
            target=target,
            concurrency_key=limit.key if limit else None,
            concurrency_limit=limit.runs if limit else None,
            error=error.as_json() if error else None,
            ended_at=ended_at,
            # Parsing does not start a run: its timeout counts from its start by an executor.
            started_at=None,
            deadline_at=None,
            is_fresh=True,
            has_journal=False,
            attempt=0,
            isolated=False,
            isolation_losses=0,
            token=col(Execution.token) + 1,
            lease_owner=None,
            lease_until=None,
            updated_at=DatabaseTime(),
        )
        .returning(col(Execution.status), col(Execution.channel), col(Execution.assigned_deployment_id))
    )
    row = (await connection.execute(statement)).first()
    if row is None:
        return None
    await connection.execute(
        update(ExecutionData)
        .where(
            col(ExecutionData.execution_id) == one.key.execution_id, col(ExecutionData.shard) == one.key.shard
        )
        .values(trigger=one.text)
    )
    status = ExecutionStatus(row.status)
    return MailRunState(
        status,
        row.channel,
        row.assigned_deployment_id,
        limit.key if limit else None,
        error if status is ExecutionStatus.FAILED else None,
    )


def _is_held(one: MailParseResult) -> Sequence[ColumnElement[bool]]:
    return (
        col(Execution.id) == one.key.execution_id,
        col(Execution.shard) == one.key.shard,
        col(Execution.token) == one.token,
        col(Execution.status) == ExecutionStatus.RUNNING,
        col(Execution.lease_owner) == one.owner,
        col(Execution.target) == UNPARSED_TARGET,
    )
