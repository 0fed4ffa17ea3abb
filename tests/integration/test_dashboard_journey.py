"""Journey of a newcomer through the dashboard, and budgets of its pages, in a browser with a worker behind it."""

from __future__ import annotations

import csv
import json
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from gateway.dashboard.graph_map import WINDOW
from gateway.workflows import shipped_templates
from tests.fakes.model_server import ModelFault, ScriptedAnswer, serve_models
from tests.integration.browser import LOADED, needs_chromium
from tests.integration.dashboard_visit import DashboardVisit, open_visit
from tests.integration.test_gateway_ai_models import create_model, create_provider
from tests.integration.test_gateway_executions import spin_until
from tests.integration.test_waiting_runs import execute_workflow, serve_worker, wait_until_ended
from tests.services import PostgresServer

pytestmark = needs_chromium

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
RUN_BUTTON = "form[data-request$='/execute'] button[type=submit]"
MAX_REQUESTS = 8
MAX_BYTES = 30_000
SLOW_BYTES = 8_000
"""Bytes a second of a network on which the page of a hundred nodes arrives in some twenty pieces."""
USABLE_SECONDS = 10
"""Longer than a large page takes on a busy machine; the benchmark `dashboard` has the budget."""


@pytest.fixture(scope="module")
async def visit(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[DashboardVisit]:
    async with (
        open_visit(postgres, tmp_path_factory.mktemp("dashboard")) as visit,
        serve_worker(
            visit.harness,
            visit.harness.gateway.broker,
            outbound_allowed_networks=(ip_network("127.0.0.1/32"),),
        ),
    ):
        yield visit


async def start_run(visit: DashboardVisit, button: str, state: str) -> str:
    """Click a button that starts a run, wait until its page shows its end, and return the id of the run."""
    await visit.page.follow(button)
    await visit.page.wait_for(f"document.querySelector('.pill').textContent === {state!r}")
    run_id: str = await visit.page.wait_for("location.pathname.match(/runs.(exec_\\w+)$/)?.[1]")
    return run_id


async def test_a_newcomer_runs_breaks_understands_mends_and_replays_the_example(
    visit: DashboardVisit,
) -> None:
    page, owner = visit.page, visit.people.owner
    example: dict[str, Any] = json.loads((EXAMPLES / "penguins.json").read_text())
    workflow_id = await owner.create(**example, status="active")
    penguins = (EXAMPLES / "penguins.csv").read_text()
    count = sum(1 for _ in csv.DictReader(penguins.splitlines()))

    await visit.show("/dashboard/workflows")
    await page.follow(f"a[href$='{workflow_id}']")
    await page.fill("#in-csv", penguins)
    good = await start_run(visit, RUN_BUTTON, "Completed")
    assert await page.count("a.row .good") == 5
    await page.follow("#node-report")
    assert await page.text("#node") == "Report"
    report = await page.text("#inspector pre")
    assert "\nAdelie on Torgersen" in report, "lines are shown as lines"
    assert str(count - 2) in report, "two penguins were not weighed"

    await visit.show(f"/dashboard/workflows/{workflow_id}?node=groups&input=last")
    config = await page.value("#config")
    assert "mean_mass_g" in config
    await page.fill("#config", config.replace('"{{ data.items }}"', '"{{ data.birds }}"'))
    await page.click("#node form button[type=submit]")
    await page.wait_for("document.querySelector('#toast').textContent.startsWith('Saved')")
    assert len(await page.value("#in-csv")) > 1_000, "the last input"
    bad = await start_run(visit, RUN_BUTTON, "Failed")

    why = await page.text("main")
    assert "Species by island: " in why
    assert "data.birds" in why
    assert "data has items, count, removed." in why
    assert "Its config has changed since it last went well" in why
    changes = await page.evaluate("[...document.querySelectorAll('.diff span')].map(one => one.textContent)")
    at = changes.index("Config · items")
    assert changes[at + 1 : at + 3] == ['- "{{ data.items }}"', '+ "{{ data.birds }}"']

    await page.follow(".banner a.main")
    assert "data.birds" in await page.value("#config")
    await page.fill("#config", config)
    await page.click("#node form button[type=submit]")
    await page.wait_for("document.querySelector('#toast').textContent.startsWith('Saved')")
    await page.follow("#node a[href$='/replay']")
    await page.wait_for("document.querySelector('#plan') !== null")
    plan = await page.text("main")
    assert "Nothing is written to the outside" in plan
    assert "Reused" in plan
    mended = await start_run(visit, "form[data-request$='/replay'] button[type=submit]", "Completed")
    assert bad in await page.text(".facts")
    assert await page.evaluate("document.body.textContent.split('result reused').length - 1") == 3
    outputs = (await owner.api.get(f"/api/v1/executions/{mended}")).json()["outputs"]
    assert (
        outputs["report"] == (await owner.api.get(f"/api/v1/executions/{good}")).json()["outputs"]["report"]
    )
    assert not visit.take_problems()


async def test_a_newcomer_begins_with_a_file_or_a_template(visit: DashboardVisit) -> None:
    page = visit.page
    person = await visit.harness.person(await visit.harness.organization())
    try:
        await visit.sign_in_as(person.key)
        await visit.show("/dashboard/overview")
        await page.follow("section[aria-labelledby=first] a.main")
        await page.wait_for("document.querySelector('form[data-request$=from-template]') !== null")
        assert await page.text("#example") == "Try the example"
        await bring_file(visit, "wrong.json", "no JSON")
        await page.wait_for(
            "document.querySelector('#problem p').textContent.startsWith('wrong.json is no JSON')"
        )
        await page.wait_for("document.querySelector('[data-imports]')?.files.length === 0")
        await bring_file(visit, "penguins.json", (EXAMPLES / "penguins.json").read_text())
        await page.wait_for(f"location.pathname.startsWith('/dashboard/workflows/wf_') && {LOADED}")
        assert "Penguin report" in await page.text("h1")
        await visit.show("/dashboard/workflows")
        assert await page.count("form[data-request$=from-template]") == 0
        listed = (await person.api.get("/api/v1/workflows")).json()["workflows"]
        assert [one["name"] for one in listed] == ["Penguin report"]
        await page.follow(".title a.main")
        assert await page.text("h1") == "New workflow"
        assert await page.count("form[data-request$=from-template]") > 3
        assert await visit.find_violations() == []
        assert (await person.api.delete(f"/api/v1/workflows/{listed[0]['id']}")).status_code == 204
        await visit.show("/dashboard/workflows")
        await page.follow("section[aria-labelledby=example] button")
        await page.wait_for(f"location.pathname.startsWith('/dashboard/workflows/wf_') && {LOADED}")
        assert await page.count(".node") == 5
        await visit.show("/dashboard/overview")
        await page.follow("section[aria-labelledby=first-run] a")
        assert (await page.value("#in-csv")).startswith("species,island,"), "the example input"
        assert await visit.find_violations() == []
        await start_run(visit, RUN_BUTTON, "Completed")
        assert "342 weighed, 2 not" in await page.text("#inspector pre")
        await visit.show("/dashboard/overview")
        assert await page.count("#first-run") == 0
        assert not visit.take_problems()
    finally:
        await visit.sign_in_as(visit.people.owner.key)


@pytest.mark.parametrize(
    "template", [f"wf_tmpl_{path.stem}" for path in sorted(shipped_templates.FOLDER.glob("*.yaml"))]
)
async def test_each_shipped_template_runs_at_the_first_press_without_outside_services(
    visit: DashboardVisit, template: str
) -> None:
    page = visit.page
    person = await visit.harness.person(await visit.harness.organization())
    try:
        await visit.sign_in_as(person.key)
        await visit.show("/dashboard/workflows")
        await page.follow(f"form[data-sends*='\"{template}\"'] button")
        await page.follow(RUN_BUTTON)
        await page.wait_for("['Completed', 'Waiting'].includes(document.querySelector('.pill').textContent)")
        if await page.text(".pill") == "Waiting":
            await page.click("form[data-request$='/input'] button.main")
        await page.wait_for("document.querySelector('.pill').textContent === 'Completed'")
        run_id = await page.evaluate("location.pathname.split('/').at(-1)")
        assert not visit.take_problems()
    finally:
        await visit.sign_in_as(visit.people.owner.key)
    run = (await person.api.get(f"/api/v1/executions/{run_id}")).json()
    nodes = (await person.workflow(run["workflowId"]))["nodes"]
    outside = {node["id"] for node in nodes if node["type"] in {"http-request", "email-send"}}
    assert not outside & run["outputs"].keys()
    steps = [step["status"] for output in run["outputs"].values() for step in output.get("steps", ())]
    assert set(steps) <= {"completed"}


async def bring_file(visit: DashboardVisit, name: str, text: str) -> None:
    """Choose a file with this content in the page's field for imports."""
    await visit.page.wait_for("document.querySelector('[data-imports]') !== null")
    await visit.page.evaluate(
        "(() => { const files = new DataTransfer();"
        f" files.items.add(new File([{json.dumps(text)}], {json.dumps(name)}));"
        " const field = document.querySelector('[data-imports]'); field.files = files.files;"
        " field.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


async def test_dragging_over_a_chart_sets_the_time_range_of_links(visit: DashboardVisit) -> None:
    page = visit.page
    await visit.show("/dashboard/overview")
    await page.wait_for("document.querySelector('[data-brush]') !== null")
    first = await page.evaluate("document.querySelector('[data-brush]').dataset.brush")
    # Problems above it may have moved it below the window.
    await page.evaluate("document.querySelector('[data-brush]').scrollIntoView({block: 'center'})")

    box = (
        "(({x, y, width, height}) => [x, y + height / 2, width / 24])"
        "(document.querySelector('[data-brush]').getBoundingClientRect())"
    )

    async def point(kind: str, hour: int, **button: object) -> None:
        left, middle, width = await page.evaluate(box)
        await page.call(
            "Input.dispatchMouseEvent", type=kind, x=left + (hour + 0.5) * width, y=middle, **button
        )

    await point("mouseMoved", 2)
    # The pointer loads the module of the gesture.
    loaded = (
        "performance.getEntriesByType('resource').map(one => one.name).find(one => one.endsWith('/brush.js'))"
    )
    module = await page.wait_for(loaded)
    assert await page.evaluate(f"import({module!r}).then(() => true)")
    await point("mousePressed", 2, button="left", clickCount=1)
    await point("mouseMoved", 4, button="left", buttons=1)
    await point("mouseReleased", 4, button="left", clickCount=1)
    await page.wait_for(f"location.search.includes('until=') && {LOADED}")
    # At 10 if another hour has begun meanwhile.
    await page.wait_for(
        "['20', '10'].includes(document.querySelector('.chart rect.brush')?.getAttribute('x'))"
    )
    link = "document.querySelector('#accepted a')"
    assert await page.wait_for(f"{link}?.pathname") == "/dashboard/runs"
    query = parse_qs(await page.evaluate(f"{link}.search.slice(1)"))
    begin = datetime.fromisoformat(first)
    assert [datetime.fromisoformat(query[name][0]) for name in ("since", "until")] == [
        begin + timedelta(hours=2),
        begin + timedelta(hours=5),
    ]
    # The same by the fields of a form.
    await page.evaluate(
        "(field => (field.focus(), field.selectedIndex = 0))(document.querySelector('#since'))"
    )
    await page.follow("#range button")
    await page.wait_for("document.querySelector('.chart rect.brush')?.getAttribute('x') === '0'")
    await page.follow("#range a")
    await page.wait_for("document.querySelector('[data-brush]') !== null")
    assert await page.count(".chart rect.brush") == 0


async def run_tree(visit: DashboardVisit, count: int) -> str:
    """Run a workflow in which each node has three followers, and return the id of the ended run."""
    nodes = [{"id": "n0", "nodeId": "manual", "label": "Start"}] + [
        {"id": f"n{number}", "nodeId": "set", "label": f"Step {number}", "config": {"values": {"a": number}}}
        for number in range(1, count)
    ]
    edges = [{"source": f"n{(number - 1) // 3}", "target": f"n{number}"} for number in range(1, count)]
    owner = visit.people.owner
    workflow_id = await owner.create(name=f"{count} nodes", status="active", nodes=nodes, connections=edges)
    run = await execute_workflow(owner, workflow_id)
    await wait_until_ended(owner, run)
    return run


async def test_the_page_of_a_hundred_nodes_loads_few_files_shifts_nothing_and_is_painted_when_it_is_whole(
    visit: DashboardVisit,
) -> None:
    page = visit.page
    run = await run_tree(visit, 100)
    await visit.look(1280, "light")
    await page.call("Network.clearBrowserCache")
    for view in ("", "?view=map"):
        # The list behind it may still load itself again.
        await page.open("about:blank", "location.href === 'about:blank'")
        page.requested.clear()
        await visit.show(f"/dashboard/runs/{run}{view}")
        await page.wait_for(LOADED)
        assert len(page.requested) <= MAX_REQUESTS, page.requested
        size = "performance.getEntriesByType('navigation')[0].encodedBodySize"
        assert await page.evaluate(size) < MAX_BYTES
        await visit.require_still()
    problems = visit.take_problems()
    assert not problems, "\n".join(problems)

    # Over a slow network, with style sheet and icons in the cache.
    await page.open("about:blank", "location.href === 'about:blank'")
    slow = {"latency": 20, "downloadThroughput": SLOW_BYTES, "uploadThroughput": SLOW_BYTES}
    await page.call("Network.emulateNetworkConditions", offline=False, **slow)
    try:
        await visit.show(f"/dashboard/runs/{run}?view=map")
    finally:
        fast = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        await page.call("Network.emulateNetworkConditions", offline=False, **fast)
    await page.wait_for("performance.getEntriesByName('first-contentful-paint').length === 1")
    assert await page.evaluate("JSON.stringify(globalThis.shifts)") == "[]"
    assert not visit.take_problems()


def has_streams(visit: DashboardVisit, count: int) -> bool:
    """Return whether the pages of a visit have so many streams of hints."""
    return visit.harness.gateway.live_hints.streams.taken == count


async def test_a_text_is_shown_while_its_model_writes_it_and_begins_again_after_a_failure(
    visit: DashboardVisit,
) -> None:
    page, owner = visit.page, visit.people.owner
    # Half of each arrives; texts of models are no HTML.
    script = [ScriptedAnswer(f"<b>{word}</b>" * 2, fault=ModelFault.STALL) for word in ("First", "Other")]
    written = "document.querySelector('[data-writes] pre')?.textContent"
    says = "document.querySelector('[data-writes] [role=status]').textContent"
    async with serve_models(*script) as served:
        provider_id = await create_provider(owner, served.url)
        models = [await create_model(owner, provider_id, name=name) for name in ("One", "Two")]
        config = {"model": models[0], "fallbackModelIds": models[1:], "prompt": "How is Oslo?"}
        workflow_id = await owner.create(
            name="Weather",
            nodes=[{"id": "start", "nodeId": "manual"}, {"id": "ask", "nodeId": "llm", "config": config}],
            connections=[{"source": "start", "target": "ask"}],
        )
        run = await execute_workflow(owner, workflow_id)
        page.requested.clear()
        await visit.show(f"/dashboard/runs/{run}")
        await page.wait_for(f"{written} === '<b>First</b>'")
        assert await page.text("#node-ask .strip") == "<b>First</b>"
        assert await page.evaluate(says) == "Writing"
        served.connections[-1].abort()  # type: ignore[attr-defined]
        await page.wait_for(f"{says}.startsWith('Begun again, since the call failed')")
        await page.wait_for(f"{written} === '<b>Other</b>'")
        assert await visit.find_violations() == []
        await visit.require_still()
        assert sum("/live?" in url for url in page.requested) == 1
        for is_hidden in (True, False):
            value = "true" if is_hidden else "false"
            hidden = f"Object.defineProperty(document, 'hidden', {{value: {value}, configurable: true}})"
            await page.evaluate(f"{hidden}; document.dispatchEvent(new Event('visibilitychange')); 0")
            await spin_until(partial(has_streams, visit, 0 if is_hidden else 1))
        await page.wait_for(f"{written} === '<b>Other</b>'")
        served.released.set()
        await page.wait_for("document.querySelector('[data-writes], .strip') === null")
        await page.wait_for("document.querySelector('.pill').textContent === 'Completed'")
    assert "<b>Other</b><b>Other</b>" in await page.text("#inspector pre")
    assert await page.count("main pre b") == 0
    problems = visit.take_problems()
    assert not problems, "\n".join(problems)


async def test_two_thousand_nodes_are_folded_and_walked_around_one(visit: DashboardVisit) -> None:
    run = await run_tree(visit, 2_000)
    await visit.show(f"/dashboard/runs/{run}")
    rows = await visit.page.count("a.row")
    assert rows <= 300
    await visit.page.follow("a.row[href*='open=']")
    assert await visit.page.count("a.row") > rows

    await visit.show(f"/dashboard/runs/{run}?view=map")
    cards = "document.querySelectorAll('[data-card]').length"
    assert await visit.page.evaluate(cards) == WINDOW
    await visit.page.wait_for(LOADED)
    box = await visit.page.evaluate(
        "JSON.stringify(document.querySelector('[data-overview]').getBoundingClientRect())"
    )
    place = json.loads(box)
    at = {"x": place["x"] + place["width"] * 0.9, "y": place["y"] + place["height"] * 0.5}
    for kind in ("mousePressed", "mouseReleased"):
        await visit.page.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)
    await visit.page.wait_for(f"{LOADED} && location.search.includes('at=') && {cards} > 0")
    assert "around Start" not in await visit.page.text(".overview")
    spent = await visit.page.evaluate("performance.getEntriesByType('navigation')[0].domComplete")
    assert spent < USABLE_SECONDS * 1_000
    assert not visit.take_problems()
