"""Sign-in with an OpenID Connect provider: users by invitation or connection, and every refused answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from time import time
from typing import Any

import httpx2
import pytest
from joserfc.jwk import ECKey, OctKey
from msgspec.structs import replace
from pydantic import SecretStr, ValidationError
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.access import openid_provider, openid_sign_in
from gateway.access.openid_provider import OpenIdClient, ProviderRefusal
from gateway.settings import GatewaySettings
from models.timestamps import DatabaseClock
from models.user_identity import UserIdentity
from tests.integration.gateway_harness import SECRET, GatewayHarness, OrganizationUsers, assert_refused
from tests.integration.openid_server import (
    CLIENT_ID,
    CLIENT_SECRET,
    OpenIdServer,
    forge_token,
    path_of,
    serve_openid,
)
from tests.integration.test_gateway_sessions import actions
from tests.integration.test_invitations import invite

AND_NEXT = "&next=%2Fdashboard%2Fruns"
BEGIN = f"/session/openid?{AND_NEXT[1:]}"
SETTINGS: dict[str, Any] = {
    "openid_client_id": CLIENT_ID,
    "openid_client_secret": SecretStr(CLIENT_SECRET),
    "openid_scopes": "openid email",
    "openid_name": "Nordwind",
}


@pytest.fixture
async def openid() -> AsyncIterator[OpenIdServer]:
    async with serve_openid() as server:
        yield server
        assert server.problems == []


@pytest.fixture
def _one_organization(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server have one organization, although tests share a database."""

    async def has_one(_connection: AsyncConnection) -> bool:
        return True

    monkeypatch.setattr(openid_sign_in, "has_one_organization", has_one)


@pytest.fixture
async def gateway(harness: GatewayHarness, openid: OpenIdServer) -> AsyncIterator[GatewayHarness]:
    """Gateway that knows the provider, on the same database."""
    changed = await harness.with_settings(openid_issuer=openid.issuer, **SETTINGS)
    sign_in = openid_sign_in.build_openid_sign_in(changed.gateway.settings, harness.gateway.database)
    assert sign_in is not None
    changed.app.state.gateway = replace(changed.gateway, openid=sign_in)
    yield GatewayHarness(changed.app, changed.app.state.gateway, changed._clients)  # noqa: SLF001 - the same clients
    await sign_in.provider.close()


async def go_to_provider(browser: httpx2.AsyncClient, path: str = BEGIN) -> str:
    """Begin a sign-in, pass the provider, and return the path that it leads back to."""
    begun = await browser.get(path)
    assert begun.status_code == 302, begun.text
    async with httpx2.AsyncClient() as elsewhere:
        back = await elsewhere.get(begun.headers["Location"])
    assert back.status_code == 302, back.text
    return path_of(back.headers["Location"])


