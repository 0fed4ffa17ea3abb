"""Pages: data from public routes, then HTML by a pure function, then an answer with a strict policy."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import quote, urlsplit

import msgspec
import structlog
from msgspec import Struct, field

from gateway.dashboard import assets
from gateway.dashboard.navigation import ENTRIES
from gateway.dashboard.page_request import PageRequest, build_page_request
from gateway.dashboard.templating import render_template
from gateway.http import errors, public_address
from gateway.http.cached_text import RedirectResponse
from gateway.http.errors import ApiError
from models.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from gateway.http.endpoint import Handler
    from gateway.http.request import GatewayRequest

log = structlog.get_logger()

WHOAMI: Final = "/api/v1/auth/whoami"
MIN_COMPRESSED: Final = 1_000
LARGE: Final = 200_000
"""Characters of HTML that are compressed in a thread, since it takes milliseconds."""
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " form-action 'self'; frame-ancestors 'none'; base-uri 'none'; require-trusted-types-for 'script';"
    " trusted-types pilotflame"
)
HEADERS: Final = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
    (b"vary", b"Cookie, Accept-Encoding"),
]

PageData: TypeAlias = Mapping[str, Any]
"""Answers of public routes, by names that the page chooses."""


class PageFrame(Struct, frozen=True):
    """Facts about the request and the visitor that every page may show."""

    root: str
    """Path of the public URL, below which all paths of the server lie; empty without one."""
    base_url: str
    now: datetime
    query: Mapping[str, str]
    parameters: Mapping[str, str]
    asked: Sequence[str] = ()
    """Paths of the public routes that the page has asked."""
    visitor: Mapping[str, Any] | None = None
    """Answer of `whoami`; None for pages without sign-in."""
    provider: str = ""
    """Name of the OpenID Connect provider; empty without one."""

    def may(self, scope: str) -> bool:
        """Return whether the visitor's key has a scope; False without a visitor, on pages for everyone."""
        return self.visitor is not None and scope in self.visitor["scopes"]


class Page(Struct, frozen=True):
    """Page of the dashboard.

    `load` asks public routes, and `view` turns their answers into values of the template without waiting for
    anything. The values must have `title`.
    """

    path: str
    template: str
    load: Callable[[PageRequest], Awaitable[PageData]]
    view: Callable[[PageData, PageFrame], Mapping[str, Any]]
    navigation: str = ""
    """Name of the entry of the main navigation that the page belongs to."""
    topics: Sequence[str] = field(default=())
    """Topics of hints after which the page loads itself again; `{id}` stands for the parameter."""


def render(page: Page, data: PageData, frame: PageFrame, *, tag: str = "") -> str:
    """Return the HTML of a page from the API answers in `data` and its frame; nothing else is read or changed.

    The HTML names its `tag`, with which the browser asks for the page again only if it has changed.
    """
    topics = [topic.format(**frame.parameters) for topic in page.topics]
    values = {"crumbs": (), "topics": topics, "current": page.navigation, **page.view(data, frame)}
    return render_template(page.template, {**_frame_values(frame), "page_tag": tag, **values})


def render_plain(template: str, frame: PageFrame, **values: object) -> str:
    """Return the HTML of a template with `values`, for a page such as an error or sign-in that shows no API
    answers.
    """
    defaults = {"crumbs": (), "topics": (), "current": "", "page_tag": ""}
    return render_template(template, {**_frame_values(frame), **defaults, **values})


def _frame_values(frame: PageFrame) -> dict[str, Any]:
    """Return the values that all templates get: frame, addresses, present time, and the navigation entries for the
    visitor's scopes.

    Without a visitor, on a page that can't be shown, these are all entries.
    """
    return {
        "frame": frame,
        "root": frame.root,
        "assets": f"{frame.root}{assets.PREFIX}{assets.version()}",
        "now": frame.now,
        "entries": [
            entry
            for entry in ENTRIES
            if frame.visitor is None or entry.scope is None or frame.may(entry.scope)
        ],
    }


def serve(name: str) -> Handler:
    """Return the handler of a dashboard page by the name of its module, which is loaded with the first
    request for it.

    The handler answers 404 if the dashboard is off, and shows API errors and an unavailable database as
    pages. Pages are rendered in a thread.
    """

    async def show(request: GatewayRequest) -> ASGIApp:
        if request.gateway.settings.dashboard == "off":
            raise errors.not_found()
        page = load_page(name)
        asking = build_page_request(request)
        try:
            visitor, data = await _load(page, asking)
        except ApiError as error:
            return await show_refusal(request, error)
        except DatabaseUnavailable as error:
            return await show_refusal(request, errors.not_ready(f"{error}: try again"))
        frame = frame_of(request, asking, visitor)
        # In a thread, so that large pages do not block other requests.
        known = request.headers.get("if-none-match", "")
        html, tag = await asyncio.to_thread(_render_unless_known, page, data, frame, known)
        validators = ((b"etag", tag.encode()),)
        if html is None:
            return HtmlAnswer(304, b"", validators)
        return await answer_html(request, html, validators)

    return show


