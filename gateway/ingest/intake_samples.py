"""Samples of rejected requests, for admins to find the cause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from gateway.http.parameters import LIMIT, OFFSET, ChoiceParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant
from gateway.ingest import rejected_samples
from gateway.workflows import editing
from models.ingest import IngestRoute

if TYPE_CHECKING:
    from models.ingest import RejectedRequestSample

ROUTE: Final = ChoiceParameter("route", "Only requests of this route.", IngestRoute)
LISTED: Final = (ROUTE, LIMIT, OFFSET)
OF_WORKFLOW: Final = (LIMIT, OFFSET)


class SampleShape(WireStruct):
    """Sample of a rejected request."""

    route: IngestRoute
    workflow_id: str | None
    """Null for an event."""
    reason: str
    """Cause as `code: message`."""
    method: str
    address: str
    """Address of the client."""
    content_type: str | None
    content_bytes: int
    """Size by the `Content-Length` header; the content itself is never stored."""
    content_hash: str | None
    """SHA-256 of the body, if it was read."""
    headers: list[str]
    """Names of the headers."""
    created_at: Instant


class SampleList(WireStruct):
    """Page of the samples, the newest first; `count` is the number of all."""

    count: int
    limit: int
    offset: int
    samples: Sequence[SampleShape]


async def index(request: GatewayRequest) -> JsonResponse:
    """List recent rejected requests that named a workflow or a token of the organization.

    The last hundred of each route are kept, for all organizations together. Accepted requests are deliveries.
    """
    query, part = request.query, request.query.page()
    async with request.gateway.database.read() as connection:
        count, found = await rejected_samples.list_samples(connection, request.caller, query[ROUTE], part)
    shown = [_show_sample(one) for one in found]
    return JsonResponse(SampleList(count=count, limit=part.limit, offset=part.offset, samples=shown))


async def of_workflow(request: GatewayRequest) -> JsonResponse:
    """List recent rejected requests that named a workflow or its token, for its owner and admins.

    The last hundred of each route are kept, for all organizations together.
    """
    part = request.query.page()
    async with request.gateway.database.read() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
        editing.require_writer(request.caller, workflow)
        count, found = await rejected_samples.list_samples(
            connection, request.caller, None, part, workflow.id
        )
    shown = [_show_sample(one) for one in found]
    return JsonResponse(SampleList(count=count, limit=part.limit, offset=part.offset, samples=shown))


def _show_sample(sample: RejectedRequestSample) -> SampleShape:
    """Return a sample of a rejected request as the API shows it."""
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
