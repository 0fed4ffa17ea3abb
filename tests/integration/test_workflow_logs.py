"""Log level of a workflow for a limited time: over HTTP, in a worker, and for pods."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from journal import log_levels
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient, assert_refused
from tests.integration.test_waiting_runs import execute_workflow, get_json, serve_worker, wait_until_ended

GRAPH: dict[str, Any] = {
    "nodes": [
        {"id": "start", "nodeId": "manual"},
        {"id": "note", "nodeId": "log", "config": {"message": "fine"}},
        {"id": "warn", "nodeId": "log", "config": {"message": "hot", "level": "warning"}},
    ],
    "connections": [{"source": "start", "target": "note"}, {"source": "note", "target": "warn"}],
}


async def set_level(person: UserClient, workflow_id: str, level: str | None, **body: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    answer = await person.api.put(f"/api/v1/workflows/{workflow_id}/log-level", json={"level": level, **body})
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def log_lines(person: UserClient, workflow_id: str) -> list[tuple[str, str]]:
    """Run the workflow, and return level and text of the lines in its log."""
    run = await execute_workflow(person, workflow_id)
    await wait_until_ended(person, run)
    return [(one["level"], one["message"]) for one in (await get_json(person, f"/{run}/logs"))["logs"]]


@pytest.mark.every_database
async def test_a_level_adds_or_drops_lines_until_it_ends(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_levels, "READ_SECONDS", 0.02)
    workflow_id = await people.owner.create(**GRAPH)
    async with serve_worker(harness):
        assert await log_lines(people.owner, workflow_id) == [("info", "fine"), ("warning", "hot")]
        shown = await set_level(people.owner, workflow_id, "debug")
        left = datetime.fromisoformat(shown["until"]) - datetime.now(UTC)
        assert timedelta(minutes=59) < left < timedelta(minutes=61)
        async with asyncio.timeout(20):
            while len(lines := await log_lines(people.owner, workflow_id)) == 2:
                pass
        assert [level for level, _ in lines if level != "debug"] == ["info", "warning"]
        ended = [text for level, text in lines if level == "debug" and "completed" in text]
        assert len(ended) == 3
        assert ended[1].startswith("Log (log) completed after ")
        assert ended[1].endswith(" ms by output")
        await set_level(people.owner, workflow_id, "warning")
        async with asyncio.timeout(20):
            while await log_lines(people.owner, workflow_id) != [("warning", "hot")]:
                pass
        assert (await set_level(people.owner, workflow_id, None))["until"] is None
        async with asyncio.timeout(20):
            while len(await log_lines(people.owner, workflow_id)) != 2:
                pass


async def test_a_level_is_shown_kept_and_recorded(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"/api/v1/workflows/{workflow_id}/log-level"
    until = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    await set_level(people.owner, workflow_id, "debug", until=until)
    shown = (await people.owner.api.get(path)).json()
    assert (await people.owner.api.put(path, json=shown)).json() == shown
    trail = (await people.admin.api.get("/api/v1/audit?action=workflow.log-level-set")).json()["entries"]
    assert [(one["userId"], one["objectId"]) for one in trail] == [(people.owner.user.id, workflow_id)]
    revision = (await people.owner.api.get(f"/api/v1/workflows/{workflow_id}")).headers["etag"]
    assert revision == '"1"', "a level is no new revision"


@pytest.mark.every_database
async def test_levels_of_others_long_times_and_unknown_fields_are_refused(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await people.owner.api.put(f"/api/v1/workflows/{workflow_id}/visibility", json={"isPublic": True})
    path = f"/api/v1/workflows/{workflow_id}/log-level"
    assert_refused(await people.colleague.api.put(path, json={"level": "debug"}), 403, "not-owner")
    assert_refused(await people.stranger.api.put(path, json={"level": "debug"}), 404, "not-found")
    for body in (
        {"level": "loud"},
        {},
        {"level": "debug", "minutes": 5},
        {"level": "debug", "until": "soon"},
        {"level": "debug", "until": "2020-01-01T00:00:00Z"},
        {"level": "debug", "until": (datetime.now(UTC) + timedelta(days=2)).isoformat()},
        {"level": "debug", "until": "2030-01-01T00:00:00"},
    ):
        answer = await people.owner.api.put(path, json=body)
        assert answer.status_code == 422, (body, answer.text)
    assert (await people.owner.api.get(path)).json()["level"] is None
