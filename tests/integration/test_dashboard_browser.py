"""Pages of the dashboard in a browser: in light and dark, wide and narrow, by keyboard, under the strict policy."""

from __future__ import annotations

import json
import shlex
from collections.abc import AsyncIterator
from hashlib import sha256
from itertools import pairwise
from urllib.parse import urlsplit

import msgspec
import pytest
from sqlalchemy import select, update
from sqlmodel import col

from engine.agents.agent import StoredAnswer
from engine.agents.agent_steps import StepStatus
from engine.model_calls import FinishReason, ModelCallRecord, RequestedToolCall, TokenUsage
from engine.run_records import RunStatus, SpanStatus
from models.data_source import DataSource
from models.execution import WaitAnswer
from models.tool_server import ListedTools, to_stored
from nodes.mcp.tool_definitions import ToolDefinition
from tests.integration import input_waits
from tests.integration.browser import LOADED, needs_chromium
from tests.integration.dashboard_visit import HOSTILE, DashboardVisit, open_visit
from tests.integration.gateway_harness import GRAPH, TRIGGER
from tests.integration.test_gateway_ai_models import create_model, create_provider
from tests.integration.test_gateway_enqueue import QUEUE
from tests.integration.test_gateway_executions import NOW, claim_run, execute_workflow
from tests.services import PostgresServer

pytestmark = needs_chromium

PATHS = (
    "/dashboard/overview",
    "/dashboard/runs",
    "/dashboard/runs?status=failed",
    "/dashboard/missing",
    "/dashboard/runs/{execution_id}",
    "/dashboard/runs/{execution_id}?node=reserve&iteration=3&tab=config",
    "/dashboard/runs/{execution_id}?view=map",
    "/dashboard/runs/{execution_id}?view=table&node=write&tab=diff",
    "/dashboard/runs/{execution_id}/replay?definition=original&from=lines",
    "/dashboard/workflows",
    "/dashboard/workflows/{orders_id}",
    "/dashboard/workflows/{orders_id}?node=write",
    "/dashboard/workflows/{orders_id}?view=table",
    "/dashboard/workflows/{orders_id}/versions?version=1&act=restore",
    "/dashboard/workflows/{orders_id}/lifecycle",
    "/dashboard/workflows/{workflow_id}",
    "/dashboard/schedule",
    "/dashboard/keys",
)
"""Pages of the owner of some runs. Each has elements, by class and place, that no other one has, nor an empty one."""
DIALOGS = """[...document.querySelectorAll('form[data-confirm]:not([data-confirm=""])')].map(form => {
  const dialog = document.querySelector('#confirm');
  form.requestSubmit(form.querySelector('[type=submit]'));
  const labels = [...dialog.querySelectorAll('h2, button')].map(one => one.textContent.trim());
  dialog.close();
  return labels;
})"""
"""Script that opens and closes the dialog of each form that asks first; returns their questions and both buttons."""
EMPTY_PATHS = (
    *("/dashboard/overview", "/dashboard/runs", "/dashboard/workflows", "/dashboard/approvals"),
    *("/dashboard/deliveries", "/dashboard/dead-letters", "/dashboard/schedule", "/dashboard/sources"),
    *("/dashboard/models", "/dashboard/keys", "/dashboard/audit", "/dashboard/health"),
)
"""Pages that an admin of an organization without anything sees."""


