import asyncio
import signal
import statistics
import subprocess
import sys
import time
from asyncio import Queue, StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import dramatiq
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from messages import redis_consumer, wakeup_worker, worker_wakeup
from messages.broker import Broker, BrokerUnavailable
from messages.broker_connection import connect_broker
from messages.redis_consumer import MESSAGE_ID, BlockingConsumer, WakeupQueues
from tests import services

PATIENCE_SECONDS = 60.0
QUEUE = "pilotflame:executions"
DEAD_LETTERS = f"{QUEUE}.XQ.msgs"
IDLE_CONSUMERS = 16
SOON_SECONDS = 8.0
"""Sooner than a consumer polls without a wakeup."""

COMMAND = """
import asyncio, signal, sys
from messages.broker_connection import connect_broker

async def main():
    broker = await connect_broker(sys.argv[1])
    broker.start_worker(lambda shard: print("wakeup", flush=True))
    told_to_stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_stop.set)
    await told_to_stop.wait()
    await broker.close()

asyncio.run(main())
"""


def _message_body(
    options: Mapping[str, object], *, queue: str = "executions", actor: str = "executions", **payload: object
) -> bytes:
    message: dramatiq.Message[None] = dramatiq.Message(queue, actor, (), payload, dict(options))
    return message.encode()


@pytest.fixture(autouse=True)
def _no_consumer_looks_before_its_wakeup_signal_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_consumer, "WAKEUP_SIGNAL_SECONDS", (600.0, 600.0))


@pytest.fixture
async def client(redis_server: services.RedisServer) -> AsyncIterator[Redis]:
    # With a timeout of the socket, redis-py may swallow the cancellation that ends a wait on Python 3.11.
    async with Redis.from_url(redis_server.url, decode_responses=True, socket_timeout=None) as client:
        await client.flushall()
        yield client


@pytest.fixture
async def broker(redis_server: services.RedisServer, client: Redis) -> AsyncIterator[Broker]:  # noqa: ARG001 - flushed first
    broker = await connect_broker(redis_server.url)
    yield broker
    await broker.close()


@pytest.fixture
async def wakeups(broker: Broker) -> "Queue[int]":
    wakeups: Queue[int] = Queue()
    broker.start_worker(wakeups.put_nowait)
    return wakeups


async def test_an_idle_worker_takes_a_wakeup_within_milliseconds(broker: Broker, wakeups: Queue[int]) -> None:
    seconds = []
    for shard in range(100):
        sent_at = time.perf_counter()
        await broker.wake_workers(shard)
        assert await _next_wakeup(wakeups) == shard
        seconds.append(time.perf_counter() - sent_at)
    median_ms = statistics.median(seconds) * 1000
    print(f"\nidle pick-up: median {median_ms:.1f} ms, slowest {max(seconds) * 1000:.1f} ms")  # noqa: T201 - a figure to read
    assert median_ms < 50  # polling takes longer


async def test_one_wakeup_among_many_idle_consumers_costs_few_commands(
    redis_server: services.RedisServer, client: Redis, broker: Broker
) -> None:
    wakeups: Queue[int] = Queue()

    async def are_idle() -> bool:
        return await client.hlen(f"{QUEUE}.msgs") == 0 and await _are_blocked(client, IDLE_CONSUMERS)

    async with _run_workers(redis_server.url, wakeups, IDLE_CONSUMERS):
        await _wait_until(are_idle)
        await broker.wake_workers()  # loads the script
        await _next_wakeup(wakeups)
        await _wait_until(are_idle)

        before = await _count_commands(client)
        await broker.wake_workers()
        await _next_wakeup(wakeups)
        await _wait_until(are_idle)
        after = await _count_commands(client)
    spent = {name: after[name] - before.get(name, 0) for name in after if after[name] > before.get(name, 0)}
    for asked in ("info", "hlen", "client|list"):  # by this test
        del spent[asked]
    print(f"\none wakeup, {IDLE_CONSUMERS} idle consumers: {sum(spent.values())} commands {spent}")  # noqa: T201 - a figure to read
    assert sum(spent.values()) < 20


async def test_a_lost_wakeup_signal_delays_a_wakeup_by_one_wait_at_most(
    client: Redis, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_consumer, "WAKEUP_SIGNAL_SECONDS", (0.2, 0.3))
    wakeups: Queue[int] = Queue()
    broker.start_worker(wakeups.put_nowait)
    await _wait_until(lambda: _are_blocked(client, 1))
    await _send_wakeup(client, 3)
    assert await _next_wakeup(wakeups) == 3


