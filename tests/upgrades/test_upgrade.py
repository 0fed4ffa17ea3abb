"""Databases of earlier releases, upgraded and run on, with all their unfinished work."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import select
from sqlmodel import col

from models import schema_migration
from models.access import ALL_KEY_SCOPES, ApiKey
from models.database import Database, parse_url
from tests import command_runs, databases, http_receiver, services, signed_requests
from tests.http_receiver import HttpReceiver
from tests.system import ledger as ledgers
from tests.system.ledger import EffectLedger
from tests.system.wait_conditions import wait_until
from tests.upgrades import fixture as fixtures
from tests.upgrades import schemas
from tests.upgrades.api import Api
from tests.upgrades.fixture import CALLBACKS, FOLDER, KINDS, LEDGER, SECRET_KEY, Fixture, Manifest

pytestmark = pytest.mark.every_database

FIXTURES = [Fixture(path.parent.name, path.name) for path in sorted(FOLDER.glob("*/*/"))]
NEW_SECRET_KEY = "another secret, by which everything is encrypted anew"
UNDO_ADDITIONS = (FOLDER / "0001/undo_additions.sql").read_text().split(";\n")[:-1]
"""Statements that turn a database of the latest revision 0001 into one of release 0.1.0."""
LEASE_SECONDS = 120.0
"""Longer than any pause of a busy machine: a repeated node would be a fault."""
SECRETS = 5
"""Those of three data sources, a signing secret and an event token."""


@dataclass(frozen=True)
class Upgraded:
    """Server on an upgraded database, with the facts about its origin."""

    manifest: Manifest
    api: Api
    ledger: EffectLedger
    callbacks: HttpReceiver

    def run(self, name: str) -> str:
        return self.manifest.runs[name]

    def path(self, workflow: str, rest: str = "") -> str:
        return f"/workflows/{self.manifest.workflows[workflow]}{rest}"

    async def complete(self, execution_id: str, node_id: str) -> None:
        """Check that a run completes after exactly one call of the ledger by its node."""
        await self.api.become(execution_id, "completed")
        calls = self.ledger.effects()[execution_id, node_id]
        assert [call.key for call in calls] == [f"{execution_id}:{node_id}:0"]


@pytest.fixture(params=KINDS)
def first_fixture(request: pytest.FixtureRequest) -> Fixture:
    return Fixture("0001", request.param)


@pytest.fixture(params=FIXTURES, ids=lambda one: f"{one.revision}-{one.kind}")
def fixture(request: pytest.FixtureRequest) -> Fixture:
    found: Fixture = request.param
    return found


async def test_a_database_of_an_earlier_release_is_upgraded_and_everything_in_it_goes_on(
    fixture: Fixture, tmp_path: Path, postgres: services.PostgresServer
) -> None:
    async with ledgers.run_ledger() as ledger, http_receiver.run_receiver() as callbacks:
        addresses = {LEDGER: ledger.url, CALLBACKS: callbacks.url("")}
        url = await fixtures.restore(fixture, postgres, tmp_path, addresses)
        port = services.reserve_port()
        server_url = url if fixture.kind == "postgresql" else None
        given = fixtures.environment(tmp_path, port, server_url, lease_seconds=LEASE_SECONDS)
        command_runs.run_output("migrate", given=given)
        assert await revision(url) == schema_migration.HEAD_REVISION
        with command_runs.run_command("dev", given=given, log=tmp_path / "log") as server:
            async with httpx2.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120
            ) as http:
                manifest = fixture.manifest
                api = Api(http, manifest.keys)
                await api.wait_until_ready()
                upgraded = Upgraded(manifest, api, ledger, callbacks)
                await asyncio.gather(
                    runs_go_on(upgraded),
                    waiting_runs_are_answered(upgraded),
                    failed_runs_are_redriven(upgraded),
                    senders_are_known(upgraded),
                    deployments_serve(upgraded),
                    results_are_shown(upgraded),
                )
                assert await unfinished(api) == []
                assert all(len(calls) == 1 for calls in ledger.effects().values())
            assert server.stop() == 0
            assert '"level":"error"' not in server.log()
        rotation = {**given, "PILOTFLAME_SECRET_KEY": NEW_SECRET_KEY}
        rotated = command_runs.run_output(
            "keys",
            "rotate-secret",
            given={**rotation, "PILOTFLAME_PREVIOUS_SECRET_KEYS": f'["{SECRET_KEY}"]'},
        )
        assert rotated.startswith(f"{SECRETS} secrets encrypted anew")
        assert "cannot" not in rotated


async def runs_go_on(upgraded: Upgraded) -> None:
    """Due, queued, orphaned and limited runs end on their own."""
    for name, node_id in (
        ("timer", "ring"),
        ("queued", "pack"),
        ("orphaned", "charge"),
        ("behind", "charge"),
    ):
        await upgraded.complete(upgraded.run(name), node_id)
    (repeated,) = upgraded.ledger.effects()[upgraded.run("orphaned"), "charge"]
    assert repeated.key == upgraded.manifest.others["interrupted_call"]
    progress = await upgraded.api.become(upgraded.run("unparsed"), "completed")
    assert progress["outputs"]["start"]["subject"] == "Number 12"
    (call,) = await wait_until(lambda: list(upgraded.callbacks.received), what="the callback arrives")
    assert call.is_signed_by(upgraded.manifest.others["signing_secret"])
    assert call.message["data"]["executionId"] == upgraded.run("orphaned")


async def waiting_runs_are_answered(upgraded: Upgraded) -> None:
    """A person answers a sub-workflow, and an event arrives."""
    pending = await upgraded.api.get(f"/executions/{upgraded.run('asked')}/pending-inputs")
    assert [one["title"] for one in pending["inputs"]] == ["Refund?"]
    await upgraded.api.post(
        f"/executions/{upgraded.run('asked')}/input", {"nodeId": "approval", "choice": "yes"}
    )
    await upgraded.complete(upgraded.run("asked"), "refund")
    await upgraded.complete(upgraded.run("parent"), "report")
    for order in (10, 11):
        await upgraded.api.post(
            "/workflows/events", {"event_type": "order.paid", "event_data": {"order": order}}
        )
    await upgraded.complete(upgraded.run("event"), "thank")


async def failed_runs_are_redriven(upgraded: Upgraded) -> None:
    """A dead letter and a rejected delivery run with their original content."""
    api = upgraded.api
    (letter,) = (await api.get(upgraded.path("orders", "/dead-letters")))["deadLetters"]
    assert letter["executionId"] == upgraded.run("failed")
    redriven = await api.post(upgraded.path("orders", "/dead-letters/redrive"), {})
    await upgraded.complete(redriven["executionIds"][0], "ship")

    await api.send("PUT", upgraded.path("early", "/status"), {"status": "active"})
    (delivery,) = (await api.get(upgraded.path("early", "/deliveries")))["deliveries"]
    again = await api.post(f"/deliveries/{delivery['id']}/redrive")
    await upgraded.complete(again["executionId"], "early")
    url = f"/hooks/{upgraded.manifest.tokens['early']}"
    repeated = await api.deliver(url, signed_requests.sign_github(3))
    assert repeated["executionId"] == again["executionId"]


async def senders_are_known(upgraded: Upgraded) -> None:
    """Tokens and signing secrets are valid, and a repeated delivery starts no run."""
    url = f"/hooks/{upgraded.manifest.tokens['hook']}"
    push = signed_requests.sign_github(1, {"text": "0123456789" * 30_000})
    assert (await upgraded.api.deliver(url, push))["executionId"] == upgraded.run("hook")
    fresh = await upgraded.api.deliver(url, signed_requests.sign_github(2))
    await upgraded.api.become(fresh["executionId"], "completed")
    events = f"/api/v1/workflows/events?key={upgraded.manifest.tokens['github']}"
    assert (await upgraded.api.deliver(events, push))["event_type"] == "github.push"


async def deployments_serve(upgraded: Upgraded) -> None:
    """A deployed workflow runs in its pods, whether they were up or stopped."""
    for name, status in (("stopped", "stopped"), ("undeployed", "not-deployed")):
        shown = await upgraded.api.get(upgraded.path(name, "/status"))
        assert shown["deploymentStatus"] == status, shown
    for name in ("up", "stopped"):
        ran = await upgraded.api.post(upgraded.path(name, "/trigger"), {"sync": True}, key=name)
        assert ran["output"]["done"]["passed"] == "done"


async def results_are_shown(upgraded: Upgraded) -> None:
    """Earlier results are still readable by permitted users: blobs, attempts, logs, versions, schedules."""
    api = upgraded.api
    large = await api.get(f"/executions/{upgraded.run('large')}?expand=blobs")
    assert large["outputs"]["large"]["text"] == "0123456789" * 40_000
    mail = (await api.get(f"/executions/{upgraded.run('mail')}/progress"))["outputs"]["start"]
    (attachment,) = mail["attachments"]
    shown = await api.http.get(
        f"/api/v1/executions/{upgraded.run('mail')}/blobs/{attachment['sha256']}",
        headers={"X-API-Key": upgraded.manifest.keys["admin"]},
    )
    assert shown.content == b"order 9"
    spans = (await api.get(f"/executions/{upgraded.run('failed')}/spans"))["spans"]
    assert [span["attempt"] for span in spans if span["kind"] == "attempt"] == [1, 2]
    logs = (await api.get(f"/executions/{upgraded.run('completed')}/logs", user="member"))["logs"]
    assert "Order 7" in [line["message"] for line in logs]
    versions = (await api.get(upgraded.path("simple", "/versions")))["versions"]
    assert {one["versionTag"] for one in versions} >= {"first"}
    assert len((await api.get(upgraded.path("hourly", "/schedule")))["nextRuns"]) == 5
    assert await api.get(f"/executions/{upgraded.run('neighbors')}", user="neighbor")
    answer = await api.http.get(
        f"/api/v1/executions/{upgraded.run('neighbors')}",
        headers={"X-API-Key": upgraded.manifest.keys["admin"]},
    )
    assert answer.status_code == httpx2.codes.NOT_FOUND


async def unfinished(api: Api) -> list[str]:
    """Return the ids of runs that have not ended."""
    lists = [await api.get(f"/executions?status={status}") for status in ("pending", "running", "waiting")]
    return [str(run["id"]) for listed in lists for run in listed["executions"]]


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_upgraded_database_has_all_its_rows_and_the_tables_of_a_new_one(
    fixture: Fixture, tmp_path: Path, postgres: services.PostgresServer
) -> None:
    url = await fixtures.restore(fixture, postgres, tmp_path, {})
    before = await schemas.read(url)
    await schema_migration.migrate(parse_url(url))
    after = await schemas.read(url)
    assert after.parts == (await read_new(fixture, tmp_path, postgres)).parts
    assert sorted(filter(None, after.row_counts.values())) == sorted(filter(None, before.row_counts.values()))

    await schemas.downgrade(url, fixture.revision)
    assert await schemas.read(url) == before


async def test_a_database_of_release_0_1_0_gets_later_additions_and_its_keys_get_new_scopes(
    first_fixture: Fixture, tmp_path: Path, postgres: services.PostgresServer
) -> None:
    url = await fixtures.restore(first_fixture, postgres, tmp_path, {})
    limited = "UPDATE api_key SET scopes = '[\"workflows:read\"]' WHERE id = (SELECT max(id) FROM api_key)"
    await schemas.execute(url, [*UNDO_ADDITIONS, limited])
    await schema_migration.migrate(parse_url(url))
    assert (await schemas.read(url)).columns == (await read_new(first_fixture, tmp_path, postgres)).columns

    # Only keys that had all scopes get new ones.
    database = Database(parse_url(url))
    async with database.read() as connection:
        scopes = (await connection.execute(select(col(ApiKey.scopes)).order_by(col(ApiKey.id)))).scalars()
        *others, last = map(set, scopes)
    await database.close()
    assert last == {"workflows:read"}
    assert ALL_KEY_SCOPES in others


async def read_new(fixture: Fixture, folder: Path, postgres: services.PostgresServer) -> schemas.Schema:
    """Return the schema of a new database of a fixture's kind, which has run all migrations without rows."""
    if fixture.kind == "postgresql":
        return await schemas.read(await databases.create_database(postgres, "upgrade_new"))
    return await schemas.read(await databases.create_sqlite_database(folder / "new.db"))


async def revision(url: str) -> str | None:
    database = Database(parse_url(url))
    try:
        async with database.read() as connection:
            return await connection.run_sync(schema_migration.read_revision)
    finally:
        await database.close()
