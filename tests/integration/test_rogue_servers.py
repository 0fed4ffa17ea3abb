"""Hostile servers of users, which never end, lie about lengths or stay silent: each causes a clear error and
little memory.
"""

from __future__ import annotations

import asyncio
import struct
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from engine.run_errors import NodeError
from engine.values import Json
from nodes.connections.data_source import ConnectionSource
from nodes.connections.data_source_connections import DataSourceConnections
from nodes.connections.data_source_policy import ConnectionPolicy
from tests.loop_heartbeat import measure_heartbeat
from tests.node_calls import CALLER, call

pytestmark = pytest.mark.anyio

POLICY = ConnectionPolicy(allowed_networks=(ip_network("127.0.0.1/32"),))
SECONDS = 20.0
"""Time limit of a node; a slow server answers in time."""
SILENT_SECONDS = 0.3
PATIENCE_SECONDS = 60.0
MAX_MORE_BYTES = 250 << 20
MAX_PAUSE_SECONDS = 3.0
"""Of the loop, on a slow machine."""

Reply = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class SingleSource:
    """Data sources with a single source for all callers."""

    def __init__(self, source: ConnectionSource) -> None:
        self._source = source

    async def find(self, caller: object, source_id: str) -> ConnectionSource:
        del caller, source_id
        return self._source


