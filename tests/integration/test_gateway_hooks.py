"""Webhooks of providers at a workflow's own URL: authentication and answers."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hmac
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx2
import pytest
from msgspec import structs
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import SQLModel, col

from gateway.http import failed_attempts
from gateway.workflows import workflow_cache
from journal.blobs.blob_storage import BlobOwner
from models.deployment import Deployment, ObservedState
from models.execution import Execution, ExecutionData, SpanRow
from models.execution_status import TERMINAL_STATUSES
from models.ingest import Delivery
from models.lifecycle_policy import StoppedReason
from tests.integration.gateway_harness import (
    EDGE,
    GRAPH,
    STEP,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.simulated_cluster import SimulatedCluster, run_simulated_cluster
from tests.provider_requests import BY_NAME, CASES, CONFIG, ProviderCase, ProviderStep
from workers.main import run_worker
from workers.settings import WorkerSettings

WORKFLOWS = "/api/v1/workflows"
SECRETS = {
    "github": [CONFIG["github"]["secret"]],
    "stripe": [CONFIG["stripe"]["secret"]],
    "slack": [CONFIG["slack"]["signing_secret"]],
    "standard-webhooks": [
        CONFIG["standard_webhooks"]["secret"],
        CONFIG["standard_webhooks"]["public_key"],
    ],
}
NOT_RUN = {"gh_ping", "slack_url_verification"}
FOLDERS = {"standard-webhooks": "standardwebhooks"}
ANYBODY: dict[str, Any] = {"verification": {"provider": "none"}}
WHEN_DONE = {**ANYBODY, "respond": "when-done"}
ANSWERS = {
    "id": "step",
    "nodeId": "webhook-response",
    "config": {
        "status": 201,
        "headers": {"X-Order": "{{ data.body.order }}", "Location": "/orders/7"},
        "body": {"order": "{{ data.body.order }}"},
    },
}
PATIENCE_SECONDS = 60.0
AFTERWARDS = {"id": "later", "nodeId": "wait", "config": {"seconds": 3600}}


# ── hooks ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class WebhookUnderTest:
    """An active workflow that begins with a webhook, and its address."""

    workflow_id: str
    path: str


def webhook_graph(config: dict[str, Any] | None, *nodes: dict[str, Any]) -> dict[str, Any]:
    trigger: dict[str, Any] = {"id": "start", "nodeId": "webhook", "config": config or {}}
    edges = [EDGE, {"source": "step", "target": "later"}]
    chain = [trigger, *(nodes or [STEP])]
    return {"nodes": chain, "connections": edges[: len(chain) - 1]}


async def create_webhook(
    person: UserClient, config: dict[str, Any] | None = None, *nodes: dict[str, Any]
) -> WebhookUnderTest:
    workflow_id = await person.create(**webhook_graph(config, *nodes), status="active")
    response = await person.api.post(f"{WORKFLOWS}/{workflow_id}/trigger-token", json={})
    assert response.status_code == 201, response.text
    return WebhookUnderTest(workflow_id, urlsplit(response.json()["urls"]["webhook"]).path)


async def create_secret(person: UserClient, text: str) -> str:
    return await create_data_source(person, {"type": "webhook-secret", "secrets": {"secret": text}})


async def create_data_source(person: UserClient, fields: dict[str, Any]) -> str:
    response = await person.api.post("/api/v1/datasources", json={"name": uuid4().hex, **fields})
    assert response.status_code == 201, response.text
    source_id: str = response.json()["dataSourceId"]
    return source_id


async def signature_config(person: UserClient, provider: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - any config
    """Return the config of a webhook trigger for a provider's signatures."""
    sources = [await create_secret(person, text) for text in SECRETS[provider]]
    named: str | list[str] = sources[0] if len(sources) == 1 else sources
    return {"verification": {"provider": provider, "dataSource": named}, **more}


@contextmanager
def set_time(harness: GatewayHarness, moment: datetime) -> Iterator[None]:
    """Set the gateway's clock for signatures."""
    before = harness.gateway
    harness.app.state.gateway = structs.replace(before, clock=lambda: moment)
    try:
        yield
    finally:
        harness.app.state.gateway = before


async def send(
    harness: GatewayHarness, step: ProviderStep, target: str, body: bytes | None = None
) -> httpx2.Response:
    """Send a recorded request with another request line."""
    left_out = {b"host", b"connection", b"content-length"}
    headers = [(name, value) for name, value in step.headers if name.lower() not in left_out]
    nobody = await harness.client()
    with set_time(harness, step.at):
        return await nobody.request(
            step.method, target, content=step.body if body is None else body, headers=headers
        )


