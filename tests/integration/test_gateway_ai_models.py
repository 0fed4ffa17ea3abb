"""Language models over HTTP: access, validation, tests with real calls, and keys that are never shown."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from ipaddress import ip_network
from typing import Any

import msgspec
import pytest
from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from engine.run_errors import NodeError
from engine.services import RunCaller
from execution.stored_data_sources import StoredDataSources
from execution.stored_models import StoredModels
from gateway.ai_models import model_access
from gateway.http import limits
from gateway.http.errors import ApiError
from models.ai_model import AiModel, AiSettings
from models.encryption import SecretVault
from tests.fakes.model_server import KEY, ModelFault, ScriptedAnswer, serve_models
from tests.integration.gateway_harness import (
    SECRET,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.test_gateway_data_sources import SOURCES

MODELS = "/api/v1/ai/models"
PROVIDER_KEYS = "/api/v1/ai/provider-keys"
PRICE = {"input": "0.25", "output": "2"}


async def create_provider(person: UserClient, url: str = "https://api.example.com/v1") -> str:
    body = {
        "name": f"Provider {url}",
        "type": "ai-provider",
        "settings": {"baseUrl": url},
        "secrets": {"key": KEY},
    }
    response = await person.api.post(SOURCES, json=body)
    assert response.status_code == 201, response.text
    source_id: str = response.json()["dataSourceId"]
    return source_id


async def create_model(person: UserClient, source_id: str, **fields: Any) -> str:  # noqa: ANN401 - any JSON value
    body = {"name": "Small", "vendorModelId": "scripted-1", "dataSourceId": source_id, **fields}
    response = await person.api.post(MODELS, json=body)
    assert response.status_code == 201, response.text
    model_id: str = response.json()["modelId"]
    return model_id


async def get_model(person: UserClient, model_id: str) -> dict[str, Any]:
    response = await person.api.get(f"{MODELS}/{model_id}")
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def stored_models(harness: GatewayHarness) -> StoredModels:
    """Return the models as a worker finds them."""
    database = harness.gateway.database
    return StoredModels(database, StoredDataSources(database, SecretVault(SECRET.encode(), [])))


def caller_of(person: UserClient) -> RunCaller:
    return RunCaller(person.user.organization_id, person.user.id, "wf_1", "exec_1", "exec_1")


async def test_a_model_is_registered_listed_changed_and_deleted(people: OrganizationUsers) -> None:
    source_id = await create_provider(people.owner)
    model_id = await create_model(people.owner, source_id, price=PRICE)
    found = await get_model(people.owner, model_id)
    assert found == {
        "id": model_id,
        "name": "Small",
        "type": "third-party",
        "provider": "openai-compatible",
        "vendorModelId": "scripted-1",
        "dataSourceId": source_id,
        "contextLength": None,
        "maxOutputTokens": None,
        "price": {**PRICE, "cacheRead": None, "cacheWrite": None},
        "limits": None,
        "capabilities": None,
        "testedAt": None,
        "blockedUntil": None,
        "isShared": False,
        "sharedWith": [],
        "organizationId": people.owner.user.organization_id,
        "ownerId": people.owner.user.id,
        "createdAt": found["createdAt"],
        "updatedAt": found["createdAt"],
    }
    for path in (MODELS, "/api/v1/models"):
        listed = (await people.owner.api.get(path)).json()
        assert listed == {"count": 1, "limit": 20, "offset": 0, "models": [found]}
    unchanged = await people.owner.api.put(f"{MODELS}/{model_id}", json=found)
    assert (unchanged.status_code, unchanged.json()) == (200, found)
    changes = {"name": "Tiny", "price": None, "limits": {"concurrency": 4}}
    changed = await people.owner.api.put(f"{MODELS}/{model_id}", json=changes)
    assert (changed.json()["name"], changed.json()["price"]) == ("Tiny", None)
    assert changed.json()["limits"] == {"requestsPerMinute": None, "tokensPerMinute": None, "concurrency": 4}
    assert (await people.owner.api.delete(f"{MODELS}/{model_id}")).status_code == 204
    assert_refused(await people.owner.api.get(f"{MODELS}/{model_id}"), 404, "not-found")


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"price": {"input": "a", "output": "1"}}, "price.input"),
        ({"price": {"input": 0.25, "output": "1"}}, "price.input"),
        ({"maxOutputTokens": 0}, "maxOutputTokens"),
        ({"limits": {"requestsPerMinute": 0}}, "limits.requestsPerMinute"),
        ({"provider": "echo"}, "provider"),
        ({"name": " "}, "name"),
        ({"dataSourceId": "ds_missing"}, "dataSourceId"),
    ],
)
async def test_invalid_fields_are_refused(
    people: OrganizationUsers, fields: dict[str, Any], path: str
) -> None:
    body = {
        "name": "Small",
        "vendorModelId": "m",
        "dataSourceId": await create_provider(people.owner),
        **fields,
    }
    response = await people.owner.api.post(MODELS, json=body)
    assert_refused(response, 422, "validation-failed")
    assert [problem["path"] for problem in response.json()["error"]["details"]] == [path]


async def test_the_data_source_of_a_model_is_a_provider_that_its_author_may_use(
    people: OrganizationUsers,
) -> None:
    source_id = await create_provider(people.owner)
    body = {"name": "Small", "vendorModelId": "m", "dataSourceId": source_id}
    assert_refused(await people.colleague.api.post(MODELS, json=body), 422, "validation-failed")
    other = {"name": "Key", "type": "http-bearer", "settings": {}, "secrets": {"token": "some-token"}}
    other_id = (await people.owner.api.post(SOURCES, json=other)).json()["dataSourceId"]
    refused = await people.owner.api.post(MODELS, json={**body, "dataSourceId": other_id})
    assert refused.json()["error"]["details"][0]["code"] == "wrong-data-source"


@pytest.mark.every_database
async def test_a_model_has_the_protocol_of_its_data_source(people: OrganizationUsers) -> None:
    settings = {"baseUrl": "https://api.anthropic.com/v1", "provider": "anthropic"}
    source = {"name": "Anthropic", "type": "ai-provider", "settings": settings, "secrets": {"key": KEY}}
    source_id = (await people.owner.api.post(SOURCES, json=source)).json()["dataSourceId"]
    model_id = await create_model(people.owner, source_id)
    assert (await get_model(people.owner, model_id))["provider"] == "anthropic"
    body = {"name": "Other", "vendorModelId": "m", "dataSourceId": source_id, "provider": "openai-compatible"}
    refused = await people.owner.api.post(MODELS, json=body)
    assert refused.json()["error"]["details"][0]["code"] == "wrong-provider"
    moved = {"dataSourceId": await create_provider(people.owner)}
    refused = await people.owner.api.put(f"{MODELS}/{model_id}", json=moved)
    assert refused.json()["error"]["details"][0]["code"] == "wrong-provider"


async def test_a_model_is_seen_and_used_by_its_owner_until_it_is_shared(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    model_id = await create_model(people.owner, await create_provider(people.owner), price=PRICE)
    models = stored_models(harness)
    for person in (people.colleague, people.stranger):
        assert_refused(await person.api.get(f"{MODELS}/{model_id}"), 404, "not-found")
        with pytest.raises(NodeError) as refused:
            await models.find(caller_of(person), model_id)
        assert refused.value.code == "model-not-found"
    await people.owner.api.put(f"{MODELS}/{model_id}", json={"isShared": True})
    assert (await get_model(people.colleague, model_id))["isShared"]
    assert_refused(
        await people.colleague.api.put(f"{MODELS}/{model_id}", json={"name": "Mine"}), 403, "not-owner"
    )
    # The model is the permission: its users need none for the data source.
    found = await models.find(caller_of(people.colleague), model_id)
    assert (found.key, found.base_url, found.vendor_model_id) == (
        KEY,
        "https://api.example.com/v1",
        "scripted-1",
    )
    with pytest.raises(NodeError):
        await models.find(caller_of(people.stranger), model_id)


@pytest.mark.every_database
async def test_a_model_is_used_by_the_users_that_it_is_shared_with(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    guest = people.colleague.user.id
    model_id = await create_model(people.owner, await create_provider(people.owner), sharedWith=[guest])
    shown = await get_model(people.colleague, model_id)
    assert shown["sharedWith"] == [guest]
    assert (await people.colleague.api.get(MODELS)).json()["models"] == [shown]
    assert (await stored_models(harness).find(caller_of(people.colleague), model_id)).key == KEY
    path = f"{MODELS}/{model_id}"
    assert_refused(await people.colleague.api.put(path, json={"sharedWith": []}), 403, "not-owner")
    unchanged = await people.owner.api.put(path, json=shown)
    assert (unchanged.status_code, unchanged.json()) == (200, shown)
    for user_id, code in ((people.stranger.user.id, "user-not-found"), (people.owner.user.id, "own-user")):
        refused = await people.owner.api.put(path, json={"sharedWith": [guest, user_id]})
        assert_refused(refused, 422, "validation-failed")
        assert [one["code"] for one in refused.json()["error"]["details"]] == [code]
    body = {"name": "Other", "vendorModelId": "m", "dataSourceId": shown["dataSourceId"]}
    refused = await people.owner.api.post(MODELS, json={**body, "sharedWith": [people.stranger.user.id]})
    assert_refused(refused, 422, "validation-failed")
    # Shared once more, it is the same share.
    again = await people.owner.api.put(path, json={"sharedWith": [guest, people.admin.user.id, guest]})
    assert set(again.json()["sharedWith"]) == {guest, people.admin.user.id}
    ended = await people.owner.api.put(path, json={"sharedWith": [people.admin.user.id]})
    assert ended.json()["sharedWith"] == [people.admin.user.id]
    assert_refused(await people.colleague.api.get(path), 404, "not-found")
    with pytest.raises(NodeError):
        await stored_models(harness).find(caller_of(people.colleague), model_id)
    assert (await people.owner.api.delete(path)).status_code == 204


async def test_a_model_that_workflows_name_is_taken_from_them_only_by_force(
    people: OrganizationUsers,
) -> None:
    shared = {"isShared": True, "sharedWith": [people.colleague.user.id]}
    model_id = await create_model(people.owner, await create_provider(people.owner), **shared)
    config = {"model": "echo", "prompt": "Hi", "fallbackModelIds": [model_id]}
    workflow_id = await people.owner.create(
        nodes=[{"id": "start", "nodeId": "manual"}, {"id": "ask", "nodeId": "llm", "config": config}],
        connections=[{"source": "start", "target": "ask"}],
    )
    path = f"{MODELS}/{model_id}"
    for response in (
        await people.owner.api.delete(path),
        await people.owner.api.put(path, json={"vendorModelId": "scripted-2"}),
        await people.owner.api.put(path, json={"isShared": False}),
    ):
        assert_refused(response, 409, "model-in-use")
        (problem,) = response.json()["error"]["details"]
        assert problem["path"] == f"workflows.{workflow_id}"
    # Nobody loses it by the end of a single share, since the whole organization may use it.
    for guests in ([], [people.colleague.user.id]):
        kept = await people.owner.api.put(path, json={"sharedWith": guests, "price": PRICE})
        assert kept.status_code == 200
    unshared = await people.owner.api.put(f"{path}?force=true", json={"isShared": False})
    assert (unshared.json()["isShared"], unshared.json()["sharedWith"]) == (False, shared["sharedWith"])
    assert_refused(await people.owner.api.put(path, json={"sharedWith": []}), 409, "model-in-use")
    forced = await people.owner.api.put(f"{path}?force=true", json={"vendorModelId": "scripted-2"})
    assert forced.json()["vendorModelId"] == "scripted-2"
    assert (await people.owner.api.delete(f"{path}?force=true")).status_code == 204


SETTINGS = "/api/v1/ai/settings"
RUN = "/api/v1/workflows/{}/execute"


async def create_question(person: UserClient, model: str) -> str:
    config = {"model": model, "prompt": "Hi"}
    return await person.create(
        nodes=[{"id": "start", "nodeId": "manual"}, {"id": "ask", "nodeId": "llm", "config": config}],
        connections=[{"source": "start", "target": "ask"}],
    )


async def test_a_run_is_refused_if_its_user_may_not_use_its_models(people: OrganizationUsers) -> None:
    """Runs of `execute` have the rights of their caller, those of a queue the rights of the workflow's owner."""
    owner, colleague = people.owner, people.colleague
    model_id = await create_model(owner, await create_provider(owner))
    foreign = await create_model(people.stranger, await create_provider(people.stranger), isShared=True)
    agent = {"model": "echo", "prompt": "Hi"}
    target = {
        "node": {"type": "llm", "config": {"model": "echo", "prompt": "Hi", "fallbackModelIds": [model_id]}}
    }
    tool = {"name": "ask", "description": "d", "parameters": {"type": "object"}, "target": target}
    nodes = [
        {"id": "agent", "nodeId": "agent", "config": agent},
        {"id": "tool", "nodeId": "tool", "config": tool},
    ]
    connections = [
        {"source": "start", "target": "agent"},
        {"source": "tool", "target": "agent", "targetPort": "tools"},
    ]
    for author in (owner, colleague):
        path = "/api/v1/workflows/{}/{}"
        workflow_id, queue_id = [
            await author.create(
                nodes=[{"id": "start", "nodeId": trigger}, *nodes],
                connections=connections,
                status="active",
            )
            for trigger in ("manual", "queue-trigger")
        ]
        for made in (workflow_id, queue_id):
            shown = await author.api.put(path.format(made, "visibility"), json={"isPublic": True})
            assert shown.status_code == 200, shown.text
        batch: dict[str, Any] = {"messages": [{"data": {}}]}
        for caller in (owner, colleague):
            responses = [
                (caller, await caller.api.post(path.format(workflow_id, "execute"), json={})),
                (author, await caller.api.post(path.format(queue_id, "enqueue"), json={"data": {}})),
                (author, await caller.api.post(path.format(queue_id, "enqueue-batch"), json=batch)),
            ]
            for user, response in responses:
                if user is owner:
                    assert response.status_code == 201, response.text
                    continue
                assert_refused(response, 403, "model-not-usable")
                assert model_id in response.json()["error"]["message"]
                assert [one["path"] for one in response.json()["error"]["details"]] == ["nodes.tool"]
    # Only the nodes that run count, and models of other organizations are as absent ones.
    part = await colleague.api.post(path.format(workflow_id, "execute"), json={"upTo": "start"})
    assert part.status_code == 201, part.text
    tested = f"/api/v1/workflows/{await create_question(owner, model_id)}/nodes/ask/test"
    assert (await owner.api.post(tested, json={"wait": 0})).status_code == 202
    for absent in (foreign, "model_absent"):
        unknown = await create_question(owner, absent)
        assert_refused(await owner.api.post(RUN.format(unknown), json={}), 403, "model-not-usable")
        assert (await owner.api.post(f"/api/v1/workflows/{unknown}/validate")).status_code == 200
        # A node with a pinned output calls no model.
        pinned = await owner.api.post(RUN.format(unknown), json={"pinned": {"ask": {"response": "Hi"}}})
        assert pinned.status_code == 201, pinned.text


