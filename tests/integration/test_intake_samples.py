"""Unauthenticated requests: counted, sampled, and shown to the owners of the trigger only."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import func, select
from sqlmodel import col

from gateway.ingest.rejected_samples import SLOTS
from models.ingest import Delivery, IngestRoute, RejectedRequestSample
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient, assert_refused

SAMPLES = "/api/v1/intake-samples"
WORKFLOWS = "/api/v1/workflows"
FLOOD = 1_000
AT_ONCE = 50


async def count_samples(harness: GatewayHarness, route: IngestRoute) -> int:
    async with harness.gateway.database.read() as connection:
        statement = (
            select(func.count())
            .select_from(RejectedRequestSample)
            .where(col(RejectedRequestSample.route) == route)
        )
        return await connection.scalar(statement) or 0


async def list_samples(person: UserClient, **query: str) -> list[dict[str, Any]]:
    answer = await person.api.get(SAMPLES, params=query)
    assert answer.status_code == 200, answer.text
    assert answer.json()["count"] == len(answer.json()["samples"])
    found: list[dict[str, Any]] = answer.json()["samples"]
    return found


@pytest.mark.parametrize(("workflows", "rows"), [(1, 20), (FLOOD, SLOTS)], ids=["to one", "to many"])
async def test_a_flood_without_a_key_is_counted_and_leaves_few_rows(
    harness: GatewayHarness, workflows: int, rows: int
) -> None:
    nobody = await harness.client()
    before, already = (
        read_refusal_count("enqueue", "unauthorized"),
        await count_samples(harness, IngestRoute.ENQUEUE),
    )
    tag = uuid4().hex[:8]
    for start in range(0, FLOOD, AT_ONCE):
        paths = [
            f"{WORKFLOWS}/wf_{tag}{number % workflows}/enqueue" for number in range(start, start + AT_ONCE)
        ]
        answers = await asyncio.gather(*(nobody.post(path, json=1) for path in paths))
        assert {answer.status_code for answer in answers} == {401}
    await harness.gateway.samples.drain()
    assert read_refusal_count("enqueue", "unauthorized") == before + FLOOD
    assert await count_samples(harness, IngestRoute.ENQUEUE) <= min(already + rows, SLOTS)
    assert workflows == 1 or await count_samples(harness, IngestRoute.ENQUEUE) == SLOTS
    async with harness.gateway.database.read() as connection:
        assert not await connection.scalar(select(func.count()).select_from(Delivery))


@pytest.mark.every_database
async def test_only_admins_see_requests_to_their_workflows_and_tokens(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create()
    made = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/trigger-token", json={})
    token = made.json()["token"]
    nobody = await harness.client(address="192.0.2.7")
    headers = {"Content-Type": "text/odd\x7f", "X-Secret": "do not keep this"}
    await nobody.post(f"{WORKFLOWS}/{workflow_id}/email-trigger", content=b"12345", headers=headers)
    await nobody.post(f"{WORKFLOWS}/events?key={token}", json={"event_type": "a.b"})
    await nobody.post(f"/hooks/{token}", json={})
    await nobody.post("/hooks/tt-00nobody", json={})
    await nobody.post(f"{WORKFLOWS}/a%00b/enqueue", json={})

    await harness.gateway.samples.drain()
    by_route = {one["route"]: one for one in await list_samples(people.admin)}
    assert set(by_route) == {"email-trigger", "events", "hook"}
    assert {one["workflowId"] for one in by_route.values()} == {workflow_id}
    mail = by_route["email-trigger"]
    assert (mail["method"], mail["address"], mail["contentType"]) == ("POST", "192.0.2.7", "text/odd?")
    assert mail["contentBytes"] == 5
    assert mail["reason"].startswith("unauthorized: ")
    assert "x-secret" in mail["headers"]
    assert by_route["hook"]["reason"].startswith("no-webhook-trigger: ")
    shown = str(by_route)
    assert token not in shown
    assert "do not keep this" not in shown
    assert [one["route"] for one in await list_samples(people.admin, route="hook")] == ["hook"]
    assert not await list_samples(people.stranger)
    assert_refused(await people.owner.api.get(SAMPLES), 403, "admin-required")


async def test_a_refusal_with_a_delivery_leaves_no_sample(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create()
    answer = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/enqueue", json={})
    assert_refused(answer, 409, "workflow-not-active")
    await harness.gateway.samples.drain()
    assert not await list_samples(people.admin)


def read_refusal_count(route: str, reason: str) -> float:
    labels = {"route": route, "reason": reason}
    return REGISTRY.get_sample_value("pilotflame_intake_refusals_total", labels) or 0.0
