"""Event tokens: creation, permissions, and revocation."""

from __future__ import annotations

import pytest

from gateway.http import sender
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, assert_refused

TOKENS = "/api/v1/auth/event-tokens"
EVENTS = "/api/v1/workflows/events"


async def test_an_admin_makes_a_token_and_is_shown_it_once(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    body = {
        "name": "Hooks of GitHub",
        "secrets": {"github": ["one", "two"], "standardWebhooks": ["whsec_YQ=="]},
    }
    response = await people.admin.api.post(TOKENS, json=body)
    assert response.status_code == 201, response.text
    made = response.json()
    assert made["url"].endswith(f"{EVENTS}?key={made['token']}")
    assert made["url"].startswith("http")
    assert "PILOTFLAME_PUBLIC_URL" in made["warnings"][0]
    assert made["providers"] == ["github", "standardWebhooks"]
    await people.admin.api.post(TOKENS, json={"name": "Plain"})

    listed = (await people.admin.api.get(f"{TOKENS}?limit=1&offset=1")).json()
    assert (listed["count"], listed["limit"], listed["offset"]) == (2, 1, 1)
    shown = {name: value for name, value in made.items() if name not in {"token", "url", "warnings"}}
    assert listed["tokens"] == [shown]
    assert (await people.stranger.api.get(TOKENS)).json()["count"] == 0

    actions = [one["action"] for one in (await people.admin.api.get("/api/v1/audit")).json()["entries"]]
    assert actions.count("event-token.created") == 2
    nobody = await harness.client()
    unsigned = await nobody.post(made["url"], json={"event_type": "a.b"})
    assert_refused(unsigned, 401, "invalid-signature")


@pytest.mark.every_database
async def test_a_token_that_has_ended_opens_nothing(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "KEPT_SECONDS", 0.0)
    made = (await people.admin.api.post(TOKENS, json={"name": "Plain"})).json()
    nobody = await harness.client()
    assert (await nobody.post(made["url"], json={"event_type": "a.b"})).status_code == 200
    assert_refused(await people.stranger.api.delete(f"{TOKENS}/{made['id']}"), 404, "not-found")
    for _ in range(2):
        assert (await people.admin.api.delete(f"{TOKENS}/{made['id']}")).status_code == 204
    assert_refused(await nobody.post(made["url"], json={"event_type": "a.b"}), 401, "unauthorized")
    (shown,) = (await people.admin.api.get(TOKENS)).json()["tokens"]
    assert shown["revokedAt"] is not None
    actions = [one["action"] for one in (await people.admin.api.get("/api/v1/audit")).json()["entries"]]
    assert actions.count("event-token.revoked") == 1


async def test_only_admins_have_to_do_with_tokens_and_wrong_ones_are_refused(
    people: OrganizationUsers,
) -> None:
    assert_refused(await people.owner.api.post(TOKENS, json={"name": "Mine"}), 403, "admin-required")
    assert_refused(await people.owner.api.get(TOKENS), 403, "admin-required")
    assert_refused(await people.owner.api.delete(f"{TOKENS}/tok_1"), 403, "admin-required")
    for body in (
        {},
        {"name": ""},
        {"name": "x", "secrets": {"github": ["a"] * 6}},
        {"name": "x", "secrets": {"slack": [""]}},
        # Otherwise these would accept unsigned requests.
        {"name": "x", "secrets": {"gitHub": ["a"]}},
        {"name": "x", "secret": {"github": ["a"]}},
    ):
        assert_refused(await people.admin.api.post(TOKENS, json=body), 422, "validation-failed")
