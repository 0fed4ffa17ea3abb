"""Invitations: links that make a user with key and session, once, until they expire, for this site alone."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import update
from sqlmodel import col

from models.access import SCOPES_OF_ROLES, UserRole
from models.invitation import Invitation
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient, assert_refused
from tests.integration.test_gateway_ai_models import wait_for_lock
from tests.integration.test_gateway_sessions import WHOAMI, actions, sign_in

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

INVITATIONS = "/api/v1/auth/invitations"


async def invite(admin: UserClient, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    answer = await admin.api.post(INVITATIONS, json={"email": "Grace@Example.com", **fields})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def code_of(made: dict[str, Any]) -> str:
    return str(made["url"].partition("#code=")[2])


async def test_a_link_makes_a_user_with_a_key_and_a_session(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    made = await invite(people.admin, role="viewer")
    assert made["url"].startswith("http://gateway/invitation#code=")
    assert (made["email"], made["state"], made["userId"]) == ("grace@example.com", "open", None)
    browser = await harness.browser()
    code = code_of(made)
    shown = await browser.post("/invitation", json={"code": code, "dryRun": True})
    assert (shown.status_code, shown.json()["organizationName"]) == (200, "An organisation")
    assert (shown.json()["email"], shown.json()["role"]) == ("grace@example.com", "viewer")
    accepted = await browser.post("/invitation", json={"code": code, "name": "Grace Hopper"})
    assert accepted.status_code == 201, accepted.text
    assert "HttpOnly; SameSite=Lax" in accepted.headers["Set-Cookie"]
    me = (await browser.get("/api/v1/auth/whoami")).json()
    assert (me["name"], me["role"], me["userId"]) == ("Grace Hopper", "viewer", accepted.json()["userId"])
    assert set(me["scopes"]) == SCOPES_OF_ROLES[UserRole.VIEWER]
    by_key = await harness.client(accepted.json()["key"])
    assert (await by_key.get("/api/v1/auth/whoami")).json()["userId"] == me["userId"]
    [listed] = (await people.admin.api.get(INVITATIONS)).json()["invitations"]
    assert (listed["state"], listed["userId"]) == ("accepted", me["userId"])
    assert "url" not in listed
    again = await (await harness.browser()).post("/invitation", json={"code": code})
    assert_refused(again, 401, "sign-in-refused")
    assert {"invitation.created", "invitation.accepted", "user.created", "key.created"} <= set(
        await actions(harness, me["organizationId"])
    )


async def test_a_link_ends_the_session_that_the_browser_had(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    browser = await sign_in(harness, people.owner.key)
    earlier = {"Cookie": f"pilotflame-loopback={browser.cookies['pilotflame-loopback']}"}
    code = code_of(await invite(people.admin))
    shown = await browser.post("/invitation", json={"code": code, "dryRun": True})
    assert shown.status_code == 200
    other = await harness.browser()
    assert (await other.get(WHOAMI, headers=earlier)).status_code == 200
    accepted = await browser.post("/invitation", json={"code": code})
    assert accepted.status_code == 201, accepted.text
    assert (await browser.get(WHOAMI)).json()["userId"] == accepted.json()["userId"]
    assert_refused(await other.get(WHOAMI, headers=earlier), 401, "unauthorized")


async def test_a_link_used_twice_at_once_makes_one_user(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    code = code_of(await invite(people.admin))
    browsers = [await harness.browser() for _ in range(4)]
    answers = await asyncio.gather(*(one.post("/invitation", json={"code": code}) for one in browsers))
    assert sorted(answer.status_code for answer in answers) == [201, 401, 401, 401]
    users = (await people.admin.api.get("/api/v1/auth/users?limit=100")).json()["users"]
    assert [user["email"] for user in users].count("grace@example.com") == 1


@pytest.mark.every_database
async def test_a_revoked_or_expired_link_makes_no_user(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    revoked, expired = await invite(people.admin), await invite(people.admin, expiresInSeconds=60)
    assert_refused(await people.stranger.api.delete(f"{INVITATIONS}/{revoked['id']}"), 404, "not-found")
    for _ in range(2):
        assert (await people.admin.api.delete(f"{INVITATIONS}/{revoked['id']}")).status_code == 204

    async def age(connection: AsyncConnection) -> None:
        values = {"expires_at": harness.gateway.clock() - timedelta(seconds=1)}
        await connection.execute(
            update(Invitation).where(col(Invitation.id) == expired["id"]).values(**values)
        )

    await harness.gateway.database.transaction(age)
    browser = await harness.browser()
    for made in (revoked, expired):
        answer = await browser.post("/invitation", json={"code": code_of(made), "dryRun": True})
        assert_refused(answer, 401, "sign-in-refused")
    states = [one["state"] for one in (await people.admin.api.get(INVITATIONS)).json()["invitations"]]
    assert states == ["expired", "revoked"]
    assert (await people.stranger.api.get(INVITATIONS)).json()["count"] == 0


@pytest.mark.every_database
async def test_an_invitation_that_is_accepted_meanwhile_is_not_revoked(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    made, database = await invite(people.admin), harness.gateway.database
    answering: asyncio.Task[Any] | None = None

    async def accept(connection: AsyncConnection) -> None:
        nonlocal answering
        statement = update(Invitation).where(col(Invitation.id) == made["id"])
        await connection.execute(statement.values(accepted_at=harness.gateway.clock()))
        revocation = people.admin.api.delete(f"{INVITATIONS}/{made['id']}")
        answering = answering or asyncio.create_task(revocation)
        await wait_for_lock(harness, answering)

    await database.transaction(accept)
    assert answering is not None
    assert (await answering).status_code == 204
    [listed] = (await people.admin.api.get(INVITATIONS)).json()["invitations"]
    assert listed["state"] == "accepted"
    assert "invitation.revoked" not in await actions(harness, people.admin.user.organization_id)


async def test_a_taken_address_keeps_the_link_open(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    code = code_of(await invite(people.admin))
    await people.admin.api.post("/api/v1/auth/users", json={"email": "grace@example.com"})
    browser = await harness.browser()
    assert_refused(await browser.post("/invitation", json={"code": code}), 409, "email-taken")
    shown = await browser.post("/invitation", json={"code": code, "dryRun": True})
    assert shown.status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"email": "nobody"},
        {"email": "a@b c"},
        {"role": "owner"},
        {"expiresInSeconds": 59},
        {"expiresInSeconds": 2_592_001},
        {"mail": "a@b"},
    ],
)
async def test_a_wrong_invitation_is_refused(people: OrganizationUsers, fields: dict[str, Any]) -> None:
    answer = await people.admin.api.post(INVITATIONS, json={"email": "a@example.com", **fields})
    assert_refused(answer, 422, "validation-failed")


async def test_a_link_serves_no_other_site_no_plain_http_and_few_guesses(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    code = code_of(await invite(people.admin))
    browser = await harness.browser(address="127.0.0.7")
    foreign = await browser.post("/invitation", json={"code": code}, headers={"Sec-Fetch-Site": "cross-site"})
    assert_refused(foreign, 403, "cross-site-request")
    elsewhere = await harness.browser(address="10.0.0.9", host="flows.example.com")
    assert_refused(await elsewhere.post("/invitation", json={"code": code}), 403, "https-required")
    assert "Signing in needs HTTPS" in (await elsewhere.get("/invitation")).text
    for _ in range(10):
        assert_refused(await browser.post("/invitation", json={"code": "wrong"}), 401, "sign-in-refused")
    assert_refused(await browser.post("/invitation", json={"code": code}), 429, "rate-limited")
    assert "Accept the invitation" in (await browser.get("/invitation")).text
