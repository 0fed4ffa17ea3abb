import asyncio
import gzip
import json
import os
import socket
import ssl
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path

import pytest

from nodes import outbound_http
from nodes.connection_phases import record_phases
from nodes.outbound_http import (
    MAX_ADDRESSES,
    OutboundClient,
    OutboundOutageCode,
    OutboundPolicy,
    OutboundRefusalCode,
    OutboundRefused,
    OutboundResponse,
    OutboundUnavailable,
    ResolveName,
)
from nodes.streamed_response import MAX_UNREAD_BYTES

LOOPBACK = OutboundPolicy(allowed_networks=(ip_network("127.0.0.1/32"),))
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Return the loop of the server's processes: its transports differ from those of asyncio."""
    return "asyncio", {"use_uvloop": True}


@dataclass(frozen=True)
class UpstreamRequest:
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


Answer = Callable[[UpstreamRequest], bytes | AsyncIterator[bytes]]


@dataclass
class UpstreamServer:
    port: int = 0
    connections: int = 0
    requests: list[UpstreamRequest] = field(default_factory=list)


async def receive(reader: asyncio.StreamReader) -> UpstreamRequest:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return UpstreamRequest(method, target, headers, body)


@asynccontextmanager
async def serve_upstream(
    answer: Answer, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncGenerator[UpstreamServer]:
    """Run a server that gives the answer to each request, and hangs up after an empty answer."""
    upstream = UpstreamServer()
    tasks: set[asyncio.Task[None]] = set()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream.connections += 1
        try:
            while True:
                request = await receive(reader)
                upstream.requests.append(request)
                answered = answer(request)
                if not answered:
                    return
                if isinstance(answered, bytes):
                    writer.write(answered)
                    continue
                async for piece in answered:
                    writer.write(piece)
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(converse(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, host, port, ssl=tls)
    upstream.port = server.sockets[0].getsockname()[1]
    try:
        yield upstream
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def open_client(
    policy: OutboundPolicy = LOOPBACK, resolve: ResolveName | None = None
) -> AsyncGenerator[OutboundClient]:
    outbound = OutboundClient(policy, resolve)
    try:
        yield outbound
    finally:
        await outbound.close()


def make_resolver(*answers: Sequence[str]) -> ResolveName:
    """Return a resolver that gives the answers in order, and then the last one forever."""
    remaining = list(answers)

    async def resolve(_: str) -> Sequence[str]:
        return remaining.pop(0) if len(remaining) > 1 else remaining[0]

    return resolve


def answer_always(answer: bytes) -> Answer:
    return lambda _: answer


def http_message(head: str, body: bytes = b"") -> bytes:
    return f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def redirect_message(location: str, status: int = 302) -> bytes:
    return http_message(f"{status} Elsewhere\r\nLocation: {location}")


async def fetch(outbound: OutboundClient, url: str, timeout_seconds: float = 10) -> OutboundResponse:
    return await outbound.request("GET", url, headers={}, timeout_seconds=timeout_seconds)


async def refusal_code(
    outbound: OutboundClient, url: str, timeout_seconds: float = 10
) -> OutboundRefusalCode:
    with pytest.raises(OutboundRefused) as refused:
        await fetch(outbound, url, timeout_seconds)
    return refused.value.code


async def outage_code(outbound: OutboundClient, url: str, timeout_seconds: float = 10) -> OutboundOutageCode:
    with pytest.raises(OutboundUnavailable) as unavailable:
        await fetch(outbound, url, timeout_seconds)
    return unavailable.value.code


async def test_a_request_is_sent_as_given_and_returns_the_response() -> None:
    answer = http_message("201 Created\r\nX-Two: a\r\nx-two: b", b"made")
    async with (
        serve_upstream(answer_always(answer)) as upstream,
        open_client(resolve=make_resolver(["127.0.0.1"])) as outbound,
    ):
        url = f"http://upstream.test:{upstream.port}/a%2Fb?c=%20d"
        response = await outbound.request(
            "post", url, headers={"X-Key": "k", "Content-Type": "text/plain"}, body=b"hello"
        )
    assert response.status == 201
    assert response.headers["x-two"] == "a, b"
    assert (response.body, response.url) == (b"made", url)
    [request] = upstream.requests
    assert (request.method, request.target, request.body) == ("POST", "/a%2Fb?c=%20d", b"hello")
    assert request.headers == {
        "host": f"upstream.test:{upstream.port}",
        "x-key": "k",
        "content-type": "text/plain",
        "content-length": "5",
        "accept": "*/*",
        "accept-encoding": "gzip, deflate",
        "user-agent": "Pilotflame",
    }


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "localhost", "0.0.0.0"]
)
async def test_the_machine_itself_is_not_reached_without_permission(host: str) -> None:
    async with serve_upstream(answer_always(OK)) as upstream, open_client(OutboundPolicy()) as outbound:
        assert (
            await refusal_code(outbound, f"http://{host}:{upstream.port}/")
            is OutboundRefusalCode.ADDRESS_NOT_ALLOWED
        )
    assert upstream.connections == 0


