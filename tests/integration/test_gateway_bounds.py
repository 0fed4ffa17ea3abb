"""Limits of the gateway process: no client exhausts the memory or the connections of others."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
from prometheus_client import REGISTRY
from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from gateway import main
from gateway.http import connection_budget
from gateway.http.byte_budget import UNCOUNTED_BYTES, ByteBudget, ByteHolding
from gateway.http.connection_budget import (
    SPENT_PART,
    ClientConnectionPhase,
    ConnectionBudget,
    connections_for,
)
from gateway.http.edge import EdgeLayer
from gateway.http.proxies import TrustedProxies
from gateway.http.request_origin import client_of
from gateway.settings import GatewaySettings
from models.settings import InvalidSettings
from tests.integration.gateway_harness import SECRET
from tests.integration.gateway_server import KEY, Address, RawConnection, listen, serve_gateway

LOCAL = ["127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"]
"""Addresses of this machine that are no trusted proxies."""
MEGABYTE = 1_000_000
CONNECTIONS = 12


def upload(size: int) -> str:
    return (
        f"POST /api/v1/workflows HTTP/1.1\nHost: x\nX-API-Key: {KEY}\nContent-Type: application/json\n"
        f"Content-Length: {size}"
    )


WORKFLOW = b'{"name": "A workflow", "description": ""}'


@contextmanager
def close_connections(connections: list[RawConnection]) -> Iterator[list[RawConnection]]:
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


# ── bytes of bodies ─────────────────────────────────────────────────────────────────────────────────────────


async def test_unfinished_bodies_of_one_client_take_no_room_from_others(tmp_path: Path) -> None:
    largest = dict.fromkeys(("max_body_bytes", "max_mail_bytes", "max_hook_bytes"), MEGABYTE)
    bounds = {**largest, "max_bodies_bytes": 2 * MEGABYTE}
    async with serve_gateway(tmp_path, **bounds) as address:
        with close_connections([await RawConnection.open(address, LOCAL[0]) for _ in range(8)]) as greedy:
            for connection in greedy:
                await connection.send(upload(900_000), b" " * 800_000)
            refused = [asyncio.create_task(connection.answer()) for connection in greedy]
            done, waiting = await asyncio.wait(refused, timeout=60, return_when=asyncio.FIRST_COMPLETED)
            while len(waiting) > 1:  # half of the budget is one such body
                done, waiting = await asyncio.wait(waiting, timeout=60, return_when=asyncio.FIRST_COMPLETED)
                assert done
            for one in set(refused) - waiting:
                status, headers = one.result()
                assert (status, headers["retry-after"]) == (503, "1")
            other = await RawConnection.open(address, LOCAL[1])
            await other.send(upload(900_000), WORKFLOW.ljust(900_000))
            assert (await other.answer())[0] == 201
            assert not next(iter(waiting)).done()
            for one in waiting:
                one.cancel()
            other.close()


def test_the_slowest_body_of_the_largest_client_is_evicted_first() -> None:
    given_up: list[str] = []
    budget = ByteBudget(10 * UNCOUNTED_BYTES, share_bytes=10 * UNCOUNTED_BYTES)

    def holding(client: str, age: float) -> ByteHolding:
        made = ByteHolding(budget, client, lambda: given_up.append(f"{client} {age}"))
        made.since -= age
        return made

    greedy = [holding("greedy", age) for age in (1.0, 9.0, 5.0)]
    assert all(one.add(2 * UNCOUNTED_BYTES) for one in greedy)
    finished = holding("finished", 100.0)
    assert finished.add(3 * UNCOUNTED_BYTES)
    finished.is_moving = False
    modest = holding("modest", 50.0)
    assert modest.add(UNCOUNTED_BYTES)  # so little is not even counted
    assert modest.add(UNCOUNTED_BYTES)
    assert given_up == ["greedy 9.0"]
    assert not greedy[1].add(1)
    for one in (*greedy, finished, modest):
        one.release()
    assert budget.used == 0
    assert holding("late", 0.0).add(10 * UNCOUNTED_BYTES)


def test_a_budget_below_the_largest_body_refuses_no_request() -> None:
    with pytest.raises(InvalidSettings, match="PILOTFLAME_MAX_BODIES_BYTES"):
        main.bounds_of(GatewaySettings(max_bodies_bytes=MEGABYTE))


# ── connections ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_idle_and_slow_connections_make_room_for_those_that_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_budget, "IDLE_SECONDS", 0.0)
    async with serve_gateway(tmp_path, max_connections=CONNECTIONS) as address:
        kept = await RawConnection.open(address, LOCAL[1])
        assert await kept.ask("/healthz") == 200
        idle = [await RawConnection.open(address, LOCAL[0]) for _ in range(CONNECTIONS // 2)]
        slow = [await RawConnection.open(address, LOCAL[0]) for _ in range(CONNECTIONS)]
        with close_connections([kept, *idle, *slow]):
            for connection in slow:
                with suppress(ConnectionError):  # others have taken its place
                    await connection.send(upload(1_000), b"{")
            for _ in range(CONNECTIONS * 2):
                newcomer = await RawConnection.open(address, LOCAL[2])
                assert await newcomer.ask("/api/v1/auth/whoami") == 200
                newcomer.close()
            await idle[0].until_closed()
            # Connections of the client with the most go first, so a client with a single connection keeps it.
            assert await kept.ask("/healthz") == 200


@dataclass(eq=False)
class FakeConnection:
    """Connection in a phase that the test chooses."""

    client_key: str
    phase: ClientConnectionPhase
    since: float = 0.0
    is_cut: bool = False

    def cut(self) -> None:
        self.is_cut = True


def test_the_least_valuable_connections_are_closed_first() -> None:
    idle, slow, read, served = (
        ClientConnectionPhase.IDLE,
        ClientConnectionPhase.WAITING_FOR_CLIENT,
        ClientConnectionPhase.READING,
        ClientConnectionPhase.SERVED,
    )
    in_order = [
        FakeConnection("many", idle, since=2),
        FakeConnection("many", idle, since=3),
        FakeConnection("many", slow, since=1),
        FakeConnection("few", idle, since=4),
        FakeConnection("few", slow, since=5),
        FakeConnection("many", read, since=6),
    ]
    stay = [*(FakeConnection("many", served) for _ in range(10)), FakeConnection("few", read)]
    budget = ConnectionBudget(len(in_order) + len(stay))
    for connection in (*reversed(in_order), *stay):
        assert budget.admit(connection)
    for number in range(len(in_order)):
        assert [one.is_cut for one in in_order] == [True] * number + [False] * (len(in_order) - number)
        assert budget.admit(FakeConnection("", served))
    assert not budget.is_over
    assert all(one.is_cut for one in in_order)
    for _ in range(2):  # in the reserve, to get a refusal with the reason
        assert budget.admit(FakeConnection("", served))
    assert budget.is_over
    assert not budget.admit(FakeConnection("", served))
    assert not any(one.is_cut for one in stay)


async def test_polls_of_one_client_leave_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_budget, "READ_SECONDS", 0.0)
    async with serve_polled(tmp_path) as address:
        with close_connections([]) as polls:
            while True:
                poll = await RawConnection.open(address, LOCAL[0])
                polls.append(poll)
                await poll.send("GET /poll HTTP/1.1\nHost: x")
                if len(polls) > CONNECTIONS // 2:
                    # Half of the connections, and no more: the rest is for other clients.
                    status, headers = await poll.answer()
                    assert (status, headers["retry-after"]) == (503, "1")
                    break
            for source in LOCAL[1:]:
                for _ in range(CONNECTIONS // 3):
                    polls.append(await RawConnection.open(address, source))
                    await polls[-1].send("GET /poll HTTP/1.1\nHost: x")
            newcomer = await RawConnection.open(address, "127.0.0.9")
            polls.append(newcomer)
            assert await newcomer.ask("/now") == 200
            await polls[0].until_closed()


async def test_pods_and_probes_are_served_where_all_connections_are_taken(tmp_path: Path) -> None:
    async with serve_polled(tmp_path) as address:
        with close_connections([]) as polls:
            for number in range(CONNECTIONS + 1):
                polls.append(await RawConnection.open(address, LOCAL[number % 4]))
                await polls[-1].send("POST /poll HTTP/1.1\nHost: x\nContent-Length: 0")
            status, headers = await polls[-1].answer()
            assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
            for path in ("/healthz", "/internal/v1/wait"):
                connection = await RawConnection.open(address, LOCAL[3])
                assert await connection.ask(path) == 200
                connection.close()
            polls[0].close()
            polls[1].close()
            while True:
                connection = await RawConnection.open(address, LOCAL[3])
                status = await connection.ask("/now")
                connection.close()
                if status == 200:
                    break


@asynccontextmanager
async def serve_polled(folder: Path) -> AsyncIterator[Address]:
    """Run a server with an endpoint that does not answer."""

    async def poll(request: Request) -> Response:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        return PlainTextResponse("gone")

    async def now(_request: Request) -> Response:
        return PlainTextResponse("now")

    routes = [Route(path, now) for path in ("/now", "/healthz", "/internal/v1/wait")]
    app = bare_application(Route("/poll", poll, methods=["GET", "POST"]), *routes)
    async with listen(app, make_settings(folder, max_connections=CONNECTIONS)) as address:
        yield address


# ── times ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_client_that_does_not_take_its_answer_is_cut_off(tmp_path: Path) -> None:
    async def large(_request: Request) -> Response:
        return PlainTextResponse("x" * 32 * MEGABYTE)

    before = _count_closed("answer-not-taken")
    app = bare_application(Route("/large", large))
    async with listen(app, make_settings(tmp_path, stall_seconds=0.2)) as address:
        with socket.create_connection(address) as reader:
            reader.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(60):
                while _count_closed("answer-not-taken") == before:  # noqa: ASYNC110 - a count has no event
                    await asyncio.sleep(0.01)
            assert len(await asyncio.to_thread(_read_rest, reader)) < 32 * MEGABYTE


def _count_closed(reason: str) -> float:
    """Return how many connections were closed for a reason."""
    return REGISTRY.get_sample_value("pilotflame_connections_closed_total", {"reason": reason}) or 0.0


def _read_rest(reader: socket.socket) -> bytes:
    reader.settimeout(60)
    rest = b""
    try:
        while chunk := reader.recv(MEGABYTE):
            rest += chunk
    except ConnectionError:
        pass
    return rest


def bare_application(*routes: Route) -> ASGIApp:
    """Return an application behind the layer with the limits, without a gateway's state."""
    router = Router(routes)
    return EdgeLayer(router, others=router)


