"""Liveness and readiness of the gateway process."""

from __future__ import annotations

import asyncio

from gateway.http import errors
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import WireStruct
from messages.broker import BrokerUnavailable
from models.errors import DatabaseUnavailable

CHECK_SECONDS = 3.0


class HealthStatus(WireStruct):
    """Body of a healthy answer, `ok` or `ready`; an unhealthy server answers with an error status."""

    status: str


async def alive(request: GatewayRequest) -> JsonResponse:  # noqa: ARG001 - a handler's signature
    """Report that the server is alive.

    The answer shows that its event loop runs. Nothing else is checked.
    """
    return JsonResponse(HealthStatus(status="ok"))


async def ready(request: GatewayRequest) -> JsonResponse:
    """Check that the server can serve requests; 503 if its database or broker does not answer."""
    gateway = request.gateway
    checks = {"database": gateway.database.ping(), "broker": gateway.broker.ping()}
    outcomes = await asyncio.gather(
        *(asyncio.wait_for(check, CHECK_SECONDS) for check in checks.values()), return_exceptions=True
    )
    missing = []
    for name, outcome in zip(checks, outcomes, strict=True):
        if isinstance(outcome, DatabaseUnavailable | BrokerUnavailable | TimeoutError):
            missing.append(errors.problem(name, "unavailable", f"The {name} does not answer"))
        elif isinstance(outcome, BaseException):
            raise outcome
    if missing:
        raise errors.not_ready("A dependency of every request does not answer", details=missing)
    return JsonResponse(HealthStatus(status="ready"))
