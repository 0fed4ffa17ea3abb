"""Gateway with its real server in this process, for tests of connections and bytes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from starlette.types import ASGIApp

from gateway import main, state
from gateway.settings import GatewaySettings
from tests import databases
from tests.integration.gateway_harness import SECRET

KEY = "a-first-key-of-the-operator"

Address = tuple[str, int]


@asynccontextmanager
async def serve_gateway(folder: Path, **settings: Any) -> AsyncIterator[Address]:  # noqa: ANN401 - values of settings
    """Run a gateway on a new SQLite database behind its real server, and yield the address that it listens on."""
    read = GatewaySettings(
        data_dir=folder, secret_key=SecretStr(SECRET), bootstrap_api_key=SecretStr(KEY), **settings
    )
    await databases.create_sqlite_database(folder / "pilotflame.db")
    async with listen(main.create_app(lambda: state.open_state(read)), read) as address:
        yield address


@asynccontextmanager
async def listen(app: ASGIApp, settings: GatewaySettings) -> AsyncIterator[Address]:
    """Serve an application by the gateway's server on a free port, and yield the address."""
    server = main.build_server(app, settings)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.01)
        yield listener.getsockname()
        server.should_exit = True
        await serving


class RawConnection:
    """Connection from an address of this machine, for raw bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, address: Address, source: str = "127.0.0.1") -> RawConnection:
        return cls(*await asyncio.open_connection(*address, local_addr=(source, 0)))

    async def send(self, head: str, body: bytes = b"") -> None:
        """Send a request's head, given without its last empty line, and a part of its body."""
        self.writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str]]:
        """Return the status and the headers of the next answer; its body stays unread."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 60)
        first, *lines = head.decode().split("\r\n")
        headers = [line.partition(": ")[::2] for line in lines if line]
        return int(first.split()[1]), dict(headers)

    async def ask(self, path: str) -> int:
        """Send a GET request with the first key, read the whole answer, and return its status."""
        await self.send(f"GET {path} HTTP/1.1\nHost: x\nX-API-Key: {KEY}")
        status, headers = await self.answer()
        await self.reader.readexactly(int(headers["content-length"]))
        return status

    async def until_closed(self) -> None:
        """Read until the server has closed the connection; raises TimeoutError after a minute without a byte."""
        try:
            while await asyncio.wait_for(self.reader.read(65_536), 60):
                pass
        except ConnectionError:
            pass

    def close(self) -> None:
        self.writer.transport.abort()