async def sign_in(browser: httpx2.AsyncClient, path: str = BEGIN) -> str:
    """Sign a browser in with the provider, and return the path that it is led to at last."""
    back = await go_to_provider(browser, path)
    answer = await browser.get(back, headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 302, answer.text
    return path_of(answer.headers["Location"])


@pytest.mark.every_database
@pytest.mark.usefixtures("_one_organization")
async def test_an_invited_person_becomes_a_user_and_signs_in_again(
    gateway: GatewayHarness, people: OrganizationUsers, openid: OpenIdServer
) -> None:
    assert "Sign in with Nordwind" in (await (await gateway.browser()).get("/sign-in")).text
    assert (await sign_in(await gateway.browser())) == f"/sign-in?problem=no-account{AND_NEXT}"
    await invite(people.admin, role="viewer")
    first, second = await gateway.browser(), await gateway.browser()
    assert await sign_in(first) == "/dashboard/runs"
    me = (await first.get("/api/v1/auth/whoami")).json()
    assert (me["email"], me["role"]) == ("grace@example.com", "viewer")
    [made] = (await people.admin.api.get("/api/v1/auth/invitations")).json()["invitations"]
    assert (made["state"], made["userId"]) == ("accepted", me["userId"])
    openid.person["email"] = "new@example.com"  # the subject counts, not the address
    openid.rotate()
    openid.has_email_in_token = False
    gateway.gateway.openid.provider._keys = None  # type: ignore[union-attr]  # noqa: SLF001 - as after an hour
    assert await sign_in(second) == "/dashboard/runs"
    again = (await second.get("/api/v1/auth/whoami")).json()
    assert (again["userId"], again["keyId"]) == (me["userId"], me["keyId"])
    assert {"identity.connected", "invitation.accepted", "session.created"} <= set(
        await actions(gateway, me["organizationId"])
    )
    await people.admin.api.delete(f"/api/v1/auth/keys/{me['keyId']}")
    third = await gateway.browser()
    assert await sign_in(third) == "/dashboard/runs"
    assert (await third.get("/api/v1/auth/whoami")).json()["keyId"] != me["keyId"]


@pytest.mark.usefixtures("_one_organization")
async def test_an_unverified_or_absent_address_is_no_invitation(
    gateway: GatewayHarness, people: OrganizationUsers, openid: OpenIdServer
) -> None:
    await invite(people.admin)
    for changes in (
        {"email_verified": False},
        {"email_verified": None},
        {"email_verified": [True]},
        {"email_verified": 1},
        {"email": 7},
        {"email": "other@x.yz"},
    ):
        openid.changes = changes
        assert await sign_in(await gateway.browser()) == f"/sign-in?problem=no-account{AND_NEXT}", changes
    openid.changes = {}
    openid.has_email_in_token = False  # userinfo has it
    assert await sign_in(await gateway.browser()) == "/dashboard/runs"


async def test_a_signed_in_user_connects_an_identity_from_a_page_of_this_server(
    gateway: GatewayHarness, people: OrganizationUsers
) -> None:
    browser = await gateway.browser()
    await browser.post("/session", json={"key": people.owner.key})
    link = "/session/openid?link=1&next=%2Fdashboard%2Fkeys"
    foreign = await browser.get(link, headers={"Sec-Fetch-Site": "cross-site"})
    assert foreign.headers["Location"] == "/sign-in?problem=lost"
    assert await sign_in(browser, link) == "/dashboard/keys"
    assert await sign_in(browser, link) == "/dashboard/keys"  # it is connected already
    by_identity = await gateway.browser()
    assert await sign_in(by_identity) == "/dashboard/runs"
    assert (await by_identity.get("/api/v1/auth/whoami")).json()["userId"] == people.owner.user.id
    other = await gateway.browser()
    await other.post("/session", json={"key": people.admin.key})
    assert await sign_in(other, link) == "/dashboard/keys?problem=taken"
    assert "belongs to another user" in (await other.get("/dashboard/keys?problem=taken")).text
    assert (await other.get("/api/v1/auth/whoami")).json()["userId"] == people.admin.user.id


async def test_a_key_of_few_scopes_gains_none_by_connecting_an_identity(
    gateway: GatewayHarness, people: OrganizationUsers
) -> None:
    body = {"name": "reader", "scopes": ["workflows:read"]}
    reader = (await people.admin.api.post("/api/v1/auth/keys", json=body)).json()
    browser = await gateway.browser()
    await browser.post("/session", json={"key": reader["key"]})
    link = "/session/openid?link=1&next=%2Fdashboard%2Fkeys"
    refused = await browser.get(link, headers={"Sec-Fetch-Site": "same-origin"})
    assert refused.headers["Location"] == "/dashboard/keys?problem=scopes"
    assert "all rights of your role" in (await browser.get(refused.headers["Location"])).text


async def begin_invitation(browser: httpx2.AsyncClient, code: str) -> str:
    """Accept an invitation with the provider, and return the path that the browser is led to at last."""
    begun = await browser.post("/session/openid", json={"code": code})
    assert begun.status_code == 200, begun.text
    async with httpx2.AsyncClient() as elsewhere:
        back = await elsewhere.get(begun.json()["url"])
    answer = await browser.get(path_of(back.headers["Location"]))
    return path_of(answer.headers["Location"])


@pytest.mark.every_database
async def test_a_link_is_accepted_with_an_account_that_has_another_address(
    gateway: GatewayHarness, people: OrganizationUsers, openid: OpenIdServer
) -> None:
    openid.person = {"sub": "person-2"}
    code = (await invite(people.admin, role="viewer"))["url"].partition("#code=")[2]
    browser = await gateway.browser()
    assert "Accept with Nordwind" in (await browser.get("/invitation")).text
    wrong = await browser.post("/session/openid", json={"code": "wrong"})
    assert_refused(wrong, 401, "sign-in-refused")
    foreign = await browser.post(
        "/session/openid", json={"code": code}, headers={"Sec-Fetch-Site": "cross-site"}
    )
    assert_refused(foreign, 403, "cross-site-request")
    assert await begin_invitation(browser, code) == "/dashboard"
    me = (await browser.get("/api/v1/auth/whoami")).json()
    assert (me["email"], me["role"]) == ("grace@example.com", "viewer")
    again = await gateway.browser()
    assert await sign_in(again) == "/dashboard/runs"
    other = (await invite(people.admin, email="other@example.com"))["url"].partition("#code=")[2]
    assert await begin_invitation(await gateway.browser(), other) == "/sign-in?problem=taken"
    openid.person = {"sub": "person-3"}
    assert await begin_invitation(await gateway.browser(), other) == "/dashboard"
    taken = (await invite(people.admin, email="new@example.com"))["url"].partition("#code=")[2]
    await people.admin.api.post("/api/v1/auth/users", json={"email": "new@example.com"})
    openid.person = {"sub": "person-4"}
    assert await begin_invitation(await gateway.browser(), taken) == "/sign-in?problem=address-taken"


@pytest.mark.every_database
async def test_an_address_alone_is_no_invitation_where_organizations_could_claim_a_person(
    gateway: GatewayHarness, people: OrganizationUsers
) -> None:
    await invite(people.stranger)
    assert await sign_in(await gateway.browser()) == f"/sign-in?problem=no-account{AND_NEXT}"


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": "another"},
        {"nonce": None},
        {"aud": "another"},
        {"aud": [CLIENT_ID, "another"]},
        {"aud": [CLIENT_ID, "another"], "azp": "another"},
        {"azp": "another"},
        {"aud": [CLIENT_ID], "azp": [CLIENT_ID]},
        {"iss": "https://evil.example.com"},
        {"exp": int(time()) - 3_600},
        {"exp": None},
        {"iat": None},
        {"nbf": int(time()) + 3_600},
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"sub": "x" * 256},
    ],
)
async def test_an_id_token_with_wrong_claims_is_refused(
    gateway: GatewayHarness, people: OrganizationUsers, openid: OpenIdServer, changes: dict[str, Any]
) -> None:
    await invite(people.admin)
    openid.changes = changes
    browser = await gateway.browser()
    assert await sign_in(browser) == f"/sign-in?problem=refused{AND_NEXT}"
    assert_refused(await browser.get("/api/v1/auth/whoami"), 401, "unauthorized")


