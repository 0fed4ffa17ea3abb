"""Responses of the documentation: constant texts with an ETag, and redirects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


class CachedText(Struct, frozen=True):
    """Response text that is constant while this process lives; clients that have it get 304."""

    body: bytes
    entity_tag: bytes
    headers: tuple[tuple[bytes, bytes], ...]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        validators = [(b"etag", self.entity_tag), (b"cache-control", b"no-cache")]
        has_it = any(
            name == b"if-none-match" and self.entity_tag in value for name, value in scope["headers"]
        )
        body = b"" if has_it else self.body
        headers = (
            validators if has_it else [*validators, *self.headers, (b"content-length", b"%d" % len(body))]
        )
        await send({"type": "http.response.start", "status": 304 if has_it else 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class RedirectResponse(Struct, frozen=True):
    """Redirect to another address. A relative address stays below the path of a proxy."""

    location: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        headers = [(b"location", self.location.encode()), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 302, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
