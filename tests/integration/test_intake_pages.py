"""Pages about inbound requests, without a browser: their rows, reasons and rights."""

from __future__ import annotations

import html
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import insert, update
from sqlmodel import col

from gateway.dashboard.pages import dead_letter_list, trigger_setup
from models import access_store
from models.access import Organization, UserRole
from models.execution import Execution
from models.ingest import Delivery
from models.process_presence import ProcessPresence
from tests.integration.gateway_harness import (
    STEP,
    GatewayHarness,
    OrganizationUsers,
    assert_refused,
    create_gateway,
)
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
    # The page of dead letters leads to requests without a run.
    dead = " ".join((await browser.get("/dashboard/dead-letters")).text.split())
    assert ("2 deliveries were rejected" in dead, "were shed" in dead) == (True, False)
    shed = update(Delivery).where(col(Delivery.outcome) == "rejected").values(outcome="shed")
    await harness.gateway.database.transaction(lambda connection: connection.execute(shed))
    dead = (await browser.get("/dashboard/dead-letters")).text
    assert "2 deliveries were shed</a>" in " ".join(dead.split())
    assert "/dashboard/deliveries?outcome=shed" in dead
    wrong = await browser.get("/dashboard/deliveries?outcome=lost")
    assert (wrong.status_code, "outcome must be one of" in wrong.text) == (400, True)


async def test_a_delivery_has_a_page_with_its_reason_runs_and_redrive(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**{**QUEUE, "name": HOSTILE, "status": "active"})
    execution_id = await enqueue(people.owner, workflow_id, {"text": HOSTILE})
    api, path = people.owner.api, f"{WORKFLOWS}/{workflow_id}"
    await api.put(f"{path}/status", json={"status": "draft"})
    await api.post(f"{path}/enqueue", json={"message": 1, "source": HOSTILE})
    await api.put(f"{path}/status", json={"status": "active"})
    listed = (await api.get(f"{path}/deliveries")).json()["deliveries"]
    refused, accepted = (f"/dashboard/deliveries/{one['id']}" for one in listed)
    browser = await sign_in(harness, people.owner.key)
    assert refused in (await browser.get("/dashboard/deliveries")).text
    shown = await browser.get(accepted)
    assert f"/dashboard/runs/{execution_id}" in shown.text
    assert "Redrive…" in shown.text
    assert listed[1]["contentHash"] in shown.text
    shown = await browser.get(refused)
    assert "workflow-not-active" in shown.text
    assert "It has started no run." in shown.text
    assert "<img" not in shown.text
    assert "<script>alert" not in shown.text
    found = await browser.get(f"/dashboard/search?q={listed[0]['id']}")
    assert found.headers["Location"] == f"deliveries/{listed[0]['id']}"
    stranger = await sign_in(harness, people.stranger.key)
    assert (await stranger.get(accepted)).status_code == 404


async def test_mails_show_their_subject_and_deferred_ones_the_reason(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    trigger = {"id": "start", "nodeId": "email-trigger", "config": {}}
    workflow_id = await owner.create(name="Mails", status="active", nodes=[trigger, STEP])
    path = f"{WORKFLOWS}/{workflow_id}"
    mail = {"from": "mira@example.org", "subject": HOSTILE}
    assert (await owner.api.post(f"{path}/email-trigger", json=mail)).status_code == 201
    await owner.api.put(f"{path}/status", json={"status": "paused"})
    assert (await owner.api.post(f"{path}/email-trigger", json=mail)).status_code == 201
    report = ProcessPresence(
        owner="scheduler_test",
        role="scheduler",
        version="0",
        seen_at=harness.gateway.clock(),
        activity={"retention": {"events": 9}},
    )
    values = report.model_dump()
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(insert(ProcessPresence).values(values))
    )
    browser = await sign_in(harness, owner.key)
    for address in ("/dashboard/deliveries", f"/dashboard/workflows/{workflow_id}/trigger"):
        shown = await browser.get(address)
        assert shown.text.count("mira@example.org") == 2, address
        assert "&lt;script&gt;" in shown.text
        assert "<script>alert" not in shown.text
        assert "The workflow is paused" in shown.text
        assert ">Refused<" not in shown.text
    assert "Kept for 9 days. A mail that comes twice runs once." in shown.text
    paused = await browser.get("/dashboard/deliveries?outcome=deferred&reason=workflow-paused")
    assert paused.text.count("mira@example.org") == 1
    window = await browser.get("/dashboard/deliveries?outcome=deferred&reason=outside-window")
    assert "No delivery matches." in window.text


