"""Protocol wrappers that limit received data, for drivers that trust their server.

A row arrives whole, however large it is, and no driver here has a limit for one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any, Final, Generic, TypeVar

from nodes.connection_phases import ConnectionPhase, note_phase
from nodes.connections.postgresql_binary import (
    COUNT,
    LearnedTypes,
    has_plausible_dimensions,
    is_credible,
    iterate_fields,
)

BYTES_BESIDE: Final = 1_000_000
"""Allowance for messages other than rows. They may take a hundred times as much memory."""
ROWS_BESIDE: Final = 2_000
"""Allowance for rows about types, and beyond the requested ones."""
DATA_ROW_TAG: Final = ord("D")
MESSAGE_HEADER: Final = Struct(">Bi")
"""Header of a PostgreSQL message: its type, and its length, which includes the length field."""
SHORTEST_LENGTH: Final = 4


class _MeteredProtocol(asyncio.BaseProtocol):
    """Wrapper around a driver's protocol that counts received bytes."""

    inner: Any

    def __init__(self, inner: Any) -> None:  # noqa: ANN401 - of one kind or the other
        self.inner = inner
        self._transport: Any = None
        self._left_bytes = BYTES_BESIDE
        self.is_exceeded = False
        self.is_garbled = False
        """Set if received data is implausible."""

    def limit(self, max_bytes: int) -> None:
        """Allow the server to send `max_bytes` from now on, plus a megabyte for other messages; more ends the
        connection.
        """
        self._left_bytes = max_bytes + BYTES_BESIDE

    def _accept_bytes(self, size_bytes: int) -> bool:
        """Count received bytes; return False, after ending the connection, if they exceed the limit."""
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


Wire = TypeVar("Wire", bound=_MeteredProtocol)


class MessageWire(_MeteredProtocol, asyncio.Protocol):
    """Wrapper for PostgreSQL that also checks the length of each message: asyncpg would read one below four forever.

    Rows are counted besides their bytes: the shortest has 7, and takes 50 in memory. So are the bytes of other
    messages, which take even more memory in asyncpg. Messages are passed on whole, and rows only if their counts are
    plausible: see `postgresql_binary`.
    """

    def __init__(self, inner: Any) -> None:  # noqa: ANN401 - see `_MeteredProtocol`
        super().__init__(inner)
        self._left_rows = ROWS_BESIDE
        self._left_bytes_beside = BYTES_BESIDE
        self._has_messages = not hasattr(inner, "on_data")
        """False for the protocol that asks a server for TLS: the answer is a single byte."""
        self._held = bytearray()
        """Beginning of an incomplete message."""
        self._needed = 0
        self._types = LearnedTypes()
        self._columns: Sequence[int] | None = None
        """Types of the expected rows; None for queries of the driver itself."""
        self._are_checked = True

    def limit_rows(
        self, max_rows: int, types: LearnedTypes | None = None, columns: Sequence[int] | None = None
    ) -> None:
        """Limit the rows that the server may send from now on to `max_rows` plus 2,000; more ends the connection.

        Counts within rows, such as of array items, are checked before the driver allocates memory by them. `columns`
        are the type ids of the rows' columns; the check is skipped if none of them is a container (such as an array) in
        `types`. Without `columns`, every row is checked.
        """
        self._left_rows = max_rows + ROWS_BESIDE
        self._left_bytes_beside = BYTES_BESIDE
        self._types = types or LearnedTypes()
        self._columns = columns
        self._are_checked = columns is None or any(self._types.container(oid) for oid in columns)

    def data_received(self, data: bytes) -> None:
        if not self._accept_bytes(len(data)):
            return
        if not self._has_messages:
            self.inner.data_received(data)
            return
        self._held += data
        if len(self._held) < self._needed:
            return
        end = self._check_messages()
        if end is None:
            self._transport.abort()
        elif end:
            whole = bytes(self._held[:end])
            del self._held[:end]
            self._needed = max(0, self._needed - end)
            self.inner.data_received(whole)

    def _check_messages(self) -> int | None:
        """Check the complete messages in the buffer, and return the position after the last one.

        None if a message is malformed or exceeds a limit.
        """
        position = 0
        while position + MESSAGE_HEADER.size <= len(self._held):
            kind, length = MESSAGE_HEADER.unpack_from(self._held, position)
            if length < SHORTEST_LENGTH:
                return None
            if kind != DATA_ROW_TAG and length > self._left_bytes_beside:
                self.is_exceeded = True
                return None
            end = position + 1 + length
            if end > len(self._held):
                self._needed = end
                return position
            if kind != DATA_ROW_TAG:
                self._left_bytes_beside -= length
            elif not self._accept_row(position + MESSAGE_HEADER.size, end):
                return None
            position = end
        self._needed = 0
        return position

    def _accept_row(self, begin: int, end: int) -> bool:
        """Count a row, at these positions of the buffer; return False for too many, or if a count within it is
        implausible.
        """
        self._left_rows -= 1
        if self._left_rows < 0:
            self.is_exceeded = True
            return False
        if not self._are_checked or end - begin < COUNT.size:
            return True
        fields = iterate_fields(bytes(self._held[begin:end]))
        if self._columns is None:
            self.is_garbled = not all(map(has_plausible_dimensions, fields))
        else:
            self.is_garbled = not all(
                is_credible(self._types, oid, field)
                for oid, field in zip(self._columns, fields, strict=False)
            )
        return not self.is_garbled


class BufferedWire(_MeteredProtocol, asyncio.BufferedProtocol):
    """Wrapper for drivers that provide the receive buffer."""

    def get_buffer(self, sizehint: int) -> memoryview:
        buffer: memoryview = self.inner.get_buffer(sizehint)
        return buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._accept_bytes(nbytes):
            self.inner.buffer_updated(nbytes)


class MeteredLoop(Generic[Wire]):
    """Running loop that wraps the protocol of every connection."""

    def __init__(self, make_wire: Callable[[Any], Wire]) -> None:
        self._loop = asyncio.get_running_loop()
        self._make_wire = make_wire
        self.wire: Wire | None = None
        """Wrapper of the last connection."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute of the loop
        if name == "start_tls":
            raise AttributeError(name)  # Without it, asyncpg begins TLS with `create_connection` as well.
        return getattr(self._loop, name)

    async def create_connection(
        self,
        protocol_factory: Callable[[], Any],
        *args: Any,  # noqa: ANN401 - passed on
        **named: Any,  # noqa: ANN401 - passed on
    ) -> tuple[asyncio.BaseTransport, Any]:
        # Drivers connect first, and begin TLS on that socket by a second call.
        with note_phase(ConnectionPhase.TLS if named.get("ssl") else ConnectionPhase.TCP):
            transport, self.wire = await self._loop.create_connection(
                lambda: self._make_wire(protocol_factory()), *args, **named
            )
        return transport, self.wire.inner
