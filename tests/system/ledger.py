"""External ledger: an HTTP server in the test's process that records every effect of runs.

Each of its answers is a new number. A repeated effect is detected by its successors, since the second answer
differs.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aiohttp import web

from tests.system.wait_conditions import stop_accepting

if TYPE_CHECKING:
    from engine.values import Json

PATIENCE_SECONDS = 60.0
BEAT_SECONDS = 0.05
STALL_SECONDS = 0.5
BACKLOG_SECONDS = 1.0
"""Time after a stall within which the requests that waited are read."""


@dataclass(frozen=True, slots=True)
class LedgerCall:
    """One request that reached the ledger."""

    execution_id: str
    node_id: str
    method: str
    key: str | None
    """Its `Idempotency-Key`."""
    body: bytes
    receipt: int
    """Number in its answer."""
    port: int
    """Port of the sender's end of the connection."""
    arrived_at: float
    """Unix time at which it was read."""
    unread_since: float = 0.0
    """Unix time since which it may have waited to be read, while this process was too busy."""

    @property
    def is_effect(self) -> bool:
        """Whether the call changed something at the ledger: any method but GET."""
        return self.method != "GET"

    @property
    def carried(self) -> Mapping[str, Json]:
        """Outputs of the preceding nodes, which the node sent with its write."""
        carried: Mapping[str, Json] = json.loads(self.body)["nodes"]
        return carried


@dataclass(slots=True)
class HeldRequests:
    """Requests of one node that have arrived and wait for their answers."""

    node_id: str
    calls: asyncio.Queue[LedgerCall] = field(default_factory=asyncio.Queue)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def next_call(self) -> LedgerCall:
        """Wait up to a minute for the next request of the node, and return it."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.calls.get()

    def release(self) -> None:
        """Answer all waiting calls, and later calls at once."""
        self.released.set()


class EffectLedger:
    """External server that records the effects of runs, and delays, holds back and refuses calls on request."""

    def __init__(self, url: str) -> None:
        self.calls: list[LedgerCall] = []
        self.delay_seconds = 0.0
        self.url = url
        self._receipts = itertools.count(1)
        self._held: dict[str, HeldRequests] = {}
        self._refused: dict[str, int] = {}
        self._on_arrival: dict[str, Callable[[LedgerCall], None]] = {}
        self._awaited: dict[int, asyncio.Future[LedgerCall]] = {}
        self._stalls: list[tuple[float, float]] = []
        """Beginnings and ends, in Unix time, of each time in which this process read nothing."""

    # ── nodes that call it ──────────────────────────────────────────────────────────────────────────────────

    def reads(self, node_id: str) -> dict[str, Json]:
        """Return a node that reads a number from the ledger; a repetition gets another number."""
        return {"id": node_id, "nodeId": "http-request", "config": {"url": self.url_of(node_id)}}

    def writes(self, node_id: str, **more: Json) -> dict[str, Json]:
        """Return a node that writes to the ledger, and sends the outputs of all nodes before it;
        `more` are fields of the node.
        """
        config: dict[str, Json] = {
            "url": self.url_of(node_id),
            "method": "POST",
            "body": {"nodes": "{{ nodes }}"},
        }
        return {"id": node_id, "nodeId": "http-request", "config": config, **more}

    def url_of(self, node_id: str) -> str:
        """Return the URL of a node's calls, with an expression for the id of its execution."""
        return f"{self.url}/{{{{ execution.id }}}}/{node_id}"

    # ── recorded effects ────────────────────────────────────────────────────────────────────────────────────

    def effects(self) -> dict[tuple[str, str], list[LedgerCall]]:
        """Return the effects by execution id and node id, each node's in the order of their arrival."""
        effects: dict[tuple[str, str], list[LedgerCall]] = defaultdict(list)
        for call in self.calls:
            if call.is_effect:
                since = self._unread_since(call.arrived_at)
                effects[call.execution_id, call.node_id].append(replace(call, unread_since=since))
        return effects

    def _unread_since(self, arrived_at: float) -> float:
        """Return the time since which a call may have waited to be read, because this process stood still."""
        for began_at, ended_at in reversed(self._stalls):
            if ended_at + BACKLOG_SECONDS < arrived_at:
                break
            arrived_at = min(arrived_at, began_at)
        return arrived_at

    async def note_stalls(self) -> None:
        """Record each time in which the event loop of this process stands still, until the task is canceled."""
        before = time.time()
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            now = time.time()
            if now - before > STALL_SECONDS:
                self._stalls.append((before, now))
            before = now

    def of(self, node_id: str) -> list[LedgerCall]:
        """Return all calls of one node, reads and effects."""
        return [call for call in self.calls if call.node_id == node_id]

    async def call(self, number: int) -> LedgerCall:
        """Wait up to a minute for the call with this number, from 1, and return it."""
        if len(self.calls) >= number:
            return self.calls[number - 1]
        awaited = self._awaited.setdefault(number, asyncio.get_running_loop().create_future())
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await asyncio.shield(awaited)

    # ── behavior ────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def holding(self, node_id: str) -> Iterator[HeldRequests]:
        """Hold back the answers to a node's requests until released or until the block ends."""
        held = self._held[node_id] = HeldRequests(node_id)
        try:
            yield held
        finally:
            held.release()
            del self._held[node_id]

    @contextmanager
    def refusing(self, node_id: str, status: int = 400) -> Iterator[None]:
        """Answer requests of a node with this status during the block."""
        self._refused[node_id] = status
        try:
            yield
        finally:
            del self._refused[node_id]

    @contextmanager
    def on_arrival(self, node_id: str, action: Callable[[LedgerCall], None]) -> Iterator[None]:
        """Call `action` for each request of a node during the block, before it is answered."""
        self._on_arrival[node_id] = action
        try:
            yield
        finally:
            del self._on_arrival[node_id]

    async def handle(self, request: web.Request) -> web.Response:
        """Record a request, and answer it as the controls say."""
        call = await self._record(request)
        if action := self._on_arrival.get(call.node_id):
            action(call)
        if held := self._held.get(call.node_id):
            held.calls.put_nowait(call)
            await held.released.wait()
        elif self.delay_seconds:
            await asyncio.sleep(self.delay_seconds)
        status = self._refused.get(call.node_id, 200)
        return web.json_response({"receipt": call.receipt}, status=status)

    async def _record(self, request: web.Request) -> LedgerCall:
        """Record a request as a call with a receipt, and wake the task that waits for its number."""
        arrived_at = time.time()
        assert request.transport is not None
        call = LedgerCall(
            execution_id=request.match_info["execution_id"],
            node_id=request.match_info["node_id"],
            method=request.method,
            key=request.headers.get("Idempotency-Key"),
            body=await request.read(),
            receipt=next(self._receipts),
            port=request.transport.get_extra_info("peername")[1],
            arrived_at=arrived_at,
        )
        self.calls.append(call)
        if awaited := self._awaited.pop(len(self.calls), None):
            awaited.set_result(call)
        return call


@asynccontextmanager
async def run_ledger() -> AsyncIterator[EffectLedger]:
    """Run a ledger on a free port during the block."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ledger = EffectLedger(f"http://127.0.0.1:{listening.getsockname()[1]}")
        app = web.Application()
        app.router.add_route("*", "/{execution_id}/{node_id}", ledger.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        stalls = asyncio.create_task(ledger.note_stalls())
        try:
            await web.SockSite(runner, listening).start()
            yield ledger
        finally:
            stalls.cancel()
            await stop_accepting(listening.fileno())
            await runner.cleanup()
