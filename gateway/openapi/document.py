"""Endpoints of the API documentation: OpenAPI 3.1 for programs, and an HTML page for people."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from gateway.http.request import GatewayRequest


@dataclass(frozen=True, slots=True)
class CachedText:
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


@dataclass(frozen=True, slots=True)
class RedirectResponse:
    """Redirect to another address. A relative address stays below the path of a proxy."""

    location: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        headers = [(b"location", self.location.encode()), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 302, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


@dataclass(frozen=True, slots=True)
class ApiDocuments:
    """OpenAPI document as JSON and as HTML."""

    openapi: CachedText
    page: CachedText


async def openapi(request: GatewayRequest) -> CachedText:
    """Show the OpenAPI 3.1 document of this API as JSON."""
    return (await _documents(request)).openapi


async def page(request: GatewayRequest) -> CachedText:
    """Show the documentation of this API as an HTML page."""
    return (await _documents(request)).page


async def home(request: GatewayRequest) -> RedirectResponse:  # noqa: ARG001 - a handler's signature
    """Redirect from the root of the server to its documentation."""
    return RedirectResponse("docs")


async def icon(request: GatewayRequest) -> CachedText:  # noqa: ARG001 - a handler's signature
    """Show the icon that browsers request from every server."""
    return _icon()


async def _documents(request: GatewayRequest) -> ApiDocuments:
    # In a thread: the first request takes some tenths of a second, and the event loop serves others
    # meanwhile.
    return await asyncio.to_thread(_render_documents, request.gateway.settings.public_url.rstrip("/"))


@cache
def _render_documents(public_url: str) -> ApiDocuments:
    # Imported on first use: most processes never render the document, and the route table imports these
    # handlers.
    from gateway.openapi import openapi_document, page  # noqa: PLC0415 - see above
    from gateway.routes import TABLE  # noqa: PLC0415 - see above

    document = openapi_document.build_document(TABLE, server=public_url or openapi_document.ANY_SERVER)
    return ApiDocuments(
        openapi=_cached_text(msgspec.json.encode(document), ((b"content-type", b"application/json"),)),
        page=_cached_text(
            page.render_page(document).encode(),
            (
                (b"content-type", b"text/html; charset=utf-8"),
                (b"content-security-policy", page.POLICY.encode()),
                (b"referrer-policy", b"no-referrer"),
            ),
        ),
    )


@cache
def _icon() -> CachedText:
    from gateway.openapi import page  # noqa: PLC0415 - see above

    headers = ((b"content-type", b"image/svg+xml"), (b"content-security-policy", page.POLICY.encode()))
    return _cached_text(page.ICON, headers)


def _cached_text(body: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> CachedText:
    return CachedText(body, b'"%s"' % sha256(body).hexdigest()[:32].encode(), headers)
