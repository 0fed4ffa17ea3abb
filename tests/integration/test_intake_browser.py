"""Journeys in a browser: a mail arrives, an approval by link, an invitation, a viewer, and a revoked key."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from msgspec.structs import replace
from sqlalchemy import delete
from sqlmodel import col

from gateway.access import openid_sign_in
from models import access_store
from models.access import Organization, UserRole
from models.execution import ExecutionData
from tests.integration.browser import BrowserPage, needs_chromium, open_page, serve_gateway
from tests.integration.dashboard_visit import AXE, RUN_AXE, find_violations, look
from tests.integration.gateway_harness import STEP, GatewayHarness, OrganizationUsers, create_gateway
from tests.integration.openid_server import OpenIdServer, serve_openid
from tests.integration.test_approvals import ask, make_link
from tests.integration.test_gateway_deliveries import enqueue
from tests.integration.test_gateway_enqueue import WORKFLOWS
from tests.integration.test_invitations import invite
from tests.integration.test_openid import SETTINGS as OPENID_SETTINGS
from tests.integration.test_organization_intake import fail_alike
from tests.integration.test_waiting_runs import serve_worker, wait_until_ended
from tests.services import PostgresServer
from tests.signed_requests import SendGrid, SignedRequest

pytestmark = needs_chromium

HOSTILE = "<img src=x onerror=alert(1)>{{ 7 * 7 }}"
FULL = (
    "/dashboard/deliveries",
    "/dashboard/deliveries?outcome=rejected",
    "/dashboard/deliveries/{refused}",
    "/dashboard/dead-letters",
    "/dashboard/dead-letters?state=settled",
    "/dashboard/workflows/{email}/trigger",
    "/dashboard/workflows/{email}/trigger?sender=mailgun",
    "/dashboard/workflows/{email}/trigger?sender=other",
    "/dashboard/workflows/{webhook}/trigger",
    "/dashboard/workflows/{queue}/trigger",
    "/dashboard/workflows/{event}/trigger",
    "/dashboard/workflows/{schedule}/trigger",
    "/dashboard/workflows/{schedule}/trigger?cron=30+7+*+*+mon-fri",
    "/dashboard/schedule",
    "/dashboard/schedule?hours=168",
    "/dashboard/keys",
    "/sign-in?problem=no-account",
    "/invitation#{invitation}",
)
ERRORS = (
    "/dashboard/deliveries?after=nonsense",
    "/dashboard/deliveries?route=nonsense",
    "/dashboard/dead-letters?group=x&workflow_id=" + "x" * 300,
    "/dashboard/schedule?offset=nonsense",
    "/dashboard/workflows/wf_missing/trigger",
)
"""Pages that the API refuses, for reasons of the address."""
TRIGGERS: dict[str, tuple[str, dict[str, Any]]] = {
    "queue": ("queue-trigger", {}),
    "email": ("email-trigger", {}),
    "webhook": ("webhook", {}),
    "event": ("event-trigger", {"event_type": "order.paid"}),
    "schedule": ("schedule-trigger", {"cron": "0 * * * *"}),
}


@dataclass
class IntakeVisit:
    """Browser, and a gateway that has received requests of all kinds."""

    harness: GatewayHarness
    people: OrganizationUsers
    url: str
    page: BrowserPage
    names: dict[str, str]
    """Ids of workflows by their kind of trigger, of a refused delivery, and the fragment of an invitation."""
    sessions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Cookies of the session that each key has begun."""
    key: str | None = None
    """Key of the session that the browser has; None if it has none, or that of an invited person."""

    async def show(self, path: str) -> None:
        path = path.format(**self.names)
        if "#" in path:
            # A change of the fragment alone would not load the page.
            await self.page.open("about:blank")
        await self.page.open(self.url + path, "document.querySelector('h1') !== null")

    async def press(self, key: str, code: int, text: str) -> None:
        """Press a key by its name, its virtual key code, and the text that it types."""
        pressed = {"key": key, "windowsVirtualKeyCode": code}
        await self.page.call("Input.dispatchKeyEvent", type="keyDown", text=text, **pressed)
        await self.page.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    async def sign_out(self) -> None:
        """Forget the session of the browser, on a page that would not notice."""
        # An open page would leave for the sign-in as soon as it notices the end of its session.
        await self.page.open("about:blank")
        await self.page.call("Network.clearBrowserCookies")
        self.key = None

    async def sign_in(self, key: str) -> None:
        """Begin a session with a key, or go on with the one that it has; the page stays if the browser has it."""
        if key == self.key:
            return
        await self.sign_out()
        if key in self.sessions:
            await self.page.call("Network.setCookies", cookies=self.sessions[key])
        else:
            await self._begin_session(key)
        self.key = key

    async def _begin_session(self, key: str) -> None:
        """Begin a session with a key, and keep its cookies."""
        await self.show("/sign-in")
        body = json.dumps({"key": key})
        options = f"{{method: 'POST', headers: {{'Content-Type': 'application/json'}}, body: {body!r}}}"
        assert await self.page.evaluate(f"fetch('/session', {options}).then(answer => answer.status)") == 201
        begun = (await self.page.call("Network.getCookies", urls=[self.url]))["cookies"]
        self.sessions[key] = [
            {name: cookie[name] for name in ("name", "value", "domain", "path", "httpOnly") if name in cookie}
            for cookie in begun
        ]