def load_page(name: str) -> Page:
    """Return the page that a module of `gateway.dashboard.pages` defines as `PAGE`, by the module's name."""
    page: Page = import_module(f"gateway.dashboard.pages.{name}").PAGE
    return page


def _render_unless_known(page: Page, data: PageData, frame: PageFrame, known: str) -> tuple[str | None, str]:
    """Return a page's HTML, None if the browser has the one with the tag `known` already, and the tag of the page.

    The tag is a hash of all that the HTML depends on but the present time: "5 s ago" instead of "4 s ago" is no change.
    """
    answers = msgspec.json.encode([assets.version(), frame.visitor, frame.query, data])
    tag = f'W/"{sha256(answers).hexdigest()[:32]}"'
    return None if tag == known else render(page, data, frame, tag=tag), tag


async def _load(page: Page, asking: PageRequest) -> tuple[Mapping[str, Any], PageData]:
    """Return the answer of `whoami` about the visitor and the page's API answers, which are requested at the same time.

    If the visitor can't be determined, loading is canceled and that error is raised, such as 401.
    """
    loading = asyncio.ensure_future(page.load(asking))
    try:
        visitor = await asking.get(WHOAMI)
    except BaseException:
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        raise
    finally:
        asking.asked[:] = [path for path in asking.asked if path != WHOAMI]
    return visitor, await loading


def frame_of(
    request: GatewayRequest, asking: PageRequest, visitor: Mapping[str, Any] | None = None
) -> PageFrame:
    """Return the facts that every page shows: addresses, the present time, the query, and the visitor, None
    if nobody is signed in.
    """
    settings = request.gateway.settings
    return PageFrame(
        root=root_of(request),
        base_url=public_address.base_url(request),
        now=request.gateway.clock(),
        query=asking.query,
        parameters=asking.parameters,
        asked=tuple(asking.asked),
        visitor=visitor,
        provider=settings.openid_name if settings.openid_issuer else "",
    )


def root_of(request: GatewayRequest) -> str:
    """Return the path part of the public URL without a slash at its end; empty for most servers."""
    return urlsplit(request.gateway.settings.public_url).path.rstrip("/")


async def show_refusal(request: GatewayRequest, error: ApiError) -> ASGIApp:
    """Return an API error as a page with its status and the visitor's navigation; for the code `unauthorized`, a
    redirect to the sign-in that leads back.
    """
    if error.code == "unauthorized":
        query = request.scope["query_string"].decode("latin-1")
        wanted = quote(request.scope["path"] + (f"?{query}" if query else ""), safe="")
        return RedirectResponse(f"{root_of(request)}/sign-in?next={wanted}")
    frame = frame_of(request, build_page_request(request), await _find_visitor(request))
    html = render_plain(
        "error.html", frame, title=f"Error {error.status}", error=error, request_id=request.id
    )
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    return HtmlAnswer(error.status, html.encode(), headers)


async def _find_visitor(request: GatewayRequest) -> Mapping[str, Any] | None:
    """Return the visitor of a page that can't be shown; None if nobody is signed in, or the database is unavailable."""
    try:
        visitor: Mapping[str, Any] = await build_page_request(request).get(WHOAMI)
    except (ApiError, DatabaseUnavailable):
        return None
    return visitor


async def answer_html(
    request: GatewayRequest, html: str, headers: Sequence[tuple[bytes, bytes]] = ()
) -> ASGIApp:
    """Return an HTML answer with status 200 and these headers, compressed from 1,000 bytes on if the browser accepts
    gzip, in a thread from 200,000 bytes on.
    """
    body = html.encode()
    if len(body) < MIN_COMPRESSED or "gzip" not in request.headers.get("accept-encoding", ""):
        return HtmlAnswer(200, body, headers)
    if len(body) >= LARGE:
        body = await asyncio.to_thread(gzip.compress, body, 5, mtime=0)
    else:
        body = gzip.compress(body, 5, mtime=0)
    return HtmlAnswer(200, body, (*headers, (b"content-encoding", b"gzip")))


class HtmlAnswer(Struct, frozen=True):
    """Answer with HTML under the policy of the dashboard, as an ASGI response."""

    status: int
    body: bytes
    headers: Sequence[tuple[bytes, bytes]] = ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        headers = [*HEADERS, *self.headers, (b"content-length", b"%d" % len(self.body))]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})
