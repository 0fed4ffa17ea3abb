"""Screenshots of every page of the dashboard, for the documentation: `make screenshots`.

A gateway with a worker gets sample data of an invented company, and Chromium takes a picture of each page as WebP.
"""

from __future__ import annotations

import asyncio
import base64
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import insert, select, update
from sqlmodel import col

from models import ids
from models.access import ApiKey, Organization, User
from models.data_source import DataSource
from models.deployment import Deployment, LifecycleDecision
from models.execution import Leadership
from models.run_hour import RunHour
from models.tool_server import ListedTools, to_stored
from nodes.mcp.tool_definitions import ToolDefinition
from scheduler.run_hours import RunHourCounter
from tests import databases
from tests.integration.browser import BrowserPage, open_page, serve_gateway
from tests.integration.deployed_workflows import mark_running
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient, run_gateway
from tests.integration.test_waiting_runs import (
    execute_workflow,
    serve_worker,
    wait_for_question,
    wait_until_ended,
)

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = ROOT / "docs" / "images"
QUALITY: Final = 62
WIDTH: Final = 1_280
LINES: Final = [{"sku": f"sku-{number}"} for number in range(12)]
ORDER: Final = {"total": 6_240.5, "currency": "EUR", "lines": LINES}
NODES: Final[list[dict[str, Any]]] = [
    {"id": "start", "nodeId": "queue-trigger", "label": "Order message"},
    {
        "id": "lines",
        "nodeId": "loop",
        "label": "For each line",
        "config": {"items": "{{ data.message.lines }}"},
    },
    {
        "id": "reserve",
        "nodeId": "set",
        "label": "Reserve stock",
        "config": {"values": {"sku": "{{ item.sku }}"}},
    },
    {
        "id": "total",
        "nodeId": "set",
        "label": "Tax and total",
        "config": {"mode": "replace", "values": {"total": "{{ trigger.message.total }}"}},
    },
    {
        "id": "large",
        "nodeId": "conditional",
        "label": "Above 5,000 €?",
        "config": {"condition": {"left": "{{ data.total }}", "operator": "greater-than", "right": 5_000}},
    },
    {"id": "bank", "nodeId": "wait", "label": "Wait for the bank", "config": {"seconds": 3}},
    {"id": "small", "nodeId": "set", "label": "Mark as small", "config": {"values": {"small": True}}},
    {
        "id": "write",
        "nodeId": "template",
        "label": "Write the order",
        "config": {"text": "{{ trigger.message.currency }}"},
    },
    {"id": "mail", "nodeId": "log", "label": "Confirm by mail", "config": {"message": "{{ data.text }}"}},
]
EDGES: Final = [
    {"source": "start", "target": "lines"},
    {"source": "lines", "sourcePort": "continue", "target": "reserve"},
    {"source": "lines", "sourcePort": "done", "target": "total"},
    {"source": "total", "target": "large"},
    {"source": "large", "sourcePort": "true", "target": "bank"},
    {"source": "large", "sourcePort": "false", "target": "small"},
    {"source": "bank", "target": "write"},
    {"source": "small", "target": "write"},
    {"source": "write", "target": "mail"},
]
QUESTION: Final = {
    "title": "Set 12 prices above 100 €?",
    "description": "The competitor has raised its prices.",
    "choices": [{"port": "yes", "label": "Set the prices"}, {"port": "no", "label": "Leave them"}],
    "schema": {"type": "object", "properties": {"reason": {"type": "string", "title": "Reason"}}},
}


@dataclass(frozen=True)
class Picture:
    """Picture of a page: `height` is that of the window in pixels."""

    name: str
    path: str
    height: int = 800
    scheme: str = "light"


