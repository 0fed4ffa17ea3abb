"""Tool server by the Model Context Protocol that is strict with its clients, and makes faults on request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from aiohttp import web

KEY = "mcp-secret-0123456789"
STATELESS = "2026-07-28"
HANDSHAKES = ("2025-11-25", "2025-06-18", "2025-03-26")
META = "io.modelcontextprotocol"


class McpFault(Enum):
    """Fault of the answers to `tools/call`."""

    SLOW = "no answer until the release of the server"
    NEVER_ENDS = "progress in place of an answer, again and again, until the release of the server"
    HUGE = "an answer of more than 4 MB"
    WRONG_ID = "the answer to another request"
    NOT_JSON = "a page in place of JSON"
    CUT = "the connection ends after the effect"
    SERVER_ERROR = "500 with a page"
    INTERNAL_ERROR = "an internal error of the protocol"
    OWN_ERROR = "an error of a proxy that has waited in vain, after the effect"
    RATE_LIMITED = "429 with Retry-After"
    KEY_REFUSED = "401 that repeats the key"
    REDIRECT = "a redirect to an address inside"
    TOOL_ERROR = "a result that says that the tool has failed"
    REPEATS_KEY = "the key in the result"
    ASKS_CLIENT = "requests of the server before its answer"
    FLOODS_CLIENT = "many requests of the server before its answer"
    NEEDS_INPUT = "a question to a person in place of a result"
    SESSION_EXPIRED = "404 once, as for an unknown session"
    SESSION_NEVER = "404 always"
    TOO_DEEP = "a value that is nested too deep"


def build_tool(name: str = "add_note", description: str = "Adds a note.", **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return the definition of a tool with one text as its argument; `fields` are added."""
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    return {"name": name, "description": description, "inputSchema": schema, **fields}


