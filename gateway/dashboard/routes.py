"""Routes of the dashboard: its pages, its sign-in and its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from gateway.dashboard import assets, page, sign_in_page
from gateway.http.endpoint import AccessRule
from gateway.http.route import Route

PAGES: Final[Mapping[str, str]] = {
    "/dashboard/overview": "overview",
    "/dashboard/workflows": "workflow_list",
    "/dashboard/workflows/{id}": "workflow",
    "/dashboard/workflows/{id}/trigger": "trigger_setup",
    "/dashboard/workflows/{id}/versions": "workflow_versions",
    "/dashboard/workflows/{id}/lifecycle": "workflow_lifecycle",
    "/dashboard/runs": "run_list",
    "/dashboard/approvals": "approvals",
    "/dashboard/runs/{id}": "run",
    "/dashboard/runs/{id}/replay": "run_replay",
    "/dashboard/deliveries": "delivery_list",
    "/dashboard/deliveries/{id}": "delivery",
    "/dashboard/dead-letters": "dead_letter_list",
    "/dashboard/schedule": "schedule_list",
    "/dashboard/sources": "data_source_list",
    "/dashboard/models": "ai_registry",
    "/dashboard/keys": "access",
    "/dashboard/audit": "audit_list",
    "/dashboard/health": "health",
}
"""Modules of the pages by path; gateways without visitors do not load them."""

ROUTES: Final[Sequence[Route]] = (
    Route("GET", "/", AccessRule.PUBLIC, sign_in_page.redirect, status=302),
    Route("GET", "/dashboard", AccessRule.PUBLIC, sign_in_page.show_start, status=302),
    Route("GET", "/sign-in", AccessRule.PUBLIC, sign_in_page.show, answer=bytes),
    Route("GET", "/invitation", AccessRule.PUBLIC, sign_in_page.show_invitation, answer=bytes),
    Route("GET", "/dashboard/search", AccessRule.PUBLIC, sign_in_page.search, status=302),
    Route("GET", f"{assets.PREFIX}*", AccessRule.PUBLIC, assets.show, answer=bytes),
    *(Route("GET", path, AccessRule.PUBLIC, page.serve(name), answer=bytes) for path, name in PAGES.items()),
    Route("GET", "/dashboard/*", AccessRule.PUBLIC, sign_in_page.show_missing, answer=bytes),
)
"""Routes for browsers; each page checks its visitor by asking public routes with the visitor's session."""
