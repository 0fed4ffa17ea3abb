"""A gateway that mail is handed in to, with a clock and an SNS of the tests, and a bucket that SES stores in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_network
from typing import Any, Final

import httpx2
from msgspec.structs import replace
from sqlalchemy import select
from sqlmodel import SQLModel, col

from engine.run_records import RunOutcome
from execution.shared_throttle import SharedThrottle
from execution.stored_data_sources import StoredDataSources
from execution.trials import TrialGate
from gateway import state
from gateway.http.failed_attempts import PasswordAttempts
from gateway.ingest.mail_verification import MailVerifier
from gateway.ingest.sns_certificates import SnsCertificateCache
from gateway.main import create_app
from gateway.state import GatewayState
from journal.store import ClaimedRun
from messages.broker_connection import connect_broker
from models.execution import Execution, ExecutionData
from models.ingest import Delivery
from nodes.connections.data_source_connections import DataSourceConnections
from nodes.connections.data_source_policy import ConnectionPolicy
from nodes.outbound_http import OutboundResponse
from tests import fake_s3
from tests.fake_s3 import FakeObject, FakeS3
from tests.integration.gateway_harness import EDGE, STEP, GatewayHarness, UserClient
from tests.provider_requests import BY_NAME, CONFIG, FOLDER, ProviderStep, read_certificate
from workers.mail_parsing import MailParser, MailSources
from workers.settings import WorkerSettings

WORKFLOWS: Final = "/api/v1/workflows"
BUCKET: Final = "fixture-inbound-mail"
PATIENCE_SECONDS: Final = 60.0
PER_CONNECTION: Final = frozenset({b"host", b"connection", b"content-length", b"x-api-key"})


@dataclass
class FakeSns:
    """Fake SNS: answers requests for certificates and confirmations, and records their addresses."""

    asked: list[str] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    """Of the next answers; after them all is well."""

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        timeout_seconds: float,
        follow_redirects: bool,
    ) -> OutboundResponse:
        assert (method, headers, follow_redirects) == ("GET", {}, False)
        assert timeout_seconds < 15
        self.asked.append(url)
        if self.statuses:
            return OutboundResponse(self.statuses.pop(0), {}, b"", url)
        body = b"<ConfirmSubscriptionResponse/>" if "Action=" in url else read_certificate(url)
        return OutboundResponse(200, {}, body, url)

    async def close(self) -> None:
        """Do nothing: there are no connections."""


@dataclass
class MailHarness:
    """Gateway that accepts mail, its clock, and the fake services that it calls."""

    harness: GatewayHarness
    sns: FakeSns
    s3: FakeS3
    now: list[datetime]
    """The gateway's clock; tests set it."""
    left: list[tuple[ClaimedRun, RunOutcome]] = field(default_factory=list)

    @property
    def gateway(self) -> GatewayState:
        return self.harness.gateway

    # ── workflows ─────────────────────────────────────────────────────────────────────────────────────────

    async def workflow(self, person: UserClient, **config: Any) -> str:  # noqa: ANN401 - any JSON value
        """Create an active workflow with an e-mail trigger of this config, and return its id."""
        trigger = {"id": "start", "nodeId": "email-trigger", "label": "Start", "config": config}
        settings = config.pop("settings", {})
        workflow_id = await person.create(nodes=[trigger, STEP], connections=[EDGE], settings=settings)
        await self.set_status(person, workflow_id, "active")
        return workflow_id

    async def set_status(self, person: UserClient, workflow_id: str, status: str) -> None:
        answer = await person.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": status})
        assert answer.status_code == 200, answer.text

    async def whole_config(self, person: UserClient) -> dict[str, Any]:
        """Return the config of an e-mail trigger that accepts every service of the recorded requests;
        creates its data sources.
        """
        return {
            "sendgrid": {"publicKey": CONFIG["sendgrid"]["public_key"]},
            "mailgun": {
                "signingKey": await self.source(
                    person, "webhook-secret", {}, secret=CONFIG["mailgun"]["webhook_signing_key"]
                )
            },
            "ses": {"topics": CONFIG["sns"]["allowed_topic_arns"], "objects": await self.bucket(person)},
            "basicAuth": await self.source(
                person,
                "http-basic",
                {"username": CONFIG["basic_auth"]["username"]},
                password=CONFIG["basic_auth"]["password"],
            ),
            "bearer": await self.source(person, "http-bearer", {}, token=CONFIG["bearer_token"]),
        }

    async def bucket(self, person: UserClient, prefix: str = "mail") -> str:
        settings = {
            "bucket": BUCKET,
            "region": self.s3.region,
            "endpoint": self.s3.url,
            "prefix": prefix,
            "accessKeyId": self.s3.access_key_id,
        }
        return await self.source(person, "s3", settings, secretAccessKey=self.s3.secret_access_key)

    async def source(self, person: UserClient, kind: str, settings: Mapping[str, Any], **secrets: str) -> str:
        body = {"name": f"{kind} {datetime.now(UTC)}", "type": kind, "settings": settings, "secrets": secrets}
        answer = await person.api.post("/api/v1/datasources", json=body)
        assert answer.status_code == 201, answer.text
        source_id: str = answer.json()["dataSourceId"]
        return source_id

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────

    async def post(
        self, workflow_id: str, step: ProviderStep, key: str | None = None, *, token: str = ""
    ) -> httpx2.Response:
        """Post a recorded request, byte for byte but for its address and its key, at its recorded time;
        return the answer.
        """
        self.now[0] = step.at
        headers = [pair for pair in step.headers if pair[0].lower() not in PER_CONNECTION]
        if key is not None:
            headers.append((b"X-API-Key", key.encode()))
        query = f"?key={token}" if token else ""
        nobody = await self.harness.client()
        return await nobody.post(
            f"{WORKFLOWS}/{workflow_id}/email-trigger{query}", content=step.body, headers=headers
        )

    async def post_form(
        self, workflow_id: str, person: UserClient, fields: Mapping[str, str | bytes]
    ) -> httpx2.Response:
        """Post fields as a multipart form with a user's key, which needs no signature; return the answer."""
        boundary = b"a-boundary-of-the-tests"
        body = b""
        for name, value in fields.items():
            raw = value.encode() if isinstance(value, str) else value
            body += b'--%s\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (
                boundary,
                name.encode(),
                raw,
            )
        return await person.api.post(
            f"{WORKFLOWS}/{workflow_id}/email-trigger",
            content=body + b"--%s--\r\n" % boundary,
            headers={"Content-Type": f"multipart/form-data; boundary={boundary.decode()}"},
        )

    async def mail(self, workflow_id: str, person: UserClient, raw: str | bytes) -> str:
        """Post a raw mail with a user's key; return the id of its execution."""
        envelope = json.dumps({"from": "a@example.org", "to": ["b@example.org"]})
        answer = await self.post_form(workflow_id, person, {"envelope": envelope, "email": raw})
        assert answer.status_code == 201, answer.text
        execution_id: str = answer.json()["executionId"]
        return execution_id

    # ── rows ──────────────────────────────────────────────────────────────────────────────────────────────

    async def rows(self, table: type[SQLModel], **equal: Any) -> list[Any]:  # noqa: ANN401 - rows of any table
        """Return the rows of a table with these values."""
        conditions = [getattr(table, name) == value for name, value in equal.items()]
        async with self.gateway.database.read() as connection:
            return list((await connection.execute(select(table).where(*conditions))).all())

    async def run(self, execution_id: str) -> Any:  # noqa: ANN401 - a row
        (row,) = await self.rows(Execution, id=execution_id)
        return row

    async def given(self, execution_id: str) -> Any:  # noqa: ANN401 - any JSON value
        """Return the input of the trigger that is stored for a run."""
        (data,) = await self.rows(ExecutionData, execution_id=execution_id)
        return json.loads(data.trigger)

    async def deliveries(self, workflow_id: str) -> list[Any]:
        async with self.gateway.database.read() as connection:
            statement = (
                select(Delivery).where(col(Delivery.workflow_id) == workflow_id).order_by(col(Delivery.id))
            )
            return list((await connection.execute(statement)).all())

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def reading(self, **settings: Any) -> AsyncIterator[MailParser]:  # noqa: ANN401 - a field of WorkerSettings
        """Parse pending mails during the block, as a worker does."""
        gateway = self.gateway
        shared = gateway.settings.model_dump(include={"data_dir", "database_url", "secret_key"})
        told = WorkerSettings(**shared, **{"lease_seconds": 5, "sweep_seconds": 0.02, **settings})
        connections = DataSourceConnections(
            StoredDataSources(gateway.database, gateway.vault),
            ConnectionPolicy(
                allowed_networks=(ip_network("127.0.0.0/8"),), own_databases=(), files=told.files_dir
            ),
        )
        reader = MailParser(
            gateway.database,
            gateway.store,
            gateway.broker,
            gateway.blobs,
            MailSources(connections, SharedThrottle(gateway.database)),
            told,
            on_left=lambda one, ended: self.left.append((one, ended)),
            isolation=TrialGate(),
        )
        reader.start()
        try:
            yield reader
        finally:
            await reader.close()
            await connections.close()

    async def read(self, *execution_ids: str) -> None:
        """Parse mails until these runs have their input or have ended."""

        async def are_left() -> bool:
            runs = [await self.run(one) for one in execution_ids]
            return all(
                run.target != "intake" or run.status in {"failed", "cancelled", "waiting"} for run in runs
            )

        async with self.reading():
            await wait_until(are_left)


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await condition():  # noqa: ASYNC110 - rows have no events
            await asyncio.sleep(0.02)


