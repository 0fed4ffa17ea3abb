"""Minimal HTTP/1.1 client for a load generator: persistent connections, one request at a time, bodies with a
length or in chunks.

It costs about 25 µs a request. The generator shares the servers' cores, so its time is lost to them.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import NamedTuple, cast

END_OF_HEAD = b"\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
LAST_CHUNK = b"\r\n0\r\n\r\n"
STATUS = slice(9, 12)


class ConnectionLost(Exception):
    """The server hung up before it had answered."""


class HttpMessage(NamedTuple):
    """A request or an answer."""

    head: bytes
    body: bytes


class HttpAnswer(NamedTuple):
    """Response of a server."""

    status: int
    body: bytes
    head: bytes
    """Status line and headers."""


def split_message(received: bytes) -> tuple[HttpMessage, bytes] | None:
    """Return the first complete message and the bytes after it; None if the message is incomplete."""
    end = received.find(END_OF_HEAD)
    if end < 0:
        return None
    length = LENGTH.search(received, 0, end)
    start = end + len(END_OF_HEAD)
    if length is None and CHUNKED.search(received, 0, end):
        if not received.endswith(LAST_CHUNK):
            return None
        return HttpMessage(received[:end], _join_chunks(received[start:])), b""
    stop = start + (int(length[1]) if length else 0)
    if len(received) < stop:
        return None
    return HttpMessage(received[:end], received[start:stop]), received[stop:]


def _join_chunks(body: bytes) -> bytes:
    """Return the bytes of a complete body in chunks."""
    joined = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            return joined
        joined += body[:length]
        body = body[length + 2 :]


@dataclass(frozen=True, slots=True)
class BenchmarkApi:
    """Address and API key of a server on this machine; builds requests as bytes."""

    port: int
    key: str

    def get(self, path: str) -> bytes:
        return self.request("GET", path)

    def post(self, path: str, body: bytes, headers: str = "") -> bytes:
        return self.request("POST", path, body, headers)

    def request(self, method: str, path: str, body: bytes | None = None, headers: str = "") -> bytes:
        """Return a request with a body of JSON, or without any; each line of `headers` ends with CR LF."""
        head = f"{method} {path} HTTP/1.1\r\n{self._headers}{headers}"
        if body is None:
            return f"{head}\r\n".encode()
        kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return f"{head}{kind}".encode() + body

    @property
    def _headers(self) -> str:
        return f"Host: 127.0.0.1:{self.port}\r\nX-API-Key: {self.key}\r\n"


class KeptConnection(asyncio.Protocol):
    """Persistent connection to a server on this machine, for one request at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._answer: asyncio.Future[HttpAnswer] | None = None

    @classmethod
    async def open(cls, port: int) -> KeptConnection:
        """Connect to a port of this machine. Raises OSError while no server listens."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return connection

    @property
    def is_open(self) -> bool:
        """Whether the connection is open; a server closes one that is idle for long."""
        return self._transport is not None and not self._transport.is_closing()

    async def send(self, request: bytes) -> HttpAnswer:
        """Send a request and wait for its answer of any status; raises `ConnectionLost`
        if the connection ends first.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionLost("The connection was closed")
        self._answer = self._loop.create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        found = split_message(self._received)
        if found is None or self._answer is None:
            return
        message, self._received = found
        if not self._answer.done():
            self._answer.set_result(HttpAnswer(int(message.head[STATUS]), message.body, message.head))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionLost(f"The server hung up: {exc}"))
