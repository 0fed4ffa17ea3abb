"""Way of every request to its endpoint: the layers around all requests, and the routers by path and host.

The layers add a request id and common headers, count the outcome, and allow pages in browsers to read answers (CORS,
https://fetch.spec.whatwg.org/#http-cors-protocol). The API needs no cookies across origins, so answers never allow
credentials: a page sends a key of its own.

Routing costs the same for any number of routes. Applications in a cluster call a workflow by its host name and trigger
it with a key. Each workflow has a Service without pods, which leads to the gateway, so the host name alone identifies
the workflow. It reveals no more than an id in a path does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from msgspec import Struct, field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http.protocol import INTERNAL
from models import ids, pod_identity
from telemetry import instruments, log_context, tracing

if TYPE_CHECKING:
    from gateway.http.protocol import RequestHolding

_HUNDRED = 100
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}\Z")
_numbers = count(1)
_HEADERS = [(b"x-content-type-options", b"nosniff")]
_NO_STORE = (b"cache-control", b"no-store")
"""Added to every answer without a `Cache-Control` of its own."""

Headers: TypeAlias = list[tuple[bytes, bytes]]

EVERY_ORIGIN: Final = "*"
MAX_AGE_SECONDS: Final = 600
EXPOSED: Final = (
    "Allow",
    "Content-Disposition",
    "ETag",
    "Idempotent-Replayed",
    "Location",
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "Server-Timing",
    "Traceparent",
    "WebHook-Allowed-Origin",
    "WebHook-Allowed-Rate",
    "WWW-Authenticate",
    "Preference-Applied",
    "X-Cold-Start",
    "X-Request-Id",
)
"""Headers that scripts may read in addition to those that browsers always expose: all documented ones."""
_EXPOSED: Final = (b"access-control-expose-headers", ", ".join(EXPOSED).encode())
_PREFLIGHT: Final = [
    # The wildcard allows every header that a page sets, except `Authorization`.
    (b"access-control-allow-headers", b"*, Authorization"),
    (b"access-control-max-age", b"%d" % MAX_AGE_SECONDS),
]
_VARY: Final = (b"vary", b"Origin")

TRIGGER_PATH: Final = "/trigger"
_HOST_PREFIX: Final = pod_identity.PREFIX.encode()


class EdgeLayer:
    """Layer around all HTTP requests: request id, common headers, metrics and traces; other traffic goes to `others`.

    Pure ASGI, since every run passes here.
    """

    def __init__(self, app: ASGIApp, *, others: ASGIApp) -> None:
        self.app = app
        self.others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.others(scope, receive, send)
            return
        started = perf_counter()
        status = 500
        request_id = _request_id(scope)
        scope["request_id"] = request_id
        headers = [(b"x-request-id", request_id.encode()), *_HEADERS]
        scope["sent_with_answer"] = headers
        trace = None
        if tracing.tracer is not None and not scope["path"].startswith(INTERNAL):
            trace = scope["trace"] = tracing.tracer.begin_request(scope["headers"])
            log_context.fields.set({"request_id": request_id, "trace_id": trace.trace_id})
        else:
            log_context.fields.set({"request_id": request_id})

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = message["headers"]
                if trace is not None:
                    headers.append((b"traceparent", str(trace.context).encode()))
                message["headers"] = (
                    [*own, *headers] if _has_cache_control(own) else [*own, *headers, _NO_STORE]
                )
            await send(message)

        holding: RequestHolding | None = scope.get("holding")
        try:
            if holding is not None and holding.refusal is not None:
                await holding.refusal.response(request_id)(scope, receive, send_with_headers)
            else:
                await self.app(scope, receive, send_with_headers)
        finally:
            if holding is not None:
                holding.release()
            route = scope.get("route")
            path = route.path if route is not None else "none"
            seconds = perf_counter() - started
            if instruments.is_exposed:
                _count_answer(scope["method"], path, status, seconds)
            if trace is not None:
                now = scope["app"].state.gateway.clock()
                trace.end(now, seconds, scope["method"], path, status, request_id)


def _count_answer(method: str, route: str, status: int, seconds: float) -> None:
    """Record the method, status class and duration in seconds of an answered request.

    `route` is the template of its path.
    """
    instruments.histogram(
        "http_server_request_duration_seconds",
        route,
        method if method in _METHODS else "other",
        f"{status // _HUNDRED}xx",
    ).observe(seconds)


def _has_cache_control(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name == b"cache-control" for name, _ in headers)


def _request_id(scope: Scope) -> str:
    """Return the request id that the client sends, if it has 1 to 64 letters, digits, `_` and `-`, else a new id."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.match(value):
            given: bytes = value
            return given.decode()
    return f"{_choose_prefix()}{next(_numbers):08x}"


@cache
def _choose_prefix() -> str:
    """Return the common prefix of this process's request ids; a counter follows, since ids must be unique, not secret.

    It is chosen at the first request: processes that are forked from one with this module would share it.
    """
    return ids.new_id("req")[:-8]


