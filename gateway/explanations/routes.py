"""Routes that explain why something does not move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gateway.explanations import run_explanations
from gateway.http.route import READ, Route

ROUTES: Final[Sequence[Route]] = (
    Route(
        "GET",
        "/api/v1/executions/{id}/why",
        READ,
        run_explanations.show,
        answer=run_explanations.RunExplanation,
    ),
)