@pytest.mark.parametrize(
    "answer", [["10.0.0.1"], ["127.0.0.1", "10.0.0.1"], ["::ffff:10.0.0.1"], ["fe80::1%2"]]
)
async def test_one_address_that_is_not_allowed_refuses_the_name(answer: list[str]) -> None:
    async with (
        serve_upstream(answer_always(OK)) as upstream,
        open_client(resolve=make_resolver(answer)) as outbound,
    ):
        assert (
            await refusal_code(outbound, f"http://name.test:{upstream.port}/")
            is OutboundRefusalCode.ADDRESS_NOT_ALLOWED
        )
    assert upstream.connections == 0


async def test_a_refusal_does_not_reveal_internal_addresses_of_a_name() -> None:
    async with open_client(resolve=make_resolver(["10.9.8.7"])) as outbound:
        with pytest.raises(OutboundRefused) as refused:
            await fetch(outbound, "http://name.test/secret?key=secret")
    assert "10.9.8.7" not in refused.value.message
    assert "secret" not in refused.value.message


async def test_a_name_in_an_allowed_network_is_found_by_the_system() -> None:
    policy = OutboundPolicy(allowed_networks=(ip_network("127.0.0.0/8"), ip_network("::1/128")))
    async with serve_upstream(answer_always(OK)) as upstream, open_client(policy) as outbound:
        assert (await fetch(outbound, f"http://localhost:{upstream.port}/")).body == b"ok"
    assert upstream.requests[0].headers["host"] == f"localhost:{upstream.port}"


@pytest.mark.parametrize("phases", [nullcontext, record_phases])
async def test_the_connection_goes_to_the_checked_address_of_the_name(
    phases: Callable[[], AbstractContextManager[object]],
) -> None:
    last = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
    async with (
        AsyncExitStack() as stack,
        serve_upstream(lambda request: last if request.target == "/last" else OK) as public,
        serve_upstream(answer_always(OK), host="127.0.0.2", port=public.port) as private,
        open_client(resolve=make_resolver(["127.0.0.1"], ["127.0.0.2"])) as outbound,
    ):
        stack.enter_context(phases())
        url = f"http://rebinding.test:{public.port}/"
        assert (await fetch(outbound, url)).status == 200
        assert (
            await fetch(outbound, f"{url}last")
        ).status == 200  # over the connection to the checked address
        assert await refusal_code(outbound, url) is OutboundRefusalCode.ADDRESS_NOT_ALLOWED
    assert (public.connections, private.connections) == (1, 0)


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_kept_connection_that_the_server_closes_costs_no_read_and_repeats_no_write(
    method: str,
) -> None:
    served = 0

    def once(_: UpstreamRequest) -> bytes:
        nonlocal served
        served += 1
        return b"" if served == 2 else OK

    async with serve_upstream(once) as upstream, open_client() as outbound:
        url = f"http://127.0.0.1:{upstream.port}/"
        assert (await fetch(outbound, url)).status == 200
        if method == "GET":
            assert (await fetch(outbound, url)).status == 200
        else:
            with pytest.raises(OutboundUnavailable) as unavailable:
                await outbound.request(method, url, headers={}, body=b"x")
            assert unavailable.value.code is OutboundOutageCode.INTERRUPTED
    assert len(upstream.requests) == (3 if method == "GET" else 2)


@pytest.mark.parametrize("behind", [OK, b"x", b"HTTP/1.1 200 OK\r\n"])
async def test_bytes_behind_a_response_never_become_the_next_one(behind: bytes) -> None:
    """Also from a server that answers twice: the second answer would reach the request of another user."""
    async with serve_upstream(answer_always(OK + behind)) as upstream, open_client() as outbound:
        for _ in range(2):
            assert (await fetch(outbound, f"http://127.0.0.1:{upstream.port}/")).body == b"ok"
    assert upstream.connections == 2


async def test_requests_wait_for_a_place_and_idle_connections_give_theirs_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbound_http, "MAX_CONNECTIONS", 2)
    async with (
        serve_upstream(answer_always(OK)) as upstream,
        open_client(resolve=make_resolver(["127.0.0.1"])) as outbound,
        asyncio.timeout(10),
        asyncio.TaskGroup() as tasks,
    ):
        for number in range(12):
            tasks.create_task(fetch(outbound, f"http://name{number % 4}.test:{upstream.port}/"))
    assert len(upstream.requests) == 12


