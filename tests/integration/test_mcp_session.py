"""Sessions with tool servers: versions, pages, calls, faults, and keys that stay hidden."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import pytest

from engine.run_errors import NodeError
from engine.run_records import UNKNOWN_OUTCOMES
from nodes.mcp import mcp_session, tool_results
from nodes.mcp.mcp_session import McpSession, ToolServerAddress
from nodes.mcp.tool_definitions import read_definition
from tests.fakes.mcp_server import HANDSHAKES, KEY, STATELESS, McpFault, McpServer, build_tool, serve_tools

if TYPE_CHECKING:
    from engine.values import Json

pytestmark = pytest.mark.anyio

LOOPBACK = (ip_network("127.0.0.1/32"),)
BOTH_ERAS = pytest.mark.parametrize(
    "versions", [(STATELESS,), HANDSHAKES[:1]], ids=["stateless", "handshake"]
)


@asynccontextmanager
async def open_mcp(
    served: McpServer, *, key: str = KEY, version: str | None = None
) -> AsyncGenerator[McpSession]:
    outbound = mcp_session.open_outbound(LOOPBACK, ())
    try:
        address = ToolServerAddress(served.url, key)
        async with mcp_session.open_session(outbound, address, version=version) as session:
            yield session
    finally:
        await outbound.close()


async def call(served: McpServer, text: str = "milk") -> dict[str, Json]:
    async with open_mcp(served) as session:
        tool = read_definition(served.tools[0])
        result = await session.call_tool(tool, {"text": text}, idempotency_key="exec:node:1")
        return tool_results.read_result(result)


async def call_failing(served: McpServer) -> NodeError:
    with pytest.raises(NodeError) as caught:
        await call(served)
    assert KEY not in str(caught.value), "the key stays hidden"
    return caught.value


@pytest.mark.parametrize("streams", [False, True], ids=["json", "events"])
@BOTH_ERAS
async def test_tools_are_listed_and_called(versions: tuple[str, ...], *, streams: bool) -> None:
    tools = [build_tool(f"tool-{number}") for number in range(5)]
    async with serve_tools(versions=versions, streams=streams, tools=tools, page_size=2) as served:
        async with open_mcp(served) as session:
            listed = await session.list_tools()
            result = await session.call_tool(listed[3], {"text": "milk"}, idempotency_key="k1")
        assert session.version == versions[0]
    assert [tool.name for tool in listed] == [tool["name"] for tool in tools]
    read = tool_results.read_result(result)
    assert read == {"text": "Noted: milk\n[image image/png left out]", "data": {"notes": 1}}
    assert served.effects == ["k1"]
    assert served.violations == []
    assert served.sessions == {}, "the session is ended"


async def test_the_version_of_an_earlier_session_saves_the_question() -> None:
    async with serve_tools() as served, open_mcp(served, version=STATELESS) as session:
        await session.list_tools()
    assert served.methods == ["tools/list"]


@pytest.mark.parametrize("version", HANDSHAKES)
async def test_older_servers_choose_the_version(version: str) -> None:
    async with serve_tools(versions=(version,)) as served, open_mcp(served) as session:
        assert session.version == version
        await session.list_tools()
    assert served.violations == []


async def test_a_server_of_unknown_versions_is_refused() -> None:
    async with serve_tools(versions=("2031-01-01",)) as served:
        error = await call_failing(served)
    assert (error.code, error.retryable) == ("tool-server-refused", False)
    async with serve_tools(versions=("2025-11-25",)) as served:
        served.versions = ("2024-11-05",)
        error = await call_failing(served)
    assert error.code in {"tool-server-version", "tool-server-refused"}


@pytest.mark.parametrize(
    ("fault", "code", "retryable", "effects"),
    [
        (McpFault.WRONG_ID, "tool-server-invalid-answer", False, 1),
        (McpFault.NOT_JSON, "tool-server-invalid-answer", False, 0),
        (McpFault.TOO_DEEP, "tool-server-invalid-answer", False, 1),
        (McpFault.CUT, "interrupted", True, 1),
        (McpFault.SERVER_ERROR, "tool-server-failed", True, 0),
        (McpFault.INTERNAL_ERROR, "tool-server-failed", False, 0),
        (McpFault.OWN_ERROR, "tool-server-failed", False, 1),
        (McpFault.RATE_LIMITED, "tool-server-busy", True, 0),
        (McpFault.KEY_REFUSED, "tool-server-key-refused", False, 0),
        (McpFault.REDIRECT, "tool-server-redirected", False, 0),
        (McpFault.TOOL_ERROR, "tool-error", False, 1),
        (McpFault.NEEDS_INPUT, "tool-input-required", False, 1),
        (McpFault.HUGE, "response-too-large", False, 1),
    ],
    ids=lambda value: value.name if isinstance(value, McpFault) else None,
)
async def test_faults_are_errors_that_say_whether_the_call_may_have_been_done(
    fault: McpFault, code: str, effects: int, *, retryable: bool
) -> None:
    async with serve_tools(fault=fault) as served:
        error = await call_failing(served)
        assert (error.code, error.retryable) == (code, retryable)
        assert len(served.effects) == effects, "a call is made once at most"
    is_unknown = error.code in UNKNOWN_OUTCOMES
    surely_done = {"tool-error", "tool-input-required"}
    assert is_unknown or not effects or code in surely_done
    assert "internal page" not in str(error), "pages are not quoted"


async def test_a_rate_limit_says_when_to_come_back() -> None:
    async with serve_tools(fault=McpFault.RATE_LIMITED) as served:
        assert (await call_failing(served)).retry_after_seconds == 7


async def test_a_server_that_does_not_answer_is_left_at_the_time_limit() -> None:
    async with serve_tools(fault=McpFault.SLOW) as served:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await call(served)
        assert served.effects == []


async def test_a_server_that_only_reports_progress_is_left_with_an_unknown_outcome(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its pauses are short, so that the limit of a pause never ends it."""
    monkeypatch.setattr(mcp_session, "TOTAL_SECONDS", 2.0)
    async with serve_tools(fault=McpFault.NEVER_ENDS) as served:
        failed = await call_failing(served)
        assert (failed.code, len(served.effects)) == ("timed-out", 1)
    assert failed.code in UNKNOWN_OUTCOMES


