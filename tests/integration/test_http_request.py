import json
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any

import anyio
import pytest
from aiohttp import web

from engine.run_errors import NodeError
from engine.services import (
    DataSourceService,
    MailServerService,
    ObjectBucket,
    RunCaller,
    SqlDatabase,
    ToolServerService,
)
from engine.values import Json
from nodes import catalog
from nodes.outbound_http import OutboundClient, OutboundPolicy
from tests.node_calls import CALLER, call

pytestmark = pytest.mark.anyio

EXAMPLE_HOST = "https://api.example.com"
EXAMPLES = catalog.load_catalog().get("http-request").examples


class RecordingServer:
    """HTTP server on this machine that records its requests, and answers by their path."""

    def __init__(self) -> None:
        self.requests: list[web.Request] = []
        self.bodies: list[bytes] = []
        self.url = ""
        self.ends = anyio.Event()
        self.outbound = OutboundClient(OutboundPolicy(allowed_networks=(ip_network("127.0.0.1/32"),)))

    async def output(
        self, config: dict[str, Json], data: Json = None, *, data_sources: DataSourceService | None = None
    ) -> dict[str, Any]:
        called = await call("http-request", config, data, http=self.outbound, data_sources=data_sources)
        output = called.output
        assert isinstance(output, dict)
        return output

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.bodies.append(await request.read())
        if request.path == "/slow":
            await self.ends.wait()
        return await ANSWERS[request.path](request)


async def serve_cities(request: web.Request) -> web.Response:
    assert request.query == {"country": "NO", "limit": "2"}
    return web.Response(
        body=b'[{"name":"Oslo"},{"name":"Bergen"}]', headers={"content-type": "application/json"}
    )


async def serve_orders(request: web.Request) -> web.Response:
    body = json.dumps({"accepted": await request.json()}).encode()
    return web.Response(status=201, body=body, headers={"content-type": "application/json"})


async def serve_status(request: web.Request) -> web.Response:
    return web.Response(status=int(request.query["status"]), text="out of\n  order " + "x" * 300)


async def serve_raw(request: web.Request) -> web.Response:
    headers = {"content-type": request.query["type"]} if "type" in request.query else {}
    return web.Response(body=bytes.fromhex(request.query.get("hex", "")), headers=headers)


async def serve_echo(request: web.Request) -> web.Response:
    said = dict(request.headers)
    status = int(request.query.get("status", "200"))
    login = said.get("Authorization", "").removeprefix("Basic ")
    try:
        decoded = b64decode(login, validate=True).decode()
    except ValueError:
        decoded = ""
    return web.json_response({**said, "decoded": decoded}, status=status, headers={"X-Said": login})


async def serve_redirect(_request: web.Request) -> web.Response:
    raise web.HTTPFound("/raw?hex=6869")


async def serve_redirect_to_404(_request: web.Request) -> web.Response:
    raise web.HTTPFound("/status?status=404")


ANSWERS: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
    "/cities": serve_cities,
    "/orders": serve_orders,
    "/status": serve_status,
    "/raw": serve_raw,
    "/moved": serve_redirect,
    "/gone/bot123456:AAH3kZ9/send": serve_redirect_to_404,
    "/echo": serve_echo,
    "/slow": serve_raw,
}


@pytest.fixture
async def server() -> AsyncIterator[RecordingServer]:
    running = RecordingServer()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", running.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    running.url = f"http://{host}:{port}"
    yield running
    running.ends.set()
    await running.outbound.close()
    await runner.cleanup()


@pytest.mark.parametrize("example", EXAMPLES)
async def test_every_example_of_the_catalogue_comes_true(
    server: RecordingServer, example: dict[str, Any]
) -> None:
    here = json.loads(json.dumps(example).replace(EXAMPLE_HOST, server.url))
    output = await server.output(here["config"], here["input"])
    assert {**output, "headers": here["output"]["headers"]} == here["output"]
    assert here["output"]["headers"].items() <= output["headers"].items()


async def test_a_write_carries_the_same_key_on_every_attempt(server: RecordingServer) -> None:
    config: dict[str, Json] = {"url": f"{server.url}/orders", "method": "POST", "body": {"a": 1}}
    await server.output(config)
    await server.output(config)
    assert [request.headers["Idempotency-Key"] for request in server.requests] == [
        "exec:node:0",
        "exec:node:0",
    ]


async def test_a_key_of_the_users_own_is_left_alone_and_a_read_has_none(server: RecordingServer) -> None:
    url = f"{server.url}/status?status=200"
    await server.output({"url": url, "method": "DELETE", "headers": {"idempotency-key": "mine"}})
    await server.output({"url": url})
    sent = [request.headers.getall("Idempotency-Key", []) for request in server.requests]
    assert sent == [["mine"], []]


