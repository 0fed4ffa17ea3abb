"""Connection of a worker for claims and reports: kept while the server keeps it, and with the errors of the client."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from pilotflame_sdk import APIError, TransportError
from pilotflame_sdk.transport import Transport
from pilotflame_sdk.worker_connection import WorkerConnection, connect

from tests.command_runs import PATIENCE_SECONDS

KEPT = b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n"
CLOSED = b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\nconnection: close\r\n\r\n"
CHUNKED = b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n8\r\n{"n": 4}\r\n0\r\n\r\n'
REFUSED = (
    b'HTTP/1.1 409 Conflict\r\ncontent-length: 50\r\n\r\n{"error":{"code":"worker-stopped","message":"no"}}'
)
TOO_LARGE = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 2\r\n\r\n{}"
LARGE = "a" * 16_000_000
"""More than the buffers of a connection hold."""


class ScriptedTcpServer:
    """Server that answers the requests of each connection with given bytes, and then closes it."""

    def __init__(self, script: Sequence[Sequence[bytes]]) -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/base"
        self.requests: list[bytes] = []
        self.closed = [threading.Event() for _ in script]
        self.thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        for answers, closed in zip(self._script, self.closed, strict=True):
            connection, _ = self._listener.accept()
            for answer in answers:
                self.requests.append(connection.recv(65_536))
                connection.sendall(answer)
            connection.close()
            closed.set()
        self._listener.close()


@contextmanager
def serving(*script: Sequence[bytes]) -> Iterator[ScriptedTcpServer]:
    server = ScriptedTcpServer(script)
    server.thread.start()
    yield server
    server.thread.join(PATIENCE_SECONDS)
    assert not server.thread.is_alive(), "not all scripted connections were opened"


def test_a_connection_is_kept_and_opened_anew_after_the_server_has_closed_it() -> None:
    with (
        serving([KEPT + b'{"n": 1}', KEPT + b'{"n": 2}'], [CLOSED + b'{"n": 3}'], [CHUNKED]) as server,
        WorkerConnection(server.url, "sk-1") as connection,
    ):
        assert connection.request("POST", "/claim", json={}) == {"n": 1}
        assert connection.request("POST", "/claim", json={}) == {"n": 2}
        assert server.closed[0].wait(PATIENCE_SECONDS)
        assert connection.request("POST", "/claim", json={}) == {"n": 3}
        assert connection.request("POST", "/report", json={"held": []}) == {"n": 4}
    sent = server.requests[-1]
    assert sent.startswith(b"POST /base/report HTTP/1.1\r\n")
    assert b"X-API-Key: sk-1\r\n" in sent
    assert sent.endswith(b'Content-Length: 11\r\n\r\n{"held":[]}')


def test_refusals_and_lost_answers_are_errors_and_leave_the_connection_usable() -> None:
    with (
        serving([REFUSED, b"HTTP/1.1 200 OK\r\ncontent-length: 90\r\n\r\n{"], [KEPT + b"no JSON!"]) as server,
        WorkerConnection(server.url, "sk-1") as connection,
    ):
        with pytest.raises(APIError) as refused:
            connection.request("POST", "/claim", json={})
        assert (refused.value.status, refused.value.code) == (409, "worker-stopped")
        with pytest.raises(TransportError, match="No Pilotflame server answers"):
            connection.request("POST", "/claim", json={})
        with pytest.raises(TransportError, match="is not Pilotflame"):
            connection.request("POST", "/claim", json={})
    with pytest.raises(TransportError, match="No Pilotflame server answers"):
        connection.request("POST", "/claim", json={})


def test_a_refusal_that_comes_before_the_end_of_the_request_is_no_lost_answer() -> None:
    with (
        serving([TOO_LARGE], [KEPT + b'{"n": 1}']) as server,
        WorkerConnection(server.url, "sk-1") as connection,
    ):
        with pytest.raises(APIError) as refused:
            connection.request("POST", "/report", json={"output": LARGE})
        assert refused.value.status == 413
        assert connection.request("POST", "/report", json={}) == {"n": 1}


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://[2001:db8::1]", ("2001:db8::1", 80)),
        ("https://[2001:db8::1]/base", ("2001:db8::1", 443)),
        ("http://[::1]:8000", ("::1", 8000)),
    ],
)
def test_the_address_of_a_url_is_connected(
    monkeypatch: pytest.MonkeyPatch, url: str, address: tuple[str, int]
) -> None:
    connected = []

    def refuse(given: tuple[str, int], *_: object) -> None:
        connected.append(given)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(TransportError), WorkerConnection(url, "sk-1") as connection:
        connection.request("POST", "/claim", json={})
    assert connected == [address]


def test_a_name_that_no_host_can_have_is_a_server_that_does_not_answer() -> None:
    with (
        pytest.raises(TransportError, match="No Pilotflame server answers"),
        WorkerConnection(f"http://{'a' * 64}.example", "sk-1") as connection,
    ):
        connection.request("POST", "/claim", json={})


def test_requests_through_a_proxy_and_repeated_ones_are_left_to_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    assert isinstance(connect("http://flows.example", "sk-1", 0.0), WorkerConnection)
    assert isinstance(connect("https://127.0.0.1:8000", "sk-1", 0.0), WorkerConnection)
    for url, retry_seconds in (("https://flows.example", 0.0), ("http://127.0.0.1:8000", 30.0)):
        with connect(url, "sk-1", retry_seconds) as connection:
            assert isinstance(connection, Transport)
