"""Data sources over HTTP: permissions, validation, and secrets that are never shown."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from engine.run_errors import NodeError
from engine.services import RunCaller
from engine.values import fingerprint
from execution.stored_data_sources import StoredDataSources
from models.data_source import DataSource
from models.encryption import SecretVault
from models.execution import Idempotency
from tests.integration.gateway_harness import (
    SECRET,
    TRIGGER,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
    wait_until_after,
)

SOURCES = "/api/v1/datasources"
WORKFLOWS = "/api/v1/workflows"
CANARY = "canary-8d41e0"
DATABASE: dict[str, Any] = {
    "type": "postgresql",
    "settings": {"host": "db.example.com", "database": "shop", "user": "reader"},
    "secrets": {"password": f"{CANARY}-password"},
}
BUCKET: dict[str, Any] = {"type": "s3", "secrets": {"secretAccessKey": "some-secret-text"}}


def changed_settings(**settings: object) -> dict[str, Any]:
    return {**DATABASE["settings"], **settings}


async def create_source(person: UserClient, **fields: Any) -> str:  # noqa: ANN401 - any JSON value
    """Create a data source and return its id."""
    count = (await person.api.get(SOURCES)).json()["count"]
    response = await person.api.post(SOURCES, json={"name": f"Source {count}", **DATABASE, **fields})
    assert response.status_code == 201, response.text
    source_id: str = response.json()["dataSourceId"]
    return source_id


async def get_source(person: UserClient, source_id: str) -> dict[str, Any]:
    response = await person.api.get(f"{SOURCES}/{source_id}")
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def change(person: UserClient, source_id: str, **fields: Any) -> httpx2.Response:  # noqa: ANN401 - any JSON value
    return await person.api.put(f"{SOURCES}/{source_id}", json=fields)


async def share(person: UserClient, source_id: str, user_id: object) -> httpx2.Response:
    return await person.api.post(f"{SOURCES}/{source_id}/share", json={"userId": user_id})


def caller_of(person: UserClient) -> RunCaller:
    """Return the identity under which a user's runs use data sources."""
    return RunCaller(person.user.organization_id, person.user.id, "wf_1", "exec_1", "exec_1")


def stored_sources(harness: GatewayHarness, *secrets: str) -> StoredDataSources:
    """Return the data sources as a worker finds them."""
    secret, *previous = [one.encode() for one in secrets or (SECRET,)]
    return StoredDataSources(harness.gateway.database, SecretVault(secret, previous))


# ── validation ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_data_source_is_shown_with_defaults_and_without_its_secrets(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    answer = await people.owner.api.post(SOURCES, json={"name": " Orders ", **DATABASE})
    assert (answer.status_code, answer.headers["ETag"]) == (201, '"1"')
    source_id = answer.json()["dataSourceId"]
    found = await get_source(people.owner, source_id)
    assert found == {
        "id": source_id,
        "name": "Orders",
        "type": "postgresql",
        "settings": {**DATABASE["settings"], "port": 5432, "tls": "prefer"},
        "secretNames": ["password"],
        "secretsSetAt": found["createdAt"],
        "secretsFingerprint": found["secretsFingerprint"],
        "organizationId": people.owner.user.organization_id,
        "ownerId": people.owner.user.id,
        "isPublic": False,
        "sharedWith": [],
        "createdAt": found["createdAt"],
        "updatedAt": found["createdAt"],
    }
    listed = (await people.owner.api.get(SOURCES)).json()
    assert listed == {"count": 1, "limit": 20, "offset": 0, "dataSources": [found]}
    source = await stored_sources(harness).find(caller_of(people.owner), source_id)
    assert (source.type, source.secrets) == ("postgresql", DATABASE["secrets"])
    assert (source.settings, source.revision) == (found["settings"], 1)


