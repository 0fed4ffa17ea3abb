"""Table of routes, put together from the tables of the features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway import health
from gateway.access import routes as access_routes
from gateway.ai_models import routes as ai_models_routes
from gateway.dashboard import routes as dashboard_routes
from gateway.data_sources import routes as data_sources_routes
from gateway.deployments import routes as deployments_routes
from gateway.documentation import site
from gateway.drift import routes as drift_routes
from gateway.executions import routes as executions_routes
from gateway.explanations import routes as explanations_routes
from gateway.http.endpoint import AccessRule, PathEndpoint, PathOperation
from gateway.http.operation_docs import KEPT, OperationDoc
from gateway.http.route import Route
from gateway.ingest import hooks
from gateway.ingest import routes as ingest_routes
from gateway.openapi import document
from gateway.tasks import routes as tasks_routes
from gateway.workflows import routes as workflows_routes
from models.access import KeyScope

SERVER: Sequence[Route] = (
    Route("GET", "/healthz", AccessRule.PUBLIC, health.alive, answer=health.HealthStatus),
    Route(
        "GET",
        "/readyz",
        AccessRule.PUBLIC,
        health.ready,
        answer=health.HealthStatus,
        docs=OperationDoc(refusals=("not-ready",)),
    ),
    Route("GET", "/openapi.json", AccessRule.PUBLIC, document.openapi, answer=dict[str, Any], docs=KEPT),
    Route(
        "GET",
        "/api/v1/openapi.json",
        KeyScope.WORKFLOWS_READ,
        document.organization_openapi,
        answer=dict[str, Any],
        docs=KEPT,
    ),
)
"""Routes for health and documentation of the server."""

TABLE: Sequence[Route] = (
    *SERVER,
    *access_routes.ROUTES,
    *workflows_routes.ROUTES,
    *deployments_routes.ROUTES,
    *data_sources_routes.ROUTES,
    *ai_models_routes.ROUTES,
    ai_models_routes.USABLE,
    *ai_models_routes.PROVIDER_KEYS,
    *ai_models_routes.TOOL_SERVERS,
    *ai_models_routes.COSTS,
    *ai_models_routes.SETTINGS,
    *ingest_routes.ROUTES,
    *executions_routes.ROUTES,
    *tasks_routes.ROUTES,
    *explanations_routes.ROUTES,
    *drift_routes.ROUTES,
)

ALIASES: Sequence[Route] = ai_models_routes.ALIASES
"""Other paths of routes of the table; not part of the OpenAPI document."""

FOR_BROWSERS: Sequence[Route] = (
    *dashboard_routes.ROUTES,
    *access_routes.FOR_BROWSERS,
    *executions_routes.FOR_BROWSERS,
    Route("GET", "/docs", AccessRule.PUBLIC, site.redirect, status=302),
    Route("GET", "/docs/*", AccessRule.PUBLIC, site.show, answer=bytes),
    Route("GET", "/favicon.svg", AccessRule.PUBLIC, document.icon, answer=bytes),
    Route("GET", "/favicon.ico", AccessRule.PUBLIC, document.icon, answer=bytes),
)
"""Routes that browsers request by themselves; not part of the API or its OpenAPI document."""


def endpoints(table: Sequence[Route]) -> dict[str, PathEndpoint]:
    """Return by path the endpoint with all methods that the table has for it; one with GET also answers HEAD, except
    webhooks, whose GET may start a run.
    """
    paths: dict[str, dict[str, PathOperation]] = {}
    for line in table:
        operations = paths.setdefault(line.path, {})
        operations[line.method] = PathOperation(line.access, line.handler, line.query)
        if line.method == "GET" and line.handler is not hooks.receive:
            operations["HEAD"] = operations["GET"]
    return {path: PathEndpoint(operations) for path, operations in paths.items()}
