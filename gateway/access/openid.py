"""Ways of a browser to the OpenID Connect provider and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import structlog
from msgspec.structs import replace

from gateway.access import sign_in
from gateway.http import errors, limits, public_address
from gateway.http.cached_text import RedirectResponse
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import StrictWire, WireStruct, decode_body
from models import browser_session
from models.access import DEFAULT_SCOPES
from models.access_store import EmailTaken

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gateway.access.openid_sign_in import OpenIdSignIn, SignInAttempt
    from gateway.http.session_cookies import SessionCookie
    from models.access import ApiCaller

log = structlog.get_logger()

CALLBACK: Final = "/session/openid/callback"
PAGES: Final = "/dashboard"
SIGN_IN_PAGE: Final = "/sign-in"
KEYS_PAGE: Final = "/dashboard/keys"
ATTEMPT_SECONDS: Final = 600
"""Time that a person may take at the provider."""


class BeginInvitation(StrictWire):
    """Request body of the page behind an invitation."""

    code: str


class ProviderAddress(WireStruct):
    """Address at which the browser signs in."""

    url: str


class RedirectWithCookies:
    """Redirect that also stores or removes cookies, as an ASGI response."""

    def __init__(self, location: str, *cookies: str) -> None:
        self._redirect = RedirectResponse(location)
        self._cookies = [(b"set-cookie", one.encode()) for one in cookies]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_cookies(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], *self._cookies, (b"cache-control", b"no-store")]
                message = {**message, "headers": headers}
            await send(message)

        await self._redirect(scope, receive, send_with_cookies)


async def begin(request: GatewayRequest) -> ASGIApp:
    """Lead a browser to the provider; with `link`, to connect the identity with the user who is signed in.

    A failed attempt redirects to a page that explains it.
    """
    from gateway.access.openid_provider import ProviderUnavailable  # noqa: PLC0415 - see _require_provider

    cookie, openid = sign_in.require_cookie(request), _require_provider(request)
    query = _query(request)
    links = ""
    if "link" in query:
        # Another site must not begin it: only a link of our own page does.
        if dict(request.scope["headers"]).get(b"sec-fetch-site") != b"same-origin":
            return _fail(request, cookie, "lost")
        caller = await request.gateway.sessions.caller(request.scope)
        if caller is None:
            return _fail(request, cookie, "lost")
        if not _has_all_scopes(caller):
            return _fail(request, cookie, "scopes", page=KEYS_PAGE)
        links = caller.user_id
    try:
        url, attempt = await openid.begin(
            _redirect_uri(request), _own_page(query.get("next", "")), links=links
        )
    except ProviderUnavailable as error:
        log.warning("sign-in provider not reached", reason=str(error))
        wanted = _own_page(query.get("next", ""))
        return _fail(request, cookie, "unavailable", wanted, page=KEYS_PAGE if links else SIGN_IN_PAGE)
    return RedirectWithCookies(url, _attempt_cookie(cookie).header(attempt, seconds=ATTEMPT_SECONDS))


async def begin_invitation(request: GatewayRequest) -> JsonResponse:
    """Return the address of the provider for the acceptance of an invitation with an account there.

    Also sets the cookie of the attempt. Refused for an unknown, used, revoked or expired code; 503 if the provider
    can't be reached.
    """
    from gateway.access.openid_provider import ProviderUnavailable  # noqa: PLC0415 - see _require_provider

    cookie, openid = sign_in.require_cookie(request), _require_provider(request)
    cookie.require_same_origin(request.scope)
    body = await decode_body(request, BeginInvitation)
    await request.gateway.invitations.find(request.scope, body.code)
    try:
        url, attempt = await openid.begin(_redirect_uri(request), PAGES, invitation_code=body.code)
    except ProviderUnavailable as error:
        log.warning("sign-in provider not reached", reason=str(error))
        raise errors.not_ready("The account provider cannot be reached: try again") from error
    headers = {"Set-Cookie": _attempt_cookie(cookie).header(attempt, seconds=ATTEMPT_SECONDS)}
    return JsonResponse(ProviderAddress(url=url), headers=headers)


async def finish(request: GatewayRequest) -> ASGIApp:
    """Take the provider's answer: sign the browser in, or connect the identity.

    Every failure redirects to a page that explains it.
    """
    from gateway.access.openid_provider import (  # noqa: PLC0415 - see _require_provider
        ProviderRefusal,
        ProviderUnavailable,
    )
    from gateway.access.openid_sign_in import NoAccount  # noqa: PLC0415 - see above
    from models.user_identity import IdentityTaken  # noqa: PLC0415 - see above

    cookie, openid = sign_in.require_cookie(request), _require_provider(request)
    query = _query(request)
    attempt = await openid.take_attempt(
        _attempt_cookie(cookie).value_of(request.scope), query.get("state", "")
    )
    if attempt is None:
        return _fail(request, cookie, "lost")
    # A person who connects an account is signed in, and sees the problem on the page where it began.
    page = KEYS_PAGE if attempt.links else SIGN_IN_PAGE
    if "code" not in query:
        log.info("sign-in refused by the provider", reason=query.get("error", "")[:100])
        return _fail(request, cookie, "refused", attempt.next, page=page)
    try:
        return await _finish(request, cookie, openid, attempt, query)
    except ProviderUnavailable as error:
        log.warning("sign-in provider not reached", reason=str(error))
        problem = "unavailable"
    except ProviderRefusal as error:
        log.warning("sign-in refused", reason=str(error))
        problem = "refused"
    except NoAccount:
        problem = "no-account"
    except EmailTaken:
        problem = "address-taken"
    except IdentityTaken:
        problem = "taken"
    return _fail(request, cookie, problem, attempt.next, page=page)


async def _finish(
    request: GatewayRequest,
    cookie: SessionCookie,
    openid: OpenIdSignIn,
    attempt: SignInAttempt,
    query: dict[str, str],
) -> ASGIApp:
    """Sign the browser in, or connect the identity for an attempt that began with a link, and redirect to its page.

    If the user of such a link is not signed in any more, or lacks scopes, the redirect is to a page that explains this.
    Raises `ProviderUnavailable`, `ProviderRefusal`, `NoAccount`, `EmailTaken` and `IdentityTaken`.
    """
    claims = await openid.provider.fetch_claims(
        query["code"],
        query.get("iss"),
        _redirect_uri(request),
        nonce=attempt.nonce,
        verifier=attempt.verifier,
        now=request.gateway.clock(),
    )
    forget = _attempt_cookie(cookie).header("")
    target = f"{_root(request)}{attempt.next}"
    if attempt.links:
        caller = await request.gateway.sessions.caller(request.scope)
        if caller is None or caller.user_id != attempt.links:
            return _fail(request, cookie, "lost")
        if not _has_all_scopes(caller):
            return _fail(request, cookie, "scopes", page=KEYS_PAGE)
        await openid.link(claims, caller.organization_id, caller.user_id)
        return RedirectWithCookies(target, forget)
    earlier = cookie.value_of(request.scope)
    replaces = None if earlier is None else browser_session.hash_secret(earlier)
    secret = await openid.sign_in(claims, request.headers.get("user-agent", ""), replaces, attempt.invitation)
    if replaces is not None:
        request.gateway.sessions.forget(replaces)
    return RedirectWithCookies(target, cookie.header(secret), forget)


def _has_all_scopes(caller: ApiCaller) -> bool:
    """Return whether the caller's key or session has all scopes of the user's role, as required to connect an identity.

    Sessions of an identity have them all: a key of few scopes could gain the others by connecting one.
    """
    return caller.scopes >= DEFAULT_SCOPES[caller.role]


def _require_provider(request: GatewayRequest) -> OpenIdSignIn:
    """Return the sign-in with the provider (OpenID Connect) of the settings; raises a 404 error without one.

    The modules for OpenID Connect are loaded only by servers with a provider.
    """
    openid = request.gateway.openid
    if openid is None:
        raise errors.not_found()
    return openid


def _fail(
    request: GatewayRequest,
    cookie: SessionCookie,
    problem: str,
    next_page: str = PAGES,
    *,
    page: str = SIGN_IN_PAGE,
) -> RedirectWithCookies:
    """Redirect to a page that explains a problem by its name, and remove the cookie of the attempt.

    Names are `lost`, `unavailable`, `refused`, `no-account`, `address-taken`, `scopes` and `taken`. From the sign-in
    page, another attempt leads to `next_page`.
    """
    wanted = {"next": next_page} if page == SIGN_IN_PAGE and next_page != PAGES else {}
    location = f"{_root(request)}{page}?{urlencode({'problem': problem, **wanted})}"
    return RedirectWithCookies(location, _attempt_cookie(cookie).header(""))


def _attempt_cookie(cookie: SessionCookie) -> SessionCookie:
    """Return the cookie that holds a sign-in which has begun: the session cookie with `-openid` after its name."""
    return replace(cookie, name=f"{cookie.name}-openid")


def _query(request: GatewayRequest) -> dict[str, str]:
    """Return the query parameters of a request, of a repeated one the last value; empty for over 50 parameters."""
    text = request.scope["query_string"].decode("latin-1")
    try:
        return dict(parse_qsl(text, max_num_fields=limits.QUERY_FIELDS, keep_blank_values=True))
    except ValueError:
        return {}


def _own_page(wanted: str) -> str:
    """Return the wanted path if it is below `/dashboard/` on this server, else `/dashboard`.

    So a link can't lead to another site after the sign-in.
    """
    # Parsers drop line breaks and tabs, which no header may have.
    is_own = wanted.startswith(f"{PAGES}/") and "\\" not in wanted and wanted.isprintable()
    return wanted if is_own and urlsplit(wanted).netloc == "" else PAGES


def _redirect_uri(request: GatewayRequest) -> str:
    """Return the public address to which the provider sends the browser back."""
    return public_address.base_url(request) + CALLBACK


def _root(request: GatewayRequest) -> str:
    """Return the path part of the public URL without a slash at its end; empty for most servers."""
    return urlsplit(request.gateway.settings.public_url).path.rstrip("/")
