"""Gateway that only accepts batches of messages, as strictly as the real one."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

FIELDS: Final = {"message", "priority", "delaySeconds", "notBefore", "deduplicationId", "source"}
DEDUPLICATION_ID: Final = re.compile(r"[\x21-\x7e]{1,255}")
MAX_MESSAGES: Final = 1_000
POISON: Final = "poison"
"""Message that the gateway always refuses."""


@dataclass(frozen=True)
class StartedFakeRun:
    """Run that one message has started."""

    message: Any
    priority: int
    source: str | None


class BatchRefusal(Exception):
    """An answer for the whole batch."""

    def __init__(
        self, status: int, code: str, headers: Mapping[str, str] | None = None, path: str | None = None
    ) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.headers = headers
        self.details = [] if path is None else [{"path": path, "code": "wrong", "message": "It is wrong"}]


@dataclass
class FakeGateway:
    """Gateway with one workflow; tests read and change its fields."""

    key: str = "sk-of-the-bridge"
    workflow_id: str = "wf_1"
    max_body_bytes: int = 10_000_000
    port: int = 0
    runs: dict[str, StartedFakeRun] = field(default_factory=dict)
    """By execution id, in the order of their acceptance."""
    executions: dict[str, str] = field(default_factory=dict)
    """Execution ids by deduplication id."""
    calls: int = 0
    refusals: list[BatchRefusal] = field(default_factory=list)
    """Answers to the next calls."""
    is_away: bool = False
    loses_answers: int = 0
    """Number of next calls whose answers are lost after their messages were accepted."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def messages(self) -> list[Any]:
        return [run.message for run in self.runs.values()]

    async def answer(self, request: Request) -> JSONResponse:
        """Answer one batch of messages as the real gateway would, or by the faults that the fields ask for."""
        self.calls += 1
        try:
            return JSONResponse(await self._answer_batch(request), 201)
        except BatchRefusal as refusal:
            error = {"code": refusal.code, "message": "It was refused", "details": refusal.details}
            body = {"success": False, "error": error, "requestId": "req_1"}
            return JSONResponse(body, refusal.status, dict(refusal.headers or {}))

    async def _answer_batch(self, request: Request) -> dict[str, Any]:
        """Accept a batch and return its answer; raises `BatchRefusal`, also after
        the acceptance if the answer is to be lost.
        """
        if self.is_away:
            raise BatchRefusal(503, "not-ready", {"Retry-After": "0"})
        if self.refusals:
            raise self.refusals.pop(0)
        if request.headers.get("X-API-Key") != self.key:
            raise BatchRefusal(401, "unauthorized")
        if request.path_params["workflow_id"] != self.workflow_id:
            raise BatchRefusal(404, "not-found")
        if int(request.headers["Content-Length"]) > self.max_body_bytes:
            raise BatchRefusal(413, "payload-too-large")
        answer = self._take(_decode_body(request.headers["Content-Type"], await request.body()))
        if self.loses_answers > 0:
            self.loses_answers -= 1
            raise BatchRefusal(500, "internal-error")
        return answer

    def _take(self, body: object) -> dict[str, Any]:
        """Return the results of a batch; raises `BatchRefusal` if it is no list of 1 to 1,000 messages."""
        if (
            not isinstance(body, dict)
            or body.keys() != {"messages"}
            or not isinstance(body["messages"], list)
        ):
            raise BatchRefusal(422, "validation-failed")
        if not 1 <= len(body["messages"]) <= MAX_MESSAGES:
            raise BatchRefusal(422, "validation-failed")
        results = [self._accept_message(one) for one in body["messages"]]
        return {
            "results": results,
            "accepted": sum(one["status"] == "accepted" for one in results),
            "duplicates": sum(one["status"] == "duplicate" for one in results),
        }

    def _accept_message(self, sent: object) -> dict[str, Any]:
        """Start a run, unless the message is invalid or its deduplication id is known, and return its result."""
        problem = _message_problem(sent)
        if problem is not None:
            return {"status": "refused", "error": {"code": "invalid-message", "message": problem}}
        assert isinstance(sent, dict)
        known_as = sent.get("deduplicationId")
        if known_as in self.executions:
            return {"executionId": self.executions[known_as], "status": "duplicate"}
        execution_id = f"exec_{len(self.runs)}"
        self.runs[execution_id] = StartedFakeRun(sent["message"], sent.get("priority", 0), sent.get("source"))
        if known_as is not None:
            self.executions[known_as] = execution_id
        return {"executionId": execution_id, "status": "accepted"}


def _decode_body(media_type: str, text: bytes) -> object:
    if media_type != "application/json":
        raise BatchRefusal(415, "unsupported-media-type")
    try:
        return json.loads(
            text.decode(), object_pairs_hook=_require_unique_names, parse_constant=_refuse_constant
        )
    except ValueError as error:
        raise BatchRefusal(400, "malformed-json") from error


def _require_unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise BatchRefusal(400, "duplicate-key")
    return dict(pairs)


def _refuse_constant(_: str) -> object:
    raise BatchRefusal(400, "not-finite")


def _message_problem(sent: object) -> str | None:
    """Return the reason why a message is invalid; None for a valid one."""
    if not isinstance(sent, dict) or not FIELDS >= sent.keys() >= {"message"}:
        return "It must be an object with a message"
    priority, known_as = sent.get("priority", 0), sent.get("deduplicationId", "x")
    if type(priority) is not int or not -100 <= priority <= 100:
        return "Its priority must be a whole number from -100 to 100"
    if not isinstance(known_as, str) or not DEDUPLICATION_ID.fullmatch(known_as):
        return "Its deduplicationId must be 1 to 255 visible ASCII characters"
    if not isinstance(sent.get("source", ""), str):
        return "Its source must be a string"
    return "It is poison" if sent["message"] == POISON else None


class _FakeGatewayServer(uvicorn.Server):
    """Uvicorn's, which leaves signals to the tests."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serve_fake_gateway() -> AsyncIterator[FakeGateway]:
    """Serve a fake gateway without runs on a free port, as long as the context lasts."""
    gateway = FakeGateway()
    path = "/api/v1/workflows/{workflow_id}/enqueue-batch"
    app = Starlette(routes=[Route(path, gateway.answer, methods=["POST"])])
    server = _FakeGatewayServer(
        uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, http="httptools")
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gateway.port = listener.getsockname()[1]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield gateway
        finally:
            server.should_exit = server.force_exit = True
            await task
