"""The table of the internal API: what pods may ask, each with the token of its deployment. It stands in no document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from execution.pod_api import PREFIX
from gateway.http.endpoint import Endpoint
from gateway.internal import journaling, lending
from gateway.internal.endpoint import InternalEndpoint, InternalHandler

if TYPE_CHECKING:
    from starlette.types import ASGIApp


@dataclass(frozen=True, slots=True)
class InternalLine:
    """One line of the table."""

    method: str
    path: str
    """Below `/internal/v1`."""
    handler: InternalHandler


TABLE: Sequence[InternalLine] = (
    InternalLine("POST", "/contact", journaling.contact),
    InternalLine("POST", "/wait", journaling.wait),
    InternalLine("POST", "/claim", journaling.claim),
    InternalLine("POST", "/suspects", journaling.suspects),
    InternalLine("POST", "/record", journaling.record),
    InternalLine("POST", "/renew", journaling.renew),
    InternalLine("POST", "/give-back", journaling.give_back),
    InternalLine("POST", "/promote", journaling.promote),
    InternalLine("POST", "/definitions", journaling.definitions),
    InternalLine("POST", "/spans", journaling.spans),
    InternalLine("POST", "/log-ends", journaling.log_ends),
    InternalLine("POST", "/answers", journaling.answers),
    InternalLine("PUT", "/blobs/{id}/{sub}", lending.put_blob),
    InternalLine("GET", "/blobs/{id}/{sub}", lending.get_blob),
    InternalLine("POST", "/executions/{id}/data-sources", lending.open_data_source),
    InternalLine("POST", "/executions/{id}/runs", lending.start_run),
    InternalLine("POST", "/executions/{id}/reservations", lending.reserve),
    InternalLine("POST", "/executions/{id}/event-waits", lending.expect_event),
)


def endpoints(table: Sequence[InternalLine]) -> Mapping[str, ASGIApp]:
    """Return what serves each path."""
    found: dict[str, Endpoint] = {}
    for line in table:
        one = InternalEndpoint(line.method, line.handler)
        earlier = found.get(line.path)
        found[line.path] = one if earlier is None else Endpoint({**earlier.operations, **one.operations})
    return {PREFIX + path: endpoint for path, endpoint in found.items()}
