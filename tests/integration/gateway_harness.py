"""Gateway on a real database, with organizations, users and keys created on demand, and their clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import httpx2
from msgspec.structs import replace
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.applications import Starlette

from gateway import state
from gateway.main import create_app
from gateway.settings import GatewaySettings
from gateway.state import GatewayState
from models import access_store
from models.access import ALL_KEY_SCOPES, KeyScope, Organization, User, UserRole
from models.timestamps import format_timestamp
from tests import databases
from tests.services import PostgresServer

FILE = "test.db"
SECRET = "a secret of more than thirty-two characters"
TRIGGER = {"id": "start", "nodeId": "manual", "label": "Start"}
STEP = {"id": "step", "nodeId": "set", "label": "Step", "config": {"values": {"a": 1}}}
EDGE = {"sourceNodeId": "start", "targetNodeId": "step"}
GRAPH: dict[str, Any] = {"nodes": [TRIGGER, STEP], "connections": [EDGE]}
"""The smallest graph that is valid."""


Made: TypeAlias = tuple[User, str]
"""A user, and a key of theirs."""


@dataclass(frozen=True)
class UserClient:
    """User with an HTTP client that sends a key of theirs."""

    user: User
    api: httpx2.AsyncClient
    key: str

    async def create(self, **fields: Any) -> str:  # noqa: ANN401 - any JSON value
        """Create a workflow through the API, with these fields, and return its id."""
        response = await self.api.post("/api/v1/workflows", json={"name": "A workflow", **fields})
        assert response.status_code == 201, response.text
        workflow_id: str = response.json()["workflowId"]
        return workflow_id

    async def workflow(self, workflow_id: str) -> dict[str, Any]:
        """Return a workflow as the API shows it to this user."""
        response = await self.api.get(f"/api/v1/workflows/{workflow_id}")
        assert response.status_code == 200, response.text
        shown: dict[str, Any] = response.json()
        return shown


@dataclass(frozen=True)
class OrganizationUsers:
    """Two organizations: one with an admin and two members, the other with an admin."""

    admin: UserClient
    owner: UserClient
    colleague: UserClient
    stranger: UserClient


class GatewayHarness:
    """Gateway in this process, with its database, and clients that are closed with it."""

    def __init__(self, app: Starlette, gateway: GatewayState, clients: AsyncExitStack) -> None:
        self.app = app
        self.gateway = gateway
        self._clients = clients

    async def people(self) -> OrganizationUsers:
        """Create two organizations with users that no other test has."""
        now = datetime.now(UTC)

        async def make(connection: AsyncConnection) -> list[Made]:
            here, elsewhere = [
                await access_store.create_organization(connection, name="An organisation", now=now)
                for _ in range(2)
            ]
            return [
                await _make_person(connection, here, UserRole.ADMIN),
                await _make_person(connection, here, UserRole.MEMBER),
                await _make_person(connection, here, UserRole.MEMBER),
                await _make_person(connection, elsewhere, UserRole.ADMIN),
            ]

        made = await self.gateway.database.transaction(make)
        return OrganizationUsers(*[UserClient(user, await self.client(key), key) for user, key in made])

    async def organization(self) -> Organization:
        """Create an organization without users."""
        return await self.gateway.database.transaction(
            lambda connection: access_store.create_organization(
                connection, name="An organisation", now=datetime.now(UTC)
            )
        )

    async def person(
        self,
        organization: Organization,
        role: UserRole = UserRole.MEMBER,
        scopes: Collection[KeyScope] = ALL_KEY_SCOPES,
    ) -> UserClient:
        """Create a user of an organization with a key; return the user's client."""
        user, key = await self.gateway.database.transaction(
            lambda connection: _make_person(connection, organization, role, scopes)
        )
        return UserClient(user, await self.client(key), key)

    async def with_settings(self, **changes: Any) -> GatewayHarness:  # noqa: ANN401 - values of settings
        """Return a harness of another gateway on the same database, with settings changed, which are not checked."""
        changed = replace(self.gateway, settings=self.gateway.settings.model_copy(update=changes))
        app = create_app(lambda: nullcontext(changed))
        await self._clients.enter_async_context(app.router.lifespan_context(app))
        return GatewayHarness(app, changed, self._clients)

    async def client(self, key: str | None = None, *, address: str = "10.0.0.1") -> httpx2.AsyncClient:
        """Return an HTTP client of the gateway that sends `key`, None for no key, from the IP address `address`."""
        transport = httpx2.ASGITransport(self.app, client=(address, 1234))
        headers = {} if key is None else {"X-API-Key": key}
        client = httpx2.AsyncClient(transport=transport, base_url="http://gateway", headers=headers)
        return await self._clients.enter_async_context(client)

    async def browser(
        self, *, address: str = "127.0.0.1", host: str = "localhost:8000"
    ) -> httpx2.AsyncClient:
        """Return a client without a key that keeps cookies, like pages of the dashboard at `host`."""
        transport = httpx2.ASGITransport(self.app, client=(address, 1234))
        headers = {"Sec-Fetch-Site": "same-origin", "User-Agent": "A browser"}
        client = httpx2.AsyncClient(transport=transport, base_url=f"http://{host}", headers=headers)
        return await self._clients.enter_async_context(client)