async def test_the_text_of_a_failed_tool_is_the_error() -> None:
    async with serve_tools(fault=McpFault.TOOL_ERROR) as served:
        assert str(await call_failing(served)) == "The notebook is full"


@BOTH_ERAS
async def test_requests_of_a_server_are_answered_and_refused(versions: tuple[str, ...]) -> None:
    async with serve_tools(versions=versions, fault=McpFault.ASKS_CLIENT) as served:
        assert (await call(served))["data"] == {"notes": 1}
    ping, sampling = served.replies
    assert ping == {"jsonrpc": "2.0", "id": "a", "result": {}}
    assert (sampling["id"], sampling["error"]["code"]) == ("b", -32601)


@BOTH_ERAS
async def test_a_server_with_too_many_requests_of_its_own_is_left(versions: tuple[str, ...]) -> None:
    async with serve_tools(versions=versions, fault=McpFault.FLOODS_CLIENT) as served:
        assert (await call_failing(served)).code == "tool-server-invalid-answer"
    assert len(served.replies) < 50


async def test_an_id_of_a_session_that_is_too_long_is_not_sent_back() -> None:
    async with serve_tools(versions=HANDSHAKES, session_prefix="x" * 2_000) as served:
        assert (await call_failing(served)).code == "tool-server-invalid-answer"
    assert not [sent for sent in served.headers if "mcp-session-id" in sent]


async def test_an_argument_that_a_schema_marks_with_no_valid_name_is_not_sent() -> None:
    schema = {"type": "object", "properties": {"text": {"type": "string", "x-mcp-header": "A: b\r\nC"}}}
    async with serve_tools(tools=[build_tool(inputSchema=schema)]) as served:
        assert (await call_failing(served)).code == "invalid-request"
        assert served.effects == []


async def test_an_expired_session_is_begun_again_once() -> None:
    async with serve_tools(versions=HANDSHAKES, fault=McpFault.SESSION_EXPIRED) as served:
        assert (await call(served))["data"] == {"notes": 1}
        assert served.methods.count("initialize") == 2
        assert served.violations == []
    async with serve_tools(versions=HANDSHAKES, fault=McpFault.SESSION_NEVER) as served:
        assert (await call_failing(served)).code == "tool-server-refused"
        assert served.methods.count("initialize") == 2


async def test_a_list_without_an_end_and_ambiguous_tools_are_refused() -> None:
    for settings in (
        {"endless": True},
        {"tools": [build_tool(), build_tool()]},
        {"tools": [build_tool(f"tool-{number}") for number in range(300)]},
        {
            "tools": [build_tool(f"t{number}", "x" * 20_000) for number in range(20)],
            "page_size": 1,
            "endless": True,
        },
        {"tools": [{"name": "a"}, "b"]},
    ):
        async with serve_tools(**settings) as served, open_mcp(served) as session:
            with pytest.raises(NodeError) as caught:
                await session.list_tools()
        assert caught.value.code == "tool-server-invalid-answer"
        assert len(served.methods) < 60


async def test_a_wrong_key_and_a_private_address_are_refused() -> None:
    async with serve_tools() as served:
        with pytest.raises(NodeError) as caught:
            async with open_mcp(served, key="other"):
                pass
        assert caught.value.code == "tool-server-key-refused"
        outbound = mcp_session.open_outbound((), ())
        with pytest.raises(NodeError) as caught:
            async with mcp_session.open_session(outbound, ToolServerAddress(served.url, KEY)):
                pass
        await outbound.close()
        assert caught.value.code == "address-not-allowed"
        assert len(served.headers) == 1, "nothing reaches the private address"
        host = served.url.removeprefix("http://").partition("/")[0]
        allowed = mcp_session.open_outbound((), (host,))
        async with mcp_session.open_session(allowed, ToolServerAddress(served.url, KEY)) as session:
            assert len(await session.list_tools()) == 1
        await allowed.close()


async def test_arguments_that_a_schema_marks_are_sent_as_headers_too() -> None:
    schema = {
        "type": "object",
        "properties": {
            "text": {"type": "string", "x-mcp-header": "Text"},
            "place": {"type": "object", "properties": {"city": {"type": "string", "x-mcp-header": "City"}}},
            "urgent": {"type": "boolean", "x-mcp-header": "Urgent"},
            "absent": {"type": "integer", "x-mcp-header": "Absent"},
        },
    }
    arguments: dict[str, Any] = {"text": "milk", "place": {"city": "Malmö"}, "urgent": True}
    async with serve_tools(tools=[build_tool(inputSchema=schema)]) as served:
        async with open_mcp(served) as session:
            await session.call_tool((await session.list_tools())[0], arguments, idempotency_key="k1")
        sent = served.headers[-1]
    found = {name: sent.get(f"mcp-param-{name}") for name in ("text", "city", "urgent", "absent")}
    assert found == {"text": "milk", "city": "=?base64?TWFsbcO2?=", "urgent": "true", "absent": None}