async def read_rows(harness: GatewayHarness, table: type[SQLModel], **equal: Any) -> list[Any]:  # noqa: ANN401 - rows of any table
    conditions = [getattr(table, name) == value for name, value in equal.items()]
    async with harness.gateway.database.read() as connection:
        return list((await connection.execute(select(table).where(*conditions))).all())


async def read_triggers(harness: GatewayHarness, workflow_id: str) -> list[dict[str, Any]]:
    """Return the trigger data of a workflow's runs."""
    runs = await read_rows(harness, Execution, workflow_id=workflow_id)
    data = [await read_rows(harness, ExecutionData, execution_id=run.id) for run in runs]
    return [json.loads(one.trigger) for (one,) in data]


async def read_outcomes(harness: GatewayHarness, workflow_id: str) -> list[tuple[str, int, str]]:
    """Return the deliveries of a workflow: outcome, status and error code."""
    found = await read_rows(harness, Delivery, workflow_id=workflow_id)
    return sorted((one.outcome, one.status, (one.reason or "").partition(":")[0]) for one in found)


@pytest.fixture(scope="module")
async def people(harness: GatewayHarness) -> OrganizationUsers:
    """Return the same users for all tests, which tell their data apart by workflow."""
    return await harness.people()


@pytest.fixture(scope="module", autouse=True)
async def worker(harness: GatewayHarness) -> AsyncIterator[None]:
    gateway = harness.gateway
    settings = WorkerSettings(
        **gateway.settings.model_dump(include={"data_dir", "database_url", "secret_key"}),
        lease_seconds=5,
        sweep_seconds=60,
    )
    async with run_worker(settings, gateway.store, gateway.broker, gateway.database):
        yield


@pytest.fixture(scope="module")
async def cluster(harness: GatewayHarness) -> AsyncIterator[SimulatedCluster]:
    async with run_simulated_cluster(harness) as cluster:
        yield cluster


# ── providers ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("provider", SECRETS)
async def test_provider_requests_get_the_expected_answers(
    harness: GatewayHarness, people: OrganizationUsers, provider: str
) -> None:
    config = await signature_config(people.owner, provider)
    folder = FOLDERS.get(provider, provider)
    cases = [case for case in CASES if case.provider == folder and not case.name.endswith("_to_enqueue")]
    assert len(cases) >= 4
    for case in cases:
        hook = await create_webhook(people.owner, config)
        response = await send(harness, case.steps[0], hook.path)
        again = await send(harness, case.steps[0], hook.path)
        expect_answer(case, response)
        told = await read_triggers(harness, hook.workflow_id)
        is_run = case.name not in NOT_RUN and response.status_code // 100 == 2
        assert len(told) == is_run, case.name
        if is_run:
            assert again.headers["Idempotent-Replayed"] == "true"
            assert again.json() == response.json()
            expect_given(case, told[0])
        if response.status_code == 401:
            assert await read_outcomes(harness, hook.workflow_id) == []


def expect_answer(case: ProviderCase, response: httpx2.Response) -> None:
    expected = case.steps[0].respond
    assert f"{response.status_code // 100}xx" == expected["status_class"], (case.name, response.text)
    assert expected.get("body_contains", "") in response.text
    assert response.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
    if response.status_code // 100 == 4:
        assert_refused(response, 401, "invalid-signature")


def expect_given(case: ProviderCase, told: dict[str, Any]) -> None:
    wanted = case.expected["event"]["event_data"]
    assert (told["body"]["data"] if case.provider == "standardwebhooks" else told["body"]) == wanted
    assert (told["method"], told["query"], told["respond"]) == ("POST", {}, "at-once")
    assert told["headers"]["content-type"]
    assert not [name for name in told["headers"] if "signature" in name]


