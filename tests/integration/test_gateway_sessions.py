"""Sign-in of browsers: sessions stand for keys, end with them, and serve no other site."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from msgspec.structs import replace
from sqlalchemy import select, update
from sqlmodel import col

from gateway.http import authentication, sessions
from models.access import DEFAULT_SCOPES, SCOPES_OF_ROLES, KeyScope, UserRole
from models.audit import AuditEntry
from models.browser_session import IDLE_LIFETIME, LIFETIME, BrowserSession
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient, assert_refused

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

WHOAMI = "/api/v1/auth/whoami"


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look keys and sessions up for each request, so that their end shows at once."""
    monkeypatch.setattr(sessions, "KEPT_SECONDS", 0.001)
    monkeypatch.setattr(authentication, "CACHE_SECONDS", 0.0)


async def sign_in(harness: GatewayHarness, key: str, **where: str) -> httpx2.AsyncClient:
    browser = await harness.browser(**where)
    answer = await browser.post("/session", json={"key": key})
    assert answer.status_code == 201, answer.text
    return browser


async def actions(harness: GatewayHarness, organization_id: str) -> list[str]:
    statement = select(col(AuditEntry.action)).where(col(AuditEntry.organization_id) == organization_id)
    async with harness.gateway.database.read() as connection:
        return sorted((await connection.execute(statement)).scalars())


async def change_row(harness: GatewayHarness, session_id: str, **values: Any) -> None:  # noqa: ANN401 - values of columns
    async def change(connection: AsyncConnection) -> None:
        await connection.execute(
            update(BrowserSession).where(col(BrowserSession.id) == session_id).values(**values)
        )

    await harness.gateway.database.transaction(change)


