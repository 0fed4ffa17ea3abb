"""Sign-in and sign-out of browsers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.values import fingerprint
from gateway.access import audit_log
from gateway.access.browser_sign_in import SignInRequest
from gateway.access.session_shapes import show_session
from gateway.http import errors, session_cookies
from gateway.http.errors import ApiError
from gateway.http.responses import JsonResponse, NoContent
from gateway.http.wire import decode_body
from models import browser_session
from models.audit import AuditAction

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.request import GatewayRequest
    from gateway.http.session_cookies import SessionCookie


async def create(request: GatewayRequest) -> JsonResponse:
    """Sign a browser in: its cookie stands for the key from then on.

    The body has an API key or a one-time code from the terminal, not both. An earlier session of the browser
    is replaced.
    """
    cookie = require_cookie(request)
    cookie.require_same_origin(request.scope)
    body = await decode_body(request, SignInRequest)
    if (body.key is None) == (body.code is None):
        raise errors.invalid([errors.problem("key", "conflict", "Give key or code, and not both")])
    earlier = cookie.value_of(request.scope)
    replaces = None if earlier is None else browser_session.hash_secret(earlier)
    signed_in = await request.gateway.sign_in.sign_in(
        request.scope, body, user_agent=request.headers.get("user-agent", ""), replaces=replaces
    )
    if replaces is not None:
        request.gateway.sessions.forget(replaces)
    shape = show_session(signed_in.row, signed_in.found.expires_at, signed_in.row.id)
    headers = {"Set-Cookie": cookie.header(signed_in.secret)}
    return JsonResponse(shape, status=201, headers=headers)


async def end(request: GatewayRequest) -> NoContent:
    """Sign a browser out: delete its session, if it has one, and its cookie."""
    cookie = require_cookie(request)
    cookie.require_same_origin(request.scope)
    secret = cookie.value_of(request.scope)
    caller = None if secret is None else await request.gateway.sessions.caller(request.scope)
    if secret is not None and caller is not None and caller.session_id is not None:
        session_id = caller.session_id

        async def delete(connection: AsyncConnection) -> None:
            await browser_session.delete_session(connection, session_id)
            await audit_log.record_change(
                connection,
                caller,
                AuditAction.SESSION_ENDED,
                session_id,
                before=fingerprint({"id": session_id}),
                after=None,
            )

        await request.gateway.database.transaction(delete)
        request.gateway.sessions.forget(browser_session.hash_secret(secret))
    return NoContent({"Set-Cookie": cookie.header("")})


def require_cookie(request: GatewayRequest) -> SessionCookie:
    """Return the session cookie for the address of the request: its name and attributes depend on HTTPS.

    Raises a 404 error if the dashboard is off, and 403 over plain HTTP from another machine.
    """
    if request.gateway.settings.dashboard == "off":
        raise errors.not_found()
    cookie = session_cookies.cookie_of(request.scope, request.gateway.settings.public_url)
    if cookie is None:
        raise ApiError(
            403,
            "https-required",
            "Signing in needs HTTPS: set PILOTFLAME_PUBLIC_URL to the https:// address of this server, or open"
            " it as http://127.0.0.1 on its own machine",
        )
    return cookie
