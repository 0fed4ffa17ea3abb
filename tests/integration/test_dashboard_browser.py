"""Pages of the dashboard in a browser: in light and dark, wide and narrow, by keyboard, under the strict policy."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from models.execution import WaitAnswer
from tests.integration import input_waits
from tests.integration.browser import BrowserPage, needs_chromium, open_page, serve_gateway
from tests.integration.gateway_harness import GRAPH, GatewayHarness, OrganizationUsers, create_gateway
from tests.services import PostgresServer
from workers.main import run_worker
from workers.settings import WorkerSettings

pytestmark = needs_chromium

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>{{ 7 * 7 }}"
ORDERS: dict[str, Any] = {
    "name": "Order intake",
    "status": "active",
    "nodes": [
        {"id": "start", "nodeId": "manual", "label": "Order message"},
        {
            "id": "lines",
            "nodeId": "loop",
            "label": "For each line",
            "config": {"items": "{{ data.body.lines }}"},
        },
        {
            "id": "reserve",
            "nodeId": "set",
            "label": "Reserve stock",
            "config": {"values": {"sku": "{{ item.sku }}"}},
        },
        {
            "id": "large",
            "nodeId": "conditional",
            "label": "Above 5,000 €?",
            "config": {
                "condition": {"left": "{{ trigger.body.total }}", "operator": "greater-than", "right": 5_000}
            },
        },
        {"id": "small", "nodeId": "set", "label": "Mark as small", "config": {"values": {"small": True}}},
        {
            "id": "write",
            "nodeId": "http-request",
            "label": "Write the order",
            "config": {
                "url": "https://orders.invalid/",
                "method": "POST",
                "body": {"total": 9_000},
            },
        },
        {"id": "confirm", "nodeId": "set", "label": "Confirm by mail", "config": {"values": {"sent": True}}},
    ],
    "connections": [
        {"sourceNodeId": "start", "targetNodeId": "lines"},
        {"sourceNodeId": "lines", "sourcePort": "continue", "targetNodeId": "reserve"},
        {"sourceNodeId": "lines", "sourcePort": "done", "targetNodeId": "large"},
        {"sourceNodeId": "large", "sourcePort": "true", "targetNodeId": "write"},
        {"sourceNodeId": "large", "sourcePort": "false", "targetNodeId": "small"},
        {"sourceNodeId": "write", "targetNodeId": "confirm"},
        {"sourceNodeId": "small", "targetNodeId": "confirm"},
    ],
}
AXE = (Path(__file__).parent / "axe" / "axe.min.js").read_text()
RUN_AXE = (
    "axe.run(document, {resultTypes: ['violations']}).then(found => found.violations"
    ".flatMap(one => one.nodes.map(node => `${one.id}: ${node.target} ${node.failureSummary}`)))"
)
PICTURES = {
    "dashboard-run.png": "/dashboard/runs/{execution_id}",
    "dashboard-workflows.png": "/dashboard/workflows",
}
LOADED = "document.readyState === 'complete'"
"""Condition under which the scripts of a page have run."""
SCREENSHOTS = Path(__file__).parents[2] / "docs" / "images"
"""Folder of the documentation's pictures; `UPDATE_SCREENSHOTS=1` takes them again."""
PATHS = (
    "/dashboard/overview",
    "/dashboard/runs",
    "/dashboard/runs?status=failed",
    "/dashboard/missing",
    "/dashboard/runs/{execution_id}",
    "/dashboard/runs/{execution_id}?node=reserve&iteration=3&tab=config",
    "/dashboard/runs/{execution_id}?view=map",
    "/dashboard/runs/{execution_id}?node=write&tab=diff",
    "/dashboard/runs/{execution_id}/replay?definition=original",
    "/dashboard/workflows",
    "/dashboard/workflows/{orders_id}",
    "/dashboard/workflows/{orders_id}?node=write",
    "/dashboard/workflows/{orders_id}?view=table",
    "/dashboard/workflows/{orders_id}/versions",
    "/dashboard/workflows/{orders_id}/lifecycle",
    "/dashboard/workflows/{workflow_id}",
    "/dashboard/approvals",
    "/dashboard/schedule",
    "/dashboard/sources",
    "/dashboard/keys",
    "/dashboard/health",
)


