"""Pages of a workflow without a browser: graph and figures, node, form, versions, and times awake."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from html import unescape
from typing import Any

import pytest

from gateway.dashboard.pages import run_replay, workflow_versions
from models.access import UserRole
from tests.integration.deployed_workflows import mark_running
from tests.integration.gateway_harness import GRAPH, GatewayHarness, OrganizationUsers, create_gateway
from tests.integration.test_dashboard import HOSTILE, MARKUP, fail_with, sign_in
from tests.integration.test_waiting_runs import execute_workflow, serve_worker, wait_until_ended
from tests.ordinary_run import checksum
from tests.services import PostgresServer

SHARE = 3
"""Ordinary runs ask for one in so many of the pairs of a parameter and an odd value."""
NODES: list[dict[str, Any]] = [
    {"id": "start", "nodeId": "manual", "label": "Measurements"},
    {"id": "parse", "nodeId": "csv-parse", "label": "Read", "config": {"text": "{{ data.body.csv }}"}},
    {"id": "report", "nodeId": "template", "label": "Report", "config": {"text": "{{ nodes.parse.rows }}"}},
]
EDGES = [{"source": "start", "target": "parse"}, {"source": "parse", "target": "report"}]


@pytest.fixture(scope="module")
async def harness(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayHarness]:
    async with create_gateway("sqlite", postgres, tmp_path_factory.mktemp("dashboard")) as harness:
        yield harness


async def test_a_workflow_shows_figures_of_its_nodes_and_a_form_for_its_inputs(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(nodes=NODES, connections=EDGES, status="active")
    async with serve_worker(harness):
        run = await execute_workflow(people.owner, workflow_id, csv="a,b\n1,2")
        await wait_until_ended(people.owner, run)
    browser = await sign_in(harness, people.owner.key)
    address = f"/dashboard/workflows/{workflow_id}"
    page = await browser.get(address)
    assert page.status_code == 200, page.text
    assert "figures of 1 run in 7 days" in page.text
    assert re.search(r'class="note"[^>]*>p95 \d+ ms', page.text)
    assert 'name=".csv"' in page.text
    assert "used by “Read" in page.text
    assert "Versions" in page.text
    filled = await browser.get(f"{address}?input=last")
    assert re.search(r'name=".csv"[^>]*>a,b\n1,2</textarea>', filled.text)
    table = await browser.get(f"{address}?view=table")
    assert table.text.count("data-row") >= len(NODES)
    assert "0 %" in table.text
    chosen = await browser.get(f"{address}?node=report")
    assert f"PUT /api/v1/workflows/{workflow_id}/nodes/report" in chosen.text
    assert "&#34;text&#34;: &#34;{{ nodes.parse.rows }}&#34;" in chosen.text
    assert "Fields of Template" in chosen.text
    viewer = await sign_in(harness, (await harness.person(await harness.organization(), UserRole.VIEWER)).key)
    assert (await viewer.get(address)).status_code == 404


async def test_a_node_chooses_among_the_resources_that_its_visitor_may_use(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    sources = []
    for person, kind, name in (
        (people.owner, "http-bearer", "Shop <b>"),
        (people.owner, "webhook-secret", "Hook"),
        (people.colleague, "http-bearer", "Hidden"),
    ):
        secrets = {"secret": "whsec_" + 32 * "a"} if kind == "webhook-secret" else {"token": "t"}
        body = {"type": kind, "name": name, "secrets": secrets}
        sources.append((await person.api.post("/api/v1/datasources", json=body)).json()["dataSourceId"])
    nodes = [
        NODES[0],
        {"id": "own", "nodeId": "http-request", "config": {"dataSource": sources[0]}},
        {"id": "other", "nodeId": "http-request", "config": {"dataSource": sources[2]}},
        {"id": "none", "nodeId": "mysql-source"},
        {"id": "ask", "nodeId": "llm", "config": {"model": "{{ data.model }}"}},
    ]
    workflow_id = await people.owner.create(nodes=nodes)
    browser = await sign_in(harness, people.owner.key)

    async def list_choices(node: str) -> list[tuple[str, str]]:
        page = (await browser.get(f"/dashboard/workflows/{workflow_id}?node={node}")).text
        select = re.search(r'<select id="choose-1" name="([^"]*)" data-in="config">(.*?)</select>', page)
        assert select is not None, page
        options = re.findall(r'<option value="(\w*)">(.*?)</option>', select[2])
        assert "<b>" not in select[2]
        return [(select[1], ""), *((id_, unescape(text)) for id_, text in options)]

    shop = (sources[0], "Shop <b> · HTTP, bearer token")
    assert await list_choices("own") == [(".dataSource", ""), ("", shop[1])]
    assert await list_choices("other") == [(".dataSource", ""), ("", sources[2]), shop]
    assert await list_choices("none") == [(".dataSource", ""), ("", "None")]
    none = (await browser.get(f"/dashboard/workflows/{workflow_id}?node=none")).text
    assert 'There is none that fits yet: <a href="/dashboard/sources?new=mysql">create one</a>.' in none
    assert await list_choices("ask") == [(".model", ""), ("", "{{ data.model }}"), ("echo", "echo · echo")]
    for node in ("start", "own"):
        page = await browser.get(f"/dashboard/workflows/{workflow_id}?node={node}")
        assert ("data-renews" in page.text) == (node == "own")
        assert "takes an expression too" not in page.text, "the source of a request is a constant"
    asked = await browser.get(f"/dashboard/workflows/{workflow_id}?node=ask")
    assert "<code>model</code> of the config, which takes an expression too." in asked.text


async def test_findings_lead_to_their_nodes(harness: GatewayHarness, people: OrganizationUsers) -> None:
    broken = [NODES[0], {"id": "parse", "nodeId": "http-request", "label": "Read", "config": {}}]
    workflow_id = await people.owner.create(nodes=broken, connections=EDGES[:1])
    page = await (await sign_in(harness, people.owner.key)).get(f"/dashboard/workflows/{workflow_id}")
    assert "url is required" in page.text
    assert f"/dashboard/workflows/{workflow_id}?node=parse#node" in page.text


async def test_versions_are_compared_by_path_and_restored_from_there(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = people.owner.api
    workflow_id = await people.owner.create(nodes=NODES, connections=EDGES, status="active")
    path = f"/api/v1/workflows/{workflow_id}"
    changed = [NODES[0], {**NODES[1], "label": HOSTILE}, {"id": "note", "nodeId": "log", "label": "Note"}]
    changed[1]["config"] = {"text": "{{ data.body.text }}", "delimiter": ";"}
    changed[2]["config"] = {"message": "x"}
    edges = [EDGES[0], {"source": "parse", "target": "note"}]
    edited = await api.put(path, json={"nodes": changed, "connections": edges, "settings": {"timeout": 60}})
    assert edited.status_code == 200, edited.text
    created = await api.post(f"{path}/versions", json={"versionTag": "v2", "description": HOSTILE})
    assert created.status_code == 201, created.text
    browser = await sign_in(harness, people.owner.key)
    address = f"/dashboard/workflows/{workflow_id}/versions"
    page = await browser.get(f"{address}?from=1&to=2")
    assert page.status_code == 200, page.text
    for part in ("config.text", "{{ data.body.csv }}", "{{ data.body.text }}", "timeout", " → Report"):
        assert part in page.text, part
    for state in ("Added", "Removed", "Changed"):
        assert page.text.count(f"</svg>{state}</span>") >= 2, state
    assert "<small>by you</small>" in page.text
    assert "<img" not in page.text
    assert "<script>" not in page.text
    for act in ("restore", "deploy"):
        assert f"{address}?from=current&amp;to=1&amp;act={act}&amp;version=1" in page.text
    assert f"POST {path}/versions/1/restore" not in page.text, "findings first"
    restoring = (await browser.get(f"{address}?from=current&to=1&act=restore&version=1")).text
    assert "Restore version 1?" in restoring
    assert f"POST {path}/versions/1/restore" in restoring
    deploying = (await browser.get(f"{address}?from=current&to=1&act=deploy&version=1")).text
    assert f"POST {path}/deploy-version" in deploying
    same = await browser.get(f"{address}?from=nonsense&to={MARKUP}")
    assert "No differences" in same.text, "the newest version is compared with the workflow as it is now"
    assert "<img" not in same.text
    run_id = (await api.post(f"{path}/execute", json={})).json()["executionId"]
    await fail_with(harness, run_id, "http-422")
    for shown in (workflow_versions, run_replay):
        monkeypatch.setattr(shown, "SHOWN_VERSIONS", 1)
    newest = (await browser.get(address)).text
    assert "Newest versions" in newest
    assert (f"{address}?from=2&amp;" in newest, f"{address}?from=1&amp;" in newest) == (True, False)
    plan = (await browser.get(f"/dashboard/runs/{run_id}/replay")).text
    assert ("Version 2, v2" in plan, "Version 1" in plan) == (True, False)


async def test_findings_of_a_version_are_shown_before_it_is_restored_or_deployed(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    api = people.owner.api
    broken = [NODES[0], {**NODES[1], "label": HOSTILE}, NODES[2]]
    circle = [*EDGES, {"source": "report", "target": "parse"}]
    workflow_id = await people.owner.create(nodes=broken, connections=circle)
    path = f"/api/v1/workflows/{workflow_id}"
    mended = await api.put(path, json={"nodes": NODES, "connections": EDGES})
    assert mended.status_code == 200, mended.text
    active = await api.put(f"{path}/status", json={"status": "active"})
    assert active.status_code == 200, active.text
    now = (await api.post(f"{path}/validate")).json()
    earlier = (await api.post(f"{path}/versions/1/validate")).json()
    assert (now["errors"], earlier["valid"]) == ([], False), earlier
    message = earlier["errors"][0]["message"]
    assert "circular" in message.lower() or "cycle" in message.lower(), message
    assert (await api.post(f"{path}/versions/7/validate")).status_code == 404
    assert len((await api.get(path)).json()["connections"]) == 2, "nothing is restored"

    browser = await sign_in(harness, people.owner.key)
    address = f"/dashboard/workflows/{workflow_id}/versions?version=1&act="
    for act, request in (("restore", "versions/1/restore"), ("deploy", "deploy-version")):
        page = (await browser.get(address + act)).text
        assert "1 error" in page
        assert "It cannot run" in page
        assert f"POST {path}/{request}" not in page, "the API would refuse it"
        assert "<img" not in page
    await api.put(f"{path}/status", json={"status": "draft"})
    page = (await browser.get(f"{address}restore")).text
    assert "1 error" in page
    assert f"POST {path}/versions/1/restore" in page, "a draft may be incomplete"
    assert "Restore version 1?" not in (await browser.get(f"{address}nonsense")).text


async def test_times_awake_are_a_calendar_and_another_policy_is_tried_on_past_runs(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(name="Stock check", status="active", **GRAPH)
    browser = await sign_in(harness, people.owner.key)
    address = f"/dashboard/workflows/{workflow_id}/lifecycle"
    assert "It is not deployed" in (await browser.get(address)).text
    assert (await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/deploy")).status_code == 202
    await mark_running(harness, workflow_id)
    page = await browser.get(address)
    assert page.status_code == 200, page.text
    assert page.text.count('<li class="day') == 14
    assert 'class="pre"' in page.text
    assert "deployed, by" in page.text
    why = (await people.owner.api.get(f"/api/v1/workflows/{workflow_id}/why")).json()["message"]
    assert why in unescape(page.text)
    assert re.search(r"<b>Stops <time datetime=.\d{4}-[^>]*>[^<]*\d\d:\d\d</time> UTC</b>", page.text)
    assert "pod hours a day" in page.text
    query = "type=scheduled-window&days=all&start=07:00&end=19:00&zone=Europe/Berlin"
    tried = await browser.get(f"{address}?{query}")
    assert "Set “In weekly windows, 07:00 to 19:00 in Europe/Berlin”" in tried.text
    assert "How long they wait, p95" in tried.text
    assert f"PUT /api/v1/workflows/{workflow_id}/lifecycle" in tried.text
    assert "Europe/Berlin" in tried.text
    present = (await people.owner.api.get(f"/api/v1/workflows/{workflow_id}/lifecycle")).json()
    assert present["lifecyclePolicy"]["type"] == "idle-shutdown", "a preview changes nothing"
    assert "Keep awake until…" in page.text
    api, path = people.owner.api, f"/api/v1/workflows/{workflow_id}/lifecycle"
    assert (await api.post(f"{path}/hold", json={"expiresInSeconds": 86_400})).is_success
    assert (await api.put(path, json={"type": "on-demand"})).is_success
    held = (await browser.get(address)).text
    name = people.owner.user.name or people.owner.user.email
    assert f"Kept awake by {name}</b> until" in unescape(held)
    assert f'data-request="DELETE {path}/hold"' in held
    assert f"{name}: On demand in place of Stops when idle" in unescape(held)
    assert f"{name}: until 20" in unescape(held)
    assert (await api.delete(f"{path}/hold")).is_success
    assert f"{name}: its policy decides again" in unescape((await browser.get(address)).text)
    for wrong in ("type=scheduled-window&zone=Nowhere", "type=idle-shutdown&minutes=0"):
        refused = await browser.get(f"{address}?{wrong}")
        assert refused.status_code == 200
        assert 'class="pad error"' in refused.text
        assert "lifecycle&#34;" not in refused.text


@pytest.mark.parametrize("page", ["", "?view=table&node=step", "?node=step", "/versions", "/lifecycle"])
async def test_texts_of_a_workflow_are_shown_as_text(
    harness: GatewayHarness, people: OrganizationUsers, page: str
) -> None:
    nodes = [
        {"id": "start", "nodeId": "manual", "label": HOSTILE},
        {"id": "step", "nodeId": "set", "label": HOSTILE, "config": {"values": {MARKUP: MARKUP}}},
    ]
    workflow_id = await people.owner.create(
        name=HOSTILE,
        description=HOSTILE,
        tags=["<b>tag</b>"],
        status="active",
        nodes=nodes,
        connections=[{"source": "start", "target": "step"}],
    )
    shown = await (await sign_in(harness, people.owner.key)).get(f"/dashboard/workflows/{workflow_id}{page}")
    assert shown.status_code == 200, shown.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown.text
    for markup in ("<img", "<script>", "<b>tag"):
        assert markup not in shown.text


async def test_addresses_with_odd_values_are_pages_and_never_errors_of_the_server(
    harness: GatewayHarness, people: OrganizationUsers, *, is_thorough: bool
) -> None:
    workflow_id = await people.owner.create(nodes=NODES, connections=EDGES, status="active")
    async with serve_worker(harness):
        run = await execute_workflow(people.owner, workflow_id, csv="a\n1")
        await wait_until_ended(people.owner, run)
    browser = await sign_in(harness, people.owner.key)
    odd = (
        "",
        "0",
        "-1",
        "current",
        "1.2.3",
        "9" * 400,
        "a b&c",
        MARKUP,
        "\x00",
        "%",
        "{{ 7 * 7 }}",
        "..",
        "/",
    )
    pages = {
        f"/dashboard/runs/{run}": ("node", "iteration", "tab", "view", "with", "open", "at"),
        f"/dashboard/workflows/{workflow_id}": ("node", "view", "at", "input"),
        f"/dashboard/workflows/{workflow_id}/versions": ("from", "to", "at"),
        f"/dashboard/workflows/{workflow_id}/lifecycle": ("type", "minutes", "days", "start", "end", "zone"),
    }
    fixed = {"iteration": {"node": "parse"}, "with": {"tab": "diff", "node": "parse"}}
    fixed |= {"minutes": {"type": "idle-shutdown"}, "zone": {"type": "scheduled-window"}}
    fixed |= {name: {"type": "scheduled-window"} for name in ("start", "end", "days")}
    for path, names in pages.items():
        for name in names:
            for value in odd:
                if not is_thorough and checksum(f"{name} {value}") % SHARE:
                    continue
                page = await browser.get(path, params={**fixed.get(name, {}), name: value})
                assert page.status_code in {200, 400, 404}, (path, name, value, page.text)
                assert "<img" not in page.text
                assert "<script>" not in page.text
