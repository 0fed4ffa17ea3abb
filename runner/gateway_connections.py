"""Kept connections of a pod to its gateway, for calls whose answers fit into memory."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from nodes.outbound_connection import (
    ConnectionBroken,
    OutboundConnection,
    ResponseInvalid,
    ResponseLimits,
    ResponseTooLarge,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nodes.outbound_connection import RawResponse

CONNECT_SECONDS: Final = 5.0
KEEP_ALIVE_SECONDS: Final = 15.0
"""The gateway keeps idle connections five times as long."""
LIMITS: Final = ResponseLimits(header_bytes=65_536, body_bytes=1 << 30, pieces=1 << 30)
"""The gateway is trusted; these limits only end a response that never ends."""


class GatewayConnections:
    """Connections of one event loop, as many as there are calls at once."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        """Prepare calls below the URL of the gateway, without a connection yet; `headers` are sent with each call."""
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._is_secure = parts.scheme == "https"
        self._port = parts.port or (443 if self._is_secure else 80)
        self._path = parts.path
        given = {"Host": parts.netloc, "User-Agent": "Pilotflame", "Accept": "*/*", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        self._tls = ssl.create_default_context() if self._is_secure else None
        self._idle: list[tuple[OutboundConnection, float]] = []
        self._open: set[OutboundConnection] = set()

    async def post(self, path: str, body: bytes) -> RawResponse:
        """Post JSON and return the whole response, of any status; an idle connection is reused.

        Raises `OSError`, such as `ConnectionError` for a broken, invalid or too large response. There is no time limit
        and no retry, even if the gateway has closed an idle connection.
        """
        connection = self._take_idle() or await self._connect()
        lines = f"POST {self._path}{path} HTTP/1.1\r\n{self._head}Content-Type: application/json\r\n"
        try:
            return await connection.exchange(
                f"{lines}Content-Length: {len(body)}\r\n\r\n".encode(), body, is_head=False
            )
        except ConnectionBroken as error:
            raise ConnectionResetError("the connection was lost") from error
        except (ResponseInvalid, ResponseTooLarge) as error:
            raise ConnectionError(f"it {error}") from error
        finally:
            if connection.is_reusable:
                self._idle.append((connection, asyncio.get_running_loop().time()))
            else:
                self._open.discard(connection)

    def close(self) -> None:
        for connection in self._open:
            connection.abort()
        self._open.clear()
        self._idle.clear()

    def _take_idle(self) -> OutboundConnection | None:
        oldest = asyncio.get_running_loop().time() - KEEP_ALIVE_SECONDS
        while self._idle:
            connection, since = self._idle.pop()
            if connection.is_open and since > oldest:
                return connection
            connection.abort()
            self._open.discard(connection)
        return None

    async def _connect(self) -> OutboundConnection:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: OutboundConnection(LIMITS),
                self._host,
                self._port,
                ssl=self._tls,
                server_hostname=self._host if self._is_secure else None,
            )
        self._open.add(connection)
        return connection
