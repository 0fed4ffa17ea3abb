"""Layers around every request and every outcome: request id, common headers, metrics and cross-origin answers.

Cross-origin requests (CORS, https://fetch.spec.whatwg.org/#http-cors-protocol) come from pages in browsers. The API
needs no cookies, so answers never allow credentials: a page sends a key of its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Final, TypeAlias

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http import metrics
from gateway.http.protocol import INTERNAL
from models import ids

if TYPE_CHECKING:
    from gateway.http.protocol import RequestHolding

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}\Z")
_PROCESS = ids.new_id("req")[:-8]
"""Common prefix of this process's request ids; a counter follows, since ids must be unique, not secret."""
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
    "WebHook-Allowed-Origin",
    "WebHook-Allowed-Rate",
    "WWW-Authenticate",
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


class EdgeLayer:
    """Pure ASGI, since every run passes here; requests other than HTTP go to `others`."""

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

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = message["headers"]
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
            metrics.count_answer(scope["method"], path, status, perf_counter() - started)


def _has_cache_control(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name == b"cache-control" for name, _ in headers)


def _request_id(scope: Scope) -> str:
    """Return the client's request id if it is valid, otherwise a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.match(value):
            given: bytes = value
            return given.decode()
    return f"{_PROCESS}{next(_numbers):08x}"


class CrossOriginLayer:
    """Outermost layer, so that allowed pages can read every answer, refusals included."""

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
    """Return the additional headers of an answer."""
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