async def test_a_response_to_head_has_no_body_and_one_without_length_ends_with_its_connection() -> None:
    def answer(request: UpstreamRequest) -> bytes | AsyncIterator[bytes]:
        if request.method == "HEAD":
            return b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"
        return unbounded()

    async def unbounded() -> AsyncIterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\n\r\nall of it"
        raise ConnectionError

    async with serve_upstream(answer) as upstream, open_client() as outbound:
        url = f"http://127.0.0.1:{upstream.port}/"
        head = await outbound.request("HEAD", url, headers={})
        assert (head.body, head.headers["content-length"]) == (b"", "9")
        assert (await fetch(outbound, url)).body == b"all of it"


@pytest.mark.parametrize(
    "answer",
    [
        http_message("200 OK\r\nContent-Encoding: gzip", gzip.compress(b"plain", mtime=0)[:-9]),
        http_message("200 OK\r\nContent-Encoding: gzip", b"no gzip"),
        http_message("200 OK\r\nContent-Encoding: deflate", zlib.compress(b"plain") + b"more"),
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_a_body_that_two_readers_could_frame_differently_is_refused(answer: bytes) -> None:
    async with serve_upstream(answer_always(answer)) as upstream, open_client() as outbound:
        code = await refusal_code(outbound, f"http://127.0.0.1:{upstream.port}/")
    assert code is OutboundRefusalCode.INVALID_RESPONSE


async def test_members_of_gzip_and_deflate_without_a_header_are_decompressed() -> None:
    raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bodies = {
        "/members": ("gzip", gzip.compress(b"two ") + gzip.compress(b"members")),
        "/raw": ("deflate", raw.compress(b"two members") + raw.flush()),
    }

    def answer(request: UpstreamRequest) -> bytes:
        encoding, body = bodies[request.target]
        return http_message(f"200 OK\r\nContent-Encoding: {encoding}", body)

    async with serve_upstream(answer) as upstream, open_client() as outbound:
        for path in bodies:
            assert (await fetch(outbound, f"http://127.0.0.1:{upstream.port}{path}")).body == b"two members"


@pytest.mark.parametrize(
    "location",
    ["http://127.0.0.2:{port}/", "//127.0.0.2:{port}/", "http://[::1]:{port}/", "http://inside.test:{port}/"],
)
async def test_a_redirect_does_not_lead_inside(location: str) -> None:
    async with serve_upstream(answer_always(OK), host="127.0.0.2") as private:
        answer = redirect_message(location.format(port=private.port))
        async with (
            serve_upstream(answer_always(answer)) as public,
            open_client(resolve=make_resolver(["127.0.0.2"])) as outbound,
        ):
            url = f"http://127.0.0.1:{public.port}/"
            assert await refusal_code(outbound, url) is OutboundRefusalCode.ADDRESS_NOT_ALLOWED
    assert (public.connections, private.connections) == (1, 0)


@pytest.mark.parametrize(
    "location", ["ftp://127.0.0.1/", "http://a@127.0.0.1/", "http://127.1/", "http:\\\\127.0.0.1"]
)
async def test_a_redirect_is_read_as_strictly_as_the_first_url(location: str) -> None:
    async with (
        serve_upstream(answer_always(redirect_message(location))) as upstream,
        open_client() as outbound,
    ):
        assert (
            await refusal_code(outbound, f"http://127.0.0.1:{upstream.port}/")
            is OutboundRefusalCode.INVALID_URL
        )


async def test_redirects_end() -> None:
    async with (
        serve_upstream(lambda request: redirect_message(request.target + "x")) as upstream,
        open_client() as outbound,
    ):
        assert (
            await refusal_code(outbound, f"http://127.0.0.1:{upstream.port}/")
            is OutboundRefusalCode.TOO_MANY_REDIRECTS
        )
    assert [request.target for request in upstream.requests] == ["/", "/x", "/xx", "/xxx", "/xxxx", "/xxxxx"]


async def test_a_redirect_may_be_left_to_the_caller() -> None:
    async with (
        serve_upstream(answer_always(redirect_message("http://10.0.0.1/"))) as upstream,
        open_client() as outbound,
    ):
        url = f"http://127.0.0.1:{upstream.port}/"
        response = await outbound.request("GET", url, headers={}, follow_redirects=False)
    assert (response.status, response.headers["location"]) == (302, "http://10.0.0.1/")


SECRETS = {
    "Authorization": "Bearer secret",
    "Cookie": "session=secret",
    "X-Api-Key": "secret",
    "Idempotency-Key": "once",
}


@pytest.mark.parametrize("host", ["127.0.0.1", "other.test"])
async def test_secrets_stay_with_the_origin_that_they_were_meant_for(host: str) -> None:
    def answer(request: UpstreamRequest) -> bytes:
        return OK if request.target == "/end" else redirect_message(f"http://{host}:{upstream.port}/end")

    async with (
        serve_upstream(answer) as upstream,
        open_client(resolve=make_resolver(["127.0.0.1"])) as outbound,
    ):
        headers = {**SECRETS, "Accept": "text/plain"}
        await outbound.request("GET", f"http://127.0.0.1:{upstream.port}/", headers=headers)
    first, last = (request.headers for request in upstream.requests)
    assert first["accept"] == last["accept"] == "text/plain"
    kept = {name for name in SECRETS if name.lower() in last}
    assert kept == (set(SECRETS) if host == "127.0.0.1" else set())


@pytest.mark.parametrize(
    ("status", "method", "following"),
    [
        (301, "POST", "GET"),
        (302, "POST", "GET"),
        (303, "POST", "GET"),
        (303, "PUT", "GET"),
        (303, "HEAD", "HEAD"),
        (302, "PUT", "PUT"),
        (307, "POST", "POST"),
        (308, "POST", "POST"),
    ],
)
async def test_a_redirect_keeps_method_and_body_or_neither(status: int, method: str, following: str) -> None:
    def answer(request: UpstreamRequest) -> bytes:
        head = "200 OK" if request.target == "/end" else f"{status} Elsewhere\r\nLocation: /end"
        return http_message(head)

    body = None if method == "HEAD" else b"body"
    async with serve_upstream(answer) as upstream, open_client() as outbound:
        url = f"http://127.0.0.1:{upstream.port}/"
        await outbound.request(method, url, headers={"Content-Type": "text/plain"}, body=body)
    last = upstream.requests[-1]
    assert (last.method, last.target) == (following, "/end")
    is_kept = following == method
    assert last.body == ((body or b"") if is_kept else b"")
    assert ("content-type" in last.headers) is is_kept


async def test_requests_of_one_name_and_address_share_a_connection() -> None:
    async with (
        serve_upstream(answer_always(OK)) as upstream,
        open_client(resolve=make_resolver(["127.0.0.1"])) as outbound,
    ):
        for name in ("one.test", "one.test", "two.test", "two.test"):
            await fetch(outbound, f"http://{name}:{upstream.port}/")
    assert upstream.connections == 2


async def test_the_next_address_is_tried_where_the_first_does_not_answer() -> None:
    policy = OutboundPolicy(allowed_networks=(ip_network("127.0.0.0/8"),))
    resolve = make_resolver(["127.0.0.3", "127.0.0.1"])
    async with serve_upstream(answer_always(OK)) as upstream, open_client(policy, resolve) as outbound:
        assert (await fetch(outbound, f"http://two.test:{upstream.port}/")).body == b"ok"


async def test_of_a_long_answer_only_the_first_addresses_are_tried() -> None:
    resolve = make_resolver([*["127.0.0.1"] * MAX_ADDRESSES, "10.0.0.1"])
    async with serve_upstream(answer_always(OK)) as gone:
        pass
    async with open_client(resolve=resolve) as outbound:
        assert (
            await outage_code(outbound, f"http://many.test:{gone.port}/") is OutboundOutageCode.NOT_CONNECTED
        )


async def test_failures_of_connection_or_resolution_are_retryable() -> None:
    async def resolve(_: str) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    async with serve_upstream(answer_always(OK)) as gone:
        pass
    async with open_client(resolve=resolve) as outbound:
        assert (
            await outage_code(outbound, f"http://127.0.0.1:{gone.port}/") is OutboundOutageCode.NOT_CONNECTED
        )
        assert await outage_code(outbound, "http://unknown.test/") is OutboundOutageCode.NAME_NOT_RESOLVED
    async with open_client(resolve=make_resolver([])) as outbound:
        assert await outage_code(outbound, "http://empty.test/") is OutboundOutageCode.NAME_NOT_RESOLVED


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE"])
async def test_a_write_on_a_broken_connection_is_sent_once(method: str) -> None:
    async with serve_upstream(answer_always(b"")) as upstream, open_client() as outbound:
        with pytest.raises(OutboundUnavailable) as unavailable:
            await outbound.request(method, f"http://127.0.0.1:{upstream.port}/", headers={}, body=b"x")
    assert unavailable.value.code is OutboundOutageCode.INTERRUPTED
    assert len(upstream.requests) == 1


async def test_a_body_that_breaks_off_is_no_answer() -> None:
    async def broken(_: UpstreamRequest) -> AsyncIterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"
        raise ConnectionError

    async with serve_upstream(broken) as upstream, open_client() as outbound:
        assert (
            await outage_code(outbound, f"http://127.0.0.1:{upstream.port}/")
            is OutboundOutageCode.INTERRUPTED
        )


async def drip_pieces(head: bytes, piece: bytes) -> AsyncIterator[bytes]:
    yield head
    while True:
        await asyncio.sleep(0.02)
        yield piece


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\nX-Endless: ", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"", b""),
    ],
)
async def test_a_server_that_drips_ends_at_the_deadline(head: bytes, piece: bytes) -> None:
    async with serve_upstream(lambda _: drip_pieces(head, piece)) as upstream, open_client() as outbound:
        begin = time.monotonic()
        url = f"http://127.0.0.1:{upstream.port}/"
        assert await outage_code(outbound, url, timeout_seconds=0.3) is OutboundOutageCode.TIMED_OUT
        assert time.monotonic() - begin > 0.25


