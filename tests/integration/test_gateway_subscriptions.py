from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select
from sqlmodel import col

from gateway.ingest import event_subscriptions
from gateway.ingest.event_subscriptions import EventSubscription
from models.workflow_triggers import TriggerKind, WorkflowTrigger
from tests.integration import query_plans
from tests.integration.gateway_harness import EDGE, STEP, GatewayHarness, OrganizationUsers, UserClient


def _subscription_graph(*patterns: str) -> dict[str, Any]:
    config = {"event_type": list(patterns)}
    return {
        "nodes": [{"id": "start", "nodeId": "event-trigger", "config": config}, STEP],
        "connections": [EDGE],
    }


async def _create_active_workflow(person: UserClient, *patterns: str) -> str:
    workflow_id = await person.create(**_subscription_graph(*patterns))
    await _set_status(person, workflow_id, "active")
    return workflow_id


async def _set_status(person: UserClient, workflow_id: str, status: str) -> None:
    response = await person.api.put(f"/api/v1/workflows/{workflow_id}/status", json={"status": status})
    assert response.status_code == 200, response.text


async def _read_subscriptions(
    harness: GatewayHarness, person: UserClient, event_type: str
) -> list[EventSubscription]:
    async with harness.gateway.database.read() as connection:
        return [
            *await event_subscriptions.match_subscriptions(
                connection, person.user.organization_id, event_type
            )
        ]


async def _workflows_started_by(harness: GatewayHarness, person: UserClient, event_type: str) -> list[str]:
    return [found.workflow_id for found in await _read_subscriptions(harness, person, event_type)]


async def test_an_event_finds_active_workflows_with_matching_patterns_in_its_organization(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    exact = await _create_active_workflow(people.owner, "user.created")
    prefix = await _create_active_workflow(people.colleague, "user.*")
    both = await _create_active_workflow(people.owner, "user.*", "user.created", "other")
    await _create_active_workflow(people.owner, "user")
    await _create_active_workflow(people.owner, "user.created.*")
    await _create_active_workflow(people.stranger, "user.created")
    await people.owner.create(**_subscription_graph("user.created"))
    assert await _workflows_started_by(harness, people.owner, "user.created") == [exact, prefix, both]
    assert await _workflows_started_by(harness, people.owner, "user.deleted.at.once") == [prefix, both]
    assert await _workflows_started_by(harness, people.owner, "User.created") == []
    (found,) = await _read_subscriptions(harness, people.owner, "other")
    assert (found.node_id, found.owner_id) == ("start", people.owner.user.id)
    assert found.config == {"event_type": ["user.*", "user.created", "other"]}


async def test_a_workflow_is_found_by_its_graph_and_status_of_the_moment(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await _create_active_workflow(owner, "a.b")
    changed = await owner.api.put(f"/api/v1/workflows/{workflow_id}", json=_subscription_graph("c.d"))
    assert changed.status_code == 200
    assert await _workflows_started_by(harness, owner, "a.b") == []
    (found,) = await _read_subscriptions(harness, owner, "c.d")
    assert found.revision == 3
    config = {"config": {"event_type": "e.f"}}
    assert (
        await owner.api.put(f"/api/v1/workflows/{workflow_id}/nodes/start", json=config)
    ).status_code == 200
    assert await _workflows_started_by(harness, owner, "e.f") == [workflow_id]
    await _set_status(owner, workflow_id, "paused")
    assert await _workflows_started_by(harness, owner, "e.f") == [workflow_id]
    await _set_status(owner, workflow_id, "draft")
    assert await _workflows_started_by(harness, owner, "e.f") == []
    await _set_status(owner, workflow_id, "active")
    assert await _workflows_started_by(harness, owner, "e.f") == [workflow_id]
    assert (await owner.api.delete(f"/api/v1/workflows/{workflow_id}")).status_code in {200, 204}
    assert await _workflows_started_by(harness, owner, "e.f") == []


async def test_templates_have_triggers_that_nothing_starts_and_their_copies_have_their_own(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.admin
    workflow_id = await _create_active_workflow(owner, "a.b")
    saved = await owner.api.post(
        f"/api/v1/workflows/{workflow_id}/save-as-template", json={"name": "A template"}
    )
    assert saved.status_code == 201, saved.text
    copied = await owner.api.post(f"/api/v1/workflows/{workflow_id}/duplicate", json={"name": "A copy"})
    assert copied.status_code == 201, copied.text
    copy_id = copied.json()["workflowId"]
    assert await _workflows_started_by(harness, owner, "a.b") == [workflow_id]
    await _set_status(owner, copy_id, "active")
    assert await _workflows_started_by(harness, owner, "a.b") == [workflow_id, copy_id]
    async with harness.gateway.database.read() as connection:
        kinds = select(col(WorkflowTrigger.kind)).where(
            col(WorkflowTrigger.organization_id) == owner.user.organization_id
        )
        assert [*await connection.scalars(kinds)] == [TriggerKind.EVENT] * 3


async def test_a_version_that_is_restored_brings_its_triggers_back(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await _create_active_workflow(owner, "old")
    kept = await owner.api.post(f"/api/v1/workflows/{workflow_id}/versions", json={"versionTag": "v2"})
    assert kept.status_code == 201, kept.text
    assert (
        await owner.api.put(f"/api/v1/workflows/{workflow_id}", json=_subscription_graph("new"))
    ).status_code == 200
    restored = await owner.api.post(f"/api/v1/workflows/{workflow_id}/versions/2/restore", json={})
    assert restored.status_code == 200, restored.text
    assert await _workflows_started_by(harness, owner, "new") == []
    assert await _workflows_started_by(harness, owner, "old") == [workflow_id]


@pytest.mark.every_database
async def test_subscribers_are_read_by_an_index(harness: GatewayHarness) -> None:
    plan = await query_plans.explain_statement(
        harness.gateway.database, event_subscriptions.statement("org_1", "user.created")
    )
    assert "ix_workflow_trigger_match_pattern" in plan
    assert "SCAN workflow" not in plan
    assert "Seq Scan" not in plan