TYPES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("mysql", {"host": "::1", "port": 3307, "database": "d", "user": "u", "tls": "verify-full"}, ["password"]),
    ("sqlite", {"file": "sales/2025.db"}, []),
    ("http-bearer", {}, ["token"]),
    ("http-bearer", {"hosts": ["api.example.com", "10.0.0.1"]}, ["token"]),
    ("http-basic", {"username": "ada"}, ["password"]),
    ("api-key", {"header": "X-Shop-Key"}, ["key"]),
    ("smtp", {"host": "mail.example.com", "username": "ada", "tls": "tls"}, ["password"]),
    ("smtp", {"host": "mail.example.com"}, []),
    ("s3", {"bucket": "exports", "accessKeyId": "AK"}, ["secretAccessKey", "sessionToken"]),
    ("s3", {"bucket": "b-1", "accessKeyId": "AK", "endpoint": "http://[::1]:9000"}, ["secretAccessKey"]),
    ("ai-provider", {"baseUrl": "https://api.example.com/v1"}, ["key"]),
    ("ai-provider", {"baseUrl": "http://[::1]:11434/v1", "keyHeader": "api-key"}, []),
    ("mcp-server", {"url": "https://tools.example.com/mcp"}, ["key"]),
    ("mcp-server", {"url": "http://[::1]:8080/mcp", "keyHeader": "X-Key"}, []),
    ("webhook-secret", {}, ["secret"]),
]  # fmt: skip


async def test_each_data_source_type_requires_its_own_settings(people: OrganizationUsers) -> None:
    for kind, settings, secrets in TYPES:
        given = dict.fromkeys(secrets, "some-secret-text")
        found = await get_source(
            people.owner, await create_source(people.owner, type=kind, settings=settings, secrets=given)
        )
        assert settings.items() <= found["settings"].items()
        assert (found["type"], found["secretNames"]) == (kind, secrets)


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"name": " "}, ["name"]),
    ({"name": "x" * 201}, ["name"]),
    ({"type": "oracle"}, ["type"]),
    ({"settings": {}}, ["settings.host", "settings.database", "settings.user"]),
    ({"settings": changed_settings(host="postgres://db"), "secrets": {}}, ["settings.host", "secrets.password"]),
    ({"settings": changed_settings(port="5432")}, ["settings.port"]),
    ({"settings": changed_settings(port=0)}, ["settings.port"]),
    ({"settings": changed_settings(tls="maybe")}, ["settings.tls"]),
    ({"settings": changed_settings(user="a\n")}, ["settings.user"]),
    ({"settings": changed_settings(password=CANARY)}, ["settings.password"]),
    ({"secrets": {"password": ""}}, ["secrets.password"]),
    ({"secrets": {"password": [CANARY]}}, ["secrets.password"]),
    ({"secrets": {"password": CANARY + "\r\n"}}, ["secrets.password"]),
    ({"secrets": CANARY}, ["secrets"]),
    ({"secrets": {"password": CANARY, "token": CANARY}}, ["secrets.token"]),
    ({"type": "sqlite", "settings": {"file": "../pilotflame.db"}, "secrets": {}}, ["settings.file"]),
    ({"type": "sqlite", "settings": {"file": "a/../../b"}, "secrets": {}}, ["settings.file"]),
    ({"type": "sqlite", "settings": {"file": "/etc/passwd"}, "secrets": {}}, ["settings.file"]),
    ({"type": "http-bearer", "settings": {"hosts": []}, "secrets": {"token": "t"}}, ["settings.hosts"]),
    ({"type": "http-bearer", "settings": {"hosts": ["a/b"]}, "secrets": {"token": "t"}}, ["settings.hosts.0"]),
    ({"type": "http-bearer", "settings": {}, "secrets": {"token": "a\u00fc"}}, ["secrets.token"]),
    ({"type": "http-basic", "settings": {"username": "a:b"}, "secrets": {"password": "p"}}, ["settings.username"]),
    ({"type": "api-key", "settings": {"header": "User-Agent"}, "secrets": {"key": "k"}}, ["settings"]),
    ({"type": "api-key", "settings": {"header": "a b"}, "secrets": {"key": "k"}}, ["settings.header"]),
    ({"type": "smtp", "settings": {"host": "m", "username": "u"}, "secrets": {}}, ["secrets.password"]),
    ({"type": "smtp", "settings": {"host": "m"}, "secrets": {"password": "p"}}, ["settings.username"]),
    ({"type": "ai-provider", "settings": {"baseUrl": f"https://u:{CANARY}@h/v1"}, "secrets": {}},
     ["settings.baseUrl"]),
    ({"type": "ai-provider", "settings": {"baseUrl": f"https://h/v1?key={CANARY}"}, "secrets": {}},
     ["settings.baseUrl"]),
    ({"type": "mcp-server", "settings": {"url": f"https://h/mcp?key={CANARY}"}, "secrets": {}}, ["settings.url"]),
    ({**BUCKET, "settings": {"bucket": "b-1", "accessKeyId": "A", "endpoint": f"https://u:{CANARY}@h"}},
     ["settings.endpoint"]),
]  # fmt: skip


