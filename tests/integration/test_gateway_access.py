"""Keys, users and organizations: authentication, scopes and expiry."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.access.bootstrap import bootstrap
from gateway.http import authentication
from gateway.http.key_refusals import KeyRefusals
from models import access_store
from models.access import ApiKey, KeyScope, UserRole
from models.database import Database, parse_url
from models.errors import LockWaitTimeout
from models.settings import InvalidSettings
from tests import databases
from tests.integration.gateway_harness import GRAPH, SECRET, GatewayHarness, assert_refused
from tests.services import PostgresServer

KEYS = "/api/v1/auth/keys"
USERS = "/api/v1/auth/users"
WHOAMI = "/api/v1/auth/whoami"
PATIENCE_SECONDS = 60.0


async def wait_until_true(condition: AsyncIterator[bool], *, within_seconds: float) -> float:
    """Wait until a condition holds, and return the duration of the wait."""
    started = monotonic()
    async for holds in condition:
        if holds:
            return monotonic() - started
        assert monotonic() - started < within_seconds
        await asyncio.sleep(0.05)
    raise AssertionError


async def test_whoami_shows_the_user_of_a_key(harness: GatewayHarness) -> None:
    people = await harness.people()
    shown = (await people.owner.api.get(WHOAMI)).json()
    assert shown["userId"] == people.owner.user.id
    assert shown["organizationId"] == people.owner.user.organization_id
    assert shown["email"] == people.owner.user.email
    assert shown["role"] == "member"
    assert "workflows:read" in shown["scopes"]


@pytest.mark.parametrize(
    "key", [None, "", "nothing", "sk-00" + "0" * 52, "Bearer nothing", "x" * 10_000, "é", "' OR 1=1 --"]
)
async def test_without_a_valid_key_every_answer_is_the_same(harness: GatewayHarness, key: str | None) -> None:
    client = await harness.client(address="10.0.0.2")
    headers = {} if key is None else {b"X-API-Key": key.encode("latin-1")}
    response = await client.get(WHOAMI, headers=headers)
    assert_refused(response, 401, "unauthorized")
    assert response.headers["WWW-Authenticate"] == "ApiKey"
    assert response.json()["error"]["message"] == "Send a valid API key in the X-API-Key header"


async def test_a_key_counts_in_its_own_header_alone(harness: GatewayHarness) -> None:
    people = await harness.people()
    client = await harness.client(address="10.0.0.3")
    for headers in (
        {"Authorization": f"Bearer {people.owner.key}"},
        {"Cookie": f"X-API-Key={people.owner.key}"},
    ):
        assert_refused(await client.get(WHOAMI, headers=headers), 401, "unauthorized")
    assert_refused(await client.get(f"{WHOAMI}?X-API-Key={people.owner.key}"), 401, "unauthorized")


async def test_headers_about_tenants_and_addresses_do_not_change_the_caller(harness: GatewayHarness) -> None:
    people = await harness.people()
    headers = {
        "X-Organization-Id": people.stranger.user.organization_id,
        "X-User-Id": people.admin.user.id,
        "X-HTTP-Method-Override": "DELETE",
        "Host": "elsewhere/healthz?",
        "X-Original-URL": "/healthz",
    }
    shown = (await people.owner.api.get(WHOAMI, headers=headers)).json()
    assert shown["userId"] == people.owner.user.id


async def test_each_scope_opens_its_own_routes_and_no_other(harness: GatewayHarness) -> None:
    organization = await harness.organization()
    reader = await harness.person(organization, scopes=[KeyScope.WORKFLOWS_READ])
    writer = await harness.person(organization, scopes=[KeyScope.WORKFLOWS_WRITE])
    assert (await reader.api.get("/api/v1/workflows")).status_code == 200
    assert (await writer.api.post("/api/v1/workflows", json={"name": "x"})).status_code == 201
    refusal = await reader.api.post("/api/v1/workflows", json={"name": "x"})
    assert_refused(refusal, 403, "scope-required")
    assert "workflows:write" in refusal.json()["error"]["message"]
    assert_refused(await writer.api.get("/api/v1/workflows"), 403, "scope-required")
    assert_refused(await writer.api.get(KEYS), 403, "scope-required")
    assert (await reader.api.get(WHOAMI)).status_code == 200


async def test_a_key_is_shown_once_and_kept_as_a_hash(harness: GatewayHarness) -> None:
    people = await harness.people()
    response = await people.owner.api.post(KEYS, json={"name": "laptop", "scopes": ["workflows:read"]})
    assert response.status_code == 201
    made = response.json()
    key = made.pop("key")
    assert key.startswith("sk-")
    assert len(key) > 50
    assert made["name"] == "laptop"
    assert made["scopes"] == ["workflows:read"]
    assert key.startswith(made["prefix"])
    listed = (await people.owner.api.get(KEYS)).json()
    assert made in listed["keys"]
    assert (listed["count"], listed["limit"], listed["offset"]) == (2, 20, 0)
    assert key not in str(listed)
    async with harness.gateway.database.read() as connection:
        row = (await connection.execute(select(ApiKey).where(col(ApiKey.id) == made["id"]))).mappings().one()
    assert key not in str(dict(row))
    assert (await (await harness.client(key)).get(WHOAMI)).json()["keyId"] == made["id"]


async def test_a_key_gets_no_scope_that_its_maker_lacks(harness: GatewayHarness) -> None:
    organization = await harness.organization()
    maker = await harness.person(organization, scopes=[KeyScope.KEYS_WRITE, KeyScope.WORKFLOWS_READ])
    refusal = await maker.api.post(KEYS, json={"name": "more", "scopes": ["workflows:write"]})
    assert_refused(refusal, 403, "scope-required")
    assert "workflows:write" in refusal.json()["error"]["message"]
    same = await maker.api.post(KEYS, json={"name": "same"})
    assert same.json()["scopes"] == ["keys:write", "workflows:read"]
    none = await maker.api.post(KEYS, json={"name": "none", "scopes": []})
    assert none.json()["scopes"] == []


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "x", "scopes": ["everything"]}, "scopes.0"),
        ({"name": "x", "expiresInSeconds": 0}, "expiresInSeconds"),
        ({"name": "x", "expiresInSeconds": 10**12}, "expiresInSeconds"),
        ({"name": "x", "expiresAt": "2001-01-01T00:00:00Z"}, "expiresAt"),
        ({"name": "x", "expiresAt": "9999-12-31T23:59:59Z"}, "expiresAt"),
        ({"name": "x", "expiresAt": "tomorrow"}, "expiresAt"),
        ({"name": "x", "expiresAt": "2030-01-01T00:00:00Z", "expiresInSeconds": 5}, "expiresAt"),
    ],
)
async def test_a_key_that_makes_no_sense_is_refused(
    harness: GatewayHarness, body: dict[str, object], path: str
) -> None:
    people = await harness.people()
    response = await people.owner.api.post(KEYS, json=body)
    assert_refused(response, 422, "validation-failed")
    assert [detail["path"] for detail in response.json()["error"]["details"]] == [path]


async def test_a_key_stops_working_when_it_expires(harness: GatewayHarness) -> None:
    people = await harness.people()
    made = (await people.owner.api.post(KEYS, json={"name": "brief", "expiresInSeconds": 2})).json()
    client = await harness.client(made["key"], address="10.0.0.4")
    assert (await client.get(WHOAMI)).status_code == 200

    async def is_refused() -> AsyncIterator[bool]:
        while True:
            yield (await client.get(WHOAMI)).status_code == 401

    assert await wait_until_true(is_refused(), within_seconds=PATIENCE_SECONDS) > 0.5


@pytest.mark.every_database
async def test_a_revocation_works_before_long(harness: GatewayHarness) -> None:
    people = await harness.people()
    made = (await people.owner.api.post(KEYS, json={"name": "lost"})).json()
    client = await harness.client(made["key"], address="10.0.0.5")
    assert (await client.get(WHOAMI)).status_code == 200
    for _ in range(2):
        assert (await people.owner.api.delete(f"{KEYS}/{made['id']}")).status_code == 204

    async def is_refused() -> AsyncIterator[bool]:
        while True:
            yield (await client.get(WHOAMI)).status_code == 401

    assert await wait_until_true(is_refused(), within_seconds=PATIENCE_SECONDS)
    assert authentication.CACHE_SECONDS <= 1
    listed = (await people.owner.api.get(KEYS)).json()["keys"]
    assert next(key for key in listed if key["id"] == made["id"])["revokedAt"] is not None


async def test_the_last_use_of_a_key_is_noted(harness: GatewayHarness) -> None:
    people = await harness.people()
    await people.owner.api.get(WHOAMI)

    async def is_noted() -> AsyncIterator[bool]:
        while True:
            listed = (await people.owner.api.get(KEYS)).json()["keys"]
            yield listed[0]["lastUsedAt"] is not None

    await wait_until_true(is_noted(), within_seconds=PATIENCE_SECONDS)
    used = (await people.owner.api.get(KEYS)).json()["keys"][0]
    assert used["lastRoute"] in {f"GET {WHOAMI}", f"GET {KEYS}"}
    assert re.fullmatch("[0-9a-f]{12}", used["lastAddressHash"])


@pytest.mark.every_database
async def test_a_key_lists_the_scopes_that_it_lacked(harness: GatewayHarness) -> None:
    people = await harness.people()
    narrow = await people.owner.api.post(KEYS, json={"name": "narrow", "scopes": ["workflows:read"]})
    api = await harness.client(narrow.json()["key"])
    workflow_id = await people.owner.create(status="active", **GRAPH)
    for _ in range(3):
        assert_refused(await api.post("/api/v1/workflows", json={"name": "x"}), 403, "scope-required")
    assert_refused(await api.post(f"/api/v1/workflows/{workflow_id}/enqueue", json={}), 403, "scope-required")
    for path in ("/api/v1/audit", f"/api/v1/workflows/{workflow_id}x"):
        assert (await api.get(path)).status_code in {403, 404}
    browser = await harness.browser()
    await browser.post("/session", json={"key": narrow.json()["key"]})
    assert (await browser.get(KEYS)).status_code == 403

    async def read() -> Mapping[str, Any]:
        listed = (await people.owner.api.get(KEYS)).json()["keys"]
        return next(key for key in listed if key["id"] == narrow.json()["id"])

    async def are_counted() -> AsyncIterator[bool]:
        while True:
            yield sum(one["count"] for one in (await read())["refusals"]) == 4

    assert await wait_until_true(are_counted(), within_seconds=PATIENCE_SECONDS)
    assert [(one["scope"], one["count"], one["lastRoute"]) for one in (await read())["refusals"]] == [
        ("workflows:write", 3, "POST /api/v1/workflows"),
        ("workflows:execute", 1, "POST /api/v1/workflows/{id}/enqueue"),
    ]
    await forget_days(harness, narrow.json()["id"])
    assert (await read())["refusals"] == []


async def test_refusals_of_thousands_of_keys_are_counted_by_several_gateways(
    harness: GatewayHarness,
) -> None:
    refusals, of_another = harness.gateway.key_refusals, KeyRefusals(harness.gateway.database)
    ids = [f"key_many{number}" for number in range(6_000)]
    for key_id in ids:
        refusals.note(key_id, "workflows:write", "POST /api/v1/workflows")
    for _ in range(2):
        of_another.note(ids[0], "workflows:write", "POST /api/v1/workflows")
    await asyncio.gather(refusals.drain(), of_another.drain())
    async with harness.gateway.database.read() as connection:
        counted = await connection.scalar(
            text("SELECT sum(count) FROM key_refusal WHERE key_id LIKE 'key_many%'")
        )
    assert counted == len(ids) + 2


async def test_refusals_are_counted_after_locks_of_another_gateway(harness: GatewayHarness) -> None:
    database, locked = harness.gateway.database, iter([True, True])

    async def transact(work: Callable[[AsyncConnection], Awaitable[None]]) -> None:
        if next(locked, False):
            raise LockWaitTimeout("Another transaction holds a lock")
        await database.transaction(work)

    refusals = KeyRefusals(cast("Database", SimpleNamespace(clock=database.clock, transaction=transact)))
    refusals.note("key_locked", "workflows:write", "POST /api/v1/workflows")
    await refusals.drain()
    async with database.read() as connection:
        counted = await connection.scalar(text("SELECT count FROM key_refusal WHERE key_id = 'key_locked'"))
    assert counted == 1


async def forget_days(harness: GatewayHarness, key_id: str) -> None:
    """Move the counted refusals of a key eight days back."""

    async def move(connection: AsyncConnection) -> None:
        await connection.execute(
            text("UPDATE key_refusal SET day = day - :time WHERE key_id = :key"),
            {"time": timedelta(days=8) // timedelta(microseconds=1), "key": key_id},
        )

    await harness.gateway.database.transaction(move)


async def test_members_manage_their_own_keys_and_admins_those_of_the_organisation(
    harness: GatewayHarness,
) -> None:
    people = await harness.people()
    mine = (await people.owner.api.post(KEYS, json={"name": "mine"})).json()["id"]
    assert mine in [key["id"] for key in (await people.owner.api.get(KEYS)).json()["keys"]]
    assert mine in [key["id"] for key in (await people.admin.api.get(KEYS)).json()["keys"]]
    for other in (people.colleague, people.stranger):
        assert mine not in [key["id"] for key in (await other.api.get(KEYS)).json()["keys"]]
        assert_refused(await other.api.delete(f"{KEYS}/{mine}"), 404, "not-found")
    assert (await people.admin.api.delete(f"{KEYS}/{mine}")).status_code == 204


async def test_an_admin_makes_keys_for_users_of_the_organisation_alone(harness: GatewayHarness) -> None:
    people = await harness.people()
    body = {"name": "for you", "scopes": ["workflows:read"], "userId": people.owner.user.id}
    made = await people.admin.api.post(KEYS, json=body)
    assert made.json()["userId"] == people.owner.user.id
    assert (await (await harness.client(made.json()["key"])).get(WHOAMI)).json()["role"] == "member"
    for other in (people.colleague, people.stranger):
        assert_refused(await other.api.post(KEYS, json=body), 404, "not-found")


async def test_an_admin_adds_users(harness: GatewayHarness) -> None:
    people = await harness.people()
    response = await people.admin.api.post(USERS, json={"email": "Ada@Example.com", "name": "Ada"})
    assert response.status_code == 201
    made = response.json()
    assert (made["email"], made["name"], made["role"]) == ("ada@example.com", "Ada", "member")
    listed = (await people.admin.api.get(USERS)).json()
    assert made in listed["users"]
    assert listed["count"] == 4
    assert_refused(await people.admin.api.post(USERS, json={"email": "ada@example.com"}), 409, "email-taken")
    same_elsewhere = await people.stranger.api.post(USERS, json={"email": "ada@example.com", "role": "admin"})
    assert same_elsewhere.status_code == 201
    assert made["id"] not in str((await people.stranger.api.get(USERS)).json())


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, "email"),
        ({"email": "nobody"}, "email"),
        ({"email": "a b@example.com"}, "email"),
        ({"email": "x" * 250 + "@example.com"}, "email"),
        ({"email": "a@example.com", "role": "owner"}, "role"),
        ({"email": "a@example.com", "name": "x" * 201}, "name"),
    ],
)
async def test_a_user_that_makes_no_sense_is_refused(
    harness: GatewayHarness, body: dict[str, object], path: str
) -> None:
    people = await harness.people()
    response = await people.admin.api.post(USERS, json=body)
    assert_refused(response, 422, "validation-failed")
    assert [detail["path"] for detail in response.json()["error"]["details"]] == [path]


async def test_only_admins_with_the_scope_see_and_add_users(harness: GatewayHarness) -> None:
    people = await harness.people()
    for request in (people.owner.api.get(USERS), people.owner.api.post(USERS, json={"email": "a@b.c"})):
        assert_refused(await request, 403, "admin-required")
    organization = await harness.organization()
    narrow = await harness.person(organization, UserRole.ADMIN, [KeyScope.WORKFLOWS_READ])
    assert_refused(await narrow.api.get(USERS), 403, "scope-required")


@pytest.mark.parametrize(
    ("first", "neighbor", "other"),
    [
        ("10.7.7.7", "10.7.7.7", "10.7.7.8"),
        ("2001:db8:7::1", "2001:db8:7:0:ffff::2", "2001:db8:7:1::1"),
    ],
)
async def test_an_address_that_keeps_failing_is_slowed_down_but_no_valid_key_is(
    harness: GatewayHarness, first: str, neighbor: str, other: str
) -> None:
    people = await harness.people()
    answers = []
    for number in range(60):
        guess = await harness.client(f"sk-00guess{number}", address=neighbor if number % 2 else first)
        answers.append(await guess.get(WHOAMI))
    assert [answer.status_code for answer in answers] == [401] * 50 + [429] * 10
    assert 0 < int(answers[-1].headers["Retry-After"]) <= 60
    for address in (first, neighbor):
        unseen = await harness.client(
            (await harness.person(await harness.organization())).key, address=address
        )
        assert (await unseen.get(WHOAMI)).status_code == 200
    wrong = await harness.client("sk-00guess", address=other)
    assert_refused(await wrong.get(WHOAMI), 401, "unauthorized")
    assert (await (await harness.client(people.admin.key, address=first)).get(WHOAMI)).status_code == 200


async def test_many_requests_with_one_key_ask_the_database_once(
    harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = await harness.people()
    asked = _count_hashes(monkeypatch)
    answers = await asyncio.gather(*(people.owner.api.get(WHOAMI) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(asked) == 1


async def test_many_wrong_keys_share_queries_with_right_ones(
    harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = await harness.people()
    asked = _count_hashes(monkeypatch)
    guesses = [await harness.client(f"sk-00guess{number}", address="10.7.7.9") for number in range(100)]
    answers = await asyncio.gather(
        *(client.get(WHOAMI) for client in (*guesses[:50], people.owner.api, *guesses[50:]))
    )
    assert answers.pop(50).status_code == 200
    assert sorted(answer.status_code for answer in answers) == [401] * 50 + [429] * 50
    assert len(asked) < 10


def _count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that collects the number of key hashes in each later query."""
    asked: list[int] = []
    find_keys = access_store.find_keys

    async def counted(database: Database, hashes: Collection[str]) -> dict[str, access_store.FoundKey]:
        asked.append(len(hashes))
        return await find_keys(database, hashes)

    monkeypatch.setattr(access_store, "find_keys", counted)
    return asked


