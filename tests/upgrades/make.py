"""Create the databases of the current revision: `python -m tests.upgrades.make`, before a migration is added.

Their contents come from the server's own API and workers. The server is killed during a run; a gateway
without workers then accepts runs that stay unclaimed.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import httpx2
from sqlalchemy import make_url

from models.schema_migration import HEAD_REVISION
from tests import command_runs, http_receiver, services, signed_requests
from tests.system import ledger as ledgers
from tests.system import workflow_shapes
from tests.system.wait_conditions import wait_until
from tests.upgrades.api import ADMIN, Api
from tests.upgrades.fixture import API_KEY, CALLBACKS, FILE, KINDS, LEDGER, Fixture, Manifest, environment

if TYPE_CHECKING:
    from engine.values import Json
    from tests.http_receiver import HttpReceiver
    from tests.system.ledger import EffectLedger

TIMER_SECONDS: Final = 15.0
"""Duration of a run's timer: it expires after the kill, and before the dump."""
LEASE_SECONDS: Final = 5.0
ASKS: Final[dict[str, Json]] = {
    "id": "approval",
    "nodeId": "human-input",
    "config": {"title": "Refund?", "choices": [{"port": "yes"}, {"port": "no"}]},
}


@dataclass
class Maker:
    """Server of which the API fills a database, its clients, and the ids of everything that was created."""

    folder: Path
    environment: Mapping[str, str]
    http: httpx2.AsyncClient
    ledger: EffectLedger
    receiver: HttpReceiver
    keys: dict[str, str] = field(default_factory=lambda: {ADMIN: API_KEY})
    tokens: dict[str, str] = field(default_factory=dict)
    workflows: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    @property
    def api(self) -> Api:
        return Api(self.http, self.keys)

    async def make(self, redis_url: str) -> Manifest:
        """Fill the database step by step, by the server's API, and return the manifest."""
        async with self._serving("dev"):
            await self._make_accounts()
            await self._make_data_sources()
            await self._complete()
            await self._fail()
            await self._receive()
            await self._deploy()
            await self._wait_for_answers()
            await self._start_timer()
            await self._lose_worker()
        async with self._serving("gateway", PILOTFLAME_REDIS_URL=redis_url):
            await self._accept_without_workers()
        await asyncio.sleep(max(TIMER_SECONDS, LEASE_SECONDS))
        made_at = time.time_ns() // 1_000
        return Manifest(made_at, self.keys, self.tokens, self.workflows, self.runs, self.others)

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _make_accounts(self) -> None:
        """Create a second organization and a member, each with a key; the neighbors have a completed run."""
        organization = self._command("orgs", "create", "Neighbors")
        self._command("users", "create", "neighbor@example.com", "--org", organization, "--role", "admin")
        self.keys["neighbor"] = self._command(
            "keys", "create", "--user", "neighbor@example.com", "--org", organization
        )
        member = await self.api.post("/auth/users", {"email": "member@example.com", "name": "Member"})
        key = await self.api.post("/auth/keys", {"name": "member's", "userId": member["id"]})
        self.keys["member"] = key["key"]
        await self.create(
            "neighbors", workflow_shapes.chain_workflow(workflow_shapes.set_node("done")), user="neighbor"
        )
        self.runs["neighbors"] = await self.run("neighbors", user="neighbor")
        await self.becomes("neighbors", "completed", user="neighbor")

    async def _make_data_sources(self) -> None:
        """Create a signing secret, secrets of webhooks, an event token, and a data source of two users."""
        signing = await self.api.post("/auth/signing-secret", {})
        self.others["signing_secret"] = signing["secret"]
        source = await self.api.post(
            "/datasources",
            {"name": "GitHub", "type": "webhook-secret", "secrets": {"secret": signed_requests.SECRET}},
        )
        self.others["webhook_secret"] = source["dataSourceId"]
        token = await self.api.post(
            "/auth/event-tokens", {"name": "GitHub", "secrets": {"github": [signed_requests.SECRET]}}
        )
        self.tokens["github"] = token["token"]
        for user, name in (("neighbor", "Database"), ("member", "Database")):
            settings = {"host": "db.example.com", "database": "shop", "user": "reader"}
            secrets = {"password": f"the password of the {user}"}
            body: dict[str, Any] = {
                "name": name,
                "type": "postgresql",
                "settings": settings,
                "secrets": secrets,
            }
            await self.api.post("/datasources", body, user=user)

    async def _complete(self) -> None:
        """Complete runs with a log, a throttle, a version and a large output."""
        log: dict[str, Json] = {
            "id": "log",
            "nodeId": "log",
            "config": {"message": "Order {{ data.body.order }}"},
        }
        paced: dict[str, Json] = {
            "id": "paced",
            "nodeId": "throttle",
            "config": {"limit": 10, "perSeconds": 1},
        }
        await self.create(
            "simple", workflow_shapes.chain_workflow(log, paced, workflow_shapes.set_node("done"))
        )
        await self.api.post(f"/workflows/{self.workflows['simple']}/versions", {"versionTag": "first"})
        path = f"/workflows/{self.workflows['simple']}/visibility"
        await self.api.send("PUT", path, {"isPublic": True})
        self.runs["completed"] = await self.run("simple", {"order": 7})
        await self.becomes("completed", "completed")

        text: dict[str, Json] = {
            "id": "large",
            "nodeId": "template",
            "config": {"text": "{{ data.body.text }}" * 40},
        }
        await self.create("large", workflow_shapes.chain_workflow(text))
        self.runs["large"] = await self.run("large", {"text": "0123456789" * 1_000})
        await self.becomes("large", "completed")

    async def _fail(self) -> None:
        """Let the run of a message fail after two attempts, so that it becomes a dead letter."""
        ship = self.ledger.writes("ship", retry={"maxAttempts": 2, "backoff": 0})
        await self.create("orders", _triggered("queue-trigger", ship))
        with self.ledger.refusing("ship", 503):
            path = f"/workflows/{self.workflows['orders']}/enqueue"
            message = {"message": {"order": 8}, "deduplicationId": "order-8"}
            self.runs["failed"] = (await self.api.post(path, message))["executionId"]
            await self.becomes("failed", "failed")

    async def _receive(self) -> None:
        """Receive a webhook with a large body, a webhook that is too early, and a mail; add a schedule."""
        verification: dict[str, Json] = {"provider": "github", "dataSource": self.others["webhook_secret"]}
        hook = _triggered("webhook", workflow_shapes.set_node("done"), verification=verification)
        await self.create("hook", hook)
        push = signed_requests.sign_github(1, {"text": "0123456789" * 30_000})
        token = await self.api.post(f"/workflows/{self.workflows['hook']}/trigger-token", {})
        self.tokens["hook"] = token["token"]
        received = await self.api.deliver(f"/hooks/{token['token']}", push)
        self.runs["hook"] = received["executionId"]
        await self.becomes("hook", "completed")

        await self.create("mail", _triggered("email-trigger", workflow_shapes.set_node("done")))
        attachment = {"filename": "order.txt", "content_type": "text/plain", "content": "b3JkZXIgOQ=="}
        mail = {"from": "ada@example.org", "subject": "Order 9", "attachments": [attachment]}
        sent = await self.api.post(f"/workflows/{self.workflows['mail']}/email-trigger", mail)
        self.runs["mail"] = sent["executionId"]
        await self.becomes("mail", "completed")

        early = _triggered("webhook", self.ledger.writes("early"), verification=verification)
        await self.create("early", {**early, "status": "draft"})
        token = await self.api.post(f"/workflows/{self.workflows['early']}/trigger-token", {})
        self.tokens["early"] = token["token"]
        push = signed_requests.sign_github(3)
        refused = await self.http.post(
            f"/hooks/{token['token']}", content=push.body, headers=dict(push.headers)
        )
        assert refused.json()["error"]["code"] == "workflow-not-active", refused.text

        await self.create(
            "hourly", _triggered("schedule-trigger", workflow_shapes.set_node("done"), intervalSeconds=3600)
        )

    async def _deploy(self) -> None:
        """Deploy three workflows: one stays up, one is stopped, one is undeployed."""
        for name, ending in (("up", None), ("stopped", "stop"), ("undeployed", "undeploy")):
            await self.create(name, workflow_shapes.chain_workflow(workflow_shapes.set_node("done")))
            path = f"/workflows/{self.workflows[name]}"
            await self.api.post(f"{path}/deploy")
            ran = await self.api.post(f"{path}/trigger", {"sync": True})
            assert ran["status"] == "completed", ran
            self.runs[name] = ran["execution_id"]
            if ending is not None:
                await self.api.post(f"{path}/{ending}")

    async def _wait_for_answers(self) -> None:
        """Leave runs waiting for a person, for a sub-workflow that does, and for an event; one was answered
        before.
        """
        await self.create(
            "ask",
            workflow_shapes.build_workflow(
                [workflow_shapes.START, ASKS, self.ledger.writes("refund")],
                "start>approval approval:yes>refund",
            ),
        )
        self.runs["answered"] = await self.run("ask")
        await self.becomes("answered", "waiting")
        path = f"/executions/{self.runs['answered']}/input"
        await self.api.post(path, {"nodeId": "approval", "choice": "yes"})
        await self.becomes("answered", "completed")
        child: dict[str, Json] = {
            "id": "child",
            "nodeId": "sub-workflow",
            "config": {"workflowId": self.workflows["ask"]},
        }
        await self.create("parent", workflow_shapes.chain_workflow(child, self.ledger.writes("report")))
        self.runs["parent"] = await self.run("parent")
        path = f"/executions?workflow_id={self.workflows['ask']}&status=waiting"

        async def waiting() -> list[dict[str, Any]]:
            return list((await self.api.get(path))["executions"])

        (asked,) = await wait_until(waiting, what="the sub-workflow waits")
        self.runs["asked"] = asked["id"]
        await self.becomes("parent", "waiting")

        event: dict[str, Json] = {
            "id": "paid",
            "nodeId": "wait-for-event",
            "config": {
                "event_type": "order.paid",
                "filter": {
                    "left": "{{ item.event_data.order }}",
                    "operator": "equals",
                    "right": "{{ data.event_data.order }}",
                },
            },
        }
        await self.create(
            "payment",
            _triggered("event-trigger", event, self.ledger.writes("thank"), event_type="order.placed"),
        )
        placed = await self.api.post(
            "/workflows/events", {"event_type": "order.placed", "event_data": {"order": 11}}
        )
        self.runs["event"] = placed["results"][0]["executionId"]
        await self.becomes("event", "waiting")

    async def _start_timer(self) -> None:
        await self.create(
            "timer",
            workflow_shapes.chain_workflow(
                workflow_shapes.wait_node("wait", TIMER_SECONDS), self.ledger.writes("ring")
            ),
        )
        self.runs["timer"] = await self.run("timer")
        await self.becomes("timer", "waiting")

    async def _lose_worker(self) -> None:
        """Kill the server while a run of it writes; another run waits for the only slot of their workflow."""
        limited = workflow_shapes.chain_workflow(self.ledger.writes("charge"), concurrency={"limit": 1})
        await self.create("charge", limited)
        with self.ledger.holding("charge") as held:
            self.runs["orphaned"] = await self.run("charge", callbackUrl=self.receiver.url())
            self.others["interrupted_call"] = str((await held.next_call()).key)
            self.runs["behind"] = await self.run("charge")
            self._server.end_family()

    async def _accept_without_workers(self) -> None:
        """Accept a run, and a mail that is still to be parsed."""
        await self.create("queued", workflow_shapes.chain_workflow(self.ledger.writes("pack")))
        self.runs["queued"] = await self.run("queued")
        body = signed_requests.encode_multipart(
            {"email": signed_requests.build_raw_mail(12), "envelope": "{}"}
        )
        path = f"/api/v1/workflows/{self.workflows['mail']}/email-trigger"
        headers = {"X-API-Key": API_KEY, "Content-Type": signed_requests.FORM}
        received = await self.api.deliver(path, signed_requests.SignedRequest(headers, body))
        self.runs["unparsed"] = received["executionId"]

    # ── parts ───────────────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _serving(self, role: str, **settings: str) -> AsyncIterator[None]:
        """Run the server in a role during the block, and kill it after it."""
        log = self.folder / f"{role}.log"
        given = {**self.environment, **settings}
        with command_runs.run_command(role, given=given, log=log) as self._server:
            await self.api.wait_until_ready()
            yield

    def _command(self, *arguments: str) -> str:
        return command_runs.run_output(*arguments, given=self.environment)

    async def create(self, name: str, workflow: Mapping[str, Json], *, user: str = ADMIN) -> None:
        """Create a workflow under a name, by which `run` finds its id."""
        made = await self.api.post("/workflows", {**workflow, "name": name, "tags": ["upgrade"]}, user=user)
        self.workflows[name] = made["workflowId"]

    async def run(
        self,
        name: str,
        inputs: Mapping[str, Json] | None = None,
        *,
        user: str = ADMIN,
        **more: Json,
    ) -> str:
        """Start a run of a workflow by its name; return the execution's id."""
        body = {"triggerInputs": dict(inputs or {}), **more}
        path = f"/workflows/{self.workflows[name]}/execute"
        ran = await self.api.post(path, body, user=user, key=f"{name}-{len(self.runs)}")
        return str(ran["executionId"])

    async def becomes(self, run: str, status: str, *, user: str = ADMIN) -> None:
        """Wait until the run with this name has a status."""
        await self.api.become(self.runs[run], status, user=user)