@asynccontextmanager
async def serve_connections(reply: Reply) -> AsyncIterator[int]:
    """Serve every connection so; yields the port."""
    tasks: set[asyncio.Task[None]] = set()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reply(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.ensure_future(converse(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=1 << 22)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def write_endlessly(writer: asyncio.StreamWriter, piece: bytes) -> None:
    many = piece * max(1, 100_000 // len(piece))
    while True:
        writer.write(many)
        await writer.drain()


async def stay_silent() -> None:
    await asyncio.Event().wait()


def memory_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (each for each in status.splitlines() if each.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


@contextmanager
def assert_little_memory() -> Iterator[None]:
    """Check that the process's memory grows little at any time, even within one call."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest so far is forgotten
    before = memory_bytes("VmRSS")
    yield
    assert memory_bytes("VmHWM") - before < MAX_MORE_BYTES


async def measure_longest_pause(work: Awaitable[Any]) -> float:
    """Return the longest time for which other tasks got no turn until the work ended."""
    running = asyncio.ensure_future(work)
    async with asyncio.timeout(PATIENCE_SECONDS), measure_heartbeat() as heartbeat:
        await asyncio.wait([running])
    return heartbeat.longest_delay_seconds


async def run_and_fail(source: ConnectionSource, node: str, config: dict[str, Json]) -> NodeError:
    """Return how a node fails with a source."""
    connections = DataSourceConnections(SingleSource(source), POLICY)
    work = asyncio.ensure_future(call(node, {"dataSource": "ds", **config}, data_sources=connections))
    try:
        with assert_little_memory():
            assert await measure_longest_pause(work) < MAX_PAUSE_SECONDS
        error = work.exception()
    finally:
        await connections.close()
    assert isinstance(error, NodeError), error
    return error


# ── PostgreSQL ──────────────────────────────────────────────────────────────────────────────────────────────

TEXT, INT4, TEXT_ARRAY, RECORD = 25, 23, 1009, 2249
ARRAY = struct.pack(">iiiii", 1, 0, TEXT, 2**31 - 1, 1)
"""Header of an array whose items never follow."""


def encode_message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack(">i", len(body) + 4) + body


def encode_row(*values: bytes | None) -> bytes:
    body = b"".join(
        struct.pack(">i", -1) if value is None else struct.pack(">i", len(value)) + value for value in values
    )
    return encode_message(b"D", struct.pack(">h", len(values)) + body)


def encode_columns(*types: int) -> bytes:
    each = [b"c%d\0" % at + struct.pack(">ihihih", 0, 0, oid, -1, -1, 1) for at, oid in enumerate(types)]
    return encode_message(b"T", struct.pack(">h", len(types)) + b"".join(each))


READY = encode_message(b"Z", b"I")
IN_TRANSACTION = encode_message(b"Z", b"T")
DONE = encode_message(b"C", b"SELECT 1\0")


def postgresql_reply(oid: int, rows: bytes, *, again: bytes = b"", after_sync: bytes = b"") -> Reply:
    """Return a server whose queries give one column and these rows; then `again` without end, if given.

    `after_sync` follows each description of a statement, though nothing asked for it.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack(">i", await reader.readexactly(4))
        await reader.readexactly(length - 4)
        writer.write(encode_message(b"R", struct.pack(">i", 0)))
        for setting in (b"server_version\x0016.1\0", b"client_encoding\0UTF8\0"):
            writer.write(encode_message(b"S", setting))
        writer.write(encode_message(b"K", b"\0" * 8) + READY)
        ready = READY
        while True:
            kind, length = struct.unpack(">ci", await reader.readexactly(5))
            query = await reader.readexactly(length - 4)
            if kind == b"X":
                return
            if kind == b"Q":
                ready = IN_TRANSACTION if query.startswith(b"BEGIN") else ready
                writer.write(encode_message(b"C", b"SET\0") + ready)
            elif kind == b"D":
                writer.write(encode_message(b"1") + encode_message(b"t", b"\0\0") + encode_columns(oid))
            elif kind == b"S":
                writer.write(ready + after_sync)
            elif kind == b"E":
                writer.write(encode_message(b"2") + rows)
                if again:
                    await write_endlessly(writer, again)

    return serve


@pytest.mark.parametrize(
    ("oid", "rows", "again", "code"),
    [
        pytest.param(TEXT, b"", encode_row(), "result-too-large", id="rows without fields"),
        pytest.param(TEXT, b"", encode_row(None), "result-too-large", id="rows of null"),
        pytest.param(TEXT, b"", encode_row(b"x" * 900), "result-too-large", id="rows"),
        pytest.param(TEXT, b"D" + struct.pack(">i", 2**31 - 1), b"x", "result-too-large", id="a field"),
        pytest.param(TEXT, b"", encode_message(b"S", b"name\0value\0"), "result-too-large", id="settings"),
        pytest.param(TEXT, b"", encode_message(b"N", b"SNOTICE\0\0"), "result-too-large", id="notices"),
        pytest.param(
            TEXT, b"", encode_message(b"A", b"\0\0\0\1a\0b\0"), "result-too-large", id="notifications"
        ),
        pytest.param(
            TEXT, encode_message(b"D", b"\0\1\x7f\xff\xff\xff"), b"", "invalid-response", id="a long field"
        ),
        pytest.param(
            TEXT, encode_message(b"D", b"\0\1\x80\0\0\0"), b"", "invalid-response", id="a field below nothing"
        ),
        pytest.param(TEXT, b"D\0\0\0\0", b"", "connection-failed", id="a message without its length"),
        pytest.param(INT4, encode_row(b"\0"), b"", "invalid-response", id="a short number"),
        pytest.param(TEXT_ARRAY, encode_row(ARRAY), b"", "invalid-response", id="an array of two billion"),
        pytest.param(
            RECORD, encode_row(struct.pack(">I", 2**27)) + DONE, b"", None, id="a record of many fields"
        ),
    ],
)
async def test_a_rogue_postgresql_costs_its_own_node_only(
    oid: int, rows: bytes, again: bytes, code: str | None
) -> None:
    async with serve_connections(postgresql_reply(oid, rows, again=again)) as port:
        source = make_source("postgresql", port)
        config: dict[str, Json] = {"query": "SELECT 1", "timeoutSeconds": SECONDS}
        if code is not None:
            assert (await run_and_fail(source, "postgresql-source", config)).code == code
            return
        with assert_little_memory():
            connections = DataSourceConnections(SingleSource(source), POLICY)
            await call("postgresql-source", {"dataSource": "ds", **config}, data_sources=connections)
            await connections.close()


async def test_a_postgresql_that_shuts_down_between_two_messages_is_worth_another_attempt() -> None:
    shutdown = encode_message(b"E", b"SFATAL\0C57P01\0Mterminating connection\0\0")
    async with serve_connections(postgresql_reply(TEXT, b"", after_sync=shutdown)) as port:
        source = make_source("postgresql", port)
        error = await run_and_fail(
            source, "postgresql-source", {"query": "SELECT 1", "timeoutSeconds": SECONDS}
        )
        assert (error.code, error.retryable) == ("connection-failed", True)


# ── MySQL ───────────────────────────────────────────────────────────────────────────────────────────────────

QUERY, PREPARE, CLOSE = 0x03, 0x16, 0x19
PROTOCOL_41, SECURE_CONNECTION, PLUGIN_AUTH = 0x200, 0x8000, 0x80000
CAPABILITIES = PROTOCOL_41 | SECURE_CONNECTION | PLUGIN_AUTH
TEXT_COLUMN, DATE_TIME_COLUMN, DECIMAL_COLUMN = 0xFD, 0x0C, 0xF6
OK, END_OF_PART = b"\0\0\0\2\0\0\0", b"\xfe\0\0\2\0"


class PacketWriter:
    """Writer of packets with consecutive numbers, as the client requires."""

    def __init__(self, writer: asyncio.StreamWriter, number: int = 1) -> None:
        self._writer = writer
        self._number = number

    def write(self, *bodies: bytes) -> None:
        self._writer.write(b"".join(self._packet(body) for body in bodies))

    async def endlessly(self, body: bytes) -> None:
        while True:
            self.write(*[body] * max(1, 20_000 // len(body)))
            await self._writer.drain()

    def _packet(self, body: bytes) -> bytes:
        head = struct.pack("<IB", min(len(body), 0xFFFFFF), self._number)
        self._number = (self._number + 1) & 0xFF
        return head[:3] + head[4:] + body


def encode_column(kind: int = TEXT_COLUMN) -> bytes:
    return b"\3def\0\0\0\1c\0\x0c" + struct.pack("<HIBHBH", 33, 4, kind, 0, 0, 0)


def encode_greeting() -> bytes:
    low, high = CAPABILITIES & 0xFFFF, CAPABILITIES >> 16
    settings = struct.pack("<HBHHB10x", low, 33, 2, high, 21)
    return b"\x0a8.0.0\0\1\0\0\0saltsalt\0" + settings + b"saltsaltsalt\0mysql_native_password\0"


def mysql_reply(reply: Callable[[PacketWriter], Awaitable[None]], *, greets: bool = True) -> Reply:
    """Return a server with this reply to queries, or to connections."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not greets:
            await reply(PacketWriter(writer, 0))
        PacketWriter(writer, 0).write(encode_greeting())
        await read_packet(reader)
        PacketWriter(writer, 2).write(OK)
        while True:
            command = await read_packet(reader)
            packets = PacketWriter(writer)
            if command[0] == PREPARE:
                places = command.count(b"?")
                packets.write(b"\0" + struct.pack("<IHHBH", 1, 0, places, 0, 0))
                packets.write(*[encode_column()] * places, *[END_OF_PART] * bool(places))
            elif command.startswith(b"\3EXECUTE"):
                await reply(packets)
            elif command[0] != CLOSE:
                packets.write(OK)

    return serve


async def read_packet(reader: asyncio.StreamReader) -> bytes:
    length, _ = struct.unpack("<HBx", await reader.readexactly(4)), None
    return await reader.readexactly(length[0] | length[1] << 16)


def rows_reply(
    body: bytes, kind: int = TEXT_COLUMN, *, columns: int = 1
) -> Callable[[PacketWriter], Awaitable[None]]:
    async def reply(packets: PacketWriter) -> None:
        head = bytes([columns]) if columns < 251 else b"\xfc" + struct.pack("<H", columns)
        packets.write(head, *[encode_column(kind)] * columns, END_OF_PART)
        await packets.endlessly(body)

    return reply


def endless_reply(*first: bytes, then: bytes) -> Callable[[PacketWriter], Awaitable[None]]:
    async def reply(packets: PacketWriter) -> None:
        packets.write(*first)
        await packets.endlessly(then)

    return reply


LARGEST = b"\0" * 0xFFFFFF
"""Packet of the maximum length, which another packet continues."""


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        pytest.param(rows_reply(b"\0"), "too-many-rows", id="rows"),
        pytest.param(rows_reply(b"\xfb" * 4_000, columns=4_000), "result-too-large", id="rows of null"),
        pytest.param(rows_reply(b"\xfd\x40\x42\x0f" + b"x" * 1_000_000), "result-too-large", id="large rows"),
        pytest.param(
            endless_reply(b"\1", encode_column(), END_OF_PART, then=LARGEST), "result-too-large", id="a row"
        ),
        pytest.param(
            endless_reply(b"\xfe" + struct.pack("<Q", 2**30), then=encode_column()),
            "result-too-large",
            id="columns",
        ),
        pytest.param(rows_reply(b"\xfe" + b"\xff" * 8), "invalid-response", id="a field below nothing"),
        pytest.param(rows_reply(b"\xfe" + b"\x7f" * 8), "sql-error", id="a long field"),
        pytest.param(rows_reply(b"\xfc"), "sql-error", id="half a length"),
        pytest.param(rows_reply(b"\1x", DECIMAL_COLUMN), "invalid-response", id="no number"),
        pytest.param(endless_reply(b"\1\2", then=b"\1"), "invalid-response", id="no column"),
        pytest.param(endless_reply(b"\xfb/etc/passwd", then=b"\0"), "statement-refused", id="a file"),
        pytest.param(endless_reply(b"", then=b"\0"), "invalid-response", id="nothing"),
    ],
)
async def test_a_rogue_mysql_costs_its_own_node_only(
    reply: Callable[[PacketWriter], Awaitable[None]], code: str
) -> None:
    async with serve_connections(mysql_reply(reply)) as port:
        config: dict[str, Json] = {"query": "SELECT 1", "timeoutSeconds": SECONDS}
        assert (await run_and_fail(make_source("mysql", port), "mysql-source", config)).code == code


async def test_a_greeting_without_end_is_not_kept() -> None:
    async with serve_connections(mysql_reply(endless_reply(then=LARGEST), greets=False)) as port:
        error = await run_and_fail(make_source("mysql", port), "mysql-source", {"query": "SELECT 1"})
        assert error.code == "connection-failed"


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
async def test_a_silent_database_is_left_when_the_time_is_up(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodes.connections.session_pool.OPEN_SECONDS", SILENT_SECONDS)

    async def say_nothing(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await stay_silent()

    async with serve_connections(say_nothing) as port:
        config: dict[str, Json] = {"query": "SELECT 1", "timeoutSeconds": SILENT_SECONDS}
        assert (await run_and_fail(make_source(kind, port), f"{kind}-source", config)).code == "timeout"


# ── mail servers ────────────────────────────────────────────────────────────────────────────────────────────


def smtp_reply(*answers: bytes, then: bytes) -> Reply:
    """Return a server that answers one command after another, and then without end."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            writer.write(answer)
            await reader.readline()
        await write_endlessly(writer, then)

    return serve


GREETED = (b"220 hello\r\n", b"250 hello\r\n")
ASKED = (*GREETED, b"250 ok\r\n", b"250 ok\r\n")


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        pytest.param(smtp_reply(then=b"220-hello\r\n"), "connection-failed", id="greeting"),
        pytest.param(smtp_reply(then=b"2"), "connection-failed", id="line"),
        pytest.param(smtp_reply(*GREETED[:1], then=b"250-SIZE 1\r\n"), "connection-failed", id="extensions"),
        pytest.param(smtp_reply(*GREETED, then=b"250-ok\r\n"), "connection-failed", id="sender"),
        pytest.param(smtp_reply(*ASKED, then=b"354-go on\r\n"), "connection-failed", id="beginning"),
        pytest.param(smtp_reply(*ASKED, b"354 go on\r\n", then=b"250-ok\r\n"), "connection-failed", id="end"),
    ],
)
async def test_a_rogue_mail_server_costs_its_own_node_only(reply: Reply, code: str) -> None:
    async with serve_connections(reply) as port:
        mail: dict[str, Json] = {"from": "a@example.com", "to": "b@example.com", "timeoutSeconds": SECONDS}
        assert (await run_and_fail(make_source("smtp", port, tls="none"), "email-send", mail)).code == code


async def test_a_server_that_repeats_the_password_does_not_show_it_in_errors() -> None:
    told = encode_message(b"E", b"SERROR\0C42000\0Mthe password p4ssw0rd is wrong\0\0")
    async with serve_connections(postgresql_reply(TEXT, told)) as port:
        error = await run_and_fail(
            make_source("postgresql", port), "postgresql-source", {"query": "SELECT 1"}
        )
    assert error.message == "The database refused: the password [hidden] is wrong"
    refusal = b"550 no p4ssw0rd, %s\r\n" % b64encode(b"p4ssw0rd")
    login = (GREETED[0], b"250-hello\r\n250 AUTH PLAIN\r\n", b"235 ok\r\n", refusal)
    async with serve_connections(smtp_reply(*login, then=b"250 ok\r\n")) as port:
        source = make_source("smtp", port, tls="none", username="u")
        error = await run_and_fail(source, "email-send", {"from": "a@example.com", "to": "b@example.com"})
    assert error.message.endswith("550 no [hidden], [hidden]")


# ── buckets ─────────────────────────────────────────────────────────────────────────────────────────────────


def http_reply(head: bytes, *, then: bytes = b"") -> Reply:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 " + head)
            if then:
                await write_endlessly(writer, then)

    return serve


def http_page(*objects: bytes, token: bytes = b"") -> bytes:
    truncated = b"<IsTruncated>true</IsTruncated><NextContinuationToken>%s</NextContinuationToken>" % token
    body = b"<ListBucketResult>%s%s</ListBucketResult>" % (b"".join(objects), truncated if token else b"")
    return b"200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


OBJECT = b"<Contents><Key>a</Key><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
GET: dict[str, Json] = {"key": "a"}
LIST: dict[str, Json] = {"prefix": "a/", "maxObjects": 10}


@pytest.mark.parametrize(
    ("config", "reply", "code"),
    [
        pytest.param(GET, http_reply(b"200 OK\r\n\r\n", then=b"x"), "response-too-large", id="body"),
        pytest.param(
            GET,
            http_reply(b"200 OK\r\nContent-Length: 999999999999\r\n\r\n", then=b"x"),
            "response-too-large",
            id="length",
        ),
        pytest.param(
            GET,
            http_reply(b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", then=b"2\r\nxx\r\n"),
            "invalid-response",
            id="chunks",
        ),
        pytest.param(
            GET,
            http_reply(b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", then=b"x"),
            "invalid-response",
            id="length of a chunk",
        ),
        pytest.param(GET, http_reply(b"200 OK\r\n", then=b"X-A: b\r\n"), "invalid-response", id="headers"),
        pytest.param(GET, http_reply(b"200 OK\r\nX-A: ", then=b"x"), "invalid-response", id="header"),
        pytest.param(
            GET,
            http_reply(b"100 Continue\r\n\r\n", then=b"HTTP/1.1 100 Continue\r\n\r\n"),
            "invalid-response",
            id="100",
        ),
        pytest.param(LIST, http_reply(http_page(*[OBJECT] * 100_000)), "too-many-objects", id="objects"),
        pytest.param(LIST, http_reply(http_page(token=b"again")), "invalid-response", id="pages"),
        pytest.param(
            LIST, http_reply(b"200 OK\r\n\r\n<L>", then=b"<L>"), "response-too-large", id="elements"
        ),
    ],
)
async def test_a_rogue_bucket_costs_its_own_node_only(
    config: dict[str, Json], reply: Reply, code: str
) -> None:
    async with serve_connections(reply) as port:
        settings: dict[str, Json] = {
            "endpoint": f"http://127.0.0.1:{port}",
            "bucket": "bucket",
            "accessKeyId": "key",
        }
        source = ConnectionSource(
            "ds", CALLER.organization_id, "s3", 1, settings, {"secretAccessKey": "secret"}
        )
        error = await run_and_fail(source, "s3-source", {**config, "timeoutSeconds": SECONDS})
        assert error.code == code, error.message


def make_source(kind: str, port: int, **settings: Json) -> ConnectionSource:
    address: dict[str, Json] = {
        "host": "127.0.0.1",
        "port": port,
        "database": "d",
        "user": "u",
        "tls": "disable",
    }
    return ConnectionSource(
        "ds", CALLER.organization_id, kind, 1, address | settings, {"password": "p4ssw0rd"}
    )
