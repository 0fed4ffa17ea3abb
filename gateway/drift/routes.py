"""Routes of the doctor, and of the health of the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gateway.drift import drift, server_health
from gateway.http.endpoint import AccessRule
from gateway.http.operation_docs import OperationDoc
from gateway.http.route import Route

ROUTES: Final[Sequence[Route]] = (
    Route(
        "GET",
        "/api/v1/admin/drift",
        AccessRule.ADMIN,
        drift.show,
        answer=drift.DriftReport,
        docs=OperationDoc(refusals=("not-ready",)),
    ),
    Route(
        "GET",
        "/api/v1/admin/health",
        AccessRule.ADMIN,
        server_health.show,
        answer=server_health.ServerHealth,
    ),
)