async def test_a_repetition_of_a_provider_is_recognized_by_its_id(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    hook = await create_webhook(people.owner, await signature_config(people.owner, "slack"))
    first = await send(harness, BY_NAME["slack_event"].steps[0], hook.path)
    retry = await send(harness, BY_NAME["slack_retry"].steps[0], hook.path)
    assert (first.status_code, retry.status_code) == (200, 200)
    assert retry.json() == first.json()
    assert len(await read_triggers(harness, hook.workflow_id)) == 1
    assert [one[0] for one in await read_outcomes(harness, hook.workflow_id)] == ["accepted", "duplicate"]


async def test_fifty_deliveries_at_once_are_one_run(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    hook = await create_webhook(people.owner, await signature_config(people.owner, "stripe"))
    step = BY_NAME["stripe_invoice_paid"].steps[0]
    answers = await asyncio.gather(*(send(harness, step, hook.path) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.content for answer in answers}) == 1
    assert len(await read_triggers(harness, hook.workflow_id)) == 1
    found = [one[0] for one in await read_outcomes(harness, hook.workflow_id)]
    assert found == ["accepted", *["duplicate"] * 49]


async def test_events_that_are_not_asked_for_are_answered_and_not_run(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    push, ping = BY_NAME["gh_push"].steps[0], BY_NAME["gh_ping"].steps[0]
    of_issues = await create_webhook(
        people.owner, await signature_config(people.owner, "github", allowedEvents=["issues"])
    )
    of_pings = await create_webhook(
        people.owner, await signature_config(people.owner, "github", allowedEvents=["ping"])
    )
    paid = await create_webhook(
        people.owner, await signature_config(people.owner, "stripe", allowedEvents=["invoice.*"])
    )
    for step, hook, is_run in (
        (push, of_issues, False),
        (ping, of_issues, False),
        (ping, of_pings, True),
        (BY_NAME["stripe_invoice_paid"].steps[0], paid, True),
    ):
        response = await send(harness, step, hook.path)
        assert response.status_code == (202 if is_run else 200), response.text
        assert response.json()["status"] == ("accepted" if is_run else "ignored")
    assert await read_triggers(harness, of_issues.workflow_id) == []
    assert await read_outcomes(harness, of_issues.workflow_id) == [("accepted", 200, "event-not-allowed")] * 2


# ── authentication ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_hook_that_says_nothing_of_verification_takes_nothing(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    hook = await create_webhook(people.owner)
    nobody = await harness.client()
    answer = await nobody.post(hook.path, json={})
    assert_refused(answer, 422, "no-verification")
    assert "`verification`" in answer.json()["error"]["message"]
    for source_id in (
        "ds_absent",
        await create_secret(people.stranger, "x"),
        await create_secret(people.colleague, "x"),
        await create_data_source(people.owner, {"type": "http-bearer", "secrets": {"token": "x"}}),
    ):
        config = {"verification": {"provider": "github", "dataSource": source_id}}
        answer = await people.owner.api.post(WORKFLOWS, json={**webhook_graph(config), "status": "active"})
        assert_refused(answer, 422, "validation-failed")


async def test_a_data_source_that_is_gone_is_for_the_owner_to_mend_and_the_sender_comes_again(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    source_id = await create_secret(people.owner, SECRETS["github"][0])
    hook = await create_webhook(
        people.owner, {"verification": {"provider": "github", "dataSource": source_id}}
    )
    await people.owner.api.delete(f"/api/v1/datasources/{source_id}?force=true")
    harness.gateway.pod_services.sources.clear()
    answer = await send(harness, BY_NAME["gh_push"].steps[0], hook.path)
    assert_refused(answer, 503, "trigger-not-ready")
    assert int(answer.headers["Retry-After"]) == 60
    assert source_id not in answer.text


async def test_an_address_that_opens_nothing_is_like_one_that_never_was(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = await create_webhook(people.owner, ANYBODY)
    replaced = await create_webhook(people.owner, ANYBODY)
    await people.owner.api.delete(f"{WORKFLOWS}/{replaced.workflow_id}/trigger-token")
    gone = await create_webhook(people.owner, ANYBODY)
    await people.owner.api.delete(f"{WORKFLOWS}/{gone.workflow_id}?force=true")
    monkeypatch.setattr(failed_attempts, "MAX_FAILURES", 10)
    nobody = await harness.client(address="10.9.9.9")
    answers = [
        await nobody.post(path, json={})
        for path in (f"{hook.path}x", "/hooks/x", replaced.path, gone.path, f"/hooks/{people.owner.key}")
    ]
    for answer in answers:
        assert_refused(answer, 404, "not-found")
    assert len({json.dumps(answer.json()["error"]) for answer in answers}) == 1
    assert (await nobody.post(hook.path, json={})).status_code == 202
    for _ in range(10):
        await nobody.post(f"/hooks/tt-{uuid4().hex}", json={})
    assert_refused(await nobody.post(f"{hook.path}x", json={}), 429, "rate-limited")
    assert (await nobody.post(hook.path, json={})).status_code == 202
    manual = await people.owner.create(**GRAPH)
    token = (await people.owner.api.post(f"{WORKFLOWS}/{manual}/trigger-token", json={})).json()["token"]
    assert_refused(await (await harness.client()).post(f"/hooks/{token}", json={}), 422, "no-webhook-trigger")


async def test_methods_networks_and_sizes_are_as_the_trigger_says(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    config = {
        **ANYBODY,
        "methods": ["PUT", "GET"],
        "allowedNetworks": ["192.0.2.0/24", "2001:db8::/32"],
        "maxBodyBytes": 100,
    }
    hook = await create_webhook(people.owner, config)
    inside, outside = await harness.client(address="192.0.2.7"), await harness.client(address="192.0.3.7")
    mapped = await harness.client(address="::ffff:192.0.2.7")
    answer = await inside.post(hook.path, json={})
    assert_refused(answer, 405, "method-not-allowed")
    assert answer.headers["Allow"] == "GET, PUT"
    assert (await inside.head(hook.path)).status_code == 405
    assert_refused(await outside.put(hook.path, json={}), 403, "network-not-allowed")
    too_large = await inside.put(hook.path, content=b"x" * 101)
    assert_refused(too_large, 413, "payload-too-large")
    assert "maxBodyBytes" in too_large.text
    assert_refused(
        await inside.put(hook.path, content=b"{", headers={"Content-Type": "application/json"}),
        400,
        "malformed-json",
    )
    assert_refused(
        await inside.put(hook.path, content=b"{}", headers={"Content-Encoding": "gzip"}),
        400,
        "malformed-body",
    )
    assert (await inside.put(hook.path, content=b"x" * 100)).status_code == 202
    assert (await mapped.get(f"{hook.path}?a=1&a=2&b=&key=secret")).status_code == 202
    (first, second) = sorted(await read_triggers(harness, hook.workflow_id), key=lambda one: one["method"])
    assert (first["method"], first["query"], first["body"]) == ("GET", {"a": ["1", "2"], "b": ""}, {})
    assert second["body"] == {"base64": base64.b64encode(b"x" * 100).decode(), "contentType": ""}


async def test_options_lists_the_methods_of_a_hook_for_its_token(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = await create_webhook(people.owner, {**ANYBODY, "methods": ["PUT", "GET"]})
    silent = await create_webhook(people.owner)
    gone = await create_webhook(people.owner, ANYBODY)
    await people.owner.api.delete(f"{WORKFLOWS}/{gone.workflow_id}/trigger-token")
    nobody = await harness.client(address="10.9.9.8")
    answer = await nobody.options(hook.path)
    assert (answer.status_code, answer.headers["Allow"]) == (204, "GET, OPTIONS, PUT")
    for path in (f"{hook.path}x", "/hooks/x", gone.path, silent.path, f"/hooks/{people.owner.key}"):
        answer = await nobody.options(path)
        everything = "DELETE, GET, OPTIONS, PATCH, POST, PUT"
        assert (answer.status_code, answer.headers["Allow"]) == (204, everything)
    monkeypatch.setattr(failed_attempts, "MAX_FAILURES", 4)
    assert_refused(await nobody.options("/hooks/x"), 429, "rate-limited")
    assert (await nobody.options(hook.path)).status_code == 204


async def test_provider_specific_signatures_are_verified(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    source_id = await create_secret(people.owner, "a secret")
    verification = {
        "provider": "hmac",
        "dataSource": source_id,
        "header": "X-Encrypted",
        "encoding": "base64",
        "prefix": "v=",
        "algorithm": "sha512",
        "timestampHeader": "X-Time",
        "deliveryHeader": "X-Name",
        "replayWindowSeconds": 30,
    }
    hook = await create_webhook(people.owner, {"verification": verification, "allowedEvents": ["a.b"]})
    nobody = await harness.client()
    now = int(datetime.now(UTC).timestamp())

    async def sent(
        body: bytes, headers: Mapping[str, str] | None = None, *, time: int = now
    ) -> httpx2.Response:
        digest = hmac.digest(b"a secret", b"%d.%s" % (time, body), "sha512")
        signed = {
            "X-Encrypted": f"v={base64.b64encode(digest).decode()}",
            "X-Time": str(time),
            **(headers or {}),
        }
        return await nobody.post(
            hook.path, content=body, headers={"Content-Type": "application/json", **signed}
        )

    body = b'{"type": "a.b"}'
    assert (await sent(body, {"X-Name": "1"})).status_code == 202
    assert (await sent(body, {"X-Name": "1"})).headers["Idempotent-Replayed"] == "true"
    assert (await sent(body, {"X-Name": "2"})).status_code == 202
    assert (await sent(b'{"type": "a.c"}')).json() == {"status": "ignored"}
    assert_refused(await sent(body, time=now - 31), 401, "invalid-signature")
    assert_refused(await sent(body, {"X-Encrypted": "v=AAAA"}), 401, "invalid-signature")
    twice = [("X-Encrypted", "v=AAAA"), ("X-Encrypted", "v=BBBB"), ("X-Time", str(now))]
    assert_refused(await nobody.post(hook.path, content=body, headers=twice), 400, "duplicate-header")
    told = await read_triggers(harness, hook.workflow_id)
    assert len(told) == 2
    assert "x-encrypted" not in told[0]["headers"]

    basic = await create_data_source(
        people.owner,
        {"type": "http-basic", "settings": {"username": "me"}, "secrets": {"password": "a password"}},
    )
    hook = await create_webhook(people.owner, {"verification": {"provider": "basic", "dataSource": basic}})
    answer = await nobody.post(hook.path, json={})
    assert_refused(answer, 401, "invalid-signature")
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    assert (await nobody.post(hook.path, json={}, auth=("me", "a password"))).status_code == 202
    assert "authorization" not in (await read_triggers(harness, hook.workflow_id))[0]["headers"]


async def test_anonymous_requests_are_limited_and_deduplicated_by_a_key(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    hook = await create_webhook(people.owner, ANYBODY)
    nobody = await harness.client()
    for headers in ({"Idempotency-Key": "mine"}, {"webhook-id": "msg_1"}):
        first, again = [await nobody.post(hook.path, json={"n": 1}, headers=headers) for _ in range(2)]
        assert again.json() == first.json()
        assert again.headers["Idempotent-Replayed"] == "true"
    assert_refused(
        await nobody.post(hook.path, json={"n": 2}, headers={"Idempotency-Key": "mine"}),
        422,
        "idempotency-mismatch",
    )
    answers = await asyncio.gather(*(nobody.post(hook.path, json={}) for _ in range(30)))
    shed = [answer for answer in answers if answer.status_code != 202]
    assert 10 <= len(shed) <= 15
    assert_refused(shed[0], 429, "rate-limited")
    assert len(await read_triggers(harness, hook.workflow_id)) == 2 + 30 - len(shed)


async def test_a_new_secret_counts_from_the_next_request_on(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = await create_webhook(people.owner, await signature_config(people.owner, "github"))
    push = BY_NAME["gh_push"].steps[0]
    assert (await send(harness, push, hook.path)).status_code == 202
    other = {
        "verification": {"provider": "github", "dataSource": await create_secret(people.owner, "another")}
    }
    await people.owner.api.put(f"{WORKFLOWS}/{hook.workflow_id}", json=webhook_graph(other))
    # The cached workflow would accept or refuse it wrongly: the cache must not decide.
    monkeypatch.setattr(workflow_cache, "CACHE_SECONDS", 60.0)
    unknown = dataclasses.replace(
        push, headers=[(name, value) for name, value in push.headers if name != b"X-GitHub-Delivery"]
    )
    assert_refused(await send(harness, unknown, hook.path), 401, "invalid-signature")
    await people.owner.api.put(
        f"{WORKFLOWS}/{hook.workflow_id}", json=webhook_graph(await signature_config(people.owner, "github"))
    )
    assert (await send(harness, unknown, hook.path)).status_code == 202
    assert len(await read_triggers(harness, hook.workflow_id)) == 2


async def test_requests_for_a_draft_are_kept_for_later(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    hook = await create_webhook(people.owner, await signature_config(people.owner, "github"))
    await people.owner.api.put(f"{WORKFLOWS}/{hook.workflow_id}/status", json={"status": "draft"})
    assert_refused(await send(harness, BY_NAME["gh_push"].steps[0], hook.path), 409, "workflow-not-active")
    ((delivery),) = await read_rows(harness, Delivery, workflow_id=hook.workflow_id)
    assert json.loads(delivery.payload)["body"]["ref"] == "refs/heads/main"
    await people.owner.api.put(f"{WORKFLOWS}/{hook.workflow_id}/status", json={"status": "active"})
    again = await people.owner.api.post(f"/api/v1/deliveries/{delivery.id}/redrive", json={})
    assert again.status_code == 201, again.text
    assert len(await read_triggers(harness, hook.workflow_id)) == 1


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_bodies_are_decoded_by_their_media_type(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    hook = await create_webhook(people.owner, ANYBODY)
    nobody = await harness.client()
    form = {"a": "1", "b": ["2", "3"]}
    for body, expected in (
        ({"json": [1]}, [1]),
        ({"data": form}, {"a": "1", "b": ["2", "3"]}),
        (
            {"data": {"a": "1"}, "files": {"f": ("x.bin", b"\0", "image/png")}},
            {"a": "1", "f": {"base64": "AA==", "contentType": "image/png", "filename": "x.bin"}},
        ),
        ({"content": "é".encode("latin-1"), "headers": {"Content-Type": "text/plain; charset=latin-1"}}, "é"),
        ({"content": b"<a/>", "headers": {"Content-Type": "application/xml"}}, "<a/>"),
        ({}, {}),
    ):
        response = await nobody.post(hook.path, **body)
        assert response.status_code == 202, response.text
        execution_id = response.json()["executionId"]
        ((data),) = await read_rows(harness, ExecutionData, execution_id=execution_id)
        assert json.loads(data.trigger)["body"] == expected
    headers = {"Content-Type": "text/plain"}
    assert_refused(await nobody.post(hook.path, content=b"a\0b", headers=headers), 400, "nul-character")
    deep = b"[" * 64 + b"]" * 64
    headers = {"Content-Type": "application/json"}
    assert_refused(await nobody.post(hook.path, content=deep, headers=headers), 400, "too-deep")


# ── large bodies ────────────────────────────────────────────────────────────────────────────────────────────


def large(**fields: Any) -> bytes:  # noqa: ANN401 - any JSON value
    """Return a JSON body of 300 kB and more."""
    return json.dumps({**fields, "fill": "é" * 150_000}, ensure_ascii=False, separators=(",", ":")).encode()


async def shown(person: UserClient, execution_id: str) -> dict[str, Any]:
    execution: dict[str, Any] = (await person.api.get(f"/api/v1/executions/{execution_id}")).json()
    return execution


async def test_a_large_body_is_a_blob_of_its_run(harness: GatewayHarness, people: OrganizationUsers) -> None:
    hook = await create_webhook(people.owner, WHEN_DONE, ANSWERS)
    nobody, api = await harness.client(), people.owner.api
    headers = {"Content-Type": "application/json", "Idempotency-Key": uuid4().hex}
    body = large(order=7)
    answer = await nobody.post(hook.path, content=body, headers=headers)
    assert (answer.status_code, answer.json()) == (201, {"order": 7})
    again = await nobody.post(hook.path, content=body, headers=headers)
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (201, "true")
    assert_refused(
        await nobody.post(hook.path, content=large(order=8), headers=headers), 422, "idempotency-mismatch"
    )

    (run,) = await read_rows(harness, Execution, workflow_id=hook.workflow_id)
    ((data),) = await read_rows(harness, ExecutionData, execution_id=run.id)
    assert len(data.trigger) < 2_000
    trigger = (await shown(people.owner, run.id))["trigger"]["data"]
    reference = trigger["body"]["$blob"]
    assert (trigger["method"], trigger["headers"]["content-type"]) == ("POST", "application/json")
    assert (reference["size"], reference["type"]) == (
        len(body),
        "application/json",
    )
    note = trigger["body"]["omitted"]
    assert (note["bytes"], note["reason"]) == (len(body), "too-large")
    kept = await api.get(note["url"])
    assert kept.json() == json.loads(body)
    expanded = (await api.get(f"/api/v1/executions/{run.id}?expand=blobs")).json()["trigger"]["data"]
    assert expanded == {**trigger, "body": json.loads(body)}

    (delivery,) = await read_rows(harness, Delivery, execution_id=run.id, outcome="accepted")
    redriven = await api.post(f"/api/v1/deliveries/{delivery.id}/redrive")
    assert redriven.status_code == 201, redriven.text
    redriven_id = redriven.json()["executionId"]
    own = (await shown(people.owner, redriven_id))["trigger"]["data"]["body"]["$blob"]
    assert own == reference
    await harness.gateway.blobs.delete_all([BlobOwner(run.organization_id, run.id)])
    assert (await api.get(f"/api/v1/executions/{run.id}/blobs/{reference['sha256']}")).status_code == 404
    assert (await api.get(f"/api/v1/executions/{redriven_id}/blobs/{own['sha256']}")).status_code == 200
    assert_refused(await api.post(f"/api/v1/deliveries/{delivery.id}/redrive"), 409, "not-redrivable")


async def test_a_body_may_be_as_large_as_its_trigger_says(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    """Its run gets the whole body, and may pass it on unchanged, although no node may output as much."""
    hook = await create_webhook(people.owner, {**WHEN_DONE, "maxBodyBytes": 25_000_000}, ANSWERS)
    nobody = await harness.client()
    headers = {"Content-Type": "application/json"}
    body = json.dumps({"order": 7, "fill": "x" * 10_500_000}).encode()
    answer = await nobody.post(hook.path, content=body, headers=headers)
    assert (answer.status_code, answer.json()) == (201, {"order": 7})
    narrow = await harness.with_settings(max_hook_bytes=1_000_000)
    too_large = await (await narrow.client()).post(hook.path, content=body, headers=headers)
    assert_refused(too_large, 413, "payload-too-large")
    assert "PILOTFLAME_MAX_HOOK_BYTES" in too_large.text


async def test_a_run_of_a_large_body_is_resumed_with_it_and_says_when_it_is_gone(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    missing = {"id": "step", "nodeId": "set", "config": {"values": {"x": "{{ trigger.body.missing }}"}}}
    hook = await create_webhook(people.owner, ANYBODY, missing)
    nobody, api = await harness.client(), people.owner.api
    headers = {"Content-Type": "application/json"}
    sent = (await nobody.post(hook.path, content=large(order=7), headers=headers)).json()["executionId"]
    assert await failure(people.owner, sent) == "node-error"
    letters = (await api.get(f"/api/v1/workflows/{hook.workflow_id}/dead-letters")).json()["deadLetters"]
    assert [one["given"]["body"]["omitted"]["reason"] for one in letters] == ["too-large"]
    resumed = (await api.post(f"/api/v1/executions/{sent}/resume")).json()["executionId"]
    assert await failure(people.owner, resumed) == "node-error"
    (run,) = await read_rows(harness, Execution, id=sent)
    await harness.gateway.blobs.delete_all([BlobOwner(run.organization_id, run.key_id)])
    resumed = (await api.post(f"/api/v1/executions/{resumed}/resume")).json()["executionId"]
    assert await failure(people.owner, resumed) == "value-lost"


async def failure(person: UserClient, execution_id: str) -> str:
    """Return the code of the error with which an execution ends."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            answer = await person.api.get(f"/api/v1/executions/{execution_id}/progress")
            if answer.json()["status"] in TERMINAL_STATUSES:
                code: str = answer.json()["error"]["code"]
                return code


async def test_a_body_that_looks_like_a_reference_is_data(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    hook = await create_webhook(people.owner, WHEN_DONE, ANSWERS)
    nobody = await harness.client()
    reference = {"$blob": {"sha256": "0" * 64, "size": 1}}
    answer = await nobody.post(hook.path, json={**reference, "order": 7})
    assert answer.json() == {"order": 7}
    assert [one["body"] for one in await read_triggers(harness, hook.workflow_id)] == [
        {**reference, "order": 7}
    ]


# ── the workflow's answer ───────────────────────────────────────────────────────────────────────────────────


async def test_the_workflow_answers_and_goes_on(harness: GatewayHarness, people: OrganizationUsers) -> None:
    hook = await create_webhook(people.owner, WHEN_DONE, ANSWERS, AFTERWARDS)
    nobody = await harness.client()
    headers = {"Idempotency-Key": "mine"}
    first = await nobody.post(hook.path, json={"order": 7}, headers=headers)
    again = await nobody.post(hook.path, json={"order": 7}, headers=headers)
    for answer in (first, again):
        assert (answer.status_code, answer.json()) == (201, {"order": 7})
        assert answer.headers["X-Order"] == "7"
        assert answer.headers["Location"] == "/orders/7"
        assert answer.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert again.headers["Idempotent-Replayed"] == "true"
    (run,) = await read_rows(harness, Execution, workflow_id=hook.workflow_id)
    assert run.ended_at is None
    (later,) = await read_rows(harness, SpanRow, execution_id=run.id, node_id="later")
    assert later.status == "waiting"


async def test_pages_of_a_workflow_are_sandboxed_and_set_no_cookies(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    page = {
        "id": "step",
        "nodeId": "webhook-response",
        "config": {
            "headers": {"Content-Type": "text/html"},
            "body": "<script>alert(1)</script>",
            "bodyType": "text",
        },
    }
    baking = {**page, "config": {"headers": {"Set-Cookie": "session=1"}}}
    empty = {**page, "config": {"status": 204, "body": "x"}}
    nobody = await harness.client()
    shown = await nobody.post((await create_webhook(people.owner, WHEN_DONE, page)).path, json={})
    cookie = await nobody.post((await create_webhook(people.owner, WHEN_DONE, baking)).path, json={})
    nothing = await nobody.post((await create_webhook(people.owner, WHEN_DONE, empty)).path, json={})
    assert (shown.headers["Content-Type"], shown.text) == ("text/html", "<script>alert(1)</script>")
    assert shown.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
    assert_refused(cookie, 500, "execution-failed")
    assert "Set-Cookie" not in cookie.headers
    assert (nothing.status_code, nothing.content) == (204, b"")


async def test_a_poll_returns_the_outcome_or_the_progress(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    silent = await create_webhook(people.owner, WHEN_DONE)
    slow = await create_webhook(
        people.owner, {**WHEN_DONE, "deadlineSeconds": 1}, {**AFTERWARDS, "id": "step"}
    )
    nobody = await harness.client()
    ended, going_on = await asyncio.gather(nobody.post(silent.path, json={}), nobody.post(slow.path, json={}))
    execution_id = ended.json()["executionId"]
    assert (ended.status_code, ended.json()) == (200, {"status": "completed", "executionId": execution_id})
    assert going_on.status_code == 202
    assert going_on.json()["status"] == "accepted"
    assert going_on.headers["Location"].endswith(going_on.json()["executionId"])


async def test_a_poll_is_answered_by_the_process_that_takes_over_the_run(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    """Simulate, in the rows, the death of the run's owner while the sender waits."""
    pause = {"id": "step", "nodeId": "wait", "config": {"seconds": 3600}}
    hook = await create_webhook(people.owner, WHEN_DONE, pause, {**ANSWERS, "id": "later"})
    nobody = await harness.client()
    waiting = asyncio.create_task(nobody.post(hook.path, json={"order": 1}))
    runs: list[Any] = []
    while not runs:
        await asyncio.sleep(0.01)
        runs = await read_rows(harness, Execution, workflow_id=hook.workflow_id, status="waiting")
    now = datetime.now(UTC)
    lost = update(Execution).where(col(Execution.id) == runs[0].id)
    held = {"status": "running", "lease_until": now, "due_at": None, "deadline_at": now + timedelta(hours=1)}
    over = update(SpanRow).where(col(SpanRow.execution_id) == runs[0].id, col(SpanRow.node_id) == "step")

    async def kill(connection: AsyncConnection) -> None:
        await connection.execute(lost.values(held))
        await connection.execute(over.values(wake_at=now))

    await harness.gateway.database.transaction(kill)
    assert (await harness.gateway.store.sweep(100)).requeued == 1
    await harness.gateway.broker.wake_workers()
    answer = await waiting
    assert (answer.status_code, answer.json()) == (201, {"order": 1})


@pytest.mark.every_database
async def test_a_deployment_that_sleeps_is_woken_and_answers_as_it_is_deployed(
    harness: GatewayHarness, people: OrganizationUsers, cluster: SimulatedCluster
) -> None:
    hook = await create_webhook(people.owner, WHEN_DONE, ANSWERS)
    nobody = await harness.client()
    await people.owner.api.post(f"{WORKFLOWS}/{hook.workflow_id}/deploy", json={})
    await people.owner.api.put(f"{WORKFLOWS}/{hook.workflow_id}", json=webhook_graph(None, ANSWERS))
    sleeping = update(Deployment).where(col(Deployment.workflow_id) == hook.workflow_id)
    values = {"replicas": 0, "stopped_reason": StoppedReason.IDLE, "observed": ObservedState.STOPPED}
    await harness.gateway.database.transaction(lambda connection: connection.execute(sleeping.values(values)))
    answer = await nobody.post(hook.path, json={"order": 7})
    assert (answer.status_code, answer.json()) == (201, {"order": 7})
    assert cluster.starts[hook.workflow_id] >= 1
    (run,) = await read_rows(harness, Execution, workflow_id=hook.workflow_id)
    assert run.assigned_deployment_id == hook.workflow_id


async def test_an_unawaited_answer_is_recorded(harness: GatewayHarness, people: OrganizationUsers) -> None:
    hook = await create_webhook(people.owner, ANYBODY, ANSWERS)
    nobody = await harness.client()
    execution_id = (await nobody.post(hook.path, json={"order": 1})).json()["executionId"]
    progress = await people.owner.api.get(f"/api/v1/executions/{execution_id}/progress")
    assert progress.json()["status"] == "completed"
    logs = await people.owner.api.get(f"/api/v1/executions/{execution_id}/logs")
    assert "No sender waits for this response" in logs.text


# ── queues ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "provider"), [("gh_push_to_enqueue", "github"), ("stripe_to_enqueue", "stripe")]
)
async def test_messages_of_providers_are_verified_and_known_again(
    harness: GatewayHarness, people: OrganizationUsers, name: str, provider: str
) -> None:
    config = await signature_config(people.owner, provider)
    start = {"id": "start", "nodeId": "queue-trigger", "config": config}
    workflow_id = await people.owner.create(nodes=[start, STEP], connections=[EDGE], status="active")
    made = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/trigger-token", json={})
    address = urlsplit(made.json()["urls"]["api"])
    target = f"{address.path}?{address.query}"
    case = BY_NAME[name]
    first, again = [await send(harness, case.steps[0], target) for _ in range(2)]
    assert (first.status_code, first.json()["trigger_type"]) == (201, "queue")
    assert again.json() == first.json()
    assert again.headers["Idempotent-Replayed"] == "true"
    expected = case.expected["enqueue"]
    (told,) = await read_triggers(harness, workflow_id)
    assert told["message"] == expected.get("by_the_letter", expected)["message"]

    nobody = await harness.client()
    assert_refused(await send(harness, case.steps[0], target, b"{}"), 401, "invalid-signature")
    assert_refused(await nobody.post(target, json={}), 401, "invalid-signature")
    batch = target.replace("/enqueue", "/enqueue-batch")
    assert_refused(await nobody.post(batch, json={"messages": [{"message": 1}]}), 401, "invalid-signature")
    with_key = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/enqueue", json={"message": 1})
    assert with_key.status_code == 201
