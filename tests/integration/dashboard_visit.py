"""Visit of the dashboard in a browser: signed in as the owner of some runs, with checks for every page."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scheduler.run_hours import RunHourCounter
from tests.integration.browser import BrowserPage, open_page, serve_gateway
from tests.integration.deployed_workflows import deploy_with_pod
from tests.integration.gateway_harness import GRAPH, GatewayHarness, OrganizationUsers, create_gateway
from tests.ordinary_run import EXTENT, checksum
from tests.services import PostgresServer
from workers.main import run_worker
from workers.settings import WorkerSettings

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
PHONE_WIDTH = 500
"""Narrower windows are those of phones."""
AXE = (Path(__file__).parent / "axe" / "axe.min.js").read_text()
RUN_AXE = (
    # Without a preload: it reads all styles and media again for rules about sounds, which no page has.
    "axe.run(document, {resultTypes: ['violations'], preload: false}).then(found => found.violations"
    ".flatMap(one => one.nodes.map(node => `${one.id}: ${node.target} ${node.failureSummary}`)))"
)
RUN_CONTRAST = RUN_AXE.replace("{resultTypes", "{runOnly: ['color-contrast'], resultTypes")
"""The rule that depends on the color scheme."""
RUN_WITHOUT_CONTRAST = RUN_AXE.replace(
    "{resultTypes", "{rules: {'color-contrast': {enabled: false}}, resultTypes"
)
"""The rules that may depend on the width of the window. Contrast, which takes longest, does not."""
NO_RULES = "[]"
DESCRIBE_SHELL = """(() => {
  const names = ['class', 'hidden', 'open', 'aria-current', 'data-state'];
  const describe = one => [one.localName, ...names.map(name => one.getAttribute(name))];
  const shell = [...document.querySelectorAll('.side, .side *, .top, .top *')];
  return [...new Set(shell.map(one => describe(one.parentElement) + ' > ' + describe(one)))].sort().join('; ');
})()"""
"""Script that describes the kinds of elements in the navigation and the top of a page, by all that colors depend on."""
SKIP_SHELL = "axe.configure({rules: [{id: 'color-contrast', selector: ':not(.side *):not(.top *)'}]})"
"""Script that leaves the contrast of navigation and top out: it takes a third of the rules' time, on each page anew."""
WIDTHS = (1280, 320)
LOOKS = tuple(itertools.product(WIDTHS, ("light", "dark")))
"""Widths of the window with color schemes, one of which an ordinary run chooses for a page, with all rules."""
IDS = re.compile(r"(?<=_)[0-9a-zA-Z]{10,}")
"""Random parts of ids in addresses."""
FIND_UNFOCUSABLE = """(() => {
  const isShown = one => !one.disabled && one.type !== 'hidden' && one.checkVisibility()
    && (one.matches('summary') || !one.closest('details:not([open])'));
  const isMarked = one => {
    const style = one && getComputedStyle(one);
    return style && (style.outlineStyle !== 'none' || one.matches('rect') && style.strokeWidth === '3px');
  };
  const found = [];
  const actions = document.querySelectorAll('a[href], button, input, select, textarea, summary');
  for (const one of [...actions].filter(isShown)) {
    one.focus({focusVisible: true});
    const marks = [one, one.parentElement, one.closest('label'), ...one.querySelectorAll('rect')];
    const isReached = one.tabIndex >= 0 || document.querySelector(`${one.localName}[tabindex="0"]`);
    if (document.activeElement !== one || !isReached || !marks.some(isMarked)) found.push(one.outerHTML.slice(0, 200));
  }
  document.activeElement.blur();
  return found;
})()"""
"""Script that returns the actions that the keyboard does not reach, or that do not show that they have the focus.

Of actions that arrow keys lead to, one is in the order of the Tab key.
"""
NOTE_SHIFTS = (
    "globalThis.shifts = []; new PerformanceObserver(list => { for (const one of list.getEntries())"
    " if (!one.hadRecentInput && !one.sources.every(({node}) => node?.parentElement?.querySelector("
    "':scope > time[data-age], :scope > span > time[data-age]'))) globalThis.shifts.push("
    "[one.value, ...one.sources.map(({node}) => (node?.outerHTML ?? node?.textContent ?? '').slice(0, 80))]) })"
    ".observe({type: 'layout-shift', buffered: true})"
)
"""Script that notes the shifts of the layout of each page with the parts that have moved, but for words behind an age
that has grown.
"""
MAX_SHIFT = 0.001
"""Sum of the shifts of a page that nobody sees; one line of text that pushes a page down is twenty times as much."""


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

    async def require_still(self) -> None:
        """Fail if the layout of the page has shifted visibly since it was opened; the message names the moved parts."""
        shifts = json.loads(await self.page.evaluate("JSON.stringify(globalThis.shifts)"))
        assert sum(value for value, *_ in shifts) < MAX_SHIFT, shifts

    async def show(self, path: str) -> None:
        """Open a page, by a path with names of ids such as `{execution_id}`, and wait until it has a heading."""
        names = {
            "workflow_id": self.workflow_id,
            "orders_id": self.orders_id,
            "execution_id": self.execution_id,
        }
        path = path.format(**names)
        await self.page.open(self.url + path, "document.querySelector('h1') !== null")

    async def look(self, width: int, scheme: str) -> None:
        """Set the width of the window and the color scheme."""
        await look(self.page, width, scheme)

    async def find_violations(self) -> list[str]:
        """Return the violations of accessibility on the shown page, as `find_violations` of this module does."""
        return await find_violations(self.page)

    async def find_unfocusable(self) -> list[str]:
        """Return the actions of the shown page that the keyboard does not reach or that do not show the focus."""
        # A window in the background shows no focus.
        await self.page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        return list(await self.page.evaluate(FIND_UNFOCUSABLE))

    def take_problems(self) -> list[str]:
        """Return the problems that the browser has logged since the last call; answers 403 and 404 are left out."""
        problems = [
            one for one in self.page.problems if "404 (Not Found)" not in one and "403 (Forbidden)" not in one
        ]
        self.page.problems.clear()
        return problems

    async def set_offline(self, is_offline: bool) -> None:  # noqa: FBT001 - a condition
        """Cut the browser off from the server, or connect it again; open event streams of the gateway end at once."""
        await self.page.call(
            "Network.emulateNetworkConditions",
            offline=is_offline,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )
        for queue in [*self.harness.gateway.live_hints._queues]:  # noqa: SLF001 - as if the process had ended
            queue.end()

    async def sign_in_as(self, key: str) -> None:
        """Replace the session of the browser by one of another key, on a page that asks for no event stream.

        A stream that is asked for between both sessions would be refused, and the browser logs that.
        """
        await self.page.open(f"{self.url}/sign-in")
        body = f"JSON.stringify({{key: '{key}'}})"
        headers = "{'Content-Type': 'application/json'}"
        status = await self.page.evaluate(
            "fetch('/session', {method: 'DELETE'}).then(() => fetch('/session',"
            f" {{method: 'POST', headers: {headers}, body: {body}}})).then(answer => answer.status)"
        )
        assert status == 201

    async def press(self, *keys: str) -> None:
        """Press and release these keys, one after the other."""
        for key in keys:
            await self.page.call(
                "Input.dispatchKeyEvent", type="keyDown", key=key, text=key if len(key) == 1 else ""
            )
            await self.page.call("Input.dispatchKeyEvent", type="keyUp", key=key)


