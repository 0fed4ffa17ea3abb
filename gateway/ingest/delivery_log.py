"""Log of inbound requests without new runs, written in groups, since floods of them are common.

Deliveries with runs are committed with these by the store.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING, Final

import structlog
from sqlalchemy import insert

from gateway.http import limits
from gateway.http.errors import ApiError
from journal.group_commit import GroupCommit
from messages.token_buckets import BucketRate, LocalTokenBuckets, TokenDemand
from models.errors import DatabaseUnavailable
from models.ingest import Delivery, DeliveryOutcome
from senders.request_refusal import RequestRefused

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.ingest.inbound_request import InboundRequest
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
        """Store a delivery; when the database is unavailable, write it to the process log instead."""
        waiting = self._group.submit(delivery)
        try:
            await waiting
        except DatabaseUnavailable as error:
            log.warning("delivery not stored", delivery_id=delivery.id, error=str(error))

    @asynccontextmanager
    async def refusals(self, sent: InboundRequest) -> AsyncIterator[None]:
        """Store a delivery for a request that the block refuses.

        Faults of the server are no refusals, since senders retry the same request. Faults of the workflow's
        owner are: the delivery informs the owner.
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
                delivery = sent.refusal_delivery(self._database.clock.now(), error)
                if not self._may_store_content(delivery):
                    delivery.payload = None
                if delivery.outcome != DeliveryOutcome.SHED:
                    await self.note(delivery)
                elif self._group.depth < MAX_WAITING:
                    self._group.submit(delivery)
            raise

    @asynccontextmanager
    async def unverified(
        self, sent: InboundRequest, describe: Callable[[], Awaitable[None]]
    ) -> AsyncIterator[None]:
        """Store a delivery for a request that can't be verified since its trigger isn't ready.

        Anybody can send such a request, hence a low rate per workflow. `describe` adds to `sent` the content
        that a redrive needs.
        """
        try:
            yield
        except ApiError as error:
            bucket = TokenDemand(f"unverified {sent.workflow_id}", UNVERIFIED, needed=1, wanted=1)
            if error.is_for_owner and self._kept.take(bucket, monotonic()).tokens:
                error.is_noted = True
                with suppress(ApiError, RequestRefused, ValueError):
                    await describe()
                await self.note(sent.refusal_delivery(self._database.clock.now(), error))
            raise

    def _may_store_content(self, delivery: Delivery) -> bool:
        """Return whether the refused content may be stored too, by its size and the organization's quota."""
        size = len(delivery.payload or "")
        if size > limits.KEPT_REFUSED_CHARACTERS:
            return False
        demand = TokenDemand(delivery.organization_id, KEPT, needed=size, wanted=size)
        return size == 0 or self._kept.take(demand, monotonic()).tokens > 0

    async def drain(self) -> None:
        """Commit the waiting deliveries."""
        await self._group.drain()

    async def _commit(self, batch: Sequence[Delivery]) -> Sequence[None]:
        rows = [one.model_dump() for one in batch]

        async def write(connection: AsyncConnection) -> None:
            await connection.execute(insert(Delivery), rows)

        await self._database.transaction(write)
        return [None] * len(batch)