@pytest.mark.parametrize(
    ("body", "headers", "sent", "content_type"),
    [
        ("æ", {}, "æ".encode(), "text/plain; charset=utf-8"),
        ({"a": [1, None]}, {}, b'{"a":[1,null]}', "application/json"),
        (0, {}, b"0", "application/json"),
        (
            "a=1",
            {"content-type": "application/x-www-form-urlencoded"},
            b"a=1",
            "application/x-www-form-urlencoded",
        ),
        (None, {}, b"", None),
    ],
)
async def test_a_body_is_sent_with_the_media_type_of_its_value(
    server: RecordingServer, body: Json, headers: dict[str, Json], sent: bytes, content_type: str | None
) -> None:
    url = f"{server.url}/status?status=200"
    await server.output({"url": url, "method": "PUT", "headers": headers, "body": "{{ data }}"}, body)
    assert server.bodies == [sent]
    assert server.requests[0].headers.get("Content-Type") == content_type


async def test_parameters_and_headers_are_added_to_those_of_the_address(server: RecordingServer) -> None:
    await server.output(
        {
            "url": f"{server.url}/status?status=200#part",
            "query": {"q": "a&b=ü", "n": 1.5, "yes": True, "none": None, "many": ["x", "y"]},
            "headers": {"X-Number": 7, "X-None": "{{ data.nothing }}"},
        }
    )
    (request,) = server.requests
    assert [*request.query.items()] == [
        ("status", "200"), ("q", "a&b=ü"), ("n", "1.5"), ("yes", "true"), ("many", "x"), ("many", "y"),
    ]  # fmt: skip
    assert request.headers["X-Number"] == "7"
    assert "X-None" not in request.headers


@pytest.mark.parametrize(
    ("response_type", "content_type", "raw", "body"),
    [
        ("auto", "application/json", b'{"a":1}', {"a": 1}),
        ("auto", "application/problem+json; charset=utf-8", b'\xef\xbb\xbf{"a":1}', {"a": 1}),
        ("auto", "application/json", b'{"a":1,"a":2}', '{"a":1,"a":2}'),
        ("auto", "application/json", b"", None),
        ("auto", "text/plain", b'{"a":1}', '{"a":1}'),
        ("auto", "text/html; charset=ISO-8859-1", b"\xfc", "ü"),
        ("auto", "text/plain; charset=punycode", "ü".encode(), "ü"),
        ("auto", "image/png", b"\x89PNG", "iVBORw=="),
        ("auto", "text/plain", b"a\0b", "YQBi"),
        ("json", "text/plain", b"[1]", [1]),
        ("json", "application/json", b"", None),
        ("text", "application/json", b"[1]", "[1]"),
        ("text", "text/plain", b"a\0\xff", "a\ufffd\ufffd"),
        ("base64", "text/plain", b"abc", "YWJj"),
    ],
)
async def test_an_answer_becomes(
    server: RecordingServer, response_type: str, content_type: str, raw: bytes, body: Json
) -> None:
    config: dict[str, Json] = {
        "url": f"{server.url}/raw",
        "query": {"type": content_type, "hex": raw.hex()},
        "responseType": response_type,
    }
    output = await server.output(config)
    assert output["body"] == body


async def test_an_answer_that_should_be_json_and_is_not_fails_the_node(server: RecordingServer) -> None:
    with pytest.raises(
        NodeError, match=r"^GET http://.*/raw\?hex=…: The response is not valid JSON"
    ) as raised:
        await server.output({"url": f"{server.url}/raw?hex=7b", "responseType": "json"})
    assert (raised.value.code, raised.value.retryable) == ("invalid-response", False)


@pytest.mark.parametrize(
    ("answered", "retryable"),
    [
        (400, False),
        (404, False),
        (408, True),
        (425, True),
        (429, True),
        (499, False),
        (500, True),
        (503, True),
    ],
)
async def test_an_error_is_worth_another_attempt_if_it_may_pass(
    server: RecordingServer, answered: int, *, retryable: bool
) -> None:
    with pytest.raises(NodeError) as raised:
        await server.output({"url": f"{server.url}/status?status={answered}&key=s3cret"})
    assert (raised.value.code, raised.value.retryable) == (f"http-{answered}", retryable)
    request = f"GET {server.url}/status?status=…&key=…"
    assert raised.value.message.startswith(f"{request}: The answer was {answered}")
    assert "out of order" in raised.value.message
    assert len(raised.value.message) < 350
    assert "s3cret" not in raised.value.message


async def test_an_error_behind_a_redirect_names_both_urls_and_no_secret_of_either(
    server: RecordingServer,
) -> None:
    with pytest.raises(NodeError) as raised:
        await server.output({"url": f"{server.url}/gone/bot123456:AAH3kZ9/send?token=s3cret"})
    first, last = f"{server.url}/gone/…/send?token=…", f"{server.url}/status?status=…"
    assert raised.value.message.startswith(f"GET {first}: The answer of {last} was 404 Not Found")
    assert raised.value.request == ("GET", first)


async def test_an_error_may_be_taken_as_an_answer(server: RecordingServer) -> None:
    output = await server.output({"url": f"{server.url}/status?status=404", "failOnError": False})
    assert output["status"] == 404