async def _make_person(
    connection: AsyncConnection,
    organization: Organization,
    role: UserRole,
    scopes: Collection[KeyScope] = ALL_KEY_SCOPES,
) -> Made:
    """Create a user of an organization with an API key; return both."""
    now = datetime.now(UTC)
    user = await access_store.create_user(
        connection,
        organization=organization,
        email=f"{uuid4().hex}@example.com",
        name="Somebody",
        role=role,
        now=now,
    )
    made = await access_store.create_key(
        connection, user=user, name="test", scopes=scopes, secret=SECRET.encode(), now=now
    )
    return user, made.key


async def wait_until_after(moment: str) -> None:
    """Wait until the time, to a millisecond as in answers, is later than `moment`."""
    while format_timestamp(datetime.now(UTC)) <= moment:  # noqa: ASYNC110 - a clock sends no events
        await asyncio.sleep(0.001)


def assert_refused(response: httpx2.Response, status: int, code: str) -> None:
    """Check that an answer is a refusal of the standard shape, with this status and code."""
    assert response.status_code == status, response.text
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-store"
    if status in {429, 503}:
        assert int(response.headers["Retry-After"]) > 0
    body = response.json()
    assert set(body) == {"success", "error", "requestId"}
    assert body["success"] is False
    assert body["requestId"] == response.headers["X-Request-Id"]
    assert set(body["error"]) == {"code", "message", "details"}
    assert body["error"]["code"] == code
    assert body["error"]["message"]
    assert isinstance(body["error"]["details"], list)


@asynccontextmanager
async def create_gateway(
    kind: str,
    postgres: PostgresServer,
    folder: Path,
    *,
    settle_seconds: float = 0,  # mostly there is no deployer to wait for
) -> AsyncIterator[GatewayHarness]:
    """Run a gateway on a new database of a kind, `sqlite` or `postgresql`, during the block."""
    if kind == "postgresql":
        url = await databases.create_database(postgres, f"gateway_{uuid4().hex}")
    else:
        url = await databases.create_sqlite_database(folder / FILE)
    async with run_gateway(url, folder, settle_seconds=settle_seconds) as harness:
        yield harness


@asynccontextmanager
async def run_gateway(url: str, folder: Path, *, settle_seconds: float = 0) -> AsyncIterator[GatewayHarness]:
    """Run a gateway on an existing, migrated database during the block."""
    settings = GatewaySettings(
        data_dir=folder,
        database_url=url,
        secret_key=SecretStr(SECRET),
        max_body_bytes=1_000_000,
        settle_seconds=settle_seconds,
    )
    app = create_app(lambda: state.open_state(settings))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        yield GatewayHarness(app, app.state.gateway, stack)
