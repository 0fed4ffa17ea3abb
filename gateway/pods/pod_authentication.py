"""Authentication of pods by the tokens of their deployments."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from execution.pod_api import RUNNER_HEADER
from gateway.http.errors import ApiError
from gateway.http.failed_attempts import FailedAttempts
from gateway.http.request_origin import client_of_scope
from gateway.pods.lease_checks import LeaseHolder
from journal.group_commit import GroupCommit
from models import deployment_token
from models.deployment_token import TokenBearer
from models.pod_identity import PodProcess

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from models.database import Database

REMEMBERED_SECONDS: Final = 1.0
"""Longest time until a revoked token is refused at every gateway."""
MAX_REMEMBERED: Final = 10_000
MAX_TOKEN_LENGTH: Final = 200


class CachedHolder(Struct, frozen=True):
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

    async def holder(self, request: HTTPConnection) -> LeaseHolder:
        """Return the calling pod with its deployment and process, by its bearer token and a header.

        Tokens are cached for a second. Raises a 401 error without a valid token, and 429 after too many
        failures of a client.
        """
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        process = PodProcess.from_name(request.headers.get(RUNNER_HEADER, ""))
        if scheme != "Bearer" or not 0 < len(token) <= MAX_TOKEN_LENGTH or process is None:
            raise _refuse_pod()
        bearer = await self._bearer(token, client_of_scope(request.scope))
        return LeaseHolder(bearer.workflow_id, bearer.organization_id, bearer.shard, process)

    def forget(self) -> None:
        """Drop all cached tokens, so that a revoked one is refused at once."""
        self._remembered.clear()

    async def _bearer(self, token: str, client: str) -> TokenBearer:
        """Return the bearer of a token, from the cache or the database.

        Raises a 401 error for an unknown one, or 429 if `client` has failed too often.
        """
        remembered = self._remembered.get(token)
        if remembered is not None and remembered.until > monotonic():
            return remembered.bearer
        until = monotonic() + REMEMBERED_SECONDS
        bearer = await self._reads.submit(token)
        if bearer is None:
            self._remembered.pop(token, None)
            raise self._failures.fail(client, _refuse_pod())
        self._remembered[token] = CachedHolder(bearer, until)
        self._remembered.move_to_end(token)
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        return bearer


def _refuse_pod() -> ApiError:
    message = "Send the token of a deployment as Authorization: Bearer, and the pod and its start as X-Runner"
    return ApiError(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})
