"""Deliveries and dead letters of a whole organization: lists, groups, redrive in bulk, and hints."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.http import limits
from gateway.ingest import dead_letter_rows, same_failures
from gateway.ingest.redrive_runs import RunRedriver
from models.dead_letter_mute import DeadLetterMute
from models.execution import Execution
from models.execution_status import ExecutionStatus
from scheduler.row_metrics import RowMetrics
from telemetry import instruments
from tests.integration.browser import serve_gateway
from tests.integration.gateway_harness import (
    STEP,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.test_dashboard import sign_in
from tests.integration.test_gateway_deliveries import enqueue, get_json
from tests.integration.test_gateway_enqueue import QUEUE, WORKFLOWS, create_active_workflow
from tests.integration.test_live_hints import next_hint, open_stream
from tests.integration.test_waiting_runs import serve_worker, wait_until_ended

DELIVERIES = "/api/v1/deliveries"
DEAD_LETTERS = "/api/v1/dead-letters"


async def fail_alike(
    harness: GatewayHarness,
    execution_ids: list[str],
    message: str,
    node_id: str = "write",
    code: str = "node-error",
) -> None:
    """End runs with an error each, whose message has the id of the run in quotes."""

    async def fail(connection: AsyncConnection) -> None:
        for execution_id in execution_ids:
            error = {
                "code": code,
                "message": f'{message} "{execution_id}"',
                "nodeId": node_id,
                "attempt": 1,
            }
            values = {"status": ExecutionStatus.FAILED, "ended_at": col(Execution.created_at), "error": error}
            await connection.execute(
                update(Execution).where(col(Execution.id) == execution_id).values(**values)
            )

    await harness.gateway.database.transaction(fail)


async def walk(person: UserClient, path: str, name: str) -> list[dict[str, Any]]:
    """Return the items of all pages of a list."""
    found: list[dict[str, Any]] = []
    cursor: str | None = "start"
    while cursor is not None:
        page = await get_json(person, f"{path}{'&' if '?' in path else '?'}after={cursor}")
        found += page[name]
        cursor = page["next"]
    return found


@pytest.mark.every_database
async def test_deliveries_of_all_readable_workflows_are_one_list(
    people: OrganizationUsers,
) -> None:
    first, second = [await create_active_workflow(people.owner) for _ in range(2)]
    hidden = await create_active_workflow(people.admin)
    for workflow_id in (first, second, first):
        await enqueue(people.owner, workflow_id)
    await enqueue(people.admin, hidden)
    await people.owner.api.post(f"{WORKFLOWS}/{first}/enqueue", json={"message": 1, "priority": 999})
    await people.owner.api.post("/api/v1/workflows/events", json={"event_type": "order.paid"})

    mine = await walk(people.owner, f"{DELIVERIES}?limit=2", "deliveries")
    assert Counter(one["workflowId"] for one in mine) == Counter([None, first, first, first, second])
    times = [one["createdAt"] for one in mine]
    assert times == sorted(times, reverse=True)
    [rejected] = [one for one in mine if one["outcome"] == "rejected"]
    assert (rejected["workflowName"], rejected["reason"]["code"]) == ("A workflow", "validation-failed")
    everything = await get_json(people.admin, DELIVERIES)
    assert (everything["count"], everything["countIsLowerBound"], everything["next"]) == (6, False, None)
    assert hidden in {one["workflowId"] for one in everything["deliveries"]}

    for query, count in (
        ("outcome=rejected", 1),
        (f"workflow_id={second}", 1),
        (f"workflow_id={first}&outcome=accepted", 2),
        ("route=events", 1),
        ("since=2020-01-01T00:00:00Z&until=2021-01-01T00:00:00Z", 0),
    ):
        page = await get_json(people.owner, f"{DELIVERIES}?{query}")
        assert (page["count"], len(page["deliveries"])) == (count, count), query
    assert (await get_json(people.owner, f"{DELIVERIES}?workflow_id={hidden}"))["deliveries"] == []
    assert (await get_json(people.colleague, DELIVERIES))["count"] == 0
    assert (await get_json(people.stranger, f"{DELIVERIES}?workflow_id={first}"))["count"] == 0
    assert_refused(await people.owner.api.get(f"{DELIVERIES}?after=nonsense"), 400, "invalid-query")
    assert_refused(await people.owner.api.get(f"{DELIVERIES}?outcome=lost"), 400, "invalid-query")


@pytest.mark.every_database
async def test_a_page_of_deliveries_examines_a_bounded_number_of_them(
    people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "EXAMINED_RUNS", 3)
    monkeypatch.setattr(limits, "EXAMINED_FOR_PAGE", 3)
    mine, hidden = await create_active_workflow(people.owner), await create_active_workflow(people.admin)
    first = await enqueue(people.owner, mine)
    for _ in range(7):
        await enqueue(people.admin, hidden)
    last = await enqueue(people.owner, mine)
    page = await get_json(people.owner, f"{DELIVERIES}?limit=5")
    assert [one["executionId"] for one in page["deliveries"]] == [last]
    assert page["next"] is not None
    found = await walk(people.owner, f"{DELIVERIES}?limit=5", "deliveries")
    assert [one["executionId"] for one in found] == [last, first]
    everything = await walk(people.admin, f"{DELIVERIES}?limit=2", "deliveries")
    assert len({one["id"] for one in everything}) == len(everything) == 9
    by_route = await walk(people.admin, f"{DELIVERIES}?limit=2&route=enqueue", "deliveries")
    assert by_route == everything


@pytest.mark.every_database
async def test_deliveries_of_one_outcome_are_redriven_once(people: OrganizationUsers) -> None:
    api = people.owner.api
    workflow_ids = [await create_active_workflow(people.owner) for _ in range(2)]
    for workflow_id in workflow_ids:
        await api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "draft"})
        refused = await api.post(f"{WORKFLOWS}/{workflow_id}/enqueue", json={"message": {"of": workflow_id}})
        assert_refused(refused, 409, "workflow-not-active")
        await api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "active"})
    path = f"{DELIVERIES}/redrive"
    chosen = {"filter": {"outcome": "rejected"}}
    dry = (await api.post(path, json={**chosen, "dryRun": True})).json()
    assert (dry["matched"], dry["redriven"], dry["executionIds"]) == (2, 0, [])
    empty: dict[str, Any]
    for empty in ({}, {"deliveryIds": []}, {"deliveryIds": [], "outcome": "rejected"}):
        assert_refused(await api.post(path, json={"filter": empty}), 422, "validation-failed")
    assert_refused(await api.post(path, json={**chosen, "dryrun": True}), 422, "validation-failed")
    foreign = await people.stranger.api.post(path, json=chosen)
    assert (foreign.status_code, foreign.json()["matched"]) == (200, 0)
    newest = (await get_json(people.owner, DELIVERIES))["deliveries"][0]["id"]
    by_id = {"filter": {"deliveryIds": [newest, "dlv_unknown"]}}
    assert (await people.stranger.api.post(path, json=by_id)).json()["matched"] == 0
    first = (await api.post(path, json=by_id)).json()
    assert (first["matched"], first["redriven"], first["remaining"]) == (1, 1, 0)
    second = (await api.post(path, json=chosen)).json()
    assert (second["matched"], second["redriven"], second["errors"]) == (1, 1, {})
    assert (await api.post(path, json=chosen)).json()["matched"] == 0
    trail = await get_json(people.admin, "/api/v1/audit?action=deliveries.redriven")
    assert trail["count"] == 2


@pytest.mark.every_database
async def test_deliveries_name_their_mail_and_the_reason_and_time_of_a_later_start(
    people: OrganizationUsers,
) -> None:
    owner = people.owner
    mails = await create_active_workflow(owner, nodes=[{"id": "start", "nodeId": "email-trigger"}, STEP])
    queue = await create_active_workflow(owner)
    mail = {"from": "Mira <mira@example.org>", "subject": "Order 7", "text": "Please"}
    path = f"{WORKFLOWS}/{mails}/email-trigger"
    assert (await owner.api.post(path, json=mail)).status_code == 201
    for mode, code in (("paused", 201), ("draft", 409)):
        await owner.api.put(f"{WORKFLOWS}/{mails}/status", json={"status": mode})
        assert (await owner.api.post(path, json={**mail, "subject": mode})).status_code == code
    delayed = {"message": 1, "delaySeconds": 3_600}
    assert (await owner.api.post(f"{WORKFLOWS}/{queue}/enqueue", json=delayed)).status_code == 201

    found = (await get_json(owner, DELIVERIES))["deliveries"]
    [later] = [one for one in found if one["workflowId"] == queue]
    accepted, deferred, rejected = sorted(
        (one for one in found if one["workflowId"] == mails), key=lambda one: one["outcome"]
    )
    assert (later["outcome"], later["mail"]) == ("accepted", None)
    assert later["notBefore"] > later["createdAt"]
    summary = {"from": "Mira <mira@example.org>", "attachments": 0}
    assert accepted["mail"] == {**summary, "subject": "Order 7"}
    assert (accepted["reason"], accepted["notBefore"]) == (None, None)
    assert (deferred["outcome"], deferred["reason"]["code"]) == ("deferred", "workflow-paused")
    assert (deferred["notBefore"], deferred["mail"]) == (None, {**summary, "subject": "paused"})
    assert (rejected["outcome"], rejected["mail"]) == ("rejected", {**summary, "subject": "draft"})
    for listed in (DELIVERIES, f"{WORKFLOWS}/{mails}/deliveries"):
        of_reason = await get_json(owner, f"{listed}?reason=workflow-paused")
        assert [one["id"] for one in of_reason["deliveries"]] == [deferred["id"]]
        assert (await get_json(owner, f"{listed}?reason=workflow%25"))["deliveries"] == []
    assert (await get_json(owner, f"{DELIVERIES}/{rejected['id']}"))["mail"] == rejected["mail"]


@pytest.mark.every_database
async def test_dead_letters_are_listed_by_kind_of_failure_and_by_state(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner, workflow_id = people.owner, await create_active_workflow(people.owner)
    runs = [await enqueue(owner, workflow_id, number) for number in range(5)]
    await fail_alike(harness, runs[:3], "Broken")
    await fail_alike(harness, runs[3:4], "Slow", code="timeout")
    await fail_alike(harness, runs[4:], "3 workers in a row died", code="crashed")
    every = await get_json(owner, f"{DEAD_LETTERS}/groups")
    assert (every["count"], every["failures"]) == (5, {"failed": 3, "crashed": 1, "timedOut": 1})
    late = await get_json(owner, f"{DEAD_LETTERS}/groups?failure=timed-out")
    assert (late["count"], late["failures"]) == (1, every["failures"])
    assert [(one["failure"], one["count"]) for one in late["groups"]] == [("timed-out", 1)]
    [crashed] = await walk(owner, f"{DEAD_LETTERS}?failure=crashed", "deadLetters")
    assert (crashed["executionId"], crashed["failure"], crashed["state"]) == (runs[4], "crashed", "open")

    async def list_in(state: str, person: UserClient = owner) -> list[tuple[str, str | None, str | None]]:
        found = await walk(person, f"{DEAD_LETTERS}?state={state}&limit=1", "deadLetters")
        assert {one["state"] for one in found} <= {state}
        return [(one["executionId"], one["successorId"], one["successorStatus"]) for one in found]

    path, api = f"{DEAD_LETTERS}/redrive", owner.api
    [again] = (await api.post(path, json={"filter": {"executionIds": runs[:1]}})).json()["executionIds"]
    timed_out = await api.post(f"{DEAD_LETTERS}/purge", json={"filter": {"failure": "timed-out"}})
    assert timed_out.json()["purged"] == 1
    replay = await api.post(f"/api/v1/executions/{runs[1]}/replay", json={})
    replayed = replay.json()["executionId"]
    assert [one[0] for one in await list_in("open")] == [runs[4], runs[2]]
    assert await list_in("redriving") == [(runs[1], replayed, "pending"), (runs[0], again, "pending")]
    assert await list_in("settled") == [(runs[3], None, None)]
    await fail_alike(harness, [again], "Broken")
    assert await list_in("settled") == [(runs[3], None, None), (runs[0], again, "failed")]
    assert [one[0] for one in await list_in("open")] == [again, runs[4], runs[2]]
    assert await list_in("settled", people.colleague) == []
    assert await list_in("redriving", people.stranger) == []
    assert_refused(await api.get(f"{DEAD_LETTERS}?state=lost"), 400, "invalid-query")


async def test_dead_letters_of_all_workflows_are_grouped_by_their_cause(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    first, second = [await create_active_workflow(people.owner) for _ in range(2)]
    alike = [await enqueue(people.owner, first, number) for number in range(3)]
    other = await enqueue(people.owner, first, "other")
    elsewhere = await enqueue(people.owner, second, "elsewhere")
    await enqueue(people.owner, second, "in time")
    await fail_alike(harness, alike, "No row for order")
    await fail_alike(harness, [other], "No row for order", node_id="read")
    await fail_alike(harness, [elsewhere], "No row for order")

    groups = await get_json(people.owner, f"{DEAD_LETTERS}/groups")
    assert (groups["count"], groups["isComplete"]) == (5, True)
    assert [(one["workflowId"], one["nodeId"], one["count"]) for one in groups["groups"]] == [
        (second, "write", 1),
        (first, "read", 1),
        (first, "write", 3),
    ]
    largest = groups["groups"][2]
    assert largest["newestExecutionId"] == alike[2]
    assert largest["message"] == f'No row for order "{alike[2]}"'
    assert (await get_json(people.owner, f"{DEAD_LETTERS}/groups?workflow_id={second}"))["count"] == 1

    pages = await walk(people.owner, f"{DEAD_LETTERS}?limit=2", "deadLetters")
    assert [one["executionId"] for one in pages] == [elsewhere, other, *reversed(alike)]
    oldest = await walk(people.owner, f"{DEAD_LETTERS}?oldest_first=true&limit=2", "deadLetters")
    assert oldest == pages[::-1]
    of_group = await walk(people.owner, f"{DEAD_LETTERS}?group={largest['id']}&limit=1", "deadLetters")
    assert [one["executionId"] for one in of_group] == alike[::-1]
    assert of_group[0]["given"]["message"] == 2
    for person, path in (
        (people.colleague, DEAD_LETTERS),
        (people.stranger, f"{DEAD_LETTERS}?workflow_id={first}"),
    ):
        assert (await get_json(person, path))["deadLetters"] == []
        assert (await get_json(person, f"{DEAD_LETTERS}/groups"))["count"] == 0


async def test_a_group_of_dead_letters_is_redriven_or_purged_once(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner)
    broken = [await enqueue(people.owner, workflow_id, number) for number in range(3)]
    useless = await enqueue(people.owner, workflow_id, "useless")
    await fail_alike(harness, broken, "Broken")
    await fail_alike(harness, [useless], "Useless", node_id="read")
    api = people.owner.api
    by_node = {
        one["nodeId"]: one["id"] for one in (await get_json(people.owner, f"{DEAD_LETTERS}/groups"))["groups"]
    }
    of_write, of_read = {"filter": {"group": by_node["write"]}}, {"filter": {"group": by_node["read"]}}

    dry = (await api.post(f"{DEAD_LETTERS}/redrive", json={**of_write, "dryRun": True})).json()
    assert (dry["matched"], dry["redriven"], dry["remaining"]) == (3, 0, 3)
    for body in ({}, {"filter": {"groups": "x"}}, {"filter": {}, "limit": 0}):
        assert_refused(await api.post(f"{DEAD_LETTERS}/redrive", json=body), 422, "validation-failed")
    # An empty choice must not select all.
    nothing: dict[str, Any] = {"filter": {"executionIds": []}}
    for act in ("redrive", "replay", "purge"):
        assert_refused(await api.post(f"{DEAD_LETTERS}/{act}", json=nothing), 422, "validation-failed")
    foreign = await people.stranger.api.post(f"{DEAD_LETTERS}/redrive", json=of_write)
    assert foreign.json()["matched"] == 0
    first = (await api.post(f"{DEAD_LETTERS}/redrive", json={**of_write, "limit": 1})).json()
    assert (first["matched"], first["redriven"], first["remaining"]) == (3, 1, 2)
    rest = (await api.post(f"{DEAD_LETTERS}/redrive", json=of_write)).json()
    assert (rest["matched"], rest["redriven"]) == (2, 2)
    # A list of one workflow and the list of the organization use one key for each dead letter.
    again = await api.post(f"{WORKFLOWS}/{workflow_id}/dead-letters/redrive", json={"executionIds": broken})
    assert again.json()["matched"] == 0

    not_theirs = await people.colleague.api.post(f"{DEAD_LETTERS}/purge", json=of_read)
    assert not_theirs.json() == {"matched": 0, "purged": 0, "remaining": 0}
    purged = await api.post(f"{DEAD_LETTERS}/purge", json=of_read)
    assert purged.json() == {"matched": 1, "purged": 1, "remaining": 0}
    assert (await get_json(people.owner, f"{DEAD_LETTERS}/groups"))["count"] == 0
    trail = (await get_json(people.admin, "/api/v1/audit"))["entries"]
    [discarded] = [one for one in trail if one["action"] == "dead-letters.purged"]
    selection = [("count", "1"), ("filter", f'{{"group":"{by_node["read"]}"}}')]
    assert [(one["path"], one["after"]) for one in discarded["changes"]] == selection
    [oldest] = [one for one in trail if one["action"] == "dead-letters.redriven"][-1:]
    assert [one["path"] for one in oldest["changes"]] == ["count", "filter"]


async def test_a_request_examines_a_bounded_number_of_failed_runs(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "EXAMINED_DEAD_LETTERS", 4)
    monkeypatch.setattr(dead_letter_rows, "BATCH", 2)
    workflow_id = await create_active_workflow(people.owner)
    wanted = await enqueue(people.owner, workflow_id, "the oldest")
    others = [await enqueue(people.owner, workflow_id, number) for number in range(5)]
    await fail_alike(harness, [wanted], "Wanted", node_id="read")
    await fail_alike(harness, others, "Other")
    [failed] = (await get_json(people.owner, f"{DEAD_LETTERS}?oldest_first=true&limit=1"))["deadLetters"]
    page = await get_json(people.owner, f"{DEAD_LETTERS}?group={failed['group']}")
    assert page["deadLetters"] == []
    assert page["next"] is not None
    found = await walk(people.owner, f"{DEAD_LETTERS}?group={failed['group']}", "deadLetters")
    assert [one["executionId"] for one in found] == [wanted]


async def count_by_metric(harness: GatewayHarness) -> float:
    """Return the metric of dead letters, which has those of all organizations."""
    await RowMetrics(harness.gateway.database).count_rows()
    gauge = instruments.gauge("dead_letters")
    assert isinstance(gauge, instruments.Gauge)
    return gauge.value


@pytest.mark.every_database
async def test_dead_letters_have_one_number_everywhere_however_many_a_list_examines(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "EXAMINED_DEAD_LETTERS", 2)
    monkeypatch.setattr(dead_letter_rows, "BATCH", 2)
    owner, names = people.owner, ("Old", "Many", "Fixed")
    of_others = await count_by_metric(harness)
    old, many, settled = [await create_active_workflow(owner, **QUEUE, name=name) for name in names]
    await fail_alike(harness, [await enqueue(owner, old) for _ in range(3)], "Old")
    await fail_alike(harness, [await enqueue(owner, many) for _ in range(4)], "Newer")
    await fail_alike(harness, [await enqueue(owner, many) for _ in range(2)], "Known", node_id="read")
    ended = [await enqueue(owner, settled) for _ in range(3)]
    await fail_alike(harness, ended, "Settled")
    for action, run in zip(("redrive", "purge"), ended[:2], strict=True):
        acted = await owner.api.post(f"{DEAD_LETTERS}/{action}", json={"filter": {"executionIds": [run]}})
        assert acted.json()["matched"] == 1
    assert (await owner.api.post(f"/api/v1/executions/{ended[2]}/replay", json={})).status_code == 201

    async def forget_settled(connection: AsyncConnection) -> None:
        # As if the process of a redrive had died before it marked the run: its key alone decides.
        await connection.execute(
            update(Execution).where(col(Execution.id) == ended[0]).values(settled_at=None)
        )

    await harness.gateway.database.transaction(forget_settled)
    [known] = [
        group
        for group in (await get_json(owner, f"{DEAD_LETTERS}/groups"))["groups"]
        if group["nodeId"] == "read"
    ]
    mute = {"reason": "Known", "expiresInSeconds": 60}
    muted = await owner.api.post(f"{DEAD_LETTERS}/groups/{known['id']}/mute", json=mute)
    assert muted.status_code == 200

    groups = await get_json(owner, f"{DEAD_LETTERS}/groups")
    assert (groups["count"], groups["isComplete"], groups["failures"]["failed"]) == (7, True, 7)
    assert [(row["workflowName"], row["count"]) for row in groups["workflows"]] == [("Many", 4), ("Old", 3)]
    assert [(group["workflowId"], group["count"]) for group in groups["groups"]] == [(many, 4), (old, 3)]
    for workflow_id, count in ((old, 3), (many, 6), (settled, 0)):
        listed = await get_json(owner, f"{WORKFLOWS}/{workflow_id}/dead-letters?limit=1")
        assert listed["count"] == count
    for action in ("redrive", "purge", "replay"):
        dry = await owner.api.post(
            f"{DEAD_LETTERS}/{action}", json={"filter": {}, "limit": 1, "dryRun": True}
        )
        assert dry.json()["matched"] == 9, action  # acts are not about mutes
    assert await count_by_metric(harness) == of_others + 7
    browser = await sign_in(harness, owner.key)
    overview = await browser.get("/dashboard/overview")
    assert "7 dead letters:</b> 4 of Many, 3 of Old" in overview.text
    page = await browser.get(f"/dashboard/dead-letters?group={groups['groups'][0]['id']}")
    assert "7 in 2 groups" in page.text
    # Two of another group are newer.
    assert f'id="dead-{groups["groups"][0]["newestExecutionId"]}"' in page.text

    monkeypatch.setattr(limits, "DEAD_LETTER_GROUPS", 1)
    first = await get_json(owner, f"{DEAD_LETTERS}/groups")
    assert (first["count"], first["isComplete"], len(first["groups"])) == (7, False, 1)
    assert first["workflows"] == groups["workflows"]
    path = f"{DEAD_LETTERS}/groups/{groups['groups'][1]['id']}/mute"
    assert (await owner.api.post(path, json=mute)).status_code == 200


async def test_dead_letters_behind_many_that_were_redriven_are_redriven_too(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "EXAMINED_DEAD_LETTERS", 2)
    monkeypatch.setattr(dead_letter_rows, "BATCH", 2)
    workflow_id = await create_active_workflow(people.owner)
    await fail_alike(
        harness, [await enqueue(people.owner, workflow_id, number) for number in range(7)], "Broken"
    )
    every = {"filter": {"workflowId": workflow_id}, "limit": 5}
    first = (await people.owner.api.post(f"{DEAD_LETTERS}/redrive", json=every)).json()
    assert (first["matched"], first["redriven"], first["remaining"]) == (7, 5, 2)
    rest = (await people.owner.api.post(f"{DEAD_LETTERS}/redrive", json=every)).json()
    assert (rest["matched"], rest["redriven"], rest["remaining"]) == (2, 2, 0)


async def test_lists_show_dead_letters_behind_more_settled_ones_than_they_examine(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "EXAMINED_DEAD_LETTERS", 2)
    monkeypatch.setattr(dead_letter_rows, "BATCH", 2)
    workflow_id = await create_active_workflow(people.owner)
    runs = [await enqueue(people.owner, workflow_id, number) for number in range(9)]
    await fail_alike(harness, runs, "Broken")
    oldest, one_by_one, together, purged = runs[0], runs[1:3], runs[3:6], runs[6:]
    path = f"{WORKFLOWS}/{workflow_id}/dead-letters"
    for address, body in (
        (f"{path}/redrive", {"executionIds": one_by_one}),
        (f"{DEAD_LETTERS}/redrive", {"filter": {"executionIds": together}}),
        (f"{path}/purge", {"executionIds": purged}),
    ):
        assert (await people.owner.api.post(address, json=body)).is_success
    groups = await get_json(people.owner, f"{DEAD_LETTERS}/groups")
    assert (groups["count"], groups["isComplete"]) == (1, True)
    assert groups["groups"][0]["newestExecutionId"] == oldest
    listed = await get_json(people.owner, DEAD_LETTERS)
    assert ([one["executionId"] for one in listed["deadLetters"]], listed["next"]) == ([oldest], None)


async def test_a_redrive_that_is_refused_leaves_its_dead_letters_in_the_list(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner)
    await fail_alike(harness, [await enqueue(people.owner, workflow_id)], "Broken")
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "paused"})
    refused = (await people.owner.api.post(f"{DEAD_LETTERS}/redrive", json={"filter": {}})).json()
    assert (refused["redriven"], refused["failed"]) == (0, 1)
    assert (await get_json(people.owner, f"{DEAD_LETTERS}/groups"))["count"] == 1


@pytest.mark.parametrize("repair", ["resume", "replay"])
async def test_a_dead_letter_that_is_taken_up_during_a_redrive_runs_once(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch, repair: str
) -> None:
    api, workflow_id = people.owner.api, await create_active_workflow(people.owner)
    failed_id = await enqueue(people.owner, workflow_id)
    await fail_alike(harness, [failed_id], "Broken")
    redrive_dead_letter = RunRedriver.redrive_dead_letter

    async def take_up_first(redriver: RunRedriver, *given: Any) -> Any:  # noqa: ANN401 - passed on
        assert (await api.post(f"/api/v1/executions/{failed_id}/{repair}", json={})).status_code == 201
        return await redrive_dead_letter(redriver, *given)

    monkeypatch.setattr(RunRedriver, "redrive_dead_letter", take_up_first)
    redriven = (await api.post(f"{DEAD_LETTERS}/redrive", json={"filter": {}})).json()
    assert (redriven["matched"], redriven["redriven"], redriven["failed"]) == (1, 0, 0)
    executions = await get_json(people.owner, f"/api/v1/executions?workflow_id={workflow_id}")
    assert len(executions["executions"]) == 2
    assert (await get_json(people.owner, DEAD_LETTERS))["deadLetters"] == []


@pytest.mark.parametrize("repair", ["resume", "replay", "dead-letters", "bulk-retry", "bulk-replay"])
async def test_a_dead_letter_that_is_redriven_during_a_repair_runs_once(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch, repair: str
) -> None:
    api, workflow_id = people.owner.api, await create_active_workflow(people.owner)
    failed_id = await enqueue(people.owner, workflow_id)
    await fail_alike(harness, [failed_id], "Broken")
    of_workflow = {"filter": {"workflowId": workflow_id}}
    redrive = partial(api.post, f"{DEAD_LETTERS}/redrive", json=of_workflow)
    lock_rows, redriven = harness.gateway.database.transaction, []
    # Transactions of the repair alone count, not those of tasks that write in the background.
    is_repair = ContextVar("is_repair", default=False)

    async def redrive_first(work: Callable[[AsyncConnection], Awaitable[Any]]) -> Any:  # noqa: ANN401 - passed on
        if not is_repair.get():
            return await lock_rows(work)
        # The first transaction of a repair is its last step, or the audit entry before it.
        monkeypatch.setattr(harness.gateway.database, "transaction", lock_rows)
        redriven.extend((await redrive()).json()["executionIds"])
        return await lock_rows(work)

    monkeypatch.setattr(harness.gateway.database, "transaction", redrive_first)
    is_repair.set(True)
    if repair in {"resume", "replay"}:
        path = f"/api/v1/executions/{failed_id}/{repair}"
        answer = await api.post(path, json={})
        assert_refused(answer, 409, "already-resumed")
        assert [one["executionId"] for one in answer.json()["error"]["details"]] == redriven
    elif repair == "dead-letters":
        answer = await api.post(f"{DEAD_LETTERS}/replay", json=of_workflow)
        assert [one["code"] for one in answer.json()["refused"]] == ["already-resumed"]
    else:
        answer = await api.post(f"/api/v1/executions/{repair}", json=of_workflow)
        assert (answer.status_code, answer.json()["affected"]) == (200, 0)
    assert len(redriven) == 1
    executions = await get_json(people.owner, f"/api/v1/executions?workflow_id={workflow_id}")
    assert {one["id"] for one in executions["executions"]} == {failed_id, *redriven}
    # Repairs of lists pass it by from now on, and a person who insists replays it.
    assert (await api.post("/api/v1/executions/bulk-retry", json=of_workflow)).json()["matched"] == 0
    again = await api.post(f"/api/v1/executions/{failed_id}/replay", json={"again": True})
    assert again.status_code == 201, again.text


@pytest.mark.every_database
async def test_a_muted_group_leaves_the_list_until_its_end_and_is_listed_apart(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner)
    await fail_alike(harness, [await enqueue(people.owner, workflow_id) for _ in range(2)], "Known")
    await fail_alike(harness, [await enqueue(people.owner, workflow_id)], "Open", node_id="read")
    api = people.owner.api
    known, open_group = sorted(
        (await get_json(people.owner, f"{DEAD_LETTERS}/groups"))["groups"], key=lambda one: -one["count"]
    )
    path = f"{DEAD_LETTERS}/groups/{known['id']}/mute"
    day = {"expiresInSeconds": 86_400}
    for wrong in ({"reason": " "}, {"reason": "x" * 501}, {"expiresInSeconds": 10**9}, {"ends": 1}):
        body = {"reason": "Known", **day, **wrong}
        assert_refused(await api.post(path, json=body), 422, "validation-failed")
    unknown = await api.post(f"{DEAD_LETTERS}/groups/0000/mute", json={"reason": "Known", **day})
    assert_refused(unknown, 404, "not-found")
    for reason in ("Known", "The partner is closed"):
        assert (await api.post(path, json={"reason": reason, **day})).status_code == 200

    listed = await get_json(people.owner, f"{DEAD_LETTERS}/groups")
    assert (listed["count"], listed["mutedGroups"]) == (1, 1)
    assert [one["id"] for one in listed["groups"]] == [open_group["id"]]
    muted = await get_json(people.owner, f"{DEAD_LETTERS}/groups?muted=true")
    assert [(one["id"], one["count"]) for one in muted["groups"]] == [(known["id"], 2)]
    mute = muted["groups"][0]["mute"]
    assert (mute["reason"], mute["mutedBy"]) == ("The partner is closed", people.owner.user.id)
    assert mute["mutedByName"] == (people.owner.user.name or people.owner.user.email)
    assert (await get_json(people.colleague, f"{DEAD_LETTERS}/groups"))["mutedGroups"] == 0
    # The dead letters stay: their list and a redrive are not about groups.
    assert len((await get_json(people.owner, DEAD_LETTERS))["deadLetters"]) == 3

    assert (await api.delete(path)).status_code == 204
    assert (await api.delete(path)).status_code == 204
    assert (await get_json(people.owner, f"{DEAD_LETTERS}/groups"))["count"] == 3
    trail = await get_json(people.admin, f"/api/v1/audit?objectId={workflow_id}")
    actions = [one["action"] for one in trail["entries"]]
    assert (actions.count("dead-letters.muted"), actions.count("dead-letters.unmuted")) == (2, 1)

    assert (await api.post(path, json={"reason": "Known", **day})).status_code == 200

    async def end_all(connection: AsyncConnection) -> None:
        await connection.execute(update(DeadLetterMute).values(ends_at=harness.gateway.clock()))

    await harness.gateway.database.transaction(end_all)
    assert (await get_json(people.owner, f"{DEAD_LETTERS}/groups"))["count"] == 3


@pytest.mark.parametrize("way", ["resume", "replay"])
async def test_a_run_that_continues_a_purged_one_and_fails_is_a_dead_letter_of_its_own(
    harness: GatewayHarness, people: OrganizationUsers, way: str
) -> None:
    api, workflow_id = people.owner.api, await create_active_workflow(people.owner)
    failed = await enqueue(people.owner, workflow_id)
    await fail_alike(harness, [failed], "Broken")
    assert (await api.post(f"{DEAD_LETTERS}/purge", json={"filter": {}})).json()["purged"] == 1
    continued = await api.post(f"/api/v1/executions/{failed}/{way}", json={})
    assert continued.status_code == 201, continued.text
    new_id = continued.json()["executionId"]
    await fail_alike(harness, [new_id], "Broken")
    listed = (await get_json(people.owner, DEAD_LETTERS))["deadLetters"]
    assert [one["executionId"] for one in listed] == [new_id]


async def test_a_group_that_is_muted_by_many_requests_at_once_is_muted(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner)
    await fail_alike(harness, [await enqueue(people.owner, workflow_id)], "Known")
    [group] = (await get_json(people.owner, f"{DEAD_LETTERS}/groups"))["groups"]
    path, body = f"{DEAD_LETTERS}/groups/{group['id']}/mute", {"reason": "Known", "expiresInSeconds": 60}
    answers = await asyncio.gather(*(people.owner.api.post(path, json=body) for _ in range(10)))
    assert [answer.status_code for answer in answers] == [200] * 10
    assert (await get_json(people.owner, f"{DEAD_LETTERS}/groups"))["mutedGroups"] == 1


@pytest.mark.every_database
async def test_a_group_says_whether_its_workflow_was_mended_and_is_replayed_after_its_plan(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner

    def graph(text: str) -> dict[str, Any]:
        nodes: list[dict[str, Any]] = [
            {"id": "start", "nodeId": "queue-trigger", "label": "Start"},
            {"id": "first", "nodeId": "set", "label": "First", "config": {"values": {"n": 1}}},
            {"id": "last", "nodeId": "template", "label": "Last", "config": {"text": text}},
        ]
        edges = [{"source": "start", "target": "first"}, {"source": "first", "target": "last"}]
        return {"nodes": nodes, "connections": edges}

    workflow_id = await create_active_workflow(owner, **graph("{{ data.missing }}"))

    async def show_group() -> dict[str, Any]:
        [group] = (await get_json(owner, f"{DEAD_LETTERS}/groups"))["groups"]
        names = ("count", "definitions", "versions", "isCurrent", "completedSince")
        return {name: group[name] for name in names}

    async with serve_worker(harness):
        for run in [await enqueue(owner, workflow_id) for _ in range(3)]:
            await wait_until_ended(owner, run)
        failed = {"count": 3, "definitions": 1, "versions": [1]}
        assert await show_group() == {**failed, "isCurrent": True, "completedSince": None}
        mended = await owner.api.put(f"{WORKFLOWS}/{workflow_id}", json=graph("{{ data.n }}"))
        assert mended.status_code == 200, mended.text
        harness.gateway.workflows.forget(owner.user.organization_id, workflow_id)
        await wait_until_ended(owner, await enqueue(owner, workflow_id))
        assert await show_group() == {**failed, "isCurrent": False, "completedSince": 1}

        body: dict[str, Any] = {"filter": {"workflowId": workflow_id}}
        path = f"{DEAD_LETTERS}/replay"
        plan = (await owner.api.post(path, json={**body, "dryRun": True})).json()
        assert (plan["matched"], plan["affected"], plan["newExecutionIds"]) == (3, 0, [])
        assert plan["counts"] == {"reuse": 6, "rerun": 3, "maybe": 0, "ask": 0}
        foreign = (await people.stranger.api.post(path, json=body)).json()
        assert (foreign["matched"], foreign["affected"]) == (0, 0)
        first = (await owner.api.post(path, json={**body, "limit": 1})).json()
        assert (first["matched"], first["affected"], first["remaining"]) == (3, 1, 2)
        rest = (await owner.api.post(path, json=body)).json()
        assert (rest["matched"], rest["affected"], rest["remaining"]) == (2, 2, 0)
        for run in [*first["newExecutionIds"], *rest["newExecutionIds"]]:
            assert (await wait_until_ended(owner, run))["status"] == "completed"
    assert (await get_json(owner, f"{DEAD_LETTERS}/groups"))["count"] == 0
    trail = await get_json(people.admin, "/api/v1/audit?action=dead-letters.replayed")
    assert trail["count"] == 2


@pytest.mark.every_database
async def test_a_stream_hints_that_something_was_delivered(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner)
    async with (
        serve_gateway(harness) as url,
        open_stream(url, people.owner.key, "deliveries") as stream,
    ):
        await enqueue(people.owner, workflow_id)
        hint = await next_hint(stream)
        while hint.topic != "deliveries":
            hint = await next_hint(stream)
        assert hint.id == ""


@pytest.mark.every_database
async def test_runs_that_failed_the_same_way_are_listed_with_one_of_them(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner)
    ids = [await enqueue(people.owner, workflow_id, number) for number in range(5)]
    await fail_alike(harness, ids[:3], "The row is locked")
    await fail_alike(harness, ids[3:4], "The disk is full")
    path = "/api/v1/executions/{}/same-failures"
    found = await get_json(people.owner, path.format(ids[0]))
    assert (found["count"], found["nodeId"], found["code"]) == (3, "write", "node-error")
    assert {one["id"] for one in found["executions"]} == set(ids[:3])
    assert not found["countIsLowerBound"]
    newest = await get_json(people.owner, path.format(ids[0]) + "?limit=1")
    assert newest == {**found, "executions": found["executions"][:1]}
    assert (await get_json(people.owner, path.format(ids[3])))["count"] == 1
    pending = await get_json(people.owner, path.format(ids[4]))
    assert (pending["count"], pending["executions"]) == (0, [])
    assert_refused(await people.stranger.api.get(path.format(ids[0])), 404, "not-found")
    browser = await harness.browser()
    assert (await browser.post("/session", json={"key": people.owner.key})).status_code == 201
    page = await browser.get(f"/dashboard/runs/{ids[0]}")
    assert "2 other runs failed the same way" in page.text
    listed = await browser.get(f"/dashboard/runs?alike={ids[0]}")
    assert [one in listed.text for one in ids] == [True, True, True, False, False]


async def test_a_private_run_is_no_same_failure_for_a_user_without_access(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner)
    shown, hidden = [await enqueue(people.owner, workflow_id, number) for number in range(2)]
    await fail_alike(harness, [shown, hidden], "The row is locked")
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/visibility", json={"isPublic": True})

    async def hide(connection: AsyncConnection) -> None:
        await connection.execute(update(Execution).where(col(Execution.id) == hidden).values(is_private=True))

    await harness.gateway.database.transaction(hide)
    path = "/api/v1/executions/{}/same-failures"
    assert (await get_json(people.owner, path.format(shown)))["count"] == 2
    seen = await get_json(people.colleague, path.format(shown))
    assert (seen["count"], [one["id"] for one in seen["executions"]]) == (1, [shown])
    assert_refused(await people.colleague.api.get(path.format(hidden)), 404, "not-found")


async def test_a_failed_run_counts_itself_behind_more_failures_than_are_read(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_failures, "EXAMINED", 2)
    workflow_id = await create_active_workflow(people.owner)
    ids = [await enqueue(people.owner, workflow_id, number) for number in range(3)]
    await fail_alike(harness, ids, "The row is locked")

    async def order(connection: AsyncConnection) -> None:
        now = harness.gateway.clock()
        for minute, execution_id in enumerate(ids):
            ended = update(Execution).where(col(Execution.id) == execution_id)
            await connection.execute(ended.values(ended_at=now + timedelta(minutes=minute)))

    await harness.gateway.database.transaction(order)
    oldest = await get_json(people.owner, f"/api/v1/executions/{ids[0]}/same-failures")
    assert (oldest["count"], oldest["countIsLowerBound"]) == (3, True)
    assert [one["id"] for one in oldest["executions"]] == ids[::-1]
    newest = await get_json(people.owner, f"/api/v1/executions/{ids[2]}/same-failures")
    assert (newest["count"], newest["countIsLowerBound"]) == (2, True)
