"""Faults between a process and a server: lost answers, and requests that arrive far too late."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from urllib.parse import urlsplit

from tests.system.wait_conditions import stop_accepting

PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.05
CHUNK_BYTES = 65_536

# Messages of PostgreSQL's protocol: the reply to a TLS request, and the error during a start.
TLS_REQUEST = struct.pack("!ii", 8, 80_877_103)
NO_TLS = b"N"
STARTING_UP = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0"


class FaultyProxy:
    """Proxy in front of a server that passes on everything except held-back traffic."""

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self._writers: set[asyncio.StreamWriter] = set()
        self._answers_marker: bytes | None = None
        self._requests_marker: bytes | None = None
        self._answers_pass = asyncio.Event()
        self._answers_pass.set()
        self._requests_pass = asyncio.Event()
        self._requests_pass.set()
        self._has_kept_one = asyncio.Event()
        self._is_starting_up = False
        self._is_cut_off = False
        self.delay_seconds = 0.0
        """Delay of each piece of traffic in each direction."""
        self.port = 0

    def keep_answers(self, marker: bytes) -> None:
        """Hold back all answers, from the next request that contains `marker` on, until `let_go`."""
        self._answers_marker = marker
        self._has_kept_one.clear()

    def keep_requests(self, marker: bytes) -> None:
        """Hold back all requests, from the next one that contains `marker` on, until `let_go`."""
        self._requests_marker = marker
        self._has_kept_one.clear()

    async def kept_one(self) -> None:
        """Wait up to a minute until traffic is held back."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self._has_kept_one.wait()

    def let_go(self) -> None:
        """Pass on held-back traffic, and all later traffic."""
        self._answers_marker = self._requests_marker = None
        self._answers_pass.set()
        self._requests_pass.set()

    def cut(self) -> None:
        """Break every connection and discard held-back traffic; later connections work again."""
        for writer in self._writers:
            writer.transport.abort()
        self.let_go()

    def cut_off(self) -> None:
        """Break every connection, and refuse new ones until `reconnect`."""
        self._is_cut_off = True
        self.cut()

    def reconnect(self) -> None:
        """Accept connections again."""
        self._is_cut_off = False

    @contextmanager
    def starting_up(self) -> Iterator[None]:
        """Break all connections, and answer new ones during the block like a PostgreSQL that recovers from a crash."""
        self._is_starting_up = True
        self.cut()
        try:
            yield
        finally:
            self._is_starting_up = False

    def in_front_of(self, url: str) -> str:
        """Return a URL of the server with the address of this proxy."""
        parts = urlsplit(url)
        login, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{login}{at}127.0.0.1:{self.port}").geturl()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass the traffic of one connection on, with the faults that are set, until one side closes it."""
        if self._is_starting_up:
            await _refuse(reader, writer)
            return
        if self._is_cut_off:
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._server)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, server_writer}
        self._writers |= both
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._pass_requests(reader, server_writer))
                directions.create_task(self._pass_answers(server_reader, writer))
        except* OSError:
            pass
        finally:
            self._writers -= both
            for one in both:
                one.transport.abort()

    async def _pass_requests(self, reader: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        """Pass requests on to the server, held back or delayed as the controls say;
        raises ConnectionResetError at their end.
        """
        while chunk := await reader.read(CHUNK_BYTES):
            if self._answers_marker is not None and self._answers_marker in chunk:
                self._answers_pass.clear()
            if self._requests_marker is not None and self._requests_marker in chunk:
                self._requests_pass.clear()
            if not self._requests_pass.is_set():
                self._has_kept_one.set()
                await self._requests_pass.wait()
            if self.delay_seconds:
                await asyncio.sleep(self.delay_seconds)
            server.write(chunk)
            await server.drain()
        raise ConnectionResetError

    async def _pass_answers(self, server: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await server.read(CHUNK_BYTES):
            if not self._answers_pass.is_set():
                self._has_kept_one.set()
                await self._answers_pass.wait()
            if self.delay_seconds:
                await asyncio.sleep(self.delay_seconds)
            writer.write(chunk)
            await writer.drain()
        raise ConnectionResetError


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if await reader.read(CHUNK_BYTES) == TLS_REQUEST:
        writer.write(NO_TLS)
        await reader.read(CHUNK_BYTES)
    writer.write(b"E" + struct.pack("!i", len(STARTING_UP) + 4) + STARTING_UP)
    writer.close()


@asynccontextmanager
async def run_proxy(url: str) -> AsyncIterator[FaultyProxy]:
    """Run a proxy on a free port in front of the server of a URL during the block."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    proxy = FaultyProxy((parts.hostname, parts.port))
    connections: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        task.add_done_callback(connections.discard)
        await proxy.serve(reader, writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        await stop_accepting(server.sockets[0].fileno())
        server.close()
        while connections:
            proxy.cut()
            await asyncio.wait(connections, timeout=POLL_SECONDS)
