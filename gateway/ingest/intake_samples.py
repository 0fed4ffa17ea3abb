"""Samples of what was sent and not let in, for admins to see why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from gateway.http.parameters import LIMIT, OFFSET, ChoiceParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant
from gateway.ingest import rejected_samples
from models.ingest import IngestRoute

if TYPE_CHECKING:
    from models.ingest import RejectedRequestSample

ROUTE: Final = ChoiceParameter("route", "Only what came this way.", IngestRoute)
LISTED: Final = (ROUTE, LIMIT, OFFSET)


class SampleShape(WireStruct):
    """A request that was not let in."""

    route: IngestRoute
    workflow_id: str | None
    """Null for an event."""
    reason: str
    """Why: `code: message`."""
    method: str
    address: str
    """Where it came from."""
    content_type: str | None
    content_bytes: int
    """As its header said; of the content nothing is kept."""
    content_hash: str | None
    """SHA-256 of the body, where it was read."""
    headers: list[str]
    """Their names."""
    created_at: Instant


class SampleList(WireStruct):
    """A part of the samples, the newest first; `count` tells how many there are in all."""

    count: int
    limit: int
    offset: int
    samples: Sequence[SampleShape]


async def index(request: GatewayRequest) -> JsonResponse:
    """List some of the last requests that named a workflow or a token of the organisation and were not let in.

    Of each way in, the last hundred of all organisations are kept. What is let in stands among the deliveries.
    """
    query, part = request.query, request.query.page()
    async with request.gateway.database.read() as connection:
        count, found = await rejected_samples.list_samples(connection, request.caller, query[ROUTE], part)
    shown = [_shape(one) for one in found]
    return JsonResponse(SampleList(count=count, limit=part.limit, offset=part.offset, samples=shown))


def _shape(sample: RejectedRequestSample) -> SampleShape:
    shape = sample.shape
    return SampleShape(
        route=IngestRoute(sample.route),
        workflow_id=sample.workflow_id,
        reason=sample.reason,
        method=shape["method"],
        address=shape["address"],
        content_type=shape["contentType"],
        content_hash=shape.get("contentHash"),
        content_bytes=sample.content_bytes,
        headers=shape["headers"],
        created_at=instant(sample.created_at),
    )
