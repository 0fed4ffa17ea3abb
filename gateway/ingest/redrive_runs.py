"""Redrive: run the current workflow again on the input of an earlier run or refused delivery."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct, field
from sqlalchemy import select
from sqlmodel import col

from engine.values import fingerprint
from gateway.access import audit_log
from gateway.http import errors, idempotency
from gateway.http.errors import ApiError
from gateway.ingest import delivery_log, delivery_rows
from gateway.ingest.blob_sharing import build_redrive_input
from journal.blobs.blob_storage import BlobOwner
from journal.store import AcceptanceResult, AcceptanceVerdict, InboundRequest
from models.execution import Execution, ExecutionData
from models.ingest import IngestRoute

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.wire import StrictWire
    from gateway.ingest.dead_letter_rows import FailedRun
    from gateway.ingest.ingest import IngestCapacity, RequestIngestor, RunInput, RunTarget
    from journal.blobs.blob_store import BlobStore
    from journal.store import IdempotencyKey
    from models.access import ApiCaller
    from models.audit import AuditAction
    from models.database import Database
    from models.ingest import Delivery

TOGETHER: Final = 10
"""Number of concurrent redrives of a bulk redrive; each input may be large."""
ROUTES: Final = {"queue": IngestRoute.ENQUEUE, "email": IngestRoute.EMAIL, "webhook": IngestRoute.HOOK}
CREATED: Final = 201


class RedriveInput(Struct, frozen=True):
    """Input to run again."""

    text: str
    """JSON."""
    source: BlobOwner | None
    """Owner of the input's blobs; None when the input never had a run."""


class RedriveResult(Struct):
    """Result of a bulk redrive: ids of the new runs, and errors."""

    execution_ids: list[str] = field(default_factory=list)
    errors: dict[str, ApiError] = field(default_factory=dict)
    """Errors by the ids of the selected objects."""


async def redrive_each(
    workflow_id: str,
    resource_ids: Sequence[str],
    redrive: Callable[[str, IdempotencyKey], Awaitable[tuple[AcceptanceResult, str]]],
) -> RedriveResult:
    """Redrive objects of one workflow by `redrive(id, key)`, ten at a time; return the ids of the new runs, and the API
    errors by object id.

    The key is derived from the ids of workflow and object, so that no bulk redrive runs an object twice; objects that
    were redriven before are in neither.
    """

    async def once(resource_id: str) -> AcceptanceResult:
        accepted, _ = await redrive(resource_id, idempotency.redrive_key(workflow_id, resource_id))
        return accepted

    return await redrive_all(resource_ids, once)


async def redrive_all(
    resource_ids: Sequence[str], redrive: Callable[[str], Awaitable[AcceptanceResult]]
) -> RedriveResult:
    """Redrive objects by `redrive(id)`, ten at a time; return the ids of the new runs, and the API errors by object id.

    Objects that were redriven before are in neither.
    """
    done = RedriveResult()

    async def attempt(resource_id: str) -> AcceptanceResult | ApiError:
        try:
            return await redrive(resource_id)
        except ApiError as error:
            return error

    for start in range(0, len(resource_ids), TOGETHER):
        some = resource_ids[start : start + TOGETHER]
        for resource_id, outcome in zip(some, await asyncio.gather(*map(attempt, some)), strict=True):
            if isinstance(outcome, ApiError):
                done.errors[resource_id] = outcome
            elif outcome.verdict is AcceptanceVerdict.ACCEPTED:
                done.execution_ids.append(outcome.execution_id)
    return done


def describe_selection(selection: StrictWire, count: int) -> Sequence[Mapping[str, str | None]]:
    """Return the filter of a bulk act and the number of selected objects, as changes of an audit entry.

    A filter of more than 100 characters, such as one with many ids, is recorded as a hash.
    """
    given = {name: value for name, value in msgspec.to_builtins(selection).items() if value not in (None, [])}
    return audit_log.list_changes({}, {"count": count, "filter": given}, shown=("count", "filter"))


async def record_redrive(
    database: Database,
    caller: ApiCaller,
    action: AuditAction,
    about: str,
    resource_ids: Sequence[str],
    selection: StrictWire,
) -> None:
    """Record a redrive in the audit trail, in a transaction of its own before it begins; `about` is the id of the
    workflow or organization.

    `selection` is the filter that has selected the objects.
    """
    after, changes = fingerprint(list(resource_ids)), describe_selection(selection, len(resource_ids))

    async def record(connection: AsyncConnection) -> None:
        await audit_log.record_change(
            connection, caller, action, about, before=None, after=after, changes=changes
        )

    await database.transaction(record)


