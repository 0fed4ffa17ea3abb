"""Templates shipped with the server, each used and run to the right result on public data that is stored
here.
"""

import asyncio
import csv
import json
import re
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from models.access import KeyScope
from tests import smtp_server
from tests.fakes.model_server import serve_models
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient, assert_refused
from workers.main import run_worker
from workers.settings import WorkerSettings

DATA = Path(__file__).parents[2] / "docs" / "examples"
SHIPPED = (
    "wf_tmpl_api-change-detection",
    "wf_tmpl_approval-before-write",
    "wf_tmpl_csv-report",
    "wf_tmpl_daily-etl",
    "wf_tmpl_mail-triage",
    "wf_tmpl_penguin-report",
    "wf_tmpl_research-agent",
    "wf_tmpl_webhook-to-database",
)


@pytest.fixture(scope="module")
async def harness_with_worker(harness: GatewayHarness) -> AsyncIterator[GatewayHarness]:
    gateway = harness.gateway
    settings = WorkerSettings(
        **gateway.settings.model_dump(include={"data_dir", "database_url", "secret_key"}),
        outbound_allowed_networks=(ip_network("127.0.0.1/32"),),
    )
    async with run_worker(settings, gateway.store, gateway.broker, gateway.database):
        yield harness


@pytest.fixture
def person(harness_with_worker: GatewayHarness, people: OrganizationUsers) -> UserClient:
    assert harness_with_worker
    return people.owner


def organization_folder(harness: GatewayHarness, person: UserClient) -> Path:
    """Return the folder of files of a user's organization."""
    path = harness.gateway.settings.data_dir / "files" / person.user.organization_id
    path.mkdir(parents=True, exist_ok=True)
    return path


async def create_sqlite_source(person: UserClient, file: str) -> str:
    """Create a data source of an SQLite file; return its id."""
    body = {"name": file, "type": "sqlite", "settings": {"file": file}}
    response = await person.api.post("/api/v1/datasources", json=body)
    assert response.status_code == 201, response.text
    source_id: str = response.json()["dataSourceId"]
    return source_id


async def use_template(person: UserClient, template: str, references: Mapping[str, str] | None = None) -> str:
    """Make a workflow out of a template, which must be fit to be activated; returns its id."""
    body = {"templateId": template, "references": references or {}}
    response = await person.api.post("/api/v1/workflows/from-template", json=body)
    assert response.status_code == 201, response.text
    workflow_id: str = response.json()["workflowId"]
    found = (await person.api.post(f"/api/v1/workflows/{workflow_id}/validate")).json()
    assert (found["valid"], found["warnings"]) == (True, []), found
    return workflow_id


async def start_run(person: UserClient, workflow_id: str, inputs: Mapping[str, Any]) -> str:
    response = await person.api.post(
        f"/api/v1/workflows/{workflow_id}/execute", json={"triggerInputs": dict(inputs)}
    )
    assert response.status_code == 201, response.text
    execution_id: str = response.json()["executionId"]
    return execution_id


async def wait_for_outputs(person: UserClient, execution_id: str) -> dict[str, Any]:
    """Wait for a run to complete; returns its outputs by node."""
    path = f"/api/v1/executions/{execution_id}/progress?wait=20"
    while (progress := (await person.api.get(path)).json())["status"] in {"pending", "running", "waiting"}:
        pass  # a busy machine takes longer
    assert progress["status"] == "completed", (
        await person.api.get(f"/api/v1/executions/{execution_id}")
    ).text
    found: dict[str, Any] = progress["outputs"]
    return found