def make_settings(folder: Path, **values: Any) -> GatewaySettings:  # noqa: ANN401 - values of settings
    return GatewaySettings(data_dir=folder, secret_key=SecretStr(SECRET), **values)


# ── identity of clients ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1%eth0", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("no:address", "no:address"),
        ("", ""),
    ],
)
def test_a_network_of_one_ipv6_host_is_one_client(address: str, client: str) -> None:
    assert client_of(address) == client


async def test_a_forwarded_address_is_believed_to_a_trusted_proxy_alone() -> None:
    forwarded = [(b"host", b"x"), (b"x-forwarded-for", b"192.0.2.1, 198.51.100.7")]
    proxies = TrustedProxies("localhost, 203.0.113.9, 203.0.113.77/28")
    await proxies.resolve()
    for peer in ("127.0.0.1", "203.0.113.9", "203.0.113.70"):
        assert proxies.client((peer, 1), forwarded) == ("198.51.100.7", 0)
        assert proxies.client((peer, 1), [(b"host", b"x")]) == (peer, 1)
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            assert proxies.client(("192.0.2.66", 1), forwarded) == ("192.0.2.66", 1)
    (warning,) = logs
    assert (warning["log_level"], warning["peer"]) == ("warning", "192.0.2.66")
    assert "PILOTFLAME_TRUSTED_PROXIES" in warning["event"]