def _triggered(trigger: str, *nodes: workflow_shapes.Node, **config: Json) -> dict[str, Json]:
    """Return an active workflow with a trigger and its nodes in a row."""
    ids = ["start", *(str(node["id"]) for node in nodes)]
    edges = " ".join(f"{source}>{target}" for source, target in pairwise(ids))
    return workflow_shapes.build_workflow(
        [{"id": "start", "nodeId": trigger, "config": config}, *nodes], edges
    )


async def _make(kind: str, database_url: str | None, redis_url: str, folder: Path) -> Manifest:
    """Fill a new database by the API of its server, store the fixture, and return its manifest."""
    port = services.reserve_port()
    given = environment(folder, port, database_url, lease_seconds=LEASE_SECONDS)
    command_runs.run_output("migrate", given=given)
    async with (
        ledgers.run_ledger() as ledger,
        http_receiver.run_receiver() as calls,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as http,
    ):
        manifest = await Maker(folder, given, http, ledger, calls).make(redis_url)
        dump = _dump_sqlite(folder / FILE) if database_url is None else _dump_postgresql(database_url)
        addresses = {LEDGER: ledger.url, CALLBACKS: calls.url("")}
        Fixture(HEAD_REVISION, kind).write(dump, folder, manifest, addresses)
        return manifest


def _dump_sqlite(file: Path) -> str:
    with closing(sqlite3.connect(file)) as connection:
        return "\n".join(connection.iterdump()) + "\n"


def _dump_postgresql(url: str) -> str:
    newest = max(Path("/usr/lib/postgresql").glob("*/bin/pg_dump"), default=Path("pg_dump"))
    program = shutil.which("pg_dump") or str(newest)
    command = [program, "--no-owner", "--no-privileges", "--inserts", "--dbname"]
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return subprocess.run([*command, plain], check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Create the fixtures of both databases."""
    with services.run_redis() as redis, services.run_postgres() as postgres:
        for kind in KINDS:
            url = asyncio.run(postgres.create_database("upgrade")) if kind == "postgresql" else None
            with TemporaryDirectory() as folder:
                asyncio.run(_make(kind, url, redis.url, Path(folder)))


if __name__ == "__main__":
    main()