@pytest.mark.every_database
async def test_a_session_is_its_key_until_it_is_signed_out(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    browser = await harness.browser()
    answer = await browser.post("/session", json={"key": people.owner.key})
    session = answer.json()
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert "Path=/" in cookie
    assert "Secure" not in cookie  # plain HTTP, on this machine only
    mine = (await people.owner.api.get(WHOAMI)).json()
    assert (await browser.get(WHOAMI)).json() == mine
    assert session["keyId"] == mine["keyId"]
    assert session["userAgent"] == "A browser"
    assert (await browser.get("/api/v1/auth/sessions")).json()["sessions"][0] == {
        **session,
        "isCurrent": True,
    }
    assert (await people.admin.api.get(f"/api/v1/auth/sessions/{session['id']}")).json()["isCurrent"] is False

    secret = browser.cookies["pilotflame-loopback"]
    gone = await browser.delete("/session")
    assert gone.status_code == 204
    assert "Max-Age=0" in gone.headers["Set-Cookie"]
    browser.cookies.set("pilotflame-loopback", secret, domain="localhost.local")
    assert_refused(
        await browser.get(WHOAMI, headers={"Cookie": f"pilotflame-loopback={secret}"}), 401, "unauthorized"
    )
    found = await actions(harness, people.owner.user.organization_id)
    assert [one for one in found if one.startswith("session.")] == ["session.created", "session.ended"]


async def test_a_sign_in_replaces_the_session_before_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    browser = await sign_in(harness, people.owner.key)
    earlier = browser.cookies["pilotflame-loopback"]
    await browser.post("/session", json={"key": people.owner.key})
    assert browser.cookies["pilotflame-loopback"] != earlier
    assert (await browser.get("/api/v1/auth/sessions")).json()["count"] == 1
    other = await harness.browser()
    assert_refused(
        await other.get(WHOAMI, headers={"Cookie": f"pilotflame-loopback={earlier}"}), 401, "unauthorized"
    )


async def test_a_session_that_another_client_ends_opens_nothing(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    browser = await sign_in(harness, people.owner.key)
    path = f"/api/v1/auth/sessions/{(await browser.get('/api/v1/auth/sessions')).json()['sessions'][0]['id']}"
    assert_refused(await people.colleague.api.delete(path), 404, "not-found")
    assert (await browser.get(WHOAMI)).status_code == 200
    assert (await people.admin.api.delete(path)).status_code == 204
    assert_refused(await browser.get(WHOAMI), 401, "unauthorized")
    assert_refused(await people.admin.api.get(path), 404, "not-found")


async def test_a_session_ends_with_its_key_and_by_itself(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    now = harness.gateway.clock()
    for seen, created in (
        (now - IDLE_LIFETIME, now - IDLE_LIFETIME),
        (now, now - LIFETIME),
    ):
        browser = await sign_in(harness, people.owner.key)
        session_id = (await browser.get("/api/v1/auth/sessions")).json()["sessions"][0]["id"]
        await change_row(harness, session_id, last_seen_at=seen, created_at=created)
        assert_refused(await browser.get(WHOAMI), 401, "unauthorized")

    browser = await sign_in(harness, people.owner.key)
    key_id = (await browser.get(WHOAMI)).json()["keyId"]
    assert (await people.admin.api.delete(f"/api/v1/auth/keys/{key_id}")).status_code == 204
    assert_refused(await browser.get(WHOAMI), 401, "unauthorized")


@pytest.mark.every_database
async def test_a_used_session_stays(harness: GatewayHarness, people: OrganizationUsers) -> None:
    browser = await sign_in(harness, people.owner.key)
    session_id = (await browser.get("/api/v1/auth/sessions")).json()["sessions"][0]["id"]
    idle_since = harness.gateway.clock() - IDLE_LIFETIME + timedelta(minutes=1)
    await change_row(harness, session_id, last_seen_at=idle_since)
    assert (await browser.get(WHOAMI)).status_code == 200
    await harness.gateway.sessions.close()
    shown = (await browser.get(f"/api/v1/auth/sessions/{session_id}")).json()
    assert shown["lastSeenAt"] >= shown["createdAt"]


@pytest.mark.parametrize(
    ("headers", "is_allowed"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost:8000"}, False),
        ({"Sec-Fetch-Site": "none"}, False),
        ({"Origin": "http://localhost:8000"}, True),
        ({"Origin": "http://localhost:9000"}, False),
        ({"Origin": "null"}, False),
        ({}, False),
    ],
)
async def test_only_pages_of_this_server_change_anything(
    harness: GatewayHarness, people: OrganizationUsers, headers: dict[str, str], *, is_allowed: bool
) -> None:
    browser = await sign_in(harness, people.owner.key)
    browser.headers.pop("Sec-Fetch-Site")
    created = await browser.post("/api/v1/workflows", json={"name": "By a page"}, headers=headers)
    signed_in = await browser.post("/session", json={"key": people.owner.key}, headers=headers)
    if is_allowed:
        assert (created.status_code, signed_in.status_code) == (201, 201)
    else:
        assert_refused(created, 403, "cross-site-request")
        assert_refused(signed_in, 403, "cross-site-request")
    assert (await browser.get(WHOAMI, headers=headers)).status_code == 200


async def test_a_request_with_a_key_never_looks_at_cookies(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    browser = await sign_in(harness, people.owner.key)
    for wrong in ("sk-wrong", "", "x" * 300):
        assert_refused(await browser.get(WHOAMI, headers={"X-API-Key": wrong}), 401, "unauthorized")
    by_key = await browser.get(WHOAMI, headers={"X-API-Key": people.colleague.key})
    assert by_key.json()["userId"] == people.colleague.user.id
    created = await browser.post(
        "/api/v1/workflows",
        json={"name": "By a program"},
        headers={"X-API-Key": people.colleague.key, "Sec-Fetch-Site": "cross-site"},
    )
    assert created.status_code == 201


async def test_plain_http_serves_this_machine_only(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    for where in ({"address": "10.0.0.9"}, {"host": "rebound.example"}, {"host": "127.0.0.1.example"}):
        browser = await harness.browser(**where)
        answer = await browser.post("/session", json={"key": people.owner.key})
        assert_refused(answer, 403, "https-required")
        assert "PILOTFLAME_PUBLIC_URL" in answer.json()["error"]["message"]
    await sign_in(harness, people.owner.key, host="[::1]:8000", address="::1")

    secure = await harness.with_settings(public_url="https://flows.example.com/base")
    # The authenticator of the harness reads the address of its own settings.
    state = replace(
        secure.gateway,
        sessions=sessions.SessionAuthenticator(secure.gateway.database, "https://flows.example.com/base"),
    )
    browser = await secure.browser(address="10.0.0.9", host="flows.example.com")
    answer = await browser.post("/session", json={"key": people.owner.key})
    cookie = answer.headers["Set-Cookie"]
    assert cookie.startswith("__Host-pilotflame=")
    assert "; Secure" in cookie
    assert "Domain" not in cookie
    scope = {
        "method": "POST",
        "headers": [
            (b"cookie", cookie.partition(";")[0].encode()),
            (b"origin", b"https://flows.example.com"),
        ],
    }
    found = await state.sessions.caller(scope)
    assert found is not None
    assert found.user_id == people.owner.user.id


async def test_failed_sign_ins_are_recorded_and_limited(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    key = (await people.owner.api.post("/api/v1/auth/keys", json={"name": "Old"})).json()
    await people.owner.api.delete(f"/api/v1/auth/keys/{key['id']}")
    browser = await harness.browser(address="127.0.0.77")
    for tried in (key["key"], *["sk-00wrong"] * 4, *["no key at all"] * 5):
        assert_refused(await browser.post("/session", json={"key": tried}), 401, "sign-in-refused")
    limited = await browser.post("/session", json={"key": people.owner.key})
    assert_refused(limited, 429, "rate-limited")
    await sign_in(harness, people.owner.key)  # from another address
    listed = await people.admin.api.get("/api/v1/audit?action=sign-in.refused")
    (entry,) = listed.json()["entries"]
    assert (entry["objectId"], entry["userId"]) == (key["id"], people.owner.user.id)


@pytest.mark.every_database
async def test_a_code_signs_in_once_on_this_machine(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    key_id = (await people.owner.api.get(WHOAMI)).json()["keyId"]
    code = harness.gateway.sign_in.issue_code(key_id)
    secure = await harness.with_settings(public_url="https://flows.example.com")
    elsewhere = await secure.browser(address="10.0.0.9", host="flows.example.com")
    assert_refused(await elsewhere.post("/session", json={"code": code}), 401, "sign-in-refused")
    browser = await harness.browser()
    assert (await browser.post("/session", json={"code": code})).status_code == 201
    assert (await browser.get(WHOAMI)).json()["keyId"] == key_id
    again = await harness.browser(address="127.0.0.78")
    assert_refused(await again.post("/session", json={"code": code}), 401, "sign-in-refused")
    for body in ({}, {"key": "sk-1", "code": "x"}, {"key": 1}, {"password": "x"}):
        assert_refused(await again.post("/session", json=body), 422, "validation-failed")


async def scopes_of(user: UserClient) -> set[str]:
    return set((await user.api.get(WHOAMI)).json()["scopes"])


async def test_a_key_has_the_scopes_that_its_role_allows(harness: GatewayHarness) -> None:
    organization = await harness.organization()
    by_role = {role: await harness.person(organization, role) for role in UserRole}
    for role, user in by_role.items():
        assert await scopes_of(user) == SCOPES_OF_ROLES[role]
    assert DEFAULT_SCOPES[UserRole.VIEWER] == {"workflows:read", "datasources:read", "models:read"}
    assert DEFAULT_SCOPES[UserRole.MEMBER] == set(KeyScope) - {"users:write", "tasks:work"}
    viewer, admin = by_role[UserRole.VIEWER], by_role[UserRole.ADMIN]
    assert (await viewer.api.get("/api/v1/workflows")).status_code == 200
    assert_refused(await viewer.api.post("/api/v1/workflows", json={"name": "No"}), 403, "scope-required")
    assert_refused(await viewer.api.post("/api/v1/auth/keys", json={"name": "No"}), 403, "scope-required")

    made = await admin.api.post("/api/v1/auth/keys", json={"name": "For them", "userId": viewer.user.id})
    assert set(made.json()["scopes"]) == DEFAULT_SCOPES[UserRole.VIEWER]
    beyond = {"name": "For them", "userId": viewer.user.id, "scopes": ["workflows:write"]}
    assert_refused(await admin.api.post("/api/v1/auth/keys", json=beyond), 422, "validation-failed")
    invited = await admin.api.post("/api/v1/auth/users", json={"email": "v@example.com", "role": "viewer"})
    assert invited.json()["role"] == "viewer"


@pytest.mark.parametrize("host", ["[", "[::1", "a]b", "//", "@", ":", "%5B", "localhost:port"])
async def test_a_malformed_host_is_no_error_of_the_server(harness: GatewayHarness, host: str) -> None:
    client = await harness.client()
    for method, path in (
        ("GET", WHOAMI),
        ("GET", "/sign-in"),
        ("POST", "/session"),
        ("GET", "/dashboard/runs"),
    ):
        answer = await client.request(method, path, headers={"Host": host}, json={"key": "sk-wrong"})
        assert answer.status_code < 500, answer.text
