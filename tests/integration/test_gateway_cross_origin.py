"""Cross-origin requests of browsers, and answers to `OPTIONS`."""

from __future__ import annotations

import httpx2
import pytest
from pydantic import ValidationError

from gateway.http import edge
from gateway.settings import GatewaySettings
from tests.api_document import read_document
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, assert_refused

WORKFLOWS = "/api/v1/workflows"
PAGE = "https://app.example.com"


def preflight_headers(origin: str, method: str = "POST") -> dict[str, str]:
    asks = {
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "x-api-key,content-type",
    }
    return {"Origin": origin, **asks}


def cors_headers(answer: httpx2.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


async def test_options_of_every_path_tell_the_documented_methods_without_a_key(
    harness: GatewayHarness,
) -> None:
    anybody = await harness.client()
    for path, methods in read_document()["paths"].items():
        answer = await anybody.options(path.replace("{", "").replace("}", ""))
        assert (answer.status_code, answer.content) == (204, b""), path
        documented = {method.upper() for method in methods} | {"OPTIONS"}
        documented |= {"HEAD"} if "get" in methods and path != "/hooks/{id}" else set()
        assert set(answer.headers["Allow"].split(", ")) == documented, path
    assert_refused(await anybody.options("/api/v1/nothing"), 404, "not-found")


async def test_no_page_may_read_answers_unless_a_setting_says_so(people: OrganizationUsers) -> None:
    answer = await people.owner.api.options(WORKFLOWS, headers=preflight_headers(PAGE))
    assert (answer.status_code, cors_headers(answer)) == (204, {})
    answer = await people.owner.api.get(WORKFLOWS, headers={"Origin": PAGE})
    assert cors_headers(answer) == {}
    assert "Vary" not in answer.headers


async def test_pages_of_named_origins_may_use_the_api(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    there = await harness.with_settings(cors_origins=(PAGE, "https://other.example.com"))
    anybody, owner = await there.client(), await there.client(people.owner.key)

    asked = await anybody.options(WORKFLOWS, headers=preflight_headers(PAGE))
    assert (asked.status_code, asked.headers["Vary"]) == (204, "Origin")
    assert cors_headers(asked) == {
        "access-control-allow-origin": PAGE,
        "access-control-allow-methods": "GET, HEAD, OPTIONS, POST",
        "access-control-allow-headers": "*, Authorization",
        "access-control-max-age": "600",
    }
    handshake = await anybody.options(f"{WORKFLOWS}/events", headers=preflight_headers(PAGE))
    assert handshake.headers["Access-Control-Allow-Methods"] == "OPTIONS, POST"

    unauthorized = await anybody.get(WORKFLOWS, headers={"Origin": PAGE})
    assert_refused(unauthorized, 401, "unauthorized")
    unknown = await anybody.get("/api/v1/nothing", headers={"Origin": PAGE})
    for answer in (await owner.get(WORKFLOWS, headers={"Origin": PAGE}), unauthorized, unknown):
        assert set(cors_headers(answer)) == {"access-control-allow-origin", "access-control-expose-headers"}
        assert answer.headers["Access-Control-Allow-Origin"] == PAGE

    for origin in ("https://app.example.com.evil.test", "http://app.example.com", "null", ""):
        for answer in (
            await owner.get(WORKFLOWS, headers={"Origin": origin}),
            await anybody.options(WORKFLOWS, headers=preflight_headers(origin)),
        ):
            assert (cors_headers(answer), answer.headers["Vary"]) == ({}, "Origin"), origin
    assert cors_headers(await anybody.get("/internal/v1/nothing", headers={"Origin": PAGE})) == {}


async def test_pages_of_every_origin_may_use_the_api_but_without_credentials(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    there = await harness.with_settings(cors_origins=("*",))
    owner = await there.client(people.owner.key)
    for answer in (
        await owner.get(WORKFLOWS, headers={"Origin": "https://anywhere.test"}),
        await owner.options(WORKFLOWS, headers=preflight_headers("https://anywhere.test")),
    ):
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


def test_scripts_may_read_every_documented_header() -> None:
    answers = [
        response
        for methods in read_document()["paths"].values()
        for operation in methods.values()
        for response in operation["responses"].values()
    ]
    documented = {
        name
        for response in [*answers, *read_document()["components"]["responses"].values()]
        for name in response.get("headers", {})
    }
    assert documented == set(edge.EXPOSED)


def test_origins_are_read_as_browsers_send_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "PILOTFLAME_CORS_ORIGINS", "https://App.example.com/, http://localhost:5173,http://[::1]:8080"
    )
    assert GatewaySettings().cors_origins == (PAGE, "http://localhost:5173", "http://[::1]:8080")
    for wrong in (
        "app.example.com",
        "https://app.example.com/below",
        "https://app.example.com:443",
        "null",
        "https://*",
    ):
        monkeypatch.setenv("PILOTFLAME_CORS_ORIGINS", wrong)
        with pytest.raises(ValidationError, match="is not an origin: write its scheme and host"):
            GatewaySettings()