@pytest.fixture(scope="module")
async def visit(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[DashboardVisit]:
    async with open_visit(postgres, tmp_path_factory.mktemp("dashboard")) as visit:
        yield visit


async def require_accessible(visit: DashboardVisit, path: str) -> None:
    """Open a page, and fail if it does not fit, if it violates rules of accessibility, or if it loads anything from
    elsewhere.
    """
    visit.page.requested.clear()
    await visit.show(path)
    await visit.require_still()
    assert await visit.find_unfocusable() == [], path
    assert await visit.find_violations() == [], path
    assert not visit.take_problems(), path
    assert not [
        one for one in visit.page.requested if not one.startswith((f"{visit.url}/", "data:", "about:"))
    ]


@pytest.mark.parametrize("path", PATHS)
async def test_a_page_fits_and_has_no_violation_of_accessibility(visit: DashboardVisit, path: str) -> None:
    await require_accessible(visit, path)


async def test_empty_pages_and_refusals_have_no_violation_of_accessibility(visit: DashboardVisit) -> None:
    await visit.sign_in_as(visit.people.stranger.key)
    for path in EMPTY_PATHS:
        await require_accessible(visit, path)
        assert "Order intake" not in await visit.page.evaluate("document.body.textContent")
    await visit.sign_in_as(visit.people.owner.key)
    await visit.show("/dashboard/audit")  # of the same parts as the page that is missing, in `PATHS`
    assert (await visit.page.text("h1")).startswith("This page can")
    await visit.show("/dashboard/runs?after=nonsense")
    assert (await visit.page.text("h1")).startswith("This page can")
    assert await visit.find_violations() == []
    assert not [one for one in visit.take_problems() if "400 (Bad Request)" not in one]


async def test_the_second_button_of_a_dialog_never_has_the_verb_of_its_question(
    visit: DashboardVisit,
) -> None:
    source = {"name": "CRM", "type": "http-bearer", "secrets": {"token": "t"}}
    source_id = (await visit.people.owner.api.post("/api/v1/datasources", json=source)).json()["dataSourceId"]
    started = await visit.people.owner.api.post(f"/api/v1/workflows/{visit.workflow_id}/execute", json={})
    run_path = f"/dashboard/runs/{started.json()['executionId']}"
    questions = set[str]()
    for path in (*PATHS, run_path, f"/dashboard/sources?source={source_id}"):
        await visit.show(path)
        for question, act, other in await visit.page.evaluate(DIALOGS):
            questions.add(question)
            assert act, question
            assert other.split()[0] not in {*act.split(), *question.split()}, (question, act, other)
    assert len(questions) >= 5, questions
    assert not visit.take_problems()


async def test_a_run_is_canceled_only_by_the_button_that_says_so(visit: DashboardVisit) -> None:
    api, page = visit.people.owner.api, visit.page
    started = await api.post(f"/api/v1/workflows/{visit.workflow_id}/execute", json={})
    path = f"/executions/{started.json()['executionId']}"
    await visit.show(path.replace("/executions", "/dashboard/runs"))
    ask = f"document.querySelector('form[data-request$=\"{path}/cancel\"] button').click()"
    for button, label, status in (
        ("[data-closes]", "Keep it running", "pending"),
        ("[data-confirms]", "Cancel the run", "cancelled"),
    ):
        await page.evaluate(ask)
        await page.wait_for("document.querySelector('#confirm').open")
        assert await page.text(f"#confirm {button}") == label
        await page.click(f"#confirm {button}")
        if status == "cancelled":
            await page.wait_for("document.querySelector('.title').textContent.includes('Cancelled')")
        assert (await api.get(f"/api/v1{path}")).json()["status"] == status


async def test_a_run_shows_its_error_first_and_each_node_by_its_address(visit: DashboardVisit) -> None:
    await visit.show("/dashboard/runs/{execution_id}")
    page = visit.page
    assert "Write the order: POST https://orders.invalid/" in await page.text(".banner h2")
    assert "Nodes that write had run before: Write the order." in await page.text(".banner")
    above = "document.querySelector('.banner').compareDocumentPosition(document.querySelector('.row')) & 4"
    assert await page.evaluate(above)
    selected = "document.querySelector('.row[aria-current]').id"
    assert await page.wait_for(selected) == "node-write"
    rows = await page.evaluate(
        "[...document.querySelectorAll('a.row .cut:first-child')].map(one => one.textContent)"
    )
    assert rows[:4] == ["Order message", "For each line", "Reserve stock", "Above 5,000 €?"]
    assert await page.count("#node-reserve .iterations rect") == 12
    await page.follow("#node-reserve")
    assert await page.wait_for(selected) == "node-reserve"
    assert await page.evaluate("location.search") == "?node=reserve"
    await visit.press("n")
    await page.wait_for("document.activeElement.id === 'node-write'")
    await visit.press("]")
    await page.wait_for(f"{LOADED} && location.search.includes('tab=config')")
    await visit.show("/dashboard/runs/{execution_id}?node=reserve&iteration=3&tab=output")
    assert "sku-3" in await page.text("#inspector pre")


async def test_a_failed_run_is_resumed_and_replayed_after_its_plan(
    visit: DashboardVisit,
) -> None:
    await visit.show("/dashboard/runs/{execution_id}")
    await visit.page.follow("a[href$='/replay?act=resume']")
    plan = await visit.page.text("main")
    assert [text in plan for text in ("Reused", "Resume: run", "Leave it out")] == [True, True, False]
    assert await visit.page.count("main select, main [name=confirm]") == 0
    assert await visit.find_violations() == []
    await visit.page.follow("main form.card button[type=submit]")
    assert not (await visit.page.evaluate("location.pathname")).endswith(visit.execution_id)
    assert visit.execution_id in await visit.page.text(".facts")

    await visit.show("/dashboard/runs/{execution_id}")
    await visit.page.follow("a[href$='/replay']")
    await visit.page.wait_for("document.querySelector('#plan') !== null")
    plan = await visit.page.text("main")
    assert "Reserve stock" in plan
    assert "Reused" in plan
    assert "writes" in plan
    await visit.page.evaluate("document.querySelector('#from').value = 'lines'")
    await visit.page.follow("form.filters button[type=submit]")
    assert await visit.page.value("#from") == "lines"
    loop = "[...document.querySelectorAll('main tbody tr')].find(row => row.textContent.includes('For each line'))"
    assert "you chose it" in await visit.page.wait_for(f"{loop}?.textContent")
    await visit.page.click("input[name=again]")  # it was resumed before
    await visit.page.follow("main form.card button[type=submit]")
    assert visit.execution_id not in await visit.page.evaluate("location.pathname")
    assert f"replays {visit.execution_id}" in await visit.page.text(".facts")


async def test_a_workflow_that_is_kept_awake_is_released_and_the_release_taken_back(
    visit: DashboardVisit,
) -> None:
    page = visit.page
    await visit.show("/dashboard/workflows/{orders_id}/lifecycle")
    await page.wait_for("document.querySelector('#hold form button') !== null")
    await page.click("#hold form button")
    await page.wait_for("document.querySelector('#toast button') !== null")
    await page.wait_for("document.querySelector('#hold') === null")
    await visit.press("z")
    await page.wait_for("document.querySelector('#toast').textContent === 'Undone'")
    await page.wait_for("document.querySelector('#hold') !== null")
    await page.evaluate("document.querySelector('#keep-awake').open = true")
    await page.click("#keep-awake button[type=submit]")
    await page.wait_for("document.querySelector('#toast').textContent.includes('Kept awake')")
    assert page.problems == []


async def test_a_deployed_workflow_is_run_in_its_pods_by_a_button_of_its_own(visit: DashboardVisit) -> None:
    page = visit.page
    await visit.show("/dashboard/workflows/{orders_id}")
    # No pod answers here: the page gets the answer of one.
    await page.evaluate(
        "((ask) => { globalThis.fetch = async (url, options) => options?.method === 'POST'"
        " ? (sessionStorage.setItem('sent', `${url} ${options.body}`),"
        ' new Response(\'{"execution_id": "exec_of_pods"}\'))'
        " : ask(url, options); })(fetch)"
    )
    await page.click("button[data-request$='/trigger']")
    await page.wait_for("location.pathname === '/dashboard/runs/exec_of_pods'")
    url, body = (await page.evaluate("sessionStorage.getItem('sent')")).split(" ", 1)
    assert url == f"/api/v1/workflows/{visit.orders_id}/trigger"
    assert set(json.loads(body)) <= {"triggerInputs"}, body
    visit.take_problems()


async def test_texts_of_users_never_become_elements_and_foreign_policies_no_html(
    visit: DashboardVisit,
) -> None:
    await visit.show("/dashboard/runs")
    texts = await visit.page.evaluate("[...document.querySelectorAll('td a')].map(one => one.textContent)")
    assert HOSTILE in texts
    assert await visit.page.count("main img, main script") == 0
    refused = "(() => { try { document.body.innerHTML = '<p>x'; return false } catch { return true } })()"
    assert await visit.page.evaluate(refused)
    other = "(() => { try { trustedTypes.createPolicy('other', {}); return false } catch { return true } })()"
    assert await visit.page.evaluate(other)
    visit.page.problems.clear()  # the browser logs what it refused


async def test_an_agent_shows_its_turns_as_they_are_recorded(visit: DashboardVisit) -> None:
    page, owner = visit.page, visit.people.owner
    agent = {"id": "agent", "nodeId": "agent", "config": {"model": "echo", "prompt": "How is Oslo?"}}
    edge = {"source": TRIGGER["id"], "target": "agent"}
    workflow_id = await owner.create(name="Agent", nodes=[TRIGGER, agent], connections=[edge])
    execution_id = await execute_workflow(owner, workflow_id)
    run = await claim_run(visit.harness, execution_id)
    begun = msgspec.structs.replace(run.span("agent", SpanStatus.RUNNING), type="agent")
    await run.write(run.span("start"), begun, run.step("agent", 0, StepStatus.STARTED))
    await visit.show(f"/dashboard/runs/{execution_id}?node=agent")
    await page.wait_for("document.querySelector('[data-turn=\"1\"]') !== null")
    await page.wait_for("document.querySelector('.live').dataset.state === 'live'")

    calls = [RequestedToolCall("call_0", HOSTILE, {"city": HOSTILE})]
    answer = msgspec.json.encode(StoredAnswer(HOSTILE, FinishReason.TOOL_CALLS, calls))
    record = ModelCallRecord("model_1", "small", TokenUsage(1_200, 30), 65_000)
    fields = {"arguments": msgspec.json.encode({"city": HOSTILE}), "effect": "write"}
    asked = run.step("agent", 0, StepStatus.COMPLETED, ended_at=NOW, result=answer, model_calls=[record])
    failed = run.step("agent", 1, StepStatus.FAILED, ended_at=NOW, result=b'"{\\"error\\":1}"', **fields)
    await run.write(asked, msgspec.structs.replace(failed, name=HOSTILE))
    await page.wait_for("document.querySelector('[data-call=\"1\"]') !== null")
    turn = await page.text("[data-turn='1']")
    assert "asked for tools" in turn
    assert "1,200 in, 30 out · $0.000065" in turn
    assert turn.count(HOSTILE) == 3, "the answer, the name of the tool and its argument"
    assert (await page.text("[data-call='1'] pre:last-child")).split() == ["{", '"error":', "1", "}"]

    last = run.step("agent", 2, StepStatus.COMPLETED, ended_at=NOW, result=b'{"text":"Cold."}')
    ended = run.span("agent", output={"response": "Cold.", "stopReason": "loop"})
    await run.write(last, msgspec.structs.replace(ended, type="agent"), end=RunStatus.COMPLETED)
    await page.wait_for("document.querySelector('[data-end]') !== null")
    assert "same call three times" in await page.text("[data-end]")
    assert "answered without a tool" in await page.text("[data-turn='2']")
    assert await page.count("main img, main script") == 0
    assert await visit.find_violations() == []
    await visit.press("]")
    await page.wait_for(f"{LOADED} && location.search.includes('tab=input')")
    assert not visit.take_problems()


async def test_keys_move_and_open(visit: DashboardVisit) -> None:
    await visit.show("/dashboard/runs")
    await visit.press("j", "j", "k")
    await visit.page.wait_for("document.activeElement.closest('tr')?.rowIndex === 1")
    await visit.press("?")
    await visit.page.wait_for("document.querySelector('#keys').open")
    await visit.page.evaluate("document.querySelector('#keys').close()")
    await visit.press("c")
    await visit.page.wait_for("document.querySelector('#curl').open")
    commands = await visit.page.text("#curl pre")
    assert "/api/v1/executions" in commands
    assert visit.people.owner.key not in commands
    await visit.page.click("#curl [data-copies]")
    words = "document.querySelector('#curl [data-copies]').textContent"
    await visit.page.wait_for(f"['Copied', 'Press Ctrl+C'].includes({words})")
    await visit.page.wait_for(f"{words} === 'Copy'")
    await visit.page.evaluate("document.querySelector('#curl').close()")
    await visit.press("/")
    await visit.page.wait_for("document.activeElement.id === 'search'")
    await visit.show("/dashboard/workflows")
    await visit.press("f")
    await visit.page.wait_for("document.activeElement.id === 'find'")
    await visit.page.evaluate("document.activeElement.blur()")
    await visit.press("j", "r")
    await visit.page.wait_for("location.hash === '#run' && /workflows.wf_/.test(location.pathname)")


async def test_a_list_updates_itself_and_holds_new_rows_back_also_after_loads_that_took_long(
    visit: DashboardVisit,
) -> None:
    run = f"/api/v1/workflows/{visit.workflow_id}/execute"
    await visit.people.owner.api.post(run, json={})
    await visit.show("/dashboard/runs")
    # After a recent change, the page asks whether it is older. It is not.
    answers = (
        "performance.getEntriesByType('resource').filter(one => one.name === location.href)"
        ".map(one => one.responseStatus)"
    )
    await visit.page.wait_for(f"{answers}.length")
    assert {*await visit.page.evaluate(answers)} == {304}
    count = await visit.page.count("tbody tr")
    await visit.people.owner.api.post(run, json={})
    await visit.page.wait_for("document.querySelector('[data-shows-new]')?.textContent === '1 new'")
    assert await visit.page.count("tbody tr") == count
    await visit.press(".")
    await visit.page.wait_for(f"document.querySelectorAll('tbody tr').length === {count + 1}")
    assert await visit.page.evaluate("document.querySelector('[data-shows-new]') === null")

    # Ten minutes pass for the page during each load.
    await visit.page.evaluate(
        "(() => { const [now, load] = [performance.now.bind(performance), globalThis.fetch]; let passed = 0;"
        " performance.now = () => now() + passed;"
        " globalThis.fetch = (...given) => { passed += 600_000; return load(...given) } })()"
    )
    for number in (1, 2):
        await visit.people.owner.api.post(run, json={})
        await visit.page.wait_for(
            f"document.querySelector('[data-shows-new]')?.textContent === '{number} new'"
        )
    assert not visit.take_problems()


async def test_a_page_without_its_server_says_so_and_catches_up_by_itself(visit: DashboardVisit) -> None:
    page = visit.page
    await visit.show("/dashboard/runs")
    await page.wait_for("document.querySelector('.live').dataset.state === 'live'")
    await visit.set_offline(True)
    try:
        await page.wait_for("!document.querySelector('#unheard').hidden")
        assert (await page.text("#unheard-title")).startswith("The server doesn")
        heard = await page.text("#heard")
        assert await page.text(".live") == f"Lost · {heard}"
        count = await page.count("tbody tr")
        assert await visit.find_violations() == []
        await visit.people.owner.api.post(f"/api/v1/workflows/{visit.workflow_id}/execute", json={})
        await page.click("[data-tries-again]")
        await page.wait_for("!document.querySelector('#unheard').hidden")
    finally:
        await visit.set_offline(False)
    # No hint comes about the run of that time.
    await page.wait_for("document.querySelector('[data-shows-new]')?.textContent === '1 new'")
    await page.wait_for("document.querySelector('#unheard').hidden")
    await page.wait_for("document.querySelector('.live').dataset.state === 'live'")
    assert await page.count("tbody tr") == count
    visit.page.problems.clear()  # the browser logs that it was offline


async def test_a_problem_stays_until_it_is_closed(visit: DashboardVisit) -> None:
    page, owner = visit.page, visit.people.owner
    workflow_id = await owner.create(name="Gone", status="active", **GRAPH)
    await visit.show(f"/dashboard/workflows/{workflow_id}")
    assert (await owner.api.delete(f"/api/v1/workflows/{workflow_id}")).status_code == 204
    await page.click("form[data-request$='/execute'] button")
    await page.wait_for("!document.querySelector('#problem').hidden")
    assert await page.text("#problem p") == "There is no such workflow"
    assert await page.evaluate("document.querySelector('#toast').hidden")
    assert await visit.find_violations() == []
    await page.click("[data-dismisses]")
    await page.wait_for("document.querySelector('#problem').hidden")
    assert not visit.take_problems()


async def test_a_ranked_list_keeps_its_order_until_it_is_asked_to_sort(visit: DashboardVisit) -> None:
    page, owner = visit.page, visit.people.owner
    await visit.look(320, "light")  # the button for new rows needs the most space there
    first = await owner.create(name="Ranked first", status="active", **GRAPH)
    second = await owner.create(name="Ranked second", status="active", **GRAPH)
    await visit.show("/dashboard/workflows")
    await page.wait_for("document.querySelector('.live').dataset.state === 'live'")
    order = "JSON.stringify([...document.querySelectorAll('tbody tr')].map(one => one.id))"
    place = "document.querySelector('main table').getBoundingClientRect().top"  # rows may get other words
    shown, top = json.loads(await page.evaluate(order)), await page.evaluate(place)
    assert shown.index(second) < shown.index(first), "of two alike, the newer one comes first"
    await owner.api.put(f"/api/v1/workflows/{first}", json={"name": "Ranked anew"})
    await owner.api.post(f"/api/v1/workflows/{visit.workflow_id}/execute", json={})
    await page.wait_for("document.querySelector('[data-shows-new]')?.textContent === 'Sort again'")
    assert "Ranked anew" in await page.text(f"#{first}"), "a row changes in its place"
    assert json.loads(await page.evaluate(order)) == shown
    assert await page.evaluate(place) == top
    await page.click("[data-shows-new]")
    await page.wait_for(f"{order}.indexOf('{first}') < {order}.indexOf('{second}')")
    await page.wait_for("document.querySelector('[data-shows-new]') === null")
    await visit.look(1280, "light")
    assert not visit.take_problems()


async def test_a_run_asks_its_question_by_the_form_of_its_schema(visit: DashboardVisit) -> None:
    page, owner = visit.page, visit.people.owner
    started = await owner.api.post(f"/api/v1/workflows/{visit.workflow_id}/execute", json={})
    execution_id = started.json()["executionId"]
    schema = {
        "type": "object",
        "required": ["amount"],
        # The other names are those of properties of forms.
        "properties": {"amount": {"type": "integer", "title": "Amount"}}
        | {name: {"type": "string"} for name in ("dataset", "elements", "querySelector")},
    }
    question = {"title": "Pay?", "choices": [{"port": "pay", "label": "Pay it"}], "schema": schema}
    await input_waits.wait_for_input(visit.harness.gateway.database, execution_id, request=question)
    await visit.show(f"/dashboard/runs/{execution_id}")
    assert await visit.find_violations() == []
    await page.fill("main input[name='.amount']", "12")
    await page.fill("main input[name='.dataset']", "penguins")
    await page.click("main button[value=pay]")
    await page.wait_for("document.querySelector('main input[name=\\'.amount\\']') === null")
    async with visit.harness.gateway.database.read() as connection:
        answers = (await connection.execute(select(WaitAnswer))).mappings().all()
    (answer,) = [one for one in answers if one["execution_id"] == execution_id]
    assert '"amount":12,"dataset":"penguins"' in str(answer).replace(": ", ":").replace(", ", ",")
    assert not visit.take_problems()


async def test_the_audit_trail_is_filtered_by_its_columns(visit: DashboardVisit) -> None:
    page, admin = visit.page, visit.people.admin
    await visit.sign_in_as(admin.key)
    await visit.show("/dashboard/audit")
    assert await visit.find_violations() == []
    assert "Changes are kept for good" in await page.text("main")
    assert "Decisions of the system are kept for 30 days" in await page.text("main")
    await page.fill("#action", "workflow.created")
    await page.fill("#since", "2020-01-01T00:00:00Z")
    await page.evaluate(f"document.querySelector('#user').value = '{visit.people.owner.user.id}'")
    await page.follow("main form button[type=submit]")
    actions = (
        "[...document.querySelectorAll('tbody tr:not(.under)')].map(one => one.cells[0].textContent.trim())"
    )
    assert set(await page.evaluate(actions)) == {"workflow.created"}
    assert await page.value("#user") == visit.people.owner.user.id
    assert await page.value("#since") == "2020-01-01T00:00:00Z"
    await visit.sign_in_as(visit.people.owner.key)
    assert not visit.take_problems()


async def test_new_keys_and_replaced_trigger_tokens_are_shown_once(visit: DashboardVisit) -> None:
    page, owner = visit.page, visit.people.owner
    workflow_id = await owner.create(name="Rotated", **QUEUE)
    old = (await owner.api.post(f"/api/v1/workflows/{workflow_id}/trigger-token", json={})).json()
    await visit.show("/dashboard/keys")
    await page.fill("#key-name", "Proven")
    await page.click("form[data-shows=key] button[type=submit]")
    await page.wait_for("document.querySelector('#shown').open")
    key = await page.text("#shown-value")
    command = shlex.split(await page.text("#shown-command"))
    assert command[:3] == ["curl", "-sS", "-H"]
    assert command[3] == f"X-API-Key: {key}"
    status = (
        f"fetch('{urlsplit(command[4]).path}', {{headers: {{'X-API-Key': '{key}'}}}}).then(one => one.status)"
    )
    assert await page.evaluate(status) == 200
    await page.click("#shown [data-closes]")
    await page.wait_for("!document.querySelector('#shown').open")
    await visit.show("/dashboard/keys")
    assert key not in await page.evaluate("document.documentElement.outerHTML")
    assert "Proven" in await page.text("main")

    # A trigger token is replaced with an overlap.
    await page.click(f"#{old['id']}-actions summary")
    await page.click(f"#{old['id']}-actions form[data-shows] button")
    await page.wait_for("document.querySelector('#shown').open")
    url = await page.text("#shown-value")
    assert f"/api/v1/workflows/{workflow_id}/enqueue?key=" in url
    assert old["token"] not in url
    assert await page.evaluate("document.querySelector('#shown-proof').hidden")
    assert "Replaced" in await page.text(f"#{old['id']}")
    await page.click("#shown [data-closes]")


async def test_a_connection_is_tested_by_phase(visit: DashboardVisit) -> None:
    page, owner = visit.page, visit.people.owner
    # A loopback address is refused before any connection.
    body = {
        "name": "Tested",
        "type": "postgresql",
        "settings": {"host": "127.0.0.1", "database": "d", "user": "u"},
        "secrets": {"password": "p"},
    }
    source_id = (await owner.api.post("/api/v1/datasources", json=body)).json()["dataSourceId"]
    await visit.show(f"/dashboard/sources?source={source_id}")
    await page.click("form[data-result] button")
    await page.wait_for("document.querySelectorAll('#phases dt').length === 1")
    assert await page.text("#phases dt") == "Name and address"
    assert (await page.text("#phases dd")).startswith("Failed after ")
    assert "not a public address" in await page.text("#phases p")
    assert await visit.find_violations() == []
    assert not visit.take_problems()


async def test_a_data_source_is_created_by_the_form_of_its_type(visit: DashboardVisit) -> None:
    page, owner = visit.page, visit.people.owner
    await visit.show("/dashboard/sources")
    await page.follow(".title a.main")
    await page.follow("nav[aria-label=Type] a[href*='new=postgresql']")
    assert await visit.find_violations() == []
    for field, text in (
        ("source-name", "Orders"),
        ("settings-host", "db.example.com:1"),
        ("settings-port", "5433"),
    ):
        await page.fill(f"#{field}", text)
    await page.fill("#settings-database", "orders")
    await page.fill("#settings-user", "reader")
    await page.fill("#secrets-password", "secret of the form")
    await page.click("form[data-request$='/datasources'] button")
    await page.wait_for(
        "!document.querySelector('form[data-request$=\"/datasources\"] [data-problem]').hidden"
    )
    await page.fill("#settings-host", "db.example.com")
    await page.click("form[data-request$='/datasources'] button")
    await page.wait_for("document.querySelector('#source-title')?.textContent === 'Orders'")
    assert "secret of the form" not in await page.text("body")
    listed = (await owner.api.get("/api/v1/datasources", params={"type": "postgresql"})).json()["dataSources"]
    (made,) = [one for one in listed if one["name"] == "Orders"]
    assert (made["settings"]["host"], made["settings"]["port"]) == ("db.example.com", 5433)
    assert made["settings"]["tls"] == "prefer"
    assert made["secretNames"] == ["password"]
    visit.take_problems()


async def test_a_tool_server_with_hashes_of_tools_fits_and_has_no_violation_of_accessibility(
    visit: DashboardVisit,
) -> None:
    body = {"name": "Warehouse", "url": "https://tools.example.com/mcp"}
    made = await visit.people.owner.api.post("/api/v1/ai/tool-servers", json=body)
    source_id = made.json()["dataSourceId"]
    tool = ToolDefinition("find", sha256(b"find").hexdigest(), input_schema={"type": "object"})
    listed = to_stored(ListedTools(offered=[msgspec.to_builtins(tool)]))
    stored = update(DataSource).where(col(DataSource.id) == source_id).values(tools=listed)
    await visit.harness.gateway.database.transaction(lambda connection: connection.execute(stored))

    await visit.show(f"/dashboard/models?server={source_id}")
    assert await visit.page.text("[data-hash]") == tool.hash
    assert await visit.find_violations() == []
    assert not visit.take_problems()


async def test_a_question_is_answered_by_its_form(visit: DashboardVisit) -> None:
    started = await visit.people.owner.api.post(f"/api/v1/workflows/{visit.workflow_id}/execute", json={})
    execution_id = started.json()["executionId"]
    await input_waits.wait_for_input(visit.harness.gateway.database, execution_id)
    await visit.show("/dashboard/approvals")
    await visit.page.fill("main input[name='.comment']", "Looks right")
    await visit.page.click("main button[value=reject]")
    await visit.page.wait_for("document.querySelector('main form') === null")
    async with visit.harness.gateway.database.read() as connection:
        answers = (await connection.execute(select(WaitAnswer))).mappings().all()
    (answer,) = [one for one in answers if one["execution_id"] == execution_id]
    assert '"reject"' in str(answer)
    assert "Looks right" in str(answer)
    assert not visit.page.problems


async def test_the_arguments_of_a_tool_call_are_changed_in_the_inbox_and_never_rounded(
    visit: DashboardVisit,
) -> None:
    page, database = visit.page, visit.harness.gateway.database
    started = await visit.people.owner.api.post(f"/api/v1/workflows/{visit.workflow_id}/execute", json={})
    execution_id = started.json()["executionId"]
    request = {**input_waits.REQUEST, "toolCall": input_waits.TOOL_CALL}
    await input_waits.wait_for_input(database, execution_id, *input_waits.CALL_PLACE, request=request)
    await visit.show("/dashboard/approvals")
    field = "main textarea[name=arguments]"
    await page.wait_for(f"document.querySelector('{field}') !== null")
    await page.click("main form details summary")
    await page.wait_for("document.querySelector('main form details').open")
    await page.fill(field, '{"to": 12345678901234567890}')
    await page.click("main button[value=approve]")
    await page.wait_for(f"document.querySelector('{field}').validationMessage.includes('round')")
    await page.fill(field, '{"to": "c@d.example"}')
    await page.click("main button[value=approve]")
    await page.wait_for("document.querySelector('main form') === null")
    async with database.read() as connection:
        answers = (await connection.execute(select(WaitAnswer))).mappings().all()
    (answer,) = [one for one in answers if one["execution_id"] == execution_id]
    assert "c@d.example" in str(answer)


async def test_a_key_answers_a_question_after_asking_and_another_person_gets_the_next(
    visit: DashboardVisit,
) -> None:
    page, owner, database = visit.page, visit.people.owner, visit.harness.gateway.database
    run_ids = []
    for title in ("The first?", "The second?"):
        started = await owner.api.post(f"/api/v1/workflows/{visit.workflow_id}/execute", json={})
        run_ids.append(started.json()["executionId"])
        await input_waits.wait_for_input(
            database, run_ids[-1], request={**input_waits.REQUEST, "title": title}
        )
    await visit.show("/dashboard/approvals")
    assert await page.text("#asked") == "The first?"
    # The address names the question, so that an update shows no other one in its place.
    await page.wait_for(f"location.search.includes('{run_ids[0]}')")
    assert await visit.find_violations() == []
    # Typed into a field, the key answers nothing.
    await page.wait_for("document.querySelector('main [name=\".comment\"]')?.focus() === undefined")
    await page.wait_for("document.activeElement.name === '.comment'")
    await visit.press("y")
    assert not await page.evaluate("document.querySelector('#confirm').open")
    await page.evaluate("document.activeElement.blur()")
    await visit.press("y", "y")
    await page.wait_for("document.querySelector('#confirm').open")
    assert await page.text("#confirm-title") == "Answer “Yes, write” to “The first?”?"
    await page.click("#confirm [data-confirms]")
    await page.wait_for("document.querySelector('#asked')?.textContent === 'The second?'")
    async with database.read() as connection:
        answers = (await connection.execute(select(WaitAnswer))).mappings().all()
    (answer,) = [one for one in answers if one["execution_id"] in run_ids]
    assert (answer["execution_id"], '"approve"' in str(answer)) == (run_ids[0], True)

    await page.click("details.confirm summary")
    await page.fill("#assignees", f" {visit.people.admin.user.email}\nnobody@example.com ")
    await page.click("details.confirm button")
    await page.wait_for(
        "document.querySelector('details.confirm [data-problem]').textContent.includes('nobody@')"
    )
    page.problems.clear()  # the browser logs the answer 422
    await page.fill("#assignees", "role:admin")
    await page.click("details.confirm button")
    await page.wait_for("document.querySelector('#asked') === null")
    await visit.show("/dashboard/approvals?tab=all")
    assert "all admins" in await page.text("main dl")
    assert not visit.take_problems()


async def test_a_node_is_mended_on_the_page_of_its_workflow(visit: DashboardVisit) -> None:
    owner = visit.people.owner
    workflow_id = await owner.create(name="To mend", status="active", **GRAPH)
    await visit.page.open(f"{visit.url}/dashboard/workflows/{workflow_id}?node=step")
    await visit.page.fill("#config", '{"values": {"b": 2}')
    await visit.page.click("#node form button[type=submit]")
    await visit.page.wait_for(
        "document.querySelector('#config').validationMessage.startsWith('This is no JSON')"
    )
    await visit.page.fill("#config", '{"values": {"b": 2}, "mode": "replace"}')
    await visit.page.click("#node form button[type=submit]")
    await visit.page.wait_for("document.querySelector('#toast').textContent.startsWith('Saved')")
    (step,) = [node for node in (await owner.workflow(workflow_id))["nodes"] if node["id"] == "step"]
    assert step["config"] == {"values": {"b": 2}, "mode": "replace"}
    await visit.page.wait_for("document.querySelector('#config').dataset.before.includes('replace')")
    await visit.page.fill("#config", '{"values": {"b": 3}}')
    await visit.page.click("#node form button[type=submit]")
    await visit.page.wait_for("!document.querySelector('#config').dataset.before.includes('replace')")
    (step,) = [node for node in (await owner.workflow(workflow_id))["nodes"] if node["id"] == "step"]
    assert step["config"] == {"values": {"b": 3}}, "a field that was deleted is gone"
    # Without a trigger, it cannot run.
    workflow_id = await owner.create(name="Broken", nodes=GRAPH["nodes"][1:])
    await visit.page.open(f"{visit.url}/dashboard/workflows/{workflow_id}?node=step")
    await visit.page.fill("#config", '{"values": {"b": 2}}')
    await visit.page.click("#node form button[type=submit]")
    await visit.page.wait_for(
        "document.querySelector('#toast').textContent.startsWith('Saved. It cannot run')"
    )


async def test_a_data_source_is_chosen_in_the_form_of_a_node(visit: DashboardVisit) -> None:
    owner, page = visit.people.owner, visit.page
    sources = {}
    for name in ("Shop", "Stock"):
        body = {"type": "http-bearer", "name": name, "secrets": {"token": "t"}}
        sources[name] = (await owner.api.post("/api/v1/datasources", json=body)).json()["dataSourceId"]
    call = {"id": "step", "nodeId": "http-request", "config": {"method": "GET", "url": "https://a.invalid"}}
    workflow_id = await owner.create(name="To connect", nodes=[GRAPH["nodes"][0], call])

    async def save(expected: dict[str, str], shown: str) -> None:
        await page.click("#node form button[type=submit]")
        await page.wait_for(
            "(([field]) => field.value === '' && field.options[0].text === "
            f"{json.dumps(shown)})(document.querySelectorAll('#choose-1'))"
        )
        (step,) = [node for node in (await owner.workflow(workflow_id))["nodes"] if node["id"] == "step"]
        assert step["config"] == expected
        assert json.loads(await page.value("#config")) == expected

    await page.open(f"{visit.url}/dashboard/workflows/{workflow_id}?node=step")
    await page.fill("#choose-1", sources["Shop"])
    await page.fill("#config", '{"url": "https://b.invalid"}')
    chosen = {"url": "https://b.invalid", "dataSource": sources["Shop"]}
    await save(chosen, "Shop · HTTP, bearer token")
    await page.fill("#choose-1", sources["Stock"])
    await save(chosen | {"dataSource": sources["Stock"]}, "Stock · HTTP, bearer token")
    await page.fill("#config", '{"url": "https://b.invalid"}')
    await save({"url": "https://b.invalid"}, "None")


async def test_a_map_keeps_its_size_and_arrows_follow_its_edges(visit: DashboardVisit) -> None:
    page = visit.page
    await visit.show("/dashboard/runs/{execution_id}?view=map")
    width = "Number(document.querySelector('[data-map] svg').getAttribute('width'))"
    whole = await page.evaluate(width)
    await page.click("[data-zoom=whole]")
    await page.click("[data-zoom=in]")
    await page.wait_for(f"{width} === {round(whole * 1.25)}")
    assert await page.text("[data-zoom=whole]") == "125 %"
    await page.evaluate("document.querySelector('[data-card]').focus()")
    await visit.press("-", "-")
    await page.wait_for(f"{width} === {round(whole * 0.85)}")

    async def wait_for_focus(*cards: str) -> None:
        await page.wait_for(f"{[*cards]}.includes(document.activeElement.dataset.card)")

    await page.evaluate("document.querySelector('[data-card=start]').focus()")
    await visit.press("ArrowRight")
    await wait_for_focus("lines")
    await visit.press("ArrowRight", "ArrowDown", "ArrowRight")
    await wait_for_focus("write", "small")
    await visit.press("ArrowLeft")
    await wait_for_focus("large")
    in_order = "[...document.querySelectorAll('[data-card][tabindex=\"0\"]')].map(one => one.dataset.card)"
    assert await page.evaluate(in_order) == ["large"], "one card is in the tab order"
    await page.evaluate("document.activeElement.dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    await page.wait_for(f"{LOADED} && location.search.includes('node=large')")
    assert await page.text("#node") == "Above 5,000 €?"

    await page.wait_for(f"{width} === {round(whole * 0.85)}")
    await page.click("[data-zoom=fit]")
    await page.wait_for(f"{width} <= document.querySelector('[data-map]').clientWidth")
    await page.click("[data-zoom=whole]")
    await page.wait_for(f"{width} === {whole}")
    assert not visit.take_problems()


@pytest.mark.parametrize("count", [5, 30])
async def test_a_map_opens_fitted(visit: DashboardVisit, count: int) -> None:
    page, owner = visit.page, visit.people.owner
    ids = [f"n{number}" for number in range(count)]
    nodes = [{"id": one, "nodeId": "set" if number else "manual"} for number, one in enumerate(ids)]
    edges = [{"source": one, "target": other} for one, other in pairwise(ids)]
    edges += [{"source": "n0", "target": one} for one in ids[2:]]
    workflow_id = await owner.create(name="In a row", status="active", nodes=nodes, connections=edges)
    run = (await owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})).json()["executionId"]
    map_ = "document.querySelector('[data-map]')"
    await visit.look(1280, "light")
    for path in (f"/dashboard/runs/{run}?view=map", f"/dashboard/workflows/{workflow_id}"):
        await visit.show(path)
        for size in ("Width", "Height"):
            assert await page.evaluate(f"{map_}.scroll{size} === {map_}.client{size}"), path
        assert int((await page.text("[data-zoom=whole]")).removesuffix(" %")) < 100
    await page.click("[data-zoom=whole]")
    await page.wait_for(f"{map_}.scrollWidth > {map_}.clientWidth")
    assert await page.text("[data-zoom=whole]") == "100 %"