PICTURES: Final = (
    Picture("overview", "/dashboard/overview"),
    Picture("workflows", "/dashboard/workflows", 420),
    Picture("workflow", "/dashboard/workflows/{orders}", 760),
    Picture("workflow-node", "/dashboard/workflows/{orders}?node=write", 800, "dark"),
    Picture("versions", "/dashboard/workflows/{orders}/versions", 760),
    Picture("lifecycle", "/dashboard/workflows/{stock}/lifecycle", 750),
    Picture("trigger", "/dashboard/workflows/{orders}/trigger"),
    Picture("runs", "/dashboard/runs", 520),
    Picture("run", "/dashboard/runs/{failed}", 900),
    Picture("run-waiting", "/dashboard/runs/{asking}", 760, "dark"),
    Picture("run-map", "/dashboard/runs/{failed}?view=map", 620),
    Picture("replay", "/dashboard/runs/{failed}/replay?definition=original", 760),
    Picture("approvals", "/dashboard/approvals", 420),
    Picture("deliveries", "/dashboard/deliveries", 420),
    Picture("dead-letters", "/dashboard/dead-letters?plan=1", 880),
    Picture("schedule", "/dashboard/schedule", 360),
    Picture("sources", "/dashboard/sources", 360),
    Picture("models", "/dashboard/models", 420),
    Picture("keys", "/dashboard/keys", 620),
    Picture("audit", "/dashboard/audit?objectId={stock}", 620),
    Picture("health", "/dashboard/health", 860),
)


