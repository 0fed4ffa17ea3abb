"""Provider of language models that answers by a script, makes faults on request, and bills."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from aiohttp import web

KEY = "sk-test-0123456789"


class ModelFault(Enum):
    """Fault of one answer."""

    RATE_LIMITED = "429 with Retry-After"
    SERVER_ERROR = "500 with a page"
    KEY_REFUSED = "401"
    CONTEXT_TOO_LONG = "400"
    SLOW_FIRST_BYTE = "headers only after the release of the server"
    STALL = "a pause in the middle of the answer until the release of the server"
    NEVER_ENDS = "comments in the middle of the answer, again and again, until the release of the server"
    CUT = "the connection ends in the middle of a billed answer"
    NO_USAGE = "no usage"
    LENGTH = "the answer ends by its length"
    REFUSAL = "the model refuses"
    HUGE = "an answer of more than 10 MB"
    REDIRECT = "a redirect, by itself to another path of the same server"
    REPEATS_KEY = "the key in the text of an error"
    CLOSED = "the connection ends in place of an answer"
    OVERLOADED = "529"
    OVERLOADED_LATE = "an error in the middle of an answer of Anthropic's protocol"
    NO_CREDIT = "429 of an account without credit"
    NO_STREAM = "one document in place of a stream"


@dataclass(frozen=True)
class ScriptedAnswer:
    """Answer with a text, tool calls or a fault; the last one of a script is repeated."""

    text: str = "Cold."
    fault: ModelFault | None = None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    retry_after: str = "7"
    """Header of a rate limit."""
    location: str = "/elsewhere/chat/completions"
    """Address of a redirect."""


@dataclass
class ModelServer:
    """Scripted provider with its state: the answers to give, and records of requests, bills and effects."""

    script: list[ScriptedAnswer] = field(default_factory=lambda: [ScriptedAnswer()])
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    billed: list[str] = field(default_factory=list)
    """Idempotency keys of the answers that a customer would pay for, in order."""
    effects: list[str] = field(default_factory=list)
    """Idempotency keys of the effects of tools: a request with a key that was seen before has none."""
    repeated: int = 0
    """Number of such repeated requests."""
    connections: list[asyncio.BaseTransport] = field(default_factory=list)
    """Connection of each request."""
    released: asyncio.Event = field(default_factory=asyncio.Event)
    on_request: Callable[[], None] = lambda: None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a chat completion by the next answer of the script, and bill it."""
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.requests.append(await request.json())
        if request.transport is not None:
            self.connections.append(request.transport)
        self.on_request()
        line = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        refusal = _build_refusal(line, request)
        if refusal is not None:
            return refusal
        if line.fault is ModelFault.CLOSED and request.transport is not None:
            request.transport.abort()
            return web.Response()
        if line.fault is ModelFault.SLOW_FIRST_BYTE:
            await self.released.wait()
        self.billed.append(request.headers.get("idempotency-key", ""))
        if line.fault is ModelFault.NO_STREAM:
            return web.json_response(_build_document(line))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        async for event in self._iterate_events(line):
            if line.fault is ModelFault.NEVER_ENDS:
                await _write_comments(response, self.released)
            await response.write(b"data: %b\n\n" % json.dumps(event).encode())
            if event.get("cut") and request.transport is not None:
                request.transport.abort()
                return response
        await response.write(b"data: [DONE]\n\n")
        return response

    async def answer_message(self, request: web.Request) -> web.StreamResponse:
        """Answer a request in the protocol of Anthropic by the next answer of the script, and bill it."""
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.requests.append(await request.json())
        self.on_request()
        line = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        refusal = _build_refusal(line, request)
        if refusal is not None:
            return refusal
        self.billed.append(request.headers.get("idempotency-key", ""))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in _list_message_events(line):
            data = json.dumps(event).encode()
            await response.write(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data))
        return response

    async def affect(self, request: web.Request) -> web.Response:
        """Record the effect of a tool, once for each idempotency key."""
        key = request.headers["Idempotency-Key"]
        if key in self.effects:
            self.repeated += 1
        else:
            self.effects.append(key)
        return web.json_response({"done": len(self.effects)})

    async def tell(self, request: web.Request) -> web.Response:
        """Answer the request of a tool that only reads."""
        return web.json_response({"city": request.query.get("city"), "degrees": -3})

    async def _iterate_events(self, line: ScriptedAnswer) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of an answer in OpenAI's protocol, with its fault."""
        text = "x" * 100_000 if line.fault is ModelFault.HUGE else line.text
        half = len(text) // 2
        yield _build_chunk({"role": "assistant", "content": text[:half]})
        if line.fault is ModelFault.CUT:
            yield {"cut": True}
        if line.fault is ModelFault.STALL:
            await self.released.wait()
        if line.fault is ModelFault.HUGE:
            for _ in range(200):
                yield _build_chunk({"content": text})
        yield _build_chunk(_build_rest(line, text[half:]))
        finish = {ModelFault.LENGTH: "length", ModelFault.REFUSAL: "content_filter"}.get(
            line.fault or ModelFault.STALL, "tool_calls" if line.tool_calls else "stop"
        )
        yield _build_chunk({}, finish)
        if line.fault is not ModelFault.NO_USAGE:
            yield {"choices": [], "model": "scripted-1", "usage": USAGE}