async def test_redirects_and_names_share_one_deadline() -> None:
    async def slow(_: str) -> Sequence[str]:
        await asyncio.sleep(0.05)
        return ["127.0.0.1"]

    policy = OutboundPolicy(allowed_networks=LOOPBACK.allowed_networks, max_redirects=1000)

    def elsewhere(_: UpstreamRequest) -> bytes:
        return redirect_message(f"http://slow{len(upstream.requests)}.test:{upstream.port}/")

    async with serve_upstream(elsewhere) as upstream, open_client(policy, slow) as outbound:
        url = f"http://slow.test:{upstream.port}/"
        assert await outage_code(outbound, url, timeout_seconds=0.3) is OutboundOutageCode.TIMED_OUT
    assert len(upstream.requests) < 10


SMALL = OutboundPolicy(allowed_networks=LOOPBACK.allowed_networks, max_response_bytes=1_000_000)


@pytest.mark.parametrize(
    "framing", ["Content-Length: 1000001", "Content-Length: 999999999999", "Connection: close"]
)
async def test_a_body_over_the_limit_is_cut_off(framing: str) -> None:
    async def endless(_: UpstreamRequest) -> AsyncIterator[bytes]:
        yield f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode()
        while True:
            yield bytes(65_536)

    async with serve_upstream(endless) as upstream, open_client(SMALL) as outbound:
        assert (
            await refusal_code(outbound, f"http://127.0.0.1:{upstream.port}/")
            is OutboundRefusalCode.RESPONSE_TOO_LARGE
        )


