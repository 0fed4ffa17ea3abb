"""A change of the server's secret: data sources and API keys survive it, whenever it is interrupted."""

from __future__ import annotations

import hmac
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx2
import pytest
from pydantic import SecretStr
from sqlalchemy import select
from sqlmodel import col

from gateway import state
from gateway.main import create_app
from gateway.settings import GatewaySettings
from models.data_source import DataSource, decrypt_secrets
from models.encryption import SecretVault, UnknownSecret
from models.settings import InvalidSettings
from pilotflame import secret_rotation
from tests import command_runs
from tests.integration.gateway_harness import SECRET, GatewayHarness, OrganizationUsers, UserClient

NEW = "the next secret, also of more than thirty-two characters"
NEWEST = "and the one after that, of more than thirty-two too"


def changed_settings(harness: GatewayHarness, secret: str, *previous: str) -> GatewaySettings:
    """Return the settings of a server with a changed secret."""
    secrets = {"secret_key": SecretStr(secret), "previous_secret_keys": tuple(map(SecretStr, previous))}
    return harness.gateway.settings.model_copy(update=secrets)


async def create_source(person: UserClient, name: str) -> str:
    body = {"name": name, "type": "http-bearer", "secrets": {"token": f"token-{name}"}}
    answer = await person.api.post("/api/v1/datasources", json=body)
    source_id: str = answer.json()["dataSourceId"]
    return source_id


async def open_secrets(harness: GatewayHarness, vault: SecretVault, *source_ids: str) -> list[dict[str, str]]:
    """Return the decrypted secrets of data sources; raises `VaultError`."""
    statement = select(DataSource).where(col(DataSource.id).in_(source_ids)).order_by(col(DataSource.id))
    async with harness.gateway.database.read() as connection:
        rows = (await connection.execute(statement)).mappings().all()
    return [decrypt_secrets(vault, DataSource(**row)) for row in rows]


@asynccontextmanager
async def run_gateway(settings: GatewaySettings) -> AsyncIterator[httpx2.AsyncClient]:
    """Run another gateway on the same database; yields a client without a key."""
    app = create_app(lambda: state.open_state(settings))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        transport = httpx2.ASGITransport(app)
        yield await stack.enter_async_context(
            httpx2.AsyncClient(transport=transport, base_url="http://gateway")
        )


async def get_whoami(client: httpx2.AsyncClient, person: UserClient) -> int:
    answer = await client.get("/api/v1/auth/whoami", headers={"X-API-Key": person.key})
    return answer.status_code


async def send_github_event(client: httpx2.AsyncClient, token: str, secret: str) -> int:
    body = b"{}"
    signature = "sha256=" + hmac.new(secret.encode(), body, "sha256").hexdigest()
    headers = {
        "X-GitHub-Event": "ping",
        "X-Hub-Signature-256": signature,
        "Content-Type": "application/json",
    }
    url = f"/api/v1/workflows/events?key={token}"
    return (await client.post(url, content=body, headers=headers)).status_code


@pytest.mark.every_database
# In one test: each change starts from the end of the previous one.
async def test_data_sources_and_keys_survive_a_change_of_the_secret(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [await create_source(people.owner, name) for name in ("a", "b", "c")]
    expected = [{"token": f"token-{name}"} for name in ("a", "b", "c")]
    signing = await people.admin.api.post("/api/v1/auth/signing-secret")
    assert signing.status_code == 201
    hooks = {"name": "Hooks", "secrets": {"github": ["a secret of GitHub's"]}}
    token = (await people.admin.api.post("/api/v1/auth/event-tokens", json=hooks)).json()["token"]
    old, new = SecretVault(SECRET.encode()), SecretVault(NEW.encode())
    settings = changed_settings(harness, NEW, SECRET)
    before = (await people.admin.api.get("/api/v1/audit")).json()

    # Interrupted after the first batch: its rows are re-encrypted, and both secrets are needed.
    monkeypatch.setattr(secret_rotation, "BATCH", 1)
    replace, calls = secret_rotation.write_encrypted, []

    async def replace_once(*given: object) -> int:
        calls.append(given)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return await replace(*given)  # type: ignore[arg-type]  # passed on as received

    monkeypatch.setattr(secret_rotation, "write_encrypted", replace_once)
    with pytest.raises(KeyboardInterrupt):
        await secret_rotation.rotate_secret(settings)
    monkeypatch.setattr(secret_rotation, "write_encrypted", replace)
    for vault in (old, new):
        with pytest.raises(UnknownSecret):
            await open_secrets(harness, vault, *ids)
    assert await open_secrets(harness, SecretVault(NEW.encode(), [SECRET.encode()]), *ids) == expected

    done = await secret_rotation.rotate_secret(settings)
    assert (done.encrypted, done.unreadable) == (4, [])
    assert await open_secrets(harness, new, *ids) == expected
    again = await secret_rotation.rotate_secret(settings)
    assert (again.encrypted, again.waiting_keys) == (0, done.waiting_keys)
    assert (await people.admin.api.get("/api/v1/audit")).json() == before

    # A key moves to the new secret when it is used; one that isn't ends with the old secret.
    async with run_gateway(settings) as both:
        assert await get_whoami(both, people.owner) == 200
        assert await get_whoami(both, people.owner) == 200
    async with run_gateway(changed_settings(harness, NEW)) as alone:
        assert await get_whoami(alone, people.owner) == 200
        assert await get_whoami(alone, people.colleague) == 401
        assert await send_github_event(alone, token, "a secret of GitHub's") == 200
        assert await send_github_event(alone, token, "another") == 401
    assert (await secret_rotation.rotate_secret(settings)).waiting_keys == done.waiting_keys - 1

    # Rows that no secret decrypts stay unchanged, and are reported.
    lost = await secret_rotation.rotate_secret(changed_settings(harness, NEWEST))
    assert (lost.encrypted, sorted(lost.unreadable)[:3], len(lost.unreadable)) == (0, ids, 5)
    assert await open_secrets(harness, new, *ids) == expected


def test_the_command_prints_its_result(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("rotation")
    command_runs.run_output("migrate", given=command_runs.command_environment(folder, SECRET_KEY=SECRET))
    given = command_runs.command_environment(
        folder, SECRET_KEY=NEW, PREVIOUS_SECRET_KEYS=json.dumps([SECRET, NEWEST])
    )
    assert command_runs.run_output("keys", "rotate-secret", given=given) == "0 secrets encrypted anew"


def test_an_earlier_secret_that_is_hardly_one_is_refused_and_none_is_shown() -> None:
    settings = GatewaySettings(
        secret_key=SecretStr(NEW), previous_secret_keys=(SecretStr("too-short-to-be-one"),)
    )
    with pytest.raises(InvalidSettings, match="PREVIOUS_SECRET_KEYS") as raised:
        _ = settings.previous_secrets
    assert "too-short-to-be-one" not in f"{raised.value} {settings!r}"
