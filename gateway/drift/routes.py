"""Routes of the doctor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gateway.drift import drift
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
)
