"""Gateway on a real database, with organizations, users and keys created on demand, and their clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
from msgspec.structs import replace
from pydantic import SecretStr
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import SQLModel
from starlette.applications import Starlette

from gateway import state
from gateway.main import create_app
from gateway.settings import GatewaySettings
from gateway.state import GatewayState
from models import ids
from models.access import (
    ALL_KEY_SCOPES,
    ApiKey,
    KeyScope,
    Organization,
    User,
    UserRole,
    hash_key,
    new_key,
    visible_prefix,
)
from models.encryption import identify_secret
from models.timestamps import format_timestamp
from tests import databases
from tests.integration.lent_database import OpenDatabase
from tests.services import PostgresServer

FILE = "test.db"
SECRET = "a secret of more than thirty-two characters"
TRIGGER = {"id": "start", "nodeId": "manual", "label": "Start"}
STEP = {"id": "step", "nodeId": "set", "label": "Step", "config": {"values": {"a": 1}}}
EDGE = {"sourceNodeId": "start", "targetNodeId": "step"}
GRAPH: dict[str, Any] = {"nodes": [TRIGGER, STEP], "connections": [EDGE]}
"""The smallest graph that is valid."""


@dataclass(frozen=True)
class MadePerson:
    """Rows of a user and of their API key, with the text of the key."""

    user: User
    row: ApiKey
    key: str


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
        here, elsewhere = _build_organization(), _build_organization()
        made = [
            _build_person(here, UserRole.ADMIN),
            _build_person(here, UserRole.MEMBER),
            _build_person(here, UserRole.MEMBER),
            _build_person(elsewhere, UserRole.ADMIN),
        ]
        await self._insert([here, elsewhere], made)
        return OrganizationUsers(*[await self._client_of(one) for one in made])

    async def organization(self) -> Organization:
        """Create an organization without users."""
        organization = _build_organization()
        await self._insert([organization], [])
        return organization

    async def person(
        self,
        organization: Organization,
        role: UserRole = UserRole.MEMBER,
        scopes: Collection[KeyScope] = ALL_KEY_SCOPES,
    ) -> UserClient:
        """Create a user of an organization with a key; return the user's client."""
        made = _build_person(organization, role, scopes)
        await self._insert([], [made])
        return await self._client_of(made)

    async def _insert(self, organizations: Sequence[Organization], made: Sequence[MadePerson]) -> None:
        """Insert rows, those of a table by one statement: most tests insert some."""
        tables: list[tuple[type[SQLModel], Sequence[SQLModel]]] = [
            (Organization, organizations),
            (User, [one.user for one in made]),
            (ApiKey, [one.row for one in made]),
        ]

        async def insert_rows(connection: AsyncConnection) -> None:
            for table, rows in tables:
                if rows:
                    await connection.execute(insert(table), [row.model_dump() for row in rows])

        await self.gateway.database.transaction(insert_rows)

    async def _client_of(self, made: MadePerson) -> UserClient:
        return UserClient(made.user, await self.client(made.key), made.key)

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


def _build_organization() -> Organization:
    """Return the row of a new organization."""
    organization_id = ids.new_id("org")
    return Organization(
        id=organization_id,
        shard=ids.shard_of(organization_id),
        name="An organisation",
        created_at=datetime.now(UTC),
    )


def _build_person(
    organization: Organization, role: UserRole, scopes: Collection[KeyScope] = ALL_KEY_SCOPES
) -> MadePerson:
    """Return the rows of a new user of an organization and of their API key, as the server stores them."""
    of_organization: dict[str, Any] = {
        "organization_id": organization.id,
        "shard": organization.shard,
        "created_at": datetime.now(UTC),
    }
    user = User(
        id=ids.new_id("user"),
        email=f"{uuid4().hex}@example.com",
        name="Somebody",
        role=role,
        **of_organization,
    )
    key = new_key()
    row = ApiKey(
        id=ids.new_id("key"),
        user_id=user.id,
        name="test",
        prefix=visible_prefix(key),
        hash=hash_key(key, SECRET.encode()),
        secret_id=identify_secret(SECRET.encode()),
        scopes=sorted(scopes),
        **of_organization,
    )
    return MadePerson(user, row, key)


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
    settings = _build_settings(url, folder, settle_seconds)
    async with _serve(lambda: state.open_state(settings)) as harness:
        yield harness


@asynccontextmanager
async def run_gateway_on(opened: OpenDatabase, folder: Path) -> AsyncIterator[GatewayHarness]:
    """Run a gateway on an open database during the block; the database stays open."""
    settings = _build_settings(opened.url, folder, settle_seconds=0)
    async with _serve(lambda: state.open_state_on(settings, opened.database, opened.store)) as harness:
        yield harness


def _build_settings(url: str, folder: Path, settle_seconds: float) -> GatewaySettings:
    return GatewaySettings(
        data_dir=folder,
        database_url=url,
        secret_key=SecretStr(SECRET),
        max_body_bytes=1_000_000,
        settle_seconds=settle_seconds,
    )


@asynccontextmanager
async def _serve(
    open_state: Callable[[], AbstractAsyncContextManager[GatewayState]],
) -> AsyncIterator[GatewayHarness]:
    app = create_app(open_state)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        yield GatewayHarness(app, app.state.gateway, stack)
