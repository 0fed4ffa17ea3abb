"""Cross-origin requests (CORS, https://fetch.spec.whatwg.org/#http-cors-protocol) of pages in browsers.

The API needs no cookies, so answers never allow credentials: a page sends a key of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final, TypeAlias

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http.protocol import INTERNAL

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
                message["headers"] = [*message["headers"], *_added(scope, origins, message["headers"])]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _added(scope: Scope, origins: Collection[str], answered: Iterable[tuple[bytes, bytes]]) -> Headers:
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
