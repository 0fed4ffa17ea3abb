"""Paused workflows: inbound requests that can't wait are stored, and run once the workflow is active."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select
from sqlmodel import col

from models.execution import Execution
from models.ingest import Delivery
from tests.integration.gateway_harness import EDGE, STEP, GatewayHarness, OrganizationUsers, UserClient

WORKFLOWS = "/api/v1/workflows"
TRIGGERS: dict[str, dict[str, Any]] = {
    "email-trigger": {},
    "event-trigger": {"event_type": "a.b"},
    "webhook": {"verification": {"provider": "none"}, "respond": "when-done"},
}


async def send(person: UserClient, kind: str, workflow_id: str, address: str, number: int) -> str:
    """Send something by which a workflow is to be run; returns the id of the execution."""
    match kind:
        case "email-trigger":
            mail = {"subject": str(number)}
            answer = await person.api.post(f"{WORKFLOWS}/{workflow_id}/email-trigger", json=mail)
        case "event-trigger":
            event = {"event_type": "a.b", "event_data": {"number": number}}
            answer = await person.api.post(f"{WORKFLOWS}/events", json=event)
        case _:
            answer = await person.api.post(address, json={"number": number})
    assert answer.status_code in {200, 201, 202}, answer.text
    told = answer.json()
    execution_id: str = (told["results"][0] if "results" in told else told)["executionId"]
    return execution_id


async def read_runs(harness: GatewayHarness, workflow_id: str) -> list[Any]:
    statement = (
        select(Execution).where(col(Execution.workflow_id) == workflow_id).order_by(col(Execution.rank))
    )
    async with harness.gateway.database.read() as connection:
        return list((await connection.execute(statement)).all())


@pytest.mark.parametrize("goes_on_as", ["active", "archived"])
@pytest.mark.parametrize("kind", TRIGGERS)
async def test_messages_for_a_paused_workflow_run_in_their_order_when_it_is_resumed(
    harness: GatewayHarness, people: OrganizationUsers, kind: str, goes_on_as: str
) -> None:
    owner = people.owner
    trigger = {"id": "start", "nodeId": kind, "config": TRIGGERS[kind]}
    workflow_id = await owner.create(nodes=[trigger, STEP], connections=[EDGE], status="active")
    url = f"{WORKFLOWS}/{workflow_id}"
    urls = (await owner.api.post(f"{url}/trigger-token", json={})).json()["urls"]
    address = urls.get("webhook", "")
    await owner.api.put(f"{url}/status", json={"status": "paused"})
    sent = [await send(owner, kind, workflow_id, address, number) for number in range(3)]
    await owner.api.put(f"{url}", json={"name": "Edited while it is paused"})
    await harness.gateway.store.sweep(100)
    assert {run.status for run in await read_runs(harness, workflow_id)} == {"waiting"}
    async with harness.gateway.database.read() as connection:
        outcomes = await connection.scalars(select(col(Delivery.outcome)))
        assert set(outcomes) == {"deferred"}

    assert (await owner.api.put(f"{url}/status", json={"status": goes_on_as})).status_code == 200
    await harness.gateway.store.sweep(100)
    kept = await read_runs(harness, workflow_id)
    assert [(run.id, run.status, run.target) for run in kept] == [(one, "pending", "shared") for one in sent]
