"""The outermost layer, for every request whatever becomes of it: its id, its headers, its place in the metrics."""

from __future__ import annotations

import re
from itertools import count
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import metrics
from models import ids

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}\Z")
_PROCESS = ids.new("req")[:-8]
"""Request ids of this process begin with it, and count on: they need to be unique, not secret."""
_numbers = count(1)
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class Edge:
    """Pure ASGI, since this is on the path of every run."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = perf_counter()
        status = 500
        request_id = _request_id(scope)
        scope["request_id"] = request_id
        headers = [(b"x-request-id", request_id.encode()), *_HEADERS]

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            route = scope.get("route")
            path = route.path if route is not None else "none"
            metrics.answered(scope["method"], path, status, perf_counter() - started)


def _request_id(scope: Scope) -> str:
    """Return the id that the client gave, where that is one, or a fresh one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.match(value):
            given: bytes = value
            return given.decode()
    return f"{_PROCESS}{next(_numbers):08x}"
