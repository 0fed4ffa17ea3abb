"""Pages about inbound requests, without a browser: their rows, reasons and rights."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gateway.dashboard.pages import dead_letter_list
from models import access_store
from models.access import Organization, UserRole
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, create_gateway
from tests.integration.test_dashboard import HOSTILE, sign_in
from tests.integration.test_gateway_deliveries import enqueue
from tests.integration.test_gateway_enqueue import QUEUE, WORKFLOWS
from tests.integration.test_organization_intake import fail_alike
from tests.services import PostgresServer


@pytest.fixture(scope="module")
async def harness(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayHarness]:
    async with create_gateway("sqlite", postgres, tmp_path_factory.mktemp("intake")) as harness:
        yield harness


async def test_deliveries_show_their_reason_and_their_run_as_text(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**{**QUEUE, "name": HOSTILE, "status": "active"})
    execution_id = await enqueue(people.owner, workflow_id)
    api = people.owner.api
    await api.post(
        f"{WORKFLOWS}/{workflow_id}/enqueue", json={"message": 1, "source": HOSTILE, "priority": 999}
    )
    await api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "draft"})
    await api.post(f"{WORKFLOWS}/{workflow_id}/enqueue", json={"message": 1})
    await api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "active"})
    browser = await sign_in(harness, people.owner.key)
    page = await browser.get("/dashboard/deliveries")
    assert page.status_code == 200
    assert f"/dashboard/runs/{execution_id}" in page.text
    assert "workflow-not-active" in page.text
    assert "<script>alert" not in page.text
    assert "<img" not in page.text
    rejected = await browser.get("/dashboard/deliveries?outcome=rejected")
    assert execution_id not in rejected.text
    assert "1 of these can run after all" in " ".join(rejected.text.split())
    assert "POST /api/v1/deliveries/redrive" in rejected.text
    wrong = await browser.get("/dashboard/deliveries?outcome=lost")
    assert (wrong.status_code, "outcome must be one of" in wrong.text) == (400, True)


async def test_samples_of_refused_requests_are_for_admins(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**{**QUEUE, "name": "Orders", "status": "active"})
    anonymous = await harness.client()
    assert (await anonymous.post(f"{WORKFLOWS}/{workflow_id}/enqueue", json={})).status_code == 401
    await harness.gateway.samples.drain()
    for person, sees in ((people.admin, True), (people.owner, False)):
        page = await (await sign_in(harness, person.key)).get("/dashboard/deliveries")
        assert ("Refused before they counted" in page.text) is sees
        assert ("Nothing has arrived yet" in page.text) is True


async def test_dead_letters_show_their_groups_and_a_viewer_gets_no_buttons(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**{**QUEUE, "name": HOSTILE, "status": "active"})
    failed = [await enqueue(people.owner, workflow_id, {"text": HOSTILE}) for _ in range(7)]
    await fail_alike(harness, failed[:6], HOSTILE, node_id="step")
    await fail_alike(harness, failed[6:], "Another", node_id="start")
    browser = await sign_in(harness, people.owner.key)
    page = await browser.get("/dashboard/dead-letters")
    assert "7 in 2 groups" in page.text
    assert "<img" not in page.text
    groups = (await people.owner.api.get("/api/v1/dead-letters/groups")).json()["groups"]
    of_six = await browser.get(f"/dashboard/dead-letters?group={groups[1]['id']}")
    assert failed[5] in of_six.text
    assert failed[0] not in of_six.text  # five rows are shown
    assert 'pattern="6"' in of_six.text
    assert "Show older" in of_six.text
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/visibility", json={"isPublic": True})
    viewer = await harness.person(
        await find_organization(harness, people.owner.user.organization_id), UserRole.VIEWER
    )
    seen = await (await sign_in(harness, viewer.key)).get("/dashboard/dead-letters")
    assert "7 in 2 groups" in seen.text
    assert "data-request" not in seen.text.partition("<main")[2].partition("</main")[0]


async def find_organization(harness: GatewayHarness, organization_id: str) -> Organization:
    async with harness.gateway.database.read() as connection:
        found = await access_store.find_organization(connection, organization_id)
    assert found is not None
    return found


def test_nodes_that_write_are_named_by_the_effect_of_their_config() -> None:
    types = {
        "nodes": [
            {"type": "set", "effect": {"default": "pure"}},
            {"type": "request", "effect": {"default": "write", "field": "method", "cases": {"GET": "read"}}},
        ]
    }
    nodes = [
        {"id": "a", "nodeId": "set", "config": {}},
        {"id": "b", "nodeId": "request", "label": "Look", "config": {"method": "GET"}},
        {"id": "c", "nodeId": "request", "label": "Write", "config": {"method": "POST"}},
        {"id": "d", "nodeId": "request", "config": {"method": {"$expression": "x"}}},
        {"id": "e", "nodeId": "unknown"},
    ]
    assert dead_letter_list.list_writes({"nodes": nodes}, types) == ["Write", "d", "e"]
    assert dead_letter_list.list_writes(None, types) == ()
