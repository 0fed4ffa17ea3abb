"""Routes of the dashboard: its pages, its sign-in and its files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gateway.dashboard import assets, page, sign_in_page
from gateway.dashboard.page import Page
from gateway.dashboard.pages import (
    access,
    approvals,
    audit_list,
    data_source_list,
    dead_letter_list,
    delivery_list,
    health,
    overview,
    run,
    run_list,
    run_replay,
    schedule_list,
    trigger_setup,
    workflow,
    workflow_lifecycle,
    workflow_list,
    workflow_versions,
)
from gateway.http.endpoint import AccessRule
from gateway.http.route import Route

PAGES: Final[Sequence[Page]] = (
    overview.PAGE,
    workflow_list.PAGE,
    workflow.PAGE,
    trigger_setup.PAGE,
    workflow_versions.PAGE,
    workflow_lifecycle.PAGE,
    run_list.PAGE,
    approvals.PAGE,
    run.PAGE,
    run_replay.PAGE,
    delivery_list.PAGE,
    dead_letter_list.PAGE,
    schedule_list.PAGE,
    data_source_list.PAGE,
    access.PAGE,
    audit_list.PAGE,
    health.PAGE,
)

ROUTES: Final[Sequence[Route]] = (
    Route("GET", "/", AccessRule.PUBLIC, sign_in_page.redirect, status=302),
    Route("GET", "/dashboard", AccessRule.PUBLIC, sign_in_page.show_start, status=302),
    Route("GET", "/sign-in", AccessRule.PUBLIC, sign_in_page.show, answer=bytes),
    Route("GET", "/invitation", AccessRule.PUBLIC, sign_in_page.show_invitation, answer=bytes),
    Route("GET", "/dashboard/search", AccessRule.PUBLIC, sign_in_page.search, status=302),
    Route("GET", f"{assets.PREFIX}*", AccessRule.PUBLIC, assets.show, answer=bytes),
    *(Route("GET", one.path, AccessRule.PUBLIC, page.serve(one), answer=bytes) for one in PAGES),
    Route("GET", "/dashboard/*", AccessRule.PUBLIC, sign_in_page.show_missing, answer=bytes),
)
"""Routes for browsers; each page checks its visitor by asking public routes with the visitor's session."""
