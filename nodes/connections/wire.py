"""Between a socket and a driver that trusts its server: what arrives is counted, and cut off where it is too much.

A row arrives whole, however large it is, and no driver here has a limit for one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from struct import Struct
from typing import Any, Final, Generic, TypeVar

BYTES_BESIDE: Final = 1_000_000
"""For what a server sends besides rows. Each may take a hundred times as much memory."""
ROWS_BESIDE: Final = 2_000
"""For rows that a server sends about its types, or beyond what was asked for."""
ROW: Final = ord("D")
HEADER: Final = Struct(">Bi")
"""Of a message of PostgreSQL: its type, and its length, which counts itself and what follows."""
SHORTEST_LENGTH: Final = 4


class _Meter(asyncio.BaseProtocol):
    """Hands everything on to the protocol of the driver, in whose place it stands."""

    inner: Any

    def __init__(self, inner: Any) -> None:  # noqa: ANN401 - of one kind or the other
        self.inner = inner
        self._transport: Any = None
        self._left_bytes = BYTES_BESIDE
        self.is_exceeded = False

    def limit(self, max_bytes: int) -> None:
        """Allow so many bytes from now on, and something besides."""
        self._left_bytes = max_bytes + BYTES_BESIDE

    def _is_allowed(self, size_bytes: int) -> bool:
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            self.is_exceeded = True
            self._transport.abort()
        return not self.is_exceeded

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.inner.connection_made(transport)

    def eof_received(self) -> bool | None:
        received: bool | None = self.inner.eof_received()
        return received

    def connection_lost(self, exc: Exception | None) -> None:
        self.inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        self.inner.resume_writing()


Wire = TypeVar("Wire", bound=_Meter)


class MessageWire(_Meter, asyncio.Protocol):
    """For PostgreSQL: also looks at the length of each message, since asyncpg would read one below four forever.

    Rows are counted besides their bytes: the shortest has 7, and takes 50 in memory. So are the bytes of other
    messages, of which asyncpg keeps more still.
    """

    def __init__(self, inner: Any) -> None:  # noqa: ANN401 - see `_Meter`
        super().__init__(inner)
        self._left_rows = ROWS_BESIDE
        self._left_bytes_beside = BYTES_BESIDE
        self._until_header = 0
        self._begun = b""
        """A header of which the rest is still to come."""

    def limit_rows(self, max_rows: int) -> None:
        """Allow so many rows from now on, and some besides."""
        self._left_rows = max_rows + ROWS_BESIDE
        self._left_bytes_beside = BYTES_BESIDE

    def data_received(self, data: bytes) -> None:
        if not self._is_allowed(len(data)):
            return
        if self._is_framed(data):
            self.inner.data_received(data)
        else:
            self._transport.abort()

    def _is_framed(self, data: bytes) -> bool:
        data, position = self._begun + data, self._until_header
        while position + HEADER.size <= len(data):
            kind, length = HEADER.unpack_from(data, position)
            if length < SHORTEST_LENGTH:
                return False
            if kind == ROW:
                self._left_rows -= 1
            else:
                self._left_bytes_beside -= length
            position += 1 + length
        if self._left_rows < 0 or self._left_bytes_beside < 0:
            self.is_exceeded = True
            return False
        self._begun = data[position:]
        self._until_header = max(0, position - len(data))
        return True


class BufferedWire(_Meter, asyncio.BufferedProtocol):
    """For a driver that lends its own memory to what arrives."""

    def get_buffer(self, sizehint: int) -> memoryview:
        buffer: memoryview = self.inner.get_buffer(sizehint)
        return buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._is_allowed(nbytes):
            self.inner.buffer_updated(nbytes)


class WiredLoop(Generic[Wire]):
    """The running loop, with a wire before every protocol that is connected through it."""

    def __init__(self, make_wire: Callable[[Any], Wire]) -> None:
        self._loop = asyncio.get_running_loop()
        self._make_wire = make_wire
        self.wire: Wire | None = None
        """That of the last connection."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the loop has
        if name == "start_tls":
            raise AttributeError(name)  # asyncpg then begins TLS with `create_connection` as well
        return getattr(self._loop, name)

    async def create_connection(
        self,
        protocol_factory: Callable[[], Any],
        *args: Any,  # noqa: ANN401 - passed on
        **named: Any,  # noqa: ANN401 - passed on
    ) -> tuple[asyncio.BaseTransport, Any]:
        transport, self.wire = await self._loop.create_connection(
            lambda: self._make_wire(protocol_factory()), *args, **named
        )
        return transport, self.wire.inner