async def test_a_chunk_with_an_endless_extension_closes_the_connection() -> None:
    async def endless(_: UpstreamRequest) -> AsyncIterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;"
        while True:
            yield b"x" * 65_536

    async with serve_upstream(endless) as upstream, open_client(SMALL) as outbound:
        code = await refusal_code(outbound, f"http://127.0.0.1:{upstream.port}/")
    assert code in {OutboundRefusalCode.RESPONSE_TOO_LARGE, OutboundRefusalCode.INVALID_RESPONSE}


async def test_a_body_of_just_the_limit_is_read() -> None:
    async with (
        serve_upstream(answer_always(http_message("200 OK", bytes(1_000_000)))) as upstream,
        open_client(SMALL) as outbound,
    ):
        assert len((await fetch(outbound, f"http://127.0.0.1:{upstream.port}/")).body) == 1_000_000


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_small_bomb_does_not_grow(encoding: str) -> None:
    zeros = bytes(200_000_000)
    bomb = gzip.compress(zeros, 9) if encoding == "gzip" else zlib.compress(zeros, 9)
    del zeros
    answer = http_message(f"200 OK\r\nContent-Encoding: {encoding}", bomb)
    async with (
        serve_upstream(lambda request: answer if request.target == "/bomb" else OK) as upstream,
        open_client(SMALL) as outbound,
    ):
        url = f"http://127.0.0.1:{upstream.port}"
        await fetch(outbound, url)
        tracemalloc.start()
        try:
            assert await refusal_code(outbound, f"{url}/bomb") is OutboundRefusalCode.RESPONSE_TOO_LARGE
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak_bytes < 10 * SMALL.max_response_bytes


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(b"plain", mtime=0)),
        ("deflate", zlib.compress(b"plain")),
        ("identity", b"plain"),
    ],
)
async def test_a_compressed_body_arrives_plain(encoding: str, body: bytes) -> None:
    answer = http_message(f"200 OK\r\nContent-Encoding: {encoding}", body)
    async with serve_upstream(answer_always(answer)) as upstream, open_client() as outbound:
        assert (await fetch(outbound, f"http://127.0.0.1:{upstream.port}/")).body == b"plain"


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "unknown"])
async def test_an_encoding_that_was_not_asked_for_is_refused(encoding: str) -> None:
    answer = http_message(f"200 OK\r\nContent-Encoding: {encoding}", b"body")
    async with serve_upstream(answer_always(answer)) as upstream, open_client() as outbound:
        assert (
            await refusal_code(outbound, f"http://127.0.0.1:{upstream.port}/")
            is OutboundRefusalCode.INVALID_RESPONSE
        )


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (http_message("200 OK\r\nX-Long: " + "x" * 40_000), OutboundRefusalCode.INVALID_RESPONSE),
        (http_message("200 OK" + "\r\nX-Many: x" * 200), OutboundRefusalCode.INVALID_RESPONSE),
        (http_message("200 OK" + f"\r\nX-Large: {'x' * 1000}" * 40), OutboundRefusalCode.RESPONSE_TOO_LARGE),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", OutboundRefusalCode.INVALID_RESPONSE),
        (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
            OutboundRefusalCode.INVALID_RESPONSE,
        ),
        (http_message("000 Nothing"), OutboundRefusalCode.INVALID_RESPONSE),
        (http_message("600 More"), OutboundRefusalCode.INVALID_RESPONSE),
        (http_message("999 Denied"), OutboundRefusalCode.INVALID_RESPONSE),
        (http_message("20 OK"), OutboundRefusalCode.INVALID_RESPONSE),
        (b"-ERR unknown command\r\n\r\n", OutboundRefusalCode.INVALID_RESPONSE),
    ],
)
async def test_a_head_that_is_too_large_or_no_http_is_refused(
    answer: bytes, code: OutboundRefusalCode
) -> None:
    async with serve_upstream(answer_always(answer)) as upstream, open_client() as outbound:
        assert await refusal_code(outbound, f"http://127.0.0.1:{upstream.port}/") is code


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("CONNECT", "X", "x"),
        ("TRACE", "X", "x"),
        ("GET / HTTP/1.1\r\nX:", "X", "x"),
        ("GET", "Host", "other.test"),
        ("GET", "Content-Length", "0"),
        ("GET", "transfer-encoding", "chunked"),
        ("GET", "Connection", "x-key"),
        ("GET", "Upgrade", "websocket"),
        ("GET", "Proxy-Authorization", "Basic eA=="),
        ("GET", "Accept-Encoding", "br"),
        ("GET", "X\r\nHost", "other.test"),
        ("GET", "X Y", "x"),
        ("GET", "", "x"),
        ("GET", "X", "x\r\nHost: other.test"),
        ("GET", "X", "x\ny"),
        ("GET", "X", "x\x00"),
        ("GET", "X", "\ud800"),
        ("GET", "Authorization", "NTLM TlRMTVNTUAAB"),
        ("GET", "authorization", "negotiate YII="),
    ],
)
async def test_a_header_that_frames_or_forges_a_request_is_refused(
    method: str, name: str, value: str
) -> None:
    async with serve_upstream(answer_always(OK)) as upstream, open_client() as outbound:
        with pytest.raises(OutboundRefused) as refused:
            await outbound.request(method, f"http://127.0.0.1:{upstream.port}/", headers={name: value})
    assert refused.value.code is OutboundRefusalCode.INVALID_REQUEST
    assert upstream.connections == 0


