"""Shared suite for the token buckets of both brokers: grants, refusals and reported state."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import redis

from messages.broker import Broker
from messages.broker_connection import connect_broker
from messages.token_buckets import SPARE, BucketRate, LocalTokenBuckets, TokenDemand, TokenGrant
from tests import services

SLOW = BucketRate(per_second=0.01, burst=10)
"""No token is restored during a test."""


@pytest.fixture(params=["redis", "in one process"])
async def brokers(
    request: pytest.FixtureRequest, redis_server: services.RedisServer
) -> AsyncIterator[tuple[Broker, Broker]]:
    """Yield the brokers of two processes; of the same one where there is only one."""
    async with AsyncExitStack() as stack:
        if request.param == "redis":
            with redis.Redis.from_url(redis_server.url) as client:
                client.flushall()
            found = await connect_broker(redis_server.url), await connect_broker(redis_server.url)
        else:
            found = (await connect_broker(None),) * 2
        for broker in set(found):
            stack.push_async_callback(broker.close)
        yield found


async def take_tokens(
    broker: Broker, needed: int, wanted: int = 0, ahead: int = 0, rate: BucketRate = SLOW
) -> TokenGrant:
    (grant,) = await broker.take_tokens([TokenDemand("a", rate, needed, wanted, ahead)])
    return grant


async def test_a_bucket_gives_its_burst_to_all_processes_together(brokers: tuple[Broker, Broker]) -> None:
    one, other = brokers
    assert await take_tokens(one, 4) == TokenGrant(4, 6)
    assert await take_tokens(other, 6) == TokenGrant(6, 0)
    refused = await take_tokens(one, 1)
    assert (refused.tokens, refused.left) == (0, 0)
    assert 40 < refused.wait_seconds <= 100


async def test_a_bucket_grants_needed_tokens_if_available_and_a_part_of_the_rest_ahead(
    brokers: tuple[Broker, Broker],
) -> None:
    wide = BucketRate(per_second=0.01, burst=100)
    assert await take_tokens(brokers[0], 1, wanted=20, ahead=1000, rate=wide) == TokenGrant(
        20 + 80 // SPARE, 80 - 80 // SPARE
    )
    assert await take_tokens(brokers[0], 1, wanted=1000, ahead=1000, rate=wide) == TokenGrant(70, 0)


async def test_a_full_bucket_gives_more_than_it_holds_and_is_in_debt(brokers: tuple[Broker, Broker]) -> None:
    assert await take_tokens(brokers[0], 25) == TokenGrant(25, -15)
    refused = await take_tokens(brokers[0], 25)
    assert refused.tokens == 0
    assert 2440 < refused.wait_seconds <= 2500


async def test_a_bucket_fills_at_its_rate_and_no_further_than_its_burst(
    brokers: tuple[Broker, Broker],
) -> None:
    quick = BucketRate(per_second=200, burst=4)
    assert (await take_tokens(brokers[0], 4, rate=quick)).tokens == 4
    while not (grant := await take_tokens(brokers[0], 4, wanted=100, rate=quick)).tokens:
        assert 0 < grant.wait_seconds <= 0.02
        await asyncio.sleep(grant.wait_seconds)
    assert grant.tokens == 4
    await asyncio.sleep(0.04)  # eight tokens
    assert (await take_tokens(brokers[0], 1, wanted=100, rate=quick)).tokens == 4


async def test_several_buckets_are_asked_at_once_and_know_nothing_of_one_another(
    brokers: tuple[Broker, Broker],
) -> None:
    demands = [TokenDemand(name, SLOW, needed, needed) for name, needed in (("b", 10), ("c", 3))]
    assert await brokers[0].take_tokens(demands) == [TokenGrant(10, 0), TokenGrant(3, 7)]
    again = await brokers[0].take_tokens(demands)
    assert [grant.tokens for grant in again] == [0, 3]


async def test_a_bucket_on_redis_is_gone_when_it_is_full(redis_server: services.RedisServer) -> None:
    broker = await connect_broker(redis_server.url)
    try:
        await broker.take_tokens([TokenDemand("short-lived", BucketRate(per_second=10, burst=5), 3, 3)])
        with redis.Redis.from_url(redis_server.url) as client:
            (key,) = client.keys("*short-lived")
            assert 0 < client.pttl(key) <= 300
    finally:
        await broker.close()


def test_full_buckets_of_one_process_are_dropped() -> None:
    buckets = LocalTokenBuckets()
    for number in range(5_000):
        buckets.take(TokenDemand(f"{number}", BucketRate(per_second=1, burst=10), 1, 1), now=number)
    assert len(buckets._full_at) <= 1_001  # noqa: SLF001 - nothing else tells how many there are