@dataclass
class McpServer:
    """Tool server with its state: tools, the fault to make, and records of the client's requests."""

    tools: list[dict[str, Any]] = field(default_factory=lambda: [build_tool()])
    versions: tuple[str, ...] = (STATELESS,)
    streams: bool = False
    """Whether it answers by streams of events, in place of JSON."""
    page_size: int = 100
    endless: bool = False
    """Whether each page of tools names a further one."""
    fault: McpFault | None = None
    result: dict[str, Any] | None = None
    """Result of every call; None for the text of its arguments, an image, and the number of calls."""
    key: str = KEY
    url: str = ""
    methods: list[str] = field(default_factory=list)
    """Methods of all requests, in order; `DELETE` for the end of a session."""
    headers: list[Mapping[str, str]] = field(default_factory=list)
    replies: list[dict[str, Any]] = field(default_factory=list)
    """Answers of the client to requests of the server."""
    effects: list[str] = field(default_factory=list)
    """Idempotency key of each call that was done."""
    violations: list[str] = field(default_factory=list)
    """Breaches of the protocol by the client."""
    sessions: dict[str, bool] = field(default_factory=dict)
    """Open sessions, and whether the client has confirmed them."""
    session_prefix: str = "session-"
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a message that the client posts; breaches of the protocol are recorded."""
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        if request.headers.get("authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "a key is missing"}, status=401)
        message = await request.json()
        accepted = request.headers.get("accept", "")
        self._require("application/json" in accepted and "text/event-stream" in accepted, "Accept")
        self._require(message.get("jsonrpc") == "2.0", "jsonrpc")
        if "method" not in message:
            self.replies.append(message)
            return web.Response(status=202)
        self.methods.append(message["method"])
        if message["method"] == "initialize":
            return self._initialize(request, message)
        meta = message.get("params", {}).get("_meta", {})
        if f"{META}/protocolVersion" in meta:
            refusal = self._check_stateless(request, message, meta)
        else:
            refusal = self._check_session(request, message)
        return refusal or await self._dispatch(request, message)

    async def end(self, request: web.Request) -> web.Response:
        """End a session that the client deletes."""
        self.methods.append("DELETE")
        known = self.sessions.pop(request.headers.get("mcp-session-id", ""), None)
        self._require(known is not None, "DELETE of an unknown session")
        return web.Response(status=200)

    def _require(self, is_kept: bool, rule: str) -> None:  # noqa: FBT001 - the rule is its name
        """Record a breach of a rule by the client unless it is kept."""
        if not is_kept:
            self.violations.append(rule)

    def _initialize(self, request: web.Request, message: dict[str, Any]) -> web.Response:
        """Open a session with the wanted or the first offered version, or refuse
        it if the server has none with sessions.
        """
        offered = [version for version in self.versions if version in HANDSHAKES]
        if not offered:
            return _refuse(
                message, -32022, "Unsupported protocol version", {"supported": list(self.versions)}
            )
        params = message["params"]
        self._require({"protocolVersion", "capabilities", "clientInfo"} <= params.keys(), "initialize")
        self._require("mcp-session-id" not in request.headers, "initialize within a session")
        wanted = params["protocolVersion"]
        session_id = f"{self.session_prefix}{len(self.methods)}"
        self.sessions[session_id] = False
        result: dict[str, Any] = {
            "protocolVersion": wanted if wanted in offered else offered[0],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "scripted", "version": "1"},
        }
        return web.json_response(
            {"jsonrpc": "2.0", "id": message["id"], "result": result}, headers={"mcp-session-id": session_id}
        )

    def _check_stateless(
        self, request: web.Request, message: dict[str, Any], meta: dict[str, Any]
    ) -> web.Response | None:
        """Check the headers of a request without a session; return its refusal, None to answer it."""
        version = meta[f"{META}/protocolVersion"]
        if STATELESS not in self.versions:
            if message["method"] == "server/discover":
                return web.Response(status=400, text="Bad Request: no session")
            self.violations.append("a request without a session")
        self._require(f"{META}/clientCapabilities" in meta, "clientCapabilities")
        self._require(request.headers.get("mcp-protocol-version") == version, "MCP-Protocol-Version")
        self._require(request.headers.get("mcp-method") == message["method"], "Mcp-Method")
        if message["method"] == "tools/call":
            self._require(request.headers.get("mcp-name") == message["params"]["name"], "Mcp-Name")
        return None

    def _check_session(self, request: web.Request, message: dict[str, Any]) -> web.Response | None:
        """Check the session of a request; return its refusal or the answer to a notification, None to answer it."""
        session_id = request.headers.get("mcp-session-id", "")
        if session_id not in self.sessions:
            return web.Response(status=404)
        if message["method"] == "notifications/initialized":
            self.sessions[session_id] = True
            return web.Response(status=202)
        self._require(self.sessions[session_id], "a request before notifications/initialized")
        self._require(request.headers.get("mcp-protocol-version") in self.versions, "MCP-Protocol-Version")
        return None

    async def _dispatch(self, request: web.Request, message: dict[str, Any]) -> web.StreamResponse:
        """Answer a checked request by its method."""
        result: dict[str, Any]
        match message["method"]:
            case "server/discover":
                result = {
                    "supportedVersions": list(self.versions),
                    "capabilities": {"tools": {}},
                    "serverInfo": {"name": "scripted", "version": "1"},
                }
            case "tools/list":
                result = self._list_page(message.get("params", {}).get("cursor"))
            case "tools/call":
                return await self._call(request, message)
            case method:
                return _refuse(message, -32601, f"Unknown method {method}", None, status=404)
        return await self._send(request, [{"jsonrpc": "2.0", "id": message["id"], "result": result}])

    def _list_page(self, cursor: str | None) -> dict[str, Any]:
        start = int(cursor or 0)
        page: dict[str, Any] = {"tools": self.tools[start : start + self.page_size]}
        if self.endless or start + self.page_size < len(self.tools):
            page["nextCursor"] = str(0 if self.endless else start + self.page_size)
        return page

    async def _call(self, request: web.Request, message: dict[str, Any]) -> web.StreamResponse:
        """Answer a call of a tool by the fault, or record its effect and return its result."""
        refusal = await self._refuse_call(request, message)
        if refusal is not None:
            return refusal
        name, arguments = message["params"]["name"], message["params"]["arguments"]
        if name not in [tool["name"] for tool in self.tools]:
            return _refuse(message, -32602, f"Unknown tool: {name}", None)
        self.effects.append(request.headers.get("idempotency-key", ""))
        self._require(
            message["params"].get("_meta", {}).get("pilotflame/idempotency-key") == self.effects[-1],
            "idempotency key",
        )
        if self.fault is McpFault.NEVER_ENDS:
            return await self._send_progress(request)
        if self.fault is McpFault.CUT:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        before: list[dict[str, Any]] = []
        if self.fault is McpFault.OWN_ERROR:
            return _refuse(message, -32001, "Request timed out", None, status=504)
        result = self._build_result(arguments)
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": message["id"], "result": result}
        if self.fault is McpFault.WRONG_ID:
            answer["id"] = 4_711
        if self.fault is McpFault.ASKS_CLIENT:
            before = [
                {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progress": 1}},
                {"jsonrpc": "2.0", "id": "a", "method": "ping"},
                {"jsonrpc": "2.0", "id": "b", "method": "sampling/createMessage", "params": {}},
            ]
        if self.fault is McpFault.FLOODS_CLIENT:
            before = [{"jsonrpc": "2.0", "id": number, "method": "ping"} for number in range(1_000, 1_100)]
        return await self._send(request, [*before, answer])

    async def _refuse_call(self, request: web.Request, message: dict[str, Any]) -> web.Response | None:
        """Return the refusal of a call that the fault asks for; None for a call that is done.

        Waits for `released` if slow.
        """
        match self.fault:
            case McpFault.SLOW:
                await self.released.wait()
            case McpFault.SERVER_ERROR:
                return web.Response(status=500, text="<html>internal page</html>")
            case McpFault.INTERNAL_ERROR:
                return _refuse(message, -32603, "Internal error", None, status=200)
            case McpFault.RATE_LIMITED:
                return web.Response(status=429, headers={"retry-after": "7"})
            case McpFault.KEY_REFUSED:
                said = f"Wrong key: {request.headers['authorization']}"
                return web.json_response({"error": {"message": said}}, status=401)
            case McpFault.REDIRECT:
                return web.Response(status=307, headers={"location": "http://169.254.169.254/latest"})
            case McpFault.NOT_JSON:
                return web.Response(text="<html>a page</html>", content_type="text/html")
            case McpFault.SESSION_EXPIRED | McpFault.SESSION_NEVER:
                if self.fault is McpFault.SESSION_EXPIRED:
                    self.fault = None
                self.sessions.pop(request.headers.get("mcp-session-id", ""), None)
                return web.Response(status=404)
        return None

    def _build_result(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the result of a call as the fault changes it."""
        text: dict[str, Any] = {"type": "text", "text": f"Noted: {arguments.get('text')}"}
        match self.fault:
            case McpFault.HUGE:
                text["text"] = "x" * 5_000_000
            case McpFault.TOOL_ERROR:
                return {"content": [{"type": "text", "text": "The notebook\nis full"}], "isError": True}
            case McpFault.REPEATS_KEY:
                text["text"] = f"You sent {self.key}"
            case McpFault.NEEDS_INPUT:
                return {"resultType": "input_required", "inputRequests": {}}
            case McpFault.TOO_DEEP:
                value: object = 1
                for _ in range(70):
                    value = [value]
                return {"content": [text], "structuredContent": {"value": value}}
        if self.result is not None:
            return self.result
        image = {"type": "image", "mimeType": "image/png", "data": "AAAA"}
        return {"content": [text, image], "structuredContent": {"notes": len(self.effects)}}

    async def _send_progress(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        progress = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progress": 1}}
        with suppress(ConnectionError):
            while not self.released.is_set():
                await response.write(b"data: %b\n\n" % json.dumps(progress).encode())
                await asyncio.sleep(0.02)
        return response

    async def _send(self, request: web.Request, messages: list[dict[str, Any]]) -> web.StreamResponse:
        if not self.streams and len(messages) == 1:
            return web.json_response(messages[0])
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await response.write(b": a comment\n\nid: 1\ndata: \n\n")
        for message in messages:
            await response.write(b"event: message\r\ndata: %b\r\n\r\n" % json.dumps(message).encode())
        return response


def _refuse(
    message: dict[str, Any],
    code: int,
    said: str,
    data: Any,  # noqa: ANN401 - any JSON value
    *,
    status: int = 400,
) -> web.Response:
    error = {"code": code, "message": said, "data": data}
    return web.json_response({"jsonrpc": "2.0", "id": message["id"], "error": error}, status=status)


@asynccontextmanager
async def serve_tools(**settings: Any) -> AsyncGenerator[McpServer]:  # noqa: ANN401 - fields of the state
    """Serve a tool server on a free port of this machine during the block; `settings` are fields of its state."""
    served = McpServer(**settings)
    app = web.Application(client_max_size=20_000_000)
    app.router.add_post("/mcp", served.answer)
    app.router.add_delete("/mcp", served.end)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server = site._server  # noqa: SLF001 - aiohttp has no other way to the port
    assert isinstance(server, asyncio.Server)
    served.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mcp"
    try:
        yield served
    finally:
        served.released.set()
        await runner.cleanup()
