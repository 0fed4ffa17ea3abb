"""Writes of a connection: head and body of a response go into one packet, no later than in the next loop
turn; and the end of a connection whose client is silent.
"""

import asyncio
import socket
from typing import cast

from gateway.http.byte_budget import ByteBudget, ByteHolding
from gateway.http.protocol import MAX_GATHERED_BYTES, BufferedTransport, ConnectionBounds, RequestHolding


class RecordedTransport(asyncio.Transport):
    """Remembers each packet."""

    def __init__(self) -> None:
        super().__init__()
        self.packets: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.is_closed
        self.packets.append(bytes(data))

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        """Abort the connection, as happens to a closed one after its client had time to read the rest."""


def make_gathering() -> tuple[BufferedTransport, RecordedTransport]:
    wire = RecordedTransport()
    return BufferedTransport(cast("asyncio.Transport", wire), asyncio.get_running_loop(), 5.0), wire


async def test_writes_in_one_turn_of_the_event_loop_form_one_packet() -> None:
    connection, wire = make_gathering()
    connection.write(b"head ")
    connection.write(b"body")
    assert wire.packets == []
    await asyncio.sleep(0)
    assert wire.packets == [b"head body"]
    connection.write(b"more")
    await asyncio.sleep(0)
    assert wire.packets == [b"head body", b"more"]


async def test_a_large_piece_is_sent_at_once_after_earlier_data() -> None:
    connection, wire = make_gathering()
    large = b"x" * (MAX_GATHERED_BYTES + 1)
    connection.write(b"head ")
    connection.write(large)
    assert wire.packets == [b"head " + large]
    await asyncio.sleep(0)
    assert len(wire.packets) == 1


async def test_a_connection_is_closed_after_all_written_data() -> None:
    connection, wire = make_gathering()
    connection.write(b"last words")
    connection.close()
    assert (wire.packets, wire.is_closed) == ([b"last words"], True)
    await asyncio.sleep(0)


async def test_the_system_ends_a_connection_with_a_silent_client() -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        transport, _ = await loop.create_connection(asyncio.Protocol, *listener.getsockname())
        try:
            holding = RequestHolding(
                cast("ConnectionBounds", None),  # of a client that is not counted
                "",
                ByteHolding(ByteBudget(1, share_bytes=1), "", lambda: None),
                BufferedTransport(transport, loop, 5.0),
            )
            holding.bound_silence(30)
            option = socket.TCP_USER_TIMEOUT
            assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, option) == 30_000
        finally:
            transport.abort()