async def test_changes_of_two_people_are_shown_before_one_is_lost(visit: DashboardVisit) -> None:
    page, owner = visit.page, visit.people.owner
    body = {
        "name": "of two",
        "type": "http-basic",
        "settings": {"username": "a"},
        "secrets": {"password": "p"},
    }
    made = (await owner.api.post("/api/v1/datasources", json=body)).json()
    path = f"/api/v1/datasources/{made['dataSourceId']}"
    cells = "[...one.cells].map(cell => cell.textContent.trim()).join(' ')"
    lines = f"[...document.querySelectorAll('[data-merge] tbody tr')].map(one => {cells})"

    async def press(selector: str) -> None:
        await page.evaluate("document.querySelector('#toast').textContent = ''")
        await page.click(selector)

    async def wait_for_toast(text: str) -> None:
        await page.wait_for(f"document.querySelector('#toast').textContent.includes({text!r})")

    # Secrets are not shown: the fingerprint stands for theirs.
    await visit.show(f"/dashboard/sources?source={made['dataSourceId']}")
    changed = {"settings": {"username": "b"}, "secrets": {"password": "theirs"}}
    assert (await owner.api.put(path, json=changed)).status_code == 200
    before = (await owner.api.get(path)).json()["secretsFingerprint"]
    await page.fill("#secret-password", "of this tab")
    await press("form:has(#secret-password) button")
    await page.wait_for("document.querySelector('[data-merge]') !== null")
    assert sorted(await page.evaluate(lines)) == [
        f'secretsFingerprint "{before}" "yours, not shown"',
        'settings.username "b" "a"',
    ]
    assert await visit.find_violations() == []
    assert (await owner.api.get(path)).json()["secretsFingerprint"] == before
    await press("[data-keeps]")
    await wait_for_toast("Replaced")
    present = (await owner.api.get(path)).json()
    assert present["secretsFingerprint"] != before
    assert present["settings"] == {"username": "b"}, "the form sends secrets alone"

    # A model of a list comes without its tag: it is compared before it is sent.
    source_id = await create_provider(visit.people.owner)
    model_id = await create_model(visit.people.owner, source_id)
    await visit.show("/dashboard/models")
    model = f"/api/v1/ai/models/{model_id}"
    assert (await owner.api.put(model, json={"isShared": True})).status_code == 200
    await page.click(f"form[data-request$='{model_id}'] button[type=submit]")
    await page.wait_for("document.querySelector('[data-merge]') !== null")
    assert await page.evaluate(lines) == ["isShared true false"]
    await page.click("[data-merges]")
    await page.wait_for("document.querySelector('[data-merge]') === null")
    assert (await owner.api.get(model)).json()["isShared"] is True
    await page.wait_for("document.querySelector('[name=isShared]').checked")
    await page.click("[name=isShared]")
    await press(f"form[data-request$='{model_id}'] button[type=submit]")
    await wait_for_toast("is shared as chosen")
    assert (await owner.api.get(model)).json()["isShared"] is False

    assert not [one for one in visit.take_problems() if "412" not in one]