async def look(page: BrowserPage, width: int, scheme: str) -> None:
    """Set the width of the window and the color scheme."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < PHONE_WIDTH}
    await page.call("Emulation.setDeviceMetricsOverride", **size)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    await page.call("Emulation.setEmulatedMedia", features=media)


_checked_shells: set[tuple[int, str, str]] = set()
"""Looks with descriptions of the navigation and top whose contrast was checked on a page before."""


async def find_violations(page: BrowserPage) -> list[str]:
    """Return the violations of accessibility on the shown page, and the widths of windows that are too narrow for it.

    A thorough run looks in both color schemes, on a wide and a narrow window. An ordinary run measures both windows,
    and applies the rules to one look that the address chooses: the pages share their colors and layouts, so that all of
    them together have each look with each rule several times. The contrast of each kind of navigation and top is
    checked on the first page of each look that has it.
    """
    await page.evaluate(f"{AXE}; 0")
    if EXTENT.is_thorough:
        looks = [(1280, "light", RUN_AXE), (1280, "dark", RUN_CONTRAST), (320, "dark", RUN_WITHOUT_CONTRAST)]
    else:
        address = await page.evaluate("location.pathname + location.search")
        width, scheme = LOOKS[checksum(IDS.sub("", address)) % len(LOOKS)]
        looks = [
            *((other, "light", NO_RULES) for other in WIDTHS if other != width),
            (width, scheme, RUN_AXE),
        ]
    found = []
    for width, scheme, rules in looks:
        await look(page, width, scheme)
        if rules == RUN_AXE:
            shell = (width, scheme, await page.evaluate(DESCRIBE_SHELL))
            if shell in _checked_shells:
                await page.evaluate(f"{SKIP_SHELL}; 0")
            _checked_shells.add(shell)
        broken, shown = await page.evaluate(
            f"Promise.resolve({rules}).then(broken => [broken, document.documentElement.scrollWidth])"
        )
        found += [f"{width} {scheme}: {one}" for one in broken]
        if shown > width:
            found.append(f"{width} {scheme}: the page is {shown} pixels wide")
    await look(page, 1280, "light")
    return found


async def run_to_its_end(
    harness: GatewayHarness, folder: Path, people: OrganizationUsers, workflow_id: str
) -> str:
    """Run the workflow on an order of 12 lines until its last request fails, by a worker of its own;
    return the run's id.
    """
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


@asynccontextmanager
async def open_visit(postgres: PostgresServer, folder: Path) -> AsyncIterator[DashboardVisit]:
    """Open a browser that is signed in as a member with some runs, one of which has failed, at the list of runs."""
    async with (
        create_gateway("sqlite", postgres, folder) as harness,
        serve_gateway(harness) as url,
        open_page(folder / "profile") as page,
    ):
        await page.call("Page.addScriptToEvaluateOnNewDocument", source=NOTE_SHIFTS)
        people = await harness.people()
        workflow_id = await people.owner.create(name=HOSTILE, status="active", **GRAPH)
        for _ in range(3):
            await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
        orders_id = await people.owner.create(**ORDERS)
        execution_id = await run_to_its_end(harness, folder, people, orders_id)
        await deploy_with_pod(harness, people.owner, orders_id)
        hold = f"/api/v1/workflows/{orders_id}/lifecycle/hold"
        assert (await people.owner.api.post(hold, json={"expiresInSeconds": 86_400})).is_success
        await RunHourCounter(harness.gateway.database).count_runs()
        await page.open(f"{url}/sign-in?next=%2Fdashboard%2Fruns")
        await page.fill("#key", "sk-wrong")
        await page.click("button[type=submit]")
        await page.wait_for("!document.querySelector('#problem').hidden")
        page.problems.clear()  # the browser logs the answer 401
        await page.fill("#key", people.owner.key)
        await page.follow("button[type=submit]")
        await page.wait_for(
            "location.pathname === '/dashboard/runs' && document.querySelector('h1') !== null"
        )
        yield DashboardVisit(harness, people, url, page, workflow_id, orders_id, execution_id)
