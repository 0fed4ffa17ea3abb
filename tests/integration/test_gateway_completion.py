"""Completion actions and concurrency limits over HTTP, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from messages.broker_connection import connect_broker
from models.access import ALL_KEY_SCOPES, KeyScope, UserRole
from models.execution_status import TERMINAL_STATUSES
from tests.http_receiver import run_receiver
from tests.integration.gateway_harness import (
    GRAPH,
    SECRET,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.second_gateway import run_second_gateway
from workers.main import run_worker
from workers.settings import WorkerSettings

PATIENCE_SECONDS = 60.0
SIGNING = "/api/v1/auth/signing-secret"
FAILING = {
    "nodes": [
        {"id": "start", "nodeId": "manual"},
        {"id": "stop", "nodeId": "stop-with-error", "config": {"message": "No"}},
    ],
    "connections": [{"source": "start", "target": "stop"}],
}


async def create_signing_secret(person: UserClient) -> str:
    answer = await person.api.post(SIGNING)
    assert answer.status_code == 201, answer.text
    secret: str = answer.json()["secret"]
    return secret


async def execute_workflow(person: UserClient, workflow_id: str, **body: Any) -> httpx2.Response:  # noqa: ANN401 - any JSON value
    key = {"Idempotency-Key": body.pop("key")} if "key" in body else {}
    return await person.api.post(f"/api/v1/workflows/{workflow_id}/execute", json=body, headers=key)


async def get_execution(person: UserClient, execution_id: str) -> dict[str, Any]:
    shown: dict[str, Any] = (await person.api.get(f"/api/v1/executions/{execution_id}")).json()
    return shown


async def wait_until_ended(person: UserClient, *execution_ids: str) -> list[dict[str, Any]]:
    """Wait until executions have ended and their completion actions are done."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            shown = [await get_execution(person, execution_id) for execution_id in execution_ids]
            if all(
                one["status"] in TERMINAL_STATUSES and not (one["followUp"] or {}).get("pending")
                for one in shown
            ):
                return shown
            await asyncio.sleep(0.02)


@asynccontextmanager
async def serve_worker(harness: GatewayHarness, folder: Path) -> AsyncIterator[None]:
    """Run a worker that finds the gateway's runs by its sweeps."""
    gateway = harness.gateway
    settings = WorkerSettings(
        data_dir=folder,
        database_url=gateway.settings.database_url,
        secret_key=SecretStr(SECRET),
        outbound_allowed_networks=(ip_network("127.0.0.1/32"),),
        sweep_seconds=0.1,
    )
    broker = await connect_broker(None)
    try:
        async with run_worker(settings, gateway.store, broker, gateway.database):
            yield
    finally:
        await broker.close()


# ── the secret ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.every_database
async def test_an_admin_makes_the_secret_and_sees_it_once(people: OrganizationUsers) -> None:
    assert_refused(await people.admin.api.get(SIGNING), 404, "not-found")
    assert_refused(await people.owner.api.post(SIGNING), 403, "admin-required")
    assert_refused(await people.owner.api.get(SIGNING), 403, "admin-required")
    made = (await people.admin.api.post(SIGNING)).json()
    assert set(made) == {"secret", "hint", "createdAt"}
    shown = (await people.admin.api.get(SIGNING)).json()
    assert shown == {"hint": made["hint"], "createdAt": made["createdAt"]}
    assert made["hint"] in made["secret"]
    (entry,) = (await people.admin.api.get("/api/v1/audit?action=signing-secret.set")).json()["entries"]
    assert (entry["objectId"], entry["beforeHash"]) == (people.admin.user.organization_id, None)
    again = (await people.admin.api.post(SIGNING)).json()
    assert again["secret"] != made["secret"]
    assert_refused(await people.stranger.api.get(SIGNING), 404, "not-found")


async def test_the_secret_takes_the_scope_for_keys(harness: GatewayHarness) -> None:
    organization = await harness.organization()
    admin = await harness.person(organization, UserRole.ADMIN, ALL_KEY_SCOPES - {KeyScope.KEYS_WRITE})
    assert_refused(await admin.api.post(SIGNING), 403, "scope-required")


# ── callbackUrl ─────────────────────────────────────────────────────────────────────────────────────────────

WRONG_URLS = {
    "ftp://example.com": "invalid-url",
    "https://user:pw@example.com": "invalid-url",
    "https://example.com/\r\nX: y": "invalid-url",
    "nowhere": "invalid-url",
    "http://10.0.0.1/": "address-not-allowed",
    "http://[::1]/": "address-not-allowed",
    "http://[::ffff:127.0.0.1]/": "address-not-allowed",
    "http://127.1/": "invalid-url",
    f"https://example.com/{'x' * 2_000}": "too-long",
}