async def test_a_policy_and_texts_of_a_workflow_are_merged(visit: DashboardVisit) -> None:
    page, owner = visit.page, visit.people.owner

    async def press(selector: str) -> None:
        await page.evaluate("document.querySelector('#toast').textContent = ''")
        await page.click(selector)

    async def wait_for_toast(text: str) -> None:
        await page.wait_for(f"document.querySelector('#toast').textContent.includes({text!r})")

    # A policy is set as a whole; theirs stays if it is taken.
    policy = f"/api/v1/workflows/{visit.orders_id}/lifecycle"
    await visit.show("/dashboard/workflows/{orders_id}/lifecycle?type=on-demand")
    assert (await owner.api.put(policy, json={"type": "always-on"})).status_code == 200
    save = "form[data-request$='/lifecycle'] button[type=submit]"
    await page.click(save)
    await page.wait_for("document.querySelector('[data-merge]') !== null")
    await page.click("[data-discards]")
    await page.wait_for("document.querySelector('[data-merge]') === null")
    assert (await owner.api.get(policy)).json()["lifecyclePolicy"]["type"] == "always-on"
    # The page knows theirs now, so that nothing is in conflict.
    await press(save)
    await wait_for_toast("is set")
    assert (await owner.api.get(policy)).json()["lifecyclePolicy"]["type"] == "on-demand"

    # Of name and description, each keeps the change of one person.
    workflow = f"/api/v1/workflows/{visit.orders_id}"
    await visit.show("/dashboard/workflows/{orders_id}")
    assert (await owner.api.put(workflow, json={"name": "Theirs"})).status_code == 200
    await page.fill("#description", "Mine")
    await press("#rename button[type=submit]")
    await page.wait_for("document.querySelector('[data-merge]') !== null")
    await press("[data-merges]")
    await wait_for_toast("Saved")
    stored = (await owner.api.get(workflow)).json()
    assert (stored["name"], stored["description"]) == ("Theirs", "Mine")
    await page.wait_for("document.getElementById('name').value === 'Theirs'")
    # Settings that a person removes and another one adds.
    settings = {"settings": {"timeout": 60, "metadata": {"order": "{{ trigger.body.total }}"}}}
    assert (await owner.api.put(workflow, json=settings)).status_code == 200
    await page.fill("#settings-json", json.dumps({**stored["settings"], "maxRetries": 1}))
    await press("#settings button[type=submit]")
    await page.wait_for("document.querySelector('#settings [data-merge]') !== null")
    await press("#settings [data-merges]")
    await wait_for_toast("Saved")
    merged = (await owner.api.get(workflow)).json()["settings"]
    assert (merged["timeout"], merged["maxRetries"], "metadata" in merged) == (60, 1, True)
    assert not [one for one in visit.take_problems() if "412" not in one]


