"""Endpoints of the OpenAPI 3.1 document and of the icon of the server."""

from __future__ import annotations

import asyncio
from functools import cache
from hashlib import sha256
from importlib import resources
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.http.cached_text import CachedText

if TYPE_CHECKING:
    from gateway.http.request import GatewayRequest

_ICON_POLICY: Final = b"default-src 'none'; frame-ancestors 'none'"


async def openapi(request: GatewayRequest) -> CachedText:
    """Show the OpenAPI 3.1 document of this API as JSON."""
    # In a thread: the first request takes some tenths of a second, and the event loop serves others meanwhile.
    return await asyncio.to_thread(_build_openapi, request.gateway.settings.public_url.rstrip("/"))


async def icon(request: GatewayRequest) -> CachedText:  # noqa: ARG001 - a handler's signature
    """Show the icon that browsers request from every server."""
    return _read_icon()


@cache
def _build_openapi(public_url: str) -> CachedText:
    # Imported on first use: most processes never render the document, and the route table imports these handlers.
    from gateway.openapi import openapi_document  # noqa: PLC0415 - see above
    from gateway.routes import TABLE  # noqa: PLC0415 - see above

    document = openapi_document.build_document(TABLE, server=public_url or openapi_document.ANY_SERVER)
    return _tag(msgspec.json.encode(document), ((b"content-type", b"application/json"),))


@cache
def _read_icon() -> CachedText:
    icon_file = resources.files(__package__).joinpath("favicon.svg").read_bytes()
    headers = ((b"content-type", b"image/svg+xml"), (b"content-security-policy", _ICON_POLICY))
    return _tag(icon_file, headers)


def _tag(body: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> CachedText:
    return CachedText(body, b'"%s"' % sha256(body).hexdigest()[:32].encode(), headers)