async def test_an_id_token_with_a_wrong_signature_is_refused(
    gateway: GatewayHarness, people: OrganizationUsers, openid: OpenIdServer
) -> None:
    await invite(people.admin)
    own = ECKey.generate_key("P-256", {"kid": "first"})
    secret = "a shared secret of more than thirty-two characters"
    for key, header in (
        (own, {}),
        (own, {"kid": "unknown"}),
        (own, {"kid": "own", "jwk": own.as_dict(private=False)}),
        (OctKey.import_key(secret, {"kid": "shared"}), {}),
    ):
        openid.signing_key, openid.header = key, header
        assert await sign_in(await gateway.browser()) == f"/sign-in?problem=refused{AND_NEXT}", header
    client = OpenIdClient(openid.issuer, CLIENT_ID, "", "openid")
    keys = {"keys": [openid.key.as_dict(private=False)]}
    now = DatabaseClock().now()
    # The last forgery takes the public key, which everybody has, as the secret of a signature.
    claims: dict[str, Any] = {"iss": openid.issuer, "aud": CLIENT_ID, "sub": "a", "nonce": "nonce"}
    claims |= {"iat": int(now.timestamp()), "exp": int(now.timestamp()) + 300}
    forged = [forge_token(claims, secret=one) for one in (None, b"x" * 32, openid.key.as_pem(private=False))]
    for text in (*forged, "", "a.b.c", "é.é.é"):
        with pytest.raises((ProviderRefusal, openid_provider.UnknownKey)):
            openid_provider.verify_id_token(text, keys, client, "nonce", now)


