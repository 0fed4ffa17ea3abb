"""The same request, fifty times at once, on every route of senders: one execution, and one answer for all."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import select
from sqlmodel import col

from models.execution import Execution
from models.ingest import Delivery
from tests import ingest_senders
from tests.ingest_senders import AllSenders
from tests.integration.gateway_harness import GatewayHarness

if TYPE_CHECKING:
    import httpx2

    from engine.values import Json

pytestmark = pytest.mark.every_database

AT_ONCE = 50


@pytest.fixture(scope="module")
async def all_senders(harness: GatewayHarness) -> AllSenders:
    admin = (await harness.people()).admin

    async def post(path: str, body: dict[str, Json]) -> httpx2.Response:
        return await admin.api.post(f"/api/v1{path}", json=body)

    return await ingest_senders.set_up(post, admin.key)


@pytest.mark.parametrize("name", ingest_senders.NAMES)
async def test_fifty_equal_requests_at_once_run_once_and_are_answered_alike(
    harness: GatewayHarness, all_senders: AllSenders, name: str
) -> None:
    sender = all_senders.one(name)
    made = sender.make(sender.delivery().number)
    nobody = await harness.client()
    before = await _read_deliveries(harness)
    answers = await asyncio.gather(*(sender.post(nobody, made) for _ in range(AT_ONCE)))
    assert len({(answer.status_code, answer.content) for answer in answers}) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    execution_id = ingest_senders.read_execution_id(answers[0])
    async with harness.gateway.database.read() as connection:
        runs = await connection.scalars(
            select(col(Execution.id)).where(col(Execution.workflow_id).in_(all_senders.workflows))
        )
        assert [run for run in runs if run not in before.values()] == [execution_id]
    new = {one: of_run for one, of_run in (await _read_deliveries(harness)).items() if one not in before}
    assert set(new.values()) == {execution_id}
    assert len(new) == AT_ONCE
    assert await _count_outcomes(harness, new) == {"accepted": 1, "duplicate": AT_ONCE - 1}


async def _read_deliveries(harness: GatewayHarness) -> dict[str, str | None]:
    """Return the runs of deliveries, by the ids of these."""
    async with harness.gateway.database.read() as connection:
        rows = await connection.execute(select(col(Delivery.id), col(Delivery.execution_id)))
        return {row.id: row.execution_id for row in rows}


async def _count_outcomes(harness: GatewayHarness, deliveries: dict[str, str | None]) -> Counter[str]:
    async with harness.gateway.database.read() as connection:
        statement = select(col(Delivery.outcome)).where(col(Delivery.id).in_(deliveries))
        return Counter(await connection.scalars(statement))
