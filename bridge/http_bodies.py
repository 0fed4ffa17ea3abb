"""Bounded bodies of HTTP responses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge.bridge_errors import BridgeRefused

if TYPE_CHECKING:
    import aiohttp


async def read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return the whole body of a response; raises `BridgeRefused` as soon as it has more than `max_bytes`."""
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > max_bytes:
            raise BridgeRefused(f"The answer has more than {max_bytes:,} bytes")
    return bytes(body)