@pytest.mark.usefixtures("_one_organization")
async def test_an_answer_belongs_to_the_browser_that_began_it_and_works_once(
    gateway: GatewayHarness, people: OrganizationUsers, openid: OpenIdServer
) -> None:
    await invite(people.admin)
    browser, other = await gateway.browser(), await gateway.browser()
    back = await go_to_provider(browser)
    await other.get(BEGIN)
    assert (await other.get(back)).headers["Location"] == "/sign-in?problem=lost"
    assert (await (await gateway.browser()).get(back)).headers["Location"] == "/sign-in?problem=lost"
    codes = dict(openid.codes)
    attempt = f"pilotflame-loopback-openid={browser.cookies['pilotflame-loopback-openid']}"
    first = await browser.get(back)
    assert first.headers["Location"] == "/dashboard/runs"
    cookies = first.headers.get_list("Set-Cookie")
    assert [cookie.partition("=")[0] for cookie in cookies] == [
        "pilotflame-loopback",
        "pilotflame-loopback-openid",
    ]
    assert all("HttpOnly; SameSite=Lax" in cookie for cookie in cookies)
    assert (await browser.get(back)).headers["Location"] == "/sign-in?problem=lost"
    # The provider would give a token for the same nonce again.
    openid.codes.update(codes)
    thief = await gateway.browser()
    assert (await thief.get(back, headers={"Cookie": attempt})).headers["Location"] == "/sign-in?problem=lost"
    for issuer in ("https://evil.example.com", None):
        openid.answer_issuer = issuer
        assert await sign_in(await gateway.browser()) == f"/sign-in?problem=refused{AND_NEXT}"


@pytest.mark.usefixtures("_one_organization")
async def test_a_page_of_another_site_is_never_the_next_one(
    gateway: GatewayHarness, people: OrganizationUsers
) -> None:
    await invite(people.admin)
    outside = ("https://evil.example.com", "//evil.example.com", "/dashboard/\\evil.example.com", "")
    breaks = [f"/dashboard/a%{code}Set-Cookie:b=c" for code in ("0D%0A", "0A", "0D", "00", "09", "C2%85")]
    for wanted in (*outside, *breaks):
        browser = await gateway.browser()
        assert await sign_in(browser, f"/session/openid?next={wanted}") == "/dashboard", wanted


async def test_a_provider_that_is_down_and_a_server_without_one_say_so(
    gateway: GatewayHarness, harness: GatewayHarness, openid: OpenIdServer
) -> None:
    openid.is_down = True
    answer = await (await gateway.browser()).get(BEGIN)
    assert answer.headers["Location"] == f"/sign-in?problem=unavailable{AND_NEXT}"
    page = await (await gateway.browser()).get("/sign-in?problem=unavailable")
    assert "provider can&#39;t be reached" in page.text
    without = await harness.browser()
    assert_refused(await without.get(BEGIN), 404, "not-found")
    assert "Sign in with" not in (await without.get("/sign-in")).text
    elsewhere = await gateway.browser(address="10.0.0.9", host="flows.example.com")
    assert_refused(await elsewhere.get(BEGIN), 403, "https-required")


@pytest.mark.usefixtures("_one_organization")
async def test_two_sign_ins_at_once_make_one_user(gateway: GatewayHarness, people: OrganizationUsers) -> None:
    await invite(people.admin)
    browsers = [await gateway.browser() for _ in range(2)]
    backs = [await go_to_provider(browser) for browser in browsers]
    answers = await asyncio.gather(
        *(browser.get(back) for browser, back in zip(browsers, backs, strict=True))
    )
    assert {answer.status_code for answer in answers} == {302}
    assert "/dashboard/runs" in [answer.headers["Location"] for answer in answers]
    async with gateway.gateway.database.read() as connection:
        count = await connection.scalar(
            select(func.count())
            .select_from(UserIdentity)
            .where(col(UserIdentity.organization_id) == people.admin.user.organization_id)
        )
    assert count == 1


@pytest.mark.parametrize(
    "given",
    [
        {"openid_issuer": "http://login.example.com", "openid_client_id": "a"},
        {"openid_issuer": "https://login.example.com/?a=b", "openid_client_id": "a"},
        {"openid_issuer": "https://login.example.com"},
    ],
)
def test_a_wrong_provider_in_the_settings_is_refused_at_the_start(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GatewaySettings(secret_key=SecretStr(SECRET), **given)