@asynccontextmanager
async def run_mail_harness(harness: GatewayHarness) -> AsyncIterator[MailHarness]:
    """Run a gateway that accepts mail on the database of a harness, with fake services, during the block."""
    here, sns, now = harness.gateway, FakeSns(), [datetime.now(UTC)]
    broker = await connect_broker(None)

    @asynccontextmanager
    async def opened() -> AsyncIterator[GatewayState]:
        async with state.assemble_state(here.settings, here.database, here.store, broker) as gateway:
            certificates = SnsCertificateCache(sns)
            attempts = PasswordAttempts("Too many wrong passwords")
            verifier = MailVerifier(gateway.workflows, gateway.pod_services.sources, certificates, attempts)
            yield replace(gateway, clock=lambda: now[0], certificates=certificates, mail_verifier=verifier)

    async with AsyncExitStack() as stack:
        stack.push_async_callback(broker.close)
        s3 = await stack.enter_async_context(fake_s3.serve_fake_s3())
        key = BY_NAME["ses_s3_action"].expected["s3"]
        s3.buckets[BUCKET] = {key["key"]: FakeObject((FOLDER / key["file"]).read_bytes(), {})}
        app = create_app(opened)
        await stack.enter_async_context(app.router.lifespan_context(app))
        yield MailHarness(GatewayHarness(app, app.state.gateway, stack), sns, s3, now)
