"""Endpoints of the OpenAPI 3.1 document and of the icon of the server."""

from __future__ import annotations

import asyncio
from functools import cache
from hashlib import sha256
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import msgspec

from gateway.http.cached_text import CachedText

if TYPE_CHECKING:
    from gateway.http.request import GatewayRequest
    from nodes.catalog import NodeCatalog

_ICON_POLICY: Final = b"default-src 'none'; frame-ancestors 'none'"


async def openapi(request: GatewayRequest) -> CachedText:
    """Show the OpenAPI 3.1 document of this API as JSON."""
    # In a thread: the first request takes some tenths of a second, and the event loop serves others meanwhile.
    return await asyncio.to_thread(_build_openapi, _server_url(request))


async def icon(request: GatewayRequest) -> CachedText:  # noqa: ARG001 - a handler's signature
    """Show the icon that browsers request from every server."""
    return _read_icon()


async def organization_openapi(request: GatewayRequest) -> CachedText:
    """Show the OpenAPI document with the node types of the organization, custom ones included.

    Its components `node.*`, `config.*` and `output.*` describe each type of the catalog, for generators of clients.
    """
    catalog = await request.catalog()
    return await asyncio.to_thread(_build_for_catalog, catalog, _server_url(request))


def _server_url(request: GatewayRequest) -> str:
    return request.gateway.settings.public_url.rstrip("/")


@cache
def _build_openapi(public_url: str) -> CachedText:
    return _tag_json(_build_document(public_url))


def _build_for_catalog(catalog: NodeCatalog, public_url: str) -> CachedText:
    from gateway.openapi import node_type_schemas  # noqa: PLC0415 - as below

    document = _build_document(public_url)
    components = document["components"]
    schemas = {**components["schemas"], **node_type_schemas.build_node_schemas(catalog)}
    return _tag_json({**document, "components": {**components, "schemas": schemas}})


@cache
def _build_document(public_url: str) -> dict[str, Any]:
    # Imported on first use: most processes never render the document, and the route table imports these handlers.
    from gateway.openapi import openapi_document  # noqa: PLC0415 - see above
    from gateway.routes import TABLE  # noqa: PLC0415 - see above

    return openapi_document.build_document(TABLE, server=public_url or openapi_document.ANY_SERVER)


def _tag_json(document: dict[str, Any]) -> CachedText:
    return _tag(msgspec.json.encode(document), ((b"content-type", b"application/json"),))


@cache
def _read_icon() -> CachedText:
    icon_file = resources.files(__package__).joinpath("favicon.svg").read_bytes()
    headers = ((b"content-type", b"image/svg+xml"), (b"content-security-policy", _ICON_POLICY))
    return _tag(icon_file, headers)


def _tag(body: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> CachedText:
    return CachedText(body, b'"%s"' % sha256(body).hexdigest()[:32].encode(), headers)
