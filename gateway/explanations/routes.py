"""Routes that explain why something does not move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gateway.explanations import organization_explanations, run_explanations, workflow_explanations
from gateway.http.route import READ, Route

ROUTES: Final[Sequence[Route]] = (
    Route(
        "GET",
        "/api/v1/executions/{id}/why",
        READ,
        run_explanations.show,
        query=(run_explanations.NODE,),
        answer=run_explanations.RunExplanation,
    ),
    Route(
        "GET",
        "/api/v1/workflows/{id}/why",
        READ,
        workflow_explanations.show,
        answer=workflow_explanations.WorkflowExplanation,
    ),
    Route(
        "GET",
        "/api/v1/why",
        READ,
        organization_explanations.show,
        answer=organization_explanations.OrganizationExplanation,
    ),
)