class RunRedriver:
    """Runs workflows again on the inputs of earlier runs and refused deliveries."""

    def __init__(
        self, database: Database, blobs: BlobStore, capacity: IngestCapacity, ingestor: RequestIngestor
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._capacity = capacity
        self._ingestor = ingestor

    async def redrive_delivery(
        self, caller: ApiCaller, one: Delivery, idempotency_key: IdempotencyKey | None
    ) -> tuple[AcceptanceResult, str]:
        """Run the current workflow of a delivery on its content again; return the result, and the kind of its trigger.

        Each call without a key runs it again. But a delivery with a deduplication key runs once under that, redrives
        and repetitions of its sender together. Raises a 409 error for a batch, an event, and a delivery without kept
        content, and the errors of the ingest.
        """
        kind = delivery_rows.KINDS.get(IngestRoute(one.route))
        if kind is None:
            raise errors.conflict(
                "not-redrivable", "Batches are redriven by their dead letters, and events by a replay"
            )
        given, source = one.payload, None
        if one.execution_id is not None:
            given, source = await self._read_input(caller, one.execution_id)
        if given is None:
            raise errors.conflict(
                "not-redrivable", "The content of the delivery is not kept, or could not be parsed"
            )
        # The sender may retry it, too: the first of the two creates the run, and the other gets its answer.
        key = (
            idempotency_key
            if one.deduplication_key is None
            else idempotency.decode_key(one.deduplication_key)
        )
        own_key = idempotency_key if one.deduplication_key is not None else None
        return await self._redrive_run(
            caller, str(one.workflow_id), kind, RedriveInput(given, source), key, one, own_key
        ), kind

    async def redrive_dead_letter(
        self, caller: ApiCaller, failed: Execution | FailedRun, idempotency_key: IdempotencyKey
    ) -> tuple[AcceptanceResult, str]:
        """Run the current workflow of a failed run on the same input; return the result, and the kind of its trigger.

        A used key gives its first result. Raises a 409 error if the input is no longer kept, and the errors of the
        ingest.
        """
        given, source = await self._read_input(caller, failed.id)
        if given is None:
            raise errors.conflict("not-redrivable", "The input of the run is no longer kept")
        kind = failed.trigger_type
        return await self._redrive_run(
            caller, failed.workflow_id, kind, RedriveInput(given, source), idempotency_key, None
        ), kind

    async def _redrive_run(
        self,
        caller: ApiCaller,
        workflow_id: str,
        kind: str,
        given: RedriveInput,
        idempotency_key: IdempotencyKey | None,
        origin: Delivery | None,
        own_key: IdempotencyKey | None = None,
    ) -> AcceptanceResult:
        """Run a workflow by its trigger of this kind on the input `given`, as a new request of `caller`, without the
        verification and rate limits of senders.

        `origin` is the delivery that it redrives, None for a dead letter. `own_key` identifies the request itself, as
        in `ingest_request`. Raises 409 for a paused workflow, 429 for a full backlog, and the errors of
        `build_redrive_input` and `ingest_request`; no delivery is stored for a refused request.
        """
        inbound = InboundRequest(
            delivery_id=delivery_log.new_delivery_id(),
            route=ROUTES.get(kind, IngestRoute.EVENTS),
            shard=caller.shard,
            organization_id=caller.organization_id,
            user_id=caller.user_id,
            sender=f"api-key:{caller.key_id}",
            content_hash=origin.content_hash if origin else "",
            content_bytes=origin.content_bytes if origin else len(given.text),
            workflow_id=workflow_id,
            redriven_from=origin.id if origin else None,
        )

        async def plan(target: RunTarget) -> RunInput:
            await self._capacity.require_not_paused(caller, target)
            await self._capacity.require_backlog(target.workflow)
            return await build_redrive_input(self._blobs, given.text, given.source, idempotency_key)

        # A refusal is not stored: the delivery would exist twice.
        return await self._ingestor.ingest_request(
            caller, inbound, kind, plan, idempotency_key, status=CREATED, own_key=own_key
        )

    async def _read_input(self, caller: ApiCaller, execution_id: str) -> tuple[str | None, BlobOwner | None]:
        """Return the input of a run of the caller's organization as JSON text, and the owner of its blobs;
        (None, None) if it is no longer kept.
        """
        organization_id = caller.organization_id
        statement = (
            select(col(ExecutionData.trigger), col(Execution.key_id))
            .join(Execution, col(Execution.id) == col(ExecutionData.execution_id))
            .where(
                col(ExecutionData.execution_id) == execution_id,
                col(ExecutionData.organization_id) == organization_id,
            )
        )
        async with self._database.read() as connection:
            row = (await connection.execute(statement)).first()
        return (None, None) if row is None else (row.trigger, BlobOwner(organization_id, row.key_id))
