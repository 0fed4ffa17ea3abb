"""Shared suite of all brokers, followed by faults of Redis and of PostgreSQL."""

import asyncio
from asyncio import Queue
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeVar

import asyncpg
import pytest
import redis
from redis.asyncio import Redis

from messages import postgresql_broker, redis_broker, redis_consumer
from messages.broker import (
    CHANGED_EXECUTIONS,
    Broker,
    BrokerUnavailable,
    ChangedExecutions,
    DirectMessage,
    Notification,
    RedisMayEvict,
)
from messages.broker_connection import connect_broker
from messages.deployer_messages import DeployerMessage, PodLogRequest, ReconcileRequest
from messages.message_seal import MessageSeal
from messages.token_buckets import BucketRate, TokenDemand
from messages.worker_wakeup import ALL_SHARDS
from models.ended_execution import MAX_NOTIFIED_BYTES, EndedExecution
from models.timestamps import DatabaseClock
from tests import services
from tests.integration.run_database import MigratedDatabase

PATIENCE_SECONDS = 60.0
END = {"say": "end"}

Item = TypeVar("Item")


@pytest.fixture(autouse=True)
def _no_consumer_looks_before_its_wakeup_signal_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_consumer, "WAKEUP_SIGNAL_SECONDS", (600.0, 600.0))


@pytest.fixture(autouse=True)
def _a_busy_machine_is_no_failure_of_postgresql(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql_broker, "ANSWER_SECONDS", PATIENCE_SECONDS)


@pytest.fixture
def redis_url(redis_server: services.RedisServer) -> str:
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def deserted_url(redis_server: services.RedisServer) -> Iterator[str]:
    redis_server.stop()
    yield redis_server.url
    redis_server.start()


@pytest.fixture
def postgresql_url(on_postgres: MigratedDatabase) -> str:
    async def empty() -> None:
        connection = await asyncpg.connect(on_postgres.url.replace("+asyncpg", ""))
        await connection.execute("TRUNCATE broker_message, rate_bucket")
        await connection.close()

    asyncio.run(empty())
    return on_postgres.url


