"""Texts that models are writing, over each broker and to the clients of a gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.applications import Starlette

from engine.services import AnswerOrigin
from execution.answer_messages import PIECES, BrokerAnswers
from execution.live_answers import COALESCE_SECONDS, AnswerPiece, AnswerPieces
from gateway.executions import live_events, live_hints
from gateway.executions.agent_step_rows import StepFilter
from gateway.executions.live_answers import AnswerReader, LiveAnswerHub, TokenShape
from gateway.executions.live_events import AgentStepSource, RecordBatch
from journal.store import ExecutionKey
from messages.broker import Broker, DirectMessage, Notification
from messages.broker_connection import connect_broker
from messages.message_seal import MessageSeal
from models.timestamps import DatabaseClock
from tests import command_runs
from tests.fakes.model_server import ModelFault, ScriptedAnswer, serve_models
from tests.forks import ForkedCommand
from tests.integration.browser import serve_gateway
from tests.integration.gateway_harness import GRAPH, GatewayHarness, OrganizationUsers
from tests.integration.test_broker import (
    _a_busy_machine_is_no_failure_of_postgresql as _a_busy_machine_is_no_failure_of_postgresql,  # noqa: PLC0414 - fixtures
)
from tests.integration.test_broker import other_broker as other_broker  # noqa: PLC0414 - as above
from tests.integration.test_broker import postgresql_url as postgresql_url  # noqa: PLC0414 - as above
from tests.integration.test_broker import redis_url as redis_url  # noqa: PLC0414 - as above
from tests.integration.test_broker import url as url  # noqa: PLC0414 - as above
from tests.integration.test_broker import worker_broker as worker_broker  # noqa: PLC0414 - as above
from tests.integration.test_gateway_ai_models import create_model, create_provider
from tests.integration.test_gateway_executions import (
    EventStreamClient,
    StreamEvent,
    run_second_gateway,
    spin_until,
)
from tests.integration.test_gateway_executions import looks as looks  # noqa: PLC0414 - as above
from tests.integration.test_waiting_runs import execute_workflow, wait_until_ended
from workers.main import run_worker
from workers.settings import WorkerSettings

PATIENCE_SECONDS = 60.0
TEXT = "Straße 東京 🙂 " * 700
"""More than a notification of PostgreSQL holds."""


def seal_of(secret: bytes) -> MessageSeal:
    return MessageSeal(secret, (), DatabaseClock())


async def read_text(reader: AnswerReader, characters: int) -> str:
    """Return the text that a reader gets, once it is so long."""
    text = ""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(text) < characters:
            await reader.changed.wait()
            for _, shape in reader.take():
                assert isinstance(shape, TokenShape)
                assert shape.offset == len(text)
                text += shape.text
    return text


async def test_texts_are_sent_over_every_broker_safe_from_readers_and_forgers(
    worker_broker: Broker, other_broker: Broker
) -> None:
    passed: list[Notification] = []
    await other_broker.listen(passed.append)
    seal = seal_of(b"a secret that all processes share")
    answers, hub = BrokerAnswers(worker_broker, seal), LiveAnswerHub(other_broker, seal)
    await answers.start()
    await hub.start()
    with hub.reader("exec_1", StepFilter()) as reader:
        await hub.follow("exec_1", worker_broker.channel)
        with answers.open(AnswerOrigin("exec_1", "ask", "", 0, 1)) as answer:
            answer.begin("model_1")
            answer.add(TEXT)
            assert await read_text(reader, len(TEXT)) == TEXT
            # Neither a message without a seal nor one of another secret is taken.
            piece = AnswerPiece("exec_1", "ask", "", 0, 1, 0, "model_1", len(TEXT), "forged")
            forged = msgspec.json.encode(AnswerPieces(worker_broker.channel, [piece]))
            sealed = seal_of(b"another secret").seal(
                b"pilotflame live answers 1", other_broker.channel, forged
            )
            for content in (forged, msgspec.json.encode(sealed)):
                await worker_broker.send(other_broker.channel, {PIECES: content.decode()})
            answer.add("!")
            assert await read_more(reader) == "!"
    await answers.close()
    messages = [each.message for each in passed if isinstance(each, DirectMessage)]
    assert any(PIECES in message for message in messages)
    assert sum("exec_1" in str(message) for message in messages) == 1, "the forged one alone can be read"


async def read_more(reader: AnswerReader) -> str:
    async with asyncio.timeout(PATIENCE_SECONDS):
        await reader.changed.wait()
    return "".join(shape.text for _, shape in reader.take() if isinstance(shape, TokenShape))


@asynccontextmanager
async def serve_worker(harness: GatewayHarness) -> AsyncIterator[None]:
    """Run a worker in the process of the gateway, as `pilotflame dev` does."""
    gateway = harness.gateway
    shared = gateway.settings.model_dump(include={"data_dir", "database_url", "secret_key"})
    networks = (ip_network("127.0.0.1/32"),)
    settings = WorkerSettings(**shared, sweep_seconds=0.2, outbound_allowed_networks=networks)
    async with run_worker(settings, gateway.store, gateway.broker, gateway.database):
        yield


async def test_a_fallback_drops_the_text_of_the_model_before_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    stalled = [ScriptedAnswer(text, fault=ModelFault.STALL) for text in ("First half", "Other half")]
    async with serve_models(*stalled) as served, serve_worker(harness):
        provider_id = await create_provider(people.owner, served.url)
        models = [await create_model(people.owner, provider_id, name=name) for name in ("One", "Two")]
        config = {"model": models[0], "fallbackModelIds": models[1:], "prompt": "How is Oslo?"}
        workflow_id = await people.owner.create(
            nodes=[{"id": "start", "nodeId": "manual"}, {"id": "ask", "nodeId": "llm", "config": config}],
            connections=[{"source": "start", "target": "ask"}],
        )
        execution_id = await execute_workflow(people.owner, workflow_id)
        headers = {"X-API-Key": people.owner.key, "Accept": "text/event-stream"}
        stream = EventStreamClient(harness.app, f"/api/v1/executions/{execution_id}/steps", headers)
        hints = EventStreamClient(harness.app, f"/live?topics=texts:{execution_id}", headers)
        first = await stream.next()
        assert (await read_texts(hints, 1))[0].data == first.data
        served.connections[-1].abort()  # type: ignore[attr-defined]
        retry, second = await stream.next(), await stream.next()
        assert [event.data for event in await read_texts(hints, 2)] == [retry.data, second.data]
        served.released.set()
        ended = await wait_until_ended(people.owner, execution_id)
        rest = await stream.rest()
        assert {event.name for event in await hints.rest()} <= {"hint", "token"}
    assert [event.name for event in (first, retry, second)] == ["token", "retry", "token"]
    assert (first.data["text"], first.data["model"]) == ("First", models[0])
    assert (retry.data["reason"], retry.id) == ("model-unavailable", None)
    assert (second.data["text"], second.data["offset"], second.data["model"]) == ("Other", 0, models[1])
    assert ended["outputs"]["ask"]["response"] == "Other half"
    assert rest[-1].id == "end"


async def read_texts(stream: EventStreamClient, count: int) -> list[StreamEvent]:
    """Return the next events about texts of a stream of hints."""
    found: list[StreamEvent] = []
    while len(found) < count:
        if (event := await stream.next()).name in {"token", "retry"}:
            found.append(event)
    return found


async def test_a_command_prints_a_text_while_it_is_written_and_its_outputs_apart(
    harness: GatewayHarness, people: OrganizationUsers, tmp_path: Path
) -> None:
    stalled = [ScriptedAnswer(text, fault=ModelFault.STALL) for text in ("First half", "Other half")]
    async with serve_models(*stalled) as served, serve_worker(harness), serve_gateway(harness) as url:
        provider_id = await create_provider(people.owner, served.url)
        models = [await create_model(people.owner, provider_id, name=name) for name in ("One", "Two")]
        config = {"model": models[0], "fallbackModelIds": models[1:], "prompt": "How is Oslo?"}
        workflow_id = await people.owner.create(
            nodes=[{"id": "start", "nodeId": "manual"}, {"id": "ask", "nodeId": "llm", "config": config}],
            connections=[{"source": "start", "target": "ask"}],
        )
        given = command_runs.command_environment(tmp_path, URL=url, API_KEY=people.owner.key)
        outputs = tmp_path / "stdout", tmp_path / "stderr"
        for output in outputs:
            output.touch()
        arguments = ("run", workflow_id, "--stream", "--output", "json")
        process = ForkedCommand(command_runs.COMMAND, arguments, given, outputs)
        try:
            await spin_until(lambda: "ask:\nFirst" in outputs[1].read_text())
            served.connections[-1].abort()  # type: ignore[attr-defined]
            await spin_until(lambda: "ask:\nOther" in outputs[1].read_text())
            served.released.set()
            assert await asyncio.to_thread(process.wait, PATIENCE_SECONDS) == 0
        finally:
            process.kill()
    printed = json.loads(outputs[0].read_text())
    assert printed["outputs"]["ask"]["response"] == "Other half"
    assert "\nask: begins again, since the call failed: model-unavailable\n" in outputs[1].read_text()


@pytest.mark.usefixtures("looks")
async def test_a_stream_of_hints_with_texts_ends_with_the_access_of_its_client(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Streams of hints alone check it then.
    monkeypatch.setattr(live_hints, "PING_SECONDS", 1_000.0)
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    key = (await people.owner.api.post("/api/v1/auth/keys", json={"name": "short-lived"})).json()
    async with run_second_gateway(harness, await connect_broker(None)) as there:
        path = f"/live?topics=executions,texts:{execution_id}"
        stream = EventStreamClient(there.app, path, {"X-API-Key": key["key"]})
        await spin_until(lambda: there.gateway.live_hints.streams.taken == 1)
        # No process holds the pending run.
        piece = AnswerPiece(execution_id, "ask", "", 0, 1, 0, "model_1", 0, "Read.")
        there.gateway.live_events.answers.receive(AnswerPieces("", [piece]))
        assert (await read_texts(stream, 1))[0].data["text"] == "Read."
        await people.owner.api.delete(f"/api/v1/auth/keys/{key['id']}")
        await asyncio.wait_for(stream.ended, PATIENCE_SECONDS)


async def test_a_node_without_recorded_contents_shows_no_text(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    async with (
        serve_models(ScriptedAnswer("A secret", fault=ModelFault.STALL)) as served,
        serve_worker(harness),
    ):
        model_id = await create_model(people.owner, await create_provider(people.owner, served.url))
        config = {"model": model_id, "prompt": "How is Oslo?", "recordContent": False}
        workflow_id = await people.owner.create(
            nodes=[{"id": "start", "nodeId": "manual"}, {"id": "ask", "nodeId": "llm", "config": config}],
            connections=[{"source": "start", "target": "ask"}],
        )
        execution_id = await execute_workflow(people.owner, workflow_id)
        headers = {"X-API-Key": people.owner.key, "Accept": "text/event-stream"}
        stream = EventStreamClient(harness.app, f"/api/v1/executions/{execution_id}/steps", headers)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not served.requests:  # noqa: ASYNC110 - of a server without events
                await asyncio.sleep(0.01)
        await asyncio.sleep(10 * COALESCE_SECONDS)
        served.released.set()
        await wait_until_ended(people.owner, execution_id)
        events = await stream.rest()
    assert [event.name for event in events] == ["execution"]


class UnreadStream(EventStreamClient):
    """Client of a stream that may stop to read."""

    def __init__(self, app: Starlette, path: str, headers: dict[str, str]) -> None:
        self.reads = asyncio.Event()
        self.reads.set()
        self.is_full = asyncio.Event()
        """Whether the server waits to send more."""
        super().__init__(app, path, headers)

    async def _send(self, message: Any) -> None:  # noqa: ANN401 - ASGI's message
        if not self.reads.is_set():
            self.is_full.set()
            await self.reads.wait()
        await super()._send(message)


@pytest.mark.usefixtures("looks")
async def test_a_revoked_key_gets_no_text_that_was_written_while_its_client_did_not_read(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    key = (await people.owner.api.post("/api/v1/auth/keys", json={"name": "short-lived"})).json()
    headers = {"X-API-Key": key["key"], "Accept": "text/event-stream"}
    async with run_second_gateway(harness, await connect_broker(None)) as there:
        live = there.gateway.live_events
        has_read, read_steps = asyncio.Event(), AgentStepSource.read

        async def read_when_full(
            source: AgentStepSource, connection: AsyncConnection, key: ExecutionKey, after: int
        ) -> RecordBatch:
            """Return the steps once the client does not read, so that they wait for the texts before them."""
            await stream.is_full.wait()
            has_read.set()
            return await read_steps(source, connection, key, after)

        def write(offset: int, text: str) -> None:
            # No process holds the pending run.
            piece = AnswerPiece(execution_id, "ask", "", 0, 1, 0, "model_1", offset, text)
            live.answers.receive(AnswerPieces("", [piece]))

        monkeypatch.setattr(AgentStepSource, "read", read_when_full)
        monkeypatch.setattr(live_events, "MAX_UNCHECKED_SECONDS", 1_000.0)
        stream = UnreadStream(there.app, f"/api/v1/executions/{execution_id}/steps", headers)
        await spin_until(lambda: live.streams.taken == 1)
        write(0, "Read. ")
        assert (await stream.next()).data["text"] == "Read. "
        stream.reads.clear()
        write(6, "Unread. ")
        await asyncio.wait_for(has_read.wait(), PATIENCE_SECONDS)
        await people.owner.api.delete(f"/api/v1/auth/keys/{key['id']}")
        write(14, "Secret.")
        monkeypatch.setattr(live_events, "MAX_UNCHECKED_SECONDS", 0.0)
        stream.reads.set()
        await asyncio.wait_for(stream.ended, PATIENCE_SECONDS)
    assert b"Unread." in stream.raw
    assert b"Secret." not in stream.raw