async def test_a_key_that_an_admin_made_has_no_more_rights_than_its_user(harness: GatewayHarness) -> None:
    people = await harness.people()
    made = (await people.admin.api.post(KEYS, json={"name": "x", "userId": people.owner.user.id})).json()
    assert "users:write" not in made["scopes"]
    assert_refused(await (await harness.client(made["key"])).get(USERS), 403, "admin-required")


# ── the first key ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["sqlite", "postgresql"])
async def empty_database(
    request: pytest.FixtureRequest, postgres: PostgresServer, tmp_path: Path
) -> AsyncIterator[Database]:
    if request.param == "postgresql":
        url = await databases.create_database(postgres, "gateway_bootstrap")
    else:
        url = await databases.create_sqlite_database(tmp_path / "empty.db")
    database = Database(parse_url(url))
    yield database
    await database.close()


@pytest.mark.every_database
async def test_the_first_organisation_is_made_once_however_many_gateways_start(
    empty_database: Database,
) -> None:
    key = "a-first-key-of-the-operator"
    made = await asyncio.gather(*(bootstrap(empty_database, key, SECRET.encode()) for _ in range(4)))
    assert sorted(made) == [False, False, False, True]
    assert not await bootstrap(empty_database, "another-key-of-the-operator", SECRET.encode())
    async with empty_database.read() as connection:
        (organization,) = await access_store.list_organizations(connection)
        count, users = await access_store.list_users(connection, organization.id, limit=10, offset=0)
        _, keys = await access_store.list_keys(connection, organization.id, user_id=None, limit=10, offset=0)
    assert count == 1
    assert users[0].role == "admin"
    assert [set(row.scopes) for row in keys] == [set(KeyScope)]
    found = await access_store.find_keys(empty_database, [keys[0].hash])
    assert found[keys[0].hash].is_valid(datetime.now(UTC) + timedelta(days=10_000))


@pytest.mark.every_database
@pytest.mark.parametrize("key", ["short", "with a space in the middle of it", "with-ünicode-characters"])
async def test_a_weak_first_key_is_refused(empty_database: Database, key: str) -> None:
    with pytest.raises(InvalidSettings, match="PILOTFLAME_BOOTSTRAP_API_KEY"):
        await bootstrap(empty_database, key, SECRET.encode())
