"""Discover: the deployed workflows of an application, with the URLs that trigger them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import select
from sqlmodel import col

from gateway.http import limits
from gateway.http.edge import TRIGGER_PATH
from gateway.http.errors import invalid_query
from gateway.http.parameters import TextParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import WireStruct
from journal.store import DefinitionKey
from models import pod_identity
from models.deployment import Deployment
from models.workflow import Workflow, WorkflowStatus, is_listed_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.settings import GatewaySettings
    from models.access import ApiCaller

APP_ID: Final = TextParameter("appId", "Value of `config.appId` in the application's workflows; required.")
LOCAL_NAMESPACE: Final = "local"


class TriggerEndpoints(WireStruct):
    """Trigger URL of a workflow."""

    proxy_url: str = msgspec.field(name="proxy_url")
    """URL at this server that accepts the body and key of the workflow's trigger, and wakes the workflow."""
    method: str = "POST"


class PodLocation(WireStruct):
    """Location of a workflow's pods."""

    pod_name: str = msgspec.field(name="pod_name")
    """Prefix of the names of its pods."""
    namespace: str


class DiscoveredWorkflow(WireStruct):
    """Deployed workflow of an application."""

    id: str
    name: str
    description: str
    trigger_type: str = msgspec.field(name="trigger_type")
    """Kind of its trigger node."""
    mode: str
    endpoints: TriggerEndpoints
    deployment: PodLocation


async def index(request: GatewayRequest) -> JsonResponse:
    """List the active, deployed workflows of an application with their trigger URLs, newest first, at most 1,000;
    `appId` is required.
    """
    app_id = request.query[APP_ID]
    if app_id is None:
        raise invalid_query("appId", "required", "appId is required")
    async with request.gateway.database.read() as connection:
        found = await _list_deployed_workflows(connection, request.caller, app_id)
    settings = request.gateway.settings
    shapes = [
        DiscoveredWorkflow(
            id=row.id,
            name=row.name,
            description=row.description,
            trigger_type=await request.gateway.deployed.trigger_kind(
                DefinitionKey(row.organization_id, row.definition_hash, row.shard)
            ),
            mode="production",
            endpoints=TriggerEndpoints(proxy_url=_trigger_url(settings, row.id)),
            deployment=PodLocation(
                pod_name=pod_identity.workflow_name(row.id), namespace=_choose_namespace(settings)
            ),
        )
        for row in found
    ]
    return JsonResponse(shapes)


async def _list_deployed_workflows(
    connection: AsyncConnection, caller: ApiCaller, app_id: str
) -> Sequence[Row[*tuple[Any, ...]]]:
    """Return the active, deployed workflows of an application that the caller may read, newest first; at most 1,000."""
    rows = await connection.execute(
        select(
            *(col(Workflow.id), col(Workflow.name), col(Workflow.description)),
            *(col(Deployment.organization_id), col(Deployment.shard), col(Deployment.definition_hash)),
        )
        .join(Deployment, col(Deployment.workflow_id) == col(Workflow.id))
        .where(
            is_listed_for(caller),
            col(Workflow.app_id) == app_id,
            col(Workflow.status) == WorkflowStatus.ACTIVE,
            col(Deployment.is_deployed),
        )
        .order_by(col(Workflow.created_at).desc(), col(Workflow.id).desc())
        .limit(limits.DISCOVERED)
    )
    return rows.all()


def _trigger_url(settings: GatewaySettings, workflow_id: str) -> str:
    if settings.cluster == "kubernetes":
        name = pod_identity.workflow_name(workflow_id)
        return f"http://{name}.{settings.kubernetes_namespace}.svc.cluster.local{TRIGGER_PATH}"
    address = settings.public_url or f"http://{settings.host}:{settings.port}"
    return f"{address.rstrip('/')}/api/v1/workflows/{workflow_id}/trigger"


def _choose_namespace(settings: GatewaySettings) -> str:
    return settings.kubernetes_namespace if settings.cluster == "kubernetes" else LOCAL_NAMESPACE
