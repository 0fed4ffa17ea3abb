"""Endpoint of one path: access, dispatch by method, and translation of errors to answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import structlog
from msgspec import Struct
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.http import errors
from gateway.http.authentication import name_route
from gateway.http.errors import ApiError
from gateway.http.parameters import QueryParameter
from gateway.http.request import GatewayRequest
from gateway.http.request_origin import CURRENT_REQUEST
from gateway.http.responses import JsonResponse, NoContent
from messages.broker import BrokerUnavailable
from models import ids
from models.access import KeyScope
from models.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from gateway.state import GatewayState
    from models.access import ApiCaller

log = structlog.get_logger()

OPTIONS: Final = "OPTIONS"
"""Method that every path answers, with the list of its methods."""
Handler: TypeAlias = Callable[[GatewayRequest], Awaitable[ASGIApp]]


class AccessRule(Enum):
    """Access to an operation that isn't tied to a single scope."""

    PUBLIC = auto()
    """Everybody, without a key."""
    ANY_KEY = auto()
    """Every valid key, regardless of its scopes."""
    ADMIN = auto()
    """Admin of an organization, with a key of the scope `users:write`."""
    SENDER = auto()
    """Key with the scope `workflows:execute`, token in the URL, or signed request."""


OPEN_QUERIES = frozenset({AccessRule.PUBLIC, AccessRule.SENDER})
"""Routes for senders, who add parameters of their own, and for browsers."""


class PathOperation(Struct, frozen=True):
    """Handler of one method of a path, with its access."""

    access: KeyScope | AccessRule
    handler: Handler
    query: Collection[QueryParameter[Any]] = ()
    """Parameters that the handler may read."""


class PathEndpoint:
    """ASGI application for one path; access depends on the matched route, never on the text of the URL."""

    def __init__(self, operations: Mapping[str, PathOperation]) -> None:
        self.operations = operations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._response(scope, receive)
        await response(scope, receive, send)

    async def _response(self, scope: Scope, receive: Receive) -> ASGIApp:
        """Return the handler's answer, or the error answer for an error of it.

        While database or broker are away it is 503, after a disconnect 400, and for unexpected errors, which are
        logged, 500.
        """
        try:
            return await self._handle(scope, receive)
        except ApiError as error:
            gateway: GatewayState = scope["app"].state.gateway
            gateway.samples.note(scope, error)
            if error.lacked_scope is not None:
                _count_refusal(gateway, scope, error.lacked_scope)
            return error.response(scope["request_id"])
        except (DatabaseUnavailable, BrokerUnavailable) as error:
            return errors.not_ready(f"{error}: try again").response(scope["request_id"])
        except ClientDisconnect:
            return errors.ApiError(400, "disconnected", "The client has closed the connection").response(
                scope["request_id"]
            )
        except Exception:
            log.exception("request failed", request_id=scope["request_id"], path=scope["route"].path)
            return errors.internal().response(scope["request_id"])

    async def _handle(self, scope: Scope, receive: Receive) -> ASGIApp:
        """Authenticate a request, check its scope, ids and query, and return the handler's answer.

        `OPTIONS` is answered without authentication. Raises the `ApiError` of any of these steps, 405 for
        another method, 404 for malformed ids.
        """
        operation = self.operations.get(scope["method"])
        if operation is None:
            allowed = {*self.operations, OPTIONS}
            if scope["method"] != OPTIONS:
                raise errors.method_not_allowed(allowed)
            # Before any authentication: browsers send no key with a preflight request.
            return NoContent({"Allow": ", ".join(sorted(allowed))})
        gateway: GatewayState = scope["app"].state.gateway
        CURRENT_REQUEST.set(scope)
        caller = sender = None
        if operation.access is AccessRule.SENDER:
            sender = await gateway.sender_authenticator.authenticate(scope)
            caller = None if sender is None else sender.caller
        elif operation.access is not AccessRule.PUBLIC:
            caller = await gateway.authenticator.caller(scope)
            _check_scope(caller, operation.access)
        if not all(map(ids.is_id, scope["path_params"].values())):
            raise errors.not_found("object")
        request = GatewayRequest(scope, receive, gateway, caller, operation.query, sender)
        if "trace" in scope:
            scope["trace"].has_key = request.has_key
        if operation.access not in OPEN_QUERIES:
            request.query.require_known()
        response = await operation.handler(request)
        if request.warnings and isinstance(response, JsonResponse):
            response.warn(request.warnings)
        return response


def _check_scope(caller: ApiCaller, access: KeyScope | AccessRule) -> None:
    """Raise a 403 error unless the caller's key has the scope; `ADMIN` also demands the role of an admin, `ANY_KEY`
    nothing.
    """
    if access is AccessRule.ANY_KEY:
        return
    if access is AccessRule.ADMIN:
        if not caller.is_admin:
            raise errors.admin_required()
        access = KeyScope.USERS_WRITE
    if not isinstance(access, KeyScope) or not caller.has_scope(access):
        raise errors.scope_required(str(access))


def _count_refusal(gateway: GatewayState, scope: Scope, lacked_scope: str) -> None:
    """Count a refusal of a key for want of a scope.

    Requests of browser sessions are left out: pages ask for parts that their visitor may not see.
    """
    caller = gateway.authenticator.recent_caller(scope)
    if caller is not None:
        gateway.key_refusals.note(caller.key_id, lacked_scope, name_route(scope))


async def answer_unrouted(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 404 to a request for a path that no route has, as an ASGI application."""
    await errors.not_found().response(scope["request_id"])(scope, receive, send)