async def test_errors_are_listed_per_field_without_values(people: OrganizationUsers) -> None:
    for fields, paths in WRONG:
        response = await people.owner.api.post(SOURCES, json={"name": "A source", **DATABASE, **fields})
        assert_refused(response, 422, "validation-failed")
        problems = response.json()["error"]["details"]
        assert [problem["path"] for problem in problems] == paths
        assert CANARY not in response.text
        assert "regex" not in response.text
    assert (await people.owner.api.get(SOURCES)).json()["count"] == 0


@pytest.mark.every_database
async def test_names_are_an_owners_own(people: OrganizationUsers) -> None:
    owner, colleague = people.owner, people.colleague
    first = await create_source(owner, name="Orders")
    assert_refused(
        await owner.api.post(SOURCES, json={"name": "Orders", **DATABASE}), 409, "data-source-name-taken"
    )
    await create_source(colleague, name="Orders")
    second = await create_source(owner, name="Other")
    assert_refused(await change(owner, second, name="Orders"), 409, "data-source-name-taken")
    assert (await change(owner, first, name="Orders")).status_code == 200


async def test_lists_are_filtered_sorted_and_shown_in_parts(people: OrganizationUsers) -> None:
    for name in "bca":
        await create_source(people.owner, name=name)
    token = await create_source(
        people.owner, name="d", type="http-bearer", settings={}, secrets={"token": "t"}
    )

    async def names(query: str) -> list[str]:
        answer = (await people.owner.api.get(f"{SOURCES}?{query}")).json()
        return [one["name"] for one in answer["dataSources"]]

    assert await names("") == ["d", "a", "c", "b"]
    assert await names("sort=name:asc&limit=2&offset=1") == ["b", "c"]
    filtered = (await people.owner.api.get(f"{SOURCES}?type=http-bearer")).json()
    assert (filtered["count"], filtered["dataSources"][0]["id"]) == (1, token)
    for query in ("type=oracle", "sort=settings", "limit=101"):
        assert_refused(await people.owner.api.get(f"{SOURCES}?{query}"), 400, "invalid-query")