@pytest.mark.every_database
async def test_a_callback_goes_to_the_internet_and_takes_a_secret(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    good = "https://example.com/hook"
    assert_refused(
        await execute_workflow(people.owner, workflow_id, callbackUrl=good), 422, "no-signing-secret"
    )
    await create_signing_secret(people.admin)
    for url, code in WRONG_URLS.items():
        answer = await execute_workflow(people.owner, workflow_id, callbackUrl=url)
        assert_refused(answer, 422, "validation-failed")
        (detail,) = answer.json()["error"]["details"]
        assert (detail["path"], detail["code"]) == ("callbackUrl", code), url
    answer = await execute_workflow(people.owner, workflow_id, callbackUrl=good)
    shown = await get_execution(people.owner, answer.json()["executionId"])
    assert shown["followUp"] == {"pending": True, "attempts": 0, "lastError": None}
    plain = await execute_workflow(people.owner, workflow_id)
    assert (await get_execution(people.owner, plain.json()["executionId"]))["followUp"] is None
    listed = (await people.owner.api.get("/api/v1/executions")).json()["executions"]
    assert all("followUp" not in one for one in listed)


async def test_callbacks_are_sent_and_failure_workflows_started(
    harness: GatewayHarness, people: OrganizationUsers, tmp_path: Path
) -> None:
    owner = people.owner
    secret = await create_signing_secret(people.admin)
    about = await owner.create(**GRAPH)
    async with run_receiver() as receiver, serve_worker(harness, tmp_path):
        url = f"http://localhost:{receiver.port}/hook"
        good = await owner.create(**GRAPH)
        bad = await owner.create(**FAILING, settings={"onFailure": {"workflowId": about}})
        told = await owner.create(**FAILING, settings={"onFailure": {"url": receiver.url("/failed")}})
        runs = [
            (await execute_workflow(owner, good, callbackUrl=url)).json()["executionId"],
            (await execute_workflow(owner, bad, callbackUrl=url)).json()["executionId"],
            (await execute_workflow(owner, told)).json()["executionId"],
        ]
        shown = await wait_until_ended(owner, *runs)
        for one in shown:
            assert one["followUp"] == {"pending": False, "attempts": 1, "lastError": None}
        received = {
            (message.path, message.message["data"]["executionId"]): message for message in receiver.received
        }
        assert set(received) == {("/hook", runs[0]), ("/hook", runs[1]), ("/failed", runs[2])}
        assert all(message.is_signed_by(secret) for message in received.values())
        assert received["/hook", runs[0]].message["data"]["outputs"] == {"step": {"body": {}, "a": 1}}
        started = (await owner.api.get(f"/api/v1/executions?workflow_id={about}")).json()["executions"]
        assert [one["triggerType"] for one in started] == ["on-failure"]
        await wait_until_ended(owner, started[0]["id"])

        # The resumed run fails and is acted on again. The callback of the first execution is not repeated.
        resumed = (await owner.api.post(f"/api/v1/executions/{runs[1]}/resume")).json()["executionId"]
        await wait_until_ended(owner, resumed)
        assert len(receiver.received) == 3
        again = (await owner.api.get(f"/api/v1/executions?workflow_id={about}")).json()
        assert again["count"] == 2


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────

WRONG_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"concurrency": {"limit": 0}}, "settings.concurrency.limit"),
    ({"concurrency": {"limit": 1_001}}, "settings.concurrency.limit"),
    ({"concurrency": {}}, "settings.concurrency.limit"),
    ({"concurrency": {"limit": 1, "onLimit": "explode"}}, "settings.concurrency.onLimit"),
    ({"concurrency": {"limit": 1, "key": "{{ data.x }}"}}, "settings.concurrency.key"),
    ({"concurrency": {"limit": 1, "key": "{{ trigger.x"}}, "settings.concurrency.key"),
    ({"concurrency": {"limit": 1, "key": "constant"}}, "settings.concurrency.key"),
    ({"onFailure": {}}, "settings.onFailure"),
    ({"onFailure": {"workflowId": "wf_1", "url": "https://example.com"}}, "settings.onFailure"),
    ({"onFailure": {"url": "ftp://example.com"}}, "settings.onFailure.url"),
    ({"onFailure": {"workflowId": "no id!"}}, "settings.onFailure.workflowId"),
]


async def test_settings_that_cannot_be_meant_are_refused(people: OrganizationUsers) -> None:
    for settings, path in WRONG_SETTINGS:
        answer = await people.owner.api.post("/api/v1/workflows", json={"name": "Mine", "settings": settings})
        assert_refused(answer, 422, "validation-failed")
        assert [detail["path"] for detail in answer.json()["error"]["details"]] == [path], settings
    workflow_id = await people.owner.create(
        settings={
            "concurrency": {"limit": 3, "key": "{{ trigger.body.a }}"},
            "onFailure": {"workflowId": "wf_1"},
        }
    )
    own = {"settings": {"onFailure": {"workflowId": workflow_id}}}
    answer = await people.owner.api.put(f"/api/v1/workflows/{workflow_id}", json=own)
    assert_refused(answer, 422, "validation-failed")
    assert answer.json()["error"]["details"][0]["code"] == "self-reference"
    cleared = {"settings": {"onFailure": None, "concurrency": None}}
    await people.owner.api.put(f"/api/v1/workflows/{workflow_id}", json=cleared)
    settings = (await people.owner.workflow(workflow_id))["settings"]
    assert not {"onFailure", "concurrency"} & set(settings)


