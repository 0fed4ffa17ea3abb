"""Callbacks: nodes that send a callback URL, and wait for the request to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest

from gateway.http import failed_attempts
from models.execution_status import TERMINAL_STATUSES
from tests.http_receiver import HttpReceiver, run_receiver
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient, assert_refused
from tests.integration.test_gateway_completion import create_signing_secret
from tests.integration.test_waiting_runs import (
    ON_ONE,
    execute_workflow,
    get_json,
    serve_worker,
    wait_until_ended,
)

pytestmark = pytest.mark.timeout(60)
PUBLIC_URL = "https://flows.example"


def calling(receiver: HttpReceiver, **config: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    request = {"method": "POST", "url": receiver.url("/jobs?key=abc"), "waitForCallback": True, **config}
    return {
        "nodes": [
            {"id": "start", "nodeId": "manual"},
            {"id": "call", "nodeId": "http-request", "config": request},
            {"id": "after", "nodeId": "set", "config": {"values": {"got": "{{ data.body }}"}}},
        ],
        "connections": [{"source": "start", "target": "call"}, {"source": "call", "target": "after"}],
    }


@asynccontextmanager
async def serve_calls(harness: GatewayHarness) -> AsyncIterator[HttpReceiver]:
    """Run a worker with nodes that reach a receiver on this machine."""
    async with (
        run_receiver() as receiver,
        serve_worker(harness, public_url=PUBLIC_URL, outbound_allowed_networks=("127.0.0.1/32",)),
    ):
        yield receiver


async def call_back(harness: GatewayHarness, url: str, **more: Any) -> httpx2.Response:  # noqa: ANN401 - arguments of `post`
    assert url.startswith(PUBLIC_URL)
    return await (await harness.client()).post(url.removeprefix(PUBLIC_URL), **more)


async def wait_for_requests(receiver: HttpReceiver, count: int = 1) -> None:
    async with asyncio.timeout(20):
        while len(receiver.received) < count:  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.02)


async def wait_for_wait(person: UserClient, execution_id: str) -> dict[str, Any]:
    """Wait until an execution waits for its callback; return why."""
    while (why := await get_json(person, f"/{execution_id}/why"))["primary"] != "awaiting-callback":
        progress = await get_json(person, f"/{execution_id}/progress?wait=0")
        assert progress["status"] not in TERMINAL_STATUSES, progress
        await asyncio.sleep(0.02)
    return why


async def test_a_run_waits_for_the_callback_of_its_request(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    secret = await create_signing_secret(people.admin)
    async with serve_calls(harness) as receiver:
        workflow_id = await people.owner.create(**calling(receiver, body={"width": 7}))
        run = await execute_workflow(people.owner, workflow_id)
        why = await wait_for_wait(people.owner, run)
        (sent,) = receiver.received
        url = sent.message["callbackUrl"]
        assert sent.is_signed_by(secret)
        assert sent.message == {"callbackUrl": url, "width": 7}
        assert sent.headers["callback-url"] == url
        blocker = why["blockers"][0]
        assert blocker["until"] is not None
        assert blocker["details"]["method"] == "POST"
        assert blocker["details"]["url"].startswith("http://127.0.0.1")
        assert "abc" not in blocker["details"]["url"]

        done = await call_back(harness, url, json={"url": "https://cdn.example/7.png"})
        assert (done.status_code, done.json()["status"]) == (200, "accepted"), done.text
        again = await call_back(harness, url, json={"url": "https://cdn.example/7.png"})
        assert again.status_code == 200
        other = await call_back(harness, url, json={"url": "https://cdn.example/8.png"})
        assert_refused(other, 409, "already-answered")
        assert (await wait_until_ended(people.owner, run))["status"] == "completed"
        spans = (await get_json(people.owner, f"/{run}/spans"))["spans"]
    outputs = {one["nodeId"]: one["outputData"] for one in spans}
    assert outputs["call"] == {"body": {"url": "https://cdn.example/7.png"}}
    assert outputs["after"]["got"] == {"url": "https://cdn.example/7.png"}
    token = parse_qs(urlsplit(url).query)["token"][0]
    assert token not in json.dumps(spans)
    assert len(receiver.received) == 1


@ON_ONE
async def test_a_callback_may_be_a_text_or_a_failure(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    await create_signing_secret(people.admin)
    async with serve_calls(harness) as receiver:
        workflow_id = await people.owner.create(**calling(receiver))
        told, failed = [await execute_workflow(people.owner, workflow_id) for _ in range(2)]
        await wait_for_requests(receiver, 2)
        urls = {
            urlsplit(one.message["callbackUrl"]).path: one.message["callbackUrl"] for one in receiver.received
        }
        for run in (told, failed):
            await wait_for_wait(people.owner, run)
        told_url = urls[f"/api/v1/executions/{told}/callback"]
        failed_url = urls[f"/api/v1/executions/{failed}/callback"] + "&outcome=failed"
        assert_refused(
            await call_back(harness, told_url, content=b"{", headers={"Content-Type": "application/json"}),
            400,
            "malformed-json",
        )
        assert_refused(await call_back(harness, told_url, data={"a": "b"}), 415, "unsupported-media-type")
        assert (
            await call_back(harness, told_url, content="fine", headers={"Content-Type": "text/plain"})
        ).status_code == 200
        assert_refused(
            await call_back(harness, failed_url, json={"code": "No Code"}), 422, "validation-failed"
        )
        assert (
            await call_back(harness, failed_url, json={"code": "too-wide", "message": "At most 6"})
        ).status_code == 200
        assert (await wait_until_ended(people.owner, told))["outputs"]["after"]["got"] == "fine"
        shown = await wait_until_ended(people.owner, failed)
    assert (shown["status"], shown["error"]["cause"]["code"]) == ("failed", "too-wide")


async def test_a_callback_after_the_deadline_is_refused(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    await create_signing_secret(people.admin)
    async with serve_calls(harness) as receiver:
        workflow_id = await people.owner.create(**calling(receiver, callbackTimeoutSeconds=2))
        run = await execute_workflow(people.owner, workflow_id)
        await wait_for_wait(people.owner, run)
        shown = await wait_until_ended(people.owner, run)
        late = await call_back(harness, receiver.received[0].message["callbackUrl"], json=1)
    assert (shown["status"], shown["error"]["cause"]["code"]) == ("failed", "expired")
    assert_refused(late, 409, "no-callback-pending")


async def test_a_callback_may_be_faster_than_the_answer_to_its_request(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    await create_signing_secret(people.admin)
    async with serve_calls(harness) as receiver:
        receiver.may_answer.clear()
        workflow_id = await people.owner.create(**calling(receiver))
        run = await execute_workflow(people.owner, workflow_id)
        await wait_for_requests(receiver)
        done = await call_back(harness, receiver.received[0].message["callbackUrl"], json={"n": 1})
        receiver.may_answer.set()
        assert done.status_code == 200, done.text
        shown = await wait_until_ended(people.owner, run)
    assert shown["outputs"]["after"]["got"] == {"n": 1}


async def test_a_refused_request_has_no_callback(harness: GatewayHarness, people: OrganizationUsers) -> None:
    await create_signing_secret(people.admin)
    async with serve_calls(harness) as receiver:
        receiver.answers.append("400 Bad Request")
        workflow_id = await people.owner.create(**calling(receiver, failOnError=False))
        run = await execute_workflow(people.owner, workflow_id)
        shown = await wait_until_ended(people.owner, run)
        late = await call_back(harness, receiver.received[0].message["callbackUrl"], json=1)
    assert shown["error"]["cause"]["code"] == "http-400"
    assert_refused(late, 409, "no-callback-pending")


@ON_ONE
async def test_a_wrong_token_is_unknown_and_counted(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failed_attempts, "MAX_FAILURES", 4)
    await create_signing_secret(people.admin)
    async with serve_calls(harness) as receiver:
        workflow_id = await people.owner.create(**calling(receiver))
        run = await execute_workflow(people.owner, workflow_id)
        await wait_for_wait(people.owner, run)
        url = receiver.received[0].message["callbackUrl"]
        wrong = [url.replace("node=call", "node=after"), url.replace("node=call", "node=call&iteration=0")]
        wrong += [url[:-1] + ("A" if url[-1] != "A" else "B"), url.partition("&token")[0]]
        for one in wrong:
            assert_refused(await call_back(harness, one, json=1), 404, "not-found")
        assert_refused(await call_back(harness, wrong[0], json=1), 429, "rate-limited")
        assert (await call_back(harness, url, json=1)).status_code == 200
        await wait_until_ended(people.owner, run)


@ON_ONE
async def test_nothing_is_sent_without_a_secret_to_sign_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    async with serve_calls(harness) as receiver:
        workflow_id = await people.owner.create(**calling(receiver))
        shown = await wait_until_ended(people.owner, await execute_workflow(people.owner, workflow_id))
        assert shown["error"]["cause"]["code"] == "no-signing-secret"
        assert receiver.received == []
        reads = await people.owner.create(**calling(receiver, method="GET"))
        checked = await people.owner.api.post(f"/api/v1/workflows/{reads}/validate")
    (error,) = checked.json()["errors"]
    assert "POST" in error["message"]
