"""External receiver of webhooks: an HTTP server, and an independent implementation of the signature check."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ReceivedRequest:
    """Received HTTP request."""

    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def message(self) -> dict[str, Any]:
        decoded: dict[str, Any] = json.loads(self.body)
        return decoded

    def is_signed_by(self, *secrets: str) -> bool:
        """Return whether the request has exactly the signatures that Standard
        Webhooks 1.0.0 requires of these secrets.
        """
        head = f"{self.headers['webhook-id']}.{self.headers['webhook-timestamp']}.".encode()
        expected = set()
        for secret in secrets:
            assert secret.startswith("whsec_")
            key = base64.b64decode(secret[len("whsec_") :], validate=True)
            assert 24 <= len(key) <= 64
            digest = hmac.new(key, head + self.body, hashlib.sha256).digest()
            expected.add("v1," + base64.b64encode(digest).decode())
        return set(self.headers["webhook-signature"].split(" ")) == expected


@dataclass
class HttpReceiver:
    """HTTP server that records requests and answers them as configured."""

    port: int = 0
    received: list[ReceivedRequest] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    """Response heads for the next requests in order; 204 after the last."""
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    echoes: bool = False
    """Whether answers repeat path and body of their requests."""

    def url(self, path: str = "/hook") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Record the requests of a connection and answer each once `may_answer` is set, until the client closes it."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.strip().split("\r\n")
                headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                self.received.append(ReceivedRequest(first.split(" ")[1], headers, body))
                await self.may_answer.wait()
                if self.echoes:
                    text = f"{first.split(' ')[1]} ".encode() + body
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
                    continue
                answer = self.answers.pop(0) if self.answers else "204 No Content"
                writer.write(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n".encode())
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has closed it
        finally:
            writer.close()


@asynccontextmanager
async def run_receiver() -> AsyncIterator[HttpReceiver]:
    """Serve a receiver on a free port during the block; it answers at once unless `may_answer` is cleared."""
    receiver = HttpReceiver()
    receiver.may_answer.set()
    tasks: set[asyncio.Task[None]] = set()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(receiver._serve(reader, writer))  # noqa: SLF001 - its own server
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
