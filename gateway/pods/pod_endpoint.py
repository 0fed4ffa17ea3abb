"""Endpoint of the internal API: authenticates the pod by the token of its deployment and decodes its call."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import msgspec

from engine import values
from engine.values import InvalidJson
from execution.pod_api import RUNNER_HEADER
from gateway.http import errors
from gateway.http.body_limit import BodyLimit
from gateway.http.client_address import client_of_scope
from gateway.http.endpoint import AccessRule, PathEndpoint, PathOperation
from gateway.http.errors import ApiError
from gateway.http.failed_attempts import FailedAttempts
from gateway.http.request import GatewayRequest
from gateway.pods.lease_checks import LeaseHolder
from journal.group_commit import GroupCommit
from json_text import decoding
from models import deployment_token
from models.deployment_token import TokenBearer
from models.pod_processes import PodProcess

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from models.database import Database

Call = TypeVar("Call")
InternalHandler: TypeAlias = "Callable[[GatewayRequest, LeaseHolder], Awaitable[ASGIApp]]"

REMEMBERED_SECONDS: Final = 1.0
"""Longest time until a revoked token is refused at every gateway."""
MAX_REMEMBERED: Final = 10_000
MAX_TOKEN_LENGTH: Final = 200
MAX_CALL_BYTES: Final = 2_000_000
LONG_BYTES: Final = 262_144
"""Size above which a body is decoded in a thread, so that other requests are answered meanwhile."""


@dataclass(frozen=True, slots=True)
class CachedHolder:
    """Bearer of a token at its last lookup."""

    bearer: TokenBearer
    until: float


class PodAuthenticator:
    """Authenticator of pods by the tokens of their deployments, with a short cache per process."""

    def __init__(self, database: Database) -> None:
        self._remembered: OrderedDict[str, CachedHolder] = OrderedDict()
        self._reads: GroupCommit[str, TokenBearer | None] = GroupCommit(
            partial(deployment_token.find_bearers, database)
        )
        """One query at a time for all waiting tokens."""
        self._failures = FailedAttempts("Too many requests from this address had no valid token")

    async def holder(self, request: GatewayRequest) -> LeaseHolder:
        """Return the calling pod. Raises 401 without a valid token, and 429 after too many failures."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        process = PodProcess.from_name(request.headers.get(RUNNER_HEADER, ""))
        if scheme != "Bearer" or not 0 < len(token) <= MAX_TOKEN_LENGTH or process is None:
            raise _unauthorized()
        bearer = await self._bearer(token, client_of_scope(request.scope))
        return LeaseHolder(bearer.workflow_id, bearer.organization_id, bearer.shard, process)

    def forget(self) -> None:
        """Drop all cached tokens."""
        self._remembered.clear()

    async def _bearer(self, token: str, client: str) -> TokenBearer:
        remembered = self._remembered.get(token)
        if remembered is not None and remembered.until > monotonic():
            return remembered.bearer
        until = monotonic() + REMEMBERED_SECONDS
        bearer = await self._reads.submit(token)
        if bearer is None:
            self._remembered.pop(token, None)
            raise self._failures.fail(client, _unauthorized())
        self._remembered[token] = CachedHolder(bearer, until)
        self._remembered.move_to_end(token)
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        return bearer


class PodEndpoint(PathEndpoint):
    """ASGI application for one method of one path."""

    def __init__(self, method: str, handler: InternalHandler) -> None:
        async def handle(request: GatewayRequest) -> ASGIApp:
            return await handler(request, await request.gateway.runners.authenticator.holder(request))

        super().__init__({method: PathOperation(AccessRule.PUBLIC, handle)})


async def decode_call(request: GatewayRequest, kind: type[Call], *, max_bytes: int = MAX_CALL_BYTES) -> Call:
    """Return the body as `kind`. Raises 400 for invalid strict JSON, 413 for size, and 422 for wrong fields."""
    raw = await request.body_up_to(BodyLimit(max_bytes, setting=""))
    if len(raw) > LONG_BYTES:
        return await asyncio.to_thread(_decoded, raw, kind)
    return _decoded(raw, kind)


def _decoded(raw: bytes, kind: type[Call]) -> Call:
    try:
        values.decode_json(raw)
        return decoding.decode(raw, kind)
    except InvalidJson as error:
        raise ApiError(400, error.code, error.message) from error
    except msgspec.ValidationError as error:
        raise errors.invalid([errors.problem("", "invalid-value", str(error))]) from error


def _unauthorized() -> ApiError:
    message = "Send the token of a deployment as Authorization: Bearer, and the pod and its start as X-Runner"
    return ApiError(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})