@dataclass(frozen=True)
class DashboardVisit:
    """Browser that is signed in as the owner of some runs."""

    harness: GatewayHarness
    people: OrganizationUsers
    url: str
    page: BrowserPage
    workflow_id: str
    orders_id: str
    execution_id: str

    async def show(self, path: str) -> None:
        names = {
            "workflow_id": self.workflow_id,
            "orders_id": self.orders_id,
            "execution_id": self.execution_id,
        }
        path = path.format(**names)
        await self.page.open(self.url + path, "document.querySelector('h1') !== null")

    async def look(self, width: int, scheme: str) -> None:
        """Set the width of the window and the color scheme."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        await self.page.call("Emulation.setDeviceMetricsOverride", **size)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.page.call("Emulation.setEmulatedMedia", features=media)

    async def take_picture(self) -> bytes:
        taken = await self.page.call("Page.captureScreenshot", format="png")
        return base64.b64decode(taken["data"])

    async def press(self, *keys: str) -> None:
        for key in keys:
            await self.page.call(
                "Input.dispatchKeyEvent", type="keyDown", key=key, text=key if len(key) == 1 else ""
            )
            await self.page.call("Input.dispatchKeyEvent", type="keyUp", key=key)


async def run_to_its_end(
    harness: GatewayHarness, folder: Path, people: OrganizationUsers, workflow_id: str
) -> str:
    """Run the order of 12 lines, whose last request fails, and return its id."""
    gateway = harness.gateway
    shared = gateway.settings.model_dump(include={"database_url", "secret_key"})
    settings = WorkerSettings(**shared, data_dir=folder)
    order = {"total": 9_000, "lines": [{"sku": f"sku-{number}"} for number in range(12)]}
    async with run_worker(settings, gateway.store, gateway.broker, gateway.database):
        started = await people.owner.api.post(
            f"/api/v1/workflows/{workflow_id}/execute", json={"triggerInputs": order}
        )
        execution_id: str = started.json()["executionId"]
        ended = await people.owner.api.get(f"/api/v1/executions/{execution_id}/progress?wait=30")
        assert ended.json()["status"] == "failed", ended.text
    return execution_id


@pytest.fixture(scope="module")
async def visit(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[DashboardVisit]:
    folder = tmp_path_factory.mktemp("dashboard")
    async with (
        create_gateway("sqlite", postgres, folder) as harness,
        serve_gateway(harness) as url,
        open_page(folder / "profile") as page,
    ):
        people = await harness.people()
        workflow_id = await people.owner.create(name=HOSTILE, status="active", **GRAPH)
        for _ in range(3):
            await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
        orders_id = await people.owner.create(**ORDERS)
        execution_id = await run_to_its_end(harness, folder, people, orders_id)
        await page.open(f"{url}/sign-in?next=%2Fdashboard%2Fruns", "document.querySelector('#key') !== null")
        await page.fill("#key", "sk-wrong")
        await page.click("button[type=submit]")
        await page.wait_for("!document.querySelector('#problem').hidden")
        page.problems.clear()  # the browser logs the answer 401
        await page.fill("#key", people.owner.key)
        await page.click("button[type=submit]")
        await page.wait_for(
            "location.pathname === '/dashboard/runs' && document.querySelector('h1') !== null"
        )
        yield DashboardVisit(harness, people, url, page, workflow_id, orders_id, execution_id)


async def test_pages_fit_in_light_and_dark_wide_and_narrow(visit: DashboardVisit) -> None:
    for path in PATHS:
        await visit.show(path)
        for width in (320, 1280):
            await visit.page.call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=800,
                deviceScaleFactor=1,
                mobile=False,
            )
            for scheme in ("light", "dark"):
                media = [{"name": "prefers-color-scheme", "value": scheme}]
                await visit.page.call("Emulation.setEmulatedMedia", features=media)
                assert await visit.page.evaluate("document.documentElement.scrollWidth") <= width, (
                    path,
                    width,
                )
    visit.page.problems[:] = [one for one in visit.page.problems if "404 (Not Found)" not in one]
    assert not visit.page.problems
    assert not [
        one for one in visit.page.requested if not one.startswith((f"{visit.url}/", "data:", "about:"))
    ]


@pytest.mark.parametrize("path", PATHS)
async def test_pages_have_no_violation_of_accessibility(visit: DashboardVisit, path: str) -> None:
    await visit.show(path)
    await visit.page.evaluate(f"{AXE}; 0")
    for width, scheme in ((1280, "light"), (1280, "dark"), (320, "light")):
        await visit.look(width, scheme)
        assert await visit.page.evaluate(RUN_AXE) == [], (path, width, scheme)
    await visit.look(1280, "light")
    if any(name == path for name in PICTURES.values()) and os.environ.get("UPDATE_SCREENSHOTS"):
        for name, of_page in PICTURES.items():
            if of_page == path:
                SCREENSHOTS.mkdir(exist_ok=True)
                (SCREENSHOTS / name).write_bytes(await visit.take_picture())
    visit.page.problems[:] = [one for one in visit.page.problems if "404 (Not Found)" not in one]
    assert not visit.page.problems


async def test_a_run_shows_its_error_first_and_each_node_by_its_address(visit: DashboardVisit) -> None:
    await visit.show("/dashboard/runs/{execution_id}")
    page = visit.page
    assert "Write the order: POST https://orders.invalid/" in await page.evaluate(
        "document.querySelector('.banner h2').textContent"
    )
    above = "document.querySelector('.banner').compareDocumentPosition(document.querySelector('.row')) & 4"
    assert await page.evaluate(above)
    selected = "document.querySelector('.row[aria-current]').id"
    assert await page.evaluate(selected) == "node-write"
    rows = await page.evaluate(
        "[...document.querySelectorAll('a.row .cut:first-child')].map(one => one.textContent)"
    )
    assert rows[:4] == ["Order message", "For each line", "Reserve stock", "Above 5,000 €?"]
    assert await page.evaluate("document.querySelectorAll('#node-reserve .iterations rect').length") == 12
    await page.click("#node-reserve")
    is_shown = f"document.querySelector('.row[aria-current]') && {selected} === 'node-reserve'"
    await page.wait_for(f"{LOADED} && {is_shown}")
    assert await page.evaluate("location.search") == "?node=reserve"
    await visit.press("n")
    assert await page.evaluate("document.activeElement.id") == "node-write"
    await visit.show("/dashboard/runs/{execution_id}?node=reserve&iteration=3&tab=output")
    assert "sku-3" in await page.evaluate("document.querySelector('#inspector pre').textContent")


async def test_a_failed_run_is_resumed_after_a_question_and_replayed_after_its_plan(
    visit: DashboardVisit,
) -> None:
    await visit.show("/dashboard/runs/{execution_id}")
    await visit.page.click("form[data-request$='/resume'] button")
    await visit.page.wait_for("document.querySelector('#confirm').open")
    await visit.page.click("[data-confirms]")
    await visit.page.wait_for(
        f"location.pathname.startsWith('/dashboard/runs/exec_') && !location.pathname.endsWith('{visit.execution_id}')"
        " && document.querySelector('h1') !== null"
    )
    assert visit.execution_id in await visit.page.evaluate("document.querySelector('.facts').textContent")

    await visit.show("/dashboard/runs/{execution_id}")
    await visit.page.click("a[href$='/replay']")
    await visit.page.wait_for(f"{LOADED} && document.querySelector('#plan') !== null")
    plan = await visit.page.evaluate("document.querySelector('main').textContent")
    assert "Reserve stock" in plan
    assert "Reused" in plan
    assert "writes" in plan
    await visit.page.click("input[name=again]")  # it was resumed before
    await visit.page.click("main form button[type=submit]")
    await visit.page.wait_for(
        f"/runs.exec_/.test(location.pathname) && !location.pathname.includes('{visit.execution_id}')"
        " && document.querySelector('.facts') !== null"
    )
    assert f"replays {visit.execution_id}" in await visit.page.evaluate(
        "document.querySelector('.facts').textContent"
    )


async def test_texts_of_users_never_become_elements(visit: DashboardVisit) -> None:
    await visit.show("/dashboard/runs")
    texts = await visit.page.evaluate("[...document.querySelectorAll('td a')].map(one => one.textContent)")
    assert HOSTILE in texts
    assert await visit.page.evaluate("document.querySelectorAll('main img, main script').length") == 0


async def test_keys_move_and_open(visit: DashboardVisit) -> None:
    await visit.show("/dashboard/runs")
    await visit.press("j", "j", "k")
    focused = "document.activeElement.closest('tr')?.rowIndex"
    assert await visit.page.evaluate(focused) == 1
    await visit.press("?")
    await visit.page.wait_for("document.querySelector('#keys').open")
    await visit.page.evaluate("document.querySelector('#keys').close()")
    await visit.press("c")
    await visit.page.wait_for("document.querySelector('#curl').open")
    commands = await visit.page.evaluate("document.querySelector('#curl pre').textContent")
    assert "/api/v1/executions" in commands
    assert visit.people.owner.key not in commands
    await visit.page.evaluate("document.querySelector('#curl').close()")
    await visit.press("/")
    assert await visit.page.evaluate("document.activeElement.id") == "search"


async def test_a_list_updates_itself_and_holds_new_rows_back(visit: DashboardVisit) -> None:
    await visit.show("/dashboard/runs")
    await visit.page.wait_for("document.querySelector('.live').dataset.state === 'live'")
    count = await visit.page.evaluate("document.querySelectorAll('tbody tr').length")
    await visit.people.owner.api.post(f"/api/v1/workflows/{visit.workflow_id}/execute", json={})
    await visit.page.wait_for("document.querySelector('[data-shows-new]')?.textContent === 'Show 1 new'")
    assert await visit.page.evaluate("document.querySelectorAll('tbody tr').length") == count
    await visit.press(".")
    await visit.page.wait_for(f"document.querySelectorAll('tbody tr').length === {count + 1}")
    assert await visit.page.evaluate("document.querySelector('[data-shows-new]') === null")
    assert not visit.page.problems


async def test_a_question_is_answered_by_its_form(visit: DashboardVisit) -> None:
    started = await visit.people.owner.api.post(f"/api/v1/workflows/{visit.workflow_id}/execute", json={})
    execution_id = started.json()["executionId"]
    await input_waits.wait_for_input(visit.harness.gateway.database, execution_id)
    await visit.show("/dashboard/approvals")
    await visit.page.fill("main input[name=comment]", "Looks right")
    await visit.page.click("main button[value=reject]")
    await visit.page.wait_for("document.querySelector('main form') === null")
    async with visit.harness.gateway.database.read() as connection:
        answers = (await connection.execute(select(WaitAnswer))).mappings().all()
    (answer,) = [one for one in answers if one["execution_id"] == execution_id]
    assert '"reject"' in str(answer)
    assert "Looks right" in str(answer)
    assert not visit.page.problems


async def test_a_foreign_policy_cannot_make_html(visit: DashboardVisit) -> None:
    await visit.show("/dashboard/runs")
    refused = "(() => { try { document.body.innerHTML = '<p>x'; return false } catch { return true } })()"
    assert await visit.page.evaluate(refused)
    other = "(() => { try { trustedTypes.createPolicy('other', {}); return false } catch { return true } })()"
    assert await visit.page.evaluate(other)
    visit.page.problems.clear()  # the browser logs what it refused


async def test_arrows_follow_the_edges_of_a_graph(visit: DashboardVisit) -> None:
    await visit.show("/dashboard/runs/{execution_id}?view=map")
    focused = "document.activeElement.dataset.card"
    await visit.page.wait_for(LOADED)
    await visit.page.evaluate("document.querySelector('[data-card=start]').focus()")
    await visit.press("ArrowRight")
    assert await visit.page.evaluate(focused) == "lines"
    await visit.press("ArrowRight", "ArrowDown", "ArrowRight")
    assert await visit.page.evaluate(focused) in {"write", "small"}
    await visit.press("ArrowLeft")
    assert await visit.page.evaluate(focused) == "large"
    in_order = "[...document.querySelectorAll('[data-card][tabindex=\"0\"]')].map(one => one.dataset.card)"
    assert await visit.page.evaluate(in_order) == ["large"], "one card is in the tab order"
    await visit.page.evaluate(
        "document.activeElement.dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    await visit.page.wait_for(f"{LOADED} && location.search.includes('node=large')")
    assert await visit.page.evaluate("document.querySelector('#node').textContent") == "Above 5,000 €?"


async def test_a_node_is_mended_on_the_page_of_its_workflow(visit: DashboardVisit) -> None:
    owner = visit.people.owner
    workflow_id = await owner.create(name="To mend", status="active", **GRAPH)
    await visit.page.open(f"{visit.url}/dashboard/workflows/{workflow_id}?node=step", LOADED)
    await visit.page.evaluate("document.querySelector('#config').value = '{\"values\": {\"b\": 2}'")
    await visit.page.click("#node form button[type=submit]")
    await visit.page.wait_for(
        "document.querySelector('#config').validationMessage.startsWith('This is no JSON')"
    )
    text = '{"values": {"b": 2}, "mode": "replace"}'
    await visit.page.evaluate(f"document.querySelector('#config').value = '{text}'")
    await visit.page.evaluate(
        "document.querySelector('#config').dispatchEvent(new Event('input', {bubbles: true}))"
    )
    await visit.page.click("#node form button[type=submit]")
    await visit.page.wait_for("document.querySelector('#toast').textContent.startsWith('Saved')")
    (step,) = [node for node in (await owner.workflow(workflow_id))["nodes"] if node["id"] == "step"]
    assert step["config"] == {"values": {"b": 2}, "mode": "replace"}
    await visit.page.wait_for("document.querySelector('#config').dataset.before.includes('replace')")
    await visit.page.evaluate("document.querySelector('#config').value = '{\"values\": {\"b\": 3}}'")
    await visit.page.click("#node form button[type=submit]")
    await visit.page.wait_for("!document.querySelector('#config').dataset.before.includes('replace')")
    (step,) = [node for node in (await owner.workflow(workflow_id))["nodes"] if node["id"] == "step"]
    assert step["config"] == {"values": {"b": 3}}, "a field that was deleted is gone"
