"""HTTP application of a pod: liveness, readiness, and wakeups."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from models import pod_identity

if TYPE_CHECKING:
    from starlette.requests import Request


class PodPhase(StrEnum):
    """Phase in the life of a pod."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """It accepts no more runs, and ends after the runs that it holds."""


class PodLifecycle:
    """Phase, drain time and wakeup of a pod, which its HTTP application and its executor share."""

    def __init__(self, token: str, workflow_id: str, patience_seconds: float = 0.0) -> None:
        self.workflow_id = workflow_id
        self.patience_seconds = patience_seconds
        """Seconds that runs may take to finish once it drains."""
        self.stage = PodPhase.STARTING
        self.wakeup: Callable[[], None] = lambda: None
        self._wakeup_key = pod_identity.wakeup_key(pod_identity.hash_token(token)).encode()

    def is_gateway_token(self, authorization: str) -> bool:
        """Return, in constant time, whether an `Authorization` header has the token with which the gateway
        wakes this pod.
        """
        return hmac.compare_digest(authorization.encode(), b"Bearer " + self._wakeup_key)


def create_app(life: PodLifecycle) -> Starlette:
    """Return the ASGI application of a pod: `/healthz` (always 200), `/readyz` (200 or 503), and POST `/trigger`.

    `/trigger` makes the executor claim runs now and answers 202; 401 without the token of the gateway, 503
    unless the pod is ready.
    """

    async def alive(_request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def ready(_request: Request) -> JSONResponse:
        return _stage(200 if life.stage is PodPhase.READY else 503)

    async def trigger(request: Request) -> JSONResponse:
        """Claim runs at once. The request carries no runs; the rows alone hold them and their results."""
        if not life.is_gateway_token(request.headers.get("authorization", "")):
            return JSONResponse({"status": "unauthorized"}, 401, {"WWW-Authenticate": "Bearer"})
        if life.stage is not PodPhase.READY:
            return _stage(503)
        life.wakeup()
        return JSONResponse({"status": "accepted"}, 202)

    def _stage(status: int) -> JSONResponse:
        return JSONResponse({"status": life.stage.value, "workflowId": life.workflow_id}, status)

    return Starlette(
        routes=[
            Route("/healthz", alive, methods=["GET"]),
            Route("/readyz", ready, methods=["GET"]),
            Route("/trigger", trigger, methods=["POST"]),
        ]
    )
