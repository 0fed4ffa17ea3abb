"""Layer around every request and every outcome: request id, common headers and metrics."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http import metrics
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
