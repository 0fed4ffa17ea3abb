"""Endpoints of the OpenAPI 3.1 document and of the icon of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import msgspec

from gateway.http.cached_text import CachedText

if TYPE_CHECKING:
    from gateway.http.request import GatewayRequest
    from nodes.catalog import NodeCatalog

DocumentBuilder: TypeAlias = Callable[[str], dict[str, Any]]
"""Function that builds the document for the base URL of its paths; the application has it as `state.build_document`."""

_ICON_POLICY: Final = b"default-src 'none'; frame-ancestors 'none'"


async def openapi(request: GatewayRequest) -> CachedText:
    """Show the OpenAPI 3.1 document of this API as JSON."""
    # In a thread: the first request takes some tenths of a second, and the event loop serves others meanwhile.
    return await asyncio.to_thread(_build_openapi, _document_builder(request), _server_url(request))


async def icon(request: GatewayRequest) -> CachedText:  # noqa: ARG001 - a handler's signature
    """Show the icon that browsers request from every server."""
    return _read_icon()


async def organization_openapi(request: GatewayRequest) -> CachedText:
    """Show the OpenAPI document with the node types of the organization, custom ones included.

    Its components `node.*`, `config.*` and `output.*` describe each type of the catalog, for generators of clients.
    """
    catalog = await request.catalog()
    return await asyncio.to_thread(
        _build_for_catalog, _document_builder(request), catalog, _server_url(request)
    )


def _document_builder(request: GatewayRequest) -> DocumentBuilder:
    return cast("DocumentBuilder", request.app.state.build_document)


def _server_url(request: GatewayRequest) -> str:
    return request.gateway.settings.public_url.rstrip("/")


@cache
def _build_openapi(build_document: DocumentBuilder, server_url: str) -> CachedText:
    return _tag_json(build_document(server_url))


def _build_for_catalog(build_document: DocumentBuilder, catalog: NodeCatalog, server_url: str) -> CachedText:
    from gateway.openapi import node_type_schemas  # noqa: PLC0415 - few processes render the document

    document = build_document(server_url)
    components = document["components"]
    schemas = {**components["schemas"], **node_type_schemas.build_node_schemas(catalog)}
    return _tag_json({**document, "components": {**components, "schemas": schemas}})


def _tag_json(document: dict[str, Any]) -> CachedText:
    return _tag(msgspec.json.encode(document), ((b"content-type", b"application/json"),))


@cache
def _read_icon() -> CachedText:
    icon_file = resources.files(__package__).joinpath("favicon.svg").read_bytes()
    headers = ((b"content-type", b"image/svg+xml"), (b"content-security-policy", _ICON_POLICY))
    return _tag(icon_file, headers)


def _tag(body: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> CachedText:
    return CachedText(body, b'"%s"' % sha256(body).hexdigest()[:32].encode(), headers)