async def test_proxies_passwords_and_cookies_of_the_machine_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("default login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    answer = http_message("200 OK\r\nSet-Cookie: session=secret")
    async with (
        serve_upstream(answer_always(OK)) as proxy,
        serve_upstream(answer_always(answer)) as upstream,
        open_client(resolve=make_resolver(["127.0.0.1"])) as outbound,
    ):
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        for _ in range(2):
            await fetch(outbound, f"http://upstream.test:{upstream.port}/")
    assert proxy.connections == 0
    for request in upstream.requests:
        assert request.headers.keys() == {"host", "accept", "accept-encoding", "user-agent"}


OTHER_PROCESS = """
import ipaddress, json, sys
import uvloop
from nodes.connection_phases import record_phases
from nodes.outbound_http import OutboundClient, OutboundError, OutboundPolicy

async def resolve(name):
    return ["127.0.0.1"]

async def request_each(urls):
    answers = []
    outbound = OutboundClient(OutboundPolicy(allowed_networks=(ipaddress.ip_network("127.0.0.1/32"),)), resolve)
    for url in urls:
        try:
            answers.append((await outbound.request("GET", url, headers={})).status)
        except OutboundError as error:
            answers.append([error.code, error.message])
    await outbound.close()
    return answers

async def main():
    had_imported = "aiohttp" in sys.modules
    answers = await request_each(sys.argv[1:])
    recorded = []
    for place in (1, 3):
        with record_phases() as recorder:
            answers += await request_each(sys.argv[place : place + 1])
        recorded.append([[one.phase, one.is_ok] for one in recorder.results])
    print(json.dumps([had_imported, *answers, recorded]))

uvloop.run(main())
"""


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    output = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *subject, *output], check=True, capture_output=True)
    return key, certificate