async def main() -> None:
    """Take the screenshots of all pages, and write them to `docs/images`."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        url = await databases.create_sqlite_database(folder / "pilotflame.db")
        async with (
            run_gateway(url, folder) as harness,
            serve_gateway(harness) as address,
            open_page(folder / "profile") as page,
        ):
            people = await harness.people()
            user = people.admin
            await _name_people(harness, people)
            async with serve_worker(harness):
                names = await _create_samples(harness, user)
                await _fill_day(harness)
                await _sign_in(page, address, user.key)
                for picture in PICTURES:
                    await _take(page, address, picture, names)


async def _name_people(harness: GatewayHarness, people: OrganizationUsers) -> None:
    """Give the organization, its users and keys the names that the screenshots show."""
    persons = (
        (people.admin, "Mira Lang", "laptop"),
        (people.owner, "Jonas Weber", "nightly orders"),
        (people.colleague, "Ada Berg", "shop"),
    )

    async def name(connection: AsyncConnection) -> None:
        organization = col(Organization.id) == people.admin.user.organization_id
        await connection.execute(update(Organization).where(organization).values(name="Nordwind"))
        for person, full_name, key in persons:
            values = {"name": full_name, "email": f"{full_name.split()[0].lower()}@nordwind.example"}
            await connection.execute(update(User).where(col(User.id) == person.user.id).values(values))
            await connection.execute(
                update(ApiKey).where(col(ApiKey.user_id) == person.user.id).values(name=key)
            )

    await harness.gateway.database.transaction(name)


async def _create_samples(harness: GatewayHarness, user: UserClient) -> Mapping[str, str]:
    """Create workflows, runs in several states and a deployment; return their ids by the names that addresses use."""
    orders = await user.create(
        name="Order intake", status="active", nodes=NODES, connections=EDGES, tags=["shop"]
    )
    good = await _enqueue(user, orders, ORDER)
    await wait_until_ended(user, good)
    await _post(
        user, f"workflows/{orders}/versions", {"versionTag": "v2", "description": "Currency of the order"}
    )
    broken = [
        one if one["id"] != "write" else {**one, "config": {"text": "{{ nodes.total.currency }}"}}
        for one in NODES
    ]
    edited = await user.api.put(f"/api/v1/workflows/{orders}", json={"nodes": broken})
    assert edited.status_code == 200, edited.text
    failed = await _enqueue(user, orders, ORDER)
    await wait_until_ended(user, failed)
    small = await _enqueue(user, orders, {**ORDER, "total": 80})
    await wait_until_ended(user, small)
    ask = [
        {"id": "start", "nodeId": "manual", "label": "New prices"},
        {"id": "ask", "nodeId": "human-input", "label": "Set 12 prices?", "config": QUESTION},
        {"id": "set", "nodeId": "log", "label": "Write the prices", "config": {"message": "set"}},
    ]
    edges = [{"source": "start", "target": "ask"}, {"source": "ask", "sourcePort": "yes", "target": "set"}]
    prices = await user.create(name="Price change", status="active", nodes=ask, connections=edges)
    asking = await execute_workflow(user, prices)
    await wait_for_question(user, asking)
    example = json.loads((ROOT / "docs" / "examples" / "penguins.json").read_text())
    await user.create(**example, status="active")
    clock = [{"id": "clock", "nodeId": "schedule-trigger", "config": {"cron": "30 7 * * mon-fri"}}, NODES[-1]]
    await user.create(
        name="Every morning",
        status="active",
        nodes=clock,
        connections=[{"source": "clock", "target": "mail"}],
    )
    source = {
        "name": "shop",
        "type": "http-basic",
        "settings": {"username": "orders"},
        "secrets": {"password": "p"},
    }
    await _post(user, "datasources", source)
    return {
        "orders": orders,
        "failed": failed,
        "asking": asking,
        "stock": await _deploy_sample(harness, user),
        "tools": await _create_models(harness, user),
    }


async def _create_models(harness: GatewayHarness, user: UserClient) -> str:
    """Create a provider with two language models, and a tool server with listed tools; return the id of the server."""
    provider = {
        "name": "Our models",
        "type": "ai-provider",
        "settings": {"baseUrl": "https://models.nordwind.example/v1"},
    }
    source_id = await _create(user, "datasources", provider)
    for name, vendor_id, price in (
        ("Small", "gpt-5-mini", {"input": "0.25", "output": "2"}),
        ("Large", "gpt-5", {"input": "1.25", "output": "10"}),
    ):
        model = {"name": name, "vendorModelId": vendor_id, "dataSourceId": source_id, "price": price}
        created = await user.api.post("/api/v1/ai/models", json={**model, "isShared": True})
        assert created.status_code == 201, created.text
    server = {"name": "Warehouse", "url": "https://tools.nordwind.example/mcp"}
    server_id = await _create(user, "ai/tool-servers", server)
    schema = {"type": "object", "properties": {"sku": {"type": "string"}}, "required": ["sku"]}
    offered = [
        ToolDefinition(name, sha256(name.encode()).hexdigest(), description=description, input_schema=schema)
        for name, description in (
            ("find_stock", "Returns the stock of an article by its number."),
            ("order_stock", "Orders an article from its supplier."),
        )
    ]
    now = harness.gateway.clock()
    tools = to_stored(ListedTools(listed_at=now, offered=[msgspec.to_builtins(one) for one in offered]))

    async def store(connection: AsyncConnection) -> None:
        await connection.execute(
            update(DataSource).where(col(DataSource.id) == server_id).values(tools=tools)
        )

    await harness.gateway.database.transaction(store)
    find = {"name": "find_stock", "hash": offered[0].hash, "effect": "read"}
    await _post(user, f"ai/tool-servers/{server_id}/accept", {"tools": [find]})
    return server_id


async def _fill_day(harness: GatewayHarness) -> None:
    """Count the runs of this hour as the scheduler does, and repeat the counts for the 23 hours before."""
    database = harness.gateway.database
    await RunHourCounter(database).count_runs()

    async def fill(connection: AsyncConnection) -> None:
        counted = [dict(row) for row in (await connection.execute(select(RunHour))).mappings()]
        earlier = [
            {
                **row,
                "starts_at": row["starts_at"] - timedelta(hours=back),
                "accepted": row["accepted"] * share,
                "completed": (row["accepted"] - row["failed"]) * share + (share % 3) * row["failed"],
                "failed": 0 if share % 3 else row["failed"],
                "run_times": {bucket: number * share for bucket, number in row["run_times"].items()},
            }
            for row in counted
            for back in range(1, 24)
            for share in (3 + 5 * back % 7 + 4 * (back % 24 in range(9, 19)),)
        ]
        await connection.execute(insert(RunHour).values(earlier))
        until = harness.gateway.clock() + timedelta(hours=1)
        lead = {"name": "scheduler", "owner": ids.new_id("scheduler"), "epoch": 1, "lease_until": until}
        await connection.execute(insert(Leadership).values(lead))

    await database.transaction(fill)


async def _deploy_sample(harness: GatewayHarness, user: UserClient) -> str:
    """Deploy a workflow with decisions to start and stop it in its window on each of six days; return its id."""
    nodes = [{"id": "start", "nodeId": "manual", "label": "Shelf"}, {**NODES[-1], "label": "Count"}]
    edges = [{"source": "start", "target": "mail"}]
    workflow_id = await user.create(name="Stock check", status="active", nodes=nodes, connections=edges)
    await _post(user, f"workflows/{workflow_id}/deploy", None)
    await mark_running(harness, workflow_id)
    windows = [{"days": [0, 1, 2, 3, 4, 5, 6], "startTime": "08:00", "endTime": "20:00"}]
    policy = {"type": "scheduled-window", "schedule": {"timezone": "Europe/Berlin", "windows": windows}}
    changed = await user.api.put(f"/api/v1/workflows/{workflow_id}/lifecycle", json=policy)
    assert changed.status_code == 200, changed.text
    now = harness.gateway.clock()
    days = [now - timedelta(days=number) for number in range(6, 0, -1)]
    rows = [
        {
            "id": ids.new_id("dec"),
            "organization_id": user.user.organization_id,
            "shard": user.user.shard,
            "workflow_id": workflow_id,
            "at": day.replace(hour=hour, minute=0, second=number),
            "action": action,
            "reason": reason,
            "replicas": int(action == "start"),
            "inputs": {},
        }
        for number, day in enumerate(days)
        for hour, action, reason in ((7, "start", "window-open"), (19, "stop", "window-closed"))
    ]
    first = update(Deployment).where(col(Deployment.workflow_id) == workflow_id)

    async def record(connection: AsyncConnection) -> None:
        await connection.execute(insert(LifecycleDecision).values(rows))
        await connection.execute(first.values(created_at=rows[0]["at"]))

    await harness.gateway.database.transaction(record)
    return workflow_id


async def _enqueue(user: UserClient, workflow_id: str, message: Mapping[str, Any]) -> str:
    answer = await user.api.post(f"/api/v1/workflows/{workflow_id}/enqueue", json=message)
    assert answer.status_code in {200, 201, 202}, answer.text
    run_id: str = answer.json()["executionId"]
    return run_id


async def _create(user: UserClient, path: str, body: object) -> str:
    """Create a data source or tool server, and return its id."""
    answer = await user.api.post(f"/api/v1/{path}", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["dataSourceId"])


async def _post(user: UserClient, path: str, body: object) -> None:
    answer = await user.api.post(f"/api/v1/{path}", json=body)
    assert answer.status_code in {200, 201, 202}, answer.text


async def _sign_in(page: BrowserPage, address: str, key: str) -> None:
    await page.open(f"{address}/sign-in?next=%2Fdashboard%2Fruns", "document.querySelector('#key') !== null")
    await page.fill("#key", key)
    await page.click("button[type=submit]")
    await page.wait_for("location.pathname === '/dashboard/runs' && document.querySelector('h1') !== null")


async def _take(page: BrowserPage, address: str, picture: Picture, names: Mapping[str, str]) -> None:
    """Open a page in a window of the picture's size, and write the picture to `docs/images`."""
    size = {"width": WIDTH, "height": picture.height, "deviceScaleFactor": 1, "mobile": False}
    await page.call("Emulation.setDeviceMetricsOverride", **size)
    media = [{"name": "prefers-color-scheme", "value": picture.scheme}]
    await page.call("Emulation.setEmulatedMedia", features=media)
    await page.open(address + picture.path.format(**names), "document.querySelector('h1') !== null")
    taken = await page.call("Page.captureScreenshot", format="webp", quality=QUALITY)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"dashboard-{picture.name}.webp").write_bytes(base64.b64decode(taken["data"]))


if __name__ == "__main__":
    asyncio.run(main())
