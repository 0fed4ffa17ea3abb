"""Inbound request, as its delivery records it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from gateway.ingest import stored_keys
from journal.store import IngestWrite
from models import ids
from models.ingest import Delivery, DeliveryOutcome, IngestRoute

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from gateway.http.errors import ApiError
    from gateway.http.sender import RequestSender
    from journal.store import EmittedEvent, IdempotencyKey, IngestedRun

LARGE_BYTES: Final = 256_000
"""Longer bodies are hashed in a thread."""
REASON_LENGTH: Final = 500
TOO_MANY: Final = 429


@dataclass(slots=True)
class InboundRequest:
    """Sender, route, target and content of one request."""

    route: IngestRoute
    sender: RequestSender
    content_hash: str
    """SHA-256 of the body, in hexadecimal."""
    content_bytes: int
    workflow_id: str | None = None
    """None: an event, which goes to all its subscribers."""
    payload: str | None = None
    """Input of a run as JSON, once it is known; stored with a refusal, so that the request can be redriven.
    """
    deduplication_key: IdempotencyKey | None = None
    """Key derived from the sender's own id; a redrive uses up the same key as a repetition."""
    redriven_from: str | None = None
    delivery_id: str = field(default_factory=lambda: ids.new_id("dlv"))

    def for_arrival(
        self,
        runs: Sequence[IngestedRun],
        *,
        status: int,
        outcome: DeliveryOutcome = DeliveryOutcome.ACCEPTED,
        event: EmittedEvent | None = None,
        answer: str | None = None,
        idempotency: IdempotencyKey | None = None,
    ) -> IngestWrite:
        """Return the write that ingests the request with its runs."""
        caller = self.sender.caller
        return IngestWrite(
            delivery_id=self.delivery_id,
            shard=caller.shard,
            organization_id=caller.organization_id,
            workflow_id=self.workflow_id,
            user_id=caller.user_id,
            route=self.route,
            sender=self.sender.label,
            content_hash=self.content_hash,
            content_bytes=self.content_bytes,
            outcome=outcome,
            status=status,
            runs=runs,
            event=event,
            answer=answer,
            idempotency=idempotency,
            redriven_from=self.redriven_from,
        )

    def repetition_delivery(self, now: datetime, *, status: int, execution_id: str | None) -> Delivery:
        """Return the delivery of a repetition."""
        return self._delivery(
            now, outcome=DeliveryOutcome.DUPLICATE, status=status, execution_id=execution_id
        )

    def noted_delivery(self, now: datetime, *, status: int, reason: str) -> Delivery:
        """Return the delivery of a valid request without a run."""
        return self._delivery(
            now, outcome=DeliveryOutcome.ACCEPTED, status=status, reason=reason[:REASON_LENGTH]
        )

    def refusal_delivery(self, now: datetime, error: ApiError) -> Delivery:
        """Return the delivery of a refused request."""
        is_shed = error.status == TOO_MANY
        return self._delivery(
            now,
            outcome=DeliveryOutcome.SHED if is_shed else DeliveryOutcome.REJECTED,
            status=error.status,
            reason=f"{error.code}: {error.message}"[:REASON_LENGTH],
            payload=None if is_shed else self.payload,
            deduplication_key=None
            if self.deduplication_key is None
            else stored_keys.encode_key(self.deduplication_key),
        )

    def _delivery(self, now: datetime, **values: Any) -> Delivery:  # noqa: ANN401 - columns of any type
        caller = self.sender.caller
        return Delivery(
            id=self.delivery_id,
            shard=caller.shard,
            organization_id=caller.organization_id,
            workflow_id=self.workflow_id,
            user_id=caller.user_id,
            route=self.route,
            sender=self.sender.label,
            content_hash=self.content_hash,
            content_bytes=self.content_bytes,
            redriven_from=self.redriven_from,
            created_at=now,
            **values,
        )


async def describe_request(
    route: IngestRoute, sender: RequestSender, content: bytes, *, workflow_id: str | None = None
) -> InboundRequest:
    """Return an inbound request with the hash of its body; a large body is hashed off the event loop."""
    hashed = await asyncio.to_thread(sha256, content) if len(content) > LARGE_BYTES else sha256(content)
    return InboundRequest(route, sender, hashed.hexdigest(), len(content), workflow_id)
