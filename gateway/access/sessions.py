"""Browser sessions of an organization, shown and ended through the API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.access import audit_log
from gateway.access.session_shapes import SessionList, hash_session, show_session
from gateway.http import errors
from gateway.http.responses import JsonResponse, NoContent
from models import browser_session
from models.audit import AuditAction

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.request import GatewayRequest
    from models.access import ApiCaller
    from models.browser_session import FoundSession


async def index(request: GatewayRequest) -> JsonResponse:
    """List your own browser sessions; for an admin, those of the organization."""
    caller = request.caller
    async with request.gateway.database.read() as connection:
        found = await browser_session.list_sessions(
            connection,
            caller.organization_id,
            user_id=_restrict_to_own_sessions(caller),
            now=request.gateway.clock(),
        )
    shown = [show_session(one.row, one.key_expires_at, caller.session_id) for one in found]
    return JsonResponse(SessionList(count=len(shown), sessions=shown))


async def show(request: GatewayRequest) -> JsonResponse:
    """Return one browser session."""
    async with request.gateway.database.read() as connection:
        found = await _require(request, connection)
    return JsonResponse(show_session(found.row, found.key_expires_at, request.caller.session_id))


async def end(request: GatewayRequest) -> NoContent:
    """End a browser session, so that its next request must sign in again; 404 for one that you may not end."""

    async def delete(connection: AsyncConnection) -> str:
        found = await _require(request, connection)
        await browser_session.delete_session(connection, found.row.id)
        await audit_log.record_change(
            connection,
            request.caller,
            AuditAction.SESSION_ENDED,
            found.row.id,
            before=hash_session(found.row),
            after=None,
        )
        return found.row.hash

    request.gateway.sessions.forget(await request.gateway.database.transaction(delete))
    return NoContent()


async def _require(request: GatewayRequest, connection: AsyncConnection) -> FoundSession:
    """Return the session of the request's path that has not ended.

    Raises a 404 error for an unknown one, and for one of another user unless the caller is an admin.
    """
    caller = request.caller
    found = await browser_session.list_sessions(
        connection,
        caller.organization_id,
        user_id=_restrict_to_own_sessions(caller),
        now=request.gateway.clock(),
        session_id=request.path_params["id"],
    )
    if not found:
        raise errors.not_found("session")
    return found[0]


def _restrict_to_own_sessions(caller: ApiCaller) -> str | None:
    """Return the id of the user whose sessions a caller may see, that is, its own.

    None for an admin, who sees all of the organization.
    """
    return None if caller.is_admin else caller.user_id