async def test_https_trusts_the_name_and_not_the_address(tmp_path: Path) -> None:
    """In a process of its own: the trusted certificates are read once, from the environment."""
    key, certificate = make_certificate(tmp_path, "upstream.test")
    server_names: list[str | None] = []
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    tls.sni_callback = lambda _connection, name, _context: server_names.append(name)

    def answer(request: UpstreamRequest) -> bytes:
        return OK if request.target == "/" else redirect_message(f"http://upstream.test:{upstream.port}/")

    async with serve_upstream(answer, tls=tls) as upstream:
        origin = f"https://upstream.test:{upstream.port}"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", OTHER_PROCESS),
            *(f"{origin}/", f"{origin}/down", f"https://other.test:{upstream.port}/"),
            f"https://127.0.0.1:{upstream.port}/",
            env={**os.environ, "SSL_CERT_FILE": str(certificate)},
            stdout=subprocess.PIPE,
        )
        output, _ = await process.communicate()
    had_imported, trusted, downgraded, other_name, bare_address, *again, recorded = json.loads(output)
    assert not had_imported
    assert trusted == 200
    assert again == [trusted, other_name]
    begun = [["dns", True], ["tcp", True]]
    assert recorded == [[*begun, ["tls", True]], [*begun, ["tls", False]]]
    assert downgraded[0] == OutboundRefusalCode.INSECURE_REDIRECT
    assert other_name == [
        OutboundOutageCode.NOT_CONNECTED,
        f"no trusted connection to other.test on port {upstream.port}",
    ]
    assert bare_address[0] == OutboundOutageCode.NOT_CONNECTED
    assert server_names == ["upstream.test", "other.test", None, "upstream.test", "other.test"]
    assert [request.headers["host"] for request in upstream.requests] == [
        f"upstream.test:{upstream.port}"
    ] * 3


async def test_answers_on_the_way_are_passed_over_up_to_the_final_one() -> None:
    early = b"".join(b"HTTP/1.1 %d Early\r\n\r\n" % status for status in (100, 102, 103, 199))
    async with open_client() as outbound, serve_upstream(answer_always(early + OK)) as upstream:
        response = await fetch(outbound, f"http://127.0.0.1:{upstream.port}/")
    assert (response.status, response.body) == (200, b"ok")


# ── streams ─────────────────────────────────────────────────────────────────────────────────────────────────

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


@pytest.mark.anyio
async def test_pieces_of_a_stream_arrive_before_its_end() -> None:
    may_go_on = asyncio.Event()

    async def answer() -> AsyncIterator[bytes]:
        yield STREAM_HEAD + chunk(b"first")
        await may_go_on.wait()
        yield chunk(b"last") + chunk(b"")

    async with serve_upstream(lambda _: answer()) as upstream, open_client() as outbound:
        url = f"http://127.0.0.1:{upstream.port}/"
        async with outbound.stream("POST", url, headers={}, body=b"{}", idle_seconds=5) as stream:
            pieces = aiter(stream)
            assert (stream.status, await anext(pieces)) == (200, b"first")
            may_go_on.set()
            assert [piece async for piece in pieces] == [b"last"]
    assert upstream.requests[0].body == b"{}"


@pytest.mark.anyio
@pytest.mark.parametrize(("is_read", "connections"), [(True, 1), (False, 2)])
async def test_the_connection_of_a_stream_that_has_ended_is_used_again(
    monkeypatch: pytest.MonkeyPatch, *, is_read: bool, connections: int
) -> None:
    monkeypatch.setattr(outbound_http, "KEEP_ALIVE_SECONDS", 60.0)

    async def answer() -> AsyncIterator[bytes]:
        yield STREAM_HEAD + chunk(b"first")
        if not is_read and len(upstream.requests) == 1:
            await asyncio.Event().wait()
        yield chunk(b"last") + chunk(b"")

    async with serve_upstream(lambda _: answer()) as upstream, open_client() as outbound:
        url = f"http://127.0.0.1:{upstream.port}/"
        async with outbound.stream("POST", url, headers={}, body=b"{}", idle_seconds=5) as stream:
            assert await anext(aiter(stream)) == b"first"
            if is_read:
                assert [piece async for piece in stream] == [b"last"]
        async with outbound.stream("POST", url, headers={}, body=b"{}", idle_seconds=5) as stream:
            assert b"".join([piece async for piece in stream]) == b"firstlast"
        assert (await outbound.request("POST", url, headers={}, body=b"x", timeout_seconds=5)).body
    assert upstream.connections == connections


@pytest.mark.anyio
async def test_streams_share_connections_of_one_origin_and_no_headers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbound_http, "KEEP_ALIVE_SECONDS", 60.0)
    async with (
        serve_upstream(answer_always(OK)) as first,
        serve_upstream(answer_always(OK)) as second,
        open_client() as outbound,
    ):
        for key, upstream in (("a", first), ("b", first), ("c", second)):
            url, headers = f"http://127.0.0.1:{upstream.port}/", {"Authorization": key}
            async with outbound.stream("POST", url, headers=headers, body=b"", idle_seconds=30) as stream:
                assert b"".join([piece async for piece in stream]) == b"ok"
    sent = [[request.headers["authorization"] for request in each.requests] for each in (first, second)]
    assert (sent, first.connections, second.connections) == ([["a", "b"], ["c"]], 1, 1)


@pytest.mark.anyio
async def test_a_connection_that_is_over_a_minute_old_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbound_http, "MAX_AGE_SECONDS", -1.0)
    async with serve_upstream(answer_always(OK)) as upstream, open_client() as outbound:
        for _ in range(2):
            await fetch(outbound, f"http://127.0.0.1:{upstream.port}/")
    assert upstream.connections == 2


