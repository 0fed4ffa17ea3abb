"""Whether this process is alive, and whether it can do its work."""

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
    """`ok` or `ready`; whatever is wrong has another status."""

    status: str


async def alive(request: GatewayRequest) -> JsonResponse:  # noqa: ARG001 - a handler's signature
    """Tell that the server is alive: its event loop turns, and nothing else is looked at."""
    return JsonResponse(HealthStatus(status="ok"))


async def ready(request: GatewayRequest) -> JsonResponse:
    """Tell whether the server can do its work.

    Where it can't, the refusal has one detail for each part that doesn't answer.
    """
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
        raise errors.not_ready("A part that every request needs does not answer", details=missing)
    return JsonResponse(HealthStatus(status="ready"))