class CrossOriginLayer:
    """Outermost layer, which adds CORS headers, so that pages of allowed origins can read every answer, refusals
    included.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origins = scope["app"].state.gateway.settings.cors_origins if scope["type"] == "http" else ()
        if not origins or scope["path"].startswith(INTERNAL):
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *_cross_origin_headers(scope, origins, message["headers"]),
                ]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _cross_origin_headers(
    scope: Scope, origins: Collection[str], answered: Iterable[tuple[bytes, bytes]]
) -> Headers:
    """Return the CORS headers to add to an answer, by the origin of the request and the allowed origins.

    `*` allows every origin; a preflight gets the methods of `answered`, the answer's headers. Without a
    permitted origin it is at most `Vary`.
    """
    sent: dict[bytes, bytes] = dict(scope["headers"])
    origin = sent.get(b"origin", b"")
    is_for_all = EVERY_ORIGIN in origins
    # Caches must not send an answer that names one origin to another.
    varies = [] if is_for_all else [_VARY]
    if not origin or not (is_for_all or origin.decode("latin-1") in origins):
        return varies
    allowed = (b"access-control-allow-origin", b"*" if is_for_all else origin)
    if scope["method"] != "OPTIONS" or b"access-control-request-method" not in sent:
        return [*varies, allowed, _EXPOSED]
    methods = [(b"access-control-allow-methods", value) for name, value in answered if name == b"allow"]
    return [*varies, allowed, *methods, *_PREFLIGHT]


class PathRoute(Struct, frozen=True):
    """Endpoint of a path, in which `{names}` stand for segments of the URL.

    `/docs/*` serves every path that begins with `/docs/`, unless another path matches it.
    """

    path: str
    endpoint: ASGIApp


class RouteMatch(NamedTuple):
    """Route of a path, with the values of its named segments."""

    route: PathRoute
    path_params: dict[str, str]


class _PathBranch(Struct):
    """Node of the tree of segments: a literal segment takes precedence over a named one."""

    words: dict[str, _PathBranch] = field(default_factory=dict)
    name: str = ""
    anything: _PathBranch | None = None
    route: PathRoute | None = None
    rest: PathRoute | None = None


class PathRouter:
    """ASGI application that dispatches each request to the endpoint of its path."""

    def __init__(self, endpoints: Mapping[str, ASGIApp], *, default: ASGIApp) -> None:
        """Build the tree of routes by their paths; `default` answers all other paths.

        A literal segment takes precedence: below `/workflows/stats`, no route of `/workflows/{id}` matches.
        Raises ValueError when two paths name the same segment differently.
        """
        self._default = default
        self._root = _PathBranch()
        for path, endpoint in endpoints.items():
            self._add(PathRoute(path, endpoint))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match = self.match(scope["path"])
        if match is None:
            await self._default(scope, receive, send)
            return
        scope["route"], scope["path_params"] = match
        await match.route.endpoint(scope, receive, send)

    def match(self, path: str) -> RouteMatch | None:
        """Return the route of a path with the values of its named segments; None if no route matches.

        Literal segments take precedence; an empty segment matches no name. A route that ends with `/*` has no values.
        """
        branch = self._root
        path_params: dict[str, str] = {}
        for segment in path.split("/"):
            following = branch.words.get(segment)
            if following is None:
                following = branch.anything
                if branch.rest is not None:
                    return RouteMatch(branch.rest, {})
                if following is None or not segment:
                    return None
                path_params[branch.name] = segment
            branch = following
        return None if branch.route is None else RouteMatch(branch.route, path_params)

    def _add(self, route: PathRoute) -> None:
        """Add a route to the tree; raises ValueError if another path has another name for one of its segments."""
        branch = self._root
        for segment in route.path.split("/"):
            if segment == "*":
                branch.rest = route
                return
            if not segment.startswith("{"):
                branch = branch.words.setdefault(segment, _PathBranch())
                continue
            name = segment.strip("{}")
            if branch.anything is None:
                branch.name, branch.anything = name, _PathBranch()
            if branch.name != name:
                raise ValueError(f"{route.path}: another path calls {{{name}}} {{{branch.name}}}")
            branch = branch.anything
        branch.route = route


class WorkflowHostRouter:
    """Router of requests to the host of a workflow; all others go to `app`."""

    def __init__(self, app: ASGIApp, *, trigger: PathRoute, default: ASGIApp) -> None:
        """Set the routes of hosts that name a workflow: `trigger` for its trigger path, `default` for all others.

        Requests for other hosts go to `app`.
        """
        self._app = app
        self._trigger = trigger
        self._default = default

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        workflow_id = _workflow_of(scope)
        if workflow_id is None:
            await self._app(scope, receive, send)
        elif scope["path"] != TRIGGER_PATH:
            await self._default(scope, receive, send)
        else:
            scope["route"], scope["path_params"] = self._trigger, {"id": workflow_id}
            await self._trigger.endpoint(scope, receive, send)


def _workflow_of(scope: Scope) -> str | None:
    """Return the id of the workflow that the first label of the host name encodes, in any domain; None for
    other hosts.
    """
    for name, value in scope["headers"]:
        if name == b"host":
            host: bytes = value.lower()
            if not host.startswith(_HOST_PREFIX):
                return None
            first = host.partition(b":")[0].partition(b".")[0]
            return pod_identity.parse_workflow_id(first.decode("latin-1"))
    return None
