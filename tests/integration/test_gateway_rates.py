"""Rate limits of the gateway: shared quotas, and response headers."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import redis

from gateway.executions import request_limits
from messages.broker import BrokerUnavailable
from messages.broker_connection import connect_broker
from messages.local_broker import LocalBroker
from messages.token_buckets import TokenDemand, TokenGrant
from tests.integration.gateway_harness import (
    GRAPH,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.gateway_variants import execute_workflow, run_with_settings
from tests.integration.run_database import MigratedDatabase
from tests.services import RedisServer

SLOW: dict[str, Any] = {"rate_per_key": 0.01, "rate_per_key_burst": 3}
"""No token is restored during a test."""


async def send_many(harness: GatewayHarness, person: UserClient, workflow_id: str, count: int) -> list[int]:
    """Return the statuses of `count` simultaneous requests."""
    answers = await asyncio.gather(*(execute_workflow(harness, person, workflow_id) for _ in range(count)))
    return [answer.status_code for answer in answers]


async def test_without_a_setting_nothing_is_limited_and_nothing_said(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    answer = await execute_workflow(harness, people.owner, await people.owner.create(**GRAPH))
    assert answer.status_code == 201
    assert not any(name.startswith("ratelimit") for name in answer.headers)


async def test_a_key_has_its_burst_is_told_where_it_stands_and_then_refused(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    async with run_with_settings(harness, **SLOW) as gateway:
        told = []
        for _ in range(3):
            answer = await execute_workflow(gateway, people.owner, workflow_id)
            assert answer.status_code == 201
            assert answer.headers["RateLimit-Policy"] == '"key";q=3;w=300'
            told.append(answer.headers["RateLimit"])
        assert told == ['"key";r=2;t=100', '"key";r=1;t=200', '"key";r=0;t=300']
        answer = await execute_workflow(gateway, people.owner, workflow_id)
        assert_refused(answer, 429, "rate-limited")
        assert answer.headers["RateLimit"] == '"key";r=0;t=300'
        assert 90 < int(answer.headers["Retry-After"]) <= 100
        assert (await execute_workflow(gateway, people.admin, workflow_id)).status_code == 201, "another key"


async def test_callers_of_a_workflow_share_its_rate_limit_and_unauthorized_ones_use_none_of_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id, other_id = [await people.owner.create(**GRAPH) for _ in range(2)]
    slow: dict[str, Any] = {"rate_per_workflow": 0.01, "rate_per_workflow_burst": 2}
    async with run_with_settings(harness, **slow) as gateway:
        for person in (people.stranger, people.colleague):
            assert await send_many(gateway, person, workflow_id, 3) == [404] * 3
        assert (await execute_workflow(gateway, people.owner, workflow_id)).status_code == 201
        answer = await execute_workflow(gateway, people.admin, workflow_id)
        assert (answer.status_code, answer.headers["RateLimit"]) == (201, '"workflow";r=0;t=200')
        assert_refused(await execute_workflow(gateway, people.owner, workflow_id), 429, "rate-limited")
        assert (await execute_workflow(gateway, people.owner, other_id)).status_code == 201


async def test_a_request_that_one_limit_refuses_is_not_counted_by_another(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    full, free = [await people.owner.create(**GRAPH) for _ in range(2)]
    async with run_with_settings(
        harness, **SLOW, rate_per_workflow=0.01, rate_per_workflow_burst=1
    ) as gateway:
        assert await send_many(gateway, people.owner, full, 4) == [201, 429, 429, 429]
        assert await send_many(gateway, people.owner, free, 1) == [201]


@pytest.mark.parametrize("kind", ["redis", "postgresql"])
async def test_gateways_share_their_buckets(
    harness: GatewayHarness,
    people: OrganizationUsers,
    redis_server: RedisServer,
    on_postgres: MigratedDatabase,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    # A busy machine may take longer to open a connection than callers wait, after which gateways count by themselves.
    monkeypatch.setattr(request_limits, "ASK_SECONDS", 10.0)
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    url = redis_server.url if kind == "redis" else on_postgres.url
    workflow_id = await people.owner.create(**GRAPH)
    burst: dict[str, Any] = {"rate_per_key": 0.01, "rate_per_key_burst": 7}
    async with (
        run_with_settings(harness, await connect_broker(url), **burst) as one,
        run_with_settings(harness, await connect_broker(url), **burst) as other,
    ):
        answered = await asyncio.gather(
            *(send_many(gateway, people.owner, workflow_id, 8) for gateway in (one, other))
        )
    assert sorted([*answered[0], *answered[1]]) == [201] * 7 + [429] * 9


class BrokerWithoutTokens(LocalBroker):
    """Broker with empty token buckets."""

    async def take_tokens(self, demands: Sequence[TokenDemand]) -> Sequence[TokenGrant]:  # noqa: ARG002 - the broker's own
        raise BrokerUnavailable("Redis is away")


async def test_with_redis_away_each_gateway_counts_by_itself(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    async with run_with_settings(harness, BrokerWithoutTokens(channel="away"), **SLOW) as gateway:
        assert sorted(await send_many(gateway, people.owner, workflow_id, 5)) == [201, 201, 201, 429, 429]
