"""Pages of the dashboard in a browser: in light and dark, wide and narrow, by keyboard, under the strict policy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from sqlalchemy import select

from models.execution import WaitAnswer
from tests.integration import input_waits
from tests.integration.browser import BrowserPage, needs_chromium, open_page, serve_gateway
from tests.integration.gateway_harness import GRAPH, GatewayHarness, OrganizationUsers, create_gateway
from tests.services import PostgresServer

pytestmark = needs_chromium

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>{{ 7 * 7 }}"
PATHS = (
    "/dashboard/overview",
    "/dashboard/runs",
    "/dashboard/runs?status=failed",
    "/dashboard/missing",
    "/dashboard/workflows",
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

    async def show(self, path: str) -> None:
        await self.page.open(self.url + path, "document.querySelector('h1') !== null")

    async def press(self, *keys: str) -> None:
        for key in keys:
            await self.page.call(
                "Input.dispatchKeyEvent", type="keyDown", key=key, text=key if len(key) == 1 else ""
            )
            await self.page.call("Input.dispatchKeyEvent", type="keyUp", key=key)


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
        yield DashboardVisit(harness, people, url, page, workflow_id)


async def test_pages_fit_in_light_and_dark_wide_and_narrow(visit: DashboardVisit) -> None:
    for path in PATHS:
        await visit.show(path.format(workflow_id=visit.workflow_id))
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


async def test_texts_of_users_never_become_elements(visit: DashboardVisit) -> None:
    await visit.show("/dashboard/runs")
    text = await visit.page.evaluate("document.querySelector('td a').textContent")
    assert text == HOSTILE
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
