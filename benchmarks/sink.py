"""External system that write nodes call: it answers a number with the next one, and counts its requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import msgspec

from benchmarks import http1


class NumberMessage(msgspec.Struct):
    """Body of both the request and the response."""

    number: int


class HttpSink:
    """Address and call counter of the sink."""

    def __init__(self) -> None:
        self.calls = 0
        self.url = ""


_decode = msgspec.json.Decoder(NumberMessage).decode
_encode = msgspec.json.Encoder().encode


@asynccontextmanager
async def run_sink() -> AsyncIterator[HttpSink]:
    """Serve the sink on a free port of this machine during the block."""
    sink = HttpSink()
    server = await asyncio.get_running_loop().create_server(lambda: _SinkProtocol(sink), "127.0.0.1", 0)
    sink.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    try:
        yield sink
    finally:
        server.close()


class _SinkProtocol(asyncio.Protocol):
    def __init__(self, sink: HttpSink) -> None:
        self._sink = sink
        self._transport: asyncio.Transport | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (found := http1.split_message(self._received)) is not None:
            message, self._received = found
            self._sink.calls += 1
            body = _encode(NumberMessage(_decode(message.body).number + 1))
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            if self._transport is not None:
                self._transport.write(head.encode() + body)
