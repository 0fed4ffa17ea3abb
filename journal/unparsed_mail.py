"""What has arrived and is still to be read: it stands in the place of a run's trigger, until a reader puts that there.

Its row has the target `intake`, which nobody runs; readers claim it under a lease as workers claim runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import case, func, null, select, update
from sqlmodel import col

from engine.run_records import RunError
from journal import concurrency_limits
from journal.blobs.blob_reference import BlobReference
from journal.concurrency_limits import LimitAction
from json_text import decoding
from models.database_time import DatabaseTime
from models.execution import LIMITED_TARGET, SHARED_TARGET, UNPARSED_TARGET, Execution, ExecutionData
from models.execution_status import ExecutionStatus
from models.ingest import Delivery
from senders.mail_kinds import MailKind

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from engine.values import Json
    from journal.concurrency_limits import ConcurrencyLimit
    from journal.store import ExecutionKey

MAIL_PREFIX: Final = '{"$intake":'
"""With it begins the text of what is still to be read; no mail that was read does."""
_ROWS_AT_ONCE: Final = 500


class StoredMailObject(msgspec.Struct, frozen=True, rename="camel"):
    """An object of somebody's bucket that is a whole mail."""

    source_id: str
    """Of the data source that reads it."""
    key: str
    """Below the data source's prefix."""


class ScreeningRules(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Rules of an e-mail trigger about mails that are accepted and not run."""

    reject_on: Sequence[str] = ()
    """Checks of the mail service that a mail must not have failed: `spf`, `dkim`, `dmarc`, `spam`, `virus`."""
    max_spam_score: float | None = None
    accept_automatic: bool = False
    """Automatic replies, bounces and receipts are run too."""


class UnparsedMail(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A mail as it was handed in; its content is here, in a blob of the run, or in a bucket."""

    kind: MailKind
    received_at: datetime
    content_type: str = ""
    """Of the body that was posted; empty where the content is the mail itself."""
    content: bytes = b""
    blob: BlobReference | None = None
    stored: StoredMailObject | None = None
    sender: str = ""
    """Of the envelope, as are the recipients."""
    recipients: Sequence[str] = ()
    verdicts: Mapping[str, str] = {}
    """Results of the checks that Amazon SES has made, by their names."""
    screening: ScreeningRules | None = None
    """Rules of the trigger; None: the mail is run whatever it is, since somebody has redriven it."""

    @classmethod
    def from_text(cls, text: str | bytes) -> UnparsedMail:
        """Return what a text holds; raises `ValueError`."""
        return _decode(text).intake

    def as_json(self) -> dict[str, Json]:
        """Return it as it stands in the place of a trigger."""
        wrapped: dict[str, Any] = msgspec.to_builtins(_UnparsedMailEnvelope(self))
        return wrapped


class _UnparsedMailEnvelope(msgspec.Struct, frozen=True):
    intake: UnparsedMail = msgspec.field(name="$intake")


_decode = decoding.build_decoder(_UnparsedMailEnvelope).decode


def is_unparsed(trigger: str) -> bool:
    """Tell whether a text in the place of a trigger is something unread."""
    return trigger.startswith(MAIL_PREFIX)


def visible_trigger(trigger: str) -> str:
    """Return a trigger as people see it: what is unread is nothing yet."""
    return "{}" if is_unparsed(trigger) else trigger


def is_unparsed_column(column: SQLColumnExpression[str]) -> ColumnElement[bool]:
    """Return the condition that a column holds something unread."""
    return func.substr(column, 1, len(MAIL_PREFIX)) == MAIL_PREFIX


# ── what a reader leaves ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class MailParseResult:
    """What was read, and the lease under which it was."""

    key: ExecutionKey
    token: int
    owner: str
    workflow_id: str
    trigger: Mapping[str, Json]
    text: str
    """The same as JSON."""


@dataclass(frozen=True, slots=True)
class MailRunState:
    """How the row of a mail was left that was read."""

    status: ExecutionStatus
    channel: str
    assigned_deployment_id: str | None
    concurrency_key: str | None
    error: RunError | None = None


async def release_parsed(
    connection: AsyncConnection, batch: Sequence[MailParseResult]
) -> list[MailRunState | None]:
    """Hand runs over to those who run them, uncounted; None for each whose lease was lost.

    A run that was asked to end meanwhile ends, as does one that may not wait and finds no place free.
    """
    limits = await _concurrency_limits(connection, batch)
    found: dict[str, MailRunState | None] = {}
    # In the order of the keys that are locked, so that rivals can't wait for one another.
    for one in sorted(batch, key=lambda one: _limit_key(limits.get(one.key.execution_id))):
        found[one.key.execution_id] = await _release_one(connection, one, limits.get(one.key.execution_id))
    return [found[one.key.execution_id] for one in batch]


async def note_rejection(connection: AsyncConnection, key: ExecutionKey, reason: str) -> None:
    """Put beside the delivery of a run why that was not run."""
    await connection.execute(
        update(Delivery)
        .where(col(Delivery.execution_id) == key.execution_id, col(Delivery.shard) == key.shard)
        .values(reason=reason)
    )


async def _concurrency_limits(
    connection: AsyncConnection, batch: Sequence[MailParseResult]
) -> dict[str, ConcurrencyLimit | None]:
    """Return how many runs like these may go on at once, by the settings that they were accepted under."""
    ids = [one.key.execution_id for one in batch]
    configs: dict[str, str] = {}
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        some = ids[start : start + _ROWS_AT_ONCE]
        statement = select(col(ExecutionData.execution_id), col(ExecutionData.config)).where(
            col(ExecutionData.execution_id).in_(some)
        )
        configs |= {row.execution_id: row.config for row in await connection.execute(statement)}
    return {
        one.key.execution_id: concurrency_limits.concurrency_limit(
            decoding.decode(configs.get(one.key.execution_id, "{}")), one.workflow_id, dict(one.trigger)
        )
        for one in batch
    }


def _limit_key(limit: ConcurrencyLimit | None) -> str:
    return limit.key if limit else ""


async def _release_one(
    connection: AsyncConnection, one: MailParseResult, limit: ConcurrencyLimit | None
) -> MailRunState | None:
    is_full = (
        limit is not None
        and limit.on_limit is LimitAction.REJECT
        and await concurrency_limits.count_unended(connection, limit.key) >= limit.runs
    )
    error = (
        RunError("concurrency-limit", "As many runs go on already as settings.concurrency allows at once")
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
            # Whoever reads has not begun it: its time runs from when it is.
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
