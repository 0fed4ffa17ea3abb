"""Route table of the internal API for pods, authenticated by deployment tokens.

It is not part of the OpenAPI document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from execution.pod_api import PREFIX
from gateway.http.endpoint import PathEndpoint
from gateway.pods import journal, node_services
from gateway.pods.pod_endpoint import InternalHandler, PodEndpoint

if TYPE_CHECKING:
    from starlette.types import ASGIApp


class PodRoute(Struct, frozen=True):
    """Row of the route table."""

    method: str
    path: str
    """Below `/internal/v1`."""
    handler: InternalHandler


TABLE: Sequence[PodRoute] = (
    PodRoute("POST", "/contact", journal.contact),
    PodRoute("POST", "/wait", journal.wait),
    PodRoute("POST", "/claim", journal.claim),
    PodRoute("POST", "/suspects", journal.suspects),
    PodRoute("POST", "/record", journal.record),
    PodRoute("POST", "/renew", journal.renew),
    PodRoute("POST", "/release", journal.release),
    # Name of the path for pods of the previous version, which run on while gateways are upgraded.
    PodRoute("POST", "/give-back", journal.release),
    PodRoute("POST", "/promote", journal.promote),
    PodRoute("POST", "/definitions", journal.definitions),
    PodRoute("POST", "/spans", journal.spans),
    PodRoute("POST", "/steps", journal.steps),
    PodRoute("POST", "/log-ends", journal.log_ends),
    PodRoute("POST", "/answers", journal.answers),
    PodRoute("POST", "/open-answers", node_services.receive_open_answers),
    PodRoute("PUT", "/blobs/{id}/{sub}", node_services.put_blob),
    PodRoute("GET", "/blobs/{id}/{sub}", node_services.get_blob),
    PodRoute("POST", "/executions/{id}/data-sources", node_services.open_data_source),
    PodRoute("POST", "/executions/{id}/models", node_services.find_model),
    PodRoute("POST", "/executions/{id}/models/blocked", node_services.block_model),
    PodRoute("POST", "/executions/{id}/models/reserve", node_services.reserve_model_call),
    PodRoute("POST", "/executions/{id}/models/settle", node_services.settle_model_call),
    PodRoute("POST", "/executions/{id}/models/release", node_services.release_model_call),
    PodRoute("POST", "/executions/{id}/models/failed", node_services.count_failed_model_call),
    PodRoute("POST", "/executions/{id}/runs", node_services.start_run),
    PodRoute("POST", "/executions/{id}/workflow-effect", node_services.read_workflow_effect),
    PodRoute("POST", "/executions/{id}/reservations", node_services.reserve),
    PodRoute("POST", "/executions/{id}/event-waits", node_services.expect_event),
    PodRoute("POST", "/executions/{id}/state", node_services.publish),
    PodRoute("POST", "/executions/{id}/signal-replies", node_services.reply_to_signal),
    PodRoute("POST", "/executions/{id}/signal-waits", node_services.expect_signal),
    PodRoute("POST", "/executions/{id}/approval-links", node_services.create_approval_links),
    PodRoute("POST", "/executions/{id}/callback-url", node_services.create_callback_url),
    PodRoute("POST", "/executions/{id}/signatures", node_services.sign),
)


def endpoints(table: Sequence[PodRoute]) -> Mapping[str, ASGIApp]:
    """Return the endpoint of each path of the API for pods, by the path, with all of its methods."""
    found: dict[str, PathEndpoint] = {}
    for line in table:
        one = PodEndpoint(line.method, line.handler)
        earlier = found.get(line.path)
        found[line.path] = one if earlier is None else PathEndpoint({**earlier.operations, **one.operations})
    return {PREFIX + path: endpoint for path, endpoint in found.items()}
