"""What a pod answers: whether it lives, whether it is ready, and to a wakeup that there is work."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from models import runner_tokens

if TYPE_CHECKING:
    from starlette.requests import Request


class PodPhase(StrEnum):
    """Where the process is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """It takes no more runs, and ends when those that it holds have."""


class PodLifecycle:
    """What the process is about, as far as it tells others."""

    def __init__(self, token: str, workflow_id: str, patience_seconds: float = 0.0) -> None:
        self.workflow_id = workflow_id
        self.patience_seconds = patience_seconds
        """How long runs may take to end once it drains."""
        self.stage = PodPhase.STARTING
        self.wakeup: Callable[[], None] = lambda: None
        self._wakeup_key = runner_tokens.wakeup_key(runner_tokens.hash_token(token)).encode()

    def is_gateway_token(self, authorization: str) -> bool:
        """Tell, in constant time, whether a header is the gateway's."""
        return hmac.compare_digest(authorization.encode(), b"Bearer " + self._wakeup_key)


def create_app(life: PodLifecycle) -> Starlette:
    """Return the application."""

    async def alive(_request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def ready(_request: Request) -> JSONResponse:
        return _stage(200 if life.stage is PodPhase.READY else 503)

    async def trigger(request: Request) -> JSONResponse:
        """Claim at once; whose runs those are, and what becomes of them, stands in the rows alone."""
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
