"""Log of deliveries: one row per inbound request.

Deliveries with runs are committed with these by the store. Those without new runs are written in groups, since
floods of them are common.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from hashlib import sha256
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import structlog
from sqlalchemy import insert

from gateway.http import idempotency, limits
from gateway.http.errors import ApiError
from journal.group_commit import GroupCommit
from journal.store import InboundRequest
from messages.token_buckets import BucketRate, LocalTokenBuckets, TokenDemand
from models import ids
from models.errors import DatabaseUnavailable
from models.ingest import Delivery, DeliveryOutcome, IngestRoute
from senders.request_refusal import RequestRefused
from telemetry import instruments

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.sender import RequestSender
    from models.database import Database

log = structlog.get_logger()

MAX_WAITING: Final = 1_000
"""Limit of shed deliveries that wait to be stored: at that point the load is too high already."""
NOT_FOUND: Final = 404
SERVER_ERROR: Final = 500
KEPT: Final = BucketRate(per_second=100_000, burst=20_000_000)
"""Characters of refused content stored per organization, so that a flood of it fills no disk."""
UNVERIFIED: Final = BucketRate(per_second=60 / 3_600, burst=60)
"""Rate of unverified requests stored per workflow."""
LARGE_BYTES: Final = 256_000
"""Longer bodies are hashed in a thread."""
REASON_LENGTH: Final = 500
TOO_MANY: Final = 429


async def describe_request(
    route: IngestRoute, sender: RequestSender, content: bytes, *, workflow_id: str | None = None
) -> InboundRequest:
    """Return the description of an inbound request, with a new delivery id and the SHA-256 of its body.

    `workflow_id` is None for an event. A body over 256 kB is hashed in a thread.
    """
    hashed = await asyncio.to_thread(sha256, content) if len(content) > LARGE_BYTES else sha256(content)
    return InboundRequest(
        delivery_id=new_delivery_id(),
        route=route,
        shard=sender.caller.shard,
        organization_id=sender.caller.organization_id,
        user_id=sender.caller.user_id,
        sender=sender.label,
        content_hash=hashed.hexdigest(),
        content_bytes=len(content),
        workflow_id=workflow_id,
    )


def new_delivery_id() -> str:
    """Return a new unique id for a delivery."""
    return ids.new_id("dlv")


def repetition_delivery(
    inbound: InboundRequest, now: datetime, *, status: int, execution_id: str | None
) -> Delivery:
    """Return the delivery of a repeated request with the outcome `DUPLICATE`, not stored yet.

    `status` is that of its answer, `execution_id` the run of the first request, None without one.
    """
    return _build_delivery(
        inbound, now, outcome=DeliveryOutcome.DUPLICATE, status=status, execution_id=execution_id
    )


def noted_delivery(inbound: InboundRequest, now: datetime, *, status: int, reason: str) -> Delivery:
    """Return the delivery of an accepted request that starts no run, not stored yet; of `reason`, 500 characters are
    kept.

    `status` is that of its answer.
    """
    return _build_delivery(
        inbound, now, outcome=DeliveryOutcome.ACCEPTED, status=status, reason=reason[:REASON_LENGTH]
    )


def refusal_delivery(inbound: InboundRequest, now: datetime, error: ApiError) -> Delivery:
    """Return the delivery of a refused request, not stored yet: `SHED` if the error is a 429, otherwise `REJECTED`.

    A rejected one keeps payload and deduplication key, so that it can be redriven.
    """
    is_shed = error.status == TOO_MANY
    key = inbound.deduplication_key
    return _build_delivery(
        inbound,
        now,
        outcome=DeliveryOutcome.SHED if is_shed else DeliveryOutcome.REJECTED,
        status=error.status,
        reason=f"{error.code}: {error.message}"[:REASON_LENGTH],
        payload=None if is_shed else inbound.payload,
        deduplication_key=None if key is None else idempotency.encode_key(key),
    )


def _build_delivery(inbound: InboundRequest, now: datetime, **values: Any) -> Delivery:  # noqa: ANN401 - columns of any type
    """Return a delivery with the facts of its request and the given columns."""
    return Delivery(
        id=inbound.delivery_id,
        shard=inbound.shard,
        organization_id=inbound.organization_id,
        workflow_id=inbound.workflow_id,
        user_id=inbound.user_id,
        route=inbound.route,
        sender=inbound.sender,
        content_hash=inbound.content_hash,
        content_bytes=inbound.content_bytes,
        redriven_from=inbound.redriven_from,
        created_at=now,
        **values,
    )


class DeliveryLog:
    """Delivery log of one gateway."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._group: GroupCommit[Delivery, None] = GroupCommit(
            self._commit,
            weigh=lambda delivery: len(delivery.payload or ""),
            max_weight=limits.KEPT_REFUSED_CHARACTERS,
        )
        self._kept = LocalTokenBuckets()

    async def note(self, delivery: Delivery) -> None:
        """Count the delivery of an inbound request in the metric `deliveries_total`, store it with the next
        group commit, and wait for that.

        If the database is unavailable, only a warning is logged, and nothing is raised.
        """
        instruments.counter("deliveries_total", delivery.route, delivery.outcome).inc()
        waiting = self._group.submit(delivery)
        try:
            await waiting
        except DatabaseUnavailable as error:
            log.warning("delivery not stored", delivery_id=delivery.id, error=str(error))

    @asynccontextmanager
    async def refusals(self, inbound: InboundRequest) -> AsyncIterator[None]:
        """Store a delivery for a request that the block refuses by an `ApiError`, which is raised again.

        Not stored: a 404, an error that is stored already, and an error of the server, after which senders
        repeat the request; the owner's own `trigger-not-ready` is stored. A 429 is stored without waiting,
        and not if 1,000 deliveries wait. Content over a million characters or beyond the organization's quota
        is left out.
        """
        try:
            yield
        except ApiError as error:
            if error.is_noted:
                raise
            if error.status == NOT_FOUND:
                raise  # the object doesn't exist for this sender: nobody could read the delivery
            error.is_noted = True
            if error.status < SERVER_ERROR or error.is_for_owner:
                delivery = refusal_delivery(inbound, self._database.clock.now(), error)
                if not self._may_store_content(delivery):
                    delivery.payload = None
                if delivery.outcome != DeliveryOutcome.SHED:
                    await self.note(delivery)
                elif self._group.depth < MAX_WAITING:
                    self._group.submit(delivery)
            raise

    @asynccontextmanager
    async def unverified(
        self, inbound: InboundRequest, describe: Callable[[], Awaitable[None]]
    ) -> AsyncIterator[None]:
        """Store a delivery for a request that can't be verified since its trigger isn't ready; the error is
        raised again.

        Anybody can send such a request, hence 60 an hour per workflow are stored. `describe` adds to
        `inbound` the content that a redrive needs; its failures are ignored.
        """
        try:
            yield
        except ApiError as error:
            bucket = TokenDemand(f"unverified {inbound.workflow_id}", UNVERIFIED, needed=1, wanted=1)
            if error.is_for_owner and self._kept.take(bucket, monotonic()).tokens:
                error.is_noted = True
                with suppress(ApiError, RequestRefused, ValueError):
                    await describe()
                await self.note(refusal_delivery(inbound, self._database.clock.now(), error))
            raise

    def _may_store_content(self, delivery: Delivery) -> bool:
        """Return whether the refused content may be stored too: a million characters at most, and within the
        organization's quota, from which it is taken.
        """
        size = len(delivery.payload or "")
        if size > limits.KEPT_REFUSED_CHARACTERS:
            return False
        demand = TokenDemand(delivery.organization_id, KEPT, needed=size, wanted=size)
        return size == 0 or self._kept.take(demand, monotonic()).tokens > 0

    async def drain(self) -> None:
        """Wait until every waiting delivery is committed or has failed, before the process stops; raises none of their
        errors.
        """
        await self._group.drain()

    async def _commit(self, batch: Sequence[Delivery]) -> Sequence[None]:
        """Insert a batch of deliveries in one transaction; return None for each."""
        rows = [one.model_dump() for one in batch]

        async def write(connection: AsyncConnection) -> None:
            await connection.execute(insert(Delivery), rows)

        await self._database.transaction(write)
        return [None] * len(batch)