@pytest.mark.every_database
async def test_there_is_an_end_to_data_sources(
    people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.http.limits.DATA_SOURCES", 1)
    await create_source(people.owner)
    assert_refused(
        await people.colleague.api.post(SOURCES, json={"name": "One more", **DATABASE}),
        409,
        "too-many-data-sources",
    )


async def test_a_repeated_request_makes_one_and_keeps_nothing_to_guess_its_secrets_by(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    body, headers = {"name": "Once", **DATABASE}, {"Idempotency-Key": "once"}
    first, *others = await asyncio.gather(
        *(people.owner.api.post(SOURCES, json=body, headers=headers) for _ in range(3))
    )
    assert {answer.status_code for answer in (first, *others)} == {201}
    assert {answer.json()["dataSourceId"] for answer in others} == {first.json()["dataSourceId"]}
    other = {**body, "secrets": {"password": "another"}}
    again = await people.owner.api.post(SOURCES, json=other, headers=headers)
    assert_refused(again, 422, "idempotency-mismatch")
    async with harness.gateway.database.read() as connection:
        kept = set(await connection.scalars(select(col(Idempotency.fingerprint))))
    assert fingerprint(body) not in kept


# ── changes ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_change_keeps_unnamed_fields_and_secrets(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    source_id = await create_source(people.owner)
    before = await get_source(people.owner, source_id)
    await wait_until_after(before["secretsSetAt"])
    response = await change(
        people.owner, source_id, name="Renamed", settings={"database": "other", "tls": None}
    )
    assert (response.status_code, response.headers["ETag"]) == (200, '"2"')
    after = response.json()
    assert after == await get_source(people.owner, source_id)
    assert after["settings"] == {**before["settings"], "database": "other"}
    assert after["secretsSetAt"] == before["secretsSetAt"]
    kept = await stored_sources(harness).find(caller_of(people.owner), source_id)
    assert (kept.secrets, kept.revision) == (DATABASE["secrets"], 2)

    same = await change(people.owner, source_id, name="Renamed", settings={"database": "other"})
    assert (same.status_code, same.headers["ETag"]) == (200, '"2"')
    renewed = await change(people.owner, source_id, secrets={"password": "renewed"})
    assert (renewed.status_code, renewed.headers["ETag"]) == (200, '"3"')
    assert renewed.json()["secretsSetAt"] > before["secretsSetAt"]
    assert (await stored_sources(harness).find(caller_of(people.owner), source_id)).secrets == {
        "password": "renewed"
    }


async def test_a_fingerprint_tells_that_secrets_were_set_and_nothing_of_them(
    people: OrganizationUsers,
) -> None:
    first, second = await create_source(people.owner), await create_source(people.owner)
    before = (await get_source(people.owner, first))["secretsFingerprint"]
    assert re.fullmatch("[0-9a-f]{12}", before)
    # The same secret: guesses in another data source, or set again, can't be compared.
    assert (await get_source(people.owner, second))["secretsFingerprint"] != before
    renamed = (await change(people.owner, first, name="Fingerprint")).json()
    assert renamed["secretsFingerprint"] == before
    again = (await change(people.owner, first, secrets=DATABASE["secrets"])).json()
    assert again["secretsFingerprint"] != before
    body = {"name": "No secret", "type": "sqlite", "settings": {"file": "sales.db"}}
    without = (await people.owner.api.post(SOURCES, json=body)).json()["dataSourceId"]
    assert (await get_source(people.owner, without))["secretsFingerprint"] is None


@pytest.mark.parametrize("setting", [{"host": "elsewhere.example.com"}, {"port": 1}, {"tls": "disable"}])
async def test_a_changed_destination_requires_the_secrets_again(
    people: OrganizationUsers, setting: dict[str, Any]
) -> None:
    source_id = await create_source(people.owner)
    for person in (people.owner, people.admin):
        response = await change(person, source_id, settings=setting)
        assert_refused(response, 422, "validation-failed")
        assert response.json()["error"]["details"][0]["path"] == "secrets"
    response = await change(people.owner, source_id, settings=setting, secrets={"password": "again"})
    assert response.status_code == 200


async def test_hosts_are_extended_only_with_the_token(people: OrganizationUsers) -> None:
    token = {"type": "http-bearer", "settings": {"hosts": ["a.example.com"]}, "secrets": {"token": "t"}}
    source_id = await create_source(people.owner, **token)
    for hosts in (None, ["b.example.com"]):
        assert_refused(
            await change(people.admin, source_id, settings={"hosts": hosts}), 422, "validation-failed"
        )
    assert (await change(people.admin, source_id, settings={"hosts": ["a.example.com"]})).status_code == 200


async def test_an_unknown_field_cannot_be_set(people: OrganizationUsers) -> None:
    source_id = await create_source(people.owner, id="ds_mine", ownerId=people.admin.user.id)
    before = await get_source(people.owner, source_id)
    assert before["ownerId"] == people.owner.user.id
    assert before["id"] == source_id != "ds_mine"
    for fields in (
        {"id": "ds_x"},
        {"type": "mysql"},
        {"organizationId": "org_x"},
        {"ownerId": "user_x"},
        {"isPublic": True},
        {"shard": 7},
    ):
        assert_refused(await change(people.owner, source_id, **fields), 422, "validation-failed")
    assert await get_source(people.owner, source_id) == before


async def test_a_change_is_made_to_the_state_that_was_read(people: OrganizationUsers) -> None:
    source_id = await create_source(people.owner)
    await change(people.owner, source_id, name="Changed")
    path, stale = f"{SOURCES}/{source_id}", {"If-Match": '"1"'}
    for response in (
        await people.owner.api.put(path, json={"name": "Lost"}, headers=stale),
        await people.owner.api.delete(path, headers=stale),
        await people.owner.api.put(f"{path}/visibility", json={"isPublic": True}, headers=stale),
    ):
        assert_refused(response, 412, "precondition-failed")
        assert response.headers["ETag"] == '"2"'
    fresh = {"If-Match": '"2"'}
    assert (await people.owner.api.put(path, json={"name": "Kept"}, headers=fresh)).status_code == 200


async def test_changes_at_the_same_time_are_all_kept(people: OrganizationUsers) -> None:
    source_id = await create_source(people.owner)
    answers = await asyncio.gather(
        change(people.owner, source_id, name="Renamed"),
        change(people.owner, source_id, settings={"database": "other"}),
        change(people.owner, source_id, secrets={"password": "new"}),
        share(people.owner, source_id, people.colleague.user.id),
    )
    assert {answer.status_code for answer in answers} == {200}
    found = await get_source(people.owner, source_id)
    assert (found["name"], found["settings"]["database"]) == ("Renamed", "other")
    assert found["sharedWith"] == [people.colleague.user.id]


# ── permissions ─────────────────────────────────────────────────────────────────────────────────────────────


async def is_usable(harness: GatewayHarness, person: UserClient, source_id: str) -> bool:
    """Return whether a user's run may use a data source, and check that the API agrees."""
    status = (await person.api.get(f"{SOURCES}/{source_id}")).status_code
    listed = (await person.api.get(SOURCES)).json()["dataSources"]
    assert (source_id in [one["id"] for one in listed]) is (status == 200)
    if status == 200:
        await stored_sources(harness).find(caller_of(person), source_id)
        return True
    with pytest.raises(NodeError) as raised:
        await stored_sources(harness).find(caller_of(person), source_id)
    assert (raised.value.code, raised.value.retryable, status) == ("data-source-not-found", False, 404)
    return False


@pytest.mark.every_database
async def test_only_readers_of_a_data_source_may_use_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    source_id, guest = await create_source(people.owner), people.colleague
    everybody = (people.owner, people.admin, guest, people.stranger)

    async def users() -> list[UserClient]:
        return [person for person in everybody if await is_usable(harness, person, source_id)]

    assert await users() == [people.owner, people.admin]
    await share(people.owner, source_id, guest.user.id)
    assert await users() == [people.owner, people.admin, guest]
    gone = await people.owner.api.delete(f"{SOURCES}/{source_id}/share/{guest.user.id}")
    assert (gone.status_code, await users()) == (204, [people.owner, people.admin])
    public = await people.owner.api.put(f"{SOURCES}/{source_id}/visibility", json={"isPublic": True})
    assert public.json()["isPublic"]
    assert await users() == [people.owner, people.admin, guest]
    await people.admin.api.put(f"{SOURCES}/{source_id}/visibility", json={"isPublic": False})
    assert await users() == [people.owner, people.admin]
    assert (await people.owner.api.delete(f"{SOURCES}/{source_id}")).status_code == 204
    assert await users() == []


async def test_a_guest_uses_and_neither_changes_nor_deletes_nor_shares(people: OrganizationUsers) -> None:
    source_id, guest = await create_source(people.owner), people.colleague
    answer = await share(people.owner, source_id, guest.user.id)
    told = {"message": "Data source shared successfully", "dataSourceId": source_id, "userId": guest.user.id}
    assert (answer.status_code, answer.json()) == (200, told)
    assert (await share(people.owner, source_id, guest.user.id)).headers["ETag"] == answer.headers["ETag"]
    shares = (await guest.api.get(f"{SOURCES}/{source_id}/share")).json()
    assert [one["userId"] for one in shares["sharedWith"]] == [guest.user.id]
    path = f"{SOURCES}/{source_id}"
    for response in (
        await change(guest, source_id, name="Taken over"),
        await guest.api.delete(path),
        await guest.api.delete(f"{path}?force=true"),
        await share(guest, source_id, people.admin.user.id),
        await guest.api.delete(f"{path}/share/{guest.user.id}"),
        await guest.api.put(f"{path}/visibility", json={"isPublic": True}),
    ):
        assert_refused(response, 403, "not-owner")


async def test_a_data_source_is_shared_with_other_users_of_the_organisation_alone(
    people: OrganizationUsers,
) -> None:
    source_id = await create_source(people.owner)
    for user_id in (people.stranger.user.id, "user_nobody", ""):
        assert_refused(await share(people.owner, source_id, user_id), 404, "not-found")
    for person, user in (
        (people.owner, people.owner.user),
        (people.admin, people.admin.user),
        (people.admin, people.owner.user),
    ):
        assert_refused(await share(person, source_id, user.id), 422, "validation-failed")
    assert_refused(
        await people.owner.api.delete(f"{SOURCES}/{source_id}/share/user_nobody"), 404, "not-found"
    )


async def test_a_change_reaches_runs_within_seconds_and_another_organisation_never(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_id = await create_source(people.owner)
    found = stored_sources(harness)
    assert (await found.find(caller_of(people.owner), source_id)).revision == 1
    await change(people.owner, source_id, name="Changed")
    assert (await found.find(caller_of(people.owner), source_id)).revision == 1
    for person in (people.stranger, people.colleague):
        with pytest.raises(NodeError) as raised:
            await found.find(caller_of(person), source_id)
        assert raised.value.code == "data-source-not-found"
    monkeypatch.setattr("execution.stored_data_sources.monotonic", lambda: float("inf"))
    assert (await found.find(caller_of(people.owner), source_id)).revision == 2


async def test_data_encrypted_with_another_secret_is_reported_without_a_crash(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    source_id = await create_source(people.owner)
    with pytest.raises(NodeError, match="enter them again") as raised:
        await stored_sources(harness, "another secret of more than thirty-two characters").find(
            caller_of(people.owner), source_id
        )
    assert raised.value.code == "data-source-unreadable"


async def test_secrets_of_one_data_source_do_not_decrypt_for_another(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    first, second = await create_source(people.owner), await create_source(people.stranger)

    async def move(connection: AsyncConnection) -> None:
        encrypted = await connection.scalar(
            select(col(DataSource.encrypted)).where(col(DataSource.id) == first)
        )
        await connection.execute(
            update(DataSource).where(col(DataSource.id) == second).values(encrypted=encrypted)
        )

    await harness.gateway.database.transaction(move)
    with pytest.raises(NodeError) as raised:
        await stored_sources(harness).find(caller_of(people.stranger), second)
    assert raised.value.code == "data-source-unreadable"


@pytest.mark.every_database
async def test_a_workflow_becomes_active_only_with_data_sources_that_its_owner_can_use(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    bearer = {"type": "http-bearer", "settings": {}, "secrets": {"token": "a-token-of-the-tests"}}
    good, foreign = await create_source(owner, **bearer), await create_source(people.stranger, **bearer)
    secret = await create_source(
        owner, name="Signs", type="webhook-secret", settings={}, secrets={"secret": "a secret of webhooks"}
    )
    broken = await create_source(owner, **bearer)

    async def break_it(connection: AsyncConnection) -> None:
        await connection.execute(
            update(DataSource).where(col(DataSource.id) == broken).values(encrypted=b"x")
        )

    await harness.gateway.database.transaction(break_it)

    def asking(source_id: str) -> list[dict[str, Any]]:
        config = {"url": "https://a.b", "dataSource": source_id}
        return [TRIGGER, {"id": "ask", "nodeId": "http-request", "config": config}]

    edges = [{"source": TRIGGER["id"], "target": "ask"}]
    for source_id, code in (
        ("SG-a-pasted-signing-key", "data-source-not-found"),
        (foreign, "data-source-not-found"),
        (secret, "wrong-data-source"),
        (broken, "data-source-unreadable"),
    ):
        workflow_id = await owner.create(nodes=asking(source_id), connections=edges)
        answer = await owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "active"})
        assert_refused(answer, 422, "validation-failed")
        (problem,) = answer.json()["error"]["details"]
        assert (problem["path"], problem["code"]) == ("nodes.ask.config.dataSource", code)

    workflow_id = await owner.create(nodes=asking(good), connections=edges)
    path = f"{WORKFLOWS}/{workflow_id}"
    assert (await owner.api.put(f"{path}/status", json={"status": "active"})).status_code == 200
    edited = await owner.api.put(path, json={"nodes": asking(secret)})
    assert_refused(edited, 422, "validation-failed")
    assert (await owner.api.delete(f"{SOURCES}/{good}?force=true")).status_code == 204
    # A data source that was deleted since doesn't block other edits of an active workflow.
    more = [*asking(good), {"id": "note", "nodeId": "log", "config": {"message": "x"}}]
    assert (await owner.api.put(path, json={"nodes": more})).status_code == 200


# ── the end of one ──────────────────────────────────────────────────────────────────────────────────────────


async def test_data_sources_in_use_are_deleted_only_by_force(people: OrganizationUsers) -> None:
    token = {"name": "Token", "type": "http-bearer", "secrets": {"token": "t"}}
    source_id = (await people.owner.api.post(SOURCES, json=token)).json()["dataSourceId"]
    node = {"id": "ask", "nodeId": "http-request", "config": {"url": "https://a.b", "dataSource": source_id}}
    own = await people.owner.create(name="Mine", nodes=[TRIGGER, node])
    hidden = await people.colleague.create(name="Hidden", nodes=[TRIGGER, node])
    elsewhere = await people.stranger.create(nodes=[TRIGGER, node])
    path = f"{SOURCES}/{source_id}"

    response = await people.owner.api.delete(path)
    assert_refused(response, 409, "data-source-in-use")
    (named,) = response.json()["error"]["details"]
    assert (named["path"], named["message"]) == (f"workflows.{own}", "Mine")
    assert hidden not in response.text
    assert elsewhere not in response.text

    # The deployed version needs it, though the graph names it no more.
    edges = [{"source": TRIGGER["id"], "target": "ask"}]
    connected = await people.owner.api.put(f"{WORKFLOWS}/{own}", json={"connections": edges})
    assert connected.status_code == 200, connected.text
    deployed = await people.owner.api.post(f"{WORKFLOWS}/{own}/deploy")
    assert deployed.status_code in {200, 202}, deployed.text
    [used] = (await people.owner.api.get(f"{path}/usage")).json()["workflows"]
    assert (used["deployedVersion"], used["isNamedByDeployed"]) == (used["version"], True)
    without = [TRIGGER, {**node, "config": {"url": "https://a.b"}}]
    edited = await people.owner.api.put(f"{WORKFLOWS}/{own}", json={"nodes": without})
    assert edited.status_code == 200, edited.text
    [used] = (await people.owner.api.get(f"{path}/usage")).json()["workflows"]
    assert (used["workflowId"], used["nodes"], used["isNamedByDeployed"]) == (own, [], True)
    (named,) = (await people.owner.api.delete(path)).json()["error"]["details"]
    assert named["path"] == f"workflows.{own}"

    assert (await people.owner.api.post(f"{WORKFLOWS}/{own}/undeploy")).status_code == 200
    response = await people.owner.api.delete(path)
    assert_refused(response, 409, "data-source-in-use")
    assert response.json()["error"]["details"] == []
    assert (await people.owner.api.delete(f"{path}?force=true")).status_code == 204
    assert_refused(await people.owner.api.get(path), 404, "not-found")
    assert_refused(await people.owner.api.delete(path), 404, "not-found")


async def test_changes_leave_a_trace_that_says_nothing_of_secrets(people: OrganizationUsers) -> None:
    source_id = await create_source(people.owner)
    await change(people.owner, source_id, secrets={"password": f"{CANARY}-2"})
    await share(people.owner, source_id, people.colleague.user.id)
    await people.owner.api.put(f"{SOURCES}/{source_id}/visibility", json={"isPublic": True})
    await people.owner.api.delete(f"{SOURCES}/{source_id}")
    trace = (await people.admin.api.get(f"/api/v1/audit?objectId={source_id}&sort=createdAt:asc")).json()
    entries = trace["entries"]
    assert [entry["action"] for entry in entries] == [
        "data-source.created", "data-source.updated", "share.added", "data-source.visibility-set",
        "data-source.deleted",
    ]  # fmt: skip
    hashes = [(entry["beforeHash"], entry["afterHash"]) for entry in entries]
    assert [before for before, _ in hashes[1:]] == [after for _, after in hashes[:-1]]
    assert (hashes[0][0], hashes[-1][1]) == (None, None)
