"""Guarantee of the bridge for every source: each message starts one run, under every loss and kill."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import pytest

from bridge.bridge_errors import BridgeRefused
from bridge.message_source import MessageSource, SourceMessage
from bridge.redis_stream import RedisStream
from bridge.settings import RefusalAction
from tests import command_runs, fake_gateway, services
from tests.fake_gateway import POISON, BatchRefusal, FakeGateway
from tests.integration import bridge_queues
from tests.integration.bridge_queues import (
    WAIT_SECONDS,
    BridgeQueue,
    BridgeRunner,
    RabbitmqBridgeQueue,
    RedisBridgeQueue,
    SqsBridgeQueue,
    wait_until,
)


@pytest.fixture
async def gateway() -> AsyncIterator[FakeGateway]:
    async with fake_gateway.serve_fake_gateway() as gateway:
        yield gateway


@pytest.fixture
async def redis_queue(
    gateway: FakeGateway, redis_server: services.RedisServer
) -> AsyncIterator[RedisBridgeQueue]:
    async with bridge_queues.open_redis_queue(gateway, redis_server) as bridge_queue:
        yield bridge_queue


@pytest.fixture
async def sqs_queue(gateway: FakeGateway) -> AsyncIterator[SqsBridgeQueue]:
    async with bridge_queues.open_sqs_queue(gateway) as bridge_queue:
        yield bridge_queue


@pytest.fixture
async def rabbitmq_queue(
    gateway: FakeGateway, rabbitmq: services.RabbitmqServer
) -> AsyncIterator[RabbitmqBridgeQueue]:
    async with bridge_queues.open_rabbitmq_queue(gateway, rabbitmq) as bridge_queue:
        yield bridge_queue


@pytest.fixture(params=["redis", "sqs", "rabbitmq"])
async def bridge_queue(request: pytest.FixtureRequest, gateway: FakeGateway) -> AsyncIterator[BridgeQueue]:
    match request.param:
        case "redis":
            server: services.RedisServer = request.getfixturevalue("redis_server")
            async with bridge_queues.open_redis_queue(gateway, server) as redis:
                yield redis
        case "sqs":
            async with bridge_queues.open_sqs_queue(gateway) as sqs:
                yield sqs
        case "rabbitmq":
            broker: services.RabbitmqServer = request.getfixturevalue("rabbitmq")
            async with bridge_queues.open_rabbitmq_queue(gateway, broker) as rabbitmq:
                yield rabbitmq


class ProcessKilled(Exception):
    """Death of the process at a given point."""


class SourceKilledBeforeAck:
    """The source of a process that is killed when the gateway has committed a batch of it."""

    def __init__(self, source: MessageSource) -> None:
        self._source = source
        self.label = source.label

    async def take(self, limit: int, wait_seconds: float) -> Sequence[SourceMessage]:
        return await self._source.take(limit, wait_seconds)

    async def hold(self, ids: Sequence[str]) -> None:
        await self._source.hold(ids)

    async def acknowledge(self, ids: Sequence[str]) -> None:
        raise ProcessKilled(ids)

    async def release(self, ids: Sequence[str]) -> None:
        raise AssertionError(f"Whoever is killed gives nothing back: {ids}")

    async def dead_letter(self, reasons: Mapping[str, str]) -> None:
        raise AssertionError(f"Nothing was refused: {reasons}")

    async def close(self) -> None:
        await self._source.close()


# ── every source ──────────────────────────────────────────────────────────────────────────────────────────


async def test_messages_start_runs_and_are_gone_from_their_source(
    gateway: FakeGateway, bridge_queue: BridgeQueue
) -> None:
    sent = [{"order": number} for number in range(25)]
    await bridge_queue.send(*sent)
    bridge = BridgeRunner(gateway, bridge_queue.open())
    await bridge.run_until(lambda: bridge.transfer.accepted == len(sent))
    assert sorted(gateway.messages, key=json.dumps) == sorted(sent, key=json.dumps)
    assert {run.source for run in gateway.runs.values()} == {bridge.source.label}
    assert bridge.source.label.endswith(f":{bridge_queue.name}")
    assert len(gateway.executions) == len(sent)
    assert await bridge_queue.left() == 0


async def test_a_bridge_that_dies_before_it_acknowledges_loses_and_doubles_nothing(
    gateway: FakeGateway, bridge_queue: BridgeQueue
) -> None:
    sent = list(range(25))
    await bridge_queue.send(*sent)
    with pytest.raises(ProcessKilled):
        await BridgeRunner(gateway, SourceKilledBeforeAck(bridge_queue.open()), batch=10).run()
    committed = len(gateway.runs)
    assert 0 < committed <= 10
    bridge_queue.time_passes()

    after = BridgeRunner(gateway, bridge_queue.open())
    await after.run_until(lambda: after.transfer.accepted + after.transfer.duplicates == len(sent))
    assert after.transfer.duplicates == committed
    assert sorted(gateway.messages) == sent
    assert await bridge_queue.left() == 0


async def test_unanswered_messages_are_sent_again_and_accepted_once(
    gateway: FakeGateway, bridge_queue: BridgeQueue
) -> None:
    gateway.refusals = [BatchRefusal(503, "not-ready", {"Retry-After": "0"})]
    gateway.loses_answers = 1
    await bridge_queue.send("a", "b", "c")
    bridge = BridgeRunner(gateway, bridge_queue.open())
    await bridge.run_until(lambda: bridge.transfer.accepted + bridge.transfer.duplicates == 3)
    assert sorted(gateway.messages) == ["a", "b", "c"]
    assert await bridge_queue.left() == 0


async def test_a_bridge_outlives_its_connection_to_the_source(
    gateway: FakeGateway, bridge_queue: BridgeQueue
) -> None:
    await bridge_queue.send("before")
    bridge = BridgeRunner(gateway, bridge_queue.open())
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(bridge.run())
        await wait_until(lambda: gateway.messages == ["before"])
        await bridge_queue.break_off()
        await bridge_queue.send("after")
        await wait_until(lambda: gateway.messages == ["before", "after"])
        bridge.stop.set()
    assert await bridge_queue.left() == 0


async def test_a_bridge_told_to_stop_while_the_gateway_is_away_lets_others_have_its_messages(
    gateway: FakeGateway, bridge_queue: BridgeQueue
) -> None:
    gateway.is_away = True
    await bridge_queue.send("a", "b")
    await BridgeRunner(gateway, bridge_queue.open()).run_until(lambda: gateway.calls > 0)
    assert not gateway.messages
    gateway.is_away = False
    other = BridgeRunner(gateway, bridge_queue.open(bridge_name="other"))
    await other.run_until(lambda: other.transfer.accepted == 2)
    assert await bridge_queue.left() == 0


async def test_a_message_that_is_refused_stops_the_bridge_and_stays_where_it_is(
    gateway: FakeGateway, bridge_queue: BridgeQueue
) -> None:
    await bridge_queue.send("good", POISON, "better")
    bridge = BridgeRunner(gateway, bridge_queue.open())
    with pytest.raises(BridgeRefused, match="invalid-message: It is poison"):
        await bridge.run()
    # Messages that were not yet accepted are still in the queue.
    assert POISON not in gateway.messages
    assert await bridge_queue.left() == 3 - len(gateway.messages)
    assert not await bridge_queue.dead()


@pytest.mark.parametrize("policy", [RefusalAction.DROP, RefusalAction.DEAD_LETTER])
async def test_a_message_that_is_refused_is_dropped_or_a_dead_letter_where_that_is_wanted(
    gateway: FakeGateway, bridge_queue: BridgeQueue, policy: RefusalAction
) -> None:
    await bridge_queue.send("good", POISON, "better")
    bridge = BridgeRunner(gateway, bridge_queue.open(), on_refused=policy)
    await bridge.run_until_gone(bridge_queue, lambda: sorted(gateway.messages) == ["better", "good"])
    assert await bridge_queue.dead() == ([POISON] if policy is RefusalAction.DEAD_LETTER else [])


# ── redis ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_entries_with_other_fields_are_handed_over_as_objects(
    gateway: FakeGateway, redis_queue: RedisBridgeQueue
) -> None:
    stream, client = redis_queue.name, redis_queue.client
    await client.xadd(stream, {"data": '{"order": 1}', "priority": "7"})
    await client.xadd(stream, {"message": "hello", "user": "5"})
    await client.xadd(stream, {"message": "only text"})
    bridge = BridgeRunner(gateway, redis_queue.open())
    await bridge.run_until(lambda: len(gateway.runs) == 3)
    assert [(run.message, run.priority) for run in gateway.runs.values()] == [
        ({"order": 1}, 7),
        ({"message": "hello", "user": "5"}, 0),
        ("only text", 0),
    ]


async def test_entries_of_a_consumer_that_never_returns_are_claimed_by_another(
    gateway: FakeGateway, redis_queue: RedisBridgeQueue
) -> None:
    await redis_queue.send("a", "b")
    dead = redis_queue.open(bridge_redis_consumer="dead")
    assert len(await dead.take(10, WAIT_SECONDS)) == 2
    await dead.close()
    heir = redis_queue.open(bridge_redis_consumer="heir")
    assert await heir.take(10, WAIT_SECONDS) == []
    await heir.close()

    await redis_queue.make_idle("dead")
    heir = redis_queue.open(bridge_redis_consumer="heir")
    bridge = BridgeRunner(gateway, heir)
    await bridge.run_until(lambda: gateway.messages == ["a", "b"])
    assert await redis_queue.left() == 0


async def test_entries_in_hand_stay_fresh_while_the_gateway_is_away(redis_queue: RedisBridgeQueue) -> None:
    await redis_queue.send("a")
    source = redis_queue.open()
    (message,) = await source.take(10, WAIT_SECONDS)
    await redis_queue.make_idle("dead")
    await source.hold([message.id])
    other = redis_queue.open(bridge_redis_consumer="other")
    assert await other.take(10, WAIT_SECONDS) == []
    await other.close()
    await source.close()


async def test_entries_are_deleted_where_that_is_wanted_and_those_deleted_by_others_do_not_stay_pending(
    gateway: FakeGateway, redis_queue: RedisBridgeQueue
) -> None:
    await redis_queue.send("deleted by its sender", "b")
    source = redis_queue.open(bridge_redis_delete=True)
    first, _ = await source.take(10, WAIT_SECONDS)
    await source.close()
    await redis_queue.client.xdel(redis_queue.name, first.id)
    bridge = BridgeRunner(gateway, redis_queue.open(bridge_redis_delete=True))
    await bridge.run_until(lambda: gateway.messages == ["b"])
    assert await redis_queue.client.xlen(redis_queue.name) == 0
    assert await redis_queue.left() == 0


async def test_a_group_that_is_gone_is_made_again(
    gateway: FakeGateway, redis_queue: RedisBridgeQueue
) -> None:
    bridge = BridgeRunner(gateway, redis_queue.open())
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(bridge.run())
        await redis_queue.send("a")
        await wait_until(lambda: gateway.messages == ["a"])
        await redis_queue.client.delete(redis_queue.name)
        await redis_queue.send("b")
        await wait_until(lambda: gateway.messages == ["a", "b"])
        bridge.stop.set()


async def test_a_key_that_is_no_stream_ends_the_bridge(redis_queue: RedisBridgeQueue) -> None:
    await redis_queue.client.set(redis_queue.name, "text")
    source: RedisStream = redis_queue.open()
    with pytest.raises(BridgeRefused, match="WRONGTYPE"):
        await source.take(10, WAIT_SECONDS)
    await source.close()


# ── sqs ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_entries_of_a_batch_that_have_failed_are_done_again(
    gateway: FakeGateway, sqs_queue: SqsBridgeQueue
) -> None:
    sqs_queue.sqs.half_failures = 1
    await sqs_queue.send("a", "b", "c")
    bridge = BridgeRunner(gateway, sqs_queue.open())
    await bridge.run_until(lambda: bridge.transfer.accepted == 3)
    assert sqs_queue.sqs.actions.count("DeleteMessageBatch") == 2
    assert await sqs_queue.left() == 0


async def test_messages_stay_invisible_while_the_gateway_is_away(
    gateway: FakeGateway, sqs_queue: SqsBridgeQueue
) -> None:
    gateway.is_away = True
    await sqs_queue.send("a")
    bridge = BridgeRunner(gateway, sqs_queue.open())
    (kept,) = sqs_queue.sqs.messages

    def is_held_since() -> bool:
        return kept.visible_at == sqs_queue.sqs.now + bridge_queues.HOLD_SECONDS

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(bridge.run())
        await wait_until(lambda: gateway.calls > 0)
        for _ in range(3):
            sqs_queue.sqs.now += bridge_queues.HOLD_SECONDS / 2
            await wait_until(is_held_since)
        gateway.is_away = False
        await wait_until(lambda: gateway.messages == ["a"])
        bridge.stop.set()
    assert kept.receives == 1


async def test_large_messages_come_whole_though_the_answer_comes_in_pieces(
    gateway: FakeGateway, sqs_queue: SqsBridgeQueue
) -> None:
    await sqs_queue.send(*("x" * 250_000 for _ in range(10)))
    bridge = BridgeRunner(gateway, sqs_queue.open())
    await bridge.run_until(lambda: len(gateway.runs) == 10)
    assert {len(message) for message in gateway.messages} == {250_000}


async def test_priorities_are_attributes_and_session_tokens_are_signed(
    gateway: FakeGateway, sqs_queue: SqsBridgeQueue
) -> None:
    sqs_queue.sqs.session_token = "token"
    sqs_queue.sqs.send("not JSON", priority={"DataType": "Number", "StringValue": "-5"})
    bridge = BridgeRunner(gateway, sqs_queue.open())
    await bridge.run_until(lambda: len(gateway.runs) == 1)
    assert [(run.message, run.priority) for run in gateway.runs.values()] == [("not JSON", -5)]


async def test_a_wrong_secret_ends_the_bridge(sqs_queue: SqsBridgeQueue) -> None:
    source = sqs_queue.open()
    sqs_queue.sqs.secret_access_key = "another"
    with pytest.raises(BridgeRefused, match="InvalidSignatureException"):
        await source.take(10, WAIT_SECONDS)
    await source.close()


async def test_a_queue_without_dead_letters_keeps_refused_messages(
    gateway: FakeGateway, sqs_queue: SqsBridgeQueue
) -> None:
    sqs_queue.sqs.max_receives = None
    await sqs_queue.send(POISON)
    bridge = BridgeRunner(gateway, sqs_queue.open(), on_refused=RefusalAction.DEAD_LETTER)
    with pytest.raises(BridgeRefused, match="no dead-letter queue"):
        await bridge.run()
    assert await sqs_queue.left() == 1


# ── rabbitmq ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_priorities_of_publishers_are_kept_up_to_a_hundred(
    gateway: FakeGateway, rabbitmq_queue: RabbitmqBridgeQueue
) -> None:
    await rabbitmq_queue.publish(b"1", priority=9)
    await rabbitmq_queue.publish(b"2", priority=200)
    await rabbitmq_queue.publish(b"3")
    bridge = BridgeRunner(gateway, rabbitmq_queue.open())
    await bridge.run_until(lambda: len(gateway.runs) == 3)
    assert {run.message: run.priority for run in gateway.runs.values()} == {1: 9, 2: 100, 3: 0}


async def test_messages_without_an_id_are_never_taken_for_one(
    gateway: FakeGateway, rabbitmq_queue: RabbitmqBridgeQueue
) -> None:
    gateway.loses_answers = 1
    await rabbitmq_queue.publish(b'"same"')
    await rabbitmq_queue.publish(b'"same"')
    bridge = BridgeRunner(gateway, rabbitmq_queue.open())
    await bridge.run_until(lambda: bridge.transfer.accepted + bridge.transfer.duplicates == 2)
    assert gateway.messages == ["same", "same"]
    assert bridge.transfer.duplicates > 0


async def test_undecodable_messages_are_refused_apart_from_their_neighbors(
    gateway: FakeGateway, rabbitmq_queue: RabbitmqBridgeQueue
) -> None:
    await rabbitmq_queue.publish(b'"before"')
    await rabbitmq_queue.publish(b"\xff\xfe")
    await rabbitmq_queue.publish(b'"between"')
    await rabbitmq_queue.publish(b'{"twice": 1, "twice": 2}')
    await rabbitmq_queue.publish(b'"after"')
    bridge = BridgeRunner(gateway, rabbitmq_queue.open(), on_refused=RefusalAction.DROP)
    await bridge.run_until(lambda: gateway.messages == ["before", "between", "after"])
    assert await rabbitmq_queue.left() == 0


async def test_a_queue_that_is_not_there_ends_the_bridge(
    gateway: FakeGateway, rabbitmq_queue: RabbitmqBridgeQueue
) -> None:
    bridge = BridgeRunner(gateway, rabbitmq_queue.open())
    running = asyncio.create_task(bridge.run())
    await rabbitmq_queue.send("a")
    await wait_until(lambda: gateway.messages == ["a"])
    await rabbitmq_queue.channel.queue_delete(rabbitmq_queue.name)
    with pytest.raises(BridgeRefused, match="NOT_FOUND"):
        await running


# ── the process ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_process_that_is_killed_before_the_answer_loses_and_doubles_nothing_and_stops_in_good_order(
    gateway: FakeGateway, redis_queue: RedisBridgeQueue, redis_server: services.RedisServer, tmp_path: Path
) -> None:
    await redis_queue.send("a", "b")
    given = {
        **command_runs.command_environment(
            tmp_path,
            URL=gateway.url,
            BRIDGE_REDIS_URL=redis_server.url,
            BRIDGE_WAIT_SECONDS="0.1",
            LOG_LEVEL="debug",
        ),
        "PILOTFLAME_API_KEY": gateway.key,
    }
    typed = ["bridge", "redis", "--workflow", gateway.workflow_id, "--stream", redis_queue.name]
    gateway.loses_answers = 100
    with command_runs.run_command(*typed, given=given, log=tmp_path / "killed") as process:
        await wait_until(lambda: len(gateway.runs) == 2)
        process.kill()
    assert await redis_queue.left() == 2

    gateway.loses_answers = 0
    with command_runs.run_command(*typed, given=given, log=tmp_path / "log") as process:
        await wait_until(lambda: '"taken":2' in process.log())
        assert await asyncio.to_thread(process.stop) == 0
        assert gateway.key not in process.log()
        assert '"event":"bridge stops"' in process.log()
    assert gateway.messages == ["a", "b"]
    assert await redis_queue.left() == 0


async def test_the_command_reports_its_obstacle_in_one_line(
    gateway: FakeGateway, redis_queue: RedisBridgeQueue, redis_server: services.RedisServer, tmp_path: Path
) -> None:
    typed = ["bridge", "redis", "--workflow", gateway.workflow_id, "--stream", redis_queue.name]
    given = command_runs.command_environment(tmp_path, URL=gateway.url, BRIDGE_REDIS_URL=redis_server.url)
    await redis_queue.send("a")
    wrong = {**given, "PILOTFLAME_API_KEY": "sk-wrong"}
    refused = await asyncio.to_thread(lambda: command_runs.run(*typed, given=wrong))
    assert refused.returncode == 2
    assert (
        refused.stderr == "pilotflame: The gateway refused the request: It was refused (401 unauthorized)\n"
    )
    assert await redis_queue.left() == 1