async def test_settled_dead_letters_lead_to_the_run_in_their_place(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await owner.create(**{**QUEUE, "name": HOSTILE, "status": "active"})
    runs = [await enqueue(owner, workflow_id, {"text": HOSTILE}) for _ in range(3)]
    await fail_alike(harness, runs, HOSTILE, node_id="step", code="timeout")
    path, browser = "/api/v1/dead-letters", await sign_in(harness, owner.key)
    [again] = (await owner.api.post(f"{path}/redrive", json={"filter": {"executionIds": runs[:1]}})).json()[
        "executionIds"
    ]
    await owner.api.post(f"{path}/purge", json={"filter": {"executionIds": runs[1:2]}})
    shown = {
        state: (await browser.get(f"/dashboard/dead-letters?{state}")).text
        for state in ("failure=timed-out", "failure=crashed", "state=redriving", "state=settled")
    }
    late, crashed, redriving, settled = shown.values()
    assert [one in late for one in runs] == [False, False, True]
    assert "No dead letter matches." in crashed
    assert [one in redriving for one in (*runs, again)] == [True, False, False, True]
    assert [one in settled for one in runs] == [False, True, False]
    assert "Discarded" in settled
    assert not any("<img" in text or "<script>alert" in text for text in shown.values())
    assert "data-request" not in redriving.partition("<main")[2].partition("</main>")[0]


async def test_acts_on_a_group_keep_to_the_trigger_of_the_page_and_the_export_to_its_state(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await owner.create(**{**QUEUE, "status": "active"})
    runs = [await enqueue(owner, workflow_id) for _ in range(2)]
    await fail_alike(harness, runs, "Broken", node_id="step")
    earlier = update(Execution).where(col(Execution.id) == runs[0]).values(trigger_type="email")
    await harness.gateway.database.transaction(lambda connection: connection.execute(earlier))
    browser = await sign_in(harness, owner.key)
    page = (await browser.get("/dashboard/dead-letters?trigger_type=email&plan=1")).text
    assert (f"dead-{runs[0]}" in page, f"dead-{runs[1]}" in page) == (True, False)
    sent = [json.loads(html.unescape(one)) for one in re.findall(r'data-sends="([^"]*)"', page)]
    kinds = {one["filter"].get("triggerType") for one in sent if "group" in one.get("filter", {})}
    assert kinds == {"email"}
    assert "Replay 1 with" in page
    await owner.api.post("/api/v1/dead-letters/purge", json={"filter": {"executionIds": runs}})
    page = (await browser.get("/dashboard/dead-letters?state=settled")).text
    assert 'data-exports="/api/v1/dead-letters?state=settled"' in page


async def test_a_schedule_is_run_paused_and_activated_from_its_list(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    clock = {"id": "clock", "nodeId": "schedule-trigger", "config": {"cron": "0 * * * *"}}
    edge = {"sourceNodeId": "clock", "targetNodeId": STEP["id"]}
    workflow_id = await people.owner.create(
        name="Hourly", status="active", nodes=[clock, STEP], connections=[edge]
    )
    browser = await sign_in(harness, people.owner.key)
    path = f"{WORKFLOWS}/{workflow_id}"

    async def list_actions() -> list[str]:
        shown = (await browser.get("/dashboard/schedule")).text
        return [
            one for one in ("Run now", "Pause", "Activate") if f">{one}</button>" in shown and path in shown
        ]

    assert await list_actions() == ["Run now", "Pause"]
    paused = await people.owner.api.put(f"{path}/status", json={"status": "paused"})
    assert paused.is_success, paused.text
    assert await list_actions() == ["Activate"]


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


def test_a_group_of_dead_letters_names_the_versions_that_failed() -> None:
    describe = dead_letter_list.describe_versions
    assert describe([14], 1) == "only version 14"
    assert describe([13, 14], 2) == "versions 13, 14"
    assert describe([13], 2) == "version 13 and 1 other definition"
    assert describe([13, 14], 4) == "versions 13, 14 and 2 other definitions"
    assert describe([], 1) == "one definition"
    assert describe([], 3) == "3 different definitions"


# ── set-up of triggers ──────────────────────────────────────────────────────────────────────────────────────


def graph_of(trigger: str, **config: object) -> dict[str, Any]:
    """Return an active workflow that begins with a trigger of this type."""
    return {
        **QUEUE,
        "status": "active",
        "nodes": [{"id": "start", "nodeId": trigger, "label": "Start", "config": config}, STEP],
    }


@pytest.mark.parametrize(
    ("trigger", "config", "sender", "texts"),
    [
        ("email-trigger", {}, "", ["mx.sendgrid.net", "/email-trigger</code>", "0 of 4 done"]),
        ("email-trigger", {}, "mailgun", ["mxa.mailgun.org", "?format=mime", "HTTP webhook signing key"]),
        ("email-trigger", {}, "ses", ["inbound-smtp.eu-west-1.amazonaws.com", "ARN of the topic"]),
        ("email-trigger", {}, "other", ["message/rfc822", "/mail/"]),
        ("webhook", {}, "", ["Payload URL", "X-Hub-Signature-256"]),
        ("webhook", {}, "stripe", ["Add destination", "Stripe-Signature"]),
        ("webhook", {}, "slack", ["Slash Commands", "X-Slack-Signature"]),
        (
            "webhook",
            {"verification": {"provider": "none"}},
            "",
            ["Requests are accepted without a signature"],
        ),
        ("queue-trigger", {}, "", ["/enqueue-batch", "Send a test message"]),
        ("event-trigger", {"event_type": ["order.*"]}, "", ["order.test", "/api/v1/workflows/events"]),
        ("schedule-trigger", {"cron": "30 2 * * *"}, "", ["30 2 * * *", "Next runs", "2 of 3 done"]),
    ],
)
async def test_the_page_of_a_trigger_shows_the_texts_to_paste_and_their_places(
    harness: GatewayHarness,
    people: OrganizationUsers,
    trigger: str,
    config: dict[str, object],
    sender: str,
    texts: list[str],
) -> None:
    workflow_id = await people.owner.create(**graph_of(trigger, **config))
    browser = await sign_in(harness, people.owner.key)
    page = await browser.get(f"/dashboard/workflows/{workflow_id}/trigger?sender={sender}")
    assert page.status_code == 200
    shown = html.unescape(page.text)
    assert [text for text in texts if text not in shown] == []
    assert ("Waiting for the first delivery…" in shown) is (trigger != "schedule-trigger")
    stranger = await sign_in(harness, people.stranger.key)
    assert (await stranger.get(f"/dashboard/workflows/{workflow_id}/trigger")).status_code == 404


async def test_the_page_of_a_trigger_explains_refused_requests_to_users_with_write_access(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**graph_of("email-trigger"))
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/visibility", json={"isPublic": True})
    anonymous = await harness.client()
    assert (await anonymous.post(f"{WORKFLOWS}/{workflow_id}/email-trigger", json={})).status_code == 401
    await harness.gateway.samples.drain()
    path = f"/dashboard/workflows/{workflow_id}/trigger"
    page = await (await sign_in(harness, people.owner.key)).get(path)
    assert "1 was refused" in page.text
    assert "no valid signature and no token" in page.text
    seen = await (await sign_in(harness, people.colleague.key)).get(path)
    assert "Waiting for the first delivery…" in seen.text
    samples = f"{WORKFLOWS}/{workflow_id}/intake-samples"
    assert (await people.owner.api.get(samples)).json()["samples"][0]["reason"].startswith("unauthorized: ")
    assert_refused(await people.colleague.api.get(samples), 403, "not-owner")
    assert_refused(await people.stranger.api.get(samples), 404, "not-found")
    await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/email-trigger", json={"subject": "Now"})
    mended = await (await sign_in(harness, people.owner.key)).get(path)
    assert "was refused" not in mended.text
    assert "Receiving" in mended.text


async def test_the_page_of_an_event_trigger_shows_the_events_that_arrive(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**graph_of("event-trigger", event_type="order.paid"))
    browser = await sign_in(harness, people.owner.key)
    path = f"/dashboard/workflows/{workflow_id}/trigger"
    assert "Waiting for the first delivery…" in (await browser.get(path)).text
    sent = await browser.post("/api/v1/workflows/events", json={"event_type": "order.paid"})
    assert sent.status_code == 200, sent.text
    page = await browser.get(path)
    assert "Receiving" in page.text
    assert "/dashboard/deliveries?route=events" in page.text


async def test_a_session_sends_test_requests_from_pages_of_this_server_alone(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**graph_of("queue-trigger"))
    browser = await sign_in(harness, people.owner.key)
    url = f"{WORKFLOWS}/{workflow_id}/enqueue"
    sent = await browser.post(url, json={"message": 1})
    assert sent.status_code == 201
    delivery = (await people.owner.api.get(f"{WORKFLOWS}/{workflow_id}/deliveries")).json()["deliveries"][0]
    key_id = (await browser.get("/api/v1/auth/whoami")).json()["keyId"]
    assert (delivery["sender"], delivery["executionId"]) == (f"api-key:{key_id}", sent.json()["executionId"])
    foreign = await browser.post(url, json={"message": 1}, headers={"Sec-Fetch-Site": "cross-site"})
    assert_refused(foreign, 403, "cross-site-request")
    organization = await find_organization(harness, people.owner.user.organization_id)
    viewer = await harness.person(organization, UserRole.VIEWER)
    refused = await (await sign_in(harness, viewer.key)).post(url, json={"message": 1})
    assert_refused(refused, 403, "scope-required")


def test_the_sender_of_a_trigger_is_the_one_that_its_config_names() -> None:
    mail, hook = trigger_setup.SENDERS["email"], trigger_setup.SENDERS["webhook"]
    assert trigger_setup.guess_sender({}, mail) == "sendgrid"
    assert trigger_setup.guess_sender({"ses": {"topics": []}}, mail) == "ses"
    assert trigger_setup.guess_sender({"verification": {"provider": "slack"}}, hook) == "slack"
    assert trigger_setup.guess_sender({"verification": {"provider": "hmac"}}, hook) == "other"
    assert trigger_setup.guess_sender({}, ()) == ""