@pytest.mark.parametrize(
    ("named", "warnings"), [("*", 1), ("10.0.0.0/8, 10.1.1.1", 1), ("10.1.1.1,proxy,10.2.0.0/28", 0)]
)
def test_a_whole_network_of_trusted_proxies_is_warned_of(named: str, warnings: int) -> None:
    with structlog.testing.capture_logs() as logs:
        TrustedProxies(named)
    assert len(logs) == warnings


async def test_clients_behind_a_trusted_proxy_have_bounds_of_their_own(tmp_path: Path) -> None:
    async with serve_polled(tmp_path) as address:
        with close_connections([]) as polls:
            for _ in range(CONNECTIONS // 2 + 1):
                polls.append(await RawConnection.open(address))  # from a trusted proxy
                await polls[-1].send("GET /poll HTTP/1.1\nHost: x\nX-Forwarded-For: 192.0.2.1")
            assert (await polls[-1].answer())[0] == 503
            polls.append(await RawConnection.open(address))
            await polls[-1].send("GET /now HTTP/1.1\nHost: x\nX-Forwarded-For: 192.0.2.2")
            assert (await polls[-1].answer())[0] == 200


def test_connections_leave_descriptors_for_everything_else() -> None:
    for descriptors in (64, 256, 1_024, 1_000_000):
        connections = connections_for(descriptors)
        assert 1 <= connections + connections // 10 <= descriptors * SPENT_PART