@pytest.fixture(params=["redis_url", "postgresql_url"])
def shared_url(request: pytest.FixtureRequest) -> str:
    """Return the address of a server that several processes share."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture(params=["redis_url", "postgresql_url", "in one process"])
def url(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "in one process" else str(request.getfixturevalue(request.param))


@pytest.fixture
async def worker_broker(url: str | None) -> AsyncIterator[Broker]:
    async with _open_broker(url) as broker:
        yield broker


@pytest.fixture
async def other_broker(url: str | None, worker_broker: Broker) -> AsyncIterator[Broker]:
    """Another process on Redis; the same one where there is only one."""
    if url is None:
        yield worker_broker
        return
    async with _open_broker(url) as broker:
        yield broker


@pytest.fixture
async def wakeups(worker_broker: Broker) -> "Queue[int]":
    wakeups: Queue[int] = Queue()
    worker_broker.start_worker(wakeups.put_nowait)
    return wakeups


@pytest.fixture
async def notifications(other_broker: Broker) -> "Queue[Notification]":
    notifications: Queue[Notification] = Queue()
    await other_broker.listen(notifications.put_nowait)
    return notifications


async def test_a_wakeup_names_the_shard_that_has_work(other_broker: Broker, wakeups: Queue[int]) -> None:
    await other_broker.wake_workers(7)
    assert await _next_item(wakeups) == 7
    await other_broker.wake_workers()
    assert await _next_item(wakeups) == ALL_SHARDS


async def test_a_shard_has_one_wakeup_until_that_is_taken(
    other_broker: Broker, worker_broker: Broker
) -> None:
    await other_broker.wake_workers(1)
    await other_broker.wake_workers(2)
    await other_broker.wake_workers(1)
    wakeups: Queue[int] = Queue()
    worker_broker.start_worker(wakeups.put_nowait)
    assert [await _next_item(wakeups), await _next_item(wakeups)] == [1, 2]

    await other_broker.wake_workers(3)
    assert await _next_item(wakeups) == 3
    await other_broker.wake_workers(1)
    assert await _next_item(wakeups) == 1


async def test_a_wakeup_waits_for_a_worker_that_starts_later(
    other_broker: Broker, worker_broker: Broker
) -> None:
    await other_broker.wake_workers(5)
    wakeups: Queue[int] = Queue()
    worker_broker.start_worker(wakeups.put_nowait)
    assert await _next_item(wakeups) == 5


async def test_a_deployer_gets_a_queued_message_once_and_works_beside_a_worker(
    other_broker: Broker, worker_broker: Broker, wakeups: Queue[int]
) -> None:
    messages: Queue[DeployerMessage] = Queue()
    asked = PodLogRequest("wf_a", limit=5, channel="gateway", request_id="logs_1")
    worker_broker.start_deployer(messages.put_nowait)
    await other_broker.notify_deployer(ReconcileRequest("wf_a"))
    assert await _next_item(messages) == ReconcileRequest("wf_a")
    await other_broker.notify_deployer(asked)
    await other_broker.wake_workers(3)
    assert (await _next_item(messages), await _next_item(wakeups)) == (asked, 3)
    await worker_broker.stop_deployer()
    await other_broker.wake_workers(4)
    assert await _next_item(wakeups) == 4


async def test_a_message_to_an_absent_deployer_is_queued_once(shared_url: str) -> None:
    async with _open_broker(shared_url) as other_broker, _open_broker(shared_url) as later:
        for workflow_id in ("wf_a", "wf_b", "wf_a"):
            await other_broker.notify_deployer(ReconcileRequest(workflow_id))
        messages: Queue[DeployerMessage] = Queue()
        later.start_deployer(messages.put_nowait)
        assert [await _next_item(messages), await _next_item(messages)] == [
            ReconcileRequest("wf_a"),
            ReconcileRequest("wf_b"),
        ]
        assert messages.empty()


async def test_one_notification_tells_all_watched_executions_of_a_batch(
    other_broker: Broker, worker_broker: Broker, notifications: Queue[Notification]
) -> None:
    await other_broker.watch(["a", "b", "c"])
    await other_broker.watch(["a"])
    await worker_broker.publish(dict.fromkeys(["a", "unwatched", "b"], ""))
    assert await _next_item(notifications) == ChangedExecutions(("a", "b"))


async def test_a_watch_is_told_once(
    other_broker: Broker, worker_broker: Broker, notifications: Queue[Notification]
) -> None:
    await other_broker.watch(["a"])
    await worker_broker.publish({"a": ""})
    await worker_broker.publish({"a": ""})
    await worker_broker.send(other_broker.channel, END)
    assert await _next_item(notifications) == ChangedExecutions(("a",))
    assert await _next_item(notifications) == DirectMessage(END)


async def test_the_channel_that_comes_with_an_execution_is_told_once_though_it_watches_nothing(
    other_broker: Broker, worker_broker: Broker, notifications: Queue[Notification]
) -> None:
    await other_broker.watch(["b"])
    await worker_broker.publish(
        {"a": other_broker.channel, "b": other_broker.channel, "c": "somebody-else", "d": ""}
    )
    await worker_broker.send(other_broker.channel, END)
    assert await _next_item(notifications) == ChangedExecutions(("a", "b"))
    assert await _next_item(notifications) == DirectMessage(END)


async def test_an_outcome_reaches_the_channel_of_its_execution_and_none_without_its_secret(
    redis_url: str,
) -> None:
    database_clock = DatabaseClock()
    small, large = (
        EndedExecution(name, "completed", 1, 99, None, (("node", f'"{text}"'),), len(text))
        for name, text in (("a", "a secret"), ("b", "x" * MAX_NOTIFIED_BYTES))
    )
    async with AsyncExitStack() as stack:
        heard: dict[str, Queue[Notification]] = {}
        opened = []
        for name, secrets in (("new", [b"2", b"1"]), ("old", [b"1"]), ("other", [b"3"])):
            seal = MessageSeal(secrets[0], secrets[1:], database_clock)
            broker = await connect_broker(redis_url, channel=name, seal=seal)
            stack.push_async_callback(broker.close)
            heard[name] = Queue()
            await broker.listen(heard[name].put_nowait)
            opened.append(broker)
        published = await stack.enter_async_context(_published_texts(redis_url))
        _, old, _ = opened
        # The old secret is among the previous ones of the new process.
        await old.publish({"a": "new", "b": "new"}, [small, large])
        assert await _next_item(heard["new"]) == ChangedExecutions(("a", "b"), (small,))
        await old.publish({"a": "other"}, [small])
        assert await _next_item(heard["other"]) == ChangedExecutions(("a",))
        texts = [await _next_item(published), await _next_item(published)]
        assert not any("a secret" in text for text in texts)


async def test_empty_watches_and_publications_have_no_effect(
    other_broker: Broker, worker_broker: Broker, notifications: Queue[Notification]
) -> None:
    await other_broker.watch([])
    await worker_broker.publish({})
    await worker_broker.send(other_broker.channel, END)
    assert await _next_item(notifications) == DirectMessage(END)


async def test_a_letter_reaches_the_channel_that_it_names_and_no_other(
    other_broker: Broker, worker_broker: Broker, notifications: Queue[Notification]
) -> None:
    await worker_broker.send("nobody", {"stop": "a"})
    await worker_broker.send(other_broker.channel, {"cancel": "b"})
    assert await _next_item(notifications) == DirectMessage({"cancel": "b"})


async def test_every_listener_of_a_process_hears_everything(
    other_broker: Broker, notifications: Queue[Notification]
) -> None:
    others: Queue[Notification] = Queue()
    await other_broker.listen(others.put_nowait)
    await other_broker.send(other_broker.channel, END)
    assert await _next_item(notifications) == await _next_item(others) == DirectMessage(END)


async def test_a_listener_to_a_subject_hears_nothing_else(
    other_broker: Broker, notifications: Queue[Notification]
) -> None:
    ends: Queue[Notification] = Queue()
    changes: Queue[Notification] = Queue()
    await other_broker.listen(ends.put_nowait, subject=next(iter(END)))
    await other_broker.listen(changes.put_nowait, subject=CHANGED_EXECUTIONS)
    await other_broker.send(other_broker.channel, {"other": "a"})
    await other_broker.publish({"a": other_broker.channel})
    await other_broker.send(other_broker.channel, END)
    heard = [await _next_item(notifications) for _ in range(3)]
    assert heard == [DirectMessage({"other": "a"}), ChangedExecutions(("a",)), DirectMessage(END)]
    assert await _next_item(ends) == DirectMessage(END)
    assert await _next_item(changes) == ChangedExecutions(("a",))
    assert ends.empty()
    assert changes.empty()


async def test_an_idle_worker_stops_though_nothing_wakes_it(
    worker_broker: Broker, wakeups: Queue[int]
) -> None:
    await worker_broker.wake_workers()
    await _next_item(wakeups)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await worker_broker.stop_worker()


async def test_each_watching_process_is_told_of_its_own_executions(shared_url: str) -> None:
    heard_by_one: Queue[Notification] = Queue()
    heard_by_other: Queue[Notification] = Queue()
    async with (
        _open_broker(shared_url) as one,
        _open_broker(shared_url) as other,
        _open_broker(shared_url) as recorder,
    ):
        await one.listen(heard_by_one.put_nowait)
        await other.listen(heard_by_other.put_nowait)
        await one.watch(["a", "b"])
        await other.watch(["b", "c"])

        await recorder.publish(dict.fromkeys(["a", "b", "c"], ""))
        assert await _next_item(heard_by_one) == ChangedExecutions(("a", "b"))
        assert await _next_item(heard_by_other) == ChangedExecutions(("b", "c"))


async def test_a_watch_ends_by_itself(redis_url: str) -> None:
    async with _open_broker(redis_url) as broker:
        await broker.watch(["a"])
        async with Redis.from_url(redis_url) as client:
            assert 0 < await client.ttl("pilotflame:watchers:a") <= 15 * 60


async def test_wakeups_that_no_worker_takes_stay_few(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_broker, "WAKEUPS_KEPT", 3)
    async with _open_broker(redis_url) as broker:
        for shard in range(9):
            await broker.wake_workers(shard)
        async with Redis.from_url(redis_url) as client:
            queue = "pilotflame:executions"
            assert await client.llen(queue) == 3
            assert await client.hlen(f"{queue}.msgs") == 3
            assert await client.llen(f"{queue}.wakeup_signal") == 3


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_wake_ups_and_notifications_return_with_redis(
    redis_server: services.RedisServer, redis_url: str, end: str
) -> None:
    async with _open_broker(redis_url) as broker:
        wakeups: Queue[int] = Queue()
        notifications: Queue[Notification] = Queue()
        broker.start_worker(wakeups.put_nowait)
        await broker.listen(notifications.put_nowait)
        await broker.wake_workers()
        await _next_item(wakeups)

        await asyncio.to_thread(getattr(redis_server, end))
        with pytest.raises(BrokerUnavailable):
            await broker.wake_workers(1)
        await asyncio.to_thread(redis_server.start)

        await broker.wake_workers(2)
        assert await _next_item(wakeups) == 2
        async with asyncio.timeout(PATIENCE_SECONDS):
            while notifications.empty():
                await broker.send(broker.channel, END)


async def test_a_flushed_redis_heals_with_the_next_wake_up(redis_url: str) -> None:
    async with _open_broker(redis_url) as broker:
        wakeups: Queue[int] = Queue()
        broker.start_worker(wakeups.put_nowait)
        await broker.wake_workers(1)
        await _next_item(wakeups)
        async with Redis.from_url(redis_url) as client:
            await client.flushall()
            await client.script_flush()

        await broker.wake_workers(1)
        assert await _next_item(wakeups) == 1


async def test_a_caller_can_be_cancelled_while_redis_answers(redis_url: str) -> None:
    async with _open_broker(redis_url) as broker:

        async def wake_for_ever() -> None:
            while True:
                await broker.wake_workers()

        for _ in range(20):
            task = asyncio.create_task(wake_for_ever())
            await asyncio.wait([task], timeout=0.01)
            task.cancel()
            await asyncio.wait([task], timeout=PATIENCE_SECONDS)
            assert task.cancelled()


async def test_without_redis_a_process_starts_says_so_and_stops(deserted_url: str) -> None:
    async with _open_broker(deserted_url) as broker:
        broker.start_worker(lambda _shard: None)
        with pytest.raises(BrokerUnavailable):
            await broker.wake_workers()
        with pytest.raises(BrokerUnavailable):
            await broker.watch(["a"])
        with pytest.raises(BrokerUnavailable):
            await broker.publish({"a": ""})
        with pytest.raises(BrokerUnavailable):
            await broker.send("nobody", END)
        with pytest.raises(BrokerUnavailable):
            await broker.ping()


async def test_a_large_message_arrives_and_a_channel_is_heard_as_long_as_its_process_lives(
    shared_url: str,
) -> None:
    large = {"say": "x" * 20_000}
    notifications: Queue[Notification] = Queue()
    async with _open_broker(shared_url) as sender:
        async with _open_broker(shared_url) as receiver:
            assert not await sender.is_heard(receiver.channel)
            await receiver.listen(notifications.put_nowait)
            assert await sender.is_heard(receiver.channel)
            await sender.send(receiver.channel, large)
            assert await _next_item(notifications) == DirectMessage(large)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await sender.is_heard(receiver.channel):  # noqa: ASYNC110 - of a server, which sets no event
                await asyncio.sleep(0.01)


async def test_buckets_are_shared_and_demands_at_once_take_each_token_once(shared_url: str) -> None:
    rate = BucketRate(per_second=0.001, burst=10)
    both = [TokenDemand("one", rate, needed=1, wanted=1), TokenDemand("two", rate, needed=1, wanted=3)]
    async with _open_broker(shared_url) as broker, _open_broker(shared_url) as other:
        taken = await asyncio.gather(*(each.take_tokens(both) for each in (broker, other) * 8))
    for place in range(2):
        assert sum(grants[place].tokens for grants in taken) == 10
    refused = [grants[0] for grants in taken if not grants[0].tokens]
    assert len(refused) == 6
    assert all(0 < grant.wait_seconds <= 1_000 for grant in refused)


async def test_wakeups_and_notifications_return_with_postgresql(postgresql_url: str) -> None:
    async with _open_broker(postgresql_url) as broker:
        wakeups: Queue[int] = Queue()
        notifications: Queue[Notification] = Queue()
        broker.start_worker(wakeups.put_nowait)
        await broker.listen(notifications.put_nowait)
        await broker.wake_workers()
        await _next_item(wakeups)

        connection = await asyncpg.connect(postgresql_url.replace("+asyncpg", ""))
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        await connection.close()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                try:
                    await broker.wake_workers(2)
                except BrokerUnavailable:
                    await asyncio.sleep(0.01)
                else:
                    break
        assert await _next_item(wakeups) == 2
        async with asyncio.timeout(PATIENCE_SECONDS):
            while notifications.empty():
                await broker.send(broker.channel, END)


async def test_without_postgresql_a_process_starts_says_so_and_stops(free_tcp_port: int) -> None:
    async with _open_broker(f"postgresql://user@127.0.0.1:{free_tcp_port}/nothing") as broker:
        broker.start_worker(lambda _shard: None)
        with pytest.raises(BrokerUnavailable):
            await broker.wake_workers()
        with pytest.raises(BrokerUnavailable):
            await broker.watch(["a"])
        with pytest.raises(BrokerUnavailable):
            await broker.publish({"a": ""})
        with pytest.raises(BrokerUnavailable):
            await broker.send("nobody", END)
        with pytest.raises(BrokerUnavailable):
            await broker.take_tokens([TokenDemand("one", BucketRate(1.0, 1), needed=1, wanted=1)])
        with pytest.raises(BrokerUnavailable):
            await broker.ping()


async def test_a_redis_that_evicts_is_refused(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as client:
        await client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(RedisMayEvict, match="set maxmemory-policy to noeviction, not allkeys-lru"):
                await connect_broker(redis_url)
        finally:
            await client.config_set("maxmemory-policy", "noeviction")


async def test_a_redis_that_does_not_tell_its_policy_is_trusted(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as client:
        await client.acl_setuser(
            "guest",
            enabled=True,
            passwords=["+secret"],
            keys=["*"],
            channels=["*"],
            commands=["+@all", "-info"],
        )
        async with _open_broker(redis_url.replace("redis://", "redis://guest:secret@")) as broker:
            await broker.wake_workers()
        await client.acl_deluser("guest")


@asynccontextmanager
async def _open_broker(url: str | None) -> AsyncIterator[Broker]:
    broker = await connect_broker(url)
    try:
        yield broker
    finally:
        await broker.close()


@asynccontextmanager
async def _published_texts(url: str) -> "AsyncIterator[Queue[str]]":
    """Yield the texts that are published on all channels, as an observer of the server sees them."""
    texts: Queue[str] = Queue()
    client = Redis.from_url(url)

    async def observe() -> None:
        async for event in subscription.listen():
            if event["type"] == "pmessage":
                texts.put_nowait(event["data"].decode())

    async with client, client.pubsub() as subscription:
        await subscription.psubscribe("*")
        observing = asyncio.create_task(observe())
        try:
            yield texts
        finally:
            observing.cancel()


async def _next_item(queue: Queue[Item]) -> Item:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await queue.get()