async def _write_comments(response: web.StreamResponse, released: asyncio.Event) -> None:
    """Write comments until the release of the server, or the end of the connection."""
    with suppress(ConnectionError):
        while not released.is_set():
            await response.write(b": still waiting\n\n")
            await asyncio.sleep(0.02)


USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}


def _list_message_events(line: ScriptedAnswer) -> list[dict[str, Any]]:
    """Return the events of an answer in the protocol of Anthropic."""
    usage = {"input_tokens": 100, "output_tokens": 1}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "scripted-1", "content": []}
    blocks: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"type": "text", "text": ""}, {"type": "text_delta", "text": line.text}),
        *(
            (
                {"type": "tool_use", "id": f"toolu_{number}", "name": call["name"], "input": {}},
                {"type": "input_json_delta", "partial_json": call["arguments"]},
            )
            for number, call in enumerate(line.tool_calls)
        ),
    ]
    events: list[dict[str, Any]] = [{"type": "message_start", "message": {**message, "usage": usage}}]
    for index, (block, delta) in enumerate(blocks):
        events += [
            {"type": "content_block_start", "index": index, "content_block": block},
            {"type": "content_block_delta", "index": index, "delta": delta},
            {"type": "content_block_stop", "index": index},
        ]
        if line.fault is ModelFault.OVERLOADED_LATE:
            error = {"type": "overloaded_error", "message": "Overloaded"}
            return [*events, {"type": "error", "error": error}]
    end = {"stop_reason": "tool_use" if line.tool_calls else "end_turn", "stop_sequence": None}
    return [
        *events,
        {"type": "message_delta", "delta": end, "usage": {"output_tokens": 20}},
        {"type": "message_stop"},
    ]


def _build_chunk(delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"object": "chat.completion.chunk", "model": "scripted-1", "choices": [choice]}


def _build_rest(line: ScriptedAnswer, text: str) -> dict[str, Any]:
    calls = [
        {"index": index, "id": f"call_{index}", "type": "function", "function": call}
        for index, call in enumerate(line.tool_calls)
    ]
    return {"content": text, **({"tool_calls": calls} if calls else {})}


def _build_document(line: ScriptedAnswer) -> dict[str, Any]:
    message = {"role": "assistant", "content": line.text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"model": "scripted-1", "choices": [choice], "usage": USAGE}


def _build_refusal(line: ScriptedAnswer, request: web.Request) -> web.Response | None:
    """Return the refusal that the fault of an answer asks for; None without such a fault."""
    key = request.headers.get("authorization", "")
    match line.fault:
        case ModelFault.RATE_LIMITED:
            return _build_error(429, "Rate limit reached", {"retry-after": line.retry_after})
        case ModelFault.OVERLOADED:
            return _build_error(529, "Overloaded", {"retry-after": "3"})
        case ModelFault.NO_CREDIT:
            return _build_error(429, "You exceeded your current quota", code="insufficient_quota")
        case ModelFault.SERVER_ERROR:
            return web.Response(status=500, text="<html>internal page</html>")
        case ModelFault.KEY_REFUSED:
            return _build_error(401, "Incorrect API key")
        case ModelFault.CONTEXT_TOO_LONG:
            return _build_error(400, "This model's maximum context length is 8192 tokens")
        case ModelFault.REPEATS_KEY:
            return _build_error(401, f"Incorrect API key: {key}")
        case ModelFault.REDIRECT:
            return web.Response(status=307, headers={"location": line.location})
    return None


def _build_error(
    status: int, message: str, headers: Mapping[str, str] | None = None, code: str | None = None
) -> web.Response:
    body = {"error": {"message": message, "code": code}}
    return web.json_response(body, status=status, headers=headers)


@asynccontextmanager
async def serve_models(*script: ScriptedAnswer) -> AsyncGenerator[ModelServer]:
    """Serve a provider with this script on a free port of this machine during the block."""
    served = ModelServer(list(script) or [ScriptedAnswer()])
    app = web.Application(client_max_size=20_000_000)
    app.router.add_post("/v1/chat/completions", served.answer)
    app.router.add_post("/v1/messages", served.answer_message)
    app.router.add_get("/v1/models", _list_models)
    app.router.add_post("/v1/effects", served.affect)
    app.router.add_get("/v1/facts", served.tell)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server = site._server  # noqa: SLF001 - aiohttp has no other way to the port
    assert isinstance(server, asyncio.Server)
    served.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield served
    finally:
        served.released.set()
        await runner.cleanup()


async def _list_models(_: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "scripted-1"}, {"id": "scripted-2"}]})