@pytest.mark.anyio
async def test_a_connection_is_used_again_after_a_large_unread_response(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbound_http, "KEEP_ALIVE_SECONDS", 60.0)
    packed = gzip.compress(bytes(2 * MAX_UNREAD_BYTES))
    head = b"HTTP/1.1 500 No\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    async with serve_upstream(answer_always(head + packed)) as upstream, open_client() as outbound:
        url = f"http://127.0.0.1:{upstream.port}/"
        for _ in range(2):
            async with outbound.stream("POST", url, headers={}, body=b"", idle_seconds=30) as stream:
                # Complete on arrival, and far more than a stream keeps unread.
                assert stream.status == 500
        assert len((await fetch(outbound, url)).body) == 2 * MAX_UNREAD_BYTES
    assert upstream.connections == 1


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("pieces", "code"),
    [
        ([STREAM_HEAD, chunk(b"a"), b"zz\r\n"], OutboundRefusalCode.INVALID_RESPONSE),
        ([STREAM_HEAD, *[chunk(b"x" * 100_000)] * 11], OutboundRefusalCode.RESPONSE_TOO_LARGE),
    ],
)
async def test_a_stream_ends_with_the_refusal_of_its_response(
    pieces: list[bytes], code: OutboundRefusalCode
) -> None:
    async with serve_upstream(answer_always(b"".join(pieces))) as upstream, open_client(SMALL) as outbound:
        url = f"http://127.0.0.1:{upstream.port}/"
        with pytest.raises(OutboundRefused) as refused:
            async with outbound.stream("POST", url, headers={}, body=b"", idle_seconds=5) as stream:
                _ = [piece async for piece in stream]
    assert refused.value.code == code


@pytest.mark.anyio
async def test_a_stream_that_pauses_for_too_long_has_timed_out() -> None:
    async def answer() -> AsyncIterator[bytes]:
        yield STREAM_HEAD + chunk(b"first")
        await asyncio.Event().wait()

    async with serve_upstream(lambda _: answer()) as upstream, open_client() as outbound:
        url = f"http://127.0.0.1:{upstream.port}/"
        with pytest.raises(OutboundUnavailable) as missing:
            async with outbound.stream("POST", url, headers={}, body=b"", idle_seconds=0.2) as stream:
                assert [piece async for piece in stream] == [b"first"]
    assert missing.value.code == OutboundOutageCode.TIMED_OUT


@pytest.mark.anyio
@pytest.mark.parametrize("sent", [b"", STREAM_HEAD + chunk(b"first")])
async def test_a_stream_that_breaks_off_is_interrupted(sent: bytes) -> None:
    async def answer() -> AsyncIterator[bytes]:
        yield sent
        raise ConnectionError

    async with serve_upstream(lambda _: answer()) as upstream, open_client() as outbound:
        url = f"http://127.0.0.1:{upstream.port}/"
        with pytest.raises(OutboundUnavailable) as missing:
            async with outbound.stream("POST", url, headers={}, body=b"", idle_seconds=5) as stream:
                _ = [piece async for piece in stream]
    assert missing.value.code == OutboundOutageCode.INTERRUPTED


@pytest.mark.anyio
async def test_a_slow_reader_slows_the_sender_of_a_stream() -> None:
    sent = 0

    async def answer() -> AsyncIterator[bytes]:
        nonlocal sent
        yield STREAM_HEAD
        for _ in range(80):
            yield chunk(b"x" * 100_000)
            sent += 100_000
        yield chunk(b"")

    async with serve_upstream(lambda _: answer()) as upstream, open_client() as outbound:
        url = f"http://127.0.0.1:{upstream.port}/"
        async with outbound.stream("POST", url, headers={}, body=b"", idle_seconds=5) as stream:
            await asyncio.sleep(0.5)  # time in which an unhindered sender would send all of it
            assert sent < 8_000_000
            assert sum([len(piece) async for piece in stream]) == 8_000_000


@pytest.mark.anyio
async def test_a_stream_follows_no_redirect_and_reaches_only_allowed_hosts() -> None:
    redirect = http_message("307 Temporary Redirect\r\nLocation: http://127.0.0.1:1/")
    async with serve_upstream(answer_always(redirect)) as upstream:
        url = f"http://127.0.0.1:{upstream.port}/"
        named = OutboundPolicy(allowed_hosts=frozenset({f"127.0.0.1:{upstream.port}"}))
        async with (
            open_client(named) as outbound,
            outbound.stream("POST", url, headers={}, body=b"", idle_seconds=5) as stream,
        ):
            assert stream.status == 307
        other = OutboundPolicy(allowed_hosts=frozenset({f"127.0.0.1:{upstream.port + 1}", "localhost"}))
        async with open_client(other) as outbound:
            with pytest.raises(OutboundRefused):
                async with outbound.stream("POST", url, headers={}, body=b"", idle_seconds=5):
                    pass
