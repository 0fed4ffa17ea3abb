"""Endpoint of the internal API: authenticates the pod by the token of its deployment and decodes its call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import msgspec

from engine import values
from engine.values import InvalidJson
from gateway.http import errors
from gateway.http.endpoint import AccessRule, PathEndpoint, PathOperation
from gateway.http.errors import ApiError
from gateway.http.request import BodyLimit, GatewayRequest
from gateway.pods.lease_checks import LeaseHolder
from json_text import decoding

if TYPE_CHECKING:
    from starlette.types import ASGIApp


Call = TypeVar("Call")
InternalHandler: TypeAlias = "Callable[[GatewayRequest, LeaseHolder], Awaitable[ASGIApp]]"

MAX_CALL_BYTES: Final = 2_000_000
LONG_BYTES: Final = 262_144
"""Size above which a body is decoded in a thread, so that other requests are answered meanwhile."""


class PodEndpoint(PathEndpoint):
    """ASGI application for one method of one path."""

    def __init__(self, method: str, handler: InternalHandler) -> None:
        async def handle(request: GatewayRequest) -> ASGIApp:
            return await handler(request, await request.gateway.pod_services.authenticator.holder(request))

        super().__init__({method: PathOperation(AccessRule.PUBLIC, handle)})


async def decode_call(request: GatewayRequest, kind: type[Call], *, max_bytes: int = MAX_CALL_BYTES) -> Call:
    """Return the body of a pod's call as `kind`, up to `max_bytes`; large ones are decoded in a thread.

    Raises a 400 error for invalid JSON, 413 for size, and 422 for wrong fields.
    """
    raw = await request.body_up_to(BodyLimit(max_bytes, setting=""))
    if len(raw) > LONG_BYTES:
        return await asyncio.to_thread(_decode_body, raw, kind)
    return _decode_body(raw, kind)


def _decode_body(raw: bytes, kind: type[Call]) -> Call:
    """Return raw bytes as `kind`; raises a 400 error for invalid JSON, 422 for wrong fields."""
    try:
        values.decode_json(raw)
        return decoding.decode(raw, kind)
    except InvalidJson as error:
        raise ApiError(400, error.code, error.message) from error
    except msgspec.ValidationError as error:
        raise errors.invalid([errors.problem("", "invalid-value", str(error))]) from error