async def test_redirects_are_followed_unless_told_otherwise(server: RecordingServer) -> None:
    followed = await server.output({"url": f"{server.url}/moved"})
    assert (followed["status"], followed["body"], followed["url"]) == (
        200,
        "hi",
        f"{server.url}/raw?hex=6869",
    )
    told = await server.output({"url": f"{server.url}/moved", "followRedirects": False})
    assert (told["status"], told["url"]) == (302, f"{server.url}/moved")


async def test_an_answer_that_does_not_come_is_worth_another_attempt(server: RecordingServer) -> None:
    with pytest.raises(NodeError, match="No complete response") as raised:
        await server.output({"url": f"{server.url}/slow", "timeoutSeconds": 0.1})
    assert (raised.value.code, raised.value.retryable) == ("timed-out", True)


async def test_a_refused_connection_is_retried(server: RecordingServer, free_tcp_port: int) -> None:
    with pytest.raises(NodeError, match=f"POST http://127.0.0.1:{free_tcp_port}/: No connection") as raised:
        await server.output({"url": f"http://127.0.0.1:{free_tcp_port}/", "method": "POST"})
    assert (raised.value.code, raised.value.retryable) == ("not-connected", True)


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"url": "http://127.0.0.2/"}, "address-not-allowed"),
        ({"url": "ftp://example.com/"}, "invalid-url"),
        ({"url": "http://127.0.0.1/", "headers": {"Host": "example.com"}}, "invalid-request"),
        ({"url": "http://127.0.0.1/", "headers": {"X-A": "a\r\nX-B: b"}}, "invalid-request"),
        ({"url": "http://127.0.0.1/", "method": "{{ data }}"}, "invalid-config"),
        ({"url": "http://127.0.0.1/", "timeoutSeconds": "{{ data }}"}, "invalid-config"),
        ({"url": "{{ data.nothing }}"}, "invalid-config"),
    ],
)
async def test_refused_callbacks_are_never_retried(
    server: RecordingServer, config: dict[str, Json], code: str
) -> None:
    with pytest.raises(NodeError) as raised:
        await server.output(config, "TRACE")
    assert (raised.value.code, raised.value.retryable) == (code, False)
    assert server.requests == []


# ── with a data source ──────────────────────────────────────────────────────────────────────────────────────


@dataclass
class HeaderDataSources:
    """Data sources of a user: each id gives the headers of its name."""

    added: dict[str, str]
    asked: list[tuple[str, str]] = field(default_factory=list)

    async def headers(self, caller: RunCaller, source_id: str, url: str) -> dict[str, str]:
        assert caller is CALLER
        self.asked.append((source_id, url))
        return self.added

    async def database(self, caller: RunCaller, source_id: str, type: str) -> SqlDatabase:  # noqa: A002 - the protocol's own word
        raise AssertionError((caller, source_id, type))

    async def bucket(self, caller: RunCaller, source_id: str) -> ObjectBucket:
        raise AssertionError((caller, source_id))

    async def mail_server(self, caller: RunCaller, source_id: str) -> MailServerService:
        raise AssertionError((caller, source_id))

    async def tool_server(self, caller: RunCaller, source_id: str) -> ToolServerService:
        raise AssertionError((caller, source_id))


async def test_a_data_source_adds_its_header_in_the_place_of_one_of_the_same_name(
    server: RecordingServer,
) -> None:
    sources = HeaderDataSources({"Authorization": "Bearer of-the-source"})
    config: dict[str, Json] = {
        "url": f"{server.url}/echo",
        "query": {"a": 1},
        "dataSource": "ds_1",
        "headers": {"authorization": "Bearer mine", "X-Other": "mine"},
    }
    output = await server.output(config, data_sources=sources)
    (request,) = server.requests
    assert request.headers.getall("Authorization") == ["Bearer of-the-source"]
    assert request.headers["X-Other"] == "mine"
    assert sources.asked == [("ds_1", f"{server.url}/echo?a=1")]
    assert output["body"]["X-Other"] == "mine"


@pytest.mark.parametrize(
    ("value", "secrets"),
    [
        ("Bearer t0p-s3cret", ["t0p-s3cret"]),
        ("a key with 'spaces'", ["a key with 'spaces'"]),
        ('quoted"\\key', ['quoted"\\key', 'quoted\\"\\\\key']),
        (
            f"Basic {b64encode(b'ada:p4ss w0rd').decode()}",
            ["p4ss w0rd", b64encode(b"ada:p4ss w0rd").decode()],
        ),
    ],
)
async def test_an_answer_that_repeats_a_secret_is_given_without_it(
    server: RecordingServer, value: str, secrets: list[str]
) -> None:
    sources = HeaderDataSources({"Authorization": value})
    config: dict[str, Json] = {"url": f"{server.url}/echo", "dataSource": "ds_1"}
    output = await server.output(config, data_sources=sources)
    shown = json.dumps(output)
    assert "[hidden]" in output["body"]["Authorization"]
    assert "[hidden]" in output["headers"]["x-said"]
    with pytest.raises(NodeError) as raised:
        await server.output({**config, "query": {"status": 401}}, data_sources=sources)
    assert "[hidden]" in raised.value.message
    assert [secret for secret in secrets if secret in shown + raised.value.message] == []
