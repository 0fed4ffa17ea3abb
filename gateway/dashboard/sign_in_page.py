"""Page on which a browser signs in, and the way to the dashboard from the root of the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import urlencode

from gateway.dashboard import page
from gateway.dashboard.page_request import build_page_request
from gateway.http import errors, session_cookies
from gateway.http.cached_text import RedirectResponse
from models import ids

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from gateway.http.request import GatewayRequest

PROBLEMS: Final = {
    "no-account": "You have no account here yet. Ask an admin for an invitation to the mail address of your account.",
    "refused": "The sign-in was refused. Try again; if it is refused again, the log of the server has the reason.",
    "lost": "The sign-in took too long, or began in another browser. Try again.",
    "scopes": "An account gets all rights of your role. Sign in with a key that has them, and connect it then.",
    "taken": "That account belongs to another user of this server.",
    "address-taken": "A user has the invited address already: sign in with a key of it, and connect the account then.",
    "unavailable": "The account provider can't be reached. Try again in a minute, or sign in with a key.",
}
"""Explanations of failed sign-ins with a provider, by their names in the address."""
FOUND: Final = {"exec_": "runs", "wf_": "workflows", "dlv_": "deliveries"}
"""Pages that show an object by its id, by the prefix of the id."""


async def show(request: GatewayRequest) -> ASGIApp:
    """Show the sign-in page; over plain HTTP from another machine, it explains that signing in is not possible there.

    A 404 error if the dashboard is off.
    """
    if request.gateway.settings.dashboard == "off":
        raise errors.not_found()
    cookie = session_cookies.cookie_of(request.scope, request.gateway.settings.public_url)
    frame = page.frame_of(request, build_page_request(request))
    html = page.render_plain(
        "sign_in.html",
        frame,
        title="Sign in",
        is_possible=cookie is not None,
        next_query=urlencode({"next": frame.query.get("next", "")}),
        problem=PROBLEMS.get(frame.query.get("problem", ""), ""),
    )
    return await page.answer_html(request, html)


async def show_invitation(request: GatewayRequest) -> ASGIApp:
    """Show the page behind the link of an invitation; the code in its fragment stays in the browser.

    A 404 error if the dashboard is off.
    """
    if request.gateway.settings.dashboard == "off":
        raise errors.not_found()
    cookie = session_cookies.cookie_of(request.scope, request.gateway.settings.public_url)
    frame = page.frame_of(request, build_page_request(request))
    html = page.render_plain("invitation.html", frame, title="Invitation", is_possible=cookie is not None)
    return await page.answer_html(request, html)


async def redirect(request: GatewayRequest) -> RedirectResponse:
    """Redirect to the dashboard; to the documentation if the dashboard is off.

    Relative addresses stay below the path of a proxy.
    """
    return RedirectResponse("docs/" if request.gateway.settings.dashboard == "off" else "dashboard")


async def show_start(request: GatewayRequest) -> RedirectResponse:
    """Redirect to the first page of the dashboard, the overview; a 404 error if it is off."""
    if request.gateway.settings.dashboard == "off":
        raise errors.not_found()
    return RedirectResponse("dashboard/overview")


async def search(request: GatewayRequest) -> RedirectResponse:
    """Redirect to the run, workflow or delivery whose id is in the query's `q`, otherwise to the list of workflows that
    match it.

    Without a text, to the runs. A 404 error if the dashboard is off.
    """
    if request.gateway.settings.dashboard == "off":
        raise errors.not_found()
    text = build_page_request(request).query.get("q", "").strip()
    page_of_kind = next((page for prefix, page in FOUND.items() if text.startswith(prefix)), None)
    if page_of_kind is not None and ids.is_id(text):
        return RedirectResponse(f"{page_of_kind}/{text}")
    return RedirectResponse(f"workflows?{urlencode({'search': text})}" if text else "runs")


async def show_missing(request: GatewayRequest) -> ASGIApp:
    """Answer 404 for an unknown path of the dashboard, as a page; as an API error if the dashboard is off."""
    error = errors.not_found("page")
    if request.gateway.settings.dashboard == "off":
        raise error
    return await page.show_refusal(request, error)