@pytest.mark.parametrize(
    "body",
    [
        b"\xff{",
        b"[]",
        b'{"queue_name": "executions"}',
        _message_body({MESSAGE_ID: "bad"}, queue="elsewhere"),
        _message_body({MESSAGE_ID: "bad"}, actor="renamed"),
        _message_body({MESSAGE_ID: "bad", "eta": 1}),
        _message_body({}),
        b"[" * 100_000,
    ],
    ids=["bytes", "list", "fields", "queue", "actor", "delayed", "nameless", "deep"],
)
async def test_a_message_that_makes_no_sense_becomes_a_dead_letter_and_harms_no_other(
    client: Redis, broker: Broker, body: bytes
) -> None:
    await _put(client, body, "bad")
    await _send_wakeup(client, 1)
    await _send_wakeup(client, 2)
    wakeups: Queue[int] = Queue()
    broker.start_worker(wakeups.put_nowait)
    assert {await _next_wakeup(wakeups), await _next_wakeup(wakeups)} == {1, 2}

    await _wait_until(lambda: _equals(client.hkeys(DEAD_LETTERS), ["bad"]))
    await _wait_until(lambda: _equals(client.hlen(f"{QUEUE}.msgs"), 0))
    await broker.wake_workers(3)
    assert await _next_wakeup(wakeups) == 3


async def test_an_unreadable_message_is_logged(client: Redis, broker: Broker) -> None:
    with capture_logs() as logs:
        await _put(client, b"?", "bad")
        broker.start_worker(lambda _shard: None)
        await _wait_until(lambda: _equals(client.hkeys(DEAD_LETTERS), ["bad"]))
        await broker.close()
    assert [entry["message_id"] for entry in logs if entry["log_level"] == "error"] == ["b'bad'"]


async def test_a_message_id_without_a_body_is_dropped(client: Redis, broker: Broker) -> None:
    await client.rpush(QUEUE, "bodiless")
    await _send_wakeup(client, 1)
    wakeups: Queue[int] = Queue()
    broker.start_worker(wakeups.put_nowait)
    assert await _next_wakeup(wakeups) == 1
    await _wait_until(lambda: _equals(client.keys("*__acks__*"), []))


async def test_a_payload_from_a_newer_release_is_a_wakeup_for_all_shards(
    client: Redis, wakeups: Queue[int]
) -> None:
    await _put(client, _message_body({MESSAGE_ID: "newer"}, v=2, shards=[1]), "newer")
    await client.rpush(f"{QUEUE}.wakeup_signal", 1)
    assert await _next_wakeup(wakeups) == worker_wakeup.ALL_SHARDS


async def test_runs_of_a_dead_worker_are_reclaimed(
    redis_server: services.RedisServer, client: Redis, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _send_wakeup(client, 4)
    dead = WakeupQueues(redis_server.url)
    assert await asyncio.to_thread(dead.do_fetch, "executions", 1)
    monkeypatch.setattr(redis_consumer, "HEARTBEAT_TIMEOUT_MILLISECONDS", 50)
    monkeypatch.setattr(redis_consumer, "WAKEUP_SIGNAL_SECONDS", (0.05, 0.1))
    wakeups: Queue[int] = Queue()
    broker.start_worker(wakeups.put_nowait)
    assert await _next_wakeup(wakeups) == 4
    dead.close()


async def test_a_redis_that_hangs_is_a_redis_that_is_lost(
    client: Redis, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_consumer, "REDIS_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(redis_consumer, "WAKEUP_SIGNAL_SECONDS", (0.01, 0.02))
    wakeups: Queue[int] = Queue()
    with capture_logs() as logs:
        broker.start_worker(wakeups.put_nowait)
        await client.client_pause(900)
        await broker.wake_workers(1)
        assert await _next_wakeup(wakeups) == 1
    assert [entry["event"] for entry in logs] == ["redis lost", "redis is back"]


async def test_runs_in_a_lost_answer_are_released_again(
    redis_server: services.RedisServer, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_consumer, "HEARTBEAT_TIMEOUT_MILLISECONDS", 50)
    monkeypatch.setattr(redis_consumer, "WAKEUP_SIGNAL_SECONDS", (0.05, 0.1))
    await _load_scripts(redis_server.url)
    await _send_wakeup(client, 6)
    wakeups: Queue[int] = Queue()
    async with _drop_answer_to(b"fetch", redis_server.url) as url:
        broker = await connect_broker(url)
        broker.start_worker(wakeups.put_nowait)
        assert await _next_wakeup(wakeups) == 6
        await broker.close()


async def test_a_wake_up_that_failed_may_have_worked(
    redis_server: services.RedisServer, broker: Broker, wakeups: Queue[int]
) -> None:
    await broker.wake_workers()  # loads the script
    await _next_wakeup(wakeups)
    async with _drop_answer_to(MESSAGE_ID.encode(), redis_server.url) as url:
        gateway = await connect_broker(url)
        with pytest.raises(BrokerUnavailable):
            await gateway.wake_workers(8)
        assert await _next_wakeup(wakeups) == 8
        await gateway.close()


async def test_wakeups_that_a_stopping_worker_held_wake_another(
    redis_server: services.RedisServer, client: Redis, wakeups: Queue[int]
) -> None:
    await _wait_until(lambda: _are_blocked(client, 1))
    leaving = WakeupQueues(redis_server.url)
    leaving.declare_queue("executions")
    consumer = leaving.consume("executions", prefetch=2)
    assert isinstance(consumer, BlockingConsumer)
    await _send_wakeup(client, 1)
    await _send_wakeup(client, 2)
    taken = await asyncio.to_thread(consumer.__next__)
    assert taken is not None

    await asyncio.to_thread(consumer.requeue, [taken])
    await asyncio.to_thread(consumer.close)
    assert {await _next_wakeup(wakeups), await _next_wakeup(wakeups)} == {1, 2}
    leaving.close()


async def test_a_worker_that_waits_for_a_wakeup_ends_soon_after_sigterm(
    redis_server: services.RedisServer, client: Redis, broker: Broker
) -> None:
    command = [sys.executable, "-c", COMMAND, redis_server.url]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    await broker.wake_workers()
    assert process.stdout
    assert await process.stdout.readline() == b"wakeup\n"
    await _wait_until(lambda: _are_blocked(client, 1))

    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), SOON_SECONDS) == 0
    assert await client.hlen(f"{QUEUE}.msgs") == 0


