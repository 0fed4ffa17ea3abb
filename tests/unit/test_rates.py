"""Rate limits: their cost in messages, and their precision."""

import asyncio
import time
from collections.abc import Sequence

import pytest
from pydantic import SecretStr

from gateway.executions.request_limits import RateLimit, RunRateLimiter
from gateway.http.errors import ApiError
from gateway.settings import GatewaySettings
from messages.local_broker import LocalBroker
from messages.token_buckets import BucketRate, TokenDemand, TokenGrant

pytestmark = pytest.mark.anyio

SETTINGS = GatewaySettings(secret_key=SecretStr("a secret of more than thirty-two characters"))


class CountingBroker(LocalBroker):
    """Broker that counts its token requests."""

    def __init__(self) -> None:
        super().__init__(channel="counting")
        self.asked = 0
        self.is_silent = False

    async def take_tokens(self, demands: Sequence[TokenDemand]) -> Sequence[TokenGrant]:
        self.asked += 1
        if self.is_silent:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        return await super().take_tokens(demands)


@pytest.fixture
def broker() -> CountingBroker:
    return CountingBroker()


def make_limit(per_second: float, burst: int) -> RateLimit:
    return RateLimit("key", "key:a", BucketRate(per_second, burst))


async def passes_limits(rates: RunRateLimiter, under: RateLimit, count: int = 1) -> bool:
    try:
        await rates.spend([under], count)
    except ApiError:
        return False
    return True


async def test_a_busy_client_costs_few_messages_and_a_refused_one_none(broker: CountingBroker) -> None:
    rates, wide = RunRateLimiter(broker, SETTINGS), make_limit(10_000, 20_000)
    assert all([await passes_limits(rates, wide) for _ in range(2_000)])
    assert broker.asked < 30
    narrow = RateLimit("key", "key:b", BucketRate(0.01, 5))
    assert [await passes_limits(rates, narrow) for _ in range(6)] == [True] * 5 + [False]
    asked = broker.asked
    assert not any([await passes_limits(rates, narrow) for _ in range(100)])
    assert broker.asked == asked


async def test_requests_that_come_together_cost_one_message(broker: CountingBroker) -> None:
    rates = RunRateLimiter(broker, SETTINGS)
    assert all(await asyncio.gather(*(passes_limits(rates, make_limit(1, 100)) for _ in range(100))))
    assert broker.asked == 1


async def test_the_rate_limit_holds_across_many_gateways(broker: CountingBroker) -> None:
    gateways = [RunRateLimiter(broker, SETTINGS) for _ in range(5)]
    rate = BucketRate(per_second=400, burst=100)
    under = RateLimit("key", "key:a", rate)
    began = ended = time.monotonic()
    asked_seconds, count = 0.0, 0
    while ended - began < 0.4:
        count += sum([await passes_limits(gateway, under) for gateway in gateways])
        # A process that gets no processor for a while asks for nothing meanwhile.
        asked_seconds += min(time.monotonic() - ended, 0.1)
        ended = time.monotonic()
    assert 0.5 * (rate.burst + asked_seconds * rate.per_second) < count
    assert count <= rate.burst + (ended - began + 0.5) * rate.per_second


async def test_many_at_once_are_refused_though_single_ones_pass(broker: CountingBroker) -> None:
    rates, under = RunRateLimiter(broker, SETTINGS), make_limit(0.01, 10)
    assert await passes_limits(rates, under, 4)
    assert not await passes_limits(rates, under, 8)
    assert await passes_limits(rates, under, 6)
    assert not await passes_limits(rates, under)


async def test_a_redis_that_hangs_is_waited_for_once(broker: CountingBroker) -> None:
    rates, under = RunRateLimiter(broker, SETTINGS), make_limit(0.01, 10)
    broker.is_silent = True
    began = time.monotonic()
    assert [await passes_limits(rates, under) for _ in range(11)] == [True] * 10 + [False]
    assert broker.asked == 1
    assert time.monotonic() - began < 60