# ── concurrency limits ──────────────────────────────────────────────────────────────────────────────────────


async def test_where_no_place_is_free_a_run_is_refused_and_those_accepted_are_answered_again(
    people: OrganizationUsers,
) -> None:
    concurrency = {"limit": 2, "key": "{{ trigger.body.who }}", "onLimit": "reject"}
    workflow_id = await people.owner.create(**GRAPH, settings={"concurrency": concurrency})
    asked = [
        execute_workflow(people.owner, workflow_id, triggerInputs={"who": "ada"}, key=f"{number}")
        for number in range(6)
    ]
    answers = await asyncio.gather(*asked)
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [201, 201, 429, 429, 429, 429]
    number = next(number for number, answer in enumerate(answers) if answer.status_code == 201)
    too_many = next(number for number, answer in enumerate(answers) if answer.status_code == 429)
    assert_refused(answers[too_many], 429, "concurrency-limit")
    again = await execute_workflow(people.owner, workflow_id, triggerInputs={"who": "ada"}, key=f"{number}")
    assert again.json() == answers[number].json()
    assert again.headers["Idempotent-Replayed"] == "true"
    assert (
        await execute_workflow(people.owner, workflow_id, triggerInputs={"who": "bob"})
    ).status_code == 201
    listed = (await people.owner.api.get(f"/api/v1/executions?workflow_id={workflow_id}")).json()
    assert listed["count"] == 3
    for one in listed["executions"]:
        await people.owner.api.post(f"/api/v1/executions/{one['id']}/cancel")
    assert (
        await execute_workflow(people.owner, workflow_id, triggerInputs={"who": "ada"})
    ).status_code == 201


@pytest.mark.parametrize("kind", ["set", "wait"])
async def test_never_more_runs_go_on_than_the_limit_and_all_of_them_end(
    harness: GatewayHarness, people: OrganizationUsers, tmp_path: Path, kind: str
) -> None:
    step = {"set": {"values": {"a": 1}}, "wait": {"seconds": 0.02}}[kind]
    graph = {
        "nodes": [{"id": "start", "nodeId": "manual"}, {"id": "step", "nodeId": kind, "config": step}],
        "connections": [{"source": "start", "target": "step"}],
    }
    settings = {"concurrency": {"limit": 3}}
    workflow_id = await people.owner.create(**graph, settings=settings)
    async with (
        run_second_gateway(harness) as client_of,
        serve_worker(harness, tmp_path),
        serve_worker(harness, tmp_path),
        client_of(people.owner) as other,
    ):
        clients = [people.owner.api, other]
        path = f"/api/v1/workflows/{workflow_id}/execute"
        accepting = asyncio.gather(*(clients[n % 2].post(path, json={}) for n in range(40)))
        most, left, are_accepted = 0, 40, False
        async with asyncio.timeout(PATIENCE_SECONDS):
            while left or not are_accepted:
                # Before the count: one that began earlier may lack the last runs.
                are_accepted = accepting.done()
                running, left = await count_active(harness, workflow_id)
                most = max(most, running)
                await asyncio.sleep(0.001)
        assert {answer.status_code for answer in await accepting} == {201}
    assert most <= 3
    assert 1 <= await max_concurrent(harness, workflow_id) <= 3


async def count_active(harness: GatewayHarness, workflow_id: str) -> tuple[int, int]:
    """Return how many runs of a workflow have an owner, and how many have not ended."""
    async with harness.gateway.database.read() as connection:
        row = (
            await connection.execute(
                text(
                    "SELECT coalesce(sum(CASE WHEN status = 'running' THEN 1 ELSE 0 END), 0), count(*)"
                    " FROM execution WHERE workflow_id = :id AND ended_at IS NULL"
                ),
                {"id": workflow_id},
            )
        ).one()
    return int(row[0]), int(row[1])


async def max_concurrent(harness: GatewayHarness, workflow_id: str) -> int:
    """Return the maximum number of a workflow's runs that were active at the same time, by their rows."""
    async with harness.gateway.database.read() as connection:
        rows = await connection.execute(
            text("SELECT started_at, ended_at FROM execution WHERE workflow_id = :id"), {"id": workflow_id}
        )
    changes = [change for started, ended in rows for change in ((started, 1), (ended, -1))]
    return max(accumulate(change for _, change in sorted(changes)))  # ends before starts at the same time