@asynccontextmanager
async def _run_workers(url: str, wakeups: "Queue[int]", count: int) -> AsyncIterator[None]:
    workers = [wakeup_worker.start(WakeupQueues(url), wakeups.put_nowait) for _ in range(count)]
    try:
        yield
    finally:
        await asyncio.gather(*(asyncio.to_thread(wakeup_worker.stop, worker) for worker in workers))


@asynccontextmanager
async def _drop_answer_to(command: bytes, url: str) -> AsyncIterator[str]:
    """Run a proxy to Redis that closes a connection once instead of passing on the answer to `command`."""
    port = int(url.rpartition(":")[2].partition("/")[0])
    cut = asyncio.Event()

    async def carry(reader: StreamReader, writer: StreamWriter) -> None:
        redis_reader, redis_writer = await asyncio.open_connection("127.0.0.1", port)
        is_last = asyncio.Event()

        async def bring_answers() -> None:
            while (answer := await redis_reader.read(65536)) and not is_last.is_set():
                writer.write(answer)
            writer.close()

        answers = asyncio.create_task(bring_answers())
        while request := await reader.read(65536):
            if command in request and not cut.is_set():
                cut.set()
                is_last.set()
            redis_writer.write(request)
        redis_writer.close()
        await answers

    async with await asyncio.start_server(carry, "127.0.0.1") as server:
        yield url.replace(f":{port}", f":{server.sockets[0].getsockname()[1]}")
    assert cut.is_set()


async def _load_scripts(url: str) -> None:
    """Send one wakeup, so that no later command fails with "no such script"."""
    broker = await connect_broker(url)
    wakeups: Queue[int] = Queue()
    broker.start_worker(wakeups.put_nowait)
    await broker.wake_workers()
    await _next_wakeup(wakeups)
    await broker.close()


async def _send_wakeup(client: Redis, shard: int) -> None:
    await _put(client, _message_body({MESSAGE_ID: f"shard-{shard}"}, v=1, shard=shard), f"shard-{shard}")


async def _put(client: Redis, body: bytes, message_id: str) -> None:
    """Enqueue without ringing the wakeup_signal."""
    await client.hset(f"{QUEUE}.msgs", message_id, body)
    await client.rpush(QUEUE, message_id)


async def _count_commands(client: Redis) -> dict[str, int]:
    statistics = await client.info("commandstats")
    return {name.removeprefix("cmdstat_"): entry["calls"] for name, entry in statistics.items()}


async def _are_blocked(client: Redis, count: int) -> bool:
    return sum("b" in entry["flags"] for entry in await client.client_list()) == count


async def _equals(answer: Awaitable[object], expected: object) -> bool:
    return await answer == expected


async def _wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await condition():
            pass


async def _next_wakeup(queue: Queue[int]) -> int:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await queue.get()
