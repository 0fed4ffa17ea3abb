"""Largest and most hostile bodies: they don't delay answers to others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from tests import hostile_json, lock_holds
from tests.integration.gateway_harness import GRAPH, GatewayHarness, UserClient, create_gateway
from tests.services import PostgresServer

LENGTH = 990_000
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
async def harness(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayHarness]:
    async with create_gateway("sqlite", postgres, tmp_path_factory.mktemp("holds")) as harness:
        yield harness


@pytest.fixture
async def owner(harness: GatewayHarness) -> UserClient:
    return (await harness.people()).owner


def _large_workflow(config: bytes) -> bytes:
    return (
        b'{"name":"Large","nodes":[{"id":"start","nodeId":"manual","label":"Start"},'
        b'{"id":"step","nodeId":"set","label":"Step","config":{"values":{"a":%s}}}],'
        b'"connections":[{"sourceNodeId":"start","targetNodeId":"step"}]}' % config
    )


async def _assert_blocks_no_other_request(
    person: UserClient, method: str, path: str, body: bytes = b""
) -> None:
    """Send a request up to three times: a hold that it causes occurs each time, a hold by a busy machine does
    not.
    """
    for _ in range(lock_holds.ATTEMPTS):
        headers = {**JSON, "Idempotency-Key": uuid4().hex}
        with lock_holds.measure_holds() as holds:
            response = await person.api.request(method, path, content=body, headers=headers)
        assert response.is_success, response.text[:1_000]
        if holds.longest_seconds < lock_holds.MEGABYTE_SECONDS * lock_holds.machine_slowness():
            return
    pytest.fail(f"{method} {path} held the lock for {holds.longest_seconds:.3f} s")


@pytest.mark.parametrize("name", ["large floats", "small objects", "nested lists", "keys"])
async def test_an_input_of_a_megabyte_does_not_block_other_requests(owner: UserClient, name: str) -> None:
    workflow_id = await owner.create(**GRAPH)
    body = b'{"triggerInputs":{"a":%s}}' % hostile_json.TEXTS[name](LENGTH)
    path = f"/api/v1/workflows/{workflow_id}/execute"
    await _assert_blocks_no_other_request(owner, "POST", path, body)


async def test_a_graph_of_a_megabyte_does_not_block_other_requests(owner: UserClient) -> None:
    graph = _large_workflow(hostile_json.TEXTS["nested lists"](LENGTH))
    await _assert_blocks_no_other_request(owner, "POST", "/api/v1/workflows", graph)
    workflow = (await owner.api.get("/api/v1/workflows?search=Large")).json()["workflows"][0]
    path = f"/api/v1/workflows/{workflow['id']}"
    for method, below in (
        ("PUT", ""),
        ("POST", "/validate"),
        ("GET", "/versions/1/diff/current"),
        ("GET", "/export"),
    ):
        body = _large_workflow(b"[]") if method == "PUT" else b""
        await _assert_blocks_no_other_request(owner, method, f"{path}{below}", body)