async def test_a_refusal_of_a_model_ends_with_a_change_of_the_workflow(people: OrganizationUsers) -> None:
    """The workflow that was refused is cached; its next run or message is judged by the stored one."""
    owner = people.owner
    ask = {"id": "ask", "nodeId": "llm", "config": {"model": "model_absent", "prompt": "Hi"}}
    path = "/api/v1/workflows/{}/{}"
    for trigger, action, body in (
        ("manual", "execute", {}),
        ("queue-trigger", "enqueue", {"data": {}}),
        ("queue-trigger", "enqueue-batch", {"messages": [{"data": {}}]}),
    ):
        workflow_id = await owner.create(
            nodes=[{"id": "start", "nodeId": trigger}, ask],
            connections=[{"source": "start", "target": "ask"}],
            status="active",
        )
        run = path.format(workflow_id, action)
        assert_refused(await owner.api.post(run, json=body), 403, "model-not-usable")
        corrected = {"config": {"model": "echo", "prompt": "Hi"}}
        changed = await owner.api.put(path.format(workflow_id, "nodes/ask"), json=corrected)
        assert changed.status_code == 200, changed.text
        assert (await owner.api.post(run, json=body)).status_code == 201, action


async def test_a_refusal_is_short_for_a_graph_with_more_models_than_a_statement_has_parameters(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    model_id = await create_model(people.owner, await create_provider(people.owner))
    models = {model_id: "own", **{f"model_{number}": f"node_{number}" for number in range(40_000)}}
    user = people.owner.user
    with pytest.raises(ApiError) as refused:
        await model_access.require_usable(
            harness.gateway.database, models, organization_id=user.organization_id, user_id=user.id
        )
    details = refused.value.details
    assert (refused.value.status, len(details), details[0]["path"]) == (403, 100, "nodes.node_0")
    assert "model_2 and 39,997 more:" in refused.value.message


@pytest.mark.parametrize("text", ["{{AI_MODEL_ID}}", "", "default"])
async def test_a_workflow_that_names_no_model_is_a_draft(people: OrganizationUsers, text: str) -> None:
    owner, workflow_id = people.owner, await create_question(people.owner, text)
    path = f"/api/v1/workflows/{workflow_id}"
    checked = (await owner.api.post(f"{path}/validate")).json()
    assert checked["valid"]
    assert [one["type"] for one in checked["warnings"]] == ["unresolved-model-placeholder"]
    for refused in (
        await owner.api.post(RUN.format(workflow_id), json={}),
        await owner.api.put(f"{path}/status", json={"status": "active"}),
        await owner.api.post(f"{path}/deploy"),
    ):
        assert_refused(refused, 422, "unresolved-model-placeholder")
        assert [one["path"] for one in refused.json()["error"]["details"]] == ["nodes.ask"]


@pytest.mark.every_database
async def test_the_default_model_is_one_that_all_may_use(people: OrganizationUsers) -> None:
    owner = people.owner
    model_id = await create_model(owner, await create_provider(owner))
    workflow_id = await create_question(owner, "default")
    foreign = await create_model(people.stranger, await create_provider(people.stranger), isShared=True)
    for given, code in ((model_id, "model-not-shared"), (foreign, "model-not-found")):
        refused = await people.admin.api.put(SETTINGS, json={"defaultModelId": given})
        assert refused.json()["error"]["details"][0]["code"] == code
    await owner.api.put(f"{MODELS}/{model_id}", json={"isShared": True})
    body = {"defaultModelId": model_id}
    assert_refused(await people.colleague.api.put(SETTINGS, json=body), 403, "admin-required")
    assert (await people.admin.api.put(SETTINGS, json=body)).json()["defaultModelId"] == model_id
    assert (await people.admin.api.put(SETTINGS, json={})).json()["defaultModelId"] == model_id
    # Of the same organization only.
    assert (await people.stranger.api.get(SETTINGS)).json()["defaultModelId"] is None
    for other, status in ((owner, 201), (people.stranger, 422)):
        its = workflow_id if other is owner else await create_question(other, "default")
        assert (await other.api.post(RUN.format(its), json={})).status_code == status
    scopes = await owner.api.post(f"/api/v1/workflows/{workflow_id}/compute-scopes")
    assert scopes.json()["scopes"] == [f"models:invoke:{model_id}"]
    for refused in (
        await owner.api.put(f"{MODELS}/{model_id}", json={"isShared": False}),
        await owner.api.delete(f"{MODELS}/{model_id}"),
    ):
        assert_refused(refused, 409, "model-in-use")
    before = await list_settings_entries(people.admin)
    assert (await owner.api.delete(f"{MODELS}/{model_id}?force=true")).status_code == 204
    assert (await owner.api.get(SETTINGS)).json()["defaultModelId"] is None
    entry, *others = await list_settings_entries(people.admin)
    assert (entry["userId"], entry["beforeHash"], others) == (owner.user.id, before[0]["afterHash"], before)
    refused = await owner.api.post(RUN.format(workflow_id), json={})
    assert_refused(refused, 422, "unresolved-model-placeholder")


async def list_settings_entries(admin: UserClient) -> list[dict[str, Any]]:
    """Return the audit entries of the settings for language models, the newest first."""
    response = await admin.api.get("/api/v1/audit?action=ai-settings.updated")
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["entries"]
    return found


async def wait_for_lock(harness: GatewayHarness, answering: asyncio.Task[Any]) -> None:
    """Wait until a request waits for a lock, or is answered; SQLite shows no locks, and admits one writer anyway."""
    database = harness.gateway.database
    while not answering.done():
        async with database.read() as connection:
            if connection.dialect.name != "postgresql":
                return
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            if await connection.scalar(text(waiting)):
                return
        await asyncio.sleep(0.01)


async def test_a_model_that_becomes_private_is_not_made_the_default_meanwhile(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner, admin, database = people.owner, people.admin, harness.gateway.database
    model_id = await create_model(owner, await create_provider(owner), isShared=True)
    answering: asyncio.Task[Any] | None = None

    async def unshare(connection: AsyncConnection) -> None:
        nonlocal answering
        model = (col(AiModel.id) == model_id, col(AiModel.is_shared))
        await connection.execute(update(AiModel).where(*model).values(is_shared=False, revision=9))
        put = admin.api.put(SETTINGS, json={"defaultModelId": model_id})
        answering = answering or asyncio.create_task(put)
        await wait_for_lock(harness, answering)

    await database.transaction(unshare)
    assert answering is not None
    assert_refused(await answering, 422, "validation-failed")
    assert (await owner.api.get(SETTINGS)).json()["defaultModelId"] is None


async def test_a_model_that_becomes_the_default_is_not_made_private_meanwhile(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner, admin, database = people.owner, people.admin, harness.gateway.database
    model_id = await create_model(owner, await create_provider(owner), isShared=True)
    assert (await admin.api.put(SETTINGS, json={"defaultModelId": "echo"})).status_code == 200
    answering: asyncio.Task[Any] | None = None

    async def choose(connection: AsyncConnection) -> None:
        nonlocal answering
        statement = select(col(AiModel.id)).where(col(AiModel.id) == model_id)
        assert await connection.scalar(statement.with_for_update(read=True)) is not None
        own = col(AiSettings.organization_id) == owner.user.organization_id
        await connection.execute(update(AiSettings).where(own).values(default_model_id=model_id))
        put = owner.api.put(f"{MODELS}/{model_id}", json={"isShared": False})
        answering = answering or asyncio.create_task(put)
        await wait_for_lock(harness, answering)

    await database.transaction(choose)
    assert answering is not None
    assert_refused(await answering, 409, "model-in-use")
    assert (await get_model(owner, model_id))["isShared"] is True


async def test_workflows_of_an_event_have_the_present_default_model(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    """A process that loaded them before another one has changed the settings reads them again."""
    owner = people.owner
    model_id = await create_model(owner, await create_provider(owner), isShared=True)
    assert (await people.admin.api.put(SETTINGS, json={"defaultModelId": "echo"})).status_code == 200
    workflow_id = await create_question(owner, "default")
    revision, named = 0, []
    for default in ("echo", model_id):
        assert (await people.admin.api.put(SETTINGS, json={"defaultModelId": default})).status_code == 200
        found = await harness.gateway.workflows.load_several(
            owner.user.organization_id, {workflow_id: revision}
        )
        revision = found[workflow_id].revision
        named.append(model_id in found[workflow_id].definition)
    assert named == [False, True]


async def test_a_data_source_of_models_is_deleted_only_by_force(people: OrganizationUsers) -> None:
    source_id = await create_provider(people.owner)
    hidden = await create_model(people.admin, source_id, name="Hidden")
    path = f"{SOURCES}/{source_id}"
    refused = await people.owner.api.delete(path)
    assert_refused(refused, 409, "data-source-in-use")
    assert refused.json()["error"].get("details", []) == []
    model_id = await create_model(people.owner, source_id)
    (problem,) = (await people.owner.api.delete(path)).json()["error"]["details"]
    assert (problem["path"], problem["message"]) == (f"models.{model_id}", "Small")
    assert (await people.owner.api.delete(f"{path}?force=true")).status_code == 204
    assert (await people.admin.api.get(f"{MODELS}/{hidden}")).status_code == 200


@pytest.mark.every_database
async def test_names_are_unique_and_creation_is_idempotent(people: OrganizationUsers) -> None:
    source_id = await create_provider(people.owner)
    body = {"name": "Small", "vendorModelId": "m", "dataSourceId": source_id}
    headers = {"Idempotency-Key": "once"}
    first, again = [await people.owner.api.post(MODELS, json=body, headers=headers) for _ in range(2)]
    assert first.json() == again.json()
    assert_refused(await people.owner.api.post(MODELS, json=body), 409, "model-name-taken")


async def test_a_test_stores_the_capabilities_of_a_model_until_its_vendor_model_changes(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_loopback(harness, monkeypatch)
    call = {"name": "report_city", "arguments": '{"city": "Oslo"}'}
    script = [
        ScriptedAnswer(),
        ScriptedAnswer(tool_calls=[call]),
        ScriptedAnswer('```json\n{"city": "Oslo"}\n```'),
        ScriptedAnswer("It is Purple."),
        ScriptedAnswer(tool_calls=[call, {**call, "arguments": '{"city": "Stockholm"}'}]),
    ]
    async with serve_models(*script) as served:
        model_id = await create_model(people.owner, await create_provider(people.owner, served.url))
        tested = (await people.owner.api.post(f"{MODELS}/{model_id}/test")).json()
    seen: dict[str, bool | None] = dict.fromkeys(
        ("tools", "jsonSchema", "streaming", "vision", "parallelTools"), True
    )
    seen["jsonMode"] = None  # It is not looked at if there is a better way.
    (shown,) = served.requests[3]["messages"]
    image = b64decode(shown["content"][1]["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert image.startswith(b"\x89PNG\r\n")
    assert (tested["ok"], tested["capabilities"]) == (True, seen)
    found = await get_model(people.owner, model_id)
    assert found["capabilities"] == seen
    assert found["testedAt"] is not None
    assert (await stored_models(harness).find(caller_of(people.owner), model_id)).follows_schemas
    changed = await people.owner.api.put(f"{MODELS}/{model_id}", json={"vendorModelId": "scripted-2"})
    assert changed.json()["capabilities"] is None


async def test_a_run_that_has_found_a_model_finds_it_again_until_the_lookup_expires(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_id = await create_provider(people.owner)
    model_id = await create_model(people.owner, source_id, sharedWith=[people.colleague.user.id])
    caller = caller_of(people.colleague)
    monkeypatch.setattr("execution.stored_models.CACHE_SECONDS", 3_600.0)
    lasting = stored_models(harness)
    monkeypatch.setattr("execution.stored_models.CACHE_SECONDS", 0.0)
    expiring = stored_models(harness)
    for models in (lasting, expiring):
        assert (await models.find(caller, model_id)).id == model_id
    await people.owner.api.put(f"{MODELS}/{model_id}", json={"sharedWith": []})
    assert (await lasting.find(caller, model_id)).id == model_id
    another_run = msgspec.structs.replace(caller, execution_id="exec_other")
    for models, run in ((lasting, another_run), (expiring, caller)):
        with pytest.raises(NodeError, match=model_id):
            await models.find(run, model_id)
    owner = caller_of(people.owner)
    assert (await lasting.find(owner, model_id)).blocked_seconds == 0
    await lasting.block(owner, model_id, 600)
    assert (await lasting.find(owner, model_id)).blocked_seconds > 0
    await people.owner.api.put(f"{MODELS}/{model_id}", json={"vendorModelId": "scripted-2"})
    assert (await lasting.find(owner, model_id)).blocked_seconds == 0, "a blocked model is not cached"


@pytest.mark.parametrize("mend", ["a test", "another model"])
async def test_a_rate_limit_ends_with_a_successful_test_and_with_another_model(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch, mend: str
) -> None:
    allow_loopback(harness, monkeypatch)
    async with serve_models() as served:
        model_id = await create_model(people.owner, await create_provider(people.owner, served.url))
        await stored_models(harness).block(caller_of(people.owner), model_id, 86_400)
        assert (await get_model(people.owner, model_id))["blockedUntil"] is not None
        if mend == "a test":
            tested = (await people.owner.api.post(f"{MODELS}/{model_id}/test")).json()
            assert tested["ok"], tested
        else:
            await people.owner.api.put(f"{MODELS}/{model_id}", json={"vendorModelId": "scripted-2"})
    assert (await get_model(people.owner, model_id))["blockedUntil"] is None
    assert (await stored_models(harness).find(caller_of(people.owner), model_id)).blocked_seconds == 0


async def test_a_limit_of_costs_that_can_not_be_kept_is_warned_of(people: OrganizationUsers) -> None:
    owner, limit = people.owner, {"maxCost": "1"}
    source_id = await create_provider(owner)
    free = await create_model(owner, source_id, name="Priced", price=PRICE)
    unpriced = await create_model(owner, source_id)
    ask: dict[str, Any] = {"prompt": "Hi", "model": free, "fallbackModelIds": [unpriced]}
    tool = {"name": "ask", "description": "d", "target": {"node": {"type": "llm", "config": ask}}}
    nodes = [
        {"id": "start", "nodeId": "manual"},
        {"id": "first", "nodeId": "llm", "config": {**ask, "budget": limit}},
        {"id": "second", "nodeId": "llm", "config": {**ask, "budget": {"maxTokens": 1}}},
        {"id": "agent", "nodeId": "agent", "config": {"prompt": "Hi", "budget": limit}},
        {"id": "model", "nodeId": "llm", "config": ask},
        {"id": "tool", "nodeId": "tool", "config": tool},
    ]
    connections = [
        {"source": "start", "target": "first"},
        {"source": "first", "target": "second"},
        {"source": "second", "target": "agent"},
        {"source": "model", "target": "agent", "targetPort": "ai"},
        {"source": "tool", "target": "agent", "targetPort": "tools"},
    ]
    workflow_id = await owner.create(nodes=nodes, connections=connections)
    path = f"/api/v1/workflows/{workflow_id}"

    async def list_unpriced(person: UserClient) -> list[str]:
        found = (await person.api.post(f"{path}/validate")).json()
        assert found["valid"], found
        unknown = [one for one in found["warnings"] if one["type"] == "model-price-unknown"]
        assert all(unpriced in one["message"] for one in unknown)
        return sorted(one["nodeId"] for one in unknown)

    assert await list_unpriced(owner) == ["first", "model", "tool"]
    budget = {"settings": {"aiBudget": limit}}
    assert (await owner.api.put(path, json=budget)).status_code == 200
    assert await list_unpriced(owner) == ["first", "model", "second", "tool"]
    assert (await owner.api.put(path, json={"settings": {}})).status_code == 200
    assert (await people.admin.api.put(SETTINGS, json={"monthBudget": limit})).status_code == 200
    assert await list_unpriced(owner) == ["first", "model", "second", "tool"]
    await owner.api.put(f"{MODELS}/{unpriced}", json={"price": PRICE})
    assert await list_unpriced(owner) == []


async def test_a_slow_ability_takes_no_time_of_the_others_and_is_named(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_loopback(harness, monkeypatch)
    monkeypatch.setattr(limits, "MODEL_TEST_SECONDS", 8)
    stalled, script = ScriptedAnswer(fault=ModelFault.STALL), [ScriptedAnswer('{"city": "Oslo"}')]
    async with serve_models() as served:
        served.on_request = lambda: served.script.__setitem__(
            slice(None), [stalled] if "tools" in served.requests[-1] else script
        )
        model_id = await create_model(people.owner, await create_provider(people.owner, served.url))
        earlier = {"tools": True, "jsonSchema": False, "streaming": None, "vision": True}
        await harness.gateway.database.transaction(
            lambda connection: connection.execute(
                update(AiModel).where(col(AiModel.id) == model_id).values(capabilities=earlier)
            )
        )
        tested = (await people.owner.api.post(f"{MODELS}/{model_id}/test")).json()
    assert (tested["ok"], len(served.requests)) == (True, 4)
    assert tested["message"] == "The model answers, but had no time to show: tools, parallelTools"
    seen: dict[str, bool | None] = {"jsonSchema": True, "streaming": True, "vision": False}
    seen |= dict.fromkeys(("tools", "parallelTools", "jsonMode"))
    assert tested["capabilities"] == seen
    found = (await get_model(people.owner, model_id))["capabilities"]
    assert found == {**seen, "tools": True}, "an earlier test has shown it"


async def test_a_test_shows_the_json_mode_of_a_provider_without_schemas(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_loopback(harness, monkeypatch)
    script = (ScriptedAnswer(), ScriptedAnswer(), ScriptedAnswer(), ScriptedAnswer('{"city": "Oslo"}'))
    async with serve_models(*script) as served:
        model_id = await create_model(people.owner, await create_provider(people.owner, served.url))
        tested = (await people.owner.api.post(f"{MODELS}/{model_id}/test")).json()
        found = await stored_models(harness).find(caller_of(people.owner), model_id)
    assert (tested["capabilities"]["jsonSchema"], tested["capabilities"]["jsonMode"]) == (False, True)
    assert (found.follows_schemas, found.has_json_mode) == (False, True)
    by_schema, in_json_mode = served.requests[2:4]
    assert by_schema["response_format"]["type"] == "json_schema"
    assert in_json_mode["response_format"] == {"type": "json_object"}
    assert "JSON Schema" in in_json_mode["messages"][0]["content"]


async def test_a_test_believes_answers_and_not_statuses(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_loopback(harness, monkeypatch)
    script = (
        ScriptedAnswer("I would look at the weather.", fault=ModelFault.NO_STREAM),
        *(ScriptedAnswer("Red."), ScriptedAnswer("Red.")),
        ScriptedAnswer(fault=ModelFault.SERVER_ERROR),
    )
    async with serve_models(*script) as served:
        model_id = await create_model(people.owner, await create_provider(people.owner, served.url))
        tested = (await people.owner.api.post(f"{MODELS}/{model_id}/test")).json()
    names = ("tools", "jsonSchema", "jsonMode", "streaming", "vision", "parallelTools")
    assert tested["capabilities"] == dict.fromkeys(names, False)


async def test_a_model_that_does_not_answer_is_a_result_without_the_key(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_loopback(harness, monkeypatch)
    async with serve_models(ScriptedAnswer(fault=ModelFault.REPEATS_KEY)) as served:
        model_id = await create_model(people.owner, await create_provider(people.owner, served.url))
        response = await people.owner.api.post(f"{MODELS}/{model_id}/test")
    assert (response.status_code, response.json()["ok"]) == (200, False)
    assert KEY not in response.text
    assert (await get_model(people.owner, model_id))["capabilities"] is None


async def test_a_provider_is_tested_by_its_list_of_models(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_models() as served:
        source_id = await create_provider(people.owner, served.url)
        refused = (await people.owner.api.post(f"{SOURCES}/{source_id}/test")).json()
        assert not refused["ok"]
        assert "allows this host alone with PILOTFLAME_MODEL_HOSTS" in refused["message"]
        allow_loopback(harness, monkeypatch)
        tested = (await people.owner.api.post(f"{SOURCES}/{source_id}/test")).json()
        assert (tested["ok"], tested["message"]) == (True, "The provider lists 2 models")
        listed = (await people.owner.api.post(f"{PROVIDER_KEYS}/{source_id}/test")).json()
    assert (listed["ok"], len(listed["models"])) == (True, 2)


@pytest.mark.every_database
async def test_a_provider_key_is_stored_listed_changed_and_deleted(people: OrganizationUsers) -> None:
    body = {"name": "Mine", "provider": "openai", "apiKey": KEY}
    created = await people.owner.api.post(PROVIDER_KEYS, json=body)
    assert created.status_code == 201, created.text
    key_id = created.json()["dataSourceId"]
    path = f"{PROVIDER_KEYS}/{key_id}"
    shown = await people.owner.api.get(path)
    found = shown.json()
    assert KEY not in shown.text
    expected = {"id": key_id, "provider": "openai", "baseUrl": "https://api.openai.com/v1", "hasKey": True}
    assert found.items() >= expected.items()
    source = (await people.owner.api.get(f"{SOURCES}/{key_id}")).json()
    assert (source["type"], source["settings"]["provider"]) == ("ai-provider", "openai-compatible")
    listed = (await people.owner.api.get(PROVIDER_KEYS)).json()
    assert listed == {"count": 1, "limit": 20, "offset": 0, "providerKeys": [found]}
    assert (await people.owner.api.put(path, json=found)).json() == found
    moved = {"baseUrl": "https://elsewhere.example.com/v1"}
    refused = await people.owner.api.put(path, json=moved)
    assert [problem["path"] for problem in refused.json()["error"]["details"]] == ["apiKey"]
    changed = (await people.owner.api.put(path, json={**moved, "apiKey": "another-key"})).json()
    assert (changed["provider"], changed["baseUrl"]) == ("openai-compatible", moved["baseUrl"])
    model_id = await create_model(people.owner, key_id)
    assert_refused(await people.owner.api.delete(path), 409, "data-source-in-use")
    assert (await people.owner.api.delete(f"{MODELS}/{model_id}")).status_code == 204
    assert (await people.owner.api.delete(path)).status_code == 204


@pytest.mark.parametrize(
    "host", ["models.example.com", "10.0.0.5:8000", "127.0.0.1:8000", "[::1]", "localhost"]
)
async def test_a_key_that_leaves_the_machine_without_tls_gets_a_warning(
    people: OrganizationUsers, host: str
) -> None:
    api, url, is_local = people.owner.api, f"http://{host}/v1", host[0] in "[l" or host.startswith("127.")
    source = {"type": "ai-provider", "settings": {"baseUrl": url}, "secrets": {"key": KEY}}
    for path, field, body in (
        (PROVIDER_KEYS, "baseUrl", {"provider": "openai-compatible", "baseUrl": url, "apiKey": KEY}),
        (SOURCES, "settings.baseUrl", source),
        ("/api/v1/ai/tool-servers", "url", {"url": url, "apiKey": KEY}),
    ):
        created = await api.post(path, json={"name": f"A key at {path}", **body})
        assert created.status_code == 201, created.text
        changed = await api.put(
            f"{path}/{created.json()['dataSourceId']}", json={"name": f"Another at {path}"}
        )
        for answer in (created.json(), changed.json()):
            warnings = [(one["path"], one["code"]) for one in answer.get("warnings", ())]
            assert warnings == ([] if is_local else [(field, "key-without-tls")])
    keyless = await api.post(SOURCES, json={"name": "No key", **source, "secrets": {}})
    assert "warnings" not in keyless.json()
    secure = {**source, "settings": {"baseUrl": url.replace("http", "https")}}
    assert "warnings" not in (await api.post(SOURCES, json={"name": "Secure", **secure})).json()


async def test_a_data_source_of_another_type_is_no_provider_key(people: OrganizationUsers) -> None:
    other = {"name": "Key", "type": "http-bearer", "settings": {}, "secrets": {"token": "some-token"}}
    path = f"{PROVIDER_KEYS}/{(await people.owner.api.post(SOURCES, json=other)).json()['dataSourceId']}"
    for response in (
        await people.owner.api.get(path),
        await people.owner.api.put(path, json={"name": "Mine"}),
        await people.owner.api.delete(path),
        await people.owner.api.post(f"{path}/test"),
    ):
        assert_refused(response, 404, "not-found")


@pytest.mark.parametrize(
    "fields",
    [
        {"provider": "openai-compatible"},
        {"provider": "openai", "baseUrl": "https://elsewhere.example.com/v1"},
    ],
)
async def test_a_provider_key_has_the_address_of_its_provider(
    people: OrganizationUsers, fields: dict[str, Any]
) -> None:
    refused = await people.owner.api.post(PROVIDER_KEYS, json={"name": "Mine", "apiKey": KEY, **fields})
    assert_refused(refused, 422, "validation-failed")
    assert [problem["path"] for problem in refused.json()["error"]["details"]] == ["baseUrl"]


@pytest.mark.every_database
async def test_a_repeated_creation_with_another_key_is_refused(people: OrganizationUsers) -> None:
    headers, body = {"Idempotency-Key": "once"}, {"name": "Mine", "provider": "anthropic", "apiKey": KEY}
    first, again = [await people.owner.api.post(PROVIDER_KEYS, json=body, headers=headers) for _ in range(2)]
    assert first.json() == again.json()
    other = {**body, "apiKey": "another-key"}
    refused = await people.owner.api.post(PROVIDER_KEYS, json=other, headers=headers)
    assert_refused(refused, 422, "idempotency-mismatch")


async def test_another_address_of_a_provider_needs_its_key_again(people: OrganizationUsers) -> None:
    source_id = await create_provider(people.owner)
    moved = {"settings": {"baseUrl": "https://elsewhere.example.com/v1"}}
    refused = await people.owner.api.put(f"{SOURCES}/{source_id}", json=moved)
    assert_refused(refused, 422, "validation-failed")


def allow_loopback(harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests of data sources and models reach servers on this machine, until the end of a test."""
    settings = harness.gateway.settings.model_copy(
        update={"outbound_allowed_networks": (ip_network("127.0.0.1/32"),)}
    )
    monkeypatch.setattr(harness.gateway.probes, "_settings", settings)
    monkeypatch.setattr(harness.gateway.model_prober, "_settings", settings)