def graph_of(trigger: str, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": HOSTILE,
        "status": "active",
        "nodes": [{"id": "start", "nodeId": trigger, "label": HOSTILE, "config": config}, STEP],
        "connections": [{"sourceNodeId": "start", "targetNodeId": "step"}],
    }


@pytest.fixture(scope="module")
async def visit(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[IntakeVisit]:
    folder: Path = tmp_path_factory.mktemp("intake")
    async with (
        create_gateway("sqlite", postgres, folder) as harness,
        serve_gateway(harness) as url,
        open_page(folder / "profile") as page,
    ):
        people = await harness.people()
        names = {kind: await people.admin.create(**graph_of(*one)) for kind, one in TRIGGERS.items()}
        runs = [await enqueue(people.admin, names["queue"], {"text": HOSTILE}) for _ in range(3)]
        await fail_alike(harness, runs[:2], HOSTILE, node_id="step")
        queue = f"{WORKFLOWS}/{names['queue']}"
        await people.admin.api.put(f"{queue}/status", json={"status": "draft"})
        await people.admin.api.post(f"{queue}/enqueue", json={"message": 1})
        await people.admin.api.put(f"{queue}/status", json={"status": "active"})
        anonymous = await harness.client()
        await anonymous.post(f"{WORKFLOWS}/{names['webhook']}/email-trigger", json={})
        await harness.gateway.samples.drain()
        listed = await people.admin.api.get("/api/v1/deliveries?outcome=rejected")
        names["refused"] = listed.json()["deliveries"][0]["id"]
        names["invitation"] = (await invite(people.admin))["url"].partition("#")[2]
        yield IntakeVisit(harness, people, url, page, names)


async def require_accessible(visit: IntakeVisit, path: str) -> None:
    """Check that a page has no violation, fits, and breaks no policy, in both schemes and at two widths."""
    visit.page.problems.clear()
    await visit.show(path)
    assert await find_violations(visit.page) == [], path
    assert await visit.page.count("main img, main script") == 0
    refusals = ("400 (Bad Request)", "404 (Not Found)")
    problems = [one for one in visit.page.problems if not any(refusal in one for refusal in refusals)]
    assert problems == []


@pytest.mark.parametrize("path", FULL)
async def test_full_pages_of_intake_have_no_violation_of_accessibility(visit: IntakeVisit, path: str) -> None:
    await visit.sign_in(visit.people.admin.key)
    await require_accessible(visit, path)


async def test_refusals_of_pages_of_intake_have_no_violation_of_accessibility(visit: IntakeVisit) -> None:
    await visit.sign_in(visit.people.admin.key)
    for path in ERRORS:
        await require_accessible(visit, path)
        assert await visit.page.evaluate("document.querySelector('.banner code') !== null"), path
    visit.page.problems.clear()  # the browser logs the refusals


async def test_a_mail_of_sendgrid_appears_on_the_open_page_of_its_trigger(visit: IntakeVisit) -> None:
    page, send_grid = visit.page, SendGrid()
    workflow_id = await visit.people.owner.create(**graph_of("email-trigger", {}))
    await visit.sign_in(visit.people.owner.key)
    await look(visit.page, 1280, "light")
    await visit.show(f"/dashboard/workflows/{workflow_id}/trigger")
    await page.wait_for("document.querySelector('.live').dataset.state === 'live'")
    assert await page.evaluate("document.querySelector('.title .pill').innerText.trim()") == (
        "Waiting for the first delivery…"
    )
    # The first mail is not signed by a known key; the page says so while it stays open.
    address = await page.text("#url")
    sender = await visit.harness.client()
    mail = send_grid.mail(1)
    path = address.removeprefix(visit.url)
    refused = await sender.post(path, content=mail.body, headers=dict(mail.headers))
    assert refused.status_code == 401
    await page.wait_for("document.querySelector('main .banner.failed') !== null")
    # What is typed stays while the page updates itself.
    public_key = send_grid.public_key
    await page.fill("#public-key", public_key)
    await page.click("form[data-request^='PUT'] button[type=submit]")
    await page.wait_for(
        "document.querySelectorAll('.steps .no.done').length >= 3"
        " && document.querySelector('#public-key').value !== ''"
    )
    await page.evaluate("window.isSamePage = true")
    accepted = await post_until_accepted(sender, path, send_grid.mail(2))
    await page.wait_for("document.querySelector('.title .pill').innerText.trim() === 'Receiving'")
    await page.wait_for("document.querySelector('main .banner.failed') === null")
    run = accepted.json()["executionId"]
    await page.wait_for(f"document.querySelector('a[href$=\"{run}\"]') !== null")
    assert await page.evaluate("window.isSamePage === true")
    page.problems.clear()


async def post_until_accepted(sender: httpx2.AsyncClient, path: str, mail: SignedRequest) -> httpx2.Response:
    """Send a mail like its service, which repeats it: the gateway may know the earlier config for a moment."""
    async with asyncio.timeout(30):
        while True:
            answer = await sender.post(path, content=mail.body, headers=dict(mail.headers))
            if answer.status_code in {201, 202}:
                return answer
            await asyncio.sleep(0.2)


async def test_a_test_message_is_sent_from_the_page_and_arrives_beside_it(visit: IntakeVisit) -> None:
    page = visit.page
    workflow_id = await visit.people.owner.create(**graph_of("queue-trigger", {}))
    await visit.sign_in(visit.people.owner.key)
    await visit.show(f"/dashboard/workflows/{workflow_id}/trigger")
    await page.click("form[data-request$='/enqueue'] button[type=submit]")
    await page.wait_for("document.querySelector('.title .pill').innerText.trim() === 'Receiving'")
    await page.fill("#message", "no JSON")
    await page.click("form[data-request$='/enqueue'] button[type=submit]")
    await page.wait_for("document.querySelector('#message').validationMessage.includes('no JSON')")
    assert page.problems == []


async def test_a_start_by_hand_becomes_a_webhook_without_a_signature_on_one_page(visit: IntakeVisit) -> None:
    page = visit.page
    workflow_id = await visit.people.owner.create(**graph_of("manual", {}))
    await visit.sign_in(visit.people.owner.key)
    await visit.show(f"/dashboard/workflows/{workflow_id}/trigger?sender=other")
    assert await find_violations(page) == []
    await page.click("form[data-sends*='webhook'] button")
    await page.click("form[data-request$='/trigger-token'] button")
    await page.wait_for("document.querySelector('#shown').open")
    path = (await page.text("#shown-value")).removeprefix(visit.url)
    await page.click("#shown [data-closes]")
    sender = await visit.harness.client()
    refused = await sender.post(path, json={})
    assert refused.status_code == 422, refused.text
    await page.wait_for("document.querySelector('main .banner.failed') !== null")
    await page.click("form[data-sends*='\"none\"'] button")
    await page.click("[data-confirms]")
    await page.wait_for("document.querySelector('#toast').textContent.startsWith('Saved: it applies')")
    await post_until_accepted(sender, path, SignedRequest({"Content-Type": "application/json"}, b"{}"))
    await page.wait_for("document.querySelector('.title .pill').innerText.trim() === 'Receiving'")
    nodes = (await visit.people.owner.workflow(workflow_id))["nodes"]
    assert nodes[0]["nodeId"] == "webhook"
    page.problems.clear()


async def test_dead_letters_are_redriven_after_their_number_is_typed(visit: IntakeVisit) -> None:
    page = visit.page
    workflow_id = await visit.people.owner.create(**graph_of("queue-trigger", {}))
    runs = [await enqueue(visit.people.owner, workflow_id, number) for number in range(2)]
    await fail_alike(visit.harness, runs, "Broken", node_id="step")
    await visit.sign_in(visit.people.owner.key)
    await visit.show("/dashboard/dead-letters")
    await page.click("details.confirm:not(.picked) > summary")
    field, button = "details.confirm[open] .input", "details.confirm[open] button[type=submit]"
    await page.fill(field, "3")
    await page.click(button)
    await page.wait_for(f"!document.querySelector({field!r}).checkValidity()")
    await page.fill(field, "2")
    await page.click("details.confirm[open] [name=firstAlone]")
    await page.click(button)
    await page.wait_for("document.querySelector('#toast').textContent.includes('2 of 2 redriven')")
    await page.wait_for("document.querySelector('.empty') !== null")
    assert page.problems == []


async def test_a_redrive_goes_on_without_the_page_changes_its_pace_and_is_stopped(visit: IntakeVisit) -> None:
    page, owner = visit.page, visit.people.owner
    workflow_id = await owner.create(**graph_of("queue-trigger", {}))
    runs = [await enqueue(owner, workflow_id, number) for number in range(20)]
    await fail_alike(visit.harness, runs, "Broken", node_id="step")
    await visit.sign_in(owner.key)
    address = f"/dashboard/dead-letters?workflow_id={workflow_id}"
    await visit.show(address)
    await page.click("details.confirm:not(.picked) > summary")
    await page.fill("details.confirm[open] .input", "20")
    await page.wait_for("document.querySelector('details.confirm[open] [name=perSecond]').value = '2'")
    await page.click("details.confirm[open] button[type=submit]")
    said = "document.querySelector('[data-operation] [data-progress-text]')?.textContent ?? ''"
    await page.wait_for(f"({said}).startsWith('1 of 20 redriven')")
    await page.evaluate(f"{AXE}; 0")
    assert await page.evaluate(RUN_AXE) == []

    async def read_operation() -> dict[str, Any]:
        listed = await owner.api.get("/api/v1/bulk-operations?limit=1")
        found: dict[str, Any] = listed.json()["operations"][0]
        return found

    assert (await read_operation())["done"] == 1, "the others wait for the end of the first"
    # A change of the pace is taken back by a key.
    pace = "document.querySelector('[data-operation] select')"
    await page.wait_for(f"{pace} !== null")
    await page.evaluate(f"{pace}.value = '10'; {pace}.dispatchEvent(new Event('change', {{bubbles: true}}))")
    await page.wait_for("document.querySelector('#toast button') !== null")
    assert "It takes 10 a second now" in await page.text("#toast")
    assert (await read_operation())["perSecond"] == 10
    await page.evaluate("document.activeElement.blur()")
    await visit.press("z", 90, "z")
    await page.wait_for("document.querySelector('#toast').textContent === 'Undone'")
    assert (await read_operation())["perSecond"] == 2
    await visit.show("/dashboard/keys")
    async with serve_worker(visit.harness):
        async with asyncio.timeout(60):
            while (await read_operation())["done"] < 2:  # noqa: ASYNC110 - the server performs it
                await asyncio.sleep(0.05)
        await visit.show(address)
        await page.click("[data-operation] form[data-request$='/stop'] button")
        await page.wait_for("document.querySelector('#toast').textContent.includes('Stopped')")
    await page.wait_for("document.querySelector('#ended-operations') !== null")
    ended = await read_operation()
    path = f"/api/v1/dead-letters?workflow_id={workflow_id}&limit=100"
    left = (await owner.api.get(path)).json()["deadLetters"]
    assert (ended["status"], len(left)) == ("stopped", 20 - ended["done"])
    assert page.problems == []


async def test_all_runs_of_a_filter_are_canceled_or_resumed_after_their_number_is_typed(
    visit: IntakeVisit,
) -> None:
    page, owner = visit.page, visit.people.owner
    workflow_id = await owner.create(**graph_of("queue-trigger", {}))
    runs = [await enqueue(owner, workflow_id, number) for number in range(5)]
    await fail_alike(visit.harness, runs[:2], "Broken", node_id="step")
    await visit.sign_in(owner.key)
    for state, word, count in (("pending", "canceled", 3), ("failed", "resumed", 2)):
        await visit.show(f"/dashboard/runs?workflow_id={workflow_id}&status={state}")
        await page.follow(".title a.button")
        await page.wait_for("document.querySelector('#act form') !== null")
        await page.evaluate(f"{AXE}; 0")
        assert await page.evaluate(RUN_AXE) == []
        await page.fill("#act .input", str(count + 1))
        await page.click("#act button[type=submit]")
        await page.wait_for("!document.querySelector('#act .input').checkValidity()")
        await page.fill("#act .input", str(count))
        if state == "failed":
            await page.click("#act [name=firstAlone]")
        await page.click("#act button[type=submit]")
        await page.wait_for(
            f"document.querySelector('#toast').textContent.includes('{count} of {count} {word}')"
        )
        await page.wait_for("document.querySelector('#act') === null")
    # Of the others, two chosen ones are replayed after a look at their plan.
    others = [await enqueue(owner, workflow_id, number) for number in range(3)]
    await fail_alike(visit.harness, others, "Broken again", node_id="step")
    await visit.show(f"/dashboard/runs?workflow_id={workflow_id}&status=failed")
    for one in others[:2]:
        await page.click(f"tr[id='{one}'] [data-pick]")
    await page.follow("[data-picked] a.main")
    assert await page.text("#act h2") == "Replay 2 runs"
    assert not await page.evaluate("document.querySelector('.live').dataset.topics"), "planned once"
    await page.evaluate(f"{AXE}; 0")
    assert await page.evaluate(RUN_AXE) == []
    await page.click("#act [name=definition] [value=current]")
    await page.follow("#act .filters button")
    await page.fill("#act .form .input", "2")
    await page.click("#act [name=firstAlone]")
    await page.click("#act .form button[type=submit]")
    await page.wait_for("document.querySelector('#toast').textContent.includes('2 of 2 replayed')")
    newest = (await owner.api.get(f"/api/v1/executions?workflow_id={workflow_id}&limit=2")).json()
    assert {one["replayOf"] for one in newest["executions"]} == set(others[:2])
    # Without a filter, there is no act on all; a reason of waits is no filter of a bulk act.
    await visit.show("/dashboard/runs")
    assert await page.evaluate("document.querySelector('.title a.button') === null")
    await visit.show(f"/dashboard/runs?workflow_id={workflow_id}&status=pending&reason=queued-behind")
    assert await page.evaluate("document.querySelector('.title a.button') === null")
    listed = (await owner.api.get(f"/api/v1/executions?workflow_id={workflow_id}&limit=50")).json()
    ended = [one["status"] for one in listed["executions"] if one["id"] in runs]
    assert sorted(ended) == ["cancelled"] * 3 + ["failed"] * 2
    assert page.problems == []


async def test_a_refused_dead_letter_counts_once_and_holds_up_no_other(visit: IntakeVisit) -> None:
    page, owner = visit.page, visit.people.owner
    workflow_id = await owner.create(**graph_of("queue-trigger", {}))
    runs = [await enqueue(owner, workflow_id, number) for number in range(5)]
    await fail_alike(visit.harness, runs, "Broken", node_id="step")
    lost = delete(ExecutionData).where(col(ExecutionData.execution_id) == runs[0])
    await visit.harness.gateway.database.transaction(lambda connection: connection.execute(lost))
    await visit.sign_in(owner.key)
    await visit.show(f"/dashboard/dead-letters?workflow_id={workflow_id}")
    await page.click("details.confirm:not(.picked) > summary")
    await page.fill("details.confirm[open] .input", "5")
    await page.click("details.confirm[open] [name=firstAlone]")
    await page.click("details.confirm[open] button[type=submit]")
    await page.wait_for("document.querySelector('#toast').textContent.includes('4 of 5 redriven, 1 refused')")
    every = {"filter": {"workflowId": workflow_id}}
    assert (await owner.api.post("/api/v1/dead-letters/purge", json=every)).json()["purged"] == 1
    assert page.problems == []


async def test_a_first_redrive_that_fails_ends_the_others(visit: IntakeVisit) -> None:
    page = visit.page
    broken = graph_of("queue-trigger", {})
    broken["nodes"][1] = {"id": "step", "nodeId": "template", "config": {"text": "{{ data.missing }}"}}
    workflow_id = await visit.people.owner.create(**broken)
    runs = [await enqueue(visit.people.owner, workflow_id, number) for number in range(3)]
    await fail_alike(visit.harness, runs, "Broken", node_id="step")
    await visit.sign_in(visit.people.owner.key)
    await visit.show(f"/dashboard/dead-letters?workflow_id={workflow_id}")
    async with serve_worker(visit.harness):
        await page.click("details.confirm:not(.picked) > summary")
        await page.fill("details.confirm[open] .input", "3")
        await page.click("details.confirm[open] button[type=submit]")
        await page.wait_for("document.querySelector('#toast').textContent.startsWith('The first one')")
    path = f"/api/v1/dead-letters?workflow_id={workflow_id}"
    assert len((await visit.people.owner.api.get(path)).json()["deadLetters"]) >= 2
    assert page.problems == []


async def test_a_group_is_replayed_after_its_plan_and_another_is_muted(visit: IntakeVisit) -> None:
    page, owner = visit.page, visit.people.owner
    graph = graph_of("queue-trigger", {})
    step = {**STEP, "nodeId": "template", "config": {"text": "{{ data.missing }}"}}
    workflow_id = await owner.create(**{**graph, "nodes": [graph["nodes"][0], step]})
    await visit.sign_in(owner.key)
    async with serve_worker(visit.harness):
        for run in [await enqueue(owner, workflow_id, number) for number in range(3)]:
            await wait_until_ended(owner, run)
        await visit.show(f"/dashboard/dead-letters?workflow_id={workflow_id}")
        assert "The workflow is as it was" in await page.evaluate(
            "document.querySelector('main').textContent"
        )
        step["config"] = {"text": "mended"}
        mended = await owner.api.put(f"{WORKFLOWS}/{workflow_id}/nodes/step", json={"config": step["config"]})
        assert mended.status_code == 200, mended.text
        await visit.show(f"/dashboard/dead-letters?workflow_id={workflow_id}")
        assert "was changed since" in await page.text("main")
        await page.follow("a[href$='plan=1#plan']")
        plan = await page.text("#plan")
        assert "3 results are reused, 3 nodes run" in " ".join(plan.split())
        await page.evaluate(f"{AXE}; 0")
        assert await page.evaluate(RUN_AXE) == []
        await page.fill("#plan .input", "3")
        await page.click("#plan button[type=submit]")
        await page.wait_for("document.querySelector('#toast').textContent.startsWith('3 of 3 replayed')")
        await page.wait_for("document.querySelector('.empty') !== null")

    runs = [await enqueue(owner, workflow_id, number) for number in range(2)]
    await fail_alike(visit.harness, runs, "Known", node_id="step")
    await visit.show(f"/dashboard/dead-letters?workflow_id={workflow_id}")
    await page.wait_for("document.querySelector('#mute-reason').closest('details').open = true")
    await page.fill("#mute-reason", HOSTILE)
    await page.click("form[data-request$='/mute'] button[type=submit]")
    await page.wait_for("document.querySelector('a.chip[href$=\"muted=true\"]') !== null")
    await page.wait_for("document.querySelector('#mute-reason') === null")
    await visit.show("/dashboard/dead-letters?muted=true")
    assert HOSTILE in await page.text("main")
    await page.evaluate(f"{AXE}; 0")
    assert await page.evaluate(RUN_AXE) == []
    await page.follow("main form[data-request^=DELETE] button")
    await page.wait_for("location.search === '' && document.querySelector('#mute-reason') !== null")
    assert page.problems == []
    every = {"filter": {"workflowId": workflow_id}}
    assert (await owner.api.post("/api/v1/dead-letters/purge", json=every)).json()["purged"] == 2


async def test_chosen_rows_are_redriven_and_discarded_by_keyboard(  # noqa: PLR0915 - one journey
    visit: IntakeVisit,
) -> None:
    page, owner = visit.page, visit.people.owner
    workflow_id = await owner.create(**graph_of("queue-trigger", {}))
    runs = [await enqueue(owner, workflow_id, number) for number in range(4)]
    await fail_alike(visit.harness, runs, "Broken", node_id="step")
    await visit.sign_in(owner.key)
    await look(page, 1280, "light")
    await visit.show(f"/dashboard/dead-letters?workflow_id={workflow_id}")
    await page.wait_for("document.querySelector('[data-picking]').dataset.watched === ''")

    async def press_space_on(selector: str) -> None:
        await page.wait_for(f"document.querySelector({selector!r}) !== null")
        await page.evaluate(f"document.querySelector({selector!r}).focus()")
        await visit.press(" ", 32, " ")

    async def confirm(request: str, count: int) -> None:
        form = f"form[data-picks][data-request$={request!r}]"
        await page.evaluate(f"document.querySelector({form!r}).closest('details').open = true")
        await page.fill(f"{form} .input", str(count))
        await page.evaluate(f"document.querySelector({form!r}).querySelector('.input').focus()")
        await visit.press("Enter", 13, "\r")

    async def list_open() -> set[str]:
        found = (await owner.api.get(f"/api/v1/dead-letters?workflow_id={workflow_id}")).json()
        return {one["executionId"] for one in found["deadLetters"]}

    # Without a choice, no form has a filter, which would select all dead letters.
    await page.wait_for(
        "[...document.querySelectorAll('form[data-picks]')].map(one => one.dataset.sends).join() === '{},{}'"
    )
    for run in runs[:2]:
        await press_space_on(f"[data-pick][value={run}]")
    bar = "document.querySelector('[data-picked]')"
    await page.wait_for(f"!{bar}.hidden && {bar}.innerText.includes('2 chosen')")
    await page.evaluate(f"{AXE}; 0")
    assert await page.evaluate(RUN_AXE) == []
    # An update of the page keeps the choice.
    await fail_alike(visit.harness, [await enqueue(owner, workflow_id, 5)], "Broken", node_id="step")
    await enqueue(owner, workflow_id, 6)  # It notifies the page; the failure was written to the row alone.
    await page.wait_for("document.querySelector('main h2 + .pill').innerText.includes('5')")
    assert await page.evaluate(f"{bar}.innerText.includes('2 chosen')")
    await confirm("/redrive", 3)
    await page.wait_for("!document.querySelector('form[data-picks] .input').checkValidity()")
    assert len(await list_open()) == 5
    await confirm("/redrive", 2)
    await page.wait_for("document.querySelector('#toast').textContent.includes('2 redriven')")
    assert not await list_open() & set(runs[:2])
    await press_space_on("[data-pick-all]")
    await page.wait_for(f"!{bar}.hidden && {bar}.innerText.includes('3 chosen')")
    await press_space_on(f"[data-pick][value={runs[3]}]")
    await page.wait_for(f"{bar}.innerText.includes('2 chosen')")
    await page.follow("[data-picked-link]")
    await page.wait_for("document.querySelector('#plan') !== null")
    assert "Replay 2 with" in await page.text("#plan-title")
    await visit.show(f"/dashboard/dead-letters?workflow_id={workflow_id}")
    await page.wait_for("document.querySelector('[data-picking]').dataset.watched === ''")
    await press_space_on("[data-pick-all]")
    await page.wait_for(f"!{bar}.hidden && {bar}.innerText.includes('3 chosen')")
    await confirm("/purge", 3)
    await page.wait_for("document.querySelector('.empty') !== null")
    assert await list_open() == set()
    assert page.problems == []


async def test_chosen_deliveries_are_redriven(visit: IntakeVisit) -> None:
    page, owner = visit.page, visit.people.owner
    workflow_id = await owner.create(**graph_of("queue-trigger", {}))
    path = f"{WORKFLOWS}/{workflow_id}"
    await owner.api.put(f"{path}/status", json={"status": "draft"})
    for number in range(3):
        await owner.api.post(f"{path}/enqueue", json={"message": number})
    await owner.api.put(f"{path}/status", json={"status": "active"})
    await visit.sign_in(owner.key)
    await look(page, 1280, "dark")
    await visit.show(f"/dashboard/deliveries?workflow_id={workflow_id}")
    await page.wait_for("document.querySelector('[data-picking]').dataset.watched === ''")
    await page.click("tbody tr:nth-child(2) [data-pick]")
    await page.click("tbody tr:nth-child(3) [data-pick]")
    await page.wait_for("!document.querySelector('[data-picked]').hidden")
    await page.click("[data-picked] summary")
    await page.fill("[data-picked] .input", "2")
    await page.click("[data-picked] button[type=submit]")
    await page.wait_for("document.querySelector('#toast').textContent.includes('2 redriven')")
    listed = (await owner.api.get(f"{path}/deliveries?outcome=accepted")).json()
    assert listed["count"] == 2
    assert {one["redrivenFrom"] is None for one in listed["deliveries"]} == {False}
    assert page.problems == []


async def test_the_navigation_counts_dead_letters_for_each_visitor(visit: IntakeVisit) -> None:
    page = visit.page
    await visit.sign_in(visit.people.admin.key)
    await look(visit.page, 1280, "light")
    count = (await visit.people.admin.api.get("/api/v1/dead-letters/groups")).json()["count"]
    assert count > 0
    await visit.show("/dashboard/deliveries")
    shown = ".side [data-count=dead-letters]"
    await page.wait_for(f"document.querySelector('{shown}').textContent === '{count}'")
    assert await page.evaluate("document.querySelector('.side [data-count=approvals]').hidden")
    await visit.sign_in(visit.people.stranger.key)
    await visit.show("/dashboard/dead-letters")
    await page.wait_for(f"sessionStorage.getItem('counts').includes('{visit.people.stranger.user.id}')")
    assert await page.evaluate(f"document.querySelector('{shown}').hidden")
    assert page.problems == []


async def test_dead_letters_are_exported_as_lines_of_json(visit: IntakeVisit) -> None:
    page = visit.page
    await visit.sign_in(visit.people.admin.key)
    await visit.show("/dashboard/dead-letters")
    await page.evaluate("URL.createObjectURL = (blob => { window.exported = blob.text(); return '#' }); 0")
    await page.click("[data-exports]")
    await page.wait_for("document.querySelector('#toast').textContent.endsWith('exported')")
    lines = (await page.evaluate("window.exported")).splitlines()
    listed = (await visit.people.admin.api.get("/api/v1/dead-letters?limit=100")).json()["deadLetters"]
    assert [json.loads(line)["executionId"] for line in lines] == [one["executionId"] for one in listed]
    assert page.problems == []


async def test_an_invitation_is_accepted_and_signs_in(visit: IntakeVisit) -> None:
    page = visit.page
    made = await invite(visit.people.admin, email="new@example.com", role="viewer")
    await visit.sign_out()
    await look(visit.page, 390, "light")
    await visit.show(f"/invitation{made['url'].partition('/invitation')[2]}")
    await page.wait_for("!document.querySelector('#invitation button').disabled")
    assert "a viewer" in await page.text("#terms")
    await page.fill("#name", HOSTILE)
    await page.click("#invitation button")
    await page.wait_for("!document.querySelector('#accepted').hidden")
    assert (await page.text("#new-key")).startswith("sk-")
    assert await page.evaluate("location.hash") == ""
    await page.follow("#accepted a.button")
    assert await page.evaluate("location.pathname") == "/dashboard/overview"
    await visit.show("/dashboard/keys")
    assert HOSTILE in await page.evaluate("document.body.textContent")
    assert await page.count("img") == 0
    assert page.problems == []

    await page.open("about:blank")
    await visit.show(f"/invitation{made['url'].partition('/invitation')[2]}")
    await page.wait_for("document.querySelector('#terms').textContent === 'This link does not work.'")
    assert "ask for a new link" in await page.text("#problem")
    assert not await page.evaluate("document.querySelector('#invitation button').checkVisibility()")
    # Another link in the same tab changes the fragment alone.
    other = await invite(visit.people.admin, email="other@example.com", role="member")
    await page.evaluate(f"location.hash = {other['url'].partition('#')[2]!r}")
    await page.wait_for("!document.querySelector('#invitation button').disabled")
    assert "other@example.com" in await page.text("#terms")
    page.problems.clear()  # the browser logs the refusal


async def test_a_person_signs_in_with_a_provider_and_learns_why_it_is_refused(visit: IntakeVisit) -> None:
    page = visit.page
    button = "a[href*='/session/openid']"
    async with serve_openid() as openid, serve_with_provider(visit, openid) as url:
        wanted = f"{url}/dashboard/keys?mine=1"
        await visit.sign_out()
        await page.open(f"{url}/sign-in?next={quote('/dashboard/keys?mine=1', safe='')}")
        await page.follow(button)
        await page.wait_for("location.search.includes('problem=no-account')")
        assert "Ask an admin for an invitation" in await page.text("[role=alert]")
        assert await find_violations(page) == []

        made = await invite(visit.people.admin, email="grace@example.com", role="viewer")
        await page.open("about:blank")
        await page.open(f"{url}/invitation{made['url'].partition('/invitation')[2]}")
        await page.wait_for("!document.querySelector('#by-provider').disabled")
        await page.follow("#by-provider")
        await page.wait_for("location.pathname === '/dashboard/overview'")
        assert "grace@example.com, viewer" in await page.text(".side .foot")
        await page.follow("form[data-request='DELETE /session'] button")
        await page.wait_for("location.pathname === '/sign-in'")

        for changes in ({"nonce": "of another attempt"}, {"exp": 1}):
            openid.changes = changes
            await page.open("about:blank")
            await page.open(f"{url}/sign-in?next={quote('/dashboard/keys?mine=1', safe='')}")
            await page.follow(button)
            await page.wait_for("location.search.includes('problem=refused')")
        openid.changes = {}
        # The next attempt leads to the page that the first one was for.
        await page.follow(button)
        await page.wait_for(f"location.href === {wanted!r}")
        assert "grace@example.com, viewer" in await page.text(".side .foot")
        assert openid.problems == []
        await page.open("about:blank")
    assert page.problems == []


@asynccontextmanager
async def serve_with_provider(visit: IntakeVisit, openid: OpenIdServer) -> AsyncIterator[str]:
    """Serve another gateway on the same database that knows the provider, and return its URL."""
    changed = await visit.harness.with_settings(openid_issuer=openid.issuer, **OPENID_SETTINGS)
    sign_in = openid_sign_in.build_openid_sign_in(changed.gateway.settings, visit.harness.gateway.database)
    assert sign_in is not None
    changed.app.state.gateway = replace(changed.gateway, openid=sign_in)
    try:
        async with serve_gateway(changed) as url:
            yield url
    finally:
        await sign_in.provider.close()


async def test_an_approval_by_link_takes_one_answer_on_a_phone(visit: IntakeVisit) -> None:
    page = visit.page
    async with serve_worker(visit.harness):
        execution_id = await ask(visit.people, description="They replace those of yesterday.")
        link = await make_link(visit.harness, execution_id, "mira@example.com")
        await visit.sign_out()
        await visit.show(link.path)
        await page.evaluate(f"{AXE}; 0")
        for width, scheme in ((390, "light"), (390, "dark"), (320, "light")):
            await look(visit.page, width, scheme)
            assert await page.evaluate(RUN_AXE) == []
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
        heights = await page.evaluate(
            "[...document.querySelectorAll('button')].map(one => one.getBoundingClientRect().height)"
        )
        assert min(heights) >= 44
        assert await page.count("nav, script") == 0
        await page.follow("button[value=yes]")
        await page.wait_for("document.querySelector('button') === null")
        await wait_until_ended(visit.people.owner, execution_id)
    span = (await visit.people.owner.api.get(f"/api/v1/executions/{execution_id}/spans/ask")).json()
    assert span["port"] == "yes"
    assert page.problems == []


async def test_the_next_times_of_an_edited_schedule_are_shown_before_it_is_saved(visit: IntakeVisit) -> None:
    page = visit.page
    await visit.sign_in(visit.people.admin.key)
    await visit.show("/dashboard/workflows/{schedule}/trigger")
    await page.fill("#cron", "15 6 * * *")
    await page.follow("button[formaction]")
    await page.wait_for("document.querySelector('#then') !== null")
    shown = (
        "[...document.querySelectorAll('section[aria-labelledby=then] li small')].map(one => one.textContent)"
    )
    assert ["T06:15:00" in one for one in await page.evaluate(shown)] == [True] * 5
    config = f"{WORKFLOWS}/{visit.names['schedule']}"
    nodes = (await visit.people.admin.api.get(config)).json()["nodes"]
    assert nodes[0]["config"]["cron"] == "0 * * * *"
    await page.fill("#cron", "15 25 * * *")
    await page.follow("button[formaction]")
    await page.wait_for("document.querySelector('form [data-problem]:not([hidden])') !== null")
    assert "matches no time" in await page.text("form [data-problem]:not([hidden])")
    assert page.problems == []


async def test_a_trigger_that_was_changed_in_another_tab_is_merged(
    visit: IntakeVisit,
) -> None:
    page, owner = visit.page, visit.people.owner
    workflow_id = await owner.create(**graph_of("schedule-trigger", {"cron": "0 * * * *"}))
    path = f"{WORKFLOWS}/{workflow_id}"
    save = "form:has(#cron) button:not([formaction])"

    async def read_cron() -> str:
        cron: str = (await owner.api.get(path)).json()["nodes"][0]["config"]["cron"]
        return cron

    async def save_and_wait() -> None:
        await page.evaluate("document.querySelector('#toast').hidden = true; 0")
        await page.click(save)
        await page.wait_for("!document.querySelector('#toast').hidden")

    await visit.sign_in(owner.key)
    await visit.show(f"/dashboard/workflows/{workflow_id}/trigger")
    # A change of another part holds up nothing.
    assert (await owner.api.put(path, json={"description": "of another tab"})).status_code == 200
    await page.fill("#cron", "5 * * * *")
    await save_and_wait()
    assert await read_cron() == "5 * * * *"

    other = {"config": {"cron": "10 * * * *"}}
    assert (await owner.api.put(f"{path}/nodes/start", json=other)).status_code == 200
    await page.fill("#cron", "15 * * * *")
    await page.click(save)
    await page.wait_for("document.querySelector('form:has(#cron) [data-merge]') !== null")
    assert await page.value("#cron") == "15 * * * *"
    assert await read_cron() == "10 * * * *"
    save = "form:has(#cron) [data-merges]"
    await save_and_wait()
    assert await read_cron() == "15 * * * *"
    assert [one for one in page.problems if "412" not in one] == []
    page.problems.clear()


async def test_a_viewer_sees_the_pages_and_cannot_act(visit: IntakeVisit) -> None:
    page = visit.page
    for kind in TRIGGERS:
        path = f"{WORKFLOWS}/{visit.names[kind]}/visibility"
        assert (await visit.people.admin.api.put(path, json={"isPublic": True})).status_code == 200
    viewer = await visit.harness.person(await find_organization(visit), UserRole.VIEWER)
    await visit.sign_in(viewer.key)
    await look(visit.page, 1280, "light")
    for path in (
        "/dashboard/overview",
        "/dashboard/sources?new=sqlite",
        "/dashboard/deliveries",
        "/dashboard/dead-letters",
        "/dashboard/schedule",
        *(f"/dashboard/workflows/{{{kind}}}/trigger" for kind in TRIGGERS),
        "/dashboard/workflows/{queue}",
    ):
        await visit.show(path)
        forms = "[...document.querySelectorAll('main form[data-request]')].map(one => one.dataset.request)"
        assert await page.evaluate(forms) == [], path
    assert page.problems == []
    for method, path in (
        ("POST", f"{WORKFLOWS}/{visit.names['queue']}/enqueue"),
        ("POST", "/api/v1/dead-letters/redrive"),
        ("PUT", f"{WORKFLOWS}/{visit.names['queue']}/status"),
        ("POST", "/api/v1/auth/invitations"),
    ):
        options = f"{{method: {method!r}, headers: {{'Content-Type': 'application/json'}}, body: '{{}}'}}"
        assert await page.evaluate(f"fetch({path!r}, {options}).then(answer => answer.status)") == 403, path
    page.problems.clear()  # the browser logs the refusals


async def test_a_revoked_key_ends_the_session_of_an_open_page(visit: IntakeVisit) -> None:
    page = visit.page
    person = await visit.harness.person(await find_organization(visit))
    await visit.sign_in(person.key)
    await visit.show("/dashboard/deliveries")
    await page.wait_for("document.querySelector('.live').dataset.state === 'live'")
    key_id = (await person.api.get("/api/v1/auth/whoami")).json()["keyId"]
    assert (await visit.people.admin.api.delete(f"/api/v1/auth/keys/{key_id}")).status_code == 204
    # A change makes the page load itself again, once the revocation is known: without a session.
    changing = asyncio.create_task(_enqueue_again_and_again(visit))
    try:
        await page.wait_for("location.pathname === '/sign-in' && location.search.includes('deliveries')")
    finally:
        changing.cancel()
    page.problems.clear()


async def _enqueue_again_and_again(visit: IntakeVisit) -> None:
    for number in itertools.count():
        await enqueue(visit.people.admin, visit.names["queue"], number)
        await asyncio.sleep(0.1)


async def find_organization(visit: IntakeVisit) -> Organization:
    async with visit.harness.gateway.database.read() as connection:
        found = await access_store.find_organization(connection, visit.people.admin.user.organization_id)
    assert found is not None
    return found