async def test_two_changes_of_a_node_are_merged_by_path(visit: DashboardVisit) -> None:
    page, owner = visit.page, visit.people.owner
    workflow_id = await owner.create(name="Changed twice", status="active", **GRAPH)
    path = f"/api/v1/workflows/{workflow_id}/nodes/step"
    await owner.api.put(path, json={"config": {"values": {"a": 1, "b": 1, "c": 1}}})
    await page.open(f"{visit.url}/dashboard/workflows/{workflow_id}?node=step")

    async def save(values: dict[str, int]) -> None:
        await page.fill("#config", json.dumps({"values": values}))
        await page.click("#node form button[type=submit]")

    async def read_values() -> object:
        (step,) = [node for node in (await owner.workflow(workflow_id))["nodes"] if node["id"] == "step"]
        return step["config"]["values"]

    # Another node or the name has changed: nothing to choose.
    await owner.api.put(f"/api/v1/workflows/{workflow_id}", json={"name": "Renamed"})
    await save({"a": 2, "b": 1, "c": 1})
    await page.wait_for("document.querySelector('#toast').textContent.startsWith('Saved')")
    assert await read_values() == {"a": 2, "b": 1, "c": 1}

    # Both have changed `a`, they have changed `b`, and the visitor `c`.
    await page.evaluate("document.querySelector('#toast').textContent = ''")
    await owner.api.put(path, json={"config": {"values": {"a": 3, "b": 3, "c": 1}}})
    await page.evaluate(
        "const ask = fetch; fetch = async (...of) => of[1]?.method || !String(of[0]).includes('/api/v1/workflows/')"
        " ? ask(...of) : (fetch = ask, new Response('', {status: 503}))"
    )
    await save({"a": 4, "b": 1, "c": 4})
    await page.wait_for("document.body.innerText.includes('could not be read (status 503)')")
    await save({"a": 4, "b": 1, "c": 4})
    await page.wait_for("!document.querySelector('[data-merge]').hidden")
    assert await read_values() == {"a": 3, "b": 3, "c": 1}, "nothing is overwritten before the choice"
    rows = "[...document.querySelectorAll('[data-merge] tbody tr')].map(one => one.cells[0].textContent)"
    assert sorted(await page.evaluate(rows)) == ["values.a", "values.b", "values.c"]
    assert await page.count("[data-merge] input") == 2
    assert await visit.find_violations() == []
    await page.click("[data-side=theirs]")
    await page.click("[data-merges]")
    await page.wait_for("document.querySelector('#toast').textContent.startsWith('Saved')")
    assert await read_values() == {"a": 3, "b": 3, "c": 4}
    assert not [one for one in visit.take_problems() if "412" not in one]
