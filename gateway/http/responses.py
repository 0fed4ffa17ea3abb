"""Answers as ASGI callables, optimized for small JSON bodies: headers are bytes from the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.settings import GatewaySettings

_encode = msgspec.json.Encoder().encode
_JSON = (b"content-type", b"application/json")


class JsonResponse:
    """Answer with a JSON body; `value` is anything that msgspec encodes, `msgspec.Raw` for encoded JSON."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        self.body = _encode(value)
        self.headers = [_JSON, (b"content-length", b"%d" % len(self.body)), *_encode_headers(headers)]

    def warn(self, warnings: Sequence[object]) -> None:
        """Add the field `warnings` to the JSON body, which must be an object with at least one field but not this one,
        and correct its length.
        """
        self.body = b'%b,"warnings":%b}' % (self.body[:-1], _encode(warnings))
        self.headers[1] = (b"content-length", b"%d" % len(self.body))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body})


class NotModified:
    """Answer 304 without a body, for a client that has the current state."""

    __slots__ = ("headers",)

    def __init__(self, headers: Mapping[str, str]) -> None:
        self.headers = _encode_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        await send({"type": "http.response.start", "status": 304, "headers": self.headers})
        await send({"type": "http.response.body", "body": b""})


class NoContent:
    """Answer 204 without a body."""

    __slots__ = ("headers",)

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        self.headers = _encode_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        await send({"type": "http.response.start", "status": 204, "headers": self.headers})
        await send({"type": "http.response.body", "body": b""})


def location(settings: GatewaySettings, execution_id: str) -> dict[str, str]:
    """Return the header `Location` with the URL of an execution: absolute if the public URL is set, else a path."""
    return {"Location": f"{settings.public_url.rstrip('/')}/api/v1/executions/{execution_id}"}


def _encode_headers(headers: Mapping[str, str] | None) -> list[tuple[bytes, bytes]]:
    if not headers:
        return []
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
