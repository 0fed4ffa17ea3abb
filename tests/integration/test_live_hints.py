"""Streams of hints: one changed run, the list of runs, a slow client, and the end of access."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.executions import live_hints
from gateway.executions.live_hints import QUEUE_LENGTH, HintQueue, LiveHint
from models.execution import Execution
from models.execution_status import ExecutionStatus
from tests.integration.browser import serve_gateway
from tests.integration.gateway_harness import (
    GRAPH,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)


@asynccontextmanager
async def open_stream(url: str, key: str, topics: str) -> AsyncIterator[aiohttp.StreamReader]:
    """Open a stream of hints, until it is open."""
    timeout = aiohttp.ClientTimeout(total=None, sock_read=30)
    async with (
        aiohttp.ClientSession(headers={"X-API-Key": key}, timeout=timeout) as session,
        session.get(f"{url}/live", params={"topics": topics}) as answer,
    ):
        assert answer.status == 200
        assert answer.headers["X-Accel-Buffering"] == "no"
        assert await answer.content.readline() == b": open\n"
        yield answer.content


async def next_hint(stream: aiohttp.StreamReader) -> LiveHint:
    async for line in stream:
        if line.startswith(b"data: "):
            return msgspec.json.decode(line.removeprefix(b"data: "), type=LiveHint)
    raise ConnectionError("the stream has ended")


async def start_run(user: UserClient) -> str:
    workflow_id = await user.create(status="active", **GRAPH)
    answer = await user.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    execution_id: str = answer.json()["executionId"]
    return execution_id


async def change_run(harness: GatewayHarness, execution_id: str, status: ExecutionStatus) -> None:
    async def change(connection: AsyncConnection) -> None:
        values = {"status": status, "updated_at": harness.gateway.clock()}
        await connection.execute(update(Execution).where(col(Execution.id) == execution_id).values(**values))

    await harness.gateway.database.transaction(change)
    await harness.gateway.broker.publish({execution_id: ""})


async def test_hints_name_changed_runs_and_lists(harness: GatewayHarness, people: OrganizationUsers) -> None:
    execution_id = await start_run(people.owner)
    async with (
        serve_gateway(harness) as url,
        open_stream(url, people.owner.key, f"execution:{execution_id}") as run,
        open_stream(url, people.admin.key, "executions") as runs,
    ):
        changing = asyncio.create_task(repeat_changes(harness, execution_id))
        hint = await next_hint(run)
        assert (hint.topic, hint.id) == (f"execution:{execution_id}", execution_id)
        of_list = await next_hint(runs)
        assert (of_list.topic, of_list.id) == ("executions", "")
        changing.cancel()


async def test_a_new_stream_begins_with_the_latest_changes(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    """A page may be older than a change that precedes its stream."""
    execution_id = await start_run(people.owner)
    async with serve_gateway(harness) as url:
        for topic in (f"execution:{execution_id}", "executions", "executions"):
            async with open_stream(url, people.admin.key, topic) as stream:
                assert (await next_hint(stream)).topic == topic


async def repeat_changes(harness: GatewayHarness, execution_id: str) -> None:
    """Change a run until a reader has seen a change: the first may precede its watch."""
    while True:
        await change_run(harness, execution_id, ExecutionStatus.RUNNING)
        await asyncio.sleep(0.05)


async def test_a_stream_ends_with_the_access_of_its_client(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_hints, "PING_SECONDS", 0.05)
    keys = [
        (await people.owner.api.post("/api/v1/auth/keys", json={"name": name})).json()
        for name in ("For a while", "For longer")
    ]
    execution_id = await start_run(people.owner)
    async with serve_gateway(harness) as url:
        async with open_stream(url, keys[0]["key"], "deliveries") as stream:
            assert await stream.readuntil(b": ping\n\n")
            await people.owner.api.delete(f"/api/v1/auth/keys/{keys[0]['id']}")
            assert (await stream.read()).replace(b": ping\n\n", b"") == b""
        # Also if hints come faster than pings.
        monkeypatch.setattr(live_hints, "PING_SECONDS", 0.5)
        async with open_stream(url, keys[1]["key"], f"execution:{execution_id}") as stream:
            changing = asyncio.create_task(repeat_changes(harness, execution_id))
            await next_hint(stream)
            await people.owner.api.delete(f"/api/v1/auth/keys/{keys[1]['id']}")
            await asyncio.wait_for(stream.read(), 10)
            changing.cancel()


@pytest.mark.timeout(30)  # a stream that is not refused has no end
async def test_topics_are_checked(people: OrganizationUsers) -> None:
    execution_id = await start_run(people.owner)
    twice = f"texts:{execution_id},texts:{execution_id}"
    for topics in ("", "nonsense", ",".join(["executions"] * 21), twice):
        assert_refused(await people.owner.api.get("/live", params={"topics": topics}), 400, "invalid-query")
    for user in (people.stranger, people.colleague):
        for kind in ("execution", "texts"):
            hidden = await user.api.get("/live", params={"topics": f"{kind}:{execution_id}"})
            assert_refused(hidden, 404, "not-found")


def test_a_slow_client_is_asked_to_load_everything_again() -> None:
    queue = HintQueue()
    for number in range(QUEUE_LENGTH):
        queue.put(LiveHint("execution:a", f"exec_{number}", "1"))
    queue.put(LiveHint("execution:a", "exec_0", "2"))
    assert queue.take() == b"event: resync\ndata: {}\n\n"
    queue.put(LiveHint("executions", "", "1"))
    queue.put(LiveHint("executions", "", "2"))
    assert queue.take().count(b"event: hint") == 1


async def test_streams_end_when_the_server_stops(harness: GatewayHarness, people: OrganizationUsers) -> None:
    """The last test of this file, since the gateway opens no stream afterwards."""
    async with serve_gateway(harness) as url, open_stream(url, people.owner.key, "executions") as stream:
        harness.gateway.live_hints.release()
        assert b"event:" not in await stream.read()
    assert_refused(await people.owner.api.get("/live?topics=executions"), 503, "not-ready")