async def run_to_outputs(person: UserClient, workflow_id: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return await wait_for_outputs(person, await start_run(person, workflow_id, inputs))


async def test_all_users_find_shipped_templates_and_cannot_change_them(people: OrganizationUsers) -> None:
    for person in (people.owner, people.stranger):
        listed = (await person.api.get("/api/v1/workflows/templates")).json()
        assert [one["id"] for one in listed["templates"]] == [*SHIPPED]
        assert listed["count"] == len(SHIPPED)
        assert all(one["nodes"] and one["description"] for one in listed["templates"])
    for template in SHIPPED:
        assert_refused(
            await people.admin.api.put(f"/api/v1/workflows/{template}", json={"name": "Mine"}),
            404,
            "not-found",
        )


async def test_they_stand_behind_the_templates_of_the_organisation_page_by_page(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.admin.create(name="Ours")
    await people.admin.api.post(f"/api/v1/workflows/{workflow_id}/save-as-template")
    names: list[str] = []
    for offset in range(0, 10, 2):
        page = (await people.owner.api.get(f"/api/v1/workflows/templates?limit=2&offset={offset}")).json()
        assert page["count"] == len(SHIPPED) + 1
        names += [one["name"] for one in page["templates"]]
    assert (len(names), names[0], len(set(names))) == (len(SHIPPED) + 1, "Ours", len(names))


async def test_the_penguin_report_brings_its_measurements(person: UserClient) -> None:
    workflow_id = await use_template(person, "wf_tmpl_penguin-report")
    workflow = await person.workflow(workflow_id)
    file = json.loads((DATA / "penguins.json").read_text())
    parts = ("id", "nodeId", "label", "config")
    given = [{name: node.get(name, {}) for name in parts} for node in file["nodes"]]
    assert [{name: node[name] for name in parts} for node in workflow["nodes"]] == given
    inputs = workflow["config"]["exampleInput"]
    assert inputs["csv"] == (DATA / "penguins.csv").read_text()
    report = (await run_to_outputs(person, workflow_id, inputs))["report"]["text"]
    assert report.splitlines()[-1] == "342 weighed, 2 not"


async def test_shipped_templates_share_one_sample_database_of_the_caller(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    async def list_sources(person: UserClient, template: str) -> set[str]:
        body = {"templateId": f"wf_tmpl_{template}"}
        response = await person.api.post("/api/v1/workflows/from-template", json=body)
        assert response.status_code == 201, response.text
        nodes = (await person.workflow(response.json()["workflowId"]))["nodes"]
        return set(re.findall(r'"dataSource": "(\w+)"', json.dumps(nodes)))

    async with asyncio.TaskGroup() as group:
        names = ["daily-etl", "research-agent", *["webhook-to-database"] * 5]
        uses = [group.create_task(list_sources(people.owner, name)) for name in names]
    (source,) = (await people.owner.api.get("/api/v1/datasources")).json()["dataSources"]
    assert {id_ for use in uses for id_ in use.result()} == {source["id"]}
    assert (source["name"], source["type"], source["isPublic"]) == ("Sample database", "sqlite", False)
    assert source["id"] not in await list_sources(people.admin, "daily-etl")
    assert not await list_sources(people.owner, "mail-triage")
    organization = await harness.organization()
    person = await harness.person(organization, scopes=[KeyScope.WORKFLOWS_READ, KeyScope.WORKFLOWS_WRITE])
    assert not await list_sources(person, "daily-etl")


async def test_references_of_a_template_may_be_filled_in_later(people: OrganizationUsers) -> None:
    body = {"templateId": "wf_tmpl_daily-etl", "name": "Later", "references": {"source": None}}
    response = await people.owner.api.post("/api/v1/workflows/from-template", json=body)
    workflow = await people.owner.workflow(response.json()["workflowId"])
    assert workflow["name"] == "Later"
    extract = next(node for node in workflow["nodes"] if node["id"] == "extract")
    assert "dataSource" not in extract["config"]
    unknown = {"templateId": "wf_tmpl_daily-etl", "references": {"nothing": "ds_1"}}
    assert_refused(
        await people.owner.api.post("/api/v1/workflows/from-template", json=unknown), 422, "validation-failed"
    )


async def test_the_daily_etl_writes_the_revenue_of_each_country_and_year(
    harness: GatewayHarness, person: UserClient
) -> None:
    shutil.copy(DATA / "invoices.db", organization_folder(harness, person) / "invoices.db")
    workflow_id = await use_template(
        person, SHIPPED[3], {"source": await create_sqlite_source(person, "invoices.db")}
    )
    await run_to_outputs(person, workflow_id, {})
    revenue: dict[tuple[str, str], float] = defaultdict(float)
    connection = sqlite3.connect(DATA / "invoices.db")
    for country, date, total in connection.execute(
        "SELECT billing_country, invoice_date, total FROM invoice"
    ):
        revenue[date[:4], country] += total
    connection.close()
    with (organization_folder(harness, person) / "objects" / "reports" / "revenue.csv").open(
        newline=""
    ) as file:
        rows = list(csv.DictReader(file))
    assert {(row["year"], row["country"]): float(row["revenue"]) for row in rows} == {
        place: round(total, 2) for place, total in revenue.items()
    }
    assert rows == sorted(rows, key=lambda row: (row["year"], -float(row["revenue"]), row["country"]))


async def test_the_csv_report_counts_and_weighs_the_penguins_of_each_island(person: UserClient) -> None:
    text = (DATA / "penguins.csv").read_text()
    found = (await run_to_outputs(person, await use_template(person, SHIPPED[2]), {"csv": text}))["report"]
    grams: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in csv.DictReader(text.splitlines()):
        if row["body_mass_g"] != "NA":
            grams[row["species"], row["island"]].append(int(row["body_mass_g"]))
    assert [(one["species"], one["island"], one["penguins"]) for one in found["groups"]] == [
        (*place, len(weights)) for place, weights in sorted(grams.items())
    ]
    for one in found["groups"]:
        weights = grams[one["species"], one["island"]]
        assert abs(one["grams"] - sum(weights) / len(weights)) <= 0.5
    assert found["summary"] == "5 groups of 342 penguins that were weighed"


async def test_a_webhook_stores_an_order_once_however_often_it_is_delivered(
    harness: GatewayHarness, person: UserClient
) -> None:
    workflow_id = await use_template(
        person, SHIPPED[7], {"target": await create_sqlite_source(person, "orders.db")}
    )
    orders = json.loads((DATA / "orders.json").read_text())
    written = (await run_to_outputs(person, workflow_id, {"orders": orders}))["store"]["written"]
    again = (await run_to_outputs(person, workflow_id, {"orders": orders[:1]}))["store"]["written"]
    alone = (await run_to_outputs(person, workflow_id, {**orders[0], "id": "ord_2000"}))["store"]["written"]
    assert (written, again, alone) == (3, 0, 1)
    connection = sqlite3.connect(organization_folder(harness, person) / "orders.db")
    stored = connection.execute("SELECT id, customer, total FROM orders ORDER BY id").fetchall()
    connection.close()
    assert stored == [
        ("ord_1001", "Ada Lovelace", 249.5),
        ("ord_1002", "Grace Hopper", 18.0),
        ("ord_1003", "Edsger Dijkstra", 77.25),
        ("ord_2000", "Ada Lovelace", 249.5),
    ]


async def test_a_polled_feed_reports_new_and_revised_items(person: UserClient) -> None:
    feed = json.loads((DATA / "earthquakes.json").read_text())
    features = feed["features"]
    feed["features"] = features[:20]

    async def answer(_request: web.Request) -> web.Response:
        return web.json_response(feed)

    app = web.Application()
    app.router.add_get("/feed", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        workflow_id = await use_template(
            person, SHIPPED[0], {"memory": await create_sqlite_source(person, "quakes.db")}
        )
        inputs = {"url": f"http://127.0.0.1:{port}/feed"}
        first = await run_to_outputs(person, workflow_id, inputs)
        nothing = await run_to_outputs(person, workflow_id, inputs)
        feed["features"] = features
        features[0]["properties"]["mag"] = 9.1
        changed = await run_to_outputs(person, workflow_id, inputs)
    finally:
        await runner.cleanup()
    assert first["news"]["text"] == "20 new and 0 revised earthquakes"
    assert "news" not in nothing
    assert nothing["compare"]["counts"]["unchanged"] == 20
    assert changed["news"]["text"] == f"{len(features) - 20} new and 1 revised earthquakes"


@pytest.mark.parametrize("choice", ["approve", "reject"])
async def test_a_price_is_written_when_somebody_has_approved_it(
    harness: GatewayHarness, person: UserClient, choice: str
) -> None:
    workflow_id = await use_template(
        person, SHIPPED[1], {"target": await create_sqlite_source(person, "prices.db")}
    )
    small = {"product": "Pencil", "price": 2, "requestedBy": "Eve"}
    assert (await run_to_outputs(person, workflow_id, small))["write"] == {"written": 1}
    large = {"product": "Piano", "price": 9000, "requestedBy": "Eve"}
    execution_id = await start_run(person, workflow_id, large)
    asked = await wait_for_input(person, execution_id)
    assert asked["title"] == "Change the price of Piano to 9000?"
    response = await person.api.post(
        f"/api/v1/executions/{execution_id}/input", json={"nodeId": asked["nodeId"], "choice": choice}
    )
    assert response.status_code == 200, response.text
    found = await wait_for_outputs(person, execution_id)
    assert ("write" in found, "refused" in found) == (choice == "approve", choice == "reject")
    connection = sqlite3.connect(organization_folder(harness, person) / "prices.db")
    stored = dict(connection.execute("SELECT product, approved_by FROM price"))
    connection.close()
    assert stored == {"Pencil": None} | ({"Piano": person.user.id} if choice == "approve" else {})


@pytest.mark.parametrize(
    ("subject", "text", "choice"),
    [
        ("Where is my order?", "It was to arrive on Friday.", "send"),
        ("A refund", "The invoice is wrong.", "discard"),
        ("Our newsletter", "Buy more!", ""),
    ],
)
async def test_a_mail_is_sorted_and_answered_when_somebody_has_approved_the_draft(
    person: UserClient, subject: str, text: str, choice: str
) -> None:
    mail = {"from": "ada@mail.example", "to": "help@example.org", "subject": subject, "body_text": text}
    async with smtp_server.serve_smtp(tls="none") as server:
        settings = {"host": "127.0.0.1", "port": server.port, "tls": "none"}
        source = {"name": f"Mail {subject}", "type": "smtp", "settings": settings}
        mails = (await person.api.post("/api/v1/datasources", json=source)).json()["dataSourceId"]
        workflow_id = await use_template(person, SHIPPED[4], {"mail": mails})
        execution_id = await start_run(person, workflow_id, mail)
        if choice:
            asked = await wait_for_input(person, execution_id)
            assert text in asked["description"], "the model `echo` repeats the mail"
            answer = {"nodeId": asked["nodeId"], "choice": choice}
            response = await person.api.post(f"/api/v1/executions/{execution_id}/input", json=answer)
            assert response.status_code == 200, response.text
        found = await wait_for_outputs(person, execution_id)
    assert [sent.recipients for sent in server.received] == (
        [["ada@mail.example"]] if choice == "send" else []
    )
    assert ("ignored" in found, "discarded" in found) == (not choice, choice == "discard")


async def test_the_research_agent_reads_a_table_and_a_page(
    harness: GatewayHarness, person: UserClient
) -> None:
    shutil.copy(DATA / "invoices.db", organization_folder(harness, person) / "research.db")
    source_id = await create_sqlite_source(person, "research.db")
    async with serve_models() as served:
        workflow_id = await use_template(person, SHIPPED[6], {"source": source_id})
        workflow = await person.workflow(workflow_id)
        (page,) = [node for node in workflow["nodes"] if node["id"] == "page"]
        target = {
            "type": "http-request",
            "config": {"url": f"{served.url}/facts?city={{{{ args.country }}}}"},
        }
        config = {"config": {**page["config"], "target": {"node": target}}}
        answer = await person.api.put(f"/api/v1/workflows/{workflow_id}/nodes/page", json=config)
        assert answer.status_code == 200, answer.text
        question = {"question": "What did we earn in Germany?"}
        found = (await run_to_outputs(person, workflow_id, question))["research"]
    assert [(step["name"], step["status"]) for step in found["steps"]] == [
        *[("echo", "completed"), ("query_revenue", "completed")],
        *[("echo", "completed"), ("read_page", "completed"), ("echo", "completed")],
    ]
    table, page_text = [one["content"] for one in found["messages"] if one["role"] == "tool"]
    rows = json.loads(table)["rows"]
    connection = sqlite3.connect(DATA / "invoices.db")
    (count,) = connection.execute("SELECT count(*) FROM invoice WHERE billing_country = 'Germany'").fetchone()
    connection.close()
    assert (sum(row["invoices"] for row in rows), len(rows)) == (count, len({row["year"] for row in rows}))
    assert json.loads(page_text)["body"] == {"city": "Germany", "degrees": -3}
    assert (found["response"], found["stopReason"], found["cost"]) == (page_text, "finished", "0")


async def test_a_template_with_models_takes_one_by_its_reference(people: OrganizationUsers) -> None:
    provider = {
        "name": "Models",
        "type": "ai-provider",
        "settings": {"baseUrl": "http://127.0.0.1:9/v1"},
    }
    made = await people.owner.api.post("/api/v1/datasources", json=provider)
    model = {"name": "Small", "vendorModelId": "small", "dataSourceId": made.json()["dataSourceId"]}
    model_id = (await people.owner.api.post("/api/v1/ai/models", json=model)).json()["modelId"]
    for template in ("wf_tmpl_mail-triage", "wf_tmpl_research-agent"):
        named: dict[str, set[str]] = {}
        for references in ({}, {"echo": model_id}):
            body = {"templateId": template, "references": references}
            response = await people.owner.api.post("/api/v1/workflows/from-template", json=body)
            workflow = await people.owner.workflow(response.json()["workflowId"])
            models = {node["config"]["model"] for node in workflow["nodes"] if "model" in node["config"]}
            named["own" if references else "built-in"] = models
        assert named == {"built-in": {"echo"}, "own": {model_id}}


async def wait_for_input(person: UserClient, execution_id: str) -> dict[str, Any]:
    """Wait until a run requests human input, and return the request."""
    for _ in range(2_000):
        body = (await person.api.get(f"/api/v1/executions/{execution_id}/pending-inputs")).json()
        if body["inputs"]:
            asked: dict[str, Any] = body["inputs"][0]
            return asked
        await person.api.get(f"/api/v1/executions/{execution_id}/progress?wait=0.1")
    raise AssertionError(body)
